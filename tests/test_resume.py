"""Equal seeds give equal bytes; and a run killed at any moment ends, with `--resume`, as if it had not been.

Each run is a process of its own. Most are sent a real SIGKILL just before a certain file operation (runner.Signaller),
so that every run of the tests kills at the same moments, also at those that an outside observer would rarely hit. One
test kills from outside.
"""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import SMALL

import iql_ooo as ooo

PEN = "pen-binary-v0"
# Episodes have 100 steps. Checkpoints: pretraining 5, 10, 15; online 100, 110; each retraining 5, 10, end.
RUN = ["--env-id", PEN, *SMALL, *"""--offline-steps 15 --online-steps 110 --retrain-at 70 110 --retrain-steps 12
--log-every 7 --checkpoint-every 5""".split()]
FINISHED = {"metrics.jsonl", "evals.jsonl", "exploitation_70.pt", "exploitation_110.pt", "exploration_110.pt"}


def directory(box, name="iql_ooo"):
    return box.work / "runs" / f"{PEN}__{name}__1"


def digest(content):
    """A fingerprint of nested dicts and lists of tensors and numbers."""
    if isinstance(content, torch.Tensor):
        return hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(content, dict):  # ids and names differ from run to run
        return {str(key): digest(value) for key, value in content.items()
                if key not in ("run_id", "source_run_id", "exp_name")}
    if isinstance(content, list | tuple):
        return [digest(value) for value in content]
    return content


def outcome(run):
    """What two runs must have in common: bytes of the records, contents of the policies, all of the replay data."""
    found = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl")}
    found["results.json"] = digest(json.loads((run / "results.json").read_text()))
    for path in sorted(run.glob("*_*.pt")):
        found[path.name] = digest(torch.load(path, weights_only=True))
    found["replay.bin"] = hashlib.sha256((run / "replay.bin").read_bytes()).hexdigest()
    # The last checkpoint: all weights, moments and counters, the exploration agent's included.
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    found["checkpoint.pt"] = digest({name: saved[name] for name in ("progress", "models")})
    return found


def check_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], f"{name} differs"


def progress(run):
    """Counters of the run's checkpoint, or None."""
    path = run / "checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"] if path.exists() else None


def finish(box, *words, name="iql_ooo"):
    """Resume to the end; returns the outcome."""
    child = box.run(*RUN, *words, "--exp-name", name, "--resume")
    assert child.code == 0, child.err
    return outcome(directory(box, name))


@pytest.fixture(scope="module")
def whole(tiny, module_box):
    """Outcome of a run that nothing interrupted."""
    tiny(PEN)
    child = module_box.run(*RUN)
    assert child.code == 0, child.err
    found = outcome(directory(module_box))
    assert found.keys() >= FINISHED
    return found


def test_same_seed_same_bytes(whole, box):
    """In another folder, and by a new interpreter."""
    child = box.run(*RUN, fresh=True)
    assert child.code == 0, child.err
    check_equal(outcome(directory(box)), whole)


def test_another_seed_differs(whole, box):
    assert box.run(*RUN, "--seed", 2, "--online-steps", 10, "--retrain-at").code == 0
    metrics = (box.work / "runs" / f"{PEN}__iql_ooo__2" / "metrics.jsonl").read_bytes()
    texts = (metrics, whole["metrics.jsonl"])
    one, other = (next(line for line in text.splitlines() if b"losses" in line) for text in texts)
    assert one != other


# === SIGKILL ===

