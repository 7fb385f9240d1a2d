# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4", "pydantic==2.14.4", "tyro==1.0.17", "tqdm==4.70.1", "filelock==4.3.1",
#     "wandb==0.31.0", "matplotlib==3.11.2"]
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

A run holds several seeds, and each seed several bonus coefficients. Each of these pairs is a member. All members are
trained side by side, as one batch of small networks; each learns from its own data. Data, first weights and random
numbers of a seed do not depend on the other seeds. Rounding does: a seed alone is another sample.

The paper is followed where it is explicit, else the code. "# choice N" marks where a choice acts.
 1. Start noise is the paper's N(0, 0.02^2) on each axis. The code's is uniform in +-0.02 (--start-noise uniform).
 2. A move is cancelled where it crosses the wall's line strictly between the wall's ends. A point on the line counts as
    right of it: two moves must not pass the wall by a stop on the line.
 3. The offline data is not published. A scripted controller makes it here: over the wall by one waypoint, slower near
    the goal, whose radius is smaller than a step.
 4. No hyper-parameter is published for this task; the code's flags are 500k pretraining and 1M online steps. Those in
    Args are ours (results/pointmass/README.md). The bonus and one update a step are the paper's.
 5. IQL and IQL + bonus differ in the bonus alone. The exploitation agents have settings of their own (retrain_...). Q
    targets are not clipped.
 6. The networks see sines and cosines of the position beside the position itself. With these, values that jump at the
    wall are learned within the small budgets here.
 7. The retraining draws 8 of 256 transitions from those into the goal (section 4.2; the code's number for its mazes).
    Drawn uniformly, a batch in twelve would hold one.
"""

import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NoReturn

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from tqdm import tqdm

SCRIPT = "pointmass_didactic"  # written into every file of a run, also by a renamed copy


# === tasks ===
TASKS = {"point-mass-wall": SimpleNamespace(settings={})}  # no overrides of Args


# === ranges (shared) ===
# The type of a setting says its range: pydantic refuses what lies outside, on the command line and in a config.json.
Steps = Annotated[int, Field(ge=0, le=10**10)]  # 0: none
Count = Annotated[int, Field(ge=1, le=10**10)]
Width = Annotated[int, Field(ge=1, le=4096)]
Real = Annotated[float, Field(ge=-1e9, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
LogStd = Annotated[float, Field(ge=-20, le=2)]
Name = Annotated[str, Field(pattern=r"^\w[\w.+=,-]{0,99}$")]  # names a folder


# === arguments ===
@dataclass(config=ConfigDict(extra="forbid"))
class Args:
    # --- experiment ---
    env_id: Literal[tuple(TASKS)] = "point-mass-wall"  # the only task here
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # first seed
    num_seeds: Width = 5  # seeds trained side by side: seed, seed + 1, ...
    exp_name: Name = re.sub(r"[^\w.+=,-]", "_", Path(__file__).stem)  # middle part of the run directory's name
    runs_dir: str = "runs"  # folder of the run directories
    scale: Positive = 1.0  # multiplies every budget and interval; episodes of evaluations shrink with it, to 5 at least
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda or cuda:N
    torch_threads: Width = 1  # CPU threads of torch; several runs side by side use a machine better than one with many
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products; medium may round to bf16
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the updates; auto: where it saves time and works
    cudagraphs: bool = False  # replay the updates as CUDA graphs (cuda only)
    resume: bool = False  # continue the run of the same name from its last checkpoint
    exploit_only: str = ""  # RUN_DIR of a finished run: repeat its retraining with other settings, as a new run
    # --- task and data ---
    start_noise: Literal["gaussian", "uniform"] = "gaussian"  # N(0, 0.02^2) (paper), or uniform in +-0.02 (code)
    offline_episodes: Count = 100  # scripted trajectories over the wall
    # --- phases ---
    offline_steps: Steps = 2_000  # pretraining: gradient steps on D_off
    online_steps: Count = 300_000  # online phase: environment steps of each member, one gradient step each
    retrain_steps: Count = 30_000  # gradient steps of the exploitation agents
    eval_every: Count = 10_000  # steps of the phase under way between evaluations
    eval_episodes: Count = 100  # episodes of one evaluation, for each member
    final_episodes: Count = 100  # episodes of the last evaluation of each policy, on start states of its own
    log_every: Count = 2_500  # steps between records of losses and coverage
    checkpoint_every: Count = 10_000  # steps between checkpoints
    # --- IQL: pretraining and online phase ---
    hidden_dims: tuple[Width, ...] = (64, 64)  # hidden layers of actor, critic and value
    num_frequencies: Width = 24  # random frequencies whose sines and cosines the networks see beside the position
    frequency: NonNegative = 2.0  # their standard deviation, in radians per unit of length: low ones generalise further
    batch_size: Count = 64  # transitions of one gradient step, for each member
    learning_rate: Rate = 1e-3  # Adam's rate for actor, critic and value
    gamma: Share = 0.95  # discount
    tau: Rate = 0.01  # Polyak rate of the target critic, per gradient step
    expectile: Fraction = 0.9  # IQL's tau in (0.5, 1): closer to 1 means closer to a max over actions
    temperature: Positive = 10.0  # multiplies the advantage in exp(temperature * A); eq. 3 divides by beta
    log_std_min: LogStd = -1.0  # lower clip of the policy's log standard deviation (upper: 2)
    bonus_coef: tuple[NonNegative, ...] = (0.0, 5.0)  # c of c / sqrt(n(s, a) + 1), for all seeds; first 0: plain IQL
    # --- exploitation: most of its data is aimless, and the goal is smaller than a step ---
    retrain_upsample: Steps = 8  # transitions of each batch drawn from those into the goal (section 4.2); 0: uniform
    retrain_batch_size: Count = 256  # batch_size of the retraining, and so on
    retrain_learning_rate: Rate = 3e-4
    retrain_gamma: Share = 0.95
    retrain_tau: Rate = 0.02
    retrain_frequency: NonNegative = 6.0  # high ones let values jump at the wall
    retrain_expectile: Fraction = 0.97
    retrain_temperature: Positive = 300.0
    # --- tracking ---
    track: bool = False  # send metrics to wandb as well
    wandb_project: str | None = None  # unset: wandb's own settings
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # unset: wandb's own settings


# --scale multiplies these
BUDGETS = ("offline_steps", "online_steps", "retrain_steps", "eval_every", "log_every", "checkpoint_every")
COMPILE_PAYS = 20_000  # updates from which on --compile auto is on


def count_updates(args):
    return (0 if args.exploit_only else args.offline_steps + args.online_steps) + args.retrain_steps


def invalid_combinations(args):
    """(condition, message): settings that are valid alone but not together."""
    return (
        (args.bonus_coef[:1] != (0,), "--bonus-coef must begin with 0: plain IQL, which the others are compared with"),
        (list(args.bonus_coef) != sorted(set(args.bonus_coef)), "--bonus-coef must rise"),
        (args.retrain_upsample > args.retrain_batch_size, "--retrain-upsample is more than --retrain-batch-size"),
    )


def exploitation_args(args):
    """The settings of the exploitation agents: retrain_X stands in X's place."""
    settings = asdict(args)
    return replace(args, **{k: settings[f"retrain_{k}"] for k in settings if f"retrain_{k}" in settings})


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


def move(positions: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of any number of points: float32 (..., 2), (..., 2) -> next positions (..., 2), at the goal (...). The
    goal pays 1 and ends the episode, all else pays 0."""
    low, high, goal = (positions.new_tensor(x) for x in (LOW, HIGH, GOAL))
    new = (positions + STEP * actions.clamp(-1, 1)).clamp(low, high)
    (px, py), (qx, qy) = positions.unbind(-1), new.unbind(-1)
    dx, dy = qx - px, qy - py
    # On which side of the line of the move each end of the wall lies: opposite sides mean that the move passes between.
    lower, upper = (dx * (end - py) - dy * (WALL_X - px) for end in (WALL_LOW, WALL_HIGH))
    crosses = ((px < WALL_X) != (qx < WALL_X)) & (lower * upper < 0)  # choice 2
    new = torch.where(crosses[..., None], positions, new)
    return new, (new - goal).norm(dim=-1) < GOAL_RADIUS


def start_positions(kind: str, generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Fresh starts (*shape, 2), drawn on the CPU."""
    if kind == "gaussian":  # choice 1
        noise = torch.randn(*shape, 2, generator=generator)
    else:
        noise = 2 * torch.rand(*shape, 2, generator=generator) - 1
    return torch.tensor(START) + START_NOISE * noise


def scripted_data(args, seed: int) -> torch.Tensor:
    """The offline data of a seed (choice 3): rows (n, 7) of obs, action, next_obs, goal, episode after episode."""
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


def count_cells(pairs: torch.Tensor) -> torch.Tensor:
    """Index of (s, a), (..., 4), in the grid of nearest nodes that the counts n(s, a) are of: (...)."""
    low, high, last = (pairs.new_tensor(x) for x in ((*LOW, -1, -1), (*HIGH, 1, 1), [n - 1 for n in BINS]))
    nodes = ((pairs - low) / (high - low) * last).round()
    return (nodes * nodes.new_tensor([math.prod(BINS[i + 1 :]) for i in range(4)])).sum(-1).long()


# === adam (shared) ===
def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x @ weight + bias, (num, batch, in) -> (num, batch, out), in the form that is fastest eager or compiled: the
    compiler adds the bias in the next kernel, and a sum beats a matrix product of width 1."""
    if not torch.compiler.is_compiling():
        return torch.baddbmm(bias, x, weight)
    if weight.shape[-1] == 1:
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    return x @ weight + bias


class Adam(torch.optim.Adam):
    """torch's fused Adam. minimize() is one step, also within a compiled update, which step() would break apart."""

    def __init__(self, parameters, learning_rate: float):
        super().__init__(parameters, learning_rate, fused=True)
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                             "exp_avg_sq": torch.zeros_like(p)}

    def minimize(self, loss: torch.Tensor) -> None:
        """One step along the gradient of the scalar loss with respect to these parameters alone."""
        group = self.param_groups[0]
        parameters = group["params"]
        rate, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        gradients = torch.autograd.grad(loss, parameters)
        states = [self.state[p] for p in parameters]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        with torch.no_grad():
            torch._foreach_add_(steps, 1.0)
            if not torch.compiler.is_compiling():
                return torch._fused_adam_(parameters, gradients, means, squares, [], steps, lr=rate, beta1=beta1,
                                          beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)
            # The same, traceable. exp(n log beta) is computed once; beta**n would be computed for every vector.
            n = steps[0].double()
            mean_rate = (rate / (1 - (n * np.log(beta1)).exp())).float()
            square_rate = (1 / (1 - (n * np.log(beta2)).exp())).sqrt().float()
            for p, g, m, v in zip(parameters, gradients, means, squares, strict=True):
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                p.sub_(mean_rate * m / (v.sqrt() * square_rate + eps))


# === networks ===
class BatchedMLP(nn.Module):
    """Independent networks of one shape, ReLU between the layers: (members, batch, in) -> (members, batch, out)."""

    def __init__(self, generators: list[torch.Generator], dims: tuple[int, ...]):
        """generators: of each member's first weights."""
        super().__init__()
        sizes = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(len(generators), i, o) for i, o in sizes])
        self.biases = nn.ParameterList([torch.zeros(len(generators), 1, o) for _, o in sizes])
        for member, generator in enumerate(generators):
            for weight in self.weights:
                nn.init.orthogonal_(weight.data[member], gain=2**0.5, generator=generator)
            self.weights[-1].data[member] *= 0.1  # first outputs near 0, whatever the features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = affine(x.relu() if i else x, weight, bias)
        return x


