# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4", "tyro==1.0.17", "tqdm==4.70.1", "psutil==7.2.2", "filelock==4.3.1", "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1", "wandb==0.31.0", "matplotlib==3.11.2"]
# ///
r"""Figure 2 of OOO from nothing: a point in a room, offline data over a wall, a shorter way under it.

Paper: "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv 2310.08558,
Algorithm 1, sections 5.1 and B.1. IQL: arXiv 2110.06169.

    python pointmass_didactic.py                                             # table over 5 seeds, and figure2.png
    python pointmass_didactic.py --seed 1 --num-seeds 1                      # one seed of all three agents
    python pointmass_didactic.py --bonus-coef 0 0.5 1 5 25 --exp-name sweep  # coefficient 0 is IQL
    python pointmass_didactic.py --online-steps 1000000 --exp-name long      # the online steps of the authors' flag
    python pointmass_didactic.py --exploit-only runs/point-mass-wall__pointmass_didactic__1 --exp-name again \
        --retrain-upsample 0                                                 # retraining only, on a run's data

All seeds, and all bonus coefficients, are trained side by side as one batch of small networks ("members"). Data, first
weights and random numbers of a seed do not depend on the others in the batch, but rounding does: a seed run alone is
another sample, not the same bytes.

Choices where paper and official code differ or are silent (the paper wins if it is explicit):
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

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages load is one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted; nothing was written\n"), os._exit(130)))

import errno
import hashlib
import io
import json
import math
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import psutil
import torch
import tyro
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

SCRIPT = "pointmass_didactic"  # written into every file of a run, also by a renamed copy


# === arguments ===
class Task(NamedTuple):
    settings: dict  # overrides of Args


TASKS = {"point-mass-wall": Task({})}


@dataclass
class Args:
    # --- experiment ---
    env_id: Literal[tuple(TASKS)] = "point-mass-wall"  # the only task here
    seed: int = 1  # first seed
    num_seeds: int = 5  # seeds trained side by side: seed, seed + 1, ...
    exp_name: str = Path(__file__).stem  # middle part of the run directory's name
    runs_dir: str = "runs"  # folder of the run directories
    scale: float = 1.0  # multiplies every budget and interval (steps, not episodes or batch size)
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda or cuda:N
    torch_threads: int = 1  # CPU threads of torch
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products; medium may round to bf16
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the updates; auto: where it saves time
    cudagraphs: bool = False  # replay the updates as CUDA graphs (cuda only)
    resume: bool = False  # continue the run of the same name; of a finished run: print and draw again
    exploit_only: str = ""  # RUN_DIR of a finished run: repeat its retraining with other settings, as a new run
    # --- task and data ---
    start_noise: Literal["gaussian", "uniform"] = "gaussian"  # N(0, 0.02^2) (paper), or uniform in +-0.02 (code)
    offline_episodes: int = 100  # scripted trajectories over the wall
    # --- phases ---
    offline_steps: int = 2_000  # pretraining: gradient steps on D_off
    online_steps: int = 300_000  # online phase: environment steps of each member, one gradient step each
    retrain_steps: int = 30_000  # gradient steps of the exploitation agents
    eval_every: int = 10_000  # steps of the phase under way between evaluations
    eval_episodes: int = 100  # episodes of one evaluation, for each member
    log_every: int = 2_500  # steps between records of losses and coverage
    checkpoint_every: int = 10_000  # steps between checkpoints
    # --- IQL: pretraining and online phase ---
    hidden_dims: tuple[int, ...] = (64, 64)  # hidden layers of actor, critic and value
    num_frequencies: int = 24  # random frequencies whose sines and cosines the networks see beside the position
    frequency: float = 2.0  # their standard deviation, in radians per unit of length: low ones generalise further
    batch_size: int = 64  # transitions of one gradient step, for each member
    learning_rate: float = 1e-3  # Adam's rate for actor, critic and value
    gamma: float = 0.95  # discount
    tau: float = 0.01  # Polyak rate of the target critic, per gradient step
    expectile: float = 0.9  # IQL's tau in (0.5, 1): closer to 1 means closer to a max over actions
    temperature: float = 10.0  # multiplies the advantage in exp(temperature * A); eq. 3 divides by beta
    log_std_min: float = -1.0  # lower clip of the policy's log standard deviation (upper: 2)
    bonus_coef: tuple[float, ...] = (0.0, 5.0)  # c of c / sqrt(n(s, a) + 1), each for all seeds; the first 0: plain IQL
    # --- exploitation: most of its data is aimless, and the goal is smaller than a step ---
    retrain_upsample: int = 8  # transitions of each batch drawn from those into the goal (section 4.2); 0: uniform
    retrain_batch_size: int = 256  # batch_size of the retraining, and so on
    retrain_learning_rate: float = 3e-4
    retrain_gamma: float = 0.95
    retrain_tau: float = 0.02
    retrain_frequency: float = 6.0  # high ones let values jump at the wall
    retrain_expectile: float = 0.97
    retrain_temperature: float = 300.0
    # --- tracking ---
    track: bool = False  # send metrics to wandb as well
    wandb_project: str | None = None  # unset: $WANDB_PROJECT, or ooo
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # unset: $WANDB_MODE, or online


BUDGETS = ("offline_steps", "online_steps", "retrain_steps", "eval_every", "log_every",
           "checkpoint_every")  # --scale multiplies these
COMPILE_PAYS = 20_000  # updates from which --compile auto is on: it saves more than it takes (docs/speed.md)
TINY = 1e-9  # open ends of intervals
RANGES = {  # closed interval of every number in Args (None is allowed where it is the default; NaN lies in none)
    (0, 2**32 - 1): "seed",
    (0, 10**10): "offline_steps retrain_upsample",
    (1, 10**10): "online_steps retrain_steps eval_every log_every checkpoint_every",
    (1, 2**16): "num_seeds offline_episodes eval_episodes batch_size retrain_batch_size num_frequencies",
    (1, 4096): "torch_threads hidden_dims",
    (TINY, 1e6): "scale temperature retrain_temperature",
    (TINY, 1.0): "learning_rate retrain_learning_rate tau retrain_tau",
    (0.0, 1 - TINY): "gamma retrain_gamma",
    (TINY, 1 - TINY): "expectile retrain_expectile",
    (-20.0, 2.0): "log_std_min",
    (0.0, 1e6): "bonus_coef frequency retrain_frequency",
}


def mistakes(args):
    """What else cannot be: (is wrong, message) pairs."""
    return (
        (args.bonus_coef[:1] != (0,), "--bonus-coef must begin with 0: plain IQL, which the others are compared with"),
        (list(args.bonus_coef) != sorted(set(args.bonus_coef)), "--bonus-coef must rise"),
        (args.retrain_upsample > args.retrain_batch_size, "--retrain-upsample is more than --retrain-batch-size"),
    )


def count_updates(args):
    """Gradient steps of the whole run."""
    return (0 if args.exploit_only else args.offline_steps + args.online_steps) + args.retrain_steps


def exploitation_args(args):
    """The settings of the exploitation agents: retrain_X stands in X's place."""
    return replace(args, **{name: getattr(args, f"retrain_{name}") for name in vars(args)
                            if hasattr(args, f"retrain_{name}")})


