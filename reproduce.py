"""Every table and figure of OOO (arXiv 2310.08558) as runs of this repository's scripts, on one machine or a cluster.

    python reproduce.py table2 --seeds 5                      # all that Table 2 needs; `python report.py runs` shows it
    python reproduce.py table2 --seeds 5 --dry-run            # the same as plain commands, to be run by hand
    python reproduce.py table1 --only pen-binary-v0 --algorithms iql iql_ooo --scale 0.01
    python reproduce.py table2 --preset small --algorithms iql iql_ooo   # minutes a run; mazes, hammer and pen
    python reproduce.py smoke                                 # every algorithm and ablation at tiny scale
    python reproduce.py table3 --address auto                 # on the Ray cluster that this machine belongs to
    python reproduce.py table2 -- --device cuda               # what follows -- is added to every training command
    python reproduce.py figure6                               # the reduced data sets and environments; no training

Needs requirements-reproduce.txt, except for --dry-run and figure6. As many runs at once as --cpus-per-run and
--gpus-per-run leave room for. A finished run is skipped, an unfinished one continued, one whose process or node dies
retried, always with the scripts' own --resume. Ctrl-C leaves everything resumable: give the same command again. On a
cluster, all machines must see this folder, the run directories and the datasets under the same paths (a shared file
system).

How the paper's items become runs:
 1. One online run serves all its retraining times and policies: `iql_ooo` gives IQL + RND and OOO (IQL) of Tables 1
    and 2 and the data of the ablations, which repeat only the retraining (--exploit-only).
 2. `iql`, `calql` and `rlpd` are the methods without bonus; no exploitation policy is trained on their data.
 3. Figures 8, 9 and 10 are the learning curves of Tables 1, 2 and 3. Figures 3, 5, 7 and 13 have the tasks that the
    paper names (of figure 3 it names those of the left half; the right half gets the same). Of figures 4, 11, 12 and
    14 they are not stated: all tasks of the method (--only narrows it).
"""

import difflib
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent

# === what the paper's tables and figures consist of ===
ADROIT = ("pen-binary-v0", "door-binary-v0", "relocate-binary-v0")
KITCHEN = ("kitchen-partial-v0", "kitchen-mixed-v0", "kitchen-complete-v0")
ANTMAZE, MAZE2D = "antmaze-goal-missing-large-v2", "maze2d-missing-data-large-v1"
HARD = (ANTMAZE, MAZE2D, "hammer-truncated-expert-v1")
LOCOMOTION = ("ant-sparse-v2", "halfcheetah-sparse-v2")
POINTMASS = ("point-mass-wall",)


@dataclass(frozen=True)
class Algorithm:
    """A script with flags; its name is the run's --exp-name. source: the algorithm whose data it retrains on."""

    script: str
    flags: tuple[str, ...] = ()
    source: str | None = None


ALGORITHMS = {
    "iql_ooo": Algorithm("iql_ooo.py"),
    "iql": Algorithm("iql_ooo.py", ("--intrinsic-reward-scale", "0", "--retrain-at")),
    "td3_rnd": Algorithm("td3_rnd.py"),
    "pex": Algorithm("pex.py"),
    "calql_ooo": Algorithm("calql_ooo.py"),
    "calql": Algorithm("calql_ooo.py", ("--intrinsic-reward-scale", "0", "--retrain-at")),
    "original": Algorithm(
        "calql_ooo.py", ("--intrinsic-reward-scale", "0", "--no-bound-uniform-actions", "--retrain-at")),
    "rlpd_ooo": Algorithm("rlpd_ooo.py"),
    "rlpd": Algorithm("rlpd_ooo.py", ("--intrinsic-reward-scale", "0", "--retrain-at")),
    "pointmass_didactic": Algorithm("pointmass_didactic.py"),
    "frozen_rnd": Algorithm("iql_ooo.py", ("--retrain-frozen-rnd",), source="iql_ooo"),
    "ooo_td3": Algorithm("iql_ooo.py", ("--retrain-algorithm", "td3"), source="iql_ooo"),
    "no_up": Algorithm("iql_ooo.py", ("--retrain-upsample", "0"), source="iql_ooo"),
    "rlpd_no_up": Algorithm("rlpd_ooo.py", ("--retrain-upsample", "0"), source="rlpd_ooo"),
    "warm": Algorithm("iql_ooo.py", ("--warm-start",), source="iql_ooo"),
    "sync": Algorithm("iql_ooo.py", ("--sync",)),
}
BASELINES = ("td3_rnd", "pex")
IQL_PAIR, CALQL_PAIR = ("iql", "iql_ooo"), ("calql", "calql_ooo")

