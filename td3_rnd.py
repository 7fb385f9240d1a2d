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
"""TD3 + RND: the authors' TD3 with RND's exploration bonus, from scratch on a buffer that starts with the offline data.

Baseline of "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv
2310.08558, Tables 1 and 2. TD3: arXiv 1802.09477, Algorithm 1. RND: arXiv 1810.12894. The policy that explores is the
one that is evaluated; nothing is pretrained and nothing retrained.

    python td3_rnd.py --env-id maze2d-missing-data-large-v1 --seed 3                           # TD3 + RND
    python td3_rnd.py --env-id pen-binary-v0 --intrinsic-reward-scale 0 --exp-name td3         # without the bonus
    python td3_rnd.py --env-id pen-binary-v0 --variant fujimoto --exp-name td3_rnd_fujimoto    # the published TD3
    python td3_rnd.py --env-id kitchen-mixed-v0 --scale 0.01                                   # every budget x 0.01
    python td3_rnd.py --eval-only runs/pen-binary-v0__td3_rnd__1 --episodes 100 --video        # the saved policy

losses/q_mean in metrics.jsonl is the mean Q of the batch, whose explosion Figure 5 shows.

Where paper and official code differ, the paper wins where it is explicit, else the code, except where the published
coefficients were tuned with the code's form (4). Each choice and exception:
 1. TD3 is the code's: "no new hyper-parameters are introduced" (B.3) holds for that one alone. Tanh-squashed Gaussian
    with a learnt log_std that explores by its own noise, no target actor, no delay, policy against the mean of both
    critics before their step; dropout (in the policy loss only) and log_std_min per task as IQL's exploration.
    --variant fujimoto is the TD3 that the paper cites: deterministic policy, target policy smoothing, a target actor,
    one policy step in two; without dropout.
 2. Networks, learning rate (3e-4) and batch (256) are those of IQL here; Fujimoto's critic loss is the sum over the two
    critics, here it is their mean, which Adam turns into the same step.
 3. No random steps at the start (Fujimoto: 25,000): the buffer holds the offline data, and the bonus explores.
 4. The bonus is added to the target, with IQL + RND's coefficients: 10 on kitchen and the mazes, 0.5 on Adroit.
    RND's own choices (largest squared error, layers, --rnd-normalizer code) are those of iql_ooo.py.
 5. Rewards are shifted and masked as for IQL (kitchen r - 4, masked at 4; mazes r - 1). Q targets are not clipped: no
    bounds in the code's TD3, nor in Fujimoto's.
 6. Offline and online data are sampled uniformly from one append-only buffer.
 7. AntMaze runs for the 1.5M steps that Table 2 reports (IQL's exploration config: 2M).
 8. Kitchen observations are 30 of D4RL's 60 numbers, without the goal, which never changes: a reading.
 9. Today's packages: README, "Data and environments" (signs, horizons, mazes, goals, noise).
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
SCRIPT = "td3_rnd"  # written into every file of a run, also by a renamed copy


@dataclass
class Args:
    # --- experiment ---
    env_id: str = "hammer-truncated-expert-v1"
    """Task of the paper: one of the nine with offline data."""
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
# === shared block: online arguments ===
    # --- online phase ---
    online_steps: int = 500_000
    """Online phase: environment steps, one gradient step each."""
    eval_every: int = 50_000
    """Steps of the phase under way between evaluations."""
    eval_episodes: Annotated[int, tyro.conf.arg(aliases=["--episodes"])] = 100
    """Episodes of one evaluation."""
    # --- optimisation ---
    batch_size: int = 256
    """Transitions of one gradient step."""
    learning_rate: float = 3e-4
    """Adam's rate for actor, critic and value."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """Polyak rate of the target critic, per gradient step."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Hidden layers of actor, critic and value."""
# === end shared block: online arguments ===
# === shared block: baseline arguments ===
    save_at: tuple[int, ...] = (250_000, 500_000)
    """Environment steps t whose policy is saved and scored in the table, beside the last; as OOO's retrain_at."""