def seeds(args):
    return [args.seed + i for i in range(args.num_seeds)]


def members(args):
    """(seed, bonus coefficient) of every member."""
    return [(seed, coef) for seed in seeds(args) for coef in args.bonus_coef]


# === environment (section 5.1) ===
STEP = 0.05 * math.sqrt(0.5)  # displacement per axis of an action of 1
LOW, HIGH = (-0.25, -0.25), (1.25, 1.45)  # positions are clipped to this room
START, START_NOISE = (0.0, 0.5), 0.02
GOAL, GOAL_RADIUS = (1.0, 0.15), 0.01
WALL_X, WALL_LOW, WALL_HIGH = 0.5, 0.1, 1.2
HORIZON = 150
WAYPOINT = (WALL_X + 0.03, WALL_HIGH + 0.1)  # of the scripted controller


def move(positions, actions):
    """One step of any number of points: float32 (..., 2), (..., 2) -> next positions (..., 2), at the goal (...). The
    goal pays 1 and ends the episode, all else pays 0."""
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


def scripted_data(args, seed):
    """The offline data of a seed: rows (n, 7) of obs, action, next_obs, goal, episode after episode."""
    generator, n = make_generator(seed, "data"), args.offline_episodes
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


BINS = (100, 100, 10, 10)  # of x, y and the two actions


def count_cells(pairs):
    """Index of (s, a), (..., 4), in the grid of nearest nodes that the counts n(s, a) are of: (...)."""
    low, high, last = (pairs.new_tensor(x) for x in ((*LOW, -1, -1), (*HIGH, 1, 1), [n - 1 for n in BINS]))
    nodes = ((pairs - low) / (high - low) * last).round()
    return (nodes * nodes.new_tensor([math.prod(BINS[i + 1 :]) for i in range(4)])).sum(-1).long()


# === networks ===
class BatchedMLP(nn.Module):
    """Independent networks of one shape, ReLU between the layers: (members, batch, in) -> (members, batch, out)."""

    def __init__(self, generators, dims):
        """generators: of each member's first weights."""
        super().__init__()
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(len(generators), i, o) for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(len(generators), 1, o) for _, o in pairs])
        for member, generator in enumerate(generators):
            for weight in self.weights:
                nn.init.orthogonal_(weight.data[member], gain=2**0.5, generator=generator)
            self.weights[-1].data[member] *= 0.1  # first outputs near 0, whatever the features

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu_() if i else x, weight)
        return x


class Agents(nn.Module):
    """The IQL networks of all members, and their optimisers. Policy: tanh(net) plus Gaussian noise with a std that does
    not depend on the state, clipped to [-1, 1]."""

    def __init__(self, args, role, device):
        """role: whose first weights, "explore" or "retrain"; those of a seed are equal for all coefficients."""
        super().__init__()
        generators = [make_generator(seed, "networks", role) for seed, _ in members(args)]
        self.log_std_min = args.log_std_min
        frequencies = [args.frequency * torch.randn(2, args.num_frequencies, generator=g) for g in generators]
        self.register_buffer("frequencies", torch.stack(frequencies))
        size = 2 + 2 * args.num_frequencies
        self.actor = BatchedMLP(generators, (size, *args.hidden_dims, 2))
        self.log_std = nn.Parameter(torch.zeros(len(generators), 1, 2))
        self.value = BatchedMLP(generators, (size, *args.hidden_dims, 1))
        # Two critics a member: the first of all members, then the second of all members.
        self.critic, self.critic_target = (BatchedMLP([*generators, *generators], (size + 2, *args.hidden_dims, 1))
                                           for _ in range(2))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.to(device)
        self.value_optimizer = Adam(self.value.parameters(), args.learning_rate)
        self.critic_optimizer = Adam(self.critic.parameters(), args.learning_rate)
        self.actor_optimizer = Adam([*self.actor.parameters(), self.log_std], args.learning_rate)
        self.optimizers = (self.value_optimizer, self.critic_optimizer, self.actor_optimizer)

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

    @torch.no_grad()
    def act(self, obs, noise):
        """Sampled actions (members, 2); obs, and noise that is standard normal, likewise."""
        return (self.mean(obs[:, None]) + self.std() * noise[:, None]).squeeze(1).clamp(-1, 1)

    @torch.no_grad()
    def update_target(self, tau):
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)


# === losses and updates ===
def expectile_loss(diff, expectile):
    """IQL eq. 5: |expectile - 1{diff < 0}| * diff^2. diff = Q_target(s, a) - V(s), any shape."""
    return torch.where(diff > 0, expectile, 1.0 - expectile) * diff.square()


def iql_update(agents, batch, bonus=0.0, *, expectile, temperature, gamma, tau):
    """One IQL update of every member: V, then Q and the policy (eq. 1 to 3). batch: observations, actions,
    next_observations (members, batch, 2), rewards, masks (members, batch); bonus: (members, batch), or 0. Losses are
    means over a member's batch and sums over members, so that no member sees another's gradient. Returns detached
    scalars, means over all members."""
    both = agents.features(torch.cat([batch["observations"], batch["next_observations"]], 1))
    observations, actions = both.chunk(2, 1)[0], batch["actions"]
    pairs = torch.cat([observations, actions], -1).repeat(2, 1, 1)
    with torch.no_grad():
        q_target = agents.critic_target(pairs).view(2, *actions.shape[:2]).amin(0)
    # --- V: expectile regression toward the target Q ---
    value_loss = expectile_loss(q_target - agents.value(observations).squeeze(-1), expectile).mean(1)
    agents.value_optimizer.minimize(value_loss.sum())
    # --- Target: the new V; masks is 0 only at the goal, so the time limit still bootstraps ---
    with torch.no_grad():
        v, next_v = agents.value(both).squeeze(-1).chunk(2, 1)
        target = batch["rewards"] + gamma * batch["masks"] * next_v + bonus
    # --- Q ---
    q = agents.critic(pairs).view(2, *actions.shape[:2])
    critic_loss = (q - target).square().mean((0, 2))
    agents.critic_optimizer.minimize(critic_loss.sum())
    # --- Policy: advantage-weighted regression (eq. 3); constants of the log-density are left out ---
    weight = (temperature * (q_target - v)).exp().clamp(max=100.0)
    std = agents.std()
    z = (actions - agents.actor(observations).tanh()) / std
    actor_loss = (weight * (0.5 * z.square() + std.log()).sum(-1)).mean(1)
    agents.actor_optimizer.minimize(actor_loss.sum())
    agents.update_target(tau)
    return {"losses/value": value_loss.detach().mean(), "losses/critic": critic_loss.detach().mean(),
            "losses/actor": actor_loss.detach().mean(), "losses/v_mean": v.mean()}