# Of each table or figure: the tasks, and the algorithms on them.
TARGETS = {
    "table1": [(ADROIT + KITCHEN, BASELINES + CALQL_PAIR + IQL_PAIR)],
    "table2": [(HARD, BASELINES + CALQL_PAIR + IQL_PAIR)],
    "table3": [(LOCOMOTION, ("rlpd", "rlpd_ooo"))],
    "figure2": [(POINTMASS, ("pointmass_didactic",))],
    "figure3": [((ANTMAZE, "relocate-binary-v0"), ("iql_ooo", "frozen_rnd"))],
    "figure4": [(ADROIT + KITCHEN + HARD, IQL_PAIR)],
    "figure5": [((ANTMAZE, "relocate-binary-v0"), ("iql_ooo", "ooo_td3"))],
    "figure6": [],  # no runs: tools/figure6.py draws the data
    "figure7": [(KITCHEN, ("calql", "original"))],
    "figure8": [(ADROIT + KITCHEN, BASELINES + CALQL_PAIR + IQL_PAIR)],
    "figure9": [(HARD, BASELINES + CALQL_PAIR + IQL_PAIR)],
    "figure10": [(LOCOMOTION, ("rlpd", "rlpd_ooo"))],
    "figure11": [(LOCOMOTION, ("rlpd_ooo", "rlpd_no_up")), (KITCHEN + (ANTMAZE, MAZE2D), ("iql_ooo", "no_up"))],
    "figure12": [(ADROIT + KITCHEN + HARD, IQL_PAIR)],
    "figure13": [((ANTMAZE,), ("iql_ooo", "warm"))],
    "figure14": [(ADROIT + KITCHEN + HARD, ("iql_ooo", "sync"))],
}
# Everything at tiny scale: one task each, so that it ends within minutes.
TARGETS["smoke"] = [
    ((MAZE2D,), tuple(k for k, x in ALGORITHMS.items() if x.script not in ("rlpd_ooo.py", "pointmass_didactic.py"))),
    (LOCOMOTION[1:], ("rlpd_ooo", "rlpd", "rlpd_no_up")),
    (POINTMASS, ("pointmass_didactic",)),
]
_TINY = "--hidden-dims 16 16 --batch-size 16 --online-steps 1000 --eval-every 1000 --eval-episodes 1 --log-every 30 " \
        "--checkpoint-every 250 --matmul-precision highest"
_TINY_OOO = _TINY + " --rnd-hidden-dims 16 16 --retrain-at 1000 --retrain-steps 60"
SMOKE = {
    "iql_ooo.py": _TINY_OOO + " --offline-steps 60",
    "calql_ooo.py": _TINY_OOO + " --offline-steps 60 --critic-hidden-dims 16 16",
    "rlpd_ooo.py": _TINY_OOO + " --learning-starts 100 --num-qs 2 --utd-ratio 1",
    "td3_rnd.py": _TINY + " --rnd-hidden-dims 16 16 --save-at 1000",
    "pex.py": _TINY + " --offline-steps 60 --learning-starts 100 --save-at 1000",
    "pointmass_didactic.py": "--offline-steps 40 --online-steps 60 --retrain-steps 40 --eval-every 60 "
                             "--eval-episodes 5 --log-every 20 --checkpoint-every 20",
}