# === end shared block: baseline arguments ===
    # --- TD3 ---
    variant: Literal["official", "fujimoto"] = "official"
    """official: the authors' simplified TD3, with the next two options; fujimoto: the published one, with the rest."""
    dropout: float = 0.0
    """Dropout rate of the policy's hidden layers, in the policy loss only."""
    log_std_min: float = -5.0
    """Lower clip of the policy's log standard deviation (upper: 2)."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on the actions that are played."""
    policy_noise: float = 0.2
    """Target policy smoothing: standard deviation of the noise on the target's actions."""
    noise_clip: float = 0.5
    """The smoothing noise is clipped to [-noise_clip, noise_clip]."""
    policy_delay: int = 2
    """Critic steps for one step of the policy and of all targets."""
    # --- RND ---
    intrinsic_reward_scale: float = 0.5
    """Coefficient of the intrinsic reward; 0: no RND."""
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


# === shared block: baseline tasks ===
BUDGETS = ("offline_steps", "online_steps", "learning_starts", "save_at", "eval_every", "log_every", "checkpoint_every")

# What the two baselines take over of a task: budget, data, rewards. Official IQL configs; steps: Tables 1 and 2.
ADROIT_TASK = dict(online_steps=1_000_000, save_at=(250_000, 500_000, 750_000, 1_000_000))
KITCHEN_TASK = dict(
    online_steps=4_000_000, save_at=(1_000_000, 2_000_000, 3_000_000, 4_000_000), reward_bias=-4.0, mask_reward=4.0)
BASELINE_TASKS = {
    **dict.fromkeys(("pen-binary-v0", "door-binary-v0", "relocate-binary-v0"), ADROIT_TASK),
    **dict.fromkeys(("kitchen-partial-v0", "kitchen-mixed-v0", "kitchen-complete-v0"), KITCHEN_TASK),
    "antmaze-goal-missing-large-v2": dict(
        online_steps=1_500_000, save_at=(500_000, 750_000, 1_000_000, 1_250_000, 1_500_000), reward_bias=-1.0,
        remove_discs=((14.0, -12.0, 2.5),)),
    # Goal, top-left and bottom-left of the drawn map (section 5.2; where the corners lie is not published).
    "maze2d-missing-data-large-v1": dict(
        reward_bias=-1.0, data_subset=500_000,
        remove_discs=((3.5, -3.0, 1.5), (-4.5, 3.0, 1.5), (-4.5, -3.0, 2.0))),
    "hammer-truncated-expert-v1": dict(truncate_episodes=20),
}
# === end shared block: baseline tasks ===
# Policy and bonus are those of IQL + RND's exploration; the bonus coefficient of Adroit and hammer is 0.5.
WIDE_BONUS = dict(intrinsic_reward_scale=10.0)
IQL_OF = {"kitchen": dict(WIDE_BONUS, dropout=0.1), "antmaze": WIDE_BONUS, "maze2d": WIDE_BONUS,
          "hammer": dict(log_std_min=-2.0)}
TASKS = {env_id: {**row, **IQL_OF.get(env_id.split("-")[0], dict(dropout=0.1))}
         for env_id, row in BASELINE_TASKS.items()}


def parse_args(argv=None):
    budgets = [name for name in BUDGETS if hasattr(Args, name)]
    return parse_command_line(Args, TASKS, budgets, SCRIPT, __doc__, argv)


