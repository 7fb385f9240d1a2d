"""tools/: pictures of the runs of every script and of the data; bad input is one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text

from tools import holes, plot_run, pointmass_chain, study

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("iql_ooo", "calql_ooo", "rlpd_ooo", "td3_rnd", "pex", "pointmass_didactic")


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """Offline data is not there, so that its panel says so."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


def texts(figure):
    """All that is written in a figure."""
    return "\n".join(t.get_text() for t in figure.findobj(Text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_of_every_script_is_drawn(script, runs, no_data, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_run.plt.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot_run.main([str(runs[script]), "--episodes", "1", "--out", str(tmp_path / "x.png")])
    figure, = figures
    lines = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) > 2]
    words = {"pointmass_didactic": ["own policy: reach the goal", "retrained: go under the wall", "bonus 5"],
             "td3_rnd": ["Learning", "Intrinsic reward"], "pex": ["Learning", "Online visits"],
             "iql_ooo": ["Exploration", "Exploitation", "Intrinsic", "Online exploration", "not available here"],
             }.get(script, ["Exploration", "Exploitation", "Intrinsic"])
    assert lines and all(word in texts(figure) for word in words)
    assert ("Exploitation" in texts(figure)) == (script not in ("td3_rnd", "pex", "pointmass_didactic"))


def test_several_runs_go_into_one_figure(runs, tmp_path):
    plot_run.main([str(runs[script]) for script in SCRIPTS[:-1]] + ["--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_explorer_of_a_retraining_is_known_by_its_id(runs):
    args, source = SimpleNamespace(exploit_only=str(runs["iql_ooo"])), plot_run.open_run(runs["iql_ooo"])
    mine, other = (SimpleNamespace(args=args, config={"source_run_id": run_id})
                   for run_id in (source.config["run_id"], "x"))
    assert plot_run.explorer_of(mine).path == source.path and plot_run.explorer_of(other) is None


def test_online_rows_are_read(runs, tmp_path):
    """Whole rows up to the last recorded step, in their order."""
    path = Path(shutil.copytree(runs["iql_ooo"], tmp_path / "run"))
    config = json.loads((path / "config.json").read_text())
    config["replay_columns"] = {"actions": [0, 1], "observations": [1, 5]}
    (path / "config.json").write_text(json.dumps(config))
    positions = np.arange(20, dtype=np.float32).reshape(10, 2)
    rows = np.hstack([np.ones((10, 1), np.float32), positions, positions])
    (path / "replay.bin").write_bytes(rows.tobytes() + b"half")
    np.testing.assert_array_equal(plot_run.visited(plot_run.open_run(path)), positions)


def refused(main, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_a_half_written_last_record_is_drawn_past_and_damage_is_named(runs, tmp_path, capsys):
    path = Path(shutil.copytree(runs["rlpd_ooo"], tmp_path / "run"))
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(whole + '{"phase": ')
    plot_run.main([str(path)])
    assert "half written" in capsys.readouterr().err and (path / "figure.png").exists()
    (path / "metrics.jsonl").write_text(whole)
    for name, content in (("metrics.jsonl", "{\n" + whole), ("metrics.jsonl", '{"a": 1}\n' + whole),
                          ("metrics.jsonl", ""), ("evals.jsonl", "\n\n"), ("config.json", "{"),
                          ("config.json", '{"script": "os"}')):
        before = (path / name).read_text()
        (path / name).write_text(content)
        assert str(path) in refused(plot_run.main, [str(path)], capsys)
        (path / name).write_text(before)


@pytest.mark.parametrize(("argv", "words"), [
    ([], "RUN_DIR"), (["nowhere"], "nowhere"), (["RUN", "--episodes", "0"], "--episodes 0"), (["RUN", "RUN"], "--out"),
    (["RUN", "--out", "none/x.png"], "none/x.png"), (["RUN", "--out", "x.xyz"], "x.xyz"), (["RUN", "--out", "."], "."),
    (["RUN", "POINT", "--out", "x.png"], "point mass"), (["~/none"], "/home/of/nobody/none"),
])
def test_bad_input_of_plot_run_is_one_line(argv, words, runs, in_tmp, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    names = {"RUN": str(runs["rlpd_ooo"]), "POINT": str(runs["pointmass_didactic"])}
    assert words in refused(plot_run.main, [names.get(word, word) for word in argv], capsys)
    assert list(in_tmp.iterdir()) == []


def test_bad_input_of_the_chain_is_one_line(tmp_path, capsys):
    run = str(ROOT / "results" / "pointmass" / "main")
    for cell in ("0", "nan", "inf"):
        assert f"--cell {cell}" in refused(pointmass_chain.main, [run, "--cell", cell], capsys)
    assert "config.json" in refused(pointmass_chain.main, [run], capsys)  # of an earlier version
    assert str(tmp_path) in refused(pointmass_chain.main, [str(tmp_path)], capsys)


def test_visits_and_bonus_of_the_holes(runs, tiny, capsys):
    """The visits of a column add up to all of that hole; there is a bonus row for each saved RND network."""
    run = plot_run.open_run(runs["iql_ooo"])
    tiny(run.args.env_id)
    holes.main(holes.Args(str(run.path)))
    visits, bonus = (table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n"))
    cells = np.array([[int(x.replace(",", "")) for x in line.split("|")[1:-2]] for line in visits[2:]])
    inside = [holes.in_disc(plot_run.visited(run), disc).sum() for disc in run.args.remove_discs]
    assert len(cells) == 10 and cells[:, 1:].sum(0).tolist() == inside
    assert len(bonus) == 2 + len(list(run.path.glob("rnd_*.pt")))
    assert str(runs["pex"]) in refused(lambda argv: holes.main(holes.Args(*argv)), [str(runs["pex"])], capsys)


def test_a_folder_without_the_study_is_one_line(runs, tmp_path, capsys):
    shutil.copytree(runs["pex"], tmp_path / "run")
    main = lambda argv: study.main(study.Args(tuple(argv)))  # noqa: E731
    assert "reproduce.py study" in refused(main, [str(tmp_path)], capsys)


def figure6(folder, **environment):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "figure6.py"), "--out", "x.png"], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, **environment})


def test_figure6_is_drawn(tiny, tmp_path):
    for task in ("antmaze-goal-missing-large-v2", "maze2d-missing-data-large-v1", "hammer-truncated-expert-v1"):
        tiny(task)
    results = [figure6(tmp_path, MINARI_DATASETS_PATH=str(tiny.path), MUJOCO_GL=gl) for gl in ("egl", "osmesa")]
    if not any(result.returncode == 0 for result in results):
        assert all(r.returncode == 2 and r.stderr.count("\n") == 1 and "MUJOCO_GL" in r.stderr for r in results)
        pytest.skip("no GL back end: " + results[0].stderr)
    out = next(result.stdout for result in results if result.returncode == 0)
    assert "of 75 transitions" in out and float(out.split("by at most ")[1].split()[0]) < 1e-3
    assert (tmp_path / "x.png").stat().st_size > 50_000


def test_figure6_without_gl_or_data_is_one_line(tmp_path):
    result = figure6(tmp_path, MUJOCO_GL="none such")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "MUJOCO_GL=osmesa" in result.stderr
    assert list(tmp_path.iterdir()) == []