class Agents(nn.Module):
    """The IQL networks of all members, and their optimisers. Policy: tanh(net) plus Gaussian noise with a std that does
    not depend on the state, clipped to [-1, 1]."""

    def __init__(self, args, role: str, device: torch.device):
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

    def features(self, positions: torch.Tensor) -> torch.Tensor:
        """What the networks see of positions (members, batch, 2): the positions themselves, and sines and cosines of
        fixed random frequencies (choice 6). On positions alone a small network takes very long to learn that the two
        sides of the wall, next to each other, have different values."""
        phases = torch.bmm(positions, self.frequencies)
        return torch.cat([2 * positions - 1, phases.sin(), phases.cos()], -1)

    def std(self) -> torch.Tensor:
        return self.log_std.clamp(self.log_std_min, 2.0).exp()

    def mean(self, positions: torch.Tensor) -> torch.Tensor:
        """Mean actions of positions (members, batch, 2)."""
        return self.actor(self.features(positions)).tanh()

    @torch.no_grad()
    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sampled actions (members, 2); obs, and noise that is standard normal, likewise."""
        return (self.mean(obs[:, None]) + self.std() * noise[:, None]).squeeze(1).clamp(-1, 1)

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)


# === losses and updates ===
def expectile_loss(diff, expectile):
    """IQL eq. 5: |expectile - 1{diff < 0}| * diff^2. diff = Q_target(s, a) - V(s), any shape."""
    return torch.where(diff > 0, expectile, 1.0 - expectile) * diff.square()


def iql_update(agents, batch, bonus=0.0, *, expectile, temperature, gamma, tau):
    """One IQL update of every member: V, then Q and the policy (eq. 1 to 3). batch: observations, actions,
    next_observations (members, batch, 2), rewards, masks (members, batch); bonus: (members, batch), or 0. A loss is the
    mean over a member's batch and the sum over members, so that no member sees another's gradient. Returns detached
    means over all members; magnitudes: of each member, (members,)."""
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
            "losses/actor": actor_loss.detach().mean(), "losses/v_mean": v.mean(),
            "losses/q_magnitude": q.detach().abs().mean((0, 2)), "losses/v_magnitude": v.abs().mean(1)}


def make_update(args, buffer, agents, optimistic):
    """update(rows) -> losses: one gradient step of every member on raw buffer rows (members, batch, 7); optimistic:
    with each member's bonus, as the counts stand."""
    options = dict(expectile=args.expectile, temperature=args.temperature, gamma=args.gamma, tau=args.tau)
    coefs = torch.tensor([[coef] for _, coef in members(args)], device=buffer.data.device)

    def update(rows):
        goal = rows[..., 6]
        batch = {"observations": rows[..., 0:2], "actions": rows[..., 2:4], "next_observations": rows[..., 4:6],
                 "rewards": goal, "masks": 1 - goal}
        bonus = coefs / (buffer.count(rows) + 1).sqrt() if optimistic else 0.0  # choice 5
        return iql_update(agents, batch, bonus, **options)

    return compile_update(args, update)


