"""The paper's tables and figures (OOO, arXiv 2310.08558) from finished runs, beside the paper's numbers.

    python report.py runs                              # report/report.md, .html (one file, opens offline) and pictures
    python report.py runs --only table2 figure4        # some of them; default: all that there are runs for
    python report.py runs --only small                 # the runs of reproduce.py --preset small
    python report.py results --unfinished --mixed --exclude '*smooth*' --out report

Folders are searched for run directories at any depth; `reproduce.py` makes them, and so does any script by hand: which
algorithm a run is follows from its settings, not from its name. Needs requirements-reproduce.txt.

What the numbers are:
 1. A cell is the mean over seeds of the score at one time t, which it says: the paper's t where the online budget of
    the run reaches it, else t's share of that budget; and of the policy's scores the last one not after it. A run
    without one has no part in the cell. All policies are read so.
 2. +- is the standard error over seeds (standard deviation with n - 1, over sqrt(n)); a single seed has none.
 3. Runs of a cell that differ in a setting that bears on it, in package versions, in the script's text (by commit) or
    in their data are never averaged: report.py stops and names them, or shows them side by side with --mixed. A run
    that was continued on other versions or another script differs from one that was not.
 4. Unfinished runs do not count; --unfinished shows their last evaluation, marked with a dagger. A double dagger marks
    settings that are not the paper's and changes on the way, which are then listed; budgets show as the scale, t over
    the paper's. What cannot be read is left out and named.
 5. IQM (interquartile mean) and probability of improvement are rliable's, with 95 % stratified bootstrap intervals,
    over the tasks that both methods have at equal times and the seeds that are common to all of these.
 6. The table of the small preset shows means of a policy's last three evaluations, with rliable's intervals over seeds.
"""

import base64
import fnmatch
import importlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from reproduce import (  # noqa: E402
    ALGORITHMS,
    ANTMAZE,
    KITCHEN,
    POINTMASS,
    SMALL,
    TARGETS,
    fail,
    nearest,
    output_folder,
    read_records,
    run_main,
    write_whole,
)

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
# Of each column of the paper's tables: algorithm, which of its policies, and t if it is not the table's own.
COLUMNS = {
    "TD3 + RND": ("td3_rnd", "exploration", None),
    "PEX": ("pex", "exploration", None),
    "Cal-QL": ("calql", "exploration", None),
    "OOO (Cal-QL)": ("calql_ooo", "exploitation", None),
    "Cal-QL @ 250k": ("calql", "exploration", 250_000),
    "OOO (Cal-QL) @ 250k": ("calql_ooo", "exploitation", 250_000),
    "IQL": ("iql", "exploration", None),
    "OOO (IQL)": ("iql_ooo", "exploitation", None),
    "RLPD": ("rlpd", "exploration", None),
    "RLPD + RND": ("rlpd_ooo", "exploration", None),
    "OOO (RLPD)": ("rlpd_ooo", "exploitation", None),
}
BASE = {"OOO (IQL)": "IQL", "OOO (Cal-QL)": "Cal-QL", "OOO (Cal-QL) @ 250k": "Cal-QL @ 250k", "OOO (RLPD)": "RLPD"}
# Names of (algorithm, policy) in the figures; "exploration" of a baseline is its only policy.
LABELS = {
    ("iql", "exploration"): "IQL", ("iql_ooo", "exploration"): "IQL + RND", ("iql_ooo", "exploitation"): "OOO (IQL)",
    ("calql", "exploration"): "Cal-QL", ("calql_ooo", "exploration"): "Cal-QL + RND",
    ("calql_ooo", "exploitation"): "OOO (Cal-QL)", ("original", "exploration"): "Cal-QL, original bound",
    ("rlpd", "exploration"): "RLPD", ("rlpd_ooo", "exploration"): "RLPD + RND",
    ("rlpd_ooo", "exploitation"): "OOO (RLPD)", ("td3_rnd", "exploration"): "TD3 + RND", ("pex", "exploration"): "PEX",
    ("frozen_rnd", "exploitation"): "OOO + frozen RND", ("ooo_td3", "exploitation"): "OOO, TD3 exploitation",
    ("no_up", "exploitation"): "OOO (IQL), no upsampling", ("rlpd_no_up", "exploitation"): "OOO (RLPD), no upsampling",
    ("warm", "exploitation"): "OOO, warm start", ("sync", "exploration"): "sync: IQL + RND",
    ("sync", "exploitation"): "sync: OOO (IQL)",
}
# What the figures show. "curves": score over environment steps; "retrain": score over gradient steps of the last
# retraining; anything else is a key of metrics.jsonl, in the online phase (rnd/...) or the retraining (losses/...).
FIGURES = {
    "figure3": ("Intrinsic reward stays (left); OOO against OOO + frozen RND", ("rnd/online_scaled_mean", "retrain")),
    "figure4": ("IQL, IQL + RND and OOO (IQL)", ("curves",)),
    "figure5": ("Exploitation with IQL and with TD3: mean Q and score", ("losses/q_mean", "retrain")),
    "figure7": ("Cal-QL with the paper's bound and with the original one", ("curves",)),
    "figure8": ("Learning curves of Table 1", ("curves",)),
    "figure9": ("Learning curves of Table 2", ("curves",)),
    "figure10": ("Learning curves of Table 3", ("curves",)),
    "figure11": ("Upsampling of high-reward data", ("retrain",)),
    "figure12": ("IQL with and without RND, and OOO (IQL)", ("curves",)),
    "figure13": ("Retraining from scratch and from the previous exploitation policy", ("retrain",)),
    "figure14": ("Exploration that continues from the exploitation policy", ("curves",)),
}
# Settings that do not bear on a run's numbers, and those that bear on the exploitation policy only.
NEUTRAL = {"resume", "track", "wandb_project", "wandb_mode", "runs_dir", "video", "seed", "exp_name", "exploit_only",
           "eval_only", "device", "torch_threads", "compile", "cudagraphs", "log_every", "checkpoint_every",
           "eval_every", "retrain_at", "save_at", "scale"}
