"""rlpd_ooo.py: updates against the authors' own learners, the sparse environments, sampling, runs, resume, errors.

What the shared blocks do is tested on iql_ooo.py; here is what only this script does.
"""

import copy
import json
import math
import os
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runner import Box
from test_errors import refused
from test_golden import (
    GRADIENTS,
    INFOS,
    PARAMETERS,
    check_rnd_state,
    check_step,
    close,
    load,
    read,
    rnd_parameters,
    stack_parameters,
    tensors,
)
from test_smoke import metrics

import rlpd_ooo as ooo

ANT, CHEETAH, PEN = "ant-sparse-v2", "halfcheetah-sparse-v2", "pen-binary-v0"
CPU, TASKS = torch.device("cpu"), dict(ooo.TASKS)
# Networks and budgets that take a second; 5 random steps at the start.
SMALL = """--hidden-dims 16 16 --rnd-hidden-dims 16 16 --batch-size 8 --utd-ratio 3 --num-qs 4 --eval-episodes 1
--final-episodes 1 --eval-every 10000 --log-every 10 --checkpoint-every 10 --online-steps 60 --learning-starts 5
--retrain-at 30 60 --retrain-steps 12""".split()


# === golden vectors ===


def make_buffer(obs_dim=5, act_dim=2, offline=0, online=0):
    """A buffer of which the first `offline` transitions are offline data; every number of a row is its index."""
    shapes = dict(observations=(obs_dim,), actions=(act_dim,), rewards=(), next_observations=(obs_dim,),
                  terminations=(), episodes=())
    buffer = ooo.ReplayBuffer({name: np.zeros((offline, *shape), np.float32) for name, shape in shapes.items()},
                              online, CPU)
    buffer.data[:] = torch.arange(offline + online)[:, None]
    buffer.size += online
    return buffer


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}; the actor's two heads are halves of its last layer."""
    net = agent.actor.net
    hidden = len(net.weights) - 1
    names = [f"actor.{i}" for i in range(hidden)] + ["last"]
    out = stack_parameters(net, names, single=True)
    del out["last.weight"], out["last.bias"]
    for name, half in (("mean", 0), ("log_std_head", 1)):
        out[f"actor.{name}.weight"] = net.weights[-1], lambda v, half=half: v[0].T.chunk(2)[half]
        out[f"actor.{name}.bias"] = net.biases[-1], lambda v, half=half: v[0, 0].chunk(2)[half]
    for prefix, critic in (("critic", agent.critic), ("target_critic", agent.critic_target)):
        out |= stack_parameters(critic, [f"{prefix}.{i}" for i in range(len(critic.weights))])
        for i, (scale, shift) in enumerate(zip(critic.scales, critic.shifts, strict=True)):
            out[f"{prefix}.ln{i}.weight"], out[f"{prefix}.ln{i}.bias"] = (
                (scale, "ensemble bias"), (shift, "ensemble bias"))
    out["log_temp"] = (agent.log_alpha, None)
    return out | (rnd_parameters(rnd) if rnd else {})


@pytest.mark.parametrize("name", ["rlpd_plain", "rlpd_rnd_qbounds"])
def test_update_equals_the_authors(name):
    """Two whole updates of four critic steps: losses, gradients (of actor, alpha and RND), parameters, statistics."""
    data, hyper = read(name)
    args = ooo.Args(hidden_dims=hyper["hidden_dims"], rnd_hidden_dims=hyper["rnd_hidden_dims"] or (8,),
                    rnd_learning_rate=hyper["rnd_lr"], num_qs=hyper["num_qs"])
    buffer = make_buffer(hyper["obs_dim"], hyper["act_dim"])
    agent = ooo.make_agent(args, buffer, CPU)
    rnd = ooo.make_rnd(args, buffer, CPU) if hyper["use_rnd"] else None
    options = dict(utd_ratio=hyper["utd_ratio"], gamma=hyper["discount"], tau=hyper["tau"],
                   num_min_qs=hyper["num_min_qs"], backup_entropy=hyper["backup_entropy"],
                   target_entropy=hyper["target_entropy"])
    if hyper["min_q"] is not None:
        options |= dict(q_min=hyper["min_q"], q_max=hyper["max_q"])
    assert hyper["target_entropy"] == -hyper["act_dim"] / 2
    named = parameters(agent, rnd)
    load(data, named)
    optimizers = [*agent.optimizers, *(rnd.optimizers if rnd else ())]
    for step in range(hyper["steps"]):
        batch, noise, bonus = tensors(data, "batch/", step), tensors(data, "noise/", step), 0.0
        if rnd:
            rewards, rnd_loss = rnd.update(batch["observations"], batch["next_observations"],
                                           hyper["rnd_update_proportion"], noise["rnd_mask_uniform"])
            close(rewards, data["rnd/intrinsic_reward"][step], PARAMETERS, f"intrinsic reward {step}")
            close(rnd_loss, data["info/rnd_loss"][step], INFOS, f"rnd loss {step}")
            bonus = hyper["intrinsic_reward_scale"] * rewards
        draws = {"next": noise["target_eps"].flatten(0, 1), "actor": noise["actor_eps"],
                 "members": noise["redq_indices"].long()}
        losses = ooo.sac_update(agent, batch, bonus, **options, noise=draws)
        for mine, its in {"critic": "critic_loss", "actor": "actor_loss", "alpha": "temperature_loss",
                          "q_mean": "q", "entropy": "entropy"}.items():
            close(losses[f"losses/{mine}"], data[f"info/{its}"][step], INFOS, f"step {step} {its}")
        assert check_step(data, named, optimizers, step + 1) >= 19
        if rnd:
            after = f"step{step + 1}/"
            check_rnd_state(rnd, {name[len(after):]: value for name, value in data.items() if name.startswith(after)})


