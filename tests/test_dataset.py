"""The offline data of each task: what load_dataset makes of Minari episodes and of .npz files.

Expectations are computed from the episodes as tiny_data wrote them, in which the interesting states were placed by hand
at known steps.
"""

import copy
import functools
import io
import json
import shutil
import zipfile

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from tiny_data import buffer

import iql_ooo as ooo

PEN, DOOR, RELOCATE = "pen-binary-v0", "door-binary-v0", "relocate-binary-v0"
HAMMER, ANT, POINT = "hammer-truncated-expert-v1", "antmaze-goal-missing-large-v2", "maze2d-missing-data-large-v1"
KITCHENS = ("kitchen-partial-v0", "kitchen-mixed-v0", "kitchen-complete-v0")
DIMENSIONS = {PEN: (45, 24), DOOR: (39, 28), RELOCATE: (39, 30), HAMMER: (46, 26), ANT: (29, 8), POINT: (4, 2)}
DIMENSIONS |= dict.fromkeys(KITCHENS, (30, 9))


environment = functools.cache(ooo.make_env)


def load(env_id, seed=1, **options):
    """load_dataset with settings of Args, but for these."""
    return ooo.load_dataset(ooo.Args(env_id=env_id, **options), environment(env_id), seed)


def refused(capsys, env_id, **options):
    """One line and status 2; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(env_id, **options)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out, (err, out)
    return err


def vectors(env_id, episode):
    """(T+1, obs_dim) observations of a raw episode, as D4RL orders them."""
    obs = episode["observations"]
    if env_id in KITCHENS:
        robot_and_objects = [*range(9), *range(18, 39)]
        return obs["observation"][:, robot_and_objects]
    if env_id == ANT:
        return np.column_stack([obs["achieved_goal"], obs["observation"]])
    return obs["observation"] if env_id == POINT else obs


def joined(parts):
    return np.concatenate(list(parts)).astype(np.float32)


def check_transitions(env_id, data, episodes, keep=slice(None)):
    """Observations, actions, successors and episode numbers, of all or of some rows."""
    states = [vectors(env_id, episode) for episode in episodes]
    want = {
        "observations": joined(x[:-1] for x in states),
        "next_observations": joined(x[1:] for x in states),
        "actions": joined(np.clip(e["actions"], -0.99999, 0.99999) for e in episodes),
        "episodes": joined(np.full(len(e["rewards"]), number) for number, e in enumerate(episodes)),
    }
    for name, value in want.items():
        np.testing.assert_allclose(data[name], value[keep], rtol=1e-6, err_msg=name)
    assert set(data) == {*want, "rewards", "terminations"}
    assert all(value.dtype == np.float32 for value in data.values())


def rows_of(data, episode):
    return np.flatnonzero(data["episodes"] == episode)


# === Adroit ===


@pytest.mark.parametrize("env_id", [PEN, DOOR, RELOCATE])
def test_binary_tasks(tiny, env_id):
    """Demonstrations and clones; the clones' file repeats the demonstrations, which count once."""
    made = tiny(env_id)
    human, cloned = made.values()
    data, report = load(env_id)
    assert len(human) == 3 and len(cloned) == 5
    check_transitions(env_id, data, cloned)
    want = np.full((5, 30), -1.0)
    want[0, [9, 10]] = 0.0  # observations 10 and 11 were placed: they are reached by transitions 9 and 10
    want[3, 29] = 0.0  # the last observation of all, which is the successor of the last transition
    np.testing.assert_array_equal(data["rewards"], want.ravel())
    assert not data["terminations"].any()
    assert report == {
        "source": f"{next(iter(made))}:22 + {list(made)[1]}:450", "transitions_read": 150, "transitions": 150,
        "episodes": 5, "successful_episodes_before_removal": 2, "successful_episodes": 2, "reward_range": [-1.0, 0.0],
        "actions_clipped": sum(int((np.abs(e["actions"]) > 0.99999).any(1).sum()) for e in cloned),
        "sha256": report["sha256"],
    }


def test_limits_and_duplicates(tiny):
    """ID:N takes the first N episodes that no earlier dataset holds; those an earlier limit left out stay out."""
    human, cloned = tiny(PEN)
    episodes, others = tiny(PEN)[cloned], "ooo-test/pen-others-v0"
    if others not in tiny.made:
        tiny.made[others] = episodes[3:]
        tiny.write(others, episodes[3:], Box(-np.inf, np.inf, (45,), np.float64), Box(-1, 1, (24,)))
    for ids, want in {
        (f"{human}:2",): [0, 1],
        (human, f"{cloned}:1"): [0, 1, 2, 3],
        (f"{human}:2", cloned): [0, 1, 3, 4],
        (cloned, human): [0, 1, 2, 3, 4],
        (f"{cloned}:4",): [0, 1, 2, 3],
        (human, others, cloned): [0, 1, 2, 3, 4],  # neither the first's nor the second's again
    }.items():
        data, report = load(PEN, dataset_id=ids)
        check_transitions(PEN, data, [episodes[i] for i in want])
        assert report["source"] == " + ".join(ids) and report["episodes"] == len(want)


# === hammer ===


def test_hammer(tiny):
    (episodes,) = tiny(HAMMER).values()
    data, report = load(HAMMER)
    check_transitions(HAMMER, data, episodes)
    following = [episode["observations"][1:] for episode in episodes]
    palms = [np.sqrt(((x[:, 33:36] - x[:, 36:39]) ** 2).sum(1)) for x in following]
    want = joined(e["rewards"] - 0.2 * palm for e, palm in zip(episodes, palms, strict=True))
    np.testing.assert_allclose(data["rewards"], want, rtol=1e-5)
    assert np.max(palms) > 0.05 and not data["terminations"].any()
    assert report["successful_episodes"] == 1 and report["reward_range"][1] > 90


