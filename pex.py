# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4", "pydantic==2.14.4", "tyro==1.0.17", "tqdm==4.70.1", "filelock==4.3.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "wandb==0.31.0"]
# ///
"""PEX (Policy Expansion): IQL offline, then its frozen policy and a second one, learnt online, act together.

Baseline of "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv
2310.08558, Tables 1 and 2. PEX: Zhang et al., arXiv 2302.00935. IQL: arXiv 2110.06169.

    python pex.py --env-id kitchen-partial-v0 --seed 3                                  # offline IQL, then PEX
    python pex.py --env-id pen-binary-v0 --scale 0.01                                   # every budget x 0.01
    python pex.py --eval-only runs/pen-binary-v0__pex__1 --episodes 100 --video         # the saved policy
  The offline phase of an iql_ooo.py run without the bonus, or of another pex.py run, can be taken over:
    python iql_ooo.py --env-id pen-binary-v0 --intrinsic-reward-scale 0 --exp-name iql
    python pex.py --env-id pen-binary-v0 --init-from runs/pen-binary-v0__iql__1

Each policy proposes an action: pi_beta (frozen) its mean, pi_theta (learnt) a sample. Which one is played is drawn from
softmax(inv_temperature * min Q). pi_theta is trained as IQL's policy, but on the actions that this composed policy
would play in the states of the batch.

Paper and official code differ. The paper is followed where it is explicit, else PEX's own code. "# choice N" marks
where a choice acts.
 1. Expectile, temperature (Table 4; we multiply by it, as the code does), dropout, log_std_min (code; hammer -2),
    pretraining steps and reward shift are those of iql_ooo.py's exploration, per task. Inverse temperature 10, 5,000
    steps before the first update and batches half offline, half online are PEX's own. No RND.
 2. Order of an update as in PEX's code (golden vectors): the Q target uses V before its step (IQL here: after). The
    policy's step uses critic, target and V after theirs.
 3. Evaluation makes two independent draws, as PEX's code: with probability 0.1 pi_theta's action is a sample, else its
    mean; with probability 0.1 the policy is drawn from the softmax, else it is the one with the larger Q.
 4. Online actions enter Q and the buffer as they were proposed, not clipped. The environment gets them clipped.
 5. Q, V and their targets go on from the offline phase; all optimisers start anew. The new policy has no dropout (the
    offline one has the task's, while it is trained), and IQL's orthogonal initialisation.
 6. Q targets are clipped to q_reward_bounds where the task's IQL does so (binary Adroit), in both phases.
 7. Offline and online data are in one buffer that keeps all; a batch takes half of its rows from each part.
 8. Kitchen: masks are 0 where the raw reward says that all 4 tasks are solved. Observations are 30 of D4RL's 60
    numbers, without the constant goal: our interpretation.
 9. AntMaze runs for the 1.5M steps that Table 2 reports (IQL's exploration config: 2M).
10. Today's packages: docs/tasks.md (signs, horizons, mazes, goals, noise). The two small mazes are not of the paper.
"""

import hashlib
import io
import json
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
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from tqdm import tqdm

SCRIPT = "pex"  # written into every file of a run, also by a renamed copy


# === tasks ===
class Task(NamedTuple):
    """A task on today's packages, and what it changes in Args. One's own: docs/tasks.md."""

    family: str  # which reward and success: see task_reward; any other word: the environment's own
    gym_id: str
    horizon: int  # steps of an episode
    datasets: tuple[str, ...]  # Minari ids; ID:N for its first N episodes
    kwargs: dict  # of gym.make
    settings: dict  # overrides of Args
    score: tuple[str, float, float] = ("return", 0.0, 100.0)  # what an episode scores, its 0 and its 100 (D4RL's)
    goal_cell: tuple[int, int] | None = None  # (row, column) of the maze
    far: int = 2  # mazes: a start of more cells than this from the goal is far


# Settings are those of IQL's exploration (iql_ooo.py). Adroit data: 90% of 25 demonstrations and of 500 rollouts of
# their clone, in file order. Kitchen: noise 0.1 is D4RL's, the reward counts completed tasks.
def adroit(name, horizon):
    return Task(
        name, f"AdroitHand{name.title()}-v1", horizon, (f"D4RL/{name}/human-v2:22", f"D4RL/{name}/cloned-v2:450"), {},
        dict(offline_steps=25_000, online_steps=1_000_000, save_at=(250_000, 500_000, 750_000, 1_000_000),
             expectile=0.8, dropout=0.1, q_reward_bounds=(-1.0, 5.0)), ("success", 0.0, 1.0))  # choice 6


def kitchen(name, *subtasks):
    return Task(
        "kitchen", "FrankaKitchen-v1", 1000, (f"D4RL/kitchen/{name}-v2",),
        dict(tasks_to_complete=list(subtasks), remove_task_when_completed=True, terminate_on_tasks_completed=False,
             robot_noise_ratio=0.1, object_noise_ratio=0.1),
        dict(offline_steps=1_000_000, online_steps=4_000_000, save_at=(1_000_000, 2_000_000, 3_000_000, 4_000_000),
             temperature=0.5, dropout=0.1, reward_bias=-4.0, mask_reward=4.0), ("max_reward", 0.0, 4.0))


MAZE = dict(reward_bias=-1.0, expectile=0.9)


def maze2d(name, horizon, low, high, goal_cell, far=2, **settings):
    return Task("maze2d", f"PointMaze_{name}-v3", horizon, (f"D4RL/pointmaze/{name.lower()}-v2",),
                dict(continuing_task=True, reset_target=False), MAZE | settings, ("return", low, high), goal_cell, far)