class CalqlNet(ooo.Stack):
    """Cal-QL's policy: log_std = multiplier * output + offset, both trained."""

    def __init__(self, dims):
        super().__init__(1, dims)
        self.multiplier, self.offset = (torch.nn.Parameter(torch.tensor(value)) for value in (1.0, -1.0))

    def forward(self, x):
        mean, log_std = super().forward(x).chunk(2, dim=-1)
        return torch.cat([mean, self.multiplier * log_std + self.offset], dim=-1)


class NoStep:
    """Stands for an optimiser: it leaves the gradients where a step would use them."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def minimize(self, loss):
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            parameter.grad = gradient


def test_sac_losses_equal_the_authors():
    """The SAC inside the authors' Cal-QL (sac_no_cql): same losses, but taken at the same old parameters, each with its
    own noise, the actor against the smaller Q, alpha's gradient without the factor alpha, log_std with two scalars."""
    data, hyper = read("sac_no_cql")
    obs_dim, act_dim = hyper["obs_dim"], hyper["act_dim"]
    agent = ooo.Agent(obs_dim, act_dim, (32, 32), 0.0, CPU, num_qs=2, layer_norm=False)
    net = agent.actor.net = CalqlNet((obs_dim, 32, 32, 2 * act_dim))
    agent.critic, agent.critic_target = (ooo.Critic(obs_dim, act_dim, (32, 32, 32), 2, False) for _ in range(2))
    named = {"log_alpha": agent.log_alpha, "policy.log_std_multiplier": net.multiplier,
             "policy.log_std_offset": net.offset}
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        named[f"policy.{i}.weight"], named[f"policy.{i}.bias"] = weight, bias

    def golden(name, value):
        """A parameter of the policy, or its gradient, as the golden file has it."""
        return value[0].T if name.endswith("weight") else value[0, 0] if name.endswith("bias") else value

    members = {f"{prefix}qf{k + 1}.{i}.{part}": (parameter, k)
               for prefix, critic in (("", agent.critic), ("target_", agent.critic_target))
               for part, group in (("weight", critic.weights), ("bias", critic.biases))
               for i, parameter in enumerate(group) for k in range(2)}
    views = {**{name: golden(name, p.data) for name, p in named.items()},
             **{name: p.data[k].t() if name.endswith("weight") else p.data[k, 0]
                for name, (p, k) in members.items()}}
    for name, view in views.items():
        view.data.copy_(torch.from_numpy(data[f"step0/{name}"]))
    policy = [p for name, p in named.items() if name != "log_alpha"]
    adam = {"policy": torch.optim.Adam([*policy, agent.log_alpha], hyper["policy_lr"]),
            "critic": torch.optim.Adam(agent.critic.parameters(), hyper["qf_lr"])}
    agent.critic_optimizer, agent.actor_optimizer = (
        NoStep(adam[name].param_groups[0]["params"]) for name in ("critic", "policy"))
    smaller = SimpleNamespace(actor=agent.actor, log_alpha=agent.log_alpha, actor_optimizer=agent.actor_optimizer,
                              critic=lambda *inputs, **how: agent.critic(*inputs, **how).amin(0, keepdim=True))
    gamma = hyper["discount"]

    def gradients_of_critics(noise):
        """And the loss, of the whole ensemble."""
        with torch.no_grad():
            next_actions, log_prob = agent.actor.sample(batch["next_observations"], noise)
            entropy = -gamma * batch["masks"] * agent.log_alpha.exp() * log_prob
        losses = ooo.critic_step(agent, batch | {"next_actions": next_actions, "extra": entropy}, None, gamma, 0.0,
                                 -np.inf, np.inf)
        return losses["losses/critic"], [p.grad for p in agent.critic.parameters()]

    def gradients_of_policy(noise):
        losses = ooo.actor_step(smaller, batch["observations"], noise, hyper["target_entropy"])
        return losses, [p.grad for p in policy], agent.log_alpha.grad

    for step in range(hyper["steps"]):
        batch, noise = tensors(data, "batch/", step), tensors(data, "noise/", step)
        batch["masks"] = 1 - batch["dones"]
        _, of_policy, _ = gradients_of_policy(noise["policy.new_action_eps"])
        reported, _, of_alpha = gradients_of_policy(noise["log_alpha.new_action_eps"])
        of_policy.append(of_alpha / agent.log_alpha.detach().exp())
        close(reported["losses/actor"], data["info/policy_loss"][step], INFOS, "policy loss")
        close(-reported["losses/entropy"], data["info/log_pi_mean"][step], INFOS, "log pi")
        both = sum(data[f"info/qf{k}_loss"][step] for k in (1, 2))
        close(2 * gradients_of_critics(noise["log_alpha.target_eps"])[0], both, INFOS, "critic loss")
        # Each critic has its own target here, and the sum of two losses where critic_step has the mean.
        one, two = (gradients_of_critics(noise[f"qf{k}.target_eps"])[1] for k in (1, 2))
        of_critics = [2 * torch.stack([a[0], b[1]]) for a, b in zip(one, two, strict=True)]
        for optimizer, gradients in ((adam["policy"], of_policy), (adam["critic"], of_critics)):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        agent.update_target(hyper["soft_target_update_rate"])
        for name, view in views.items():
            if f"step{step + 1}/{name}" in data:
                close(view, data[f"step{step + 1}/{name}"], PARAMETERS, f"step {step + 1} {name}")
        if step == 0:
            of_named = zip((name for name in named if name != "log_alpha"), of_policy, strict=False)
            found = {name: golden(name, gradient) for name, gradient in of_named}
            found["log_alpha"] = of_policy[-1]
            by_id = {id(p): g for p, g in zip(agent.critic.parameters(), of_critics, strict=True)}
            for name, (p, k) in members.items():
                if not name.startswith("target"):
                    found[name] = by_id[id(p)][k].t() if name.endswith("weight") else by_id[id(p)][k, 0]
            for name, gradient in found.items():
                close(gradient, 10 * data[f"step1/adam_m/{name}"], GRADIENTS, f"gradient {name}")


