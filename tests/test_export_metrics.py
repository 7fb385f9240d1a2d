"""tools/export_metrics.py: CSV, TensorBoard and wandb hold what the files of every script's runs hold."""

import csv
import json
import re
import resource
import shlex
import shutil
import sys
import threading
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from test_tools import ROOT, SCRIPTS, refused

import iql_ooo
from tools import export_metrics
from tools.export_metrics import EVENTS, main

WHERE = ("phase", "env_step", "grad_step")
RUN_ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    """The export to TensorBoard sets it; here it is set back."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture
def run(tmp_path):
    """A run directory as today's scripts write it, of calql_ooo.py: two retrainings, one stopped early."""
    path = tmp_path / "runs" / "pen-binary-v0__calql_ooo__1"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"script": "calql_ooo", "run_id": RUN_ID, "args": {"seed": 1}}))
    record(path, "pretrain", 0, 10, **{"losses/critic": 0.5})
    record(path, "online", 7, 17, **{"charts/episodic_return": -1.5, "charts/episodic_success": True})
    for t in (5, 7):
        record(path, "retrain", t, 20, **{"losses/critic": t / 10})
        record(path, "retrain", t, 20, **{"eval/return": 2.0, "eval/episodes": 2})
    record(path, "retrain", 7, 20, early_stop="Q falls")
    episodes = [{"return": 1.0, "length": 3, "success": False}, {"return": 3.0, "length": 4, "success": True}]
    record(path, "retrain", 7, 20, "evals.jsonl", episodes=episodes)
    return path


