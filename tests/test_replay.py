"""The replay buffer: layout, growth, rows as bytes and back, sampling, the choice of high-reward rows."""

import tracemalloc
import zlib

import numpy as np
import pytest
import torch

import iql_ooo as ooo

SHAPES = dict(observations=(3,), actions=(2,), rewards=(), next_observations=(3,), terminations=(), episodes=())
CPU = torch.device("cpu")


def rows(n, seed=0):
    """n transitions as columns."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(n, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def contents(buffer, start=0):
    return {name: value.numpy()[start:] for name, value in buffer.first(buffer.size).items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def filled(offline, online, room):
    """A buffer with offline rows and then online rows, added one by one."""
    buffer, data = ooo.ReplayBuffer(rows(offline), room, CPU), rows(online, seed=1)
    for i in range(online):
        buffer.add(**{name: value[i] for name, value in data.items()})
    return buffer


def test_offline_data_then_what_is_added():
    buffer = filled(10, 5, 10)
    want = {name: np.concatenate([rows(10)[name], rows(5, seed=1)[name]]) for name in SHAPES}
    assert (buffer.size, buffer.offline_size, buffer.width, buffer.obs_dim, buffer.act_dim) == (15, 10, 11, 3, 2)
    equal(contents(buffer), want)
    chosen = torch.tensor([14, 0, 14])
    batch = buffer.split(buffer.data[chosen])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    equal({name: value.numpy() for name, value in batch.items()}, {n: v[chosen.numpy()] for n, v in want.items()})
    equal({n: v.numpy() for n, v in buffer.first(12).items()}, {n: v[:12] for n, v in want.items()})


def test_adding_copies_what_it_is_given():
    buffer, data = ooo.ReplayBuffer(rows(0), 2, CPU), {name: value[0] for name, value in rows(1).items()}
    buffer.add(**data)
    before = {name: value.copy() for name, value in contents(buffer).items()}
    buffer.add(**{name: value + 1 for name, value in data.items()})
    equal({name: value[:1] for name, value in contents(buffer).items()}, before)


def test_numbers_of_python_and_booleans_are_stored():
    buffer = ooo.ReplayBuffer(rows(0), 1, CPU)
    buffer.add(observations=np.zeros(3), actions=np.zeros(2), rewards=-0.5, next_observations=np.ones(3),
               terminations=True, episodes=17)
    row = contents(buffer)
    assert (row["rewards"][0], row["terminations"][0], row["episodes"][0]) == (-0.5, 1.0, 17.0)


@pytest.mark.parametrize("n", [0, 1, 25])
def test_rows_as_bytes_and_back(tmp_path, n):
    """replay.bin holds all of a transition, in float32; at a checkpoint it gets the rows that are new."""
    buffer, again = filled(8, n, 40), ooo.ReplayBuffer(rows(8), 40, CPU)
    saved = buffer.rows_since(0)
    assert len(saved) == 4 * 11 * n
    assert all(saved == saved[: 44 * t] + buffer.rows_since(t) for t in range(n + 1))
    again.load(*stored(tmp_path, saved), n)
    assert again.size == 8 + n
    equal(contents(again), contents(buffer))
    again.add(**{name: value[0] for name, value in rows(1).items()})  # it goes on
    assert again.size == 9 + n


def stored(tmp_path, saved, size=None):
    """A replay.bin, of which the first bytes are the run's: path, size and checksum."""
    (tmp_path / "replay.bin").write_bytes(saved)
    size = len(saved) if size is None else size
    return tmp_path / "replay.bin", size, zlib.crc32(saved[:size])


@pytest.mark.parametrize(("size", "count"), [(25, 25), (25, 7), (20, 20), (20, 0)])
def test_rows_of_the_first_bytes_up_to_a_count(tmp_path, size, count):
    """What was written after the checkpoint is not read; a retraining for t takes the first t of them."""
    buffer, again = filled(8, 25, 40), ooo.ReplayBuffer(rows(8), 40, CPU)
    again.load(*stored(tmp_path, buffer.rows_since(0), 44 * size), count)
    equal(contents(again), {name: value[: 8 + count] for name, value in contents(buffer).items()})


def test_many_rows_are_read_part_by_part(tmp_path):
    """A copy of all of them beside the buffer would be a second one."""
    n = 50_000
    one = ooo.ReplayBuffer(rows(0), n, CPU)
    one.data[:], one.size = torch.rand(n, 11), n
    place = stored(tmp_path, one.rows_since(0))
    again = ooo.ReplayBuffer(rows(0), n, CPU)
    tracemalloc.start()
    again.load(*place, n)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(one.data, again.data) and again.size == n
    assert most < 44 * n / 3


