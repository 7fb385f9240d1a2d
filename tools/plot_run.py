"""Draw a run of any script: learning curves, intrinsic reward and, in the mazes, where data and policies went.

    python tools/plot_run.py runs/maze2d-missing-data-large-v1__iql_ooo__1              # writes figure.png in the run
    python tools/plot_run.py runs/pen-binary-v0__*__* --out pen.png                     # compares several runs
    python tools/plot_run.py runs/point-mass-wall__pointmass_didactic__1 --out way.png  # by bonus coefficient

One run: the exploration policy's normalised score (steps before 0 are pretraining), each exploitation policy's score
during its retraining, the intrinsic reward of the last 1000 online steps, and for the mazes the offline data, the
online visits, and trajectories of the saved policies, rolled out here from the same start states (antmaze draws a goal
for each episode; their mean is shown). td3_rnd.py and pex.py have one policy only. Shaded: standard error over the
episodes of an evaluation. The data panel needs the offline data; without it, the panel says so. Of the point mass:
the share of episodes that reach the goal, and that go under the wall, of each policy and seed.

Several runs: a row for each task. Colour is the experiment (--exp-name), every seed has its own line, stars are
exploitation policies; on the right the last policies, a line joining exploration and exploitation of one seed.
"""

import importlib
import io
import json
import os
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import tyro

os.environ["MPLBACKEND"] = "agg"  # matplotlib does not even load with a name that it does not know
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reproduce import ALGORITHMS, check_ranges, fail, output_folder, read_records, run_main, script_of, write_whole  # noqa: E402

SCRIPTS = {Path(algorithm.script).stem for algorithm in ALGORITHMS.values()}
BASELINES = {"td3_rnd", "pex"}  # one policy, no retraining
# Settings that not every script has.
ABSENT = dict(offline_steps=0, retrain_at=[], exploit_only="", remove_discs=[], save_at=[])
EXPLORE, EXPLOIT, REACHED, MISSED = "#0072B2", "#D55E00", "#009E73", "#B0527A"  # readable for colour-blind eyes too
GROUPS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 160,
}
MAX_POINTS = 40_000  # of one scatter


@dataclass
class Args:
    run_dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """RUN_DIR of a run; several are compared in one figure."""
    out: str = ""
    """File of the figure. Default for one run: RUN_DIR/figure.png; needed for several."""
    episodes: int = 10
    """Episodes of each policy in the maze panels."""


# === reading a run ===
def open_run(folder):
    """A run directory as a namespace: path, script (module), args, config, metrics and errors, the standard error of
    each evaluation by (phase, env_step, grad_step). Exit 2 if it is not a run, or if it has no evaluation."""
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
        if config["script"] not in SCRIPTS:
            raise ValueError(f"written by {config['script']!r}, no script of this repository")
        args = SimpleNamespace(**ABSENT | config["args"])
        metrics, episodes = read_records(path / "metrics.jsonl"), path / "evals.jsonl"
        places = [(record["phase"], record["env_step"], record["grad_step"]) for record in metrics]
        script, errors = script_of(config), {}
        far = any("eval/far_success_rate" in record for record in metrics)  # a maze: the measure of the tables
        for record in metrics:
            if "eval/normalized_score" in record:
                record["drawn"] = 100 * record.get("eval/far_success_rate", np.nan) if far else (
                    record["eval/normalized_score"])
        if config["script"] != "pointmass_didactic":
            for record in read_records(episodes) if episodes.exists() else ():
                scores = [episode_score(script, args.env_id, episode, far) for episode in record["episodes"]]
                scores = [score for score in scores if score is not None] or [np.nan]
                errors[record["phase"], record["env_step"], record["grad_step"]] = np.std(scores) / len(scores) ** 0.5
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{folder} is not a readable run ({type(error).__name__}: {error}); give the folder of a run")
    if not places or not any("eval/success_rate" in record for record in metrics):
        fail(f"{folder} has no evaluation in metrics.jsonl yet; nothing to draw")
    return SimpleNamespace(path=path, script=script, args=args, config=config, metrics=metrics, errors=errors,
                           baseline=config["script"] in BASELINES,
                           measure="success from far starts, %" if far else "normalised score")


# === what this takes from the scripts ===
def episode_score(script, env_id, episode, far):
    """What is drawn of an episode; far: success, None from a near start."""
    key, low, high = script.TASKS[env_id].score
    if far:
        return 100 * episode["success"] if episode["start_distance"] > script.TASKS[env_id].far else None
    return 100 * (episode[key] - low) / (high - low)


