# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4", "tyro==1.0.17", "tqdm==4.70.1", "psutil==7.2.2", "filelock==4.3.1", "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1", "wandb==0.31.0"]
# ///
"""OOO (IQL): explore with an optimistic IQL + RND policy, then retrain a pessimistic IQL offline on all the data.

Paper: "Offline Retraining for Online RL: Decoupled Policy Learning to Mitigate Exploration Bias", arXiv 2310.08558,
Algorithm 1. IQL: arXiv 2110.06169. RND: arXiv 1810.12894.

    python iql_ooo.py --env-id hammer-truncated-expert-v1 --seed 3              # IQL + RND, and OOO (Tables 1 and 2)
    python iql_ooo.py --env-id pen-binary-v0 --intrinsic-reward-scale 0 --exp-name iql       # plain IQL, and OOO on it
    python iql_ooo.py --env-id maze2d-missing-data-large-v1 --scale 0.01                     # every budget x 0.01
    python iql_ooo.py --eval-only runs/pen-binary-v0__iql_ooo__1 --episodes 100 --video      # the saved policy
  Ablations of the exploitation phase, on the data of a finished run:
    python iql_ooo.py --exploit-only runs/pen-binary-v0__iql_ooo__1 --retrain-frozen-rnd --exp-name frozen_rnd  # Fig. 3
    python iql_ooo.py --exploit-only runs/pen-binary-v0__iql_ooo__1 --retrain-algorithm td3 --exp-name ooo_td3  # Fig. 5
    python iql_ooo.py --exploit-only runs/kitchen-mixed-v0__iql_ooo__1 --retrain-upsample 0 --exp-name no_up   # Fig. 11
    python iql_ooo.py --exploit-only runs/pen-binary-v0__iql_ooo__1 --warm-start --exp-name warm               # Fig. 13
    python iql_ooo.py --env-id pen-binary-v0 --sync --exp-name sync                                            # Fig. 14

Where paper and official code differ, the paper wins where it is explicit, else the code, except where the published
coefficients were tuned with the code's form (4 to 6). Each choice and exception:
 1. AWR weight exp(temperature * advantage), as the code and Table 4's values mean it; eq. 3 divides by beta.
 2. Hammer: expectile 0.8, dropout 0 in both phases (Table 4, B.4; the code: 0.7 / 0, and retraining 0.8 / 0.1),
    log_std_min -2 in exploration, -5 in exploitation (code; the paper says nothing). Kitchen is not in Table 4: code.
 3. Q targets are clipped in the exploitation phase (code; --no-retrain-q-bounds), to the rewards in its data, but not
    with --retrain-frozen-rnd, whose bonus these bounds would cut off (as the code); in exploration only on binary
    Adroit, to r in [-1, 5] (code; --q-reward-bounds).
 4. Intrinsic reward of s': largest squared feature error (code; --rnd-reward l2 is the paper's squared norm).
 5. RND layers (512, 512), the last one linear (code; --rnd-hidden-dims 512 512 512 is the paper's wording).
 6. RND's running standard deviation is of rewards that it has divided already (code; --rnd-normalizer paper: of the raw
    errors, as appendix A means it).
 7. The buffer is append-only and holds all data; the code's ring overwrites the offline data on five tasks.
 8. Kitchen masks come from the raw reward (0 where all 4 tasks are solved) in both phases; the code forgets this in
    exploitation. Offline rewards count the tasks that hold now, as recorded (--kitchen-cumulative: ever completed).
 9. Kitchen observations are 30 of D4RL's 60 numbers, without the goal, which never changes: a reading.
10. Upsampling (--retrain-upsample rows a batch) per task as the code; on maze2d as its flags mean it, where it cannot
    run; with no high reward in the data it is off, with a message (code: trains on a shorter batch, or stops).
11. Q bounds and high-reward trajectories come from D_off + D_on[:t]; the code looks at the whole buffer.
12. Fig. 5's TD3 (--retrain-algorithm td3) has the task's dropout in its policy loss only, not in target actions (code).
13. All retrainings run after the online phase (--sync: at the end of the episode that holds t); the data are the same.
14. Today's packages: docs/tasks.md (signs, horizons, mazes, goals, noise). The two small mazes are not of the paper.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages load is one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted; nothing was written\n"), os._exit(130)))

import errno
import hashlib
import io
import json
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

SCRIPT = "iql_ooo"  # written into every file of a run, also by a renamed copy


# === tasks ===
class Task(NamedTuple):
    """A task of the paper on today's packages, and what it changes in Args."""

    family: str
    gym_id: str
    horizon: int  # steps of an episode
    datasets: tuple[str, ...]  # Minari ids; ID:N for its first N episodes
    kwargs: dict  # of gym.make
    settings: dict  # overrides of Args
    score: tuple[str, float, float] = ("success", 0.0, 1.0)  # what an episode scores, its 0 and its 100 (D4RL's)
    goal_cell: tuple[int, int] | None = None  # (row, column) of the maze


# Settings are the official IQL configs' (Table 4 where it speaks). Adroit data: 90% of 25 demonstrations and of 500
# rollouts of their clone, in file order. Kitchen: noise 0.1 is D4RL's, the reward counts completed tasks.
def adroit(name, horizon):
    return Task(
        name, f"AdroitHand{name.title()}-v1", horizon, (f"D4RL/{name}/human-v2:22", f"D4RL/{name}/cloned-v2:450"), {},
        dict(offline_steps=25_000, online_steps=1_000_000, retrain_at=(250_000, 500_000, 750_000, 1_000_000),
             expectile=0.8, dropout=0.1, q_reward_bounds=(-1.0, 5.0), upsample_reward=0.0))


def kitchen(name, *subtasks):
    return Task(
        "kitchen", "FrankaKitchen-v1", 1000, (f"D4RL/kitchen/{name}-v2",),
        dict(tasks_to_complete=list(subtasks), remove_task_when_completed=True, terminate_on_tasks_completed=False,
             robot_noise_ratio=0.1, object_noise_ratio=0.1),
        dict(offline_steps=1_000_000, online_steps=4_000_000,
             retrain_at=(1_000_000, 2_000_000, 3_000_000, 4_000_000), temperature=0.5, dropout=0.1, reward_bias=-4.0,
             mask_reward=4.0, intrinsic_reward_scale=10.0, retrain_upsample=8, upsample_reward=4.0,
             upsample_trajectories=True), ("max_reward", 0.0, 4.0))


MAZE = dict(reward_bias=-1.0, expectile=0.9, intrinsic_reward_scale=10.0, retrain_upsample=8)


def maze2d(name, horizon, low, high, goal_cell, **settings):
    return Task("maze2d", f"PointMaze_{name}-v3", horizon, (f"D4RL/pointmaze/{name.lower()}-v2",),
                dict(continuing_task=True, reset_target=False), MAZE | settings, ("return", low, high), goal_cell)


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
        dict(MAZE, temperature=10.0, online_steps=2_000_000, remove_discs=((14.0, -12.0, 2.5),),
             retrain_at=(500_000, 750_000, 1_000_000, 1_250_000, 1_500_000)), ("return", 0.0, 1.0), (7, 9)),
    # Discs: goal, top-left and bottom-left of the drawn map (section 5.2; where the corners lie is not published).
    "maze2d-missing-data-large-v1": maze2d(
        "Large", 800, 6.7, 273.99, (7, 9), data_subset=500_000,
        remove_discs=((3.5, -3.0, 1.5), (-4.5, 3.0, 1.5), (-4.5, -3.0, 2.0))),
    "hammer-truncated-expert-v1": Task(
        "hammer", "AdroitHandHammer-v1", 200, ("D4RL/hammer/expert-v2",), {},
        dict(offline_steps=50_000, truncate_episodes=20, expectile=0.8, log_std_min=-2.0, retrain_log_std_min=-5.0,
             upsample_reward=25.0),
        ("return", -274.856578, 12794.134825156867)),
    # Not of the paper: small mazes to try things on, with D4RL's goals, horizons and score ranges.
    "maze2d-missing-data-umaze-v1": maze2d("UMaze", 300, 23.85, 161.86, (1, 1), remove_discs=((-1.0, 1.0, 1.0),)),
    "maze2d-missing-data-medium-v1": maze2d("Medium", 600, 13.13, 277.39, (6, 6), remove_discs=((2.5, -2.5, 1.5),)),
}