# === algorithm 1 ===
def pretrain(run, buffer, explorers):
    """Algorithm 1, line 1: the exploration agents' update on D_off."""
    args, p = run.args, run.progress
    last = args.offline_steps
    update = make_update(args, buffer, explorers, optimistic=True)
    draws = random_numbers(args, "pretrain", p["grad_step"], run.device)
    for step in progress_bar("pretrain", p["grad_step"], last):
        uniform, _, _ = next(draws)
        losses = update(buffer.sample(uniform))
        run.updates += 1
        p["grad_step"] = step = step + 1
        if step % args.log_every == 0 or step == last:
            log_losses(run, args, "exploration", "pretrain", 0, step, losses)
        if step % args.eval_every == 0 or step == last:
            evaluate_and_log(run, explorers, "pretrain", 0, step)
        if step == last:
            save_policies(run, explorers, "pretrained.pt")
        if step % args.checkpoint_every == 0 or step == last or run.signal:
            run.checkpoint(explorers=explorers)


def explore(run, buffer, explorers):
    """Algorithm 1, lines 2 to 6: the optimistic policies act, each in its own environment; one update a step, on all
    data."""
    args, p = run.args, run.progress
    last = args.online_steps
    update = make_update(args, buffer, explorers, optimistic=True)
    saved = p["env_step"]
    draws = random_numbers(args, "online", saved, run.device)
    obs, age = buffer.last_positions()
    for t in progress_bar("online", saved, last):
        uniform, noise, fresh = next(draws)
        obs = torch.where((age % HORIZON == 0)[:, None], fresh, obs)  # new episodes
        actions = explorers.act(obs, noise)
        next_obs, goal = move(obs, actions)
        buffer.extend(torch.cat([obs, actions, next_obs, goal[:, None]], 1)[None])
        obs, age = next_obs, (age + 1).masked_fill(goal, 0)
        losses = update(buffer.sample(uniform))
        run.updates += 1
        p["env_step"] = t = t + 1
        p["grad_step"] += 1
        if t % args.log_every == 0 or t == last:
            log_losses(run, args, "exploration", "online", t, p["grad_step"], losses, **coverage(buffer))
        if t % args.eval_every == 0 or t == last:
            evaluate_and_log(run, explorers, "online", t, p["grad_step"])
        if t == last:
            save_policies(run, explorers, f"exploration_{t}.pt")
        if t % args.checkpoint_every == 0 or t == last or run.signal:
            run.write("replay.bin", buffer.rows_since(saved))
            run.checkpoint(explorers=explorers)
            saved = t


def retrain(run, buffer, explorers):
    """Algorithm 1, last line: separate pessimistic agents, from scratch, on D_off + D_on, task reward only."""
    args, p = exploitation_args(run.args), run.progress
    last, t = args.retrain_steps, args.online_steps
    agents = Agents(args, "retrain", run.device)
    run.restore(exploiters=agents)
    update = make_update(args, buffer, agents, optimistic=False)
    draws = random_numbers(args, "retrain", p["retrain_step"], run.device)
    goal_rows = buffer.goal_rows()
    for step in progress_bar("retrain", p["retrain_step"], last):
        uniform, _, _ = next(draws)
        losses = update(buffer.sample(uniform, *goal_rows, args.retrain_upsample))  # choice 7
        run.updates += 1
        p["retrain_step"] = step = step + 1
        if step % args.log_every == 0 or step == last:
            log_losses(run, args, f"exploitation {t}", "retrain", t, step, losses)
        if step % args.eval_every == 0 or step == last:
            evaluate_and_log(run, agents, "retrain", t, step)
        if step == last:
            save_policies(run, agents, f"exploitation_{t}.pt")
        if step % args.checkpoint_every == 0 or step == last or run.signal:
            run.checkpoint(explorers=explorers, exploiters=agents)
    return agents