def make_update(args, buffer, agents, optimistic):
    """update(rows) -> losses: one gradient step of every member on raw buffer rows (members, batch, 7); optimistic:
    with each member's bonus, as the counts stand."""
    options = dict(expectile=args.expectile, temperature=args.temperature, gamma=args.gamma, tau=args.tau)
    coefs = torch.tensor([[coef] for _, coef in members(args)], device=buffer.data.device)

    def update(rows):
        goal = rows[..., 6]
        batch = {"observations": rows[..., 0:2], "actions": rows[..., 2:4], "next_observations": rows[..., 4:6],
                 "rewards": goal, "masks": 1 - goal}
        bonus = coefs / (buffer.count(rows) + 1).sqrt() if optimistic else 0.0
        return iql_update(agents, batch, bonus, **options)

    return faster(args, update)


# === algorithm 1 ===
def pretrain(run, buffer, explorers, starts):
    """Algorithm 1, line 1: the exploration agents' update on D_off."""
    args, p, last = run.args, run.progress, run.args.offline_steps
    update, draws = make_update(args, buffer, explorers, optimistic=True), Draws(args, "pretrain", run.device)
    for step in progress_bar("pretrain", p["grad_step"], last):
        uniform, _, _ = draws[step]
        losses = update(buffer.sample(uniform))
        p["grad_step"] = step = step + 1
        run.updates += 1
        if due(step, args.log_every, last):
            run.log_losses("pretrain", 0, step, losses)
        if due(step, args.eval_every, last):
            evaluate_and_log(run, explorers, starts, "pretrain", 0, step)
        if step == last:
            save_policies(run, explorers, "pretrained.pt")
        if due(step, args.checkpoint_every, last) or run.signal:
            run.checkpoint(explorers=explorers)


def explore(run, buffer, explorers, starts):
    """Algorithm 1, lines 2 to 6: the optimistic policies act, each in its own environment; one update a step, on all
    data."""
    args, p, last = run.args, run.progress, run.args.online_steps
    update, draws = make_update(args, buffer, explorers, optimistic=True), Draws(args, "online", run.device)
    obs, age = buffer.last_positions()
    for t in progress_bar("online", p["env_step"], last):
        uniform, noise, fresh = draws[t]
        obs = torch.where((age % HORIZON == 0)[:, None], fresh, obs)  # new episodes
        actions = explorers.act(obs, noise)
        next_obs, goal = move(obs, actions)
        buffer.extend(torch.cat([obs, actions, next_obs, goal[:, None]], 1)[None])
        obs, age = next_obs, (age + 1).masked_fill(goal, 0)
        losses = update(buffer.sample(uniform))
        p["env_step"] = t = t + 1
        p["grad_step"] += 1
        run.updates += 1
        if due(t, args.log_every, last):
            run.log_losses("online", t, p["grad_step"], losses, **coverage(buffer))
        if due(t, args.eval_every, last):
            evaluate_and_log(run, explorers, starts, "online", t, p["grad_step"])
        if t == last:
            save_policies(run, explorers, f"exploration_{t}.pt")
        if due(t, args.checkpoint_every, last) or run.signal:
            run.append("replay.bin", buffer.unsaved())
            run.checkpoint(explorers=explorers)


def retrain(run, buffer, explorers, starts):
    """Algorithm 1, last line: separate pessimistic agents, from scratch, on D_off + D_on, task reward only."""
    args, p, last, n = exploitation_args(run.args), run.progress, run.args.retrain_steps, run.args.online_steps
    agents = Agents(args, "retrain", run.device)
    run.restore(exploiters=agents)
    update, draws = make_update(args, buffer, agents, optimistic=False), Draws(args, "retrain", run.device)
    high = buffer.goal_rows()
    for step in progress_bar("retrain", p["retrain_step"], last):
        uniform, _, _ = draws[step]
        losses = update(buffer.sample(uniform, *high, args.retrain_upsample))
        p["retrain_step"] = step = step + 1
        run.updates += 1
        if due(step, args.log_every, last):
            run.log_losses("retrain", n, step, losses)
        if due(step, args.eval_every, last):
            evaluate_and_log(run, agents, starts, "retrain", n, step)
        if step == last:
            save_policies(run, agents, f"exploitation_{n}.pt")
        if due(step, args.checkpoint_every, last) or run.signal:
            run.checkpoint(explorers=explorers, exploiters=agents)
    return agents


def main(args):
    # Build, and go back to the last checkpoint; nothing is written before all of it has worked.
    run = Run(args, grad_step=0, env_step=0, retrain_step=0)
    if args.exploit_only:
        take_over(run, args.exploit_only)
    data, dataset = load_dataset(args)
    buffer = ReplayBuffer(data, args.online_steps, run.device)
    buffer.restore(run.read_replay(7 * len(data)))
    explorers = Agents(args, "explore", run.device)
    run.restore(explorers=explorers)
    starts = evaluation_starts(args, run.device)
    run.begin(dataset, buffer.COLUMNS)

    if not args.exploit_only:
        pretrain(run, buffer, explorers, starts)
        explore(run, buffer, explorers, starts)
    exploiters = retrain(run, buffer, explorers, starts)
    return report(run, buffer, starts, explorers, exploiters)


def save_policies(run, agents, name):
    """The networks of all members; agents.mean() is all that is needed to act."""
    save_torch(run.path / name, {"script": SCRIPT, "members": members(run.args), "agents": agents.state_dict()})


# Below is plumbing: random numbers, data and replay, evaluation, figure, run directory. Nothing of the method.


# === random numbers ===
CHUNK = 256  # steps whose random numbers are drawn at once


def make_generator(seed, *place):
    """A CPU generator that is a function of seed and place alone: the random numbers of a seed do not depend on the
    other seeds of the batch, and a resumed run needs no saved state."""
    return torch.Generator().manual_seed(derive_seed(seed, *place))


