"""The tables of docs/results.md and README.md hold what the packed records hold."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SEEDS = {"iql_retrained": 20, "iql_ooo": 20, "offline_only": 10, "iql_equal_updates": 16}  # from 1 on
ROWS = {"success from far starts": "far_success_rate", "success": "success_rate"}
COLUMNS = (("iql_retrained", "exploration"), ("iql_retrained", "exploitation"), ("iql_ooo", "exploration"),
           ("iql_ooo", "exploitation"), ("offline_only", "exploitation"), ("iql_equal_updates", "exploration"))


def final_evaluations():
    """{(run, policy): {seed: summary}}, each mean made again from its episodes."""
    found = {}
    with tarfile.open(ROOT / "results" / "study_a.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("results.json"):
                results = json.loads(archive.extractfile(member).read())
                for policy in ("exploration", "exploitation"):
                    summary = results["rows"][-1].get(policy)
                    if summary is None:  # offline only: nothing has acted
                        continue
                    far = [e["success"] for e in summary["per_episode"] if e["start_distance"] > 2]
                    assert summary["eval/far_success_rate"] == np.mean(far) and len(summary["per_episode"]) == 100
                    found.setdefault((results["exp_name"], policy), {})[results["seed"]] = summary
    return found


def test_the_study_in_the_medium_maze():
    found, page = final_evaluations(), (ROOT / "docs" / "results.md").read_text()
    assert all(sorted(found[column]) == list(range(1, SEEDS[column[0]] + 1)) for column in COLUMNS)
    for name, key in ROWS.items():
        cells = re.search(rf"^\| {name} \|(.*)\|$", page, flags=re.M)[1].split("|")
        means = [100 * np.mean([s[f"eval/{key}"] for s in found[column].values()]) for column in COLUMNS]
        np.testing.assert_allclose([float(cell.split("[")[0]) for cell in cells], means, atol=0.0501)  # one decimal
    names = ("IQL", "IQL's data, retrained", "IQL + RND", "OOO (IQL)", "offline data alone", "IQL, equal updates")
    for name, column in zip(names, COLUMNS, strict=True):
        cells = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", page, flags=re.M)[-1].split("|")
        rates = [found[column][seed]["eval/far_success_rate"] for seed in sorted(found[column])]
        assert [cell.strip() for cell in cells] == [str(round(100 * rate)) for rate in rates] + ["-"] * (
            len(cells) - len(rates))


def test_the_example_run_is_the_studys_seed_1():
    """Its policies can be loaded, and its table is that of the packed records."""
    import iql_ooo as ooo

    example = ROOT / "results" / "example"
    (row,) = json.loads((example / "results.json").read_text())["rows"]
    config = ooo.read_config(example)
    assert sum(path.stat().st_size for path in example.iterdir()) < 2_000_000
    for policy in ("exploration", "exploitation"):
        assert row[policy] == final_evaluations()["iql_ooo", policy][1]
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
