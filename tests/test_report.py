"""report.py: numbers computed by hand from run directories made up here."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_structure import load

import report
import reproduce

ROOT = Path(report.__file__).parent
HAMMER, PEN, ANTMAZE = "hammer-truncated-expert-v1", "pen-binary-v0", reproduce.ANTMAZE
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
HARDWARE = {"gpu": None, "cores": 2, "cpu": "x", "cpu_capability": "AVX2", "matmul_precision": "highest"}
PLAIN = ("--intrinsic-reward-scale", "0")


def summary(score, success=0.0, far=None, episodes=100):
    """A final evaluation as in results.json."""
    values = {"eval/return": 0.0, "eval/success_rate": success, "eval/normalized_score": score,
              "eval/episodes": episodes, "per_episode": []}
    return values | ({} if far is None else {"eval/far_success_rate": far})


def make_run(folder, script, env_id, seed, exploration=(), exploitation=(), flags=(), finished=True, metrics=(),
             episodes=(), diverged=(), **config):
    """A run directory as a script leaves it. exploration, exploitation: {t: score, or keywords of summary}."""
    args = load(f"{script}.py").parse_args(["--env-id", env_id, "--seed", str(seed), "--exp-name", script, *flags])
    path = Path(folder) / f"{env_id}__{script}{len(list(Path(folder).glob('*')))}__{seed}"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(
        {"script": script, "run_id": "a", "args": asdict(args), "versions": VERSIONS, "commit": None,
         "script_sha256": "f" * 64, "hardware": HARDWARE, "command": f"{script}.py --seed {seed}", "resumed": [],
         "dataset": {"sha256": "0", "source": "s"}} | config))
    final = lambda x: None if x is None else summary(**x) if isinstance(x, dict) else summary(x)  # noqa: E731
    exploration, exploitation = dict(exploration), dict(exploitation)
    own = ("policy",) if script in ("td3_rnd", "pex") else ("exploration", "exploitation")
    rows = [{"env_step": t, **dict(zip(own, (final(exploration.get(t)), final(exploitation.get(t))), strict=False))}
            for t in sorted({*exploration, *exploitation})]
    # The curves' last evaluations are not those of the tables.
    lines = [{"phase": "online", "env_step": t, "grad_step": t, **summary(-1.0)} for t in exploration]
    lines += [{"phase": "retrain", "env_step": t, "grad_step": step, **summary(-1.0)}
              for t in exploitation for step in (0, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *metrics]))
    if finished:
        (path / "results.json").write_text(json.dumps(
            {"script": script, "env_id": env_id, "exp_name": args.exp_name, "seed": seed, "run_id": "a",
             "source_run_id": None, "rows": rows, "training_episodes": list(episodes), "diverged": dict(diverged)}))
    return path


def run_report(tmp_path, *argv, runs=None):
    report.main([str(runs or tmp_path / "runs"), "--out", str(tmp_path / "out"), *argv])
    return (tmp_path / "out" / "report.md").read_text()


def row_of(text, title, task, words=""):
    """{column: text of the cell} of a row of a table; words: what the row is of, "" for seeds, episodes and t."""
    part = text.split(f"## {title}")[1].split("\n## ")[0]
    head, row = (next(line for line in part.splitlines() if line.startswith(start))
                 for start in ("| | |", f"| {task} | {words} |"))
    return dict(zip(*([x.strip() for x in line.split("|")[3:-1]] for line in (head, row)), strict=True))


def score_of(text, title, task):
    return row_of(text, title, task, "normalised score")


# === cells ===


@pytest.fixture
def hammer(tmp_path):
    """Three seeds of IQL (10, 20, 60) and of OOO (40, 50, 90), at a hundredth of the budget."""
    runs, scale = tmp_path / "runs", ("--scale", "0.01")
    for seed, score in ((1, 10.0), (2, 20.0), (3, 60.0)):
        make_run(runs, "iql_ooo", HAMMER, seed, {5000: score}, flags=(*scale, *PLAIN, "--retrain-at"))
        make_run(runs, "iql_ooo", HAMMER, seed, {2500: 99.0, 5000: 1.0}, {2500: 99.0, 5000: score + 30}, flags=scale)
    return runs


def test_a_cell_is_mean_and_interval_of_the_final_evaluations(hammer, tmp_path):
    text = run_report(tmp_path)
    # Mean 30; deviations -20, -10, 30: variance 1400 / 2 = 700, standard error 15.28; t(2) is 4.303: +-65.7.
    assert score_of(text, "Table 2", HAMMER) == {
        "PEX": "", "TD3 + RND": "", "Cal-QL": "", "OOO (Cal-QL)": "", "IQL": "30.0 [-35.7, 95.7]",
        "OOO (IQL)": "60.0 [-5.7, 125.7]"}
    row = row_of(text, "Table 2", HAMMER)
    assert row["IQL"] == "3 seeds, 100 episodes, t = 5k (scale 0.01)" and row["PEX"] == "missing"
    assert row_of(text, "Table 2", HAMMER, "paper: score ± standard error")["OOO (IQL)"] == "104 ± 12.4"
    assert "## Table 1" not in text and "## Table 3" not in text and "## Other" not in text
    assert "No finished run" in run_report(tmp_path, "--only", "table1")


def test_methods_are_compared_seed_by_seed(hammer, tmp_path):
    line, = [x for x in run_report(tmp_path).splitlines() if x.startswith("| OOO (IQL) - IQL |")]
    # The difference is 30 for each seed; 2 of 8 sign patterns are as extreme.
    assert line == f"| OOO (IQL) - IQL | {HAMMER} | normalised score | 3 | 30.0 [30.0, 30.0] | 0.25 | 0.25 |"


def test_statistics():
    assert report.sign_flip([1.0, 2.0, 3.0]) == 0.25
    # 3 + 2 - 1 = 4 of at most 6: 3 + 2 + 1, 3 + 2 - 1, and their opposites.
    assert report.sign_flip([-1.0, 2.0, 3.0]) == 0.5
    assert report.sign_flip([0.0, 0.0]) == 1.0
    assert report.sign_flip([1.0] * 20) == 2 / 2**20
    assert report.sign_flip([1.0, -1.0] * 15) == 1.0 and report.sign_flip([1.0] * 30) < 1e-4
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and report.holm([]) == []
    assert report.t_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert report.mean_interval([100.0, 90.0], (0, 100)) == "95.0 [31.5, 100.0]"
    assert report.mean_interval([7.0]) == "7.0"


def test_the_t_interval_holds_the_mean_of_normal_scores():
    coverage = __import__("tools.coverage", fromlist=["coverage"])
    draw, mean = coverage.SCORES["normal"]
    values = draw(np.random.default_rng(0), (2000, 5))
    assert 0.93 < np.mean([low < mean < high for low, high in map(report.t_interval, values)]) < 0.97


@pytest.mark.parametrize(("env_id", "online_steps", "times", "read"), [
    (PEN, 250_000, (50_000, 250_000), 250_000),  # the natural cheap run of the @ 250k columns
    (PEN, 1_000_000, (50_000, 240_000, 260_000), 240_000),
    (PEN, 6000, (1500, 3000, 6000), 1500),
    (PEN, 6000, (3000, 6000), None),
    (ANTMAZE, 1_500_000, (1_100_000, 1_500_000), 1_500_000),
    (ANTMAZE, 20_000, (10_000, 15_000, 20_000), 15_000),
])
def test_a_cell_and_its_base_are_read_at_the_same_time(env_id, online_steps, times, read, tmp_path):
    runs, flags = tmp_path / "runs", ("--online-steps", str(online_steps), "--retrain-at", str(online_steps))
    scores = {t: float(i) for i, t in enumerate(times)}
    for seed in (1, 2):
        make_run(runs, "calql_ooo", env_id, seed, scores, flags=(*flags, *PLAIN))
        make_run(runs, "calql_ooo", env_id, seed, {t: 99.0 for t in times}, scores, flags=flags)
    text = run_report(tmp_path)
    title, names = ("Table 1", ("Cal-QL @ 250k", "OOO (Cal-QL) @ 250k")) if env_id == PEN else \
        ("Table 2", ("Cal-QL", "OOO (Cal-QL)"))
    if read is None:
        assert title not in text and text.split("## Other runs")[1].count("6k") >= 2
        return
    for name in names:
        assert score_of(text, title, env_id)[name] == f"{scores[read]:.1f} [{scores[read]:.1f}, {scores[read]:.1f}]"
        assert f"t = {report.steps(read)} " in row_of(text, title, env_id)[name]
    assert f"| OOO (Cal-QL) - Cal-QL | {env_id} |" in text


def test_figures_read_the_time_of_the_tables(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "runs", "iql_ooo", ANTMAZE, seed, {1_500_000: 5.0, 2_000_000: 9.0}, flags=PLAIN)
        make_run(tmp_path / "runs", "iql_ooo", ANTMAZE, seed, {1_500_000: 6.0}, {1_500_000: 7.0})
    text = run_report(tmp_path)
    for title in ("Table 2", "Figure 4", "Figure 9", "Figure 12"):
        row = score_of(text, title, ANTMAZE)
        assert row["IQL"].startswith("5.0") and row["OOO (IQL)"].startswith("7.0"), title


def test_only_equal_times_are_compared(tmp_path):
    runs, flags = tmp_path / "runs", ("--scale", "0.01")
    for seed in (1, 2):
        make_run(runs, "calql_ooo", PEN, seed, {1000: 1.0, 2500: 42.0}, flags=(*flags, *PLAIN))
        make_run(runs, "calql_ooo", PEN, seed, {}, {2000: 43.0, 10_000: 91.0}, flags=flags)
    text = run_report(tmp_path, "--only", "table1")
    row = score_of(text, "Table 1", PEN)
    assert row["OOO (Cal-QL) @ 250k"].startswith("43.0") and row["Cal-QL @ 250k"].startswith("42.0")
    assert f"- {PEN}: OOO (Cal-QL) is read at t = 2k, Cal-QL at t = 2.5k; not compared." in text
    assert "| OOO (Cal-QL) - Cal-QL" not in text


def test_unfinished_runs_do_not_count(tmp_path, capsys):
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    make_run(tmp_path / "runs", "pex", HAMMER, 2, {500: 5.0}, finished=False)
    text = run_report(tmp_path)
    assert score_of(text, "Table 2", HAMMER)["PEX"] == "10.0" and "| unfinished |" in text
    assert "1 of 2 runs (1 unfinished)" in capsys.readouterr().out


# === the study and other runs ===

# Far success of IQL, IQL's data retrained, the explorer and OOO: a constant and what is added for a seed.
STUDY = [(2.0, 0), (4.0, 2), (60.0, 20), (90.0, 1)]


def make_study(runs, seeds=(1, 2, 3, 4, 5), more=()):
    env_id = reproduce.MEDIUM
    episodes = [dict(env_step=600 * i, success=i < 3, start_distance=i, **{"return": 0.0}, length=600)
                for i in range(1, 5)]
    for seed in seeds:
        iql, iql_retrained, explorer, ooo = (
            dict(score=x - 5, success=min(1, (x + 10) / 100), far=(x + seed * part / 5) / 100) for x, part in STUDY)
        for algorithm, exploration, exploitation in (
                ("iql_retrained", {20_000: iql}, {20_000: iql_retrained}),
                ("iql_ooo", {20_000: explorer}, {20_000: ooo}), ("offline_only", {}, {0: iql})):
            flags = [*reproduce.small(env_id, algorithm), "--exp-name", algorithm, *more]
            diverged = {"exploration": dict(phase="online", env_step=77, grad_step=99, magnitude=7e6, ceiling=1e4)}
            make_run(runs, "iql_ooo", env_id, seed, exploration, exploitation, flags, episodes=episodes,
                     diverged=diverged if (seed, algorithm) == (3, "iql_ooo") else {})


def test_the_study_shows_the_two_by_two_with_its_comparisons(tmp_path):
    make_study(tmp_path / "runs")
    text, title, task = run_report(tmp_path), "The study and the small preset", reproduce.MEDIUM
    row = row_of(text, title, task, "success from far starts, %")
    assert list(row) == ["IQL", "IQL's data retrained", "IQL + RND", "OOO (IQL)", "D_off alone retrained"]
    assert {x: y.split(" [")[0] for x, y in row.items()} == {
        "IQL": "2.0", "IQL's data retrained": "5.2", "IQL + RND": "72.0", "OOO (IQL)": "90.6",
        "D_off alone retrained": "2.0"}
    # Far starts are more than 2 cells from the goal: of episodes 1 to 4 the first two are near, and the successes.
    assert row_of(text, title, task, "episodes of D_on with success, %")["OOO (IQL)"] == "50.0"
    assert row_of(text, title, task, "the same from far starts, %")["OOO (IQL)"] == "0.0"
    # OOO - explorer: 90 + seed / 5 - 60 - 4 seed: 30 - 3.8 seed, mean 18.6, all positive.
    lines = [x for x in text.splitlines() if x.startswith("| OOO (IQL) - ")]
    assert [x.split("|")[1].strip() for x in lines] == ["OOO (IQL) - IQL + RND", "OOO (IQL) - IQL's data retrained"]
    assert all("| success from far starts, % | 5 |" in x and x.endswith("| 0.062 | 0.062 |") for x in lines)
    assert "| 18.6 [" in lines[0]
    assert "IQL + RND: diverged, mean |Q| or |V| above what rewards can give: seed 3 (7e+06 at online step 77" in text
    assert "- all: ‡ " in text and "tau 0.02 instead of 0.005" in text and "retrain_steps 46000 of 2000000" in text
    assert "(scale 0.04) ‡" in row_of(text, title, task)["OOO (IQL)"]
    assert row_of(text, title, task)["D_off alone retrained"] == "5 seeds, 100 episodes, t = 0 ‡"
    assert (tmp_path / "out" / "small.png").stat().st_size > 10_000
    assert "## Table" not in text and "## Other" not in text


def test_one_seed_has_no_interval_and_no_comparison(tmp_path):
    make_study(tmp_path / "runs", seeds=(1,))
    text, title = run_report(tmp_path, "--only", "small"), "The study and the small preset"
    assert row_of(text, title, reproduce.MEDIUM, "success from far starts, %")["OOO (IQL)"] == "90.2"
    assert row_of(text, title, reproduce.MEDIUM)["OOO (IQL)"].startswith("1 seed, ")
    assert "fewer than 2 seeds in common; not compared" in text and "| OOO (IQL) - " not in text


def test_runs_of_no_table_are_shown_under_their_own_names(tmp_path, capsys):
    """Another --exp-name, a copied script, an online run of an ablation."""
    runs = tmp_path / "runs"
    for seed in (1, 2):
        flags = ("--exp-name", "make_run", "--online-steps", "700", "--retrain-at", "700")
        make_run(runs, "iql_ooo", reproduce.UMAZE, seed, {700: 5.0}, {700: dict(score=8.0, far=0.5)}, flags)
        make_run(runs, "iql_ooo", reproduce.UMAZE, seed, {700: 6.0}, {700: 9.0}, flags, command="my_iql.py --seed 1",
                 script_sha256="0" * 64)
        make_run(runs, "iql_ooo", reproduce.UMAZE, seed, {700: 6.0}, {700: 9.0}, ("--retrain-upsample", "0"))
    text = run_report(tmp_path)
    assert score_of(text, "Other runs", reproduce.UMAZE) == {
        x: f"{y} [{y}, {y}]" for x, y in {
            "IQL + RND": 6.0, "OOO without upsampling": 9.0, "IQL + RND (make_run)": 5.0, "OOO (IQL) (make_run)": 8.0,
            "my_iql make_run, exploitation policy": 9.0, "my_iql make_run, exploration policy": 6.0}.items()}
    assert "## Table" not in text and "6 of 6 runs are in" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (("--offline-steps", "10"), "offline_steps 10 of 50000"),
    (("--retrain-steps", "10"), "retrain_steps 10 of 2000000"),
    (("--gamma", "0.9"), "gamma 0.9 instead of 0.99"),
    (("--hidden-dims", "8"), "hidden_dims [8] instead of [256, 256]"),
    (("--eval-every", "7", "--eval-episodes", "7", "--log-every", "7"), None),
])
def test_what_is_not_the_papers_is_named(flags, words, tmp_path):
    for name, folder in ((flags, "runs"), ((), "plain")):
        make_run(tmp_path / folder, "iql_ooo", HAMMER, 1, {}, {500_000: 5.0}, flags=name)
    text = run_report(tmp_path, "--only", "table2")
    assert (f"- all: ‡ {words}." in text) if words else ("‡" not in text)
    assert ("(scale 1) ‡" in row_of(text, "Table 2", HAMMER)["OOO (IQL)"]) == bool(words)
    assert "‡" not in run_report(tmp_path, "--only", "table2", runs=tmp_path / "plain")


def test_a_budget_shrunk_by_scale_is_no_departure_and_learning_starts_is_one(tmp_path):
    scaled = ("--scale", "0.001")
    make_run(tmp_path / "runs", "rlpd_ooo", "halfcheetah-sparse-v2", 1, {1000: 50.0}, {1000: 5.0}, scaled)
    assert "‡" not in run_report(tmp_path, "--only", "table3")
    make_run(tmp_path / "x", "rlpd_ooo", "halfcheetah-sparse-v2", 1, {1000: dict(score=50.0, episodes=5)}, {},
             (*scaled, "--goal-x", "10", "--learning-starts", "100"))
    text = run_report(tmp_path, "--only", "table3", runs=tmp_path / "x")
    assert row_of(text, "Table 3", "halfcheetah-sparse-v2")["RLPD + RND"] == \
        "1 seed, 5 episodes, t = 1k (scale 0.001) ‡"
    assert "goal_x 10.0 instead of None" in text and "learning_starts 1 of 5000" in text  # scaled as well
    make_run(tmp_path / "y", "pex", HAMMER, 1, {500_000: 50.0}, {}, ("--learning-starts", "100"))
    assert "- all: ‡ learning_starts 100 of 5000." in run_report(tmp_path, runs=tmp_path / "y")


# === what is averaged ===


@pytest.mark.parametrize(("change", "words"), [
    (dict(flags=("--gamma", "0.9")), ["gamma 0.99 and 0.9"]),
    (dict(versions={**VERSIONS, "torch": "2.0.0"}), ["version of torch 2.13.0 and 2.0.0"]),
    (dict(script_sha256="0" * 64), ["script ffffffffffff and 000000000000"]),
    (dict(script_sha256=None, commit="abc"), ["script ffffffffffff and unknown (commit abc)"]),
    (dict(dataset={"sha256": "1", "source": "s"}), ["data 0 and 1"]),
    (dict(flags=("--online-steps", "1000", "--save-at", "500")), ["online_steps 500000 and 1000"]),
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
    assert score_of(text, "Table 2", HAMMER)["PEX"] == "10.0<br>30.0"
    assert f"{paths[1]} are not averaged" in text


START = {"time": 1.0, "command": "x", "hardware": HARDWARE, "versions": VERSIONS, "commit": None,
         "script_sha256": "f" * 64}


@pytest.mark.parametrize(("later", "words"), [
    ({"versions": {**VERSIONS, "torch": "2.14.0"}}, "version of torch 2.13.0 and 2.13.0 then 2.14.0"),
    ({"versions": VERSIONS | {"mujoco": "3.3.7"}}, "version of mujoco None and None then 3.3.7"),
    ({"script_sha256": "0" * 64}, "script ffffffffffff and ffffffffffff then 000000000000"),
])
def test_a_run_continued_on_other_versions_or_script_is_not_averaged(later, words, tmp_path, capsys):
    """The same start again is no change, and neither is another commit of the same text."""
    same = [START, START | {"commit": "other"}]
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0}, run_id="a", resumed=[])
    make_run(tmp_path / "runs", "pex", HAMMER, 2, {500: 30.0}, run_id="b", resumed=same)
    assert score_of(run_report(tmp_path), "Table 2", HAMMER)["PEX"].startswith("20.0 [")
    make_run(tmp_path / "runs", "pex", HAMMER, 3, {500: 50.0}, run_id="c", resumed=[*same, {**START, **later}])
    with pytest.raises(SystemExit) as stop:
        run_report(tmp_path)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    text = run_report(tmp_path, "--mixed", "--only", "table2")
    assert score_of(text, "Table 2", HAMMER)["PEX"].endswith("<br>50.0") and words.split(" and ")[1] in text


def test_settings_that_a_run_of_an_older_script_has_not_are_named(tmp_path):
    path = make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    config = json.loads((path / "config.json").read_text())
    del config["args"]["epsilon"]
    (path / "config.json").write_text(json.dumps(config))
    assert "made before there was epsilon" in run_report(tmp_path)


def test_settings_that_do_not_bear_on_the_cell_do_not_separate_runs(tmp_path):
    make_run(tmp_path / "runs", "iql_ooo", HAMMER, 1, {500_000: 10.0}, flags=PLAIN)
    make_run(tmp_path / "runs", "iql_ooo", HAMMER, 2, {500_000: 30.0}, flags=(
        *PLAIN, "--retrain-steps", "5", "--retrain-at", "100", "--log-every", "7", "--eval-episodes", "3"))
    assert score_of(run_report(tmp_path), "Table 2", HAMMER)["IQL"].startswith("20.0 [")


def test_two_scores_of_one_seed_are_refused(tmp_path, capsys):
    for score in (1.0, 2.0):
        make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: score})
    with pytest.raises(SystemExit):
        run_report(tmp_path)
    assert "same seed" in capsys.readouterr().err
    assert score_of(run_report(tmp_path, "--exclude", "*pex0*"), "Table 2", HAMMER)["PEX"] == "2.0"


@pytest.mark.parametrize("algorithm", [name for name in reproduce.ALGORITHMS if name != "pointmass_didactic"])
def test_algorithms_are_known_by_their_settings(algorithm):
    what = reproduce.ALGORITHMS[algorithm]
    script, env_id = load(what.script), "halfcheetah-sparse-v2" if "rlpd" in algorithm else reproduce.MAZE2D
    env_id = "hammer-truncated-expert-v1" if algorithm == "no_bootstrap" else env_id  # which has cut episodes
    args = script.parse_args(["--env-id", env_id, *reproduce.merged(what.flags), "--exp-name", "anything"])
    config = {"script": Path(what.script).stem, "args": json.loads(json.dumps(asdict(args)))}
    # The data of IQL are retrained or not: both are IQL.
    assert report.identify(config) == {"iql_retrained": "iql"}.get(algorithm, algorithm)


def test_a_baselines_divergence_is_said(tmp_path):
    """It has one policy, whose name is "policy"."""
    where = {"policy": dict(phase="online", env_step=77, grad_step=77, magnitude=7e6, ceiling=1e4)}
    make_run(tmp_path / "runs", "pex", reproduce.UMAZE, 1, {700: 5.0},
             flags=("--save-at", "700", "--online-steps", "700"), diverged=where)
    assert "diverged, mean |Q| or |V| above what rewards can give: seed 1" in run_report(tmp_path)


def test_retrainings_on_the_data_of_one_run_are_not_two_seeds(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "runs", "iql_ooo", reproduce.UMAZE, seed, {}, {700: 9.0}, ("--retrain-upsample", "0"),
                 source_run_id="the same")
    with pytest.raises(SystemExit):
        run_report(tmp_path)
    assert "data of one run" in capsys.readouterr().err


def test_retrainings_on_data_of_two_script_texts_are_not_averaged(tmp_path, capsys):
    for seed, text in ((1, "0"), (2, "0"), (3, "1")):
        make_run(tmp_path / "runs", "iql_ooo", reproduce.UMAZE, seed, {700: 5.0}, {700: 8.0}, run_id=f"source {seed}",
                 script_sha256=text * 64)
        make_run(tmp_path / "runs", "iql_ooo", reproduce.UMAZE, seed, {}, {700: 9.0}, ("--retrain-upsample", "0"),
                 run_id=f"own {seed}", source_run_id=f"source {seed}")
        if seed == 2:
            run_report(tmp_path)
    text = run_report(tmp_path, "--mixed")
    assert score_of(text, "Other runs", reproduce.UMAZE)["OOO without upsampling"] == "9.0 [9.0, 9.0]<br>9.0"
    with pytest.raises(SystemExit):
        run_report(tmp_path, "--exclude", "*__iql_ooo4__*")  # the source of seed 3: its text is not known
    assert "script of the source 000000000000 and None" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--warm-start", "--sync"])
def test_retrainings_that_begin_with_others_are_not_averaged(flag, tmp_path, capsys):
    """The retraining at 700 is another one after one at 300. From scratch it is the same."""
    for own, folder in (((), "scratch"), ((flag,), "warm")):
        for seed, times in ((1, ("700",)), (2, ("300", "700"))):
            make_run(tmp_path / folder, "iql_ooo", reproduce.UMAZE, seed, {}, {700: 9.0},
                     (*own, "--online-steps", "700", "--retrain-at", *times))
    run_report(tmp_path, runs=tmp_path / "scratch")
    with pytest.raises(SystemExit):
        run_report(tmp_path, runs=tmp_path / "warm")
    assert "retrain_at" in capsys.readouterr().err


def test_a_mean_over_fewer_seeds_says_so(tmp_path):
    for seed in (1, 2, 3):
        far = {} if seed == 3 else dict(far=0.5)
        make_run(tmp_path / "runs", "iql_ooo", reproduce.UMAZE, seed, {700: 5.0}, {700: dict(score=8.0, **far)},
                 ("--online-steps", "700", "--retrain-at", "700"))
    text = run_report(tmp_path)
    assert "(2 of 3 seeds)" in row_of(text, "Other runs", reproduce.UMAZE, "success from far starts, %")["OOO (IQL)"]


# === what cannot be read ===


def damage(path, kind):
    """Damage a run directory; returns what it then is to be called."""
    config, metrics, results = path / "config.json", path / "metrics.jsonl", path / "results.json"
    if kind == "records":
        metrics.write_text("{" + metrics.read_text())
        return "line 1 of"
    if kind == "no records":
        metrics.unlink()
        return "No such file"
    if kind == "a score":
        results.write_text(results.read_text().replace("30.0", "NaN"))
        return "nan"
    if kind == "an episode":
        results.write_text(results.read_text().replace('"training_episodes": []', '"training_episodes": [{}]'))
        return "env_step"
    if kind in ("rows", "diverged"):
        content = json.loads(results.read_text()) | {kind: [1] if kind == "rows" else {"exploration": {"phase": 1}}}
        results.write_text(json.dumps(content))
        return "cannot be read"
    if kind == "no config":
        config.unlink()
        return "No such file"
    if kind == "half a config":
        config.write_text(config.read_text()[:-20])
        return "cannot be read"
    if kind == "results":
        results.write_text("{")
        return "cannot be read"
    changed = json.loads(config.read_text())
    changed |= {"script": {"script": 7}, "hardware": {"hardware": None}, "starts": {"resumed": ["x"]}}[kind]
    config.write_text(json.dumps(changed))
    return "cannot be read"


@pytest.mark.parametrize("kind", ["records", "no records", "a score", "an episode", "rows", "diverged", "no config",
                                  "half a config", "results", "script", "hardware", "starts"])
def test_a_run_that_cannot_be_read_is_left_out_by_name(kind, tmp_path, capsys):
    paths = [make_run(tmp_path / "runs", "pex", HAMMER, seed, {500: 10.0 * seed}) for seed in (1, 2, 3)]
    word = damage(paths[2], kind)
    text = run_report(tmp_path)
    out, err = capsys.readouterr()
    assert score_of(text, "Table 2", HAMMER)["PEX"].startswith("15.0 [")
    line, = [line for line in text.splitlines() if "left out" in line]
    assert paths[2].name in line and word in line
    assert err.count("\n") == 1 and paths[2].name in err and "2 of 3 runs (1 left out)" in out


def test_a_half_written_last_record_is_read_past(tmp_path, capsys):
    path = make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "onl')
    assert score_of(run_report(tmp_path), "Table 2", HAMMER)["PEX"] == "10.0"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "half written" in err and str(path) in err


def test_the_point_mass_has_its_own_table_and_damage_is_named(tmp_path, capsys):
    path = make_run(tmp_path / "runs", "pointmass_didactic", "point-mass-wall", 1)
    (path / "figure2.png").write_bytes(b"a picture")
    row = {"policy": "IQL", "seeds": [1, 2], "steps": [30, 40], "success": [1, 0.5], "under": [1, 0]}
    results = {"rows": [row], "episodes_per_seed": 5, "shortest_steps": {x: {"mean": 28} for x in ("under", "over")}}
    (path / "results.json").write_text(json.dumps(results))
    make_run(tmp_path / "runs", "pointmass_didactic", "point-mass-wall", 2)
    text = run_report(tmp_path)
    assert "| IQL | 35.0 ± 5.0 | 75.0 ± 25.0 | 50.0 ± 50.0 |" in text
    assert (tmp_path / "out" / "figure2.png").read_bytes() == b"a picture"
    assert "pointmass_didactic1__2 is left out" in capsys.readouterr().err


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://x/y.png)",
           "|</td></tr></table>|", "\n\n<h1>x</h1>\n\n", "`<b>`", "\"onclick=\"x", "**&lt;b&gt;**", "\x1b[31m"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_a_run_is_only_text_in_the_page(text, tmp_path):
    def tags(page):
        return [re.sub("base64,[^\"]*", "", tag) for tag in re.findall("<[^>]*>", page)]

    def pages(name, word):
        runs = tmp_path / name
        paths = [make_run(runs, "pex", HAMMER, seed, {500: 30.0}, flags=("--dataset-id", word), commit=word,
                          script_sha256=None, versions={"torch": word}, hardware={**HARDWARE, "gpu": word},
                          resumed=[{**START, "versions": {word: word}, "commit": "x"}]) for seed in (1, 2)]
        paths[1].rename(paths[1].with_name(f"{word.replace('/', '')}"[:99] + "-"))
        make_run(runs, "pex", "pen-binary-v0", 1, {500: 30.0}, flags=("--exp-name", "x"))
        config = make_run(runs, "rlpd_ooo", "ant-sparse-v2", 1, {500: 30.0}) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"script": word}))
        report.main([str(runs), "--out", str(tmp_path / "out"), "--only", "table2", "table3"])
        return (tmp_path / "out" / "report.html").read_text()

    page = pages("runs", text)
    assert tags(page) == tags(pages("plain", "word")) and "\x1b" not in page


@pytest.mark.parametrize(("argv", "words"), [
    (["nowhere"], ["nowhere is not a folder"]),
    (["."], ["no run directory", "reproduce.py"]),
    ([".", "--only", "table4"], ["did you mean table"]),
    ([], ["python report.py runs"]),
    (["~/nowhere"], ["/home/of/nobody/nowhere"]),
])
def test_bad_input_is_one_line(argv, words, in_tmp, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words) and list(in_tmp.iterdir()) == []


def test_an_output_that_is_a_file_and_a_disk_that_fails_are_one_line(tmp_path, capsys):
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run_report(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path / "out") in err
    assert (tmp_path / "out").read_text() == "mine"
    # A limit on the size of a file fails as a full disk does; what was there before stays whole. Neither git nor a
    # back end of matplotlib that is not installed matters.
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.md").write_text("before")
    command = f"ulimit -f 1; exec {sys.executable} {report.__file__} runs --only table2 table1"
    env = {**os.environ, "MPLBACKEND": "module://nowhere.backend"}
    result = subprocess.run(["/bin/bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "report.md" in result.stderr
    assert [path.name for path in out.iterdir()] == ["report.md"] and (out / "report.md").read_text() == "before"
    command = [sys.executable, report.__file__, "runs"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env | {"PATH": "/nowhere"})
    assert result.returncode == 0 and result.stderr == "" and "1 of 1 runs are in report/report.md" in result.stdout


# === pictures ===


def test_the_page_needs_no_other_file(hammer, tmp_path):
    run_report(tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert (tmp_path / "out" / "figure4.png").exists()


def test_figures_of_the_papers_tasks_and_of_the_data_are_drawn(tmp_path, monkeypatch):
    runs, drawn = tmp_path / "runs", {}
    draw = report.draw
    monkeypatch.setattr(report, "draw", lambda tasks, columns, kinds, *x: drawn.setdefault(kinds, []).append(columns) or
                        draw(tasks, columns, kinds, *x))
    losses = [{"phase": "retrain", "env_step": 1_500_000, "grad_step": g, "losses/q_mean": 1.0} for g in (5, 10)]
    for flags in ((), ("--retrain-frozen-rnd",), ("--retrain-algorithm", "td3"), ("--warm-start",), ("--sync",)):
        make_run(runs, "iql_ooo", ANTMAZE, 1, {1_500_000: 3.0}, {1_000_000: 5.0, 1_500_000: 6.0}, flags, metrics=losses)
    for flags in ((), ("--no-bound-uniform-actions",)):
        make_run(runs, "calql_ooo", "kitchen-mixed-v0", 1, {250_000: 3.0}, flags=(*PLAIN, *flags))
    (runs / "figure6.png").write_bytes(b"a picture")
    text = run_report(tmp_path)
    for figure in (3, 5, 6, 7, 13, 14):
        assert f"## Figure {figure}:" in text
    assert "warm_start" not in text.split("## Figure 13:")[1].split("## Figure 14:")[0]  # it is what it shows
    assert drawn["exploitation",] == [["OOO (IQL)", "OOO with warm start"]]
    assert drawn["losses/q_mean", "retrain"] == [["OOO (IQL)", "OOO with TD3"]]
    assert (tmp_path / "out" / "figure6.png").read_bytes() == b"a picture"


def test_points_of_a_panel(tmp_path):
    lines = [{"phase": "pretrain", "env_step": 0, "grad_step": 200, **summary(1.0)},
             {"phase": "online", "env_step": 300, "grad_step": 500, **summary(2.0, far=0.5)},
             {"phase": "online", "env_step": 400, "grad_step": 600, "rnd/online_scaled_mean": 0.25},
             {"phase": "retrain", "env_step": 300, "grad_step": 10, **summary(3.0)},
             {"phase": "retrain", "env_step": 600, "grad_step": 20, "losses/q_mean": 9.0, **summary(4.0)}]
    flags = ("--offline-steps", "200", "--online-steps", "600", "--retrain-at", "300", "600")
    path = make_run(tmp_path, "iql_ooo", reproduce.MAZE2D, 1, {}, {}, flags, metrics=lines)
    results = json.loads((path / "results.json").read_text())
    results["rows"] = [{"env_step": t, "exploration": None, "exploitation": summary(t / 100)} for t in (300, 600)]
    (path / "results.json").write_text(json.dumps(results))
    record, found = report.read_run(path), {}
    for kind, policy in product(("curves", "exploration", "exploitation", "retrain", "rnd/online_scaled_mean",
                                 "losses/q_mean"), ("exploration", "exploitation")):
        found[kind, policy[4:6]] = report.points(record, kind, policy, "score")
    assert {key: value for key, value in found.items() if value} == {
        ("curves", "or"): {0: 1.0, 300: 2.0}, ("exploration", "or"): {0: 1.0, 300: 2.0},
        ("curves", "oi"): {300: 3.0, 600: 6.0}, ("exploitation", "oi"): {300: 3.0, 600: 6.0},
        ("retrain", "oi"): {20: 4.0}, ("rnd/online_scaled_mean", "or"): {400: 0.25}, ("losses/q_mean", "oi"): {20: 9.0}}
    assert report.points(record, "curves", "exploration", "far") == {300: 50.0}