# === arguments ===
@dataclass
class Args:
    # --- experiment ---
    env_id: Literal[tuple(TASKS)] = "hammer-truncated-expert-v1"  # task
    seed: int = 1  # seed of everything random in the run
    exp_name: str = Path(__file__).stem  # middle part of the run directory's name
    runs_dir: str = "runs"  # folder of the run directories
    scale: float = 1.0  # multiplies every budget and interval (steps, not episodes or batch size)
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda or cuda:N
    torch_threads: int = 1  # CPU threads of torch; several runs side by side use a machine better than one with many
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products; medium may round to bf16
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the updates; auto: where it saves time
    cudagraphs: bool = False  # replay the updates as CUDA graphs (cuda only)
    resume: bool = False  # continue the run of the same name from its last checkpoint
    eval_only: str = ""  # RUN_DIR of a run: evaluate its last exploitation policy, train nothing
    exploit_only: str = ""  # RUN_DIR of a finished run: repeat its retrainings with other settings, as a new run
    video: bool = False  # with --eval-only: also record three episodes as mp4 (MUJOCO_GL=osmesa or egl: no display)
    # --- task and data ---
    dataset_id: tuple[str, ...] = ()  # Minari ids, each optionally ID:N for its first N episodes (default: the task's)
    dataset_path: str = ""  # an .npz with D4RL's keys instead of Minari data
    truncate_episodes: int = 0  # keep the first N transitions of every offline episode (0: all)
    data_subset: int = 0  # keep N random offline transitions (0: all); drawn before discs are removed
    remove_discs: tuple[tuple[float, float, float], ...] = ()  # X Y RADIUS ...: offline transitions inside are removed
    kitchen_cumulative: bool = False  # kitchen's offline rewards count tasks ever completed, not those that hold now
    reward_scale: float = 1.0  # sampled rewards are (r + reward_bias) * reward_scale; stored rewards stay raw
    reward_bias: float = 0.0  # see reward_scale
    mask_reward: float | None = None  # if set, masks are 0 exactly where the raw reward equals this (kitchen: 4)
    # --- phases ---
    offline_steps: int = 500_000  # pretraining: gradient steps on D_off
    online_steps: int = 500_000  # online phase: environment steps, one gradient step each
    retrain_at: tuple[int, ...] = (250_000, 500_000)  # environment steps t: a policy is retrained on D_off + D_on[:t]
    retrain_steps: int = 2_000_000  # gradient steps of one retraining
    eval_every: int = 50_000  # steps of the phase under way between evaluations
    eval_episodes: Annotated[int, tyro.conf.arg(aliases=["--episodes"])] = 100  # episodes of one evaluation
    log_every: int = 1_000  # steps between records of losses and of the intrinsic reward
    checkpoint_every: int = 10_000  # steps between checkpoints; online at the next end of an episode
    # --- IQL (exploration, and exploitation where its own value is unset) ---
    batch_size: int = 256  # transitions of one gradient step
    learning_rate: float = 3e-4  # Adam's rate for actor, critic and value
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critic, per gradient step
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of actor, critic and value
    expectile: float = 0.7  # IQL's tau in (0.5, 1): closer to 1 means closer to a max over actions
    temperature: float = 3.0  # multiplies the advantage in exp(temperature * A); the paper's beta (Table 4)
    dropout: float = 0.0  # dropout rate of the actor's hidden layers, in the actor loss only
    log_std_min: float = -5.0  # lower clip of the policy's log standard deviation (upper: 2)
    q_reward_bounds: tuple[float, float] | None = None  # exploration: Q targets clipped to these rewards / (1 - gamma)
    # --- exploitation (offline retraining) ---
    retrain_algorithm: Literal["iql", "td3"] = "iql"  # td3: the authors' simplified TD3 (Fig. 5), Q explodes offline
    retrain_expectile: float | None = None  # unset: expectile
    retrain_dropout: float | None = None  # unset: dropout
    retrain_log_std_min: float | None = None  # unset: log_std_min
    retrain_reward_scale: float | None = None  # unset: reward_scale
    retrain_q_bounds: bool = True  # clip Q targets to [min, max] reward of the data / (1 - gamma)
    retrain_frozen_rnd: bool = False  # add the bonus of the RND as it stood at t, never updated, unbounded (Fig. 3)
    retrain_upsample: int = 0  # rows of each batch drawn from the high-reward data (section 4.2, Fig. 11)
    upsample_reward: float = 1.0  # a raw reward of at least this is high
    upsample_trajectories: bool = False  # high-reward data are whole trajectories that reach upsample_reward
    warm_start: bool = False  # start from the previous retraining's networks instead of from scratch (Fig. 13)
    sync: bool = False  # after each retraining the exploration agent continues as the exploitation agent (Fig. 14)
    # --- RND ---
    intrinsic_reward_scale: float = 0.5  # coefficient of the intrinsic reward; 0 is plain IQL, without RND
    rnd_reward: Literal["max", "l2"] = "max"  # max over features of the squared error (code), or their sum (paper)
    rnd_normalizer: Literal["code", "paper"] = "code"  # variance of already normalised rewards, or of the raw errors
    rnd_hidden_dims: tuple[int, ...] = (512, 512)  # layers of predictor and target, the last one linear
    rnd_learning_rate: float = 1e-4  # Adam's rate for the predictor
    rnd_update_proportion: float = 0.25  # share of each batch that trains the predictor
    # --- tracking ---
    track: bool = False  # send metrics to wandb as well
    wandb_project: str | None = None  # unset: $WANDB_PROJECT, or ooo
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # unset: $WANDB_MODE, or online


BUDGETS = ("offline_steps", "online_steps", "retrain_at", "retrain_steps", "eval_every", "log_every",
           "checkpoint_every")  # --scale multiplies these
COMPILE_PAYS = 20_000  # updates from which --compile auto is on: it saves more than it takes (docs/speed.md)
TINY = 1e-9  # open ends of intervals
RANGES = {  # closed interval of every number in Args (None is allowed where it is the default; NaN lies in none)
    (0, 2**32 - 1): "seed",
    (0, 10**10): "truncate_episodes data_subset offline_steps online_steps retrain_upsample",
    (1, 10**10): "retrain_at retrain_steps eval_every log_every checkpoint_every",
    (1, 2**16): "eval_episodes batch_size",
    (1, 4096): "torch_threads hidden_dims rnd_hidden_dims",
    (TINY, 1e6): "scale temperature",
    (-1e9, 1e9): "remove_discs reward_bias mask_reward q_reward_bounds upsample_reward",
    (TINY, 1.0): "learning_rate rnd_learning_rate tau rnd_update_proportion",
    (0.0, 1 - TINY): "gamma dropout retrain_dropout",
    (TINY, 1 - TINY): "expectile retrain_expectile",
    (-20.0, 2.0): "log_std_min retrain_log_std_min",
    (0.0, 1e6): "intrinsic_reward_scale reward_scale retrain_reward_scale",
}


