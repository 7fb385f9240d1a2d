"""Bad input: one line on stderr, exit status 2, nothing written. A loss that is not a number: status 1, what and when.

Each run is a process of its own in a folder that holds only the script. `nothing_written` compares all files.
"""

import gc
import json
import os
import shutil
import signal
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


@pytest.mark.parametrize("words", [["--env-id", "kitchen-mix-v0"], ["--no-such-option", "1"], ["--gamma", "x"],
                                   ["--seed"], ["--compile", "maybe"], ["stray"], ["--hidden-dims", "64", "x"]],
                         ids=" ".join)
def test_a_command_line_that_cannot_be_read(box, words):
    assert words[0] in refused(box, *words)


def test_unknown_task_names_the_tasks(box):
    line = refused(box, "--env-id", "kitchen-mix-v0")
    assert "kitchen-mix-v0" in line and all(task in line for task in ooo.TASKS)


def test_retrain_at_beyond_the_online_budget(box):
    line = refused(box, "--env-id", PEN, "--online-steps", 1000, "--retrain-at", 500, 1001)
    assert "1001" in line and "1000" in line


def test_device_that_is_not_there(box):
    assert "cuda:97" in refused(box, "--env-id", PEN, "--device", "cuda:97")
    assert "nonsense" in refused(box, "--env-id", PEN, "--device", "nonsense")


# === datasets ===


def test_missing_dataset_without_network(box, tmp_path):
    """The id, the store, and what can be done; soon."""
    start = time.monotonic()
    store = {"MINARI_DATASETS_PATH": str(tmp_path / "empty")}
    line = refused(box, "--env-id", HAMMER, fresh=True, env=store)
    assert time.monotonic() - start < 30 + 20  # 30 s, and starting Python on a busy machine
    ways = ("minari download", "--dataset-id", "--dataset-path", "tools/collect_pointmaze.py")
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
    assert dataset_id in line and ("this task" in line or ooo.TASKS[env_id].gym_id in line)


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
    """A copy of the run in this test's own folder, to be damaged; as if it had ended before its results."""
    path = shutil.copytree(module_box.work / finished, box.work / finished)
    (path / "results.json").unlink()
    return path


def test_existing_run(finished, module_box):
    line = refused(module_box, "--env-id", PEN, *SHORT)
    assert finished in line and "--resume" in line


RESUME = ["--env-id", PEN, *SHORT, "--resume"]


def damage(content, kind):
    middle = len(content) // 2
    flip = bytes([content[middle] ^ 4])
    return {"empty": b"", "cut": content[:middle], "text": b"not what it was", "one bit": content[:middle] + flip +
            content[middle + 1 :], "a zeroed block": content[:64] + bytes(512) + content[576:],
            "its last byte": content[:-1]}[kind]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in ("checkpoint.pt", "replay.bin")
                         for kind in ("empty", "cut", "text", "one bit", "a zeroed block", "its last byte")),
                       ("metrics.jsonl", "cut"), ("timing.jsonl", "its last byte")])
def test_what_a_resume_keeps_is_verified(broken, box, name, kind):
    """Whatever happened to a saved file: one line that names it, and nothing has changed."""
    path = broken / name
    path.write_bytes(damage(path.read_bytes(), kind))
    assert name in refused(box, *RESUME)
    if name in ("checkpoint.pt", "replay.bin"):
        assert name in refused(box, "--exploit-only", f"runs/{broken.name}", "--exp-name", "x")


@pytest.mark.parametrize("name", ["checkpoint.pt", "replay.bin"])
def test_a_file_of_another_run(broken, finished, module_box, box, name):
    """Of the same settings: only the content, or the run's id, tells them apart."""
    assert module_box.run("--env-id", PEN, *SHORT, "--seed", 2, "--resume").code == 0
    shutil.copy(module_box.work / "runs" / f"{PEN}__iql_ooo__2" / name, broken / name)
    assert "checkpoint.pt" in (line := refused(box, *RESUME)) or name in line


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("content", [[1, 2], {"script": "iql_ooo"}, Payload()], ids=["list", "no id", "pickled code"])
def test_a_checkpoint_that_was_written_again(broken, box, content):
    torch.save(content, broken / "checkpoint.pt")
    assert "checkpoint.pt" in refused(box, *RESUME)
    assert not (box.work / "executed").exists()


def test_settings_that_were_changed_in_a_config(broken, box):
    """A digit of config.json: the checkpoint knows the settings that it was made with."""
    path = broken / "config.json"
    config = json.loads(path.read_text())
    config["args"]["gamma"] = 0.9
    path.write_text(json.dumps(config))
    assert "config.json" in refused(box, "--exploit-only", f"runs/{broken.name}", "--exp-name", "x")
    assert "config.json" in refused(box, *RESUME, "--gamma", 0.9)


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "replay.bin"])
def test_records_that_are_missing(broken, box, name):
    (broken / name).unlink()
    assert name in refused(box, *RESUME)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".", "", "-x", "a b", "x" * 300, "a\nb"])
