"""Every table and figure of OOO (arXiv 2310.08558), and this project's own study, as runs of the scripts.

    python reproduce.py table2 --seeds 5                      # all that Table 2 needs; `python report.py runs` shows it
    python reproduce.py table2 --seeds 5 --dry-run            # the same as plain commands, to be run by hand
    python reproduce.py table1 --only pen-binary-v0 --algorithms iql iql_ooo --scale 0.01
    python reproduce.py study --seeds 20 --only maze2d-missing-data-medium-v1      # does OOO work? With all controls
    python reproduce.py gates --seeds 3                       # is retraining on the offline data alone enough?
    python reproduce.py parity --seeds 8                      # beside curves of the authors' learner: tools/parity.py
    python reproduce.py table2 --preset small                 # minutes a run; mazes, hammer and pen
    python reproduce.py smoke                                 # every algorithm and ablation at tiny scale
    python reproduce.py table3 --address auto                 # on the Ray cluster that this machine belongs to
    python reproduce.py table2 -- --device cuda               # what follows -- is added to every training command
    python reproduce.py figure6                               # the reduced data sets and environments; no training

Needs requirements-reproduce.txt, except for --dry-run and figure6. As many runs at once as --cpus-per-run and
--gpus-per-run leave room for. A finished run (one with results.json) is skipped, an unfinished one continued, one whose
process or node dies retried, always with the scripts' own --resume. At Ctrl-C and SIGTERM every run saves a checkpoint
before it ends: give the same command again. On a cluster, all machines must see this folder, the run directories and
the datasets under the same paths (a shared file system).

How the paper's items become runs:
 1. One online run serves all its retraining times and policies: `iql_ooo` gives IQL + RND and OOO (IQL) of Tables 1
    and 2 and the data of the ablations, which repeat only the retraining (--exploit-only).
 2. `iql`, `calql`, `original` and `rlpd` are the methods without bonus. They have no retraining, and end where the
    paper's tables read them (Cal-QL of Table 1 at 250k), because only the last policy has a final evaluation.
 3. `iql_retrained` is `iql` with the retraining: IQL itself, and a policy retrained on IQL's data.
 4. Figures 8, 9 and 10 are the learning curves of Tables 1, 2 and 3. Figures 3, 5, 7 and 13 have the tasks that the
    paper names (of figure 3 it names those of the left half; the right half gets the same). Of figures 4, 11, 12 and
    14 they are not stated: all tasks of the method (--only narrows it).
 5. `study`: {data of IQL, data of IQL + RND} x {the policy that acted, a policy retrained on the data}, and controls:
    retraining on D_off alone, with the frozen bonus, without Q bounds, without upsampling, and IQL with as many
    updates in all as OOO. Settings are those of --preset small.
"""

import difflib
import importlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
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
UMAZE, MEDIUM = "maze2d-missing-data-umaze-v1", "maze2d-missing-data-medium-v1"  # not of the paper


@dataclass(frozen=True)
class Algorithm:
    """A script with flags; its name is the run's --exp-name. source: the algorithm whose data it retrains on."""

    script: str
    flags: str = ""
    source: str | None = None