# === the parts of an update ===


def make_batch(n, obs_dim=5, act_dim=2):
    return {"observations": torch.randn(n, obs_dim), "actions": torch.rand(n, act_dim) * 2 - 1,
            "rewards": torch.randn(n), "masks": (torch.rand(n) < 0.7).float(),
            "next_observations": torch.randn(n, obs_dim)}


def make_agent(num_qs=4, layer_norm=True):
    torch.manual_seed(0)
    agent = ooo.Agent(5, 2, (16, 16), 3e-4, CPU, num_qs=num_qs, layer_norm=layer_norm, init_alpha=0.3)
    for critic in (agent.critic, agent.critic_target):
        for parameter in critic.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return agent


def test_density_of_the_squashed_gaussian():
    agent, observations = make_agent(), 3 * torch.randn(50, 5)
    actions, log_prob = agent.actor.sample(observations, torch.randn(50, 2))
    mean, log_std = (value.double() for value in agent.actor(observations))
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform())
    inside = actions.abs().amax(-1) < 0.999  # the inverse needs digits
    assert inside.sum() > 25
    torch.testing.assert_close(log_prob[inside].double(), squashed.log_prob(actions.double())[inside].sum(-1),
                               rtol=1e-3, atol=1e-3)
    huge = agent.actor.sample(observations, torch.full((50, 2), 1e3))[1]
    assert torch.isfinite(huge).all()


def test_ensemble_members_are_separate_networks_with_layer_norm():
    agent, batch = make_agent(), make_batch(7)
    critic = agent.critic
    q = critic(batch["observations"], batch["actions"])
    assert q.shape == (4, 7)
    for k in range(4):
        x = torch.cat([batch["observations"], batch["actions"]], dim=-1)
        for i in range(2):
            x = x @ critic.weights[i][k] + critic.biases[i][k]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
            x = (x * critic.scales[i][k] + critic.shifts[i][k]).relu()
        torch.testing.assert_close(q[k], (x @ critic.weights[2][k] + critic.biases[2][k]).squeeze(-1))
    members = torch.tensor([3, 1])
    torch.testing.assert_close(critic(batch["observations"], batch["actions"], members), q[members])
    assert not len(make_agent(layer_norm=False).critic.scales)


