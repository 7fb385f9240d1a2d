"""What the tests of td3_rnd.py and pex.py have in common."""

import copy
import hashlib
import json
import signal
from dataclasses import replace
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
        for name in {"Agent", "TD3Agent", "PEXAgent"} & set(vars(script)):
            kind = getattr(script, name)

            def init(agent, *args, build=kind.__init__, **options):
                build(agent, *args, **options)
                self.agents.append(agent)

            monkeypatch.setattr(kind, "__init__", init)
        for env_id, task in script.ENVIRONMENTS.items():
            horizon = KITCHEN_HORIZON if task.family == "kitchen" else HORIZON
            monkeypatch.setitem(script.ENVIRONMENTS, env_id, replace(task, horizon=horizon))

    def run(self, *words):
        self.agents.clear()
        return self.script.main(self.script.parse_args([str(word) for word in words]))

    def spy(self, name, before):
        """Call before(*args) ahead of every call of a function of the script."""
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
        env_id = run.name.split("__")[0]
        assert row[script.SCRIPT] == script.summarize(env_id, evaluations[row["env_step"]])
    act, content = script.load_policy(run / f"policy_{times[-1]}.pt")
    state = agent.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in content["agent"].items())
    action = act(np.ones(agent.actor[0].in_features if hasattr(agent.actor, "__getitem__")
                         else agent.actor.net[0].in_features, np.float32))
    assert np.abs(action).max() <= 1 and action.dtype == np.float32


def outcome(run):
    """Bytes of the records, and fingerprints of policies, data and the last checkpoint."""
    def digest(content):
        if isinstance(content, torch.Tensor):
            return hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
        if isinstance(content, dict):
            return {str(key): digest(value) for key, value in content.items()}
        return [digest(value) for value in content] if isinstance(content, list | tuple) else content

    found = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl", "results.json")}
    found |= {path.name: path.read_bytes() for path in sorted((run / "replay").glob("*"))}
    return found | {path.name: digest(torch.load(path, weights_only=True)) for path in sorted(run.glob("*.pt"))}


def check_determinism_and_resume(folder, script, words, moments):
    """Twice the same bytes; and after a real SIGKILL before each moment (end of a path that is written, or (that, for
    the how many-th time)), with --resume, still the same."""
    box = Box(folder, script=script)
    try:
        (one, again, killed) = (["--exp-name", name] for name in ("one", "again", "killed"))
        whole = {}
        for name in (one, again):
            child = box.run(*words, *name)
            assert child.code == 0, child.err
            (run,) = (box.work / "runs").glob(f"*__{name[1]}__1")
            whole[name[1]] = outcome(run)
        assert whole["one"] == whole["again"]
        for number, moment in enumerate(moments):
            path, times = moment if isinstance(moment, tuple) else (moment, 1)
            resume = ["--resume"] if number else []
            child = box.run(*words, *killed, *resume, signal_at=(signal.SIGKILL, "os.rename", path, times))
            assert child.code == -signal.SIGKILL, child.err
        child = box.run(*words, *killed, "--resume")
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


def check_compiled(script, build, **options):
    """Four eager and four compiled updates end in equal parameters. build(args, buffer, device) -> (update, counters,
    {name: module})."""
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        args, device = script.Args(batch_size=32, compile=compiled, **options), torch.device("cpu")
        shapes = dict(observations=(4,), actions=(2,), rewards=(), next_observations=(4,), terminations=(), episodes=())
        buffer = script.ReplayBuffer(shapes, 200, device)
        buffer.data.copy_(torch.randn(200, buffer.data.shape[1]).clamp(-0.9, 0.9))
        update, counters, modules = build(args, buffer, device)
        torch.manual_seed(1)
        for number in range(4):
            update(buffer.data[number * 32 : number * 32 + 32])
            counters["grad_step"] += 1
        states.append({f"{name}.{key}": value for name, module in modules.items()
                       for key, value in module.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=3e-5, msg=name)
