"""rlpd_ooo.py: updates against the authors' own learners, the sparse environments, sampling, runs, resume, errors.

What the shared blocks do is tested on iql_ooo.py; here is what only this script does.
"""

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
from test_golden import GRADIENTS, INFOS, PARAMETERS, check_rnd_state, check_step, close, load, read, tensors
from test_resume import check_equal, outcome
from test_smoke import metrics

import rlpd_ooo as ooo

ANT, CHEETAH, PEN = "ant-sparse-v2", "halfcheetah-sparse-v2", "pen-binary-v0"
CPU = torch.device("cpu")
# Networks and budgets that take a second; 5 random steps at the start.
SMALL = """--hidden-dims 16 16 --rnd-hidden-dims 16 16 --batch-size 8 --utd-ratio 3 --num-qs 4 --eval-episodes 1
--eval-every 10000 --log-every 10 --checkpoint-every 10 --online-steps 60 --learning-starts 5 --retrain-at 30 60
--retrain-steps 12""".split()


# === golden vectors ===


def linears(network):
    return [layer for layer in network if isinstance(layer, torch.nn.Linear)]


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}; the actor's two heads are halves of its last layer."""
    out, (*hidden, last) = {}, linears(agent.actor.net)
    for i, layer in enumerate(hidden):
        out[f"actor.{i}.weight"], out[f"actor.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    act_dim = len(last.bias) // 2
    for name, half in (("mean", slice(None, act_dim)), ("log_std_head", slice(act_dim, None))):
        out[f"actor.{name}.weight"], out[f"actor.{name}.bias"] = (last.weight, half), (last.bias, half)
    for prefix, critic in (("critic", agent.critic), ("target_critic", agent.critic_target)):
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (weight, "ensemble"), (bias, "bias")
        for i, (scale, shift) in enumerate(zip(critic.scales, critic.shifts, strict=True)):
            out[f"{prefix}.ln{i}.weight"], out[f"{prefix}.ln{i}.bias"] = (scale, "bias"), (shift, "bias")
    for prefix, network in [("rnd_predictor", rnd.predictor), ("rnd_target", rnd.target)] if rnd else ():
        for i, layer in enumerate(linears(network)):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    out["log_temp"] = (agent.log_alpha, None)
    return out


@pytest.mark.parametrize("name", ["rlpd_plain", "rlpd_rnd_qbounds"])
def test_update_equals_the_authors(name):
    """Two whole updates of four critic steps: losses, gradients (of actor, alpha and RND), parameters, statistics."""
    data, hyper = read(name)
    args = ooo.Args(hidden_dims=hyper["hidden_dims"], rnd_hidden_dims=hyper["rnd_hidden_dims"] or (),
                    rnd_learning_rate=hyper["rnd_lr"], rnd_update_proportion=hyper["rnd_update_proportion"])
    agent = ooo.make_agent(args, hyper["obs_dim"], hyper["act_dim"], CPU, hyper["num_qs"], layer_norm=True)
    rnd = ooo.make_rnd(args, hyper["obs_dim"], CPU, reward_before_step=True) if hyper["use_rnd"] else None
    bounds = {} if hyper["min_q"] is None else dict(q_min=hyper["min_q"], q_max=hyper["max_q"])
    settings = ooo.Settings(hyper["target_entropy"], hyper["discount"], hyper["tau"], hyper["num_min_qs"],
                            hyper["backup_entropy"], hyper["intrinsic_reward_scale"], **bounds)
    assert ooo.make_settings(args, hyper["act_dim"]).target_entropy == hyper["target_entropy"]
    named = parameters(agent, rnd)
    load(data, named)
    optimizers = [*agent.optimizers.values(), *([rnd.optimizer] if rnd else [])]
    for step in range(hyper["steps"]):
        batch, noise, bonus = tensors(data, "batch/", step), tensors(data, "noise/", step), None
        if rnd:
            bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"], noise["rnd_mask_uniform"])
            close(bonus, data["rnd/intrinsic_reward"][step], PARAMETERS, f"intrinsic reward {step}")
            close(rnd_loss, data["info/rnd_loss"][step], INFOS, f"rnd loss {step}")
        draws = {"next": noise["target_eps"].flatten(0, 1), "actor": noise["actor_eps"],
                 "members": noise["redq_indices"].long()}
        losses = ooo.sac_update(agent, batch, settings, hyper["utd_ratio"], bonus, draws)
        for mine, its in {"critic": "critic_loss", "actor": "actor_loss", "alpha": "temperature_loss",
                          "q_mean": "q", "entropy": "entropy"}.items():
            close(losses[f"losses/{mine}"], data[f"info/{its}"][step], INFOS, f"step {step} {its}")
        assert check_step(data, named, optimizers, step + 1) >= 19
        if rnd:
            after = f"step{step + 1}/"
            check_rnd_state(rnd, {name[len(after):]: value for name, value in data.items() if name.startswith(after)})


class CalqlHead(torch.nn.Linear):
    """The last layer of Cal-QL's policy: log_std = multiplier * output + offset, both trained."""

    def __init__(self, fan_in, act_dim):
        super().__init__(fan_in, 2 * act_dim)
        self.multiplier, self.offset = (torch.nn.Parameter(torch.tensor(value)) for value in (1.0, -1.0))

    def forward(self, x):
        mean, log_std = super().forward(x).chunk(2, dim=-1)
        return torch.cat([mean, self.multiplier * log_std + self.offset], dim=-1)


def test_sac_losses_equal_the_authors():
    """The SAC inside the authors' Cal-QL (sac_no_cql): same losses, but taken at the same old parameters, each with its
    own noise, the actor against the smaller Q, alpha's gradient without the factor alpha, log_std with two scalars."""
    data, hyper = read("sac_no_cql")
    obs_dim, act_dim = hyper["obs_dim"], hyper["act_dim"]
    agent = ooo.Agent(obs_dim, act_dim, (32, 32), 0.0, CPU, num_qs=2, layer_norm=False)
    head = agent.actor.net[-1] = CalqlHead(32, act_dim)
    agent.critic, agent.critic_target = (ooo.Critic(obs_dim, act_dim, (32, 32, 32)) for _ in range(2))
    settings = ooo.Settings(hyper["target_entropy"], hyper["discount"], hyper["soft_target_update_rate"])
    named = {"log_alpha": agent.log_alpha, "policy.log_std_multiplier": head.multiplier,
             "policy.log_std_offset": head.offset}
    for i, layer in enumerate(linears(agent.actor.net)):
        named[f"policy.{i}.weight"], named[f"policy.{i}.bias"] = layer.weight, layer.bias
    members = {f"{prefix}qf{k + 1}.{i}.{part}": (parameter, k)
               for prefix, critic in (("", agent.critic), ("target_", agent.critic_target))
               for part, group in (("weight", critic.weights), ("bias", critic.biases))
               for i, parameter in enumerate(group) for k in range(2)}
    views = {**named, **{name: p.data[k].t() if name.endswith("weight") else p.data[k, 0]
                         for name, (p, k) in members.items()}}
    for name, view in views.items():
        view.data.copy_(torch.from_numpy(data[f"step0/{name}"]))
    policy = [p for name, p in named.items() if name != "log_alpha"]
    optimizers = {"policy": ooo.Adam([*policy, agent.log_alpha], hyper["policy_lr"]),
                  "critic": ooo.Adam(agent.critic.parameters(), hyper["qf_lr"])}
    smaller = SimpleNamespace(actor=agent.actor, log_alpha=agent.log_alpha,
                              critic=lambda *inputs: agent.critic(*inputs).amin(0, keepdim=True))

    def loss_of_critics(noise):
        with torch.no_grad():
            target = ooo.td_target(agent, batch, settings, *ooo.next_actions_of(agent, batch, settings, noise))
        return ooo.critic_loss(agent, batch, target)[0]

    for step in range(hyper["steps"]):
        batch, noise = tensors(data, "batch/", step), tensors(data, "noise/", step)
        batch["masks"] = 1 - batch["dones"]
        loss_pi, _ = ooo.actor_loss(smaller, batch["observations"], noise["policy.new_action_eps"])
        gradients = list(torch.autograd.grad(loss_pi, policy))
        reported, entropy = ooo.actor_loss(smaller, batch["observations"], noise["log_alpha.new_action_eps"])
        loss_alpha = ooo.alpha_loss(agent, settings, entropy)
        gradients.append(torch.autograd.grad(loss_alpha, [agent.log_alpha])[0] / agent.log_alpha.detach().exp())
        close(reported, data["info/policy_loss"][step], INFOS, "policy loss")
        close(-entropy, data["info/log_pi_mean"][step], INFOS, "log pi")
        both = sum(data[f"info/qf{k}_loss"][step] for k in (1, 2))
        close(2 * loss_of_critics(noise["log_alpha.target_eps"]), both, INFOS, "critic loss")
        # Each critic has its own target here, and the sum of two losses where sac_update has the mean.
        one, two = (torch.autograd.grad(loss_of_critics(noise[f"qf{k}.target_eps"]), list(agent.critic.parameters()))
                    for k in (1, 2))
        of_critics = [2 * torch.stack([a[0], b[1]]) for a, b in zip(one, two, strict=True)]
        optimizers["policy"].apply(gradients)
        optimizers["critic"].apply(of_critics)
        agent.update_target(settings.tau)
        for name, view in views.items():
            if f"step{step + 1}/{name}" in data:
                close(view, data[f"step{step + 1}/{name}"], PARAMETERS, f"step {step + 1} {name}")
        if step == 0:
            found = dict(zip((n for n in named if n != "log_alpha"), gradients, strict=False))
            found["log_alpha"] = gradients[-1]
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
    settings = ooo.Settings(-1.0, gamma=0.9, backup_entropy=False)
    next_actions, entropy_term = ooo.next_actions_of(agent, batch, settings, torch.randn(6, 2))
    assert not entropy_term.any()
    q = agent.critic_target(batch["next_observations"], next_actions)
    target = ooo.td_target(agent, batch, settings, next_actions, entropy_term, torch.tensor([2, 0]))
    torch.testing.assert_close(target, batch["rewards"] + 0.9 * batch["masks"] * torch.minimum(q[2], q[0]))
    # Two different ones for each critic step, every pair alike.
    members = ooo.draw_noise(3000, 1, 2, 4, 2, CPU)["members"]
    assert members.shape == (3000, 2) and (members[:, 0] != members[:, 1]).all()
    pairs = torch.bincount(4 * members.amin(1) + members.amax(1), minlength=16)
    assert (pairs > 0).sum() == 6 and pairs[pairs > 0].min() > 400
    noise = ooo.draw_noise(3, 4, 2, 4, 2, CPU)
    assert noise["next"].shape == (12, 2) and noise["actor"].shape == (4, 2)


def test_entropy_and_bonus_come_after_the_bounds():
    agent, batch, noise = make_agent(), make_batch(6), torch.randn(6, 2)
    settings = ooo.Settings(-1.0, gamma=0.9, intrinsic_reward_scale=2.0, q_min=-0.1, q_max=0.1)
    next_actions, entropy_term = ooo.next_actions_of(agent, batch, settings, noise)
    _, log_prob = agent.actor.sample(batch["next_observations"], noise)
    torch.testing.assert_close(entropy_term, -0.9 * batch["masks"] * 0.3 * log_prob)
    bonus = torch.rand(6) + 5
    target = ooo.td_target(agent, batch, settings, next_actions, entropy_term, None, bonus)
    clipped = target - entropy_term - 2 * bonus
    assert clipped.min() > -0.1001 and clipped.max() < 0.1001 and clipped.std() > 0.01


@pytest.mark.parametrize(("target_entropy", "rises"), [(50.0, True), (-50.0, False)])
def test_alpha_moves_toward_the_target_entropy(target_entropy, rises):
    agent, batch = make_agent(), make_batch(8)
    losses = ooo.sac_update(agent, batch, ooo.Settings(target_entropy))
    assert (losses["losses/alpha_value"] > 0.3) == rises
    assert losses["losses/alpha"].item() == pytest.approx(0.3 * (losses["losses/entropy"].item() - target_entropy))


def test_each_loss_moves_its_own_network_and_the_target_follows_every_critic_step():
    agent, batch = make_agent(), make_batch(12)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    ooo.sac_update(agent, batch, ooo.Settings(-1.0, tau=1.0), utd_ratio=3)
    after = agent.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert {name: int(o.step) for name, o in agent.optimizers.items()} == {"critic": 3, "actor": 1, "alpha": 1}
    for name, value in agent.critic.state_dict().items():
        torch.testing.assert_close(agent.critic_target.state_dict()[name], value)


def test_symmetric_sampling():
    """Every minibatch, not only the whole draw, has its share of offline rows; all rows are drawn alike."""
    buffer = ooo.ReplayBuffer(dict(rewards=()), 50, CPU)
    buffer.extend(dict(rewards=np.arange(40, dtype=np.float32)))
    torch.manual_seed(0)
    rows = ooo.sample_symmetric(buffer, 10, 0.5, 300, 8).squeeze(-1).view(300, 8)
    assert (rows[:, :4] < 10).all() and (rows[:, 4:] >= 10).all()
    counts = torch.bincount(rows.flatten().long(), minlength=40)
    assert counts[:10].min() > 80 and counts[10:].min() > 15 and len(counts) == 40
    for offline_size, ratio, share in ((0, 0.5, 0.0), (10, 0.0, 0.0), (10, 0.25, 0.25)):
        rows = ooo.sample_symmetric(buffer, offline_size, ratio, 5, 8).squeeze(-1)
        offline = (rows < offline_size).float().mean().item()
        assert rows.shape == (40,) and offline == share and (rows < 40).all()


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
    monkeypatch.setitem(ooo.ENVIRONMENTS, CHEETAH, replace(ooo.ENVIRONMENTS[CHEETAH], horizon=5))
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
    moves = iter([0] * 5 + [0] * 5 + [0] * 5)
    episodes = ooo.evaluate(env, lambda obs: np.full(6, next(moves), np.float32), 3, seed=0)
    assert [e["success"] for e in episodes][:2] == [False, True] and episodes[1]["return"] == 5
    summary = ooo.summarize(CHEETAH, episodes)
    assert summary["eval/normalized_score"] == pytest.approx(100 * summary["eval/success_rate"])


def test_sparse_tasks_have_no_offline_data(sparse):
    env = sparse(CHEETAH)
    data, report = ooo.load_dataset(CHEETAH, env)
    assert {name: value.shape for name, value in data.items()} == dict(
        observations=(0, 17), actions=(0, 6), rewards=(0,), next_observations=(0, 17), terminations=(0,), episodes=(0,))
    assert report["transitions"] == 0


# === whole runs, in this process ===


@pytest.fixture
def session(in_tmp, monkeypatch):
    """session(*words) runs the script with short episodes; returns the table's rows."""
    for env_id in (ANT, CHEETAH, PEN):
        monkeypatch.setitem(ooo.ENVIRONMENTS, env_id, replace(ooo.ENVIRONMENTS[env_id], horizon=20))

    def run(*words):
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
    losses = {f"losses/{name}" for name in ("critic", "actor", "alpha", "q_mean", "entropy", "alpha_value")}
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
    chunks = [np.load(path) for path in sorted((run / "replay").iterdir())]
    assert sum(len(chunk["rewards"]) for chunk in chunks) == 60 and not any(c["terminations"].any() for c in chunks)
    # The saved policy, by itself
    act, content = ooo.load_policy(run / "exploitation_60.pt")
    action = act(np.ones(content["obs_dim"], np.float32))
    assert action.shape == (content["act_dim"],) and np.abs(action).max() <= 1
    if env_id == CHEETAH:
        (again,) = session("--exploit-only", run, "--retrain-at", 60, "--exp-name", "again")
        assert again == rows[1]
        summary = session("--eval-only", run, "--episodes", 2)
        assert summary["eval/episodes"] == 2


def test_plain_rlpd_and_what_the_retraining_samples(session, monkeypatch, capsys):
    """Without RND; with successes (the goal lies at the start): 32 of 288 rows are high; no bounds, or [0, 100]."""
    drawn, made, sample, make = [], [], ooo.ReplayBuffer.sample, ooo.make_update

    def watch(buffer, size, first, high, extra):
        drawn.append((size, first, extra))
        assert (buffer.split(buffer.data[high])["rewards"] == 1).all()
        return sample(buffer, size, first, high, extra)

    def watch_make(args, buffer, agent, settings, *rest):
        made.append(settings)
        return make(args, buffer, agent, settings, *rest)

    monkeypatch.setattr(ooo.ReplayBuffer, "sample", watch)
    monkeypatch.setattr(ooo, "make_update", watch_make)
    words = ["--env-id", CHEETAH, *SMALL, "--retrain-at", 30, "--online-steps", 30, "--retrain-steps", 2]
    rows = session(*words, "--intrinsic-reward-scale", 0, "--goal-x", -0.05, "--batch-size", 256)
    assert rows[0]["exploration"]["eval/success_rate"] == 1 and drawn == [(288, 30, 32)] * 2
    explore, retrain = made
    assert explore.intrinsic_reward_scale == retrain.intrinsic_reward_scale == 0 and explore.q_max == math.inf
    assert (retrain.q_min, retrain.q_max) == (-math.inf, math.inf) and retrain.target_entropy == -3
    run = session.folder / f"{CHEETAH}__rlpd_ooo__1"
    assert not list(run.glob("rnd_*")) and not any("losses/rnd" in r for r in metrics(run))
    drawn.clear(), made.clear()
    session("--exploit-only", run, "--exp-name", "other", "--retrain-upsample", 0, "--retrain-q-bounds",
            "--retrain-critics", 3, "--retrain-layer-norm")
    assert drawn == [(256, 30, 0)] * 2 and (made[0].q_min, made[0].q_max) == (0, pytest.approx(100, rel=1e-4))
    other = agent_of(session.folder / f"{CHEETAH}__other__1" / "exploitation_30.pt")
    assert len(other["critic.weights.0"]) == 3 and "critic.scales.0" in other
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


RUN = ["--env-id", PEN, *SMALL, *"""--utd-ratio 2 --online-steps 110 --retrain-at 70 110 --log-every 7
--checkpoint-every 5""".split()]
CHECKPOINT = ("os.rename", "/checkpoint.pt")


def test_killed_and_resumed(tiny, rlpd_box):
    """SIGKILL before the first checkpoint, between data and checkpoint, inside a retraining, and after a policy."""
    tiny(PEN)
    assert rlpd_box.run(*RUN).code == 0
    runs = rlpd_box.work / "runs"
    whole = outcome(runs / f"{PEN}__rlpd_ooo__1")
    assert {"exploitation_70.pt", "exploitation_110.pt", "metrics.jsonl"} <= whole.keys()
    moments = [(*CHECKPOINT, 1), (*CHECKPOINT, 2), (*CHECKPOINT, 4), ("os.rename", "/exploitation_110.pt", 1)]
    for moment in moments:
        child = rlpd_box.run(*RUN, "--exp-name", "killed", "--resume", signal_at=(signal.SIGKILL, *moment))
        assert child.code == -signal.SIGKILL
    assert rlpd_box.run(*RUN, "--exp-name", "killed", "--resume").code == 0
    check_equal(outcome(runs / f"{PEN}__killed__1"), whole)


def test_sparse_task_killed_and_resumed(rlpd_box):
    """Without offline data, in the process as a user starts it; the goal lies at the start, so rows are upsampled."""
    words = ["--env-id", CHEETAH, *SMALL, "--goal-x", -0.05]
    assert rlpd_box.run(*words).code == 0
    moment = (signal.SIGKILL, "os.rename", "/exploitation_60.pt", 1)
    killed = rlpd_box.run(*words, "--exp-name", "killed", signal_at=moment)
    assert killed.code == -signal.SIGKILL
    assert rlpd_box.run(*words, "--exp-name", "killed", "--resume").code == 0
    check_equal(*(outcome(rlpd_box.work / "runs" / f"{CHEETAH}__{name}__1") for name in ("killed", "rlpd_ooo")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env-id", "halfcheetah-sparse-v3"], "did you mean halfcheetah-sparse-v2?"),
        (["--env-id", PEN, "--goal-x", "3"], "--goal-x"),
        (["--env-id", CHEETAH, "--dataset-id", "D4RL/pen/human-v2"], "without offline data"),
        (["--env-id", CHEETAH, "--dataset-path", "x.npz"], "without offline data"),
        (["--env-id", CHEETAH, "--retrain-upsample", "1"], "--retrain-upsample"),
        (["--env-id", PEN, "--offline-ratio", "1.5"], "--offline-ratio"),
        (["--env-id", CHEETAH, "--num-qs", "1"], "--num-qs"),
        (["--env-id", CHEETAH, "--retrain-critics", "1"], "--retrain-critics"),
        (["--env-id", CHEETAH, "--utd-ratio", "0"], "--utd-ratio"),
        (["--env-id", CHEETAH, "--init-alpha", "0"], "--init-alpha"),
        (["--env-id", CHEETAH, "--retrain-at", "2000000"], "--retrain-at"),
        (["--env-id", CHEETAH, "--cudagraphs", "--device", "cpu"], "--cudagraphs"),
        (["--env-id", CHEETAH, "--online-steps", str(10**12)], "GiB"),
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
                intrinsic_reward_scale=10.0, retrain_steps=1_000_000, retrain_critics=2, retrain_q_bounds=False)
    assert want.items() <= asdict(args).items()
    small = ooo.parse_args(["--env-id", CHEETAH, "--scale", "0.01", "--utd-ratio", "2"])
    assert (small.online_steps, small.learning_starts, small.retrain_at[0], small.utd_ratio) == (10_000, 50, 2_500, 2)
    import iql_ooo

    for env_id in iql_ooo.TASKS:
        mine, other = ooo.parse_args(["--env-id", env_id]), iql_ooo.parse_args(["--env-id", env_id])
        names = ("reward_scale", "reward_bias", "mask_reward", "truncate_episodes", "data_subset", "remove_discs",
                 "intrinsic_reward_scale")
        assert all(getattr(mine, name) == getattr(other, name) for name in names), env_id
