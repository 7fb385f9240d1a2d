# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "gymnasium-robotics==1.4.2", "mujoco==3.3.7",
#     "minari[hdf5,hf]==0.5.4", "tyro==1.0.17"]
# ///
"""OOO (IQL) on one maze, from the data to the table of results. Read this file first.

Paper: Mark et al., Offline Retraining for Online RL, arXiv 2310.08558. IQL: arXiv 2110.06169. RND: arXiv 1810.12894.

    python tools/collect_pointmaze.py --maze Medium --steps 100000 --dataset-id ooo/pointmaze/medium-100k-v0   # once
    python nano_ooo.py --seed 3                                              # about 14 minutes on one CPU core

A ball is pushed to a goal in a maze. The offline data D_off have no transitions from around the goal. Online, a bonus
for new states (RND) leads the agent there. But a policy that is trained with the bonus goes on looking for new states,
and is poor at the task itself. So OOO trains two agents, both with IQL, an actor-critic that can learn from data alone:
  The explorer (optimistic) learns from reward + bonus, first on D_off, then online. It alone acts, and fills D_on.
  The exploiter (pessimistic) learns afterwards, from scratch, on D_off and D_on, without the bonus. You deploy it.
What helps, the bonus or the retraining? All is done twice: without the bonus, where the explorer is plain IQL, and with
it. For each the table has the policy that acted, and one retrained on its data. OOO is the last of the four rows.

iql_ooo.py computes the same numbers (tests/test_nano.py), and has the paper's tasks, settings and ablations.
"""

import time
import zlib

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from torch import nn

# === the task: D4RL's maze2d-medium ===
DATASET = "ooo/pointmaze/medium-100k-v0"  # walks between random places
OBS_DIM, ACT_DIM = 4, 2  # position and velocity; force
GOAL, GOAL_RADIUS = np.array([2.5, -2.5]), 0.5  # the reward is 1 in every step that ends within the radius, else 0
HOLE_RADIUS = 1.5  # transitions of the data that begin this near to the goal are left out
NEAR_CELLS = {(6, 6), (5, 6), (4, 6), (6, 5)}  # row, column: at most 2 cells from the goal's; other starts are far
HORIZON = 600  # steps of every episode: it does not end at the goal, the ball has to stay there
SCORE_0, SCORE_100 = 13.13, 277.39  # returns of a random and of an expert policy: D4RL's score 0 and 100

# === settings; the paper: networks of 256 units, lower rates, 500,000 / 500,000 / 2,000,000 steps ===
OFFLINE_STEPS = 3_000  # updates of the explorer on D_off
ONLINE_STEPS = 20_000  # steps of the explorer in the maze, with an update after each
RETRAIN_STEPS = 46_000  # updates of the exploiter, twice those of the explorer
LOG_EVERY = 3_000  # steps between lines of progress
EVAL_EPISODES, FINAL_EPISODES = 20, 100  # for a line of progress; for the table
BATCH_SIZE = 256
HIDDEN_DIMS = (128, 128)  # of policy, Q and V
LEARNING_RATE = 1e-3
GAMMA = 0.99  # discount
TAU = 0.02  # rate at which the target Q follows Q
REWARD_BIAS = -1.0  # added to every reward: -1 a step, 0 at the goal
EXPECTILE = 0.9  # IQL's tau: 0.5 is the mean over the actions of the data, close to 1 their maximum
TEMPERATURE = 3.0  # multiplies the advantage in the policy's weights
RND_DIMS = (256, 256)  # layers of RND's networks, the last one linear
RND_LEARNING_RATE = 1e-4
RND_UPDATE_PROPORTION = 0.25  # share of a batch that trains RND's predictor
INTRINSIC_REWARD_SCALE = 10.0  # factor of the bonus
UPSAMPLE = 8  # rows of each batch of the exploiter that are drawn from those with reward 1 (section 4.2)


# === networks ===
class Stack(nn.Module):
    """`num` MLPs of equal sizes side by side (the two Q networks in one product): (batch, in) -> (num, batch, out)."""

    def __init__(self, num, *dims):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(dims[:-1], dims[1:], strict=True):
            weights = [nn.init.orthogonal_(torch.empty(i, o), gain=2**0.5) for _ in range(num)]
            self.weights.append(torch.stack(weights))
            self.biases.append(torch.zeros(num, 1, o))

    def forward(self, *inputs):
        x = torch.cat(inputs, dim=-1).expand(len(self.weights[0]), -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, torch.relu(x) if i else x, weight)  # x @ weight + bias
        return x