EXPLOITATION_ONLY = re.compile("retrain_|upsample|warm_start")


@dataclass
class Args:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders with run directories."""
    only: tuple[str, ...] = ()
    """Tables and figures; default: all that there are runs for, and the tables always."""
    out: str = "report"
    """Folder of report.md, report.html and the pictures."""
    exclude: tuple[str, ...] = ()
    """Patterns of run directories (paths) to leave out."""
    unfinished: bool = False
    """Show unfinished runs too, with their last evaluation, marked."""
    mixed: bool = False
    """Show runs of different settings, versions or data side by side instead of stopping."""


# === reading runs ===
@dataclass
class Record:
    """A run directory. exploration: {t: (score, episodes)}, pretraining at t <= 0 (gradient steps before the online
    phase); exploitation: the same at each retraining time; retraining: {t: [(gradient step, score)]}."""

    path: Path
    name: str  # the path as it may stand in the report
    algorithm: str
    env_id: str
    seed: int
    config: dict
    starts: list  # config, then what each later start recorded: commit, versions, hardware
    results: dict | None  # results.json of a finished run
    metrics: list = field(repr=False, default_factory=list)
    exploration: dict = field(default_factory=dict)
    exploitation: dict = field(default_factory=dict)
    retraining: dict = field(default_factory=dict)

    @property
    def finished(self):
        return self.results is not None


def plain(value):
    """A copy of something read from a run in whose texts no HTML, Markdown or terminal code is left."""
    if isinstance(value, str):
        return re.sub(r"""[&<>"'|*\[\]`\\\x00-\x1f\x7f-\x9f]""", lambda match: f"&#{ord(match[0])};", value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def identify(config):
    """Name in ALGORITHMS of a run, from its settings."""
    script, args = config["script"], config["args"]
    plain = args.get("intrinsic_reward_scale") == 0
    if script == "iql_ooo":
        for name, is_it in (("sync", args["sync"]), ("frozen_rnd", args["retrain_frozen_rnd"]),
                            ("ooo_td3", args["retrain_algorithm"] == "td3"), ("warm", args["warm_start"]),
                            ("no_up", args["retrain_upsample"] == 0 and upsampled(args["env_id"]))):
            if is_it:
                return name
        return "iql" if plain else "iql_ooo"
    if script == "calql_ooo":
        return ("calql" if args["bound_uniform_actions"] else "original") if plain else "calql_ooo"
    if script == "rlpd_ooo":
        if args["exploit_only"] and args["retrain_upsample"] == 0:
            return "rlpd_no_up"
        return "rlpd" if plain else "rlpd_ooo"
    return script


def upsampled(env_id):
    """Whether IQL's retraining upsamples on this task by default."""
    return env_id in {task for tasks, names in TARGETS["figure11"] if "no_up" in names for task in tasks}


def read_run(path):
    """The Record of a run directory. Whatever is wrong with it is a ValueError, KeyError, TypeError or OSError."""
    config = plain(json.loads((path / "config.json").read_text()))
    algorithm, args = identify(config), config["args"]
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown script {algorithm!r}")
    results = path / "results.json"
    record = Record(path, plain(path.as_posix()), algorithm, args["env_id"], int(args["seed"]), config,
                    [config, *config.get("resumed", ())],
                    plain(json.loads(results.read_text())) if results.exists() else None,
                    read_records(path / "metrics.jsonl"))
    for line in record.metrics:
        t, phase, step = int(line["env_step"]), line["phase"], int(line["grad_step"])
        if "eval/normalized_score" not in line:
            continue
        value = float(line["eval/normalized_score"]), int(line["eval/episodes"])
        if not math.isfinite(value[0]):
            raise ValueError(f"a score of {value[0]}")
        if phase == "retrain":
            record.exploitation[t] = value
            record.retraining.setdefault(t, []).append((step, value[0]))
        else:
            record.exploration[t if phase == "online" else step - int(args.get("offline_steps", 0))] = value
    if args.get("exploit_only"):
        record.exploration = {}  # those of its source
    for policy in ("exploration", "exploitation"):  # what the cells will ask for
        for time in getattr(record, policy):
            settings_of(record, policy, time)
    provenance([record])
    return record


def read_all(args):
    """([Record], [what was left out and why])."""
    records, left_out = [], []
    for folder in args.folders:
        if not Path(folder).is_dir():
            fail(f"{folder} is not a folder; give the --runs-dir of the runs")
        # Either file makes a folder a run's: a run that has lost one is to be missed.
        for path in sorted({p.parent for name in ("config.json", "metrics.jsonl") for p in Path(folder).rglob(name)}):
            if any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in args.exclude):
                continue
            try:
                records.append(read_run(path))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
                line = f"{path.as_posix()} is left out, it cannot be read: {reason}"
                left_out.append(plain(line))
                print(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line), file=sys.stderr)
    if not records:
        fail(f"no run directory (config.json, metrics.jsonl) in {' '.join(args.folders)}; start some with reproduce.py")
    return records, left_out


