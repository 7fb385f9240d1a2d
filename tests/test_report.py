"""report.py: numbers computed by hand from run directories made up here."""

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_structure import load

import report
import reproduce

ROOT = Path(report.__file__).parent
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


def test_the_small_preset_shows_means_of_the_last_three_evaluations(tmp_path):
    """Of its own runs only; a run of the paper's sizes is another one."""
    small = {name: reproduce.small(HAMMER, name) for name in ("iql", "iql_ooo")}
    flags = {"iql": ["--intrinsic-reward-scale", "0", "--retrain-at", *small["iql"]], "iql_ooo": small["iql_ooo"]}
    for seed, score in ((1, 10.0), (2, 20.0)):
        for name, retraining in (("iql", {}), ("iql_ooo", {12_000: [(1, 99.0), *((i, 2 * score) for i in (2, 3, 4))]})):
            path = make_run(tmp_path / "runs", "iql_ooo", HAMMER, seed,
                            {0: 99.0, 2000: 99.0, 8000: score - 3, 10_000: score, 12_000: score + 3}, retraining,
                            flags=flags[name])
            with open(path / "metrics.jsonl", "a") as file:
                for success in (True, False, False, False):
                    file.write(json.dumps({"phase": "online", "env_step": 1, "grad_step": 1,
                                           "charts/episodic_success": success}) + "\n")
    make_run(tmp_path / "runs", "iql_ooo", HAMMER, 3, {500_000: 1.0}, {500_000: [(20, 1.0)]})
    row = row_of(run_report(tmp_path, "--only", "small"), "The small preset", HAMMER)
    assert row.pop("successes in D_on: IQL, IQL + RND") == "25 %, 25 %"
    assert {name: text.split(" [")[0] for name, text in row.items()} == {
        "IQL": "**15.0**", "IQL + RND": "**15.0**", "OOO (IQL)": "**30.0**", "TD3 + RND": "missing", "PEX": "missing"}
    assert row["IQL"].endswith("[10.0, 20.0] (0 %), 2 seeds")