TASKS = {
    "pen-binary-v0": adroit("pen", 100),
    "door-binary-v0": adroit("door", 200),
    "relocate-binary-v0": adroit("relocate", 200),
    "kitchen-partial-v0": kitchen("partial", "microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed-v0": kitchen("mixed", "microwave", "kettle", "bottom burner", "light switch"),
    "kitchen-complete-v0": kitchen("complete", "microwave", "kettle", "light switch", "slide cabinet"),
    "antmaze-goal-missing-large-v2": Task(
        "antmaze", "AntMaze_Large-v5", 1000, ("D4RL/antmaze/large-diverse-v1",),
        dict(continuing_task=True, reset_target=False, include_cfrc_ext_in_observation=False),
        dict(MAZE, temperature=10.0, online_steps=1_500_000, remove_discs=((14.0, -12.0, 2.5),),  # choice 9
             save_at=(500_000, 750_000, 1_000_000, 1_250_000, 1_500_000)), ("return", 0.0, 1.0), (7, 9)),
    # Discs: goal, top-left and bottom-left of the drawn map (section 5.2; where the corners lie is not published).
    "maze2d-missing-data-large-v1": maze2d(
        "Large", 800, 6.7, 273.99, (7, 9), data_subset=500_000,
        remove_discs=((3.5, -3.0, 1.5), (-4.5, 3.0, 1.5), (-4.5, -3.0, 2.0))),
    "hammer-truncated-expert-v1": Task(
        "hammer", "AdroitHandHammer-v1", 200, ("D4RL/hammer/expert-v2",), {},
        dict(offline_steps=50_000, truncate_episodes=20, expectile=0.8, log_std_min=-2.0),
        ("return", -274.856578, 12794.134825156867)),
    # Not of the paper: small mazes to try things on, with D4RL's goals, horizons and score ranges.
    "maze2d-missing-data-umaze-v1": maze2d(
        "UMaze", 300, 23.85, 161.86, (1, 1), far=1, remove_discs=((-1.0, 1.0, 1.0),)),
    "maze2d-missing-data-medium-v1": maze2d("Medium", 600, 13.13, 277.39, (6, 6), remove_discs=((2.5, -2.5, 1.5),)),
}


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
    env_id: Literal[tuple(TASKS)] = "hammer-truncated-expert-v1"  # task
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seed of everything random in the run
    exp_name: Name = re.sub(r"[^\w.+=,-]", "_", Path(__file__).stem)  # middle part of the run directory's name
    runs_dir: str = "runs"  # folder of the run directories
    scale: Positive = 1.0  # multiplies every budget and interval; episodes of evaluations shrink with it, to 5 at least
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda or cuda:N
    torch_threads: Width = 1  # CPU threads of torch; several runs side by side use a machine better than one with many
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products; medium may round to bf16
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the updates; auto: where it saves time and works
    cudagraphs: bool = False  # replay the updates as CUDA graphs (cuda only)
    resume: bool = False  # continue the run of the same name from its last checkpoint
    eval_only: str = ""  # RUN_DIR of a run: evaluate its last saved policy, train nothing
    video: bool = False  # with --eval-only: also record three episodes as mp4 (MUJOCO_GL=osmesa or egl: no display)
    # --- task and data ---
    dataset_id: tuple[str, ...] = ()  # Minari ids, each optionally ID:N for its first N episodes (default: the task's)
    dataset_path: str = ""  # an .npz with D4RL's keys instead of Minari data
    truncate_episodes: Steps = 0  # keep the first N transitions of every offline episode (0: all)
    bootstrap_at_cut: bool = True  # bootstrap at the cut of --truncate-episodes, as the official IQL code does
    data_subset: Steps = 0  # keep N random offline transitions (0: all); drawn before discs are removed
    remove_discs: tuple[tuple[Real, Real, Real], ...] = ()  # X Y RADIUS ...: offline transitions inside are removed
    kitchen_cumulative: bool = False  # kitchen's offline rewards count tasks ever completed, not those that hold now
    reward_scale: NonNegative = 1.0  # sampled rewards are (r + reward_bias) * reward_scale; stored rewards stay raw
    reward_bias: Real = 0.0  # see reward_scale
    mask_reward: Real | None = None  # if set, masks are 0 where the raw reward equals this (kitchen: 4)
    # --- phases ---
    offline_steps: Steps = 500_000  # offline phase: gradient steps of IQL on D_off
    init_from: str = ""  # RUN_DIR of an iql_ooo.py run without the bonus, or of pex.py: its offline phase instead
    online_steps: Count = 500_000  # online phase: environment steps
    learning_starts: Steps = 5_000  # environment steps before the first update; then one update a step
    save_at: tuple[Count, ...] = (250_000, 500_000)  # environment steps after which the policy is saved and scored
    eval_every: Count = 50_000  # steps of the phase under way between evaluations
    eval_episodes: Annotated[Count, tyro.conf.arg(aliases=["--episodes"])] = 100  # episodes of one evaluation
    final_episodes: Count = 100  # episodes of the last evaluation of each policy, on start states of its own
    log_every: Count = 1_000  # steps between records of losses
    checkpoint_every: Count = 10_000  # steps between checkpoints; online at the next end of an episode
    # --- IQL, and PEX's Q, V and pi_theta ---
    batch_size: Count = 256  # transitions of one gradient step
    learning_rate: Rate = 3e-4  # Adam's rate for actor, critic and value
    gamma: Share = 0.99  # discount
    tau: Rate = 0.005  # Polyak rate of the target critic, per gradient step
    hidden_dims: tuple[Width, ...] = (256, 256)  # hidden layers of actor, critic and value
    expectile: Fraction = 0.7  # IQL's tau in (0.5, 1): closer to 1 means closer to a max over actions
    temperature: Positive = 3.0  # multiplies the advantage in exp(temperature * A); the paper's beta (Table 4)
    dropout: Share = 0.0  # offline phase: dropout rate of the actor's hidden layers, in the actor loss only
    log_std_min: LogStd = -5.0  # lower clip of both policies' log standard deviation (upper: 2)
    q_reward_bounds: tuple[Real, Real] | None = None  # Q targets clipped to these rewards / (1 - gamma)
    # --- PEX ---
    inv_temperature: NonNegative = 10.0  # inverse temperature of choosing between the two policies' actions by their Q
    offline_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of each online batch drawn from the offline data
    # Probability of a sample of pi_theta in an evaluation and, drawn apart, of a choice by softmax.
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.1
    # --- tracking ---
    track: bool = False  # send metrics to wandb as well
    wandb_project: str | None = None  # unset: wandb's own settings
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # unset: wandb's own settings


BUDGETS = ("offline_steps", "online_steps", "learning_starts", "save_at", "eval_every", "log_every",
           "checkpoint_every")  # --scale multiplies these
COMPILE_PAYS = 20_000  # updates from which on --compile auto is on


def count_updates(args):
    return (0 if args.init_from else args.offline_steps) + max(0, args.online_steps - args.learning_starts)


def invalid_combinations(args):
    """(condition, message): settings that are valid alone but not together."""
    last = max(args.save_at, default=0)
    return (
        (list(args.save_at) != sorted(set(args.save_at)), "--save-at must rise"),
        (last > args.online_steps, f"--save-at {last} lies outside the online budget of {args.online_steps} steps"),
        (args.q_reward_bounds and args.q_reward_bounds[0] > args.q_reward_bounds[1], "--q-reward-bounds must rise"),
        (args.dataset_id and args.dataset_path, "give --dataset-id or --dataset-path, not both"),
        (not args.bootstrap_at_cut and not args.truncate_episodes, "--no-bootstrap-at-cut needs --truncate-episodes"),
    )


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


# === networks (shared) ===
class Stack(nn.Module):
    """`num` networks of equal sizes side by side: (batch, dims[0]) -> (num, batch, dims[-1]). Linear layers, orthogonal
    with gain sqrt(2), ReLU (and dropout) between them; the last one is linear."""

    def __init__(self, num: int, dims: tuple[int, ...]):
        super().__init__()
        sizes = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(num, i, o) for i, o in sizes])
        self.biases = nn.ParameterList([torch.zeros(num, 1, o) for _, o in sizes])
        for weight in self.weights:
            for member in weight.data:
                nn.init.orthogonal_(member, gain=2**0.5)

    def forward(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        layers = list(zip(self.weights, self.biases, strict=True))
        x = x.expand(len(self.weights[0]), -1, -1)
        for weight, bias in layers[:-1]:
            x = F.relu(affine(x, weight, bias))
            x = F.dropout(x, dropout) if dropout else x
        return affine(x, *layers[-1])


class Critic(Stack):
    """Two Q(s, a): (batch, obs_dim), (batch, act_dim) -> (2, batch)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__(2, (obs_dim + act_dim, *hidden_dims, 1))

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([observations, actions], dim=-1)).squeeze(-1)


class Actor(nn.Module):
    """Diagonal Gaussian with a state-independent log_std. IQL: mean = tanh(net), not squashed, actions clipped.
    squash (TD3): action = tanh(net + std * noise)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dims: tuple[int, ...], log_std_min=-5.0, squash=False):
        super().__init__()
        self.net = Stack(1, (obs_dim, *hidden_dims, act_dim))
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.log_std_min = log_std_min
        self.squash = squash

    def log_prob(self, observations: torch.Tensor, actions: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """log pi(a|s) of the unsquashed Gaussian, shape (batch,)."""
        log_std = self.log_std.clamp(self.log_std_min, 2.0)
        z = (actions - self.net(observations, dropout)[0].tanh()) / log_std.exp()
        return -(0.5 * z.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)

    def act(self, observations: torch.Tensor, noise=0.0, dropout: float = 0.0) -> torch.Tensor:
        """Actions in [-1, 1], shape (batch, act_dim); noise: standard normal, or 0 for the mean."""
        mean = self.net(observations, dropout)[0]
        spread = self.log_std.clamp(self.log_std_min, 2.0).exp() * noise
        return (mean + spread).tanh() if self.squash else (mean.tanh() + spread).clamp(-1.0, 1.0)


# === iql agent (shared) ===
class Agent(nn.Module):
    """The networks of one IQL (or TD3) agent and their optimisers."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, **actor_options):
        super().__init__()
        self.options = dict(obs_dim=obs_dim, act_dim=act_dim, hidden_dims=list(hidden_dims), **actor_options)
        self.actor = Actor(obs_dim, act_dim, hidden_dims, **actor_options)
        self.critic, self.critic_target = (Critic(obs_dim, act_dim, hidden_dims) for _ in range(2))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.value = Stack(1, (obs_dim, *hidden_dims, 1))  # V(s): (batch, obs_dim) -> (1, batch, 1)
        self.to(device)
        self.value_optimizer = Adam(self.value.parameters(), learning_rate)
        self.critic_optimizer = Adam(self.critic.parameters(), learning_rate)
        self.actor_optimizer = Adam(self.actor.parameters(), learning_rate)
        self.optimizers = (self.value_optimizer, self.critic_optimizer, self.actor_optimizer)

    @torch.no_grad()
    def act(self, obs: np.ndarray, sample: bool = False) -> np.ndarray:
        """Observations (..., obs_dim) to actions (..., act_dim) in [-1, 1], numpy: samples, or the means."""
        log_std = self.actor.log_std
        observations = torch.from_numpy(obs).to(log_std.device).view(-1, obs.shape[-1])
        noise = torch.randn(len(observations), len(log_std), device=log_std.device) if sample else 0.0
        return self.actor.act(observations, noise).view(*obs.shape[:-1], -1).cpu().numpy()

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)


# === pex agent ===
class PEXAgent(nn.Module):
    """The frozen policy of the offline phase, the learnt one, and Q and V, which go on from it; new optimisers."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, log_std_min, inv_temperature, epsilon):
        super().__init__()
        self.options = dict(obs_dim=obs_dim, act_dim=act_dim, hidden_dims=list(hidden_dims), log_std_min=log_std_min,
                            inv_temperature=inv_temperature, epsilon=epsilon)
        self.actor, self.offline_actor = (Actor(obs_dim, act_dim, hidden_dims, log_std_min) for _ in range(2))
        self.critic, self.critic_target = (Critic(obs_dim, act_dim, hidden_dims) for _ in range(2))
        self.value = Stack(1, (obs_dim, *hidden_dims, 1))
        self.offline_actor.requires_grad_(False)
        self.critic_target.requires_grad_(False)
        self.inv_temperature = inv_temperature
        self.epsilon = epsilon
        self.to(device)
        self.actor_optimizer = Adam(self.actor.parameters(), learning_rate)
        self.critic_optimizer = Adam(self.critic.parameters(), learning_rate)
        self.value_optimizer = Adam(self.value.parameters(), learning_rate)
        self.optimizers = (self.actor_optimizer, self.critic_optimizer, self.value_optimizer)

    def take_over(self, offline: Agent) -> None:
        """Policy, Q and V of the offline phase (choice 5)."""
        self.offline_actor.load_state_dict(offline.actor.state_dict())
        for name in ("critic", "critic_target", "value"):
            getattr(self, name).load_state_dict(getattr(offline, name).state_dict())

    @torch.no_grad()
    def propose(self, observations, noise=0.0):
        """Both policies' actions (2, batch, act_dim), the frozen one's first, not clipped, and their Q (2, batch).
        noise: standard normal (batch, act_dim) of the learnt policy, or 0 for its mean."""
        std = self.actor.log_std.clamp(self.actor.log_std_min, 2.0).exp()
        learnt = self.actor.net(observations)[0].tanh() + std * noise
        actions = torch.stack([self.offline_actor.act(observations), learnt])
        return actions, torch.stack([self.critic(observations, a).amin(0) for a in actions])

    def probabilities(self, q):
        """Boltzmann over the two actions' Q: the probability of playing each; q and result: (2, batch)."""
        return (self.inv_temperature * q).softmax(0)

    @torch.no_grad()
    def compose(self, observations, noise, uniform):
        """Actions (batch, act_dim) that the composed policy draws, and whether they are the learnt policy's (batch,).
        uniform: draws in [0, 1), shape (batch,)."""
        actions, q = self.propose(observations, noise)
        from_learnt = uniform >= self.probabilities(q)[0]
        return torch.where(from_learnt[:, None], actions[1], actions[0]), from_learnt

    @torch.no_grad()
    def act(self, obs: np.ndarray, sample: bool = False) -> np.ndarray:
        """One observation to one action, numpy. sample: drawn from the composed policy and not clipped (choice 4).
        Else as PEX evaluates, in [-1, 1]: the learnt policy's mean and the larger Q, but for two draws of probability
        epsilon (choice 3)."""
        log_std = self.actor.log_std
        noise = torch.randn(1, len(log_std), device=log_std.device)
        uniform, first, second = torch.rand(3).tolist()
        observations = torch.from_numpy(obs).to(log_std.device)[None]
        actions, q = self.propose(observations, noise * (sample or first < self.epsilon))
        drawn = uniform >= self.probabilities(q)[0] if sample or second < self.epsilon else q[1] > q[0]
        action = actions[int(drawn), 0]
        return (action if sample else action.clamp(-1.0, 1.0)).cpu().numpy()

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)