# --preset small: minutes of one core a run of the IQL family, the same settings for every method. Chosen on seeds from
# 101 on (docs/results.md).
SMALL = {  # task: data ("": D4RL's; tools/collect_pointmaze.py), steps of pretraining, online, retraining, evaluations
    "maze2d-missing-data-umaze-v1": ("ooo/pointmaze/umaze-v0", 2_000, 4_000, 6_000, 1_000),
    "maze2d-missing-data-medium-v1": ("ooo/pointmaze/medium-v0", 3_000, 10_000, 12_000, 2_000),
    MAZE2D: ("ooo/pointmaze/large-v0:420", 4_000, 60_000, 40_000, 10_000),  # 420 episodes: about 100,000 steps
    "hammer-truncated-expert-v1": ("", 20_000, 20_000, 20_000, 4_000),
    "pen-binary-v0": ("", 4_000, 12_000, 12_000, 2_000),
}
SMALL_TARGETS = {"table2": [(tuple(SMALL), BASELINES + IQL_PAIR)]}


def small(env_id, algorithm):
    """Flags of --preset small for a run of iql_ooo.py, td3_rnd.py or pex.py."""
    (data, offline, online, retrain, every), script = SMALL[env_id], ALGORITHMS[algorithm].script
    flags = f"--hidden-dims 128 128 --learning-rate 1e-3 --tau 0.02 --online-steps {online} --eval-every {every} " \
            "--eval-episodes 20 --log-every 500 --checkpoint-every 2000"
    flags += f" --dataset-id {data}" if data else ""
    flags += " --learning-starts 1000" if script == "pex.py" else " --rnd-hidden-dims 256 256"
    flags += "" if script == "td3_rnd.py" else f" --offline-steps {offline}"
    flags += f" --save-at {online}" if script != "iql_ooo.py" else ""
    flags += f" --retrain-at {online} --retrain-steps {retrain}" if algorithm == "iql_ooo" else ""
    flags += " --retrain-reward-scale 0.01" if algorithm == "iql_ooo" and env_id.startswith("hammer") else ""
    return flags.split()


@dataclass
class Run:
    """One command. name: its run directory's; source: the name of the run whose data it needs, or None."""

    name: str
    algorithm: str
    env_id: str
    seed: int
    command: list[str]
    source: str | None = None


@dataclass
class Args:
    target: str
    """table1 to table3, figure2 to figure14, or smoke."""
    seeds: int = 5
    """Seeds 1, 2, ... of each row."""
    only: tuple[str, ...] = ()
    """Tasks; default: all of the target."""
    algorithms: tuple[str, ...] = ()
    """Names as in --dry-run's --exp-name (iql, iql_ooo, ...); default: all of the target."""
    preset: Literal["paper", "small"] = "paper"
    """Budgets and sizes: the paper's, or small ones for table2's IQL family (three mazes, hammer, pen)."""
    scale: float = 1.0
    """Multiplies every budget and interval of the scripts."""
    runs_dir: str = "runs"
    """Folder of the run directories; relative to the present one."""
    dry_run: bool = False
    """Print the commands and stop."""
    address: str = "local"
    """local, or the address of a Ray cluster (auto: the one that this machine belongs to)."""
    cpus_per_run: int = 1
    """CPU cores, and threads of torch, of a run."""
    gpus_per_run: float | None = None
    """Share of a GPU of a run (unset: a quarter where Ray sees GPUs, else 0)."""
    retries: int = 3
    """How often a run is continued after its process or node died."""


RANGES = dict(seeds=(1, 1000), scale=(1e-6, 1000), cpus_per_run=(1, 1024), gpus_per_run=(0, 64), retries=(0, 1000))


