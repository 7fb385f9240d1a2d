"""The paper's tables and figures (OOO, arXiv 2310.08558) from finished runs, beside the paper's numbers.

    python report.py runs                              # report/report.md, .html (one file, opens offline) and pictures
    python report.py runs --only table2 figure4        # some of them; default: all that there are runs for
    python report.py results --unfinished --mixed --exclude '*smooth*' --out report

Folders are searched for run directories at any depth; `reproduce.py` makes them, and so does any script by hand: which
algorithm a run is follows from its settings, not from its name. Needs requirements-reproduce.txt.

What the numbers are:
 1. A cell is the mean over seeds of the score at the paper's share of the online budget (Table 2: 500k of a run of 500k
    steps is the end of a run of any length), else of the last time that the run has. Each cell says the time t.
 2. +- is the standard error over seeds (standard deviation with n - 1, over sqrt(n)); a single seed has none.
 3. Runs of a cell that differ in a setting that bears on it, in package versions, in the script's text (by commit) or
    in their data are never averaged: report.py stops and names them, or shows them side by side with --mixed.
 4. Unfinished runs do not count; --unfinished shows their last evaluation, marked with a dagger. A double dagger marks
    settings that are not the paper's, which are then listed; budgets show as the scale, t over the paper's.
 5. IQM (interquartile mean) and probability of improvement are rliable's, with 95 % stratified bootstrap intervals,
    over the tasks that both methods have and the seeds that are common to all of these.
"""

import base64
import fnmatch
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from reproduce import ALGORITHMS, ANTMAZE, KITCHEN, POINTMASS, TARGETS, fail, nearest  # noqa: E402

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
    algorithm: str
    env_id: str
    seed: int
    config: dict
    finished: bool
    metrics: list = field(repr=False, default_factory=list)
    exploration: dict = field(default_factory=dict)
    exploitation: dict = field(default_factory=dict)
    retraining: dict = field(default_factory=dict)


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
    """A Record, or None if the folder's config.json is not that of a run."""
    try:
        config = json.loads((path / "config.json").read_text())
        algorithm = identify(config)
        if algorithm not in ALGORITHMS:
            return None
        args = config["args"]
        lines = (path / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    record = Record(path, algorithm, args["env_id"], args["seed"], config, (path / "results.json").exists(), metrics)
    for line in metrics:
        if "eval/normalized_score" not in line:
            continue
        value = line["eval/normalized_score"], line["eval/episodes"]
        if line["phase"] == "retrain":
            record.exploitation[line["env_step"]] = value
            record.retraining.setdefault(line["env_step"], []).append((line["grad_step"], value[0]))
        else:
            t = line["env_step"] if line["phase"] == "online" else line["grad_step"] - args.get("offline_steps", 0)
            record.exploration[t] = value
    if config["args"].get("exploit_only"):
        record.exploration = {}  # those of its source
    return record


def read_all(args):
    records = []
    for folder in args.folders:
        if not Path(folder).is_dir():
            fail(f"{folder} is not a folder; give the --runs-dir of the runs")
        for path in sorted(p.parent for p in Path(folder).rglob("config.json")):
            if not any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in args.exclude):
                records.append(read_run(path))
    records = [r for r in records if r]
    if not records:
        fail(f"no run directory (config.json, metrics.jsonl) in {' '.join(args.folders)}; start some with reproduce.py")
    return records


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
    """(time, score, episodes) of a policy at the share of the online budget that t is of the paper's, else at the
    last time before, else at the last one; None if there is no score."""
    online = record.config["args"]["online_steps"]
    wanted = round(t * online / full_budget(record.algorithm, record.env_id))
    values = {k: v for k, v in getattr(record, policy).items() if k > 0}
    if not values:
        return None
    time = max((k for k in values if k <= wanted), default=max(values))
    if policy == "exploitation" and wanted not in values:
        time = max(values)
    return time, *values[time]