def log_losses(run, args, policy, phase, env_step, grad_step, losses, **extra):
    """Losses of the last update, means over all members. |Q| and |V| are those of one member: of those that were not
    yet said to diverge, the one nearest to its ceiling, the largest |reward|, bonus included, / (1 - gamma). The goal
    pays 1; what is drawn has been counted, so that its bonus is c / sqrt(2) at most."""
    bonus, all_members = policy == "exploration", members(args)
    names = [f"{policy}, seed {seed}, c = {coef:g}" for seed, coef in all_members]
    ceilings = torch.tensor([(1 + bonus * coef / 2**0.5) / (1 - args.gamma) for _, coef in all_members])
    q, v = losses["losses/q_magnitude"].cpu(), losses["losses/v_magnitude"].cpu()
    new = torch.tensor([name not in run.progress["diverged"] for name in names])
    worst = (new * torch.maximum(q, v) / ceilings).argmax().item()
    losses = losses | {"losses/q_magnitude": q[worst], "losses/v_magnitude": v[worst]}
    run.log_losses(names[worst], phase, env_step, grad_step, losses, ceilings[worst].item(), **extra)


def main(args):
    # Build and restore. Nothing is written before run.begin().
    run = Run(args, grad_step=0, env_step=0, retrain_step=0, diverged={})
    data_from = read_source(run) if args.exploit_only else run.replay
    data, dataset = load_dataset(args)
    buffer = ReplayBuffer(data, args.online_steps, run.device)
    buffer.load(*data_from)
    explorers = Agents(args, "explore", run.device)
    run.restore(explorers=explorers)
    run.begin(dataset, buffer.COLUMNS)

    if not args.exploit_only:
        pretrain(run, buffer, explorers)
        explore(run, buffer, explorers)
    exploiters = retrain(run, buffer, explorers)
    write_results(run, buffer, explorers, exploiters)
    return print_table(run)


def save_policies(run, agents, name):
    """The networks of all members; agents.mean() is all that is needed to act."""
    save(run.path / name, {"script": SCRIPT, "run_id": run.id, "members": members(run.args),
                           "agents": agents.state_dict()})


# Below is plumbing: random numbers, data and replay, evaluation, figure, run directory. Nothing of the method.
# It needs from above: SCRIPT, TASKS, Args, BUDGETS, COMPILE_PAYS, count_updates, invalid_combinations, seeds, members,
# and the environment.


# === random numbers ===
CHUNK = 256  # steps whose random numbers are drawn at once


def make_generator(seed: int, *place) -> torch.Generator:
    """On the CPU, a function of seed and place alone: the random numbers of a seed do not depend on the other seeds,
    and a resumed run needs no saved state."""
    return torch.Generator().manual_seed(derive_seed(seed, *place))


def random_numbers(args, phase, step, device):
    """Of each step of a phase, from `step` on: uniform (members, batch), action noise and starts (members, 2). The
    members of a seed, one for each coefficient, share them."""
    while True:
        parts = []
        for seed in seeds(args):
            g = make_generator(seed, phase, step // CHUNK)
            parts.append((torch.rand(CHUNK, args.batch_size, generator=g, dtype=torch.float64),
                          torch.randn(CHUNK, 2, generator=g), start_positions(args.start_noise, g, CHUNK)))
        values = [torch.stack(x, 1).repeat_interleave(len(args.bonus_coef), 1).to(device)
                  for x in zip(*parts, strict=True)]
        for i in range(step % CHUNK, CHUNK):
            yield [x[i] for x in values]
        step += CHUNK - step % CHUNK


# === data and replay ===
def load_dataset(args) -> tuple[list[torch.Tensor], dict]:
    """The scripted data of each member, rows (n, 7), and a report."""
    data = {seed: scripted_data(args, seed) for seed in seeds(args)}
    digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in data.values())).hexdigest()
    report = {"source": "scripted", "transitions": {seed: len(rows) for seed, rows in data.items()}, "sha256": digest}
    return [data[seed] for seed, _ in members(args)], report


class ReplayBuffer:
    """Append-only transitions of all members, raw, (time, members, 7), and the counts n(s, a) of all of them. Offline
    data is of unequal length: it ends at the same row for all members, and what stands before it is never drawn."""

    COLUMNS = {"observations": slice(0, 2), "actions": slice(2, 4), "next_observations": slice(4, 6), "goal": 6}

    def __init__(self, data: list[torch.Tensor], online_steps: int, device: torch.device):
        """data: offline rows (n, 7) of each member; room for online_steps more."""
        sizes = torch.tensor([len(rows) for rows in data])
        self.offline_size = self.size = int(sizes.max())
        self.data = torch.zeros(self.size + online_steps, len(data), 7, device=device)
        self.counts = torch.zeros(len(data), math.prod(BINS), device=device)
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

    def online(self):
        """Rows (n, members, 7) since the offline data."""
        return self.data[self.offline_size : self.size]

    def rows_since(self, env_step):
        """The online rows from env_step on, as the bytes of replay.bin."""
        return self.online()[env_step:].cpu().numpy().tobytes()

    def load(self, path, size, checksum, count):
        """Append the `count` rows of all members in the first `size` bytes of a replay.bin; exit 2 unless these bytes
        are those that were written."""
        stored = np.memmap(path, np.uint8, "c")[:size] if size else np.empty(0, np.uint8)  # not a copy in memory
        width = 28 * len(self.members)
        if len(stored) != size or zlib.crc32(stored) != checksum or size < count * width:
            fail(f"{path} is not as it was written (its checksum differs); restore it, or start the run again")
        rows = stored[: count * width].view(np.float32).reshape(count, len(self.members), 7)
        for part in torch.from_numpy(rows).split(4096):
            self.extend(part.to(self.data.device))

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

    def sample(self, uniform, goal_rows=None, numbers=None, extra=0):
        """Rows (members, batch, 7), drawn by uniform in [0, 1), (members, batch): the first `extra` of a batch from
        the indices `goal_rows`, the others from all."""
        begin = self.begin[:, None]
        index = begin + (uniform * (self.size - begin)).long()
        if extra:
            at_goal = goal_rows.gather(1, (uniform[:, :extra] * numbers).long())
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


