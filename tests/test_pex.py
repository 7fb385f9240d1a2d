"""pex.py: composition, the frozen policy, the update, PEX's own updates, evaluation, every task, --init-from, resume
and errors.

What pex.py shares with iql_ooo.py, byte for byte (test_shared_blocks.py), is tested there.
"""

import copy
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from baseline import (
    Session,
    check_compiled,
    check_determinism_and_resume,
    check_divergence_is_said,
    check_own_task,
    check_refused,
    check_scores,
    losses_of,
    outcome,
    read_lines,
    run_directory,
    small_words,
)
from runner import Box
from test_golden import INFOS, check_step, load, oriented, parameters, read, tensors
from test_golden import close as near
from test_losses import (
    ACT,
    BATCH,
    CPU,
    HIDDEN,
    IQL,
    OBS,
    array,
    close,
    forward,
    linears,
    log_density,
    make_batch,
    q_values,
)

import iql_ooo
import pex

PEN, POINT = "pen-binary-v0", "maze2d-missing-data-large-v1"
SMALL = small_words("--offline-steps", 15, "--learning-starts", 5)


@pytest.fixture
def session(monkeypatch, in_tmp):
    return Session(pex, monkeypatch)


def make_agent(learning_rate=1e-2, inv_temperature=10.0, epsilon=0.1):
    torch.manual_seed(0)
    offline = pex.Agent(OBS, ACT, HIDDEN, learning_rate, CPU)
    with torch.no_grad():
        for parameter in offline.critic_target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        offline.value.biases[-1].sub_(2.0)  # advantages of both signs
    agent = pex.PEXAgent(OBS, ACT, HIDDEN, learning_rate, CPU, -5.0, inv_temperature, epsilon)
    agent.take_over(offline)
    return agent, offline


def set_q(agent, monkeypatch, q_offline, q_learnt):
    """Let min Q be these for the two policies' actions: recognised by what the agent proposes."""
    actions = []

    def critic(observations, proposed):
        actions.append(proposed)
        q = q_offline if len(actions) % 2 else q_learnt  # the frozen policy's action is valued first
        return torch.tensor([q + 1.0, q]).repeat(len(observations), 1).T  # the smaller member counts

    monkeypatch.setattr(agent.critic, "forward", critic)


# === composition ===


@pytest.mark.parametrize("inverse", [10.0, 0.0, 1.0])
@pytest.mark.parametrize(("q_offline", "q_learnt"), [(0.0, 0.0), (1.0, 0.9), (-3.0, -2.7), (0.0, 50.0), (800.0, 0.0)])
def test_probabilities_of_hand_made_values(inverse, q_offline, q_learnt):
    agent, _ = make_agent(inv_temperature=inverse)
    got = agent.probabilities(torch.tensor([[q_offline], [q_learnt]], dtype=torch.float64))
    difference = inverse * (q_learnt - q_offline)
    learnt = 1.0 if difference > 700 else 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0
    assert got[:, 0].tolist() == pytest.approx([1 - learnt, learnt], abs=1e-12)


def test_composition_draws_with_these_probabilities(monkeypatch):
    """Over 20,000 draws, and exactly at the boundary of a draw."""
    agent, offline = make_agent()
    set_q(agent, monkeypatch, 1.0, 1.1)
    learnt = 1 / (1 + math.exp(-1.0))
    observations = torch.randn(1, OBS).expand(20_000, -1)
    noise, uniform = torch.randn(20_000, ACT), torch.rand(20_000)
    actions, from_learnt = agent.compose(observations, noise, uniform)
    assert from_learnt.float().mean().item() == pytest.approx(learnt, abs=5 * math.sqrt(0.25 / 20_000))
    assert torch.equal(from_learnt, uniform >= agent.probabilities(torch.tensor([[1.0], [1.1]]))[0])
    mean = np.tanh(forward(*linears(offline.actor.net), array(observations[:1])))
    close(actions[~from_learnt], np.repeat(mean, int((~from_learnt).sum()), 0))  # the frozen policy's mean
    mean = np.tanh(forward(*linears(agent.actor.net), array(observations[:1])))
    sampled = mean + np.exp(array(agent.actor.log_std)) * array(noise)
    close(actions[from_learnt], sampled[from_learnt.numpy()])  # the learnt policy's sample, not clipped
    assert np.abs(sampled).max() > 1


