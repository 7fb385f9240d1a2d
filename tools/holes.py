"""Does the bonus lead an explorer into the holes of the offline data? Visits and bonus, hole by hole, of a maze's run.

    python tools/holes.py runs/maze2d-missing-data-large-v1__iql_ooo__1
    python tools/holes.py runs/maze2d-missing-data-large-v1__iql_ooo__1 --rnd copies/*.pt   # copies of checkpoint.pt

A hole is a disc from which all offline data were removed (--remove-discs). Visits: online steps inside it, in each
tenth of the online phase. Bonus: coefficient times scaled intrinsic reward, for each saved RND network, averaged over
the offline states that were removed from the hole (real states, with their speeds); over the offline data that were
kept; and over the states in which the explorer was in the last tenth of the online phase. Needs the offline data, as
training does.
"""

import io
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import iql_ooo as ooo  # noqa: E402
from reproduce import fail, read_records, run_main  # noqa: E402
from tools.plot_run import open_run, visited  # noqa: E402
from tools.study import table  # noqa: E402

MANY = 10_000  # states that a mean is made of, at most


@dataclass
class Args:
    run_dir: Annotated[str, tyro.conf.Positional]
    """RUN_DIR of a run of iql_ooo.py in a maze."""
    rnd: tuple[str, ...] = ()
    """Copies of checkpoint.pt from different times of this run; default: the run's rnd_*.pt."""


def in_disc(positions, disc):
    """Which of the positions (n, 2) lie in a disc (x, y, radius)."""
    return np.linalg.norm(positions - np.float32(disc[:2]), axis=-1) <= disc[2]


def mean_bonus(rnd, args, observations):
    """Mean bonus of observations (n, dim), as the explorer's update adds it; of many, every k-th."""
    some = torch.from_numpy(observations[:: len(observations) // MANY + 1])
    return args.intrinsic_reward_scale * rnd.intrinsic_rewards(some).mean().item()


def saved_networks(run, files, data):
    """(label, RND) of each saved RND network, in the order of training."""
    device, found = torch.device("cpu"), []
    buffer = ooo.ReplayBuffer(data, 0, device)
    for file in map(Path, files or run.path.glob("rnd_*.pt")):
        saved, rnd = ooo.load_torch(file, device, run.config["run_id"]), ooo.make_rnd(run.args, buffer, device)
        if files:
            if "rnd" not in saved.get("models", {}):
                fail(f"{file} is not a checkpoint.pt with RND; give copies of the run's checkpoint.pt")
            rnd.load_state_dict(saved["models"]["rnd"]["networks"])
            place = saved["progress"]["env_step"], saved["progress"]["grad_step"]
        else:
            rnd.load_state_dict(saved["rnd"])
            place = int(file.stem.split("_")[1]), 0
        found.append((place, rnd))
    found.sort(key=lambda pair: pair[0])
    return [(f"{t:,}" if t else f"{step - run.args.offline_steps:,}", rnd) for (t, step), rnd in found]


def main(args):
    run = open_run(args.run_dir)
    discs = run.args.remove_discs
    if run.config["script"] != "iql_ooo" or not discs or run.args.exploit_only:
        fail(f"{args.run_dir} is not a run of iql_ooo.py that explored a maze with holes; give one")
    env = ooo.make_env(run.args.env_id)
    with redirect_stdout(io.StringIO()):  # load_dataset's report
        data, found = ooo.load_dataset(run.args, env, run.args.seed)
        run.args.remove_discs = []
        every = ooo.load_dataset(run.args, env, run.args.seed)[0]["observations"]
    if found["sha256"] != run.config["dataset"]["sha256"]:
        fail(f"the offline data is not what {args.run_dir} was trained on (sha256 differs); give that in the store")
    holes = [every[in_disc(every[:, :2], disc)] for disc in discs]
    names = [f"({x:g}, {y:g})" + (" (goal)" if np.linalg.norm(env.center - (x, y)) < radius else "")
             for x, y, radius in discs]
    states = visited(run, every.shape[1])
    positions, last = states[:, :2], states[int(0.9 * len(states)) :]
    ends = [record for record in read_records(run.path / "metrics.jsonl") if "charts/episodic_success" in record]
    edges, rows = np.linspace(0, len(positions), 11).astype(int), []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        mine = [record for record in ends if start < record["env_step"] <= stop]
        won = sum(record["charts/episodic_success"] for record in mine)
        rows.append([f"{stop:,}", *(int(in_disc(positions[start:stop], disc).sum()) for disc in discs),
                     f"{won:.0f} of {len(mine)}"])
    table(["online steps up to", *(f"steps in {name}" for name in names),
           "successful episodes"], rows)
    rows = [[label, *(f"{mean_bonus(rnd, run.args, x):.3f}" for x in (*holes, data["observations"], last))]
            for label, rnd in saved_networks(run, args.rnd, data)]
    table(["online steps (below 0: pretraining)", *(f"bonus in {name}" for name in names), "on the kept data",
           "where the explorer was last"], rows)


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__)))