def test_hammer_is_truncated_to_20(tiny):
    (episodes,) = tiny(HAMMER).values()
    data, report = load(HAMMER, truncate_episodes=20)
    kept = np.concatenate([25 * number + np.arange(20) for number in range(3)])
    check_transitions(HAMMER, data, episodes, kept)
    full, _ = load(HAMMER)
    np.testing.assert_array_equal(data["rewards"], full["rewards"][kept])
    # The last successor kept is the episode's own next state, and no terminal: the target bootstraps through the cut.
    np.testing.assert_allclose(data["next_observations"][19], episodes[0]["observations"][20], rtol=1e-6)
    assert not data["terminations"].any()
    assert report["transitions_read"] == 75 and report["transitions"] == 60 and report["removed_by_truncation"] == 15
    assert report["successful_episodes"] == 0  # the success was in step 22
    assert ooo.TASKS[HAMMER].settings["truncate_episodes"] == 20


def test_truncating_longer_than_the_episodes_keeps_all(tiny):
    tiny(HAMMER)
    assert load(HAMMER, truncate_episodes=25)[1]["removed_by_truncation"] == 0


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("cut", [0, 10, 20, 40])
def test_no_bootstrap_at_cut(tmp_path, cut, bootstrap):
    """Masks are 0 where --truncate-episodes has really cut: in the last row of an episode that was longer."""
    lengths = (10, 20, 21, 35, 9)
    n, ends = sum(lengths), np.cumsum(lengths) - 1
    columns = flat(n, 46, 26, timeouts=at(n, *ends), next_observations=successors(*ends, n=n, obs_dim=46))
    data, report = load(HAMMER, dataset_path=save(tmp_path, columns), truncate_episodes=cut, bootstrap_at_cut=bootstrap)
    want = [[0.0] * min(length, cut or length) for length in lengths]
    for steps, length in zip(want, lengths, strict=True):
        steps[-1] = float(not bootstrap and 0 < cut < length)
    assert data["terminations"].tolist() == sum(want, [])
    assert report["transitions"] == sum(map(len, want))


def test_no_bootstrap_at_cut_beside_terminations(tmp_path):
    """Antmaze's own terminations stay; the cut goes with the row that a disc or the subset takes away."""
    observations = np.zeros((12, 29), np.float32)
    observations[:, 0] = np.linspace(13.3, 14.4, 12)  # at the goal from 14.3 on
    observations[:, 1] = -12.55
    path = save(tmp_path, flat(observations=observations, actions=np.zeros((12, 8)), timeouts=at(12, 11)))
    reached = load(ANT, dataset_path=path)[0]["terminations"]
    assert 0 < reached.sum() < 11
    cut = load(ANT, dataset_path=path, truncate_episodes=4, bootstrap_at_cut=False)[0]["terminations"]
    assert cut.tolist() == [*reached[:3], 1.0]
    disc = ((float(observations[3, 0]), -12.55, 0.05),)
    left = load(ANT, dataset_path=path, truncate_episodes=4, bootstrap_at_cut=False, remove_discs=disc)[0]
    assert left["terminations"].tolist() == reached[:3].tolist()


# === kitchen ===


@pytest.mark.parametrize("cumulative", [False, True], ids=["now", "cumulative"])
@pytest.mark.parametrize("env_id", KITCHENS)
def test_kitchen(tiny, env_id, cumulative):
    """Reward of a transition: the tasks whose goal holds in the successor, or has held before in this episode."""
    (episodes,) = tiny(env_id).values()
    data, report = load(env_id, kitchen_cumulative=cumulative)
    check_transitions(env_id, data, episodes)
    first, second = data["rewards"][rows_of(data, 0)], data["rewards"][rows_of(data, 1)]
    # Task one at observations 3 to 6, task two from 5 on; transition i leads to observation i + 1.
    assert first.tolist() == [0, 0, 1, 1, 2, 2, *([2] * 6 if cumulative else [1] * 6)]
    assert second.tolist() == [0] * 8 + [4] * 4
    assert not data["terminations"].any()
    assert report["successful_episodes"] == 1 and report["reward_range"] == [0.0, 4.0]


def test_kitchen_tasks_differ_in_their_goals(tiny, capsys):
    """Mixed wants the bottom burner where the others want the slide cabinet: foreign data lacks a goal."""
    tiny("kitchen-mixed-v0")
    assert "mixed" in refused(capsys, "kitchen-partial-v0", dataset_id=("D4RL/kitchen/mixed-v2",))


# === mazes ===


def test_antmaze_relabelling(tiny):
    (episodes,) = tiny(ANT).values()
    data, report = load(ANT)
    check_transitions(ANT, data, episodes)
    positions = joined(episode["observations"]["achieved_goal"][1:] for episode in episodes).astype(float)
    want = np.hypot(positions[:, 0] - 14.75, positions[:, 1] + 12.75) <= 0.5  # mean of D4RL's evaluation goals
    assert 5 < want.sum() < 40
    np.testing.assert_array_equal(data["rewards"], want)
    np.testing.assert_array_equal(data["terminations"], want)
    assert report["successful_episodes"] == 1