RENAME, OPEN, MAKE = "os.rename", "open", "os.mkdir"  # audit events; os.replace is a rename
CHECKPOINT = "/checkpoint.pt"
MOMENTS = {
    "before the run directory": (MAKE, f"{PEN}__iql_ooo__1", 1),
    "before the config": (RENAME, "config.json", 1),
    "pretraining, before the first checkpoint": (RENAME, CHECKPOINT, 2),
    "pretraining, after a checkpoint": (RENAME, CHECKPOINT, 4),
    "pretraining, between the policy and its checkpoint": (RENAME, "/pretrained.pt", 1),
    "online, between the snapshots of policy and RND": (RENAME, "/rnd_70.pt", 1),
    "online, between the data and their checkpoint": (RENAME, CHECKPOINT, 5),
    "retraining, after a checkpoint": (RENAME, CHECKPOINT, 9),
    "retraining, between the policy and its checkpoint": (RENAME, "/exploitation_70.pt", 1),
    "second retraining, after its checkpoints": (RENAME, "/exploitation_110.pt", 1),
    "before the table": (RENAME, "/results.json", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(whole, box, moment):
    child = box.run(*RUN, signal_at=(signal.SIGKILL, *MOMENTS[moment]))
    assert child.code == -signal.SIGKILL
    check_equal(finish(box), whole)


def test_killed_again_and_again(whole, box):
    """Also while it resumes; and each time `--resume` takes it from where it is."""
    moments = [(RENAME, CHECKPOINT, 3), (RENAME, "config.json", 1), (OPEN, "/evals.jsonl", 1), (RENAME, CHECKPOINT, 2),
               (RENAME, CHECKPOINT, 3), (OPEN, "/replay.bin", 2), (RENAME, CHECKPOINT, 2)]
    for moment in moments:
        assert box.run(*RUN, "--resume", signal_at=(signal.SIGKILL, *moment)).code == -signal.SIGKILL
    check_equal(finish(box), whole)


def test_killed_from_outside(whole, box):
    """A new interpreter, killed as soon as its checkpoint shows the wanted progress: in each of the three phases."""
    run = directory(box)
    for wanted in (
        lambda p: p["grad_step"] >= 5,
        lambda p: p["env_step"] >= 100,
        lambda p: p["retrain_step"] >= 5 or "exploitation 70" in p["scores"],
    ):
        child = box.start(*RUN, "--resume", fresh=True)
        end = time.monotonic() + 240
        while not ((p := progress(run)) and wanted(p)):
            assert child.poll() is None and time.monotonic() < end, child.err
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
    check_equal(finish(box), whole)


def test_ablations_resume_too(tiny, box):
    """Those with a state of their own: the frozen RND, the previous retraining's networks, a replaced explorer."""
    tiny(PEN)
    words = ["--sync", "--warm-start", "--retrain-frozen-rnd", "--retrain-upsample", 4, "--upsample-reward", 0]
    assert box.run(*RUN, *words).code == 0
    whole = outcome(directory(box))
    moments = [(RENAME, CHECKPOINT, 5), (RENAME, "/rnd_110.pt", 1), (RENAME, "/exploitation_110.pt", 1)]
    for moment in moments:
        child = box.run(*RUN, *words, "--exp-name", "killed", "--resume", signal_at=(signal.SIGKILL, *moment))
        assert child.code == -signal.SIGKILL
    check_equal(finish(box, *words, name="killed"), whole)


def test_exploit_only_resumes_too(whole, module_box):
    words = ["--exploit-only", f"runs/{PEN}__iql_ooo__1", "--retrain-dropout", 0]
    assert module_box.run(*words, "--exp-name", "once").code == 0
    moment = (signal.SIGKILL, RENAME, "/exploitation_110.pt", 1)
    killed = module_box.run(*words, "--exp-name", "killed", signal_at=moment)
    assert killed.code == -signal.SIGKILL
    assert "exploitation 70" in progress(directory(module_box, "killed"))["scores"]
    child = module_box.run(*words, "--exp-name", "killed", "--resume")
    assert child.code == 0, child.err
    check_equal(outcome(directory(module_box, "killed")), outcome(directory(module_box, "once")))


# === other interruptions ===


@pytest.mark.parametrize(
    ("name", "moment"), [("SIGINT", (RENAME, CHECKPOINT, 2)), ("SIGTERM", (RENAME, "/rnd_70.pt", 1)),
                         ("SIGHUP", (RENAME, CHECKPOINT, 7)), ("SIGUSR1", (RENAME, CHECKPOINT, 3)),
                         ("SIGUSR2", (RENAME, CHECKPOINT, 8))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_signal_ends_at_the_next_checkpoint(whole, box, name, moment):
    """However far away the next one that --checkpoint-every asks for is; one line says so."""
    number = getattr(signal, name)
    child = box.run(*RUN, signal_at=(number, *moment))
    assert child.code == 128 + number
    lines = [line for line in child.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: stopped by {name}") and "--resume" in lines[0], child.err
    assert progress(directory(box)) is not None
    check_equal(finish(box), whole)


def test_a_signal_makes_a_checkpoint(whole, box):
    child = box.run(*RUN, "--checkpoint-every", 10**6, signal_at=(signal.SIGTERM, RENAME, "config.json", 1))
    assert child.code == 128 + signal.SIGTERM or child.code == -signal.SIGTERM  # before or after the handler is there
    child = box.run(*RUN, "--checkpoint-every", 10**6, "--resume", signal_at=(signal.SIGTERM, RENAME, "/rnd_70.pt", 1))
    assert child.code == 128 + signal.SIGTERM and progress(directory(box))["env_step"] == 100
    check_equal(finish(box), whole)


def test_an_ignored_signal_stays_ignored(tiny, box):
    """As under nohup, or in the background of a shell script."""
    tiny(PEN)
    code = "import signal, runpy, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[0] = 'iql_ooo.py'; "
    code += "from importlib import import_module as load; ooo = load('iql_ooo'); ooo.main(ooo.parse_args()); "
    code += "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    command = [sys.executable, "-c", code, *map(str, [*RUN, "--online-steps", 1, "--retrain-at"])]
    result = subprocess.run(command, cwd=box.work, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_interrupted_before_anything_is_written(tiny, box):
    """Ctrl-C while the data are read: one line, 130, nothing left."""
    tiny(PEN)
    for words in (RUN, [*RUN, "--resume"]):
        child = box.run(*words, signal_at=(signal.SIGINT, OPEN, "metadata.json", 1))
        assert child.code == 130 and child.err.startswith("error: interrupted") and child.err.count("\n") == 1
        assert box.files() == []


def test_resume_says_what_it_does(whole, box):
    child = box.run(*RUN, "--resume", signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 3))
    assert "nothing to continue, starting anew" in child.out
    child = box.run(*RUN, "--resume")
    assert "continued at" in child.out and "'grad_step': 5" in child.out
    config = json.loads((directory(box) / "config.json").read_text())
    (start,) = config["resumed"]
    assert start.keys() == {"time", "command", "commit", "script_sha256", "versions", "hardware", "compile"}
    assert "--resume" in start["command"]


def test_resuming_a_finished_run_changes_nothing(whole, module_box):
    run = directory(module_box)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    child = module_box.run(*RUN, "--resume")
    assert child.code == 0 and child.out.endswith("is finished: see its results.json\n")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("words", [["--log-every", "4", "--device", "cpu"], ["--checkpoint-every", "7"]], ids=" ".join)
def test_what_bears_on_no_number_may_change(whole, box, words):
    box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 3))
    found = finish(box, *words)
    for name in ("evals.jsonl", "results.json", "replay.bin", "exploitation_110.pt"):
        assert found[name] == whole[name], name


def test_data_may_move(tiny, box):
    """A data file of the same content under another name; not one of other content."""
    rng = np.random.default_rng(0)
    data = dict(observations=rng.normal(size=(60, 46)), actions=rng.uniform(-0.9, 0.9, (60, 26)),
                rewards=rng.normal(size=60), terminals=np.zeros(60, bool), timeouts=np.arange(60) % 30 == 29)
    np.savez(box.work / "one.npz", **data)
    words = ["--env-id", "hammer-truncated-expert-v1", *RUN[2:], "--online-steps", 5, "--retrain-at"]
    killed = box.run(*words, "--dataset-path", "one.npz", signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 3))
    assert killed.code == -signal.SIGKILL
    np.savez(box.work / "two.npz", **{**data, "rewards": data["rewards"] + 1})
    child = box.run(*words, "--dataset-path", "two.npz", "--resume")
    assert child.code == 2 and "sha256" in child.err
    (box.work / "one.npz").rename(box.work / "two.npz")
    child = box.run(*words, "--dataset-path", "two.npz", "--resume")
    assert child.code == 0, child.err


def test_two_processes_do_not_share_a_run(whole, box):
    """The second ends with one line and changes nothing; when the first has died, the way is free."""
    first = box.start(*RUN, signal_at=(signal.SIGSTOP, RENAME, CHECKPOINT, 2))
    end = time.monotonic() + 120
    while Path(f"/proc/{first.pid}/stat").read_text().split(") ")[1][0] != "T":  # stopped
        assert first.poll() is None and time.monotonic() < end, first.err
        time.sleep(0.02)
    before = {path: path.read_bytes() for path in box.work.rglob("*") if path.is_file()}
    second = box.run(*RUN, "--resume")
    assert second.code == 2 and "another process" in second.err and second.err.count("\n") == 1
    assert {path: path.read_bytes() for path in box.work.rglob("*") if path.is_file()} == before
    first.stop()
    check_equal(finish(box), whole)


def test_a_new_run_at_an_old_path_is_a_new_run(tiny, box):
    tiny(PEN)
    short, ids = [*RUN, "--online-steps", 1, "--retrain-at"], []
    for _ in range(2):
        assert box.run(*short).code == 0
        ids.append(json.loads((directory(box) / "config.json").read_text())["run_id"])
        shutil.rmtree(directory(box))
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "17"], ["--retrain-at", "60", "110"], ["--no-retrain-q-bounds"], ["--eval-every", "5"],
     ["--sync"]],
    ids=" ".join,
)
def test_resuming_with_other_settings_is_refused(whole, module_box, words):
    run = directory(module_box)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    child = module_box.run(*RUN, *words, "--resume")
    assert child.code == 2 and child.err.startswith("error: ") and child.err.count("\n") == 1
    assert words[0].removeprefix("--no-").removeprefix("--") in child.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resuming_with_other_data_is_refused(whole, module_box):
    """The dataset of that id was replaced: by its own first four episodes, here."""
    config = directory(module_box) / "config.json"
    before = config.read_bytes()
    changed = json.loads(before)
    changed["dataset"]["sha256"] = "0" * 64
    config.write_text(json.dumps(changed))
    results = directory(module_box) / "results.json"  # without it the run is not finished
    table = results.read_bytes()
    results.unlink()
    child = module_box.run(*RUN, "--resume")
    results.write_bytes(table)
    config.write_bytes(before)
    assert child.code == 2 and child.err.count("\n") == 1 and "sha256" in child.err