def check_args(args):
    """Exit 2 with one line for values that cannot work together."""
    check_times(args, "save_at")
    check_limits(args, dict(policy_delay=1, exploration_noise=0, policy_noise=0, noise_clip=0))


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
class TD3Agent(nn.Module):
    """The networks of Fujimoto's TD3 and their optimisers: action = tanh(actor(s)), clipped noise where it acts."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, exploration_noise=0.1):
        super().__init__()
        self.actor, self.actor_target = (mlp((obs_dim, *hidden_dims, act_dim)) for _ in range(2))
        self.critic, self.critic_target = (Critic(obs_dim, act_dim, hidden_dims) for _ in range(2))
        self.pairs = [(self.actor, self.actor_target), (self.critic, self.critic_target)]
        for network, target in self.pairs:
            target.load_state_dict(network.state_dict())
            target.requires_grad_(False)
        self.exploration_noise, self.device, self.act_dim = exploration_noise, device, act_dim
        self.register_buffer("actor_loss", torch.zeros(1))  # of the latest policy step
        self.to(device)
        self.optimizers = {"critic": Adam(self.critic.parameters(), learning_rate),
                           "actor": Adam(self.actor.parameters(), learning_rate)}

    @torch.no_grad()
    def update_targets(self, tau):
        for network, target in self.pairs:
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), tau)

    @torch.no_grad()
    def act(self, obs, sample):
        """One numpy observation to one numpy action in [-1, 1]; sample: with exploration noise."""
        action = self.actor(torch.from_numpy(obs).to(self.device)[None])[0].tanh()
        if sample:
            action = (action + self.exploration_noise * torch.randn(self.act_dim, device=self.device)).clamp(-1, 1)
        return action.cpu().numpy()

    def full_state(self):
        return {"networks": self.state_dict(), **{name: adam.state_dict() for name, adam in self.optimizers.items()}}

    def load_full_state(self, state):
        self.load_state_dict(state["networks"])
        for name, adam in self.optimizers.items():
            adam.load_state_dict(state[name])


# === shared block: iql agent ===
class Actor(nn.Module):
    """Diagonal Gaussian with a state-independent log_std. IQL: mean = tanh(net), not squashed, actions clipped.
    squash (TD3): action = tanh(net + std * noise)."""

    def __init__(self, obs_dim, act_dim, hidden_dims, dropout=0.0, log_std_min=-5.0, squash=False):
        super().__init__()
        self.net = mlp((obs_dim, *hidden_dims, act_dim), dropout)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.log_std_min, self.squash = log_std_min, squash

    def std(self):
        return self.log_std.clamp(self.log_std_min, 2.0).exp()

    def log_prob(self, observations, actions):
        """log pi(a|s) of the unsquashed Gaussian, shape (batch,)."""
        z = (actions - self.net(observations).tanh()) / self.std()
        normalizer = self.log_std.clamp(self.log_std_min, 2.0) + 0.5 * np.log(2 * np.pi)
        return -(0.5 * z.square() + normalizer).sum(-1)

    def act(self, observations, noise=None):
        """Actions in [-1, 1], shape (batch, act_dim); noise: standard normal, or None for the mean."""
        mean = self.net(observations)
        spread = 0.0 if noise is None else self.std() * noise
        return (mean + spread).tanh() if self.squash else (mean.tanh() + spread).clamp(-1.0, 1.0)


class Agent(Learner):
    """The networks of one IQL (or TD3) agent and their optimisers."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, **actor_options):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, hidden_dims, **actor_options)
        self.critic = Critic(obs_dim, act_dim, hidden_dims)
        self.critic_target = Critic(obs_dim, act_dim, hidden_dims)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.value = mlp((obs_dim, *hidden_dims, 1))
        self.to(device)
        self.optimizers = {
            "value": Adam(self.value.parameters(), learning_rate),
            "critic_actor": Adam([*self.critic.parameters(), *self.actor.parameters()], learning_rate),
        }

    @torch.no_grad()
    def act(self, obs, sample):
        """One numpy observation to one numpy action in [-1, 1]; dropout is off."""
        self.actor.eval()
        device = self.actor.log_std.device
        noise = torch.randn(len(self.actor.log_std), device=device) if sample else None
        action = self.actor.act(torch.from_numpy(obs).to(device)[None], noise)[0].cpu().numpy()
        self.actor.train()
        return action



# === end shared block: iql agent ===


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
    """What an update needs beside the agent and the batch; the simplified TD3 reads the first three."""

    gamma: float = 0.99
    tau: float = 0.005
    intrinsic_reward_scale: float = 0.0
    policy_noise: float = 0.2
    noise_clip: float = 0.5