# === cells ===
@cache
def paper_settings(algorithm, env_id):
    """dict of an algorithm's settings on a task as the paper has them, and the names of the budgets among them."""
    what = ALGORITHMS[algorithm]
    module = importlib.import_module(Path(what.script).stem)
    return asdict(module.parse_args(["--env-id", env_id, *what.flags])), set(module.BUDGETS)


def full_budget(algorithm, env_id):
    """The paper's online steps of a task."""
    return paper_settings(algorithm, env_id)[0]["online_steps"]


def paper_time(target, env_id, t=None):
    """Environment steps at which the paper reads its table."""
    if target == "table2":
        return t or (1_500_000 if env_id == ANTMAZE else 500_000)
    return t or (4_000_000 if env_id in KITCHEN else 1_000_000)


def score_at(record, policy, t):
    """(time that is wanted, time of the policy's last score not after it or None, that score). Wanted is t, or where
    the run's online budget does not reach it, t's share of the paper's budget taken of the run's own."""
    online = record.config["args"]["online_steps"]
    wanted = t if online >= t else round(t * online / full_budget(record.algorithm, record.env_id))
    values = {k: score for k, (score, _) in getattr(record, policy).items() if 0 < k <= wanted}
    time = max(values, default=None)
    return wanted, time, values.get(time)


