"""reproduce.py: what its targets expand to, and real local Ray runs of the scripts on tiny data."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from test_structure import load

import reproduce

ROOT = Path(__file__).resolve().parent.parent
PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
PARSED = {}  # {command: its Args}: several targets have the same commands
each_target = pytest.mark.parametrize("target", reproduce.TARGETS)


def expand(*argv):
    return reproduce.expand(*reproduce.parse_args(list(argv)))


# === what targets expand to ===


def test_there_is_a_target_for_every_table_and_figure():
    figures = [f"figure{i}" for i in range(2, 15)]
    assert set(reproduce.TARGETS) == {"table1", "table2", "table3", *figures, "study", "large", "gates", "parity",
                                      "smoke"}


def test_figures_have_the_tasks_that_the_paper_names():
    tasks = {name: sorted({run.env_id for run in expand(name, "--seeds", "1")}) for name in reproduce.TARGETS}
    assert tasks["figure3"] == tasks["figure5"] == ["antmaze-goal-missing-large-v2", "relocate-binary-v0"]
    assert tasks["figure13"] == ["antmaze-goal-missing-large-v2"]
    assert tasks["figure7"] == ["kitchen-complete-v0", "kitchen-mixed-v0", "kitchen-partial-v0"]
    for figure, table in (("figure8", "table1"), ("figure9", "table2"), ("figure10", "table3")):
        assert expand(figure, "--seeds", "1") == expand(table, "--seeds", "1")


def test_figure6_is_a_picture_of_the_data(capsys):
    reproduce.main(["figure6", "--dry-run", "--runs-dir", "elsewhere"])
    assert capsys.readouterr().out == "python tools/figure6.py --out elsewhere/figure6.png\n"


@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_every_cell_of_the_papers_tables_has_its_runs(table):
    report = load("report.py")
    rows = {key for key in PAPER[table] if key not in ("budget", "columns", "average")}
    runs = {(run.env_id, run.algorithm, run.seed): run for run in expand(table, "--seeds", "3")}
    labels = [head.removesuffix(" @ 250k") for head in PAPER[table]["columns"]]
    columns = {next(name for name, pair in report.LABELS.items() if label in pair): label for label in labels}
    assert runs.keys() == {(row, name, seed) for row in rows for name in {
        name for name, pair in report.LABELS.items() if name in columns} for seed in (1, 2, 3)} - {
        (row, "rlpd_no_up", seed) for row in rows for seed in (1, 2, 3)}
    # Each has a final evaluation at the t at which the paper reads it.
    for (env_id, algorithm, seed), run in runs.items():
        args = asdict(load(run.command[1]).parse_args(run.command[2:])) if seed == 1 else None
        times = args and (*(args.get("retrain_at") or args.get("save_at") or ()), args["online_steps"])
        assert not times or reproduce.table_time(env_id, algorithm) in times, (env_id, algorithm, times)


@each_target
def test_commands_parse_and_make_the_directories_that_are_named(target, monkeypatch):
    runs = expand(target, "--seeds", "1", "--scale", "0.5")
    assert len({run.name for run in runs}) == len(runs)
    before = {}
    for run in runs:
        module = load(run.command[1])

        def read_config(run_dir, *_):
            source = before[Path(run_dir).name]  # a source comes first
            assert source.command[1] == run.command[1]  # noqa: B023
            return {"args": asdict(PARSED[shlex.join(source.command)])}

        monkeypatch.setattr(module, "read_config", read_config)
        key = shlex.join(run.command)
        if key not in PARSED:
            PARSED[key] = module.parse_args(run.command[2:])
        args = PARSED[key]
        getattr(module, "check_args", lambda args: None)(args)
        assert run.name == f"{args.env_id}__{args.exp_name}__{args.seed}"
        assert (run.source in before) if run.source else not getattr(args, "exploit_only", "")
        before[run.name] = run


@pytest.mark.parametrize("argv", [("table2", "--preset", "small"), ("study",)])
def test_the_small_preset_gives_every_method_of_a_task_the_same_settings(argv):
    runs = expand(*argv, "--seeds", "1")
    for env_id in {run.env_id for run in runs}:
        (data, offline, online, ratio) = reproduce.SMALL[env_id]
        parsed = {}
        for run in (run for run in runs if run.env_id == env_id and not run.source):
            parsed[run.algorithm] = asdict(load(run.command[1]).parse_args(run.command[2:]))
        for name in ("hidden_dims", "learning_rate", "tau", "rnd_hidden_dims", "dataset_id", "eval_every",
                     "eval_episodes", "final_episodes", "batch_size", "reward_scale", "retrain_reward_scale"):
            assert len({args[name] for args in parsed.values() if name in args}) == 1, (env_id, name)
        for algorithm, args in parsed.items():
            alone, equal = algorithm == "offline_only", algorithm.endswith("equal_updates")
            assert args["online_steps"] == (0 if alone else online)
            assert args.get("offline_steps", offline) == (0 if alone else 3 * offline if equal else offline)
            assert tuple(args.get("retrain_at", args.get("save_at"))) == ((0,) if alone else () if equal else (online,))
            # As many updates as the paper's share, and the control has as many in all.
            assert args.get("retrain_steps", 0) in (0, round(ratio * (offline + online)))
            assert not equal or args["updates_per_step"] * online + args["offline_steps"] == 3 * (offline + online)


def test_the_study_has_all_arms():
    names = {env_id: [run.algorithm for run in expand("study", "--seeds", "1", "--only", env_id)]
             for env_id in (reproduce.MEDIUM, reproduce.UMAZE)}
    assert names == {
        reproduce.MEDIUM: ["iql_retrained", "iql_ooo", "offline_only", "frozen_rnd", "no_bounds", "no_up",
                           "iql_equal_updates", "rnd_equal_updates"],
        reproduce.UMAZE: ["iql_retrained", "iql_ooo", "offline_only"]}
    assert [run.seed for run in expand("study", "--seeds", "2", "--only", reproduce.UMAZE)] == [1, 1, 1, 2, 2, 2]


def test_retrainings_reuse_the_online_run():
    runs = expand("figure13", "--seeds", "1")
    assert [run.algorithm for run in runs] == ["iql_ooo", "warm"]
    assert runs[1].source == runs[0].name
    assert "--exploit-only runs/antmaze-goal-missing-large-v2__iql_ooo__1" in shlex.join(runs[1].command)
    # also where the online run is not asked for
    assert [run.algorithm for run in expand("figure13", "--seeds", "1", "--algorithms", "warm")] == ["iql_ooo", "warm"]


def test_options_narrow_and_scale():
    run, = expand("table1", "--seeds", "1", "--only", "pen-binary-v0", "--algorithms", "iql", "--scale", "0.1",
                  "--runs-dir", "elsewhere", "--cpus-per-run", "2", "--", "--compile")
    assert shlex.join(run.command) == (
        "python iql_ooo.py --env-id pen-binary-v0 --seed 1 --intrinsic-reward-scale 0 --retrain-at --scale 0.1 "
        "--compile --exp-name iql --runs-dir elsewhere --torch-threads 2")
    assert reproduce.merged("--a 1 2 --b", "--a -3 --c x", "--a") == ["--a", "--b", "--c", "x"]
    point, = expand("figure2", "--seeds", "3")
    assert "--num-seeds 3" in shlex.join(point.command)


@pytest.mark.parametrize(("argv", "words"), [
    (["tabel2"], ["did you mean table2"]),
    (["table2", "--only", "hammer-truncated-expert-v0"], ["did you mean hammer-truncated-expert-v1"]),
    (["table2", "--algorithms", "iql_oo"], ["did you mean iql_ooo"]),
    (["table2", "--seeds", "0"], ["--seeds 0", "from 1 to"]),
    (["table1", "--preset", "small"], ["--preset small has table2, study only"]),
    (["table2", "--scale", "0"], ["--scale 0"]),
    (["table2", "--scale", "inf"], ["--scale inf"]),
    (["table2", "--gpus-per-run", "-1"], ["--gpus-per-run -1"]),
    (["figure11", "--only", "ant-sparse-v2", "--algorithms", "no_up"], ["nothing is left"]),
])
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        expand(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert all(word in err for word in words)


@pytest.mark.parametrize("name", reproduce.RANGES)
def test_no_number_may_be_nan(name, capsys):
    assert {f.name for f in fields(reproduce.Args) if re.search("int|float", str(f.type))} == reproduce.RANGES.keys()
    with pytest.raises(SystemExit) as stop:
        reproduce.check_ranges(reproduce.Args("table1", **{name: float("nan")}), reproduce.RANGES)
    assert stop.value.code == 2 and "nan must be from" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [
    ("--no-such-flag", ["--no-such-flag"]),
    ("--gamma nan", ["gamma", "nan"]),
    ("--gamma x", ["--gamma", "x"]),
    ("--expectile 0.9", ["--expectile"]),
    ("--seed 3", ["--only, --seeds"]),
])
def test_flags_that_a_script_refuses_are_refused_before_anything_starts(flags, words, in_tmp, capsys):
    for dry in (["--dry-run"], []) if flags == "--gamma nan" else ([],):
        with pytest.raises(SystemExit) as stop:
            only = ["--only", "hammer-truncated-expert-v1", "--seeds", "1"]
            reproduce.main(["table2", *only, *dry, "--", *flags.split()])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and all(word in err for word in words), err
    assert list(in_tmp.iterdir()) == []


def point_mass_run(folder, *extra):
    run, = expand("figure2", "--seeds", "1", "--runs-dir", str(folder), "--", *extra)
    return run, folder / run.name


@pytest.mark.parametrize("damage", ["config.json", "results.json", "no settings", "a file"])
def test_a_damaged_run_is_one_line_that_names_it(damage, tmp_path, capsys):
    run, path = point_mass_run(tmp_path)
    assert reproduce.finished(run, tmp_path) is False
    if damage == "a file":
        path.write_text("")
    else:
        path.mkdir()
        settings = load("pointmass_didactic.py").parse_args(run.command[2:])
        (path / "config.json").write_text(json.dumps({"args": asdict(settings)}))
        (path / "results.json").write_text("{}")
        assert reproduce.finished(run, tmp_path) is True
        if damage == "no settings":
            (path / "config.json").write_text("[]")
        else:
            (path / damage).write_text('{"args": {"seed"')
    with pytest.raises(SystemExit) as stop:
        reproduce.finished(run, tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(path) in err


def test_progress_of_damaged_records_is_what_is_known(tmp_path):
    run, path = point_mass_run(tmp_path)
    path.mkdir()
    for config, metrics in (("[]", "{}"), ('{"args": {}}', '{"phase": 3}'), ('{"args": {"online_steps": "x"}}', "7"),
                            ('{"args": 3}', '{"phase": "online", "env_step": null, "grad_step": 1}')):
        (path / "config.json").write_text(config)
        (path / "metrics.jsonl").write_text(metrics + "\n")
        assert "done" not in reproduce.progress(run, tmp_path)


# === what report.py and the tools use too ===


def test_a_half_written_last_line_is_read_past_and_damage_is_named(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    assert reproduce.read_records(path) == [{"a": 1}, {"a": 2}] and capsys.readouterr().err == ""
    path.write_bytes(b'{"a": 1}\n{"a": ')
    assert reproduce.read_records(path) == [{"a": 1}]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and "half written" in err
    for damaged in (b'{"a": 1}\n{"a": \n{"a": 3}\n', b'{"a": 1}\n\x00\x00\n{"a": 3}\n', b'{"a": 1}\n2\n{"a": 3}\n',
                    b'{"a": 1}\n\xff\n{"a'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"line 2 of {path}"):
            reproduce.read_records(path)


@pytest.mark.parametrize("where", ["a file", "below a file", "full"])
def test_an_output_that_cannot_be_written_is_one_line(where, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "full": tmp_path}[where]
    if where == "full":
        monkeypatch.setattr(reproduce.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb", buffering=0))
    with pytest.raises(SystemExit) as stop:
        reproduce.output_folder(str(folder), "--runs-dir")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(folder) in err


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    run, = expand("figure2", "--seeds", "1", "--runs-dir", "~/runs")
    assert "--runs-dir /somewhere/runs" in shlex.join(run.command)


def shell(command, folder):
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "PY": sys.executable, "TOOL": str(ROOT / "reproduce.py")})
    return result.returncode, result.stdout, result.stderr


def test_an_output_stream_that_goes_away_is_no_traceback(tmp_path):
    assert shell("$PY $TOOL table1 --dry-run | head -1", tmp_path)[::2] == (0, "")
    assert shell("$PY $TOOL table1 --dry-run > /dev/full", tmp_path)[::2] == (
        1, "error: output: No space left on device\n")


def test_ctrl_c_and_a_failing_disk_are_one_line(tmp_path):
    start = "import reproduce, os, signal; reproduce.run_main(lambda: {})"
    for body, code, words in (("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted"),
                              ("reproduce.write_whole(reproduce.Path('/dev/full/x'), b'1')", 1, "Not a directory"),
                              ("open('/dev/full', 'wb', 0).write(b'1')", 1, "No space left on device")):
        result = subprocess.run([sys.executable, "-c", start.format(body)], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == code and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


def test_a_link_named_like_a_temporary_file_is_not_followed(tmp_path):
    mine, path = tmp_path / "mine", tmp_path / "x"
    mine.write_text("precious")
    (tmp_path / f".x.{os.getpid()}.tmp").symlink_to(mine)
    reproduce.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink() and mine.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [mine, path]


def test_progress_counts_the_steps_of_all_phases(tmp_path):
    run = expand("figure4", "--seeds", "1", "--only", "pen-binary-v0", "--algorithms", "iql_ooo")[0]
    assert reproduce.progress(run, tmp_path) == {}
    path = tmp_path / run.name
    path.mkdir()
    settings = dict(offline_steps=100, online_steps=200, retrain_at=[100, 200], retrain_steps=50, exploit_only="")
    (path / "config.json").write_text(json.dumps({"args": settings}))
    (path / "timing.jsonl").write_text('{"charts/SPS": 10.0}\n')
    for record, done in (({"phase": "pretrain", "env_step": 0, "grad_step": 40}, 40),
                         ({"phase": "online", "env_step": 60, "grad_step": 160}, 160),
                         ({"phase": "online", "env_step": 160, "grad_step": 260}, 260),
                         ({"phase": "retrain", "env_step": 100, "grad_step": 20}, 320),
                         ({"phase": "retrain", "env_step": 200, "grad_step": 50}, 400)):
        (path / "metrics.jsonl").write_text(json.dumps(record) + '\n{"half')
        state = reproduce.progress(run, tmp_path)
        assert state == {"phase": record["phase"], "done": done / 400, "left": (400 - done) / 10}
    for changes, record, done in (
            (dict(sync=True), {"phase": "retrain", "env_step": 100, "grad_step": 20}, 220 / 400),
            (dict(sync=True), {"phase": "online", "env_step": 160, "grad_step": 60}, 310 / 400),
            (dict(exploit_only="x"), {"phase": "retrain", "env_step": 200, "grad_step": 25}, 75 / 100)):
        (path / "config.json").write_text(json.dumps({"args": settings | changes}))
        (path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert reproduce.progress(run, tmp_path)["done"] == done


def test_a_retraining_of_other_data_is_refused(tmp_path, capsys, monkeypatch):
    source, run = expand("figure13", "--seeds", "1")
    module = load("iql_ooo.py")
    settings = module.parse_args(source.command[2:])
    monkeypatch.setattr(module, "parse_args", lambda argv: settings)
    for name, config in ((source.name, {"run_id": "a", "args": asdict(settings)}),
                         (run.name, {"source_run_id": "a", "args": asdict(settings)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "results.json").write_text("{}")
    assert reproduce.finished(run, tmp_path) is True
    (tmp_path / source.name / "config.json").write_text(json.dumps({"run_id": "b", "args": asdict(settings)}))
    with pytest.raises(SystemExit):
        reproduce.finished(run, tmp_path)
    assert "of another run than" in capsys.readouterr().err


# === real runs ===


@pytest.fixture(scope="module")
def started(tiny):
    """start(folder, *argv): reproduce.py as a process of its own, on tiny data; they end with the module."""
    tiny("maze2d-missing-data-large-v1")
    processes = []

    def start(folder, *argv):
        env = {**os.environ, "MINARI_DATASETS_PATH": str(tiny.path), "RAY_TMPDIR": "/tmp"}
        process = subprocess.Popen([sys.executable, str(ROOT / "reproduce.py"), *argv], cwd=folder, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()


def finish(process, code=0, timeout=560):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    return out, err


def reproducible(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    del results["run_id"]  # drawn anew for each run
    return {"results": results, **{name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl")}}


def wait_for(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_that_cannot_work_is_not_repeated_and_says_why(tmp_path):
    log, stop = tmp_path / "log.txt", tmp_path / "stop"
    command = ["python", "pointmass_didactic.py", "--gamma", "2"]
    failed = reproduce.execute(command, tmp_path, log, stop, {}, 3)
    assert failed.startswith("failed: exit status 2: ") and "gamma" in failed
    assert log.read_text().count("--- worker") == 1
    for sources, state in ((("finished", failed), "failed: the run whose data it needs failed"),
                           (("stopped",), "stopped")):
        assert reproduce.execute(command, tmp_path, log, stop, {}, 3, *sources) == state
    stop.touch()
    assert reproduce.execute(command, tmp_path, log, stop, {}, 3) == "stopped"
    assert log.read_text().count("--- worker") == 1


@pytest.mark.parametrize(("body", "state", "attempts"), [
    ("sys.exit(143)", "stopped", 1), ("sys.exit(138)", "stopped", 1), ("sys.exit(1)", "failed: exit status 1: ", 1),
    ("os.kill(os.getpid(), signal.SIGKILL)", "failed: exit status -9: ", 3), ("pass", "finished", 1),
    ("open('stop', 'w'); time.sleep(60)", "stopped", 1),  # asked before it could save: the default of SIGTERM
    ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); open('stop', 'w'); time.sleep(60)", "stopped", 1),
])
def test_a_run_that_was_stopped_has_not_failed(body, state, attempts, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(f"import os, signal, sys, time\n{body}\n")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    found = reproduce.execute(["python", "script.py"], tmp_path, tmp_path / "log.txt", tmp_path / "stop", {}, 2)
    assert found.startswith(state) and (tmp_path / "log.txt").read_text().count("--- worker") == attempts


def test_failures_are_reported_and_room_is_checked(started, tmp_path):
    argv = ("smoke", "--seeds", "1", "--algorithms", "pointmass_didactic")
    out, err = finish(started(tmp_path, *argv, "--", "--device", "cuda:99"), code=1)
    assert "0 of 1 runs of smoke are finished, 1 failed" in out
    assert "failed: exit status 2: error: --device cuda:99" in err
    _, err = finish(started(tmp_path, *argv, "--address", "127.0.0.1:1"), code=1)
    assert err.count("\n") == 1 and "Ray cannot start or connect" in err
    _, err = finish(started(tmp_path, *argv, "--cpus-per-run", "999"), code=2)
    assert err.startswith("error: a run needs 999 CPU") and err.count("\n") == 1


@pytest.fixture(scope="module")
def undisturbed(started, tmp_path_factory):
    """A folder with the smoke runs of the point mass and, for two seeds, of RLPD + RND and a retraining on its data."""
    folder = tmp_path_factory.mktemp("undisturbed")
    out, _ = finish(started(folder, "smoke", "--seeds", "2", "--algorithms", "pointmass_didactic", "rlpd_no_up"))
    assert "5 of 5 runs of smoke are finished" in out
    return folder


def test_a_local_run_finishes_and_is_not_repeated(undisturbed, started):
    runs = sorted(path.name for path in (undisturbed / "runs").iterdir() if path.name != "logs")
    cheetah = "halfcheetah-sparse-v2"
    assert runs == [f"{cheetah}__rlpd_no_up__1", f"{cheetah}__rlpd_no_up__2", f"{cheetah}__rlpd_ooo__1",
                    f"{cheetah}__rlpd_ooo__2", "point-mass-wall__pointmass_didactic__1"]
    times = {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("*") if path.is_file()}
    same = ("smoke", "--seeds", "2", "--algorithms", "pointmass_didactic", "rlpd_no_up")
    out, _ = finish(started(undisturbed, *same))
    assert "5 of 5 runs of smoke are finished; python report.py runs" in out
    assert times == {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("*") if path.is_file()}
    # Finished with other settings: not skipped silently.
    _, err = finish(started(undisturbed, *same, "--", "--gamma", "0.5"), code=2)
    assert err.count("\n") == 1 and "gamma" in err


def test_a_killed_worker_ends_with_the_metrics_of_an_undisturbed_run(undisturbed, started, tmp_path):
    name = "halfcheetah-sparse-v2__rlpd_ooo__1"
    process = started(tmp_path, "smoke", "--seeds", "1", "--algorithms", "rlpd_ooo")
    run_dir, log = tmp_path / "runs" / name, tmp_path / "runs" / "logs" / f"{name}.txt"
    wait_for((run_dir / "checkpoint.pt").exists)
    worker, = re.findall(r"^--- worker (\d+), attempt 1", log.read_text(), re.MULTILINE)
    os.kill(int(worker), signal.SIGKILL)
    finish(process)
    assert log.read_text().count("--- worker") == 2
    assert reproducible(run_dir) == reproducible(undisturbed / "runs" / name)


def test_a_killed_script_and_an_interrupted_driver_continue(undisturbed, started, tmp_path):
    name = "halfcheetah-sparse-v2__rlpd_ooo__1"
    argv = ("smoke", "--seeds", "1", "--algorithms", "rlpd_ooo")
    run_dir, log = tmp_path / "runs" / name, tmp_path / "runs" / "logs" / f"{name}.txt"
    process = started(tmp_path, *argv)
    wait_for((run_dir / "checkpoint.pt").exists)
    worker, = re.findall(r"^--- worker (\d+), attempt 1", log.read_text(), re.MULTILINE)
    child, = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    wait_for(lambda: "attempt 2" in log.read_text())
    # A terminal sends Ctrl-C to all processes, kill SIGTERM to one: the run saves itself in both cases, and goes on.
    for number, attempts in ((signal.SIGINT, 3), (signal.SIGTERM, None)):
        wait_for(lambda: (run_dir / "timing.jsonl").exists())
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, err = finish(process, code=128 + number)
        assert "interrupted; the same command continues" in err and "Traceback" not in err
        assert not list(log.parent.glob("stop_*")) and not (run_dir / "results.json").exists()
        process = started(tmp_path, *argv)
        if attempts:
            wait_for(lambda: log.read_text().count("--- worker") == attempts)  # noqa: B023
    finish(process)
    assert reproducible(run_dir) == reproducible(undisturbed / "runs" / name)


@pytest.mark.slow  # minutes: every algorithm and ablation, through Ray
def test_all_of_smoke_and_its_report(started, tmp_path):
    out, _ = finish(started(tmp_path, "smoke", "--seeds", "1"), timeout=1800)
    n = len(expand("smoke", "--seeds", "1"))
    assert f"{n} of {n} runs of smoke are finished" in out
    subprocess.run([sys.executable, str(ROOT / "report.py"), "runs"], cwd=tmp_path, check=True, timeout=600)
    text = (tmp_path / "report" / "report.md").read_text()
    for figure in (2, 4, 9, 10, 11, 12, 14):
        assert f"## Figure {figure}:" in text