def test_target_takes_the_smallest_of_a_random_two():
    agent, batch = make_agent(), make_batch(6)
    batch |= {"next_actions": torch.rand(6, 2), "extra": torch.randn(6)}
    with torch.no_grad():
        q_next = agent.critic_target(batch["next_observations"], batch["next_actions"])
        q = agent.critic(batch["observations"], batch["actions"])
    target = batch["rewards"] + 0.9 * batch["masks"] * torch.minimum(q_next[2], q_next[0]) + batch["extra"]
    losses = ooo.critic_step(agent, batch, torch.tensor([2, 0]), 0.9, 0.005, -np.inf, np.inf)
    torch.testing.assert_close(losses["losses/critic"], (q - target).square().mean())
    torch.testing.assert_close(losses["losses/q_mean"], q.mean())
    # Two different ones for each critic step, every pair alike.
    members = ooo.draw_noise(3000, 1, 2, 4, 2, CPU)["members"]
    assert members.shape == (3000, 2) and (members[:, 0] != members[:, 1]).all()
    pairs = torch.bincount(4 * members.amin(1) + members.amax(1), minlength=16)
    assert (pairs > 0).sum() == 6 and pairs[pairs > 0].min() > 400
    noise = ooo.draw_noise(3, 4, 2, 4, 2, CPU)
    assert noise["next"].shape == (12, 2) and noise["actor"].shape == (4, 2)


@pytest.mark.parametrize("backup_entropy", [True, False])
def test_entropy_and_bonus_come_after_the_bounds(monkeypatch, backup_entropy):
    """The bounds here leave no room: what a target is above 0.25 is entropy and bonus."""
    agent, batch, bonus = make_agent(), make_batch(6), torch.rand(6) + 5
    noise = ooo.draw_noise(2, 3, 2, 4, 2, CPU)
    _, log_prob = agent.actor.sample(batch["next_observations"], noise["next"])
    extra = bonus - 0.9 * batch["masks"] * 0.3 * log_prob.detach() * backup_entropy
    with torch.no_grad():
        q = agent.critic(batch["observations"][3:], batch["actions"][3:])
    agent.critic_optimizer.param_groups[0]["lr"] = 0.0
    losses = ooo.sac_update(agent, batch, bonus, utd_ratio=2, gamma=0.9, tau=0.0, target_entropy=-1.0,
                            backup_entropy=backup_entropy, q_min=0.25, q_max=0.25, noise=noise)
    torch.testing.assert_close(losses["losses/critic"], (q - 0.25 - extra[3:]).square().mean())
    torch.testing.assert_close(agent.largest_entropy_reward, (extra - bonus).abs().max()[None])


def test_value_ceiling_has_room_for_bonus_and_entropy():
    """Largest |reward| 3, bonus 10 x 0.5, entropy 2: at most 10 in each step."""
    args, agent = ooo.Args(gamma=0.9, reward_bias=-1.0), make_agent()
    agent.largest_entropy_reward.fill_(2.0)
    rnd = SimpleNamespace(largest_reward=torch.tensor([0.5]))
    rewards = torch.tensor([-2.0, 1.0])
    assert ooo.value_ceiling(args, rewards, agent, rnd) == pytest.approx(100)
    assert ooo.value_ceiling(args, rewards, agent) == pytest.approx(50)


OPTIONS = dict(gamma=0.99, tau=0.005, target_entropy=-1.0)


@pytest.mark.parametrize(("target_entropy", "rises"), [(50.0, True), (-50.0, False)])
def test_alpha_moves_toward_the_target_entropy(target_entropy, rises):
    agent, batch = make_agent(), make_batch(8)
    losses = ooo.sac_update(agent, batch, **OPTIONS | {"target_entropy": target_entropy})
    assert (losses["losses/alpha_value"] > 0.3) == rises
    assert losses["losses/alpha"].item() == pytest.approx(0.3 * (losses["losses/entropy"].item() - target_entropy))


def test_each_loss_moves_its_own_network_and_the_target_follows_every_critic_step():
    agent, batch = make_agent(), make_batch(12)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    ooo.sac_update(agent, batch, utd_ratio=3, **OPTIONS | {"tau": 1.0})
    after = agent.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    steps = [{int(state["step"]) for state in optimizer.state.values()} for optimizer in agent.optimizers]
    assert steps == [{3}, {1}]
    for name, value in agent.critic.state_dict().items():
        torch.testing.assert_close(agent.critic_target.state_dict()[name], value)
    critic = copy.deepcopy(agent.critic).state_dict()
    ooo.actor_step(agent, batch["observations"], torch.randn(12, 2), -1.0)
    assert all(torch.equal(value, critic[name]) for name, value in agent.critic.state_dict().items())


def test_symmetric_sampling():
    """Every minibatch, not only the whole draw, has its share of offline rows; all rows are drawn alike."""
    torch.manual_seed(0)
    rows = ooo.sample_symmetric(make_buffer(offline=10, online=30), 300, 8, 0.5)[:, 0].view(300, 8)
    assert (rows[:, :4] < 10).all() and (rows[:, 4:] >= 10).all()
    counts = torch.bincount(rows.flatten().long(), minlength=40)
    assert counts[:10].min() > 80 and counts[10:].min() > 15 and len(counts) == 40
    for offline, ratio, share in ((0, 0.5, 0.0), (10, 0.0, 0.0), (10, 0.25, 0.25), (10, 1.0, 1.0)):
        rows = ooo.sample_symmetric(make_buffer(offline=offline, online=30), 5, 8, ratio)[:, 0]
        assert rows.shape == (40,) and (rows < offline).float().mean().item() == share and (rows < 40).all()


