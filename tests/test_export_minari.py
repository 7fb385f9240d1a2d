"""What a run collected is a Minari dataset that iql_ooo.py reads as the run had it."""

import json
import sys
from pathlib import Path

import minari
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import export_minari  # noqa: E402

import iql_ooo as ooo  # noqa: E402


@pytest.fixture
def store(tiny, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return runs


@pytest.mark.parametrize("script", ["iql_ooo", "calql_ooo"])
def test_the_dataset_is_what_was_collected(store, script):
    config, module, data = export_minari.read_run(store[script])
    export_minari.main([str(store[script]), "--dataset-id", "me/explored-v0"])
    dataset = minari.load_dataset("me/explored-v0")
    assert dataset.total_steps == len(data["rewards"]) == 200
    assert config["run_id"] in dataset.storage.metadata["description"]
    args = ooo.parse_args(["--env-id", config["args"]["env_id"], "--dataset-id", "me/explored-v0", "--remove-discs",
                           "--data-subset", "0"])
    env = ooo.make_env(args.env_id)
    loaded, _ = ooo.load_dataset(args, env, 1)
    np.testing.assert_array_equal(loaded["observations"], data["observations"])
    np.testing.assert_array_equal(loaded["next_observations"], data["next_observations"])
    np.testing.assert_array_equal(loaded["rewards"], data["rewards"])
    np.testing.assert_allclose(loaded["actions"], data["actions"], atol=2e-5)  # clipped as all offline data
    starts = np.flatnonzero(np.diff(data["episodes"], prepend=-1))
    np.testing.assert_array_equal(np.flatnonzero(np.diff(loaded["episodes"], prepend=-1)), starts)


def test_hammers_reward_is_the_packages(store, monkeypatch):
    """load_dataset turns it into D4RL's again."""
    task = ooo.TASKS["hammer-truncated-expert-v1"]
    rng = np.random.default_rng(0)
    next_obs, reward = rng.normal(size=(20, 46)).astype(np.float32), rng.normal(size=20)
    correction, _ = ooo.task_reward(task, next_obs, np.zeros(20))
    np.testing.assert_allclose(ooo.task_reward(task, next_obs, reward - correction)[0], reward)


def test_bad_input_is_one_line(store, tmp_path, capsys):
    (tmp_path / "no run").mkdir()
    for words, named in (([str(tmp_path / "no run"), "--dataset-id", "me/x-v0"], "no run"),
                         ([str(store["iql_ooo"]), "--dataset-id", "no version"], "no version")):
        with pytest.raises(SystemExit) as stop:
            export_minari.main(words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and named in err and err.startswith("error: ")


def test_an_existing_dataset_is_kept(store, capsys):
    words = [str(store["iql_ooo"]), "--dataset-id", "me/twice-v0"]
    export_minari.main(words)
    before = json.dumps(str(minari.load_dataset("me/twice-v0").spec))
    with pytest.raises(SystemExit):
        export_minari.main(words)
    assert json.dumps(str(minari.load_dataset("me/twice-v0").spec)) == before