NO_BONUS = "--intrinsic-reward-scale 0"
ALGORITHMS = {
    "iql_ooo": Algorithm("iql_ooo.py"),
    "iql": Algorithm("iql_ooo.py", f"{NO_BONUS} --retrain-at"),
    "iql_retrained": Algorithm("iql_ooo.py", NO_BONUS),
    "iql_equal_updates": Algorithm("iql_ooo.py", f"{NO_BONUS} --retrain-at --updates-per-step 3"),
    "rnd_equal_updates": Algorithm("iql_ooo.py", "--retrain-at --updates-per-step 3"),
    "offline_only": Algorithm("iql_ooo.py", "--offline-steps 0 --online-steps 0 --retrain-at 0"),
    "parity": Algorithm("iql_ooo.py", f"{NO_BONUS} --online-steps 0 --retrain-at"),
    "no_bootstrap": Algorithm("iql_ooo.py", f"{NO_BONUS} --online-steps 0 --retrain-at --no-bootstrap-at-cut"),
    "td3_rnd": Algorithm("td3_rnd.py"),
    "pex": Algorithm("pex.py"),
    "calql_ooo": Algorithm("calql_ooo.py"),
    "calql": Algorithm("calql_ooo.py", f"{NO_BONUS} --retrain-at"),
    "original": Algorithm("calql_ooo.py", f"{NO_BONUS} --no-bound-uniform-actions --retrain-at"),
    "rlpd_ooo": Algorithm("rlpd_ooo.py"),
    "rlpd": Algorithm("rlpd_ooo.py", f"{NO_BONUS} --retrain-at"),
    "pointmass_didactic": Algorithm("pointmass_didactic.py"),
    "frozen_rnd": Algorithm("iql_ooo.py", "--retrain-frozen-rnd", source="iql_ooo"),
    "no_bounds": Algorithm("iql_ooo.py", "--no-retrain-q-bounds", source="iql_ooo"),
    "ooo_td3": Algorithm("iql_ooo.py", "--retrain-algorithm td3", source="iql_ooo"),
    "no_up": Algorithm("iql_ooo.py", "--retrain-upsample 0", source="iql_ooo"),
    "rlpd_no_up": Algorithm("rlpd_ooo.py", "--retrain-upsample 0", source="rlpd_ooo"),
    "warm": Algorithm("iql_ooo.py", "--warm-start", source="iql_ooo"),
    "sync": Algorithm("iql_ooo.py", "--sync"),
}
BASELINES = ("td3_rnd", "pex")
IQL_PAIR, CALQL_PAIR = ("iql", "iql_ooo"), ("calql", "calql_ooo")
TWO_BY_TWO = ("iql_retrained", "iql_ooo", "offline_only")  # exploration and exploitation of both; D_off alone

GATES = ("pen-binary-v0", "hammer-truncated-expert-v1")
# Steps of three targets, which are neither the paper's nor the small preset's. large: a fifth of the paper's.
STEPS = {
    ("gates", GATES[0]): "--retrain-steps 300000 --eval-every 25000 --eval-episodes 50 --checkpoint-every 20000",
    ("gates", GATES[1]): "--retrain-steps 600000 --eval-every 50000 --eval-episodes 50 --checkpoint-every 20000",
    ("large", MAZE2D): "--offline-steps 100000 --online-steps 100000 --retrain-at 100000 --retrain-steps 400000 "
                       "--eval-every 20000 --eval-episodes 50 --checkpoint-every 5000 --log-every 1000",
    ("parity", GATES[0]): "--offline-steps 8000 --eval-every 4000 --log-every 4000 --compile on",
    ("parity", GATES[1]): "--offline-steps 12000 --eval-every 4000 --log-every 4000 --compile on",
}

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
    "figure11": [(LOCOMOTION, ("rlpd_ooo", "rlpd_no_up")), (KITCHEN + (ANTMAZE, MAZE2D), ("iql_ooo", "no_up"))],
    "figure12": [(ADROIT + KITCHEN + HARD, IQL_PAIR)],
    "figure13": [((ANTMAZE,), ("iql_ooo", "warm"))],
    "figure14": [(ADROIT + KITCHEN + HARD, ("iql_ooo", "sync"))],
    "study": [((MEDIUM,), (*TWO_BY_TWO, "frozen_rnd", "no_bounds", "no_up", "iql_equal_updates", "rnd_equal_updates")),
              ((UMAZE,), TWO_BY_TWO)],
    "large": [((MAZE2D,), ("iql_retrained", "iql_ooo"))],
    "gates": [(GATES, ("offline_only",))],
    "parity": [(GATES, ("parity",)), (GATES[1:], ("no_bootstrap",))],
}
TARGETS |= {"figure8": TARGETS["table1"], "figure9": TARGETS["table2"], "figure10": TARGETS["table3"]}
# Everything at tiny scale: one task each, so that it ends within minutes.
TARGETS["smoke"] = [
    ((MAZE2D,), tuple(name for name, x in ALGORITHMS.items() if name not in ("parity", "no_bootstrap")
                      and x.script not in ("rlpd_ooo.py", "pointmass_didactic.py"))),
    (LOCOMOTION[1:], ("rlpd_ooo", "rlpd", "rlpd_no_up")),
    (POINTMASS, ("pointmass_didactic",)),
]
_TINY = "--hidden-dims 16 16 --batch-size 16 --online-steps 1000 --eval-every 1000 --eval-episodes 1 --log-every 30 " \
        "--final-episodes 2 --checkpoint-every 250 --matmul-precision highest"
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