@cache
def script_text(script, commit):
    """An id of a script's text at a commit: equal commits or equal texts give equal ids."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}:{script}.py"],
                         capture_output=True, text=True) if re.fullmatch("[0-9a-f]{7,40}", str(commit)) else None
    return git.stdout.strip() if git and git.returncode == 0 else f"commit {commit}"


def bears_on(setting, record, policy):
    """Whether a setting of a run has a part in the scores of its policy."""
    without_rnd = record.config["args"].get("intrinsic_reward_scale") == 0
    return not (setting in NEUTRAL or policy == "exploration" and EXPLOITATION_ONLY.match(setting)
                or without_rnd and setting.startswith("rnd_"))


def settings_of(record, policy, time):
    """dict of all that must be equal for two runs to be averaged."""
    config, args = record.config, record.config["args"]
    kept = {k: v for k, v in args.items() if bears_on(k, record, policy)}
    data = config.get("dataset") or {}
    # A random subset of the data is another one for every seed.
    kept["data"] = data.get("source") if args.get("data_subset") else data.get("sha256")
    kept["script"] = history(script_text(config["script"], start.get("commit")) for start in record.starts)
    for name in dict.fromkeys(name for start in record.starts for name in start["versions"]):
        kept[f"version of {name}"] = history(start["versions"].get(name) for start in record.starts)
    return {**kept, "t": time, "episodes": getattr(record, policy)[time][1]}


def history(values):
    """The value of each start of a run as one text, without repetitions: "2.13.0" or "2.13.0 then 2.14.0"."""
    return " then ".join(str(value) for value, _ in itertools.groupby(values))


@dataclass
class Group:
    """Runs of one cell that may be averaged: {seed: (score, record)}."""

    policy: str
    settings: dict
    seeds: dict

    @property
    def scores(self):
        return [score for score, _ in self.seeds.values()]

    def summary(self):
        return f"{np.mean(self.scores):.1f}" + (f" ± {standard_error(self.scores):.1f}" if len(self.seeds) > 1 else "")

    def details(self, paper_t):
        """Seeds, episodes, time, and its share of the paper's, in a few words."""
        dagger = "" if all(r.finished for _, r in self.seeds.values()) else " † unfinished"
        dagger += " ‡" if self.departures() else ""
        t, seeds, episodes = self.settings["t"], len(self.seeds), self.settings["episodes"]
        return (f"{seeds} seed{'s' * (seeds > 1)}, {episodes} episode{'s' * (episodes > 1)}, "
                f"t = {steps(t)} (scale {t / paper_t:.3g}){dagger}")

    def departures(self):
        """What is not as in the paper beside the budgets, "goal_x 10 instead of 20, ...", what a run of an older script
        has no setting for, and what changed between the starts of a run."""
        record = next(iter(self.seeds.values()))[1]
        usual, budgets = paper_settings(record.algorithm, record.env_id)
        usual = {k: v for k, v in json.loads(json.dumps(usual)).items()
                 if k not in budgets and k != "eval_episodes" and bears_on(k, record, self.policy)}
        missing = sorted(usual.keys() - self.settings.keys())
        words = [f"{k} {self.settings[k]} instead of {v}" for k, v in usual.items() if self.settings.get(k, v) != v]
        words += [f"{k} {v}" for k, v in self.settings.items()
                  if (k == "script" or k.startswith("version of ")) and " then " in v]
        return ", ".join(words + ([f"made before there was {' and '.join(missing)}"] if missing else []))


def steps(n):
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k" if n >= 1000 else str(n)


def standard_error(scores):
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def cell(records, env_id, algorithm, policy, t, args):
    """The groups of a cell, the one with most seeds first, and a line for each run that has no score for it."""
    groups, without = [], []
    for record in records:
        if (record.env_id, record.algorithm) != (env_id, algorithm) or not (record.finished or args.unfinished):
            continue
        wanted, time, score = score_at(record, policy, t)
        if time is None:
            without.append(f"{record.name} has no {policy} score at or before t = {steps(wanted)}.")
            continue
        settings = settings_of(record, policy, time)
        group = next((g for g in groups if g.settings == settings), None)
        if group is None:
            groups.append(group := Group(policy, settings, {}))
        if record.seed in group.seeds and group.seeds[record.seed][1].path != record.path:
            other = group.seeds[record.seed][1]
            if group.seeds[record.seed][0] != score:
                fail(f"{record.name} and {other.name} are the same seed with the same settings but other scores; "
                     "leave one out with --exclude")
        group.seeds[record.seed] = score, record
    if len(groups) > 1 and not args.mixed:
        fail(f"{why_not_averaged(groups[0], groups[1])}; keep them in folders of their own, leave some out with "
             "--exclude, or show them side by side with --mixed")
    return sorted(groups, key=lambda g: -len(g.seeds)), without