def maze_of(script, env_id):
    """(environment, position of the goal, its radius) of a maze task, else None."""
    if not env_id.startswith(("maze2d", "antmaze")):
        return None
    env = script.make_env(env_id)
    offset = script.ANTMAZE_DATA_GOAL_OFFSET if "antmaze" in env_id else 0
    return env, np.add(env.center, offset), script.GOAL_RADIUS


def roll_out(run, env, file, episodes):
    """Episodes of a saved policy as evaluate's dicts, each with its path (length, 2). The seed is that of --eval-only:
    start states that training has not used."""
    policy, positions = run.script.load_policy(file), []

    def act(obs):
        positions.append(obs[:2].copy())
        return policy.act(obs)

    results, _ = run.script.evaluate(
        env, SimpleNamespace(act=act), episodes, run.script.derive_seed(run.args.seed, "eval-only"))
    paths = np.split(np.array(positions), np.cumsum([episode["length"] for episode in results])[:-1])
    return [episode | {"path": path} for path, episode in zip(paths, results, strict=True)]


# === curves ===
def evaluations(run, *phases, env_step=None):
    """Evaluations of some phases: x (n,), what is drawn (n,), its standard error (n,). x: environment steps, before
    0 for pretraining; gradient steps for retraining."""
    rows = []
    for record in run.metrics:
        phase, t, step = record["phase"], record["env_step"], record["grad_step"]
        if phase in phases and "drawn" in record and env_step in (None, t):
            x = {"pretrain": step - run.args.offline_steps, "online": t, "retrain": step}[phase]
            rows.append((x, record["drawn"], run.errors.get((phase, t, step), 0.0)))
    return np.array(rows, float).reshape(-1, 3).T


def exploitation(run):
    """{t: what is drawn of the exploitation policy at the end of its retraining}."""
    evaluated = [r for r in run.metrics if r["phase"] == "retrain" and "drawn" in r]
    return {r["env_step"]: r["drawn"] for r in evaluated}  # the last one of each t stays


def explorer_of(run):
    """The run that explored: itself, or the one that --exploit-only names; None if that one is not here."""
    if not run.args.exploit_only:
        return run
    source = Path(run.args.exploit_only)
    found = open_run(source) if (source / "config.json").exists() else None
    return found if found and found.config["run_id"] == run.config["source_run_id"] else None


# === one run: its panels ===
def draw_curve(ax, x, score, error, color, **style):
    ax.plot(x, score, color=color, marker="o", markersize=2.5, linewidth=1.4, **style)
    ax.fill_between(x, score - error, score + error, color=color, alpha=0.15, linewidth=0)


def draw_mean(ax, lines, color, **style):
    """The mean of lines {x: y} at the x that all of them have."""
    common = sorted(set.intersection(*map(set, lines)))
    if len(lines) > 1 and common:
        ax.plot(common, [np.mean([line[x] for line in lines]) for x in common], color=color, linewidth=2, **style)


def score_axis(ax, measure):
    """At least ten points high, so that noise around a constant score does not look like learning."""
    low, high = ax.get_ylim()
    margin = max(0.0, 10 - (high - low)) / 2
    ax.set(ylim=(low - margin, high + margin), ylabel=measure)


def steps_axis(ax, label, title):
    ax.set(xlabel=label, title=title)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def time_colors(times):
    return dict(zip(times, plt.get_cmap("plasma")(np.linspace(0.1, 0.75, len(times))), strict=True))


def draw_exploration(ax, run, explorer):
    """Exploration score against environment steps, and where each exploitation policy ended."""
    if explorer:
        x, score, error = evaluations(explorer, "pretrain", "online")
        draw_curve(ax, x, score, error, EXPLORE, label="policy" if run.baseline else "exploration policy")
        if len(x) and x.min() < 0:
            ax.axvspan(x.min(), 0, facecolor="0.93", edgecolor="0.7", linewidth=0.5, zorder=0, label="pretraining")
    ends, colors = exploitation(run), time_colors(exploitation(run))
    for t, score in ends.items():
        label = "exploitation policy, retrained at t" if t == min(ends) else None
        ax.plot(t, score, "*", markersize=13, color=colors[t], markeredgecolor="white", label=label, zorder=3)
    steps_axis(ax, "environment steps (before 0: gradient steps)", "Learning" if run.baseline else "Exploration")
    score_axis(ax, run.measure)
    ax.legend(loc="best")


