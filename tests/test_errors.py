"""Bad input: one line on stderr, exit status 2, nothing written. A loss that is not a number: status 1, what and when.

Each run is a process of its own in a folder that holds only the script. `nothing_written` compares all files.
"""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from runner import SMALL
from tiny_data import roll_out

import iql_ooo as ooo

PEN, POINT, HAMMER = "pen-binary-v0", "maze2d-missing-data-large-v1", "hammer-truncated-expert-v1"
SHORT = [*SMALL, "--offline-steps", "2", "--online-steps", "2", "--retrain-at", "2", "--retrain-steps", "2"]


def refused(box, *args, code=2, **options):
    """Run it; check that it ends as bad input should; return the line."""
    before = contents(box)
    child = box.run(*args, **options)
    assert child.code == code, child.err
    assert child.err.startswith("error: ") and child.err.count("\n") == 1 and child.err.endswith("\n"), child.err
    assert contents(box) == before
    return child.err


def contents(box):
    return {path: path.read_bytes() if path.is_file() else None for path in box.work.rglob("*")}


# === arguments ===


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hammer-truncated-expert-v0", "hammer-truncated-expert-v1"),
        ("kitchen-mix-v0", "kitchen-mixed-v0"),
        ("door", "door-binary-v0"),
        ("antmaze-large-diverse-v2", "antmaze-goal-missing-large-v2"),
    ],
)
def test_unknown_task(box, typed, meant):
    line = refused(box, "--env-id", typed)
    assert f"did you mean {meant}?" in line and all(task in line for task in ooo.TASKS)


def test_retrain_at_beyond_the_online_budget(box):
    line = refused(box, "--env-id", PEN, "--online-steps", 1000, "--retrain-at", 500, 1001)
    assert "1001" in line and "1000" in line


def test_device_that_is_not_there(box):
    assert "cuda:97" in refused(box, "--env-id", PEN, "--device", "cuda:97")
    assert "nonsense" in refused(box, "--env-id", PEN, "--device", "nonsense")


def test_buffer_that_does_not_fit(tiny, box):
    tiny(PEN)
    line = refused(box, "--env-id", PEN, "--online-steps", 10**12)
    assert "GiB" in line and "--online-steps" in line


# === datasets ===


def test_missing_dataset_without_network(box, tmp_path):
    """The id, the store, and what can be done; soon."""
    start = time.monotonic()
    store = {"MINARI_DATASETS_PATH": str(tmp_path / "empty")}
    line = refused(box, "--env-id", HAMMER, fresh=True, env=store)
    assert time.monotonic() - start < 30 + 20  # 30 s, and starting Python on a busy machine
    ways = ("minari download", "--dataset-id", "--dataset-path")
    assert all(part in line for part in ("D4RL/hammer/expert-v2", store["MINARI_DATASETS_PATH"], *ways))


def test_missing_dataset_of_ones_own(box, tmp_path):
    options = {"env": {"MINARI_DATASETS_PATH": str(tmp_path / "empty")}}
    for dataset_id in ("mine/large-v0", "mine/large-v0:5", "no-version", "../up-v0"):
        assert dataset_id.split(":")[0] in refused(box, "--env-id", POINT, "--dataset-id", dataset_id, **options)


def test_default_store_is_minaris(box, tmp_path):
    line = refused(box, "--env-id", HAMMER, env={"HOME": str(tmp_path), "MINARI_DATASETS_PATH": ""})
    assert str(tmp_path / ".minari" / "datasets") in line


def test_damaged_dataset(tiny, box, tmp_path):
    tiny(HAMMER)
    store = tmp_path / "store"
    shutil.copytree(tiny.path / "D4RL" / "hammer", store / "D4RL" / "hammer")
    (data,) = (store / "D4RL" / "hammer" / "expert-v2" / "data").glob("*.hdf5")
    data.write_bytes(data.read_bytes()[:1000])
    assert "D4RL/hammer/expert-v2" in refused(box, "--env-id", HAMMER, env={"MINARI_DATASETS_PATH": str(store)})


@pytest.mark.parametrize("limit", ["x", "-1", "2:3", "0"])
def test_wrong_number_of_episodes(tiny, box, limit):
    tiny(PEN)
    assert f"D4RL/pen/human-v2:{limit}" in refused(box, "--env-id", PEN, "--dataset-id", f"D4RL/pen/human-v2:{limit}")


@pytest.mark.parametrize(
    ("env_id", "data_of"),
    [(PEN, HAMMER), (HAMMER, PEN), (POINT, PEN), (PEN, POINT), ("kitchen-mixed-v0", PEN), ("kitchen-mixed-v0", POINT),
     ("antmaze-goal-missing-large-v2", POINT)],
)
def test_dataset_of_another_task(tiny, box, env_id, data_of):
    """Other shapes, or another kind of observation."""
    tiny(env_id)
    dataset_id = next(iter(tiny(data_of)))
    line = refused(box, "--env-id", env_id, "--dataset-id", dataset_id)
    assert dataset_id in line and (env_id in line or ooo.ENVIRONMENTS[env_id].gym_id in line)


