"""The shortest way to the goal that the data of a point-mass run holds: is exploration or exploitation what is missing?

    python tools/pointmass_chain.py runs/point-mass-wall__pointmass_didactic__1

Positions are put into cells of --cell; two transitions are joined where one ends in the cell in which the other starts.
Prints, for each seed and bonus coefficient, the least number of steps from the start's cell to the goal. Joining within
a cell may save a fraction of a step each time, so that a chain can be shorter than any path; with smaller cells fewer
transitions join. About 45 to 56 steps go over the wall, about 28 to 40 under it.
"""

import sys
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reproduce import check_ranges, fail, run_main  # noqa: E402


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]
    """RUN_DIR of a run of pointmass_didactic.py."""
    cell: float = 0.02
    """Edge of a cell; a step is at most 0.035 long on each axis."""


def shortest_chain(rows, start, cell):
    """Least number of steps from the cell of start (x, y) to the goal, None if no chain leads there. rows (n, 7): obs,
    action, next_obs, goal."""
    name = lambda xy: tuple(np.floor(np.asarray(xy) / cell).astype(int).tolist())  # noqa: E731
    before, steps = defaultdict(set), {}
    for row in rows:
        if row[6]:
            steps[name(row[0:2])] = 1
        else:
            before[name(row[4:6])].add(name(row[0:2]))
    queue = deque(steps)
    while queue:
        here = queue.popleft()
        for there in before[here] - steps.keys():
            steps[there] = steps[here] + 1
            queue.append(there)
    return steps.get(name(start))


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    check_ranges(args, dict(cell=(1e-4, 1)))
    import torch

    import pointmass_didactic as pm

    folder, device = Path(args.run_dir), torch.device("cpu")
    config = pm.read_config(folder)
    if config["source_run_id"]:
        fail(f"{folder} has no online data of its own; give the run that it was retrained on")
    settings, saved = pm.Args(**config["args"]), pm.read_checkpoint(folder, config, device)
    buffer = pm.ReplayBuffer(pm.load_dataset(settings)[0], saved["progress"]["env_step"], device)
    buffer.load(folder / "replay.bin", saved["sizes"]["replay.bin"], saved["replay_sum"], saved["progress"]["env_step"])
    data = [buffer.data[buffer.begin[i] :, i].numpy() for i in range(len(buffer.members))]
    for (seed, coef), rows in zip(pm.members(settings), data, strict=True):
        print(f"seed {seed}, coefficient {coef:g}: {shortest_chain(rows, pm.START, args.cell) or 'no'} steps")


if __name__ == "__main__":
    run_main(main)