def test_antmaze_removal_looks_at_observations_only(tiny):
    (episodes,) = tiny(ANT).values()
    data, report = load(ANT, remove_discs=ooo.TASKS[ANT].settings["remove_discs"])
    assert ooo.TASKS[ANT].settings["remove_discs"] == ((14.0, -12.0, 2.5),)
    states = joined(vectors(ANT, episode)[:-1] for episode in episodes)
    keep = np.hypot(states[:, 0] - 14.0, states[:, 1] + 12.0) > 2.5
    check_transitions(ANT, data, episodes, keep)
    after = np.hypot(data["next_observations"][:, 0] - 14.0, data["next_observations"][:, 1] + 12.0)
    assert (after <= 2.5).sum() == 1  # the step that enters the disc stays, its successor lies inside
    assert not data["rewards"].any() and not data["terminations"].any()
    assert report["removed_by_discs"] == [[14.0, -12.0, 2.5, int((~keep).sum())]] and (~keep).sum() > 10
    assert report["transitions"] == keep.sum() and report["transitions_read"] == 80
    assert report["successful_episodes_before_removal"] == 1 and report["successful_episodes"] == 0


def test_maze2d_relabelling_and_removal(tiny):
    (episodes,) = tiny(POINT).values()
    data, _ = load(POINT)
    check_transitions(POINT, data, episodes)
    after = data["next_observations"].astype(float)
    want = np.hypot(after[:, 0] - 3.5, after[:, 1] + 3.0) <= 0.5
    np.testing.assert_array_equal(data["rewards"], want)
    assert 0 < want.sum() < 10 and not data["terminations"].any()

    discs = ooo.TASKS[POINT].settings["remove_discs"]
    assert discs == ((3.5, -3.0, 1.5), (-4.5, 3.0, 1.5), (-4.5, -3.0, 2.0))
    removed, report = load(POINT, remove_discs=discs)
    states = joined(vectors(POINT, episode)[:-1] for episode in episodes)
    inside = [np.hypot(states[:, 0] - x, states[:, 1] - y) <= radius for x, y, radius in discs]
    check_transitions(POINT, removed, episodes, ~np.any(inside, axis=0))
    assert not removed["rewards"].any()
    assert [disc[3] for disc in report["removed_by_discs"]] == [int(mask.sum()) for mask in inside]  # discs are apart


def test_discs_are_arguments(tiny):
    (episodes,) = tiny(POINT).values()
    states = joined(vectors(POINT, episode)[:-1] for episode in episodes)
    for x, y, radius in ((3.5, -3.0, 0.5), (3.5, -3.0, 3.0), (0.0, -3.0, 1.0)):
        data, report = load(POINT, remove_discs=((x, y, radius),))
        inside = np.hypot(states[:, 0] - x, states[:, 1] - y) <= radius
        assert 0 < inside.sum() == report["removed_by_discs"][0][3] == 120 - report["transitions"]
        check_transitions(POINT, data, episodes, ~inside)


def test_subset_comes_before_the_discs(tiny):
    (episodes,) = tiny(POINT).values()
    full, _ = load(POINT)
    one, report = load(POINT, data_subset=60, seed=3)
    again, _ = load(POINT, data_subset=60, seed=3)
    other, _ = load(POINT, data_subset=60, seed=4)
    assert report["subset"] == report["transitions"] == 60 and report["transitions_read"] == 120
    row = {tuple(state): number for number, state in enumerate(full["observations"])}
    numbers = [row[tuple(state)] for state in one["observations"]]
    assert len(set(numbers)) == 60  # without replacement
    for name in full:
        np.testing.assert_array_equal(one[name], full[name][numbers], err_msg=name)
        np.testing.assert_array_equal(one[name], again[name])
    assert (one["observations"] != other["observations"]).any()
    disc = ((3.5, -3.0, 1.5),)
    inside = np.hypot(one["observations"][:, 0] - 3.5, one["observations"][:, 1] + 3.0) <= 1.5
    removed, report = load(POINT, data_subset=60, remove_discs=disc, seed=3)
    assert report["subset"] == 60 and report["removed_by_discs"][0][3] == inside.sum() > 0
    np.testing.assert_array_equal(removed["observations"], one["observations"][~inside])
    assert "subset" not in load(POINT, data_subset=500)[1]  # more than there are


def test_nothing_left_is_an_error(tiny, capsys):
    tiny(POINT)
    assert "nothing is left" in refused(capsys, POINT, remove_discs=((0.0, 0.0, 100.0),))


@pytest.mark.parametrize("maze", ["large", "medium", "umaze"])
def test_positions_in_other_coordinates_are_refused(tmp_path, capsys, maze):
    """D4RL's maze2d has its origin in a corner: (row, column) where gymnasium-robotics has x, y from the center."""
    env_id = f"maze2d-missing-data-{maze}-v1"
    env = environment(env_id)
    cells = np.array(sorted(env.distances))
    ours = np.array([env.unwrapped.maze.cell_rowcol_to_xy(cell) for cell in cells])
    for positions in (ours, cells):
        observations = np.zeros((len(cells), 4), np.float32)
        observations[:, :2] = positions
        columns = flat(len(cells), observations=observations, timeouts=None, next_observations=observations + 0.1)
        path = save(tmp_path, columns)
        if positions is ours:
            assert load(env_id, dataset_path=path)[1]["transitions"] == len(cells)
        else:
            assert "coordinates" in refused(capsys, env_id, dataset_path=path)


# === datasets that cannot be right ===


@pytest.fixture
def changed(tiny):
    """changed(env_id, change): the task's first dataset, after change(its open HDF5 file); put back at the end."""
    backups = []

    def change_first(env_id, change):
        tiny(env_id)
        folder = tiny.path / ooo.TASKS[env_id].datasets[0].partition(":")[0] / "data"
        backups.append((folder, folder.with_name("backup")))
        shutil.copytree(*backups[-1])
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            change(file)

    yield change_first
    for folder, backup in backups:
        shutil.rmtree(folder)
        backup.rename(folder)