def test_the_table_in_the_docs_is_that_of_the_packed_runs(tmp_path):
    with tarfile.open(ROOT / "results" / "small_preset.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    text = run_report(tmp_path, "--only", "small", runs=tmp_path / "small_preset").split("## Runs")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(reproduce.SMALL)
    assert all(row in (ROOT / "docs" / "results.md").read_text() for row in rows)


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


@pytest.mark.parametrize(("env_id", "online_steps", "times", "read"), [
    (PEN, 250_000, (50_000, 250_000), 250_000),  # the natural cheap run of the @ 250k columns
    (PEN, 1_000_000, (50_000, 240_000, 260_000), 240_000),
    (PEN, 6000, (1500, 3000, 6000), 1500),
    (PEN, 6000, (3000, 6000), None),
    ("antmaze-goal-missing-large-v2", 1_500_000, (1_100_000, 1_500_000), 1_500_000),
    ("antmaze-goal-missing-large-v2", 20_000, (10_000, 15_000, 20_000), 15_000),
])
def test_a_cell_and_its_base_are_read_at_the_same_time(env_id, online_steps, times, read, tmp_path):
    runs, flags = tmp_path / "runs", ("--online-steps", str(online_steps), "--retrain-at", str(online_steps))
    scores = {t: float(i) for i, t in enumerate(times)}
    for seed in (1, 2):
        make_run(runs, "calql_ooo", env_id, seed, scores, flags=(*flags, "--intrinsic-reward-scale", "0"))
        make_run(runs, "calql_ooo", env_id, seed, {t: 99.0 for t in times},
                 {t: [(5, score)] for t, score in scores.items()}, flags=flags)
    text = run_report(tmp_path, "--only", "table1" if env_id == PEN else "table2")
    row = row_of(text, "Table 1" if env_id == PEN else "Table 2", env_id)
    names = ("Cal-QL @ 250k", "OOO (Cal-QL) @ 250k") if env_id == PEN else ("Cal-QL", "OOO (Cal-QL)")
    for name in names:
        if read is None:
            assert row[name].startswith("missing")
            assert text.count(f"- {name}: {runs}") == 2 and "score at or before t = 1.5k." in text
        else:
            assert row[name].startswith(f"**{scores[read]:.1f} ± 0.0**") and f"t = {report.steps(read)} " in row[name]
    assert ("probability of improvement" in text) == (read is not None)


def test_only_equal_times_are_compared(tmp_path):
    runs, flags = tmp_path / "runs", ("--scale", "0.01")
    for seed in (1, 2):
        make_run(runs, "calql_ooo", PEN, seed, {1000: 1.0, 2500: 42.0}, flags=(*flags, "--intrinsic-reward-scale", "0"))
        make_run(runs, "calql_ooo", PEN, seed, {}, {2000: [(5, 43.0)], 10_000: [(5, 91.0)]}, flags=flags)
    text = run_report(tmp_path, "--only", "table1")
    row = row_of(text, "Table 1", PEN)
    assert row["OOO (Cal-QL) @ 250k"].startswith("**43.0") and row["Cal-QL @ 250k"].startswith("**42.0")
    assert f"- {PEN}: OOO (Cal-QL) @ 250k is read at t = 2k, Cal-QL @ 250k at t = 2.5k; not compared." in text
    assert "probability of improvement" not in text


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
    cell = row_of(text, "Table 2", HAMMER)["PEX"]
    assert "**10.0**" in cell and "**30.0**" in cell and "20.0" not in cell
    assert f"{paths[1]} are not averaged" in text


START = {"time": 1.0, "command": "x", "hardware": {"gpu": None, "cores": 2, "cpu": "y", "matmul_precision": "highest"}}


@pytest.mark.parametrize(("later", "words"), [
    ({"versions": {**VERSIONS, "torch": "2.14.0"}}, "version of torch 2.13.0 and 2.13.0 then 2.14.0"),
    ({"versions": VERSIONS | {"mujoco": "3.3.7"}}, "version of mujoco None and None then 3.3.7"),
    ({"commit": "0" * 12}, "script commit None and commit None then commit 000000000000"),
])
def test_a_run_continued_on_other_versions_or_commit_is_not_averaged(later, words, tmp_path, capsys):
    """The same start again is no change; configs without these keys are those of the other tests."""
    same = [{**START, "versions": VERSIONS, "commit": None}] * 2
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0}, run_id="a", resumed=[])
    make_run(tmp_path / "runs", "pex", HAMMER, 2, {500: 30.0}, run_id="b", resumed=same)
    assert "**20.0 ± 10.0**" in run_report(tmp_path)
    make_run(tmp_path / "runs", "pex", HAMMER, 3, {500: 50.0}, run_id="c", resumed=[*same, {**same[0], **later}])
    with pytest.raises(SystemExit) as stop:
        run_report(tmp_path)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    text = run_report(tmp_path, "--mixed", "--only", "table2")
    cell = row_of(text, "Table 2", HAMMER)["PEX"]
    assert "**20.0 ± 10.0**" in cell and "**50.0**" in cell and "‡" in cell
    note, = [line for line in text.splitlines() if line.startswith(f"- ‡ {HAMMER}, PEX: ")]
    assert words.split(" and ")[1] in note


def test_settings_that_a_run_of_an_older_script_has_not_are_named(tmp_path):
    path = make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    config = json.loads((path / "config.json").read_text())
    del config["args"]["epsilon"]
    (path / "config.json").write_text(json.dumps(config))
    assert f"- ‡ {HAMMER}, PEX: made before there was epsilon.\n" in run_report(tmp_path)


def damage(path, kind):
    """Damage a run directory; returns what it then is to be called."""
    config, metrics = path / "config.json", path / "metrics.jsonl"
    if kind == "records":
        metrics.write_text("{" + metrics.read_text())
        return "line 1 of"
    if kind == "no records":
        metrics.unlink()
        return "No such file"
    if kind == "a score":
        metrics.write_text(metrics.read_text().replace("30.0", "NaN"))
        return "nan"
    if kind == "no config":
        config.unlink()
        return "No such file"
    if kind == "half a config":
        config.write_text(config.read_text()[:-20])
        return "cannot be read"
    if kind == "results":
        (path / "results.json").write_text("{")
        return "cannot be read"
    changed = json.loads(config.read_text())
    changed |= {"script": {"script": "other"}, "hardware": {"hardware": None}, "starts": {"resumed": ["x"]}}[kind]
    config.write_text(json.dumps(changed))
    return "other" if kind == "script" else "cannot be read"


@pytest.mark.parametrize("kind", ["records", "no records", "a score", "no config", "half a config", "results", "script",
                                  "hardware", "starts"])
def test_a_run_that_cannot_be_read_is_left_out_by_name(kind, tmp_path, capsys):
    paths = [make_run(tmp_path / "runs", "pex", HAMMER, seed, {500: 10.0 * seed}) for seed in (1, 2, 3)]
    word = damage(paths[2], kind)
    text = run_report(tmp_path)
    out, err = capsys.readouterr()
    assert row_of(text, "Table 2", HAMMER)["PEX"].startswith("**15.0 ± 5.0**<br>2 seeds")
    line, = [line for line in text.splitlines() if "left out" in line]
    assert paths[2].name in line and word in line
    assert err.count("\n") == 1 and paths[2].name in err and "2 of 3 runs (1 left out)" in out