class Agent:
    """The networks of an IQL agent, explorer or exploiter, and their optimisers."""

    def __init__(self):
        self.actor = Stack(1, OBS_DIM, *HIDDEN_DIMS, ACT_DIM)  # policy: Gaussian with mean tanh(actor(s)) and
        self.log_std = nn.Parameter(torch.zeros(ACT_DIM))  # a standard deviation that is the same in every state
        self.critic = Stack(2, OBS_DIM + ACT_DIM, *HIDDEN_DIMS, 1)
        self.critic_target = Stack(2, OBS_DIM + ACT_DIM, *HIDDEN_DIMS, 1).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.value = Stack(1, OBS_DIM, *HIDDEN_DIMS, 1)
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_std], LEARNING_RATE, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), LEARNING_RATE, fused=True)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), LEARNING_RATE, fused=True)

    @torch.no_grad()
    def act(self, obs, sample=False):
        """An action in [-1, 1] for one observation, numpy to numpy: a sample of the policy, or its mean."""
        mean = self.actor(torch.from_numpy(obs)[None])[0, 0].tanh()
        noise = self.log_std.clamp(-5.0, 2.0).exp() * torch.randn(ACT_DIM) if sample else 0.0
        return (mean + noise).clamp(-1.0, 1.0).numpy()


def minimize(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()  # each loss below reaches the networks of its own optimiser only
    optimizer.step()


# === RND: the bonus ===
class RND:
    """A predictor learns the outputs of a fixed random network. Where it is still wrong, a state is new."""

    def __init__(self):
        self.predictor, self.target = self.network(), self.network().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), RND_LEARNING_RATE, fused=True)
        self.obs_statistics = (torch.zeros(OBS_DIM).double(), torch.ones(OBS_DIM).double(), 1e-4)  # mean, variance, n
        self.reward_statistics = (torch.zeros(1).double(), torch.ones(1).double(), 1e-4)

    def network(self):
        first, last = nn.Linear(OBS_DIM, RND_DIMS[0]), nn.Linear(*RND_DIMS)
        for layer in (first, last):
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(first, nn.ReLU(), last)

    def update(self, observations, next_observations):
        """One step of the predictor. Returns the bonus for each of next_observations (batch,), and the loss."""
        mean, variance, _ = self.obs_statistics
        z = ((next_observations - mean.float()) / variance.sqrt().float()).clamp(-5.0, 5.0)
        # --- Predictor, on a random quarter of the batch ---
        some = z[torch.rand(len(z)) < RND_UPDATE_PROPORTION]
        loss = (self.predictor(some) - self.target(some)).square().mean(-1).mean()
        minimize(self.optimizer, loss)
        # --- Reward: largest squared error (official code; paper: their sum) / a running standard deviation ---
        errors = (self.predictor(z) - self.target(z)).detach().square().amax(-1)
        rewards = errors / self.reward_statistics[1].sqrt().float()
        self.reward_statistics = merge(self.reward_statistics, rewards[:, None])  # of divided rewards (official code)
        self.obs_statistics = merge(self.obs_statistics, observations)
        return INTRINSIC_REWARD_SCALE * rewards, loss.detach()


def merge(statistics, x):
    """Running (mean, variance, count) with the rows of x (n, dim) taken in: Chan's parallel formula, in float64."""
    (mean, variance, count), x, n = statistics, x.double(), len(x)
    total, delta = count + n, x.mean(0) - mean
    squares = variance * count + x.var(0, correction=0) * n + delta.square() * (count * n / total)
    return mean + delta * (n / total), squares / total, total