class Draws:
    """Random numbers of a phase, step by step. The members of a seed, one for each coefficient, share them."""

    def __init__(self, args, phase, device):
        self.args, self.phase, self.device, self.chunk = args, phase, device, None

    def __getitem__(self, step):
        """(uniform (members, batch), action noise (members, 2), starts (members, 2)) of a step."""
        if self.chunk != step // CHUNK:
            self.chunk, parts = step // CHUNK, []
            for seed in seeds(self.args):
                g = make_generator(seed, self.phase, self.chunk)
                parts.append((torch.rand(CHUNK, self.args.batch_size, generator=g, dtype=torch.float64),
                              torch.randn(CHUNK, 2, generator=g), start_positions(self.args.start_noise, g, CHUNK)))
            self.values = [torch.stack(x, 1).repeat_interleave(len(self.args.bonus_coef), 1).to(self.device)
                           for x in zip(*parts, strict=True)]
        return tuple(x[step % CHUNK] for x in self.values)


# === data and replay ===
def load_dataset(args):
    """The scripted data of each member, rows (n, 7), and a report."""
    data = {seed: scripted_data(args, seed) for seed in seeds(args)}
    digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in data.values())).hexdigest()
    report = {"source": "scripted", "transitions": {seed: len(rows) for seed, rows in data.items()}, "sha256": digest}
    return [data[seed] for seed, _ in members(args)], report


class ReplayBuffer:
    """Append-only transitions of all members, raw, (time, members, 7), and the counts n(s, a) of all of them. Offline
    data is of unequal length: it ends at the same row for all members, and what stands before it is never drawn."""

    COLUMNS = {"observations": slice(0, 2), "actions": slice(2, 4), "next_observations": slice(4, 6), "goal": 6}

    def __init__(self, data, online_steps, device):
        """data: offline rows (n, 7) of each member; room for online_steps more."""
        sizes = torch.tensor([len(rows) for rows in data])
        self.offline_size = self.size = self.saved = int(sizes.max())
        shapes = (self.size + online_steps, len(data), 7), (len(data), math.prod(BINS))
        need = 4 * sum(map(math.prod, shapes))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > 0.95 * free:
            fail(f"the replay buffer needs {need / 2**30:.2f} GiB, {device} has {free / 2**30:.2f} GiB free; lower "
                 "--online-steps or --num-seeds, or use another device")
        self.data, self.counts = (torch.zeros(shape, device=device) for shape in shapes)
        self.members, self.begin = torch.arange(len(data), device=device), (self.size - sizes).to(device)
        for member, rows in enumerate(data):
            self.data[self.size - len(rows) : self.size, member] = rows = rows.to(device)
            self.add_counts(self.members[member], rows)

    def add_counts(self, member, rows):
        self.counts.index_put_((member, count_cells(rows[..., :4])), self.counts.new_ones(()), accumulate=True)

    def extend(self, rows):
        """Append rows (n, members, 7)."""
        self.data[self.size : self.size + len(rows)] = rows
        self.add_counts(self.members, rows)
        self.size += len(rows)

    def restore(self, rows):
        """Append rows (n, members * 7) of replay.bin."""
        self.extend(torch.from_numpy(rows).view(-1, len(self.members), 7).to(self.data.device))
        self.saved = self.size

    def unsaved(self):
        """Bytes of the rows that replay.bin does not hold yet."""
        rows, self.saved = self.data[self.saved : self.size], self.size
        return rows.cpu().numpy().tobytes()

    def online(self):
        """Rows (n, members, 7) since the offline data."""
        return self.data[self.offline_size : self.size]

    def last_positions(self):
        """Where the members are, (members, 2), and how many steps ago their first episode, or the one after their last
        visit of the goal, began (members,): at multiples of HORIZON they begin a new one."""
        goal = self.online()[..., 6].flip(0)
        return self.data[self.size - 1, :, 4:6], (goal.cumsum(0) == 0).sum(0)

    def goal_rows(self):
        """Indices (members, most) of the rows of each member that end at the goal, padded, and their number
        (members, 1). The scripted data always holds some."""
        found = [column.nonzero().squeeze(1) for column in self.data[..., 6].T]
        numbers = torch.tensor([[len(rows)] for rows in found], device=self.data.device)
        return nn.utils.rnn.pad_sequence(found, batch_first=True), numbers

    def sample(self, uniform, high=None, numbers=None, extra=0):
        """Rows (members, batch, 7), drawn by uniform in [0, 1), (members, batch): the first `extra` of a batch from
        the indices `high` (of goal_rows), the others from all."""
        begin = self.begin[:, None]
        index = begin + (uniform * (self.size - begin)).long()
        if extra:
            at_goal = high.gather(1, (uniform[:, :extra] * numbers).long())
            index = torch.cat([at_goal, index[:, extra:]], 1)
        return self.data[index, self.members[:, None]]

    def count(self, rows):
        """n(s, a) of rows (members, batch, 7), as it stands now."""
        return self.counts[self.members[:, None], count_cells(rows[..., :4])]


def coverage(buffer):
    """Of each member's online data: share of the cells of a 30 x 30 grid that it visited, goals reached, share of
    its states that lie under the wall's lower end and right of the wall's line."""
    rows = buffer.online()
    low, high = (rows.new_tensor(x) for x in (LOW, HIGH))
    x, y = ((rows[..., 4:6] - low) / (high - low) * 30).long().clamp(max=29).unbind(-1)
    visited = rows.new_zeros(rows.shape[1], 900).scatter_(1, (x * 30 + y).T, 1.0)
    under = (rows[..., 4] > WALL_X) & (rows[..., 5] < WALL_LOW)
    return {"charts/coverage": visited.mean(1).tolist(), "charts/goals": rows[..., 6].sum(0).int().tolist(),
            "charts/under": under.float().mean(0).tolist()}


def take_over(run, source):
    """--exploit-only: the online rows and exploration agents of a finished run, whose members must be this run's."""
    config, args = read_config(source), run.args
    for name in ("seed", "num_seeds", "bonus_coef", "start_noise", "offline_episodes", "online_steps", "hidden_dims",
                 "num_frequencies"):
        if getattr(args, name) != (was := config["args"][name]):
            fail(f"--{name.replace('_', '-')}: the data and agents of {source} are of {was}; leave the option out")
    saved, run.rows = run.read_checkpoint(Path(source), config)
    have = len(run.rows) // (28 * len(members(args)))
    if have < args.online_steps:
        fail(f"{source} holds {have} of {args.online_steps} online steps; finish it first (--resume)")
    run.models["explorers"], run.data_sha256 = saved["models"]["explorers"], config["dataset"]["sha256"]
    run.progress.update(grad_step=args.offline_steps + have, env_step=have)