def test_a_name_that_is_no_folder(box, name):
    assert "--exp-name" in refused(box, "--env-id", PEN, f"--exp-name={name}")


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


def test_a_retraining_on_anothers_data_does_not_become_a_run_of_its_own(finished, box, module_box):
    """Stopped, and continued without --exploit-only, it would explore itself."""
    words = ["--exploit-only", module_box.work / finished, "--exp-name", "x"]
    assert box.run(*words).code == 0
    (path,) = (box.work / "runs").glob("*__x__*")
    (path / "results.json").unlink()
    assert "--exploit-only" in refused(box, "--env-id", PEN, *SHORT, "--exp-name", "x", "--resume")
    assert box.run(*words, "--resume").code == 0


def test_nothing_to_evaluate(broken, box):
    for path in broken.glob("ex*_2.pt"):
        path.unlink()
    assert "exploitation" in refused(box, "--eval-only", f"runs/{broken.name}")


def test_damaged_policy(broken, box):
    (broken / "exploitation_2.pt").write_bytes(b"cut")
    assert "exploitation_2.pt" in refused(box, "--eval-only", f"runs/{broken.name}")


def test_video_without_a_way_to_render(broken, box):
    child = box.run("--eval-only", f"runs/{broken.name}", "--video", "--episodes", 1, env={"MUJOCO_GL": "nonsense"})
    assert child.code == 1 and "error: no video" in child.err and "MUJOCO_GL=egl" in child.err
    assert not list(broken.glob("*.mp4"))


def test_an_evaluation_that_cannot_be_saved(broken, box):
    """Its score is printed (a folder in the place of the file stands for one that may not be written)."""
    (broken / "exploitation_2_eval.json").mkdir()
    child = box.run("--eval-only", f"runs/{broken.name}", "--episodes", 1)
    assert child.code == 1 and "eval/success_rate" in child.out and child.err.startswith("error: ")


# === losses that are not numbers ===


@pytest.mark.parametrize(
    ("phase", "call", "step", "kept"),
    [
        ("pretrain", 25, 25, dict(grad_step=20, env_step=0)),
        ("online", 30 + 45, 75, dict(grad_step=30, env_step=0)),
        ("retrain", 30 + 60 + 25, 25, dict(env_step=60, retrain_step=20)),
    ],
)
def test_nan_stops_the_run(tiny, in_tmp, monkeypatch, capsys, phase, call, step, kept):
    """It names the first bad step and the loss; the last checkpoint was written before, and the run goes on from it."""
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--online-steps", "60", "--retrain-at", "60", "--log-every", "5"]
    calls, update = [0], ooo.iql_update

    def poisoned(*args, **options):
        calls[0] += 1
        losses = update(*args, **options)
        return {**losses, "losses/critic": torch.tensor(float("nan"))} if calls[0] == call else losses

    with monkeypatch.context() as patch:
        patch.setattr(ooo, "iql_update", poisoned)
        try:
            ooo.main(ooo.parse_args(words))
        except SystemExit as stop:
            assert stop.code == 1
    gc.collect()  # the run, with its lock
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line.startswith(f"error: losses/critic is nan at {phase} step {step};")
    (run,) = (in_tmp / "runs").iterdir()
    progress = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]
    assert {name: progress[name] for name in kept} == kept
    assert not (run / "exploitation_60.pt").exists()
    (row,) = ooo.main(ooo.parse_args([*words, "--resume"]))
    assert row["env_step"] == 60


def test_weights_that_are_not_finite_are_never_saved(tiny, in_tmp, monkeypatch, capsys):
    """Between two records no loss is looked at."""
    tiny(PEN)
    update, calls = ooo.iql_update, [0]

    def poisoned(agent, *args, **options):
        calls[0] += 1
        losses = update(agent, *args, **options)
        if calls[0] == 25:
            agent.value.biases[0].data[0, 0, 0] = float("nan")
        return {name: value.nan_to_num() for name, value in losses.items()}

    monkeypatch.setattr(ooo, "iql_update", poisoned)
    with pytest.raises(SystemExit):
        ooo.main(ooo.parse_args(["--env-id", PEN, *SMALL, "--online-steps", "60", "--retrain-at", "60"]))
    assert "explorer is not finite" in capsys.readouterr().err
    (run,) = (in_tmp / "runs").iterdir()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["grad_step"] == 20


def test_variables_of_other_programs_do_not_matter(tiny, box):
    tiny(PEN)
    names = ("MUJOCO_GL", "MPLBACKEND", "WANDB_MODE", "WANDB_PROJECT")
    child = box.run("--env-id", PEN, *SHORT, fresh=True, env=dict.fromkeys(names, "nonsense"))
    assert child.code == 0, child.err


def test_interrupt_of_an_evaluation(broken, box):
    child = box.run("--eval-only", f"runs/{broken.name}", signal_at=(signal.SIGINT, "open", "exploitation_2.pt", 1))
    assert child.code == 130 and child.err.count("\n") == 1 and child.err.startswith("error: interrupted")