def mistakes(args):
    """What else cannot be: (is wrong, message) pairs."""
    last = max(args.retrain_at, default=0)
    return (
        (list(args.retrain_at) != sorted(set(args.retrain_at)), "--retrain-at must rise"),
        (last > args.online_steps, f"--retrain-at {last} lies outside the online budget of {args.online_steps} steps"),
        (args.retrain_upsample > args.batch_size, "--retrain-upsample is more than --batch-size"),
        (args.q_reward_bounds and args.q_reward_bounds[0] > args.q_reward_bounds[1], "--q-reward-bounds must rise"),
        (args.retrain_frozen_rnd and not args.intrinsic_reward_scale,
         "--retrain-frozen-rnd needs a run with RND: --intrinsic-reward-scale above 0"),
        (args.sync and (args.retrain_algorithm == "td3" or args.exploit_only),
         "--sync needs an online phase and --retrain-algorithm iql"),
        (args.exploit_only and args.eval_only, "give --exploit-only or --eval-only, not both"),
        (args.exploit_only and not args.retrain_at, "--exploit-only needs --retrain-at"),
    )


def count_updates(args):
    """Gradient steps of the whole run."""
    online = 0 if args.exploit_only else args.offline_steps + args.online_steps
    return online + len(args.retrain_at) * args.retrain_steps


# === shared block: networks ===
class MLP(nn.Module):
    """Orthogonal linear layers of the given sizes with ReLU (and dropout) between them; the last one is linear."""

    def __init__(self, dims):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x, dropout=0.0):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
            x = F.dropout(x, dropout) if dropout else x
        return self.layers[-1](x)


class Critic(nn.Module):
    """Two Q(s, a) as batched products: (batch, obs_dim), (batch, act_dim) -> (2, batch)."""

    def __init__(self, obs_dim, act_dim, hidden_dims, num_qs=2):
        super().__init__()
        dims = (obs_dim + act_dim, *hidden_dims, 1)
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.weights = nn.ParameterList([torch.empty(num_qs, i, o) for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(num_qs, 1, o) for _, o in pairs])
        for weight in self.weights:
            for member in weight.data:
                nn.init.orthogonal_(member, gain=2**0.5)

    def forward(self, observations, actions):
        x = torch.cat([observations, actions], dim=-1).expand(len(self.weights[0]), -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = F.relu(x, inplace=True) if i < len(self.weights) - 1 else x
        return x.squeeze(-1)


class Actor(nn.Module):
    """Diagonal Gaussian with a state-independent log_std. IQL: mean = tanh(net), not squashed, actions clipped.
    squash (TD3): action = tanh(net + std * noise)."""

    def __init__(self, obs_dim, act_dim, hidden_dims, log_std_min=-5.0, squash=False):
        super().__init__()
        self.net = MLP((obs_dim, *hidden_dims, act_dim))
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.log_std_min, self.squash = log_std_min, squash

    def log_prob(self, observations, actions, dropout=0.0):
        """log pi(a|s) of the unsquashed Gaussian, shape (batch,)."""
        log_std = self.log_std.clamp(self.log_std_min, 2.0)
        z = (actions - self.net(observations, dropout).tanh()) / log_std.exp()
        return -(0.5 * z.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)

    def act(self, observations, noise=0.0, dropout=0.0):
        """Actions in [-1, 1], shape (batch, act_dim); noise: standard normal, or 0 for the mean."""
        mean = self.net(observations, dropout)
        spread = self.log_std.clamp(self.log_std_min, 2.0).exp() * noise
        return (mean + spread).tanh() if self.squash else (mean.tanh() + spread).clamp(-1.0, 1.0)


# === end shared block: networks ===


# === shared block: iql agent ===
class Agent(nn.Module):
    """The networks of one IQL (or TD3) agent and their optimisers."""

    def __init__(self, obs_dim, act_dim, hidden_dims, learning_rate, device, **actor_options):
        super().__init__()
        self.options = dict(obs_dim=obs_dim, act_dim=act_dim, hidden_dims=list(hidden_dims), **actor_options)
        self.actor = Actor(obs_dim, act_dim, hidden_dims, **actor_options)
        self.critic, self.critic_target = (Critic(obs_dim, act_dim, hidden_dims) for _ in range(2))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.requires_grad_(False)
        self.value = MLP((obs_dim, *hidden_dims, 1))
        self.to(device)
        self.value_optimizer = Adam(self.value.parameters(), learning_rate)
        self.critic_optimizer = Adam(self.critic.parameters(), learning_rate)
        self.actor_optimizer = Adam(self.actor.parameters(), learning_rate)
        self.optimizers = (self.value_optimizer, self.critic_optimizer, self.actor_optimizer)

    @torch.no_grad()
    def act(self, obs, sample=False):
        """One numpy observation to one numpy action in [-1, 1]: a sample, or the mean."""
        device = self.actor.log_std.device
        noise = torch.randn(len(self.actor.log_std), device=device) if sample else 0.0
        return self.actor.act(torch.from_numpy(obs).to(device)[None], noise)[0].cpu().numpy()

    @torch.no_grad()
    def update_target(self, tau):
        torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), tau)


# === end shared block: iql agent ===


# === shared block: rnd ===
class RND(nn.Module):
    """Random network distillation (arXiv 1810.12894): the error of a trained predictor of a fixed random network's
    features of s', divided by a running standard deviation, is the intrinsic reward. reward, normalizer: see Args."""

    def __init__(self, obs_dim, hidden_dims, learning_rate, device, reward="max", normalizer="code"):
        super().__init__()
        self.predictor, self.target = (MLP((obs_dim, *hidden_dims)) for _ in range(2))
        self.target.requires_grad_(False)
        self.reward_form, self.normalizer = reward, normalizer
        # Not 0-d: torch.compile loses what is written into a 0-d float64 tensor on the CPU. The paper's form starts
        # from nothing, so that the scale of the networks cancels exactly.
        for name, dim, count in (("obs", obs_dim, 1e-4), ("reward", 1, 0.0 if normalizer == "paper" else 1e-4)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim, dtype=torch.float64))
            self.register_buffer(f"{name}_var", torch.ones(dim, dtype=torch.float64))
            self.register_buffer(f"{name}_count", torch.full((1,), count, dtype=torch.float64))
        self.to(device)
        self.optimizer = Adam(self.predictor.parameters(), learning_rate)
        self.optimizers = (self.optimizer,)

    def update_running(self, name, x):
        """Chan's parallel mean and variance (population) of the batch x (n, dim), in place."""
        mean, var, count = (getattr(self, f"{name}_{part}") for part in ("mean", "var", "count"))
        x, n = x.double(), x.shape[0]
        delta, total = x.mean(0) - mean, count + n
        m2 = var * count + x.var(0, correction=0) * n + delta.square() * (count * n / total)
        mean.add_(delta * (n / total))
        var.copy_(m2 / total)
        count.add_(n)

    def reward_std(self):
        """Running standard deviation (1,); 1 where there is no spread yet."""
        return torch.where(self.reward_var > 0, self.reward_var, 1.0).sqrt().float()

    def normalize(self, observations):
        return ((observations - self.obs_mean.float()) / self.obs_var.sqrt().float()).clamp(-5.0, 5.0)

    def errors(self, z):
        """Raw intrinsic rewards (n,) of normalised observations."""
        errors = (self.predictor(z) - self.target(z)).square()
        return errors.amax(-1) if self.reward_form == "max" else errors.sum(-1)

    @torch.no_grad()
    def intrinsic_rewards(self, next_observations):
        """(n,), divided by the running standard deviation, no mean subtracted; nothing is updated."""
        return self.errors(self.normalize(next_observations)) / self.reward_std()

    def update(self, observations, next_observations, update_proportion=0.25, uniform=None):
        """One predictor step and the intrinsic rewards of the batch. Returns (rewards (batch,), predictor loss).
        uniform: draws in [0, 1) that select the training rows, shape (batch,); None draws them."""
        z = self.normalize(next_observations)
        # --- Predictor step on a random share of the batch ---
        uniform = torch.rand(len(z), device=z.device) if uniform is None else uniform
        mask = uniform < update_proportion
        if z.device.type == "cpu":  # only the chosen rows; a GPU would have to wait for their number
            rows = mask.nonzero().squeeze(1)
            loss = (self.predictor(z[rows]) - self.target(z[rows])).square().mean(-1).sum() / mask.sum().clamp(min=1)
        else:
            error = (self.predictor(z) - self.target(z)).square().mean(-1)
            loss = (error * mask).sum() / mask.sum().clamp(min=1)
        self.optimizer.minimize(loss)
        # --- Rewards after the step (IQL code), and the statistics: see rnd_normalizer ---
        with torch.no_grad():
            rewards = self.errors(z)
            if self.normalizer == "paper":
                self.update_running("reward", rewards[:, None])
            rewards = rewards / self.reward_std()
            if self.normalizer == "code":
                self.update_running("reward", rewards[:, None])
            self.update_running("obs", observations)
        return rewards, loss.detach()