# === evaluation ===
def evaluation_starts(args, device):
    """The same fresh starts for all members of a seed, at every evaluation: (members, episodes, 2)."""
    starts = [start_positions(args.start_noise, make_generator(seed, "evaluation"), args.eval_episodes)
              for seed in seeds(args)]
    return torch.stack(starts).repeat_interleave(len(args.bonus_coef), 0).to(device)


@torch.no_grad()
def evaluate(agents, starts):
    """Episodes of the mean policies from starts (members, episodes, 2). Returns positions (members, episodes,
    HORIZON + 1, 2), which stay at the goal once there, and of each episode (members, episodes): steps to the goal
    (HORIZON if missed), success, and which way it went."""
    positions, steps = [starts], torch.full(starts.shape[:2], HORIZON, device=starts.device)
    success = torch.zeros_like(steps, dtype=torch.bool)
    for t in range(HORIZON):
        new, goal = move(positions[-1], agents.mean(positions[-1]))
        positions.append(torch.where(success[..., None], positions[-1], new))
        steps.masked_fill_(goal & ~success, t + 1)
        success |= goal
    positions = torch.stack(positions, 2)
    under, over = ways(positions)
    return positions, {"steps": steps, "success": success, "under": under, "over": over}


def ways(positions):
    """Which way each trajectory (..., time, 2) passes the wall's line first: (under (...), over (...)), both False if
    it does not. Moves through the wall do not happen, so the height right after the crossing tells."""
    right = positions[..., 0] >= WALL_X
    crossings = right[..., 1:] & ~right[..., :-1]
    first = crossings & (crossings.cumsum(-1) == 1)
    middle = (WALL_LOW + WALL_HIGH) / 2
    height = positions[..., 1:, 1]
    return (first & (height < middle)).any(-1), (first & (height > middle)).any(-1)


def evaluate_and_log(run, agents, starts, phase, env_step, grad_step):
    """Every episode of every member to evals.jsonl; the means of each to metrics.jsonl."""
    begin = time.perf_counter()
    _, episodes = evaluate(agents, starts)
    for member, (seed, coef) in enumerate(members(run.args)):
        mean = {name: value[member].double().mean().item() for name, value in episodes.items()}
        run.log("metrics.jsonl", phase, env_step, grad_step, seed=seed, bonus_coef=coef, **{
            "eval/return": mean["success"] - mean["steps"],  # -1 a step, 0 for the step into the goal
            "eval/steps": mean["steps"], "eval/success_rate": mean["success"], "eval/under": mean["under"],
            "eval/over": mean["over"], "eval/std": agents.std()[member].mean().item()})
        run.log("evals.jsonl", phase, env_step, grad_step, seed=seed, bonus_coef=coef,
                **{name: value[member].tolist() for name, value in episodes.items()})
    run.clock += time.perf_counter() - begin  # evaluation is not training time


def shortest_steps(starts, over):
    """Least number of steps from starts (..., 2) to the goal, over or under the wall. Both axes move at the same time,
    at most STEP each, so a way takes the sum of its legs' larger axis differences: start, end of the wall, goal."""
    corner, goal = starts.new_tensor((WALL_X, WALL_HIGH if over else WALL_LOW)), starts.new_tensor(GOAL)
    legs = (corner - starts).abs().amax(-1) + (goal - corner).abs().amax()
    return ((legs - GOAL_RADIUS) / STEP).ceil()


# === table and figure ===
def report(run, buffer, starts, explorers, exploiters):
    """Both policies of every member from the same starts; prints the table, writes results.json and figure2.png."""
    args, rows = run.args, []
    explored, retrained = evaluate(explorers, starts), evaluate(exploiters, starts)
    covered, each = coverage(buffer)["charts/coverage"], len(args.bonus_coef)
    for j, coef in enumerate(args.bonus_coef):
        name = "IQL" if coef == 0 else f"IQL + bonus {coef:g}"
        for policy, (_, episodes) in ((name, explored), (f"OOO on the data of {name}", retrained)):
            mean = {key: value[j::each].double().mean(1).tolist() for key, value in episodes.items()}  # one a seed
            rows.append({"policy": policy, "bonus_coef": coef, "seeds": seeds(args), **mean,
                         "coverage": covered[j::each]})
    shortest = {way: shortest_steps(starts, way == "over") for way in ("under", "over")}
    shortest = {way: {"mean": float(n.mean()), "least": int(n.min()), "most": int(n.max())}
                for way, n in shortest.items()}
    results = {"env_id": args.env_id, "episodes_per_seed": args.eval_episodes, "shortest_steps": shortest,
               "rows": rows}
    atomic_write(run.path / "results.json", json.dumps(results, indent=1).encode())
    print_table(args, rows, shortest)
    atomic_write(run.path / "figure2.png", draw_figure(args, buffer, explored[0], retrained[0]))
    print(f"saved in {run.path}: results.json, figure2.png")
    return results


def print_table(args, rows, shortest):
    """Mean and standard deviation over the seeds; an episode that misses the goal counts as HORIZON steps."""
    print(f"\n{args.env_id}, seeds {seeds(args)[0]} to {seeds(args)[-1]}, {args.eval_episodes} episodes each, mean "
          "policy: mean (standard deviation) over seeds")
    print(f"{'policy':34}  {'steps to goal':>15}  {'reach the goal':>15}  {'go under':>15}  {'go over':>15}")
    for row in rows:
        cells = [f"{np.mean(row['steps']):7.1f} ({np.std(row['steps']):5.1f})"]
        cells += [f"{np.mean(row[k]):7.1%} ({np.std(row[k]):5.1%})" for k in ("success", "under", "over")]
        print(f"{row['policy']:34}  " + "  ".join(f"{cell:>15}" for cell in cells))
    for way, n in shortest.items():
        print(f"{f'shortest way {way} the wall':34}  {n['mean']:7.1f} ({n['least']} to {n['most']})")


