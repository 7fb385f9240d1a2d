"""td3_rnd.py: both variants' losses, the authors' own updates, the delayed policy, every task, resume and errors.

What td3_rnd.py shares with iql_ooo.py, byte for byte (test_shared_blocks.py), is tested there.
"""

import copy
import math
import shutil

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
    read_lines,
    run_directory,
    small_words,
)
from test_golden import INFOS, check_step, load, parameters, read, tensors
from test_golden import close as near
from test_losses import ACT, BATCH, CPU, HIDDEN, OBS, TD3, array, close, forward, linears, make_batch, q_values

import td3_rnd

PEN = "pen-binary-v0"
SMALL = small_words("--rnd-hidden-dims", 16, 16)


@pytest.fixture
def session(monkeypatch, in_tmp):
    return Session(td3_rnd, monkeypatch)


def make_agent(learning_rate=1e-2, **options):
    """Targets differ from their networks, so that a mix-up shows."""
    torch.manual_seed(0)
    agent = td3_rnd.FujimotoAgent(OBS, ACT, HIDDEN, learning_rate, CPU, **options)
    with torch.no_grad():
        for target in (agent.critic_target, agent.actor_target):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


# === the authors' TD3 ===


@pytest.mark.parametrize("name", ["td3_plain", "td3_qbounds_intrinsic"])
def test_golden(name):
    """The value network, which the authors' code trains on the side, has no influence and is not here."""
    data, hyper = read(name)
    agent = td3_rnd.Agent(hyper["obs_dim"], hyper["act_dim"], hyper["hidden_dims"], hyper["actor_lr"], CPU)
    named = parameters(agent)
    load(data, named)
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        noise = torch.from_numpy(data["noise/action_eps"][step]).expand(2, -1, -1)
        bonus = hyper["intrinsic_reward_scale"] * batch.pop("intrinsic_rewards", 0.0)
        losses = td3_rnd.td3_update(agent, batch, bonus, gamma=hyper["discount"], tau=hyper["tau"], noise=noise)
        for ours, theirs in {"losses/critic": "critic_loss", "losses/actor": "actor_loss"}.items():
            near(losses[ours], data[f"info/{theirs}"][step], INFOS, f"step {step} {theirs}")
        if step + 1 in hyper["snapshots"]:
            assert check_step(data, named, agent.optimizers, step + 1) == len(named)
    assert hyper["steps"] in hyper["snapshots"]


def test_dropout_is_in_the_policy_loss_alone():
    torch.manual_seed(0)
    agent, batch = td3_rnd.Agent(OBS, ACT, HIDDEN, 1e-2, CPU), make_batch()
    noise, losses = torch.randn(2, BATCH, ACT), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(td3_rnd.td3_update(copy.deepcopy(agent), batch, dropout=0.5, noise=noise, **TD3))
    assert losses[0]["losses/critic"] == losses[1]["losses/critic"]
    assert losses[0]["losses/actor"] != losses[1]["losses/actor"]


# === Fujimoto's TD3 ===


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_fujimoto_update(bonus):
    """Target, both losses, who is moved by which, and the targets, from their definitions in numpy."""
    agent, batch = make_agent(), make_batch()
    noise, intrinsic = torch.randn(BATCH, ACT), 3.0 * torch.rand(BATCH) if bonus else torch.zeros(1)
    before = copy.deepcopy(agent)
    losses = td3_rnd.fujimoto_update(agent, batch, intrinsic, gamma=0.9, tau=0.1, policy_noise=0.4, noise_clip=0.5,
                                     noise=noise)
    b = {name: array(value) for name, value in batch.items()}

    smoothing = np.minimum(np.maximum(0.4 * array(noise), -0.5), 0.5)
    assert (np.abs(smoothing) == 0.5).any() and (np.abs(smoothing) < 0.5).any()
    following = np.tanh(forward(*linears(before.actor_target), b["next_observations"])) + smoothing
    assert (np.abs(following) > 1).any()  # the smoothed action is clipped, too
    following = torch.from_numpy(np.minimum(np.maximum(following, -1), 1))
    next_q = np.minimum(*q_values(before.critic_target, batch["next_observations"], following))
    target = b["rewards"] + 0.9 * b["masks"] * next_q + array(intrinsic)
    q = q_values(before.critic, batch["observations"], batch["actions"])
    close(losses["losses/critic"], np.mean((q - target) ** 2))
    close(losses["losses/q_mean"], q.mean())
    assert (q < 0).any() and (q > 0).any()
    close(losses["losses/q_magnitude"], np.abs(q).mean())

    # The policy climbs the first critic, as it is after its own step.
    actions = np.tanh(forward(*linears(before.actor), b["observations"]))
    first = q_values(agent.critic, batch["observations"], torch.from_numpy(actions))[0]
    close(losses["losses/actor"], -first.mean())

    critic_loss = (before.critic(batch["observations"], batch["actions"]) - torch.from_numpy(target).float()) ** 2
    actor_loss = -agent.critic(batch["observations"], before.actor(batch["observations"])[0].tanh())[0].mean()
    for network, old, loss, optimizer in [(agent.critic, before.critic, critic_loss.mean(), agent.critic_optimizer),
                                          (agent.actor, before.actor, actor_loss, agent.actor_optimizer)]:
        wanted = torch.autograd.grad(loss, list(old.parameters()))
        for parameter, want in zip(network.parameters(), map(array, wanted), strict=True):
            got = 10 * array(optimizer.state[parameter]["exp_avg"])  # after one step of Adam from nothing
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    for now, was, source in [(agent.critic_target, before.critic_target, agent.critic),
                             (agent.actor_target, before.actor_target, agent.actor)]:
        for one, old, new in zip(now.parameters(), was.parameters(), source.parameters(), strict=True):
            close(one, 0.9 * array(old) + 0.1 * array(new), 1e-6)