def draw_exploitation(ax, run, explorer):
    """Exploitation score against gradient steps, for each t; dashed: the exploration policy at that t."""
    colors = time_colors(exploitation(run))
    at = {}
    if explorer:
        x, score, _ = evaluations(explorer, "online")
        at = dict(zip(x, score, strict=True))
    for t, color in colors.items():
        draw_curve(ax, *evaluations(run, "retrain", env_step=t), color, label=f"t = {EngFormatter(sep='')(t)}")
        if t in at:
            ax.axhline(at[t], color=color, linestyle="--", linewidth=1)
    if at:
        ax.plot([], [], "--", color="0.5", linewidth=1, label="exploration policy at t")
    steps_axis(ax, "gradient steps of the retraining", "Exploitation")
    score_axis(ax, run.measure)
    ax.legend(loc="best") if colors else ax.text(0.5, 0.5, "no retraining yet", transform=ax.transAxes, ha="center")


def draw_intrinsic(ax, explorer):
    """Intrinsic reward of the last 1000 online transitions (paper, Fig. 3 left)."""
    rows = [record for record in explorer.metrics if "rnd/online_mean" in record]
    for key, style in (("mean", "-"), ("scaled_mean", "--"), ("std", ":")):
        x, y = [r["env_step"] for r in rows], [r[f"rnd/online_{key}"] for r in rows]
        ax.plot(x, y, style, color=EXPLORE, linewidth=1.4, label=key.replace("_", " "))
    ax.set(yscale="log", ylabel="intrinsic reward")
    steps_axis(ax, "environment steps", "Intrinsic reward, last 1000 online steps")
    ax.legend(loc="best")


# === one run: mazes ===
def draw_maze(ax, maze_task, discs, title):
    """Walls, the goal disc, and the discs without offline data."""
    env, goal, radius = maze_task
    maze = env.unwrapped.maze
    size, rows, cols = maze.maze_size_scaling, len(maze.maze_map), len(maze.maze_map[0])
    for row, line in enumerate(maze.maze_map):
        for col, cell in enumerate(line):
            if cell == 1:
                x, y = (col - (cols - 1) / 2) * size, ((rows - 1) / 2 - row) * size
                ax.add_patch(Rectangle((x - size / 2, y - size / 2), size, size, color="0.82", linewidth=0))
    for x, y, r in discs:
        ax.add_patch(Circle((x, y), r, fill=False, linestyle="--", linewidth=0.9, color="0.25", zorder=4))
    ax.add_patch(Circle(goal, radius, color="#E69F00", alpha=0.85, linewidth=0, zorder=5))
    ax.set(xlim=np.array([-0.5, 0.5]) * cols * size, ylim=np.array([-0.5, 0.5]) * rows * size, aspect="equal")
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)


def draw_points(ax, positions, **style):
    """A scatter of at most MAX_POINTS of the positions (n, 2), in random order, so that no time hides another."""
    chosen = np.random.default_rng(0).permutation(len(positions))[:MAX_POINTS]
    style = {name: value[chosen] if isinstance(value, np.ndarray) else value for name, value in style.items()}
    return ax.scatter(*positions[chosen].T, s=0.6, linewidths=0, rasterized=True, **style)


def note(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.2", zorder=6,
            bbox={"color": "white", "alpha": 0.8})


def draw_offline_data(ax, run, explorer, maze):
    draw_maze(ax, maze, run.args.remove_discs, "Offline data")
    reason = io.StringIO()
    try:
        with redirect_stderr(reason):  # --data-subset was drawn with the explorer's seed
            data, report = run.script.load_dataset(run.args, maze[0], (explorer or run).args.seed)
    except SystemExit:  # what load_dataset does when the data is not there; the figure goes on without it
        print(f"offline data panel left out: {reason.getvalue().strip().removeprefix('error: ')}")
        return note(ax, "not available here")
    if report["sha256"] != run.config["dataset"]["sha256"]:
        print("offline data panel left out: the data is not what the run was trained on (sha256 differs)")
        return note(ax, "data has changed since the run")
    draw_points(ax, data["observations"][:, :2], color="0.3", alpha=0.5)
    ax.set_title(f"Offline data: {EngFormatter(places=0, sep='')(report['transitions'])} transitions")