# === end shared block: rnd ===


# === shared block: iql update ===
def expectile_loss(diff, expectile):
    """IQL eq. 5: |expectile - 1{diff < 0}| * diff^2, averaged. diff = Q_target(s, a) - V(s), shape (batch,)."""
    weight = torch.where(diff > 0, expectile, 1.0 - expectile)
    return (weight * diff.square()).mean()


def iql_update(agent, batch, bonus=0.0, *, expectile, temperature, gamma, tau, dropout=0.0, q_min=-np.inf,
               q_max=np.inf):
    """One IQL update (paper eq. 1 to 3): V, then Q and the policy. batch: observations, actions, rewards, masks,
    next_observations; bonus: scaled intrinsic rewards (batch,), or 0. Returns detached scalars."""
    observations, actions = batch["observations"], batch["actions"]
    # One pass of the target critic serves V and the policy: both want it as it was before this update's EMA.
    with torch.no_grad():
        q_target = agent.critic_target(observations, actions)
    # --- V: expectile regression toward the (bounded) target Q ---
    v = agent.value(observations).squeeze(-1)
    value_loss = expectile_loss(q_target.clamp(q_min, q_max).amin(0) - v, expectile)
    agent.value_optimizer.minimize(value_loss)
    # --- Target: the new V; masks is 0 only at true terminals. The bonus comes after the clip (official code) ---
    with torch.no_grad():
        next_v, v = agent.value(torch.cat([batch["next_observations"], observations])).squeeze(-1).chunk(2)
        target = (batch["rewards"] + gamma * batch["masks"] * next_v).clamp(q_min, q_max) + bonus
    # --- Q: mean over the ensemble and the batch ---
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    agent.critic_optimizer.minimize(critic_loss)
    # --- Policy: advantage-weighted regression (eq. 3); the advantage is not clipped to the bounds ---
    advantage = q_target.amin(0) - v
    weight = (temperature * advantage).exp().clamp(max=100.0)
    actor_loss = -(weight * agent.actor.log_prob(observations, actions, dropout)).mean()
    agent.actor_optimizer.minimize(actor_loss)
    agent.update_target(tau)
    return {"losses/value": value_loss.detach(), "losses/critic": critic_loss.detach(),
            "losses/actor": actor_loss.detach(), "losses/q_mean": q.detach().mean(), "losses/v_mean": v.mean(),
            "losses/advantage_mean": advantage.mean()}


# === end shared block: iql update ===


# === shared block: simplified td3 ===
def td3_update(agent, batch, bonus=0.0, *, gamma, tau, dropout=0.0, noise=None):
    """The authors' simplified TD3 (Fig. 5): no target actor, no delay, no noise clip, no bounds. The policy's critic
    is the one before this step's update. noise: standard normal (2, batch, act_dim) for next and policy action."""
    observations, actions = batch["observations"], batch["actions"]
    noise = torch.randn(2, *actions.shape, device=actions.device) if noise is None else noise
    with torch.no_grad():
        next_actions = agent.actor.act(batch["next_observations"], noise[0])
        next_q = agent.critic_target(batch["next_observations"], next_actions).amin(0)
        target = batch["rewards"] + gamma * batch["masks"] * next_q + bonus
    # --- Policy: mean of both critics, which get no gradient from it ---
    actor_loss = -agent.critic(observations, agent.actor.act(observations, noise[1], dropout)).mean()
    agent.actor_optimizer.minimize(actor_loss)
    # --- Q ---
    q = agent.critic(observations, actions)
    critic_loss = (q - target).square().mean()
    agent.critic_optimizer.minimize(critic_loss)
    agent.update_target(tau)
    return {"losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(),
            "losses/q_mean": q.detach().mean()}


# === end shared block: simplified td3 ===


def make_update(args, buffer, agent, bounds, rnd=None, exploitation=False):
    """update(rows) -> losses: one gradient step of the agent on raw buffer rows (batch, width). Exploration trains rnd
    and adds its bonus; exploitation has no rnd, or a frozen one. bounds: least and largest reward, or None."""
    low, high = bounds or (-np.inf, np.inf)
    reward_scale = pick(args, "reward_scale", exploitation)
    options = dict(gamma=args.gamma, tau=args.tau, dropout=pick(args, "dropout", exploitation))
    if not agent.actor.squash:
        options |= dict(expectile=pick(args, "expectile", exploitation), temperature=args.temperature,
                        q_min=low / (1 - args.gamma), q_max=high / (1 - args.gamma))

    def update(rows):
        batch = buffer.split(rows)
        raw, bonus, losses = batch["rewards"], 0.0, {}
        batch["masks"] = 1.0 - batch["terminations"] if args.mask_reward is None else (raw != args.mask_reward).float()
        batch["rewards"] = (raw + args.reward_bias) * reward_scale
        if rnd and exploitation:
            bonus = args.intrinsic_reward_scale * rnd.intrinsic_rewards(batch["next_observations"])
        elif rnd:
            rewards, loss = rnd.update(batch["observations"], batch["next_observations"], args.rnd_update_proportion)
            bonus = args.intrinsic_reward_scale * rewards
            losses = {"losses/rnd": loss, "rnd/batch_intrinsic_reward": rewards.mean()}
        learn = td3_update if agent.actor.squash else iql_update
        return learn(agent, batch, bonus, **options) | losses

    return faster(args, update)


def pick(args, name, exploitation):
    """A setting of the exploration agent, or of the exploitation agent where it has its own."""
    own = getattr(args, f"retrain_{name}") if exploitation else None
    return getattr(args, name) if own is None else own


# === algorithm 1 ===
def make_agent(args, buffer, device, exploitation=False):
    return Agent(buffer.obs_dim, buffer.act_dim, args.hidden_dims, args.learning_rate, device,
                 log_std_min=pick(args, "log_std_min", exploitation),
                 squash=exploitation and args.retrain_algorithm == "td3")


def make_rnd(args, buffer, device):
    return RND(buffer.obs_dim, args.rnd_hidden_dims, args.rnd_learning_rate, device, args.rnd_reward,
               args.rnd_normalizer)


def pretrain(run, buffer, explorer, rnd, update, eval_env):
    """Algorithm 1, line 1: the exploration agent's update on D_off."""
    args, p, last = run.args, run.progress, run.args.offline_steps
    for step in progress_bar("pretrain", p["grad_step"], last):
        if step == 0:
            evaluate_and_log(run, eval_env, explorer, "pretrain", 0, 0)
        run.seed("pretrain", step)
        losses = update(buffer.sample(args.batch_size, buffer.offline_size))
        p["grad_step"] = step = step + 1
        if due(step, args.log_every, last):
            run.log_losses("pretrain", 0, step, losses)
        if due(step, args.eval_every, last):
            evaluate_and_log(run, eval_env, explorer, "pretrain", 0, step)
        if step == last:
            save_policy(run, explorer, "pretrained.pt")
        if due(step, args.checkpoint_every, last) or run.signal:
            run.checkpoint(explorer=explorer, rnd=rnd)


