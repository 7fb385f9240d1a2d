"""The tables of docs/results.md and README.md hold what the packed records hold."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np

import iql_ooo as ooo
import report
import tools.first_run as first_run
import tools.study as study

ROOT = Path(__file__).resolve().parent.parent


README_CELLS = {  # arm: the row of README's table, and the column of the medium maze
    "IQL": ("data of IQL", 0), "IQL's data, retrained": ("data of IQL", 1),
    "IQL + RND": ("data of IQL + RND", 0), "OOO (IQL)": ("data of IQL + RND", 1),
    "offline data alone, retrained": ("offline data alone", 1),
    "IQL, equal updates": ("data of IQL with three times the updates", 0),
    "IQL + RND, equal updates": ("data of IQL + RND with three times the updates (seeds 1 to 5)", 0),
}


def final_evaluations():
    """{(task, run, policy): {seed: summary}}; each far success rate is made again from its episodes."""
    found = {}
    with tarfile.open(ROOT / "results" / "study_a.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("results.json"):
                results = json.loads(archive.extractfile(member).read())
                for policy in ("exploration", "exploitation"):
                    summary = results["rows"][-1].get(policy)
                    if summary is None:  # offline only: nothing has acted
                        continue
                    far = [e["success"] for e in summary["per_episode"]
                           if e["start_distance"] > ooo.TASKS[results["env_id"]].far]
                    assert summary["eval/far_success_rate"] == np.mean(far) and len(summary["per_episode"]) == 100
                    key = results["env_id"], results["exp_name"], policy
                    found.setdefault(key, {})[results["seed"]] = summary
    return found


def test_the_tables_of_the_study(tmp_path, capsys):
    """docs/results.md has what tools/study.py prints, README the same rounded."""
    with tarfile.open(ROOT / "results" / "study_a.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    study.main(study.Args((str(tmp_path),)))
    page, readme = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md"))
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert all(table in page for table in tables), tables
    records, _ = report.read_all(report.Args((str(tmp_path),)))
    summaries = final_evaluations()
    for (task, label), runs in study.last_policies(records).items():
        name, policy = study.ARMS[label]
        assert sorted(runs) == list(range(1, len(runs) + 1))
        for seed, (_, values) in runs.items():
            assert values["far"] == 100 * summaries[task, name, policy][seed]["eval/far_success_rate"]
        far = [values["far"] for _, values in runs.values()]
        low, high = np.clip(report.t_interval(far), 0, 100)
        row, column = README_CELLS[label]
        line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", readme, flags=re.M)[1].replace("**", "").split("|")
        words = line[column + 2 * (task == study.UMAZE)].strip()
        assert words.startswith(f"{np.mean(far):.0f} [{low:.0f}, {high:.0f}]"), (task, label)


def test_the_first_run_is_compared_with_the_medium_maze(tmp_path):
    """Of the packed records only those of its own maze."""
    summaries, (means, seeds) = final_evaluations(), first_run.study()
    mine = summaries[study.MEDIUM, "iql_ooo", "exploitation"]
    assert seeds == len(mine) == 20
    assert means["OOO (IQL)"] == np.mean([summary["eval/far_success_rate"] for summary in mine.values()])


def test_the_example_run_is_the_studys_seed_1():
    """Its policies can be loaded, and its table is that of the packed records."""
    example = ROOT / "results" / "example"
    (row,) = json.loads((example / "results.json").read_text())["rows"]
    config = ooo.read_config(example)
    assert sum(path.stat().st_size for path in example.iterdir()) < 2_000_000
    for policy in ("exploration", "exploitation"):
        assert row[policy] == final_evaluations()[config["args"]["env_id"], "iql_ooo", policy][1]
        agent = ooo.load_policy(example / f"{policy}_20000.pt")
        assert agent.act(np.zeros((3, 4), np.float32)).shape == (3, 2)
        saved = ooo.load_torch(example / f"{policy}_20000.pt", ooo.torch.device("cpu"), config["run_id"])
        assert saved["env_id"] == config["args"]["env_id"]


def test_the_table_beside_the_authors_learner(tmp_path, capsys):
    import tools.parity as parity

    with tarfile.open(ROOT / "results" / "parity.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    parity.main(parity.Args(str(tmp_path / "parity")))
    assert capsys.readouterr().out in (ROOT / "docs" / "results.md").read_text()


def test_the_gate_of_pen():
    with tarfile.open(ROOT / "results" / "gates.tar.xz") as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("results.json")]
        (row,) = json.loads(archive.extractfile(name).read())["rows"]
        lines = archive.extractfile(name.replace("results.json", "metrics.jsonl")).read().splitlines()
    curve = {r["grad_step"]: r["eval/success_rate"] for r in map(json.loads, lines) if "eval/success_rate" in r}
    cells = [curve[1000 * k] for k in (25, 50, 100, 150, 200, 250, 300)] + [row["exploitation"]["eval/success_rate"]]
    words = " | ".join(str(round(100 * value)) for value in cells)
    assert f"| success, % | {words} |" in (ROOT / "docs" / "results.md").read_text()


def test_the_pilot_in_the_large_maze():
    with tarfile.open(ROOT / "results" / "large.tar.xz") as archive:
        results, metrics = (archive.extractfile(f"large/maze2d-missing-data-large-v1__pilot__101/{name}").read()
                            for name in ("results.json", "metrics.jsonl"))
    (row,), page = json.loads(results)["rows"], (ROOT / "docs" / "results.md").read_text()
    for label, policy in (("IQL + RND, the explorer", "exploration"),
                          ("OOO (IQL), retrained on its data", "exploitation")):
        far, success, score = (row[policy]["eval/" + name]
                               for name in ("far_success_rate", "success_rate", "normalized_score"))
        assert f"| {label} | {100 * far:.0f} | {100 * success:.0f} | {score:.1f} |" in page
    curve = [f"{100 * r['eval/far_success_rate']:.0f}" for r in map(json.loads, metrics.splitlines())
             if r["phase"] == "retrain" and "eval/far_success_rate" in r]
    assert f"| success from far starts, % | {' | '.join(curve)} |" in page