def record(path, phase, env_step, grad_step, name="metrics.jsonl", wandb=None, **values):
    """A record by the scripts' own Run.log."""
    with open(path / name, "ab") as file:
        self = types.SimpleNamespace(wandb=wandb, write=lambda name, data: file.write(data))
        iql_ooo.Run.log(self, name, phase, env_step, grad_step, **values)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for wandb; (started, sent): the arguments of wandb.init and of log."""
    started, sent = [], []
    stub = types.ModuleType("wandb")
    one = types.SimpleNamespace(log=sent.append, finish=lambda: None, dir=tmp_path / "x" / "files", offline=True)
    stub.init, stub.Settings = lambda **options: started.append(options) or one, dict
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for name in ("WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return started, sent


def rows(path):
    """The rows of a CSV file, without what is empty."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def points(folder):
    """{tag: [(step, value)]} of the event file of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def number(value):
    return str(int(value) if isinstance(value, bool) else value)


def records(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


# === the runs of every script ===
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "pointmass_didactic"])
def test_a_row_and_a_point_for_every_value(script, runs, tmp_path):
    path, expected = runs[script], defaultdict(list)
    for kind in ("csv", "tensorboard"):
        main([kind, str(path), "--out", str(tmp_path)])
    folder = tmp_path / path.name
    assert rows(folder / "metrics.csv") == [{k: number(v) for k, v in r.items()} for r in records(path)]
    assert rows(folder / "evals.csv") == [
        {k: number(v) for k, v in ({name: r[name] for name in WHERE} | {"episode": i} | episode).items()}
        for r in records(path, "evals.jsonl") for i, episode in enumerate(r["episodes"])]
    for r in records(path):
        phase, step = {"pretrain": ("pretrain", r["grad_step"]), "online": ("online", r["env_step"]),
                       "retrain": (f"retrain_{r['env_step']}", r["grad_step"])}[r["phase"]]
        for name in r.keys() - WHERE:
            expected[f"{phase}/{name}"].append((step, np.float32(r[name])))
    assert points(folder) == expected


def test_members_of_the_point_mass_are_told_apart(runs, tmp_path):
    path = runs["pointmass_didactic"]
    for kind in ("csv", "tensorboard"):
        main([kind, str(path), "--out", str(tmp_path)])
    folder, found = tmp_path / path.name, points(tmp_path / path.name)
    table, evals = rows(folder / "metrics.csv"), rows(folder / "evals.csv")
    first = next(r for r in records(path) if "charts/coverage" in r)
    assert len(first["charts/coverage"]) == 4
    for place, value in ((0, "seed_1_bonus_0"), (1, "seed_1_bonus_5"), (3, "seed_2_bonus_5")):  # order of members()
        step, coverage = first["env_step"], first["charts/coverage"][place]
        assert found[f"online/charts/coverage/{value}"][0] == (step, np.float32(coverage))
        _, seed, _, coef = value.split("_")
        (row,) = [r for r in table if "charts/coverage" in r and r["env_step"] == str(step) and r["phase"] == "online"
                  and (r["seed"], float(r["bonus_coef"])) == (seed, float(coef))]
        assert row["charts/coverage"] == str(coverage) and "losses/value" not in row
    losses = [r for r in records(path) if "losses/value" in r]
    assert [r["losses/value"] for r in table if "losses/value" in r] == [str(r["losses/value"]) for r in losses]
    last = records(path, "evals.jsonl")[-1]
    assert [int(r["steps"]) for r in evals[-len(last["steps"]):]] == last["steps"] and evals[-1]["bonus_coef"] == "5.0"
    assert found["retrain_60/eval/return/seed_2_bonus_5"][-1][0] == last["grad_step"]


# === one run ===
def test_retrainings_are_apart_and_words_are_text(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kind in ("csv", "tensorboard"):
        main([kind, str(run), "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / run.name
    assert (folder / "metrics.csv").read_text().startswith("phase,env_step,grad_step,losses/critic,")
    assert rows(folder / "metrics.csv")[-1]["early_stop"] == "Q falls"
    found = points(folder)
    assert found["retrain_7/losses/critic"] == [(20, np.float32(0.7))] and "retrain_5/eval/return" in found
    assert found["online/charts/episodic_success"] == [(7, 1.0)]
    texts = EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    assert set(texts) == {"config/text_summary", "retrain_7/early_stop/text_summary"}


def test_the_next_export_replaces_this_one(run, tmp_path):
    for value in (1.0, 2.0):
        record(run, "online", 9, 19, **{"losses/critic": value})
        for kind in ("csv", "tensorboard"):
            main([kind, str(run), "--out", str(tmp_path / "out")])
    folder = tmp_path / "out" / run.name
    assert sorted(p.name for p in folder.iterdir()) == sorted(["metrics.csv", "evals.csv", EVENTS])
    assert points(folder)["online/losses/critic"] == [(9, 1.0), (9, 2.0)]
    assert len(rows(folder / "metrics.csv")) == len(records(run))


def test_wandb_gets_what_track_sends(run, wandb):
    started, sent = wandb
    (run / "metrics.jsonl").unlink()
    tracked = sys.modules["wandb"].init()
    record(run, "pretrain", 0, 10, wandb=tracked, **{"losses/critic": 0.5})
    record(run, "retrain", 7, 20, wandb=tracked, early_stop="Q falls", **{"charts/goals": [1, 2]})
    lists = json.loads((run / "config.json").read_text())
    lists["args"] |= {"num_seeds": 1, "bonus_coef": [0.0, 5.0]}
    (run / "config.json").write_text(json.dumps(lists))
    main(["wandb", str(run), "--wandb-mode", "offline"])
    assert sent[2:] == sent[:2] and len(sent) == 4
    by_export = started[1]  # what --track has: test_smoke.py
    want = {"project": None, "mode": "offline", "group": RUN_ID, "name": run.name, "dir": run}
    assert {name: by_export[name] for name in want} == want
    assert by_export["id"] == f"{RUN_ID}-export" and "resume" not in by_export and by_export["config"] == lists


def test_a_second_offline_export_replaces_the_first(run, monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (run / "wandb" / f"offline-run-1-{RUN_ID}").mkdir(parents=True)  # what --track has left
    for _ in range(2):
        main(["wandb", str(run), "--wandb-mode", "offline"])
    left = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(left) == 2 and left[0] == f"offline-run-1-{RUN_ID}"
    content = (run / "wandb" / left[1] / f"run-{RUN_ID}-export.wandb").read_bytes()
    assert all(word in content for word in (b"retrain/early_stop", b"charts/episodic_success", run.name.encode()))


def documented():
    text = export_metrics.__doc__ + (ROOT / "docs" / "runs.md").read_text()
    return sorted(set(re.findall(r"python tools/export_metrics\.py ([^#\n]*[^#\s])", text)))


@pytest.mark.parametrize("command", documented())
def test_documented_commands_work(command, run, wandb, in_tmp):
    main([str(run) if word.startswith("runs/") else word for word in shlex.split(command)])
    assert (in_tmp / "exported" / run.name).exists() or wandb[1]


# === bad input ===
def test_a_half_written_last_line_is_read_past(run, tmp_path, capsys):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": ')
    main(["csv", str(run), "--out", str(tmp_path / "out")])
    assert "half written" in capsys.readouterr().err
    assert len(rows(tmp_path / "out" / run.name / "metrics.csv")) == 7


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"script": "os"}'), ("config.json", None),
    ("metrics.jsonl", '{\n{"phase": 1}\n'), ("metrics.jsonl", '{"a": 1}\n'), ("metrics.jsonl", ""),
    ("metrics.jsonl", None), ("evals.jsonl", "\n\n"),
    ("metrics.jsonl", '{"phase": "online", "env_step": 1, "grad_step": 1, "losses/critic": null}\n'),
    ("metrics.jsonl", '{"phase": "online", "env_step": 1, "grad_step": 1, "losses/critic": [1.0]}\n'),
    ("metrics.jsonl", '{"phase": "other", "env_step": 1, "grad_step": 1, "losses/critic": 1.0}\n'),
])
def test_damage_is_one_line(name, content, run, in_tmp, capsys):
    (run / name).unlink() if content is None else (run / name).write_text(content)
    assert str(run) in refused(main, ["csv", str(run), "--out", "out"], capsys)
    assert [path.name for path in in_tmp.iterdir()] == ["runs"]


@pytest.mark.parametrize(("argv", "words"), [
    (["csv", "--out", "out"], "RUN_DIR"), (["csv", "nowhere", "--out", "out"], "nowhere"),
    (["tensorboard", "~/none", "--out", "out"], "~/none"), (["csv", "RUN", "RUN", "--out", "out"], "two runs"),
    (["csv", "RUN", "--out", "file"], "file"), (["tensorboard", "RUN", "--out", "file"], "file"),
    (["csv", "RUN", "OTHER", "--out", "taken"], "taken"), (["wandb", "OTHER"], "no run_id"),
])
def test_bad_input_is_one_line(argv, words, run, in_tmp, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    other = Path(shutil.copytree(run, run.parent / "other"))
    (other / "config.json").write_text('{"script": "pex", "args": {}}')
    (in_tmp / "file").touch()
    (in_tmp / "taken").mkdir()
    (in_tmp / "taken" / "other").touch()
    before = sorted(in_tmp.rglob("*"))
    names = {"RUN": str(run), "OTHER": str(other)}
    assert words in refused(main, [names.get(word, word) for word in argv], capsys)
    assert sorted(in_tmp.rglob("*")) == before


def test_wandb_that_is_off_or_cannot_start_is_one_line(run, wandb, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    assert "--wandb-mode offline" in refused(main, ["wandb", str(run)], capsys)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "WANDB_MODE" in refused(main, ["wandb", str(run)], capsys)


@pytest.mark.parametrize(("kind", "module", "file"), [
    ("tensorboard", "torch.utils.tensorboard", "requirements-reproduce.txt"), ("wandb", "wandb", "requirements.txt")])
def test_a_missing_package_is_named(kind, module, file, run, in_tmp, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    out = ["--out", "out"] if kind == "tensorboard" else []
    assert f"pip install -r {file}" in refused(main, [kind, str(run), *out], capsys)
    assert [path.name for path in in_tmp.iterdir()] == ["runs"]


@pytest.mark.parametrize(("kind", "name"), [("csv", "metrics.csv"), ("tensorboard", EVENTS)])
def test_a_full_disk_leaves_the_export_before(kind, name, run, tmp_path):
    argv = [kind, str(run), "--out", str(tmp_path / "out")]
    main(argv)
    file = tmp_path / "out" / run.name / name
    before, inside = file.read_bytes(), sorted(file.parent.iterdir())
    record(run, "online", 9, 19, **{"losses/critic": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError):  # reproduce.run_main makes one line of it
            main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and sorted(file.parent.iterdir()) == inside
