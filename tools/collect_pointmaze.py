"""Collect an offline dataset on one of the PointMaze environments and store it with Minari.

The recipe is D4RL's for maze2d: a waypoint PD controller (p 10, d -1) walks along shortest paths to random goals,
with Gaussian noise of standard deviation 0.5 on its actions. The task continues: an episode is truncated at its goal
or at the maze's horizon, and the next one starts in the state where it stopped, with a new goal. Only the first row of
the dataset follows a reset of the environment.

    python tools/collect_pointmaze.py
    python tools/collect_pointmaze.py --maze UMaze --steps 20000 --seed 1 --dataset-id ooo/pointmaze/umaze-small-v0

The data goes to the local Minari store: the folder named by MINARI_DATASETS_PATH, else ~/.minari/datasets. It is
written to a hidden folder of the store first and renamed when complete, so that an interrupted run leaves no dataset.
Only a kill that cannot be caught leaves that hidden folder (.collect_*) behind; Minari ignores it, delete it.
"""

import contextlib
import importlib.metadata
import io
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reproduce import expand_store, run_main  # noqa: E402

MAX_EPISODE_STEPS = {"UMaze": 300, "Medium": 600, "Large": 800}  # environment steps, D4RL's
P_GAIN, D_GAIN = 10.0, -1.0  # force per metre of distance to the waypoint, force per m/s of velocity
ACTION_NOISE = 0.5  # standard deviation, in units of the action range [-1, 1]
REACHED = 0.1  # metres; a waypoint this close counts as passed
JITTER = 0.1  # metres; waypoints are this far off their cell's centre, so that paths do not share one thin line
BYTES_PER_STEP = 200  # of the stored data; 184 were measured
WALL = 1  # value of a wall cell in the maze map


@dataclass
class Args:
    maze: Literal["UMaze", "Medium", "Large"] = "Large"
    """The data are of PointMaze_<maze>-v3."""
    steps: int = 500_000
    """Environment steps to record; exactly this many, the last episode is cut short."""
    seed: int = 0
    """Seed of the environment (start and goals) and of the action noise."""
    dataset_id: str = ""
    """Minari id to store the data under (default: ooo/pointmaze/<maze>-v0). Those of the published data are refused."""
    overwrite: bool = False
    """Replace a dataset of that id instead of keeping it."""


class WaypointController:
    """PD controller that follows the shortest path, cell by cell, to a goal position.

    Positions are (x, y) in metres, cells are (row, col). Plain floats, because NumPy would take most of a step's time.
    """

    def __init__(self, maze, rng):
        self.maze, self.rng = maze, rng
        self.centres = {
            (row, col): maze.cell_rowcol_to_xy((row, col))
            for row, line in enumerate(maze.maze_map)
            for col, value in enumerate(line)
            if value != WALL
        }

    def cell(self, x, y):
        """Cell that holds a position."""
        size = self.maze.maze_size_scaling
        return math.floor((self.maze.y_map_center - y) / size), math.floor((x + self.maze.x_map_center) / size)

    def set_goal(self, position, goal):
        """Aim for goal, starting from position."""
        self.goal, self.goal_cell = goal, self.cell(*goal)
        # Breadth-first search from the goal: for every cell, the next cell on the way there.
        self.next_cell, queue = {self.goal_cell: self.goal_cell}, deque([self.goal_cell])
        while queue:
            row, col = cell = queue.popleft()
            for neighbour in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
                if neighbour in self.centres and neighbour not in self.next_cell:
                    self.next_cell[neighbour] = cell
                    queue.append(neighbour)
        self.set_target(self.next_cell[self.cell(*position)])

    def set_target(self, cell):
        """Head for a cell: for the goal itself in the goal's cell, for a point near the centre in any other."""
        self.target_cell, self.waypoint = cell, self.goal
        if cell != self.goal_cell:
            self.waypoint = (self.centres[cell] + self.rng.uniform(-JITTER, JITTER, 2)).tolist()

    def follow_path(self, x, y):
        """Move the waypoint on when it is reached."""
        cell = self.cell(x, y)
        if cell == self.target_cell:
            if cell != self.goal_cell and math.hypot(self.waypoint[0] - x, self.waypoint[1] - y) < REACHED:
                self.set_target(self.next_cell[cell])
        elif self.next_cell[cell] != self.target_cell:
            self.set_target(self.next_cell[cell])  # noise or momentum carried it off the path: go on from here

    def act(self, observation):
        """Noisy action in [-1, 1], shape (2,), from observation (x, y, vx, vy) in m and m/s."""
        x, y, vx, vy = observation.tolist()
        self.follow_path(x, y)
        to_x, to_y = self.waypoint
        noise_x, noise_y = self.rng.normal(0.0, ACTION_NOISE, 2).tolist()
        # The controller saturates before the noise is added; otherwise noise would not show far from a waypoint.
        action_x = clip(P_GAIN * (to_x - x) + D_GAIN * vx) + noise_x
        action_y = clip(P_GAIN * (to_y - y) + D_GAIN * vy) + noise_y
        return np.array((clip(action_x), clip(action_y)), np.float32)


