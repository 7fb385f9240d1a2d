"""Draw Figure 6 of the paper: the three reduced data sets, and the environments they are for.

    python tools/figure6.py --out figure6.png                      # MUJOCO_GL=osmesa (or egl) where there is no screen

Above, the offline data as training sees it: antmaze and maze2d over their mazes, with the discs (dashed) from which all
observations were taken, the goal's among them; hammer as the height of the hammer over the steps of the demonstrations,
with the line before which they are kept, and the last frame of one such truncated demonstration (its actions are played
again from its first state; how far that is from the data is printed). Below, the environments. Needs the offline data,
as training does, and a GL back end.
"""

import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import iql_ooo  # noqa: E402
from reproduce import ANTMAZE, HARD, MAZE2D, fail, output_folder, run_main, write_whole  # noqa: E402
from tools.plot_run import draw_maze, draw_points, maze_of, plt  # noqa: E402

HAMMER = HARD[-1]
DEMONSTRATIONS = 100  # drawn of hammer
HAMMER_Z, NAIL_Z = 38, 44  # in hammer's observation (46,): height of the hammer and of the nail, m
# Where the camera looks from: point, distance (m), azimuth and elevation (degrees).
CAMERAS = {ANTMAZE: ((0, 0, 0), 56, 90, -65), MAZE2D: ((0, 0, 0), 14, 90, -65), HAMMER: ((0, -0.1, 0.15), 1.1, 30, -25)}


@dataclass
class Args:
    out: str = "figure6.png"
    """File of the picture."""


def offline_data(env, env_id, *flags):
    """The task's offline data as {column: (n, ...)} and its settings; flags are iql_ooo.py's."""
    settings = iql_ooo.parse_args(["--env-id", env_id, *flags])
    return iql_ooo.load_dataset(settings, env, settings.seed)[0], settings


# === panels ===
def check_gl():
    """Exit 2 with one line where nothing can be rendered."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glfw says each thing that fails
            import mujoco

            context = mujoco.GLContext(8, 8)
            context.make_current()
            mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
            context.free()
    except Exception as error:  # each back end fails in its own way; the remedy is the same
        fail(f"nothing can be rendered ({error}); set MUJOCO_GL=egl, or MUJOCO_GL=osmesa with libosmesa6")


def draw_environment(ax, env, env_id, title):
    """What the environment looks like now."""
    import mujoco

    base = env.unwrapped
    simulation = getattr(base, "ant_env", getattr(base, "point_env", base))
    camera, renderer = mujoco.MjvCamera(), mujoco.Renderer(simulation.model, 480, 480)
    camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = CAMERAS[env_id]
    renderer.update_scene(simulation.data, camera)
    ax.imshow(renderer.render())
    renderer.close()
    ax.set(xticks=[], yticks=[], title=title)


def draw_truncation(ax, whole, kept, steps):
    """Height of the hammer above the table over the steps of a demonstration: what is kept, and what is cut off."""
    heights = whole["observations"][:, HAMMER_Z]
    episodes = np.split(heights, np.flatnonzero(np.diff(whole["episodes"])) + 1)
    for episode in episodes[:: max(1, len(episodes) // DEMONSTRATIONS)][:DEMONSTRATIONS]:
        ax.plot(np.arange(steps, len(episode)), episode[steps:], color="0.8", linewidth=0.5)
        ax.plot(episode[:steps], color="#0072B2", linewidth=0.7)
    ax.axvline(steps, color="#D55E00", linestyle="--")
    ax.set(xlabel="step of the demonstration", ylabel="height of the hammer, m")
    ax.set_title(f"{HAMMER}\n{len(kept['rewards']):,} transitions, the first {steps} of each episode")


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
    check_gl()
    fig, axes = plt.subplots(2, 4, figsize=(16, 7.6), layout="constrained")
    mazes = {env_id: maze_of(iql_ooo, env_id) for env_id in (ANTMAZE, MAZE2D)}
    envs = {env_id: maze[0] for env_id, maze in mazes.items()} | {HAMMER: iql_ooo.make_env(HAMMER)}
    for ax, (env_id, env) in zip(axes[1], envs.items(), strict=False):  # first, as data takes longer to load
        env.reset(seed=1)
        draw_environment(ax, env, env_id, env_id)
    for ax, (env_id, maze) in zip(axes[0], mazes.items(), strict=False):
        data, settings = offline_data(maze[0], env_id)
        print(f"{env_id}: {len(data['rewards']):,} transitions", flush=True)
        draw_maze(ax, maze, settings.remove_discs, f"{env_id}\n{len(data['rewards']):,} transitions")
        draw_points(ax, data["observations"][:, :2], color="#0072B2", alpha=0.5)
    kept, settings = offline_data(envs[HAMMER], HAMMER)
    whole, _ = offline_data(envs[HAMMER], HAMMER, "--truncate-episodes", "0")
    print(f"{HAMMER}: {len(kept['rewards']):,} of {len(whole['rewards']):,} transitions", flush=True)
    draw_truncation(axes[0, 2], whole, kept, settings.truncate_episodes)
    print(f"demonstration played again: observations differ by at most {replay(envs[HAMMER], kept):.2g}")
    title = f"the last frame of a truncated\ndemonstration (step {settings.truncate_episodes})"
    draw_environment(axes[0, 3], envs[HAMMER], HAMMER, title)
    axes[1, 3].axis("off")
    legend = "blue: offline data\ngrey lines: cut off\ndashed: what was removed\nyellow: goal"
    axes[1, 3].text(0.1, 0.5, legend, va="center", fontsize=12, linespacing=1.6)
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=72)
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
