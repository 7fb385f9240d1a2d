"""The tables of docs/results.md about the study: every arm, every seed, the differences.

    python reproduce.py study --seeds 20
    python tools/study.py runs
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import report  # noqa: E402
from reproduce import MEDIUM, UMAZE, fail, run_main  # noqa: E402

ARMS = {  # label: (name in reproduce.ALGORITHMS, the policy that is scored)
    "IQL": ("iql_retrained", "exploration"),
    "IQL's data, retrained": ("iql_retrained", "exploitation"),
    "IQL + RND": ("iql_ooo", "exploration"),
    "OOO (IQL)": ("iql_ooo", "exploitation"),
    "offline data alone, retrained": ("offline_only", "exploitation"),
    "IQL, equal updates": ("iql_equal_updates", "exploration"),
    "IQL + RND, equal updates": ("rnd_equal_updates", "exploration"),
    "OOO, no Q bounds": ("no_bounds", "exploitation"),
    "OOO + frozen RND, no Q bounds": ("frozen_rnd", "exploitation"),
    "OOO, no upsampling": ("no_up", "exploitation"),
}
ACTED = ("IQL", "IQL + RND", "IQL, equal updates", "IQL + RND, equal updates")  # arms whose own policy collected data
PLANNED = (("OOO (IQL)", "IQL + RND"), ("OOO (IQL)", "IQL's data, retrained"))
OTHER_PAIRS = (("OOO (IQL)", "IQL, equal updates"), ("OOO (IQL)", "IQL + RND, equal updates"),
               ("IQL + RND", "IQL, equal updates"), ("OOO (IQL)", "OOO, no Q bounds"),
               ("OOO (IQL)", "OOO, no upsampling"), ("OOO + frozen RND, no Q bounds", "OOO, no Q bounds"))
TASKS = (MEDIUM, UMAZE)


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders with the runs of `reproduce.py study`."""


def last_policies(records):
    """{(task, label): {seed: (record, measures of the last policy's final evaluation)}}."""
    found = {}
    for task, (label, (name, policy)) in itertools.product(TASKS, ARMS.items()):
        chosen = [(record, policy, max(record.cells[policy])) for record in records if record.env_id == task
                  and record.config["args"]["exp_name"] == name and record.cells[policy]]
        if chosen:
            (group,) = report.grouped(chosen, report.Args(()))  # exit 2 where settings or script texts differ
            found[task, label] = {seed: (record, record.cells[policy][group.settings["t"]])
                                  for seed, record in sorted(group.seeds.items())}
    return found


def span(seeds):
    """Seeds in words; a gap is shown."""
    seeds = sorted(seeds)
    gap = seeds != list(range(seeds[0], seeds[-1] + 1))
    return " ".join(map(str, seeds)) if gap or len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def differences(found, task, pair):
    """{seed: difference of success from far starts} of the seeds that both arms have."""
    a, b = (found.get((task, label), {}) for label in pair)
    return {seed: a[seed][1]["far"] - b[seed][1]["far"] for seed in sorted(a.keys() & b.keys())}


def corrected(found, pair):
    """{task: p}, corrected by Holm for the number of tasks."""
    values = {task: list(d.values()) for task in TASKS if len(d := differences(found, task, pair)) > 1}
    return dict(zip(values, report.holm([report.sign_flip(v) for v in values.values()]), strict=True))


def collected(record, far):
    """Per cent of the episodes of D_on that were a success."""
    return report.successes(record, sys.maxsize, far) or 0.0


def table(head, rows):
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)), end="\n\n")


def main(args):
    records, _ = report.read_all(report.Args(args.folders))
    found = last_policies(records)
    if not found:
        fail(f"{' '.join(args.folders)} has no finished runs of the study; make them with: python reproduce.py study")
    for task in (task for task in TASKS if any(task == t for t, _ in found)):
        arms = {label: runs for label in ARMS if (runs := found.get((task, label)))}
        acted = [label for label in ACTED if label in arms]
        seeds = sorted({seed for runs in arms.values() for seed in runs})
        rows = []
        for label, runs in arms.items():
            cells = [report.mean_interval([m[measure] for _, m in runs.values()], report.limits_of(measure, task))
                     for measure in ("far", "success", "score")]
            near, far = (np.mean([collected(record, f) for record, _ in runs.values()]) for f in (False, True))
            rows.append([label, span(runs), *cells, f"{near:.1f} ({far:.1f})" if label in acted else ""])
        table([task, "seeds", "success from far starts, %", "success, %", "D4RL's score",
               "successful episodes of D_on, % (from far starts)"], rows)
        rows = [[label, *(f"{runs[s][1]['far']:.0f}" if s in runs else "-" for s in seeds)]
                for label, runs in arms.items()]
        rows += [[f"*D_on of {label}: successful episodes, %*",
                  *(f"{collected(arms[label][s][0], False):.0f}" if s in arms[label] else "-" for s in seeds)]
                 for label in acted]
        table(["success from far starts, %, of seed", *seeds], rows)
        rows = []
        for pair in PLANNED + OTHER_PAIRS:
            if len(values := differences(found, task, pair)) > 1:
                holm = f"{corrected(found, pair)[task]:.2g}" if pair in PLANNED else "not planned"
                p = f"{report.sign_flip(list(values.values())):.2g}"
                rows.append([" - ".join(pair), span(values), report.mean_interval(list(values.values())), p, holm])
        table(["difference of success from far starts, points", "seeds", "mean [95 % interval]", "p",
               "p, Holm over the mazes"], rows)


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__)))