def xavier(layer):
    """Whether a matrix (in, out) or (out, in) looks drawn by xavier_uniform."""
    bound = math.sqrt(6 / sum(layer.shape))
    return 0.95 * bound < layer.abs().max() <= bound and abs(layer.std().item() * math.sqrt(3) / bound - 1) < 0.1


def test_all_networks_are_initialised_as_rlpds():
    buffer = make_buffer(30, 10)
    agent = ooo.make_agent(ooo.Args(), buffer, CPU)
    rnd = ooo.make_rnd(ooo.Args(), buffer, CPU)
    matrices = [matrix for p in [*agent.parameters(), *rnd.parameters()] if p.ndim > 1 and p.shape[-2] > 1
                for matrix in p.detach().view(-1, *p.shape[-2:])]
    assert len(matrices) == 3 + 2 * 3 * 10 + 2 * 2 and all(xavier(matrix) for matrix in matrices)


def test_rnd_pays_before_its_step_and_the_normaliser_has_two_forms():
    """code: the variance of rewards already divided; paper: of the raw errors, this batch's included."""
    for form in ("code", "paper"):
        args, raw, paid = ooo.Args(rnd_hidden_dims=(16, 8), rnd_normalizer=form), [], []
        torch.manual_seed(0)
        rnd = ooo.make_rnd(args, make_buffer(), CPU)
        for _ in range(3):
            observations, following = torch.randn(2, 32, 5)
            with torch.no_grad():
                z = rnd.normalize(following)
                raw.append((rnd.predictor(z) - rnd.target(z)).square().amax(-1))
            var = rnd.reward_statistics.var
            divisor = var.item() ** 0.5 if form == "code" else torch.cat(raw).std(correction=0).item()
            rewards, _ = rnd.update(observations, following, 0.25)
            torch.testing.assert_close(rewards, raw[-1] / divisor, rtol=1e-4, atol=1e-6)
            paid.append(rewards)
            want = torch.cat(paid if form == "code" else raw).std(correction=0).item()
            assert var.item() ** 0.5 == pytest.approx(want, rel=1e-3)


# === sparse environments ===


@pytest.fixture
def sparse():
    """sparse(env_id) makes an environment."""
    made = []

    def make(env_id):
        made.append(ooo.make_env(env_id))
        return made[-1]

    yield make
    for env in made:
        env.close()


@pytest.mark.parametrize(("env_id", "obs_dim", "act_dim", "threshold"), [(ANT, 28, 8, 10), (CHEETAH, 17, 6, 20)])
def test_sparse_environment(sparse, env_id, obs_dim, act_dim, threshold):
    env = sparse(env_id)
    assert env.observation_space.shape == (obs_dim,) and env.action_space.shape == (act_dim,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    data, rng = env.unwrapped.data, np.random.default_rng(0)

    def state():
        """Ant: x, no y; cheetah: no x."""
        kept = np.delete(data.qpos, 1) if env_id == ANT else data.qpos[1:]
        return np.concatenate([kept, data.qvel]).astype(np.float32)

    starts = [env.reset(seed=seed)[0] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2]) and starts[0].dtype == np.float32
    np.testing.assert_array_equal(starts[2], state())
    initial = env.unwrapped.init_qpos.copy()
    assert np.abs(data.qpos - initial).max() <= 0.1 and np.abs(data.qpos - initial).max() > 0.01
    for x, reward in ((threshold - 1, 0), (threshold + 1, 1), (-threshold - 1, 0)):
        qpos = data.qpos.copy()
        qpos[0] = x
        env.unwrapped.set_state(qpos, data.qvel.copy())
        obs, got, terminated, truncated, info = env.step(rng.uniform(-1, 1, act_dim).astype(np.float32))
        np.testing.assert_array_equal(obs, state())
        assert got == reward == float(data.qpos[0] > threshold) and info["success"] == bool(reward)
        assert not terminated and not truncated


@pytest.mark.parametrize("env_id", [ANT, CHEETAH])
def test_sparse_episode_has_1000_steps_whatever_happens(sparse, env_id):
    """Also an ant that flies or lies on its back, which its package calls unhealthy."""
    env = sparse(env_id)
    env.reset(seed=0)
    action = np.ones(env.action_space.shape, np.float32)
    for step in range(1, 1001):
        if step % 300 == 0 and env_id == ANT:
            qpos = env.unwrapped.data.qpos.copy()
            qpos[2], qpos[3:7] = 3.0, (0, 1, 0, 0)
            env.unwrapped.set_state(qpos, env.unwrapped.data.qvel.copy())
        _, _, terminated, truncated, _ = env.step(action)
        assert not terminated and truncated == (step == 1000), step


