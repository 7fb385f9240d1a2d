"""A few hundred steps of every task through all phases, every ablation once, and what a run leaves behind.

The runs happen in this process, on tiny datasets, with tiny networks and short episodes (the horizon is lowered).
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import SMALL

import iql_ooo as ooo

PEN, HORIZON = "pen-binary-v0", 30
KITCHEN_HORIZON = 12  # slow to simulate


class Session:
    """Runs the script in this process. agents: (agent, its first weights) of every agent built, in order."""

    def __init__(self, monkeypatch):
        self.agents, self.monkeypatch = [], monkeypatch
        build = ooo.Agent.__init__

        def init(agent, *args, **options):
            build(agent, *args, **options)
            self.agents.append((agent, copy.deepcopy(agent.state_dict())))

        monkeypatch.setattr(ooo.Agent, "__init__", init)
        for env_id, task in ooo.TASKS.items():
            horizon = KITCHEN_HORIZON if task.family == "kitchen" else HORIZON
            monkeypatch.setitem(ooo.TASKS, env_id, task._replace(horizon=horizon))

    def run(self, *words):
        """main(parse_args(words)); returns its result."""
        self.agents.clear()
        return ooo.main(ooo.parse_args([str(word) for word in words]))

    def spy(self, name, before):
        """Call before(*args) ahead of every call of a function of the script."""
        function = getattr(ooo, name)

        def wrapper(*args, **options):
            before(*args, **options)
            return function(*args, **options)

        self.monkeypatch.setattr(ooo, name, wrapper)


@pytest.fixture
def session(monkeypatch, in_tmp):
    return Session(monkeypatch)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(run, phase=None):
    records = read_lines(run / "metrics.jsonl")
    return [r for r in records if r["phase"] == phase] if phase else records


def replay(run):
    """replay.bin as its config.json describes it: {column: (n,) or (n, dim)}."""
    columns = json.loads((run / "config.json").read_text())["replay_columns"]
    rows = np.fromfile(run / "replay.bin", np.float32).reshape(-1, max(stop for _, stop in columns.values()))
    return {name: rows[:, start:stop].squeeze(1) if stop == start + 1 else rows[:, start:stop]
            for name, (start, stop) in columns.items()}


def directory(env_id, name="iql_ooo"):
    return Path("runs") / f"{env_id}__{name}__1"


def weights(path):
    return torch.load(path, weights_only=True)["agent"]


def same(one, other):
    """Equal tensors in the same order; a network with dropout numbers its layers differently."""
    return all(torch.equal(*pair) for pair in zip(one.values(), other.values(), strict=True))


def check_moved(state, first):
    assert not [name for name, value in state.items() if torch.equal(value, first[name])]


def check_metrics(run, rnd=True):
    """All numbers are finite, and every phase logged its losses."""
    for record in metrics(run):
        for name, value in record.items():
            assert isinstance(value, str) or math.isfinite(value), (name, record)
    names = ("value", "critic", "actor", "q_mean", "v_mean", "q_magnitude", "v_magnitude", "advantage_mean")
    losses = {f"losses/{name}" for name in names}
    bonus = {"losses/rnd", "rnd/batch_intrinsic_reward"} if rnd else set()
    last = {"rnd/online_mean", "rnd/online_scaled_mean", "rnd/online_std"} if rnd else set()
    where = {"phase", "env_step", "grad_step"}
    for phase, want in {"pretrain": losses | bonus, "online": losses | bonus | last, "retrain": losses}.items():
        logged = [r for r in metrics(run, phase) if "losses/value" in r]
        assert logged and all(r.keys() - {"diverged"} == where | want for r in logged), phase
        evaluations = [r for r in metrics(run, phase) if "eval/return" in r]
        names = {"eval/return", "eval/success_rate", "eval/normalized_score", "eval/episodes"}
        far = "eval/far_success_rate"  # in mazes, where an episode starts far from the goal
        assert evaluations and all(r.keys() - {far} == where | names for r in evaluations), phase


# === every task ===


@pytest.mark.parametrize("env_id", ooo.TASKS)
def test_all_phases(env_id, tiny, session, capsys):
    tiny(env_id)
    times, horizon = [40, 80], ooo.TASKS[env_id].horizon
    rows = session.run("--env-id", env_id, *SMALL, "--offline-steps", 60, "--online-steps", 80, "--retrain-at", *times,
                       "--retrain-steps", 40)
    run = directory(env_id)
    check_metrics(run)

    # One exploration agent and one exploitation agent for each t, all of whose weights moved, each in its own way.
    (explorer, first), *exploiters = session.agents
    assert len(exploiters) == len(times)
    check_moved(explorer.state_dict(), first)
    for t, (agent, first) in zip(times, exploiters, strict=True):
        check_moved(agent.state_dict(), first)
        assert same(weights(run / f"exploitation_{t}.pt"), agent.state_dict())
        assert not same(weights(run / f"exploration_{t}.pt"), agent.state_dict())
    assert same(weights(run / f"exploration_{times[-1]}.pt"), explorer.state_dict())

    # The saved policy is the agent's, for any observation, also after a detour over numbers alone.
    path, last = run / f"exploitation_{times[-1]}.pt", exploiters[-1][0]
    assert torch.load(path, weights_only=True)["env_id"] == env_id
    agent, rng = ooo.load_policy(path), np.random.default_rng(0)
    for _ in range(5):
        obs = rng.normal(size=last.options["obs_dim"]).astype(np.float32)
        action = agent.act(obs)
        np.testing.assert_array_equal(action, last.act(obs))
        assert action.shape == (last.options["act_dim"],) and np.abs(action).max() <= 1

    # Scores: in the table, in results.json, in metrics.jsonl, and per episode in evals.jsonl.
    results = json.loads((run / "results.json").read_text())
    assert (results["env_id"], results["rows"]) == (env_id, rows) and [row["env_step"] for row in rows] == times
    assert len(read_lines(run / "evals.jsonl")) == len([r for r in metrics(run) if "eval/return" in r])
    for row in rows:
        for kind in ("exploration", "exploitation"):
            episodes = row[kind]["per_episode"]
            assert len(episodes) == row[kind]["eval/episodes"]
            assert row[kind]["eval/return"] == np.mean([episode["return"] for episode in episodes])
            assert all(0 < episode["length"] <= horizon for episode in episodes)
    assert sum(episode["length"] for episode in results["training_episodes"]) == times[-1]
    assert f"{rows[-1]['exploitation']['eval/normalized_score']:.1f}" in capsys.readouterr().out

    # Every online step is in replay.bin, episode after episode, with the actions that were taken.
    online = replay(run)
    assert len(online["rewards"]) == times[-1]
    episodes = online["episodes"]
    assert (np.diff(episodes) >= 0).all() and len(set(episodes)) == math.ceil(times[-1] / horizon)
    inner = np.flatnonzero(np.diff(episodes) == 0)
    np.testing.assert_array_equal(online["next_observations"][inner], online["observations"][inner + 1])
    lengths = [r["charts/episodic_length"] for r in metrics(run, "online") if "charts/episodic_length" in r]
    assert sum(lengths) == times[-1] and lengths[0] == horizon


def test_config_says_what_was_run(tiny, session):
    tiny(PEN)
    session.run("--env-id", PEN, *SMALL, "--retrain-steps", 20, "--online-steps", 30, "--retrain-at", 30)
    config = json.loads((directory(PEN) / "config.json").read_text())
    assert config["script"] == "iql_ooo" and config["args"]["retrain_at"] == [30] and "commit" in config
    assert config["args"].keys() == asdict_keys()
    assert {"torch", "mujoco", "gymnasium-robotics", "minari", "python"} <= config["versions"].keys()
    assert config["dataset"]["transitions"] == 150 and len(config["dataset"]["sha256"]) == 64
    assert {"cpu", "cores", "threads", "gpu"} <= config["hardware"].keys()
    assert config["args"]["compile"] == "off" and config["resumed"] == [] and len(config["run_id"]) == 16


def asdict_keys():
    return {field.name for field in dataclasses.fields(ooo.Args)}


# === the data and the settings of the two phases ===


def test_what_each_phase_learns_from(tiny, session):
    """Exploration has the bonus and its own bounds; exploitation has none and the bounds of its rewards."""
    tiny(PEN)
    calls = []
    session.spy("iql_update", lambda agent, batch, bonus, **options: calls.append((bonus, options, batch["rewards"])))
    session.run("--env-id", PEN, *SMALL, "--reward-bias", -2, "--reward-scale", 3, "--gamma", 0.9,
                "--retrain-expectile", 0.6, "--retrain-steps", 2, "--retrain-at", 20, 40, "--online-steps", 40)
    explore, exploit = calls[: 30 + 40], calls[30 + 40 :]
    assert len(exploit) == 2 * 2
    for bonus, options, rewards in explore:
        assert bonus.shape == (16,) and (bonus > 0).all() and set(rewards.tolist()) <= {-9.0, -6.0}
        assert (options["expectile"], options["q_min"]) == (0.8, pytest.approx(-10))
        assert options["q_max"] == pytest.approx(50)
    for bonus, options, rewards in exploit:
        assert bonus == 0 and options["expectile"] == 0.6 and set(rewards.tolist()) <= {-9.0, -6.0}
        # Raw rewards are -1 and 0: (r - 2) 3 / (1 - 0.9)
        assert (options["q_min"], options["q_max"]) == (pytest.approx(-90, rel=1e-5), pytest.approx(-60, rel=1e-5))


def test_the_retraining_has_a_reward_scale_of_its_own(tiny, session):
    tiny(PEN)
    calls = []
    session.spy("iql_update", lambda agent, batch, bonus, **options: calls.append((options, batch["rewards"])))
    session.run("--env-id", PEN, *SMALL, "--retrain-reward-scale", 0.01, "--retrain-steps", 2, "--online-steps", 20,
                "--retrain-at", 20)
    assert all(set(rewards.tolist()) <= {-1.0, 0.0} for _, rewards in calls[:50])
    for options, rewards in calls[50:]:
        assert rewards.numpy().max() <= 0 and rewards.numpy().min() == pytest.approx(-0.01)
        assert options["q_min"] == pytest.approx(-1) and options["q_max"] == 0


def test_bounds_of_the_exploitation_phase_are_an_option(tiny, session):
    tiny(PEN)
    calls = []
    session.spy("iql_update", lambda *args, **options: calls.append((options["q_min"], options["q_max"])))
    session.run("--env-id", PEN, *SMALL, "--no-retrain-q-bounds", "--retrain-steps", 2, "--online-steps", 20,
                "--retrain-at", 20)
    assert calls[-2:] == [(-math.inf, math.inf)] * 2 and calls[0][1] < math.inf


def test_retraining_sees_the_data_up_to_t(tiny, session, monkeypatch):
    """D_off + D_on[:t], exactly, though it runs when the online phase is over."""
    tiny(PEN)
    drawn, offline = [], 150
    sample = ooo.ReplayBuffer.sample

    def watch(buffer, batch_size, first=None, *rest):
        rows = sample(buffer, batch_size, first, *rest)
        index = {bytes(value.numpy().tobytes()): i for i, value in enumerate(buffer.data[: buffer.size])}
        drawn.append((len(session.agents), buffer.size, [index[bytes(value.numpy().tobytes())] for value in rows]))
        return rows

    monkeypatch.setattr(ooo.ReplayBuffer, "sample", watch)
    session.run("--env-id", PEN, *SMALL, "--online-steps", 75, "--retrain-at", 40, 75, "--retrain-steps", 45)
    largest = {n: max(i for agent, _, rows in drawn if agent == n for i in rows) for n in (2, 3)}
    assert offline + 30 < largest[2] < offline + 40 and offline + 65 < largest[3] < offline + 75
    assert all(size == offline + 75 for agent, size, _ in drawn if agent > 1)
    # Pretraining draws offline rows only, the online phase what there is by then.
    for step, (_, size, rows) in enumerate(drawn[: 30 + 75]):
        assert size == offline + max(0, step - 29) and max(rows) < size


def test_pretraining_can_be_left_out(tiny, session):
    tiny(PEN)
    session.run("--env-id", PEN, *SMALL, "--offline-steps", 0, "--online-steps", 30, "--retrain-at", 30)
    assert not metrics(directory(PEN), "pretrain") and metrics(directory(PEN), "retrain")


def test_exploitation_can_be_left_out(tiny, session, capsys):
    tiny(PEN)
    (row,) = session.run("--env-id", PEN, *SMALL, "--online-steps", 30, "--retrain-at")
    assert row["env_step"] == 30 and row["exploration"] and "exploitation" not in row
    assert not list(directory(PEN).glob("exploitation*")) and not metrics(directory(PEN), "retrain")


# === ablations ===


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A finished run in a folder of its own: (folder, run directory)."""
    tiny(PEN)
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # In episodes of 30 steps, t = 45 lies inside the second one and is retrained for when it ends.
        Session(patch).run("--env-id", PEN, *SMALL, "--online-steps", 90, "--retrain-at", 45, 90)
    return folder / directory(PEN)