def read_source(run):
    """--exploit-only: the exploration agents of a finished run, whose members must be this run's, and where its online
    rows are, as ReplayBuffer.load wants it. The source is known by its id, wherever it lies."""
    source, args = Path(run.args.exploit_only), run.args
    config = read_config(source)
    if run.config and run.source_id != config["run_id"]:
        fail(f"{source} is not the run whose data {run.path} was started with; give that one")
    for name in ("seed", "num_seeds", "bonus_coef", "start_noise", "offline_episodes", "online_steps", "hidden_dims",
                 "num_frequencies"):
        if getattr(args, name) != (was := config["args"][name]):
            fail(f"--{name.replace('_', '-')}: the data and agents of {source} are of {was}; leave the option out")
    saved = read_checkpoint(source, config, run.device)
    if (have := saved["progress"]["env_step"]) < args.online_steps:
        fail(f"{source} holds {have} of {args.online_steps} online steps; give a run that has all (--resume)")
    run.models["explorers"] = saved["models"]["explorers"]
    run.source_id, run.data_sha256 = config["run_id"], config["dataset"]["sha256"]
    return source / "replay.bin", saved["sizes"]["replay.bin"], saved["replay_sum"], args.online_steps


# === evaluation ===
def evaluation_starts(args, purpose, episodes):
    """The same fresh starts for all members of a seed: (members, episodes, 2)."""
    starts = [start_positions(args.start_noise, make_generator(seed, purpose), episodes) for seed in seeds(args)]
    return torch.stack(starts).repeat_interleave(len(args.bonus_coef), 0)


