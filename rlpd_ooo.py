# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium==1.4.0",
#     "gymnasium-robotics==1.4.2",
#     "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "psutil==7.2.2",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1",
#     "wandb==0.31.0",
#     "matplotlib==3.11.2",
# ]
# ///
r"""OOO (RLPD): explore online with RLPD + RND, then retrain a SAC agent offline on the buffer, task reward only.

Paper: "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv 2310.08558,
Algorithm 1. RLPD: arXiv 2302.02948. SAC: arXiv 1812.05905. RND: arXiv 1810.12894.

    python rlpd_ooo.py --env-id halfcheetah-sparse-v2 --compile --cudagraphs      # RLPD + RND, and OOO (Table 3), GPU
    python rlpd_ooo.py --env-id ant-sparse-v2 --intrinsic-reward-scale 0 --exp-name rlpd      # RLPD, and OOO on it
    python rlpd_ooo.py --env-id halfcheetah-sparse-v2 --goal-x 10 --utd-ratio 1 --scale 0.05  # a small look on a CPU
    python rlpd_ooo.py --env-id pen-binary-v0             # with offline data: half of every batch is drawn from it
    python rlpd_ooo.py --eval-only runs/ant-sparse-v2__rlpd_ooo__1 --episodes 100 --video     # the saved policy
  Ablations of the exploitation phase, on the data of a finished run:
    python rlpd_ooo.py --exploit-only runs/ant-sparse-v2__rlpd_ooo__1 --retrain-upsample 0 --exp-name no_up    # Fig. 11
    python rlpd_ooo.py --exploit-only runs/ant-sparse-v2__rlpd_ooo__1 --retrain-q-bounds --exp-name bounds
    python rlpd_ooo.py --exploit-only runs/ant-sparse-v2__rlpd_ooo__1 --retrain-critics 10 --retrain-layer-norm \
        --exp-name ensemble

Where paper and official code differ, the paper wins where it is explicit, else the code, except where the published
coefficients were tuned with the code's form (5, 6). Each choice and exception:
 1. The retrained agent is plain SAC: 2 critics without layer norm (code; --retrain-critics, --retrain-layer-norm).
 2. Its Q targets are not clipped: neither the paper nor the published command has bounds. --retrain-q-bounds clips them
    to [min, max] reward of its data / (1 - gamma), before the entropy term is added, as elsewhere in the code.
 3. Upsampling: 32 rows of reward 1 are added to each batch of 256 (code), which is section 4.2 with alpha = 1/9
    (--retrain-upsample). With no such row in the data sampling stays uniform, with a message; the code then
    upsamples the largest reward, that is: everything.
 4. The actor maximises the mean over the critics in both phases, as RLPD does (SAC's paper: the smaller of two).
 5. Intrinsic reward of s': largest squared feature error, from the predictor before its step, once for the whole
    update of --utd-ratio batches (code; --rnd-reward l2 is the paper's squared norm). Layers (512, 512), the last one
    linear, initialised as all of RLPD's (code; --rnd-hidden-dims 512 512 512 is the paper's wording).
 6. RND's running standard deviation is of rewards that it has divided already (code; --rnd-normalizer paper: of the raw
    errors, as appendix A means it).
 7. Ant: 28 observations. The code's 112 hold 84 contact forces, which were 0 in its MuJoCo unless asked for.
 8. Tasks with offline data are not in the paper's Table 3: rewards, masks and data are those of iql_ooo.py, the rest
    is as in sparse locomotion. --offline-ratio is the share of offline data in each single minibatch.
 9. Kitchen observations are 30 of D4RL's 60 numbers, without the goal, which never changes: a reading.
10. Retraining for t uses exactly D_off + D_on[:t] but runs when the episode under way has ended (see iql_ooo.py).
grad_step counts updates: one is --utd-ratio critic steps, then one actor and one alpha step.
"""

import difflib
import hashlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Annotated, Literal, NoReturn
from zipfile import BadZipFile

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

# === arguments ===
SCRIPT = "rlpd_ooo"  # written into every file of a run, also by a renamed copy


@dataclass
class Args:
    # --- experiment ---
    env_id: str = "halfcheetah-sparse-v2"
    """ant-sparse-v2 or halfcheetah-sparse-v2 (online only), or one of the nine tasks with offline data."""
# === shared block: experiment arguments ===
    seed: int = 1
    """Seed of everything random in the run."""
    exp_name: str = Path(__file__).stem
    """Middle part of the run directory's name."""
    runs_dir: str = "runs"
    """Folder of the run directories."""
    scale: float = 1.0
    """Multiplies every budget and interval (steps, not episodes or batch size)."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    torch_threads: int = 1
    """CPU threads of torch; several runs side by side use a machine better than one run with many threads."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision; auto takes medium where a test product shows it to be exact float32."""
    compile: bool = False
    """Wrap the updates in torch.compile (needs a C++ compiler on the CPU)."""
    cudagraphs: bool = False
    """Replay the updates as CUDA graphs (cuda only)."""
    resume: bool = False
    """Continue the run of the same name from its last checkpoint."""
    eval_only: str = ""
    """RUN_DIR of a run: evaluate its last saved policy (OOO: of exploitation), train nothing."""
    video: bool = False
    """With --eval-only: also record the first episodes as mp4 (MUJOCO_GL=osmesa or egl where there is no display)."""
# === end shared block: experiment arguments ===
# === shared block: data arguments ===
    # --- task and data ---
    dataset_id: tuple[str, ...] = ()
    """Minari ids, each optionally ID:N for its first N episodes. Default: the task's published datasets."""
    dataset_path: str = ""
    """An .npz with D4RL's keys (observations, actions, rewards, terminals, timeouts) instead of Minari data."""
    truncate_episodes: int = 0
    """Keep the first N transitions of every offline episode (0: all)."""
    data_subset: int = 0
    """Keep N random offline transitions (0: all); drawn before discs are removed."""
    remove_discs: tuple[tuple[float, float, float], ...] = ()
    """Discs X Y RADIUS ... in maze coordinates; offline transitions whose observation lies inside one are removed."""
    kitchen_cumulative: bool = False
    """Kitchen offline rewards count tasks ever completed, as online, instead of tasks that hold now."""
    reward_scale: float = 1.0
    """Sampled rewards are (r + reward_bias) * reward_scale; stored rewards stay raw."""
    reward_bias: float = 0.0
    """See reward_scale."""
    mask_reward: float | None = None
    """If set, masks are 0 exactly where the raw reward equals this (kitchen: 4), else from terminations."""
# === end shared block: data arguments ===
    goal_x: float | None = None
    """Sparse tasks: pay beyond this x instead of the paper's 10 (ant) or 20 (halfcheetah). Another, easier task."""
    # --- phases ---
    online_steps: int = 1_000_000
    """Online phase: environment steps, one update (of utd_ratio critic steps) each."""
    learning_starts: int = 5_000
    """Environment steps with uniformly random actions and without updates, at the start."""
    exploit_only: str = ""
    """RUN_DIR of a finished run: repeat its retraining phase on its data, with other settings, as a new run."""
    retrain_at: tuple[int, ...] = (250_000, 500_000, 750_000, 1_000_000)
    """Environment steps t for which an exploitation policy is trained on D_off + D_on[:t]; empty for none."""
    retrain_steps: int = 1_000_000
    """Updates of one retraining, with one batch each."""
    eval_every: int = 50_000
    """Steps of the phase under way between evaluations."""
    eval_episodes: Annotated[int, tyro.conf.arg(aliases=["--episodes"])] = 100
    """Episodes of one evaluation."""
    # --- optimisation ---
    batch_size: int = 256
    """Transitions of one critic step."""
    utd_ratio: int = 20
    """Critic steps of one online update; actor and alpha take one, on its last minibatch."""
    offline_ratio: float = 0.5
    """Share of offline transitions in each online minibatch, where there is offline data."""
    learning_rate: float = 3e-4
    """Adam's rate for actor, critic and alpha."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """Polyak rate of the target critic, per critic step."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Hidden layers of actor and critic."""
    # --- RLPD ---
    num_qs: int = 10
    """Critics of the exploration agent, with layer norm."""
    num_min_qs: int = 2
    """The target is the smallest of this many critics, drawn anew for each critic step."""
    backup_entropy: bool = True
    """The target includes the next action's entropy."""
    init_alpha: float = 1.0
    """Entropy coefficient at the start; it is learnt."""
    target_entropy: float | None = None
    """Unset: minus half of the action's dimension."""
    # --- exploitation (offline retraining) ---
    retrain_critics: int = 2
    """Critics of the exploitation agent; its target is the smallest of num_min_qs of them."""
    retrain_layer_norm: bool = False
    """Layer norm in the exploitation agent's critics."""
    retrain_q_bounds: bool = False
    """Clip Q targets to [min, max] reward of the data / (1 - gamma)."""
    retrain_upsample: float = 1 / 9
    """alpha of section 4.2, below 1: the share of high-reward transitions in a batch, added to batch_size others."""
    upsample_reward: float = 1.0
    """A raw reward of at least this is high."""
    upsample_trajectories: bool = False
    """High-reward data are whole trajectories that reach upsample_reward, instead of single transitions."""
    # --- RND ---
    intrinsic_reward_scale: float = 10.0
    """Coefficient of the intrinsic reward; 0 is plain RLPD, without RND."""
# === shared block: rnd arguments ===
    rnd_reward: Literal["max", "l2"] = "max"
    """max over features of the squared error (code), or their sum (paper)."""
    rnd_normalizer: Literal["code", "paper"] = "code"
    """The reward is divided by the running std of rewards already divided (code), or of the raw errors (paper)."""
    rnd_hidden_dims: tuple[int, ...] = (512, 512)
    """Layers of predictor and target, the last one linear."""
    rnd_learning_rate: float = 1e-4
    """Adam's rate for the predictor."""
    rnd_update_proportion: float = 0.25
    """Share of each batch that trains the predictor."""
# === end shared block: rnd arguments ===
# === shared block: logging arguments ===
    # --- logging and checkpoints ---
    log_every: int = 1_000
    """Steps between records of losses and of the intrinsic reward."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; online at the next end of an episode."""
    track: bool = False
    """Send metrics to wandb as well."""
    wandb_project: str = "ooo"
    """wandb project."""
    wandb_mode: Literal["online", "offline", "disabled"] = "online"
    """wandb mode."""
# === end shared block: logging arguments ===


BUDGETS = ("online_steps", "learning_starts", "retrain_at", "retrain_steps", "eval_every", "log_every",
           "checkpoint_every")