def test_metric_is_the_share_of_episodes_that_ever_pass(sparse, monkeypatch):
    """One step beyond the threshold counts; the return counts the steps."""
    monkeypatch.setitem(ooo.TASKS, CHEETAH, ooo.TASKS[CHEETAH]._replace(horizon=5))
    env = sparse(CHEETAH)
    played, reset = [0], env.reset

    def reset_near(**options):
        obs = reset(**options)
        played[0] += 1
        qpos = env.unwrapped.data.qpos.copy()
        qpos[0] = {1: 19.0, 2: 25.0, 3: 20.02}[played[0]]
        qvel = np.zeros(9)
        qvel[0] = -5.0  # episode 3: beyond the goal for a moment
        env.unwrapped.set_state(qpos, qvel)
        return obs

    env.reset = reset_near
    still = SimpleNamespace(act=lambda obs: np.zeros(6, np.float32))
    episodes, summary = ooo.evaluate(env, still, 3, seed=0)
    assert [e["success"] for e in episodes][:2] == [False, True] and episodes[1]["return"] == 5
    assert summary["eval/normalized_score"] == pytest.approx(100 * summary["eval/success_rate"])


def test_sparse_tasks_have_no_offline_data(sparse):
    data, report = ooo.no_data(sparse(CHEETAH))
    assert {name: value.shape for name, value in data.items()} == dict(
        observations=(0, 17), actions=(0, 6), rewards=(0,), next_observations=(0, 17), terminations=(0,), episodes=(0,))
    assert report["transitions"] == 0


# === whole runs, in this process ===


@pytest.fixture
def session(in_tmp, monkeypatch):
    """session(*words) runs the script with short episodes; returns the table's rows."""
    def run(*words):
        for env_id in (ANT, CHEETAH, PEN):
            monkeypatch.setitem(ooo.TASKS, env_id, TASKS[env_id]._replace(horizon=20))
        return ooo.main(ooo.parse_args([str(word) for word in words]))

    run.folder = in_tmp / "runs"
    return run


def agent_of(path):
    return torch.load(path, weights_only=True)["agent"]


@pytest.mark.parametrize("env_id", [ANT, CHEETAH, PEN])
def test_all_phases(env_id, tiny, session, capsys):
    if env_id == PEN:
        tiny(PEN)
    rows = session("--env-id", env_id, *SMALL)
    run = session.folder / f"{env_id}__rlpd_ooo__1"
    assert [row["env_step"] for row in rows] == [30, 60] and all(r["exploration"] and r["exploitation"] for r in rows)
    assert json.loads((run / "results.json").read_text())["rows"] == rows
    for record in metrics(run):
        assert all(isinstance(value, str) or math.isfinite(value) for value in record.values()), record
    losses = {f"losses/{name}" for name in ("critic", "actor", "alpha", "q_mean", "q_magnitude", "entropy",
                                            "alpha_value")}
    bonus = {"losses/rnd", "rnd/batch_intrinsic_reward", "rnd/online_mean", "rnd/online_scaled_mean", "rnd/online_std"}
    for phase, names in (("online", losses | bonus), ("retrain", losses)):
        logged = [r for r in metrics(run, phase) if "losses/critic" in r]
        assert logged and all(r.keys() == {"phase", "env_step", "grad_step"} | names for r in logged)
    # 5 random steps, then one update each; the first evaluation is before all of it.
    steps = [(r["env_step"], r["grad_step"]) for r in metrics(run, "online")]
    assert steps[0] == (0, 0) and set(steps[1:]) == {(t, t - 5) for t, _ in steps[1:]}
    # The exploration agent is an ensemble with layer norm, the exploitation agents two plain critics, all different.
    explorer, *exploiters = (agent_of(run / name) for name in
                             ("exploration_60.pt", "exploitation_30.pt", "exploitation_60.pt"))
    assert len(explorer["critic.weights.0"]) == 4 and "critic.scales.0" in explorer
    assert all(len(e["critic.weights.0"]) == 2 and "critic.scales.0" not in e for e in exploiters)
    assert not torch.equal(exploiters[0]["critic.weights.0"], exploiters[1]["critic.weights.0"])
    assert ("sampling stays uniform" in capsys.readouterr().out) == (env_id != PEN)
    columns = json.loads((run / "config.json").read_text())["replay_columns"]
    replay = np.fromfile(run / "replay.bin", np.float32).reshape(60, -1)
    assert not replay[:, columns["terminations"][0]].any() and len(np.unique(replay[:, columns["episodes"][0]])) == 3
    # The saved policy, by itself
    agent = ooo.load_policy(run / "exploitation_60.pt")
    action = agent.act(np.ones(agent.options["obs_dim"], np.float32))
    assert action.shape == (agent.options["act_dim"],) and np.abs(action).max() <= 1
    if env_id == CHEETAH:
        (again,) = session("--exploit-only", run, "--retrain-at", 60, "--exp-name", "again")
        assert again == rows[1]
        summary = session("--eval-only", run, "--episodes", 2)
        assert summary["eval/episodes"] == 2