def why_not_averaged(a, b):
    """One line: which runs of a cell differ, and in what."""
    differ = [k for k in {**a.settings, **b.settings} if a.settings.get(k) != b.settings.get(k)]
    what = ", ".join(f"{k} {a.settings.get(k)} and {b.settings.get(k)}" for k in differ[:4])
    paths = [next(iter(g.seeds.values()))[1].name for g in (a, b)]
    return (f"{paths[0]} and {paths[1]} are not averaged: {what}"
            + (f" and {len(differ) - 4} more" if len(differ) > 4 else ""))


# === tables ===
def table(name, records, args):
    """Markdown of one of the paper's tables, and the cells {(task, column): groups}."""
    paper, cells, notes = PAPER[name], {}, []
    columns = paper["columns"]
    tasks = [task for task in TARGETS[name][0][0]]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for task in tasks:
        texts = []
        for i, column in enumerate(columns):
            algorithm, policy, t = COLUMNS[column]
            t = paper_time(name, task, t)
            cells[task, column], without = groups, _ = cell(records, task, algorithm, policy, t, args)
            text = [f"**{g.summary()}**<br>{g.details(t)}" for g in groups] or ["missing"]
            mean, error = paper[task][i]
            texts.append("<br>".join([*text, f"paper {mean:g} ± {error:g}"]))
            notes += [f"{column}: {line}" for line in without]
            notes += [why_not_averaged(groups[0], g) for g in groups[1:]]
            notes += [f"‡ {task}, {column}: {g.departures()}." for g in groups if g.departures()]
        lines.append(f"| {task} | " + " | ".join(texts) + " |")
    texts = []
    for i, column in enumerate(columns):
        groups = [cells[task, column] for task in tasks]
        whole = all(len(g) == 1 for g in groups)
        mean = f"**{np.mean([np.mean(g[0].scores) for g in groups]):.1f}**" if whole else "missing"
        texts.append(f"{mean}<br>paper {paper['average'][i]:g}")
    lines.append("| average | " + " | ".join(texts) + " |")
    head = f"## {name.capitalize().replace('e', 'e ', 1)}\n\nThe paper's budget: {paper['budget']}.\n"
    return "\n".join([head, *lines, "", *(f"- {note}" for note in notes), *statistics(columns, tasks, cells)]), cells


SMALL_COLUMNS = {"IQL": ("iql", "exploration"), "IQL + RND": ("iql_ooo", "exploration"),
                 "OOO (IQL)": ("iql_ooo", "exploitation"), "TD3 + RND": ("td3_rnd", "exploration"),
                 "PEX": ("pex", "exploration")}


def small_table(records, args):
    """Markdown of the runs of --preset small: each policy's last three evaluations, and the successes in D_on."""
    lines = ["## The small preset", "", "| | " + " | ".join(SMALL_COLUMNS) + " | successes in D_on: IQL, IQL + RND |",
             "|---|" + "---|" * (len(SMALL_COLUMNS) + 1)]
    for task, (_, _, online, _, _) in SMALL.items():
        chosen = [r for r in records if (r.config["args"]["online_steps"], r.config["args"]["hidden_dims"][:1])
                  == (online, [128])]
        cells = {name: cell(chosen, task, *what, full_budget(what[0], task), args)[0]
                 for name, what in SMALL_COLUMNS.items()}
        shares = [f"{np.mean([goals(r) for _, r in g.seeds.values()]):.0f} %"
                  for name in ("IQL", "IQL + RND") for g in cells[name][:1]]
        texts = ["<br>".join(map(small_cell, groups)) or "missing" for groups in cells.values()]
        lines.append(f"| {task} | " + " | ".join([*texts, ", ".join(shares)]) + " |")
    return "\n".join([*lines, "", "Means over seeds and the last three evaluations of each policy, [95 % stratified "
                      "bootstrap interval over seeds], (rate of success). Mazes and hammer: D4RL's score; pen: rate of "
                      "success. These are not the paper's budgets and networks.", ""])


def goals(record):
    """Percentage of the online episodes that were a success."""
    return 100 * np.mean([x["charts/episodic_success"] for x in record.metrics if "charts/episodic_success" in x])


def small_cell(group):
    """Mean, interval and rate of success of a group's last three evaluations."""
    phase = "retrain" if group.policy == "exploitation" else "online"
    lines = [[x for x in record.metrics if x["phase"] == phase and "eval/normalized_score" in x][-3:]
             for _, record in group.seeds.values()]
    scores, rates = (np.array([np.mean([x[f"eval/{key}"] for x in last]) for last in lines])
                     for key in ("normalized_score", "success_rate"))
    _, (low, high) = bootstrap({"": scores[:, None]}, lambda x: np.array([x.mean()]))[""]
    seeds = f"{len(lines)} seed{'s' * (len(lines) > 1)}"
    return f"**{scores.mean():.1f}** [{low:.1f}, {high:.1f}] ({100 * rates.mean():.0f} %), {seeds}"


