"""What docs/extending.md shows works as it stands there."""

import json
import re
from pathlib import Path

import numpy as np
from runner import SMALL, Box

import report

ROOT = Path(__file__).resolve().parent.parent
POINT, PEN = "maze2d-missing-data-umaze-v1", "pen-binary-v0"
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), flags=re.M | re.S)


def test_a_count_bonus(tiny, tmp_path):
    """In a copy under another name, through all phases, with the bonus frozen in the retraining."""
    (code,) = [block for block in BLOCKS if "class CountBonus" in block]
    tiny(POINT)
    box = Box(tmp_path)
    text = (ROOT / "iql_ooo.py").read_text()
    old = re.search(r"^def make_rnd\(.*?(?=^def )", text, flags=re.M | re.S)[0]
    (box.work / "count_ooo.py").write_text(text.replace(old, code + "\n\n"))
    box.script = "count_ooo.py"
    words = ["--env-id", POINT, *SMALL, "--online-steps", 120, "--retrain-at", 120, "--retrain-frozen-rnd"]
    child = box.run(*words)
    assert child.code == 0, child.err
    run = box.work / "runs" / f"{POINT}__count_ooo__1"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bonus = [r["rnd/batch_intrinsic_reward"] for r in records if "rnd/batch_intrinsic_reward" in r]
    assert bonus[0] > bonus[-1] > 0 and (run / "rnd_120.pt").exists()
    box.stop()


def test_a_new_update(tiny, tmp_path):
    """The hunks of the example, applied to a copy; it is reported under its own name."""
    (example,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), flags=re.M | re.S)
    tiny(POINT)
    box, text = Box(tmp_path), (ROOT / "iql_ooo.py").read_text()
    for hunk in example.rstrip("\n").split("\n\n"):
        old, new = ("\n".join(line[1:] for line in hunk.split("\n") if line[0] in (" ", sign)) for sign in "-+")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (box.work / "best_ooo.py").write_text(text)
    box.script = "best_ooo.py"
    for words in ((), ("--best-share", 0.5, "--exp-name", "half")):
        child = box.run("--env-id", POINT, *SMALL, "--online-steps", 120, "--retrain-at", 120, *words)
        assert child.code == 0, child.err
    report.main([str(box.work / "runs"), "--out", str(tmp_path / "report")])
    shown = (tmp_path / "report" / "report.md").read_text()
    assert "best_ooo, exploitation policy" in shown and "best_ooo half, exploitation policy" in shown
    box.stop()


def test_a_trained_policy(tiny, in_tmp, runs):
    """The lines that load a policy, with a run of this test in the place of the paper's."""
    (code,) = [block for block in BLOCKS if "load_policy" in block]
    path = runs["iql_ooo"]
    env_id = json.loads((path / "config.json").read_text())["args"]["env_id"]
    code = code.replace("runs/pen-binary-v0__iql_ooo__1/exploitation_1000000.pt", str(path / "exploitation_200.pt"))
    names = {}
    exec(code.replace(PEN, env_id).replace("episodes=10", "episodes=1"), names)
    policy, obs = names["policy"], names["obs"]
    many = policy.act(np.stack([obs, obs]))
    np.testing.assert_allclose(many[0], names["action"], atol=1e-6)
    assert len(names["episodes"]) == 1 and "eval/return" in names["means"]