@cache
def script_text(script, commit):
    """An id of a script's text at a commit: equal commits or equal texts give equal ids."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}:{script}.py"],
                         capture_output=True, text=True) if commit and "dirty" not in commit else None
    return git.stdout.strip() if git and git.returncode == 0 else f"commit {commit}"


def settings_of(record, policy, time):
    """dict of all that must be equal for two runs to be averaged."""
    config, args = record.config, record.config["args"]
    kept = {k: v for k, v in args.items() if k not in NEUTRAL and not (policy == "exploration"
                                                                       and EXPLOITATION_ONLY.match(k))}
    data = config.get("dataset") or {}
    # A random subset of the data is another one for every seed.
    kept["data"] = data.get("source") if args.get("data_subset") else data.get("sha256")
    kept["script"] = script_text(config["script"], config.get("commit"))
    return {**kept, **{f"version of {k}": v for k, v in config["versions"].items()}, "t": time,
            "episodes": getattr(record, policy)[time][1]}


@dataclass
class Group:
    """Runs of one cell that may be averaged: {seed: (score, record)}."""

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
        """What is not as in the paper beside the budgets: "goal_x 10 instead of 20, ..."."""
        record = next(iter(self.seeds.values()))[1]
        usual, budgets = paper_settings(record.algorithm, record.env_id)
        usual = json.loads(json.dumps(usual))
        return ", ".join(f"{k} {self.settings[k]} instead of {v}" for k, v in usual.items()
                         if k not in budgets | NEUTRAL | {"eval_episodes"} and self.settings.get(k, v) != v)


def steps(n):
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k" if n >= 1000 else str(n)


def standard_error(scores):
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def cell(records, env_id, algorithm, policy, t, args):
    """The groups of a cell, the one with most seeds first."""
    groups = []
    for record in records:
        if (record.env_id, record.algorithm) != (env_id, algorithm) or not (record.finished or args.unfinished):
            continue
        found = score_at(record, policy, t)
        if found is None:
            continue
        time, score, _ = found
        settings = settings_of(record, policy, time)
        group = next((g for g in groups if g.settings == settings), None)
        if group is None:
            groups.append(group := Group(settings, {}))
        if record.seed in group.seeds and group.seeds[record.seed][1].path != record.path:
            other = group.seeds[record.seed][1]
            if group.seeds[record.seed][0] != score:
                fail(f"{record.path} and {other.path} are the same seed with the same settings but other scores; "
                     "leave one out with --exclude")
        group.seeds[record.seed] = score, record
    if len(groups) > 1 and not args.mixed:
        fail(f"{why_not_averaged(groups[0], groups[1])}; keep them in folders of their own, leave some out with "
             "--exclude, or show them side by side with --mixed")
    return sorted(groups, key=lambda g: -len(g.seeds))


def why_not_averaged(a, b):
    """One line: which runs of a cell differ, and in what."""
    differ = [k for k in {**a.settings, **b.settings} if a.settings.get(k) != b.settings.get(k)]
    what = ", ".join(f"{k} {a.settings.get(k)} and {b.settings.get(k)}" for k in differ[:4])
    paths = [next(iter(g.seeds.values()))[1].path for g in (a, b)]
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
            cells[task, column] = groups = cell(records, task, algorithm, policy, t, args)
            text = [f"**{g.summary()}**<br>{g.details(t)}" for g in groups] or ["missing"]
            mean, error = paper[task][i]
            texts.append("<br>".join([*text, f"paper {mean:g} ± {error:g}"]))
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


def statistics(columns, tasks, cells):
    """Lines with rliable's IQM of each method and probability of improvement of OOO over its base."""
    lines = []
    for ooo, base in BASE.items():
        if ooo not in columns or base not in columns:
            continue
        shared = [task for task in tasks if len(cells[task, ooo]) == len(cells[task, base]) == 1]
        seeds = [set(cells[task, column][0].seeds) for task in shared for column in (ooo, base)]
        seeds = sorted(set.intersection(*seeds)) if seeds else []
        if len(seeds) < 2:
            lines.append(f"- {ooo} against {base}: fewer than 2 seeds common to both; no intervals.")
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


