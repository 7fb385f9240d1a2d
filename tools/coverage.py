"""How often report.py's 95 % intervals hold the true mean, simulated: the t interval, and BCa beside it.

    python tools/coverage.py                      # 20,000 experiments for each row and number of seeds; a minute

The scores of a seed are normal; lognormal (sigma 1); or those of seeds that either learn the task or do not: 90 with
probability 0.7 and else 10, with normal noise of 5. "difference" rows are means of paired differences: of lognormal
seeds, and of seeds that learn with probability 0.7 against ones with 0.3. These intervals are what report.py shows.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import t_interval  # noqa: E402
from reproduce import check_ranges, run_main  # noqa: E402


@dataclass
class Args:
    seeds: tuple[int, ...] = (3, 5, 10, 20)
    """Numbers of seeds."""
    experiments: int = 20_000
    """Simulated experiments of each number."""


def learnt(generator, shape, probability):
    return np.where(generator.random(shape) < probability, 90, 10) + generator.normal(0, 5, shape)


SCORES = {  # name: (draw(generator, shape), true mean)
    "normal": (lambda g, shape: g.normal(size=shape), 0.0),
    "lognormal": (lambda g, shape: g.lognormal(size=shape), np.exp(0.5)),
    "learnt or not": (lambda g, shape: learnt(g, shape, 0.7), 66.0),
    "lognormal, difference": (lambda g, shape: g.lognormal(size=shape) - g.lognormal(size=shape), 0.0),
    "learnt or not, difference": (lambda g, shape: learnt(g, shape, 0.7) - learnt(g, shape, 0.3), 32.0),
}


def coverage(draw, mean, seeds, experiments):
    """(share of t intervals, of BCa intervals) that hold the mean."""
    values = draw(np.random.default_rng(seeds), (experiments, seeds))
    inside = np.mean([low <= mean <= high for low, high in map(t_interval, values)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = values[: experiments // 10]
        bca = stats.bootstrap((some,), np.mean, axis=1, n_resamples=1000, batch=50, method="BCa",
                              rng=np.random.default_rng(0)).confidence_interval
    return inside, np.mean((bca.low <= mean) & (mean <= bca.high))


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    for seeds in args.seeds:
        if seeds < 2:
            sys.exit("error: --seeds from 2 on")
    check_ranges(args, dict(experiments=(10, 10**7)))
    print("| 95 % interval holds the mean, %: t (BCa) | " + " | ".join(f"{n} seeds" for n in args.seeds) + " |")
    print("|---|" + "---:|" * len(args.seeds))
    for name, (draw, mean) in SCORES.items():
        found = [coverage(draw, mean, n, args.experiments) for n in args.seeds]
        print(f"| {name} | " + " | ".join(f"{100 * t:.1f} ({100 * bca:.1f})" for t, bca in found) + " |", flush=True)


if __name__ == "__main__":
    run_main(main)