def test_offline_data_alone(tiny, session):
    """t = 0: the retraining on D_off; RLPD does not pretrain, so no exploration policy stands beside it."""
    tiny(PEN)
    (row,) = session("--env-id", PEN, *SMALL, "--online-steps", 0, "--retrain-at", 0, "--final-episodes", 3)
    assert row["env_step"] == 0 and len(row["exploitation"]["per_episode"]) == 3
    words = [*SMALL, "--retrain-at", 0, 30, 60, "--final-episodes", 3, "--exp-name", "all"]
    first, _, _ = session("--env-id", PEN, *words)
    assert first == {"env_step": 0, "exploration": None, "exploitation": row["exploitation"]}


def test_plain_rlpd_and_what_the_retraining_samples(session, monkeypatch, capsys):
    """Without RND; with successes (the goal lies at the start): 32 of 288 rows are high; no bounds."""
    drawn, made, sample, make = [], [], ooo.ReplayBuffer.sample, ooo.sac_update

    def watch(buffer, size, first, high, extra):
        drawn.append((size, first, extra))
        assert not extra or (buffer.first(first)["rewards"][high] == 1).all()
        return sample(buffer, size, first, high, extra)

    def watch_update(agent, batch, bonus, **options):
        made.append((len(agent.critic.weights[0]), bonus, options))
        return make(agent, batch, bonus, **options)

    monkeypatch.setattr(ooo.ReplayBuffer, "sample", watch)
    monkeypatch.setattr(ooo, "sac_update", watch_update)
    words = ["--env-id", CHEETAH, *SMALL, "--retrain-at", 30, "--online-steps", 30, "--retrain-steps", 2]
    rows = session(*words, "--intrinsic-reward-scale", 0, "--goal-x", -0.05, "--batch-size", 256)
    assert rows[0]["exploration"]["eval/success_rate"] == 1 and drawn == [(288, 30, 32)] * 2
    explore, retrain = made[:25], made[25:]
    assert len(retrain) == 2 and {qs for qs, _, _ in explore} == {4} and {qs for qs, _, _ in retrain} == {2}
    for _, bonus, options in made:
        assert bonus == 0 and (options["q_min"], options["q_max"]) == (-math.inf, math.inf)
        assert options["target_entropy"] == -3
    run = session.folder / f"{CHEETAH}__rlpd_ooo__1"
    assert not any("losses/rnd" in r for r in metrics(run))
    drawn.clear(), made.clear()
    session("--exploit-only", run, "--exp-name", "other", "--retrain-upsample", 0, "--retrain-q-bounds",
            "--retrain-critics", 3, "--retrain-layer-norm")
    assert drawn == [(256, 30, 0)] * 2
    assert (made[0][2]["q_min"], made[0][2]["q_max"]) == (0, pytest.approx(100))
    other = agent_of(session.folder / f"{CHEETAH}__other__1" / "exploitation_30.pt")
    assert len(other["critic.weights.0"]) == 3 and "critic.scales.0" in other
    drawn.clear()
    session("--exploit-only", run, "--exp-name", "half", "--retrain-upsample", 0.5)
    assert drawn == [(512, 30, 256)] * 2  # half of a batch
    assert "no raw reward" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        session("--exploit-only", run, "--exp-name", "third", "--goal-x", 1)
    assert stop.value.code == 2 and "--goal-x" in capsys.readouterr().err


# === runs as processes of their own: resume and errors ===


@pytest.fixture
def rlpd_box(tmp_path):
    box = Box(tmp_path, script="rlpd_ooo.py")
    yield box
    box.stop()


def outcome(run):
    """What two runs must have in common: all but times and what names the run."""
    found = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl", "replay.bin")}
    found["results.json"] = json.loads((run / "results.json").read_text())
    found |= {path.name: plain(torch.load(path, weights_only=True)) for path in run.glob("*.pt")}
    for name in ("run_id", "exp_name", "args", "sizes"):
        for content in found.values():
            if isinstance(content, dict):
                content.pop(name, None)
    return found


def plain(content):
    """With bytes in place of tensors."""
    if isinstance(content, torch.Tensor):
        return content.numpy().tobytes()
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list | tuple) else content


RUN = ["--env-id", PEN, *SMALL, *"""--utd-ratio 2 --online-steps 110 --retrain-at 70 110 --log-every 7
--checkpoint-every 5""".split()]
CHECKPOINT = ("os.rename", "/checkpoint.pt")