def replaced(name, change):
    """A change of the file: one array replaced, or (None) taken out."""

    def apply(file):
        value = file[name][()]
        del file[name]
        if (new := change(value)) is not None:
            file[name] = new

    return apply


SHAPES = {
    "one short": lambda value: value[:-1], "one long": lambda value: np.concatenate([value, value[-1:]]),
    "none": lambda value: value[:0], "another rank": lambda value: value[..., None],
    "text": lambda value: value.astype("S"), "complex": lambda value: value + 1j, "missing": lambda value: None,
}


@pytest.mark.parametrize("how", SHAPES)
@pytest.mark.parametrize("column", ["observations", "actions", "rewards"])
def test_a_column_of_another_shape(changed, capsys, column, how):
    """In one episode only; T observations instead of T + 1 too."""
    changed(HAMMER, replaced(f"episode_1/{column}", SHAPES[how]))
    assert "D4RL/hammer/expert-v2" in refused(capsys, HAMMER)


def test_two_opposite_errors_do_not_cancel(changed, capsys):
    """An action too few here and one too many there would shift everything between."""
    changed(HAMMER, lambda file: [replaced(f"episode_{number}/actions", SHAPES[how])(file)
                                  for number, how in ((0, "one short"), (2, "one long"))])
    line = refused(capsys, HAMMER)
    assert "episode 0" in line and "actions" in line and "(24, 26)" in line


def test_every_episode_with_an_observation_too_few(changed, capsys):
    changed(HAMMER, lambda file: [replaced(f"{name}/observations", SHAPES["one short"])(file) for name in list(file)])
    assert "(24, 46)" in refused(capsys, HAMMER)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("column", ["observations", "actions", "rewards"])
def test_a_number_that_is_none(changed, capsys, column, value):
    """Or that float32 does not hold."""

    def spoil(array):
        array = array.astype(float)
        array[(7, *[3] * (array.ndim - 1))] = value
        return array

    changed(HAMMER, replaced(f"episode_2/{column}", spoil))
    line = refused(capsys, HAMMER)
    assert "episode 2" in line and column in line and "row 7" in line


@pytest.mark.parametrize("last", [0, -1])
def test_the_first_and_the_last_observation_count(changed, capsys, last):
    def spoil(array):
        array[last, 0] = np.nan
        return array

    changed(POINT, replaced("episode_0/observations/observation", spoil))
    assert "NaN" in refused(capsys, POINT)


@pytest.mark.parametrize("name", ["observations/achieved_goal/microwave", "observations/desired_goal/microwave",
                                  "observations/observation"])
def test_parts_of_a_nested_observation(changed, capsys, name):
    changed("kitchen-complete-v0", replaced(f"episode_1/{name}", SHAPES["one short"]))
    assert "D4RL/kitchen/complete-v2" in refused(capsys, "kitchen-complete-v0")


def foreign_dataset(tiny, task, dataset_id, env_id):
    """A dataset with the content of a task's and the description of another environment (None: without one)."""
    if dataset_id not in tiny.made:
        tiny.made[dataset_id] = next(iter(tiny(task).values()))
        env = environment(task).env.unwrapped
        spec = copy.deepcopy(gym.spec(env_id)) if env_id else None
        minari.create_dataset_from_buffers(
            dataset_id, [buffer(episode) for episode in tiny.made[dataset_id]], env=spec,
            observation_space=env.observation_space, action_space=env.action_space)
    return dataset_id


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("task", "name", "env_id", "taken"),
    [
        (POINT, "medium", "PointMaze_Medium-v3", False),
        (POINT, "umaze", "PointMaze_UMaze-v3", False),
        (POINT, "hand", "AdroitHandPen-v1", False),
        (POINT, "large", "PointMaze_Large-v3", True),
        (POINT, "dense", "PointMaze_LargeDense-v3", True),  # rewards are made anew
        (POINT, "diverse", "PointMaze_Large_Diverse_GR-v3", True),
        (POINT, "nothing", None, True),
        (HAMMER, "sparse-hammer", "AdroitHandHammerSparse-v1", False),  # its rewards are others
        (HAMMER, "hammer", "AdroitHandHammer-v1", True),
    ],
)
def test_data_of_another_environment(tiny, capsys, task, name, env_id, taken):
    """Shapes agree in all of them: the dataset's own description decides."""
    environment(task)  # registers the packages' environments
    dataset_id = foreign_dataset(tiny, task, f"ooo-test/{name}-v0", env_id)
    if taken:
        assert load(task, dataset_id=(dataset_id,))[1]["episodes"] == 3
    else:
        line = refused(capsys, task, dataset_id=(dataset_id,))
        assert dataset_id in line and env_id in line and ooo.TASKS[task].gym_id in line


@pytest.mark.parametrize("entry", [{"env_spec": "{}"}, {"env_spec": "text"}, {"total_steps": "x"}, {"total_steps": []}],
                         ids=str)
def test_a_damaged_description(changed, capsys, tiny, entry):
    def damage(file):
        path = tiny.path / "D4RL/hammer/expert-v2/data/metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))

    changed(HAMMER, damage)
    assert "D4RL/hammer/expert-v2" in refused(capsys, HAMMER)


@pytest.mark.parametrize("dataset_id", ["", ":3", "..", "/", "D4RL", "D4RL/hammer", "a b", "x" * 300])
def test_a_dataset_that_is_none(tiny, capsys, dataset_id):
    tiny(HAMMER)
    assert "dataset" in refused(capsys, HAMMER, dataset_id=(dataset_id,))