def statistics(columns, tasks, cells):
    """Lines with rliable's IQM of each method and probability of improvement of OOO over its base."""
    lines = []
    for ooo, base in BASE.items():
        if ooo not in columns or base not in columns:
            continue
        shared = [task for task in tasks if len(cells[task, ooo]) == len(cells[task, base]) == 1]
        times = {task: [cells[task, column][0].settings["t"] for column in (ooo, base)] for task in shared}
        for task in [task for task in shared if len(set(times[task])) > 1]:
            shared.remove(task)
            there, here = map(steps, times[task])
            lines.append(f"- {task}: {ooo} is read at t = {there}, {base} at t = {here}; not compared.")
        seeds = [set(cells[task, column][0].seeds) for task in shared for column in (ooo, base)]
        seeds = sorted(set.intersection(*seeds)) if seeds else []
        if len(seeds) < 2:
            lines.append(f"- {ooo} against {base}: fewer than 2 seeds common to both at equal times; no intervals.")
            continue
        scores = {c: np.array([[cells[task, c][0].seeds[seed][0] for task in shared] for seed in seeds])
                  for c in (ooo, base)}
        result = intervals(scores[ooo], scores[base])
        form = lambda x: f"{x[0]:.1f} [{x[1]:.1f}, {x[2]:.1f}]"  # noqa: E731
        p = result["improvement"]
        lines.append(f"- {ooo} against {base} ({len(shared)} of {len(tasks)} tasks, seeds {', '.join(map(str, seeds))}"
                     f"): IQM {form(result['ooo'])} against {form(result['base'])}; probability of improvement "
                     f"{p[0]:.2f} [{p[1]:.2f}, {p[2]:.2f}] (95 % stratified bootstrap).")
    return lines


