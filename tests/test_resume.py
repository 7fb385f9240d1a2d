"""Equal seeds give equal bytes; and a run killed at any moment ends, with `--resume`, as if it had not been.

Each run is a process of its own. Most are sent a real SIGKILL just before a certain file operation (runner.Signaller),
so that every run of the tests kills at the same moments, also at those that an outside observer would rarely hit. One
test kills from outside.
"""

import hashlib
import json
import os
import signal
import time

import pytest
import torch
from runner import SMALL

import iql_ooo as ooo

PEN = "pen-binary-v0"
# Episodes have 100 steps, so t = 70 is retrained for at step 100, in the middle of the online phase, with losses of 2
# steps not yet logged. Checkpoints: pretraining 5, 10, 15; online 100; retraining 5, 10, end; online 110; and so on.
RUN = ["--env-id", PEN, *SMALL, *"""--offline-steps 15 --online-steps 110 --retrain-at 70 110 --retrain-steps 12
--log-every 7 --checkpoint-every 5""".split()]
FINISHED = {"metrics.jsonl", "evals.jsonl", "exploitation_70.pt", "exploitation_110.pt", "exploration_110.pt"}


def directory(box, name="iql_ooo"):
    return box.work / "runs" / f"{PEN}__{name}__1"


def digest(content):
    """A fingerprint of nested dicts and lists of tensors and numbers."""
    if isinstance(content, torch.Tensor):
        return hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(content, dict):
        return {str(key): digest(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [digest(value) for value in content]
    return content


def outcome(run):
    """What two runs must have in common: bytes of the records, contents of the policies, all of the replay data."""
    found = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl", "results.json")}
    for path in sorted(run.glob("*_*.pt")):
        found[path.name] = digest(torch.load(path, weights_only=True))
    for path in sorted((run / "replay").glob("*")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    # The last checkpoint: all weights, moments, counters and random states, the exploration agent's included.
    found["checkpoint.pt"] = digest(torch.load(run / "checkpoint.pt", weights_only=True))
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
    "pretraining, before the first checkpoint": (RENAME, CHECKPOINT, 1),
    "pretraining, after a checkpoint": (RENAME, CHECKPOINT, 3),
    "online, between the snapshots of policy and RND": (RENAME, "/rnd_70.pt", 1),
    "online, between a chunk of data and its checkpoint": (RENAME, CHECKPOINT, 4),
    "retraining, after a checkpoint": (RENAME, CHECKPOINT, 6),
    "retraining, between the policy and its checkpoint": (RENAME, CHECKPOINT, 7),
    "online again, after a retraining": (RENAME, "/rnd_110.pt", 1),
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
    moments = [(RENAME, CHECKPOINT, 2), (RENAME, "config.json", 1), (OPEN, "/evals.jsonl", 1), (RENAME, CHECKPOINT, 2),
               (RENAME, CHECKPOINT, 3), (OPEN, "000000000-000000100.npz", 1), (RENAME, CHECKPOINT, 2)]
    for moment in moments:
        assert box.run(*RUN, "--resume", signal_at=(signal.SIGKILL, *moment)).code == -signal.SIGKILL
    check_equal(finish(box), whole)


def test_killed_from_outside(whole, box):
    """A new interpreter, killed as soon as its checkpoint shows the wanted progress: in each of the three phases."""
    run = directory(box)
    for wanted in (
        lambda p: p["grad_step"] >= 5,
        lambda p: p["env_step"] >= 100,
        lambda p: p["retrain_step"] >= 5 or p["retrained"],
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
    moments = [(RENAME, CHECKPOINT, 6), (RENAME, "/rnd_110.pt", 1), (RENAME, "/exploitation_110.pt", 1)]
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
    assert progress(directory(module_box, "killed"))["retrained"] == [70]
    child = module_box.run(*words, "--exp-name", "killed", "--resume")
    assert child.code == 0, child.err
    check_equal(outcome(directory(module_box, "killed")), outcome(directory(module_box, "once")))


# === other interruptions ===


def test_interrupt_from_the_keyboard(whole, box):
    child = box.run(*RUN, signal_at=(signal.SIGINT, RENAME, CHECKPOINT, 3))
    assert child.code == 130
    assert child.err.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in child.err
    check_equal(finish(box), whole)


def test_resuming_a_finished_run_shows_its_table(whole, module_box):
    run = directory(module_box)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = module_box.started[0].out
    child = module_box.run(*RUN, "--resume")
    assert child.code == 0
    assert child.out == first and "exploitation" in first
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "17"], ["--retrain-at", "60", "110"], ["--no-retrain-q-bounds"], ["--device", "cpu"], ["--sync"]],
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
    child = module_box.run(*RUN, "--resume")
    config.write_bytes(before)
    assert child.code == 2 and child.err.count("\n") == 1 and "sha256" in child.err


# === full disk ===


def check_stopped(child, run):
    """Exit status 1, and after the progress bar one line that says what to do."""
    assert child.code == 1
    assert "Traceback" not in child.err
    last = child.err.splitlines()[-1]
    assert last.startswith("error: ") and "make room" in last and str(run.name) in last


@pytest.mark.parametrize("checkpoints", [1, 3, 5], ids=["pretraining", "online", "retraining"])
def test_full_disk(whole, box, checkpoints):
    """Real writes fail, for the operating system allows no larger file. The checkpoint before stays and is used."""
    run = directory(box)
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, checkpoints + 1)).code == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in run.rglob("*.pt") if not path.name.startswith(".")}
    for path in run.rglob(".*.tmp"):
        path.unlink()  # left by the SIGKILL
    child = box.run(*RUN, "--resume", file_limit=30_000)  # enough for the records, not for weights or data
    check_stopped(child, run)
    assert {path: path.read_bytes() for path in run.rglob("*.pt")} == kept
    assert not list(run.rglob(".*"))
    check_equal(finish(box), whole)


def test_full_disk_while_logging(whole, box):
    run = directory(box)
    assert box.run(*RUN, signal_at=(signal.SIGKILL, RENAME, CHECKPOINT, 2)).code == -signal.SIGKILL
    (run / "timing.jsonl").unlink()
    (run / "timing.jsonl").symlink_to("/dev/full")
    child = box.run(*RUN, "--resume")
    check_stopped(child, run)
    assert "No space left on device" in child.err
    (run / "timing.jsonl").unlink()
    check_equal(finish(box), whole)


def test_full_disk_at_the_start(tiny, box):
    """Not even the config fits: one line, and nothing that stands in the way of the next try."""
    tiny(PEN)
    child = box.run(*RUN, file_limit=1500)  # the config is larger, what goes to stdout is not
    assert child.code in (1, 2)
    assert child.err.startswith("error: ") and child.err.count("\n") == 1, child.err
    again = box.run(*RUN, "--offline-steps", 1, "--online-steps", 1, "--retrain-at", "--resume")
    assert again.code == 0, again.err


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    ooo.atomic_write(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ooo.os, moment, full)
        with pytest.raises(OSError, match="No space"):
            ooo.atomic_write(path, b"new, and longer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    ooo.atomic_write(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