# === full disk ===


def check_stopped(child):
    """Exit status 1, and after the progress bar one line that says what was wrong and how to go on."""
    assert child.code == 1
    assert "Traceback" not in child.err
    last = child.err.splitlines()[-1]
    assert last.startswith("error: ") and "--resume" in last, child.err
    return last


@pytest.mark.parametrize("checkpoints", [1, 4, 6], ids=["pretraining", "online", "retraining"])
def test_full_disk(whole, box, checkpoints):
    """Real writes fail, for the operating system allows no larger file. The checkpoint before stays and is used."""
    run = directory(box)
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, checkpoints + 2)).code == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in run.rglob("*.pt") if not path.name.startswith(".")}
    for path in run.rglob(".*.tmp"):
        path.unlink()  # left by the SIGKILL
    child = box.run(*RUN, "--resume", file_limit=30_000)  # enough for the records, not for weights or data
    assert "File too large" in check_stopped(child)
    assert {path: path.read_bytes() for path in run.rglob("*.pt")} == kept
    check_equal(finish(box), whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "replay.bin"])
def test_a_record_is_whole_or_the_run_stops(whole, box, name):
    """Wherever in a line the room ends, also where the operating system takes a part of it."""
    run = directory(box)
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 5)).code == -signal.SIGKILL
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["sizes"]
    for more in (1, 100):
        child = box.run(*RUN, "--resume", limit_of=(f"/{name}", saved[name] + more))
        assert "No space left" in check_stopped(child) and (run / name).stat().st_size == saved[name] + more
    check_equal(finish(box), whole)


