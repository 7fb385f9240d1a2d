"""The tasks on today's packages: shapes, horizons, start states, rewards, success and termination.

Expected values come from the simulator's state or from the package's own info, not from the script's formulas. To see
a success, the simulator is put into a state: a nail driven in, a door opened, a kettle moved.
"""

import functools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
from tiny_data import KITCHEN_TASKS

import iql_ooo as ooo

TASKS = {  # observation and action dimensions, horizon
    "pen-binary-v0": (45, 24, 100),
    "door-binary-v0": (39, 28, 200),
    "relocate-binary-v0": (39, 30, 200),
    "hammer-truncated-expert-v1": (46, 26, 200),
    "kitchen-partial-v0": (30, 9, 1000),
    "kitchen-mixed-v0": (30, 9, 1000),
    "kitchen-complete-v0": (30, 9, 1000),
    "antmaze-goal-missing-large-v2": (29, 8, 1000),
    "maze2d-missing-data-large-v1": (4, 2, 800),
    "maze2d-missing-data-medium-v1": (4, 2, 600),
    "maze2d-missing-data-umaze-v1": (4, 2, 300),
}
MAZES = {  # D4RL's goal, the number of free cells, its center, D4RL's scores of 0 and 100
    "maze2d-missing-data-large-v1": ((7, 9), 46, (3.5, -3.0), (6.7, 273.99)),
    "maze2d-missing-data-medium-v1": ((6, 6), 26, (2.5, -2.5), (13.13, 277.39)),
    "maze2d-missing-data-umaze-v1": ((1, 1), 7, (-1.0, 1.0), (23.85, 161.86)),
}
BINARY = ("pen-binary-v0", "door-binary-v0", "relocate-binary-v0")
KITCHENS = tuple(env_id for env_id in TASKS if env_id.startswith("kitchen"))
ANT, POINT, HAMMER = "antmaze-goal-missing-large-v2", "maze2d-missing-data-large-v1", "hammer-truncated-expert-v1"
each_task = pytest.mark.parametrize("env_id", TASKS)


@functools.cache
def environment(env_id):
    """One environment for all tests of a task: a test must not depend on what was done in it before."""
    return ooo.make_env(env_id)


def still(env):
    return np.zeros(env.action_space.shape, np.float32)


def wander(env, steps, seed):
    rng = np.random.default_rng(seed)
    return [env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)) for _ in range(steps)]


class Inner:
    """What the package itself returned for the last step, underneath the script's wrapper."""

    def __init__(self, env, monkeypatch):
        self.step = env.env.step
        monkeypatch.setattr(env.env, "step", self.record)

    def record(self, action):
        result = self.step(action)
        self.obs, self.reward, self.terminated, self.truncated, self.info = result
        return result


# === all tasks ===


def test_these_are_all_tasks():
    assert set(TASKS) == set(ooo.TASKS)
    assert all(task.datasets for task in ooo.TASKS.values())


