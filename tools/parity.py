"""iql_ooo.py beside the authors' own IQL learner, on the same offline data: success and values along pretraining.

    python reproduce.py parity --seeds 8
    python tools/parity.py runs

Theirs: the official learner (MaxSobolMark/OOO, commit b1424a2) as it is, on jax 0.4.35 and flax 0.8.5, on a CPU, in a
plain loop over uniform batches of 256 from the arrays that iql_ooo.py's load_dataset returns; no bonus; the settings of
the task's exploration agent; 100 episodes an evaluation. Of its pen runs the successes of every seed are known, of
mean Q the range.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reproduce import fail, read_records, run_main  # noqa: E402

PEN, HAMMER = "pen-binary-v0", "hammer-truncated-expert-v1"
SUCCESS, Q, LOSS = "eval/success_rate", "losses/q_mean", "losses/critic"
ROWS = (  # task, update, metric, its name, factor, the official learner's values
    (PEN, 4_000, SUCCESS, "success, %", 100, (35, 37, 34, 37, 39, 37, 35)),
    (PEN, 8_000, SUCCESS, "success, %", 100, (37, 46, 45, 51, 63, 45)),
    (PEN, 8_000, Q, "mean Q of a batch", 1, "-23.1 to -20.4"),
    (HAMMER, 4_000, Q, "mean Q of a batch", 1, (-24.9, -25.0, -24.5)),
    (HAMMER, 8_000, Q, "mean Q of a batch", 1, (-43.6, -43.8)),
    (HAMMER, 12_000, Q, "mean Q of a batch", 1, (-59.6, -61.5)),
    (HAMMER, 4_000, LOSS, "critic loss of a batch", 1, (0.012, 0.012)),
    (HAMMER, 8_000, LOSS, "critic loss of a batch", 1, (0.033, 0.030)),
    (HAMMER, 12_000, LOSS, "critic loss of a batch", 1, (0.083, 0.107)),
)


@dataclass
class Args:
    runs_dir: tyro.conf.Positional[str] = "runs"
    """Folder of the runs of `reproduce.py parity`."""


def ours(runs_dir, name="parity"):
    """{(task, update, metric): the values of seeds 1, 2, ...} of the runs of a name."""
    found = {}
    for path in sorted(path.parent for path in Path(runs_dir).glob(f"*__{name}__*/config.json")):
        config = json.loads((path / "config.json").read_text())
        for record in read_records(path / "metrics.jsonl"):
            for metric in (SUCCESS, Q, LOSS):
                if metric in record:
                    key = config["args"]["env_id"], record["grad_step"], metric
                    found.setdefault(key, {})[config["args"]["seed"]] = record[metric]
    return {key: [values[seed] for seed in sorted(values)] for key, values in found.items()}


def show(values, digits):
    """Every value, and the mean."""
    if isinstance(values, str):
        return values
    return f"{' '.join(f'{value:.{digits}f}' for value in values)} (mean {np.mean(values):.{digits}f})"


def main(args):
    found = ours(args.runs_dir)
    if not found:
        fail(f"{args.runs_dir} has no runs of the parity target; make them with: python reproduce.py parity --seeds 8")
    print("| task | updates | | official learner | `iql_ooo.py` |\n|---|---:|---|---|---|")
    for task, step, metric, name, factor, theirs in ROWS:
        digits = {SUCCESS: 0, Q: 1, LOSS: 3}[metric]
        values = [factor * value for value in found.get((task, step, metric), ())]
        print(f"| {task} | {step:,} | {name} | {show(theirs, digits)} | {show(values, digits) if values else ''} |")
    ended = ours(args.runs_dir, "no_bootstrap")
    print("\n| hammer, success in %, of each seed | 4,000 updates | 8,000 | 12,000 | mean Q at 12,000 |")
    print("|---|---|---|---|---|")
    for name, values in (("as the official code", found), ("no bootstrap at the cut", ended)):
        cells = [values.get((HAMMER, step, SUCCESS), ()) for step in (4_000, 8_000, 12_000)]
        cells = [show([100 * value for value in cell], 0) if cell else "" for cell in cells]
        cells.append(show(values[HAMMER, 12_000, Q], 1) if (HAMMER, 12_000, Q) in values else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__)))