def explore(run, buffer, explorer, rnd, update, env, eval_env, until):
    """Algorithm 1, lines 2 to 6: the optimistic policy alone acts; one update a step, on all data. Ends with the
    episode in which step `until` falls."""
    args, p = run.args, run.progress
    if p["env_step"] >= until:
        return
    bar, saved = progress_bar("online", p["env_step"], args.online_steps), p["env_step"]
    while p["env_step"] < until:
        obs, _ = env.reset(seed=derive_seed(args.seed, "training episode", p["episode"]))
        episode, done = {"return": 0.0, "length": 0, "success": False}, False
        while not done and p["env_step"] < args.online_steps:
            run.seed("online", p["env_step"])
            action = explorer.act(obs, sample=True)
            next_obs, reward, terminated, truncated, info = env.step(action)
            run.append("replay.bin", buffer.add(
                observations=obs, actions=action, rewards=reward, next_observations=next_obs,
                terminations=terminated, episodes=buffer.offline_episodes + p["episode"]))
            obs, done = next_obs, terminated or truncated
            episode = {"return": episode["return"] + reward, "length": episode["length"] + 1,
                       "success": episode["success"] or info["success"]}
            losses = update(buffer.sample(args.batch_size))
            p["env_step"] = t = p["env_step"] + 1
            p["grad_step"] += 1
            bar.update()
            if t % args.log_every == 0:
                run.log_losses("online", t, p["grad_step"], losses, **recent_intrinsic_reward(args, buffer, rnd))
            if due(t, args.eval_every, args.online_steps) or t in args.retrain_at:
                summary = evaluate_and_log(run, eval_env, explorer, "online", t, p["grad_step"])
            if t in args.retrain_at or t == args.online_steps:  # what the table, and a retraining for t, may need
                p["scores"][f"exploration {t}"] = summary
                save_policy(run, explorer, f"exploration_{t}.pt")
                if rnd:
                    save_torch(run.path / f"rnd_{t}.pt", {"script": SCRIPT, "rnd": rnd.state_dict()})
        p["episode"] += 1
        run.log("metrics.jsonl", "online", p["env_step"], p["grad_step"],
                **{f"charts/episodic_{key}": value for key, value in episode.items()})
        if p["env_step"] >= until or p["env_step"] - saved >= args.checkpoint_every or run.signal:
            run.checkpoint(explorer=explorer, rnd=rnd)
            saved = p["env_step"]
    bar.close()


def retrain(run, buffer, explorer, rnd, eval_env, t):
    """Algorithm 1, last line: a separate pessimistic agent, from scratch, on D_off + D_on[:t], task reward only."""
    args, p, last, n = run.args, run.progress, run.args.retrain_steps, buffer.offline_size + t
    if f"exploitation {t}" in p["scores"]:
        return
    run.seed("retrain", t)
    agent, frozen_rnd = make_agent(args, buffer, run.device, exploitation=True), None
    if args.retrain_frozen_rnd:
        frozen_rnd = make_rnd(args, buffer, run.device)
        frozen_rnd.load_state_dict(load_torch(Path(args.exploit_only or run.path) / f"rnd_{t}.pt", run.device)["rnd"])
    if args.warm_start and t != args.retrain_at[0]:
        before = args.retrain_at[args.retrain_at.index(t) - 1]
        agent.load_state_dict(load_torch(run.path / f"exploitation_{before}.pt", run.device)["agent"])
    run.restore(exploiter=agent)
    rewards = (buffer.first(n)["rewards"] + args.reward_bias) * pick(args, "reward_scale", True)
    # A bonus in the target needs room above the largest reward.
    bounds = (rewards.min().item(), rewards.max().item()) if args.retrain_q_bounds and not frozen_rnd else None
    update = make_update(args, buffer, agent, bounds, frozen_rnd, exploitation=True)
    high = high_reward_rows(args, buffer.first(n))
    for step in progress_bar(f"retrain t={t}", p["retrain_step"], last):
        if step == 0:
            evaluate_and_log(run, eval_env, agent, "retrain", t, 0)
        run.seed("retrain", t, step)
        losses = update(buffer.sample(args.batch_size, n, high, args.retrain_upsample if len(high) else 0))
        p["retrain_step"] = step = step + 1
        if due(step, args.log_every, last):
            run.log_losses("retrain", t, step, losses)
        if due(step, args.eval_every, last):
            summary = evaluate_and_log(run, eval_env, agent, "retrain", t, step)
        if step < last and (step % args.checkpoint_every == 0 or run.signal):
            run.checkpoint(explorer=explorer, rnd=rnd, exploiter=agent)
    save_policy(run, agent, f"exploitation_{t}.pt")
    if args.sync:
        load_state(explorer, state_of(agent))
    p["scores"][f"exploitation {t}"], p["retrain_step"] = summary, 0
    run.checkpoint(explorer=explorer, rnd=rnd)


def recent_intrinsic_reward(args, buffer, rnd):
    """Figure 3 (left): the intrinsic reward over the last 1000 online transitions."""
    if rnd is None:
        return {}
    reward = rnd.intrinsic_rewards(buffer.last(1000)["next_observations"])
    mean, std = reward.mean().item(), reward.std(correction=0).item()
    scaled = args.intrinsic_reward_scale * mean
    return {"rnd/online_mean": mean, "rnd/online_scaled_mean": scaled, "rnd/online_std": std}


def high_reward_rows(args, batch):
    """Indices (k,) of the high-reward transitions (section 4.2); k may be 0."""
    if not args.retrain_upsample:
        return ()
    high = batch["rewards"] >= args.upsample_reward
    if args.upsample_trajectories:
        high = torch.isin(batch["episodes"], batch["episodes"][high].unique())
    if not high.any():
        print(f"no raw reward of at least {args.upsample_reward:g} in the data: sampling stays uniform")
    return high.nonzero().squeeze(1)


def main(args):
    if args.eval_only:
        return evaluate_saved(args, "exploitation")
    # Build, and go back to the last checkpoint; nothing is written before all of it has worked.
    run = Run(args, grad_step=0, env_step=0, episode=0, retrain_step=0, scores={})
    if args.exploit_only:
        take_over(run, args.exploit_only)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    data, dataset = load_dataset(args, env, run.data_seed)
    buffer = ReplayBuffer(data, max(args.retrain_at) if args.exploit_only else args.online_steps, run.device)
    buffer.extend(run.read_replay(buffer.width))
    explorer = rnd = None
    if not args.exploit_only:
        run.seed("networks")
        explorer = make_agent(args, buffer, run.device)
        rnd = make_rnd(args, buffer, run.device) if args.intrinsic_reward_scale else None
        run.restore(explorer=explorer, rnd=rnd)
    run.begin(dataset, buffer.columns)

    if not args.exploit_only:
        update = make_update(args, buffer, explorer, args.q_reward_bounds, rnd)
        pretrain(run, buffer, explorer, rnd, update, eval_env)
        for t in args.retrain_at if args.sync else ():
            explore(run, buffer, explorer, rnd, update, env, eval_env, until=t)
            retrain(run, buffer, explorer, rnd, eval_env, t)
        explore(run, buffer, explorer, rnd, update, env, eval_env, until=args.online_steps)
    for t in args.retrain_at:
        retrain(run, buffer, explorer, rnd, eval_env, t)
    return report(run, ("exploration", "exploitation"))