@each_task
def test_shapes(env_id):
    env, (obs_dim, act_dim, horizon) = environment(env_id), TASKS[env_id]
    obs, info = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (obs_dim,) and obs.dtype == np.float32
    assert env.action_space.shape == (act_dim,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == horizon
    assert info["success"] is False and set(info) - {"start_distance"} == {"success"}
    assert ("start_distance" in info) == (env_id == ANT or env_id in MAZES)
    obs, reward, terminated, truncated, info = env.step(still(env))
    assert obs.shape == (obs_dim,) and obs.dtype == np.float32
    assert type(reward) is float and (terminated, truncated) == (False, False)
    assert set(info) == {"success"} and type(info["success"]) is bool


@pytest.mark.parametrize("env_id", [env_id for env_id in TASKS if env_id not in KITCHENS])  # too slow: spec above
def test_episodes_end_at_the_horizon_and_not_before(env_id):
    env, horizon = environment(env_id), TASKS[env_id][2]
    env.reset(seed=1)
    for step in range(1, horizon + 1):
        _, _, terminated, truncated, _ = env.step(still(env))
        assert not terminated
        assert truncated == (step == horizon)


@each_task
def test_start_depends_on_the_seed_alone(env_id):
    """After any use, in any instance: also the ten steps after the reset, in which hidden state would show."""
    env, fresh = environment(env_id), ooo.make_env(env_id)

    def trajectory(env):
        first, _ = env.reset(seed=5)
        return np.array([first, *(step[0] for step in wander(env, 10, 0))])

    env.reset(seed=3)
    wander(env, 7, 1)
    one = trajectory(env)
    env.reset()
    env.reset(seed=6)
    wander(env, 3, 2)
    two = trajectory(env)
    assert (one == two).all() and (one == trajectory(fresh)).all()
    other, _ = env.reset(seed=6)
    assert (other != one[0]).any()
    fresh.close()


# === Adroit ===


def test_the_installed_package_has_the_sign_and_the_version_that_are_corrected(monkeypatch):
    """gymnasium-robotics 1.2.1 to 1.4.2 add 0.1 |palm - hammer| to the dense reward; others subtract it, as D4RL does,
    and 1.4.3 has v2 alone. With such a package task_reward would correct a sign that is right."""
    env = environment(HAMMER)
    for env_id in (*BINARY, HAMMER):
        assert ooo.TASKS[env_id].gym_id in gym.registry, "this gymnasium-robotics has other Adroit environments"
    inner, rng = Inner(env, monkeypatch), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(20):
        env.step(rng.uniform(-1, 1, 26).astype(np.float32))
        subtracted, distance = d4rl_hammer_reward(env.unwrapped)
        weight = (inner.reward - subtracted) / distance - 0.1
        assert distance > 0.01 and weight == pytest.approx(0.1, abs=1e-4), (
            f"the dense hammer reward has {weight:+.1f} |palm - hammer|: take the correction out of task_reward")


def succeed(env_id, env):
    """Put the simulator into a state in which the task is solved."""
    sim = env.unwrapped
    if env_id == "door-binary-v0":
        qpos = sim.data.qpos.copy()
        qpos[sim.door_hinge_addrs] = 1.45
        sim.set_state(qpos, sim.data.qvel * 0)
    elif env_id == "relocate-binary-v0":
        sim.model.site_pos[sim.target_obj_site_id] = sim.data.xpos[sim.obj_body_id]
    else:  # the pen already lies in the hand: turn the wanted orientation to its own
        sim.model.body_quat[sim.target_obj_body_id] = sim.data.xquat[sim.obj_body_id]


@pytest.mark.parametrize("env_id", BINARY)
def test_binary_reward_is_the_package_success(env_id, monkeypatch):
    env = environment(env_id)
    inner, seen = Inner(env, monkeypatch), []
    for seed in range(4):
        env.reset(seed=seed)
        if seed % 2:
            succeed(env_id, env)
        for action in [still(env)] * 5 + [env.action_space.high] * 20:
            _, reward, terminated, _, info = env.step(action)
            assert reward in (-1.0, 0.0) and reward == info["success"] - 1.0
            assert info["success"] == bool(inner.info["success"])
            assert not terminated
            seen.append(info["success"])
    assert True in seen and False in seen


def test_pen_goes_on_when_it_is_dropped():
    env = environment("pen-binary-v0")
    env.reset(seed=0)
    sim = env.unwrapped
    qpos = sim.data.qpos.copy()
    qpos[-6:-3] += (0.3, 0.3, 0.0)  # beside the hand
    sim.set_state(qpos, sim.data.qvel * 0)
    heights, ends = [], []
    for _ in range(60):
        obs, _, terminated, _, _ = env.step(still(env))
        heights.append(obs[26])
        ends.append(terminated)
    assert min(heights) < 0.075 and not any(ends)  # where D4RL's dense pen environment ends the episode


def d4rl_hammer_reward(sim):
    """D4RL's dense formula from the simulator's state."""
    data = sim.data
    palm, head = data.site("S_grasp").xpos, data.site("tool").xpos
    nail, goal = data.site("S_target").xpos, data.site("nail_goal").xpos
    hammer = data.body("Object").xpos
    depth = np.sqrt(((nail - goal) ** 2).sum())
    reward = -0.1 * np.sqrt(((palm - hammer) ** 2).sum()) - np.sqrt(((head - nail) ** 2).sum()) - 10 * depth
    reward -= 0.01 * np.sqrt((data.qvel**2).sum())
    reward += 2.0 * (hammer[2] > 0.04 and head[2] > 0.04) + 25.0 * (depth < 0.02) + 75.0 * (depth < 0.01)
    return reward, np.sqrt(((palm - hammer) ** 2).sum())


def test_hammer_reward_is_d4rls():
    env = environment(HAMMER)
    env.reset(seed=0)
    rng, distances = np.random.default_rng(0), []
    for _ in range(60):
        _, reward, _, _, _ = env.step(rng.uniform(-1, 1, 26).astype(np.float32))
        want, distance = d4rl_hammer_reward(env.unwrapped)
        assert reward == pytest.approx(want, abs=1e-5)
        distances.append(distance)
    assert max(distances) > 0.05  # so that the sign was seen


def test_hammer_success_is_the_package_success(monkeypatch):
    """The nail is put at many depths, close to the limit of 0.01 and far from it, with the hand moving or not."""
    env = environment(HAMMER)
    inner, seen = Inner(env, monkeypatch), []
    sim = env.unwrapped
    nail = sim.model.joint("nail_dir").qposadr[0]
    for number, depth in enumerate(np.concatenate([np.linspace(0.0, 0.09, 12), np.linspace(0.07, 0.09, 25)])):
        env.reset(seed=number)
        qpos, qvel = sim.data.qpos.copy(), sim.data.qvel.copy()
        qpos[nail] = depth
        qvel[:26] = 30.0 * (number % 2)  # a violent hand costs reward, and must not hide the success
        sim.set_state(qpos, qvel)
        _, reward, terminated, _, info = env.step(still(env))
        assert info["success"] == bool(inner.info["success"]) == (reward > 50)
        assert reward == pytest.approx(d4rl_hammer_reward(sim)[0], abs=1e-5) and not terminated
        seen.append((info["success"], reward > 20))
    assert set(seen) == {(True, True), (False, True), (False, False)}  # in, almost in (+25), out


# === kitchen ===


def move_to_goal(sim, task, on=True):
    """Put the joints of one kitchen task to its goal, or back to where they start."""
    robot, where = sim.robot_env, OBS_ELEMENT_INDICES[task]
    qpos, qvel = robot.data.qpos.copy(), robot.data.qvel * 0
    qpos[where] = OBS_ELEMENT_GOALS[task] if on else robot.init_qpos[where]
    robot.set_state(qpos, qvel)


@pytest.mark.parametrize("env_id", KITCHENS)
def test_kitchen_reward_counts_completed_tasks(env_id):
    env = environment(env_id)
    tasks = KITCHEN_TASKS[env_id.split("-")[1]]
    foreign = next(task for task in OBS_ELEMENT_GOALS if task not in tasks)
    env.reset(seed=0)
    rewards, wanted = [], []
    for task, count in [(None, 0), (foreign, 0), *zip(tasks, (1, 2, 3, 4), strict=True)]:
        if task:
            move_to_goal(env.unwrapped, task)
        _, reward, terminated, truncated, info = env.step(still(env))
        rewards.append(reward)
        wanted.append(float(count))
        assert info["success"] == (count == 4) and not terminated and not truncated
    assert rewards == wanted
    for task in tasks:  # undone, but completed once
        move_to_goal(env.unwrapped, task, on=False)
    for _ in range(2):
        _, reward, terminated, _, info = env.step(still(env))
        assert (reward, terminated, info["success"]) == (4.0, False, True)
    env.reset(seed=0)
    assert env.step(still(env))[1] == 0.0


def test_kitchen_observation():
    """D4RL's vector without its constant goal: robot positions (9), object positions (21); noise of the old level."""
    env = environment("kitchen-mixed-v0")
    differences = []
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        differences.append(obs - env.unwrapped.robot_env.data.qpos)
    spread = np.abs(differences).max(0)
    assert 0.005 < spread[:9].max() <= 0.0101  # 0.1 x 0.1 rad; the package's default is a tenth of it
    assert 0.001 < spread[9:].max() <= 0.0101  # the package's default is 1/200 of it


# === mazes ===


def test_antmaze_start_and_goal():
    env = environment(ANT)
    goals, starts, joints, speeds = [], [], [], []
    for seed in range(60):
        obs, _ = env.reset(seed=seed)
        sim = env.unwrapped.ant_env.data
        np.testing.assert_allclose(obs, np.concatenate([sim.qpos, sim.qvel]), rtol=1e-6)  # D4RL's order, no goal
        goals.append(env.goal)
        starts.append(obs[:2] - (-18.0, 12.0))
        joints.append(obs[7:15] - env.unwrapped.ant_env.init_qpos[7:])
        speeds.append(obs[15:])
    goals = np.array(goals)
    assert (goals >= (14.0, -13.5)).all() and (goals <= (15.5, -12.0)).all()
    assert np.abs(goals.mean(0) - (14.75, -12.75)).max() < 0.2 and goals.std(0).min() > 0.2
    for noise in (starts, joints):
        assert 0.09 < np.abs(noise).max() <= 0.1 + 1e-5
    assert 0.08 < np.std(speeds) < 0.12


def test_antmaze_terminates_at_the_goal_only():
    env, seen = environment(ANT), []
    for number, distance in enumerate([0.0, 0.3, 0.44, 0.47, 0.49, 0.51, 0.55, 0.9, 3.0]):
        env.reset(seed=number)
        ant, angle = env.unwrapped.ant_env, number
        qpos = ant.data.qpos.copy()
        qpos[:2] = env.goal + distance * np.array([np.cos(angle), np.sin(angle)])
        ant.set_state(qpos, ant.data.qvel * 0)
        obs, reward, terminated, truncated, info = env.step(still(env))
        near = bool(np.hypot(*(obs[:2] - env.goal)) <= 0.5)
        assert (terminated, reward, info["success"]) == (near, float(near), near) and not truncated
        seen.append(near)
    assert set(seen) == {True, False}


def test_antmaze_goes_on_when_the_ant_falls():
    env = environment(ANT)
    env.reset(seed=0)
    ant = env.unwrapped.ant_env
    qpos = ant.data.qpos.copy()
    qpos[2:7] = (0.3, 0.0, 1.0, 0.0, 0.0)  # on its back
    ant.set_state(qpos, ant.data.qvel * 0)
    for _ in range(10):
        _, reward, terminated, truncated, _ = env.step(still(env))
        assert (reward, terminated, truncated) == (0.0, False, False)


@pytest.mark.parametrize("env_id", MAZES)
def test_maze2d_starts_everywhere(env_id):
    env, (goal, cells, center, scores) = environment(env_id), MAZES[env_id]
    maze = env.unwrapped.maze
    free = {(row, col) for row, line in enumerate(maze.maze_map) for col, cell in enumerate(line) if cell != 1}
    assert len(free) == cells and goal in free and env.task.score == ("return", *scores)
    seen, speeds, offsets = set(), [], []
    for seed in range(10 * cells):
        obs, _ = env.reset(seed=seed)
        cell = tuple(int(i) for i in maze.cell_xy_to_rowcol(obs[:2]))
        seen.add(cell)
        offsets.append(obs[:2] - (cell[1] + 0.5 - maze.map_width / 2, maze.map_length / 2 - cell[0] - 0.5))
        speeds.append(obs[2:])
        point = env.unwrapped.point_env.data
        np.testing.assert_allclose(obs, np.concatenate([point.qpos, point.qvel]), rtol=1e-6)
        assert env.goal.tolist() == list(center)
    assert seen == free
    assert 0.09 < np.abs(offsets).max() <= 0.1 + 1e-6
    assert 0.08 < np.std(speeds) < 0.12 and abs(np.mean(speeds)) < 0.03


def shortest_paths(maze_map, goal):
    """{free cell: steps to the goal}, by relaxing all cells until nothing changes."""
    free = np.array([[cell != 1 for cell in line] for line in maze_map])
    steps = np.where(free, np.inf, np.nan)
    steps[goal] = 0
    for _ in range(free.size):
        padded = np.pad(steps, 1, constant_values=np.nan)
        around = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        around = np.where(np.isnan(around), np.inf, around).min(0) + 1
        steps = np.where(free, np.minimum(np.where(free, steps, 0), around), np.nan)
    return {tuple(map(int, cell)): int(steps[tuple(cell)]) for cell in np.argwhere(free)}


@pytest.mark.parametrize("env_id", MAZES)
def test_start_distance_is_the_shortest_path_from_where_the_point_starts(env_id):
    env, goal = environment(env_id), MAZES[env_id][0]
    maze = env.unwrapped.maze
    want, seen = shortest_paths(maze.maze_map, goal), {}
    for seed in range(6 * len(want)):
        obs, info = env.reset(seed=seed)
        # The position decides, not what the script asked for.
        cell = (int(np.floor(maze.map_length / 2 - obs[1])), int(np.floor(obs[0] + maze.map_width / 2)))
        assert info["start_distance"] == want[cell] and type(info["start_distance"]) is int
        seen[cell] = want[cell]
    assert min(seen.values()) == 0 and len(seen) > 0.9 * len(want)
    if "umaze" in env_id:  # three cells above, one at the bend, three below
        assert want == {(1, 1): 0, (1, 2): 1, (1, 3): 2, (2, 3): 3, (3, 3): 4, (3, 2): 5, (3, 1): 6}


def test_start_distance_of_antmaze():
    """Always the same start: around the walls of the large maze."""
    env = environment(ANT)
    want = shortest_paths(env.unwrapped.maze.maze_map, (7, 9))[1, 1]
    assert {env.reset(seed=seed)[1]["start_distance"] for seed in range(3)} == {want} and want >= 14


def test_which_starts_are_far():
    far = {env_id: task.far for env_id, task in ooo.TASKS.items() if task.goal_cell}
    assert far == {ANT: 2, **{env_id: 1 if "umaze" in env_id else 2 for env_id in MAZES}}


def test_maze2d_reward_and_no_termination():
    env = environment(POINT)
    env.reset(seed=0)
    point, seen = env.unwrapped.point_env, []
    for number, distance in enumerate(np.linspace(0.0, 0.9, 40)):
        point.set_state(np.array([3.5, -3.0]) + distance * np.array([np.cos(number), np.sin(number)]), np.zeros(2))
        obs, reward, terminated, truncated, info = env.step(still(env))
        near = bool(np.hypot(obs[0] - 3.5, obs[1] + 3.0) <= 0.5)
        assert (reward, info["success"]) == (float(near), near)
        assert not terminated and not truncated
        seen.append((near, np.hypot(obs[0] - 3.5, obs[1] + 3.0) > 0.45))
    assert set(seen) == {(True, False), (True, True), (False, True)}  # 0.5 is D4RL's; the package has 0.45


# === evaluation ===


class Countdown:
    """An environment of three steps whose start is drawn from the seed; success in the middle step only."""

    task = ooo.TASKS["pen-binary-v0"]

    def __init__(self):
        self.starts = []

    def reset(self, seed):
        self.left = 3
        self.starts.append(np.random.default_rng(seed).normal())
        return np.array([self.starts[-1]]), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1), [-1.0, 5.0, 2.0][self.left] + action, False, self.left == 0, {"success": self.left == 1}


