"""The replay buffer: layout, growth, chunks on disk, memory check, and the choice of high-reward rows."""

from types import SimpleNamespace

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
    return {name: value.numpy() for name, value in buffer.split(buffer.data[start : buffer.size]).items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def filled(offline, online, capacity):
    """A buffer with offline rows and then online rows, added one by one."""
    buffer, data = ooo.ReplayBuffer(SHAPES, capacity, CPU), rows(online, seed=1)
    buffer.extend(rows(offline))
    for i in range(online):
        buffer.add(**{name: value[i] for name, value in data.items()})
    return buffer


def test_extend_add_and_split():
    buffer = filled(10, 5, 20)
    want = {name: np.concatenate([rows(10)[name], rows(5, seed=1)[name]]) for name in SHAPES}
    assert buffer.size == 15
    equal(contents(buffer), want)
    chosen = torch.tensor([14, 0, 14])
    batch = buffer.split(buffer.data[chosen])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    equal({name: value.numpy() for name, value in batch.items()}, {n: v[chosen.numpy()] for n, v in want.items()})


def test_adding_copies_what_it_is_given():
    buffer, data = ooo.ReplayBuffer(SHAPES, 2, CPU), {name: value[0] for name, value in rows(1).items()}
    buffer.add(**data)
    before = {name: value.copy() for name, value in contents(buffer).items()}
    buffer.add(**{name: value + 1 for name, value in data.items()})
    equal({name: value[:1] for name, value in contents(buffer).items()}, before)


def test_numbers_of_python_and_booleans_are_stored():
    buffer = ooo.ReplayBuffer(SHAPES, 1, CPU)
    buffer.add(observations=np.zeros(3), actions=np.zeros(2), rewards=-0.5, next_observations=np.ones(3),
               terminations=True, episodes=17)
    row = contents(buffer)
    assert (row["rewards"][0], row["terminations"][0], row["episodes"][0]) == (-0.5, 1.0, 17.0)


def test_overflow_is_an_error():
    """Append-only: nothing is ever overwritten."""
    buffer = filled(10, 0, 12)
    before = buffer.data[:10].clone()
    with pytest.raises(IndexError):
        buffer.extend(rows(3))
    buffer.extend(rows(2))
    with pytest.raises(IndexError):
        buffer.add(**{name: value[0] for name, value in rows(1).items()})
    assert torch.equal(buffer.data[:10], before)


@pytest.mark.parametrize("wanted", [25, 17, 10, 3, 0])
def test_chunks(tmp_path, wanted):
    """Also when the last chunk holds more than the checkpoint that counts."""
    buffer = filled(8, 25, 40)
    for start, stop in ((0, 10), (10, 25)):
        buffer.save_chunk(tmp_path / "replay", 8, start, stop)
    again = ooo.ReplayBuffer(SHAPES, 40, CPU)
    again.extend(rows(8))
    again.load_chunks(tmp_path / "replay", wanted)
    assert again.size == 8 + wanted
    equal(contents(again), {name: value[: 8 + wanted] for name, value in contents(buffer).items()})


def test_a_chunk_is_plain_arrays(tmp_path):
    filled(8, 5, 40).save_chunk(tmp_path, 8, 0, 5)
    (path,) = tmp_path.iterdir()
    with np.load(path, allow_pickle=False) as chunk:
        equal({name: chunk[name] for name in chunk.files}, rows(5, seed=1))


def test_saving_leaves_old_chunks_alone(tmp_path):
    buffer = filled(8, 25, 40)
    buffer.save_chunk(tmp_path, 8, 0, 10)
    (first,) = tmp_path.iterdir()
    was = first.stat()
    buffer.save_chunk(tmp_path, 8, 10, 25)
    now = first.stat()
    assert (now.st_mtime_ns, now.st_ino, now.st_size) == (was.st_mtime_ns, was.st_ino, was.st_size)
    assert len(list(tmp_path.iterdir())) == 2


def one_line_error(capsys, stop):
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("damage", ["missing", "first missing", "empty", "cut", "text", "field missing"])
def test_damaged_chunks_are_an_error(tmp_path, capsys, damage):
    buffer = filled(8, 30, 40)
    for start in (0, 10, 20):
        buffer.save_chunk(tmp_path, 8, start, start + 10)
    paths = sorted(tmp_path.iterdir())
    if damage == "missing":
        paths[1].unlink()
    elif damage == "first missing":
        paths[0].unlink()
    elif damage == "field missing":
        with np.load(paths[1]) as chunk:
            rest = {name: chunk[name] for name in chunk.files if name != "actions"}
        np.savez(paths[1], **rest)
    else:
        content = paths[1].read_bytes()
        paths[1].write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not an archive"}[damage])
    again = ooo.ReplayBuffer(SHAPES, 40, CPU)
    with pytest.raises(SystemExit) as stop:
        again.load_chunks(tmp_path, 30)
    assert tmp_path.name in one_line_error(capsys, stop)


def test_memory_is_checked_before_it_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("allocated before the check"))
    monkeypatch.setattr(ooo.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    with pytest.raises(SystemExit) as stop:
        ooo.ReplayBuffer(SHAPES, 2**26, CPU)  # 11 numbers of 4 bytes a row: 2.75 GiB
    err = one_line_error(capsys, stop)
    assert "2.75 GiB" in err and "1.00 GiB" in err and "--online-steps" in err


# === high-reward rows ===


def session(rewards, episodes, **args):
    data = {**rows(len(rewards)), "rewards": np.float32(rewards), "episodes": np.float32(episodes)}
    buffer = ooo.ReplayBuffer(SHAPES, len(rewards), CPU)
    buffer.extend(data)
    return SimpleNamespace(args=ooo.Args(**args), buffer=buffer, device=CPU)


REWARDS, EPISODES = [0, 4, 1, 0, 3, 4, 0], [0, 0, 0, 1, 1, 2, 2]


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
    assert ooo.high_reward_rows(session(REWARDS, EPISODES, **settings), n).tolist() == want
    assert capsys.readouterr().out == ""


def test_without_high_rewards_sampling_stays_uniform(capsys):
    s = session(REWARDS, EPISODES, retrain_upsample=8, upsample_reward=5.0)
    assert len(ooo.high_reward_rows(s, 7)) == 0
    assert "uniform" in capsys.readouterr().out