# === iql update (shared) ===
def expectile_loss(diff, expectile):
    """IQL eq. 5: |expectile - 1{diff < 0}| * diff^2, averaged. diff = Q_target(s, a) - V(s), shape (batch,)."""
    weight = torch.where(diff > 0, expectile, 1.0 - expectile)
    return (weight * diff.square()).mean()


def iql_update(agent, batch, bonus=0.0, *, expectile, temperature, gamma, tau, dropout=0.0, q_min=-np.inf,
               q_max=np.inf):
    """One IQL update (paper eq. 1 to 3): V, then Q and the policy. batch: observations, actions, rewards, masks,
    next_observations; bonus: scaled intrinsic rewards (batch,), or 0. Returns detached scalars."""
    observations, actions = batch["observations"], batch["actions"]
    # One pass of the target critic serves V and the policy: both need it from before this step's target update.
    with torch.no_grad():
        q_target = agent.critic_target(observations, actions)
    # --- V: expectile regression toward the (bounded) target Q ---
    v = agent.value(observations)[0, :, 0]
    value_loss = expectile_loss(q_target.clamp(q_min, q_max).amin(0) - v, expectile)
    agent.value_optimizer.minimize(value_loss)
    # --- Target: the new V; masks is 0 only at true terminals. The bonus comes after the clip (official code) ---
    with torch.no_grad():
        next_v, v = agent.value(torch.cat([batch["next_observations"], observations]))[0, :, 0].chunk(2)
        target = (batch["rewards"] + gamma * batch["masks"] * next_v).clamp(q_min, q_max) + bonus
    # --- Q: mean over the ensemble and the batch ---
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    agent.critic_optimizer.minimize(critic_loss)
    # --- Policy: advantage-weighted regression (eq. 3); the advantage is not clipped to the bounds ---
    advantage = q_target.amin(0) - v
    weight = (temperature * advantage).exp().clamp(max=100.0)  # choice 1
    actor_loss = -(weight * agent.actor.log_prob(observations, actions, dropout)).mean()
    agent.actor_optimizer.minimize(actor_loss)
    agent.update_target(tau)
    return {"losses/value": value_loss.detach(), "losses/critic": critic_loss.detach(),
            "losses/actor": actor_loss.detach(), "losses/q_mean": q.detach().mean(), "losses/v_mean": v.mean(),
            "losses/q_magnitude": q.detach().abs().mean(), "losses/v_magnitude": v.abs().mean(),
            "losses/advantage_mean": advantage.mean()}


