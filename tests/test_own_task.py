"""One's own task and data: the example of docs/tasks.md, copied as a reader copies it, in all scripts that take
offline data. A row of TASKS and an .npz are enough."""

import importlib.util
import json
import re
import shlex
import sys

import gymnasium as gym
import numpy as np
import pytest
from baseline import Session, read_lines, small_words
from conftest import ROOT

PAGE = (ROOT / "docs/tasks.md").read_text()
PROGRAM, ROWS, COMMANDS = re.findall(r"^~~~\w+\n(.*?)^~~~$", PAGE, re.DOTALL | re.MULTILINE)
HIGH = {"pendulum-v0": 2.0, "inverted-pendulum-v0": 3.0}  # of the action spaces
FILES = {"pendulum-v0": "pendulum.npz", "inverted-pendulum-v0": "inverted_pendulum.npz"}
ONLINE = 230
RND, OOO = "--rnd-hidden-dims 8 8", "--retrain-at 230 --retrain-steps 3"
WORDS = {  # small budgets; Pendulum has 200 steps an episode
    "iql_ooo": f"{RND} {OOO} --offline-steps 3",
    "calql_ooo": f"{RND} {OOO} --offline-steps 3 --critic-hidden-dims 16 16",
    "rlpd_ooo": f"{RND} {OOO} --learning-starts 200 --num-qs 2 --utd-ratio 1",
    "td3_rnd": f"{RND} --save-at 230",
    "pex": "--offline-steps 3 --learning-starts 200 --save-at 230",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the documented program has written its files, with fewer episodes."""
    path = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        exec(compile(PROGRAM.replace("50,", "3,").replace("500,", "40,"), "make_data.py", "exec"), {})
    return path


def with_rows(script, folder):
    """The script with the documented rows at the head of its TASKS."""
    text, path = (ROOT / f"{script}.py").read_text(), folder / f"{script}.py"
    assert text.count("\nTASKS = {\n") == 1
    path.write_text(text.replace("\nTASKS = {\n", "\nTASKS = {\n" + ROWS))
    spec = importlib.util.spec_from_file_location(f"own_{script}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", WORDS)
@pytest.mark.parametrize("env_id", HIGH)
def test_a_row_and_an_npz_are_enough(script, env_id, folder, monkeypatch):
    monkeypatch.chdir(folder)
    module, high, tables, file = with_rows(script, folder), HIGH[env_id], [], dict(np.load(FILES[env_id]))
    row, session = module.TASKS[env_id], Session(module, monkeypatch)
    monkeypatch.setitem(module.TASKS, env_id, row)  # of which Session has shortened the episodes
    session.spy("ReplayBuffer", lambda table, *_: tables.append(table))
    session.run("--env-id", env_id, "--dataset-path", FILES[env_id], "--online-steps", ONLINE,
                *small_words(*WORDS[script].split()))
    run = folder / "runs" / f"{env_id}__{script}__1"

    # The file: terminals count, and actions of the whole range are those of the policy's.
    (table,) = tables
    np.testing.assert_array_equal(table["terminations"], file["terminals"])
    assert file["terminals"].sum() == (40 if "inverted" in env_id else 0)
    assert np.abs(file["actions"]).max() > 0.9 * high
    np.testing.assert_allclose(table["actions"], (file["actions"] / high).clip(-1 + 1e-5, 1 - 1e-5), atol=1e-6)
    np.testing.assert_allclose(table["rewards"], file["rewards"], rtol=1e-6)
    np.testing.assert_allclose(table["next_observations"], file["next_observations"], rtol=1e-6)

    # The environment: played again by hand, with the torques that the stored actions mean.
    columns = json.loads((run / "config.json").read_text())["replay_columns"]
    rows = np.fromfile(run / "replay.bin", np.float32).reshape(ONLINE, -1)
    online = {name: rows[:, start:stop].squeeze() for name, (start, stop) in columns.items()}
    env = gym.make(row.gym_id)
    obs, done, episode = None, True, -1
    for t in range(ONLINE):
        if done:
            episode += 1
            obs, _ = env.reset(seed=module.derive_seed(1, "training episode", episode))
        np.testing.assert_allclose(online["observations"][t], obs, rtol=1e-4, atol=1e-4)
        action = high * np.clip(online["actions"][t : t + 1], -1, 1)
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        done = terminated or truncated
        assert online["terminations"][t] == terminated and online["rewards"][t] == pytest.approx(reward, rel=1e-4)
        assert online["episodes"][t] == online["episodes"][0] + episode
    assert online["terminations"].sum() > 2 if "inverted" in env_id else not online["terminations"].any()

    # The scores: returns.
    results = json.loads((run / "results.json").read_text())
    played = [summary for row in results["rows"] for key, summary in row.items() if key != "env_step"]
    assert played and all(s["eval/normalized_score"] == pytest.approx(s["eval/return"]) for s in played)
    assert all(s["eval/success_rate"] == 0 and "eval/far_success_rate" not in s for s in played)
    lengths = [e["length"] for s in played for e in s["per_episode"]]
    assert set(lengths) == {200} if env_id == "pendulum-v0" else max(lengths) < 1000
    assert {"pretrain", "online"} & {record["phase"] for record in read_lines(run / "metrics.jsonl")}


def test_the_documented_commands_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    module = with_rows("iql_ooo", folder)
    lines = [shlex.split(line) for line in COMMANDS.splitlines()]
    assert lines[0] == ["python", "make_data.py"] and PROGRAM.startswith("# make_data.py\n")
    for _, script, *words in lines[1:]:
        args = module.parse_args(words)
        assert script == "iql_ooo.py" and FILES[args.env_id] == args.dataset_path and args.offline_steps == 500
        module.load_dataset(args, module.make_env(args.env_id), 1)
    assert {words[words.index("--env-id") + 1] for words in lines[1:]} == set(FILES)