def test_killed_and_resumed(tiny, rlpd_box):
    """SIGKILL before an episode is saved, between data and checkpoint, inside a retraining, and after a policy."""
    tiny(PEN)
    assert rlpd_box.run(*RUN).code == 0
    runs = rlpd_box.work / "runs"
    whole = outcome(runs / f"{PEN}__rlpd_ooo__1")
    assert {"exploitation_70.pt", "exploitation_110.pt", "metrics.jsonl"} <= whole.keys()
    moments = [(*CHECKPOINT, 2), (*CHECKPOINT, 2), (*CHECKPOINT, 4), ("os.rename", "/exploitation_110.pt", 1)]
    for moment in moments:
        child = rlpd_box.run(*RUN, "--exp-name", "killed", "--resume", signal_at=(signal.SIGKILL, *moment))
        assert child.code == -signal.SIGKILL
    assert rlpd_box.run(*RUN, "--exp-name", "killed", "--resume").code == 0
    assert outcome(runs / f"{PEN}__killed__1") == whole


def test_sparse_task_killed_and_resumed(rlpd_box):
    """Without offline data, in the process as a user starts it; the goal lies at the start, so rows are upsampled."""
    words = ["--env-id", CHEETAH, *SMALL, "--goal-x", -0.05]
    assert rlpd_box.run(*words).code == 0
    moment = (signal.SIGKILL, "os.rename", "/exploitation_60.pt", 1)
    killed = rlpd_box.run(*words, "--exp-name", "killed", signal_at=moment)
    assert killed.code == -signal.SIGKILL
    assert rlpd_box.run(*words, "--exp-name", "killed", "--resume").code == 0
    one, other = (outcome(rlpd_box.work / "runs" / f"{CHEETAH}__{name}__1") for name in ("killed", "rlpd_ooo"))
    assert one == other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env-id", "halfcheetah-sparse-v3"], "halfcheetah-sparse-v2"),
        (["--env-id", PEN, "--goal-x", "3"], "--goal-x"),
        (["--env-id", CHEETAH, "--dataset-id", "D4RL/pen/human-v2"], "without offline data"),
        (["--env-id", CHEETAH, "--dataset-path", "x.npz"], "without offline data"),
        (["--env-id", ANT, "--truncate-episodes", "9"], "without offline data"),
        (["--env-id", CHEETAH, "--retrain-upsample", "1"], "--retrain-upsample"),
        (["--env-id", PEN, "--offline-ratio", "1.5"], "--offline-ratio"),
        (["--env-id", CHEETAH, "--num-qs", "1"], "--num-qs"),
        (["--env-id", CHEETAH, "--retrain-critics", "1"], "--retrain-critics"),
        (["--env-id", CHEETAH, "--utd-ratio", "0"], "--utd-ratio"),
        (["--env-id", CHEETAH, "--init-alpha", "0"], "--init-alpha"),
        (["--env-id", CHEETAH, "--retrain-at", "2000000"], "--retrain-at"),
        (["--env-id", CHEETAH, "--cudagraphs", "--device", "cpu"], "--cudagraphs"),
        (["--env-id", CHEETAH, "--retrain-at", "0"], "without offline data"),
        (["--eval-only", "nowhere", "--goal-x", "x"], "--goal-x"),
        (["--eval-only", "nowhere"], "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_bad_input(rlpd_box, words, said):
    assert said in refused(rlpd_box, *words)


def test_a_run_of_another_script_is_refused(rlpd_box):
    run = rlpd_box.work / "runs" / f"{PEN}__iql_ooo__1"
    os.makedirs(run)
    (run / "config.json").write_text(json.dumps({"script": "iql_ooo", "args": {}}))
    assert "iql_ooo" in refused(rlpd_box, "--eval-only", f"runs/{run.name}")


# === arguments ===


def test_settings_of_the_tasks():
    """Table 3's numbers by default, those of the data tasks as in iql_ooo.py, and --scale."""
    args = ooo.parse_args(["--env-id", ANT])
    assert args == replace(ooo.Args(), env_id=ANT)
    want = dict(online_steps=1_000_000, learning_starts=5_000, utd_ratio=20, batch_size=256, num_qs=10, num_min_qs=2,
                intrinsic_reward_scale=10.0, retrain_steps=1_000_000, retrain_critics=2, retrain_q_bounds=False,
                retrain_upsample=1 / 9)
    assert want.items() <= asdict(args).items()
    small = ooo.parse_args(["--env-id", CHEETAH, "--scale", "0.01", "--utd-ratio", "2"])
    assert (small.online_steps, small.learning_starts, small.retrain_at[0], small.utd_ratio) == (10_000, 50, 2_500, 2)
    import iql_ooo

    for env_id in iql_ooo.TASKS:
        mine, other = ooo.parse_args(["--env-id", env_id]), iql_ooo.parse_args(["--env-id", env_id])
        names = ("reward_scale", "reward_bias", "mask_reward", "truncate_episodes", "data_subset", "remove_discs",
                 "intrinsic_reward_scale")
        assert all(getattr(mine, name) == getattr(other, name) for name in names), env_id