def player(act):
    return SimpleNamespace(act=act)


def test_evaluation():
    env = Countdown()
    results, summary = ooo.evaluate(env, player(lambda obs: 0.5), 4, seed=7)
    assert results == [{"return": 7.5, "length": 3, "success": True, "max_reward": 5.5}] * 4
    assert summary == {"eval/return": 7.5, "eval/success_rate": 1.0, "eval/normalized_score": 100.0, "eval/episodes": 4}
    assert len(set(env.starts)) == 4
    ooo.evaluate(env, player(lambda obs: 9.0), 4, seed=7)  # another policy meets the same starts
    ooo.evaluate(env, player(lambda obs: 0.5), 4, seed=8)
    assert env.starts[4:8] == env.starts[:4] and not set(env.starts[8:]) & set(env.starts[:4])


class Maze(Countdown):
    """Episodes of three steps that start at these distances; success in those of an even number."""

    def __init__(self, env_id, distances):
        super().__init__()
        self.task, self.distances = ooo.TASKS[env_id], list(distances)
        self.number = -1

    def reset(self, seed):
        self.number += 1
        return super().reset(seed)[0], {"success": False, "start_distance": self.distances[self.number]}

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"success": self.number % 2 == 0}


@pytest.mark.parametrize(
    ("env_id", "distances", "far"),
    [
        ("maze2d-missing-data-umaze-v1", [0, 1, 2, 3, 4, 6], 0.5),  # episodes 2 to 5
        ("maze2d-missing-data-umaze-v1", [6, 1, 2, 0, 1, 1], 1.0),
        ("maze2d-missing-data-medium-v1", [0, 1, 2, 3, 2, 6], 0.0),
        (POINT, [3, 9, 2, 3], 1 / 3),
        (ANT, [14, 14], 0.5),
        (POINT, [0, 1, 2, 2], None),  # no far start: nothing to say
    ],
)
def test_success_from_far_starts(env_id, distances, far):
    results, summary = ooo.evaluate(Maze(env_id, distances), player(lambda obs: 0.0), len(distances), seed=1)
    assert [episode["start_distance"] for episode in results] == distances
    assert summary.get("eval/far_success_rate") == (far if far is None else pytest.approx(far))
    assert summary["eval/success_rate"] == pytest.approx(np.mean([number % 2 == 0 for number in range(len(distances))]))