def test_q_of_a_proposal_is_the_smaller_critic():
    agent, _ = make_agent()
    observations = torch.randn(BATCH, OBS)
    actions, q = agent.propose(observations, torch.randn(BATCH, ACT))
    for number in range(2):
        close(q[number], np.minimum(*q_values(agent.critic, observations, actions[number])))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("lead", [0.1, -0.1], ids=["learnt better", "offline better"])
def test_evaluation_makes_two_independent_draws(monkeypatch, epsilon, lead):
    """Each with probability epsilon: the learnt policy's action is a sample instead of its mean; the policy is drawn
    from the softmax of Q / 0.1, here 1 to e, instead of being the one with the larger Q."""
    (agent, _), n = make_agent(epsilon=epsilon), 4000
    means = [np.tanh(forward(*linears(actor.net), np.ones((1, OBS))))[0]
             for actor in (agent.offline_actor, agent.actor)]
    set_q(agent, monkeypatch, 0.0, lead)
    torch.manual_seed(0)
    played = np.array([agent.act(np.ones(OBS, np.float32)) for _ in range(n)])
    offline, mean = (np.abs(played - m).max(1) < 1e-5 for m in means)
    learnt = ~offline
    softmax = 1 / (1 + math.exp(-10 * lead))
    share = (1 - epsilon) * (lead > 0) + epsilon * softmax

    def near_to(count, probability):
        return abs(count - n * probability) <= 5 * math.sqrt(n * probability * (1 - probability)) + 1e-9

    assert near_to(learnt.sum(), share)
    assert near_to((learnt & ~mean).sum(), share * epsilon)
    assert np.abs(played).max() <= 1


@pytest.mark.parametrize("inverse", [0.0, 10.0])
def test_without_a_draw_the_larger_q_decides(monkeypatch, inverse):
    agent, _ = make_agent(epsilon=0.0, inv_temperature=inverse)
    for leads in ((1.0, 1.001), (1.001, 1.0)):
        set_q(agent, monkeypatch, *leads)
        actor = agent.actor if leads[1] > leads[0] else agent.offline_actor
        close(agent.act(np.ones(OBS, np.float32)), np.tanh(forward(*linears(actor.net), np.ones((1, OBS))))[0])


class FixedLength:
    """An environment whose episodes have 20 steps; the actions are kept."""

    task = pex.TASKS[PEN]

    def __init__(self):
        self.episodes = []

    def reset(self, seed):
        self.episodes.append([])
        return np.ones(OBS, np.float32), {}

    def step(self, action):
        self.episodes[-1].append(action)
        return np.ones(OBS, np.float32), 0.0, False, len(self.episodes[-1]) == 20, {"success": False}


def test_an_evaluation_depends_on_its_place_alone():
    """Not on earlier evaluations or the training's random numbers; episodes and seeds differ."""
    (agent, _), env = make_agent(epsilon=0.5), FixedLength()
    for seed in (0, 1):
        for before in (0, 3):
            torch.manual_seed(before)
            pex.evaluate(env, agent, 2, seed=seed)
    one, other = (np.array(env.episodes[start : start + 4]) for start in (0, 4))
    for runs in (one, other):
        np.testing.assert_array_equal(runs[:2], runs[2:])
        assert (runs[0] != runs[1]).any()
    assert (one != other).any()


def test_default_coefficients():
    args = pex.parse_args(["--env-id", PEN])
    assert (args.inv_temperature, args.epsilon, args.learning_starts, args.offline_ratio) == (10.0, 0.1, 5000, 0.5)


def test_evaluated_action_is_clipped(monkeypatch):
    agent, _ = make_agent(epsilon=1.0)
    set_q(agent, monkeypatch, 0.0, 100.0)
    torch.manual_seed(0)
    played = np.array([agent.act(np.ones(OBS, np.float32)) for _ in range(50)])
    assert np.abs(played).max() == 1.0 and len(np.unique(played[:, 0])) > 10