@torch.no_grad()
def evaluate(agents: Agents, starts: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Episodes of the mean policies from starts (members, episodes, 2). Returns positions (members, episodes,
    HORIZON + 1, 2), which stay at the goal once there, and of each episode (members, episodes): steps to the goal
    (HORIZON if missed), success, and which way it went."""
    starts = starts.to(agents.log_std.device)
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


def evaluate_and_log(run, agents, phase, env_step, grad_step):
    """A point of the curves: every episode of every member to evals.jsonl, the means of each to metrics.jsonl."""
    _, episodes = evaluate(agents, evaluation_starts(run.args, "evaluation", run.args.eval_episodes))
    for member, (seed, coef) in enumerate(members(run.args)):
        mean = {name: value[member].double().mean().item() for name, value in episodes.items()}
        run.log("metrics.jsonl", phase, env_step, grad_step, seed=seed, bonus_coef=coef, **{
            "eval/return": mean["success"] - mean["steps"],  # -1 a step, 0 for the step into the goal
            "eval/steps": mean["steps"], "eval/success_rate": mean["success"], "eval/under": mean["under"],
            "eval/over": mean["over"], "eval/std": agents.std()[member].mean().item()})
        run.log("evals.jsonl", phase, env_step, grad_step, seed=seed, bonus_coef=coef,
                **{name: value[member].tolist() for name, value in episodes.items()})


def shortest_steps(starts, over):
    """Least number of steps from starts (..., 2) to the goal, over or under the wall. Both axes move at the same time,
    at most STEP each, so a way takes the sum of its legs' larger axis differences: start, end of the wall, goal."""
    corner, goal = starts.new_tensor((WALL_X, WALL_HIGH if over else WALL_LOW)), starts.new_tensor(GOAL)
    legs = (corner - starts).abs().amax(-1) + (goal - corner).abs().amax()
    return ((legs - GOAL_RADIUS) / STEP).ceil()


# === table and figure ===
def write_results(run, buffer, explorers, exploiters):
    """The final evaluation: both policies of every member, on starts that no curve uses. figure2.png, then
    results.json: rows with a mean for each seed, and every episode (seed by seed)."""
    args, rows = run.args, []
    starts = evaluation_starts(args, "final", args.final_episodes)
    explored, retrained = evaluate(explorers, starts), evaluate(exploiters, starts)
    covered, each = coverage(buffer)["charts/coverage"], len(args.bonus_coef)
    for j, coef in enumerate(args.bonus_coef):
        name = "IQL" if coef == 0 else f"IQL + bonus {coef:g}"
        for policy, (_, found) in ((name, explored), (f"OOO on the data of {name}", retrained)):
            means = {key: value[j::each].double().mean(1).tolist() for key, value in found.items()}
            episodes = {key: value[j::each].tolist() for key, value in found.items()}
            rows.append({"policy": policy, "bonus_coef": coef, "seeds": seeds(args), **means,
                         "coverage": covered[j::each], "per_episode": episodes})
    steps = {way: shortest_steps(starts, way == "over") for way in ("under", "over")}
    shortest = {way: {"mean": float(n.mean()), "least": int(n.min()), "most": int(n.max())} for way, n in steps.items()}
    save(run.path / "figure2.png", draw_figure(args, buffer, explored[0], retrained[0]))
    save(run.path / "results.json", {
        "script": SCRIPT, "env_id": args.env_id, "exp_name": args.exp_name, "seed": args.seed, "run_id": run.id,
        "source_run_id": run.source_id, "episodes_per_seed": args.final_episodes, "shortest_steps": shortest,
        "rows": rows, "diverged": run.progress["diverged"]})


def print_table(run):
    """Mean and standard deviation over the seeds; an episode that misses the goal counts as HORIZON steps."""
    args, results = run.args, json.loads((run.path / "results.json").read_text())
    print(f"\n{args.env_id}, seeds {seeds(args)[0]} to {seeds(args)[-1]}, {args.final_episodes} episodes each, mean "
          "policy: mean (standard deviation) over seeds")
    print(f"{'policy':34}  {'steps to goal':>15}  {'reach the goal':>15}  {'go under':>15}  {'go over':>15}")
    for row in results["rows"]:
        cells = [f"{np.mean(row['steps']):7.1f} ({np.std(row['steps']):5.1f})"]
        cells += [f"{np.mean(row[k]):7.1%} ({np.std(row[k]):5.1%})" for k in ("success", "under", "over")]
        print(f"{row['policy']:34}  " + "  ".join(f"{cell:>15}" for cell in cells))
    for way, n in results["shortest_steps"].items():
        print(f"{f'shortest way {way} the wall':34}  {n['mean']:7.1f} ({n['least']} to {n['most']})")
    for policy, where in results["diverged"].items():
        print(f"{policy} has diverged: {where}")
    print(f"saved in {run.path}: results.json, figure2.png")
    return results["rows"]


def draw_figure(args, buffer, explored, retrained):
    """Figure 2 of the first seed, bytes of a png: data, where the agents went online, and new episodes of the three
    policies. explored, retrained: positions (members, episodes, time, 2)."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib does not even load with a name that it does not know
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    coefs = args.bonus_coef
    bonus = coefs.index(5.0) if 5.0 in coefs else len(coefs) - 1  # the paper's coefficient where there is a choice
    offline = buffer.data[buffer.begin[0] : buffer.offline_size, 0].cpu()
    iql, optimistic = (buffer.online()[:, member, :2].cpu() for member in (0, bonus))
    policies = ((explored[0], "tab:orange", "IQL"), (explored[bonus], "tab:purple", "IQL + bonus"),
                (retrained[bonus], "tab:green", "OOO"))
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    axes[0].scatter(*offline[:, :2].T, s=1.5, color="tab:gray", linewidths=0)
    for axis, xy in ((axes[1], iql), (axes[2], optimistic)):
        counts = axis.hist2d(*xy.T.numpy(), bins=(75, 85), range=(*zip(LOW, HIGH, strict=True),), norm=LogNorm(1, 1e3))
    figure.colorbar(counts[3], ax=axes[2], label="online states in a bin", extend="max")
    for positions, color, label in policies:
        axes[3].plot(*positions[:10].cpu().permute(2, 1, 0), color=color, linewidth=0.9)
        axes[3].plot([], [], color=color, label=label)
    titles = (f"(a) offline data: {args.offline_episodes} trajectories", "(b) online data of IQL",
              "(c) online data of IQL + bonus", "(d) 10 new episodes of each policy")
    for axis, title in zip(axes, titles, strict=True):
        axis.plot(*START, marker="o", color="tab:blue", markersize=6, linestyle="", label="start")
        axis.plot(*GOAL, marker="*", color="red", markersize=12, linestyle="", label="goal")
        axis.plot([WALL_X, WALL_X], [WALL_LOW, WALL_HIGH], color="black", linewidth=3, label="wall")
        axis.set(title=title, xlabel="x (units of length)", xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]),
                 aspect="equal", xticks=(0, 0.5, 1))
    axes[0].set_ylabel("y (units of length)")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"Seed {args.seed}, {args.online_steps:,} online steps, bonus coefficient {coefs[bonus]:g}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


# === command line, run directory (shared) ===
SCRIPT_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # read at once: the file may be edited later
# Settings of a process, not of its run: not taken over from another run, and free to change on --resume.
PROCESS_SETTINGS = ("resume", "track", "wandb_project", "wandb_mode", "runs_dir", "video", "device", "torch_threads",
                    "compile")
# May change on --resume: results differ by rounding at most. Moved data or source runs must be the same ones.
MAY_CHANGE = (*PROCESS_SETTINGS, "log_every", "checkpoint_every", "dataset_path", "exploit_only", "init_from")


def fail(message: str, code: int = 2) -> NoReturn:
    """Say in one line on stderr what was wrong and what to do, and exit."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv: list[str] | None = None):
    """Defaults < the task's row < the settings of the --exploit-only or --eval-only run < the command line; then
    --scale. Exit 2 with one line for what is wrong."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    first = tyro_cli([word for word in argv if word not in ("-h", "--help")], Args())
    source = getattr(first, "eval_only", "") or getattr(first, "exploit_only", "")
    if source:
        own = (*PROCESS_SETTINGS, "exp_name", "eval_only", "exploit_only")
        default = Args(**read_config(source)["args"] | {k: v for k, v in asdict(Args()).items() if k in own})
    else:
        default = Args(env_id=first.env_id, **TASKS[first.env_id].settings)
    args = tyro_cli(argv, default)
    # The times of a source run's phases have been scaled already.
    for name in (n for n in BUDGETS if not source or n == "retrain_steps" or n.endswith("_every")):
        value = getattr(args, name)
        scaled = [max(1, round(x * args.scale)) if x else 0 for x in np.atleast_1d(value).tolist()]
        setattr(args, name, tuple(scaled) if isinstance(value, tuple) else scaled[0])
    for name in ("eval_episodes", "final_episodes"):
        value = getattr(args, name)
        setattr(args, name, min(value, max(5, round(value * args.scale))))
    args.scale = 1.0
    if source and args.env_id != default.env_id:
        fail(f"{source} is a run on {default.env_id}; leave --env-id out")
    for wrong, message in invalid_combinations(args):
        if wrong:
            fail(message)
    return args


def tyro_cli(argv, default):
    """tyro's reading of a command line; its errors, which fill a box, as one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(Args, args=argv, default=default, description=__doc__)
    except SystemExit as stop:
        text = re.sub(r"[\s\u2500-\u257f]+", " ", box.getvalue())
        text = re.sub(r"^ ?(.+) (?=\1)", "", text, flags=re.IGNORECASE)  # a title that the text repeats
        if outside := re.search(r"for Args (\w+)\S* (.*?) \[type=\w+, input_value=(.*?), input_type", text):
            text = f"--{outside[1].replace('_', '-')} {outside[3]}: {outside[2]}"
        if stop.code:
            fail(text)
        raise


def read_config(run_dir, scripts=(SCRIPT,)):
    """config.json of a run of one of the scripts; exit 2 if RUN_DIR does not hold one."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
        if config["script"] == SCRIPT:
            args = asdict(Args(**config["args"]))
            if missing := args.keys() - config["args"].keys():
                raise ValueError(f"made by another version: no {' '.join(sorted(missing))}")
            config["args"] = args
        if config["script"] in scripts:
            config["run_id"], config["source_run_id"], config["dataset"]["sha256"], config["resumed"]
            return config
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = str(error).partition("For further")[0]  # pydantic adds a link
        fail(f"{path} is not the config of a run of {' or '.join(scripts)} ({type(error).__name__}: {why})")
    fail(f"{run_dir} is a run of {config['script']}; give a run of {' or '.join(scripts)}")


# --- seeds, steps, device ---
def derive_seed(seed: int, *place) -> int:
    """An independent 32-bit seed for each (seed, purpose, step or episode, ...)."""
    words = [zlib.crc32(str(part).encode()) for part in place]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def seed_torch(seed):
    """torch.manual_seed for the devices in use; that one takes 0.2 ms, a part of an update."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def progress_bar(name, start, stop):
    """Step numbers from start to stop, with a bar on stderr; in a log file it is a line a minute."""
    interval = 0.1 if sys.stderr.isatty() else 60
    return tqdm(range(start, stop), initial=start, total=stop, desc=name, mininterval=interval, maxinterval=interval)


def setup_torch(args):
    """Device, threads, precision, and --compile auto made on or off. Exit 2 for what does not work."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if args.device == "auto" else args.device)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # the one that is seeded
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.cudagraphs and device.type != "cuda":
        fail("--cudagraphs needs a CUDA device; leave it out on the CPU")
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    auto, updates = args.compile == "auto", count_updates(args)
    if args.compile == "on" or auto and updates >= COMPILE_PAYS:
        try:  # a small graph of each kind that the updates have
            torch.compile(lambda x: (x @ x).relu().sum())(torch.zeros(64, 64, device=device))
            args.compile = "on"
        except Exception as error:  # no compiler, one without OpenMP, a damaged cache, ...
            if not auto:
                fail(f"--compile on: {str(error).strip().splitlines()[0]}; install g++, or leave it off")
            print(f"torch.compile does not work here, going on without it: {str(error).strip().splitlines()[0]}")
    args.compile = "off" if args.compile == "auto" else args.compile
    if auto:
        print(f"--compile auto: {args.compile} ({updates:,} updates; it pays from {COMPILE_PAYS:,} on)")
    return device


def compile_update(args, update):
    """update(rows) -> losses as --compile and --cudagraphs want it."""
    if args.compile == "on":
        torch.compiler.reset()  # graphs of an earlier phase's networks
        torch._inductor.config.fallback_random = True  # the random numbers of the eager update
        # One graph, although gradients are taken and RND's rows are counted within it.
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


# --- files ---
def save(path, content):
    """Write a .json, a .pt or bytes so that at any moment the file is the old one or the new one, complete."""
    stream = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, stream)
    else:
        stream.write(json.dumps(content, indent=1).encode() if path.suffix == ".json" else content)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a kill or a full disk
    with open(temporary, "xb") as file:  # made here: a link of that name is not followed
        file.write(stream.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_torch(path: Path, device, run_id: str | None = None) -> dict:
    """A .pt file of save; exit 2 if it is missing, damaged, or of another run than run_id."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load looks at no checksum
            raise ValueError("its checksum differs")
        content = torch.load(path, map_location=device, weights_only=True)
        if run_id not in (None, content["run_id"]):
            raise ValueError("it is of another run")
        return content
    except Exception as error:  # zipfile, pickle and torch raise many kinds for a damaged file
        fail(f"{path} cannot be used ({type(error).__name__}: {error}); restore it, or start the run again")


def state_of(model):
    """Networks and optimisers, for load_state."""
    states = [[o.state[p] for p in o.param_groups[0]["params"]] for o in model.optimizers]
    return {"networks": model.state_dict(), "optimizers": states}


@torch.no_grad()
def load_state(model, state):
    """Copies into the tensors that are there: a CUDA graph goes on using them."""
    model.load_state_dict(state["networks"])
    for optimizer, states in zip(model.optimizers, state["optimizers"], strict=True):
        for p, saved in zip(optimizer.param_groups[0]["params"], states, strict=True):
            for name, value in saved.items():
                optimizer.state[p][name].copy_(value)


class Run:
    """A run directory. config.json: settings, versions, hardware, data. metrics.jsonl, evals.jsonl: the same bytes for
    the same seed on the same machine. timing.jsonl: what differs each time. replay.bin: the online transitions, raw
    float32 rows (columns: config.json). checkpoint.pt: what --resume needs. results.json: the end.

    Until begin() nothing is written. Everything random is seeded by its place (phase, step or episode). So --resume
    needs no saved generator: what came after the last checkpoint is cut off and made again."""

    FILES = ("metrics.jsonl", "evals.jsonl", "timing.jsonl", "replay.bin")
    signal = None  # the one that has come

    def __init__(self, args, **progress):
        """progress: the counters and scores of a new run. Of one that is to be continued: what the checkpoint holds."""
        self.args = args
        self.progress = progress
        self.path = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}"
        self.config = None
        self.id, self.source_id = secrets.token_hex(8), None
        self.models = {}
        self.sizes, self.replay_sum = dict.fromkeys(self.FILES, 0), 0
        self.replay = self.path / "replay.bin", 0, 0, 0  # what ReplayBuffer.load needs to go back to the checkpoint
        self.data_seed, self.data_sha256 = args.seed, None  # of the offline data; --exploit-only: the source's
        self.wandb = None
        self.updates, self.clock = 0, time.perf_counter()
        if not (self.path / "config.json").exists():
            if any(p.stat().st_size for name in self.FILES for p in self.path.glob(name)):
                fail(f"{self.path} has records but no config.json; restore it, or choose another --seed or --exp-name")
            self.device = setup_torch(args)
            return
        if not args.resume:
            fail(f"{self.path} exists; continue it with --resume, or choose another --seed or --exp-name")
        self.config = read_config(self.path)
        self.id, self.source_id = self.config["run_id"], self.config["source_run_id"]
        self.data_sha256 = self.config["dataset"]["sha256"]
        before = self.config["args"]
        if before.get("exploit_only") and not args.exploit_only:
            fail(f"{self.path} retrains on the data of another run; give --exploit-only and that run again")
        if changed := [k for k, v in asdict(args).items() if k not in MAY_CHANGE and before[k] != v]:
            was = ", ".join(f"--{name.replace('_', '-')} was {before[name]}" for name in changed)
            fail(f"--resume needs the settings that {self.path} was started with: {was}")
        if (self.path / "results.json").exists():
            print(f"{self.path} is finished: see its results.json")
            raise SystemExit(0)
        self.lock = FileLock(self.path / ".lock").acquire(timeout=0)  # one process a directory; death releases it
        self.device = setup_torch(args)
        saved = read_checkpoint(self.path, self.config, self.device)
        self.models, self.progress, self.sizes = saved["models"], saved["progress"], saved["sizes"]
        self.replay_sum = saved["replay_sum"]
        self.replay = (self.replay[0], self.sizes["replay.bin"], self.replay_sum, self.progress["env_step"])

    def begin(self, dataset, columns):
        """From here on files are written. dataset: the report of load_dataset; columns: those of replay.bin's rows."""
        if self.data_sha256 not in (None, dataset["sha256"]):
            fail(f"the offline data {dataset['source']} is not what the run was started with (sha256 differs)")
        start = provenance(self.device) | {"compile": self.args.compile}
        if self.config:
            self.config["resumed"].append(start)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock").acquire(timeout=0)
            ends = {k: [c.start, c.stop] if isinstance(c, slice) else [c, c + 1] for k, c in columns.items()}
            self.config = {"script": SCRIPT, "run_id": self.id, "source_run_id": self.source_id,
                           "args": asdict(self.args), **start, "dataset": dataset, "replay_columns": ends,
                           "resumed": []}
        if self.args.track:
            import wandb  # its own variables fill in what is not given

            try:
                mode = self.args.wandb_mode or wandb.setup().settings.mode
                parts = f"-{len(self.config['resumed'])}" if mode == "offline" else ""  # wandb continues no offline run
                self.wandb = wandb.init(
                    project=self.args.wandb_project, mode=self.args.wandb_mode, id=self.id + parts, resume="allow",
                    name=os.environ.get("WANDB_NAME", self.path.name), group=os.environ.get("WANDB_RUN_GROUP", self.id),
                    dir=os.environ.get("WANDB_DIR", self.path), config=self.config)
            except Exception as error:  # no key, no network
                fail(f"--track: wandb cannot start ({error}); log in, use --wandb-mode offline, or leave --track out")
        self.files = {name: open(self.path / name, "ab", buffering=0) for name in self.FILES}
        for name, file in self.files.items():
            file.truncate(self.sizes[name])
        if not (self.path / "checkpoint.pt").exists():
            self.checkpoint()  # a run that has a config.json and no checkpoint.pt has lost it
        save(self.path / "config.json", self.config)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            with suppress(AttributeError, ValueError):  # not on Windows; not in a thread
                number = getattr(signal, name)
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, Run.on_signal)
        if self.args.resume:
            place = {name: value for name, value in self.progress.items() if name not in ("scores", "diverged")}
            print(f"continued at {place}" if any(place.values()) else "nothing to continue, starting anew")

    @staticmethod
    def on_signal(number, frame):
        """The next checkpoint is the last one; a second signal of the kind ends at once."""
        Run.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def write(self, name, data):
        """Bytes to the end of a file: all of them, or the run stops."""
        if self.files[name].write(data) != len(data):
            raise OSError(f"No space left for {self.path / name}")
        self.sizes[name] += len(data)
        if name == "replay.bin":
            self.replay_sum = zlib.crc32(data, self.replay_sum)

    def log(self, name, phase, env_step, grad_step, **values):
        """One record, a line of JSON."""
        where = {"phase": phase, "env_step": env_step, "grad_step": grad_step}
        self.write(name, json.dumps(where | values).encode() + b"\n")
        if self.wandb and name == "metrics.jsonl":
            self.wandb.log({f"{phase}/{key}": value for key, value in values.items()} | where)

    def log_losses(self, policy, phase, env_step, grad_step, losses, ceiling=0.0, **extra):
        """Losses of the last update; one that is not finite ends the run. A mean |Q| or |V| over the ceiling is said
        once: no true value is that large. A tenth is left for the error of the networks, and a ceiling of 0 is none."""
        values = {name: value.item() for name, value in losses.items()}
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            fail(f"{bad[0]} is {values[bad[0]]} at {phase} step {grad_step}; the last checkpoint before is kept", 1)
        size = max(values.get("losses/q_magnitude", 0.0), values.get("losses/v_magnitude", 0.0))
        if size > 1.1 * ceiling > 0 and policy not in self.progress["diverged"]:
            self.progress["diverged"][policy] = {"phase": phase, "env_step": env_step, "grad_step": grad_step,
                                                 "magnitude": size, "ceiling": ceiling}
            extra["diverged"] = policy
            print(f"{policy} diverges: mean |Q| or |V| is {size:.4g} at {phase} step {grad_step}, and the data allow "
                  f"{ceiling:.4g}", file=sys.stderr)
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
        for name, file in self.files.items():
            os.fsync(file.fileno())
            if os.path.getsize(self.path / name) != self.sizes[name]:
                fail(f"{self.path / name} was changed by another process; end it, then go on with --resume", 1)
        save(self.path / "checkpoint.pt", {
            "script": SCRIPT, "run_id": self.id, "args": json.dumps(self.config["args"]), "progress": self.progress,
            "sizes": self.sizes, "replay_sum": self.replay_sum,
            "models": {name: state_of(model) for name, model in models.items()}})
        if self.signal:
            fail(f"stopped by {self.signal.name}; the checkpoint is written, go on with --resume", 128 + self.signal)


