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
r"""Figure 2 of OOO from nothing: a point in a room, offline data over a wall, a shorter way under it.

Paper: "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv 2310.08558,
sections 5.1 and B.1. IQL: arXiv 2110.06169. All seeds, and all bonus coefficients, are trained side by side as one
batch of small networks ("members"). Data, first weights and random numbers of a seed do not depend on the others in the
batch, but rounding does: a seed run alone is another sample, not the same bytes.

    python pointmass_didactic.py                                             # table over 5 seeds, and figure2.png
    python pointmass_didactic.py --seed 1 --num-seeds 1                      # one seed of all three agents
    python pointmass_didactic.py --bonus-coef 0 0.5 1 5 25 --exp-name sweep  # coefficient 0 is IQL
    python pointmass_didactic.py --compile                                   # faster where there is a C++ compiler
    python pointmass_didactic.py --online-steps 1000000 --exp-name long      # the online steps of the authors' flag
    python pointmass_didactic.py --exploit-only runs/point-mass-wall__pointmass_didactic__1 --exp-name again \
        --retrain-upsample 0                                                 # retraining only, on a run's data

Choices where paper and official code differ or are silent:
 1. Start noise is the paper's N(0, 0.02^2) on each axis; the code's is uniform in +-0.02 (--start-noise uniform).
 2. A move is cancelled where it crosses the line of the wall strictly between the wall's ends. A point that lies on the
    line counts as right of it, so that no two moves can pass the wall by way of the line itself.
 3. The offline data is not published. A scripted controller makes it here: over the wall by one waypoint, slower near
    the goal, whose radius is smaller than a step.
 4. No hyper-parameter is published for this task (the code's flags: 500k pretraining, 1M online steps). Those in Args
    are ours; results/pointmass/README.md says what was tried. The bonus and one update a step are the paper's.
 5. The same losses and networks serve all agents. IQL and IQL + bonus differ in the bonus alone; the exploitation
    agents have settings of their own (retrain_...). Q targets are not clipped.
 6. The networks see sines and cosines of the position beside the position itself: with these, values that jump at the
    wall are learned within the small budgets here.
 7. The retraining draws 8 of 256 transitions from those into the goal (section 4.2; the code's number for its mazes,
    none is published for this task). Uniformly drawn, one batch in twelve would hold one.
"""

import ctypes
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

# === arguments ===
SCRIPT = "pointmass_didactic"  # written into every file of a run, also by a renamed copy


@dataclass
class Args:
    # --- experiment ---
    env_id: str = "point-mass-wall"
    """The only task here; names the run directory."""
    seed: int = 1
    """First seed."""
    num_seeds: int = 5
    """Seeds trained side by side: seed, seed + 1, ..."""
    exp_name: str = Path(__file__).stem
    """Middle part of the run directory's name."""
    runs_dir: str = "runs"
    """Folder of the run directories."""
    scale: float = 1.0
    """Multiplies every budget and interval (steps, not episodes or batch size)."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    torch_threads: int = 1
    """CPU threads of torch."""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """torch.set_float32_matmul_precision; auto takes medium where a test product shows it to be exact float32."""
    compile: bool = False
    """Wrap the updates in torch.compile (needs a C++ compiler on the CPU)."""
    resume: bool = False
    """Continue the run of the same name from its last checkpoint; of a finished run: print and draw again."""
    exploit_only: str = ""
    """RUN_DIR of a run past its online phase: repeat its retraining on its data, with other settings, as a new run."""
    # --- task and data ---
    start_noise: Literal["gaussian", "uniform"] = "gaussian"
    """Gaussian N(0, 0.02^2) as the paper says, or uniform in +-0.02 as the code does."""
    offline_episodes: int = 100
    """Scripted trajectories over the wall."""
    # --- phases ---
    offline_steps: int = 2_000
    """Pretraining: gradient steps on D_off."""
    online_steps: int = 300_000
    """Online phase: environment steps of each member, one gradient step each."""
    retrain_steps: int = 30_000
    """Gradient steps of the exploitation agents, from scratch on all data, task reward only."""
    eval_every: int = 10_000
    """Steps of the phase under way between evaluations."""
    eval_episodes: int = 100
    """Episodes of one evaluation, for each member."""
    # --- networks ---
    hidden_dims: tuple[int, ...] = (64, 64)
    """Hidden layers of actor, critic and value."""
    num_frequencies: int = 24
    """Random frequencies whose sines and cosines the networks see beside the position."""
    # --- optimisation and IQL: pretraining and online phase ---
    batch_size: int = 64
    """Transitions of one gradient step, for each member."""
    learning_rate: float = 1e-3
    """Adam's rate for actor, critic and value."""
    gamma: float = 0.95
    """Discount."""
    tau: float = 0.01
    """Polyak rate of the target critic, per gradient step."""
    frequency: float = 2.0
    """Standard deviation of the random frequencies, in radians per unit of length: low ones generalise further."""
    expectile: float = 0.9
    """IQL's tau in (0.5, 1): closer to 1 means closer to a max over actions."""
    temperature: float = 10.0
    """Multiplies the advantage in exp(temperature * A); the paper's eq. 3 divides by beta."""
    log_std_min: float = -1.0
    """Lower clip of the policy's log standard deviation (upper: 2)."""
    # --- the same for the exploitation agents, whose data is mostly aimless and whose goal is smaller than a step ---
    retrain_batch_size: int = 256
    """Batch size of the retraining."""
    retrain_upsample: int = 8
    """Transitions of each of its batches that are drawn from those into the goal (section 4.2); 0: uniform batches."""
    retrain_learning_rate: float = 3e-4
    """Adam's rate in the retraining."""
    retrain_gamma: float = 0.95
    """Discount of the retraining."""
    retrain_tau: float = 0.02
    """Polyak rate of the retraining."""
    retrain_frequency: float = 6.0
    """Frequencies of the retraining: high ones let values jump at the wall."""
    retrain_expectile: float = 0.97
    """Expectile of the retraining."""
    retrain_temperature: float = 300.0
    """Temperature of the retraining."""
    # --- count bonus ---
    bonus_coef: tuple[float, ...] = (0.0, 5.0)
    """Coefficients c of c / sqrt(n(s, a) + 1), each for all seeds; the first must be 0, which is plain IQL."""
    # --- logging and checkpoints ---
    log_every: int = 2_500
    """Steps between records of losses and coverage."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints."""


