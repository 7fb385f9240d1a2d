"""Tables and pictures of finished runs; the paper's (OOO, arXiv 2310.08558) stand beside the paper's numbers.

    python report.py runs                              # report/report.md, .html (one file, opens offline) and pictures
    python report.py runs --only table2 figure4        # some of them; default: all that there are runs for
    python report.py runs --only small                 # reproduce.py's study and --preset small
    python report.py results --mixed --exclude '*smooth*' --out report

Folders are searched for run directories at any depth; `reproduce.py` makes them, and so does any script by hand: which
algorithm a run is follows from its settings, not from its name. Needs requirements-reproduce.txt.

What the numbers are:
 1. Tables are made from results.json: the final evaluation of each policy, on start states that no curve has used.
    Curves are made from metrics.jsonl.
 2. A cell is the mean over seeds at one time t, which it says: for the paper's items the paper's t where the online
    budget of the run reaches it, else t's share of that budget, and of a policy's final evaluations the last one not
    after it; elsewhere the last. A run without one has no part in the cell.
 3. [low, high] is the 95 % t interval over seeds; a single seed has none. Two methods are compared by the differences
    of equal seeds: their mean and interval, and the exact two-sided sign-flip p (Holm: corrected for the number of
    tasks). How often such intervals hold the mean: tools/coverage.py.
 4. Runs of a cell that differ in a setting that bears on it, in package versions, in the script's text (by SHA-256) or
    in their data are never averaged: report.py stops and names them, or shows them side by side with --mixed. A run
    that was continued on other versions or another script differs from one that was not.
 5. Unfinished runs do not count. A double dagger marks settings that are not the paper's, budgets whose share of the
    paper's is not that of t (the scale), and changes on the way; they are listed. What cannot be read is named.
 6. Runs of the study and the small preset, and runs that have no place in the paper's tables, have tables of their own.
    A copy of a script under another name is an algorithm of its own, with that name and its --exp-name.
"""

import base64
import fnmatch
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from html import unescape
from pathlib import Path
from typing import Annotated

os.environ["MPLBACKEND"] = "Agg"  # whatever the environment says: pictures go to files

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from scipy import stats

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from reproduce import (  # noqa: E402
    ALGORITHMS,
    POINTMASS,
    SMALL,
    TARGETS,
    fail,
    merged,
    nearest,
    output_folder,
    paper,
    read_records,
    run_main,
    small,
    table_time,
    write_whole,
)

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
# Names of an algorithm's exploration policy (of a baseline's only one) and of its exploitation policy.
LABELS = {
    "iql": ("IQL", "IQL's data retrained"), "iql_ooo": ("IQL + RND", "OOO (IQL)"),
    "offline_only": ("before the online phase", "D_off alone retrained"),
    "parity": ("IQL, offline", "the same retrained"),
    "no_bootstrap": ("IQL, offline, no bootstrap at the cut", "the same retrained"),
    "frozen_rnd": ("IQL + RND", "OOO + frozen RND"), "no_bounds": ("IQL + RND", "OOO without Q bounds"),
    "no_up": ("IQL + RND", "OOO without upsampling"),
    "iql_equal_updates": ("IQL with OOO's updates", "the same retrained"),
    "rnd_equal_updates": ("IQL + RND with OOO's updates", "the same retrained"),
    "ooo_td3": ("IQL + RND", "OOO with TD3"), "warm": ("IQL + RND", "OOO with warm start"),
    "sync": ("sync IQL + RND", "sync OOO (IQL)"), "td3_rnd": ("TD3 + RND", ""), "pex": ("PEX", ""),
    "calql": ("Cal-QL", "Cal-QL's data retrained"), "calql_ooo": ("Cal-QL + RND", "OOO (Cal-QL)"),
    "original": ("Cal-QL with original bound", "original bound retrained"), "rlpd": ("RLPD", "RLPD's data retrained"),
    "rlpd_ooo": ("RLPD + RND", "OOO (RLPD)"), "rlpd_no_up": ("RLPD + RND", "OOO (RLPD) without upsampling"),
}
ORDER = [label for pair in LABELS.values() for label in pair]
# Comparisons: a method, and what it is compared with.
PAIRS = [("OOO (IQL)", "IQL"), ("OOO (Cal-QL)", "Cal-QL"), ("OOO (RLPD)", "RLPD")]
STUDY_PAIRS = [("OOO (IQL)", "IQL + RND"), ("OOO (IQL)", "IQL's data retrained")]
# What the panels show, beside keys of metrics.jsonl: "exploration": evaluations over environment steps;
# "exploitation": final ones over the t of the retrainings; "curves": both; "retrain": evaluations over the gradient
# steps of the last retraining; "dots": every seed's final evaluation.
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
    "figure13": ("Retraining from scratch and from the previous exploitation policy", ("exploitation",)),
    "figure14": ("Exploration that continues from the exploitation policy", ("curves",)),
}
MEASURES = {"far": "success from far starts, %", "success": "success, %", "score": "normalised score"}
# Settings that do not bear on a run's numbers, and those that bear on the exploitation policy only.
NEUTRAL = {"resume", "track", "wandb_project", "wandb_mode", "runs_dir", "video", "seed", "exp_name", "exploit_only",
           "eval_only", "device", "torch_threads", "compile", "cudagraphs", "log_every", "checkpoint_every",
           "eval_every", "eval_episodes", "final_episodes", "retrain_at", "save_at", "scale", "dataset_path"}