def draw_figure(args, buffer, explored, retrained):
    """Figure 2 of the first seed, bytes of a png: data, where the agents went online, and fresh episodes of the three
    policies. explored, retrained: positions (members, episodes, time, 2)."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib does not even load with a name that it does not know
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    coefs = args.bonus_coef
    bonus = coefs.index(5.0) if 5.0 in coefs else len(coefs) - 1  # the paper's coefficient where there is a choice
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    offline = buffer.data[buffer.begin[0] : buffer.offline_size, 0].cpu().numpy()
    axes[0].scatter(offline[:, 0], offline[:, 1], s=1.5, color="tab:gray", linewidths=0)
    axes[0].set_title(f"(a) offline data, {args.offline_episodes} trajectories")
    for axis, member, title in ((axes[1], 0, "(b) visitation of IQL"),
                                (axes[2], bonus, f"(c) visitation with the bonus, c = {coefs[bonus]:g}")):
        rows = buffer.online()[:, member].cpu().numpy()
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
    figure.suptitle(f"seed {args.seed}; blue: start, red: goal, black: wall")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


# === shared block: run directory ===
# --- command line ---
def fail(message, code=2) -> NoReturn:
    """Say in one line on stderr what was wrong and what to do, and exit."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv=None):
    """Defaults < the task's row < the settings of the --exploit-only or --eval-only run < the command line; then
    --scale. Exit 2 with one line for what cannot be."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    first = tyro_cli([word for word in argv if word not in ("-h", "--help")], Args())
    if source := getattr(first, "eval_only", "") or getattr(first, "exploit_only", ""):
        own = {name: getattr(Args, name) for name in (*OWN, "exp_name", "eval_only", "exploit_only") if
               hasattr(Args, name)}
        default = tyro_cli(command_line(read_config(source)["args"] | own), Args(), f"{source}/config.json: ")
        check_ranges(default)
    else:
        default = replace(Args(env_id=first.env_id), **TASKS[first.env_id].settings)
    args = tyro_cli(argv, default)
    check_ranges(args)
    for name in ("runs_dir", "dataset_path", "eval_only", "exploit_only", "init_from"):
        if hasattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))

    for name in BUDGETS:
        value = getattr(args, name)
        scaled = [max(1, round(x * args.scale)) if x else 0 for x in np.atleast_1d(value).tolist()]
        setattr(args, name, tuple(scaled) if isinstance(value, tuple) else scaled[0])
    args.scale = 1.0
    for wrong, message in (
        (source and args.env_id != default.env_id, f"{source} is a run on {default.env_id}; leave --env-id out"),
        (not re.fullmatch(r"\w[\w.+=,-]*", args.exp_name) or len(os.fsencode(args.exp_name)) > 100,
         "--exp-name must be one short word, it names a folder"),
        (getattr(args, "rnd_hidden_dims", 1) == (), "--rnd-hidden-dims needs a layer"),
        (getattr(args, "video", False) and not args.eval_only, "--video goes with --eval-only"),
        (getattr(args, "dataset_id", ()) and args.dataset_path, "give --dataset-id or --dataset-path, not both"),
        *mistakes(args),
    ):
        if wrong:
            fail(message)
    return args


def command_line(settings):
    """The words that give these settings: those of a config.json are read as if they were typed."""
    flat = lambda value: [w for x in value for w in flat(x)] if isinstance(value, tuple) else [str(value)]  # noqa: E731
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(getattr(Args, name), bool):
            yield f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag}={value}"
        else:
            yield from (f"--{flag}", *flat(value)) if isinstance(value, tuple) else (f"--{flag}={value}",)


def tyro_cli(argv, default, where=""):
    """tyro's reading of a command line; its errors, which fill a box, as one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(Args, args=list(argv), default=default, description=__doc__)
    except SystemExit as stop:
        if stop.code:
            fail(where + re.sub(r"(?:[\s\u2500-\u257f]|-{3,})+", " ", box.getvalue()))
        raise


def check_ranges(args):
    """Exit 2 with one line unless every number lies in its interval of RANGES."""
    for (low, high), names in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            for x in np.ravel(() if value is None and getattr(Args, name) is None else value).tolist():
                if not (isinstance(x, (int, float)) and low <= x <= high):
                    fail(f"--{name.replace('_', '-')} {x} lies outside [{low:g}, {high:g}]")


def read_config(run_dir, scripts=(SCRIPT,)):
    """config.json of a run of one of the scripts; exit 2 if RUN_DIR does not hold one."""
    path = Path(run_dir).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text())
        if config["script"] not in scripts:
            fail(f"{run_dir} is a run of {config['script']}; give a run of {' or '.join(scripts)}")
        tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value  # noqa: E731
        config["args"] = {name: tuples(value) for name, value in config["args"].items()}
        other = set(config["args"]) ^ {field.name for field in fields(Args)}
        if other and config["script"] == SCRIPT:
            fail(f"{path} has other settings than this version of {SCRIPT} ({' '.join(sorted(other))})")
        config["run_id"], config["dataset"]["sha256"], config["versions"], config["resumed"]
        return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is not the config of a run of {' or '.join(scripts)} ({error!r}); give the folder of a run")


# --- run directory, metrics, checkpoint ---
OWN = ("resume", "track", "wandb_project", "wandb_mode", "runs_dir", "video", "device", "torch_threads")
FREE = (*OWN, "log_every", "checkpoint_every", "dataset_path")  # bear on no number (the data's SHA-256 does)


def derive_seed(seed, *place):
    """An independent 32-bit seed for each (seed, purpose, step or episode, ...)."""
    words = [zlib.crc32(str(part).encode()) for part in place]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def seed_torch(seed):
    """torch.manual_seed for the devices in use; that one takes 0.2 ms, a part of an update."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def due(step, every, last):
    return step % every == 0 or step == last


def progress_bar(name, start, stop):
    """Step numbers from start to stop, with a bar on stderr; in a log file it is a line a minute."""
    interval = 0.1 if sys.stderr.isatty() else 60
    return tqdm(range(start, stop), initial=start, total=stop, desc=name, dynamic_ncols=True, mininterval=interval,
                  maxinterval=max(10, interval))


def setup_torch(args):
    """Device, threads, precision, and --compile auto made on or off. Exit 2 for a device that does not work."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if args.device == "auto" else args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.cudagraphs and device.type != "cuda":
        fail("--cudagraphs needs a CUDA device; leave it out on the CPU")
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    auto, updates, compiler = args.compile == "auto", count_updates(args), None
    if auto:
        args.compile = "on" if updates >= COMPILE_PAYS else "off"
    if args.compile == "on":
        with suppress(RuntimeError):
            compiler = shutil.which(torch._inductor.cpp_builder.get_cpp_compiler())
        if not compiler and not auto:
            fail("--compile on needs a C++ compiler, and there is none that works: install g++, or leave it off")
        args.compile = "on" if compiler else "off"
    if auto:
        print(f"--compile auto: {args.compile} ({updates:,} updates; on from {COMPILE_PAYS:,}, with a C++ compiler)")
    return device


