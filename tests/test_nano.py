"""nano_ooo.py computes what iql_ooo.py computes: the losses of every update and every evaluation, number for number.

Both run on the same tiny data with the same seed, eager, on one thread, without and with the bonus. All settings but
the sizes are those of nano_ooo.py's constants, and of the task's row and make run's flags in iql_ooo.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import iql_ooo as ooo
import nano_ooo as nano

SCRIPT = Path(nano.__file__)
ENV_ID = "maze2d-missing-data-medium-v1"
SIZES = dict(OFFLINE_STEPS=40, ONLINE_STEPS=200, RETRAIN_STEPS=60, HORIZON=20, LOG_EVERY=20, EVAL_EPISODES=3)
ARMS = {"IQL": 0, "IQL + RND": 10}  # and iql_ooo.py's --intrinsic-reward-scale
STEP = {"pretrain": "grad_step", "online": "env_step", "retrain": "grad_step"}


def run_nano(monkeypatch, seed):
    """{arm: [(phase, step, losses of the update)]}, and [[(return, is far) of an episode]] of all evaluations."""
    for name, value in SIZES.items():
        monkeypatch.setattr(nano, name, value)
    monkeypatch.setattr(nano, "DATASET", "D4RL/pointmaze/medium-v2")
    losses, evaluations = {name: [] for name in ARMS}, []
    progress, evaluate = nano.progress, nano.evaluate

    def record_losses(name, phase, step, values, *rest):
        losses[name].append((phase, step, {key: value.item() for key, value in values.items()}))
        progress(name, phase, step, values, *rest)

    def record_evaluation(*args):
        returns, is_far = evaluate(*args)
        evaluations.append(list(zip(returns.tolist(), is_far.tolist(), strict=True)))
        return returns, is_far

    monkeypatch.setattr(nano, "progress", record_losses)
    monkeypatch.setattr(nano, "evaluate", record_evaluation)
    nano.main(seed)
    return losses, evaluations


def run_script(monkeypatch, seed, coefficient):
    """The same of one arm of iql_ooo.py, and its final scores. nano_ooo.py does not evaluate before the first step."""
    monkeypatch.setitem(ooo.TASKS, ENV_ID, ooo.TASKS[ENV_ID]._replace(horizon=nano.HORIZON))
    flags = {
        "env-id": ENV_ID, "seed": seed, "exp-name": f"c{coefficient}", "device": "cpu", "compile": "off",
        "log-every": 1, "eval-every": nano.LOG_EVERY, "eval-episodes": nano.EVAL_EPISODES,
        "offline-steps": nano.OFFLINE_STEPS, "online-steps": nano.ONLINE_STEPS, "retrain-at": nano.ONLINE_STEPS,
        "retrain-steps": nano.RETRAIN_STEPS, "hidden-dims": nano.HIDDEN_DIMS, "rnd-hidden-dims": nano.RND_DIMS,
        "learning-rate": nano.LEARNING_RATE, "tau": nano.TAU, "intrinsic-reward-scale": coefficient}
    ooo.main(ooo.parse_args([x for name, value in flags.items() for x in (f"--{name}", *np.atleast_1d(value))]))
    folder = Path("runs") / f"{ENV_ID}__c{coefficient}__{seed}"
    metrics, curves = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                       for name in ("metrics.jsonl", "evals.jsonl"))
    losses = [(r["phase"], r[STEP[r["phase"]]],
               {key: r[f"losses/{key}"] for key in ("rnd", "value", "critic", "actor") if f"losses/{key}" in r})
              for r in metrics if "losses/actor" in r]
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    evaluations = [r["episodes"] for r in curves if r[STEP[r["phase"]]] > 0]
    evaluations += [row[policy]["per_episode"] for policy in ("exploration", "exploitation")]
    return losses, [[(x["return"], x["start_distance"] > 2) for x in episodes] for episodes in evaluations], row


# With seed 2 an online episode starts at the goal, so the exploiter's batches are upsampled; with seed 1 none does.
@pytest.mark.parametrize(("seed", "upsampled"), [(1, False), (2, True)])
def test_the_numbers_are_those_of_iql_ooo(tiny, in_tmp, monkeypatch, capsys, seed, upsampled):
    tiny(ENV_ID)
    losses, evaluations = run_nano(monkeypatch, seed)
    table = capsys.readouterr().out.splitlines()[-4:]
    wanted = []
    for name, coefficient in ARMS.items():
        wanted_losses, found, row = run_script(monkeypatch, seed, coefficient)
        assert losses[name] == wanted_losses
        assert len(wanted_losses) == 40 + 200 + 60 and ("rnd" in wanted_losses[0][2]) == (coefficient > 0)
        assert ("sampling stays uniform" in capsys.readouterr().out) == (not upsampled)
        wanted += found
        for policy in ("exploration", "exploitation"):
            shown, summary = table.pop(0), row[policy]
            cells = [f"{summary[f'eval/{key}']:.0%}" for key in ("success_rate", "far_success_rate")]
            assert shown.startswith(name) and shown.split()[-3:] == [*cells, f"{summary['eval/normalized_score']:.1f}"]
    assert evaluations == wanted
    assert [len(episodes) for episodes in wanted] == 2 * [*15 * [3], 100, 100]


def test_its_constants_are_the_task():
    task, args = ooo.TASKS[ENV_ID], ooo.parse_args(["--env-id", ENV_ID])
    assert task.horizon == nano.HORIZON and task.score == ("return", nano.SCORE_0, nano.SCORE_100)
    assert args.remove_discs == ((*nano.GOAL, nano.HOLE_RADIUS),) and ooo.GOAL_RADIUS == nano.GOAL_RADIUS
    env = ooo.make_env(ENV_ID)
    assert env.center.tolist() == nano.GOAL.tolist()
    assert {cell for cell, distance in env.distances.items() if distance <= task.far} == nano.NEAR_CELLS


def test_it_is_read_at_one_sitting():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 120
    required = (SCRIPT.parent / "requirements.txt").read_text()
    packages = re.findall(r'"(\S+==\S+)"', "".join(lines[: lines.index("# ///")]))
    assert len(packages) == 7 and all(package in required for package in packages)


def test_alone_in_a_folder_it_says_how_the_data_are_made(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    environment = {"MINARI_DATASETS_PATH": str(tmp_path / "none"), "PATH": ""}
    result = subprocess.run([sys.executable, SCRIPT.name, "--seed", "3"], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    command = "python tools/collect_pointmaze.py --maze Medium --steps 100000 --dataset-id ooo/pointmaze/medium-100k-v0"
    assert command in result.stderr.splitlines()[-1] and command in nano.__doc__