@pytest.mark.parametrize("where", ["observations", "actions", "rewards"])
def test_nan_in_data(tiny, box, where):
    if not tiny.made.get(where):
        env = ooo.make_env(HAMMER).env  # the package's own
        episode = roll_out(env, 10, seed=0)
        episode[where][7] = np.nan
        tiny.made[where] = {f"ooo-test/nan-{where}-v0": [episode]}
        tiny.write(f"ooo-test/nan-{where}-v0", [episode], env.observation_space, env.action_space)
    line = refused(box, "--env-id", HAMMER, "--dataset-id", f"ooo-test/nan-{where}-v0")
    assert "NaN" in line and where in line and "7" in line


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off", None, "npy", "folder", "pickle"])
def test_unreadable_npz(box, tmp_path, content):
    path = tmp_path / "data.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif content == "folder":
        path.mkdir()
    elif content == "pickle":
        np.savez(path, observations=np.array([{}]), actions=np.zeros(1), rewards=np.zeros(1), terminals=np.zeros(1))
    elif content is not None:
        path.write_bytes(content)
    assert str(path) in refused(box, "--env-id", POINT, "--dataset-path", path)


# === run directories ===


@pytest.fixture(scope="module")
def finished(tiny, module_box):
    """A small finished run; never changed. Its path, relative to module_box.work."""
    tiny(PEN)
    child = module_box.run("--env-id", PEN, *SHORT)
    assert child.code == 0, child.err
    return f"runs/{PEN}__iql_ooo__1"


@pytest.fixture
def broken(finished, module_box, box):
    """A copy of the run in this test's own folder, to be damaged."""
    return shutil.copytree(module_box.work / finished, box.work / finished)


def test_existing_run(finished, module_box):
    line = refused(module_box, "--env-id", PEN, *SHORT)
    assert finished in line and "--resume" in line


RESUME = ["--env-id", PEN, *SHORT, "--resume"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_corrupt_checkpoint(broken, box, damage):
    path = broken / "checkpoint.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes({"empty": b"", "cut": content[:middle], "text": b"not a checkpoint",
                      "flipped": b"\0" * 200 + content[200:]}[damage])
    assert "checkpoint.pt" in refused(box, *RESUME)
    assert "checkpoint.pt" in refused(box, "--exploit-only", f"runs/{broken.name}", "--exp-name", "x")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("kind", ["another script's", "no dict", "pickled code", "another task's"])
def test_foreign_checkpoint(tiny, broken, box, kind):
    path = broken / "checkpoint.pt"
    if kind == "another task's":
        tiny(HAMMER)
        assert box.run("--env-id", HAMMER, *SHORT, "--exp-name", "other").code == 0
        shutil.copy(box.work / "runs" / f"{HAMMER}__other__1" / "checkpoint.pt", path)
        for name in ("metrics.jsonl", "evals.jsonl"):  # long enough for it
            with open(broken / name, "a") as file:
                file.write("{}\n" * 10_000)
    elif kind == "another script's":
        content = torch.load(path, weights_only=True)
        torch.save({**content, "script": "rlpd_ooo"}, path)
    else:
        torch.save([1, 2] if kind == "no dict" else {"script": "iql_ooo", "progress": Payload()}, path)
    assert "checkpoint.pt" in refused(box, *RESUME)


def test_foreign_config(broken, box):
    """A run of another script, which has other arguments."""
    path = broken / "config.json"
    config = json.loads(path.read_text())
    args = {name: value for name, value in config["args"].items() if name != "expectile"}
    path.write_text(json.dumps({**config, "script": "rlpd_ooo", "args": {**args, "utd_ratio": 20}}))
    source = f"runs/{broken.name}"
    for words in (["--exploit-only", source, "--exp-name", "x"], ["--eval-only", source], RESUME):
        assert broken.name in refused(box, *words)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"args": 3}', b"{}", b"\xff\xfe", b'{"args": {}}'])
def test_damaged_config(broken, box, content):
    (broken / "config.json").write_bytes(content)
    for words in (["--exploit-only", f"runs/{broken.name}", "--exp-name", "x"], RESUME):
        assert broken.name in refused(box, *words)


@pytest.mark.parametrize("option", ["--exploit-only", "--eval-only"])
def test_not_a_run_directory(box, option):
    (box.work / "folder").mkdir()
    (box.work / "file").write_text("")
    for name in ("folder", "file", "missing"):
        assert name in refused(box, option, name)


