"""Export runs of any script, also unfinished ones, to CSV, to TensorBoard or to wandb.

    python tools/export_metrics.py csv runs/pen-binary-v0__*__* --out exported
    python tools/export_metrics.py tensorboard runs/pen-binary-v0__*__* --out exported   # tensorboard --logdir exported
    python tools/export_metrics.py wandb runs/pen-binary-v0__iql_ooo__1 --wandb-mode offline

Each phase has its own steps: gradient steps in pretraining, environment steps online, and in each retraining gradient
steps from 0. An earlier export of a run is replaced whole. timing.jsonl is left out.

csv: RUN/metrics.csv has a row for each record, RUN/evals.csv one for each evaluation episode. Of a retraining, env_step
is its t. tensorboard: pretrain/losses/critic, online/eval/return, retrain_500000/losses/critic, ... in RUN, each over
the steps of its phase, and the config as text. wandb: what --track sends, in the same group, with the id RUN_ID-export.
There retrain/* holds all t: env_step tells them apart, grad_step is their axis. The members of pointmass_didactic.py,
each a seed and a bonus coefficient, have rows of their own, and TensorBoard names that end in /seed_1_bonus_5.
"""

import csv
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reproduce import ALGORITHMS, fail, output_folder, read_records, run_main, write_whole  # noqa: E402

SCRIPTS = {Path(algorithm.script).stem for algorithm in ALGORITHMS.values()}
STEP = {"pretrain": "grad_step", "online": "env_step", "retrain": "grad_step"}  # what a phase counts
PLACE = ("phase", "env_step", "grad_step", "seed", "bonus_coef", "episode")  # where a row belongs
EVENTS = "events.out.tfevents.exported"  # always this name, so that the next export replaces it

RunDirs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR", help="Folders of runs.")]
Out = Annotated[str, tyro.conf.arg(metavar="FOLDER", help="Each run gets a folder of its own name in this one.")]


# === reading runs ===
def rows_of(record, members=None):
    """A record as dicts of single values. The elements of lists, one for each member (seed and bonus_coef) or else for
    each episode, become rows of their own. ValueError or LookupError for what no script writes."""
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    single = {name: value for name, value in record.items() if name not in lists}
    place = {name: value for name, value in single.items() if name in PLACE}
    rows = [] if lists and single == place else [single]
    for i, values in enumerate(zip(*lists.values(), strict=True)):
        where = place | ({"episode": i} if members is None else members[i])
        rows.append(where | (values[0] if isinstance(values[0], dict) else dict(zip(lists, values, strict=True))))
    for row in rows:
        if odd := [name for name, value in row.items() if not isinstance(value, str | int | float)]:
            raise ValueError(f"{odd[0]} is {row[odd[0]]}")
        row.update({name: int(value) for name, value in row.items() if isinstance(value, bool)})
        row["env_step"], row[STEP[row["phase"]]]  # KeyError if one is missing
    return rows