def test_a_half_written_last_record_is_read_past(tmp_path, capsys):
    path = make_run(tmp_path / "runs", "pex", HAMMER, 1, {400: 1.0, 500: 10.0})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "onl')
    assert row_of(run_report(tmp_path), "Table 2", HAMMER)["PEX"].startswith("**10.0**")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "half written" in err and str(path) in err


def test_a_point_mass_whose_results_are_damaged_is_named(tmp_path, capsys):
    path = make_run(tmp_path / "runs", "pointmass_didactic", "point-mass-wall", 1)
    (path / "figure2.png").write_bytes(b"")
    assert f"{path.name} is left out" in run_report(tmp_path, "--only", "figure2")
    assert "KeyError" in capsys.readouterr().err


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "![x](http://x/y.png)",
           "|</td></tr></table>|", "\n\n<h1>x</h1>\n\n", "`<b>`", "\"onclick=\"x", "**&lt;b&gt;**", "\x1b[31m"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_a_run_is_only_text_in_the_page(text, tmp_path):
    def tags(page):
        return [re.sub("base64,[^\"]*", "", tag) for tag in re.findall("<[^>]*>", page)]

    def pages(name, word):
        runs = tmp_path / name
        paths = [make_run(runs, "pex", HAMMER, seed, {500: 30.0}, flags=("--dataset-id", word), commit=word,
                          versions={"torch": word}, resumed=[{**START, "versions": {word: word}, "commit": "x"}],
                          hardware={"gpu": word, "cores": 1, "cpu": word, "matmul_precision": word}) for seed in (1, 2)]
        paths[1].rename(paths[1].with_name(f"{word.replace('/', '')}"[:99] + "-"))
        config = make_run(runs, "rlpd_ooo", "ant-sparse-v2", 1, {500: 30.0}) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"script": word}))
        report.main([str(runs), "--out", str(tmp_path / "out"), "--only", "table2", "table3"])
        return (tmp_path / "out" / "report.html").read_text()

    page = pages("runs", text)
    assert tags(page) == tags(pages("plain", "word")) and "\x1b" not in page


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
    (["~/nowhere"], ["/home/of/nobody/nowhere"]),
])
def test_bad_input_is_one_line(argv, words, in_tmp, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words) and list(in_tmp.iterdir()) == []


def test_an_output_that_is_a_file_and_a_disk_that_fails_are_one_line(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs", "pex", HAMMER, 1, {500: 10.0})
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run_report(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path / "out") in err
    assert (tmp_path / "out").read_text() == "mine"
    # A limit on the size of a file fails as a full disk does; what was there before stays whole.
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.md").write_text("before")
    command = f"ulimit -f 1; exec {sys.executable} {report.__file__} runs --only table2 table1"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "report.md" in result.stderr
    assert [path.name for path in out.iterdir()] == ["report.md"] and (out / "report.md").read_text() == "before"


def test_figures_of_the_papers_tasks_and_of_the_data_are_drawn(tmp_path):
    runs, antmaze = tmp_path / "runs", "antmaze-goal-missing-large-v2"
    for flags in ((), ("--retrain-frozen-rnd",), ("--retrain-algorithm", "td3"), ("--warm-start",)):
        make_run(runs, "iql_ooo", antmaze, 1, {1000: 3.0}, {2_000_000: [(5, 1.0), (10, 2.0)]}, flags=flags)
    for flags in ((), ("--no-bound-uniform-actions",)):
        make_run(runs, "calql_ooo", "kitchen-mixed-v0", 1, {1000: 3.0}, flags=("--intrinsic-reward-scale", "0", *flags))
    (runs / "figure6.png").write_bytes(b"a picture")
    text = run_report(tmp_path)
    for figure in (3, 5, 6, 7, 13):
        assert f"## Figure {figure}:" in text
    assert f"- ‡ {antmaze}, OOO, warm start: warm_start" not in text.split("## Figure 13:")[1]  # it is what it shows
    make_run(runs, "iql_ooo", antmaze, 1, {1000: 3.0}, {2_000_000: [(5, 1.0)]}, flags=("--sync", "--gamma", "0.9"))
    assert f"- ‡ {antmaze}, sync: OOO (IQL): gamma 0.9 instead of 0.99.\n" in run_report(tmp_path, "--only", "figure14")
    assert (tmp_path / "out" / "figure6.png").read_bytes() == b"a picture"