class Adam(torch.optim.Adam):
    """torch's fused Adam. minimize() is one step, also within a compiled update, which step() would break apart."""

    def __init__(self, parameters, learning_rate):
        super().__init__(parameters, learning_rate, fused=True)
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                             "exp_avg_sq": torch.zeros_like(p)}

    def minimize(self, loss):
        """One step along the gradient of the scalar loss with respect to these parameters alone."""
        group = self.param_groups[0]
        parameters, rate, eps, (beta1, beta2) = group["params"], group["lr"], group["eps"], group["betas"]
        gradients = torch.autograd.grad(loss, parameters)
        states = [self.state[p] for p in parameters]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        with torch.no_grad():
            torch._foreach_add_(steps, 1.0)
            if not torch.compiler.is_compiling():
                return torch._fused_adam_(parameters, gradients, means, squares, [], steps, lr=rate, beta1=beta1,
                                          beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)
            for p, g, m, v, n in zip(parameters, gradients, means, squares, steps, strict=True):  # the same, traceable
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                p.sub_(rate / (1 - beta1**n) * m / ((v / (1 - beta2**n)).sqrt() + eps))


def faster(args, update):
    """update(rows) -> losses as --compile and --cudagraphs want it."""
    if args.compile == "on":
        torch.compiler.reset()  # graphs of an earlier phase's networks
        torch._inductor.config.fallback_random = True  # the random numbers of the eager update
        torch._dynamo.config.trace_autograd_ops = torch._dynamo.config.capture_dynamic_output_shape_ops = True
        update = torch.compile(update)
    return CudaGraph(update) if args.cudagraphs else update


class CudaGraph:
    """Replays update(rows) as one CUDA graph: three eager calls on a side stream (every one a real update), then
    capture. The returned tensors are overwritten by the next call. Draws inside follow the seed as those outside do."""

    def __init__(self, update):
        self.update, self.calls, self.graph, self.stream = update, 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, rows):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.update(rows)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.calls == 4:
            self.rows = rows.clone()
            with torch.cuda.graph(self.graph):
                self.losses = self.update(self.rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.losses


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
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # the rename itself; some file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_torch(path, content):
    """torch.save, atomically, with the file's SHA-256 as comment of the zip archive that it is."""
    stream = io.BytesIO()
    torch.save(content, stream)
    data = stream.getvalue()[:-2]  # without the comment's length
    atomic_write(path, data + (64).to_bytes(2, "little") + hashlib.sha256(data).hexdigest().encode())


def load_torch(path, device, scripts=(SCRIPT,)):
    """A file of save_torch; exit 2 if it is missing, is not as it was written, or is of none of the scripts."""
    try:
        data = Path(path).read_bytes()
        if hashlib.sha256(data[:-66]).hexdigest().encode() != data[-64:]:
            fail(f"{path} is not as it was written (its checksum differs): restore it, or start the run again")
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}); has the run come that far?")
    if content["script"] not in scripts:
        fail(f"{path} was not written by {' or '.join(scripts)}; give a run of it")
    return content


def read_verified(path, size, checksum):
    """The first `size` bytes of a file; exit 2 if they are not those that were written."""
    try:
        with open(path, "rb") as file:
            data = file.read(size)
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    if len(data) != size or zlib.crc32(data) != checksum:
        fail(f"{path} is not as it was written (its checksum differs): restore it, or start the run again")
    return data


def state_of(model):
    """Networks and optimisers, for load_state."""
    return {"networks": model.state_dict(), "optimizers": [o.state_dict()["state"] for o in model.optimizers]}


def load_state(model, state):
    model.load_state_dict(state["networks"])
    for optimizer, saved in zip(model.optimizers, state["optimizers"], strict=True):
        # This process's groups: a checkpoint of another device has other options there.
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})