def parse_args(argv=None):
    """(Args, flags after --)."""
    import tyro

    argv = sys.argv[1:] if argv is None else list(argv)
    argv, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = tyro.cli(Args, args=argv, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    if args.target not in TARGETS:
        nearest(args.target, list(TARGETS), "target")
    if args.target not in targets(args):
        fail(f"--preset {args.preset} has {', '.join(targets(args))} only")
    tasks, algorithms = ({x: None for part in targets(args)[args.target] for x in part[i]} for i in (0, 1))
    for name in args.only:
        if name not in tasks:
            nearest(name, list(tasks), f"task of {args.target}")
    for name in args.algorithms:
        if name not in algorithms:
            nearest(name, list(algorithms), f"algorithm of {args.target}")
    check_ranges(args, RANGES)
    args.runs_dir = os.path.expanduser(args.runs_dir)
    return args, extra


def targets(args):
    return SMALL_TARGETS if args.preset == "small" else TARGETS


def expand(args, extra=()):
    """The runs of a target in an order in which each comes after its source; no run twice."""
    runs = {}
    for tasks, algorithms in targets(args)[args.target]:
        for env_id in tasks:
            for name in algorithms:
                if (not args.only or env_id in args.only) and (not args.algorithms or name in args.algorithms):
                    for seed in range(1, args.seeds + 1):
                        add_run(runs, args, extra, name, env_id, seed)
    if not runs and targets(args)[args.target]:
        fail(f"nothing is left of {args.target}: its --algorithms do not run on these tasks (--only)")
    return list(runs.values())


def add_run(runs, args, extra, algorithm, env_id, seed):
    """Put a run into runs {name: Run}, its source before it; returns its name."""
    what = ALGORITHMS[algorithm]
    if what.script == "pointmass_didactic.py":  # all seeds side by side in one run
        seed, seeds = 1, ["--num-seeds", str(args.seeds)]
    else:
        seeds = ["--seed", str(seed)]
    name = f"{env_id}__{algorithm}__{seed}"
    if name in runs:
        return name
    source, flags = None, list(what.flags)
    if what.source:
        source = add_run(runs, args, extra, what.source, env_id, seed)
        flags = ["--exploit-only", f"{args.runs_dir}/{source}", *flags]
    else:
        flags = ["--env-id", env_id, *seeds, *flags]
        if args.target == "smoke":
            tiny = shlex.split(SMOKE[what.script])
            at = tiny.index("--retrain-at") if "--retrain-at" in tiny and "--retrain-at" in what.flags else None
            flags += tiny if at is None else tiny[:at] + tiny[at + 2 :]
        flags += small(env_id, algorithm) if args.preset == "small" else []
        flags += ["--scale", f"{args.scale:g}"] if args.scale != 1 else []
        flags += extra
    flags += ["--exp-name", algorithm]
    flags += ["--runs-dir", args.runs_dir] if args.runs_dir != "runs" else []
    flags += ["--torch-threads", str(args.cpus_per_run)] if args.cpus_per_run != 1 else []
    runs[name] = Run(name, algorithm, env_id, seed, ["python", what.script, *flags], source)
    return name


def check_extra(args, runs, extra):
    """Exit 2 with one line unless every training command takes the flags after --, and is still the same run."""
    refused = {}  # {reason: scripts}
    trained = [run for run in runs if not run.source]  # a retraining takes over its source's settings
    for run in trained:
        output = io.StringIO()
        try:
            with redirect_stdout(output), redirect_stderr(output):
                script = load_script(run)
                parsed = script.parse_args(run.command[2:])
        except SystemExit:  # the script's own line, or a box of tyro's: its title, then what was wrong
            lines = [line.strip("╭╮╰╯│─+-| ") for line in output.getvalue().splitlines()]
            lines = [line for line in lines if line] or ["--help"]
            refused.setdefault(lines[min(1, len(lines) - 1)].removeprefix("error: "), set()).add(run.command[1])
            continue
        if (f"{parsed.env_id}__{parsed.exp_name}__{parsed.seed}", parsed.runs_dir) != (run.name, args.runs_dir):
            fail(f"{shlex.join(extra)} names a task, seed or folder; say that before -- (--only, --seeds, --runs-dir)")
    if refused:
        taken = sorted({run.command[1] for run in trained}.difference(*refused.values()))
        fail(f"{shlex.join(extra)} is refused: " + "; ".join(
            f"{', '.join(sorted(scripts))}: {reason}" for reason, scripts in refused.items())
            + (f"; {', '.join(taken)} would take it (--algorithms)" if taken else ""))


def load_script(run):
    """The script of a run as a module."""
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
    return importlib.import_module(Path(run.command[1]).stem)


# === what report.py and tools/ use too ===
def fail(message, code=2):
    """Say in one line on stderr what was wrong and what to do, and exit."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def nearest(name, names, what):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    fail(f"unknown {what} {name!r}; did you mean {near}? There are: {', '.join(names)}")


def check_ranges(args, ranges):
    """Exit 2 for a field of args outside ranges {name: (least, most)}; NaN lies outside of all, None is unset."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value:g} must be from {low:g} to {high:g}")