def clip(value):
    """The range of one action component."""
    return min(max(value, -1.0), 1.0)


def record_episode(env, obs, seed, controller, max_steps):
    """Walk from obs to its goal; returns the EpisodeBuffer and the last observation.

    env is the bare environment: time limit and goal changes are handled here. max_steps is in environment steps.
    Observations and infos have one row more than the other columns.
    """
    controller.set_goal(obs["achieved_goal"].tolist(), obs["desired_goal"].tolist())
    observations, successes, actions, rewards, success = [obs], [False], [], [], False
    while not success and len(actions) < max_steps:
        action = controller.act(obs["observation"])
        obs, reward, _, _, info = env.step(action)
        success = info["success"]
        observations.append(obs)
        successes.append(success)
        actions.append(action)
        rewards.append(reward)
    steps = len(actions)
    episode = EpisodeBuffer(
        seed=seed,
        observations={key: np.array([o[key] for o in observations]) for key in obs},
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(1, steps + 1) == steps,
        infos={"success": np.array(successes)},
    )
    return episode, obs


def make_maze(maze, **options):
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(f"PointMaze_{maze}-v3", continuing_task=True, max_episode_steps=MAX_EPISODE_STEPS[maze], **options)


def collect(env, horizon, steps, seed):
    """Episodes with `steps` environment steps in all, as a list of EpisodeBuffer."""
    env = env.unwrapped  # the wrapper's time limit counts from the only reset, not from the start of an episode
    controller = WaypointController(env.maze, np.random.default_rng(seed))
    obs, _ = env.reset(seed=seed)
    episodes, left, episode_seed = [], steps, seed
    with tqdm(total=steps, desc="collect", unit="step", unit_scale=True, mininterval=1.0) as bar:
        while left:
            episode, obs = record_episode(env, obs, episode_seed, controller, min(horizon, left))
            if not episode.infos["success"][-1]:  # at a goal the environment itself draws the next one
                env.goal = env.add_xy_position_noise(env.generate_target_goal())
                env.update_target_site_pos()
            # The last observation of an episode still shows the old goal; the next episode begins with the new one.
            obs = {**obs, "desired_goal": env.goal.copy()}
            episodes.append(episode)
            episode_seed = None  # only the first episode follows a seeded reset
            left -= len(episode.rewards)
            bar.update(len(episode.rewards))
    return episodes