def test_runs_folder_that_cannot_be_made(tiny, box):
    tiny(PEN)
    (box.work / "file").write_text("")
    assert "file" in refused(box, "--env-id", PEN, *SHORT, "--runs-dir", "file", code=1)


def test_records_shorter_than_the_checkpoint_says(broken, box):
    (broken / "metrics.jsonl").write_text("")
    assert "metrics.jsonl" in refused(box, *RESUME)


def test_replay_data_that_is_missing(broken, box):
    shutil.rmtree(broken / "replay")
    assert "replay" in refused(box, *RESUME)
    assert "replay" in refused(box, "--exploit-only", f"runs/{broken.name}", "--exp-name", "x")


def test_exploit_only_beyond_what_was_played(finished, module_box):
    """Checked against the stored data, not only against the budget."""
    line = refused(module_box, "--exploit-only", finished, "--exp-name", "x", "--online-steps", 9, "--retrain-at", 3)
    assert "3" in line and finished in line


def test_exploit_only_with_rnd_that_was_not_saved(finished, module_box):
    words = ["--exploit-only", finished, "--exp-name", "x", "--retrain-frozen-rnd", "--retrain-at", 1]
    assert "rnd_1.pt" in refused(module_box, *words)


def test_exploit_only_on_other_data(finished, module_box):
    line = refused(module_box, "--exploit-only", finished, "--exp-name", "x", "--dataset-id", "D4RL/pen/human-v2")
    assert "sha256" in line


def test_nothing_to_evaluate(broken, box):
    (broken / "exploitation_2.pt").unlink()
    assert "exploitation" in refused(box, "--eval-only", f"runs/{broken.name}")


def test_damaged_policy(broken, box):
    (broken / "exploitation_2.pt").write_bytes(b"cut")
    assert "exploitation_2.pt" in refused(box, "--eval-only", f"runs/{broken.name}")


def test_video_without_a_way_to_render(broken, box):
    """The first line says it; gymnasium's half-built viewer may complain after it."""
    child = box.run("--eval-only", f"runs/{broken.name}", "--video", "--episodes", 1, env={"MUJOCO_GL": "nonsense"})
    assert child.code == 2 and child.err.startswith("error: cannot render") and "MUJOCO_GL=egl" in child.err
    assert not list(broken.glob("*.mp4")) and not list(broken.glob("*_eval.json"))


# === losses that are not numbers ===


def test_infinite_learning_rate(tiny, box):
    tiny(PEN)
    child = box.run("--env-id", PEN, *SMALL, "--learning-rate", "inf", "--checkpoint-every", 5)
    assert child.code == 1
    line = child.err.splitlines()[-1]
    assert line.startswith("error: losses/") and "nan at step 1;" in line and "Traceback" not in child.err


@pytest.mark.parametrize(
    ("phase", "call", "step", "kept"),
    [
        ("pretrain", 25, 25, dict(grad_step=20, env_step=0)),
        ("online", 30 + 42, 72, dict(grad_step=30, env_step=0)),
        ("retrain", 30 + 60 + 25, 25, dict(env_step=60, retrain_step=20)),
    ],
)
def test_nan_stops_the_run(tiny, in_tmp, monkeypatch, capsys, phase, call, step, kept):
    """It names the first bad step and the loss; the last checkpoint was written before, and the run goes on from it."""
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--online-steps", "60", "--retrain-at", "60", "--log-every", "50"]
    calls, update = [0], ooo.iql_update

    def poisoned(*args, **options):
        calls[0] += 1
        losses = update(*args, **options)
        return {**losses, "losses/critic": torch.tensor(float("nan"))} if calls[0] == call else losses

    with monkeypatch.context() as patch:
        patch.setattr(ooo, "iql_update", poisoned)
        with pytest.raises(SystemExit) as stop:
            ooo.main(ooo.parse_args(words))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith(f"error: losses/critic is nan at step {step};")
    (run,) = (in_tmp / "runs").iterdir()
    progress = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]
    assert {name: progress[name] for name in kept} == kept
    assert not (run / "exploitation_60.pt").exists()
    (row,) = ooo.main(ooo.parse_args([*words, "--resume"]))
    assert row["env_step"] == 60


def test_loss_history():
    history = ooo.LossHistory()
    assert history.means(0) == {}
    for value in (1.0, 3.0):
        history.add({"losses/a": torch.tensor(value), "losses/b": torch.tensor(2 * value)})
    assert history.means(2) == {"losses/a": 2.0, "losses/b": 4.0}
    assert history.means(2) == {}  # only what is new
    for value in (1.0, float("inf"), float("nan")):
        history.add({"losses/a": torch.tensor(0.0), "losses/b": torch.tensor(value)})
    with pytest.raises(ooo.NonFiniteLoss, match="losses/b is inf at step 41"):
        history.means(42)