def test_actions_are_stored_as_proposed_and_played_clipped(tiny, session):
    """As PEX's own code does."""
    tiny(PEN)
    played, step = [], pex.TaskEnv.step

    def record(env, action):
        played.append(action)
        return step(env, action)

    session.monkeypatch.setattr(pex.TaskEnv, "step", record)
    session.spy("evaluate", lambda env, *_: session.monkeypatch.setattr(env, "step", step.__get__(env)))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--offline-steps", 0)
    run = run_directory(pex, PEN)
    start, end = json.loads((run / "config.json").read_text())["replay_columns"]["actions"]
    stored = np.fromfile(run / "replay.bin", np.float32).reshape(20, -1)[:, start:end]
    assert np.abs(stored).max() > 1.2
    np.testing.assert_array_equal(stored.clip(-1, 1), played)


# === the update ===


def test_golden():
    """Composition and five online updates of the expanded policy, as PEX's own code makes them."""
    data, hyper = read("pex")
    agent = pex.PEXAgent(hyper["obs_dim"], hyper["act_dim"], hyper["hidden_dims"], hyper["lr"], CPU, -5.0,
                         hyper["inv_temperature"], 0.1)
    learnt = parameters(agent)
    actors = parameters(SimpleNamespace(**agent._modules | {"actor": agent.offline_actor}))
    frozen = {name.replace("actor", "actor_offline"): pair for name, pair in actors.items() if name[:5] == "actor"}
    load(data, frozen | learnt)

    batch = tensors(data, "batch/", 0)
    eps, u = (torch.from_numpy(data[f"select/{name}"]) for name in ("eps", "u"))
    actions, q = agent.propose(batch["observations"], eps)
    for number, name in enumerate(("a_offline", "a_learning")):
        near(actions[number], data[f"select/{name}"], INFOS, name)
    near(agent.probabilities(q).T, data["select/probs"], INFOS, "probabilities")
    composed, from_learnt = agent.compose(batch["observations"], eps, u)
    assert (from_learnt.numpy() == data["select/choice"].astype(bool)).all()
    near(composed, data["select/action"], INFOS, "composed action")

    options = dict(gamma=hyper["discount"], tau=hyper["target_update_rate"], expectile=hyper["expectile"],
                   temperature=hyper["beta"])
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        batch["masks"] = 1.0 - batch.pop("terminals").float()
        noise, uniform = (torch.from_numpy(data[f"noise/{name}"][step]) for name in ("eps", "u"))
        losses = pex.pex_update(agent, batch, noise=noise, uniform=uniform, **options)
        near(losses["pex/learnt_share"], data["noise/choice"][step].mean(), INFOS, "choice")
        if step + 1 in hyper["snapshots"]:
            assert check_step(data, learnt, agent.optimizers, step + 1) == len(learnt)
    assert hyper["steps"] in hyper["snapshots"]
    for name, (parameter, how) in frozen.items():
        np.testing.assert_array_equal(oriented(parameter, how).detach().numpy(), data[f"step0/{name}"])