def visited(run, dims=2):
    """Positions (n, 2) of the online transitions that the run has kept, in their order; the first dims numbers of
    their observations."""
    done = max(record["env_step"] for record in run.metrics)
    columns = run.config["replay_columns"]  # {name: [start, stop]} of a row of floats
    width, start = max(stop for _, stop in columns.values()), columns["observations"][0]
    rows = np.fromfile(run.path / "replay.bin", np.float32)
    return rows[: len(rows) // width * width].reshape(-1, width)[:done, start : start + dims]


def draw_online_data(ax, run, explorer, maze):
    draw_maze(ax, maze, run.args.remove_discs, "Online visits" if run.baseline else "Online exploration")
    try:
        positions = visited(explorer) if explorer else []
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"online data panel left out: the replay data of {explorer.path} cannot be read ({error})")
        return note(ax, "replay data is damaged")
    if not len(positions):
        return note(ax, "no replay data here")
    points = draw_points(ax, positions, c=np.arange(len(positions)), cmap="viridis")
    steps = EngFormatter(places=0, sep="")
    bar = ax.figure.colorbar(points, cax=ax.inset_axes([0.0, -0.07, 1.0, 0.035]), orientation="horizontal")
    bar.set_ticks([0, len(positions) - 1], labels=["0", f"{steps(len(positions))} steps"])
    bar.outline.set_visible(False)


def draw_policy(ax, run, maze, file, name, episodes):
    """Trajectories of a saved policy from start states that are the same for every policy of the run."""
    draw_maze(ax, maze, run.args.remove_discs, name)
    if not file.exists():
        return note(ax, f"no {file.name} here")
    print(f"rolling out {file.name}, {episodes} episodes", flush=True)
    results = roll_out(run, maze[0], file, episodes)
    for episode in results:
        color = REACHED if episode["success"] else MISSED
        ax.plot(*episode["path"].T, color=color, linewidth=0.9, alpha=0.8, rasterized=True)
        ax.plot(*episode["path"][0], "o", color="black", markersize=2.5)
    score = np.mean([episode_score(run.script, run.args.env_id, episode, False) for episode in results])
    success = np.mean([episode["success"] for episode in results])
    ax.set_title(f"{name}\nscore {score:.1f}, success {success:.0%} of {episodes} episodes")


def draw_mazes(axes, run, explorer, maze, times, episodes):
    """axes (2, 1 + len(times)): offline and online data, then exploration above exploitation for each t."""
    draw_offline_data(axes[0, 0], run, explorer, maze)
    draw_online_data(axes[1, 0], run, explorer, maze)
    for column, t in enumerate(times, start=1):
        where = f"t = {EngFormatter(sep='')(t)}"
        if run.baseline:
            draw_policy(axes[0, column], run, maze, run.path / f"policy_{t}.pt", f"Policy, {where}", episodes)
            axes[1, column].axis("off")
            continue
        source = (explorer or run).path
        draw_policy(axes[0, column], run, maze, source / f"exploration_{t}.pt", f"Exploration, {where}", episodes)
        draw_policy(axes[1, column], run, maze, run.path / f"exploitation_{t}.pt", f"Exploitation, {where}", episodes)
    keys = [Patch(color="#E69F00", label="goal"), Line2D([], [], color=REACHED, label="reached the goal"),
            Line2D([], [], color=MISSED, label="did not"),
            Line2D([], [], marker="o", linestyle="", color="black", markersize=3, label="start")]
    if run.args.remove_discs:
        keys.append(Line2D([], [], linestyle="--", linewidth=0.9, color="0.25", label="offline data removed"))
    axes[0, 0].get_figure(root=False).legend(handles=keys, loc="outside lower center", ncols=len(keys))


