"""The tasks on today's packages: shapes, horizons, start states, rewards, success and termination.

Expected values come from the simulator's state or from the package's own info, not from the script's formulas. To see
a success, the simulator is put into a state: a nail driven in, a door opened, a kettle moved.
"""

import functools
from types import SimpleNamespace

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
    assert info == {"success": False}
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


def test_hammer_reward_is_d4rls(monkeypatch):
    env = environment(HAMMER)
    inner = Inner(env, monkeypatch)
    env.reset(seed=0)
    rng, distances = np.random.default_rng(0), []
    for _ in range(60):
        _, reward, _, _, _ = env.step(rng.uniform(-1, 1, 26).astype(np.float32))
        want, distance = d4rl_hammer_reward(env.unwrapped)
        assert reward == pytest.approx(want, abs=1e-5)
        assert reward == pytest.approx(inner.reward - 0.2 * distance, abs=1e-5)  # the package has the other sign
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


@pytest.mark.parametrize("env_id", [ANT, *MAZES])
def test_positions_in_walls(env_id):
    """Every cell of the map, at its center and close to its corners; and what lies outside, however far."""
    env = environment(env_id)
    maze = env.unwrapped.maze
    for row, line in enumerate(maze.maze_map):
        for column, cell in enumerate(line):
            center = maze.cell_rowcol_to_xy(np.array([row, column]))
            corners = center + 0.49 * maze.maze_size_scaling * np.array([[0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]])
            assert env.in_walls(corners.astype(np.float32)).tolist() == [cell == 1] * 5, (row, column)
    outside = np.float32([[1e30, 0], [-1e30, 0], [0, 1e30], [0, -1e30], [30, 0], [0, -30]])
    assert env.in_walls(outside).all()


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


def test_what_a_policy_draws_in_evaluation_depends_on_seed_and_episode():
    """Whatever was drawn before, and however many episodes there are."""

    def draws(episodes, seed=7):
        seen = []
        torch.rand(episodes)
        ooo.evaluate(Countdown(), player(lambda obs: seen.append(torch.rand(1).item()) or 0.0), episodes, seed)
        return seen

    assert draws(3)[:6] == draws(2) and len(set(draws(3))) == 9
    assert not set(draws(2)) & set(draws(2, seed=8))


def test_training_and_evaluation_episodes_differ():
    training = {ooo.derive_seed(1, "training episode", i) for i in range(1000)}
    evaluation = {ooo.derive_seed(1, "evaluation", i) for i in range(1000)}
    saved = {ooo.derive_seed(1, "eval-only")}
    assert len(training | evaluation | saved) == 2001