def fujimoto_update(agent, batch, settings, intrinsic_rewards=None, update_policy=True, noise=None):
    """One step of TD3 (arXiv 1802.09477, Algorithm 1). batch: observations, actions, rewards, masks,
    next_observations; intrinsic_rewards: (batch,) or None; update_policy: also the delayed part, policy and targets;
    noise: standard normal (batch, act_dim), None draws it. Returns detached scalars; losses/actor is that of the latest
    policy step."""
    observations, actions = batch["observations"], batch["actions"]
    # --- Target: smoothed target action, the smaller of the two target critics; masks is 0 only at true terminals ---
    with torch.no_grad():
        noise = torch.randn_like(actions) if noise is None else noise
        smoothing = (settings.policy_noise * noise).clamp(-settings.noise_clip, settings.noise_clip)
        next_observations = batch["next_observations"]
        next_actions = (agent.actor_target(next_observations).tanh() + smoothing).clamp(-1.0, 1.0)
        next_q = agent.critic_target(next_observations, next_actions).amin(0)
        target = batch["rewards"] + settings.gamma * batch["masks"] * next_q
        if intrinsic_rewards is not None:
            target = target + settings.intrinsic_reward_scale * intrinsic_rewards
    # --- Q: mean over the ensemble and the batch ---
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    agent.optimizers["critic"].minimize(critic_loss)
    # --- Policy, delayed: the first critic after its step; then all targets follow ---
    if update_policy:
        actor_loss = -agent.critic(observations, agent.actor(observations).tanh())[0].mean()
        agent.optimizers["actor"].minimize(actor_loss)
        agent.actor_loss.copy_(actor_loss.detach())
        agent.update_targets(settings.tau)
    return {"losses/critic": critic_loss.detach(), "losses/actor": agent.actor_loss[0].clone(),
            "losses/q_mean": q.detach().mean()}


# === shared block: simplified td3 ===
def td3_update(agent, batch, settings, intrinsic_rewards=None, noise=None):
    """The authors' simplified TD3 (Fig. 5): no target actor, no delay, no noise clip, no bounds. The policy's critic
    is the one before this step's update; dropout acts in the policy loss alone. noise: standard normal (2, batch,
    act_dim) for next and policy action."""
    observations, actions = batch["observations"], batch["actions"]
    noise = torch.randn(2, *actions.shape, device=actions.device) if noise is None else noise
    with torch.no_grad():
        agent.actor.eval()
        next_actions = agent.actor.act(batch["next_observations"], noise[0])
        agent.actor.train()
        next_q = agent.critic_target(batch["next_observations"], next_actions).amin(0)
        target = batch["rewards"] + settings.gamma * batch["masks"] * next_q
        if intrinsic_rewards is not None:
            target = target + settings.intrinsic_reward_scale * intrinsic_rewards
    actor_loss = -agent.critic(observations, agent.actor.act(observations, noise[1])).mean()
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    critic, actor = list(agent.critic.parameters()), list(agent.actor.parameters())
    gradients = torch.autograd.grad(critic_loss, critic) + torch.autograd.grad(actor_loss, actor)
    agent.optimizers["critic_actor"].apply(gradients)
    agent.update_target(settings.tau)
    return {"losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(),
            "losses/q_mean": q.detach().mean()}


# === end shared block: simplified td3 ===


# === shared block: gradient step ===
def make_gradient_step(args, buffer, learn, rnd=None, frozen_rnd=False):
    """update(rows) -> losses: one gradient step on raw buffer rows (batch, width), with RND's. learn(batch,
    intrinsic_rewards or None) -> losses."""

    def update(rows):
        batch = task_batch(buffer.split(rows), args)
        if rnd is None:
            return learn(batch, None)
        if frozen_rnd:
            return learn(batch, rnd.intrinsic_rewards(batch["next_observations"]))
        bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"])
        losses = learn(batch, bonus)
        return {**losses, "losses/rnd": rnd_loss, "rnd/batch_intrinsic_reward": bonus.mean()}

    return wrap_update(args, update)


# === end shared block: gradient step ===


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


# === shared block: wrapped update ===
def wrap_update(args, update):
    """update(rows) -> losses as --compile and --cudagraphs want it."""
    update = compiled(update) if args.compile else update
    return CudaGraph(update) if args.cudagraphs else update


# === end shared block: wrapped update ===


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