def read_records(path):
    """The records (dicts) of a .jsonl file. A last line that a killed run wrote by half is left out, with a word on
    stderr; ValueError, naming file and line, for damage elsewhere; OSError if the file cannot be read."""
    records, lines = [], Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError):  # TypeError: no dict
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged") from None
            if line:
                print(f"the last line of {path} was half written and is left out", file=sys.stderr)
    return records


def output_folder(folder, flag):
    """Path of a folder to write to, made if it is missing and tried; exit 2 where nothing can be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        fail(f"{flag} {folder}: nothing can be written there ({error.strerror}); choose another folder")
    return Path(folder)


def write_whole(path, content):
    """Write bytes so that at any moment the file is the old one or the new one, complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


class Lasting:
    """An output stream that may go away (| head, a closed terminal, a full disk): the rest is then dropped."""

    def __init__(self, stream):
        self.stream = stream

    def attempt(self, method, *args):
        try:
            return getattr(self.stream, method)(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text):
        return self.attempt("write", text)

    def flush(self):
        self.attempt("flush")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_main(main):
    """main() as a program: Ctrl-C and a disk that fails are one line (exit 130 and 1), lost output streams nothing."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    finally:
        sys.stdout.flush()


# === what the run directories say ===
def finished(run, runs_dir):
    """Whether the run is complete; exit 2 if its directory is damaged, a file, or holds a run with other settings."""
    path = Path(runs_dir) / run.name
    if not path.exists():
        return False
    try:
        saved = json.loads((path / "config.json").read_text())["args"]
        if not (path / "results.json").exists():
            return False
        json.loads((path / "results.json").read_text())
        script = load_script(run)
        wanted = json.loads(json.dumps(asdict(script.parse_args(run.command[2:]))))
        # FREE may change when a run is continued; what is auto was resolved at the start
        changed = [k for k, v in wanted.items() if k not in script.FREE and v not in ("auto", saved.get(k))]
    except FileNotFoundError:  # killed before its config was there
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is no readable run ({type(error).__name__}: {error}); move it away, or choose another --runs-dir")
    if changed:
        was = ", ".join(f"--{k.replace('_', '-')} was {saved.get(k)}, is {wanted[k]}" for k in changed)
        fail(f"{path} was made with other settings ({was}); move it away, or choose another --runs-dir")
    return True


def last_records(path, size=1 << 16):
    """The last JSON records of a file of lines, newest first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            yield json.loads(line)
        except ValueError:  # half a line
            continue