# --preset small: minutes of one core a run of the IQL family. Every arm of a task has the same settings.
SMALL = {  # task: data ("": the task's own); steps of pretraining; online steps; retraining steps for each of both
    UMAZE: ("ooo/pointmaze/umaze-v0", 2_000, 4_000, 2),
    MEDIUM: ("ooo/pointmaze/medium-100k-v0", 3_000, 20_000, 2),
    MAZE2D: ("ooo/pointmaze/large-v0:420", 4_000, 60_000, 2),  # 420 episodes: about 100,000 steps
    "hammer-truncated-expert-v1": ("", 20_000, 20_000, 3.6),
    "pen-binary-v0": ("", 4_000, 12_000, 2),
}
SMALL_TARGETS = {"table2": [(tuple(SMALL), BASELINES + TWO_BY_TWO)], "study": TARGETS["study"]}


def merged(*texts):
    """The flags of all texts as one list; of a flag that comes twice the last one counts."""
    flags = {}
    for word in shlex.split(" ".join(texts)):
        if word.startswith("--"):
            last = flags[word] = [word]
        else:
            last.append(word)
    return [word for words in flags.values() for word in words]


def small(env_id, algorithm):
    """Flags of --preset small for a run of iql_ooo.py, td3_rnd.py or pex.py."""
    (data, offline, online, ratio), script = SMALL[env_id], ALGORITHMS[algorithm].script
    flags = "--hidden-dims 128 128 --learning-rate 1e-3 --tau 0.02 --eval-episodes 20 --log-every 500 " \
            f"--checkpoint-every 2000 --online-steps {online} --eval-every {online // 5}"
    flags += f" --dataset-id {data}" if data else ""
    flags += " --learning-starts 1000" if script == "pex.py" else " --rnd-hidden-dims 256 256"
    flags += f" --retrain-at {online} --retrain-steps {round(ratio * (offline + online))}" if script == "iql_ooo.py" \
        else f" --save-at {online}"
    if algorithm.endswith("equal_updates"):
        offline *= 3
    flags += "" if script == "td3_rnd.py" else f" --offline-steps {offline}"
    return merged(flags, ALGORITHMS[algorithm].flags)


def table_time(env_id, algorithm):
    """Environment steps at which the paper's tables read a method."""
    if env_id in ADROIT + KITCHEN and ALGORITHMS[algorithm].script == "calql_ooo.py":
        return 250_000
    return (4_000_000 if env_id in KITCHEN else 1_000_000 if env_id in ADROIT + LOCOMOTION
            else 1_500_000 if env_id == ANTMAZE else 500_000)


def paper(env_id, algorithm, steps=""):
    """Flags of a row at the paper's settings; steps: flags of the target."""
    ends = env_id == ANTMAZE and algorithm == "iql" or algorithm in ("calql", "original")
    stop = f"--online-steps {table_time(env_id, algorithm)}" if ends else ""
    return merged(stop, ALGORITHMS[algorithm].flags, steps)


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
    """table1 to table3, figure2 to figure14, study, large, gates, parity, or smoke."""
    seeds: int = 5
    """Seeds 1, 2, ... of each row."""
    only: tuple[str, ...] = ()
    """Tasks; default: all of the target."""
    algorithms: tuple[str, ...] = ()
    """Names as in --dry-run's --exp-name (iql, iql_ooo, ...); default: all of the target."""
    preset: Literal["paper", "small"] = "paper"
    """Budgets and sizes: the paper's, or small ones for the IQL family (three mazes, hammer, pen; study: always)."""
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
            for seed in range(1, args.seeds + 1):  # a seed's arms together: what is complete can be compared
                for name in algorithms:
                    if (not args.only or env_id in args.only) and (not args.algorithms or name in args.algorithms):
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
    source = None
    if what.source:
        source = add_run(runs, args, extra, what.source, env_id, seed)
        flags = ["--exploit-only", f"{args.runs_dir}/{source}", *merged(what.flags)]
    else:
        flags = ["--env-id", env_id, *seeds]
        flags += (merged(SMOKE[what.script], what.flags) if args.target == "smoke"
                  else small(env_id, algorithm) if args.preset == "small" or args.target == "study"
                  else paper(env_id, algorithm, STEPS.get((args.target, env_id), "")))
        flags += ["--scale", f"{args.scale:g}"] if args.scale != 1 else []
        flags += extra
    flags += ["--exp-name", algorithm]
    flags += ["--runs-dir", args.runs_dir] if args.runs_dir != "runs" else []
    flags += ["--torch-threads", str(args.cpus_per_run)] if args.cpus_per_run != 1 else []
    runs[name] = Run(name, algorithm, env_id, seed, ["python", what.script, *flags], source)
    return name