def test_what_a_policy_draws_in_evaluation_depends_on_seed_and_episode():
    """Whatever was drawn before, and however many episodes there are."""

    def draws(episodes, seed=7):
        seen = []
        torch.rand(episodes)
        ooo.evaluate(Countdown(), player(lambda obs: seen.append(torch.rand(1).item()) or 0.0), episodes, seed)
        return seen

    assert draws(3)[:6] == draws(2) and len(set(draws(3))) == 9
    assert not set(draws(2)) & set(draws(2, seed=8))


def test_starts_of_training_curves_final_evaluation_and_eval_only_differ(monkeypatch, in_tmp):
    """Those of a kind are the same for every policy and at every time."""
    env, agent, starts = Countdown(), player(lambda obs: 0.0), {}
    args = ooo.Args(eval_episodes=20, final_episodes=50)
    run = SimpleNamespace(args=args, log=lambda *where, **what: None, progress={"scores": {}})

    def played(kind, function, *options):
        env.starts.clear()
        function(*options)
        assert starts.setdefault(kind, set(env.starts)) == set(env.starts)

    for step in (0, 100):
        played("curve", ooo.evaluate_and_log, run, env, agent, "online", step, step)
    for policy in ("exploration 100", "exploitation 100"):
        played("final", ooo.final_evaluation, run, env, agent, policy)
        assert len(run.progress["scores"][policy]["per_episode"]) == 50
    monkeypatch.setattr(ooo, "make_env", lambda *_: env)
    monkeypatch.setattr(ooo, "load_policy", lambda path: agent)
    monkeypatch.setattr(ooo, "read_config", lambda folder: {"run_id": "1"})
    monkeypatch.setattr(ooo, "load_torch", lambda *_: None)
    (in_tmp / "exploitation_100.pt").touch()
    args.eval_only = "."
    played("eval-only", ooo.evaluate_saved, args, ("exploitation",))
    starts["training"] = {np.random.default_rng(ooo.derive_seed(1, "training episode", i)).normal() for i in range(500)}
    assert {kind: len(found) for kind, found in starts.items()} == {
        "curve": 20, "final": 50, "eval-only": 20, "training": 500}
    assert len(set.union(*starts.values())) == 590


