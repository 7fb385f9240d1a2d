"""What the tests of td3_rnd.py and pex.py have in common: runs in this process, and kills."""

import copy
import importlib.util
import json
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from runner import Box

HORIZON, KITCHEN_HORIZON = 30, 12  # of the episodes inside this process; kitchen is slow to simulate


def small_words(*words):
    """Networks and intervals that take about a second."""
    return [*"""--hidden-dims 16 16 --batch-size 16 --eval-episodes 1 --final-episodes 2 --eval-every 10000
    --log-every 10 --checkpoint-every 10""".split(), *map(str, words)]


class Session:
    """Runs a script in this process. agents: every agent that was built, in order."""

    def __init__(self, script, monkeypatch):
        self.script, self.monkeypatch, self.agents = script, monkeypatch, []
        for name in {"Agent", "FujimotoAgent", "PEXAgent"} & set(vars(script)):
            kind = getattr(script, name)

            def init(agent, *args, build=kind.__init__, **options):
                build(agent, *args, **options)
                self.agents.append(agent)

            monkeypatch.setattr(kind, "__init__", init)
        for env_id, task in script.TASKS.items():
            horizon = KITCHEN_HORIZON if task.family == "kitchen" else HORIZON
            monkeypatch.setitem(script.TASKS, env_id, task._replace(horizon=horizon))

    def run(self, *words):
        self.agents.clear()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            return self.script.main(self.script.parse_args([str(word) for word in words]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def spy(self, name, before):
        """Call before(*args, **options) ahead of every call of a function of the script."""
        function = getattr(self.script, name)

        def wrapper(*args, **options):
            before(*args, **options)
            return function(*args, **options)

        self.monkeypatch.setattr(self.script, name, wrapper)


def run_directory(script, env_id):
    return Path("runs") / f"{env_id}__{script.SCRIPT}__1"


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses_of(run, phase):
    found = [r for r in read_lines(run / "metrics.jsonl") if r["phase"] == phase and "losses/critic" in r]
    assert found
    return found


def check_scores(script, run, rows, times, agent):
    """The table, results.json and the saved policies agree; the final start states are not those of the curves."""
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert results["rows"] == rows and [row["env_step"] for row in rows] == times and results["diverged"] == {}
    assert results["run_id"] == config["run_id"] and results["source_run_id"] == config["source_run_id"]
    evaluations = {r["env_step"]: r["episodes"] for r in read_lines(run / "evals.jsonl") if r["phase"] == "online"}
    assert evaluations.keys() == {0, *times}
    for row in rows:
        assert row.keys() == {"env_step", "policy"}
        episodes = row["policy"]["per_episode"]
        assert len(episodes) == row["policy"]["eval/episodes"] == 2
        assert row["policy"]["eval/return"] == pytest.approx(np.mean([episode["return"] for episode in episodes]))
    ends = np.cumsum([episode["length"] for episode in results["training_episodes"]]).tolist()
    assert [episode["env_step"] for episode in results["training_episodes"]] == ends and ends[-1] == times[-1]
    saved = {t: script.load_policy(run / f"policy_{t}.pt") for t in times}
    for path in run.glob("*.pt"):
        assert torch.load(path, weights_only=True)["run_id"] == config["run_id"]
    for name, value in agent.state_dict().items():  # the last one is the agent as it is now
        assert torch.equal(saved[times[-1]].state_dict()[name], value), name
    action = saved[times[-1]].act(np.ones(agent.options["obs_dim"], np.float32))
    assert action.shape == (agent.options["act_dim"],) and action.dtype == np.float32 and np.abs(action).max() <= 1


def check_divergence_is_said(session, words, capsys):
    """A ceiling that is passed: one line, one record, and a place in results.json."""
    session.monkeypatch.setattr(session.script, "value_ceiling", lambda *_: 1e-6)
    session.run(*words)
    err, (run,) = capsys.readouterr().err, Path("runs").iterdir()
    assert err.count("policy diverges") == 1
    records = [r for r in read_lines(run / "metrics.jsonl") if "diverged" in r]
    (said,) = json.loads((run / "results.json").read_text())["diverged"].items()
    assert len(records) == 1 and records[0]["diverged"] == said[0] == "policy"
    assert said[1] == {**{k: records[0][k] for k in ("phase", "env_step", "grad_step")}, "ceiling": 1e-6,
                       "magnitude": max(v for k, v in records[0].items() if k.endswith("_magnitude"))}


def with_own_task(script, folder, gym_id):
    """The script, imported anew with a row for another environment in TASKS."""
    text = (ROOT / f"{script}.py").read_text()
    assert text.count("TASKS = {\n") == 1
    row = f'TASKS = {{\n    "mine": Task("own", "{gym_id}", {HORIZON}, (), {{}}, {{}}),\n'
    path = folder / f"{script}_own.py"
    path.write_text(text.replace("TASKS = {\n", row))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_own_task(script, folder, monkeypatch, words, gym_id):
    """A row of TASKS and an .npz are enough: actions are scaled to the environment's range, and terminations count."""
    env, rng, rows = gym.make(gym_id), np.random.default_rng(0), []
    high = env.action_space.high
    for seed in range(4):
        obs, done = env.reset(seed=seed)[0], False
        for step in range(HORIZON):
            action = rng.uniform(-high, high).astype(np.float32)
            next_obs, reward, done, _, _ = env.step(action)
            rows.append((obs, action, reward, done, step == HORIZON - 1 and not done, next_obs))
            obs = next_obs
            if done:
                break
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    data = dict(zip(keys, map(np.array, zip(*rows, strict=True)), strict=True))
    np.savez(folder / "mine.npz", **data)

    session = Session(with_own_task(script, folder, gym_id), monkeypatch)
    module, tables = session.script, []
    session.spy("ReplayBuffer", lambda table, *_: tables.append(table))
    session.run("--env-id", "mine", "--dataset-path", "mine.npz", "--online-steps", 60, "--save-at", *words)
    np.testing.assert_allclose(tables[0]["actions"], (data["actions"] / high).clip(-1 + 1e-5, 1 - 1e-5), atol=1e-6)
    np.testing.assert_array_equal(tables[0]["terminations"], data["terminals"])
    run = Path(f"runs/mine__{script}_own__1")
    columns = json.loads((run / "config.json").read_text())["replay_columns"]
    replay = np.fromfile(run / "replay.bin", np.float32).reshape(60, -1)
    online = {name: replay[:, start:end] for name, (start, end) in columns.items()}
    # The first episode again, in the environment itself.
    obs, done, t = env.reset(seed=module.derive_seed(1, "training episode", 0))[0], False, 0
    while not done and t < HORIZON:
        np.testing.assert_allclose(online["observations"][t], obs, rtol=1e-5, atol=1e-5)
        obs, reward, done, _, _ = env.step(high * online["actions"][t].clip(-1, 1))
        assert online["terminations"][t, 0] == done and online["rewards"][t, 0] == pytest.approx(reward, rel=1e-4)
        t += 1
    assert online["episodes"][t, 0] == online["episodes"][0, 0] + 1
    assert done == (gym_id == "InvertedPendulum-v5")


def outcome(run):
    """What is the same in every run: all but times, ids, the run's name and its settings."""
    differ = {"timing.jsonl", "config.json", ".lock"}
    found = {path.name: path.read_bytes() for path in run.iterdir() if path.name not in differ}
    for name, content in found.items():
        if name.endswith(".pt"):
            content = flat(torch.load(run / name, weights_only=True))
        elif name == "results.json":
            content = json.loads(content)
        if isinstance(content, dict):
            found[name] = {k: v for k, v in content.items()
                           if k not in ("run_id", "source_run_id", "exp_name", "args", "sizes")}
    return found


def flat(content):
    """Nested dicts and lists with tensors as nested lists."""
    if isinstance(content, dict):
        return {key: flat(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [flat(value) for value in content]
    return content.tolist() if isinstance(content, torch.Tensor) else content


def check_determinism_and_resume(folder, script, words, moments):
    """Twice the same bytes; and after a real SIGKILL before each moment (end of a path that is written, or (that, for
    the how many-th time)), with --resume, still the same."""
    box = Box(folder, script=script)
    try:
        whole = {}
        for name in ("one", "again"):
            child = box.run(*words, "--exp-name", name)
            assert child.code == 0, child.err
            (run,) = (box.work / "runs").glob(f"*__{name}__1")
            whole[name] = outcome(run)
        assert whole["one"] == whole["again"]
        for moment in moments:
            path, times = moment if isinstance(moment, tuple) else (moment, 1)
            child = box.run(*words, "--exp-name", "killed", "--resume",
                            signal_at=(signal.SIGKILL, "os.rename", path, times))
            assert child.code == -signal.SIGKILL, child.err
        child = box.run(*words, "--exp-name", "killed", "--resume")
        assert child.code == 0, child.err
        (run,) = (box.work / "runs").glob("*__killed__1")
        found = outcome(run)
        assert found.keys() == whole["one"].keys()
        assert [name for name in found if found[name] != whole["one"][name]] == []
    finally:
        box.stop()


def check_refused(script, words, named, capsys, folder):
    """One line on stderr that names the cause, status 2, and not a file more than before."""
    before = copy.copy(sorted(folder.rglob("*")))
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args([str(word) for word in words]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert named in err and sorted(folder.rglob("*")) == before


def check_compiled(script, args, build):
    """300 eager and 300 compiled updates, each in one graph, end in parameters that differ by rounding only: by 1e-3 of
    the largest of their tensor. build(args, buffer) -> (update functions, taken in turn, {name: module})."""
    states = []
    for args.compile in ("off", "on"):
        torch.manual_seed(0)
        draw = torch.randn(200, 12).clamp(-0.9, 0.9).numpy()
        data = dict(observations=draw[:, :4], actions=draw[:, 4:6], rewards=draw[:, 6], next_observations=draw[:, 7:11],
                    terminations=np.zeros(200, np.float32), episodes=np.zeros(200, np.float32))
        buffer = script.ReplayBuffer(data, 0, torch.device("cpu"))
        torch._dynamo.utils.counters.clear()
        updates, modules = build(args, buffer)
        for number in range(300):
            torch.manual_seed(number)
            updates[number % len(updates)](buffer.sample(32))
        states.append({f"{name}.{key}": value for name, module in modules.items()
                       for key, value in module.state_dict().items()})
    assert not torch._dynamo.utils.counters["graph_break"]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-3 * value.abs().max().item(), msg=name)