# === shared block: baseline online phase ===
def online(s, save_policy):
    """Act, store and learn until the budget is spent. At save_at and at the end the policy is saved as
    save_policy(s, path), evaluated, and its score kept for the table."""
    args, p = s.args, s.progress
    last_checkpoint = p["saved_steps"]
    with phase_bar(s, "online", args.online_steps, p["env_step"]):
        if p["env_step"] == 0:
            log_evaluation(s, "online", 0, p["grad_step"], s.explorer)
        while p["env_step"] < args.online_steps:
            for t in play_episode(s):
                wanted = t in args.save_at or t == args.online_steps
                summary = log_online_step(s, t, wanted)
                if wanted:
                    p["scores"][str(t)] = summary
                    save_policy(s, s.path / f"policy_{t}.pt")
            if p["env_step"] >= args.online_steps or p["env_step"] - last_checkpoint >= args.checkpoint_every:
                save_checkpoint(s)
                last_checkpoint = p["env_step"]
    p["phase"] = "done"
    save_checkpoint(s)


def report(s):
    """The table of the saved policies' scores."""
    return print_table(s, {*s.args.save_at, s.args.online_steps}, {s.script: s.progress["scores"]})


# === end shared block: baseline online phase ===


# === policy files ===
def make_agent(variant, obs_dim, act_dim, hidden_dims, learning_rate, device, exploration_noise=0.0, **options):
    """options: dropout and log_std_min of the official variant."""
    if variant == "official":
        return Agent(obs_dim, act_dim, hidden_dims, learning_rate, device, squash=True, **options)
    return TD3Agent(obs_dim, act_dim, hidden_dims, learning_rate, device, exploration_noise)


def save_policy(s, path):
    """A policy that load_policy (and nothing else) needs. This method normalises no observations; actions are the
    environment's, in [-1, 1]."""
    save_torch(path, {
        "script": SCRIPT, "env_id": s.args.env_id, "observation_normalization": None,
        "build": [s.args.variant, s.obs_dim, s.act_dim, list(s.args.hidden_dims)],
        "agent": s.explorer.state_dict(),  # all networks
    })


def load_policy(path, device="cpu"):
    """Returns (act, content) of a file of save_policy; act(obs) is the deterministic action, numpy to numpy."""
    content = load_torch(path, SCRIPT, device)
    agent = make_agent(*content["build"], 0.0, device)
    agent.load_state_dict(content["agent"])
    return lambda obs: agent.act(obs, sample=False), content


# === main ===
def open_session(args):
    """Check everything, load the data and build the agents; nothing is written before all of it has worked."""
    check_args(args)
    s = new_session(args, SCRIPT)
    load_offline(s, args.online_steps)
    s.progress |= dict(phase="online", scores={})
    s.explorer = make_agent(args.variant, s.obs_dim, s.act_dim, args.hidden_dims, args.learning_rate, s.device,
                            args.exploration_noise, dropout=args.dropout, log_std_min=args.log_std_min)
    s.rnd = make_rnd(args, s.obs_dim, s.device) if args.intrinsic_reward_scale else None
    s.learners = {"explorer": s.explorer, **({"rnd": s.rnd} if s.rnd else {})}
    s.explore_update = make_update(s)
    s.choose_action = lambda obs: s.explorer.act(obs, sample=True)
    s.learn = lambda: s.explore_update(s.buffer.sample(args.batch_size))
    start_run(s)
    return s


def make_update(s):
    """update(rows) -> losses: one gradient step on raw buffer rows (batch, width), with RND's."""
    args = s.args
    settings = Settings(args.gamma, args.tau, args.intrinsic_reward_scale, args.policy_noise, args.noise_clip)
    if args.variant == "official":
        learn = lambda batch, bonus: td3_update(s.explorer, batch, settings, bonus)  # noqa: E731
        return make_gradient_step(args, s.buffer, learn, s.rnd)
    # Two fixed graphs, so that --compile and --cudagraphs meet no condition: critics alone, and with the policy.
    critics, both = (
        make_gradient_step(args, s.buffer, lambda batch, bonus, update_policy=update_policy: fujimoto_update(
            s.explorer, batch, settings, bonus, update_policy), s.rnd)
        for update_policy in (False, True))
    return lambda rows: (critics if (s.progress["grad_step"] + 1) % args.policy_delay else both)(rows)


def main(args):
    if args.eval_only:
        return evaluate_saved(args, load_policy, "policy_*.pt")
    s = open_session(args)
    with errors_in_one_line(s):
        if s.progress["phase"] == "online":
            online(s, save_policy)
        return report(s)


if __name__ == "__main__":
    main(parse_args())
