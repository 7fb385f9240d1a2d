"""Draw Figure 6 of the paper: the three reduced data sets, and the environments they are for.

    python tools/figure6.py --out figure6.png                      # MUJOCO_GL=osmesa (or egl) where there is no screen

Above, the offline data as training sees it: antmaze and maze2d over their mazes, with the discs (dashed) from which all
observations were taken, the goal's among them; hammer as the distance from the nail to its goal, with the first
transitions of each demonstration, which are kept, before the line. Below, the last frame of one such truncated
demonstration (its actions played again from its first state; how far that is from the data is printed), and the three
environments. Needs the offline data, as training does; a task whose data is missing ends it.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reproduce import ANTMAZE, HARD, MAZE2D, fail, output_folder, run_main, write_whole  # noqa: E402

HAMMER = HARD[-1]
MAX_POINTS = 60_000  # of one scatter
DEMONSTRATIONS = 100  # drawn of hammer
NAIL_Z, PALM, TOOL = 44, slice(33, 36), slice(36, 39)  # of hammer's observation (46,)


@dataclass
class Args:
    out: str = "figure6.png"
    """File of the picture."""


# === what this takes from iql_ooo.py ===
def offline_data(env, env_id, *flags):
    """The task's offline data as {column: (n, ...)} and its settings; flags are iql_ooo.py's."""
    import iql_ooo

    a = iql_ooo.parse_args(["--env-id", env_id, *flags])
    data, _ = iql_ooo.load_dataset(env_id, env, truncate_episodes=a.truncate_episodes, data_subset=a.data_subset,
                                   remove_discs=a.remove_discs, seed=a.seed)
    return data, a


def make_env(env_id):
    import iql_ooo

    return iql_ooo.make_env(env_id, "rgb_array")


# === panels ===
def picture(ax, env, title):
    """What the environment looks like now."""
    ax.imshow(env.render())
    ax.set(xticks=[], yticks=[])
    ax.set_title(title)


def draw_maze(ax, env, data, discs, title):
    """Walls, positions of the data, the goal's cell and the discs without data."""
    from matplotlib.patches import Circle, Rectangle

    maze = env.unwrapped.maze
    size, rows, cols = maze.maze_size_scaling, len(maze.maze_map), len(maze.maze_map[0])
    for row, col in np.argwhere(np.array(maze.maze_map) == 1):
        corner = (col - cols / 2) * size, (rows / 2 - row - 1) * size
        ax.add_patch(Rectangle(corner, size, size, color="0.8", linewidth=0))
    points = data["observations"][:, :2]
    chosen = np.random.default_rng(0).permutation(len(points))[:MAX_POINTS]
    ax.scatter(*points[chosen].T, s=0.5, color="#0072B2", linewidths=0, alpha=0.5, rasterized=True)
    for x, y, radius in discs:
        ax.add_patch(Circle((x, y), radius, fill=False, linestyle="--", color="#D55E00", zorder=4))
    ax.plot(*discs[0][:2], "*", color="#D55E00", markersize=11, markeredgecolor="white", zorder=5)
    ax.set(xlim=np.array([-0.5, 0.5]) * cols * size, ylim=np.array([-0.5, 0.5]) * rows * size, aspect="equal")
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{title}: {len(points):,} transitions")


def draw_truncation(ax, whole, kept, steps):
    """Height of the hammer above the table over the steps of a demonstration: what is kept, and what is cut off."""
    heights = whole["observations"][:, TOOL][:, 2]
    episodes = np.split(heights, np.flatnonzero(np.diff(whole["episodes"])) + 1)
    for episode in episodes[:: max(1, len(episodes) // DEMONSTRATIONS)][:DEMONSTRATIONS]:
        ax.plot(np.arange(steps, len(episode)), episode[steps:], color="0.8", linewidth=0.5)
        ax.plot(episode[:steps], color="#0072B2", linewidth=0.7)
    ax.axvline(steps, color="#D55E00", linestyle="--")
    ax.set(xlabel="step of the demonstration", ylabel="height of the hammer, m")
    ax.set_title(f"{HAMMER}: {len(kept['rewards']):,} transitions,\nthe first {steps} of each demonstration")


def replay(env, data):
    """Put the environment where the first demonstration of data ends. Returns the largest difference of an observation
    from the recorded one, in the observation's units."""
    first = data["episodes"] == data["episodes"][0]
    start = data["observations"][0]
    base = env.unwrapped
    obs, _ = env.reset(seed=0)
    state = base.get_env_state()
    # The board's height is all that a reset draws; the nail moves with it.
    board = np.array(state["board_pos"], float)
    board[2] += start[NAIL_Z] - obs[NAIL_Z]
    base.set_env_state({"qpos": state["qpos"], "qvel": state["qvel"], "board_pos": board})
    for action in data["actions"][first]:
        obs, *_ = env.step(action)
    return float(np.abs(obs - data["next_observations"][first][-1]).max())


def draw():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 4, figsize=(16, 7.4), layout="constrained")
    for column, env_id in enumerate((ANTMAZE, MAZE2D)):
        env = make_env(env_id)
        data, settings = offline_data(env, env_id)
        print(f"{env_id}: {len(data['rewards']):,} transitions", flush=True)
        draw_maze(axes[0, column], env, data, settings.remove_discs, env_id)
        env.reset(seed=1)
        picture(axes[1, column], env, env_id)
        env.close()
    env = make_env(HAMMER)
    kept, settings = offline_data(env, HAMMER)
    whole, _ = offline_data(env, HAMMER, "--truncate-episodes", "0")
    print(f"{HAMMER}: {len(kept['rewards']):,} of {len(whole['rewards']):,} transitions", flush=True)
    draw_truncation(axes[0, 2], whole, kept, settings.truncate_episodes)
    env.reset(seed=1)
    picture(axes[1, 2], env, HAMMER)
    print(f"demonstration played again: observations differ by at most {replay(env, kept):.2g}")
    picture(axes[1, 3], env, f"the last frame of a truncated demonstration (step {settings.truncate_episodes})")
    axes[0, 3].axis("off")
    axes[0, 3].text(0, 0.5, "blue: kept   grey line: cut off\ndashed: removed   star: goal", va="center", fontsize=11)
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=90)
    return content.getvalue()


def main():
    args = tyro.cli(Args, description=__doc__)
    out = Path(os.path.expanduser(args.out))
    if out.is_dir():
        fail(f"--out {out} is a folder; give the picture a file name")
    output_folder(out.parent, "--out")
    write_whole(out, draw())
    print(f"figure: {out}")


if __name__ == "__main__":
    run_main(main)