# === one's own task (docs/tasks.md; tests/test_method.py trains on its examples) ===


class Car(gym.Env):
    """Ends at x = 1 with success, which info says under one of the usual names; actions of an odd range."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-3, 0]), np.float32([1, 10]))

    def __init__(self, key="success", render_mode=None):
        self.key = key

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.1, 0.1)
        return np.array([self.x, 0]), {}

    def step(self, action):
        self.action = action
        self.x += 0.1
        done = self.x >= 1
        return np.array([self.x, 0]), 2.5, done, False, {self.key: done} if self.key else {}


@pytest.mark.parametrize("key", ["success", "is_success", None])
def test_an_environment_of_ones_own(monkeypatch, key):
    """Its reward, terminations and success are the environment's; the score is the return."""
    monkeypatch.setitem(gym.registry, "Car-v0", gym.envs.registration.EnvSpec("Car-v0", Car))
    monkeypatch.setitem(ooo.TASKS, "car-v0", ooo.Task("own", "Car-v0", 50, (), dict(key=key), {}))
    env = ooo.make_env("car-v0")
    assert env.action_space == gym.spaces.Box(-1, 1, (2,)) and env.spec.max_episode_steps == 50
    obs, info = env.reset(seed=3)
    assert obs.dtype == np.float32 and info == {"success": False} and (env.reset(seed=3)[0] == obs).all()
    for action, wanted in (([-1, -1], [-3, 0]), ([1, 1], [1, 10]), ([0, 0.5], [-1, 7.5])):
        env.step(np.float32(action))
        np.testing.assert_allclose(env.unwrapped.action, wanted, rtol=1e-6)
    results, summary = ooo.evaluate(env, player(lambda obs: np.zeros(2, np.float32)), 3, seed=1)
    for episode in results:
        assert 8 < episode["length"] < 13 and episode["return"] == 2.5 * episode["length"]
        assert episode["success"] is (key is not None)
    assert summary["eval/normalized_score"] == pytest.approx(summary["eval/return"])
    env = ooo.make_env("car-v0")
    monkeypatch.setitem(ooo.TASKS, "car-v0", ooo.TASKS["car-v0"]._replace(horizon=4))
    short = ooo.make_env("car-v0")  # the row's horizon cuts, which is no termination
    short.reset(seed=1)
    assert [short.step(np.zeros(2, np.float32))[2:4] for _ in range(4)] == [(False, False)] * 3 + [(False, True)]


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), gym.spaces.Box(-np.inf, np.inf, (2,))], ids=str)
def test_actions_that_are_no_bounded_vectors_are_refused(monkeypatch, capsys, space):
    monkeypatch.setitem(gym.registry, "Car-v0", gym.envs.registration.EnvSpec("Car-v0", Car))
    monkeypatch.setitem(ooo.TASKS, "car-v0", ooo.Task("own", "Car-v0", 50, (), {}, {}))
    monkeypatch.setattr(Car, "action_space", space)
    with pytest.raises(SystemExit) as stop:
        ooo.make_env("car-v0")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: car-v0") and err.count("\n") == 1