TASKS = {"point-mass-wall": {}}
BUDGETS = ("offline_steps", "online_steps", "retrain_steps", "eval_every", "log_every", "checkpoint_every")
NOT_SETTINGS = ("resume", "runs_dir")  # may change at --resume


def parse_args(argv=None):
    """Args < settings of the --exploit-only run < command line; then --scale."""
    argv = sys.argv[1:] if argv is None else list(argv)
    default = Args()
    if source := tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")]).exploit_only:
        default = Args(**read_config(source, SCRIPT)["args"])
        default = replace(default, exp_name=Args.exp_name, runs_dir=Args.runs_dir, resume=False)
    args = tyro.cli(Args, args=argv, default=default, description=__doc__)
    if not 0 < args.scale < math.inf:
        fail(f"--scale {args.scale:g} must be above 0, and finite")
    budgets = {name: max(1, round(getattr(args, name) * args.scale)) for name in BUDGETS if getattr(args, name) > 0}
    return replace(args, **budgets, scale=1.0)


def phase_args(args, phase):
    """The settings of a phase: in the retraining, retrain_X stands in X's place."""
    if phase != "retrain":
        return args
    names = [f.name for f in fields(args) if hasattr(args, f"retrain_{f.name}")]
    return replace(args, **{name: getattr(args, f"retrain_{name}") for name in names})


def check_args(args):
    """Exit 2 with one line for values that cannot work."""
    if args.env_id not in TASKS:
        fail(f"unknown --env-id {args.env_id!r}; the only task is {next(iter(TASKS))}")
    if not args.bonus_coef or args.bonus_coef[0] != 0:
        fail("--bonus-coef must begin with 0: plain IQL, which the others are compared with")
    if list(args.bonus_coef) != sorted(set(args.bonus_coef)) or not math.isfinite(args.bonus_coef[-1]):
        fail(f"--bonus-coef must rise and be finite: {' '.join(map(str, args.bonus_coef))}")
    for name in ("gamma", "retrain_gamma"):
        if not 0 <= getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name):g} must be at least 0 and below 1")
    for name in ("expectile", "retrain_expectile"):
        if not 0 < getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name):g} must be between 0 and 1")
    lowest = {"seed": 0, "retrain_upsample": 0} | dict.fromkeys(
        (*BUDGETS, "num_seeds", "torch_threads", "offline_episodes", "batch_size", "retrain_batch_size",
         "num_frequencies", "eval_episodes"), 1)
    for name, low in lowest.items():
        if getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; the least is {low}")
    if args.retrain_upsample > args.retrain_batch_size:
        fail(f"--retrain-upsample {args.retrain_upsample} is more than --retrain-batch-size {args.retrain_batch_size}")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        fail("--hidden-dims needs at least one layer, each of at least 1 unit")


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


# === environment ===
STEP = 0.05 * math.sqrt(0.5)  # displacement per axis of an action of 1
LOW, HIGH = (-0.25, -0.25), (1.25, 1.45)  # positions are clipped to this room
START, START_NOISE = (0.0, 0.5), 0.02
GOAL, GOAL_RADIUS = (1.0, 0.15), 0.01
WALL_X, WALL_LOW, WALL_HIGH = 0.5, 0.1, 1.2
HORIZON = 150
WAYPOINT = (WALL_X + 0.03, WALL_HIGH + 0.1)  # of the scripted controller


def move(positions, actions):
    """One step of any number of points: float32 (..., 2), (..., 2) -> next positions (..., 2), at the goal (...)."""
    low, high, goal = (positions.new_tensor(x) for x in (LOW, HIGH, GOAL))
    new = (positions + STEP * actions.clamp(-1, 1)).clamp(low, high)
    (px, py), (qx, qy) = positions.unbind(-1), new.unbind(-1)
    dx, dy = qx - px, qy - py
    # On which side of the line of the move each end of the wall lies: opposite sides mean that the move passes between.
    lower, upper = (dx * (end - py) - dy * (WALL_X - px) for end in (WALL_LOW, WALL_HIGH))
    crosses = ((px < WALL_X) != (qx < WALL_X)) & (lower * upper < 0)
    new = torch.where(crosses[..., None], positions, new)
    return new, (new - goal).norm(dim=-1) < GOAL_RADIUS