def bootstrap(scores, statistic):
    """rliable's {name: (estimate, (low, high))} of scores {name: (seeds, tasks)}, 95 % stratified bootstrap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rliable.library import get_interval_estimates

        np.random.seed(0)  # rliable draws from the global generator, whatever random_state it is given
        points, around = get_interval_estimates(scores, statistic, reps=2000)
    return {name: (np.ravel(points[name])[0].item(), np.ravel(around[name]).tolist()) for name in scores}


def intervals(ooo, base):
    """(point, low, high) of both IQMs and of P(ooo > base). ooo, base: scores (seeds, tasks)."""
    from rliable import metrics

    result = bootstrap({"ooo": ooo, "base": base}, lambda x: np.array([metrics.aggregate_iqm(x)]))
    result |= bootstrap({"improvement": (ooo, base)}, metrics.probability_of_improvement)
    return {name: (point, *around) for name, (point, around) in result.items()}


# === figures ===
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")


def series(name):
    """(algorithm, policy) of all lines of a figure, in the order of LABELS."""
    algorithms = {x for _, names in TARGETS[name] for x in names}
    return [key for key in LABELS if key[0] in algorithms]


def figure(name, records, args, out):
    """Draw a figure: a row of panels for each task. Markdown with it and a table of last scores, or "" if there are no
    runs for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title, kinds = FIGURES[name]
    tasks = [task for tasks, _ in TARGETS[name] for task in tasks]
    keys = series(name)
    shown = [r for r in records if (r.finished or args.unfinished) and r.env_id in tasks
             and r.algorithm in {key[0] for key in keys}]
    if name in ("figure3", "figure5", "figure7", "figure11", "figure13", "figure14"):  # comparisons need both sides
        theirs = {k[0] for k in keys} - {"iql_ooo", "rlpd_ooo", "calql"}
        tasks = [t for t in tasks if any(r.env_id == t and r.algorithm in theirs for r in shown)]
    tasks = [task for task in tasks if any(r.env_id == task for r in shown)]
    if not tasks:
        return ""
    fig, axes = plt.subplots(len(tasks), len(kinds), figsize=(6.4 * len(kinds), 3.2 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        mine = [r for r in shown if r.env_id == task]
        for ax, kind in zip(row, kinds, strict=True):
            draw(ax, kind, mine, keys)
            ax.set_title(task, loc="left", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize=7)
    fig.tight_layout()
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=110)
    plt.close(fig)
    write_whole(out / f"{name}.png", picture.getvalue())
    number = name.removeprefix("figure")
    lines = [f"## Figure {number}: {title}", "", f"![Figure {number}]({name}.png)", "",
             "Thin: single seeds; thick: their mean where all have the evaluation. Last scores:", "",
             "| task | policy | score | |", "|---|---|---|---|"]
    notes = []
    for task in tasks:
        for key in keys:
            if not any((r.env_id, r.algorithm) == (task, key[0]) for r in shown):
                continue
            budget = full_budget(key[0], task)
            groups, _ = cell(records, task, *key, budget, args)
            lines += [f"| {task} | {LABELS[key]} | {g.summary()} | {g.details(budget)} |" for g in groups]
            notes += [f"- ‡ {task}, {LABELS[key]}: {g.departures()}." for g in groups if g.departures()]
    return "\n".join([*lines, "", *notes, ""])


def draw(ax, kind, records, keys):
    """One panel: a line for each seed, and the mean of each (algorithm, policy)."""
    ax.set_xlabel("gradient steps of the last retraining" if kind == "retrain" or kind.startswith("losses/")
                  else "environment steps")
    ax.set_ylabel({"curves": "normalised score", "retrain": "normalised score"}.get(kind, kind))
    if kind.startswith("losses/"):
        ax.set_yscale("symlog")
    for colour, key in zip(COLOURS, keys, strict=False):
        algorithm, policy = key
        if policy == "exploration" and (kind == "retrain" or kind.startswith("losses/")):
            continue
        groups = []  # [(settings, lines)]: no mean over runs of different settings (--mixed)
        for record in (r for r in records if r.algorithm == algorithm):
            if kind == "curves":
                points = sorted((t, v[0]) for t, v in getattr(record, policy).items())
            elif kind == "retrain":
                points = sorted(record.retraining[max(record.retraining)]) if record.retraining else []
            else:
                points = measured(record, kind, policy)
            if points and getattr(record, policy):
                settings = settings_of(record, policy, max(getattr(record, policy)))
                if not any(g[0] == settings for g in groups):
                    groups.append((settings, []))
                next(g[1] for g in groups if g[0] == settings).append(dict(points))
                ax.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.6,
                        marker="*" if policy == "exploitation" and kind == "curves" else None, ms=7)
        for style, (_, lines) in zip(itertools.cycle(("-", "--", ":", "-.")), groups, strict=False):
            common = sorted(set.intersection(*map(set, lines)))
            ax.plot(common, [np.mean([line[t] for line in lines]) for t in common], color=colour, lw=2, ls=style,
                    label=f"{LABELS[key]} ({len(lines)})")


def measured(record, key, policy):
    """[(step, value)] of a key of metrics.jsonl."""
    online = key.startswith("rnd/")
    if online != (policy == "exploration"):
        return []
    last = max(record.retraining, default=None)
    return [(line["env_step" if online else "grad_step"], line[key]) for line in record.metrics if key in line
            and line["phase"] == ("online" if online else "retrain") and (online or line["env_step"] == last)]


def figure2(records, out):
    """The point mass: its own picture, and its table as it was measured. Markdown, or "" if there are no runs."""
    parts = []
    for record in records:
        if record.env_id not in POINTMASS or not record.finished or not (record.path / "figure2.png").exists():
            continue
        name = f"figure2_{len(parts)}.png" if parts else "figure2.png"
        try:
            part, picture = pointmass_table(record), (record.path / "figure2.png").read_bytes()
        except (OSError, KeyError, TypeError, IndexError) as error:
            parts.append(f"{record.name} is left out: its results cannot be read ({plain(repr(error))}).\n")
            print(parts[-1], end="", file=sys.stderr)
            continue
        write_whole(out / name, picture)
        parts += [part[0], "", f"![Figure 2]({name})", "", *part[1:], ""]
    return "\n".join(["## Figure 2: point mass and wall", "", *parts]) if parts else ""