EXPLOITATION_ONLY = re.compile("retrain_|upsample|warm_start")


@dataclass
class Args:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders with run directories."""
    only: tuple[str, ...] = ()
    """Tables and figures: small, other, table1, figure4, ...; default: all that there are runs for."""
    out: str = "report"
    """Folder of report.md, report.html and the pictures."""
    exclude: tuple[str, ...] = ()
    """Patterns of run directories (paths) to leave out."""
    mixed: bool = False
    """Show runs of different settings, versions or data side by side instead of stopping."""


# === reading runs ===
@dataclass
class Record:
    """A run directory. cells: {policy: {t: measures of its final evaluation}}, see measures()."""

    path: Path
    name: str  # the path as it may stand in the report
    algorithm: str  # a name in ALGORITHMS, or that of a copied script
    env_id: str
    seed: int
    config: dict
    starts: list  # config, then what each later start recorded: script, versions, hardware
    results: dict | None  # results.json of a finished run
    metrics: list = field(repr=False)
    cells: dict = field(default_factory=lambda: {"exploration": {}, "exploitation": {}})
    source: "Record | None" = None  # the run whose data or networks it has, if that is in the folders too

    def label(self, policy):
        """The paper's name of the method, with --exp-name where that says something else; a copied script's own."""
        if self.algorithm not in ALGORITHMS:
            return f"{self.algorithm}, {policy} policy"
        name = self.config["args"]["exp_name"]
        own = "" if name in ALGORITHMS else f" ({name})"
        return LABELS[self.algorithm][policy == "exploitation"] + own


def plain(value):
    """A copy of something read from a run in whose texts no HTML, Markdown or terminal code is left."""
    if isinstance(value, str):
        return re.sub(r"""[&<>"'|*\[\]`\\\x00-\x1f\x7f-\x9f]""", lambda match: f"&#{ord(match[0])};", value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


@cache
def parsed(script, *argv):
    """dict of the settings that a script makes of a command line, and its budgets' names; {} if it refuses it."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            module = importlib.import_module(script)
            return json.loads(json.dumps(asdict(module.parse_args(list(argv))))), module.BUDGETS
    except SystemExit:
        return {}, ()


def identify(config):
    """Name in ALGORITHMS of a run, from its settings: of those whose flags it has, the one with most. A changed script
    under another name is an algorithm of that name and --exp-name."""
    script, task = config["script"], ("--env-id", config["args"]["env_id"])
    words = shlex.split(unescape(config.get("command") or script))  # plain() has escaped its quotes
    name, file = plain(Path(words[0]).stem), ROOT / f"{script}.py"
    mine = {algorithm: what for algorithm, what in ALGORITHMS.items() if what.script == file.name}
    if not mine:
        return script
    if name != script and config.get("script_sha256") != hashlib.sha256(file.read_bytes()).hexdigest():
        own = config["args"]["exp_name"]
        return name if own == name else f"{name} {own}"
    usual, best, most = parsed(script, *task)[0], next(iter(mine)), 0
    for name, what in mine.items():
        settings = parsed(script, *task, *merged(what.flags))[0]
        differ = [k for k, v in settings.items() if v != usual[k] and k not in ("retrain_at", "offline_steps")]
        if len(differ) > most and all(config["args"].get(k) == settings[k] for k in differ):
            best, most = name, len(differ)
    return best


def measures(summary):
    """Numbers of an evaluation, {"score", "success", "far", "episodes"}; rates in per cent."""
    values = {"score": summary["eval/normalized_score"], "success": 100 * summary["eval/success_rate"],
              "episodes": int(summary["eval/episodes"])}
    if summary.get("eval/far_success_rate") is not None:
        values["far"] = 100 * summary["eval/far_success_rate"]
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"an evaluation of {values}")
    return values


def read_run(path):
    """The Record of a run directory, after trying on it what the report does with a run."""
    config, results = plain(json.loads((path / "config.json").read_text())), path / "results.json"
    record = Record(path, plain(path.as_posix()), identify(config), config["args"]["env_id"],
                    int(config["args"]["seed"]), config, [config, *config.get("resumed", ())],
                    plain(json.loads(results.read_text())) if results.exists() else None,
                    read_records(path / "metrics.jsonl"))
    for row in record.results["rows"] if record.results and record.env_id not in POINTMASS else ():
        for kind, policy in (("exploration", "exploration"), ("policy", "exploration"),
                             ("exploitation", "exploitation")):
            if row.get(kind) and not (config["args"].get("exploit_only") and kind == "exploration"):  # its source's
                record.cells[policy][int(row["env_step"])] = measures(row[kind])
    for policy, values in record.cells.items():
        for t in values:
            group = Group(policy, settings_of(record, policy, t), {record.seed: record})
            group.details(), group.divergence(), group.shares(True), group.shares(False)
            record.label(policy), read_at(record, policy, 1)
    for policy, kind in itertools.product(record.cells, ("curves", "retrain")):
        points(record, kind, policy, "score")
    if record.results and record.env_id in POINTMASS:
        pointmass_table(record)
    small_run(record), provenance([record])
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
            except Exception as error:  # whatever is in the files must not end the report
                reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
                line = f"{path.as_posix()} is left out, it cannot be read: {reason}"
                left_out.append(plain(line))
                print(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line), file=sys.stderr)
    by_id = {record.config["run_id"]: record for record in records if "run_id" in record.config}
    for record in records:
        record.source = by_id.get(record.config.get("source_run_id"))
    if not records:
        fail(f"no run directory (config.json, metrics.jsonl) in {' '.join(args.folders)}; start some with reproduce.py")
    return records, left_out


def points(record, kind, policy, measure):
    """{x: y} of a run in a kind of panel; {} where the policy has no part in it. Pretraining's evaluations are at
    x <= 0 (gradient steps before the online phase)."""
    retrained, found = policy == "exploitation", {}
    if retrained and kind in ("curves", "exploitation"):
        return {t: values[measure] for t, values in record.cells[policy].items() if measure in values}
    if kind == "exploitation" or retrained != (kind == "retrain" or kind.startswith("losses/")):
        return {}
    last = max((int(x["env_step"]) for x in record.metrics if x["phase"] == "retrain"), default=None)
    for x in record.metrics:
        t, step, offline = int(x["env_step"]), int(x["grad_step"]), int(record.config["args"].get("offline_steps", 0))
        value = x.get(kind)
        if kind in ("curves", "exploration", "retrain") and "eval/normalized_score" in x:
            value = measures(x).get(measure)
        if value is not None and (x["phase"] == "retrain") == retrained and (not retrained or t == last):
            found[step if retrained else t if x["phase"] == "online" else step - offline] = value
    return found


def successes(record, t, far):
    """Percentage of the online episodes up to t that were a success (far: of those from far starts), or None."""
    task = getattr(importlib.import_module(record.config["script"]), "TASKS", {}).get(record.env_id)
    found = [x["success"] for x in (record.results or {}).get("training_episodes") or () if x["env_step"] <= t
             and (not far or x.get("start_distance", 0) > getattr(task, "far", 2))]
    return 100 * float(np.mean(found)) if found else None


# === settings ===
def small_run(record):
    """Whether a finished run has the sizes of reproduce.py's small preset."""
    args, what = record.config["args"], ALGORITHMS.get(record.algorithm)
    if not record.results or record.env_id not in SMALL or not what or what.script.startswith(("calql", "rlpd")):
        return False
    wanted = parsed(record.config["script"], "--env-id", record.env_id, *small(record.env_id, record.algorithm),
                    "--scale", str(args.get("scale", 1.0)))[0]
    names = ("online_steps", "offline_steps", "hidden_dims", "dataset_id")
    return bool(wanted) and all(args.get(name) == wanted.get(name) for name in names)


def bears_on(setting, record, policy):
    """Whether a setting of a run has a part in the scores of its policy."""
    without_rnd = record.config["args"].get("intrinsic_reward_scale") == 0
    return not (setting in NEUTRAL or policy == "exploration" and EXPLOITATION_ONLY.match(setting)
                or without_rnd and setting.startswith("rnd_"))


def settings_of(record, policy, t):
    """dict of all that must be equal for two runs to be averaged."""
    args = record.config["args"]
    kept = {k: v for k, v in args.items() if bears_on(k, record, policy)}
    if args.get("warm_start") or args.get("sync"):  # a retraining is begun with the one before
        kept["retrain_at"] = args["retrain_at"]
    data = record.config.get("dataset") or {}
    # A random subset of the data is another one for every seed.
    kept["data"] = data.get("source") if kept.get("data_subset") else data.get("sha256")
    kept["script"] = history(script_id(start) for start in record.starts)
    if record.source:
        kept["script of the source"] = history(script_id(start) for start in record.source.starts)
    for name in dict.fromkeys(name for start in record.starts for name in start["versions"]):
        kept[f"version of {name}"] = history(start["versions"].get(name) for start in record.starts)
    return {**kept, "t": t, "episodes": record.cells[policy][t]["episodes"]}


def script_id(start):
    """What says which text a script had; the commit alone does not."""
    return (start.get("script_sha256") or "")[:12] or f"unknown (commit {start.get('commit')})"


def history(values):
    """The value of each start of a run as one text, without repetitions: "2.13.0" or "2.13.0 then 2.14.0"."""
    return " then ".join(str(value) for value, _ in itertools.groupby(values))


# === cells ===
@dataclass
class Group:
    """Runs of one cell that may be averaged: {seed: record}."""

    policy: str
    settings: dict
    seeds: dict

    @property
    def record(self):
        return next(iter(self.seeds.values()))

    def values(self, measure):
        """{seed: value}, of the seeds that have it."""
        found = {seed: r.cells[self.policy][self.settings["t"]].get(measure) for seed, r in self.seeds.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def shares(self, far):
        found = [successes(r, self.settings["t"], far) for r in self.seeds.values()]
        return [value for value in found if value is not None]

    @property
    def scale(self):
        """t over the paper's, or None."""
        t, r = self.settings["t"], self.record
        return t / table_time(r.env_id, r.algorithm) if t and r.algorithm in ALGORITHMS else None

    def details(self):
        """Seeds, episodes, time, and its share of the paper's, in a few words."""
        seeds, episodes, scale = len(self.seeds), self.settings["episodes"], self.scale
        return (f"{seeds} seed{'s' * (seeds > 1)}, {episodes} episode{'s' * (episodes > 1)}, "
                f"t = {steps(self.settings['t'])}" + (f" (scale {scale:.3g})" if scale else "")
                + " ‡" * bool(self.departures()))

    def departures(self):
        """What is not as in the paper, ["goal_x 10 instead of 20"]: settings, budgets whose share of the paper's is not
        that of t, what a run of an older script has no setting for, what changed between the starts of a run."""
        record, words, scale = self.record, [], self.scale or 1
        usual, budgets = ({}, ()) if record.algorithm not in ALGORITHMS else parsed(
            record.config["script"], "--env-id", record.env_id, *paper(record.env_id, record.algorithm))
        usual = {k: v for k, v in usual.items() if bears_on(k, record, self.policy) and k != "online_steps"}
        missing = sorted(usual.keys() - self.settings.keys())
        for k, v in usual.items():
            mine = self.settings.get(k, v)
            if k in budgets:
                words += [f"{k} {mine} of {v}"] * (abs(mine - scale * v) > max(1, 0.01 * scale * v))
            elif mine != v:
                words.append(f"{k} {mine} instead of {v}")
        words += [f"{k} {v}" for k, v in self.settings.items()
                  if (k == "script" or k.startswith("version of ")) and " then " in v]
        return words + [f"made before there was {x}" for x in missing]

    def divergence(self):
        """The seeds whose values passed what rewards can give: ["seed 3 (7.1e+06 at online step 1200, ...)"]."""
        key = self.policy if self.policy == "exploration" else f"exploitation {self.settings['t']}"
        said = [(seed, (r.results or {}).get("diverged") or {}) for seed, r in sorted(self.seeds.items())]
        found = [(seed, x.get(key) or x.get("policy")) for seed, x in said]  # a baseline has one policy
        return [f"seed {seed} ({x['magnitude']:.2g} at {x['phase']} step "
                f"{x['env_step' if x['phase'] == 'online' else 'grad_step']}, ceiling {x['ceiling']:.2g})"
                for seed, x in found if x]


def steps(n):
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k" if n >= 1000 else str(n)


def read_at(record, policy, t):
    """Time of the policy's last final evaluation not after t (at the run's --scale, or where the online budget does not
    reach it, t's share of the budget), or None."""
    args = record.config["args"]
    t, full = t * args.get("scale", 1.0), parsed(record.config["script"], "--env-id", record.env_id)[0]
    if args["online_steps"] < round(t) and full:
        t = t * args["online_steps"] / (full["online_steps"] * args.get("scale", 1.0))
    return max((k for k in record.cells[policy] if 0 < k <= round(t)), default=None)


def grouped(chosen, args):
    """The groups of a cell, the one with most seeds first. chosen: [(record, policy, t)]."""
    groups = []
    for record, policy, t in chosen:
        settings = settings_of(record, policy, t)
        group = next((g for g in groups if g.settings == settings), None)
        if group is None:
            groups.append(group := Group(policy, settings, {}))
        other = group.seeds.setdefault(record.seed, record)
        source = record.config.get("source_run_id")
        same = [r for r in group.seeds.values() if source and r.config.get("source_run_id") == source]
        if len(same) > 1:
            fail(f"{same[0].name} and {same[1].name} are retrainings on the data of one run, not two seeds; leave one "
                 "out with --exclude")
        if other.cells[policy][t] != record.cells[policy][t]:
            fail(f"{record.name} and {other.name} are the same seed with the same settings but other scores; "
                 "leave one out with --exclude")
    if len(groups) > 1 and not args.mixed:
        fail(f"{why_not_averaged(groups[0], groups[1])}; keep them in folders of their own, leave some out with "
             "--exclude, or show them side by side with --mixed")
    return sorted(groups, key=lambda g: -len(g.seeds))


def why_not_averaged(a, b):
    """One line: which runs of a cell differ, and in what."""
    differ = [k for k in {**a.settings, **b.settings} if a.settings.get(k) != b.settings.get(k)]
    what = ", ".join(f"{k} {a.settings.get(k)} and {b.settings.get(k)}" for k in differ[:4])
    return (f"{a.record.name} and {b.record.name} are not averaged: {what}"
            + (f" and {len(differ) - 4} more" if len(differ) > 4 else ""))


# === statistics ===
def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def t_interval(values):
    """95 % interval of the mean of two or more values."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * standard_error(values)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def sign_flip(differences, draws=1 << 20):
    """Two-sided p of a mean difference of 0: the share of the sign patterns whose sum is as far from 0 as the observed
    one. Exact up to 20 differences; above that as many random patterns as 20 have, the observed one among them."""
    d = np.asarray(differences, dtype=float)
    if len(d) <= 20:
        sums = np.zeros(1)
        for x in d:
            sums = np.concatenate([sums + x, sums - x])
    else:
        signs, sums = np.random.default_rng(0), np.full(draws, d[0])
        for x in d[1:]:
            sums += x * (1 - 2 * signs.integers(0, 2, draws))
        sums[0] = d.sum()
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()))


def holm(ps):
    """p values corrected for their number, in their order."""
    order, n = np.argsort(ps), len(ps)
    corrected = np.empty(n)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.sort(ps) * (n - np.arange(n))))
    return corrected.tolist()


def mean_interval(values, limits=(-math.inf, math.inf)):
    """ "mean [low, high]"; of a rate the interval is cut to what a rate can be."""
    low, high = np.clip(t_interval(values), *limits) if len(values) > 1 else (None, None)
    return f"{np.mean(values):.1f}" + (f" [{low:.1f}, {high:.1f}]" if len(values) > 1 else "")


def limits_of(measure, task):
    """What a mean of a measure can be."""
    return (0, 100) if measure != "score" or task.endswith("binary-v0") else (-math.inf, math.inf)


def primary(env_id):
    """What decides on a task."""
    return "far" if env_id.startswith(("maze2d", "antmaze")) else "score"


def comparisons(pairs, tasks, cells, measure_of):
    """Lines of a table: each method against another on each task, paired by seed. cells: {(task, column): groups}."""
    lines, notes = [], []
    for method, other in pairs:
        rows = []
        for task in tasks:
            a, b = cells.get((task, method), ()), cells.get((task, other), ())
            if len(a) != 1 or len(b) != 1:
                continue
            times = [group.settings["t"] for group in (a[0], b[0])]
            if times[0] != times[1]:
                notes.append(f"- {task}: {method} is read at t = {steps(times[0])}, {other} at t = {steps(times[1])}; "
                             "not compared.")
                continue
            measure = measure_of(task)
            a, b = a[0].values(measure), b[0].values(measure)
            common = sorted(a.keys() & b.keys())
            if len(common) < 2:
                notes.append(f"- {task}: {method} and {other} have fewer than 2 seeds in common; not compared.")
                continue
            differences = [a[seed] - b[seed] for seed in common]
            rows.append((task, measure, len(common), mean_interval(differences), sign_flip(differences)))
        for (task, measure, n, text, p), corrected in zip(rows, holm([row[-1] for row in rows]), strict=True):
            lines.append(f"| {method} - {other} | {task} | {MEASURES[measure]} | {n} | {text} | {p:.2g} | "
                         f"{corrected:.2g} |")
    head = ["| difference | task | of | seeds | mean [95 % interval] | p | p, Holm |", "|---|---|---|---|---|---|---|"]
    after = ["", f"p: exact sign-flip test of differences paired by seed, two-sided; with n seeds it cannot be below "
                 f"2 / 2^n. Holm: over the tasks of a comparison. {COVERAGE}", ""]
    return ["", *head, *lines, *after] * bool(lines) + notes


COVERAGE = ("Intervals are t intervals over seeds. Simulated (tools/coverage.py), those of 5, 10 and 20 seeds hold the "
            "mean in 95, 95 and 95 % of experiments with normal scores, in 82, 84 and 87 % with lognormal ones; of a "
            "difference of two lognormal ones in 97, 97 and 96 %.")


# === tables ===
def notes(cells):
    """Lines on what the cells {(task, label): groups} depart in, which seeds diverged, and what was not averaged."""
    found, every, lines = {}, {}, {}  # {(mark, note): {task: [labels]}}
    for (task, label), groups in cells.items():
        every.setdefault(task, []).append(label)
        marked = {("‡ ", word): 0 for group in groups for word in group.departures()}
        marked |= {("diverged, mean |Q| or |V| above what rewards can give: ", x): 0 for g in groups
                   for x in g.divergence()}
        marked |= {("", why_not_averaged(groups[0], group)): 0 for group in groups[1:]}
        for note in marked:
            found.setdefault(note, {}).setdefault(task, []).append(label)
    for (mark, note), where in found.items():
        text = "all" if where == every else "; ".join(
            f"{task}, {'all' if labels == every[task] else ', '.join(labels)}" for task, labels in where.items())
        lines.setdefault((text, mark), []).append(note)
    return ["", *(f"- {text}: {mark}{', '.join(words)}." for (text, mark), words in lines.items()), ""]


def last_cells(records):
    """{(task, label): [(record, policy, t)]} of all policies at their last t."""
    chosen = {}
    for record in records:
        for policy, values in record.cells.items():
            if values:
                chosen.setdefault((record.env_id, record.label(policy)), []).append((record, policy, max(values)))
    return chosen


def paper_cells(name, records):
    """The same of a table's or figure's tasks and policies, at the t of the paper's tables. A figure compares: of a
    task it needs two algorithms."""
    chosen, columns = {}, [head.removesuffix(" @ 250k") for head in PAPER.get(name, {}).get("columns", ())]
    curves = {"curves", "rnd/online_scaled_mean"} & set(FIGURES.get(name, ("", ("curves",)))[1])
    for tasks, algorithms in TARGETS[name]:
        for task in tasks:
            shown = [r for r in records if r.env_id == task and r.algorithm in algorithms]
            for record in shown if columns or len({r.algorithm for r in shown}) > 1 else ():
                for policy in record.cells if curves else ("exploitation",):
                    label = LABELS[record.algorithm][policy == "exploitation"]
                    t = read_at(record, policy, table_time(task, record.algorithm))
                    if t and (label in columns or not columns):
                        chosen.setdefault((task, label), []).append((record, policy, t))
    return chosen


def section(name, title, text, chosen, kinds, pairs, measure_of, args, pictures):
    """Markdown of a table of final evaluations, a row for each task and measure and a column for each policy, with
    notes, comparisons and a picture, and its groups; "" without runs. chosen: see last_cells()."""
    cells = {key: grouped(runs, args) for key, runs in chosen.items()}
    if not cells:
        return "", []
    place = lambda x, order: (order.index(x) if x in order else len(order), x)  # noqa: E731
    shown = PAPER.get(name, {})
    order = list(dict.fromkeys([*SMALL, *(x for i in (1, 2, 3) for x in TARGETS[f"table{i}"][0][0])]))
    tasks = [x for x in order if x in shown] or sorted({x for x, _ in cells}, key=lambda x: place(x, order))
    columns = shown.get("columns") or sorted({label for _, label in cells}, key=lambda x: place(x, ORDER))
    lines = ["| | | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    columns = [label.removesuffix(" @ 250k") for label in columns]
    cells = {key: cells[key] for key in itertools.product(tasks, columns) if key in cells}
    for task in tasks:
        groups = [cells.get((task, label), []) for label in columns]
        rows = {"": [[g.details() for g in mine] or ["missing"] * bool(shown) for mine in groups]}
        for measure, words in MEASURES.items():
            rows[words] = [[mean_interval(values, limits_of(measure, task))
                            + f" ({len(values)} of {len(g.seeds)} seeds)" * (len(values) < len(g.seeds)) for g in mine
                            if (values := list(g.values(measure).values()))] for mine in groups]
        rows["paper: score ± standard error"] = [[f"{x:g} ± {error:g}"] for x, error in shown.get(task, ())]
        for words, far in (("episodes of D_on with success, %", False), ("the same from far starts, %", True)):
            rows[words] = [[f"{np.mean(g.shares(far)):.1f}" for g in mine if g.shares(far)] for mine in groups]
        lines += [f"| {task} | {words} | " + " | ".join(map("<br>".join, texts)) + " |"
                  for words, texts in rows.items() if any(texts)]
    if kinds:
        pictures[f"{name}.png"] = draw(tasks, columns, kinds, cells, measure_of)
        lines += ["", f"![{title}]({name}.png)", "", "Thin lines and dots are seeds, thick lines and bars their means. "
                  "Lines are the evaluations of the curves. Stars, dots and bars with their 95 % intervals are final "
                  "evaluations."]
    return "\n".join([f"## {title}", "", text, "", *lines, *comparisons(pairs, tasks, cells, measure_of),
                      *notes(cells)]), [g for groups in cells.values() for g in groups]


# === pictures ===
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#17BECF",
           "#9467BD", "#BCBD22")
AXES = {"curves": "environment steps (below 0: pretraining, gradient steps)", "exploitation": "environment steps t",
        "rnd/online_scaled_mean": "environment steps"}
VALUES = {"losses/q_mean": "mean Q of a batch", "rnd/online_scaled_mean": "scaled intrinsic reward, last 1000 steps"}


def draw(tasks, columns, kinds, cells, measure_of):
    """PNG with a row of panels for each task. The legend stands below them, so that it covers no line."""
    fig = Figure(figsize=(max(4.6 * len(kinds), 7), 3.1 * len(tasks) + 0.8), layout="constrained", dpi=110)
    colours = dict(zip(columns, itertools.cycle(COLOURS), strict=False))
    for row, task in zip(fig.subplots(len(tasks), len(kinds), squeeze=False), tasks, strict=True):
        groups = [(label, i, g) for label in columns for i, g in enumerate(cells.get((task, label), ()))]
        measure = measure_of(task) if all(g.values(measure_of(task)) for _, _, g in groups) else "score"
        for ax, kind in zip(row, kinds, strict=True):
            ax.set_title(task, loc="left", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
            ax.set_xlabel(AXES.get(kind.replace("exploration", "curves"), "gradient steps of the last retraining"),
                          fontsize=8)
            ax.set_ylabel(VALUES.get(kind, MEASURES[measure]), fontsize=8)
            if kind == "dots":
                draw_dots(ax, task, groups, colours, measure)
                continue
            for label, i, group in groups:
                found = [x for r in group.seeds.values() if (x := points(r, kind, group.policy, measure))]
                star = "*" if group.policy == "exploitation" and kind in ("curves", "exploitation") else None
                draw_lines(ax, found, colours[label], ("-", "--", ":", "-.")[i % 4], star)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if kind.startswith("losses/"):
                ax.set_yscale("symlog")
    fig.legend(handles=[Line2D([], [], color=colours[x], lw=2, label=x) for x in columns], loc="outside lower center",
               ncols=4, frameon=False, fontsize=8)
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return file.getvalue()


def draw_lines(ax, lines, colour, style, marker):
    """Thin: lines [{x: y}] of seeds; thick: their mean where all have values, in between interpolated."""
    for line in lines if len(lines) > 1 else ():
        ax.plot(*zip(*sorted(line.items()), strict=True), color=colour, lw=0.7, alpha=0.35, ls=style)
    if lines:
        xs = np.unique([x for line in lines for x in line])
        xs = xs[(xs >= max(map(min, lines))) & (xs <= min(map(max, lines)))]
        mean = np.mean([np.interp(xs, sorted(line), [line[x] for x in sorted(line)]) for line in lines], axis=0)
        ax.plot(xs, mean, color=colour, lw=2, ls=style, marker=marker, ms=7)


def draw_dots(ax, task, groups, colours, measure):
    """A row for each policy: a dot for each seed, a bar at the mean, a line for its interval."""
    for y, (label, _, group) in enumerate(groups):
        values = list(group.values(measure).values())
        spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0]
        ax.plot(values, y + np.array(spread), "o", ms=4, alpha=0.5, mew=0, color=colours[label])
        ax.plot([np.mean(values)] * 2, [y - 0.35, y + 0.35], lw=2.5, color=colours[label])
        if len(values) > 1:
            ax.plot(np.clip(t_interval(values), *limits_of(measure, task)), [y, y], lw=1, color=colours[label])
    ax.set_yticks(range(len(groups)), [f"{label} ({len(g.seeds)})" for label, _, g in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel(MEASURES[measure], fontsize=8)
    ax.set_ylabel("policy (seeds)", fontsize=8)


def figure2(records, pictures):
    """The point mass: its own pictures, and its tables as they were measured. Markdown, or ""; and the records."""
    parts, found = [], [r for r in records if r.env_id in POINTMASS and (r.path / "figure2.png").exists()]
    for i, record in enumerate(found):
        name = f"figure2_{i}.png" if i else "figure2.png"
        pictures[name] = (record.path / "figure2.png").read_bytes()
        first, *lines = pointmass_table(record)
        parts += [first, "", f"![Figure 2]({name})", "", *lines, ""]
    return "\n".join(["## Figure 2: point mass and wall", "", *parts]) if parts else "", found


def mean_error(values):
    return f"{np.mean(values):.1f}" + (f" ± {standard_error(values):.1f}" if len(values) > 1 else "")


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
    lines.append(f"| shortest way under / over the wall | {shortest} | | |")
    return lines + [f"\nDiverged: {name} ({x['magnitude']:.2g} at {x['phase']} step {x['grad_step']}, ceiling "
                    f"{x['ceiling']:.2g})" for name, x in (results.get("diverged") or {}).items()]


def figure6(folders, pictures):
    """The picture of the reduced data sets, where reproduce.py left one; else ""."""
    found = next((path for folder in folders if (path := Path(folder) / "figure6.png").exists()), None)
    if not found:
        return ""
    pictures["figure6.png"] = found.read_bytes()
    return "## Figure 6: the reduced data sets and their environments\n\n![Figure 6](figure6.png)\n"


# === the report ===
def provenance(records, left_out=()):
    """A table of the runs: what each is, and from where; and what could not be read."""
    lines = ["## Runs", "", "| run | algorithm | seed | script's SHA-256 | offline / online / retrain steps | hardware "
             "| |", "|---|---|---|---|---|---|---|"]
    for r in records:
        a = r.config["args"]
        budget = " / ".join(steps(a.get(k, 0)) for k in ("offline_steps", "online_steps", "retrain_steps"))
        machines = [start["hardware"] for start in r.starts]
        where = history(", ".join([h["gpu"] or f"{h['cores']} x {h['cpu']}", h.get("cpu_capability") or "",
                                   h["matmul_precision"]]) for h in machines)
        script, state = history(map(script_id, r.starts)), "" if r.results else "unfinished"
        lines.append(f"| {r.name} | {r.algorithm} | {r.seed} | {script} | {budget} | {where} | {state} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in left_out), ""])


def html(text, pictures):
    """One page with the pictures inside."""
    import markdown

    def inline(match):
        return f'src="data:image/png;base64,{base64.b64encode(pictures[match[1]]).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', inline, markdown.markdown(text, extensions=["tables"]))
    style = ("body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:4px 8px;"
             "text-align:left;vertical-align:top}")
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>OOO: report</title><style>{style}' \
           f"</style></head><body>{body}</body></html>"


ITEMS = ["small", *(f"table{i}" for i in (1, 2, 3)), *(f"figure{i}" for i in range(2, 15)), "other"]


KINDS = ("exploration", "retrain", "dots")
SMALL_WORDS = ("The study and the small preset", "Means over seeds [95 % interval]. Not the paper's budgets and "
               "networks. D_on: the data of the online phase; D_off: the offline data.")
OTHER_WORDS = ("Other runs", "Runs that have no place above: the last policies, means over seeds [95 % interval].")


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
    smalls = [r for r in records if r.results and small_run(r)]
    others = [r for r in records if r.results and r not in smalls]
    parts, pictures, used = [], {}, set()
    for name in wanted:
        groups = []
        if name == "small":
            text, groups = section(name, *SMALL_WORDS, last_cells(smalls), KINDS, STUDY_PAIRS, primary, args, pictures)
        elif name == "other":
            rest = [r for r in others if r.path not in used]
            text, groups = section(name, *OTHER_WORDS, last_cells(rest), KINDS, STUDY_PAIRS, primary, args, pictures)
        elif name in FIGURES or name in PAPER:
            words, kinds = FIGURES.get(name, (f"the paper's budget: {PAPER.get(name, {}).get('budget')}", ()))
            title, pairs = name.replace("table", "Table ").replace("figure", "Figure "), () if kinds else PAIRS
            text, groups = section(name, f"{title}: {words}", "Means over seeds [95 % interval].",
                                   paper_cells(name, others), kinds, pairs, lambda _: "score", args, pictures)
        else:
            text, found = figure2(others, pictures) if name == "figure2" else (figure6(args.folders, pictures), ())
            used |= {r.path for r in found}
        used |= {r.path for group in groups for r in group.seeds.values()}
        parts.append(text or f"## {name}\n\nNo finished run has a part in it.\n" * (name in args.only))
    head = ("# OOO: measured beside the paper\n\nThe last policy at t, never the best, in its final evaluation. The "
            f"paper's: {PAPER['source']} Runs at a scale below 1, or on regenerated data, are not comparable with "
            "them.\n")
    text = "\n\n".join([head, *filter(None, parts), provenance(records, left_out)])
    out = output_folder(args.out, "--out")  # all is computed: nothing half-made is left by what stops the report
    for name, content in pictures.items():
        write_whole(out / name, content)
    write_whole(out / "report.md", text.encode())
    write_whole(out / "report.html", html(text, pictures).encode())
    unfinished = sum(r.results is None for r in records)
    words = [f"{n} {what}" for n, what in ((unfinished, "unfinished"), (len(left_out), "left out")) if n]
    print(f"{len(used)} of {len(records) + len(left_out)} runs{' (' + ', '.join(words) + ')' if words else ''} are in "
          f"{out / 'report.md'} and {out / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