def figure_of_run(run, episodes):
    explorer, maze = explorer_of(run), maze_of(run.script, run.args.env_id)
    intrinsic = bool(explorer) and any("rnd/online_mean" in record for record in explorer.metrics)
    panels = 1 + (not run.baseline) + intrinsic
    times = sorted(run.args.save_at if run.baseline else run.args.retrain_at)
    columns = 1 + len(times) if maze else 0
    width = max(3.6 * max(panels, 2), 3.1 * columns)
    heights = [3.0, 2 * 0.82 * width / max(columns, 2) + 0.4] if maze else [3.0]
    fig = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = list(parts[0].subplots(1, panels, squeeze=False)[0])
    draw_exploration(axes.pop(0), run, explorer)
    if not run.baseline:
        draw_exploitation(axes.pop(0), run, explorer)
    if intrinsic:
        draw_intrinsic(axes.pop(0), explorer)
    if maze:
        draw_mazes(parts[1].subplots(2, columns, squeeze=False), run, explorer, maze, times, episodes)
    fig.suptitle(f"{run.args.env_id}, {run.args.exp_name}, seed {run.args.seed}", fontweight="bold")
    return fig


# === the point mass ===
def figure_of_point_mass(run):
    """Of the exploring policies and of the retrained ones: episodes that reach the goal, and that go under the wall; a
    line for each seed, the mean thick, a colour for each bonus coefficient."""
    rows = [record for record in run.metrics if "eval/under" in record]
    phases = [(names, title) for names, title in ((("pretrain", "online"), "own policy"), (("retrain",), "retrained"))
              if any(record["phase"] in names for record in rows)]
    fig, axes = plt.subplots(2, len(phases), figsize=(4.4 * len(phases), 5.6), squeeze=False, sharey=True,
                             layout="constrained")
    for column, (names, title) in enumerate(phases):
        before = 0 if "retrain" in names else run.args.offline_steps
        for ax, key, what in zip(axes[:, column], ("success_rate", "under"), ("reach the goal", "go under the wall"),
                                 strict=True):
            for color, coef in zip(GROUPS, sorted({record["bonus_coef"] for record in rows}), strict=False):
                mine = [r for r in rows if r["phase"] in names and r["bonus_coef"] == coef]
                lines = [{r["grad_step"] - before: 100 * r[f"eval/{key}"] for r in mine if r["seed"] == seed}
                         for seed in sorted({r["seed"] for r in mine})]
                for line in lines:
                    ax.plot(list(line), list(line.values()), color=color, linewidth=0.7, alpha=0.5)
                draw_mean(ax, lines, color)
                ax.plot([], [], color=color, linewidth=2, label=f"bonus {coef:g}" if coef else "no bonus (IQL)")
            ax.set(ylim=(-4, 104), ylabel=f"episodes that {what}, %")
            steps_axis(ax, "environment steps" if "online" in names else "gradient steps of the retraining",
                       f"{title}: {what}")
    axes[0, 0].legend(loc="best")
    fig.suptitle(f"{run.args.env_id}, {run.args.exp_name}, {run.args.num_seeds} seeds", fontweight="bold")
    return fig


# === several runs ===
def draw_group(curves, ends, runs, color, position, groups):
    """The runs of one experiment: every seed's exploration curve, their mean, and the exploitation policies (groups
    side by side); on the right, at x = position, the policies at the last retraining time."""
    star = dict(marker="*", linestyle="", color=color, markersize=9, markeredgecolor="white", markeredgewidth=0.4)
    found = [evaluations(run, "pretrain", "online") for run in runs]
    for x, score, _ in found:
        curves.plot(x, score, color=color, linewidth=0.8, alpha=0.6)
    draw_mean(curves, [dict(zip(x, score, strict=True)) for x, score, _ in found], color)
    for run, (x, score, _) in zip(runs, found, strict=True):
        final, explored = exploitation(run), dict(zip(x, score, strict=True))
        if not final and len(x):
            ends.plot(position - 0.2, score[-1], "o", color=color, markersize=4)
        if run.args.exploit_only and (source := explorer_of(run)):
            explored = dict(zip(*evaluations(source, "online")[:2], strict=True))
        aside = (position - (groups - 1) / 2) * 0.012 * max(run.args.online_steps, 1)
        curves.plot([t + aside for t in final], list(final.values()), **star)
        if final:
            t = max(final)
            pair, places = [explored.get(t, np.nan), final[t]], [position - 0.2, position + 0.2]
            ends.plot(places, pair, color=color, linewidth=0.8, alpha=0.6)
            ends.plot(places[0], pair[0], "o", color=color, markersize=4)
            ends.plot(places[1], pair[1], **star)