def check_extra(args, runs, extra):
    """Exit 2, with the script's own line, unless every training command takes the flags after --, and is still the same
    run."""
    for run in (run for run in runs if not run.source):  # a retraining takes over its source's settings
        parsed = load_script(run).parse_args(run.command[2:])
        if (f"{parsed.env_id}__{parsed.exp_name}__{parsed.seed}", parsed.runs_dir) != (run.name, args.runs_dir):
            fail(f"{shlex.join(extra)} names a task, seed or folder; say that before -- (--only, --seeds, --runs-dir)")


def load_script(run):
    """The script of a run as a module."""
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
    return importlib.import_module(Path(run.command[1]).stem)


# === what report.py and tools/ use too ===
def script_of(config):
    """The script that made a run, as a module: a changed copy if it lies beside the project's scripts, else the one
    that was copied. Exit 2 if that does not know the run's task."""
    name = Path(shlex.split(config.get("command") or config["script"])[0]).stem
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
    script = importlib.import_module(name if (ROOT / f"{name}.py").exists() else config["script"])
    if config["args"]["env_id"] not in script.TASKS:
        fail(f"{script.__name__}.py has no task {config['args']['env_id']}; put its copy {name}.py beside it")
    return script


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


def expand_store():
    """MINARI_DATASETS_PATH as the scripts take it: ~ is the home folder, empty is as if it were not there."""
    if store := os.environ.pop("MINARI_DATASETS_PATH", ""):
        os.environ["MINARI_DATASETS_PATH"] = os.path.expanduser(store)


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
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # made here: a link of that name is not followed
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def run_main(main):
    """main() as a program: Ctrl-C and a disk that fails are one line (exit 130 and 1); | head is no fault."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        if not error.filename:  # of an output stream: what is left in it would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)


# === what the run directories say ===
def finished(run, runs_dir):
    """Whether the run is complete; exit 2 if its directory is damaged, a file, or holds a run with other settings."""
    path = Path(runs_dir) / run.name
    if not path.exists():
        return False
    try:
        config = json.loads((path / "config.json").read_text())
        if not (path / "results.json").exists():
            return False
        json.loads((path / "results.json").read_text())
        script, saved = load_script(run), config["args"]
        wanted = json.loads(json.dumps(asdict(script.parse_args(run.command[2:]))))
        # What is auto was resolved at the start; a source is known by its id, wherever it lies.
        changed = [k for k, v in wanted.items() if k not in script.MAY_CHANGE and v not in ("auto", saved.get(k))]
        source = json.loads((path.parent / run.source / "config.json").read_text())["run_id"] if run.source else None
    except FileNotFoundError:  # killed before its config was there
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is no readable run ({type(error).__name__}: {error}); move it away, or choose another --runs-dir")
    if changed:
        was = ", ".join(f"--{k.replace('_', '-')} was {saved.get(k)}, is {wanted[k]}" for k in changed)
        fail(f"{path} was made with other settings ({was}); move it away, or choose another --runs-dir")
    if source != config.get("source_run_id"):
        fail(f"{path} was retrained on the data of another run than {run.source}; move it away")
    return True


def last_record(path, size=1 << 16):
    """The last whole JSON record of a file of lines."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return json.loads(file.read().split(b"\n")[-2])