# === pex updates ===
def pex_update(agent, batch, *, expectile, temperature, gamma, tau, q_min=-np.inf, q_max=np.inf, noise=None,
               uniform=None):
    """One online update of PEX: V and Q as in IQL, then the learnt policy on the actions that the composed one draws.
    noise: standard normal (batch, act_dim), uniform: draws in [0, 1), shape (batch,), None draws them. Returns detached
    scalars; pex/learnt_share is the share of those actions that are the learnt policy's."""
    observations, actions = batch["observations"], batch["actions"]
    with torch.no_grad():
        q_target = agent.critic_target(observations, actions).clamp(q_min, q_max).amin(0)
        next_v = agent.value(batch["next_observations"])[0, :, 0]  # before V's step: choice 2
        target = (batch["rewards"] + gamma * batch["masks"] * next_v).clamp(q_min, q_max)
    # --- V: expectile regression ---
    value_loss = expectile_loss(q_target - agent.value(observations)[0, :, 0], expectile)
    agent.value_optimizer.minimize(value_loss)
    # --- Q: mean over the ensemble and the batch ---
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    agent.critic_optimizer.minimize(critic_loss)
    agent.update_target(tau)
    # --- Policy: advantage-weighted regression on composed actions, not on those of the batch ---
    noise = torch.randn_like(actions) if noise is None else noise
    uniform = torch.rand(len(actions), device=actions.device) if uniform is None else uniform
    composed, from_learnt = agent.compose(observations, noise, uniform)
    with torch.no_grad():
        v = agent.value(observations)[0, :, 0]
        advantage = agent.critic_target(observations, composed).amin(0) - v  # of what was proposed: choice 4
        weight = (temperature * advantage).exp().clamp(max=100.0)  # choice 1
    actor_loss = -(weight * agent.actor.log_prob(observations, composed)).mean()
    agent.actor_optimizer.minimize(actor_loss)
    return {"losses/value": value_loss.detach(), "losses/critic": critic_loss.detach(),
            "losses/actor": actor_loss.detach(), "losses/q_mean": q.detach().mean(), "losses/v_mean": v.mean(),
            "losses/q_magnitude": q.detach().abs().mean(), "losses/v_magnitude": v.abs().mean(),
            "losses/advantage_mean": advantage.mean(), "pex/learnt_share": from_learnt.float().mean()}


def make_update(args, buffer, agent):
    """update(rows) -> losses: one gradient step of IQL, or of PEX, on raw buffer rows (batch, width)."""
    low, high = args.q_reward_bounds or (-np.inf, np.inf)
    options = dict(expectile=args.expectile, temperature=args.temperature, gamma=args.gamma, tau=args.tau,
                   q_min=low / (1 - args.gamma), q_max=high / (1 - args.gamma))  # choice 6

    def update(rows):
        batch = buffer.split(rows)
        raw = batch["rewards"]
        batch["masks"] = 1.0 - batch["terminations"]
        if args.mask_reward is not None:
            batch["masks"] = batch["masks"] * (raw != args.mask_reward)  # choice 8
        batch["rewards"] = (raw + args.reward_bias) * args.reward_scale
        if isinstance(agent, PEXAgent):
            return pex_update(agent, batch, **options)
        return iql_update(agent, batch, dropout=args.dropout, **options)

    return compile_update(args, update)


# === algorithm ===
def pretrain(run, buffer, agent, eval_env):
    """Offline phase: IQL on D_off."""
    args, p, last = run.args, run.progress, run.args.offline_steps
    update = make_update(args, buffer, agent)
    ceiling = value_ceiling(args, buffer)
    for step in progress_bar("pretrain", p["grad_step"], last):
        if step == 0:
            evaluate_and_log(run, eval_env, agent, "pretrain", 0, 0)
        run.seed("pretrain", step)
        losses = update(buffer.sample(args.batch_size, buffer.offline_size))
        p["grad_step"] = step = step + 1
        if step % args.log_every == 0 or step == last:
            run.log_losses("policy", "pretrain", 0, step, losses, ceiling)
        if step % args.eval_every == 0 or step == last:
            evaluate_and_log(run, eval_env, agent, "pretrain", 0, step)
        if step == last:
            save_policy(run, agent, "pretrained.pt")
        if step % args.checkpoint_every == 0 or step == last or run.signal:
            run.checkpoint(offline=agent)


def train(run, buffer, agent, env, eval_env):
    """Online phase: act with the composed policy, store, and one update a step on half offline, half online data. At
    --save-at and after the last step the policy is saved and scored."""
    args, p, saved = run.args, run.progress, run.progress["env_step"]
    update = make_update(args, buffer, agent)
    online_share = args.batch_size - round(args.batch_size * args.offline_ratio)
    online_rows = torch.arange(buffer.offline_size, len(buffer.data), device=run.device)
    if p["env_step"] == 0:
        evaluate_and_log(run, eval_env, agent, "online", 0, p["grad_step"])
    bar = progress_bar("online", p["env_step"], args.online_steps)
    while p["env_step"] < args.online_steps:
        obs, info = env.reset(seed=derive_seed(args.seed, "training episode", p["episode"]))
        episode, done = {"return": 0.0, "length": 0, **info}, False
        while not done and p["env_step"] < args.online_steps:
            run.seed("online", p["env_step"])
            action = agent.act(obs, sample=True)
            next_obs, reward, terminated, truncated, info = env.step(action.clip(-1, 1))  # choice 4
            buffer.add(observations=obs, actions=action, rewards=reward, next_observations=next_obs,
                       terminations=terminated, episodes=buffer.offline_episodes + p["episode"])
            obs, done = next_obs, terminated or truncated
            episode["return"] += reward
            episode["length"] += 1
            episode["success"] |= info["success"]
            p["env_step"] = t = p["env_step"] + 1
            bar.update()
            if t > args.learning_starts:
                losses = update(buffer.sample(args.batch_size, buffer.offline_size, online_rows[:t], online_share))
                p["grad_step"] += 1  # the batch: choice 7
                if t % args.log_every == 0:
                    run.log_losses("policy", "online", t, p["grad_step"], losses, value_ceiling(args, buffer))
            if t % args.eval_every == 0 or t == args.online_steps or t in args.save_at:
                evaluate_and_log(run, eval_env, agent, "online", t, p["grad_step"])
            if t in args.save_at or t == args.online_steps:
                final_evaluation(run, eval_env, agent, f"policy {t}")
                save_policy(run, agent, f"policy_{t}.pt")
        p["episode"] += 1
        run.log("metrics.jsonl", "online", p["env_step"], p["grad_step"],
                **{f"charts/episodic_{key}": value for key, value in episode.items()})
        if p["env_step"] == args.online_steps or p["env_step"] - saved >= args.checkpoint_every or run.signal:
            run.write("replay.bin", buffer.rows_since(saved))
            run.checkpoint(agent=agent)
            saved = p["env_step"]


def value_ceiling(args, buffer):
    """What no true |Q| or |V| exceeds: the largest |reward| of the data / (1 - gamma)."""
    rewards = (buffer.first(buffer.size)["rewards"] + args.reward_bias) * args.reward_scale
    return rewards.abs().max().item() / (1 - args.gamma)


