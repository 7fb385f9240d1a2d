"""`make run`: does OOO matter here? Two short runs a seed in the medium maze, then a verdict and a picture.

    python tools/first_run.py                # seed 1
    python tools/first_run.py --seeds 1 2 3  # more of them; finished ones are not run again

Of each seed one run explores with the bonus (IQL + RND) and one without (IQL). On the data of both a second policy is
then trained from scratch. That gives four policies, with the same settings and budgets:

                          the policy that acted    a policy retrained on its data
    data of IQL           IQL                      IQL's data, retrained
    data of IQL + RND     IQL + RND                OOO (IQL)

If only the retraining mattered, both on the right would be good; if only the bonus, both below.
"""

import json
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from plot_run import EXPLOIT, EXPLORE, STYLE, draw_policy, maze_of, open_run, plt  # noqa: E402

from reproduce import MEDIUM, fail, run_main  # noqa: E402

DATASET = ("--maze", "Medium", "--steps", "100000", "--dataset-id", "ooo/pointmaze/medium-100k-v0")
# Small networks with larger steps, so that minutes are enough. Chosen on pilot seeds from 101 on (docs/results.md).
OFFLINE, ONLINE, RETRAIN = 3_000, 20_000, 46_000
SETTINGS = f"""--env-id {MEDIUM} --dataset-id {DATASET[-1]} --hidden-dims 128 128
    --rnd-hidden-dims 256 256 --learning-rate 1e-3 --tau 0.02 --offline-steps {OFFLINE} --online-steps {ONLINE}
    --retrain-at {ONLINE} --retrain-steps {RETRAIN} --eval-every 5000 --eval-episodes 20 --log-every 500
    --checkpoint-every 2000""".split()
ARMS = {"iql": ["--intrinsic-reward-scale", "0"], "iql_ooo": []}
POLICIES = {  # name: (arm, policy)
    "IQL": ("iql", "exploration"), "IQL's data, retrained": ("iql", "exploitation"),
    "IQL + RND": ("iql_ooo", "exploration"), "OOO (IQL)": ("iql_ooo", "exploitation"),
}
NEXT = "next: other seeds (make run SEEDS='2 3'), nano_ooo.py (the method in 300 lines), or the paper's tasks (README)"


@dataclass
class Args:
    seeds: tuple[int, ...] = (1,)
    """Seeds; two processes at a time."""
    runs_dir: str = "runs"
    """Folder of the run directories."""


def folder(args, arm, seed):
    return Path(args.runs_dir) / f"{MEDIUM}__first_{arm}__{seed}"


def done_steps(path):
    """(phase, its step, share of all gradient steps) of a run, from its last record."""
    try:
        last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "starting", 0, 0.0
    step = last["env_step"] if last["phase"] == "online" else last["grad_step"]
    before = {"pretrain": 0, "online": OFFLINE, "retrain": OFFLINE + ONLINE}[last["phase"]]
    return last["phase"], step, (before + step) / (OFFLINE + ONLINE + RETRAIN)


def train(args, seed):
    """Both runs of a seed side by side, continued if they were stopped; a line says how far they are."""
    runs, began = {}, time.time()
    for arm, flags in ARMS.items():
        path = folder(args, arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".log"), "ab") as log:
            command = [sys.executable, str(ROOT / "iql_ooo.py"), *SETTINGS, *flags, "--exp-name", f"first_{arm}",
                       "--seed", str(seed), "--runs-dir", args.runs_dir, "--resume"]
            runs[arm] = path, done_steps(path)[2], subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while any(process.poll() is None for _, _, process in runs.values()):
            time.sleep(2 if sys.stdout.isatty() else 20)
            words, left = [], 0.0
            for arm, (path, first, _) in runs.items():
                phase, step, share = done_steps(path)
                words.append(f"{arm}: {phase} {step:,}")
                if share > first:
                    left = max(left, (time.time() - began) / (share - first) * (1 - share))
            line = f"seed {seed}: {', '.join(words)}" + (f"; about {left / 60:.1f} min left" if left else "")
            start, end = ("\r", "") if sys.stdout.isatty() else ("", "\n")
            print(f"{start}{line:<100}", end=end, flush=True)
    except KeyboardInterrupt:
        for _, _, process in runs.values():  # they save what they have
            process.terminate()
            process.wait()
        fail("stopped; the same command goes on from here", 130)
    print()
    for path, _, process in runs.values():
        if process.returncode:
            lines = path.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            fail(f"{path}: {lines[-1] if lines else 'no output'}", process.returncode)


def summaries(args):
    """{name of a policy: [its final evaluation for each seed]}."""
    results = {}
    for name, (arm, policy) in POLICIES.items():
        rows = [json.loads((folder(args, arm, seed) / "results.json").read_text())["rows"] for seed in args.seeds]
        results[name] = [row[-1][policy] for row in rows]
    return results


