"""Tiny Minari datasets for the tests: a few short episodes of the real environments, some states placed by hand.

Every dataset is made when a test first asks for it, in a store that the test session throws away, under the published
ids, so that the script finds it without further arguments. `episodes[id]` holds what was written.
"""

import warnings

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

gym.logger.min_level = gym.logger.ERROR
gym.register_envs(gymnasium_robotics)

ADROIT_STEPS, HAMMER_STEPS, KITCHEN_STEPS, MAZE_STEPS = 30, 25, 12, 40
KITCHEN_TASKS = {
    "partial": ["microwave", "kettle", "light switch", "slide cabinet"],
    "complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "mixed": ["microwave", "kettle", "bottom burner", "light switch"],
}


def roll_out(env, steps, seed, scale=1.0, **reset_options):
    """One episode of smoothed random actions: dict of observations (T+1), actions, rewards and infos."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed, **reset_options)
    observations, actions, rewards, action = [obs], [], [], np.zeros(env.action_space.shape)
    for _ in range(steps):
        action = np.clip(0.8 * action + scale * rng.normal(0, 0.4, env.action_space.shape), -1, 1)
        obs, reward, _, _, _ = env.step(action.astype(np.float32))
        observations.append(obs)
        actions.append(action.astype(np.float32))
        rewards.append(float(reward))
    return {"observations": stack(observations), "actions": np.array(actions), "rewards": np.array(rewards)}


def stack(observations):
    """A list of arrays, or of (nested) dicts of arrays, as one."""
    if isinstance(observations[0], dict):
        return {key: stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.array(observations, np.float64)


def buffer(episode):
    """An episode as Minari wants it; cut by a time limit, unless it says that it has terminated."""
    ends = np.arange(1, len(episode["rewards"]) + 1) == len(episode["rewards"])
    terminated = ends & episode.get("terminated", False)
    return EpisodeBuffer(observations=episode["observations"], actions=episode["actions"], rewards=episode["rewards"],
                         terminations=terminated, truncations=ends & ~terminated)


# === states placed by hand ===


def place_success(family, observations, index):
    """Let the success formula of an Adroit task hold at these indices of the observations (T+1, dim)."""
    if family == "pen":
        observations[index, 39:42] = 0.04  # norm 0.069 < 0.075
        observations[index, 33:36] = observations[index, 36:39] = (0.0, 0.6, 0.8)
    elif family == "door":
        observations[index, 28] = 1.35
    elif family == "relocate":
        observations[index, 36:39] = (0.0, 0.06, -0.06)
    else:
        raise ValueError(family)


def adroit(family):
    """Three demonstrations; the clones' file repeats them and adds two. First success of each: see place_success."""
    env = gym.make(f"AdroitHand{family.capitalize()}-v1")
    episodes = [roll_out(env, ADROIT_STEPS, seed) for seed in range(5)]
    for episode in episodes:
        if family == "door":
            episode["observations"][:, 28] = 0.0
    place_success(family, episodes[0]["observations"], [10, 11])
    place_success(family, episodes[3]["observations"], [0, ADROIT_STEPS])  # 0 is the successor of nothing
    place_success(family, episodes[4]["observations"], [0])
    return {f"D4RL/{family}/human-v2": episodes[:3], f"D4RL/{family}/cloned-v2": episodes}, env


def hammer():
    """Rewards as gymnasium-robotics gives them; a success in step 22 (from 0) of the second episode."""
    env = gym.make("AdroitHandHammer-v1")
    episodes = [roll_out(env, HAMMER_STEPS, seed) for seed in range(3)]
    episodes[1]["rewards"][22] += 100.0
    return {"D4RL/hammer/expert-v2": episodes}, env