def exploit(session, source, *words):
    rows = session.run("--exploit-only", source, "--exp-name", "again", *words)
    return directory(PEN, "again"), rows


def test_exploit_only_repeats_the_retraining_exactly(session, source):
    run, rows = exploit(session, source)
    assert metrics(run) == metrics(source, "retrain")
    assert read_lines(run / "evals.jsonl") == [r for r in read_lines(source / "evals.jsonl") if r["phase"] == "retrain"]
    for t in (45, 90):
        assert same(weights(run / f"exploitation_{t}.pt"), weights(source / f"exploitation_{t}.pt"))
    assert rows == json.loads((source / "results.json").read_text())["rows"]  # the exploration scores are there too


def test_retraining_leaves_no_trace_in_the_online_phase(session, source):
    """Without the stop at t = 45, and with a longer retraining, exploration takes the same course."""
    session.run("--env-id", PEN, *SMALL, "--online-steps", 90, "--retrain-at", 90, "--retrain-steps", 31)
    kept = [r for r in metrics(source, "online") if not ("eval/return" in r and r["env_step"] == 45)]
    assert metrics(directory(PEN), "online") == kept
    assert same(weights(directory(PEN) / "exploration_90.pt"), weights(source / "exploration_90.pt"))
    assert not same(weights(directory(PEN) / "exploitation_90.pt"), weights(source / "exploitation_90.pt"))