def test_between_policy_steps_only_the_critics_learn():
    agent, batch = make_agent(), make_batch()
    before = copy.deepcopy(agent.state_dict())
    losses = td3_rnd.fujimoto_update(agent, batch, update_policy=False, **TD3)
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"critic"} and "losses/actor" not in losses


def test_action_noise():
    agent, obs = make_agent(exploration_noise=0.3), np.ones(OBS, np.float32)
    mean = np.tanh(forward(*linears(agent.actor), obs[None]))[0]
    close(agent.act(obs), mean)
    torch.manual_seed(0)
    noise = torch.randn(ACT)
    torch.manual_seed(0)
    close(agent.act(obs, sample=True), np.clip(mean + 0.3 * array(noise), -1, 1))


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay_counts_gradient_steps(tiny, session, delay):
    tiny(PEN)
    asked = []
    session.spy("fujimoto_update", lambda *_, update_policy, **options: asked.append(update_policy))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 12, "--save-at", "--variant", "fujimoto",
                "--policy-delay", delay)
    assert asked == [(step % delay == 0) for step in range(1, 13)]


@pytest.mark.parametrize("agent", [td3_rnd.Agent, td3_rnd.FujimotoAgent])
def test_actions_of_many_observations(agent):
    """As those of each one."""
    agent, obs = agent(OBS, ACT, HIDDEN, 0.0, CPU), np.random.default_rng(0).normal(size=(2, 3, OBS)).astype(np.float32)
    close(agent.act(obs), np.array([[agent.act(one) for one in some] for some in obs]))


def test_ceiling_of_values():
    """The largest |reward| of all data, shifted and scaled, and the largest bonus, over 1 - gamma."""
    rewards = [-7.0, 2.0, 5.0]
    data = dict(observations=np.zeros((3, OBS)), actions=np.zeros((3, ACT)), rewards=np.array(rewards),
                next_observations=np.zeros((3, OBS)), terminations=np.zeros(3), episodes=np.zeros(3))
    buffer = td3_rnd.ReplayBuffer(data, 1, CPU)
    args = td3_rnd.Args(reward_bias=-1.0, reward_scale=2.0, gamma=0.9, intrinsic_reward_scale=3.0)
    assert td3_rnd.value_ceiling(args, buffer, None) == pytest.approx(160)
    rnd = td3_rnd.RND(OBS, HIDDEN, 1e-4, CPU)
    rnd.largest_reward.fill_(0.5)
    assert td3_rnd.value_ceiling(args, buffer, rnd) == pytest.approx(175)
    buffer.add(**{name: value[0] for name, value in data.items()} | {"rewards": 11.0})
    assert td3_rnd.value_ceiling(args, buffer, rnd) == pytest.approx(215)


# === runs ===


@pytest.mark.parametrize(("env_id", "variant"), [*((env_id, "official") for env_id in td3_rnd.TASKS),
                                                 (PEN, "fujimoto")])
def test_every_task(env_id, variant, tiny, session):
    tiny(env_id)
    rows = session.run("--env-id", env_id, *SMALL, "--variant", variant, "--online-steps", 20, "--save-at", 10)
    run = run_directory(td3_rnd, env_id)
    assert type(session.agents[0]) is {"official": td3_rnd.Agent, "fujimoto": td3_rnd.FujimotoAgent}[variant]
    check_scores(td3_rnd, run, rows, [10, 20], session.agents[0])
    names = {"critic", "actor", "q_mean", "q_magnitude", "rnd"}
    for record in losses_of(run, "online"):
        assert {f"losses/{name}" for name in names} | {"rnd/online_mean"} <= record.keys()
        assert all(math.isfinite(value) for value in record.values() if not isinstance(value, str))


def test_official_variant_has_the_tasks_policy(tiny, session):
    tiny(PEN)
    asked = []
    session.spy("td3_update", lambda agent, *_, **options: asked.append((agent, options["dropout"])))
    session.run("--env-id", PEN, *SMALL, "--log-std-min", -2, "--online-steps", 40, "--save-at", 20)
    assert len(asked) == 40 and {dropout for _, dropout in asked} == {0.1}
    actor = asked[0][0].actor
    assert actor.squash and actor.log_std_min == -2