@pytest.mark.parametrize("bounds", [{}, dict(q_min=-0.4, q_max=0.5)], ids=["unbounded", "bounded"])
def test_pex_update(bounds):
    """All three losses from their definitions, in numpy."""
    agent, _ = make_agent(inv_temperature=2.0)
    batch, noise, uniform = make_batch(), torch.randn(BATCH, ACT), torch.rand(BATCH)
    low, high = bounds.get("q_min", -np.inf), bounds.get("q_max", np.inf)
    before = copy.deepcopy(agent)
    losses = pex.pex_update(agent, batch, gamma=0.9, tau=0.05, expectile=0.8, temperature=4.0, noise=noise,
                            uniform=uniform, **bounds)
    b = {name: array(value) for name, value in batch.items()}
    observations = batch["observations"]

    q_target = np.minimum(*np.clip(q_values(before.critic_target, observations, batch["actions"]), low, high))
    u = q_target - forward(*linears(before.value), b["observations"])[:, 0]
    close(losses["losses/value"], np.mean(np.where(u < 0, 0.2, 0.8) * u**2))
    next_v = forward(*linears(before.value), b["next_observations"])[:, 0]  # V before its step
    target = np.clip(b["rewards"] + 0.9 * b["masks"] * next_v, low, high)
    q = q_values(before.critic, observations, batch["actions"])
    close(losses["losses/critic"], np.mean((q - target) ** 2))

    # Composed actions: the two policies before the step, valued by the critic after its step.
    offline = np.tanh(forward(*linears(before.offline_actor.net), b["observations"]))
    mean = np.tanh(forward(*linears(before.actor.net), b["observations"]))
    learnt = mean + np.exp(array(before.actor.log_std)) * array(noise)
    q_offline, q_learnt = (np.minimum(*q_values(agent.critic, observations, torch.from_numpy(a)))
                           for a in (offline, learnt))
    chosen = array(uniform) >= 1 / (1 + np.exp(2.0 * (q_learnt - q_offline)))
    assert 0 < chosen.mean() < 1 and (q < 0).any() and (q > 0).any()
    close(losses["losses/q_magnitude"], np.abs(q).mean())
    close(losses["pex/learnt_share"], chosen.mean())
    composed = np.where(chosen[:, None], learnt, offline)
    v = forward(*linears(agent.value), b["observations"])[:, 0]
    close(losses["losses/v_magnitude"], np.abs(v).mean())
    advantage = np.minimum(*q_values(agent.critic_target, observations, torch.from_numpy(composed))) - v
    close(losses["losses/advantage_mean"], advantage.mean(), 1e-4)
    weight = np.minimum(np.exp(4.0 * advantage), 100.0)
    assert (weight == 100).any() and (weight < 100).any()
    density = log_density(composed, mean, array(before.actor.log_std))
    close(losses["losses/actor"], -np.mean(weight * density), 1e-3)
    for now, was, new in zip(agent.critic_target.parameters(), before.critic_target.parameters(),
                             agent.critic.parameters(), strict=True):
        close(now, 0.95 * array(was) + 0.05 * array(new), 1e-6)


def test_the_frozen_policy_never_moves():
    agent, offline = make_agent(learning_rate=0.1)
    first = {name: value.clone() for name, value in offline.actor.state_dict().items()}
    fresh = copy.deepcopy(agent.actor.state_dict())
    for _ in range(5):
        pex.pex_update(agent, make_batch(), **IQL)
    for name, value in first.items():
        assert torch.equal(agent.offline_actor.state_dict()[name], value)
        assert not torch.equal(agent.actor.state_dict()[name], fresh[name])
    optimised = {id(p) for o in agent.optimizers for group in o.param_groups for p in group["params"]}
    frozen = {id(p) for p in [*agent.offline_actor.parameters(), *agent.critic_target.parameters()]}
    assert optimised == {id(p) for p in agent.parameters()} - frozen
    assert not any(p.requires_grad for p in agent.offline_actor.parameters())


# === runs ===


@pytest.mark.parametrize("env_id", pex.TASKS)
def test_every_task(env_id, tiny, session):
    tiny(env_id)
    rows = session.run("--env-id", env_id, *SMALL, "--online-steps", 20, "--save-at", 10)
    run = run_directory(pex, env_id)
    offline, agent = session.agents[0], session.agents[-1]
    check_scores(pex, run, rows, [10, 20], agent)
    assert losses_of(run, "pretrain") and all("pex/learnt_share" in record for record in losses_of(run, "online"))
    for record in read_lines(run / "metrics.jsonl"):
        assert all(math.isfinite(value) for value in record.values() if not isinstance(value, str))
    # The policy of the offline phase is in the saved one, unchanged; the other one has been learnt.
    saved = pex.load_policy(run / "pretrained.pt").state_dict()
    for name, value in offline.actor.state_dict().items():
        assert torch.equal(agent.offline_actor.state_dict()[name], value)
        assert torch.equal(saved[f"actor.{name}"], value)
        assert not torch.equal(agent.actor.state_dict()[name], value)


def test_batches_are_half_offline_and_updates_wait(tiny, session):
    tiny(PEN)
    seen = []
    session.spy("pex_update", lambda agent, batch, **options: seen.append(batch["episodes"].clone()))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at")
    assert len(seen) == 20 - 5  # the first comes after step 6
    for episodes in seen:
        assert (episodes < 5).sum() == (episodes >= 5).sum() == 8  # the tiny data has 5 episodes
    grad_steps = [r["grad_step"] for r in read_lines(run_directory(pex, PEN) / "metrics.jsonl")]
    assert max(grad_steps) == 15 + 15