def kitchen(kind):
    """Tasks are moved to their goals by hand: in episode 0 the first at observations 3 to 6 and the second from 5 on,
    in episode 1 all four from 9 on."""
    tasks = KITCHEN_TASKS[kind]
    env = gym.make("FrankaKitchen-v1", tasks_to_complete=tasks, remove_task_when_completed=False,
                   terminate_on_tasks_completed=False)
    episodes = [roll_out(env, KITCHEN_STEPS, seed, scale=0.2) for seed in range(2)]
    placed = [(0, tasks[0], slice(3, 7)), (0, tasks[1], slice(5, None)), *((1, task, slice(9, None)) for task in tasks)]
    for episode, task, where in placed:
        obs = episodes[episode]["observations"]
        obs["achieved_goal"][task][where] = obs["desired_goal"][task][where] + 0.1 / len(obs["desired_goal"][task][0])
    return {f"D4RL/kitchen/{kind}-v2": episodes}, env


def antmaze():
    """Episode 0 is moved on a straight line from the east into the middle of the goal area and stays there."""
    env = gym.make("AntMaze_Large_Diverse_GR-v4", continuing_task=True, reset_target=False)
    episodes = [roll_out(env, MAZE_STEPS, seed, scale=0.3) for seed in range(2)]
    fraction = np.minimum(np.arange(MAZE_STEPS + 1) / 30, 1)[:, None]
    episodes[0]["observations"]["achieved_goal"][:] = (14.75, -17.75) + fraction * (0, 5.0)
    return {"D4RL/antmaze/large-diverse-v1": episodes}, env


def small_maze(name, goal):
    """Episode 0 stays at the goal."""
    env = gym.make(f"PointMaze_{name}-v3", continuing_task=True, reset_target=True)
    episodes = [roll_out(env, MAZE_STEPS, seed) for seed in range(3)]
    obs = episodes[0]["observations"]
    obs["achieved_goal"][:] = obs["observation"][:, :2] = goal
    return {f"D4RL/pointmaze/{name.lower()}-v2": episodes}, env


def pointmaze():
    """Episode 0 is moved on a straight line from the goal to the west, episode 1 stays in the top left corner."""
    env = gym.make("PointMaze_Large-v3", continuing_task=True, reset_target=True)
    episodes = [roll_out(env, MAZE_STEPS, seed) for seed in range(3)]
    fraction = (np.arange(MAZE_STEPS + 1) / MAZE_STEPS)[:, None]
    for episode, path in ((0, (3.5, -3.0) + fraction * (-4.0, 0.0)), (1, (-4.5, 3.0) + fraction * (0.1, 0.1))):
        obs = episodes[episode]["observations"]
        obs["achieved_goal"][:] = obs["observation"][:, :2] = path
    return {"D4RL/pointmaze/large-v2": episodes}, env


MAKERS = {
    "pen-binary-v0": lambda: adroit("pen"),
    "door-binary-v0": lambda: adroit("door"),
    "relocate-binary-v0": lambda: adroit("relocate"),
    "kitchen-partial-v0": lambda: kitchen("partial"),
    "kitchen-mixed-v0": lambda: kitchen("mixed"),
    "kitchen-complete-v0": lambda: kitchen("complete"),
    "antmaze-goal-missing-large-v2": antmaze,
    "maze2d-missing-data-large-v1": pointmaze,
    "hammer-truncated-expert-v1": hammer,
    "maze2d-missing-data-umaze-v1": lambda: small_maze("UMaze", (-1.0, 1.0)),
    "maze2d-missing-data-medium-v1": lambda: small_maze("Medium", (2.5, -2.5)),
}


class TinyData:
    """The store. tiny(env_id) makes the datasets of a task, once, and returns their episodes: {id: [episode, ...]}."""

    def __init__(self, path):
        self.path, self.made = path, {}

    def __call__(self, env_id):
        if env_id not in self.made:
            self.made[env_id], env = MAKERS[env_id]()
            for dataset_id, episodes in self.made[env_id].items():
                self.write(dataset_id, episodes, env.observation_space, env.action_space)
            env.close()
        return self.made[env_id]

    def write(self, dataset_id, episodes, observation_space, action_space):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no author, no permalink, on purpose
            minari.create_dataset_from_buffers(dataset_id, [buffer(episode) for episode in episodes],
                                               observation_space=observation_space, action_space=action_space)