def progress(run, runs_dir):
    """dict of phase, share of the run's steps that are done, score, speed (steps/s) and seconds left, as far as they
    are known; speeds of different phases differ, so the time left is rough."""
    path, state, newest = Path(runs_dir) / run.name, {}, None
    try:
        config = json.loads((path / "config.json").read_text())
        settings = config["args"]
        for record in last_records(path / "metrics.jsonl"):
            newest = newest or record
            if "eval/normalized_score" in record or "eval/success_rate" in record:
                score = record.get("eval/normalized_score")
                state["score"] = 100 * record["eval/success_rate"] if score is None else score
                break
        for record in last_records(path / "timing.jsonl"):
            state["speed"] = record["charts/SPS"]
            break
        # Steps of all kinds count alike. Retrainings come after the online phase; with --sync, and in scripts that
        # write no run_id, when it has reached their t.
        after = "run_id" in config and not settings.get("sync")
        phase, t = newest["phase"], newest["env_step"]
        offline, retrain = settings.get("offline_steps", 0), settings.get("retrain_steps", 0)
        times = settings.get("retrain_at", [settings["online_steps"]] if retrain else [])
        explores = not settings.get("exploit_only")
        total = explores * (offline + settings["online_steps"]) + len(times) * retrain
        done = explores * (settings["online_steps"] if after and phase == "retrain" else t)
        done += sum(time < t for time in times) * retrain if phase == "retrain" or not after else 0
        done += newest["grad_step"] if phase in ("pretrain", "retrain") else 0
        done += offline if explores and phase != "pretrain" else 0
        state |= {"phase": phase, "done": min(1.0, done / max(total, 1))}
        if state.get("speed"):
            state["left"] = max(0, total - done) / state["speed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no records yet, or damaged ones, at which the script itself stops
    return state


# === one run, in a worker ===
def end_with_parent():
    """In the child: die when the worker does, so that no two processes ever write to one run (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def execute(command, folder, log, environment, retries, *sources):
    """Run a command with --resume until it ends by itself. Returns "" or the reason why it failed. sources: the return
    values of the runs that it needs."""
    if any(sources):
        return "the run whose data it needs failed"
    command = [sys.executable, str(ROOT / command[1]), *command[2:], "--resume"]
    try:
        for attempt in range(retries + 1):
            with open(log, "ab", buffering=0) as file:
                file.write(f"--- worker {os.getpid()}, attempt {attempt + 1}: {shlex.join(command[1:])}\n".encode())
                child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                         env={**os.environ, **environment}, preexec_fn=end_with_parent)
                try:
                    code = child.wait()
                except BaseException:  # cancelled
                    child.terminate()
                    child.wait()
                    raise
            if code >= 0:  # not killed by a signal: the script knew what it did
                break
        lines = Path(log).read_text(errors="replace").splitlines()
    except OSError as error:
        return f"{error.filename or log}: {error.strerror}"
    if code == 0:
        return ""
    return f"exit status {code}: {lines[-1] if lines else ''}"


# === all runs, in the driver ===
def run_all(args, runs):
    """Start what is not finished, show it until all is done; returns the number of runs that failed."""
    try:
        import ray
    except ImportError:
        fail("runs are started through Ray: pip install -r requirements-reproduce.txt, or use --dry-run's commands")
    folder, runs_dir = os.getcwd(), Path(args.runs_dir)
    states = {run.name: "finished before" if finished(run, runs_dir) else "waiting" for run in runs}
    todo = [run for run in runs if states[run.name] == "waiting"]
    if not todo:
        print(f"all {len(runs)} runs of {args.target} are finished in {runs_dir}")
        return 0
    logs = output_folder(runs_dir / "logs", "--runs-dir")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs beside anything else
    try:
        ray.init(address=args.address, include_dashboard=False if args.address == "local" else None,
                 log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        fail(f"--address {args.address}: Ray cannot connect ({str(error).splitlines()[0]})")
    have = ray.cluster_resources()
    gpus = args.gpus_per_run if args.gpus_per_run is not None else (0.25 if have.get("GPU") else 0)
    for kind, need in (("CPU", args.cpus_per_run), ("GPU", gpus)):
        if need > have.get(kind, 0):
            ray.shutdown()
            fail(f"a run needs {need:g} {kind} and Ray has {have.get(kind, 0):g}; lower --{kind.lower()}s-per-run")
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_run), "TQDM_DISABLE": "1"}
    environment |= {k: v for k, v in os.environ.items() if k in ("MINARI_DATASETS_PATH", "MUJOCO_GL")}
    remote = ray.remote(execute).options(num_cpus=args.cpus_per_run, num_gpus=gpus, max_retries=args.retries)
    tasks = {}
    for run in todo:
        sources = [tasks[run.source]] if run.source in tasks else []
        tasks[run.name] = remote.remote(run.command, folder, str(logs / f"{run.name}.txt"), environment, args.retries,
                                        *sources)
    try:
        watch(args, runs, states, tasks)
    except KeyboardInterrupt:
        for task in tasks.values():
            ray.cancel(task)
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=10)
        ray.shutdown()
        fail("interrupted; the same command continues every run from its last checkpoint", code=130)
    ray.shutdown()
    failed = [run for run in runs if states[run.name].startswith("failed")]
    for run in failed:
        print(f"{run.name} {states[run.name]} ({logs / run.name}.txt)", file=sys.stderr)
    return len(failed)


def watch(args, runs, states, tasks):
    """Keep states {name: text} up to date and show them, as a live table on a terminal, else a line per change."""
    import ray
    from rich.console import Console
    from rich.live import Live

    console, began = Console(), time.time()
    pending = {task: name for name, task in tasks.items()}
    with Live(console=console, refresh_per_second=1, transient=False) as live:
        while pending:
            done, _ = ray.wait(list(pending), timeout=1)
            changed = []
            for task in done:
                name = pending.pop(task)
                try:
                    reason = ray.get(task)
                except ray.exceptions.RayError as error:
                    reason = f"its worker died more than {args.retries} times ({type(error).__name__})"
                states[name] = f"failed: {reason}" if reason else "finished"
                changed.append(name)
            for name in pending.values():
                log = Path(args.runs_dir) / "logs" / f"{name}.txt"
                # A log from before is that of an earlier call.
                if states[name] == "waiting" and log.exists() and log.stat().st_mtime >= began:
                    states[name] = "running"
                    changed.append(name)
            if console.is_terminal:
                live.update(table(args, runs, states, console.height - 6))
            else:
                for name in changed:
                    print(f"{time.strftime('%H:%M:%S')}  {name}: {states[name]}", flush=True)


def table(args, runs, states, height):
    """The live table: what runs, what failed, and the rest in numbers."""
    from rich.table import Table

    count = {word: sum(s.startswith(word) for s in states.values())
             for word in ("finished", "running", "waiting", "failed")}
    head = ", ".join(f"{n} {word}" for word, n in count.items() if n)
    result = Table(title=f"{args.target}: {head}", title_justify="left")
    for column in ("run", "state", "done", "score", "steps/s", "left"):
        result.add_column(column, justify="left" if column in ("run", "state") else "right")
    order = ("running", "failed", "waiting", "finished")
    ordered = sorted(runs, key=lambda run: next(i for i, x in enumerate(order) if states[run.name].startswith(x)))
    for run in ordered[: max(height, 4)]:
        p = progress(run, args.runs_dir) if states[run.name] != "waiting" else {}
        state = states[run.name] if states[run.name] != "running" else p.get("phase", "starting")
        running = states[run.name] == "running"
        result.add_row(run.name, state, f"{p['done']:.0%}" if "done" in p else "",
                       f"{p['score']:.1f}" if "score" in p else "",
                       f"{p['speed']:.1f}" if running and "speed" in p else "",
                       f"{p['left'] / 3600:.1f} h" if running and "left" in p else "")
    return result


def main(argv=None):
    args, extra = parse_args(argv)
    if args.target == "figure6":
        command = ["python", "tools/figure6.py", "--out", f"{args.runs_dir}/figure6.png", *extra]
        runs = [Run("figure6", "", "", 1, command)]
    else:
        runs = expand(args, extra)
        if extra:
            check_extra(args, runs, extra)
    if args.dry_run:
        for run in runs:
            print(shlex.join(run.command))
        return
    if args.target == "figure6":
        output_folder(args.runs_dir, "--runs-dir")
        sys.exit(subprocess.call([sys.executable, str(ROOT / runs[0].command[1]), *runs[0].command[2:]]))
    if shutil.which("git") is None:
        print("git is not installed: the runs' records will not name the commit", file=sys.stderr)
    failed = run_all(args, runs)
    print(f"{len(runs) - failed} of {len(runs)} runs of {args.target} are finished; python report.py {args.runs_dir}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