def test_exploit_only_for_another_t(session, source):
    """Any t of the stored data, also one in the middle and one at which the run was not evaluated."""
    run, (row,) = exploit(session, source, "--retrain-at", 60)
    assert row["env_step"] == 60 and "exploration" not in row and row["exploitation"]["eval/episodes"] >= 1
    run, (row,) = exploit(session, source, "--retrain-at", 45, "--exp-name", "inner")
    assert same(weights(directory(PEN, "inner") / "exploitation_45.pt"), weights(source / "exploitation_45.pt"))


def test_retraining_records_say_for_which_t(source):
    """With several t, a loss record must be told from that of another t."""
    steps = [(r["env_step"], r["grad_step"]) for r in metrics(source, "retrain") if "losses/value" in r]
    assert steps == [(45, 20), (45, 30), (90, 20), (90, 30)]


def test_frozen_rnd(session, source):
    """The RND as it stood at t, not updated; its scaled reward is added, and nothing is clipped."""
    seen, bonuses = [], []
    session.spy("make_update", lambda args, buffer, agent, bounds, rnd, **rest: seen.append((bounds, rnd, rest)))
    session.spy("iql_update", lambda agent, batch, bonus, **options: bonuses.append((batch, bonus, options)))
    run, _ = exploit(session, source, "--retrain-frozen-rnd")
    for (bounds, rnd, options), t in zip(seen, (45, 90), strict=True):
        assert same(rnd.state_dict(), torch.load(source / f"rnd_{t}.pt", weights_only=True)["rnd"])
        assert options == {"exploitation": True} and bounds is None
    assert not same(seen[0][1].state_dict(), seen[1][1].state_dict())
    batch, bonus, options = bonuses[-1]
    assert torch.equal(bonus, 0.5 * seen[1][1].intrinsic_rewards(batch["next_observations"]))
    assert options["q_max"] == math.inf
    assert not same(weights(run / "exploitation_45.pt"), weights(source / "exploitation_45.pt"))
    assert not any("rnd" in name for record in metrics(run) for name in record)


