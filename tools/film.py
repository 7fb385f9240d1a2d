"""Film a run: explorer and exploitation policy side by side, from the same start states, as a GIF under 2 MB.

    python tools/film.py runs/maze2d-missing-data-medium-v1__iql_ooo__1       # writes film.gif in the run
    python tools/film.py runs/pen-binary-v0__iql_ooo__1 --episodes 5 --out pen.gif

The policies are the last exploitation policy of the run and the exploration policy of the same time (of the source run,
if the run is an --exploit-only one and the source is still there). td3_rnd.py and pex.py have one policy, shown alone.
Start states are used by no training and no evaluation; in mazes they are far ones. Mazes are drawn from above, with the
path so far; other tasks are rendered. For that MUJOCO_GL is set to what works: what it is already, egl, osmesa or glfw.
An episode ends in the film when every policy has succeeded or has no steps left.
"""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reproduce import check_ranges, fail, first_line, output_folder, run_main, script_of, write_whole  # noqa: E402
from tools.plot_run import BASELINES, EXPLOIT, EXPLORE, SCRIPTS, STYLE, draw_maze, plt  # noqa: E402

LIMIT = 2_000_000  # bytes of the GIF
FRAMES = 160  # of the whole film, without the pauses at the ends of episodes
PAUSE = 12  # frames
DURATION = 60  # ms of a frame
COLORS = 64
TRY_GL = """import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]
    """RUN_DIR of a run of any script but the point mass's."""
    episodes: int = 3
    """Episodes of each policy."""
    out: str = ""
    """File of the film (default: film.gif in the run directory)."""


# === what is filmed ===
def open_policies(folder):
    """(script, settings of the run, {title: policy})."""
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder} is not a run ({type(error).__name__}: {error}); give the folder of one")
    if name not in SCRIPTS - {"pointmass_didactic"}:
        fail(f"{folder} is a run of {name}, which cannot be filmed")
    script = script_of(config)
    config = script.read_config(folder)
    args, kind = script.Args(**config["args"]), "policy" if name in BASELINES else "exploitation"
    times = [int(path.stem.split("_")[1]) for path in folder.glob(f"{kind}_*.pt")]
    if not times:
        fail(f"{folder} has no {kind}_*.pt yet; finish the run first (--resume)")
    source, found = folder, {}
    if getattr(args, "exploit_only", "") and (Path(args.exploit_only) / "config.json").exists():
        source = Path(args.exploit_only)
    explorer = source / f"exploration_{max(times)}.pt"
    if explorer.exists() and script.read_config(source)["run_id"] in (config["run_id"], config["source_run_id"]):
        found["Explorer"] = script.load_policy(explorer)
    title = "Policy" if name in BASELINES else "Exploitation policy (OOO)"
    return script, args, found | {title: script.load_policy(folder / f"{kind}_{max(times)}.pt")}


def choose_gl():
    """Set MUJOCO_GL to the first back end that renders, each tried in a process of its own. Exit 2 if there is none."""
    for name in dict.fromkeys((os.environ.get("MUJOCO_GL", "egl"), "egl", "osmesa", "glfw")):
        environment = os.environ | {"MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", TRY_GL], env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    fail("nothing can be rendered here, neither with egl nor osmesa nor glfw; install one (Debian: apt install "
         "libosmesa6)")


def roll_out(script, env, policy, seed, stride):
    """One episode as (views, step of the first success or None, length, goal). Views, one for each `stride` steps: the
    picture, or in a maze the position."""
    script.seed_torch(seed)
    obs, _ = env.reset(seed=seed)
    views, length, success, done = [], 0, None, False
    while True:
        if length % stride == 0:
            views.append(obs[:2].copy() if env.task.goal_cell else env.render())
        if done:
            return views, success, length, env.goal
        obs, _, terminated, truncated, info = env.step(policy.act(obs))
        length += 1
        done = terminated or truncated
        if info["success"] and success is None:
            success = length


def far_starts(script, env, seed):
    """Seeds of the episodes, without end; in a maze of those whose start is far from the goal."""
    for i in range(10**6):
        one = script.derive_seed(seed, "film", i)
        if env.reset(seed=one)[1].get("start_distance", math.inf) > env.task.far:
            yield one


