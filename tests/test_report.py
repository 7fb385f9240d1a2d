"""report.py: numbers computed by hand from run directories made up here."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_structure import load

import report
import reproduce

HAMMER, PEN = "hammer-truncated-expert-v1", "pen-binary-v0"
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def make_run(folder, script, env_id, seed, exploration=(), exploitation=(), flags=(), finished=True, **config):
    """A run directory as a script leaves it. exploration: {t: score}; exploitation: {t: [(gradient step, score)]}."""
    args = load(f"{script}.py").parse_args(["--env-id", env_id, "--seed", str(seed), *flags])
    path = Path(folder) / f"{env_id}__{script}{len(list(Path(folder).glob('*')))}__{seed}"
    path.mkdir(parents=True)
    hardware = {"gpu": None, "cores": 2, "cpu": "x", "matmul_precision": "highest"}
    (path / "config.json").write_text(json.dumps(
        {"script": script, "args": asdict(args), "versions": VERSIONS, "commit": None, "hardware": hardware,
         "dataset": {"sha256": "0", "source": "s"}} | config))
    score = lambda x: {"eval/normalized_score": x, "eval/success_rate": 0.0, "eval/episodes": 10}  # noqa: E731
    lines = [{"phase": "online", "env_step": t, "grad_step": t, **score(x)} for t, x in dict(exploration).items()]
    lines += [{"phase": "retrain", "env_step": t, "grad_step": g, **score(x)}
              for t, points in dict(exploitation).items() for g, x in points]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (path / "results.json").write_text("{}")
    return path


def run_report(tmp_path, *argv, runs=None):
    out = tmp_path / "out"
    report.main([str(runs or tmp_path / "runs"), "--out", str(out), *argv])
    return (out / "report.md").read_text()


def row_of(text, table, task):
    """{column: text of the cell} of a row of a table."""
    part = text.split(f"## {table}\n")[1].split("\n## ")[0]
    head, row = (next(line for line in part.splitlines() if line.startswith(start)) for start in ("| |", f"| {task} |"))
    return dict(zip(*([x.strip() for x in line.split("|")[2:-1]] for line in (head, row)), strict=True))


@pytest.fixture
def hammer(tmp_path):
    """Three seeds of IQL (10, 20, 60) and of OOO (40, 50, 90), at a hundredth of the budget."""
    runs, flags = tmp_path / "runs", ("--scale", "0.01", "--retrain-at", "500000")
    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0)):
        make_run(runs, "iql_ooo", HAMMER, seed, {0: 3.0, 2500: 99.0, 5000: score},
                 flags=(*flags[:2], "--intrinsic-reward-scale", "0", "--retrain-at"))
        make_run(runs, "iql_ooo", HAMMER, seed, {0: 3.0, 5000: 1.0}, {5000: [(0, 0.0), (10, 77.0), (20, score + 30)]},
                 flags=flags)
    return runs


def test_a_cell_is_mean_and_standard_error_of_the_last_scores(hammer, tmp_path):
    row = row_of(run_report(tmp_path), "Table 2", HAMMER)
    # Mean 30; deviations -20, -10, 30: variance 1400 / 2 = 700, standard error sqrt(700 / 3) = 15.28.
    assert row["IQL"] == "**30.0 ± 15.3**<br>3 seeds, 10 episodes, t = 5k (scale 0.01)<br>paper 6 ± 5.6"
    assert row["OOO (IQL)"].startswith("**60.0 ± 15.3**<br>3 seeds")
    assert row["PEX"] == "missing<br>paper 6 ± 3.6"


def test_interquartile_mean_and_probability_of_improvement():
    ooo, base = np.array([[0.0], [10.0], [20.0], [100.0]]), np.full((4, 1), 5.0)
    result = report.intervals(ooo, base)
    assert result["ooo"][0] == pytest.approx(15.0)  # the middle half: 10 and 20
    assert result["base"] == pytest.approx((5.0, 5.0, 5.0))
    assert result["improvement"][0] == pytest.approx(0.75)  # all but 0 exceed 5
    assert result["ooo"][1] <= 15.0 <= result["ooo"][2]


def test_statistics_of_a_table(hammer, tmp_path):
    text = run_report(tmp_path, "--only", "table2")
    # A quarter of three values is less than one: nothing is trimmed, the IQM is the mean.
    assert "OOO (IQL) against IQL (1 of 3 tasks, seeds 1, 2, 3): IQM 60.0" in text
    # P(40, 50, 90 > 10, 20, 60): 40 beats 2 of 3, 50 beats 2, 90 beats 3: 7 / 9.
    assert "probability of improvement 0.78" in text
    assert "OOO (Cal-QL) against Cal-QL: fewer than 2 seeds" in text


def test_the_time_is_the_papers_share_of_the_budget(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs, "calql_ooo", PEN, 1, {500: 1.0, 2500: 42.0, 10_000: 90.0},
             {2500: [(5, 43.0)], 10_000: [(5, 91.0)]},
             flags=("--scale", "0.01", "--intrinsic-reward-scale", "0", "--retrain-at"))
    make_run(runs, "calql_ooo", PEN, 1, {2500: 1.0, 10_000: 2.0}, {2500: [(5, 44.0)], 10_000: [(5, 91.0)]},
             flags=("--scale", "0.01"))
    row = row_of(run_report(tmp_path), "Table 1", PEN)
    assert row["Cal-QL @ 250k"].startswith("**42.0**<br>1 seed, 10 episodes, t = 2.5k (scale 0.01)<br>paper 74 ±")
    assert "**44.0**" in row["OOO (Cal-QL) @ 250k"]


def test_unfinished_runs_count_only_when_asked(tmp_path):
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {10: 5.0}, finished=False)
    assert row_of(run_report(tmp_path), "Table 2", HAMMER)["PEX"].startswith("missing")
    cell = row_of(run_report(tmp_path, "--unfinished"), "Table 2", HAMMER)["PEX"]
    assert cell.startswith("**5.0**") and "† unfinished" in cell


@pytest.mark.parametrize(("change", "words"), [
    (dict(flags=("--gamma", "0.9")), ["gamma 0.99 and 0.9"]),
    (dict(versions={**VERSIONS, "torch": "2.0.0"}), ["version of torch 2.13.0 and 2.0.0"]),
    (dict(commit="0" * 12), ["script"]),
    (dict(dataset={"sha256": "1", "source": "s"}), ["data 0 and 1"]),
    (dict(flags=("--online-steps", "1000")), ["online_steps 500000 and 1000"]),
])
def test_mixed_runs_are_never_averaged(tmp_path, capsys, change, words):
    paths = [make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0}),
             make_run(tmp_path / "runs", "pex", HAMMER, 2, {500: 30.0}, **change)]
    with pytest.raises(SystemExit) as stop:
        run_report(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert all(word in err for word in [*words, *(p.name for p in paths), "--mixed"])
    text = run_report(tmp_path, "--mixed")
    cell = row_of(text, "Table 2", HAMMER)["PEX"]
    assert "**10.0**" in cell and "**30.0**" in cell and "20.0" not in cell
    assert f"{paths[1]} are not averaged" in text


def test_settings_that_do_not_bear_on_the_cell_do_not_separate_runs(tmp_path):
    make_run(tmp_path / "runs", "iql_ooo", HAMMER, 1, {500: 10.0}, flags=("--intrinsic-reward-scale", "0"))
    make_run(tmp_path / "runs", "iql_ooo", HAMMER, 2, {500: 30.0}, flags=(
        "--intrinsic-reward-scale", "0", "--retrain-steps", "5", "--retrain-at", "100", "--log-every", "7"))
    assert row_of(run_report(tmp_path), "Table 2", HAMMER)["IQL"].startswith("**20.0 ± 10.0**")


def test_settings_that_are_not_the_papers_are_named(tmp_path):
    make_run(tmp_path / "runs", "rlpd_ooo", "halfcheetah-sparse-v2", 1, {1000: 50.0}, flags=(
        "--goal-x", "10", "--utd-ratio", "1", "--scale", "0.001"))
    text = run_report(tmp_path)
    assert row_of(text, "Table 3", "halfcheetah-sparse-v2")["RLPD + RND"].startswith(
        "**50.0**<br>1 seed, 10 episodes, t = 1k (scale 0.001) ‡")
    assert "- ‡ halfcheetah-sparse-v2, RLPD + RND: utd_ratio 1 instead of 20, goal_x 10.0 instead of None.\n" in text \
        or "- ‡ halfcheetah-sparse-v2, RLPD + RND: goal_x 10.0 instead of None, utd_ratio 1 instead of 20.\n" in text


def test_two_scores_of_one_seed_are_refused(tmp_path, capsys):
    for score in (1.0, 2.0):
        make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: score})
    with pytest.raises(SystemExit):
        run_report(tmp_path)
    assert "same seed" in capsys.readouterr().err
    assert "**2.0**" in run_report(tmp_path, "--exclude", "*pex0*")


def test_the_page_needs_no_other_file(hammer, tmp_path):
    run_report(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert (tmp_path / "out" / "figure4.png").exists()


@pytest.mark.parametrize("algorithm", [name for name in reproduce.ALGORITHMS if name != "pointmass_didactic"])
def test_algorithms_are_known_by_their_settings(algorithm, monkeypatch):
    target = next(t for t, parts in reproduce.TARGETS.items() if any(algorithm in names for _, names in parts))
    runs = reproduce.expand(*reproduce.parse_args([target, "--seeds", "1", "--algorithms", algorithm]))
    run = next(run for run in runs if run.algorithm == algorithm)
    source = next((r for r in runs if r.name == run.source), None)
    module = load(run.command[1])
    if source:
        args = module.parse_args(source.command[2:])
        monkeypatch.setattr(module, "read_config", lambda *_: {"args": asdict(args)})
    args = module.parse_args([*run.command[2:-2], "--exp-name", "anything"])
    assert report.identify({"script": Path(run.command[1]).stem, "args": asdict(args)}) == algorithm


@pytest.mark.parametrize(("argv", "words"), [
    (["nowhere"], ["nowhere is not a folder"]),
    (["."], ["no run directory", "reproduce.py"]),
    ([".", "--only", "table4"], ["did you mean table"]),
    ([], ["python report.py runs"]),
])
def test_bad_input_is_one_line(argv, words, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words) and list(in_tmp.iterdir()) == []