def start_positions(kind, generator, *shape):
    """Fresh starts (*shape, 2), drawn on the CPU."""
    if kind == "gaussian":
        noise = torch.randn(*shape, 2, generator=generator)
    else:
        noise = 2 * torch.rand(*shape, 2, generator=generator) - 1
    return torch.tensor(START) + START_NOISE * noise


class PointMassWall(gym.Env):
    """The task for one agent. The phases below call move() for all members at once, which is the same dynamics."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, start_noise="gaussian"):
        self.render_mode, self.start_noise = render_mode, start_noise
        self.observation_space = gym.spaces.Box(np.float32(LOW), np.float32(HIGH))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,))
        self.position, self.steps = np.float32(START), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**63)))
        self.position, self.steps = start_positions(self.start_noise, generator).numpy(), 0
        return self.position.copy(), {"success": False}

    def step(self, action):
        position, goal = move(torch.from_numpy(self.position), torch.as_tensor(action, dtype=torch.float32))
        self.position, success = position.numpy(), bool(goal)
        self.steps += 1
        return self.position.copy(), float(success), success, self.steps >= HORIZON, {"success": success}

    def render(self):
        """The room from above: wall black, goal green, point blue; (340, 300, 3) bytes."""
        if self.render_mode != "rgb_array":
            return None
        x, y = (np.linspace(low, high, n) for low, high, n in zip(LOW, HIGH, (300, 340), strict=True))
        x, y = np.meshgrid(x, y[::-1])  # the first row of a picture is its top
        frame = np.full((*x.shape, 3), 255, np.uint8)
        frame[(abs(x - WALL_X) < 0.01) & (WALL_LOW <= y) & (y <= WALL_HIGH)] = 0
        for (px, py), color in ((GOAL, (0, 160, 0)), (self.position, (30, 80, 220))):
            frame[np.hypot(x - px, y - py) < 0.02] = color
        return frame


def shortest_steps(starts, over):
    """Least number of steps from starts (..., 2) to the goal, over or under the wall. Both axes move at the same time,
    at most STEP each, so a way takes the sum of its legs' larger axis differences: start, end of the wall, goal."""
    corner, goal = starts.new_tensor((WALL_X, WALL_HIGH if over else WALL_LOW)), starts.new_tensor(GOAL)
    legs = (corner - starts).abs().amax(-1) + (goal - corner).abs().amax()
    return ((legs - GOAL_RADIUS) / STEP).ceil()


def scripted_data(args, seed):
    """The offline data of a seed: rows (n, 7) of obs, action, next_obs, goal, episode after episode."""
    generator, n = stream(seed, "data"), args.offline_episodes
    positions = start_positions(args.start_noise, generator, n)
    running, rows, owners = torch.ones(n, dtype=torch.bool), [], []
    for _ in range(HORIZON):
        # First aim just right of the wall's line and above its end; from there straight at the goal.
        aim = torch.where(positions[:, :1] > WALL_X, torch.tensor(GOAL), torch.tensor(WAYPOINT))
        way = aim - positions
        # Full speed on the longer axis, less where one step would go past the aim.
        actions = way / way.abs().amax(-1, keepdim=True).clamp(min=STEP)
        actions = (actions + 0.1 * torch.randn(n, 2, generator=generator)).clamp(-1, 1)
        new, goal = move(positions, actions)
        rows.append(torch.cat([positions, actions, new, goal[:, None]], -1)[running])
        owners.append(running.nonzero().squeeze(1))
        positions, running = new, running & ~goal
    if running.any():
        fail(f"{int(running.sum())} scripted trajectories of seed {seed} miss the goal; leave out this --seed")
    return torch.cat(rows)[torch.cat(owners).argsort(stable=True)]


# === random numbers ===
STREAMS = {name: i for i, name in enumerate(("data", "networks", "pretrain", "online", "retrain", "starts"))}
CHUNK = 256  # steps whose random numbers are drawn at once