SOURCES = ("iql_ooo", "pex")
# All that an offline phase depends on, but for the seed and the data, whose SHA-256 is compared.
SAME_AS_SOURCE = ("env_id", "intrinsic_reward_scale", "offline_steps", "batch_size", "learning_rate", "gamma", "tau",
                  "hidden_dims", "expectile", "temperature", "dropout", "log_std_min", "q_reward_bounds",
                  "reward_scale", "reward_bias", "mask_reward")


def read_source(run):
    """--init-from: the networks after the source's offline phase, which must be that of this run: exit 2 for other
    settings, and for another source than the one that the run was started with."""
    source = Path(run.args.init_from)
    config = read_config(source, SOURCES)
    if run.config and run.source_id != config["run_id"]:
        fail(f"{source} is not the run whose offline phase {run.path} was started with; give that one, or none")
    was, now = ({"intrinsic_reward_scale": 0.0} | json.loads(json.dumps(each))
                for each in (config["args"], asdict(run.args)))
    if missing := {"seed", *SAME_AS_SOURCE} - was.keys():
        fail(f"--init-from {source}: its config.json has no {' '.join(sorted(missing))}; give another run")
    if changed := [name for name in SAME_AS_SOURCE if was[name] != now[name]]:
        values = ", ".join(f"--{name.replace('_', '-')} was {was[name]}, here it is {now[name]}" for name in changed)
        fail(f"--init-from {source} was pretrained with other settings: {values}; make them the same")
    run.source_id = config["run_id"]
    run.progress["grad_step"] = max(run.progress["grad_step"], run.args.offline_steps)
    run.data_seed, run.data_sha256 = config["args"]["seed"], config["dataset"]["sha256"]
    return load_torch(source / "pretrained.pt", run.device, run.source_id)["agent"]


def main(args):
    if args.eval_only:
        return evaluate_saved(args, ("policy",))
    # Build and restore. Nothing is written before run.begin().
    run = Run(args, grad_step=0, env_step=0, episode=0, scores={}, diverged={})
    source = None
    if run.config:
        run.data_seed = run.config["dataset"]["seed"]
    if args.init_from and not (run.source_id and run.models and not Path(args.init_from).exists()):
        source = read_source(run)
    elif run.source_id and not run.models:
        fail(f"{run.path} ended before it had taken over its source's networks; give --init-from again")
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    data, dataset = load_dataset(args, env, run.data_seed)
    dataset["seed"] = run.data_seed  # of --data-subset
    buffer = ReplayBuffer(data, args.online_steps, run.device)
    buffer.load(*run.replay)
    run.seed("networks")
    dims = (buffer.obs_dim, buffer.act_dim, args.hidden_dims, args.learning_rate, run.device)
    offline = Agent(*dims, log_std_min=args.log_std_min)
    agent = PEXAgent(*dims, args.log_std_min, args.inv_temperature, args.epsilon)
    if source:
        offline.load_state_dict(source)
    run.restore(offline=offline, agent=agent)
    run.begin(dataset, buffer.columns)
    if source and run.progress["env_step"] == 0:
        run.checkpoint(offline=offline)  # from now on the source is not needed

    pretrain(run, buffer, offline, eval_env)
    if run.progress["env_step"] == 0:
        agent.take_over(offline)
    train(run, buffer, agent, env, eval_env)
    return report(run)


def save_policy(run, agent, name):
    """A policy that load_policy (and nothing else) needs. No observations are normalised; actions are make_env's, in
    [-1, 1]. All networks: for --init-from and those who analyse the values."""
    save(run.path / name, {"script": SCRIPT, "run_id": run.id, "env_id": run.args.env_id, "options": agent.options,
                           "observation_normalization": None, "agent": agent.state_dict()})


def load_policy(path: str | Path) -> Agent | PEXAgent:
    """The agent of a file of save_policy, on the CPU; agent.act(obs) is its action in evaluation, numpy to numpy."""
    content = load_torch(Path(path), torch.device("cpu"))
    kind = PEXAgent if "epsilon" in content["options"] else Agent
    agent = kind(**content["options"], learning_rate=0.0, device=torch.device("cpu"))
    agent.load_state_dict(content["agent"])
    return agent


# Below is plumbing: evaluation, replay, environments, data, command line, run directory. Nothing of the method. It
# needs from above: SCRIPT, Task, TASKS, Args, BUDGETS, COMPILE_PAYS, count_updates, invalid_combinations, load_policy.
# For a new algorithm edit what is above and leave this part as it is; a new task is a row of TASKS (docs/extending.md).


# === evaluation (shared) ===
def evaluate(env, agent, episodes: int, seed: int, frames: list | None = None) -> tuple[list[dict], dict]:
    """Episodes of agent.act(obs): a list of dicts, and their means under the names of the metrics. The score is the
    paper's: success, kitchen tasks / 4, or D4RL's score, x 100. Start states and draws depend on the seed alone.
    frames: a list that takes the pictures of the first three episodes."""
    key, low, high = env.task.score
    results = []
    for i in range(episodes):
        seed_torch(derive_seed(seed, "evaluation policy", i))
        obs, info = env.reset(seed=derive_seed(seed, "evaluation", i))
        start = {"start_distance": info["start_distance"]} if "start_distance" in info else {}
        rewards, success, done = [], False, False
        while not done:
            if frames is not None and i < 3:
                frames.append(env.render())
            obs, reward, terminated, truncated, info = env.step(agent.act(obs))
            rewards.append(reward)
            success |= info["success"]
            done = terminated or truncated
        results.append({"return": sum(rewards), "length": len(rewards), "success": success, "max_reward": max(rewards),
                        **start})
    mean = {name: float(np.mean([episode[name] for episode in results])) for name in ("return", "success", key)}
    summary = {"eval/return": mean["return"], "eval/success_rate": mean["success"],
               "eval/normalized_score": 100 * (mean[key] - low) / (high - low), "eval/episodes": episodes}
    if far := [episode["success"] for episode in results if episode.get("start_distance", 0) > env.task.far]:
        summary["eval/far_success_rate"] = float(np.mean(far))
    return results, summary


def evaluate_and_log(run, env, agent, phase, env_step, grad_step):
    """A point of the curves: means go to metrics.jsonl, every episode to evals.jsonl."""
    episodes, summary = evaluate(env, agent, run.args.eval_episodes, run.args.seed)
    run.log("metrics.jsonl", phase, env_step, grad_step, **summary)
    run.log("evals.jsonl", phase, env_step, grad_step, episodes=episodes)


def final_evaluation(run, env, agent, name):
    """What the tables show of a policy: its episodes on start states that no curve and no --eval-only uses."""
    episodes, summary = evaluate(env, agent, run.args.final_episodes, derive_seed(run.args.seed, "final"))
    run.progress["scores"][name] = summary | {"per_episode": episodes}