@contextlib.contextmanager
def minari_root(path):
    """Make Minari use another store inside a with statement."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def store(args, env, episodes):
    """Write the episodes under args.dataset_id: into a hidden folder first, then renamed."""
    final = get_dataset_path(args.dataset_id)
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("gymnasium-robotics", "mujoco")]
    hidden = Path(tempfile.mkdtemp(prefix=".collect_", dir=get_dataset_path()))
    try:
        # Minari names the folder after the id, and the id is part of the metadata: so build in a store of its own.
        with minari_root(hidden), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(code_permalink|author_email).*", category=UserWarning)
            eval_env = make_maze(args.maze, reset_target=False)
            minari.create_dataset_from_buffers(
                args.dataset_id,
                episodes,
                env=env,
                eval_env=eval_env,
                algorithm_name="waypoint PD controller with action noise",
                author="tools/collect_pointmaze.py",
                description=f"D4RL's maze2d recipe on PointMaze_{args.maze}-v3: PD controller (p 10, d -1) along "
                "shortest paths to random goals, Gaussian action noise 0.5. Continuing task: an episode is truncated "
                f"at its goal or after {MAX_EPISODE_STEPS[args.maze]} steps and the next starts where it stopped. Seed "
                f"{args.seed}.",
                requirements=versions,
            )
            built = get_dataset_path(args.dataset_id)
        namespace = parse_dataset_id(args.dataset_id)[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
        if final.exists():
            final.rename(set_aside(final))
        built.rename(final)
    finally:
        restore(final)
        shutil.rmtree(hidden, ignore_errors=True)
    return final


def set_aside(final):
    """Where the dataset that --overwrite replaces lies until the new one is in its place."""
    return final.with_name(f".{final.name}.replaced")


def restore(final):
    """Back to one dataset: the new one, or the old one if the new one has not got there."""
    if not final.exists() and set_aside(final).exists():
        set_aside(final).rename(final)
    shutil.rmtree(set_aside(final), ignore_errors=True)


def refusal(args):
    """Why these arguments cannot be served, in one line, or None."""
    if args.dataset_id.lower().startswith("d4rl/"):
        return f"{args.dataset_id}: ids under D4RL/ belong to the published data, choose another --dataset-id"
    try:
        parse_dataset_id(args.dataset_id)
    except (ValueError, TypeError):  # TypeError: no version at the end
        return f"{args.dataset_id}: not a Minari id such as namespace/name-v0"
    for name, low, high in (("steps", 1, 10**9), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(args, name) <= high:
            return f"--{name} {getattr(args, name)} must be from {low} to {high}"
    store = os.environ.get("MINARI_DATASETS_PATH", "the Minari store")
    try:
        path = get_dataset_path(args.dataset_id)
        with tempfile.TemporaryFile(dir=get_dataset_path(), buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        return f"nothing can be written to {store} ({error.strerror}); set MINARI_DATASETS_PATH to another folder"
    # HDF5 crashes the process when a disk fills up, so look before.
    need, free = BYTES_PER_STEP * args.steps + 2**20, shutil.disk_usage(get_dataset_path()).free
    if free < need:
        return f"{store} has {free / 2**20:.1f} MiB free, {need / 2**20:.1f} are needed; make room, or lower --steps"
    if path.exists() and not is_stored(args) and not args.overwrite:
        return f"{path} exists but holds no readable dataset; --overwrite replaces it"
    return None


def is_stored(args):
    """Whether Minari can open a dataset of this id."""
    try:
        return minari.load_dataset(args.dataset_id).total_steps > 0
    except (OSError, ValueError, KeyError):
        return False


def main(args):
    args.dataset_id = args.dataset_id or f"ooo/pointmaze/{args.maze.lower()}-v0"
    expand_store()
    with contextlib.suppress(ValueError, TypeError, OSError):  # what is wrong with the id or the store is said below
        restore(get_dataset_path(args.dataset_id))  # after a kill that could not be caught
    if reason := refusal(args):
        print(f"collect_pointmaze: {reason}", file=sys.stderr)
        return 2
    if not args.overwrite and is_stored(args):
        print(f"{args.dataset_id}: exists in {get_dataset_path()}, kept (--overwrite replaces it)")
        return 0
    # Make a polite kill clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.time()
    with contextlib.redirect_stderr(io.StringIO()):  # the package prints a notice about other environments
        env = make_maze(args.maze, reset_target=True)
    episodes = collect(env, MAX_EPISODE_STEPS[args.maze], args.steps, args.seed)
    path = store(args, env, episodes)
    env.close()
    reached = sum(bool(episode.infos["success"][-1]) for episode in episodes)
    print(
        f"{args.dataset_id}: {args.steps} steps in {len(episodes)} episodes, {reached} reached their goal, "
        f"{time.time() - start:.0f} s, in {path}"
    )
    return 0


if __name__ == "__main__":
    run_main(lambda: sys.exit(main(tyro.cli(Args, description=__doc__))))
