"""tools/collect_pointmaze.py: layout of the data, and that no half dataset is ever left."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import minari
import numpy as np
import pytest

PATH = Path(__file__).resolve().parent.parent / "tools" / "collect_pointmaze.py"
STEPS = 3000


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool as a module, with an empty Minari store."""
    spec = importlib.util.spec_from_file_location("collect_pointmaze", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)  # it would outlive the test
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return module


def collect(tool, **changes):
    """Run the tool; returns its exit status and the episodes that Minari then finds."""
    args = tool.Args(**{"steps": STEPS, **changes})
    status = tool.main(args)
    return status, list(minari.load_dataset(args.dataset_id))


def check_layout(episodes):
    for episode in episodes:
        steps = len(episode.actions)
        assert {key: value.shape for key, value in episode.observations.items()} == {
            "observation": (steps + 1, 4),
            "achieved_goal": (steps + 1, 2),
            "desired_goal": (steps + 1, 2),
        }
        assert episode.actions.dtype == np.float32 and np.abs(episode.actions).max() <= 1
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * (steps - 1) + [True]
        goals = episode.observations["desired_goal"]
        assert (goals == goals[0]).all()
        near = np.linalg.norm(episode.observations["achieved_goal"] - goals, axis=1) <= 0.45
        success = episode.infos["success"]
        assert success.shape == (steps + 1,) and (success[1:] == near[1:]).all()
        assert (episode.rewards == success[1:]).all() and not success[:-1].any()
    for before, after in zip(episodes, episodes[1:], strict=False):
        assert (before.observations["observation"][-1] == after.observations["observation"][0]).all()
        assert (before.observations["desired_goal"][0] != after.observations["desired_goal"][0]).all()


def test_dataset(tool, tmp_path):
    status, episodes = collect(tool)
    assert status == 0
    check_layout(episodes)
    assert sum(len(episode.actions) for episode in episodes) == STEPS
    assert all(episode.infos["success"][-1] for episode in episodes[:-1])
    dataset = minari.load_dataset("ooo/pointmaze/large-v0")
    env, eval_env = dataset.recover_environment(), dataset.recover_environment(eval_env=True)
    assert env.unwrapped.reset_target and not eval_env.unwrapped.reset_target
    # Positions stay inside: cells are 1 m wide, the maze of 9 x 12 cells is centred at the origin.
    positions = np.concatenate([episode.observations["achieved_goal"] for episode in episodes])
    cells = {(math.floor(4.5 - y), math.floor(x + 6)) for x, y in positions}
    assert len(cells) > 15 and all(env.unwrapped.maze.maze_map[row][col] == 0 for row, col in cells)
    assert [path.name for path in tmp_path.iterdir()] == ["ooo"]


@pytest.mark.parametrize(("maze", "cells"), [("UMaze", 7), ("Medium", 26)])
def test_the_small_mazes(tool, capfd, maze, cells):
    """Under an id of their own, of the environment that they name; nothing is printed by other packages."""
    status, episodes = collect(tool, maze=maze)
    assert status == 0 and len(episodes) > 5
    dataset = minari.load_dataset(f"ooo/pointmaze/{maze.lower()}-v0")
    env = dataset.recover_environment()
    assert dataset.spec.env_spec.id == f"PointMaze_{maze}-v3"
    assert sum(cell != 1 for row in env.unwrapped.maze.maze_map for cell in row) == cells
    err = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("collect:") for line in err), err


def test_time_limit_keeps_the_state_and_draws_a_new_goal(tool, monkeypatch):
    monkeypatch.setitem(tool.MAX_EPISODE_STEPS, "Large", 40)
    _, episodes = collect(tool)
    check_layout(episodes)
    assert max(len(episode.actions) for episode in episodes) == 40
    assert sum(not episode.infos["success"][-1] for episode in episodes) > 10


def test_existing_dataset_is_kept_unless_overwritten(tool, capsys):
    _, first = collect(tool, seed=1)
    status, second = collect(tool, seed=2)
    assert status == 0 and "kept" in capsys.readouterr().out
    assert (first[0].actions == second[0].actions).all()
    _, third = collect(tool, seed=2, overwrite=True)
    assert first[0].actions.shape != third[0].actions.shape or (first[0].actions != third[0].actions).any()
    _, again = collect(tool, seed=1, overwrite=True)
    assert len(again) == len(first)
    assert all((a.actions == b.actions).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("before", [False, True], ids=["empty store", "overwrite"])
def test_interrupted_write_leaves_no_half_dataset(tool, tmp_path, monkeypatch, before):
    if before:
        collect(tool, seed=1)

    def interrupted(storage, episodes):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tool.main(tool.Args(steps=STEPS, seed=2, overwrite=before))
    assert not list(tmp_path.glob(".collect_*"))
    assert list(minari.list_local_datasets()) == (["ooo/pointmaze/large-v0"] if before else [])
    status, episodes = collect(tool, seed=2)
    assert status == 0 and sum(len(episode.actions) for episode in episodes) == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_id": "D4RL/pointmaze/large-v2"},
        {"dataset_id": "d4rl/x-v0"},
        {"dataset_id": "../x-v0"},
        {"dataset_id": "no-version"},
        {"steps": 0},
        {"steps": float("nan")},
        {"seed": -1},
        {"seed": float("nan")},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_in_one_line(tool, tmp_path, capsys, changes):
    assert tool.main(tool.Args(**changes)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", ["a file", "full"])
def test_a_store_that_cannot_take_the_data_is_refused_in_one_line(store, tool, tmp_path, monkeypatch, capsys):
    if store == "full":
        monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file"))
    assert tool.main(tool.Args(steps=STEPS)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err and "MiB" in err or "written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"] * (store == "a file")


def test_home_is_expanded(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", "~/store")
    assert tool.main(tool.Args(steps=50)) == 0
    assert (tmp_path / "store" / "ooo" / "pointmaze" / "large-v0").is_dir()


def test_a_folder_that_is_no_dataset_is_not_taken_for_one(tool, tmp_path, capsys):
    (tmp_path / "ooo/pointmaze/large-v0/data").mkdir(parents=True)
    assert tool.main(tool.Args(steps=STEPS)) == 2
    assert "no readable dataset" in capsys.readouterr().err
    assert collect(tool, overwrite=True)[0] == 0
