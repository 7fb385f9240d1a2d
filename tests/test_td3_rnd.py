"""td3_rnd.py: both variants' losses, the delayed policy, every task, resume and errors; see also test_golden.py.

What td3_rnd.py shares with iql_ooo.py, byte for byte (test_shared_blocks.py), is tested there.
"""

import copy
import math
import shutil
from types import SimpleNamespace

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
    run_directory,
    small_words,
)
from test_losses import ACT, BATCH, HIDDEN, OBS, array, close, forward, gradients, linears, make_batch, q_values

import td3_rnd

PEN = "pen-binary-v0"
SMALL = small_words("--rnd-hidden-dims", 16, 16)


@pytest.fixture
def session(monkeypatch, in_tmp):
    return Session(td3_rnd, monkeypatch)


def make_agent(learning_rate=1e-2, **options):
    """Targets differ from their networks, so that a mix-up shows."""
    torch.manual_seed(0)
    agent = td3_rnd.TD3Agent(OBS, ACT, HIDDEN, learning_rate, torch.device("cpu"), **options)
    with torch.no_grad():
        for target in (agent.critic_target, agent.actor_target):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


# === losses ===


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_fujimoto_update(bonus):
    """Target, both losses, who is moved by which, and the targets, from their definitions in numpy."""
    agent, batch = make_agent(), make_batch()
    settings = td3_rnd.Settings(0.9, 0.1, 3.0, policy_noise=0.4, noise_clip=0.5)
    noise, intrinsic = torch.randn(BATCH, ACT), torch.rand(BATCH) if bonus else None
    before = copy.deepcopy(agent)
    losses = td3_rnd.fujimoto_update(agent, batch, settings, intrinsic, True, noise)
    b = {name: array(value) for name, value in batch.items()}

    smoothing = np.minimum(np.maximum(0.4 * array(noise), -0.5), 0.5)
    assert (np.abs(smoothing) == 0.5).any() and (np.abs(smoothing) < 0.5).any()
    following = np.tanh(forward(*linears(before.actor_target), b["next_observations"])) + smoothing
    assert (np.abs(following) > 1).any()  # the smoothed action is clipped, too
    following = torch.from_numpy(np.minimum(np.maximum(following, -1), 1))
    next_q = np.minimum(*q_values(before.critic_target, batch["next_observations"], following))
    target = b["rewards"] + 0.9 * b["masks"] * next_q + (3.0 * array(intrinsic) if bonus else 0)
    q = q_values(before.critic, batch["observations"], batch["actions"])
    close(losses["losses/critic"], np.mean((q - target) ** 2))
    close(losses["losses/q_mean"], q.mean())

    # The policy climbs the first critic, as it is after its own step.
    actions = np.tanh(forward(*linears(before.actor), b["observations"]))
    first = q_values(agent.critic, batch["observations"], torch.from_numpy(actions))[0]
    close(losses["losses/actor"], -first.mean())

    critic_loss = (before.critic(batch["observations"], batch["actions"]) - torch.from_numpy(target).float()) ** 2
    actor_loss = -agent.critic(batch["observations"], before.actor(batch["observations"]).tanh())[0].mean()
    for network, old, loss, name in [(agent.critic, before.critic, critic_loss.mean(), "critic"),
                                     (agent.actor, before.actor, actor_loss, "actor")]:
        wanted = torch.autograd.grad(loss, list(old.parameters()))
        for got, want in zip(gradients(network)(agent.optimizers[name]), map(array, wanted), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    for now, was, source in [(agent.critic_target, before.critic_target, agent.critic),
                             (agent.actor_target, before.actor_target, agent.actor)]:
        for one, old, new in zip(now.parameters(), was.parameters(), source.parameters(), strict=True):
            close(one, 0.9 * array(old) + 0.1 * array(new), 1e-6)


def test_between_policy_steps_only_the_critics_learn():
    agent, batch = make_agent(), make_batch()
    first = td3_rnd.fujimoto_update(agent, batch, td3_rnd.Settings())["losses/actor"]
    before = copy.deepcopy(agent.state_dict())
    losses = td3_rnd.fujimoto_update(agent, batch, td3_rnd.Settings(), update_policy=False)
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"critic"}
    assert losses["losses/actor"] == first != 0  # the loss of the latest policy step


def test_action_noise():
    agent, obs = make_agent(exploration_noise=0.3), np.ones(OBS, np.float32)
    mean = np.tanh(forward(*linears(agent.actor), obs[None]))[0]
    close(agent.act(obs, sample=False), mean)
    torch.manual_seed(0)
    noise = torch.randn(ACT)
    torch.manual_seed(0)
    close(agent.act(obs, sample=True), np.clip(mean + 0.3 * array(noise), -1, 1))


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay_counts_gradient_steps(tiny, session, delay):
    tiny(PEN)
    asked = []
    session.spy("fujimoto_update", lambda agent, batch, settings, bonus, policy: asked.append(policy))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 12, "--save-at", "--variant", "fujimoto",
                "--policy-delay", delay)
    assert asked == [(step % delay == 0) for step in range(1, 13)]


# === runs ===


@pytest.mark.parametrize(("env_id", "variant"), [*((env_id, "official") for env_id in td3_rnd.TASKS),
                                                 (PEN, "fujimoto")])
