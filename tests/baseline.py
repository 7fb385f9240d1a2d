"""What the tests of td3_rnd.py and pex.py have in common: runs in this process, and kills."""

import copy
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import Box

HORIZON, KITCHEN_HORIZON = 30, 12  # of the episodes inside this process; kitchen is slow to simulate


def small_words(*words):
    """Networks and intervals that take about a second."""
    return [*"""--hidden-dims 16 16 --batch-size 16 --eval-episodes 1 --eval-every 10000 --log-every 10
    --checkpoint-every 10""".split(), *map(str, words)]


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
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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
    """The table, results.json, evals.jsonl and the saved policies agree."""
    assert json.loads((run / "results.json").read_text())["rows"] == rows
    assert [row["env_step"] for row in rows] == times
    evaluations = {r["env_step"]: r["episodes"] for r in read_lines(run / "evals.jsonl") if r["phase"] == "online"}
    assert evaluations.keys() == {0, *times}
    for row in rows:
        returns = [episode["return"] for episode in evaluations[row["env_step"]]]
        assert row["policy"]["eval/return"] == pytest.approx(np.mean(returns))
    saved = {t: script.load_policy(run / f"policy_{t}.pt") for t in times}
    for name, value in agent.state_dict().items():  # the last one is the agent as it is now
        assert torch.equal(saved[times[-1]].state_dict()[name], value), name
    action = saved[times[-1]].act(np.ones(agent.options["obs_dim"], np.float32))
    assert action.shape == (agent.options["act_dim"],) and action.dtype == np.float32 and np.abs(action).max() <= 1


def outcome(run):
    """What is the same in every run: all bytes, but for times, ids and the run's name; of the last checkpoint the
    learners and counters."""
    differ = {"timing.jsonl", "config.json", ".lock", "checkpoint.pt"}
    found = {path.name: path.read_bytes() for path in run.iterdir() if path.name not in differ}
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    return found | {"checkpoint.pt": flat({name: checkpoint[name] for name in ("models", "progress")})}


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
    """Four eager and four compiled updates end in equal parameters. build(args, buffer) -> (the four functions, {name:
    module})."""
    states = []
    for args.compile in ("off", "on"):
        torch.manual_seed(0)
        draw = torch.randn(200, 12).clamp(-0.9, 0.9).numpy()
        data = dict(observations=draw[:, :4], actions=draw[:, 4:6], rewards=draw[:, 6], next_observations=draw[:, 7:11],
                    terminations=np.zeros(200, np.float32), episodes=np.zeros(200, np.float32))
        buffer = script.ReplayBuffer(data, 0, torch.device("cpu"))
        updates, modules = build(args, buffer)
        for number, update in enumerate(updates):
            torch.manual_seed(number)
            update(buffer.data[number * 32 : number * 32 + 32])
        states.append({f"{name}.{key}": value for name, module in modules.items()
                       for key, value in module.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=3e-5, msg=name)