class Run:
    """A run directory. config.json: settings, versions, hardware, data. metrics.jsonl, evals.jsonl: the same bytes for
    the same seed on the same machine. timing.jsonl: what differs each time. replay.bin: the online transitions, raw
    float32 rows (columns: config.json). checkpoint.pt: what --resume needs.

    Everything random is seeded by its place (phase, step or episode), so a resumed run needs no saved generator. Until
    begin() nothing is written, and by then what is to be continued has been read and verified."""

    FILES = ("metrics.jsonl", "evals.jsonl", "timing.jsonl", "replay.bin")
    signal = None  # the one that has come

    def __init__(self, args, **progress):
        """progress: the counters and scores of a new run."""
        self.args, self.progress, self.models, self.config, self.wandb = args, progress, {}, None, None
        self.path = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
        self.sizes, self.sums = dict.fromkeys(self.FILES, 0), dict.fromkeys(self.FILES, 0)
        self.updates, self.clock = 0, time.perf_counter()
        self.data_seed, self.data_sha256 = args.seed, None  # of the offline data; --exploit-only: the source's
        if (self.path / "config.json").exists():
            if not args.resume:
                fail(f"{self.path} exists; continue it with --resume, or choose another --seed or --exp-name")
            self.lock()
            self.config = read_config(self.path)
            before = self.config["args"]
            args.compile = before["compile"] if args.compile == "auto" else args.compile
            changed = [name for name, value in asdict(args).items() if name not in FREE and before[name] != value]
            if changed:
                was = ", ".join(f"--{name.replace('_', '-')} was {before[name]}" for name in changed)
                fail(f"--resume needs the settings that {self.path} was started with: {was}")
        elif self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir())):
            fail(f"{self.path} is there and is not a run; choose another --seed or --exp-name")
        self.device = setup_torch(args)
        self.rows = b""
        if self.config and (self.path / "checkpoint.pt").exists():
            saved, self.rows = self.read_checkpoint(self.path, self.config)
            self.models, self.progress, self.sizes, self.sums = (
                saved[name] for name in ("models", "progress", "sizes", "sums"))

    def lock(self):
        """One process a directory; death releases it."""
        self.held = FileLock(self.path / ".lock")
        try:
            self.held.acquire(timeout=0)
        except Timeout:
            fail(f"another process is at work in {self.path}; wait for it, or choose another --seed or --exp-name")

    def read_checkpoint(self, path, config):
        """The checkpoint of a run directory and the bytes of its online rows; exit 2 if anything was altered."""
        saved = load_torch(path / "checkpoint.pt", self.device)
        if (saved["run_id"], saved["args"]) != (config["run_id"], json.dumps(config["args"])):
            fail(f"{path / 'checkpoint.pt'} does not belong to {path / 'config.json'}; restore the run's own")
        for name in self.FILES:  # the last one's content is returned
            data = read_verified(path / name, saved["sizes"][name], saved["sums"][name])
        return saved, data

    def read_replay(self, width):
        """The online rows (n, width) up to the checkpoint."""
        return np.frombuffer(bytearray(self.rows), np.float32).reshape(-1, width)

    def begin(self, dataset, columns):
        """From here on files are written. dataset: the report of load_dataset; columns: those of replay.bin's rows."""
        start, known = provenance(self.device), self.config
        if {dataset["sha256"], known and known["dataset"]["sha256"], self.data_sha256} - {None} != {dataset["sha256"]}:
            fail(f"the offline data {dataset['source']} is not what the run was started with (sha256 differs)")
        if known:
            for name in ("commit", "versions", "hardware"):
                if start[name] != (last := (known["resumed"] or [known])[-1][name]):
                    print(f"resumed with other {name}: {start[name]}, before: {last}")
            known["resumed"].append(start)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if (self.path / "config.json").exists():
                fail(f"another process has just started {self.path}")
            ends = {k: [c.start, c.stop] if isinstance(c, slice) else [c, c + 1] for k, c in columns.items()}
            self.config = {"script": SCRIPT, "run_id": secrets.token_hex(8), "args": asdict(self.args), **start,
                           "dataset": dataset, "replay_columns": ends, "resumed": []}
        try:
            if self.args.track:
                self.start_wandb()
            atomic_write(self.path / "config.json", json.dumps(self.config, indent=1).encode())
            self.files = {name: open(self.path / name, "ab", buffering=0) for name in self.FILES}
            for name, file in self.files.items():  # what came after the checkpoint is made again
                file.truncate(self.sizes[name])
        except BaseException:
            if not known:  # a start that fails leaves nothing behind
                shutil.rmtree(self.path, ignore_errors=True)
                with suppress(OSError):
                    self.path.parent.rmdir()
            raise
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, Run.on_signal)
        place = {name: value for name, value in self.progress.items() if name != "scores"}
        if self.args.resume:
            print(f"continued at {place}" if any(place.values()) else "nothing to continue, starting anew")

    def start_wandb(self):
        try:
            import wandb

            mode = self.args.wandb_mode or os.environ.get("WANDB_MODE", "online")
            parts = len(self.config["resumed"])  # wandb continues no offline run: each part is a run of one group
            run_id = self.config["run_id"] + (f"-{parts}" if mode == "offline" and parts else "")
            project = self.args.wandb_project or os.environ.get("WANDB_PROJECT", "ooo")
            self.wandb = wandb.init(project=project, mode=mode, id=run_id, group=self.config["run_id"], resume="allow",
                                    name=self.path.name, dir=self.path, config=self.config)
        except Exception as error:  # no key, no network, not installed
            fail(f"--track: wandb cannot start ({error}); log in, use --wandb-mode offline, or leave --track out")

    @staticmethod
    def on_signal(number, frame):
        """The next checkpoint is the last one; a second signal ends at once."""
        Run.signal = number
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    def append(self, name, data):
        """Bytes to the end of a file: all of them, or the run stops."""
        if self.files[name].write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / name))
        self.sizes[name] += len(data)
        self.sums[name] = zlib.crc32(data, self.sums[name])

    def log(self, name, phase, env_step, grad_step, **values):
        """One record, a line of JSON."""
        where = {"phase": phase, "env_step": env_step, "grad_step": grad_step}
        self.append(name, json.dumps(where | values).encode() + b"\n")
        if self.wandb and name == "metrics.jsonl":
            self.wandb.log({f"{phase}/{key}": value for key, value in values.items()} | where)

    def log_losses(self, phase, env_step, grad_step, losses, **extra):
        """Losses of the last update; one that is not finite ends the run."""
        values = {name: value.item() for name, value in losses.items()}
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            fail(f"{bad[0]} is {values[bad[0]]} at {phase} step {grad_step}; the last checkpoint before is kept", 1)
        self.log("metrics.jsonl", phase, env_step, grad_step, **values, **extra)
        speed = self.updates / max(time.perf_counter() - self.clock, 1e-9)
        self.log("timing.jsonl", phase, env_step, grad_step, **{"charts/SPS": speed, "time": time.time()})
        self.updates, self.clock = 0, time.perf_counter()

    def seed(self, *place):
        """Whatever is random from here on depends on the run's seed and this place alone."""
        seed_torch(derive_seed(self.args.seed, *place))
        self.updates += 1

    def restore(self, **models):
        """The checkpoint's state of the models that it has."""
        for name, model in models.items():
            if model and name in self.models:
                load_state(model, self.models.pop(name))

    def checkpoint(self, **models):
        """Everything that a resumed process needs; then the end, if a signal has come."""
        models = {name: model for name, model in models.items() if model}
        for name, model in models.items():
            if not all(p.isfinite().all() for p in model.parameters()):
                fail(f"{name} is not finite at {self.progress}; the checkpoint before is kept in {self.path}", 1)
        for file in self.files.values():
            os.fsync(file.fileno())
        save_torch(self.path / "checkpoint.pt", {
            "script": SCRIPT, "run_id": self.config["run_id"], "args": json.dumps(self.config["args"]),
            "progress": self.progress, "sizes": self.sizes, "sums": self.sums,
            "models": {name: state_of(model) for name, model in models.items()}})
        if self.signal:
            name = signal.Signals(self.signal).name
            fail(f"stopped by {name}; the checkpoint is written, continue with --resume", 128 + self.signal)


def provenance(device):
    """What a number needs beside it: versions, commit, hardware, command, time."""
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    commit, cpu = None, platform.processor() or platform.machine()
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    with suppress(OSError):
        cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), cpu)
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                         "matmul_precision": torch.get_float32_matmul_precision(),
                         "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}}


class Stream:
    """An output stream whose reader may go away; where nobody looks, progress is written in lines."""

    def __init__(self, stream):
        self.stream, self.lines = stream or open(os.devnull, "w"), not (stream and stream.isatty())

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text.replace("\r", "\n") if self.lines else text)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def one_line_errors():
    """What can end a run from outside, said in one line."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed stream's number must not become that of a file
        os.set_inheritable(number, True)
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        yield
    except OSError as error:
        fail(f"{error}; what was saved before is whole: put it right, then use --resume", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = re.sub("backend='.*' raised:", "", str(error)).strip().splitlines()[0]
            cache = torch._inductor.runtime.cache_dir_utils.cache_dir()
            fail(f"torch.compile: {reason}; delete its cache ({cache}), or give --compile off", 1)
        if isinstance(error, RuntimeError) and "memory" not in str(error) and "alloc" not in str(error):
            raise
        fail(f"not enough memory ({str(error).splitlines()[0]}); use smaller networks, batches or budgets", 1)


# === end shared block: run directory ===


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