def study():
    """({name of a policy: mean success from far starts}, number of seeds) of the study's packed records."""
    found, arms = {}, {"iql": "iql_retrained", "iql_ooo": "iql_ooo"}
    with tarfile.open(ROOT / "results" / "study_a.tar.xz") as archive:
        for member in archive:
            if member.name.endswith("results.json"):
                results = json.loads(archive.extractfile(member).read())
                for name, (arm, policy) in POLICIES.items():
                    if (results["env_id"], results["exp_name"]) == (MEDIUM, arms[arm]):
                        found.setdefault(name, []).append(results["rows"][-1][policy]["eval/far_success_rate"])
    return {name: np.mean(rates) for name, rates in found.items()}, len(found["IQL"])


def verdict(args, results):
    """What was seen, in numbers and in words."""
    n, episodes = len(args.seeds), results["IQL"][0]["eval/episodes"]
    print(f"seed{'s' * (n > 1)} {' '.join(map(str, args.seeds))}, {episodes} episodes of each policy on fresh starts\n"
          "far: a start of more than two cells from the goal\n")
    before, seeds_before = study()
    print(f"{'':24}{'far starts':>12}{'all starts':>12}{'score':>8}   far starts, the study's {seeds_before} seeds")
    far = {}
    for name, seeds in results.items():
        far[name], everywhere, score = (np.mean([s[f"eval/{key}"] for s in seeds]) for key in (
            "far_success_rate", "success_rate", "normalized_score"))
        each = "  seed by seed: " + " ".join(f"{s['eval/far_success_rate']:.0%}" for s in seeds) if n > 1 else ""
        print(f"{name:24}{far[name]:>12.0%}{everywhere:>12.0%}{score:>8.1f}{before[name]:>13.0%}{each}")
    ooo, explorer, retrained = far["OOO (IQL)"], far["IQL + RND"], far["IQL's data, retrained"]
    bonus, retraining = ooo > retrained, ooo > explorer
    seen = {
        (True, True): "OOO was ahead of its explorer and of IQL's data, retrained: bonus and retraining helped.",
        (False, True): "OOO was ahead of its explorer, not of IQL's data, retrained: only the retraining helped.",
        (True, False): "OOO was ahead of IQL's data, retrained, not of its explorer: only the bonus helped.",
        (False, False): "OOO was ahead of neither its explorer nor of IQL's data, retrained.",
    }[bonus, retraining]
    print(f"\nHere, from far starts, {seen} {n} seed{'s say' if n > 1 else ' says'} little; the last column has the "
          f"means of the study ({seeds_before} seeds, the same settings, docs/results.md).\n")


def picture(args, results):
    """Where each policy of the first seed goes, and a bar for each policy, with a dot for each seed."""
    runs = {arm: open_run(folder(args, arm, args.seeds[0])) for arm in ARMS}
    maze = maze_of(runs["iql"].script, runs["iql"].args.env_id)
    colors = [EXPLORE, "#56B4E9", "#E69F00", EXPLOIT]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 5, figsize=(16, 3.6), layout="constrained", width_ratios=[1, 1, 1, 1, 1.2])
        for ax, (name, (arm, policy)) in zip(axes, POLICIES.items(), strict=False):
            draw_policy(ax, runs[arm], maze, runs[arm].path / f"{policy}_{ONLINE}.pt", name, 12)
        for i, (color, seeds) in enumerate(zip(colors, results.values(), strict=True)):
            rates = [100 * s["eval/far_success_rate"] for s in seeds]
            axes[4].barh(3 - i, np.mean(rates), color=color, height=0.6)
            axes[4].plot(rates, np.full(len(rates), 3 - i), "o", color="black", markersize=3)
        axes[4].set(yticks=range(4), yticklabels=list(results)[::-1], xlim=(0, 105),
                    xlabel="success from far starts, % of episodes",
                    title=f"Mean, and each seed ({' '.join(map(str, args.seeds))})")
        out = Path(args.runs_dir) / "first_run.png"
        fig.savefig(out)
        plt.close(fig)
    print(f"picture: {out} (seed {args.seeds[0]}: green paths reached the goal; dashed: no offline data inside)")


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    missing = [seed for seed in args.seeds
               if not all((folder(args, arm, seed) / "results.json").exists() for arm in ARMS)]
    if missing:
        print(f"collecting {DATASET[-1]}, 100,000 steps (kept if it exists)", flush=True)
        if subprocess.call([sys.executable, str(ROOT / "tools" / "collect_pointmaze.py"), *DATASET]):
            sys.exit(1)
    else:
        print(f"seed{'s' * (len(args.seeds) > 1)} {' '.join(map(str, args.seeds))}: finished before; {NEXT}\n")
    for seed in missing:
        train(args, seed)
    results = summaries(args)
    verdict(args, results)
    picture(args, results)
    if missing:
        print(NEXT)


if __name__ == "__main__":
    run_main(main)