def test_every_task(env_id, variant, tiny, session):
    tiny(env_id)
    rows = session.run("--env-id", env_id, *SMALL, "--variant", variant, "--online-steps", 20, "--save-at", 10)
    run = run_directory(td3_rnd, env_id)
    check_scores(td3_rnd, run, rows, [10, 20], session.agents[-1])
    names = {"critic", "actor", "q_mean", "rnd"}
    for record in losses_of(run, "online"):
        assert {f"losses/{name}" for name in names} | {"rnd/online_mean"} <= record.keys()
        assert all(math.isfinite(value) for value in record.values() if not isinstance(value, str))


def test_official_variant(tiny, session):
    tiny(PEN)
    asked = []
    session.spy("td3_update", lambda agent, *rest: asked.append(agent))
    rows = session.run("--env-id", PEN, *SMALL, "--log-std-min", -2, "--online-steps", 40, "--save-at", 20)
    assert len(asked) == 40 and asked[0].actor.squash and asked[0].actor.log_std_min == -2
    kept = {layer.keep for layer in asked[0].actor.modules() if isinstance(layer, td3_rnd.Dropout)}
    assert kept == {round(0.9 * 65536)}  # the task's dropout
    check_scores(td3_rnd, run_directory(td3_rnd, PEN), rows, [20, 40], asked[0])


def test_without_the_bonus_there_is_no_rnd(tiny, session):
    tiny(PEN)
    session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at", "--intrinsic-reward-scale", 0)
    assert all("losses/rnd" not in record for record in losses_of(run_directory(td3_rnd, PEN), "online"))


def test_offline_data_is_in_the_buffer_from_the_first_step(tiny, session):
    tiny(PEN)
    sizes = []
    session.spy("log_evaluation", lambda s, *rest: sizes.append((s.offline_size, s.buffer.size, rest[:2])))
    session.run("--env-id", PEN, *SMALL, "--online-steps", 20, "--save-at")
    assert sizes[0] == (150, 150, ("online", 0)) and sizes[-1] == (150, 170, ("online", 20))


@pytest.mark.parametrize("variant", ["official", "fujimoto"])
def test_same_bytes_and_resume_after_sigkill(tiny, tmp_path, variant):
    tiny(PEN)
    words = ["--env-id", PEN, *SMALL, "--variant", variant, "--online-steps", 105, "--save-at", 70, "--log-every", 7]
    # Checkpoints at 100, with losses of two steps not yet logged, and at 105.
    check_determinism_and_resume(tmp_path, "td3_rnd.py", words, ["/policy_70.pt", ("/checkpoint.pt", 2)])


@pytest.mark.parametrize(("words", "named"), [
    (["--env-id", "pen-binary-v1"], "did you mean pen-binary-v0?"),
    (["--env-id", PEN, "--save-at", 10, "--online-steps", 9], "--save-at 10"),
    (["--env-id", PEN, "--save-at", 9, 8], "--save-at must rise"),
    (["--env-id", PEN, "--policy-delay", 0], "--policy-delay"),
    (["--env-id", PEN, "--noise-clip", -1], "--noise-clip"),
    (["--env-id", PEN, "--device", "cuda:97"], "cuda:97"),
    (["--env-id", PEN, "--dataset-id", "mine/none-v0"], "mine/none-v0"),
    (["--eval-only", "missing"], "missing"),
])
def test_bad_input(tiny, in_tmp, capsys, words, named):
    tiny(PEN)
    check_refused(td3_rnd, words, named, capsys, in_tmp)


def test_task_rows():
    want = {"pen-binary-v0": (0.5, 0.0, None, 1_000_000), "kitchen-mixed-v0": (10.0, -4.0, 4.0, 4_000_000),
            "antmaze-goal-missing-large-v2": (10.0, -1.0, None, 1_500_000),
            "maze2d-missing-data-large-v1": (10.0, -1.0, None, 500_000),
            "hammer-truncated-expert-v1": (0.5, 0.0, None, 500_000)}
    for env_id, row in want.items():
        args = td3_rnd.parse_args(["--env-id", env_id])
        assert (args.intrinsic_reward_scale, args.reward_bias, args.mask_reward, args.online_steps) == row
    assert (args.policy_noise, args.noise_clip, args.policy_delay, args.exploration_noise) == (0.2, 0.5, 2, 0.1)
    assert len(td3_rnd.TASKS) == 9 and args.truncate_episodes == 20


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("variant", ["official", "fujimoto"])
@pytest.mark.parametrize("normalizer", ["code", "paper"])
def test_compiled_update_equals_eager(variant, normalizer):
    """All graphs (two of the delayed update), with RND's, over the same rows and random numbers, with dropout."""
    def build(args, buffer, device):
        options = dict(dropout=0.2) if variant == "official" else {}
        agent = td3_rnd.make_agent(variant, 4, 2, (16, 16), 1e-2, device, **options)
        rnd = td3_rnd.make_rnd(args, 4, device)
        s = SimpleNamespace(args=args, buffer=buffer, explorer=agent, rnd=rnd, progress={"grad_step": 0})
        return td3_rnd.make_update(s), s.progress, {"agent": agent, "rnd": rnd}

    check_compiled(td3_rnd, build, rnd_hidden_dims=(24, 16), variant=variant, rnd_normalizer=normalizer)