def stream(seed, name, index=0):
    """A CPU generator that is a function of its arguments alone: a resumed run needs no saved random state, and the
    random numbers of a seed do not depend on the other seeds of the batch."""
    words = np.random.SeedSequence([seed, STREAMS[name], index]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class Draws:
    """Random numbers of a phase, step by step. The members of a seed, one for each coefficient, share them."""

    def __init__(self, args, seeds, phase, device):
        self.args, self.seeds, self.phase, self.device, self.chunk = args, seeds, phase, device, None

    def __getitem__(self, step):
        """(uniform (members, batch), action noise (members, 2), starts (members, 2)) of a step."""
        if self.chunk != step // CHUNK:
            self.chunk = step // CHUNK
            parts = []
            for seed in self.seeds:
                g = stream(seed, self.phase, self.chunk)
                parts.append((torch.rand(CHUNK, self.args.batch_size, generator=g, dtype=torch.float64),
                              torch.randn(CHUNK, 2, generator=g), start_positions(self.args.start_noise, g, CHUNK)))
            self.values = [torch.stack(x, 1).repeat_interleave(len(self.args.bonus_coef), 1).to(self.device)
                           for x in zip(*parts, strict=True)]
        return tuple(x[step % CHUNK] for x in self.values)


# === replay and counts ===
STATE_BINS, ACTION_BINS = 100, 10


def count_cells(positions, actions):
    """Index of (s, a) in the 100 x 100 x 10 x 10 grid of nearest nodes; (..., 2), (..., 2) -> (...)."""
    low, high = (positions.new_tensor(x) for x in (LOW, HIGH))
    state = ((positions - low) / (high - low) * (STATE_BINS - 1)).round().long()
    action = ((actions + 1) / 2 * (ACTION_BINS - 1)).round().long()
    return ((state[..., 0] * STATE_BINS + state[..., 1]) * ACTION_BINS + action[..., 0]) * ACTION_BINS + action[..., 1]


class Replay:
    """Append-only transitions of every member, raw, and the counts n(s, a) of all of them, offline data included."""

    def __init__(self, offline, online_steps, device):
        """offline: a list of rows (n, 7) for each member."""
        self.members = torch.arange(len(offline), device=device)
        self.offline_sizes = torch.tensor([len(rows) for rows in offline], device=device)
        longest = max(len(rows) for rows in offline)
        self.data = torch.zeros(len(offline), longest + online_steps, 7, device=device)
        self.cells = torch.zeros(self.data.shape[:2], dtype=torch.long, device=device)
        self.counts = torch.zeros(len(offline), STATE_BINS**2 * ACTION_BINS**2, device=device)
        self.sizes = torch.zeros_like(self.offline_sizes)
        for member, rows in enumerate(offline):
            self.extend(member, rows.to(device))

    def extend(self, member, rows):
        """Append rows (n, 7) of one member."""
        here = slice(int(self.sizes[member]), int(self.sizes[member]) + len(rows))
        self.data[member, here], self.cells[member, here] = rows, count_cells(rows[:, :2], rows[:, 2:4])
        self.counts[member].index_add_(0, self.cells[member, here], torch.ones(len(rows), device=rows.device))
        self.sizes[member] += len(rows)

    def add(self, rows):
        """Append one row for each member, (members, 7)."""
        cells = count_cells(rows[:, :2], rows[:, 2:4])
        self.data[self.members, self.sizes], self.cells[self.members, self.sizes] = rows, cells
        self.counts[self.members, cells] += 1
        self.sizes += 1

    def goal_rows(self):
        """The rows of each member that end at the goal, and their number: (members, most), (members,). The scripted
        data always holds some."""
        at_goal = self.data[..., 6] > 0  # rows that are not filled yet are 0
        numbers = at_goal.sum(1)
        return at_goal.long().argsort(dim=1, descending=True, stable=True)[:, : int(numbers.max())], numbers

    def sample(self, uniform, bonus_coef, goals=None, upsample=0):
        """A batch for each member, with the bonus as the counts stand now. uniform: [0, 1), (members, batch). The first
        `upsample` transitions of a batch are drawn from `goals` (of goal_rows) instead of from all."""
        index, member = (uniform * self.sizes[:, None]).long(), self.members[:, None]
        if upsample:
            table, numbers = goals
            at_goal = table.gather(1, (uniform[:, :upsample] * numbers[:, None]).long())
            index = torch.cat([at_goal, index[:, upsample:]], 1)
        rows, counts = self.data[member, index], self.counts[member, self.cells[member, index]]
        rewards = rows[..., 6] + bonus_coef[:, None] / (counts + 1).sqrt()
        return {"observations": rows[..., 0:2], "actions": rows[..., 2:4], "next_observations": rows[..., 4:6],
                "rewards": rewards, "masks": 1 - rows[..., 6]}

    def online(self, member):
        """Rows of one member since its offline data."""
        return self.data[member, self.offline_sizes[member] : self.sizes[member]]


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


# === networks ===
class BatchedMLP(nn.Module):
    """Independent networks of one shape, ReLU between the layers: (members, batch, in) -> (members, batch, out)."""

    def __init__(self, generators, dims):
        """generators: of each member's first weights; a repeated seed gives equal networks."""
        super().__init__()
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(len(generators), i, o) for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(len(generators), 1, o) for _, o in pairs])
        for member, generator in enumerate(generators):
            for weight in self.weights:
                nn.init.orthogonal_(weight.data[member], gain=2**0.5, generator=generator)
            self.weights[-1].data[member] *= 0.1  # first outputs near 0, whatever the features

    def forward(self, x):
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.baddbmm(bias, x if weight is self.weights[0] else x.relu_(), weight)
        return x