def intervals(ooo, base, reps=2000):
    """rliable's (point, low, high) of both IQMs and of P(ooo > base). ooo, base: scores (seeds, tasks)."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rliable import library, metrics

        state = np.random.RandomState(0)
        point, interval = library.get_interval_estimates(
            {"ooo": ooo, "base": base}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=reps, random_state=state)
        better, around = library.get_interval_estimates(
            {"improvement": (ooo, base)}, metrics.probability_of_improvement, reps=reps, random_state=state)
    result = {name: (point[name].item(), *interval[name].ravel().tolist()) for name in point}
    return result | {"improvement": (float(better["improvement"]), *np.ravel(around["improvement"]).tolist())}


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
    fig.savefig(out / f"{name}.png", dpi=110)
    plt.close(fig)
    number = name.removeprefix("figure")
    lines = [f"## Figure {number}: {title}", "", f"![Figure {number}]({name}.png)", "",
             "Thin: single seeds; thick: their mean where all have the evaluation. Last scores:", "",
             "| task | policy | score | |", "|---|---|---|---|"]
    for task in tasks:
        for key in keys:
            if not any((r.env_id, r.algorithm) == (task, key[0]) for r in shown):
                continue
            budget = full_budget(key[0], task)
            groups = cell(records, task, *key, budget, args)
            lines += [f"| {task} | {LABELS[key]} | {g.summary()} | {g.details(budget)} |" for g in groups]
    return "\n".join([*lines, ""])


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


def figure2(records, args, out):
    """The point mass: its own picture, and its table as it was measured."""
    parts = []
    for record in records:
        if record.env_id not in POINTMASS or not record.finished or not (record.path / "figure2.png").exists():
            continue
        name = f"figure2_{len(parts)}.png" if parts else "figure2.png"
        (out / name).write_bytes((record.path / "figure2.png").read_bytes())
        results = json.loads((record.path / "results.json").read_text())
        a, short = record.config["args"], results["shortest_steps"]
        budget = " / ".join(steps(a[k]) for k in ("offline_steps", "online_steps", "retrain_steps"))
        parts += [f"`{record.path.name}`: {budget} pretraining / online / retraining steps, "
                  f"{len(results['rows'][0]['seeds'])} seeds, {results['episodes_per_seed']} episodes each; "
                  "mean ± standard error.", "", f"![Figure 2]({name})", "",
                  "| policy | steps to the goal | reach it, % | go under the wall, % |", "|---|---|---|---|"]
        for row in results["rows"]:
            form = [mean_error(row["steps"])] + [mean_error(100 * np.array(row[k])) for k in ("success", "under")]
            parts.append(f"| {row['policy']} | " + " | ".join(form) + " |")
        shortest = " / ".join(f"{short[way]['mean']:.1f}" for way in ("under", "over"))
        parts += [f"| shortest way under / over the wall | {shortest} | | |", ""]
    return "\n".join(["## Figure 2: point mass and wall", "", *parts]) if parts else ""


def mean_error(values):
    return f"{np.mean(values):.1f}" + (f" ± {standard_error(values):.1f}" if len(values) > 1 else "")


# === the report ===
def provenance(records):
    """A table of the runs: what each is, and from where."""
    lines = ["## Runs", "", "| run | algorithm | seed | commit | offline / online / retrain steps | hardware | |",
             "|---|---|---|---|---|---|---|"]
    for r in records:
        a, hardware = r.config["args"], r.config["hardware"]
        budget = " / ".join(steps(a.get(k, 0)) for k in ("offline_steps", "online_steps", "retrain_steps"))
        where = hardware["gpu"] or f"{hardware['cores']} x {hardware['cpu']}"
        lines.append(f"| {r.path.as_posix()} | {r.algorithm} | {r.seed} | {r.config.get('commit')} | {budget} | "
                     f"{where}, {hardware['matmul_precision']} | {'' if r.finished else 'unfinished'} |")
    return "\n".join([*lines, ""])


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


ITEMS = [name for name in TARGETS if name != "smoke"]


def parse_args(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if not args.folders:
        fail("give the folders of the runs, for example: python report.py runs")
    for name in args.only:
        if name not in ITEMS:
            nearest(name, ITEMS, "table or figure")
    return args


def main(argv=None):
    args = parse_args(argv)
    records, wanted = read_all(args), args.only or ITEMS
    # All cells before anything is written, so that mixed runs stop the report first.
    parts = [table(name, records, args)[0] for name in wanted if name in PAPER]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        if name == "figure2":
            parts.append(figure2(records, args, out))
        elif name in FIGURES:
            parts.append(figure(name, records, args, out))
    head = ("# OOO: measured beside the paper\n\nMean ± standard error over seeds of the last policy at t, never the "
            f"best. The paper's: {PAPER['source']} Runs at a scale below 1, or on regenerated data, are not comparable "
            "with them.\n")
    text = "\n\n".join([head, *filter(None, parts), provenance(records)])
    (out / "report.md").write_text(text)
    (out / "report.html").write_text(html(text, out))
    used = sum(r.finished or args.unfinished for r in records)
    print(f"{used} of {len(records)} runs (the others are unfinished) are in {out / 'report.md'} and "
          f"{out / 'report.html'}")


if __name__ == "__main__":
    main()
