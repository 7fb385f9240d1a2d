"""Draw a run: learning curves, intrinsic reward and, in the mazes, where data and policies went.

    python tools/plot_run.py runs/maze2d-missing-data-large-v1__iql_ooo__1              # writes figure.png in the run
    python tools/plot_run.py runs/pen-binary-v0__*__* --out pen.png                     # compares several runs

One run: the exploration policy's normalised score (steps before 0 are pretraining), each exploitation policy's score
during its retraining, the intrinsic reward of the last 1000 online steps, and for the mazes the offline data, the
online visits, and trajectories of the saved policies, rolled out here from the same start states (antmaze draws a goal
for each episode; their mean is shown). Shaded: standard error over the episodes of an evaluation. The data panel needs
the offline data; without it, the panel says so.

Several runs: a row for each task. Colour is the experiment (--exp-name), every seed has its own line, stars are
exploitation policies; on the right both policies at the last retraining time, a line joining those of one seed.
"""

import importlib
import io
import json
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import iql_ooo  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
def read_lines(path):
    """Records of a .jsonl file; a last line that a killed run left unfinished is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def open_run(folder):
    """A run directory as a namespace: path, script (module), args, config, metrics and errors, the standard error of
    each evaluation by (phase, env_step, grad_step). Exit 2 if it is not a run, or if it has no evaluation."""
    config, path = iql_ooo.read_config(folder, iql_ooo.SCRIPT), Path(folder)
    if config.get("script") not in {file.stem for file in ROOT.glob("*.py")}:
        iql_ooo.fail(f"{folder} was written by {config.get('script')!r}, no script of this repository")
    script, args = importlib.import_module(config["script"]), SimpleNamespace(**config["args"])
    metrics = read_lines(path / "metrics.jsonl")
    if not any("eval/normalized_score" in record for record in metrics):
        iql_ooo.fail(f"{folder} has no evaluation in metrics.jsonl yet; nothing to draw")
    task, errors = script.ENVIRONMENTS[args.env_id], {}
    for record in read_lines(path / "evals.jsonl"):
        scores = [script.normalized_score(task, episode) for episode in record["episodes"]]
        errors[record["phase"], record["env_step"], record["grad_step"]] = np.std(scores) / len(scores) ** 0.5
    return SimpleNamespace(path=path, script=script, args=args, config=config, metrics=metrics, errors=errors)


def evaluations(run, *phases, env_step=None):
    """Evaluations of some phases: x (n,), normalised score (n,), its standard error (n,). x: environment steps, before
    0 for pretraining; gradient steps for retraining."""
    rows = []
    for record in run.metrics:
        phase, t, step = record["phase"], record["env_step"], record["grad_step"]
        if phase in phases and "eval/normalized_score" in record and env_step in (None, t):
            x = {"pretrain": step - run.args.offline_steps, "online": t, "retrain": step}[phase]
            rows.append((x, record["eval/normalized_score"], run.errors.get((phase, t, step), 0.0)))
    return np.array(rows, float).reshape(-1, 3).T


def exploitation(run):
    """{t: normalised score of the exploitation policy at the end of its retraining}."""
    evaluated = [r for r in run.metrics if r["phase"] == "retrain" and "eval/normalized_score" in r]
    return {r["env_step"]: r["eval/normalized_score"] for r in evaluated}  # the last one of each t stays


def explorer_of(run):
    """The run that explored: itself, or the one that --exploit-only names; None if that one is not here."""
    if not run.args.exploit_only:
        return run
    return open_run(run.args.exploit_only) if (Path(run.args.exploit_only) / "config.json").exists() else None


# === one run: curves ===
def draw_curve(ax, x, score, error, color, **style):
    ax.plot(x, score, color=color, marker="o", markersize=2.5, linewidth=1.4, **style)
    ax.fill_between(x, score - error, score + error, color=color, alpha=0.15, linewidth=0)


def score_axis(ax):
    """At least ten points high, so that noise around a constant score does not look like learning."""
    low, high = ax.get_ylim()
    margin = max(0.0, 10 - (high - low)) / 2
    ax.set(ylim=(low - margin, high + margin), ylabel="normalised score")


def steps_axis(ax, label, title):
    ax.set(xlabel=label, title=title)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def time_colors(times):
    return dict(zip(times, plt.get_cmap("plasma")(np.linspace(0.1, 0.75, len(times))), strict=True))


def draw_exploration(ax, run, explorer):
    """Exploration score against environment steps, and where each exploitation policy ended."""
    if explorer:
        x, score, error = evaluations(explorer, "pretrain", "online")
        draw_curve(ax, x, score, error, EXPLORE, label="exploration policy")
        if len(x) and x.min() < 0:
            ax.axvspan(x.min(), 0, facecolor="0.93", edgecolor="0.7", linewidth=0.5, zorder=0, label="pretraining")
    ends, colors = exploitation(run), time_colors(exploitation(run))
    for t, score in ends.items():
        label = "exploitation policy, retrained at t" if t == min(ends) else None
        ax.plot(t, score, "*", markersize=13, color=colors[t], markeredgecolor="white", label=label, zorder=3)
    steps_axis(ax, "environment steps (before 0: gradient steps)", "Exploration")
    score_axis(ax)
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
    score_axis(ax)
    ax.legend(loc="best") if colors else ax.text(0.5, 0.5, "no retraining yet", transform=ax.transAxes, ha="center")


def draw_intrinsic(ax, explorer):
    """Intrinsic reward of the last 1000 online transitions (paper, Fig. 3 left)."""
    rows = [record for record in explorer.metrics if "rnd/online_mean" in record]
    for key, style in (("mean", "-"), ("scaled_mean", "--"), ("std", ":")):
        x, y = [r["env_step"] for r in rows], [r[f"rnd/online_{key}"] for r in rows]
        ax.plot(x, y, style, color=EXPLORE, linewidth=1.4, label=key.replace("_", " "))
    ax.set_yscale("log")
    steps_axis(ax, "environment steps", "Intrinsic reward, last 1000 online steps")
    ax.legend(loc="best")


# === one run: mazes ===
def draw_maze(ax, run, env, title):
    """Walls, the goal disc, and the discs without offline data."""
    maze, task = env.unwrapped.maze, env.task
    size, rows, cols = maze.maze_size_scaling, len(maze.maze_map), len(maze.maze_map[0])
    for row, line in enumerate(maze.maze_map):
        for col, cell in enumerate(line):
            if cell == 1:
                x, y = (col - (cols - 1) / 2) * size, ((rows - 1) / 2 - row) * size
                ax.add_patch(Rectangle((x - size / 2, y - size / 2), size, size, color="0.82", linewidth=0))
    for x, y, radius in run.args.remove_discs:
        ax.add_patch(Circle((x, y), radius, fill=False, linestyle="--", linewidth=0.9, color="0.25", zorder=4))
    goal = np.add(task.goal, run.script.ANTMAZE_DATA_GOAL_OFFSET if task.family == "antmaze" else 0)
    ax.add_patch(Circle(goal, run.script.GOAL_RADIUS, color="#E69F00", alpha=0.85, linewidth=0, zorder=5))
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


def draw_offline_data(ax, run, explorer, env):
    args, reason = run.args, io.StringIO()
    seed = (explorer or run).args.seed  # --data-subset was drawn with it
    draw_maze(ax, run, env, "Offline data")
    try:
        with redirect_stderr(reason):
            data, report = run.script.load_dataset(
                args.env_id, env, dataset_ids=tuple(args.dataset_id), dataset_path=args.dataset_path, seed=seed,
                truncate_episodes=args.truncate_episodes, data_subset=args.data_subset,
                remove_discs=[tuple(disc) for disc in args.remove_discs])
    except SystemExit:  # what load_dataset does when the data is not there; the figure goes on without it
        print(f"offline data panel left out: {reason.getvalue().strip().removeprefix('error: ')}")
        return note(ax, "not available here")
    if report["sha256"] != run.config["dataset"]["sha256"]:
        print("offline data panel left out: the data is not what the run was trained on (sha256 differs)")
        return note(ax, "data has changed since the run")
    draw_points(ax, data["observations"][:, :2], color="0.3", alpha=0.5)
    ax.set_title(f"Offline data: {EngFormatter(places=0, sep='')(report['transitions'])} transitions")


def draw_online_data(ax, run, explorer, env):
    draw_maze(ax, run, env, "Online exploration")
    chunks = sorted((explorer.path / "replay").glob("online-*.npz")) if explorer else []
    if not chunks:
        return note(ax, "no replay data here")
    positions = np.concatenate([np.load(path, allow_pickle=False)["observations"][:, :2] for path in chunks])
    points = draw_points(ax, positions, c=np.arange(len(positions)), cmap="viridis")
    steps = EngFormatter(places=0, sep="")
    bar = ax.figure.colorbar(points, cax=ax.inset_axes([0.0, -0.07, 1.0, 0.035]), orientation="horizontal")
    bar.set_ticks([0, len(positions) - 1], labels=["0", f"{steps(len(positions))} steps"])
    bar.outline.set_visible(False)


def draw_policy(ax, run, env, file, name, episodes):
    """Trajectories of a saved policy from start states that are the same for every policy of the run."""
    draw_maze(ax, run, env, name)
    if not file.exists():
        return note(ax, f"no {file.name} here")
    act, _ = run.script.load_policy(file)
    positions = []

    def act_and_record(obs):
        positions.append(obs[:2].copy())
        return act(obs)

    print(f"rolling out {file.name}, {episodes} episodes", flush=True)
    # The seed of --eval-only: start states that training has not used.
    results = run.script.evaluate(env, act_and_record, episodes, run.script.derive_seed(run.args.seed, "eval-only"))
    splits = np.cumsum([episode["length"] for episode in results])[:-1]
    for path, episode in zip(np.split(np.array(positions), splits), results, strict=True):
        ax.plot(*path.T, color=REACHED if episode["success"] else MISSED, linewidth=0.9, alpha=0.8, rasterized=True)
        ax.plot(*path[0], "o", color="black", markersize=2.5)
    summary = run.script.summarize(run.args.env_id, results)
    score, success = summary["eval/normalized_score"], summary["eval/success_rate"]
    ax.set_title(f"{name}\nscore {score:.1f}, success {success:.0%} of {episodes} episodes")


def draw_mazes(axes, run, explorer, times, episodes):
    """axes (2, 1 + len(times)): offline and online data, then exploration above exploitation for each t."""
    env = run.script.make_env(run.args.env_id)
    draw_offline_data(axes[0, 0], run, explorer, env)
    draw_online_data(axes[1, 0], run, explorer, env)
    for column, t in enumerate(times, start=1):
        where = f"t = {EngFormatter(sep='')(t)}"
        source = (explorer or run).path
        draw_policy(axes[0, column], run, env, source / f"exploration_{t}.pt", f"Exploration, {where}", episodes)
        draw_policy(axes[1, column], run, env, run.path / f"exploitation_{t}.pt", f"Exploitation, {where}", episodes)
    keys = [Patch(color="#E69F00", label="goal"), Line2D([], [], color=REACHED, label="reached the goal"),
            Line2D([], [], color=MISSED, label="did not"),
            Line2D([], [], marker="o", linestyle="", color="black", markersize=3, label="start")]
    if run.args.remove_discs:
        keys.append(Line2D([], [], linestyle="--", linewidth=0.9, color="0.25", label="offline data removed"))
    axes[0, 0].get_figure(root=False).legend(handles=keys, loc="outside lower center", ncols=len(keys))


def figure_of_run(run, episodes):
    explorer = explorer_of(run)
    intrinsic = bool(explorer) and any("rnd/online_mean" in record for record in explorer.metrics)
    is_maze = run.script.ENVIRONMENTS[run.args.env_id].family in ("maze2d", "antmaze")
    times = sorted(run.args.retrain_at)
    columns = 1 + len(times) if is_maze else 0
    width = max(3.6 * (2 + intrinsic), 3.1 * columns)
    heights = [3.0, 2 * 0.82 * width / columns + 0.4] if is_maze else [3.0]
    fig = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(1, 2 + intrinsic)
    draw_exploration(axes[0], run, explorer)
    draw_exploitation(axes[1], run, explorer)
    if intrinsic:
        draw_intrinsic(axes[2], explorer)
    if is_maze:
        draw_mazes(parts[1].subplots(2, columns, squeeze=False), run, explorer, times, episodes)
    fig.suptitle(f"{run.args.env_id}, {run.args.exp_name}, seed {run.args.seed}", fontweight="bold")
    return fig


# === several runs ===
def draw_group(curves, ends, runs, color, position, groups):
    """The runs of one experiment: every seed's exploration curve, their mean, and the exploitation policies (groups
    side by side); on the right, at x = position, the policies at the last retraining time."""
    star = dict(marker="*", linestyle="", color=color, markersize=9, markeredgecolor="white", markeredgewidth=0.4)
    found = [evaluations(run, "pretrain", "online") for run in runs]
    for x, score, _ in found:
        curves.plot(x, score, color=color, linewidth=0.8, alpha=0.6)
    shared = sorted(set.intersection(*(set(x) for x, _, _ in found)))
    if len(runs) > 1 and shared:
        mean = np.mean([score[np.isin(x, shared)] for x, score, _ in found], axis=0)
        curves.plot(shared, mean, color=color, linewidth=2)
    for run, (x, score, _) in zip(runs, found, strict=True):
        final, explored = exploitation(run), dict(zip(x, score, strict=True))
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
        score_axis(curves)
        ends.set(xlim=(-0.6, len(here) - 0.4), title="at the last retraining")
        ends.set_xticks(range(len(here)), here, rotation=20 if len(here) > 2 else 0)
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


def main(args):
    torch.set_num_threads(1)
    runs = [open_run(folder) for folder in args.run_dirs]
    if not runs:
        iql_ooo.fail("give the folder of a run: python tools/plot_run.py RUN_DIR")
    if len(runs) > 1 and not args.out:
        iql_ooo.fail("several runs go into one figure: say where with --out FILE")
    out = Path(args.out or runs[0].path / "figure.png")
    kind = out.suffix.lstrip(".") or "png"
    if kind not in plt.figure().canvas.get_supported_filetypes() or not out.parent.is_dir() or args.episodes < 1:
        iql_ooo.fail(f"--out {out} --episodes {args.episodes}: give a picture file in a folder that exists, and N >= 1")
    with plt.rc_context(STYLE):
        fig = figure_of_run(runs[0], args.episodes) if len(runs) == 1 else figure_of_runs(runs)
        picture = io.BytesIO()
        fig.savefig(picture, format=kind)
    iql_ooo.atomic_write(out, picture.getvalue())
    print(f"figure: {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