def test_evaluations_leave_no_trace_in_the_training(tiny, session):
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at"]
    for name, every in (("often", 3), ("once", 1000)):
        session.run(*words, "--exp-name", name, "--eval-every", every)
    one, other = ([r for r in read_lines(f"runs/{PEN}__{name}__1/metrics.jsonl") if "losses/critic" in r]
                  for name in ("often", "once"))
    assert one == other


# === --init-from ===


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """Runs of iql_ooo.py without and with the bonus."""
    tiny(PEN)
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        session = Session(iql_ooo, patch)
        words = ["--env-id", PEN, *small_words("--rnd-hidden-dims", 16, 16), "--offline-steps", 15, "--online-steps",
                 40, "--retrain-at"]
        session.run(*words, "--intrinsic-reward-scale", 0, "--exp-name", "iql")
        session.run(*words, "--exp-name", "rnd")
    return folder / "runs"


def test_init_from_takes_the_pretrained_networks(source, session):
    """As they were at the end of pretraining, not as the online phase has left them; and nothing is pretrained."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    run = source / f"{PEN}__iql__1"
    starts = []
    session.spy("evaluate_and_log", lambda run, env, agent, *where: starts.append((*where, copy.deepcopy(agent))))
    rows = session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--init-from", run)
    check_scores(pex, run_directory(pex, PEN), rows, [20], session.agents[-1])
    ids = [json.loads((each / "config.json").read_text()) for each in (run_directory(pex, PEN), run)]
    assert ids[0]["source_run_id"] == ids[1]["run_id"]
    want = torch.load(run / "pretrained.pt", weights_only=True)["agent"]
    (*where, agent), *_ = starts
    assert where == ["online", 0, 15] and all(phase == "online" for phase, *_ in starts)
    for mine, theirs in (("offline_actor", "actor"), ("critic", "critic"), ("critic_target", "critic_target"),
                         ("value", "value")):
        for name, value in getattr(agent, mine).state_dict().items():
            assert torch.equal(value, want[f"{theirs}.{name}"]), (mine, name)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_offline_phase_is_iql_oos(source, session):
    """The same seed and settings give the same networks in both scripts."""
    session.run("--env-id", PEN, *SMALL, "--online-steps", 1, "--save-at")
    mine, theirs = (torch.load(folder / "pretrained.pt", weights_only=True)["agent"]
                    for folder in (run_directory(pex, PEN), source / f"{PEN}__iql__1"))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_init_from_gives_what_the_own_offline_phase_gives(source, session):
    """From a run of iql_ooo.py or of pex.py itself."""
    words = ["--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at"]
    session.run(*words)
    own = run_directory(pex, PEN)
    for name, run in (("iql", source / f"{PEN}__iql__1"), ("pex", own)):
        session.run(*words, "--init-from", run, "--exp-name", f"from_{name}")
        mine, theirs = outcome(Path(f"runs/{PEN}__from_{name}__1")), outcome(own)
        for file in ("policy_20.pt", "replay.bin", "checkpoint.pt", "results.json"):
            assert mine[file] == theirs[file], file


def test_init_from_has_the_sources_choice_of_offline_data(source, session):
    """Another seed than the source's: the subset is drawn by the source's, also when the run is continued."""
    words = ["--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--data-subset", 50]
    session.run(*words, "--exp-name", "source")
    seeds, load = [], pex.load_dataset

    def load_dataset(args, env, seed):
        seeds.append(seed)
        return load(args, env, seed)

    session.monkeypatch.setattr(pex, "load_dataset", load_dataset)
    words += ["--seed", 2, "--exp-name", "other", "--init-from", f"runs/{PEN}__source__1"]
    session.run(*words)
    for again in (words, words[:-2]):  # with the source and without it
        Path(f"runs/{PEN}__other__2/results.json").unlink()
        session.run(*again, "--resume")
    assert seeds == [1, 1, 1]


def test_init_from_what_does_not_fit(tiny, source, in_tmp, capsys):
    run, words = source / f"{PEN}__iql__1", ["--env-id", PEN, *SMALL, "--init-from"]
    check_refused(pex, [*words, source / f"{PEN}__rnd__1"], "--intrinsic-reward-scale was 0.5", capsys, in_tmp)
    check_refused(pex, [*words, run, "--expectile", 0.6], "--expectile was 0.8", capsys, in_tmp)
    check_refused(pex, [*words, run, "--hidden-dims", 8], "--hidden-dims was [16, 16]", capsys, in_tmp)
    for flag, value, was in (("--offline-steps", 16, 15), ("--dropout", 0.2, 0.1), ("--learning-rate", 0.001, 0.0003),
                             ("--tau", 0.01, 0.005), ("--batch-size", 8, 16)):
        check_refused(pex, [*words, run, flag, value], f"{flag} was {was}", capsys, in_tmp)
    check_refused(pex, [*words, run, "--dataset-id", "D4RL/pen/human-v2"], "sha256", capsys, in_tmp)
    tiny(POINT)
    check_refused(pex, ["--env-id", POINT, "--init-from", run], PEN, capsys, in_tmp)
    check_refused(pex, [*words, "missing"], "missing", capsys, in_tmp)


def test_init_from_a_run_of_another_script(source, in_tmp, capsys):
    (in_tmp / "other").mkdir()
    config = json.loads((source / f"{PEN}__iql__1" / "config.json").read_text())
    (in_tmp / "other" / "config.json").write_text(json.dumps({**config, "script": "td3_rnd"}))
    check_refused(pex, ["--env-id", PEN, *SMALL, "--init-from", "other"], "td3_rnd", capsys, in_tmp)
    del config["args"]["expectile"]
    (in_tmp / "other" / "config.json").write_text(json.dumps(config))
    check_refused(pex, ["--env-id", PEN, *SMALL, "--init-from", "other"], "expectile", capsys, in_tmp)


def test_init_from_a_damaged_file(source, in_tmp, capsys):
    shutil.copytree(source / f"{PEN}__iql__1", in_tmp / "damaged")
    path = in_tmp / "damaged" / "pretrained.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    check_refused(pex, ["--env-id", PEN, *SMALL, "--init-from", "damaged"], "checksum", capsys, in_tmp)
    path.unlink()
    check_refused(pex, ["--env-id", PEN, *SMALL, "--init-from", "damaged"], "pretrained.pt", capsys, in_tmp)


def start_and_kill(box, words, moment):
    child = box.run(*words, signal_at=(signal.SIGKILL, "os.rename", *moment))
    assert child.code == -signal.SIGKILL, child.err


@pytest.mark.parametrize("gone", [False, True], ids=["moved", "gone"])
def test_a_run_from_a_source_is_continued(source, tmp_path, gone):
    """The source is known by its id, wherever it lies; another one is refused; without it the run goes on, too."""
    box = Box(tmp_path, script="pex.py")
    try:
        shutil.copytree(source / f"{PEN}__iql__1", box.work / "source")
        words = ["--env-id", PEN, *SMALL, "--online-steps", 205, "--save-at", 70]
        child = box.run(*words, "--init-from", "source", "--exp-name", "whole")
        assert child.code == 0, child.err
        start_and_kill(box, [*words, "--init-from", "source"], ("/policy_70.pt", 1))
        shutil.copytree(box.work / "source", box.work / "other")
        config = json.loads((box.work / "other" / "config.json").read_text())
        (box.work / "other" / "config.json").write_text(json.dumps(config | {"run_id": "f" * 16}))
        child = box.run(*words, "--resume", "--init-from", "other")
        assert child.code == 2 and "other is not the run" in child.err
        (box.work / "source").rename(box.work / "moved")
        if gone:
            shutil.rmtree(box.work / "moved")
        child = box.run(*words, "--resume", *([] if gone else ["--init-from", "moved"]))
        assert child.code == 0, child.err
        whole, resumed = (outcome(box.work / "runs" / f"{PEN}__{name}__1") for name in ("whole", "pex"))
        assert whole == resumed
    finally:
        box.stop()


def test_a_run_that_has_not_taken_over_its_source_needs_it(source, tmp_path):
    box = Box(tmp_path, script="pex.py")
    try:
        words = ["--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at"]
        start_and_kill(box, [*words, "--init-from", source / f"{PEN}__iql__1"], ("/checkpoint.pt", 2))
        child = box.run(*words, "--resume")
        assert child.code == 2 and "--init-from" in child.err
        child = box.run(*words, "--resume", "--init-from", source / f"{PEN}__iql__1")
        assert child.code == 0, child.err
    finally:
        box.stop()


# === resume and errors ===


def test_divergence_is_said(tiny, session, capsys):
    tiny(PEN)
    check_divergence_is_said(session, ["--env-id", PEN, *SMALL, "--online-steps", 40, "--save-at"], capsys)


def test_ceiling_of_values():
    """The largest |reward| of all data, shifted and scaled, over 1 - gamma."""
    data = dict(observations=np.zeros((3, OBS)), actions=np.zeros((3, ACT)), rewards=np.array([-7.0, 2.0, 5.0]),
                next_observations=np.zeros((3, OBS)), terminations=np.zeros(3), episodes=np.zeros(3))
    buffer = pex.ReplayBuffer(data, 1, CPU)
    args = pex.Args(reward_bias=-1.0, reward_scale=2.0, gamma=0.9)
    assert pex.value_ceiling(args, buffer) == pytest.approx(160)
    buffer.add(**{name: value[0] for name, value in data.items()} | {"rewards": 11.0})
    assert pex.value_ceiling(args, buffer) == pytest.approx(200)


@pytest.mark.parametrize("gym_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_own_task(in_tmp, monkeypatch, gym_id):
    check_own_task("pex", in_tmp, monkeypatch, SMALL, gym_id)


def test_same_bytes_and_resume_after_sigkill(tiny, tmp_path):
    """Killed before and after the policy is expanded, and in the middle of the online phase."""
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--offline-steps", 17, "--online-steps", 205, "--save-at", 70, "--log-every", 7,
             "--learning-starts", 50]
    # Checkpoints: pretraining 10, 17; online 100, 200, 205. The second time it is killed, no online step is saved yet.
    moments = ["/pretrained.pt", "/policy_70.pt", ("/checkpoint.pt", 2)]
    check_determinism_and_resume(tmp_path, "pex.py", words, moments)


@pytest.mark.parametrize(("words", "named"), [
    (["--env-id", "door"], "door-binary-v0"),
    (["--env-id", PEN, "--save-at", 10, "--online-steps", 9], "--save-at 10"),
    (["--env-id", PEN, "--offline-ratio", 1.5], "--offline-ratio"),
    (["--env-id", PEN, "--epsilon", -0.1], "--epsilon"),
    (["--env-id", PEN, "--learning-starts", -1], "--learning-starts"),
    (["--env-id", PEN, "--dataset-path", "none.npz"], "none.npz"),
    (["--eval-only", "missing"], "missing"),
])
def test_bad_input(tiny, in_tmp, capsys, words, named):
    tiny(PEN)
    check_refused(pex, words, named, capsys, in_tmp)


@pytest.mark.parametrize("env_id", pex.TASKS)
def test_offline_settings_are_iql_oos(env_id):
    """Whatever both scripts have, but for the budget of AntMaze, which is the paper's table's."""
    mine, theirs = (vars(module.parse_args(["--env-id", env_id])) for module in (pex, iql_ooo))
    differ = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]} - {"exp_name"}
    assert differ == ({"online_steps"} if env_id.startswith("antmaze") else set())
    assert mine["save_at"] == theirs["retrain_at"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("expanded", [False, True], ids=["iql", "pex"])
def test_compiled_update_equals_eager(expanded):
    def build(args, buffer):
        if expanded:
            agent = pex.PEXAgent(4, 2, (16, 16), 3e-4, CPU, -5.0, 10.0, 0.1)
        else:
            agent = pex.Agent(4, 2, (16, 16), 3e-4, CPU)
        return [pex.make_update(args, buffer, agent)], {"agent": agent}

    check_compiled(pex, pex.Args(dropout=0.2, q_reward_bounds=(-1.0, 5.0)), build)