def progress(run, runs_dir):
    """dict of phase, share of the run's steps that are done and seconds left, as far as they are known; speeds of
    different phases differ, so the time left is rough."""
    path, state = Path(runs_dir) / run.name, {}
    try:
        settings = json.loads((path / "config.json").read_text())["args"]
        newest = last_record(path / "metrics.jsonl")
        # Steps of all kinds count alike. Retrainings come after the online phase, with --sync when it reaches their t.
        phase, t, sync = newest["phase"], newest["env_step"], settings.get("sync")
        offline, online = settings.get("offline_steps", 0), settings["online_steps"]
        retrain = settings.get("retrain_steps", 0)
        times = settings.get("retrain_at", [online] if retrain else [])
        done = sum(time < t for time in times) * retrain if phase == "retrain" or sync else 0
        if settings.get("exploit_only"):
            offline = online = t = 0
        done += newest["grad_step"] if phase in ("pretrain", "retrain") else 0
        done += 0 if phase == "pretrain" else offline + (online if phase == "retrain" and not sync else t)
        total = offline + online + len(times) * retrain
        state |= {"phase": phase, "done": min(1.0, done / max(total, 1))}
        state["left"] = max(0, total - done) / last_record(path / "timing.jsonl")["charts/SPS"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        pass  # no records yet, or damaged ones, at which the script itself stops
    return state


# === one run, in a worker ===
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                if hasattr(signal, name)]
SAVED = {128 + number for number in STOP_SIGNALS}  # exit status of a script that was stopped and has saved itself
SAVE_SECONDS = 15 * 60  # it may be in an evaluation