def evaluate_saved(args, kinds):
    """--eval-only: the last policy of the first of `kinds` that the run has, on start states of its own; the score is
    printed before it is saved. --video: the first three episodes as mp4."""
    folder, frames = Path(args.eval_only), [] if args.video else None
    found = [sorted(folder.glob(f"{kind}_*[0-9].pt"), key=lambda path: int(path.stem.split("_")[1])) for kind in kinds]
    if not any(found):
        fail(f"{folder} has no policy {kinds[0]}_*.pt yet; finish the run first (--resume)")
    path = next(filter(None, found))[-1]
    load_torch(path, torch.device("cpu"), read_config(folder)["run_id"])  # it is a policy of this run
    agent, seed = load_policy(path), derive_seed(args.seed, "eval-only")
    torch.set_num_threads(args.torch_threads)
    try:
        env = make_env(args.env_id, "rgb_array" if args.video else None)
        episodes, summary = evaluate(env, agent, args.eval_episodes, seed, frames)
    except Exception as error:  # GL back ends fail in many ways
        if not args.video:
            raise
        fail(f"no video ({type(error).__name__}: {error}): set MUJOCO_GL=egl, or osmesa with libosmesa6 installed", 1)
    print(f"{path.name}: " + "  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    save(folder / f"{path.stem}_eval.json", {"policy": path.name, **summary, "per_episode": episodes})
    if frames:
        import imageio

        imageio.mimwrite(path.with_suffix(".mp4"), frames, fps=env.metadata.get("render_fps", 30), macro_block_size=2)
        print(f"video: {path.with_suffix('.mp4')} ({len(frames)} frames)")
    return summary


def report(run):
    """Write results.json, and print the table of the final evaluations."""
    scores, diverged = run.progress["scores"], run.progress["diverged"]
    policies = sorted({name.split()[0] for name in scores}, reverse=True)  # exploration, exploitation
    rows = [{"env_step": t, **{policy: scores.get(f"{policy} {t}") for policy in policies}}
            for t in sorted({int(name.split()[1]) for name in scores})]
    records = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    training = [{k.removeprefix("charts/episodic_"): r[k] for k in r if k == "env_step" or "episodic" in k}
                for r in records if "charts/episodic_return" in r]
    save(run.path / "results.json", {
        "script": SCRIPT, "env_id": run.args.env_id, "exp_name": run.args.exp_name, "seed": run.args.seed,
        "run_id": run.id, "source_run_id": run.source_id, "rows": rows, "training_episodes": training,
        "diverged": diverged})
    print(f"\n{run.args.env_id}, seed {run.args.seed}, {run.args.final_episodes} episodes of each policy")
    for name, found in scores.items():
        print(f"{name:>24}: score {found['eval/normalized_score']:.1f}, success {found['eval/success_rate']:.1%}")
    for policy, where in diverged.items():
        print(f"{policy} has diverged: {where}")
    print(f"saved in {run.path}")
    return rows


# === replay buffer (shared) ===
class ReplayBuffer:
    """Append-only transitions on the training device, as they came (raw rewards; choice 7 of iql_ooo.py). One row holds
    all columns side by side, so that a batch is a single gather and an online step a single copy."""

    def __init__(self, data: dict[str, np.ndarray], online_steps: int, device: torch.device):
        """data: {column: float32 array (n, ...)}, the offline data; room for online_steps more rows."""
        self.columns, self.width = {}, 0
        for name, value in data.items():
            size = value.shape[1] if value.ndim > 1 else 1
            self.columns[name] = slice(self.width, self.width + size) if value.ndim > 1 else self.width
            self.width += size
        self.obs_dim, self.act_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.offline_size = self.size = len(data["rewards"])
        self.offline_episodes = int(data["episodes"].max(initial=-1)) + 1
        self.data = torch.empty((self.offline_size + online_steps, self.width), device=device)
        for name, column in self.columns.items():
            self.data[: self.size, column] = torch.as_tensor(data[name]).to(device)

    def add(self, **transition):
        self.data[self.size] = torch.from_numpy(np.hstack([transition[name] for name in self.columns]))
        self.size += 1

    def sample(self, batch_size, size=None, high_rows=(), num_high=0):
        """Rows (batch_size, width) drawn uniformly from the first `size` transitions (None: all), `num_high` of them
        from the indices `high_rows` instead."""
        rows = torch.randint(size or self.size, (batch_size - num_high,), device=self.data.device)
        if num_high:
            rows = torch.cat([rows, high_rows[torch.randint(len(high_rows), (num_high,), device=self.data.device)]])
        return self.data.index_select(0, rows)

    def split(self, rows):
        """Views of the columns of rows (n, width): {column: (n,) or (n, dim)}."""
        return {name: rows[:, column] for name, column in self.columns.items()}

    def first(self, n):
        return self.split(self.data[:n])

    def rows_since(self, env_step):
        """The online rows from env_step on, as the bytes of replay.bin."""
        return self.data[self.offline_size + env_step : self.size].cpu().numpy().tobytes()

    def load(self, path, size, checksum, count):
        """Append the first `count` of the rows in the first `size` bytes of a replay.bin; exit 2 unless these bytes are
        those that were written."""
        stored = np.memmap(path, np.uint8, "c")[:size] if size else np.empty(0, np.uint8)  # not a copy in memory
        if len(stored) != size or zlib.crc32(stored) != checksum or size < count * self.width * 4:
            fail(f"{path} is not as it was written (its checksum differs); restore it, or start the run again")
        rows = stored[: count * self.width * 4].view(np.float32).reshape(count, self.width)
        self.data[self.size : self.size + count] = torch.from_numpy(rows)
        self.size += count


# === environments (shared) ===
GOAL_RADIUS = 0.5  # D4RL's in both mazes; gymnasium-robotics uses 0.45
ANTMAZE_DATA_GOAL_OFFSET = (0.75, -0.75)  # mean of the goals drawn by TaskEnv.reset
# Families whose episodes end at the horizon alone, whatever the package or a file says. Antmaze ends at the goal, any
# other family where its environment does.
FIXED_LENGTH = ("pen", "door", "relocate", "hammer", "kitchen", "maze2d")


def flatten_observation(task, obs):
    """Today's observation (array, or dict of arrays with leading axes) as D4RL's vector, float32. An array is one
    already (tools/export_minari.py)."""
    family = task.family if isinstance(obs, dict) else None
    if family == "kitchen":  # robot qpos 9, object qpos 21; without velocities and without the constant goal
        obs = np.concatenate([obs["observation"][..., 0:9], obs["observation"][..., 18:39]], axis=-1)
    elif family == "antmaze":
        obs = np.concatenate([obs["achieved_goal"], obs["observation"][..., :27]], axis=-1)
    elif family == "maze2d":
        obs = obs["observation"]
    return np.asarray(obs).astype(np.float32, casting="same_kind", copy=False)  # text and complex numbers are refused


def task_reward(task, next_obs, reward, goal=None):
    """(reward, success) of the task for transitions into next_obs (..., obs_dim), reward as the package gives it (...);
    kitchen's must already count tasks. Formulas: D4RL, mj_envs and the official code."""
    o = next_obs
    if task.family == "kitchen":
        return reward, reward == 4
    if task.family == "hammer":
        # gymnasium-robotics 1.2.1 to 1.4.2 add 0.1 |palm - hammer|, D4RL subtracts it. Only success pays +100.
        reward = reward - 0.2 * np.linalg.norm(o[..., 33:36] - o[..., 36:39], axis=-1)
        return reward, reward > 50
    if task.family in ("maze2d", "antmaze"):
        success = np.linalg.norm(o[..., :2] - np.asarray(goal), axis=-1) <= GOAL_RADIUS
        return np.float64(success), success
    if task.family == "pen":
        success = (np.linalg.norm(o[..., 39:42], axis=-1) < 0.075) & ((o[..., 33:36] * o[..., 36:39]).sum(-1) > 0.95)
    elif task.family == "door":
        success = o[..., 28] >= 1.35
    elif task.family == "relocate":
        success = np.linalg.norm(o[..., 36:39], axis=-1) < 0.1
    else:  # one's own: the environment's reward; its success is known online only
        return reward, np.zeros(np.shape(reward), bool)
    return success - 1.0, success


class TaskEnv(gym.Wrapper):
    """The task: D4RL's observation, reward, termination and start states; actions in [-1, 1]. Every reset(seed=...)
    depends on the seed alone. info["success"]: of this step; info["start_distance"] at a reset in a maze: cells on the
    shortest path from the start to the goal."""

    def __init__(self, env: gym.Env, task: Task, data_action_space: gym.spaces.Box):
        super().__init__(env)
        self.data_action_space = data_action_space  # offline actions are the environment's own
        self.task, self.rng, self.goal, self.center = task, np.random.default_rng(0), None, None
        obs = flatten_observation(task, env.observation_space.sample())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        if task.goal_cell:
            self.center = env.unwrapped.maze.cell_rowcol_to_xy(np.array(task.goal_cell))
            self.distances = cell_distances(env.unwrapped.maze.maze_map, task.goal_cell)
        if task.family == "antmaze":  # D4RL's noise: +-0.1 on position and joints, N(0, 0.1^2) on velocities
            env.unwrapped.position_noise_range, env.unwrapped.ant_env._reset_noise_scale = 0.0, 0.1
        elif task.family == "maze2d":
            env.unwrapped.position_noise_range = 0.1

    def reset(self, *, seed=None, options=None):
        info = {"success": False}
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if self.task.goal_cell:
            self.goal, start = self.center, (1, 1)
            if self.task.family == "antmaze":  # D4RL draws the (unobserved) goal anew for each episode
                offset = self.rng.uniform(0, 1, 2) + self.rng.uniform(0, 0.5, 2)
                self.goal = self.center + offset * (1, -1)
            else:  # any free cell, the goal's included
                free = sorted(self.distances)
                start = free[self.rng.integers(len(free))]
            info["start_distance"] = self.distances[start]
            options = {"goal_cell": np.array(self.task.goal_cell), "reset_cell": np.array(start)}
        obs, _ = self.env.reset(seed=seed, options=options)
        if self.task.family == "maze2d":
            point = self.unwrapped.point_env
            point.set_state(point.data.qpos.copy(), 0.1 * self.rng.standard_normal(2))
            obs = {**obs, "observation": np.concatenate([point.data.qpos, point.data.qvel])}
        return flatten_observation(self.task, obs), info

    def step(self, action):
        family = self.task.family
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs = flatten_observation(self.task, obs)
        if family == "kitchen":
            reward = float(len(info["episode_task_completions"]))
        reward, success = task_reward(self.task, obs, reward, self.goal)
        if family in FIXED_LENGTH:
            terminated = False
        elif family == "antmaze":
            terminated = success
        else:
            success = info.get("success", info.get("is_success", False))
        return obs, float(reward), bool(terminated), truncated, {"success": bool(success)}


def cell_distances(maze_map, goal_cell):
    """{(row, column): cells on the shortest path to the goal} of a maze's free cells."""
    distances, frontier = {tuple(goal_cell): 0}, [tuple(goal_cell)]
    for row, column in frontier:  # grows while it is read: breadth first
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if maze_map[cell[0]][cell[1]] != 1 and cell not in distances:
                distances[cell] = distances[row, column] + 1
                frontier.append(cell)
    return distances


def make_env(env_id: str, render_mode: str | None = None) -> TaskEnv:
    """The task's environment; actions in [-1, 1], whatever the package's own range is."""
    task = TASKS[env_id]
    if render_mode is None:  # without a picture no GL back end is needed, nor one that fails
        os.environ["MUJOCO_GL"] = "disable"
    with redirect_stderr(io.StringIO()):  # the package prints a notice about the sign that task_reward corrects
        import gymnasium_robotics

        gym.logger.min_level = gym.logger.ERROR
        gym.register_envs(gymnasium_robotics)
        env = gym.make(task.gym_id, max_episode_steps=task.horizon, render_mode=render_mode,
                       disable_env_checker=True, **task.kwargs)
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
        fail(f"{env_id}: actions must be vectors within bounds, not {space}")
    if (space.low != -1).any() or (space.high != 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return TaskEnv(env, task, space)


# === offline data (shared) ===
def check_columns(source, env, columns):
    """The columns as float32 arrays of equal length; exit 2 for another length or width, NaN or infinity."""
    widths = {"observations": env.observation_space.shape, "next_observations": env.observation_space.shape,
              "actions": env.action_space.shape}
    columns = {name: np.asarray(x).astype(np.float32, casting="same_kind", copy=False) for name, x in columns.items()}
    for name, value in columns.items():
        shape = (len(columns["rewards"]), *widths.get(name, ()))
        if value.shape != shape:
            fail(f"{source}: {name} have shape {value.shape}, and {shape} is this task's, with "
                 f"{len(columns['rewards'])} rewards")
        if not np.isfinite(value).all():
            row = np.argwhere(~np.isfinite(value))[0, 0]
            fail(f"{source}: NaN or infinity in {name}, first in row {row}; remove it")
    return columns


def open_minari(dataset_id):
    """A Minari dataset from the local store. What is missing or cannot be read is fetched, by one process at a time."""
    import urllib.request

    import minari
    from huggingface_hub import constants

    if store := os.environ.pop("MINARI_DATASETS_PATH", ""):  # empty: as if it were not there
        os.environ["MINARI_DATASETS_PATH"] = os.path.expanduser(store)
    try:
        return minari.load_dataset(dataset_id)
    except Exception as local:
        path = minari.storage.get_dataset_path(dataset_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            with suppress(Exception):  # another process has fetched it meanwhile
                return minari.load_dataset(dataset_id)
            try:
                urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()  # one quick try; minari retries for long
                with redirect_stderr(io.StringIO()):
                    minari.download_dataset(dataset_id, force_download=True)
            except Exception as remote:
                raise ValueError(f"{str(local).partition(' Use download')[0]} Download: {remote}") from None
        return minari.load_dataset(dataset_id)


def read_minari(args, env, dataset_ids):
    """Columns of Minari datasets ('ID', or 'ID:N' for N episodes), episode after episode, rewards as stored (kitchen:
    counted from the goals). An episode that an earlier dataset already holds is not taken again."""
    task, episodes, seen = env.task, [], set()
    for spec in dataset_ids:
        dataset_id, _, limit = spec.partition(":")
        try:
            dataset = open_minari(dataset_id)
            made_in = dataset.spec.env_spec and dataset.spec.env_spec.id  # other goals or a dense reward do no harm
            if made_in and not re.fullmatch(rf"{task.gym_id.rpartition('-')[0]}(_\w+|Dense)?-v\d+", made_in):
                fail(f"dataset {dataset_id} is of {made_in}, not of {task.gym_id}; give another --dataset-id")
            taken, here = 0, set()
            for episode in dataset.iterate_episodes():
                here.add(digest := hashlib.sha256(np.ascontiguousarray(episode.actions)).digest())
                if digest in seen or limit and taken >= int(limit):
                    continue
                taken += 1
                observations, rewards = flatten_observation(task, episode.observations), episode.rewards
                if task.family == "kitchen" and isinstance(episode.observations, dict):
                    achieved, desired = episode.observations["achieved_goal"], episode.observations["desired_goal"]
                    done = np.stack([np.linalg.norm(achieved[t] - desired[t], axis=-1)[1:] < 0.3
                                     for t in task.kwargs["tasks_to_complete"]])
                    rewards = (np.maximum.accumulate(done, axis=1) if args.kitchen_cumulative else done).sum(0)
                episodes.append(check_columns(f"dataset {dataset_id}, episode {episode.id}", env, dict(
                    observations=observations[:-1], actions=episode.actions, rewards=rewards,
                    next_observations=observations[1:], episodes=np.full(len(rewards), len(episodes)),
                    terminations=episode.terminations)))
            seen |= here
        except Exception as error:  # the store, the server, the id and the file can be wrong in many ways
            fail(f"dataset {spec} cannot be used for {task.gym_id} ({type(error).__name__}: {error}); run `minari "
                 f"download {dataset_id}` where there is a network and set MINARI_DATASETS_PATH, or give --dataset-id "
                 "or --dataset-path; mazes: tools/collect_pointmaze.py makes data")
    if not episodes:
        fail(f"{args.env_id}: no episode in its datasets {' '.join(dataset_ids)}; give --dataset-id or --dataset-path")
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def read_npz(path, env):
    """Columns of an .npz with D4RL's keys. Episodes end at terminals and timeouts, or without timeouts where
    next_observations do not continue. Without next_observations the last step of an episode is dropped, as its
    successor was not recorded, unless it is a true terminal."""
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    task, where = env.task, f"--dataset-path {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in keys if name in file.files or name in keys[:4]}
            data |= {name: data[name].squeeze(1) for name in keys[2:5] if name in data and data[name].ndim == 2}
        if task.family == "kitchen":  # D4RL appends the constant goal to the 30 numbers
            data |= {name: data[name][:, :30] for name in ("observations", "next_observations") if name in data}
        data = check_columns(where, env, data)
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        fail(f"{where} cannot be read as .npz with D4RL's keys ({type(error).__name__}: {error})")
    observations, n = data["observations"], len(data["rewards"])
    own = task.family not in (*FIXED_LENGTH, "antmaze")
    terminals, timeouts = data["terminals"] > 0, data.get("timeouts", np.zeros(n)) > 0
    ends = terminals | timeouts
    if "next_observations" in data:
        breaks = np.append((data["next_observations"][:-1] != observations[1:]).any(1), True)
        wrong = (breaks & ~ends & ("timeouts" in data)) | (terminals & ~breaks & own)
        if wrong[:-1].any():
            fail(f"{where}: next_observations of row {wrong.argmax()} and terminals or timeouts contradict each other "
                 "about an end there; leave timeouts out, or put them right")
        ends = ends if "timeouts" in data else ends | breaks
    elif "timeouts" not in data and not terminals[-1]:
        fail(f"{where}: nothing marks where episodes end; give timeouts or next_observations")
    twice = ends[:-1] & ends[1:] & (terminals[:-1] != terminals[1:])
    if twice.any() and task.family != "antmaze":  # there terminals are steps at the goal, and an ant may leave it
        fail(f"{where}: row {twice.argmax()} is an end and the next row another, by terminals and by timeouts or "
             "next_observations; put them right")
    longest = int(np.diff(np.flatnonzero(np.append(ends[:-1], True)), prepend=-1).max())
    if longest > task.horizon + (task.family == "antmaze"):  # D4RL's antmaze records one step more
        fail(f"{where} has an episode of {longest} transitions, and this task's have {task.horizon} at most; mark "
             "where episodes end (timeouts). Longer demonstrations can be read as Minari data")
    keep = np.ones(n, bool)
    if "next_observations" not in data:
        data["next_observations"] = np.where(ends[:, None], observations, np.roll(observations, -1, 0))
        keep = ~ends | (terminals & (task.family not in FIXED_LENGTH))
        keep[-1] &= ends[-1]
    data["episodes"] = np.append(0, np.cumsum(ends)[:-1]).astype(np.float32)
    data["terminations"] = terminals.astype(np.float32)
    return {name: value[keep] for name, value in data.items() if name not in ("terminals", "timeouts")}


@np.errstate(over="ignore")  # what float32 cannot hold is infinite, and said
def load_dataset(args, env: TaskEnv, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """The task's offline data, {column: float32 (n, ...)}, and a report. Columns: observations, actions, rewards (raw),
    next_observations, episodes, terminations. Order: read, check, truncate, subset (drawn by seed), remove discs."""
    task, npz, dataset_ids = env.task, args.dataset_path, args.dataset_id or env.task.datasets
    data = read_npz(npz, env) if npz else read_minari(args, env, dataset_ids)
    n = len(data["rewards"])
    report, rows = {"source": npz or " + ".join(dataset_ids), "transitions_read": n}, np.arange(n)
    # --- Rewards and terminations of the task; an .npz of D4RL has D4RL's dense rewards ---
    if npz and task.family in ("kitchen", "hammer"):
        success = data["rewards"] == 4 if task.family == "kitchen" else data["rewards"] > 50
    else:
        goal = env.center if task.family != "antmaze" else env.center + ANTMAZE_DATA_GOAL_OFFSET
        rewards, success = task_reward(task, data["next_observations"], data["rewards"].astype(np.float64), goal)
        data["rewards"] = rewards.astype(np.float32)
    if task.family in FIXED_LENGTH or task.family == "antmaze":
        data["terminations"] = success.astype(np.float32) * (task.family == "antmaze")
    # --- Actions in [-1, 1] ---
    low, high = env.data_action_space.low, env.data_action_space.high
    if (low != -1).any() or (high != 1).any():
        data["actions"] = 2 * (data["actions"] - low) / (high - low) - 1
    clipped = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)
    # --- Which rows are kept ---
    if args.truncate_episodes:
        place = rows - np.searchsorted(data["episodes"], data["episodes"])  # of a row in its episode
        if not args.bootstrap_at_cut:
            data["terminations"][np.flatnonzero(place == args.truncate_episodes) - 1] = 1.0
        rows = rows[place < args.truncate_episodes]
        report["removed_by_truncation"] = n - len(rows)
    report["successful_episodes_before_removal"] = len(np.unique(data["episodes"][rows][success[rows]]))
    if task.goal_cell:
        positions, maze = data["observations"][:, :2], env.unwrapped.maze
        if outside := int((np.abs(positions) > (maze.x_map_center, maze.y_map_center)).any(1).sum()):
            fail(f"{report['source']}: {outside} positions lie outside the maze; give them in gymnasium-robotics' "
                 "coordinates, which have their origin in the middle")
        jumps = np.linalg.norm(data["next_observations"][:, :2] - positions, axis=-1)
        if jumps.max(initial=0.0) > maze.maze_size_scaling:  # a cell
            fail(f"{report['source']}: a step of {jumps.max():.1f} m in row {jumps.argmax()}, where an episode must "
                 "have ended; put its ends right")
    elif args.remove_discs:
        fail(f"--remove-discs: {args.env_id} has no positions in a maze")
    if args.data_subset and args.data_subset < len(rows):
        rows = np.random.default_rng(derive_seed(seed, "subset")).choice(rows, args.data_subset, replace=False)
        report["subset"] = args.data_subset
    for x, y, radius in args.remove_discs:
        outside = np.linalg.norm(data["observations"][rows, :2] - np.float32([x, y]), axis=-1) > radius
        report.setdefault("removed_by_discs", []).append([x, y, radius, int((~outside).sum())])
        rows = rows[outside]
    if not len(rows):
        fail(f"{report['source']}: nothing is left; check --remove-discs and --truncate-episodes")
    report["actions_clipped"] = int((clipped != data["actions"])[rows].any(1).sum())  # transitions
    data["actions"] = clipped
    data, success = {name: value[rows] for name, value in data.items()}, success[rows]
    report |= {"transitions": len(rows), "episodes": len(np.unique(data["episodes"])),
               "successful_episodes": len(np.unique(data["episodes"][success])),
               "reward_range": [float(data["rewards"].min()), float(data["rewards"].max())],
               "sha256": hashlib.sha256(b"".join(data[name].tobytes() for name in sorted(data))).hexdigest()}
    print(f"{args.env_id}: offline data")
    print(*(f"  {key.replace('_', ' ')}: {value}" for key, value in report.items()), sep="\n")
    return data, report


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
