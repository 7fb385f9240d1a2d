"""pex.py: composition, the frozen policy, the update, evaluation, every task, --init-from, resume and errors.

What pex.py shares with iql_ooo.py, byte for byte (test_shared_blocks.py), is tested there; whole updates against PEX's
own code: test_golden.py.
"""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from baseline import (
    Session,
    check_compiled,
    check_determinism_and_resume,
    check_refused,
    check_scores,
    losses_of,
    read_lines,
    run_directory,
    small_words,
)
from test_losses import ACT, BATCH, HIDDEN, OBS, array, close, forward, linears, log_density, make_batch, q_values

import iql_ooo
import pex

PEN, POINT = "pen-binary-v0", "maze2d-missing-data-large-v1"
SMALL = small_words("--offline-steps", 15, "--learning-starts", 5)


@pytest.fixture
def session(monkeypatch, in_tmp):
    return Session(pex, monkeypatch)


def make_agent(learning_rate=1e-2, **options):
    torch.manual_seed(0)
    offline = pex.Agent(OBS, ACT, HIDDEN, learning_rate, torch.device("cpu"))
    with torch.no_grad():
        for parameter in offline.critic_target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        offline.value[-1].bias.sub_(2.0)  # advantages of both signs
    return pex.PEXAgent(OBS, ACT, HIDDEN, learning_rate, torch.device("cpu"), offline=offline, **options), offline


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


def test_default_coefficients():
    args = pex.parse_args(["--env-id", PEN])
    assert (args.inv_temperature, args.epsilon, args.learning_starts, args.offline_ratio) == (10.0, 0.1, 5000, 0.5)


def test_played_action_is_clipped(monkeypatch):
    agent, _ = make_agent()
    set_q(agent, monkeypatch, 0.0, 100.0)
    torch.manual_seed(0)
    played = np.array([agent.act(np.ones(OBS, np.float32), sample=True) for _ in range(50)])
    assert np.abs(played).max() == 1.0 and len(np.unique(played[:, 0])) > 10


# === the update ===


@pytest.mark.parametrize("bounds", [{}, dict(q_min=-0.4, q_max=0.5)], ids=["unbounded", "bounded"])
def test_pex_update(bounds):
    """All three losses from their definitions, in numpy."""
    agent, _ = make_agent(inv_temperature=2.0)
    batch, noise, uniform = make_batch(), torch.randn(BATCH, ACT), torch.rand(BATCH)
    settings = pex.Settings(gamma=0.9, tau=0.05, expectile=0.8, temperature=4.0, **bounds)
    before = copy.deepcopy(agent)
    losses = pex.pex_update(agent, batch, settings, noise, uniform)
    b = {name: array(value) for name, value in batch.items()}
    observations = batch["observations"]

    q_target = np.minimum(*np.clip(q_values(before.critic_target, observations, batch["actions"]), settings.q_min,
                                   settings.q_max))
    u = q_target - forward(*linears(before.value), b["observations"])[:, 0]
    close(losses["losses/value"], np.mean(np.where(u < 0, 0.2, 0.8) * u**2))
    next_v = forward(*linears(before.value), b["next_observations"])[:, 0]  # V before its step
    target = np.clip(b["rewards"] + 0.9 * b["masks"] * next_v, settings.q_min, settings.q_max)
    q = q_values(before.critic, observations, batch["actions"])
    close(losses["losses/critic"], np.mean((q - target) ** 2))

    # Composed actions: the two policies before the step, valued by the critic after its step.
    offline = np.tanh(forward(*linears(before.offline_actor.net), b["observations"]))
    mean = np.tanh(forward(*linears(before.actor.net), b["observations"]))
    learnt = mean + np.exp(array(before.actor.log_std)) * array(noise)
    q_offline, q_learnt = (np.minimum(*q_values(agent.critic, observations, torch.from_numpy(a)))
                           for a in (offline, learnt))
    chosen = array(uniform) >= 1 / (1 + np.exp(2.0 * (q_learnt - q_offline)))
    assert 0 < chosen.mean() < 1
    close(losses["pex/learnt_share"], chosen.mean())
    composed = np.where(chosen[:, None], learnt, offline)
    v = forward(*linears(agent.value), b["observations"])[:, 0]
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
        pex.pex_update(agent, make_batch(), pex.Settings())
    for name, value in first.items():
        assert torch.equal(agent.offline_actor.state_dict()[name], value)
        assert not torch.equal(agent.actor.state_dict()[name], fresh[name])
    optimised = {id(p) for o in agent.optimizers.values() for p in o.parameters}
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
    saved = torch.load(run / "pretrained.pt", weights_only=True)["explorer"]["networks"]
    for name, value in offline.actor.state_dict().items():
        assert torch.equal(agent.offline_actor.state_dict()[name], value)
        assert torch.equal(saved[f"actor.{name}"], value)
        assert not torch.equal(agent.actor.state_dict()[name], value)