def test_terminations_of_minari_data_count_unless_the_family_says_otherwise(tiny, monkeypatch):
    """And actions of another range are scaled to [-1, 1]."""
    dataset_id, rng, episodes = "ooo-test/inverted-pendulum-v0", np.random.default_rng(0), []
    for length in (3, 7, 5):
        episodes.append(dict(observations=rng.normal(size=(length + 1, 4)), rewards=np.ones(length),
                             actions=rng.uniform(-3, 3, (length, 1)).astype(np.float32), terminated=length < 7))
    if dataset_id not in tiny.made:
        tiny.made[dataset_id] = episodes
        tiny.write(dataset_id, episodes, Box(-np.inf, np.inf, (4,), np.float64), Box(-3, 3, (1,)))
    monkeypatch.setitem(ooo.TASKS, "mine", ooo.Task("own", "InvertedPendulum-v5", 1000, (dataset_id,), {}, {}))
    env = ooo.make_env("mine")
    data, report = ooo.load_dataset(ooo.Args(), env, 1)
    assert np.flatnonzero(data["terminations"]).tolist() == [2, 14] and report["episodes"] == 3
    actions = joined(episode["actions"] for episode in episodes)
    np.testing.assert_allclose(data["actions"], actions / 3, rtol=1e-4, atol=1e-6)
    env.task = env.task._replace(family="hammer")
    monkeypatch.setattr(ooo, "task_reward", lambda task, obs, reward, goal: (reward, reward > 2))
    assert not ooo.load_dataset(ooo.Args(), env, 1)[0]["terminations"].any()


# === .npz with D4RL's keys ===