class Agents(nn.Module):
    """The IQL networks of all members, and their optimisers. Policy: tanh(net) plus Gaussian noise with a std that does
    not depend on the state, clipped to [-1, 1]."""

    def __init__(self, seeds, args, phase, device):
        """seeds: one for each member."""
        super().__init__()
        generators = [stream(seed, "networks", STREAMS[phase]) for seed in seeds]
        self.log_std_min = args.log_std_min
        frequencies = [args.frequency * torch.randn(2, args.num_frequencies, generator=g) for g in generators]
        self.register_buffer("frequencies", torch.stack(frequencies))
        size = 2 + 2 * args.num_frequencies
        self.actor = BatchedMLP(generators, (size, *args.hidden_dims, 2))
        self.log_std = nn.Parameter(torch.zeros(len(seeds), 1, 2))
        self.value = BatchedMLP(generators, (size, *args.hidden_dims, 1))
        # Two critics a member: the first of all members, then the second of all members.
        self.critic, self.critic_target = (BatchedMLP([*generators, *generators], (size + 2, *args.hidden_dims, 1))
                                           for _ in range(2))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.to(device)
        critic_actor = [*self.critic.parameters(), *self.actor.parameters(), self.log_std]
        self.optimizers = {"value": Adam(self.value.parameters(), args.learning_rate),
                           "critic_actor": Adam(critic_actor, args.learning_rate)}

    def features(self, positions):
        """What the networks see of positions (members, batch, 2): the positions themselves, and sines and cosines of
        fixed random frequencies. On bare positions a small network takes very long to learn that the two sides of the
        wall, next to each other, have different values."""
        phases = torch.bmm(positions, self.frequencies)
        return torch.cat([2 * positions - 1, phases.sin(), phases.cos()], -1)

    def std(self):
        return self.log_std.clamp(self.log_std_min, 2.0).exp()

    def mean(self, positions):
        """Mean actions of positions (members, batch, 2)."""
        return self.actor(self.features(positions)).tanh()

    def full_state(self):
        return {"networks": self.state_dict(), "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()}}

    def load_full_state(self, state):
        self.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


# === losses and updates ===
def expectile_loss(diff, expectile):
    """IQL eq. 5: |expectile - 1{diff < 0}| * diff^2. diff = Q_target(s, a) - V(s), any shape."""
    return torch.where(diff > 0, expectile, 1.0 - expectile) * diff.square()


def iql_update(agents, batch, args):
    """One IQL update of every member: V, then Q and the policy. batch: observations, actions, next_observations
    (members, batch, 2), rewards, masks (members, batch). Losses are means over a member's batch and sums over members,
    so that no member sees another's gradient. Returns detached scalars, means over all members."""
    members = len(batch["rewards"])
    observations, actions = agents.features(batch["observations"]), batch["actions"]
    pairs = torch.cat([observations, actions], -1).repeat(2, 1, 1)
    with torch.no_grad():
        q_target = agents.critic_target(pairs).view(2, members, -1).amin(0)
    # --- V: expectile regression toward the target Q ---
    value_loss = expectile_loss(q_target - agents.value(observations).squeeze(-1), args.expectile).mean(1)
    agents.optimizers["value"].minimize(value_loss.sum())
    # --- Target: the new V; masks is 0 only at the goal, so the time limit still bootstraps ---
    with torch.no_grad():
        next_observations = agents.features(batch["next_observations"])
        next_v, v = agents.value(torch.cat([next_observations, observations], 1)).squeeze(-1).chunk(2, 1)
        target = batch["rewards"] + args.gamma * batch["masks"] * next_v
    # --- Q ---
    q = agents.critic(pairs).view(2, members, -1)
    critic_loss = (q - target).square().mean((0, 2))
    # --- Policy: advantage-weighted regression (eq. 3); constants of the log-density are left out ---
    weight = (args.temperature * (q_target - v)).exp().clamp(max=100.0)
    std = agents.std()
    z = (actions - agents.actor(observations).tanh()) / std
    actor_loss = (weight * (0.5 * z.square() + std.log()).sum(-1)).mean(1)
    agents.optimizers["critic_actor"].minimize((critic_loss + actor_loss).sum())  # no parameter is in both
    with torch.no_grad():
        torch._foreach_lerp_(list(agents.critic_target.parameters()), list(agents.critic.parameters()), args.tau)
    return {"losses/value": value_loss.detach().mean(), "losses/critic": critic_loss.detach().mean(),
            "losses/actor": actor_loss.detach().mean(), "losses/v_mean": v.mean()}


# === evaluation ===
@torch.no_grad()
def roll_out(agents, starts):
    """Episodes of the mean policies from starts (members, episodes, 2). Returns positions (members, episodes,
    HORIZON + 1, 2), which stay at the goal once there, and steps to the goal (members, episodes), inf if missed."""
    positions, steps = [starts], torch.full(starts.shape[:2], math.inf, device=starts.device)
    for t in range(HORIZON):
        new, goal = move(positions[-1], agents.mean(positions[-1]))
        positions.append(torch.where(steps.isfinite()[..., None], positions[-1], new))
        steps[goal & steps.isinf()] = t + 1
    return torch.stack(positions, 2), steps


def ways(positions):
    """Which way each trajectory (..., time, 2) passes the wall's line first: (under (...), over (...)), both False if
    it does not. Moves through the wall do not happen, so the height right after the crossing tells."""
    right = positions[..., 0] >= WALL_X
    crossings = right[..., 1:] & ~right[..., :-1]
    first = crossings & (crossings.cumsum(-1) == 1)
    middle = (WALL_LOW + WALL_HIGH) / 2
    height = positions[..., 1:, 1]
    return (first & (height < middle)).any(-1), (first & (height > middle)).any(-1)


def evaluation_starts(args, seeds, device):
    """The same fresh starts for all members of a seed, at every evaluation: (members, episodes, 2)."""
    starts = [start_positions(args.start_noise, stream(seed, "starts"), args.eval_episodes) for seed in seeds]
    return torch.stack(starts).repeat_interleave(len(args.bonus_coef), 0).to(device)


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


# === phases ===
def build(s):
    """Data, buffer and the agents of the phase that comes first; nothing is written."""
    s.seeds = [s.args.seed + i for i in range(s.args.num_seeds)]
    # Member i * len(bonus_coef) + j is seed i with coefficient j.
    s.members = [(seed, coef) for seed in s.seeds for coef in s.args.bonus_coef]
    s.coefs = torch.tensor([coef for _, coef in s.members], dtype=torch.float32, device=s.device)
    data = {seed: scripted_data(s.args, seed) for seed in s.seeds}
    s.replay = Replay([data[seed] for seed, _ in s.members], s.args.online_steps, s.device)
    s.starts = evaluation_starts(s.args, s.seeds, s.device)
    s.agents = make_agents(s, "pretrain")
    s.positions = torch.tensor(START, device=s.device).repeat(len(s.members), 1)
    s.clock = torch.full((len(s.members),), HORIZON, device=s.device)  # the first online step begins an episode
    s.losses = LossHistory()


def make_agents(s, phase):
    return Agents([seed for seed, _ in s.members], phase_args(s.args, phase), phase, s.device)


@torch.no_grad()
def act(s, noise, starts):
    """One step of every member in its own environment: the exploration policies sample, the transitions are stored."""
    new_episode = s.clock >= HORIZON
    positions = torch.where(new_episode[:, None], starts, s.positions)
    actions = (s.agents.mean(positions[:, None]) + s.agents.std() * noise[:, None]).squeeze(1).clamp(-1, 1)
    new, goal = move(positions, actions)
    s.replay.add(torch.cat([positions, actions, new, goal[:, None]], 1))
    s.positions = new
    s.clock = torch.where(new_episode, 1, s.clock + 1).masked_fill(goal, HORIZON)


def train(s, phase, steps):
    """One phase. pretrain and retrain: gradient steps on the data so far; online: a step of the environment before
    each. Algorithm 1: pretrain and online are optimistic (bonus), retrain is pessimistic (task reward only)."""
    args, p = phase_args(s.args, phase), s.progress
    draws = Draws(args, s.seeds, phase, s.device)
    coefs, goals, upsample = s.coefs, None, 0
    if phase == "retrain":
        coefs, goals, upsample = torch.zeros_like(s.coefs), s.replay.goal_rows(), args.retrain_upsample

    def update(uniform):
        return iql_update(s.agents, s.replay.sample(uniform, coefs, goals, upsample), args)

    if args.compile:  # only the update: a compiled act() would copy the whole replay at each step
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
        update = torch.compile(update, fullgraph=True)
    with tqdm(total=steps, initial=p[phase], desc=phase, unit="step", dynamic_ncols=True, smoothing=0.05,
              mininterval=1) as bar:
        clock = (time.perf_counter(), p[phase])
        while p[phase] < steps:
            uniform, noise, starts = draws[p[phase]]
            if phase == "online":
                act(s, noise, starts)
            s.losses.add(update(uniform))
            p[phase] += 1
            bar.update()
            step, last = p[phase], p[phase] == steps
            if step % args.log_every == 0 or last:
                s.run.log("metrics.jsonl", {**where(s, phase), **s.losses.means(step), **visits(s)})
                now = time.perf_counter()
                s.run.log("timing.jsonl", {**where(s, phase), "charts/SPS": (step - clock[1]) / (now - clock[0]),
                                           "time": time.time()})
                clock = (now, step)
            if step % args.eval_every == 0 or last:
                log_evaluation(s, phase)
            if last:
                save_policies(s, phase)
            if step % args.checkpoint_every == 0 or last:
                save_checkpoint(s)


def where(s, phase):
    p = s.progress
    return {"phase": phase, "env_step": p["online"], "grad_step": p["retrain"] or p["pretrain"] + p["online"]}


def visits(s):
    """Of each member's online data: share of the cells of a 30 x 30 grid that it visited, goals reached, share of
    its states that lie under the wall's lower end and right of the wall's line."""
    if not s.progress["online"]:
        return {}
    found = {"coverage": [], "goals": [], "under": []}
    for member in range(len(s.members)):
        rows = s.replay.online(member)
        low, high = (rows.new_tensor(x) for x in (LOW, HIGH))
        x, y = ((rows[:, 4:6] - low) / (high - low) * 30).long().clamp(max=29).unbind(-1)
        found["coverage"].append(len((x * 30 + y).unique()) / 900)
        found["goals"].append(int(rows[:, 6].sum()))
        found["under"].append(float(((rows[:, 4] > WALL_X) & (rows[:, 5] < WALL_LOW)).float().mean()))
    return {f"charts/{name}": values for name, values in found.items()}


def log_evaluation(s, phase):
    """Every episode of every member to evals.jsonl; the summary of each to metrics.jsonl."""
    positions, steps = roll_out(s.agents, s.starts)
    under, over = ways(positions)
    for member, (seed, coef) in enumerate(s.members):
        head = {**where(s, phase), "seed": seed, "bonus_coef": coef}
        success = steps[member].isfinite()
        length = steps[member].clamp(max=HORIZON)
        s.run.log("metrics.jsonl", {
            **head, "eval/return": float(-(length - success.float()).mean()),  # -1 a step, 0 for the step into the goal
            "eval/steps": float(length.mean()), "eval/success_rate": float(success.float().mean()),
            "eval/under": float(under[member].float().mean()), "eval/over": float(over[member].float().mean()),
            "eval/std": float(s.agents.std()[member].detach().mean())})
        s.run.log("evals.jsonl", {**head, "steps": length.int().tolist(), "success": success.tolist(),
                                  "under": under[member].tolist(), "over": over[member].tolist()})


def save_policies(s, phase):
    """The networks of all members at the end of a phase, under the phase's name."""
    save_torch(s.run.path / f"{phase}.pt", {"script": SCRIPT, "members": [list(x) for x in s.members],
                                            "agents": s.agents.state_dict()})


def save_checkpoint(s):
    """Everything a resumed process needs. The counts follow from the data, random numbers from the step."""
    save_torch(s.run.path / "checkpoint.pt", {
        "script": SCRIPT, "progress": s.progress, "offsets": s.run.offsets(), "losses": s.losses.state_dict(),
        "agents": s.agents.full_state(), "positions": s.positions, "clock": s.clock,
        "online": torch.stack([s.replay.online(member) for member in range(len(s.members))])})


def restore(s, saved):
    """Bring a session that was just built to where its checkpoint was written (None: killed before the first one)."""
    if saved is None:
        return s.run.truncate(dict.fromkeys(Run.FILES, 0))
    s.progress.update(saved["progress"])
    s.run.truncate(saved["offsets"])
    s.losses.load_state_dict(saved["losses"], s.device)
    s.positions, s.clock = saved["positions"], saved["clock"]
    for member, rows in enumerate(saved["online"]):
        s.replay.extend(member, rows)
    if s.progress["retrain"]:
        s.agents = make_agents(s, "retrain")
    s.agents.load_full_state(saved["agents"])


# === table and figure ===
def report(s):
    """Roll out both policies of every member from the same starts; print the table, write results.json, figure2.png."""
    s.agents.load_state_dict(load_torch(s.run.path / "online.pt", SCRIPT, s.device)["agents"])
    explored = roll_out(s.agents, s.starts)
    s.agents.load_state_dict(load_torch(s.run.path / "retrain.pt", SCRIPT, s.device)["agents"])
    retrained = roll_out(s.agents, s.starts)
    visited, rows = visits(s), []
    for j, coef in enumerate(s.args.bonus_coef):
        name = "IQL" if coef == 0 else f"IQL + bonus {coef:g}"
        for policy, (positions, steps) in ((name, explored), (f"OOO on the data of {name}", retrained)):
            mine = slice(j, None, len(s.args.bonus_coef))  # this coefficient's members, one a seed
            under, over = ways(positions[mine])
            row = {"policy": policy, "bonus_coef": coef, "seeds": s.seeds,
                   "steps": steps[mine].clamp(max=HORIZON).mean(1).tolist(),
                   "success": steps[mine].isfinite().float().mean(1).tolist(),
                   "under": under.float().mean(1).tolist(), "over": over.float().mean(1).tolist(),
                   "coverage": visited["charts/coverage"][mine]}
            rows.append(row)
    shortest = {way: shortest_steps(s.starts, way == "over") for way in ("under", "over")}
    shortest = {way: {"mean": float(n.mean()), "least": int(n.min()), "most": int(n.max())}
                for way, n in shortest.items()}
    results = {"env_id": s.args.env_id, "episodes_per_seed": s.args.eval_episodes, "shortest_steps": shortest,
               "rows": rows}
    atomic_write(s.run.path / "results.json", json.dumps(results, indent=1).encode())
    print_table(s, rows, shortest)
    draw(s, explored[0], retrained[0])
    print(f"saved in {s.run.path}: results.json, figure2.png")
    return results


def print_table(s, rows, shortest):
    """Mean and standard deviation over the seeds; an episode that misses the goal counts as HORIZON steps."""
    print(f"\n{s.args.env_id}, seeds {s.seeds[0]} to {s.seeds[-1]}, {s.args.eval_episodes} episodes each, mean policy: "
          "mean (standard deviation) over seeds")
    print(f"{'policy':34}  {'steps to goal':>15}  {'reach the goal':>15}  {'go under':>15}  {'go over':>15}")
    for row in rows:
        cells = [f"{np.mean(row['steps']):7.1f} ({np.std(row['steps']):5.1f})"]
        cells += [f"{np.mean(row[k]):7.1%} ({np.std(row[k]):5.1%})" for k in ("success", "under", "over")]
        print(f"{row['policy']:34}  " + "  ".join(f"{cell:>15}" for cell in cells))
    for way, n in shortest.items():
        print(f"{f'shortest way {way} the wall':34}  {n['mean']:7.1f} ({n['least']} to {n['most']})")


def draw(s, explored, retrained):
    """figure2.png, from the first seed: data, where the agents went online, and fresh episodes of the three policies.
    explored, retrained: positions (members, episodes, time, 2)."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    coefs = s.args.bonus_coef
    bonus = coefs.index(5.0) if 5.0 in coefs else len(coefs) - 1  # the paper's coefficient where there is a choice
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.6), layout="constrained", sharey=True)
    offline = s.replay.data[0, : s.replay.offline_sizes[0]].cpu().numpy()
    axes[0].scatter(offline[:, 0], offline[:, 1], s=1.5, color="tab:gray", linewidths=0)
    axes[0].set_title(f"(a) offline data, {s.args.offline_episodes} trajectories")
    for axis, member, title in ((axes[1], 0, "(b) visitation of IQL"),
                                (axes[2], bonus, f"(c) visitation with the bonus, c = {coefs[bonus]:g}")):
        rows = s.replay.online(member).cpu().numpy()
        image = axis.hist2d(rows[:, 0], rows[:, 1], bins=(75, 85), range=list(zip(LOW, HIGH, strict=True)),
                            norm=LogNorm(1, 1e3), cmap="viridis")[3]
        axis.set_title(title)
    figure.colorbar(image, ax=axes[2], label="online states in a bin", extend="max")
    agents = ((explored[0], "tab:orange", "IQL"), (explored[bonus], "tab:purple", "IQL + bonus"),
              (retrained[bonus], "tab:green", "OOO"))
    for positions, color, label in agents:
        for i, path in enumerate(positions[:10].cpu().numpy()):
            axes[3].plot(path[:, 0], path[:, 1], color=color, linewidth=0.9, label=None if i else label)
    axes[3].set_title("(d) ten fresh episodes of each policy")
    axes[3].legend(loc="upper left", fontsize=8)
    for axis in axes:
        axis.plot([WALL_X, WALL_X], [WALL_LOW, WALL_HIGH], color="black", linewidth=3)
        axis.plot(*GOAL, marker="*", color="red", markersize=12)
        axis.plot(*START, marker="o", color="blue", markersize=6)
        axis.set(xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]), aspect="equal", xticks=[0, 0.5, 1])
    figure.suptitle(f"seed {s.seeds[0]}; blue: start, red: goal, black: wall")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    atomic_write(s.run.path / "figure2.png", picture.getvalue())


# === main ===
def open_session(args):
    """Check everything and build the agents; nothing is written before all of it has worked."""
    check_args(args)
    path = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
    if path.exists() and not args.resume:
        fail(f"{path} exists; continue it with --resume, or choose another --seed or --exp-name")
    config = read_config(path, SCRIPT) if (path / "config.json").exists() else None
    if config:
        was = {f.name: config["args"].get(f.name) for f in fields(Args) if f.name not in NOT_SETTINGS}
        changed = [f"--{k.replace('_', '-')} was {v}" for k, v in was.items() if v != getattr(args, k)]
        if changed:
            fail(f"--resume needs the settings that {path} was started with: {', '.join(changed)}")
    device, precision = setup_torch(args)
    with suppress(OSError, AttributeError):  # glibc: keep freed memory instead of faulting it in again at each update
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    s = SimpleNamespace(args=args, device=device, progress={"pretrain": 0, "online": 0, "retrain": 0})
    build(s)
    if args.exploit_only:
        s.source = load_torch(Path(args.exploit_only) / "checkpoint.pt", SCRIPT, device)
        if s.source["online"].shape[:2] != (len(s.members), args.online_steps):
            fail(f"{args.exploit_only} has not the online data of these settings; finish its online phase, and change "
                 "neither seeds, coefficients nor --online-steps")
    config = config or {"script": SCRIPT, "args": asdict(args), **provenance(device, precision)}
    saved = load_torch(path / "checkpoint.pt", SCRIPT, device) if (path / "checkpoint.pt").exists() else None
    try:
        s.run = Run(path, config)
    except OSError as error:
        fail(f"cannot write in {path} ({error.strerror}); make room, or choose another --runs-dir", code=1)
    if args.resume:
        restore(s, saved)
    if args.exploit_only and not saved:
        load_source(s)
    return s


def load_source(s):
    """--exploit-only: the online data and the exploration policies of another run."""
    source, p = Path(s.args.exploit_only), s.progress
    for member, rows in enumerate(s.source["online"]):
        s.replay.extend(member, rows)
    p.update(pretrain=s.args.offline_steps, online=s.args.online_steps)
    save_torch(s.run.path / "online.pt", load_torch(source / "online.pt", SCRIPT, s.device))


def main(args):
    s = open_session(args)
    try:
        train(s, "pretrain", args.offline_steps)
        train(s, "online", args.online_steps)
        if s.progress["retrain"] == 0:
            s.agents = make_agents(s, "retrain")
        train(s, "retrain", args.retrain_steps)
        return report(s)
    except NonFiniteLoss as error:
        fail(f"{error}; stopped, the checkpoint before it is kept in {s.run.path}", code=1)
    except OSError as error:
        fail(f"cannot write in {s.run.path} ({error.strerror or error}); make room and continue with --resume", code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; continue with --resume, the last checkpoint is in {s.run.path}", code=130)


if __name__ == "__main__":
    main(parse_args())