def test_batches_are_half_offline_and_updates_wait(tiny, session):
    tiny(PEN)
    seen = []
    session.spy("pex_update", lambda agent, batch, settings: seen.append(batch["episodes"].clone()))
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
    session.spy("log_evaluation", lambda s, phase, t, *rest: starts.append((phase, t, copy.deepcopy(s.explorer))))
    rows = session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--init-from", run)
    check_scores(pex, run_directory(pex, PEN), rows, [20], session.agents[-1])
    want = torch.load(run / "pretrained.pt", weights_only=True)["explorer"]["networks"]
    (phase, t, agent), *_ = starts
    assert (phase, t) == ("online", 0) and all(phase == "online" for phase, *_ in starts)
    for mine, theirs in (("offline_actor", "actor"), ("critic", "critic"), ("critic_target", "critic_target"),
                         ("value", "value")):
        for name, value in getattr(agent, mine).state_dict().items():
            assert torch.equal(value, want[f"{theirs}.{name}"]), (mine, name)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_offline_phase_is_iql_oos(source, session):
    """The same seed and settings give the same networks in both scripts."""
    session.run("--env-id", PEN, *SMALL, "--online-steps", 1, "--save-at")
    mine, theirs = (torch.load(folder / "pretrained.pt", weights_only=True)["explorer"]
                    for folder in (run_directory(pex, PEN), source / f"{PEN}__iql__1"))
    for name, value in mine["networks"].items():
        assert torch.equal(value, theirs["networks"][name]), name


def test_init_from_what_does_not_fit(tiny, source, in_tmp, capsys):
    run, words = source / f"{PEN}__iql__1", ["--env-id", PEN, *SMALL, "--init-from"]
    check_refused(pex, [*words, source / f"{PEN}__rnd__1"], "--intrinsic-reward-scale 0", capsys, in_tmp)
    check_refused(pex, [*words, run, "--expectile", 0.6], "--expectile was 0.8", capsys, in_tmp)
    check_refused(pex, [*words, run, "--hidden-dims", 8], "--hidden-dims was (16, 16)", capsys, in_tmp)
    check_refused(pex, [*words, run, "--dataset-id", "D4RL/pen/human-v2"], "sha256", capsys, in_tmp)
    tiny(POINT)
    check_refused(pex, ["--env-id", POINT, "--init-from", run], PEN, capsys, in_tmp)
    check_refused(pex, [*words, "missing"], "missing", capsys, in_tmp)


def test_init_from_a_run_of_another_script(source, in_tmp, capsys):
    (in_tmp / "other").mkdir()
    config = json.loads((source / f"{PEN}__iql__1" / "config.json").read_text())
    (in_tmp / "other" / "config.json").write_text(json.dumps({**config, "script": "td3_rnd"}))
    check_refused(pex, ["--env-id", PEN, *SMALL, "--init-from", "other"], "td3_rnd", capsys, in_tmp)


# === resume and errors ===


def test_same_bytes_and_resume_after_sigkill(tiny, tmp_path):
    """Killed before and after the policy is expanded, and in the middle of the online phase."""
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--offline-steps", 17, "--online-steps", 105, "--save-at", 70, "--log-every", 7,
             "--learning-starts", 50]
    # Checkpoints: pretraining 10, 17; online 100, 105. The second time it is killed, no online step is saved yet.
    moments = ["/pretrained.pt", "/policy_70.pt", ("/checkpoint.pt", 2)]
    check_determinism_and_resume(tmp_path, "pex.py", words, moments)


@pytest.mark.parametrize(("words", "named"), [
    (["--env-id", "door"], "did you mean door-binary-v0?"),
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
def test_compiled_update_equals_eager():
    def build(args, buffer, device):
        offline = pex.Agent(4, 2, (16, 16), 1e-2, device)
        agent = pex.PEXAgent(4, 2, (16, 16), 1e-2, device, offline=offline)
        update = pex.make_gradient_step(args, buffer, lambda batch, _: pex.pex_update(agent, batch, pex.Settings()))
        return update, {"grad_step": 0}, {"agent": agent}

    check_compiled(pex, build)
