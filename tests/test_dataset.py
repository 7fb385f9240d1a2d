"""The offline data of each task: what load_dataset makes of Minari episodes and of .npz files.

Expectations are computed from the episodes as tiny_data wrote them, in which the interesting states were placed by hand
at known steps.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box

import iql_ooo as ooo

PEN, DOOR, RELOCATE = "pen-binary-v0", "door-binary-v0", "relocate-binary-v0"
HAMMER, ANT, POINT = "hammer-truncated-expert-v1", "antmaze-goal-missing-large-v2", "maze2d-missing-data-large-v1"
KITCHENS = ("kitchen-partial-v0", "kitchen-mixed-v0", "kitchen-complete-v0")
DIMENSIONS = {PEN: (45, 24), DOOR: (39, 28), RELOCATE: (39, 30), HAMMER: (46, 26), ANT: (29, 8), POINT: (4, 2)}
DIMENSIONS |= dict.fromkeys(KITCHENS, (30, 9))


def load(env_id, **options):
    """load_dataset with the spaces of the task's environment, which is not built."""
    obs_dim, act_dim = DIMENSIONS[env_id]
    spaces = SimpleNamespace(observation_space=SimpleNamespace(shape=(obs_dim,)),
                             action_space=SimpleNamespace(shape=(act_dim,)))
    return ooo.load_dataset(env_id, spaces, **options)


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
        data, report = load(PEN, dataset_ids=ids)
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
    assert ooo.TASKS[HAMMER]["truncate_episodes"] == 20


def test_truncating_longer_than_the_episodes_keeps_all(tiny):
    tiny(HAMMER)
    assert load(HAMMER, truncate_episodes=25)[1]["removed_by_truncation"] == 0


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


def test_kitchen_tasks_differ_in_their_goals(tiny):
    """Mixed wants the bottom burner where the others want the slide cabinet: foreign data lacks a goal."""
    tiny("kitchen-mixed-v0")
    with pytest.raises(SystemExit):
        load("kitchen-partial-v0", dataset_ids=("D4RL/kitchen/mixed-v2",))


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
    data, report = load(ANT, remove_discs=ooo.TASKS[ANT]["remove_discs"])
    assert ooo.TASKS[ANT]["remove_discs"] == ((14.0, -12.0, 2.5),)
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

    discs = ooo.TASKS[POINT]["remove_discs"]
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
    with pytest.raises(SystemExit) as stop:
        load(POINT, remove_discs=((0.0, 0.0, 100.0),))
    assert stop.value.code == 2 and "nothing is left" in capsys.readouterr().err


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
    following = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    columns = flat(timeouts=at(12, 4, 8), next_observations=following)
    data, report = load(POINT, dataset_path=save(tmp_path, columns))
    np.testing.assert_array_equal(data["observations"], columns["observations"])
    np.testing.assert_array_equal(data["next_observations"], following)
    assert data["episodes"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert report["transitions_read"] == 12


def test_npz_without_timeouts(tmp_path):
    data, _ = load(POINT, dataset_path=save(tmp_path, flat(timeouts=None)))
    assert len(data["rewards"]) == 11 and not data["episodes"].any()


def test_npz_terminals_end_episodes(tmp_path):
    """A terminal's recorded successor would be the next episode's start. Tasks that never terminate drop the step."""
    columns = flat(terminals=at(12, 5, 11), timeouts=None)
    data, _ = load(POINT, dataset_path=save(tmp_path, columns))
    assert len(data["rewards"]) == 10 and data["episodes"].tolist() == [0] * 5 + [1] * 5
    np.testing.assert_array_equal(data["next_observations"][4], columns["observations"][5])
    assert not data["terminations"].any()


def test_npz_of_antmaze_keeps_terminal_steps(tmp_path):
    observations = np.zeros((12, 29), np.float32)
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


def test_actions_are_clipped(tmp_path):
    data, _ = load(POINT, dataset_path=save(tmp_path, flat()))
    assert data["actions"].min() == np.float32(-1 + 1e-5) and data["actions"].max() == np.float32(1 - 1e-5)
    inside = np.abs(flat()["actions"][:-1]) < 0.999
    np.testing.assert_array_equal(data["actions"][inside], flat()["actions"][:-1][inside])


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    "columns",
    [
        flat(rewards=np.array([Payload()] * 12, dtype=object)),
        flat(extra=np.array([Payload()], dtype=object)),
        flat(rewards=None),
        flat(terminals=None),
        flat(actions=np.zeros((11, 2))),
        flat(observations=np.zeros((13, 4))),
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
    ids=["pickle", "pickle beside", "no rewards", "no terminals", "short actions", "long observations",
         "short next_observations", "short timeouts", "scalar rewards", "flat observations", "wide observations",
         "wide actions", "narrow next_observations", "one row", "NaN", "infinity", "text"],
)
def test_bad_npz_is_refused_in_one_line(tmp_path, capsys, columns):
    path = save(tmp_path, columns)
    with pytest.raises(SystemExit) as stop:
        load(POINT, dataset_path=path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "data.npz" in err


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
    path = save(tmp_path, columns)
    assert load(POINT, dataset_path=path)[1]["reward_range"] == [0.0, 1.0]
    report = load(POINT, dataset_path=path, remove_discs=((3.5, -3.0, 1.0),))[1]
    assert report["reward_range"] == [0.0, 0.0] and report["successful_episodes_before_removal"] == 1