# === one update, of explorer and exploiter alike (paper eq. 1 to 3 are IQL's eq. 5 to 7) ===
def update(agent, rows, rnd=None, q_min=-np.inf, q_max=np.inf):
    """One gradient step on transitions (batch, width); returns the losses. The explorer has rnd, if the bonus is on.
    The exploiter has bounds of Q: no true value lies outside [least, largest reward of its data] / (1 - gamma)."""
    observations, actions, rewards, next_observations = rows.split([OBS_DIM, ACT_DIM, 1, OBS_DIM], dim=1)
    rewards, bonus, losses = rewards[:, 0] + REWARD_BIAS, 0.0, {}
    if rnd:
        bonus, losses["rnd"] = rnd.update(observations, next_observations)
    q_target = agent.critic_target(observations, actions)[..., 0]
    # --- V, IQL eq. 5: expectile regression to the smaller Q: V is near the largest Q of the data's actions in s ---
    diff = q_target.clamp(q_min, q_max).amin(0) - agent.value(observations)[0, :, 0]
    value_loss = (torch.where(diff > 0, EXPECTILE, 1.0 - EXPECTILE) * diff.square()).mean()
    minimize(agent.value_optimizer, value_loss)
    # --- Q, IQL eq. 6: regression of both to r + gamma V(s') + bonus. No transition is terminal in this task ---
    next_v, v = agent.value(torch.cat([next_observations, observations])).detach()[0, :, 0].chunk(2)
    target = (rewards + GAMMA * next_v).clamp(q_min, q_max) + bonus
    critic_loss = (agent.critic(observations, actions)[..., 0] - target).square().mean()
    minimize(agent.critic_optimizer, critic_loss)
    # --- Policy, IQL eq. 7: log pi(a|s) of the data's actions, weighted by exp(temperature * (Q - V)) ---
    weight = (TEMPERATURE * (q_target.amin(0) - v)).exp().clamp(max=100.0)
    log_std = agent.log_std.clamp(-5.0, 2.0)
    z = (actions - agent.actor(observations)[0].tanh()) / log_std.exp()
    log_prob = -(0.5 * z.square() + log_std + 0.5 * np.log(2 * np.pi)).sum(-1)
    actor_loss = -(weight * log_prob).mean()
    minimize(agent.actor_optimizer, actor_loss)
    # --- The target Q follows Q ---
    for slow, fast in zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
        slow.data.lerp_(fast.data, TAU)
    return losses | {"value": value_loss.detach(), "critic": critic_loss.detach(), "actor": actor_loss.detach()}