def flat(n=12, obs_dim=4, act_dim=2, **changes):
    """Columns of an .npz: n steps of one stream, whose observations count up."""
    columns = {
        "observations": np.arange(n * obs_dim, dtype=np.float32).reshape(n, obs_dim) / 1000 - 2,
        "actions": np.linspace(-1.5, 1.5, n * act_dim, dtype=np.float32).reshape(n, act_dim),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    return {name: value for name, value in (columns | changes).items() if value is not None}


def at(n, *indices):
    flags = np.zeros(n, bool)
    flags[list(indices)] = True
    return flags


def successors(*ends, n=12, obs_dim=4):
    """next_observations of flat(n): the next row's, but at these ends and in the last row."""
    observations = flat(n, obs_dim)["observations"]
    following = np.roll(observations, -1, 0)
    following[[*ends, n - 1]] = observations[[*ends, n - 1]] + 0.5
    return following


def save(tmp_path, columns):
    path = tmp_path / "data.npz"
    np.savez(path, **columns)
    return str(path)


def test_npz_without_successors(tmp_path):
    """Timeouts at 4 and 8: the successor of these and of the last step was never recorded."""
    columns = flat(timeouts=at(12, 4, 8))
    data, report = load(POINT, dataset_path=save(tmp_path, columns))
    kept = [0, 1, 2, 3, 5, 6, 7, 9, 10]
    np.testing.assert_array_equal(data["observations"], columns["observations"][kept])
    np.testing.assert_array_equal(data["next_observations"], columns["observations"][np.add(kept, 1)])
    assert data["episodes"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert report["transitions_read"] == 9 and report["episodes"] == 3


def test_npz_with_successors(tmp_path):
    """Nothing has to be dropped."""
    columns = flat(timeouts=at(12, 4, 8)) | dict(next_observations=successors(4, 8))
    data, report = load(POINT, dataset_path=save(tmp_path, columns))
    np.testing.assert_array_equal(data["observations"], columns["observations"])
    np.testing.assert_array_equal(data["next_observations"], columns["next_observations"])
    assert data["episodes"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert report["transitions_read"] == 12


def test_npz_without_timeouts(tmp_path):
    """An episode ends where next_observations do not continue: the same episodes as timeouts give."""
    columns = flat(timeouts=at(12, 4, 8)) | dict(next_observations=successors(4, 8))
    one, _ = load(POINT, dataset_path=save(tmp_path, columns))
    del columns["timeouts"]
    other, _ = load(POINT, dataset_path=save(tmp_path, columns))
    assert one["episodes"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_npz_with_an_episode_longer_than_the_tasks(tmp_path, capsys):
    n = ooo.TASKS[POINT].horizon
    assert load(POINT, dataset_path=save(tmp_path, flat(n)))[1]["episodes"] == 1
    capsys.readouterr()
    states = flat(n + 2)["observations"]
    continued = flat(n + 1, observations=states[:-1], next_observations=states[1:], timeouts=None)
    for columns in (flat(n + 1), flat(n + 1, timeouts=at(n + 1, n)), flat(n + 5, timeouts=at(n + 5, 2)), continued):
        line = refused(capsys, POINT, dataset_path=save(tmp_path, columns))
        assert "an episode of" in line and str(n) in line
    assert load(POINT, dataset_path=save(tmp_path, flat(n + 5, timeouts=at(n + 5, 40))))[1]["episodes"] == 2


UMAZE = "maze2d-missing-data-umaze-v1"


def tours(flags, shift=0):
    """Twenty walks of 100 steps in a corner each of the U-maze, whose ends lie under `flags`, so many rows late."""
    rng, corners = np.random.default_rng(0), np.array([(-1, -1), (1, 1), (1, -1), (-1, 1)])
    walks = [corners[i % 4] + np.cumsum(rng.normal(0, 0.01, (100, 2)), 0).clip(-0.3, 0.3) for i in range(20)]
    ends = np.roll(np.arange(1, 2001) % 100 == 0, shift)
    return flat(2000, observations=np.column_stack([np.concatenate(walks), np.zeros((2000, 2))]), **{flags: ends})


@pytest.mark.parametrize("flags", ["timeouts", "terminals"])
def test_ends_of_a_maze_may_be_in_either_column(tmp_path, flags):
    data, report = load(UMAZE, dataset_path=save(tmp_path, tours(flags)))
    assert report["episodes"] == 20 and report["transitions"] == 20 * 99
    assert np.linalg.norm(data["next_observations"] - data["observations"], axis=1).max() < 0.2
    assert not data["terminations"].any()


@pytest.mark.parametrize("flags", ["timeouts", "terminals"])
@pytest.mark.parametrize("shift", [1, -1, 7], ids="{} rows late".format)
def test_ends_that_a_jump_contradicts(tmp_path, capsys, flags, shift):
    """A step of metres is none that the point can do: a wrong end would be learnt as a way through the wall."""
    assert "a step of" in refused(capsys, UMAZE, dataset_path=save(tmp_path, tours(flags, shift)))


def test_ends_that_are_missing(tmp_path, capsys):
    """Two files with an end each at their last row, put together: two of fifty ends. In every order of rows."""
    n = 10_000
    for marked, taken in ((np.arange(199, n, 200), True), ([n // 2 - 1, n - 1], False), ([199, n - 1], False),
                          ([n - 1], False), (np.arange(199, n, 400), False)):
        columns = flat(n, 46, 26, timeouts=at(n, *marked))
        if taken:
            assert load(HAMMER, dataset_path=save(tmp_path, columns))[1]["episodes"] == 50
        else:
            assert "an episode of" in refused(capsys, HAMMER, dataset_path=save(tmp_path, columns))


@pytest.mark.parametrize("columns", [
    flat(timeouts=at(12, 5), next_observations=successors(4)),  # one late
    flat(timeouts=at(12, 3), next_observations=successors(4)),  # one early
    flat(terminals=at(12, 5), next_observations=successors(4)),
    flat(timeouts=at(12, 4), next_observations=successors(4, 8)),  # one of two
    flat(timeouts=at(12, 11), next_observations=successors(8)),
    flat(timeouts=at(12), next_observations=successors(8)),  # none
], ids=["late", "early", "terminal late", "one of two", "last alone", "none"])
def test_ends_that_next_observations_contradict(tmp_path, capsys, columns):
    line = refused(capsys, POINT, dataset_path=save(tmp_path, columns))
    assert "next_observations of row" in line and "timeouts" in line


def test_ends_may_be_more_than_next_observations_show(tmp_path):
    """A stream that is cut into episodes goes on in the next row (D4RL's maze2d)."""
    columns = flat(timeouts=at(12, 4, 8), next_observations=successors())
    assert load(POINT, dataset_path=save(tmp_path, columns))[1]["episodes"] == 3


def test_terminals_that_timeouts_contradict(tmp_path, capsys):
    """One row before the timeout: the episode that both mean ends once."""
    columns = flat(terminals=at(12, 3), timeouts=at(12, 4, 8))
    assert "row 3" in refused(capsys, POINT, dataset_path=save(tmp_path, columns))
    for terminals in ([4], [4, 8], [2]):  # the same end, or another one
        columns = flat(terminals=at(12, *terminals), timeouts=at(12, 4, 8))
        assert load(POINT, dataset_path=save(tmp_path, columns))[1]["episodes"] == (4 if terminals == [2] else 3)


@pytest.mark.parametrize("columns", [
    dict(terminals=at(12, 4, 8), timeouts=at(12, 3, 7, 11)),
    dict(terminals=at(12, 4), timeouts=None, next_observations=successors(3, 11)),
    dict(terminals=np.ones(12, bool), timeouts=None, next_observations=successors(11)),
])
def test_terminals_one_row_late_in_ones_own_data(tmp_path, capsys, monkeypatch, columns):
    """The first row of an episode would be its terminal."""
    task = ooo.Task("own", "InvertedPendulum-v5", 1000, (), {}, {})
    monkeypatch.setitem(ooo.TASKS, "own-v0", task)
    env, path = ooo.make_env("own-v0"), save(tmp_path, flat(act_dim=1, **columns))
    with pytest.raises(SystemExit):
        ooo.read_npz(path, env)
    assert "put them right" in capsys.readouterr().err


def test_kitchen_files_mark_every_end_by_a_terminal(tmp_path):
    """D4RL's have no timeouts. The steps whose successor was not recorded are dropped; nothing terminates."""
    n = 840
    columns = flat(n, 60, 9, rewards=np.repeat(np.arange(4.0), n // 4), terminals=at(n, 279, 559, 839), timeouts=None)
    data, report = load("kitchen-partial-v0", dataset_path=save(tmp_path, columns))
    assert report["episodes"] == 3 and report["transitions"] == 837
    np.testing.assert_array_equal(data["next_observations"][278], columns["observations"][279, :30])
    np.testing.assert_array_equal(data["observations"][279], columns["observations"][280, :30])
    assert not data["terminations"].any()


def test_a_file_that_marks_no_end(tmp_path, capsys):
    """Without timeouts, next_observations and a terminal in the last row nobody knows where episodes end."""
    for terminals in (at(12), at(12, 5)):
        line = refused(capsys, POINT, dataset_path=save(tmp_path, flat(timeouts=None, terminals=terminals)))
        assert "timeouts" in line and "next_observations" in line


def test_npz_terminals_end_episodes(tmp_path):
    """A terminal's recorded successor would be the next episode's start. Tasks that never terminate drop the step."""
    columns = flat(terminals=at(12, 5, 11))
    data, _ = load(POINT, dataset_path=save(tmp_path, columns))
    assert len(data["rewards"]) == 10 and data["episodes"].tolist() == [0] * 5 + [1] * 5
    np.testing.assert_array_equal(data["next_observations"][4], columns["observations"][5])
    assert not data["terminations"].any()


def test_npz_of_antmaze_keeps_terminal_steps(tmp_path):
    observations = np.zeros((12, 29), np.float32)
    observations[:, :2] = (13.0, -11.0)
    observations[5, :2] = (14.75, -12.75)
    columns = flat(observations=observations, actions=np.zeros((12, 8)), terminals=at(12, 5), timeouts=at(12, 8))
    data, _ = load(ANT, dataset_path=save(tmp_path, columns))
    # Kept: the steps into the goal (4, whose successor is 5) and at it (5, terminal, which is its own successor).
    assert len(data["rewards"]) == 10  # without 8 (timeout) and 11 (the end of the file)
    assert data["terminations"].tolist() == data["rewards"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(data["next_observations"][5], observations[5])
    assert data["episodes"].tolist() == [0] * 6 + [1] * 2 + [2] * 2


def test_npz_of_dense_tasks_has_d4rls_rewards(tmp_path):
    """No sign to correct in hammer, and the kitchen's rewards count tasks already."""
    rng = np.random.default_rng(0)
    for env_id in (HAMMER, "kitchen-mixed-v0"):
        obs_dim, act_dim = DIMENSIONS[env_id]
        columns = flat(observations=rng.normal(size=(12, obs_dim)), actions=np.zeros((12, act_dim)),
                       rewards=np.float32([0, 1, 4, 3, 60, 2, 0, 0, 1, 1, 0, 0]))
        data, report = load(env_id, dataset_path=save(tmp_path, columns))
        np.testing.assert_array_equal(data["rewards"], columns["rewards"][:-1])
        assert report["successful_episodes"] == 1


def test_npz_of_binary_tasks_is_relabelled(tmp_path):
    """D4RL's files of these tasks hold dense rewards."""
    observations = np.zeros((12, 39), np.float32)
    observations[6, 28] = 1.5
    columns = flat(observations=observations, actions=np.zeros((12, 28)))
    data, _ = load(DOOR, dataset_path=save(tmp_path, columns))
    assert data["rewards"].tolist() == [-1.0] * 5 + [0.0] + [-1.0] * 5


def test_npz_of_antmaze_may_stay_at_the_goal(tmp_path):
    """D4RL's episodes go on there, with a terminal in every step until the time is up."""
    observations = np.zeros((12, 29), np.float32)
    observations[:, 0], observations[:, 1] = np.linspace(13, 14.75, 12), -12.75
    columns = flat(observations=observations, actions=np.zeros((12, 8)), terminals=at(12, 8, 9, 10, 11),
                   timeouts=at(12, 11))
    data, _ = load(ANT, dataset_path=save(tmp_path, columns))
    assert len(data["rewards"]) == 12 and data["terminations"].tolist() == data["rewards"].tolist()


@pytest.mark.parametrize("following", [False, True], ids=["observations", "next_observations"])
def test_npz_of_the_kitchen_with_d4rls_60_columns(tmp_path, following):
    """The last 30 are the constant goal."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(12, 60)).astype(np.float32)
    columns = flat(observations=observations, actions=np.zeros((12, 9)), rewards=np.float32([0] * 11 + [4]),
                   next_observations=np.roll(observations, -1, 0) if following else None)
    wide, report = load("kitchen-mixed-v0", dataset_path=save(tmp_path, columns))
    for name in {"observations", "next_observations"} & set(columns):
        columns[name] = columns[name][:, :30]
    narrow, other = load("kitchen-mixed-v0", dataset_path=save(tmp_path, columns))
    assert wide["observations"].shape[1] == 30 and report["sha256"] == other["sha256"]
    for name in wide:
        np.testing.assert_array_equal(wide[name], narrow[name])


def test_sixty_columns_are_the_kitchens_alone(tmp_path, capsys):
    assert "(12, 60)" in refused(capsys, POINT, dataset_path=save(tmp_path, flat(observations=np.zeros((12, 60)))))


def test_columns_of_columns(tmp_path):
    """(n, 1) is read as (n,): so do some tools write rewards and flags."""
    flags = {name: flat(timeouts=at(12, 4))[name][:, None] for name in ("rewards", "terminals", "timeouts")}
    one, other = (load(POINT, dataset_path=save(tmp_path, flat(**changes)))[1] for changes in
                  (dict(timeouts=at(12, 4)), flags))
    assert one == other


def test_keys_that_are_not_needed_are_not_read(tmp_path):
    """Another program's notes, even as a pickle; and arrays of any size."""
    want = load(POINT, dataset_path=save(tmp_path, flat()))[1]
    extra = {"infos/qpos": np.full((12, 2), np.nan), "metadata": np.array([{"a": 1}, Payload()], object)}
    assert load(POINT, dataset_path=save(tmp_path, flat() | extra))[1] == want


def test_npz_whose_header_claims_40_gib(tmp_path, capsys):
    """Of twelve numbers: the claim is not believed."""
    path = save(tmp_path, flat())
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((12, 4), np.float32))
    content = stream.getvalue().replace(b"(12, 4), }" + b" " * 10, b"(2684354560, 4), }  ")
    with zipfile.ZipFile(path) as archive:
        rest = {name: archive.read(name) for name in archive.namelist() if name != "observations.npy"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in rest.items() | {("observations.npy", content)}:
            archive.writestr(name, data)
    assert "data.npz" in refused(capsys, POINT, dataset_path=path)


def test_any_damage_of_an_npz_is_one_line(tmp_path, capsys):
    """Cut, flipped, overwritten: read as it was, or refused; other numbers without a word never."""
    path = tmp_path / "data.npz"
    np.savez_compressed(path, **flat())
    content, rng, seen = path.read_bytes(), np.random.default_rng(0), set()
    want = load(POINT, dataset_path=str(path))[1]["sha256"]
    for number in range(300):
        data = bytearray(content)
        if number % 3 == 0:
            del data[rng.integers(len(data)) :]
        elif number % 3 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            for place in len(data) - rng.integers(1, 600, 5):
                data[place] = rng.integers(256)
        path.write_bytes(data)
        capsys.readouterr()
        try:
            assert load(POINT, dataset_path=str(path))[1]["sha256"] == want
            seen.add("whole")
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1
            seen.add("refused")
    assert seen == {"whole", "refused"}


def test_actions_are_clipped_and_counted(tmp_path):
    """Transitions, not numbers: those whose action was altered in any part."""
    data, report = load(POINT, dataset_path=save(tmp_path, flat()))
    assert data["actions"].min() == np.float32(-1 + 1e-5) and data["actions"].max() == np.float32(1 - 1e-5)
    actions = flat()["actions"][:-1]
    inside = np.abs(actions) < 0.999
    np.testing.assert_array_equal(data["actions"][inside], actions[inside])
    assert 0 < report["actions_clipped"] == (np.abs(actions) > 0.99999).any(1).sum() < 11
    assert load(POINT, dataset_path=save(tmp_path, flat(actions=np.full((12, 2), 0.5))))[1]["actions_clipped"] == 0


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    "columns",
    [
        flat(rewards=np.array([Payload()] * 12, dtype=object)),
        flat(actions=np.array([[Payload()] * 2] * 12, dtype=object)),
        flat(rewards=None),
        flat(terminals=None),
        flat(actions=np.zeros((11, 2))),
        flat(observations=np.zeros((13, 4))),
        flat(observations=np.zeros((24, 2))),
        flat(actions=np.zeros((24, 1))),
        flat(next_observations=np.zeros((11, 4))),
        flat(timeouts=np.zeros(5, bool)),
        flat(rewards=np.float32(1.0)),
        flat(observations=np.zeros(12)),
        flat(observations=np.zeros((12, 5))),
        flat(actions=np.zeros((12, 3))),
        flat(next_observations=np.zeros((12, 3))),
        flat(n=1),
        flat(rewards=np.float32([np.nan] * 12)),
        flat(next_observations=np.full((12, 4), np.inf)),
        flat(rewards=np.array(["text"] * 12)),
    ],
    ids=["pickle", "pickle of another column", "no rewards", "no terminals", "short actions", "long observations",
         "long and narrow observations", "long and narrow actions",
         "short next_observations", "short timeouts", "scalar rewards", "flat observations", "wide observations",
         "wide actions", "narrow next_observations", "one row", "NaN", "infinity", "text"],
)
def test_bad_npz_is_refused_in_one_line(tmp_path, capsys, columns):
    assert "data.npz" in refused(capsys, POINT, dataset_path=save(tmp_path, columns))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"])
def test_every_column_of_an_npz_is_checked(tmp_path, capsys, name):
    """Its length, rank and numbers, in any row."""
    good = flat(next_observations=successors(5), timeouts=at(12, 5))
    load(POINT, dataset_path=save(tmp_path, good))
    spoilt = [(how, change(good[name])) for how, change in SHAPES.items() if how != "missing"]
    for row in (0, 5, 11):
        for value in (np.nan, np.inf):
            array = good[name].astype(np.float32)
            array[row] = value
            spoilt.append((f"{value} in row {row}", array))
    for how, value in spoilt:
        if how == "another rank" and value.ndim == 2:
            value = value[..., None]  # (n, 1) is read as (n,)
        line = refused(capsys, POINT, dataset_path=save(tmp_path, good | {name: value}))
        assert "data.npz" in line, how


# === report ===


def test_report_is_a_fingerprint(tiny, tmp_path):
    tiny(POINT)
    one, two = load(POINT)[1], load(POINT)[1]
    assert one == two and len(one["sha256"]) == 64
    changed = flat()
    first = load(POINT, dataset_path=save(tmp_path, changed))[1]["sha256"]
    changed["observations"][3, 2] += 1e-4
    assert load(POINT, dataset_path=save(tmp_path, changed))[1]["sha256"] != first


def test_reward_range_is_that_of_the_data_left(tmp_path):
    columns = flat(observations=np.tile(np.linspace(0, 3, 12)[:, None], (1, 4)))
    columns["observations"][:, :2] = (3.5, -3.0)
    columns["observations"][6:, :2] = (0.0, 0.0)
    columns["timeouts"] = at(12, 6)  # 0 in row 6 is a step of the first episode, which is not learnt from
    columns["observations"][6, :2] = (3.5, -3.0)
    path = save(tmp_path, columns)
    assert load(POINT, dataset_path=path)[1]["reward_range"] == [0.0, 1.0]
    report = load(POINT, dataset_path=path, remove_discs=((3.5, -3.0, 1.0),))[1]
    assert report["reward_range"] == [0.0, 0.0] and report["successful_episodes_before_removal"] == 1