# === the film ===
class Panel:
    """One policy: its picture or its maze, and a line of text below."""

    def __init__(self, ax, env, radius, title, color, episode):
        self.views, self.success, self.length, goal = episode
        self.maze = bool(env.task.goal_cell)
        self.what = "goal reached" if self.maze else "success"
        if self.maze:
            ax.grid(False)
            draw_maze(ax, (env, goal, radius), (), title)
            self.line, = ax.plot([], [], color=color, linewidth=1.5, zorder=6)
            self.dot, = ax.plot([], [], "o", color=color, markersize=5, zorder=7)
            ax.plot(*self.views[0], "o", color="black", markersize=3, zorder=6)
        else:
            self.image = ax.imshow(self.views[0])
            ax.set(xticks=[], yticks=[], title=title)
            ax.spines[:].set_visible(False)
        ax.set_title(title, color=color)
        self.text = ax.text(0.5, -0.03, "step 0", transform=ax.transAxes, ha="center", va="top")

    def end(self):
        return self.success or self.length

    def show(self, step, stride):
        step = min(step, self.end() if self.maze else self.length)
        view = min(step // stride, len(self.views) - 1)
        if self.maze:
            self.line.set_data(*np.array(self.views[: view + 1]).T)
            self.dot.set_data(*self.views[view][:, None])
        else:
            self.image.set_data(self.views[view])
        reached = self.success and step >= self.success
        self.text.set_text(f"{self.what} at step {self.success}" if reached else f"step {step}")
        self.text.set_fontweight("bold" if reached else "normal")


def film(script, args, policies, episodes):
    """The pictures of the film, arrays (height, width, 3)."""
    task = script.TASKS[args.env_id]
    if getattr(args, "goal_x", None) is not None:
        task = script.TASKS[args.env_id] = task._replace(kwargs=task.kwargs | {"goal_x": args.goal_x})
    if not task.goal_cell:
        choose_gl()
    try:
        env = script.make_env(args.env_id, None if task.goal_cell else "rgb_array")
        env.reset(seed=0)
        task.goal_cell or env.render()
    except Exception as error:  # environments lack different things
        fail(f"{args.env_id} cannot be rendered here ({first_line(error)})")
    stride = 1 if task.goal_cell else math.ceil(task.horizon * episodes / FRAMES)
    seeds = far_starts(script, env, args.seed)
    rolled = [[roll_out(script, env, policy, seed, stride) for policy in policies.values()]
              for seed in (next(seeds) for _ in range(episodes))]
    ends = [max(success or length for _, success, length, _ in row) for row in rolled]
    step = stride * math.ceil(sum(ends) / FRAMES / stride)
    pictures = []
    for number, (row, end) in enumerate(zip(rolled, ends, strict=True), 1):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(1, len(policies), figsize=(2.7 * len(policies), 3.3), dpi=100, squeeze=False,
                                        layout="constrained")
            colors = (EXPLORE, EXPLOIT)[-len(policies):]
            panels = [Panel(ax, env, script.GOAL_RADIUS, title, color, episode)
                      for ax, title, color, episode in zip(axes[0], policies, colors, row, strict=True)]
            figure.suptitle(f"{args.env_id}, start {number} of {episodes}", fontsize=9)
            figure.canvas.draw()
            figure.set_layout_engine("none")  # else panels move with the width of the text
            for t in [*range(0, end, step), *[end] * PAUSE]:
                for panel in panels:
                    panel.show(t, stride)
                figure.canvas.draw()
                pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
            plt.close(figure)
    return pictures


def gif(pictures):
    """Bytes of a GIF of at most LIMIT bytes: with half the pictures, as long as it would be more."""
    duration = DURATION
    while True:
        every = max(1, len(pictures) // 8)  # one palette for all pictures, of some of them
        palette = Image.fromarray(np.concatenate(pictures[::every])).quantize(COLORS)
        first, *others = [Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in pictures]
        stream = io.BytesIO()
        first.save(stream, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
        if stream.tell() <= LIMIT or not others:
            return stream.getvalue()
        pictures, duration = pictures[::2], 2 * duration


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    check_ranges(args, dict(episodes=(1, 100)))
    folder = Path(args.run_dir)
    out = Path(args.out) if args.out else folder / "film.gif"
    if out.is_dir() or out.suffix != ".gif":
        fail(f"--out {out} must name a .gif file")
    script, settings, policies = open_policies(folder)
    output_folder(out.parent, "--out" if args.out else "RUN_DIR")
    content = gif(film(script, settings, policies, args.episodes))
    write_whole(out, content)
    print(f"film: {out} ({len(content) / 1e6:.2f} MB)")


if __name__ == "__main__":
    run_main(main)