def test_without_the_bonus_there_is_no_rnd(tiny, session):
    tiny(PEN)
    session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--intrinsic-reward-scale", 0)
    assert all("losses/rnd" not in record for record in losses_of(run_directory(td3_rnd, PEN), "online"))


def test_batches_are_of_offline_and_online_data(tiny, session):
    """Offline data is in the buffer from the first step; pen's 5 offline episodes have the numbers 0 to 4."""
    tiny(PEN)
    seen = []
    session.spy("td3_update", lambda agent, batch, *_, **options: seen.append(batch["episodes"].clone()))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 60, "--save-at")
    episodes = torch.cat(seen)
    assert (seen[0] < 5).sum() > 8 and set(episodes.int().tolist()) == set(range(7))


def test_evaluations_leave_no_trace_in_the_training(tiny, session):
    tiny(PEN)
    for name, every in (("often", 3), ("once", 1000)):
        session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--exp-name", name, "--eval-every",
                    every)
    one, other = ([r for r in read_lines(f"runs/{PEN}__{name}__1/metrics.jsonl") if "losses/critic" in r]
                  for name in ("often", "once"))
    assert one == other


@pytest.mark.parametrize("variant", ["official", "fujimoto"])
def test_divergence_is_said(tiny, session, capsys, variant):
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--variant", variant, "--online-steps", 40, "--save-at"]
    check_divergence_is_said(session, words, capsys)


@pytest.mark.parametrize("gym_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_own_task(in_tmp, monkeypatch, gym_id):
    check_own_task("td3_rnd", in_tmp, monkeypatch, SMALL, gym_id)


@pytest.mark.parametrize("variant", ["official", "fujimoto"])
def test_same_bytes_and_resume_after_sigkill(tiny, tmp_path, variant):
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--variant", variant, "--online-steps", 205, "--save-at", 170, "--log-every", 7]
    # Checkpoints at 100, 200 and 205.
    check_determinism_and_resume(tmp_path, "td3_rnd.py", words, ["/policy_170.pt", ("/checkpoint.pt", 2)])


@pytest.mark.parametrize(("words", "named"), [
    (["--env-id", "pen-binary-v1"], "pen-binary-v0"),
    (["--env-id", PEN, "--save-at", 10, "--online-steps", 9], "--save-at 10"),
    (["--env-id", PEN, "--save-at", 9, 8], "--save-at must rise"),
    (["--env-id", PEN, "--online-steps", 0, "--save-at"], "--online-steps"),
    (["--env-id", PEN, "--policy-delay", 0], "--policy-delay"),
    (["--env-id", PEN, "--noise-clip", -1], "--noise-clip"),
    (["--env-id", PEN, "--policy-noise", "nan"], "--policy-noise"),
    (["--env-id", PEN, "--device", "cuda:97"], "cuda:97"),
    (["--env-id", PEN, "--dataset-id", "mine/none-v0"], "mine/none-v0"),
    (["--eval-only", "missing"], "missing"),
])
def test_bad_input(tiny, in_tmp, capsys, words, named):
    tiny(PEN)
    check_refused(td3_rnd, words, named, capsys, in_tmp)


def test_task_rows():
    want = {"pen-binary-v0": (0.5, 0.0, None, 0.1, -5.0, 1_000_000),
            "kitchen-mixed-v0": (10.0, -4.0, 4.0, 0.1, -5.0, 4_000_000),
            "antmaze-goal-missing-large-v2": (10.0, -1.0, None, 0.0, -5.0, 1_500_000),
            "maze2d-missing-data-large-v1": (10.0, -1.0, None, 0.0, -5.0, 500_000),
            "hammer-truncated-expert-v1": (0.5, 0.0, None, 0.1, -5.0, 500_000)}  # its official TD3 config
    for env_id, row in want.items():
        args = td3_rnd.parse_args(["--env-id", env_id])
        assert args.variant == "official"
        assert (args.intrinsic_reward_scale, args.reward_bias, args.mask_reward, args.dropout, args.log_std_min,
                args.online_steps) == row
    assert (args.policy_noise, args.noise_clip, args.policy_delay, args.exploration_noise) == (0.2, 0.5, 2, 0.1)
    assert args.truncate_episodes == 20


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("variant", ["official", "fujimoto"])
@pytest.mark.parametrize("normalizer", ["code", "paper"])
def test_compiled_update_equals_eager(variant, normalizer):
    """All graphs (two of the delayed update), with RND's, over the same rows and random numbers, with dropout."""
    def build(args, buffer):
        agent = (td3_rnd.Agent if variant == "official" else td3_rnd.FujimotoAgent)(4, 2, (16, 16), 3e-4, CPU)
        rnd = td3_rnd.RND(4, (24, 16), 1e-4, CPU, "max", normalizer)
        both, critics = (td3_rnd.make_update(args, buffer, agent, rnd, policy) for policy in (True, False))
        return [critics, both], {"agent": agent, "rnd": rnd}

    check_compiled(td3_rnd, td3_rnd.Args(variant=variant, dropout=0.2), build)