# Overrides of Args per task. Sparse locomotion: the official config is Args' defaults (Table 3 and Figure 10). The
# others: data, rewards and bonus as iql_ooo.py has them.
ADROIT = dict(upsample_reward=0.0, intrinsic_reward_scale=0.5, retrain_upsample=0.0)
KITCHEN = dict(reward_bias=-4.0, mask_reward=4.0, upsample_reward=4.0, upsample_trajectories=True)
MAZE = dict(reward_bias=-1.0)
TASKS = {
    "ant-sparse-v2": {},
    "halfcheetah-sparse-v2": {},
    **dict.fromkeys(("pen-binary-v0", "door-binary-v0", "relocate-binary-v0"), ADROIT),
    **dict.fromkeys(("kitchen-partial-v0", "kitchen-mixed-v0", "kitchen-complete-v0"), KITCHEN),
    "antmaze-goal-missing-large-v2": dict(MAZE, remove_discs=((14.0, -12.0, 2.5),)),
    "maze2d-missing-data-large-v1": dict(
        MAZE, data_subset=500_000, remove_discs=((3.5, -3.0, 1.5), (-4.5, 3.0, 1.5), (-4.5, -3.0, 2.0))),
    "hammer-truncated-expert-v1": dict(ADROIT, truncate_episodes=20, upsample_reward=25.0),
}


def parse_args(argv=None):
    return parse_command_line(Args, TASKS, BUDGETS, SCRIPT, __doc__, argv)


def check_args(args):
    """Exit 2 with one line for values that cannot work together."""
    for name, low, high in (("offline_ratio", 0, 1), ("retrain_upsample", 0, 0.99)):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} {getattr(args, name):g} must lie between {low} and {high}")
    if args.init_alpha <= 0:
        fail(f"--init-alpha {args.init_alpha:g} must be above 0")
    for name in ("num_qs", "retrain_critics"):
        if getattr(args, name) < args.num_min_qs:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is less than --num-min-qs {args.num_min_qs}")
    if args.goal_x is not None and ENVIRONMENTS[args.env_id].threshold is None:
        fail(f"--goal-x is for the sparse tasks; {args.env_id} has its own goal")
    check_times(args, "retrain_at")
    check_limits(args, dict(retrain_steps=1, utd_ratio=1, num_min_qs=1, learning_starts=0))


# === shared block: command line ===
NOT_SETTINGS = ("resume", "track", "wandb_project", "wandb_mode", "runs_dir", "video")  # may change at --resume


def parse_command_line(args_class, tasks, budgets, script, description, argv=None):
    """The dataclass of a script's settings: its defaults < the task's row < the settings of the --exploit-only or
    --eval-only run < the command line; then --scale multiplies the fields named in budgets."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = tyro.cli(args_class, args=[a for a in argv if a not in ("-h", "--help")])
    if source := getattr(first, "exploit_only", "") or first.eval_only:
        saved = args_class(**read_config(source, script)["args"])
        # The source's intervals and budgets are kept; its name must not be taken, so the script's own is the default.
        default = replace(saved, exp_name=args_class.exp_name, runs_dir=args_class.runs_dir, resume=False, track=False)
    else:
        if first.env_id not in tasks:
            near = difflib.get_close_matches(first.env_id, tasks, n=1, cutoff=0.0)[0]
            fail(f"unknown --env-id {first.env_id!r}; did you mean {near}? Tasks: {', '.join(tasks)}")
        default = args_class(**{"env_id": first.env_id, **tasks[first.env_id]})
    args = tyro.cli(args_class, args=argv, default=default, description=description)
    if args.scale <= 0:
        fail(f"--scale {args.scale:g} must be above 0")

    def scaled(value):
        if isinstance(value, tuple):
            return tuple(map(scaled, value))
        return max(1, round(value * args.scale)) if value > 0 else value

    return replace(args, **{name: scaled(getattr(args, name)) for name in budgets}, scale=1.0)


def check_times(args, name):
    """Exit 2 with one line unless the field's environment steps rise and lie inside the online budget."""
    times, flag = getattr(args, name), f"--{name.replace('_', '-')}"
    bad_t = [t for t in times if not 0 < t <= args.online_steps]
    if bad_t:
        fail(f"{flag} {bad_t[0]} lies outside the online budget of {args.online_steps} steps (--online-steps)")
    if list(times) != sorted(set(times)):
        fail(f"{flag} must rise: {' '.join(map(str, times))}")


def check_limits(args, lowest):
    """Exit 2 with one line for a value below its least: those that every script has, and lowest {field: least}."""
    if not 0 <= args.gamma < 1:
        fail(f"--gamma {args.gamma:g} must be at least 0 and below 1")
    if args.cudagraphs and torch.device(pick_device(args.device)).type != "cuda":
        fail("--cudagraphs needs a CUDA device; leave it out on the CPU")
    lowest = {**dict.fromkeys(("seed", "online_steps", "truncate_episodes", "data_subset"), 0), **dict.fromkeys(
        ("torch_threads", "eval_episodes", "batch_size", "log_every", "eval_every", "checkpoint_every"), 1), **lowest}
    for name, low in lowest.items():
        if getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; the least is {low}")


# === end shared block: command line ===


# === shared block: run directory and metrics ===
def fail(message, code=2) -> NoReturn:
    """Say in one line on stderr what was wrong and what to do, and exit."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


SEED_FOR = {name: i for i, name in enumerate(("training episode", "evaluation", "subset", "retraining", "eval-only"))}


def derive_seed(seed, purpose, index=0):
    """An independent 32-bit seed for each (seed, purpose, index)."""
    return int(np.random.SeedSequence([seed, SEED_FOR[purpose], index]).generate_state(1)[0])


def pick_device(name):
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def setup_torch(args):
    """Device, threads, matmul precision and seed; returns (device, precision that was chosen)."""
    try:
        device = torch.device(pick_device(args.device))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.compile and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError:
            fail("--compile needs a C++ compiler on the CPU, and there is none: install g++, or leave --compile out")
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    precision = args.matmul_precision
    if precision == "auto":
        # On CPUs without bf16 units "medium" picks a faster kernel that is still exact float32; elsewhere it rounds.
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
        torch.set_float32_matmul_precision("medium")
        error = ((a @ b).double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
        precision = "medium" if device.type == "cpu" and error < 1e-6 else "highest"
    torch.set_float32_matmul_precision(precision)
    return device, precision


def read_config(run_dir, script):
    """config.json of a run of `script`; exit 2 if RUN_DIR is not the directory of one."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
        if config["script"] != script:
            fail(f"{run_dir} is a run of {config['script']}; give a run of {script}")
        tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value  # noqa: E731
        return {**config, "args": {name: tuples(value) for name, value in config["args"].items()}}
    except OSError as error:
        fail(f"{run_dir} is not a run directory: cannot read {path.name} ({error.strerror}); give the folder of a run")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is not the config of a run; give the folder of a run")


def provenance(device, precision):
    """What a number needs beside it: versions, commit, hardware, command."""
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
                             capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), cpu)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hardware": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "matmul_precision": precision,
        },
    }