def test_full_disk_at_the_start(tiny, box):
    """Not even the config fits: one line, and nothing that stands in the way of the next try."""
    tiny(PEN)
    child = box.run(*RUN, file_limit=1500)  # the config is larger, what goes to stdout is not
    assert child.code == 1
    assert child.err.startswith("error: ") and child.err.count("\n") == 1, child.err
    again = box.run(*RUN, "--offline-steps", 1, "--online-steps", 1, "--retrain-at")
    assert again.code == 0, again.err


def test_progress_in_a_log_file_is_lines(whole, module_box):
    """No carriage returns, and a line at the start and the end of each phase of these short ones."""
    text = module_box.started[0].err
    assert "\r" not in text and sum("it/s" in line for line in text.splitlines()) <= 2 * 4


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    """Some file systems answer EINVAL to an fsync of a directory."""
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(ooo.os, "fsync", fsync)
    ooo.save(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_save_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    ooo.save(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ooo.os, moment, full)
        with pytest.raises(OSError, match="No space"):
            ooo.save(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    ooo.save(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# === never wrong ===


def test_a_lost_checkpoint_is_not_a_new_start(whole, box):
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 4)).code == -signal.SIGKILL
    run = directory(box)
    (run / "checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    child = box.run(*RUN, "--resume")
    assert child.code == 2 and "checkpoint.pt" in child.err and child.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_records_without_a_config_are_not_overwritten(whole, box):
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 4)).code == -signal.SIGKILL
    (directory(box) / "config.json").unlink()
    for words in ([], ["--resume"]):
        child = box.run(*RUN, *words)
        assert child.code == 2 and "no config.json" in child.err