def read_checkpoint(path, config, device):
    """checkpoint.pt of a run directory; exit 2 if it does not belong to the files beside it."""
    saved = load_torch(path / "checkpoint.pt", device, config["run_id"])
    if saved["args"] != json.dumps(config["args"]):
        fail(f"{path / 'checkpoint.pt'} does not belong to {path / 'config.json'}; restore the run's own")
    for name, size in saved["sizes"].items():
        if not (path / name).exists() or os.path.getsize(path / name) < size:
            fail(f"{path / name} is shorter than it was at the checkpoint; restore it, or start the run again")
    return saved


def provenance(device):
    """What a number needs beside it: the script's text, versions, commit, hardware, command, time."""
    packages = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "minari")
    commit, cpu = None, platform.processor() or platform.machine()
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    with suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit,
            "script_sha256": SCRIPT_SHA256, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {"cpu": cpu, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
                         "threads": torch.get_num_threads(), "matmul_precision": torch.get_float32_matmul_precision(),
                         "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}}


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint", 130)
    except Timeout as error:
        fail(f"{error} Is another process at work there? Wait for it, or choose another --seed or --exp-name")
    except OSError as error:  # a full disk, say
        fail(f"{error}; what was saved before is whole: put it right, then go on (a run: with --resume)", 1)