@pytest.mark.parametrize("damage", ["a bit", "short", "checksum", "count", "half a row"])
def test_rows_that_are_not_as_written_are_refused(tmp_path, capsys, damage):
    saved, count = bytearray(filled(8, 25, 40).rows_since(0)), 25
    path, size, checksum = stored(tmp_path, bytes(saved))
    if damage == "a bit":
        saved[500] ^= 1
        path.write_bytes(saved)
    elif damage == "short":
        path.write_bytes(saved[:-44])
    elif damage == "checksum":
        checksum += 1
    elif damage == "count":
        count = 26
    else:
        path, size, checksum = stored(tmp_path, bytes(saved[:-10]))
    with pytest.raises(SystemExit) as stop:
        ooo.ReplayBuffer(rows(8), 40, CPU).load(path, size, checksum, count)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "replay.bin" in err


def test_episode_numbers_go_on_after_the_data():
    data = rows(4) | {"episodes": np.float32([0, 0, 7, 7])}
    assert ooo.ReplayBuffer(data, 0, CPU).offline_episodes == 8
    assert ooo.ReplayBuffer(rows(0), 5, CPU).offline_episodes == 0  # no offline data at all


# === sampling ===


def numbered(offline, online):
    """A buffer whose rewards are the rows' numbers."""
    data = rows(offline) | {"rewards": np.arange(offline, dtype=np.float32)}
    buffer = ooo.ReplayBuffer(data, online + 10, CPU)  # with room left, that must not be drawn
    buffer.data[buffer.size :] = -1.0
    for i in range(online):
        buffer.add(**{name: value[0] for name, value in rows(1).items()} | {"rewards": offline + i})
    return buffer


@pytest.mark.parametrize(("first", "stop"), [(None, 30), (20, 20), (25, 25)], ids=["all", "offline", "prefix"])
def test_uniform_over_the_first_rows(first, stop):
    buffer = numbered(20, 10)
    torch.manual_seed(0)
    drawn = torch.cat([buffer.split(buffer.sample(100, first))["rewards"] for _ in range(60)]).numpy()
    counts = np.bincount(drawn.astype(int), minlength=30)
    assert (counts[stop:] == 0).all() and drawn.min() == 0
    assert np.abs(counts[:stop] - 6000 / stop).max() < 5 * np.sqrt(6000 / stop)
    assert buffer.sample(7, first).shape == (7, 11)


def test_extra_rows_come_from_the_high_ones():
    buffer = numbered(20, 10)
    high = torch.tensor([3, 17, 29])
    torch.manual_seed(0)
    batches = [buffer.split(buffer.sample(16, 20, high, 5))["rewards"].numpy() for _ in range(400)]
    assert {len(batch) for batch in batches} == {16}
    counts = np.bincount(np.concatenate([batch[-5:] for batch in batches]).astype(int), minlength=30)
    assert set(np.flatnonzero(counts)) == {3, 17, 29} and counts[counts > 0].min() > 550
    uniform = np.concatenate([batch[:-5] for batch in batches])
    assert set(uniform) == set(range(20))


# === high-reward rows ===

REWARDS, EPISODES = [0, 4, 1, 0, 3, 4, 0], [0, 0, 0, 1, 1, 2, 2]


def high_rows(n, **args):
    """Of the first n transitions."""
    data = {**rows(7), "rewards": np.float32(REWARDS), "episodes": np.float32(EPISODES)}
    found = ooo.high_reward_rows(ooo.Args(**args), ooo.ReplayBuffer(data, 0, CPU).first(n))
    return torch.as_tensor(found).tolist()


@pytest.mark.parametrize(
    ("settings", "n", "want"),
    [
        (dict(retrain_upsample=0, upsample_reward=4.0), 7, []),
        (dict(retrain_upsample=8, upsample_reward=4.0), 7, [1, 5]),
        (dict(retrain_upsample=8, upsample_reward=3.0), 7, [1, 4, 5]),
        (dict(retrain_upsample=8, upsample_reward=4.0), 5, [1]),  # only D_off + D_on[:t]
        (dict(retrain_upsample=8, upsample_reward=4.0, upsample_trajectories=True), 7, [0, 1, 2, 5, 6]),
        (dict(retrain_upsample=8, upsample_reward=4.0, upsample_trajectories=True), 6, [0, 1, 2, 5]),
    ],
)
def test_high_reward_rows(settings, n, want, capsys):
    assert high_rows(n, **settings) == want
    assert capsys.readouterr().out == ""


def test_without_high_rewards_sampling_stays_uniform(capsys):
    assert high_rows(7, retrain_upsample=8, upsample_reward=5.0) == []
    assert "uniform" in capsys.readouterr().out