def end_with_parent():
    """In the child: die when the worker does, so that no two processes ever write to one run (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def execute(command, folder, log, stop, environment, retries, *sources):
    """Run a command with --resume until it ends by itself. Returns how: "finished", "stopped" (it saved itself and can
    be continued) or "failed: REASON". stop: a file; once it is there the run is asked to save and end. sources: what
    the runs whose data it needs returned."""
    if any(state != "finished" for state in sources):
        return "stopped" if "stopped" in sources else "failed: the run whose data it needs failed"
    command = [sys.executable, str(ROOT / command[1]), *command[2:], "--resume"]
    try:
        for attempt in range(retries + 1):
            if os.path.exists(stop):
                return "stopped"
            with open(log, "ab", buffering=0) as file:
                file.write(f"--- worker {os.getpid()}, attempt {attempt + 1}: {shlex.join(command[1:])}\n".encode())
                child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                         env={**os.environ, **environment}, preexec_fn=end_with_parent)
                asked = False
                while (code := child.poll()) is None:
                    if not asked and os.path.exists(stop):
                        child.terminate()
                        asked = True
                    time.sleep(0.1)
            if asked and code == -signal.SIGTERM or code in SAVED:  # the former: before the script was ready
                return "stopped"
            if code >= 0:  # not killed by a signal: the script knew what it did
                break
        lines = Path(log).read_text(errors="replace").splitlines()
    except OSError as error:
        return f"failed: {error.filename or log}: {error.strerror}"
    return f"failed: exit status {code}: {lines[-1] if lines else ''}" if code else "finished"


# === all runs, in the driver ===
def run_all(args, runs):
    """Start what is not finished and show it until all is done; returns {name of the run: how it ended}."""
    try:
        import ray
    except ImportError:
        fail("runs are started through Ray: pip install -r requirements-reproduce.txt, or use --dry-run's commands")
    folder, runs_dir = os.getcwd(), Path(args.runs_dir)
    states = {run.name: "finished before" if finished(run, runs_dir) else "waiting" for run in runs}
    todo = [run for run in runs if states[run.name] == "waiting"]
    if not todo:
        return states
    logs = output_folder(runs_dir / "logs", "--runs-dir").absolute()
    stop = logs / f"stop_{secrets.token_hex(4)}"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs beside anything else
    host, _, port = args.address.partition(":")
    try:
        if port.isdigit():  # Ray tries for many minutes to reach a machine that does not answer
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=args.address, include_dashboard=False if args.address == "local" else None,
                 log_to_driver=False, logging_level="ERROR")
        have = ray.cluster_resources()
    except Exception as error:  # Ray's are of many kinds
        fail(f"--address {args.address}: Ray cannot start or connect ({first_line(error)})", 1)
    gpus = args.gpus_per_run if args.gpus_per_run is not None else (0.25 if have.get("GPU") else 0)
    for kind, need in (("CPU", args.cpus_per_run), ("GPU", gpus)):
        if need > have.get(kind, 0):
            ray.shutdown()
            fail(f"a run needs {need:g} {kind} and Ray has {have.get(kind, 0):g}; lower --{kind.lower()}s-per-run")
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_run), "TQDM_DISABLE": "1"}
    environment |= {k: v for k, v in os.environ.items() if k in ("MINARI_DATASETS_PATH", "MUJOCO_GL")}
    tasks, signals = {}, []
    for number in STOP_SIGNALS[:3]:  # in place of Ray's own, which end the runs at once
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        remote = ray.remote(execute).options(num_cpus=args.cpus_per_run, num_gpus=gpus, max_retries=args.retries)
        for run in todo:
            sources = [tasks[run.source]] if run.source in tasks else []
            tasks[run.name] = remote.remote(run.command, folder, str(logs / f"{run.name}.txt"), str(stop), environment,
                                            args.retries, *sources)
        watch(args, runs, states, tasks, stop, signals)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        fail(f"Ray failed ({first_line(error)}); the same command continues every run", 1)
    finally:
        stop.unlink(missing_ok=True)
        ray.shutdown()
    if signals:
        fail("interrupted; the same command continues every run from its last checkpoint", 128 + signals[0])
    for run in runs:
        if states[run.name].startswith(("failed", "stopped")):
            print(f"{run.name} {states[run.name]} ({logs / run.name}.txt)", file=sys.stderr)
    return states


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def watch(args, runs, states, tasks, stop, signals):
    """Keep states {name: text} up to date and show them, as a live table on a terminal, else a line per change, until
    all runs have ended. At the first signal they are asked to save themselves; a second one ends this at once."""
    import ray
    from rich.console import Console
    from rich.live import Live

    console, began, end = Console(), time.time(), float("inf")
    pending = {task: name for name, task in tasks.items()}
    with Live(console=console, refresh_per_second=1, transient=False) as live:
        while pending and len(signals) < 2 and time.time() < end:
            if signals and not stop.exists():
                stop.touch()
                end = time.time() + SAVE_SECONDS
                print(f"stopping: every run saves a checkpoint, in at most {SAVE_SECONDS // 60} minutes; a second "
                      "Ctrl-C ends them at once", file=sys.stderr, flush=True)
            done, _ = ray.wait(list(pending), timeout=1)
            changed = []
            for task in done:
                name = pending.pop(task)
                try:
                    states[name] = ray.get(task)
                except ray.exceptions.RayError as error:
                    states[name] = f"failed: its worker died more than {args.retries} times ({first_line(error)})"
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
             for word in ("finished", "running", "waiting", "stopped", "failed")}
    head = ", ".join(f"{n} {word}" for word, n in count.items() if n)
    result = Table(title=f"{args.target}: {head}", title_justify="left")
    for column in ("run", "state", "done", "left"):
        result.add_column(column, justify="left" if column in ("run", "state") else "right")
    order = ("running", "failed", "stopped", "waiting", "finished")
    ordered = sorted(runs, key=lambda run: next(i for i, x in enumerate(order) if states[run.name].startswith(x)))
    for run in ordered[: max(height, 4)]:
        p = progress(run, args.runs_dir) if states[run.name] == "running" else {}
        state = p.get("phase", "starting") if states[run.name] == "running" else states[run.name]
        result.add_row(run.name, state, f"{p['done']:.0%}" if "done" in p else "",
                       f"{p['left'] / 3600:.1f} h" if "left" in p else "")
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
    states = run_all(args, runs)
    count = {x: sum(state.startswith(x) for state in states.values()) for x in ("finished", "stopped", "failed")}
    words = "".join(f", {count[word]} {word}" for word in ("stopped", "failed") if count[word])
    print(f"{count['finished']} of {len(runs)} runs of {args.target} are finished{words}; "
          f"python report.py {shlex.quote(args.runs_dir)}")
    sys.exit(count["finished"] < len(runs))


if __name__ == "__main__":
    run_main(main)