def figure_of_runs(runs):
    tasks = sorted({run.args.env_id for run in runs})
    names = sorted({run.args.exp_name for run in runs})
    colors = {name: GROUPS[i % len(GROUPS)] for i, name in enumerate(names)}
    fig, axes = plt.subplots(len(tasks), 2, figsize=(9, 3.2 * len(tasks) + 0.5), width_ratios=(2.2, 1), sharey="row",
                             squeeze=False, layout="constrained")
    for (curves, ends), env_id in zip(axes, tasks, strict=True):
        here = [name for name in names if any(r.args.env_id == env_id and r.args.exp_name == name for r in runs)]
        for position, name in enumerate(here):
            group = [run for run in runs if run.args.env_id == env_id and run.args.exp_name == name]
            draw_group(curves, ends, group, colors[name], position, len(here))
        curves.axvline(0, color="0.6", linewidth=0.8)
        steps_axis(curves, "environment steps (before 0: gradient steps of pretraining)", env_id)
        score_axis(curves, next(run.measure for run in runs if run.args.env_id == env_id))
        ends.set(xlim=(-0.6, len(here) - 0.4), title="at the end")
        aslant = dict(rotation=20, ha="right") if len(here) > 2 else {}
        ends.set_xticks(range(len(here)), here, **aslant)
        ends.grid(axis="x", visible=False)
    keys = []
    for name in names:
        counts = [sum(r.args.env_id == env_id and r.args.exp_name == name for r in runs) for env_id in tasks]
        seeds = " or ".join(map(str, sorted({count for count in counts if count})))
        keys.append(Line2D([], [], color=colors[name], label=f"{name} (seeds: {seeds})"))
    keys += [Line2D([], [], marker=marker, color="0.4", linestyle=line, markersize=size, label=label)
             for marker, line, size, label in (("o", "-", 4, "exploration"), ("*", "", 9, "exploitation"))]
    fig.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 4))
    return fig


def say(runs):
    """What was seen in the seeds of one experiment with both policies, in one sentence."""
    ends, keys = {}, ("eval/success_rate", "eval/normalized_score")
    for run in runs:
        last = {x["phase"]: [x[key] for key in keys] for x in run.metrics if keys[1] in x}
        if {"online", "retrain"} <= last.keys():
            ends[run.args.seed] = last["online"], last["retrain"]
    if ends and len({(run.args.env_id, run.args.exp_name) for run in runs}) == 1:
        before, after = (f"{rate:.0%} (score {score:.0f})" for rate, score in np.mean(list(ends.values()), 0))
        print(f"seed{'s' * (len(ends) > 1)} {' '.join(map(str, ends))}: the exploration policy, which alone touched "
              f"the environment, succeeds in {before} of its last evaluation's episodes; the exploitation policy, "
              f"retrained offline on its data without the bonus, in {after}")


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    check_ranges(args, dict(episodes=(1, 10_000)))
    if not args.run_dirs:
        fail("give the folder of a run: python tools/plot_run.py RUN_DIR")
    if len(args.run_dirs) > 1 and not args.out:
        fail("several runs go into one figure: say where with --out FILE")
    folders = [os.path.expanduser(folder) for folder in args.run_dirs]
    if len(folders) > 1:  # runs/* has logs and pictures too
        folders = [folder for folder in folders if os.path.exists(os.path.join(folder, "config.json"))]
        print(f"{len(folders)} runs, {len(args.run_dirs) - len(folders)} others passed over")
    if not folders:
        fail("none of these is the folder of a run")
    runs = [open_run(folder) for folder in folders]
    point_mass = [run for run in runs if run.config["script"] == "pointmass_didactic"]
    if point_mass and len(runs) > 1:
        fail(f"{point_mass[0].path}: a run of the point mass is drawn alone; give the others without it")
    out = Path(os.path.expanduser(args.out) or runs[0].path / "figure.png")
    kind = out.suffix.lstrip(".") or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes() or out.is_dir() or not out.parent.is_dir():
        fail(f"--out {out}: give a picture file in a folder that exists")
    output_folder(out.parent, "--out")
    importlib.import_module("torch").set_num_threads(1)
    with plt.rc_context(STYLE):
        if point_mass:
            fig = figure_of_point_mass(runs[0])
        else:
            fig = figure_of_run(runs[0], args.episodes) if len(runs) == 1 else figure_of_runs(runs)
        picture = io.BytesIO()
        fig.savefig(picture, format=kind)
        plt.close(fig)
    write_whole(out, picture.getvalue())
    print(f"figure: {out}")
    say(runs)


if __name__ == "__main__":
    run_main(main)