def save_policy(run, agent, name):
    """A policy that load_policy (and nothing else) needs. IQL normalises no observations; actions are the
    environment's, in [-1, 1]. All networks: for --warm-start, PEX's --init-from and those who analyse the values."""
    save_torch(run.path / name, {"script": SCRIPT, "env_id": run.args.env_id, "options": agent.options,
                                 "observation_normalization": None, "agent": agent.state_dict()})


def load_policy(path):
    """The agent of a file of save_policy, on the CPU; agent.act(obs) is its deterministic action, numpy to numpy."""
    content = load_torch(path, torch.device("cpu"))
    agent = Agent(**content["options"], learning_rate=0.0, device=torch.device("cpu"))
    agent.load_state_dict(content["agent"])
    return agent


# Below is plumbing: command line, evaluation, replay, environments, dataset, run directory. Nothing of the method.


# === shared block: exploit only ===
def take_over(run, source):
    """--exploit-only: the online rows and exploration scores of a finished run, and its choice of offline data."""
    config, times = read_config(source), run.args.retrain_at
    saved, run.rows = run.read_checkpoint(Path(source), config)
    have, needed = saved["progress"]["env_step"], max(times)
    if have < needed:
        fail(f"--retrain-at {needed}: {source} holds {have} online transitions")
    for t in times if getattr(run.args, "retrain_frozen_rnd", False) else ():
        load_torch(Path(source) / f"rnd_{t}.pt", run.device)
    run.rows = run.rows[: len(run.rows) // have * needed]
    names = {f"exploration {t}" for t in times} & set(saved["progress"]["scores"])
    run.progress["scores"] = {name: saved["progress"]["scores"][name] for name in names} | run.progress["scores"]
    run.data_seed, run.data_sha256 = config["args"]["seed"], config["dataset"]["sha256"]


# === end shared block: exploit only ===


# === shared block: tasks and data ===
# --- evaluation ---
def evaluate(env, agent, episodes, seed, frames=None):
    """Episodes of agent.act(obs): a list of dicts, and their means under the names of the metrics. The score is the
    paper's: success, kitchen tasks / 4, or D4RL's score, x 100. Start states and draws depend on the seed alone."""
    key, low, high = env.task.score
    results = []
    for i in range(episodes):
        seed_torch(derive_seed(seed, "evaluation policy", i))
        obs, _ = env.reset(seed=derive_seed(seed, "evaluation", i))
        episode, done = {"return": 0.0, "length": 0, "success": False, "max_reward": -float("inf")}, False
        while not done:
            if frames is not None:
                frames.append(env.render())
            obs, reward, terminated, truncated, info = env.step(agent.act(obs))
            done = terminated or truncated
            episode["return"] += reward
            episode["length"] += 1
            episode["success"] |= info["success"]
            episode["max_reward"] = max(episode["max_reward"], reward)
        results.append(episode)
    mean = {name: float(np.mean([episode[name] for episode in results])) for name in ("return", "success", key)}
    return results, {"eval/return": mean["return"], "eval/success_rate": mean["success"],
                     "eval/normalized_score": 100 * (mean[key] - low) / (high - low), "eval/episodes": episodes}


def evaluate_and_log(run, env, agent, phase, env_step, grad_step):
    """Evaluate without sampling; means go to metrics.jsonl, every episode to evals.jsonl. Returns the means."""
    start = time.perf_counter()
    episodes, summary = evaluate(env, agent, run.args.eval_episodes, run.args.seed)
    run.log("metrics.jsonl", phase, env_step, grad_step, **summary)
    run.log("evals.jsonl", phase, env_step, grad_step, episodes=episodes)
    run.clock += time.perf_counter() - start  # evaluation is not training time
    return summary


def evaluate_saved(args, kind):
    """--eval-only: the run's last policy `kind`_T.pt on start states that training never saw; --video records some."""
    folder = Path(args.eval_only)
    times = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(rf"{kind}_(\d+)\.pt", path.name))]
    if not times:
        fail(f"{folder} has no policy {kind}_*.pt yet; finish the run first (--resume)")
    setup_torch(replace(args, compile="off"))
    path, seed = folder / f"{kind}_{max(times)}.pt", derive_seed(args.seed, "eval-only")
    agent = load_policy(path)
    if args.video:
        import imageio

        try:
            env, frames = make_env(args.env_id, "rgb_array"), []
            evaluate(env, agent, min(3, args.eval_episodes), seed, frames)
        except Exception as error:  # GL back ends fail in many ways
            fail(f"cannot render ({error}); set MUJOCO_GL=egl, or MUJOCO_GL=osmesa with libosmesa6 installed")
        temporary = path.with_suffix(".tmp.mp4")
        imageio.mimwrite(temporary, frames, fps=env.metadata.get("render_fps", 30), macro_block_size=2)
        os.replace(temporary, path.with_suffix(".mp4"))
        print(f"video: {path.with_suffix('.mp4')} ({len(frames)} frames)")
    episodes, summary = evaluate(make_env(args.env_id), agent, args.eval_episodes, seed)
    result = {"policy": path.name, **summary, "per_episode": episodes}
    atomic_write(path.with_name(f"{path.stem}_eval.json"), json.dumps(result, indent=1).encode())
    print("  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    return summary


def report(run, policies):
    """The table of the policies' scores {"policy env_step": means of evaluate}, also in results.json."""
    scores = run.progress["scores"]
    rows = [{"env_step": t, **{name: scores.get(f"{name} {t}") for name in policies}}
            for t in sorted({int(name.split()[1]) for name in scores})]
    atomic_write(run.path / "results.json", json.dumps({"env_id": run.args.env_id, "rows": rows}, indent=1).encode())
    print(f"\n{run.args.env_id}, seed {run.args.seed}, {run.args.eval_episodes} episodes: score (success rate)")
    print(f"{'env step':>10}" + "".join(f"{name:>20}" for name in policies))
    for row in rows:
        cells = [f"{s['eval/normalized_score']:.1f} ({s['eval/success_rate']:.1%})" if s else "-"
                 for s in (row[name] for name in policies)]
        print(f"{row['env_step']:>10}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"saved in {run.path}")
    return rows


# --- replay buffer ---
class ReplayBuffer:
    """Append-only transitions on the training device, as they came (raw rewards). One row holds all columns side by
    side, so that a batch is a single gather and an online step a single copy; no call waits for the device."""

    def __init__(self, data, online_steps, device):
        """data: {column: float32 array (n, ...)}, the offline data; room for online_steps more rows."""
        self.columns, self.width = {}, 0
        for name, value in data.items():
            size = value.shape[1] if value.ndim > 1 else 1
            self.columns[name] = slice(self.width, self.width + size) if value.ndim > 1 else self.width
            self.width += size
        self.obs_dim, self.act_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.offline_size, self.offline_episodes = len(data["rewards"]), int(data["episodes"].max(initial=-1)) + 1
        self.size, self.row = self.offline_size, np.empty(self.width, np.float32)
        capacity = self.offline_size + online_steps
        need = capacity * self.width * 4
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > 0.95 * free:
            fail(f"the replay buffer needs {need / 2**30:.2f} GiB for {capacity} transitions, {device} has "
                 f"{free / 2**30:.2f} GiB free; lower --online-steps or --data-subset, or use another device")
        self.data = torch.empty((capacity, self.width), device=device)
        for name, column in self.columns.items():
            self.data[: self.size, column] = torch.as_tensor(data[name]).to(device)

    def extend(self, rows):
        """Append rows (n, width)."""
        self.data[self.size : self.size + len(rows)] = torch.as_tensor(rows).to(self.data.device)
        self.size += len(rows)

    def add(self, **transition):
        """Append one transition; returns its row as bytes."""
        for name, column in self.columns.items():
            self.row[column] = transition[name]
        self.extend(self.row[None])
        return self.row.tobytes()

    def sample(self, batch_size, first=None, high=(), extra=0):
        """Rows (batch_size, width) drawn uniformly from the first `first` transitions (None: all), `extra` of them from
        the indices `high` instead."""
        rows = torch.randint(first or self.size, (batch_size - extra,), device=self.data.device)
        if extra:
            rows = torch.cat([rows, high[torch.randint(len(high), (extra,), device=self.data.device)]])
        return self.data.index_select(0, rows)

    def split(self, rows):
        """Views of the columns of rows (n, width): {column: (n,) or (n, dim)}."""
        return {name: rows[:, column] for name, column in self.columns.items()}

    def first(self, n):
        return self.split(self.data[:n])

    def last(self, n):
        """The last n online transitions, or as many as there are."""
        return self.split(self.data[max(self.offline_size, self.size - n) : self.size])


# --- environments and datasets ---
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
    return np.asarray(obs).astype(np.float32, casting="same_kind", copy=False)


def task_reward(task, next_obs, reward, goal=None):
    """(reward, success) of the paper's task for transitions into next_obs (..., obs_dim), reward as the package gives
    it (...). Kitchen's reward must already count tasks, sparse locomotion's be metres of x beyond the goal (the cheetah
    does not observe x). Formulas: D4RL, mj_envs and the official code."""
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
    else:
        locomotion = task.family in ("ant", "halfcheetah")
        success = reward > 0 if locomotion else np.linalg.norm(o[..., :2] - np.asarray(goal), axis=-1) <= GOAL_RADIUS
        return np.float64(success), success
    return success - 1.0, success


class TaskEnv(gym.Wrapper):
    """The paper's task: D4RL's observation, reward, termination (antmaze only, at the goal) and start states.
    Every reset(seed=...) depends on the seed alone. info["success"] is the success of this step."""

    def __init__(self, env, task):
        super().__init__(env)
        self.task, self.rng, self.goal, self.center = task, np.random.default_rng(0), None, None
        obs = flatten_observation(task, env.observation_space.sample())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        if task.goal_cell:
            self.center = env.unwrapped.maze.cell_rowcol_to_xy(np.array(task.goal_cell))
        if task.family == "antmaze":  # D4RL's noise: +-0.1 on position and joints, N(0, 0.1^2) on velocities
            env.unwrapped.position_noise_range, env.unwrapped.ant_env._reset_noise_scale = 0.0, 0.1
        elif task.family == "maze2d":
            env.unwrapped.position_noise_range = 0.1

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if self.task.goal_cell:
            self.goal, start = self.center, (1, 1)
            if self.task.family == "antmaze":  # D4RL draws the (unobserved) goal anew for each episode
                offset = self.rng.uniform(0, 1, 2) + self.rng.uniform(0, 0.5, 2)
                self.goal = self.center + offset * (1, -1)
            else:  # any free cell, the goal's included
                free = np.argwhere(self.free_cells())
                start = free[self.rng.integers(len(free))]
            options = {"goal_cell": np.array(self.task.goal_cell), "reset_cell": np.array(start)}
        obs, _ = self.env.reset(seed=seed, options=options)
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
        elif self.task.family in ("ant", "halfcheetah"):
            reward = info["x_position"] - self.task.goal_x
        reward, success = task_reward(self.task, obs, reward, self.goal)
        terminated = self.task.family == "antmaze" and bool(success)
        return obs, float(reward), terminated, truncated, {"success": bool(success)}

    def free_cells(self):
        """(rows, columns) of booleans: where a maze has no wall."""
        return np.array([[cell != 1 for cell in row] for row in self.unwrapped.maze.maze_map])

    def in_walls(self, positions):
        """(n,) of booleans: which positions (n, 2) lie in a wall of the maze, or outside it."""
        maze, free = self.unwrapped.maze, np.pad(self.free_cells(), 1)
        rows = np.floor((maze.y_map_center - positions[:, 1]) / maze.maze_size_scaling) + 1
        columns = np.floor((positions[:, 0] + maze.x_map_center) / maze.maze_size_scaling) + 1
        rows, columns = (np.clip(c, 0, n - 1).astype(int) for c, n in zip((rows, columns), free.shape, strict=True))
        return ~free[rows, columns]


def make_env(env_id, render_mode=None):
    """The task's environment; actions in [-1, 1]."""
    task = TASKS[env_id]
    with redirect_stderr(io.StringIO()):  # the package prints a notice about the sign that task_reward corrects
        try:
            import gymnasium_robotics
        except Exception:  # MUJOCO_GL names a back end that does not work here; only videos need one
            if render_mode:
                raise
            os.environ["MUJOCO_GL"] = "disable"
            import gymnasium_robotics

        gym.logger.min_level = gym.logger.ERROR
        gym.register_envs(gymnasium_robotics)
        env = gym.make(task.gym_id, max_episode_steps=task.horizon, render_mode=render_mode,
                       disable_env_checker=True, **task.kwargs)
    return TaskEnv(env, task)


def open_minari(dataset_id):
    """A Minari dataset from the local store, or downloaded if the server answers; else exit 2."""
    import minari

    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    try:
        if (root / dataset_id / "data").exists():
            return minari.load_dataset(dataset_id)
        import urllib.request

        from huggingface_hub import constants

        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()  # one quick try; minari itself retries for long
        with redirect_stderr(io.StringIO()):
            return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # the store, the server or the id can be wrong in many ways; what to do is the same
        fail(f"dataset {dataset_id} cannot be had from the store {root} or by download ({type(error).__name__}: "
             f"{error}); run `minari download {dataset_id}` where there is a network and set MINARI_DATASETS_PATH, or "
             "give --dataset-id or --dataset-path; or type `make run`, which makes its own small data")


def check_columns(source, obs_dim, act_dim, **columns):
    """The columns as float32 arrays of equal length; exit 2 for another length, rank or width, NaN or infinity."""
    widths = {"observations": (obs_dim,), "next_observations": (obs_dim,), "actions": (act_dim,)}
    n = len(columns["rewards"])
    for name, value in columns.items():
        shape = (n, *widths.get(name, ()))
        try:
            columns[name] = value = np.asarray(value).astype(np.float32, casting="same_kind", copy=False)
        except (TypeError, ValueError) as error:
            fail(f"{source}: {name} are not numbers ({error})")
        if value.shape != shape:
            fail(f"{source}: {name} have shape {value.shape}, beside {n} rewards it must be {shape}; give a dataset of "
                 "this task")
        if not np.isfinite(value).all():
            row = (~np.isfinite(value)).reshape(n, -1).any(1).argmax()
            fail(f"{source}: NaN or infinity in {name}, first in row {row}; remove it")
    return columns


def check_origin(dataset_id, dataset, env):
    """Exit 2 if the dataset's own description says that it is of another environment, or of another maze."""
    spec = dataset.spec.env_spec
    if spec is None:
        return
    base = env.task.gym_id.rpartition("-")[0]  # of which there are others that differ in goals, or pay densely
    walls = [[cell == 1 for cell in row] for row in spec.kwargs.get("maze_map", ())]
    same = re.fullmatch(rf"{base}(_\w+|Dense)?-v\d+", spec.id)
    if not same or walls and not np.array_equal(walls, ~env.free_cells()):
        fail(f"dataset {dataset_id} is of {spec.id}, this task is {env.task.gym_id}; give a dataset of it")


def read_minari(args, env, dataset_ids):
    """Columns of Minari datasets ('ID' or 'ID:N' episodes), episode after episode, rewards as stored (kitchen: counted
    from the goals). An episode that an earlier dataset already holds is not taken again."""
    task, episodes, seen = env.task, [], set()
    for spec in dataset_ids:
        dataset_id, _, limit = spec.partition(":")
        if limit and not re.fullmatch("[1-9][0-9]*", limit):
            fail(f"--dataset-id {spec}: what follows the colon must be a number of episodes")
        dataset = open_minari(dataset_id)
        taken, here = 0, set()
        try:
            check_origin(dataset_id, dataset, env)
            for episode in dataset.iterate_episodes():
                here.add(digest := hashlib.sha256(np.ascontiguousarray(episode.actions).tobytes()).digest())
                if digest in seen or (limit and taken >= int(limit)):
                    continue
                taken += 1
                observations, rewards = flatten_observation(task, episode.observations), episode.rewards
                if task.family == "kitchen":
                    achieved, desired = episode.observations["achieved_goal"], episode.observations["desired_goal"]
                    done = np.stack([np.linalg.norm(achieved[t] - desired[t], axis=-1)[1:] < 0.3
                                     for t in task.kwargs["tasks_to_complete"]])
                    rewards = (np.maximum.accumulate(done, axis=1) if args.kitchen_cumulative else done).sum(0)
                where = f"dataset {dataset_id}, episode {episode.id}"
                episodes.append(check_columns(
                    where, *env.observation_space.shape, *env.action_space.shape, observations=observations[:-1],
                    actions=episode.actions, rewards=rewards, next_observations=observations[1:],
                    episodes=np.full(len(rewards), len(episodes))))
        except Exception as error:  # h5py and pyarrow raise many kinds; another task's observations raise KeyError
            fail(f"dataset {dataset_id} cannot be read as data of {task.gym_id} ({type(error).__name__}: {error}); "
                 "give a dataset of this task")
        seen |= here
    if not episodes:
        fail(f"no episode in {' '.join(dataset_ids)}; give another --dataset-id")
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def read_npz(args, env):
    """Columns of an .npz with D4RL's keys. Episodes end at terminals and timeouts, or without timeouts where
    next_observations do not continue. Without next_observations the last step of an episode is dropped, as its
    successor was not recorded, unless it is a true terminal (antmaze)."""
    path, family = args.dataset_path, env.task.family
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(i.file_size for i in archive.infolist() if Path(i.filename).stem in D4RL_KEYS)
        if size > 0.5 * psutil.virtual_memory().available:
            fail(f"--dataset-path {path} needs {size / 2**30:.1f} GiB, too much for this machine; give a part of it")
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in D4RL_KEYS if name in file.files}
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        fail(f"--dataset-path {path} cannot be read as .npz without pickle ({type(error).__name__}: {error})")
    if missing := [name for name in D4RL_KEYS[:4] if name not in data]:
        fail(f"--dataset-path {path} has no {', '.join(missing)}; D4RL's keys are needed")
    if not {"timeouts", "next_observations"} & set(data):
        fail(f"--dataset-path {path} has neither timeouts nor next_observations: where episodes end cannot be told")
    for name, value in data.items():
        if name not in ("observations", "actions", "next_observations"):
            data[name] = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
        elif family == "kitchen" and name != "actions" and value.ndim == 2 and value.shape[1] == 60:
            data[name] = value[:, :30]  # D4RL appends the constant goal
    if any(np.ndim(data[name]) == 0 for name in data) or len(data["rewards"]) < 2:
        fail(f"--dataset-path {path} needs columns of 2 transitions or more")
    data = check_columns(path, *env.observation_space.shape, *env.action_space.shape, **data)
    observations, terminals, n = data["observations"], data["terminals"] > 0, len(data["rewards"])
    if "timeouts" in data:
        ends = terminals | (data["timeouts"] > 0)
    else:
        ends = terminals | np.append((data["next_observations"][:-1] != observations[1:]).any(1), True)
    if not ends[:-1].any() and n > env.task.horizon:
        fail(f"--dataset-path {path} marks no end of an episode in {n} transitions; {env.task.horizon} are one")
    keep = np.ones(n, bool)
    if "next_observations" not in data:
        data["next_observations"] = np.where(ends[:, None], observations, np.roll(observations, -1, 0))
        keep = ~ends | (terminals & (family == "antmaze"))
        keep[-1] &= ends[-1]
    data["episodes"] = np.append(0, np.cumsum(ends)[:-1]).astype(np.float32)
    names = ("observations", "actions", "rewards", "next_observations", "episodes")
    return {name: data[name][keep] for name in names}


D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


@np.errstate(over="ignore")  # what float32 cannot hold is infinite, and said
def load_dataset(args, env, seed):
    """The task's offline data, {column: float32 (n, ...)}, and a report. Columns: observations, actions, rewards (raw),
    next_observations, terminations, episodes. Order: read, check, truncate, relabel, subset (drawn by seed), remove
    discs."""
    task, npz = env.task, args.dataset_path
    source = npz or " + ".join(args.dataset_id or task.datasets)
    data = read_npz(args, env) if npz else read_minari(args, env, args.dataset_id or task.datasets)
    report = {"source": source, "transitions_read": len(data["rewards"])}
    if args.truncate_episodes:
        starts = np.flatnonzero(np.diff(data["episodes"], prepend=-1))
        position = np.arange(len(data["rewards"])) - np.repeat(starts, np.diff([*starts, len(data["rewards"])]))
        data = {name: value[position < args.truncate_episodes] for name, value in data.items()}
        report["removed_by_truncation"] = report["transitions_read"] - len(data["rewards"])
    if npz and task.family in ("kitchen", "hammer"):  # an .npz of D4RL has D4RL's dense rewards
        success = data["rewards"] >= (4 if task.family == "kitchen" else 50)
    else:
        goal = env.center if task.family != "antmaze" else env.center + ANTMAZE_DATA_GOAL_OFFSET
        rewards, success = task_reward(task, data["next_observations"], data["rewards"].astype(np.float64), goal)
        data["rewards"] = rewards.astype(np.float32)
    data["terminations"] = success.astype(np.float32) * (task.family == "antmaze")
    report["successful_episodes_before_removal"] = len(np.unique(data["episodes"][success]))
    if task.goal_cell:
        report["positions_in_walls"] = int(env.in_walls(data["observations"][:, :2]).sum())
        if report["positions_in_walls"]:
            print(f"warning: {source}: {report['positions_in_walls']} positions lie in walls or outside the maze; are "
                  "they in other coordinates than gymnasium-robotics'?", file=sys.stderr)
    if args.data_subset and args.data_subset < len(success):
        rng = np.random.default_rng(derive_seed(seed, "subset"))
        keep = rng.choice(len(success), args.data_subset, replace=False)
        data, success = {name: value[keep] for name, value in data.items()}, success[keep]
        report["subset"] = args.data_subset
    if args.remove_discs and env.task.goal_cell is None:
        fail(f"--remove-discs: {args.env_id} has no positions in a maze")
    for x, y, radius in args.remove_discs:
        keep = np.linalg.norm(data["observations"][:, :2] - np.float32([x, y]), axis=-1) > radius
        report.setdefault("removed_by_discs", []).append([x, y, radius, int((~keep).sum())])
        if keep.all():
            print(f"warning: --remove-discs {x:g} {y:g} {radius:g} removes nothing", file=sys.stderr)
        data, success = {name: value[keep] for name, value in data.items()}, success[keep]
    if not len(success):
        fail(f"{source}: nothing is left after truncation and removal; check --remove-discs and --truncate-episodes")
    clipped = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)
    report["actions_clipped"] = int((clipped != data["actions"]).any(1).sum())  # transitions
    data["actions"] = clipped
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(np.ascontiguousarray(data[name]))
    report |= {"transitions": len(success), "episodes": len(np.unique(data["episodes"])),
               "successful_episodes": len(np.unique(data["episodes"][success])),
               "reward_range": [float(data["rewards"].min()), float(data["rewards"].max())],
               "sha256": digest.hexdigest()}
    print(f"{args.env_id}: offline data")
    print(*(f"  {key.replace('_', ' ')}: {value}" for key, value in report.items()), sep="\n")
    return data, report


# === end shared block: tasks and data ===


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