def pointmass_table(record):
    """Lines: what was run, and a table of its policies."""
    a, results = record.config["args"], record.results
    budget = " / ".join(steps(a[k]) for k in ("offline_steps", "online_steps", "retrain_steps"))
    lines = [f"{plain(record.path.name)}: {budget} pretraining / online / retraining steps, "
             f"{len(results['rows'][0]['seeds'])} seeds, {results['episodes_per_seed']} episodes each; "
             "mean ± standard error.",
             "| policy | steps to the goal | reach it, % | go under the wall, % |", "|---|---|---|---|"]
    for row in results["rows"]:
        form = [mean_error(row["steps"])] + [mean_error(100 * np.array(row[k])) for k in ("success", "under")]
        lines.append(f"| {row['policy']} | " + " | ".join(form) + " |")
    shortest = " / ".join(f"{results['shortest_steps'][way]['mean']:.1f}" for way in ("under", "over"))
    return [*lines, f"| shortest way under / over the wall | {shortest} | | |"]


def figure6(folders, out):
    """The picture of the reduced data sets, where reproduce.py left one; else ""."""
    found = next((path for folder in folders if (path := Path(folder) / "figure6.png").exists()), None)
    if not found:
        return ""
    write_whole(out / "figure6.png", found.read_bytes())
    return "## Figure 6: the reduced data sets and their environments\n\n![Figure 6](figure6.png)\n"


def mean_error(values):
    return f"{np.mean(values):.1f}" + (f" ± {standard_error(values):.1f}" if len(values) > 1 else "")


# === the report ===
def provenance(records, left_out=()):
    """A table of the runs: what each is, and from where; and what could not be read."""
    lines = ["## Runs", "", "| run | algorithm | seed | commit | offline / online / retrain steps | hardware | |",
             "|---|---|---|---|---|---|---|"]
    for r in records:
        a = r.config["args"]
        budget = " / ".join(steps(a.get(k, 0)) for k in ("offline_steps", "online_steps", "retrain_steps"))
        commits = history(start.get("commit") for start in r.starts)
        machines = [start["hardware"] for start in r.starts]
        where = history(f"{h['gpu'] or str(h['cores']) + ' x ' + h['cpu']}, {h['matmul_precision']}" for h in machines)
        lines.append(f"| {r.name} | {r.algorithm} | {r.seed} | {commits} | {budget} | {where} | "
                     f"{'' if r.finished else 'unfinished'} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in left_out), ""])


def html(text, out):
    """One page with the pictures inside."""
    import markdown

    def inline(match):
        data = base64.b64encode((out / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^"]+\.png)"', inline, markdown.markdown(text, extensions=["tables"]))
    style = ("body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:4px 8px;"
             "text-align:left;vertical-align:top}")
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>OOO: report</title><style>{style}' \
           f"</style></head><body>{body}</body></html>"


ITEMS = ["small", *(name for name in TARGETS if name != "smoke")]


def parse_args(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if not args.folders:
        fail("give the folders of the runs, for example: python report.py runs")
    args.folders, args.out = tuple(map(os.path.expanduser, args.folders)), os.path.expanduser(args.out)
    for name in args.only:
        if name not in ITEMS:
            nearest(name, ITEMS, "table or figure")
    return args


def main(argv=None):
    args = parse_args(argv)
    (records, left_out), wanted = read_all(args), args.only or ITEMS
    # All cells before anything is written, so that mixed runs stop the report first.
    parts = [small_table(records, args)] if "small" in args.only else []
    parts += [table(name, records, args)[0] for name in wanted if name in PAPER]
    out = output_folder(args.out, "--out")
    for name in wanted:
        if name == "figure2":
            parts.append(figure2(records, out))
        elif name == "figure6":
            parts.append(figure6(args.folders, out))
        elif name in FIGURES:
            parts.append(figure(name, records, args, out))
    head = ("# OOO: measured beside the paper\n\nMean ± standard error over seeds of the last policy at t, never the "
            f"best. The paper's: {PAPER['source']} Runs at a scale below 1, or on regenerated data, are not comparable "
            "with them.\n")
    text = "\n\n".join([head, *filter(None, parts), provenance(records, left_out)])
    write_whole(out / "report.md", text.encode())
    write_whole(out / "report.html", html(text, out).encode())
    used = sum(r.finished or args.unfinished for r in records)
    words = [f"{n} {what}" for n, what in ((len(records) - used, "unfinished"), (len(left_out), "left out")) if n]
    print(f"{used} of {len(records) + len(left_out)} runs{' (' + ', '.join(words) + ')' if words else ''} are in "
          f"{out / 'report.md'} and {out / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