class Run:
    """A run directory: config.json, metrics.jsonl and evals.jsonl (the same bytes for the same seed on the same
    machine), timing.jsonl (what differs each time: wall-clock seconds, steps per second)."""

    FILES = ("metrics.jsonl", "evals.jsonl")

    def __init__(self, path, config, track=None):
        """track: keyword arguments of wandb.init, or None."""
        self.path, self.wandb = Path(path), None
        self.path.mkdir(parents=True, exist_ok=True)
        if track:
            try:
                import wandb

                run_id = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
                self.wandb = wandb.init(id=run_id, name=self.path.name, dir=self.path, config=config,
                                        resume="allow", **track)
            except Exception as error:  # no key, no network, not installed
                with suppress(OSError):
                    self.path.rmdir()
                fail(f"--track: wandb cannot start ({error}); log in, use --wandb-mode offline, or leave --track out")
        atomic_write(self.path / "config.json", json.dumps(config, indent=1).encode())
        self.files = {name: open(self.path / name, "ab", buffering=0) for name in (*self.FILES, "timing.jsonl")}

    def log(self, file, record):
        """Append one record (a line of JSON) to a file, and to wandb."""
        self.files[file].write(json.dumps(record).encode() + b"\n")
        if self.wandb:
            prefix = record["phase"] + "/"
            self.wandb.log({prefix + k: v for k, v in record.items() if isinstance(v, (int, float))})

    def offsets(self):
        """Bytes of each reproducible file, on disk for good: where a checkpoint lets the files end."""
        for name in self.FILES:
            os.fsync(self.files[name].fileno())
        return {name: os.path.getsize(self.path / name) for name in self.FILES}

    def truncate(self, offsets):
        for name in self.FILES:
            if os.path.getsize(self.path / name) < offsets[name]:
                fail(f"{self.path / name} is shorter than its checkpoint says; the run cannot be resumed")
            self.files[name].truncate(offsets[name])


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite; the message names step and tensor."""


class LossHistory:
    """The scalars of every update since the last record, kept on the device so that no update waits for the host."""

    def __init__(self):
        self.names, self.rows = (), []

    def add(self, losses):
        """losses: dict of 0-d tensors, the same names every time."""
        self.names = tuple(losses)
        self.rows.append(torch.stack([value.detach().float() for value in losses.values()]))

    def check(self, last_step):
        """Raise NonFiniteLoss naming the first bad update; last_step is the step of the newest row."""
        if not self.rows:
            return None
        table = torch.stack(self.rows).cpu()
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            step = last_step - len(self.rows) + 1 + row
            raise NonFiniteLoss(f"{self.names[column]} is {table[row, column].item()} at step {step}")
        return table

    def means(self, last_step):
        """Mean of each scalar since the last call, after the check; {} when there was no update."""
        table = self.check(last_step)
        self.rows = []
        return {} if table is None else dict(zip(self.names, table.double().mean(0).tolist(), strict=True))

    def state_dict(self):
        return {"names": list(self.names), "rows": torch.stack(self.rows).cpu() if self.rows else None}

    def load_state_dict(self, state, device):
        self.names = tuple(state["names"])
        self.rows = [] if state["rows"] is None else list(state["rows"].to(device))


# === end shared block: run directory and metrics ===


# === shared block: environments ===
@dataclass(frozen=True)
class Task:
    """A task of the paper on today's packages. score_range: D4RL's (random, expert) returns, None where the score is
    something else (normalized_score). goal: maze coordinates (x, y) of the cell (row 7, column 9). threshold: sparse
    locomotion, without offline data, pays 1 in every step beyond this x."""

    family: str
    gym_id: str
    horizon: int
    datasets: tuple[str, ...]
    kwargs: dict = field(default_factory=dict)
    score_range: tuple[float, float] | None = None
    goal: tuple[float, float] | None = None
    threshold: float | None = None


def _kitchen(*subtasks):
    # Noise 0.1 is the level of the D4RL environment; the reward counts completed tasks, nothing terminates.
    return dict(tasks_to_complete=list(subtasks), remove_task_when_completed=True,
                terminate_on_tasks_completed=False, robot_noise_ratio=0.1, object_noise_ratio=0.1)


_ABCD = _kitchen("microwave", "kettle", "light switch", "slide cabinet")
_MIXED = _kitchen("microwave", "kettle", "bottom burner", "light switch")
_MAZE = dict(continuing_task=True, reset_target=False)  # the wrapper owns goal, reward and termination
# Adroit data: 90% of 25 demonstrations and of 500 rollouts of their clone, in file order, as the official IQL loads it.
ENVIRONMENTS = {
    "pen-binary-v0": Task("pen", "AdroitHandPen-v1", 100, ("D4RL/pen/human-v2:22", "D4RL/pen/cloned-v2:450")),
    "door-binary-v0": Task("door", "AdroitHandDoor-v1", 200, ("D4RL/door/human-v2:22", "D4RL/door/cloned-v2:450")),
    "relocate-binary-v0": Task(
        "relocate", "AdroitHandRelocate-v1", 200, ("D4RL/relocate/human-v2:22", "D4RL/relocate/cloned-v2:450")),
    "kitchen-partial-v0": Task("kitchen", "FrankaKitchen-v1", 1000, ("D4RL/kitchen/partial-v2",), _ABCD),
    "kitchen-mixed-v0": Task("kitchen", "FrankaKitchen-v1", 1000, ("D4RL/kitchen/mixed-v2",), _MIXED),
    "kitchen-complete-v0": Task("kitchen", "FrankaKitchen-v1", 1000, ("D4RL/kitchen/complete-v2",), _ABCD),
    "antmaze-goal-missing-large-v2": Task(
        "antmaze", "AntMaze_Large-v5", 1000, ("D4RL/antmaze/large-diverse-v1",),
        dict(_MAZE, include_cfrc_ext_in_observation=False), (0.0, 1.0), (14.0, -12.0)),
    "maze2d-missing-data-large-v1": Task(
        "maze2d", "PointMaze_Large-v3", 800, ("D4RL/pointmaze/large-v2",), _MAZE, (6.7, 273.99), (3.5, -3.0)),
    "hammer-truncated-expert-v1": Task(
        "hammer", "AdroitHandHammer-v1", 200, ("D4RL/hammer/expert-v2",), {}, (-274.856578, 12794.134825156867)),
    "ant-sparse-v2": Task(
        "ant", "Ant-v5", 1000, (),
        dict(include_cfrc_ext_in_observation=False, exclude_current_positions_from_observation=False,
             terminate_when_unhealthy=False), threshold=10.0),
    "halfcheetah-sparse-v2": Task("halfcheetah", "HalfCheetah-v5", 1000, (), threshold=20.0),
}
GOAL_RADIUS = 0.5  # D4RL's in both mazes; gymnasium-robotics uses 0.45
ANTMAZE_DATA_GOAL_OFFSET = (0.75, -0.75)  # mean of the goals drawn by TaskEnv.reset


def flatten_observation(task, obs):
    """Today's observation (array, or dict of arrays with leading axes) as D4RL's vector, float32."""
    if task.family == "kitchen":  # robot qpos 9, object qpos 21; without velocities and without the constant goal
        obs = np.concatenate([obs["observation"][..., 0:9], obs["observation"][..., 18:39]], axis=-1)
    elif task.family == "antmaze":
        obs = np.concatenate([obs["achieved_goal"], obs["observation"][..., :27]], axis=-1)
    elif task.family == "maze2d":
        obs = obs["observation"]
    elif task.family == "ant":  # x, qpos[2:], qvel: without y; the contact forces were all 0 in the paper's MuJoCo
        obs = np.delete(obs, 1, axis=-1)
    return np.asarray(obs, dtype=np.float32)


def task_reward(task, next_obs, reward, goal=None):
    """(reward, success) of the paper's task for transitions into next_obs (..., obs_dim), reward as the package gives
    it (...). Kitchen's reward must already count tasks, sparse locomotion's be the x position (the cheetah does not
    observe it). Formulas: D4RL, mj_envs and the official code."""
    o = next_obs
    if task.family == "pen":
        success = (np.linalg.norm(o[..., 39:42], axis=-1) < 0.075) & ((o[..., 33:36] * o[..., 36:39]).sum(-1) > 0.95)
    elif task.family == "door":
        success = o[..., 28] >= 1.35
    elif task.family == "relocate":
        success = np.linalg.norm(o[..., 36:39], axis=-1) < 0.1
    elif task.family == "kitchen":
        return reward, reward == 4
    elif task.family == "hammer":
        # gymnasium-robotics 1.2.1 to 1.4.2 add 0.1 |palm - hammer|, D4RL subtracts it. Only success pays +100.
        reward = reward - 0.2 * np.linalg.norm(o[..., 33:36] - o[..., 36:39], axis=-1)
        return reward, reward > 50
    elif task.threshold is not None:
        success = np.asarray(reward) > task.threshold
        return success.astype(np.float64), success
    else:
        success = np.linalg.norm(o[..., :2] - np.asarray(goal), axis=-1) <= GOAL_RADIUS
        return success.astype(np.float64), success
    return success - 1.0, success


class TaskEnv(gym.Wrapper):
    """The paper's task: D4RL's observation, reward, termination (antmaze only, at the goal) and start states.
    Every reset(seed=...) depends on the seed alone. info["success"] is the success of this step."""

    def __init__(self, env, task):
        super().__init__(env)
        self.task, self.rng, self.goal = task, np.random.default_rng(0), None
        obs = flatten_observation(task, env.observation_space.sample())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        if task.family == "antmaze":  # D4RL's noise: +-0.1 on position and joints, N(0, 0.1^2) on velocities
            env.unwrapped.position_noise_range, env.unwrapped.ant_env._reset_noise_scale = 0.0, 0.1
        elif task.family == "maze2d":
            env.unwrapped.position_noise_range = 0.1

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        options = dict(options or {})
        if self.task.goal:
            self.goal, start = np.array(self.task.goal), (1, 1)
            if self.task.family == "antmaze":  # D4RL draws the (unobserved) goal anew for each episode
                offset = self.rng.uniform(0, 1, 2) + self.rng.uniform(0, 0.5, 2)
                self.goal = self.goal + offset * (1, -1)
            else:  # any of the 46 free cells, the goal's included
                free = [(i, j) for i, row in enumerate(self.unwrapped.maze.maze_map)
                        for j, cell in enumerate(row) if cell != 1]
                start = free[self.rng.integers(len(free))]
            options |= {"goal_cell": np.array([7, 9]), "reset_cell": np.array(start)}
        obs, info = self.env.reset(seed=seed, options=options or None)
        if self.task.family == "maze2d":
            point = self.unwrapped.point_env
            point.set_state(point.data.qpos.copy(), 0.1 * self.rng.standard_normal(2))
            obs = {**obs, "observation": np.concatenate([point.data.qpos, point.data.qvel])}
        return flatten_observation(self.task, obs), {"success": False}

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        obs = flatten_observation(self.task, obs)
        if self.task.family == "kitchen":
            reward = float(len(info["episode_task_completions"]))
        elif self.task.threshold is not None:
            reward = info["x_position"]
        reward, success = task_reward(self.task, obs, reward, self.goal)
        terminated = self.task.family == "antmaze" and bool(success)
        return obs, float(reward), terminated, truncated, {"success": bool(success)}


def make_env(env_id, render_mode=None):
    """The task's environment; actions in [-1, 1]."""
    task = ENVIRONMENTS[env_id]
    with redirect_stderr(io.StringIO()):  # the package prints a notice about the sign that task_reward corrects
        import gymnasium_robotics

        gym.logger.min_level = gym.logger.ERROR
        gym.register_envs(gymnasium_robotics)
        env = gym.make(task.gym_id, max_episode_steps=task.horizon, render_mode=render_mode,
                       disable_env_checker=True, **task.kwargs)
    return TaskEnv(env, task)


def normalized_score(task, episode):
    """The paper's number for one episode (dict of evaluate): success, kitchen tasks / 4, or D4RL's score, x 100."""
    if task.family == "kitchen":
        return 100.0 * episode["max_reward"] / 4
    if task.score_range is None:
        return 100.0 * episode["success"]
    low, high = task.score_range
    return 100.0 * (episode["return"] - low) / (high - low)


# === end shared block: environments ===


# === shared block: dataset ===
def open_minari(dataset_id):
    """A Minari dataset from the local store, or downloaded if the server answers; else exit 2."""
    import minari

    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    if (Path(root) / dataset_id / "data").exists():
        try:
            dataset = minari.load_dataset(dataset_id)
            next(iter(dataset.iterate_episodes()))  # opens the data file
            return dataset
        except Exception as error:  # h5py, json and minari raise many kinds for a damaged store
            fail(f"dataset {dataset_id} in {root} cannot be read ({error}); delete it there and get it again")
    try:
        import urllib.request

        from huggingface_hub import constants

        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()  # one quick try; minari itself retries for long
        with redirect_stderr(io.StringIO()):
            return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # whatever the server, the client or the id did wrong, the remedy is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"dataset {dataset_id} is not in the local store {root} and cannot be downloaded ({reason}); set "
             f"MINARI_DATASETS_PATH to a store that has it, or run `minari download {dataset_id}` on a machine with "
             f"network and copy it, or give --dataset-id or --dataset-path")


