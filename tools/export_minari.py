"""Write what a run has collected online as a Minari dataset, to be published or trained on.

    python tools/export_minari.py runs/maze2d-missing-data-medium-v1__first_iql_ooo__1 --dataset-id me/explored-v0
    python iql_ooo.py --env-id maze2d-missing-data-medium-v1 --dataset-id me/explored-v0 --remove-discs
    minari upload me/explored-v0 --key-path KEY.json

The second command learns from it; without --remove-discs a maze task would remove the data near its goal. The third
publishes it.

Runs of iql_ooo.py, td3_rnd.py, pex.py, calql_ooo.py and rlpd_ooo.py. Observations are the task's (D4RL's) vectors,
float32; actions are as they were played, in the environment's units; rewards are the task's, raw (hammer: with the
package's sign of the palm's distance, as in every Minari dataset of it). The dataset goes to the folder that
MINARI_DATASETS_PATH names, else to ~/.minari/datasets. An existing one is not touched. Its description names the run by
its id.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reproduce import expand_store, fail, run_main, script_of  # noqa: E402


@dataclass
class Args:
    run_dir: Annotated[str, tyro.conf.Positional]
    """RUN_DIR of a run with an online phase."""
    dataset_id: str
    """Id of the new dataset, such as me/explored-v0."""


def read_run(path):
    """(config, script as a module, {column: (n,) or (n, dim)}) of a run; exit 2 without online transitions."""
    try:
        config = json.loads((path / "config.json").read_text())
        script = script_of(config)
        saved = script.read_checkpoint(path, config, script.torch.device("cpu"))
        columns, size = config["replay_columns"], saved["sizes"]["replay.bin"]
        data = (path / "replay.bin").read_bytes()[:size]
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        fail(f"{path} is not a run that can be exported ({type(error).__name__}: {error}); give a RUN_DIR")
    if script.zlib.crc32(data) != saved["replay_sum"] or not data:
        fail(f"{path / 'replay.bin'} holds no online transitions, or not those that were written; give another RUN_DIR")
    rows = np.frombuffer(data, np.float32).reshape(-1, max(stop for _, stop in columns.values()))
    width_1 = ("rewards", "terminations", "episodes")
    return config, script, {k: rows[:, a] if k in width_1 else rows[:, a:b] for k, (a, b) in columns.items()}


def episodes_of(data):
    """EpisodeBuffers, one an episode, in their order. The last step of each is its end: terminated, else truncated."""
    starts = np.flatnonzero(np.diff(data["episodes"], prepend=-1))
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(data["episodes"])], strict=True)):
        part = slice(start, stop)
        terminations = data["terminations"][part] > 0
        truncations = np.zeros(stop - start, bool)
        truncations[-1] = not terminations[-1]
        observations = np.concatenate([data["observations"][part], data["next_observations"][stop - 1 : stop]])
        yield EpisodeBuffer(id=number, observations=observations, actions=data["actions"][part],
                            rewards=np.asarray(data["rewards"][part], np.float64), terminations=terminations,
                            truncations=truncations, infos={})


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    path = Path(args.run_dir)
    expand_store()
    config, script, data = read_run(path)
    settings = config["args"]
    env = script.make_env(settings["env_id"])
    if env.task.family == "hammer":  # load_dataset corrects the package's reward
        correction, _ = script.task_reward(env.task, data["next_observations"], np.zeros(len(data["rewards"])))
        data["rewards"] = data["rewards"] - correction
    space, spec = env.data_action_space, env.unwrapped.spec
    data["actions"] = data["actions"].clip(-1, 1)  # as PEX played them
    if (space.low != -1).any() or (space.high != 1).any():
        data["actions"] = space.low + (data["actions"] + 1) / 2 * (space.high - space.low)
    warnings.simplefilter("ignore")  # minari's, about an author and a link
    try:
        minari.create_dataset_from_buffers(
            args.dataset_id, list(episodes_of(data)),
            env=None if callable(spec.entry_point) else spec,  # the sparse tasks are made by a script
            observation_space=gym.spaces.Box(-np.inf, np.inf, data["observations"].shape[1:], np.float32),
            action_space=space,
            algorithm_name=f"{settings['exp_name']} ({config['script']}.py), exploration",
            description=f"Online phase of run {config['run_id']}: {settings['env_id']}, seed {settings['seed']}. "
            "Observations, actions and raw rewards as the task in OOO RL has them.",
            requirements=[f"{name}=={config['versions'][name]}" for name in ("gymnasium-robotics", "mujoco")])
    except (ValueError, OSError, TypeError, AssertionError) as error:
        fail(f"--dataset-id {args.dataset_id}: {error}")
    print(f"{args.dataset_id}: {len(data['rewards'])} steps in {len(set(data['episodes'].tolist()))} episodes")


if __name__ == "__main__":
    run_main(main)