def test_td3(session, source):
    run, _ = exploit(session, source, "--retrain-algorithm", "td3", "--retrain-at", 45)
    losses = [r for r in metrics(run) if "losses/critic" in r]
    assert losses and all(math.isfinite(r["losses/q_mean"]) and "losses/value" not in r for r in losses)
    saved = ooo.load_policy(run / "exploitation_45.pt")
    assert saved.options["squash"] is True
    agent, first = session.agents[0]
    obs = np.ones(45, np.float32)
    np.testing.assert_array_equal(saved.act(obs), agent.act(obs))
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, first[name])}
    assert {name.split(".")[0] for name in moved} == {"actor", "critic", "critic_target"}


def test_upsampling(session, source, monkeypatch):
    """Of each batch, as many rows as asked for come from the high rewards; the rest from all data."""
    batches = []
    sample = ooo.ReplayBuffer.sample

    def watch(buffer, *args):
        rows = sample(buffer, *args)
        batches.append(buffer.split(rows)["rewards"].clone())
        return rows

    monkeypatch.setattr(ooo.ReplayBuffer, "sample", watch)
    options = ["--retrain-at", 45, "--retrain-upsample", 6, "--upsample-reward", 0]
    run, _ = exploit(session, source, *options)
    assert all(len(batch) == 16 and (batch[-6:] == 0).all() for batch in batches)
    rest = torch.cat([batch[:-6] for batch in batches])
    assert (rest == -1).any()
    assert not same(weights(run / "exploitation_45.pt"), weights(source / "exploitation_45.pt"))
    batches.clear()
    exploit(session, source, *options, "--upsample-trajectories", "--exp-name", "trajectories")
    assert all(len(batch) == 16 for batch in batches) and (torch.cat([b[-6:] for b in batches]) == -1).any()