def read_minari(task, dataset_ids, kitchen_cumulative):
    """Transitions of Minari datasets ('ID' or 'ID:N' episodes), episode after episode, rewards as stored (kitchen:
    counted from the goals). An episode that an earlier dataset already holds is not taken again."""
    columns, seen = {}, set()
    for spec in dataset_ids:
        dataset_id, _, limit = spec.partition(":")
        if limit and not limit.isdigit():
            fail(f"--dataset-id {spec}: what follows the colon must be a number of episodes")
        taken, here = 0, set()
        for episode in open_minari(dataset_id).iterate_episodes():
            digest = hashlib.sha256(np.ascontiguousarray(episode.actions).tobytes()).digest()
            here.add(digest)
            if digest in seen or (limit and taken >= int(limit)):
                continue
            taken += 1
            rewards = np.asarray(episode.rewards, np.float64)
            try:
                observations = flatten_observation(task, episode.observations)
                if task.family == "kitchen":
                    achieved, desired = episode.observations["achieved_goal"], episode.observations["desired_goal"]
                    done = np.stack([np.linalg.norm(achieved[t][1:] - desired[t][1:], axis=-1) < 0.3
                                     for t in task.kwargs["tasks_to_complete"]])
                    rewards = (np.maximum.accumulate(done, axis=1) if kitchen_cumulative else done).sum(0)
            except (KeyError, IndexError, TypeError) as error:
                fail(f"dataset {dataset_id} has not the observations of {task.gym_id} ({error!r}); "
                     "give a dataset of this task")
            rows = dict(observations=observations[:-1], actions=episode.actions, rewards=rewards,
                        next_observations=observations[1:], terminations=episode.terminations,
                        episodes=np.full(len(rewards), len(columns.get("episodes", ()))))
            for name, value in rows.items():
                columns.setdefault(name, []).append(value)
        seen |= here
    if not columns:
        fail(f"no episode in {' '.join(dataset_ids)}; give another --dataset-id")
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def read_npz(path, keep_terminals):
    """Transitions of an .npz with D4RL's keys. Without next_observations the last step of an episode, whose successor
    was not recorded, is dropped, unless it is a true terminal (keep_terminals)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        fail(f"--dataset-path {path} cannot be read as .npz without pickle ({error})")
    missing = [k for k in ("observations", "actions", "rewards", "terminals") if k not in data]
    if missing:
        fail(f"--dataset-path {path} has no {', '.join(missing)}; D4RL's keys are needed")
    n = data["rewards"].size
    for name in {"observations", "actions", "rewards", "terminals", "timeouts", "next_observations"} & set(data):
        if data[name].dtype.kind not in "bfiu" or data[name].ndim == 0 or len(data[name]) != n or n < 2:
            fail(f"--dataset-path {path}: {name} must be an array of numbers as long as rewards, 2 or more")
    terminations = data["terminals"].astype(bool).reshape(n)
    ends = terminations | (data["timeouts"].astype(bool).reshape(n) if "timeouts" in data else False)
    columns = dict(observations=data["observations"], actions=data["actions"], rewards=data["rewards"].reshape(n),
                   terminations=terminations, episodes=np.concatenate([[0], np.cumsum(ends)[:-1]]))
    if "next_observations" in data:
        columns["next_observations"] = data["next_observations"]
        return columns
    columns["next_observations"] = np.where(ends[:, None], data["observations"], np.roll(data["observations"], -1, 0))
    keep = ~ends | (terminations & keep_terminals)
    keep[-1] &= ends[-1]
    return {name: value[keep] for name, value in columns.items()}


def load_dataset(env_id, env, *, dataset_ids=(), dataset_path="", truncate_episodes=0, data_subset=0, remove_discs=(),
                 kitchen_cumulative=False, seed=0):
    """The task's offline data and a report. Returns ({column: float32 array (n, ...)}, dict). Columns: observations,
    actions, rewards (raw), next_observations, terminations, episodes (index of the episode). Order: read, check,
    truncate, relabel, subset, remove discs."""
    task = ENVIRONMENTS[env_id]
    if task.threshold is not None:
        if dataset_path or dataset_ids:
            fail(f"{env_id} is learnt without offline data; leave --dataset-id and --dataset-path out")
        shapes = dict(observations=env.observation_space.shape, actions=env.action_space.shape, rewards=(),
                      next_observations=env.observation_space.shape, terminations=(), episodes=())
        none = {name: np.zeros((0, *shape), np.float32) for name, shape in shapes.items()}
        return none, {"source": "none", "transitions": 0, "sha256": hashlib.sha256().hexdigest()}
    if dataset_path:
        data = read_npz(dataset_path, task.family == "antmaze")
    else:
        data = read_minari(task, dataset_ids or task.datasets, kitchen_cumulative)
    source = dataset_path or " + ".join(dataset_ids or task.datasets)
    spaces = {"observations": env.observation_space.shape, "next_observations": env.observation_space.shape,
              "actions": env.action_space.shape}
    for name, shape in spaces.items():
        if data[name].shape[1:] != shape:
            fail(f"{source}: {name} have shape {data[name].shape[1:]}, {env_id} needs {shape}; give a dataset of it")
    data = {name: np.asarray(value, np.float32) for name, value in data.items()}
    for name, value in data.items():
        if not np.isfinite(value).all():
            rows = (~np.isfinite(value)).reshape(len(value), -1).any(1)
            fail(f"{source}: NaN or infinity in {name} of {rows.sum()} transitions, first {rows.argmax()}; clean it")
    report = {"source": source, "transitions_read": len(data["rewards"])}

    if truncate_episodes:
        starts = np.flatnonzero(np.diff(data["episodes"], prepend=-1))
        position = np.arange(len(data["rewards"])) - np.repeat(starts, np.diff([*starts, len(data["rewards"])]))
        data = {name: value[position < truncate_episodes] for name, value in data.items()}
        report["removed_by_truncation"] = report["transitions_read"] - len(data["rewards"])
    if not dataset_path or task.family not in ("kitchen", "hammer"):  # an .npz of D4RL has D4RL's dense rewards
        goal = task.goal
        if task.family == "antmaze":
            goal = np.add(goal, ANTMAZE_DATA_GOAL_OFFSET)
        rewards, success = task_reward(task, data["next_observations"], data["rewards"].astype(np.float64), goal)
        data["rewards"] = rewards.astype(np.float32)
    else:
        success = data["rewards"] >= (4 if task.family == "kitchen" else 50)
    data["terminations"] = success.astype(np.float32) if task.family == "antmaze" else np.zeros_like(data["rewards"])
    report["successful_episodes_before_removal"] = len(np.unique(data["episodes"][success]))
    if data_subset and data_subset < len(success):
        keep = np.random.default_rng(derive_seed(seed, "subset")).choice(len(success), data_subset, replace=False)
        data, success = {name: value[keep] for name, value in data.items()}, success[keep]
        report["subset"] = data_subset
    for x, y, radius in remove_discs:
        keep = np.linalg.norm(data["observations"][:, :2] - np.float32([x, y]), axis=-1) > radius
        report.setdefault("removed_by_discs", []).append([x, y, radius, int((~keep).sum())])
        data, success = {name: value[keep] for name, value in data.items()}, success[keep]
    if not len(success):
        fail(f"{source}: nothing is left after truncation and removal; check --remove-discs and --truncate-episodes")
    data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(np.ascontiguousarray(data[name]))
    return data, report | {
        "transitions": len(success),
        "episodes": len(np.unique(data["episodes"])),
        "successful_episodes": len(np.unique(data["episodes"][success])),
        "reward_range": [float(data["rewards"].min()), float(data["rewards"].max())],
        "sha256": digest.hexdigest(),
    }


# === end shared block: dataset ===


# === shared block: replay buffer ===
class ReplayBuffer:
    """Append-only transitions on the training device, as they came (raw rewards). One row holds all fields side by
    side, so that a batch is a single gather and an online step a single copy; no call waits for the device."""

    def __init__(self, shapes, capacity, device):
        """shapes: {field: ()} for a scalar or {field: (dim,)}. Exit 2 if the memory is not there."""
        self.columns, width = {}, 0
        for name, shape in shapes.items():
            size = shape[0] if shape else 1
            self.columns[name] = slice(width, width + size) if shape else width
            width += size
        need = capacity * width * 4
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > 0.95 * free:
            fail(f"the replay buffer needs {need / 2**30:.2f} GiB for {capacity} transitions, {device} has "
                 f"{free / 2**30:.2f} GiB free; lower --online-steps or --data-subset, or use another device")
        self.bytes, self.size, self.row = need, 0, np.empty(width, np.float32)
        self.data = torch.empty((capacity, width), device=device)

    def extend(self, columns):
        """Append n rows: {field: float32 array (n, ...)}."""
        n = len(next(iter(columns.values())))
        if self.size + n > len(self.data):
            raise IndexError(f"{self.size} + {n} rows are more than the capacity of {len(self.data)}")
        for name, column in self.columns.items():
            self.data[self.size : self.size + n, column] = torch.as_tensor(columns[name]).to(self.data.device)
        self.size += n

    def add(self, **transition):
        """Append one transition; a field that is not given is 0 until it is known."""
        for name, column in self.columns.items():
            self.row[column] = transition.get(name, 0.0)
        self.data[self.size] = torch.from_numpy(self.row)
        self.size += 1

    def sample(self, batch_size, first=None, extra_rows=None, extra=0):
        """Rows (batch_size, width) drawn uniformly from the first `first` transitions (None: all), `extra` of them
        from extra_rows (k,) instead."""
        rows = torch.randint(first or self.size, (batch_size - extra,), device=self.data.device)
        if extra:
            rows = torch.cat([rows, extra_rows[torch.randint(len(extra_rows), (extra,), device=self.data.device)]])
        return self.data.index_select(0, rows)

    def split(self, rows):
        """Views of the fields of rows (n, width): {field: (n,) or (n, dim)}."""
        return {name: rows[:, column] for name, column in self.columns.items()}

    def save_chunk(self, folder, offline_size, start, stop):
        """Write online transitions [start, stop) as one .npz with the fields as arrays."""
        folder.mkdir(exist_ok=True)
        rows = self.split(self.data[offline_size + start : offline_size + stop].cpu().numpy())
        content = io.BytesIO()
        np.savez(content, **rows)
        atomic_write(folder / f"online-{start:09d}-{stop:09d}.npz", content.getvalue())

    def load_chunks(self, folder, count):
        """Append the first `count` online transitions that save_chunk wrote; exit 2 if they are not all there."""
        have = 0
        for path in sorted(Path(folder).glob("online-*.npz")):
            start, stop = (int(part) for part in path.stem.split("-")[1:])
            if start != have or have >= count:
                break
            try:
                with np.load(path, allow_pickle=False) as chunk:
                    self.extend({name: chunk[name][: count - have] for name in self.columns})
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                fail(f"{path} cannot be read ({error}); the run's replay data is damaged, start it again")
            have = min(stop, count)
        if have < count:
            fail(f"{folder} holds {have} online transitions, {count} are needed; the run's replay data is incomplete")


# === end shared block: replay buffer ===


# === shared block: optimizer ===
class Adam:
    """torch.optim.Adam with its default betas and eps, without that class's bookkeeping in Python, which took a tenth
    of an IQL update on a CPU, and traceable as a part of one compiled update."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.step = torch.zeros((), device=self.parameters[0].device)

    def minimize(self, loss):
        """One step against the gradient of a scalar loss, which every parameter must have a part in."""
        self.apply(torch.autograd.grad(loss, self.parameters))

    @torch.no_grad()
    def apply(self, gradients):
        self.step += 1
        if not torch.compiler.is_compiling():
            torch._fused_adam_(self.parameters, list(gradients), self.exp_avg, self.exp_avg_sq, [],
                               [self.step] * len(self.parameters), lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8,
                               weight_decay=0.0, amsgrad=False, maximize=False)
            return
        step_size, unbias = self.lr / (1 - 0.9**self.step), (1 - 0.999**self.step).sqrt()
        for p, g, mean, square in zip(self.parameters, gradients, self.exp_avg, self.exp_avg_sq, strict=True):
            mean.lerp_(g, 0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            p.sub_(step_size * mean / (square.sqrt() / unbias + 1e-8))

    def state_dict(self):
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.step.copy_(state["step"])
        for mine, saved in zip(self.exp_avg + self.exp_avg_sq, state["exp_avg"] + state["exp_avg_sq"], strict=True):
            mine.copy_(saved)


# === end shared block: optimizer ===


# === shared block: networks ===
def orthogonal_linear(fan_in, fan_out):
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain=2**0.5)
    nn.init.zeros_(layer.bias)
    return layer


class Dropout(nn.Module):
    """nn.Dropout with 16 random bits an element (rate exact to 2^-17): its own draws would be a tenth of an update."""

    def __init__(self, rate):
        super().__init__()
        self.keep = round((1 - rate) * 65536)

    def forward(self, x):
        if not self.training or self.keep == 65536:
            return x
        bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,), device=x.device)
        kept = bits.view(torch.int16)[: x.numel()].view_as(x) < self.keep - 32768
        return x * kept * (65536 / self.keep)