def open_run(folder):
    """A run directory as a namespace: path, config, records (of metrics.jsonl), metrics and episodes (rows). Exit 2 if
    it is not a run, or has no record."""
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    try:
        config = json.loads((path / "config.json").read_text())
        if config["script"] not in SCRIPTS:
            raise ValueError(f"written by {config['script']!r}, no script of this repository")
        args, records, evals = config["args"], read_records(path / "metrics.jsonl"), path / "evals.jsonl"
        members = [{"seed": args["seed"] + i, "bonus_coef": coef}
                   for i in range(args.get("num_seeds", 0)) for coef in args["bonus_coef"]]
        metrics = [row for record in records for row in rows_of(record, members)]
        episodes = [row for record in (read_records(evals) if evals.exists() else ()) for row in rows_of(record)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{folder} is not a readable run ({type(error).__name__}: {error}); give the folder of a run")
    if not metrics:
        fail(f"{folder} has no record in metrics.jsonl yet; nothing to export")
    return SimpleNamespace(path=path, config=config, records=records, metrics=metrics, episodes=episodes)


def open_runs(folders):
    return [open_run(folder) for folder in folders] or fail("give the folder of a run: RUN_DIR")


def folders_of(runs, out):
    """FOLDER/RUN of each run, made; exit 2 before any is made if one cannot be."""
    folders = [Path(os.path.expanduser(out)) / run.path.name for run in runs]
    for path in folders:
        if folders.count(path) > 1 or path.exists() and not path.is_dir():
            fail(f"--out {out}: {path} is a file, or of two runs; choose another folder, or export one by one")
    return [output_folder(path, "--out") for path in folders]


def need(module, requirements):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fail(f"{module} cannot be imported ({error}): pip install -r {requirements}")


# === the exports ===
def csv_of(rows):
    """Rows as the bytes of a CSV file; what a row lacks is empty."""
    names = dict.fromkeys(PLACE[:3]) | {name: None for row in rows for name in row}
    text = io.StringIO()
    table = csv.DictWriter(text, sorted(names, key=lambda name: name not in PLACE), lineterminator="\n")  # PLACE first
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def to_csv(run_dirs: RunDirs, out: Out):
    """FOLDER/RUN/metrics.csv and evals.csv."""
    runs = open_runs(run_dirs)
    for run, folder in zip(runs, folders_of(runs, out), strict=True):
        write_whole(folder / "metrics.csv", csv_of(run.metrics))
        write_whole(folder / "evals.csv", csv_of(run.episodes))
        print(f"{folder}: metrics.csv ({len(run.metrics)} rows), evals.csv ({len(run.episodes)} episodes)")


def to_tensorboard(run_dirs: RunDirs, out: Out):
    """FOLDER/RUN with one event file."""
    runs, tensorboard = open_runs(run_dirs), need("torch.utils.tensorboard", "requirements-reproduce.txt")
    threading.excepthook = lambda _: None  # of the writer's thread; it raises the error here, too
    for run, folder in zip(runs, folders_of(runs, out), strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            with tensorboard.SummaryWriter(temporary) as writer:
                writer.add_text("config", "    " + json.dumps(run.config, indent=1).replace("\n", "\n    "))
                for row in run.metrics:
                    phase, step = row["phase"], row[STEP[row["phase"]]]
                    phase += f"_{row['env_step']}" if phase == "retrain" else ""
                    member = f"/seed_{row['seed']}_bonus_{row['bonus_coef']:g}" if "seed" in row else ""
                    for name in [name for name in row if name not in PLACE]:
                        add = writer.add_text if isinstance(row[name], str) else writer.add_scalar
                        add(f"{phase}/{name}{member}", row[name], step)
            file, = Path(temporary).iterdir()
            write_whole(folder / EVENTS, file.read_bytes())
        print(f"{folder / EVENTS}: {len(run.records)} records; tensorboard --logdir {out}")


def to_wandb(run_dirs: RunDirs, wandb_project: str | None = None,
             wandb_mode: Literal["online", "offline"] | None = None):
    """A run of wandb for each run; its local files lie in RUN_DIR/wandb.

    Args:
        wandb_project: unset: wandb's own settings
        wandb_mode: unset: $WANDB_MODE, or online
    """
    runs, wandb = open_runs(run_dirs), need("wandb", "requirements.txt")
    project, mode = wandb_project, wandb_mode or os.environ.get("WANDB_MODE")
    if mode == "disabled":
        fail("WANDB_MODE is disabled, so that nothing would be exported; give --wandb-mode")
    if old := [run.path for run in runs if "run_id" not in run.config]:
        fail(f"{old[0]} has no run_id, as an earlier version wrote it; export it to csv or tensorboard")
    for run in runs:
        output_folder(run.path, "RUN_DIR")
        group = run.config["run_id"]
        earlier = set((run.path / "wandb").glob(f"*run-*-{group}-export"))
        try:  # without resume=, a run of the same id is replaced
            sent = wandb.init(project=project, mode=mode, id=f"{group}-export", group=group, name=run.path.name,
                              dir=run.path, config=run.config,
                              settings=wandb.Settings(silent=True, console="off", x_disable_stats=True))
        except Exception as error:  # no key, no network
            fail(f"wandb cannot start ({error}); log in, or use --wandb-mode offline")
        for record in run.records:
            where = {name: record[name] for name in PLACE[:3]}
            sent.log({f"{where['phase']}/{name}": record[name] for name in record if name not in where} | where)
        sent.finish()
        local = Path(sent.dir).parent
        for folder in earlier - {local}:
            shutil.rmtree(folder)
        print(f"{run.path.name}: {len(run.records)} records; {f'wandb sync {local}' if sent.offline else sent.url}")


def main(argv=None):
    commands = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}
    tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)


if __name__ == "__main__":
    run_main(main)