def test_a_file_that_another_process_changes(whole, box):
    """It stops the run at the next checkpoint; the one before is used."""
    first = box.start(*RUN, signal_at=(signal.SIGSTOP, OPEN, "/.checkpoint.pt.tmp", 3))
    end = time.monotonic() + 120
    while Path(f"/proc/{first.pid}/stat").read_text().split(") ")[1][0] != "T":  # stopped
        assert first.poll() is None and time.monotonic() < end, first.err
        time.sleep(0.02)
    with open(directory(box) / "metrics.jsonl", "ab") as file:
        file.write(b"{}\n")
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait().code == 1 and "metrics.jsonl was changed by another process" in first.err
    check_equal(finish(box), whole)


def test_a_temporary_file_that_is_a_link(tmp_path):
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "precious")
    ooo.save(tmp_path / "file", b"content")
    assert (tmp_path / "precious").read_bytes() == b"mine" and (tmp_path / "file").read_bytes() == b"content"
    assert not (tmp_path / "file").is_symlink()


def test_a_source_is_known_by_its_id(whole, module_box):
    """Wherever it lies; another run under its name is refused."""
    words = ["--retrain-dropout", 0, "--exp-name", "moved"]
    source = directory(module_box)
    killed = module_box.run("--exploit-only", f"runs/{source.name}", *words,
                            signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 3))
    assert killed.code == -signal.SIGKILL
    other = module_box.work / "other"
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"run_id": "0" * 16}))
    child = module_box.run("--exploit-only", "other", *words, "--resume")
    assert child.code == 2 and "is not the run" in child.err
    child = module_box.run("--exploit-only", f"{source.resolve()}/", *words, "--resume")
    assert child.code == 0, child.err