def mlp(dims, dropout=0.0):
    """Linear layers of the given sizes with ReLU (and dropout) between them; the last one is linear."""
    layers = []
    for fan_in, fan_out in zip(dims[:-2], dims[1:-1], strict=True):
        layers += [orthogonal_linear(fan_in, fan_out), nn.ReLU(inplace=True), Dropout(dropout)]
    return nn.Sequential(*layers, orthogonal_linear(dims[-2], dims[-1]))


class Critic(nn.Module):
    """Ensemble of Q(s, a) as batched products: (batch, obs_dim), (batch, act_dim) -> (num_qs, batch)."""

    def __init__(self, obs_dim, act_dim, hidden_dims, num_qs=2, layer_norm=False):
        """layer_norm: between each hidden layer and its ReLU."""
        super().__init__()
        dims = (obs_dim + act_dim, *hidden_dims, 1)
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(num_qs, i, o) for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(num_qs, 1, o) for _, o in pairs])
        for weight in self.weights:
            for member in weight.data:
                nn.init.orthogonal_(member, gain=2**0.5)
        norms = pairs[:-1] if layer_norm else []
        self.scales = nn.ParameterList([torch.ones(num_qs, 1, o) for _, o in norms])
        self.shifts = nn.ParameterList([torch.zeros(num_qs, 1, o) for _, o in norms])

    def forward(self, observations, actions, members=None):
        """members: indices (k,) of the members that are wanted, for a result (k, batch); None: all."""
        pick = (lambda p: p) if members is None else (lambda p: p.index_select(0, members))
        num_qs = len(self.weights[0]) if members is None else len(members)
        x = torch.cat([observations, actions], dim=-1).expand(num_qs, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(pick(bias), x, pick(weight))
            if len(self.scales) > i:
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
                x = torch.addcmul(pick(self.shifts[i]), x, pick(self.scales[i]))
            x = F.relu(x, inplace=True) if i < len(self.weights) - 1 else x
        return x.squeeze(-1)


class Learner(nn.Module):
    """An agent with critic, critic_target and optimizers {name: Adam}: the target's average, and all of its state."""

    @torch.no_grad()
    def update_target(self, tau):
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)

    def full_state(self):
        return {"networks": self.state_dict(), "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()}}

    def load_full_state(self, state):
        self.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


# === end shared block: networks ===


# === networks ===
@torch.no_grad()
def xavier_uniform(weights):
    """RLPD's initialisation of every network, RND's too, in place; the other scripts' is orthogonal. weights: (in, out)
    matrices, also stacked. Drawn on the CPU, so that all devices start alike."""
    for weight in weights:
        for matrix in weight.view(-1, *weight.shape[-2:]):
            matrix.copy_(nn.init.xavier_uniform_(torch.empty(matrix.shape)))


class Actor(nn.Module):
    """tanh-squashed Gaussian, mean and log_std from one network."""

    def __init__(self, obs_dim, act_dim, hidden_dims):
        super().__init__()
        self.net = mlp((obs_dim, *hidden_dims, 2 * act_dim))  # the last layer: means, then log_stds

    def forward(self, observations):
        """Mean and log_std before the tanh, shapes (batch, act_dim)."""
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        return mean, log_std.clamp(-20.0, 2.0)

    def sample(self, observations, noise):
        """Actions (batch, act_dim) and their log densities (batch,); noise: standard normal (batch, act_dim)."""
        mean, log_std = self(observations)
        u = mean + log_std.exp() * noise
        # log(1 - tanh(u)^2), in a form that neither under- nor overflows
        log_slope = 2.0 * (np.log(2.0) - u - F.softplus(-2.0 * u))
        return u.tanh(), -(0.5 * noise.square() + log_std + 0.5 * np.log(2 * np.pi) + log_slope).sum(-1)


class Agent(Learner):
    """The networks of one SAC agent and their optimisers. RLPD is SAC with num_qs critics and layer norm."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, *, num_qs, layer_norm, init_alpha=1.0):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, hidden_dims)
        self.critic, self.critic_target = (
            Critic(obs_dim, act_dim, hidden_dims, num_qs, layer_norm) for _ in range(2))
        xavier_uniform([p for p in self.actor.parameters() if p.ndim == 2] + list(self.critic.weights))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(float(np.log(init_alpha))))
        self.to(device)
        parameters = {"actor": self.actor.parameters(), "critic": self.critic.parameters(), "alpha": [self.log_alpha]}
        self.optimizers = {name: Adam(p, learning_rate) for name, p in parameters.items()}

    @torch.no_grad()
    def act(self, obs, sample):
        """One numpy observation to one numpy action in [-1, 1]: a sample, or the tanh of the mean."""
        mean, log_std = self.actor(torch.from_numpy(obs).to(self.log_alpha.device)[None])
        u = mean + log_std.exp() * torch.randn_like(mean) if sample else mean
        return u.tanh()[0].cpu().numpy()



# === shared block: rnd ===
def update_running(mean, var, count, x):
    """Chan's parallel mean and variance (population), in place; mean, var: float64 (dim,), x: (n, dim)."""
    x = x.double()
    n, total = x.shape[0], count + x.shape[0]
    delta = x.mean(0) - mean
    m2 = var * count + x.var(0, correction=0) * n + delta.square() * (count * n / total)
    mean.add_(delta * (n / total))
    var.copy_(m2 / total)
    count.add_(n)


class RND(nn.Module):
    """Random network distillation (arXiv 1810.12894): the error e of a trained predictor of a fixed random network's
    features of s', divided by a running standard deviation, is the intrinsic reward."""

    def __init__(self, predictor, target, obs_dim, learning_rate, device, *, update_proportion=0.25, reward="max",
                 normalizer="code", reward_before_step=False):
        """predictor, target: networks (n, obs_dim) -> (n, features). reward: 'max' over features of the squared error
        (official code) or 'l2', its sum (paper). normalizer: the standard deviation is that of e ('paper', appendix A:
        the networks' scale cancels), or of rewards that were already divided ('code': these tend to e / var(e)^(1/4),
        in which it does not). reward_before_step: order of the RLPD and Cal-QL codes."""
        super().__init__()
        self.predictor, self.target = predictor, target.requires_grad_(False)
        self.update_proportion, self.reward_form, self.normalizer = update_proportion, reward, normalizer
        self.reward_before_step = reward_before_step
        for name, dim in (("obs", obs_dim), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim, dtype=torch.float64))
            self.register_buffer(f"{name}_var", torch.ones(dim, dtype=torch.float64))
            # Not 0-d: torch.compile loses what is written into a 0-d float64 tensor on the CPU.
            self.register_buffer(f"{name}_count", torch.full((1,), 1e-4, dtype=torch.float64))
        if normalizer == "paper":  # squared errors may be so small that a variance of 1 counted 1e-4 times outweighs
            self.reward_count.zero_()  # theirs for a whole run; thus the first batch replaces it
        self.to(device)
        self.optimizer = Adam(self.predictor.parameters(), learning_rate)

    def normalize(self, observations):
        return ((observations - self.obs_mean.float()) / self.obs_var.sqrt().float()).clamp(-5.0, 5.0)

    def error_of(self, predicted, features):
        """The intrinsic reward before its division, shape (n,)."""
        error = (predicted - features).square()
        return error.amax(-1) if self.reward_form == "max" else error.sum(-1)

    def divide(self, error):
        """By the running standard deviation, no mean subtracted; that of a first batch of one row is 0."""
        return error / self.reward_var.sqrt().float().clamp(min=1e-12)

    @torch.no_grad()
    def intrinsic_rewards(self, next_observations):
        """Reward of the state as it stands; nothing is updated."""
        z = self.normalize(next_observations)
        return self.divide(self.error_of(self.predictor(z), self.target(z)))

    def update(self, observations, next_observations, uniform=None):
        """One predictor step and the intrinsic rewards of the batch. Returns (rewards (batch,), predictor loss).
        uniform: draws in [0, 1) that select the training rows, shape (batch,); None draws them."""
        with torch.no_grad():
            z = self.normalize(next_observations)
            features = self.target(z)
        # --- Predictor step on a random share of the batch ---
        uniform = torch.rand(len(z), device=z.device) if uniform is None else uniform
        mask = uniform < self.update_proportion
        if z.device.type == "cpu":  # only the chosen rows; a GPU would have to wait for their number
            rows = mask.nonzero().squeeze(1)
            error = (self.predictor(z[rows]) - features[rows]).square().mean(-1)
        else:
            error = (self.predictor(z) - features).square().mean(-1) * mask
        loss = error.sum() / mask.sum().clamp(min=1)
        with torch.no_grad():
            if self.reward_before_step:
                raw = self.error_of(self.predictor(z), features)
        self.optimizer.minimize(loss)
        # --- Rewards with the statistics from before this batch, then the statistics ---
        with torch.no_grad():
            if not self.reward_before_step:
                raw = self.error_of(self.predictor(z), features)
            rewards = self.divide(raw)
            seen = rewards if self.normalizer == "code" else raw
            update_running(self.reward_mean, self.reward_var, self.reward_count, seen[:, None])
            update_running(self.obs_mean, self.obs_var, self.obs_count, observations)
        return rewards, loss.detach()

    def full_state(self):
        return {"networks": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_full_state(self, state):
        self.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_rnd(args, obs_dim, device, **options):
    networks = (mlp((obs_dim, *args.rnd_hidden_dims)) for _ in range(2))
    return RND(*networks, obs_dim, args.rnd_learning_rate, device, update_proportion=args.rnd_update_proportion,
               reward=args.rnd_reward, normalizer=args.rnd_normalizer, **options)


# === end shared block: rnd ===


# === losses and updates ===
@dataclass(frozen=True)
class Settings:
    """What an update needs beside the agent and the batch; exploration and exploitation have one each."""

    target_entropy: float
    gamma: float = 0.99
    tau: float = 0.005
    num_min_qs: int = 2
    backup_entropy: bool = True
    intrinsic_reward_scale: float = 0.0
    q_min: float = -float("inf")
    q_max: float = float("inf")


def next_actions_of(agent, batch, settings, noise):
    """What the targets need of the actor at s': next actions (rows, act_dim), and the discounted entropy term of the
    backup (rows,). noise: standard normal (rows, act_dim)."""
    actions, log_prob = agent.actor.sample(batch["next_observations"], noise)
    alpha = agent.log_alpha.exp() if settings.backup_entropy else 0.0
    return actions, -settings.gamma * batch["masks"] * alpha * log_prob


def td_target(agent, batch, settings, next_actions, entropy_term, members=None, intrinsic_rewards=None):
    """Target (rows,) of the critics: r + gamma * smallest Q of the target critics `members` (all: None), clipped to the
    bounds; entropy and bonus come after the clip (official code). masks is 0 only at true terminals."""
    next_q = agent.critic_target(batch["next_observations"], next_actions, members).amin(0)
    target = batch["rewards"] + settings.gamma * batch["masks"] * next_q
    target = target.clamp(settings.q_min, settings.q_max) + entropy_term
    return target if intrinsic_rewards is None else target + settings.intrinsic_reward_scale * intrinsic_rewards


def critic_loss(agent, batch, target):
    """Mean over ensemble and batch of (Q - target)^2, and the mean Q."""
    q = agent.critic(batch["observations"], batch["actions"])
    return (q - target).square().mean(), q.detach().mean()


def actor_loss(agent, observations, noise):
    """SAC's policy loss, alpha log pi - Q with the mean Q of the ensemble; and the policy's entropy (0-d)."""
    actions, log_prob = agent.actor.sample(observations, noise)
    q = agent.critic(observations, actions).mean(0)
    return (agent.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.detach().mean()


def alpha_loss(agent, settings, entropy):
    """Raises alpha where the entropy is below its target."""
    return agent.log_alpha.exp() * (entropy - settings.target_entropy)


def draw_noise(utd_ratio, batch_size, act_dim, num_qs, num_min_qs, device):
    """The random numbers of one update: next (utd * batch, act_dim) and actor (batch, act_dim), standard normal;
    members (utd, num_min_qs), the critics of each target."""
    normal = torch.randn((utd_ratio + 1) * batch_size, act_dim, device=device)
    order = torch.rand(utd_ratio, num_qs, device=device).argsort(dim=-1)
    return {"next": normal[:-batch_size], "actor": normal[-batch_size:], "members": order[:, :num_min_qs]}


def critic_step(agent, batch, settings, next_actions, entropy_term, members=None, intrinsic_rewards=None):
    """One step of critics and target critics on one minibatch. Returns loss and mean Q, detached."""
    with torch.no_grad():
        target = td_target(agent, batch, settings, next_actions, entropy_term, members, intrinsic_rewards)
    loss, q = critic_loss(agent, batch, target)
    agent.optimizers["critic"].minimize(loss)
    agent.update_target(settings.tau)
    return loss.detach(), q


def actor_step(agent, observations, settings, noise):
    """One step of the actor, then one of alpha, with the entropy of the actor before its step. Returns losses."""
    loss_pi, entropy = actor_loss(agent, observations, noise)
    agent.optimizers["actor"].minimize(loss_pi)
    loss_alpha = alpha_loss(agent, settings, entropy)
    agent.optimizers["alpha"].minimize(loss_alpha)
    return {"losses/actor": loss_pi.detach(), "losses/alpha": loss_alpha.detach(), "losses/entropy": entropy,
            "losses/alpha_value": agent.log_alpha.detach().exp()}


def sac_update(agent, batch, settings, utd_ratio=1, intrinsic_rewards=None, noise=None,
               steps=(critic_step, actor_step)):
    """One RLPD update: utd_ratio critic steps, each on its own part of the batch, then an actor and an alpha step on
    the last part. batch: observations, actions, rewards, masks, next_observations with utd_ratio * n rows;
    intrinsic_rewards: one for each row, or None. noise: see draw_noise. steps: the two kinds of step, perhaps compiled.
    Returns detached scalars, of the last part."""
    rows, act_dim = batch["actions"].shape
    n, num_qs = rows // utd_ratio, len(agent.critic.weights[0])
    if noise is None:
        noise = draw_noise(utd_ratio, n, act_dim, num_qs, settings.num_min_qs, batch["actions"].device)
    with torch.no_grad():  # one pass for all parts: actor and alpha do not change in between
        next_actions, entropy_term = next_actions_of(agent, batch, settings, noise["next"])
    # --- Critic: a part of the batch and a target network step for each ---
    for j in range(utd_ratio):
        here = slice(j * n, (j + 1) * n)
        part = {name: value[here] for name, value in batch.items()}
        members = noise["members"][j] if settings.num_min_qs < num_qs else None
        bonus = None if intrinsic_rewards is None else intrinsic_rewards[here]
        loss_q, q = steps[0](agent, part, settings, next_actions[here], entropy_term[here], members, bonus)
    # --- Actor and alpha, with the new critics ---
    losses = steps[1](agent, part["observations"], settings, noise["actor"])
    return {"losses/critic": loss_q, "losses/q_mean": q, **losses}


def make_update(args, buffer, agent, settings, rnd=None, utd_ratio=1):
    """update(rows) -> losses: one update of the agent on raw buffer rows (utd_ratio * batch, width), with RND's.
    --compile compiles one critic step, which the loop calls again and again (the unrolled loop would take minutes to
    compile), and the actor's; --cudagraphs captures the whole update."""
    steps = [compiled(step) if args.compile else step for step in (critic_step, actor_step)]

    def update(rows):
        batch = task_batch(buffer.split(rows), args)
        batch = {name: batch[name] for name in ("observations", "actions", "rewards", "masks", "next_observations")}
        if rnd is None:
            return sac_update(agent, batch, settings, utd_ratio, steps=steps)
        # RND: the rewards of the whole batch, then one predictor step
        bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"])
        losses = sac_update(agent, batch, settings, utd_ratio, bonus, steps=steps)
        return {**losses, "losses/rnd": rnd_loss, "rnd/batch_intrinsic_reward": bonus.mean()}

    return CudaGraph(update) if args.cudagraphs else update


def sample_symmetric(buffer, offline_size, offline_ratio, utd_ratio, batch_size):
    """Raw rows (utd_ratio * batch_size, width) in which every minibatch has the same number of offline ones, first."""
    offline = round(offline_ratio * batch_size) if offline_size else 0
    device = buffer.data.device
    online = torch.randint(offline_size, buffer.size, (utd_ratio, batch_size - offline), device=device)
    if offline:
        online = torch.cat([torch.randint(offline_size, (utd_ratio, offline), device=device), online], dim=1)
    return buffer.data.index_select(0, online.flatten())


# === shared block: compiled updates ===
def task_batch(batch, args):
    """Rewards and masks of sampled raw rows as the learner sees them."""
    raw = batch["rewards"]
    masks = 1.0 - batch["terminations"] if args.mask_reward is None else (raw != args.mask_reward).float()
    return {**batch, "rewards": (raw + args.reward_bias) * args.reward_scale, "masks": masks}


def compiled(function):
    """A function of an update under torch.compile: one graph of losses, gradients and Adam."""
    # RND's number of chosen rows varies.
    torch._dynamo.config.trace_autograd_ops = torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch._inductor.config.fallback_random = True  # the random numbers of the eager update
    # A code object of its own: compiled versions are kept, and looked through at each call, per code object.
    code = function.__code__.replace()
    return torch.compile(FunctionType(code, function.__globals__, closure=function.__closure__))


class CudaGraph:
    """Replays update(rows) as one CUDA graph: three eager calls on a side stream (every one a real update), then
    capture. The returned tensors are overwritten by the next call."""

    def __init__(self, update):
        self.update, self.calls, self.graph, self.stream = update, 0, None, torch.cuda.Stream()

    def __call__(self, rows):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.update(rows)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.rows, self.graph = rows.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = self.update(self.rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.losses


# === end shared block: compiled updates ===


# === shared block: evaluation ===
def evaluate(env, act, episodes, seed, frames=None):
    """Episodes with act(obs) -> action. Returns a list of dicts: return, length, success (at any step), max_reward.
    Start states, and the CPU's random numbers that act may draw, depend on `seed` and the episode alone; the training's
    random numbers are untouched. frames: a list that receives the rendered pictures, or None."""
    results, training_rng = [], torch.get_rng_state()
    for i in range(episodes):
        torch.default_generator.manual_seed(derive_seed(seed, "evaluation", i))
        obs, _ = env.reset(seed=derive_seed(seed, "evaluation", i))
        episode, done = {"return": 0.0, "length": 0, "success": False, "max_reward": -float("inf")}, False
        while not done:
            if frames is not None:
                frames.append(env.render())
            obs, reward, terminated, truncated, info = env.step(act(obs))
            done = terminated or truncated
            episode["return"] += reward
            episode["length"] += 1
            episode["success"] = episode["success"] or info["success"]
            episode["max_reward"] = max(episode["max_reward"], reward)
        results.append(episode)
    torch.set_rng_state(training_rng)
    return results


def summarize(env_id, episodes):
    """Means over the episodes of evaluate, under the names of the metrics."""
    scores = [normalized_score(ENVIRONMENTS[env_id], episode) for episode in episodes]
    return {
        "eval/return": float(np.mean([e["return"] for e in episodes])),
        "eval/success_rate": float(np.mean([e["success"] for e in episodes])),
        "eval/normalized_score": float(np.mean(scores)),
        "eval/episodes": len(episodes),
    }


# === end shared block: evaluation ===


# === shared block: checkpoints ===
def atomic_write(path, content):
    """Write bytes so that at any moment the file is the old one or the new one, complete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def save_torch(path, content):
    """torch.save, atomically. content: tensors, numbers, strings, and lists and dicts of them."""
    stream = io.BytesIO()
    torch.save(content, stream)
    atomic_write(path, stream.getvalue())


def load_torch(path, script, device):
    """A file of save_torch, read with weights_only=True; exit 2 if it is damaged or another script's."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is not there; the run has not come that far")
    except Exception as error:  # torch raises many kinds for a damaged file
        fail(f"{path} cannot be read ({type(error).__name__}); it is damaged: remove the run directory, or restore it")
    if not isinstance(content, dict) or content.get("script") != script:
        fail(f"{path} was not written by {script}; give a run of that script")
    return content


def get_rng(device):
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# === end shared block: checkpoints ===


# === shared block: session ===
# What all phases share is in one namespace, s: args, device, environments, buffer, learners, progress (the counters).


def new_session(args, script, source=None):
    """The run directory is free or can be resumed, the device works; nothing is written. source: config of the run
    whose data an --exploit-only run takes over."""
    path = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if path.exists() and not args.resume:
        fail(f"{path} exists; continue it with --resume, or choose another --seed or --exp-name")
    config = read_config(path, script) if (path / "config.json").exists() else None
    if config:
        changed = [name for name, value in asdict(args).items() if name not in NOT_SETTINGS
                   and json.dumps(config["args"].get(name)) != json.dumps(value)]
        if changed:
            was = ", ".join(f"--{name.replace('_', '-')} was {config['args'].get(name)}" for name in changed)
            fail(f"--resume needs the settings that {path} was started with: {was}")
    device, precision = setup_torch(args)
    saved = load_torch(path / "checkpoint.pt", script, device) if (path / "checkpoint.pt").exists() else None
    if saved and saved.get("env_id") != args.env_id:
        fail(f"{path / 'checkpoint.pt'} belongs to another task; restore the run's own, or remove the run directory")
    progress = dict(phase="pretrain", grad_step=0, env_step=0, episode=0, saved_steps=0)
    return SimpleNamespace(args=args, script=script, path=path, config=config, source=source, saved=saved,
                           device=device, precision=precision, progress=progress, losses=LossHistory(), learners={},
                           retraining=None, bar=None, run=None)


def load_offline(s, online_rows, prepare=lambda data: (data, {})):
    """Environments, offline data and a replay buffer with room for online_rows more transitions. prepare(data) -> (data
    as the script wants it, also with scalar columns of its own, additions to the report)."""
    args = s.args
    s.env, s.eval_env = make_env(args.env_id), make_env(args.env_id)
    data, s.report = load_dataset(
        args.env_id, s.env, dataset_ids=args.dataset_id, dataset_path=args.dataset_path,
        seed=s.source["args"]["seed"] if s.source else args.seed, truncate_episodes=args.truncate_episodes,
        data_subset=args.data_subset, remove_discs=args.remove_discs, kitchen_cumulative=args.kitchen_cumulative)
    for started in filter(None, (s.config, s.source)):
        if started["dataset"]["sha256"] != s.report["sha256"]:
            fail(f"the offline data {s.report['source']} is not what the run was started with (sha256 differs)")
    data, more = prepare(data)
    s.report |= more
    (s.obs_dim,), (s.act_dim,) = s.env.observation_space.shape, s.env.action_space.shape
    shapes = dict(observations=(s.obs_dim,), actions=(s.act_dim,), rewards=(), next_observations=(s.obs_dim,),
                  terminations=(), episodes=())
    shapes |= {name: () for name in data if name not in shapes}
    s.buffer = ReplayBuffer(shapes, len(data["rewards"]) + online_rows, s.device)
    s.buffer.extend(data)
    s.offline_size, s.offline_episodes = s.buffer.size, int(data["episodes"].max(initial=-1)) + 1


def start_run(s):
    """Print the report of the data, create or reopen the run directory, and go back to its checkpoint."""
    args = s.args
    print(f"{args.env_id}: offline data")
    for key, value in s.report.items():
        print(f"  {key.replace('_', ' ')}: {value}")
    print(f"  replay buffer: {len(s.buffer.data)} transitions, {s.buffer.bytes / 2**20:.0f} MiB on {s.device}")
    config = s.config or {"script": s.script, "args": asdict(args), **provenance(s.device, s.precision),
                          "dataset": s.report}
    try:
        s.run = Run(s.path, config, dict(project=args.wandb_project, mode=args.wandb_mode) if args.track else None)
    except OSError as error:
        fail(f"cannot write in {s.path} ({error.strerror}); make room, or choose another --runs-dir", code=1)
    if not args.resume:
        return
    if s.saved is None:  # killed before the first checkpoint
        return s.run.truncate(dict.fromkeys(Run.FILES, 0))
    s.progress.update(s.saved["progress"])
    s.run.truncate(s.saved["offsets"])
    s.losses.load_state_dict(s.saved["losses"], s.device)
    set_rng(s.saved["rng"], s.device)
    if s.learners:
        s.buffer.load_chunks(s.path / "replay", s.progress["saved_steps"])
    for name, learner in s.learners.items():
        learner.load_full_state(s.saved["learners"][name])
    s.retraining, s.saved = s.saved["retraining"], None


def save_checkpoint(s, retraining=None):
    """Everything a resumed process needs, in one file; new online transitions go to a file of their own first.
    retraining: dict with agent, losses and outer_rng of the retraining under way."""
    p = s.progress
    s.losses.check(p["grad_step"])
    if p["env_step"] > p["saved_steps"]:
        s.buffer.save_chunk(s.path / "replay", s.offline_size, p["saved_steps"], p["env_step"])
        p["saved_steps"] = p["env_step"]
    content = {
        "script": s.script, "env_id": s.args.env_id, "progress": p, "offsets": s.run.offsets(),
        "rng": get_rng(s.device), "losses": s.losses.state_dict(), "retraining": None,
        "learners": {name: learner.full_state() for name, learner in s.learners.items()},
    }
    if retraining:
        retraining["losses"].check(p["retrain_step"])
        content["rng"] = retraining["outer_rng"]
        content["retraining"] = {"agent": retraining["agent"].full_state(), "rng": get_rng(s.device),
                                 "losses": retraining["losses"].state_dict()}
    save_torch(s.path / "checkpoint.pt", content)


def phase_bar(s, phase, total, initial):
    s.bar = tqdm(total=total, initial=initial, desc=phase, unit="step", dynamic_ncols=True, smoothing=0.05)
    s.clock = (time.perf_counter(), initial)
    return s.bar


def log_losses(s, phase, env_step, step, losses, **extra):
    """Mean losses since the last record, to metrics.jsonl; speed to timing.jsonl. Returns the means."""
    where, means = {"phase": phase, "env_step": env_step, "grad_step": step}, losses.means(step)
    s.run.log("metrics.jsonl", {**where, **means, **extra})
    now, (then, before) = time.perf_counter(), s.clock
    s.run.log("timing.jsonl", {**where, "charts/SPS": (s.bar.n - before) / max(now - then, 1e-9), "time": time.time()})
    s.clock = (now, s.bar.n)
    return means


def log_evaluation(s, phase, env_step, step, agent):
    """Evaluate the agent without sampling; the summary goes to metrics.jsonl, every episode to evals.jsonl."""
    start = time.perf_counter()
    episodes = evaluate(s.eval_env, lambda obs: agent.act(obs, sample=False), s.args.eval_episodes, s.args.seed)
    where, summary = {"phase": phase, "env_step": env_step, "grad_step": step}, summarize(s.args.env_id, episodes)
    s.run.log("metrics.jsonl", {**where, **summary})
    s.run.log("evals.jsonl", {**where, "episodes": episodes})
    s.bar.set_postfix(score=f"{summary['eval/normalized_score']:.1f}")
    s.clock = (s.clock[0] + time.perf_counter() - start, s.clock[1])  # evaluation is not training time
    return summary


def play_episode(s):
    """One training episode (cut short at the end of the budget): s.choose_action(obs), store, s.learn(), one update on
    the data so far, or None. Yields the environment step after each; then the episode is counted and logged."""
    args, p = s.args, s.progress
    obs, _ = s.env.reset(seed=derive_seed(args.seed, "training episode", p["episode"]))
    episode, done = {"return": 0.0, "length": 0, "success": False}, False
    while not done and p["env_step"] < args.online_steps:
        action = s.choose_action(obs)
        next_obs, reward, terminated, truncated, info = s.env.step(action)
        s.buffer.add(observations=obs, actions=action, rewards=reward, next_observations=next_obs,
                     terminations=terminated, episodes=s.offline_episodes + p["episode"])
        obs, done = next_obs, terminated or truncated
        episode["return"] += reward
        episode["length"] += 1
        episode["success"] = episode["success"] or info["success"]
        p["env_step"] += 1
        if losses := s.learn():
            s.losses.add(losses)
            p["grad_step"] += 1
        s.bar.update()
        yield p["env_step"]
    p["episode"] += 1
    s.run.log("metrics.jsonl", {"phase": "online", "env_step": p["env_step"], "grad_step": p["grad_step"],
                                **{f"charts/episodic_{key}": value for key, value in episode.items()}})


def log_online_step(s, t, wanted):
    """The records that are due after online step t. Returns the evaluation's summary where one was due or wanted."""
    args, grad_step = s.args, s.progress["grad_step"]
    if t % args.log_every == 0:
        log_losses(s, "online", t, grad_step, s.losses, **recent_intrinsic_reward(s))
    if wanted or t % args.eval_every == 0:
        return log_evaluation(s, "online", t, grad_step, s.explorer)


def recent_intrinsic_reward(s):
    """Figure 3 (left): mean, scaled mean and std of the intrinsic reward over the last 1000 online transitions."""
    if "rnd" not in s.learners:
        return {}
    start = max(s.offline_size, s.buffer.size - 1000)
    next_observations = s.buffer.split(s.buffer.data[start : s.buffer.size])["next_observations"]
    reward = s.learners["rnd"].intrinsic_rewards(next_observations)
    mean, std = reward.mean().item(), reward.std(correction=0).item()
    scaled = s.args.intrinsic_reward_scale * mean
    return {"rnd/online_mean": mean, "rnd/online_scaled_mean": scaled, "rnd/online_std": std}


def print_table(s, steps, columns):
    """Scores at the environment steps, one column for each policy; the numbers are also in results.json. columns:
    {name: {str(env_step): summary}}."""
    rows = [{"env_step": t, **{name: values.get(str(t)) for name, values in columns.items()}} for t in sorted(steps)]
    atomic_write(s.path / "results.json", json.dumps({"env_id": s.args.env_id, "rows": rows}, indent=1).encode())
    print(f"\n{s.args.env_id}, seed {s.args.seed}, {s.args.eval_episodes} episodes: normalised score (success rate)")
    print(f"{'env step':>10}  " + "  ".join(f"{name:>18}" for name in columns))
    for row in rows:
        cells = [f"{r['eval/normalized_score']:9.1f} ({r['eval/success_rate']:6.1%})" if r else "-"
                 for r in (row[name] for name in columns)]
        print(f"{row['env_step']:>10}  " + "  ".join(f"{cell:>18}" for cell in cells))
    print(f"saved in {s.path}")
    return rows


@contextmanager
def errors_in_one_line(s):
    """What can stop a run that has started, said in one line, with how to go on."""
    try:
        yield
    except NonFiniteLoss as error:
        fail(f"{error}; stopped, the checkpoint before it is kept in {s.path}", code=1)
    except OSError as error:
        fail(f"cannot write in {s.path} ({error.strerror or error}); make room and continue with --resume", code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; continue with --resume, the last checkpoint is in {s.path}", code=130)


def evaluate_saved(args, load_policy, pattern):
    """--eval-only: the run's last policy named like pattern ('..._*.pt', * the environment step), on start states that
    training never saw; --video records three episodes. load_policy(path) -> (act, content)."""
    setup_torch(replace(args, compile=False))
    run = Path(args.eval_only)
    policies = sorted(run.glob(pattern), key=lambda path: int(path.stem.split("_")[1]))
    if not policies:
        fail(f"{run} has no policy {pattern} yet; finish the run first (--resume)")
    act, content = load_policy(policies[-1])
    seed = derive_seed(args.seed, "eval-only")
    if args.video:
        import imageio

        try:
            env, frames = make_env(content["env_id"], "rgb_array"), []
            evaluate(env, act, min(3, args.eval_episodes), seed, frames)
        except Exception as error:  # GL back ends fail in many ways
            fail(f"cannot render ({error}); set MUJOCO_GL=egl, or MUJOCO_GL=osmesa with libosmesa6 installed")
        video, fps = run / f"{policies[-1].stem}.mp4", env.metadata.get("render_fps", 30)
        imageio.mimwrite(video.with_suffix(".tmp.mp4"), frames, fps=fps, macro_block_size=2)
        os.replace(video.with_suffix(".tmp.mp4"), video)
        print(f"video: {video} ({len(frames)} frames)")
    episodes = evaluate(make_env(content["env_id"]), act, args.eval_episodes, seed)
    summary = summarize(content["env_id"], episodes)
    result = {"policy": policies[-1].name, **summary, "per_episode": episodes}
    atomic_write(run / f"{policies[-1].stem}_eval.json", json.dumps(result, indent=1).encode())
    print("  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    return summary


# === end shared block: session ===


# === shared block: online phase ===
def online(s, retrain, save_policy, play=lambda s: play_episode(s)):
    """Algorithm 1, the online loop: the exploration policy alone acts; one optimistic update per step on all data.
    play(s): one training episode with its updates; yields the environment step after each."""
    args, p = s.args, s.progress
    last_checkpoint = p["saved_steps"]
    with phase_bar(s, "online", args.online_steps, p["env_step"]):
        while True:
            retrain_due(s, retrain)
            if p["env_step"] >= args.online_steps:
                break
            for t in play(s):
                wanted = t in args.retrain_at or t == args.online_steps
                summary = log_online_step(s, t, wanted)
                if wanted:
                    p["exploration"][str(t)] = summary
                    snapshot(s, t, save_policy)
            due = [t for t in args.retrain_at if t <= p["env_step"] and t not in p["retrained"]]
            finished = p["env_step"] >= args.online_steps
            if due or finished or p["env_step"] - last_checkpoint >= args.checkpoint_every:
                save_checkpoint(s)
                last_checkpoint = p["env_step"]
    p["phase"] = "done"
    save_checkpoint(s)


def snapshot(s, t, save_policy):
    """What the retraining for time t may need later: the exploration policy and the RND as they stand."""
    save_policy(s, s.explorer, s.path / f"exploration_{t}.pt")
    if s.rnd:
        save_torch(s.path / f"rnd_{t}.pt", {"script": s.script, "rnd": s.rnd.state_dict()})


# === end shared block: online phase ===


# === shared block: retraining ===
def retrain_due(s, retrain):
    """Retrain for every t that the online phase has passed and that has no exploitation policy yet."""
    for t in s.args.retrain_at:
        if t <= s.progress["env_step"] and t not in s.progress["retrained"]:
            outer_rng = get_rng(s.device)  # retraining leaves no trace in the online phase that goes on after it
            torch.manual_seed(derive_seed(s.args.seed, "retraining", t))
            retrain(s, t, outer_rng)
            s.progress["retrained"].append(t)
            s.progress["retrain_step"] = 0
            set_rng(outer_rng, s.device)
            save_checkpoint(s)


def retrain_loop(s, t, agent, step, outer_rng, stop=lambda means: False):
    """The gradient steps of one retraining with evaluations and checkpoints, from where it was interrupted. step():
    one gradient step of the agent, returns losses. stop(mean losses since the last record) -> True: that was the last
    step. Returns the last evaluation's summary."""
    args, p, losses, online_bar = s.args, s.progress, LossHistory(), s.bar
    if s.retraining:  # this retraining was interrupted
        agent.load_full_state(s.retraining["agent"])
        losses.load_state_dict(s.retraining["losses"], s.device)
        set_rng(s.retraining["rng"], s.device)
        s.retraining = None
    last = args.retrain_steps
    with phase_bar(s, f"retrain t={t}", last, p["retrain_step"]) as bar:
        if p["retrain_step"] == 0:
            log_evaluation(s, "retrain", t, 0, agent)
        while p["retrain_step"] < last:
            losses.add(step())
            p["retrain_step"] += 1
            bar.update()
            done = p["retrain_step"]
            if done % args.log_every == 0 and stop(log_losses(s, "retrain", t, done, losses)):
                last = done
            if done % args.eval_every == 0 or done == last:
                summary = log_evaluation(s, "retrain", t, done, agent)
            if done % args.checkpoint_every == 0 and done < last:
                save_checkpoint(s, dict(agent=agent, losses=losses, outer_rng=outer_rng))
    losses.check(p["retrain_step"])
    if online_bar is not None:
        s.bar, s.clock = online_bar, (time.perf_counter(), online_bar.n)
    p["exploitation"][str(t)] = summary
    return summary


def high_reward_rows(s, n):
    """Indices (k,) of the high-reward transitions among the first n (section 4.2), on the device; k may be 0."""
    if not s.args.retrain_upsample:
        return torch.empty(0, dtype=torch.long)
    batch = s.buffer.split(s.buffer.data[:n])
    high = batch["rewards"] >= s.args.upsample_reward
    if s.args.upsample_trajectories:
        high = torch.isin(batch["episodes"], batch["episodes"][high].unique())
    rows = high.nonzero().squeeze(1)
    if not len(rows):
        tqdm.write(f"no raw reward of at least {s.args.upsample_reward:g} in the data: sampling stays uniform")
    return rows


def report(s):
    """The table of both policies' scores at every retraining time and, after an online phase, at its end."""
    end = () if s.args.exploit_only else (s.args.online_steps,)
    columns = {name: s.progress[name] for name in ("exploration", "exploitation")}
    return print_table(s, {*s.args.retrain_at, *end}, columns)


def load_source(s):
    """--exploit-only: the online data and the exploration scores of the finished run."""
    source, p = Path(s.args.exploit_only), s.progress
    saved = load_torch(source / "checkpoint.pt", s.script, "cpu")["progress"]
    needed = max(s.args.retrain_at, default=0)
    if needed > saved["saved_steps"]:
        fail(f"--retrain-at {needed}: {source} holds {saved['saved_steps']} online transitions")
    s.buffer.load_chunks(source / "replay", needed)
    p.update(phase="exploit-only", env_step=needed, saved_steps=needed)
    for record in map(json.loads, (source / "metrics.jsonl").read_text().splitlines()):
        if record["phase"] == "online" and "eval/return" in record:
            p["exploration"][str(record["env_step"])] = {k: v for k, v in record.items() if k.startswith("eval/")}


# === end shared block: retraining ===


# === phases ===
def before_learning(s):
    """RLPD does not pretrain: the first evaluation is the untrained policy's."""
    with phase_bar(s, "online", s.args.online_steps, 0):
        log_evaluation(s, "online", 0, 0, s.explorer)
    s.progress["phase"] = "online"
    save_checkpoint(s)


def retrain(s, t, outer_rng):
    """Algorithm 1, last line: a separate SAC agent, from scratch, on D_off + D_on[:t], task reward only."""
    args, n = s.args, s.offline_size + t
    agent = make_agent(args, s.obs_dim, s.act_dim, s.device, args.retrain_critics, args.retrain_layer_norm)
    raw = s.buffer.split(s.buffer.data[:n])["rewards"]
    low, high = ((r + args.reward_bias) * args.reward_scale / (1 - args.gamma) for r in (raw.min(), raw.max()))
    bounds = dict(q_min=float(min(low, high)), q_max=float(max(low, high))) if args.retrain_q_bounds else {}
    update = make_update(args, s.buffer, agent, make_settings(args, s.act_dim, **bounds))
    high_rows = high_reward_rows(s, n)
    # extra / (batch_size + extra) = alpha
    extra = round(args.batch_size * args.retrain_upsample / (1 - args.retrain_upsample)) if len(high_rows) else 0
    retrain_loop(s, t, agent, lambda: update(s.buffer.sample(args.batch_size + extra, n, high_rows, extra)), outer_rng)
    save_policy(s, agent, s.path / f"exploitation_{t}.pt")


def make_agent(args, obs_dim, act_dim, device, num_qs, layer_norm):
    return Agent(obs_dim, act_dim, args.hidden_dims, args.learning_rate, device, num_qs=num_qs, layer_norm=layer_norm,
                 init_alpha=args.init_alpha)


def make_settings(args, act_dim, **options):
    target_entropy = -act_dim / 2 if args.target_entropy is None else args.target_entropy
    return Settings(target_entropy, args.gamma, args.tau, args.num_min_qs, args.backup_entropy, **options)


def save_policy(s, agent, path):
    """A policy that load_policy (and nothing else) needs. Observations are not normalised; actions are in [-1, 1]."""
    sizes = dict(obs_dim=s.obs_dim, act_dim=s.act_dim, hidden_dims=list(s.args.hidden_dims))
    save_torch(path, {"script": SCRIPT, "env_id": s.args.env_id, **sizes, "observation_normalization": None,
                      "actor": agent.actor.state_dict(), "agent": agent.state_dict()})


def load_policy(path, device="cpu"):
    """Returns (act, content) of a file of save_policy; act(obs) is the deterministic action, numpy to numpy."""
    content = load_torch(path, SCRIPT, device)
    agent = Agent(content["obs_dim"], content["act_dim"], content["hidden_dims"], 0.0, device, num_qs=1,
                  layer_norm=False)
    agent.actor.load_state_dict(content["actor"])
    return lambda obs: agent.act(obs, sample=False), content


# === main ===
def set_goal(args):
    """--goal-x: the threshold of this process's task."""
    if args.goal_x is not None:
        ENVIRONMENTS[args.env_id] = replace(ENVIRONMENTS[args.env_id], threshold=args.goal_x)


def open_session(args):
    """Check everything, load the data and build the agents; nothing is written before all of it has worked."""
    check_args(args)
    source = read_config(args.exploit_only, SCRIPT) if args.exploit_only else None
    if source and source["args"]["goal_x"] != args.goal_x:
        fail(f"--goal-x: the rewards in {args.exploit_only} are those of its own goal; leave it out")
    set_goal(args)
    s = new_session(args, SCRIPT, source)
    load_offline(s, max(args.retrain_at, default=0) if source else args.online_steps)
    s.progress |= dict(retrain_step=0, retrained=[], exploration={}, exploitation={})
    if source:
        load_source(s)
    else:
        build_explorer(s)
    start_run(s)
    return s


def build_explorer(s):
    args = s.args
    s.explorer = make_agent(args, s.obs_dim, s.act_dim, s.device, args.num_qs, layer_norm=True)
    s.rnd = make_rnd(args, s.obs_dim, s.device, reward_before_step=True) if args.intrinsic_reward_scale else None
    if s.rnd:
        xavier_uniform([p for p in s.rnd.parameters() if p.ndim == 2])
    s.learners = {"explorer": s.explorer, **({"rnd": s.rnd} if s.rnd else {})}
    settings = make_settings(args, s.act_dim, intrinsic_reward_scale=args.intrinsic_reward_scale)
    s.explore_update = make_update(args, s.buffer, s.explorer, settings, s.rnd, args.utd_ratio)

    def choose_action(obs):
        if s.progress["env_step"] < args.learning_starts:
            return torch.rand(s.act_dim).numpy() * 2 - 1
        return s.explorer.act(obs, sample=True)

    def learn():
        if s.progress["env_step"] > args.learning_starts:
            return s.explore_update(sample_symmetric(s.buffer, s.offline_size, args.offline_ratio, args.utd_ratio,
                                                     args.batch_size))

    s.choose_action, s.learn = choose_action, learn


def main(args):
    if args.eval_only:
        set_goal(args)
        return evaluate_saved(args, load_policy, "exploitation_*.pt")
    s = open_session(args)
    with errors_in_one_line(s):
        if s.progress["phase"] == "exploit-only":
            retrain_due(s, retrain)
        if s.progress["phase"] == "pretrain":
            before_learning(s)
        if s.progress["phase"] == "online":
            online(s, retrain, save_policy)
        return report(s)


if __name__ == "__main__":
    main(parse_args())