# === Algorithm 1 ===
def algorithm_1(name, use_rnd, seed, offline_data, env, eval_env):
    """Returns the explorer and the exploiter. Each step has a seed of its own, so that iql_ooo.py can be resumed."""
    n = len(offline_data)  # the data are rows (s, a, r, s'), those of D_off first; the bonus is never stored
    data = torch.cat([offline_data, torch.empty(ONLINE_STEPS, offline_data.shape[1])])
    torch.manual_seed(derive_seed(seed, "networks"))
    explorer, rnd = Agent(), RND() if use_rnd else None
    # --- Line 1: the explorer's update on D_off ---
    for step in range(OFFLINE_STEPS):
        torch.manual_seed(derive_seed(seed, "pretrain", step))
        losses = update(explorer, data[torch.randint(n, (BATCH_SIZE,))], rnd)
        progress(name, "pretrain", step + 1, losses, explorer, eval_env, seed)
    # --- Lines 2 to 6: the explorer acts, its transition goes to D_on, and it is updated on D_off and D_on ---
    for step in range(ONLINE_STEPS):
        if step % HORIZON == 0:
            obs, _ = env.reset(derive_seed(seed, "training episode", step // HORIZON))
        torch.manual_seed(derive_seed(seed, "online", step))
        action = explorer.act(obs, sample=True)
        next_obs, reward = env.step(action)
        data[n + step] = torch.from_numpy(np.concatenate([obs, action, [reward], next_obs]))
        obs = next_obs
        losses = update(explorer, data[torch.randint(n + step + 1, (BATCH_SIZE,))], rnd)
        progress(name, "online", step + 1, losses, explorer, eval_env, seed)
    # --- Last line: offline retraining. A new agent on D_off and D_on, without the bonus ---
    torch.manual_seed(derive_seed(seed, "retrain", ONLINE_STEPS))
    exploiter, rewards = Agent(), data[:, OBS_DIM + ACT_DIM]
    q_min, q_max = ((reward.item() + REWARD_BIAS) / (1 - GAMMA) for reward in (rewards.min(), rewards.max()))
    high_rows = (rewards == 1).nonzero()[:, 0]
    extra = UPSAMPLE if len(high_rows) else 0  # none if the explorer never reached the goal
    for step in range(RETRAIN_STEPS):
        torch.manual_seed(derive_seed(seed, "retrain", ONLINE_STEPS, step))
        rows = torch.randint(len(data), (BATCH_SIZE - extra,))
        if extra:
            rows = torch.cat([rows, high_rows[torch.randint(len(high_rows), (extra,))]])
        losses = update(exploiter, data[rows], None, q_min, q_max)
        progress(name, "retrain", step + 1, losses, exploiter, eval_env, seed)
    return explorer, exploiter


def derive_seed(seed, *place):
    words = [zlib.crc32(str(part).encode()) for part in place]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


# === environment, data, evaluation ===
class Maze:
    """As in D4RL: an episode starts in any free cell, at a small random velocity; reward 1 at the goal, else 0."""

    def __init__(self):
        self.env = gym.make("gymnasium_robotics:PointMaze_Medium-v3", continuing_task=True, reset_target=False)
        self.env.unwrapped.position_noise_range = 0.1  # of the start, within its cell
        self.free_cells = np.argwhere(np.array(self.env.unwrapped.maze.maze_map) == 0)

    def reset(self, seed):
        """The first observation, and whether the start is far from the goal."""
        rng = np.random.default_rng(seed)
        cell = self.free_cells[rng.integers(len(self.free_cells))]
        self.env.reset(seed=seed, options={"goal_cell": np.array([6, 6]), "reset_cell": cell})
        point = self.env.unwrapped.point_env
        point.set_state(point.data.qpos.copy(), 0.1 * rng.standard_normal(2))
        return np.concatenate([point.data.qpos, point.data.qvel]).astype(np.float32), tuple(cell) not in NEAR_CELLS

    def step(self, action):
        obs = self.env.step(action)[0]["observation"].astype(np.float32)
        return obs, float(np.linalg.norm(obs[:2] - GOAL, axis=-1) <= GOAL_RADIUS)


def load_offline_data():
    """D_off: float32 rows (s, a, r, s')."""
    if DATASET not in minari.list_local_datasets():
        raise SystemExit(f"no dataset {DATASET}; make it in the repository's folder: python tools/collect_pointmaze.py "
                         f"--maze Medium --steps 100000 --dataset-id {DATASET}")
    data = []
    for episode in minari.load_dataset(DATASET):
        obs = episode.observations["observation"].astype(np.float32)
        actions = episode.actions.clip(-1 + 1e-5, 1 - 1e-5)  # official code
        distance = np.linalg.norm(obs[:, :2] - GOAL, axis=-1)
        rows = np.column_stack([obs[:-1], actions, distance[1:] <= GOAL_RADIUS, obs[1:]])
        data.append(rows[distance[:-1] > HOLE_RADIUS])
    return torch.from_numpy(np.concatenate(data).astype(np.float32))


def evaluate(agent, env, episodes, seed):
    """The return of each episode of the policy's mean action (success: not 0), and whether it started far away."""
    returns, is_far = np.zeros(episodes), np.zeros(episodes, bool)
    for i in range(episodes):
        obs, is_far[i] = env.reset(derive_seed(seed, "evaluation", i))
        for _ in range(HORIZON):
            obs, reward = env.step(agent.act(obs))
            returns[i] += reward
    return returns, is_far


def progress(name, phase, step, losses, agent, env, seed):
    """A line now and then: success of the policy under training (the mean action), losses of the last update."""
    if step % LOG_EVERY == 0:
        returns, _ = evaluate(agent, env, EVAL_EPISODES, seed)
        words = "".join(f"  {key} {loss.item():<8.2g}" for key, loss in losses.items())
        print(f"{name:9}  {phase:8} {step:6,}  success {(returns > 0).mean():4.0%}  losses:{words}", flush=True)


def main(seed: int = 1):
    torch.set_num_threads(1)
    start, env, eval_env, offline_data = time.time(), Maze(), Maze(), load_offline_data()
    table = ["data of    policy      success: all starts  far starts  D4RL's score"]
    for name in ("IQL", "IQL + RND"):
        agents = algorithm_1(name, name == "IQL + RND", seed, offline_data, env, eval_env)
        for policy, agent in zip(("that acted", "retrained"), agents, strict=True):
            returns, is_far = evaluate(agent, eval_env, FINAL_EPISODES, derive_seed(seed, "final"))
            success, far_success = (returns > 0).mean(), (returns[is_far] > 0).mean()
            score = 100 * (returns.mean() - SCORE_0) / (SCORE_100 - SCORE_0)
            table.append(f"{name:9}  {policy:10}  {success:19.0%}  {far_success:10.0%}  {score:12.1f}")
    print(f"\nseed {seed}, {FINAL_EPISODES} episodes of each policy, {(time.time() - start) / 60:.1f} minutes",
          *table, sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