def test_upsampling_without_high_rewards_is_uniform_sampling(session, source, capsys):
    run, _ = exploit(session, source, "--retrain-upsample", 6, "--upsample-reward", 1)
    assert same(weights(run / "exploitation_90.pt"), weights(source / "exploitation_90.pt"))
    assert "uniform" in capsys.readouterr().out


def first_evaluations(session):
    """Weights of each agent at its evaluation before its first retraining step, in order."""
    starts = []

    def before(run, env, agent, phase, env_step, step):
        if phase == "retrain" and step == 0:
            starts.append(copy.deepcopy(agent.state_dict()))

    session.spy("evaluate_and_log", before)
    return starts


def test_warm_start(session, source):
    starts = first_evaluations(session)
    run, _ = exploit(session, source, "--warm-start")
    assert same(weights(run / "exploitation_45.pt"), weights(source / "exploitation_45.pt"))  # the first: from scratch
    assert same(starts[1], weights(run / "exploitation_45.pt"))
    assert not same(weights(run / "exploitation_90.pt"), weights(source / "exploitation_90.pt"))
    exploit(session, source, "--exp-name", "cold")
    assert not same(starts[3], starts[2]) and not same(starts[3], weights(run / "exploitation_45.pt"))


def test_sync(tiny, session):
    """The retraining for t = 45 runs when the second episode ends; then the explorer is the exploitation agent."""
    tiny(PEN)
    after = []

    def before(run, buffer, explorer, rnd, update, env, eval_env, until):
        after.append((run.progress["env_step"], copy.deepcopy(explorer.state_dict()),
                      {int(state["step"]) for o in explorer.optimizers for state in o.state.values()}))

    session.spy("explore", before)
    session.run("--env-id", PEN, *SMALL, "--sync", "--retrain-dropout", 0.0, "--online-steps", 90,
                "--retrain-at", 45, 90)
    run = directory(PEN)
    assert [step for step, *_ in after] == [0, 60, 90]
    exploitation = weights(run / "exploitation_45.pt")
    assert same(after[1][1], exploitation) and not same(after[0][1], exploitation)
    assert after[1][2] == {30}  # the optimisers go on as the exploitation agent's too
    assert not same(weights(run / "exploration_90.pt"), exploitation)


def test_without_intrinsic_reward_there_is_no_rnd(tiny, session):
    tiny(PEN)
    session.run("--env-id", PEN, *SMALL, "--intrinsic-reward-scale", 0, "--online-steps", 50, "--retrain-at", 50)
    run = directory(PEN)
    check_metrics(run, rnd=False)
    assert not list(run.glob("rnd_*"))


def test_rnd_reward_forms_differ(tiny, session):
    tiny(PEN)
    logged = {}
    for form in ("max", "l2"):
        session.run("--env-id", PEN, *SMALL, "--rnd-reward", form, "--exp-name", form, "--offline-steps", 20,
                    "--online-steps", 20, "--retrain-at")
        logged[form] = metrics(directory(PEN, form), "pretrain")[1]
    assert logged["max"]["losses/rnd"] == logged["l2"]["losses/rnd"]  # the predictor learns the same
    assert logged["max"]["rnd/batch_intrinsic_reward"] != logged["l2"]["rnd/batch_intrinsic_reward"]


def test_intrinsic_reward_over_the_last_steps(tiny, session):
    """Figure 3: statistics of the bonus of the latest transitions as the RND stands, unscaled and scaled."""
    tiny(PEN)
    states = []
    session.spy("recent_intrinsic_reward", lambda args, buffer, rnd: states.append((copy.deepcopy(rnd), buffer)))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 60, "--retrain-at", 60, "--retrain-steps", 1,
                "--intrinsic-reward-scale", 2)
    rnd, buffer = states[-1]
    following = buffer.split(buffer.data[150:210])["next_observations"]
    rewards = rnd.intrinsic_rewards(following).double().numpy()
    record = [r for r in metrics(directory(PEN), "online") if "rnd/online_mean" in r][-1]
    assert record["env_step"] == 60
    assert record["rnd/online_mean"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert record["rnd/online_scaled_mean"] == pytest.approx(2 * rewards.mean(), rel=1e-5)
    assert record["rnd/online_std"] == pytest.approx(rewards.std(), rel=1e-4)


def test_kitchen_cumulative_reaches_the_data(tiny, session, capsys):
    tiny("kitchen-complete-v0")
    seen = []

    session.spy("pretrain", lambda run, buffer, *rest: seen.append(buffer.first(buffer.size)["rewards"].sum().item()))
    short = ["--offline-steps", 2, "--online-steps", 2, "--retrain-at", 2, "--retrain-steps", 2]
    for number, words in enumerate(([], ["--kitchen-cumulative"])):
        session.run("--env-id", "kitchen-complete-v0", *SMALL, *short, "--exp-name", number, *words)
    assert seen == [28.0, 34.0]


# === evaluation of a saved policy ===


def test_eval_only(session, source, capsys):
    seeds = []
    session.spy("evaluate", lambda env, agent, episodes, seed, frames: seeds.append(seed))
    summary = session.run("--eval-only", source, "--episodes", 3)
    out = capsys.readouterr().out
    result = json.loads((source / "exploitation_90_eval.json").read_text())
    assert result["policy"] == "exploitation_90.pt" and len(result["per_episode"]) == 3
    assert summary == {name: result[name] for name in summary} and summary["eval/episodes"] == 3
    assert f"eval/normalized_score {summary['eval/normalized_score']:.4g}" in out
    again = session.run("--eval-only", source, "--episodes", 3)
    assert again == summary
    assert seeds == [seeds[0]] * 2 and seeds[0] != 1  # not the episodes seen in training, whose seed was 1
    assert not (source / "exploitation_90.mp4").exists()


def working_gl():
    """A backend with which MuJoCo renders without a display, or None."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    for name in dict.fromkeys((os.environ.get("MUJOCO_GL") or "osmesa", "osmesa", "egl")):
        environment = {**os.environ, "MUJOCO_GL": name}
        if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0:
            return name
    return None


def test_video(session, source, monkeypatch, capsys):
    backend = working_gl()
    if backend is None:
        pytest.skip("no GL backend can render here (osmesa, egl)")
    import imageio.v3

    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setitem(ooo.TASKS, PEN, ooo.TASKS[PEN]._replace(horizon=5))
    session.run("--eval-only", source, "--episodes", 2, "--video")
    frames = list(imageio.v3.imiter(source / "exploitation_90.mp4"))
    assert len(frames) == 10 and frames[0].shape == (480, 480, 3)
    assert np.std(frames[0]) > 5 and (frames[0] != frames[4]).any()
    assert "exploitation_90.mp4 (10 frames)" in capsys.readouterr().out
    assert not list(source.glob("*tmp*"))


# === wandb ===


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb; (started, sent): the arguments of wandb.init and of log."""
    started, sent = [], []
    stub = types.ModuleType("wandb")
    stub.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=os.environ.get("WANDB_MODE")))
    stub.init = lambda **options: started.append(options) or types.SimpleNamespace(log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return started, sent


TRACK = ["--env-id", PEN, *SMALL, "--online-steps", 30, "--retrain-at", 30, "--track"]


def test_track_sends_what_the_files_hold(tiny, session, wandb):
    tiny(PEN)
    started, sent = wandb
    session.run(*TRACK, "--wandb-mode", "offline", "--wandb-project", "mine")
    assert started[0]["project"] == "mine" and started[0]["mode"] == "offline"
    assert started[0]["config"]["args"]["env_id"] == PEN
    record = metrics(directory(PEN), "pretrain")[0]
    where = {"phase": "pretrain", "env_step": 0, "grad_step": 0}
    assert sent[0] == where | {f"pretrain/{name}": value for name, value in record.items() if name not in where}
    assert len(sent) == len(metrics(directory(PEN)))


def test_a_run_is_itself_for_wandb_too(tiny, session, wandb, monkeypatch):
    """Its id is the run's own, not the path's; an offline part of a run never replaces another; variables count."""
    tiny(PEN)
    started, _ = wandb
    unfinished = directory(PEN) / "results.json"  # without it a run goes on
    session.run(*TRACK, "--wandb-mode", "online")
    unfinished.unlink()
    session.run(*TRACK, "--wandb-mode", "online", "--resume")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        unfinished.unlink()
        session.run(*TRACK, "--resume")
    ids = [options["id"] for options in started]
    run_id = json.loads((directory(PEN) / "config.json").read_text())["run_id"]
    assert ids[:2] == [run_id] * 2 and len(set(ids)) == 3 and {options["group"] for options in started} == {run_id}
    # What is not given is left to wandb, which reads its own variables.
    assert [options["mode"] for options in started] == ["online", "online", None, None]
    assert {options["project"] for options in started} == {None}
    shutil.rmtree(directory(PEN))
    session.run(*TRACK)
    assert started[-1]["id"] != run_id
