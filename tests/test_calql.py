"""calql_ooo.py: updates with importance sampling against the authors' own learner (there are no vectors without it),
returns, hand-made cases of the conservative term, mixing, what each task makes of its data, all phases, resume, errors.

What the shared blocks do is tested on iql_ooo.py; here is what only this script does.
"""

import copy
import json
import math
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import SMALL, Box
from test_golden import INFOS, check_rnd_state, check_step, close, load, read, rnd_parameters, stack_parameters, tensors
from test_resume import digest

import calql_ooo as ooo

PEN, HAMMER, MAZE = "pen-binary-v0", "hammer-truncated-expert-v1", "maze2d-missing-data-large-v1"
CPU = torch.device("cpu")


def parse(*words):
    return ooo.parse_args([str(word) for word in words])


# === golden vectors ===


def make(hyper):
    """Agent, settings and RND as a golden file's hyper-parameters want them."""
    dims = {name: tuple(int(d) for d in hyper[name].split("-")) for name in ("policy_arch", "qf_arch")}
    agent = ooo.Agent(hyper["obs_dim"], hyper["act_dim"], dims["policy_arch"], dims["qf_arch"], CPU, hyper["qf_lr"],
                      hyper["policy_lr"], unit_features=hyper["feature_normalization"],
                      lagrange=hyper["cql_lagrange"])
    if hyper["bound_q_functions"]:
        agent.q_bounds.copy_(torch.tensor([hyper["min_q"], hyper["max_q"]]))
    args = ooo.Args(
        target_entropy=hyper["target_entropy"], gamma=hyper["discount"], tau=hyper["soft_target_update_rate"],
        cql_alpha=hyper["cql_min_q_weight"] if hyper["use_cql"] else 0.0, cql_actions=hyper["cql_n_actions"],
        cql_importance_sampling=hyper["cql_importance_sample"], calibrate=hyper["enable_calql"],
        cql_target_gap=hyper["cql_target_action_gap"] if hyper["cql_lagrange"] else None,
        max_target_backup=hyper["cql_max_target_backup"], backup_entropy=hyper["backup_entropy"],
        intrinsic_reward_scale=hyper.get("rnd_reward_scale", 0.0))
    rnd = None
    if hyper["use_rnd"]:
        rnd = ooo.RND(hyper["obs_dim"], (*hyper["rnd_hidden_dims"], hyper["rnd_hidden_dims"][-1]), hyper["rnd_lr"], CPU,
                      "max", "code")
    return agent, args, rnd


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}; each critic is a slice of the ensemble."""
    out = {"log_alpha": (agent.log_alpha, None)}
    if agent.log_alpha_prime is not None:
        out["log_alpha_prime"] = (agent.log_alpha_prime, None)
    for name in ("log_std_multiplier", "log_std_offset"):
        out[f"policy.{name}"] = (getattr(agent.actor, name), None)
    layers = range(len(agent.actor.net.weights))
    out |= stack_parameters(agent.actor.net, [f"policy.{i}" for i in layers], single=True)
    for prefix, critic in (("", agent.critic), ("target_", agent.critic_target)):
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            for member in (0, 1):
                out[f"{prefix}qf{member + 1}.{i}.weight"] = weight, lambda value, member=member: value[member].T
                out[f"{prefix}qf{member + 1}.{i}.bias"] = bias, lambda value, member=member: value[member, 0]
    return out | (rnd_parameters(rnd) if rnd else {})


def draws(data, loss, step, hyper):
    """The random numbers of one loss as draw_noise gives them; what a loss does not use is 0."""
    n = hyper["cql_n_actions"]
    shape = data["batch/actions"][step].shape
    noise = {"new": torch.zeros(1, *shape), "target": torch.zeros(1, *shape),
             **{name: torch.zeros(n, *shape) for name in ("current", "next", "random")}}
    names = {"new": "new_action_eps", "target": "target_eps", "random": "random_actions", "current": "current_eps",
             "next": "next_eps"}
    for mine, its in names.items():
        if f"noise/{loss}.{its}" in data:
            value = torch.from_numpy(data[f"noise/{loss}.{its}"][step])
            noise[mine] = value[None] if value.dim() == 2 else value.transpose(0, 1)
    return noise


INFO = {"alpha": "alpha_value", "alpha_loss": "alpha", "policy_loss": "actor", "target_q_values_mean": "next_q_mean"}


def learnt(agent):
    """Parameters of the policy (and alpha), and of the critics (and the multiplier)."""
    return [optimizer.param_groups[0]["params"] for optimizer in agent.optimizers]


def gradients(agent, policy_loss, critic_loss):
    """Gradients of the policy's and of the critics' parameters, from the sum of the losses."""
    policy, critics = learnt(agent)
    found = torch.autograd.grad(policy_loss + critic_loss, [*policy, *critics])
    return found[: len(policy)], found[len(policy):]


def step_with(args, agent, policy, critic):
    """What calql_update does with these gradients."""
    for optimizer, gradients in zip(agent.optimizers, (policy, critic), strict=True):
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    agent.update_target(args.tau)


def replay(name, results, **changes):
    """Replay golden inputs `name`; compare with the results of the file `results`."""
    data, hyper = read(name)
    agent, args, rnd = make(hyper)
    args = replace(args, **changes)
    wanted = read(results)[0]
    named = parameters(agent, rnd)
    load(data, named)
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        batch |= {"masks": 1 - batch["dones"], "lower_bounds": batch["mc_returns"]}
        bonus = 0.0
        if rnd:
            uniform = torch.from_numpy(data["noise/rnd_mask_uniform"][step])
            bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"],
                                         hyper["rnd_update_proportion"], uniform)
            close(bonus, data["rnd/intrinsic_reward"][step], INFOS, f"intrinsic reward {step}")
            close(rnd_loss, wanted["info/rnd_loss"][step], INFOS, f"rnd loss {step}")
        # The authors evaluate the model once for each loss, with other random numbers each time.
        found = {}
        for loss in hyper["loss_order"]:
            *losses, info = ooo.calql_losses(args, agent, batch, draws(data, loss, step, hyper),
                                             args.intrinsic_reward_scale * bonus, args.calibrate)
            found[loss] = gradients(agent, *losses)
        policy = [*found["policy"][0][:-1], found["log_alpha"][0][-1]]
        layers = len(learnt(agent)[1]) - ("log_alpha_prime" in found)
        critic = [torch.stack([found["qf1"][1][i][0], found["qf2"][1][i][1]]) for i in range(layers)]
        critic += [found["log_alpha_prime"][1][-1]] if "log_alpha_prime" in found else []
        for i, gradient in enumerate(("qf1_loss_gradient", "qf2_loss_gradient")):
            norm = torch.stack([g[i].square().sum() for g in critic[:layers]]).sum().sqrt()
            close(norm, wanted[f"info/{gradient}"][step], INFOS, gradient)
        step_with(args, agent, policy, critic)
        # Its reports are those of the last loss's numbers.
        report = {its: wanted[f"info/{its}"][step] for its in INFO}
        for its, mine in INFO.items():
            close(info[f"losses/{mine}"], report[its], INFOS, f"step {step} {its}")
        mean = (wanted["info/q1_pred_mean"][step] + wanted["info/q2_pred_mean"][step]) / 2
        close(info["losses/q_mean"], mean, INFOS, f"step {step} q")
        close(info["losses/entropy"], -wanted["info/log_pi_mean"][step], INFOS, f"step {step} entropy")
        if hyper["use_cql"]:
            bellman = (wanted["info/cql.qf1_bellman_loss"][step] + wanted["info/cql.qf2_bellman_loss"][step]) / 2
            close(info["losses/critic"], bellman, INFOS, f"step {step} Bellman loss")
            gap = (wanted["info/cql.cql_qf1_diff"][step] + wanted["info/cql.cql_qf2_diff"][step]) / 2
            close(info["losses/cql"], gap, INFOS, f"step {step} conservative term")
            if args.calibrate:
                rates = [wanted[f"info/cql.bound_rate_{x}"][step] for x in (
                    "cql_q1_current_actions", "cql_q1_next_actions", "cql_q2_current_actions", "ql_q2_next_actions")]
                close(info["losses/bound_rate_policy"], np.mean(rates), INFOS, f"step {step} bound rate")
        if hyper["cql_lagrange"]:
            close(info["losses/alpha_prime"], wanted["info/cql.alpha_prime_loss"][step], INFOS, "multiplier's loss")
            close(info["losses/alpha_prime_value"], wanted["info/cql.alpha_prime"][step], INFOS, "multiplier")
        optimizers = (*agent.optimizers, *(rnd.optimizers if rnd else ()))
        if f"step{step + 1}/log_alpha" in wanted:
            compared = check_step(wanted, named, optimizers, step + 1)
        if rnd:
            check_rnd_state(rnd, {key[len(f"step{step + 1}/"):]: value for key, value in wanted.items()
                                  if key.startswith(f"step{step + 1}/rnd_")})
    assert "step2/log_alpha" in wanted and step == 1
    assert compared == len(named) - (6 if rnd else 0)  # the fixed RND target is stored once


@pytest.mark.parametrize("name", ["calql", "calql_lagrange", "cql_featnorm_qbounds", "sac_no_cql", "calql_rnd"])
def test_update_equals_the_authors(name):
    replay(name, name)


def test_original_bound_equals_upstream():
    """Upstream Cal-QL, on the same inputs, leaves the uniform actions' Q unbounded."""
    replay("calql", "calql_upstream", bound_uniform_actions=False)
    with pytest.raises(AssertionError, match="loss_gradient"):
        replay("calql", "calql_upstream")


# === Monte-Carlo returns ===

RETURNS, RETURNS_HYPER = read("return_to_go")


@pytest.mark.parametrize("branch", RETURNS_HYPER["branches"])
def test_return_to_go_equals_the_authors(branch):
    """Also the rule for sparse trajectories without success, and the kitchen's for what follows the last reward."""
    flags = RETURNS_HYPER["branches"][branch]
    raw = (-1.0 if "binary" in branch else 0.0) if flags["is_sparse_reward"] else None
    negative = None if raw is None else raw * flags["reward_scale"] + flags["reward_bias"]
    for i in range(3):
        rewards, ends = (RETURNS[f"{branch}/{i}/{name}"].astype(np.float64) for name in ("rewards", "terminals"))
        for gamma in RETURNS_HYPER["gammas"]:
            got = ooo.return_to_go(rewards, ends, gamma, negative, flags["infinite_horizon"])
            np.testing.assert_allclose(got, RETURNS[f"{branch}/{i}/return_to_go_gamma{gamma}"], rtol=1e-5, atol=1e-5)


def columns(rewards, episodes, observations, terminations=None):
    """Columns of transitions between the given observations; next_observations are 1 higher."""
    observations = np.array(observations, np.float32)[:, None]
    return dict(observations=observations, actions=np.zeros_like(observations), next_observations=observations + 1,
                rewards=np.array(rewards, np.float32), episodes=np.array(episodes, np.float32),
                terminations=np.zeros(len(rewards), np.float32) if terminations is None else
                np.array(terminations, np.float32))


def torches(data):
    return {name: torch.from_numpy(value) for name, value in data.items()}


def test_returns_end_where_a_trajectory_ends():
    """At another episode, and where a transition is missing (discs, subsets)."""
    data = columns([1, 2, 4, 8, 16, 32], [0, 0, 0, 0, 1, 1], [0, 1, 5, 6, 7, 8])
    args = ooo.Args(gamma=0.5)
    np.testing.assert_allclose(ooo.monte_carlo_returns(args, torches(data)), [2, 2, 8, 8, 32, 32])
    kitchen = replace(args, infinite_horizon=True, reward_bias=1.0, reward_scale=2.0)  # (r + 1) 2
    want = [4 + 6, 6 + 6, 10 + 18, 18 + 18, 34 + 66, 66 + 66]
    np.testing.assert_allclose(ooo.monte_carlo_returns(kitchen, torches(data)), want)
    sparse = columns([-1, -1, -1, 0], [0, 0, 1, 1], [0, 1, 2, 3])
    got = ooo.monte_carlo_returns(replace(args, negative_reward=-1.0, reward_bias=0.5, reward_scale=10.0),
                                  torches(sparse))
    np.testing.assert_allclose(got, [-10, -10, -5 + 2.5, 5])


def test_a_shuffled_subset_has_trajectories_of_one_step():
    data = {name: value[[2, 0, 1]] for name, value in columns([1, 2, 4], [0, 0, 0], [0, 1, 2]).items()}
    assert ooo.monte_carlo_returns(ooo.Args(gamma=0.5), torches(data)).tolist() == [4, 2, 2]  # 0 and 1 still follow


def test_only_successful_episodes_up_to_their_last_success():
    data = columns([-1, 0, -1, 0, -1, -1, -1, 0], [0, 0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 0, 1, 0])
    report = {}
    kept = ooo.prepare_data(ooo.Args(successful_only=True, negative_reward=-1.0, gamma=0.5), data, report)
    assert kept["rewards"].tolist() == [-1, 0, -1, 0, 0] and kept["episodes"].tolist() == [0, 0, 0, 0, 2]
    assert kept["terminations"].tolist() == [0, 1, 0, 1, 1]
    assert kept["lower_bounds"].tolist() == [-1, 0, -1, 0, 0]
    assert report == {"kept_of_successful_episodes": 5, "return_to_go_range": [-1, 0]}
    with pytest.raises(SystemExit):
        ooo.prepare_data(ooo.Args(successful_only=True), columns([-1], [0], [0]), {})


@pytest.mark.parametrize("words", [[], ["--bootstrap-at-cut"]], ids=["code", "bootstrap"])
def test_the_cut_of_a_demonstration_is_terminal(tiny, words):
    """Choice 18. No end is terminal where the episode itself ended."""
    tiny(HAMMER)
    args = replace(parse("--env-id", HAMMER, *words), infinite_horizon=True)
    data, report = ooo.load_dataset(args, ooo.make_env(HAMMER), 1)
    data = ooo.prepare_data(args, data, report)
    cuts = np.flatnonzero(np.diff(data["episodes"], append=-1))
    assert len(cuts) > 1 and np.flatnonzero(data["terminations"]).tolist() == ([] if words else cuts.tolist())
    tail = data["rewards"][cuts] * (1 if not words else 1 + 0.99 / (1 - 0.99))
    np.testing.assert_allclose(data["lower_bounds"][cuts], tail, rtol=1e-5)
    longer = replace(args, truncate_episodes=1000)
    assert not ooo.load_dataset(longer, ooo.make_env(HAMMER), 1)[0]["terminations"].any()


# === the conservative term ===


def sample_q(seed=0, n=3, batch=4):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, batch, generator=g), torch.randn(2, 3 * n, batch, generator=g),
            torch.randn(3 * n, batch, generator=g), ooo.Args(cql_actions=n))


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
def test_conservative_term(sampling, calibrate, uniform):
    """Against loops over critics, states and actions."""
    q_data, q, densities, args = sample_q()
    bounds = torch.tensor([-1.0, 0.0, 0.5, 9.0])
    args = replace(args, cql_importance_sampling=sampling, bound_uniform_actions=uniform)
    gap, rate_uniform, rate_policy = ooo.conservative_term(args, q_data, q, densities, bounds, calibrate)
    for member in range(2):
        total = 0.0
        for i in range(4):
            terms = [] if sampling else [math.exp(q_data[member, i])]
            for j in range(9):
                value = q[member, j, i].item()
                if calibrate and (uniform or j >= 3):
                    value = max(value, bounds[i].item())
                terms.append(math.exp(value - (densities[j, i].item() if sampling else 0.0)))
            total += math.log(sum(terms)) - q_data[member, i].item()
        assert gap[member].item() == pytest.approx(total / 4, rel=1e-5)
    assert rate_uniform.item() == pytest.approx((q[:, :3] < bounds).float().mean().item())
    assert rate_policy.item() == pytest.approx((q[:, 3:] < bounds).float().mean().item())


def test_nothing_is_pushed_down_below_the_return():
    """MC returns above all Q: both rates are 1, and the sampled actions' Q have no gradient; the data's go up."""
    q_data, q, densities, args = sample_q()
    q_data, q = q_data.requires_grad_(), q.requires_grad_()
    gap, *rates = ooo.conservative_term(args, q_data, q, densities, torch.full((4,), 100.0))
    assert [rate.item() for rate in rates] == [1.0, 1.0]
    gap.sum().backward()
    assert not q.grad.any() and (q_data.grad < 0).all()
    q.grad = None
    original = replace(args, bound_uniform_actions=False)
    ooo.conservative_term(original, q_data, q, densities, torch.zeros(4) + 3)[0].sum().backward()
    assert (q.grad[:, :3] > 0).all() and not q.grad[:, 3:].any()  # the uniform actions are still pushed down


def agent_and_batch(batch=16, **options):
    torch.manual_seed(0)
    agent = ooo.Agent(5, 2, (8, 8), (8, 8), CPU, **options)
    data = {"observations": torch.randn(batch, 5), "actions": torch.rand(batch, 2) * 2 - 1,
            "rewards": torch.randn(batch), "masks": torch.ones(batch), "next_observations": torch.randn(batch, 5),
            "lower_bounds": torch.full((batch,), -100.0)}
    return agent, data, ooo.draw_noise(data["actions"], 10, 10)


def test_the_improved_bound_changes_the_loss():
    agent, batch, noise = agent_and_batch()
    batch["lower_bounds"] = torch.full((16,), 1.0)
    losses = [ooo.calql_losses(ooo.Args(bound_uniform_actions=uniform), agent, batch, noise)
              for uniform in (True, False)]
    assert losses[0][1] > losses[1][1] + 0.1 and losses[0][0] == losses[1][0]
    assert losses[0][2]["losses/bound_rate_uniform"] == 1


@pytest.mark.parametrize(("gap", "grows"), [(-50.0, True), (50.0, False)])
def test_lagrange_multiplier(gap, grows):
    """It grows while the conservative term is above its target, and shrinks below."""
    agent, batch, noise = agent_and_batch(lagrange=True)
    args = ooo.Args(cql_target_gap=gap)
    *losses, info = ooo.calql_losses(args, agent, batch, noise)
    assert info["losses/alpha_prime_value"].item() == pytest.approx(math.e)
    step_with(args, agent, *gradients(agent, *losses))
    assert (agent.log_alpha_prime.item() > 1) == grows


def test_one_loss_moves_one_part():
    """The policy's gradient stops at the actions of the conservative term and at the critics' weights."""
    agent, batch, noise = agent_and_batch(lagrange=True)
    losses = ooo.calql_losses(ooo.Args(cql_target_gap=0.8), agent, batch, noise)[:2]
    for loss, own, others in zip(losses, learnt(agent), learnt(agent)[::-1], strict=True):
        assert all(g is not None for g in torch.autograd.grad(loss, own, retain_graph=True))
        found = torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True)
        assert all(g is None for g in found)
    assert not any(p.requires_grad for p in agent.critic_target.parameters())


def test_update_takes_the_gradients_of_its_losses():
    """calql_update is Adam on the losses at the numbers that it draws, and the targets move after it."""
    args = ooo.Args(tau=0.5)
    agent, batch, _ = agent_and_batch()
    other = copy.deepcopy(agent)
    torch.manual_seed(5)
    ooo.calql_update(args, agent, batch, calibrate=False)
    torch.manual_seed(5)
    noise = ooo.draw_noise(batch["actions"], 10, 10)
    policy, critic = gradients(other, *ooo.calql_losses(args, other, batch, noise, calibrate=False)[:2])
    for new, old, gradient, rate in zip(
            sum(learnt(agent), []), sum(learnt(other), []), [*policy, *critic],
            [1e-4] * len(policy) + [3e-4] * len(critic), strict=True):
        torch.testing.assert_close(new, old - rate * gradient / (gradient.abs() + 1e-8), rtol=1e-5, atol=1e-7)
    for target, critic, before in zip(agent.critic_target.parameters(), agent.critic.parameters(),
                                      other.critic.parameters(), strict=True):
        torch.testing.assert_close(target, (critic + before) / 2)


def test_target():
    """Best of the next actions by the smaller critic, clipped, then discounted; the bonus comes on top of it."""
    agent, batch, noise = agent_and_batch()
    agent.q_bounds.copy_(torch.tensor([-0.001, 0.001]))
    batch["masks"][::2] = 0
    bonus = torch.rand(16)
    _, loss, info = ooo.calql_losses(ooo.Args(gamma=0.9, cql_alpha=0.0), agent, batch, noise, 3 * bonus)
    with torch.no_grad():
        mean, log_std = agent.actor(batch["next_observations"])
        actions = (mean + log_std.exp() * noise["target"]).tanh()
        q = torch.stack([agent.critic_target(batch["next_observations"], a[None])[:, 0].amin(0) for a in actions])
        best = q.amax(0).clamp(-0.001, 0.001)
        target = batch["rewards"] + 0.9 * batch["masks"] * best + 3 * bonus
        want = (agent.critic(batch["observations"], batch["actions"][None])[:, 0] - target).square().mean(1).sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert (q.amax(0).abs() > 0.001).any() and info["losses/next_q_mean"].item() == pytest.approx(best.mean().item())


def test_feature_normalisation_reaches_the_network():
    """Features are of length 1: their scale does not matter any more. Without it, it does."""
    for unit, same in ((True, True), (False, False)):
        agent, batch, _ = agent_and_batch(unit_features=unit)
        before = agent.critic(batch["observations"], batch["actions"][None])
        with torch.no_grad():
            agent.critic.weights[-2] *= 7
        after = agent.critic(batch["observations"], batch["actions"][None])
        assert torch.allclose(before, after, rtol=1e-4) == same


def test_density_of_the_squashed_gaussian():
    """It integrates to 1 over (-1, 1), for narrow and wide Gaussians."""
    actions = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    for mean, log_std in ((0.0, 0.0), (1.0, -2.0), (-0.5, 0.7)):
        noise = ((actions.atanh() - mean) / math.exp(log_std))[:, None, None]
        got, log_prob = ooo.squashed_sample(torch.full((1, 1), mean).double(), torch.full((1, 1), log_std).double(),
                                            noise)
        assert torch.allclose(got[:, 0, 0], actions)
        assert log_prob.exp().sum().item() * 1e-5 == pytest.approx(1, abs=2e-3)


def test_first_weights():
    """Last layers start small, orthogonal with gain 0.01; policy and target critics as the official code has them."""
    agent = ooo.Agent(5, 2, (8, 8), (16, 8), CPU)
    rnd = ooo.RND(5, (16, 8, 8), 1e-4, CPU)
    last = (rnd.predictor[-1].weight, rnd.target[-1].weight,
            *(w.T for net in (agent.actor.net, agent.critic) for w in net.weights[-1]))
    for weight in last:
        torch.testing.assert_close(weight @ weight.T, 1e-4 * torch.eye(len(weight)))
    for weight in (agent.actor.net.weights[1][0].T, rnd.target[2].weight, agent.critic.weights[1][0].T):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), rtol=1e-5, atol=1e-5)
    assert (agent.log_alpha.item(), agent.actor.log_std_offset.item()) == (0.0, -1.0)
    assert all(map(torch.equal, agent.critic.parameters(), agent.critic_target.parameters()))
    mean, log_std = agent.actor(torch.zeros(1, 5))
    assert not mean.any() and (log_std == -1).all()
    obs = np.ones((3, 4, 5), np.float32)  # act takes any leading axes
    np.testing.assert_array_equal(agent.act(obs)[1, 2], agent.act(obs[0, 0]))


COLUMNS = dict(observations=6, actions=3, rewards=0, next_observations=6, terminations=0, episodes=0, lower_bounds=0)


def make_buffer(rows, online=0, seed=0):
    rng = np.random.default_rng(seed)
    data = {name: rng.normal(size=(rows, dim) if dim else rows).clip(-0.9, 0.9).astype(np.float32)
            for name, dim in COLUMNS.items()}
    data["episodes"][:] = 0
    return ooo.ReplayBuffer(data, online, CPU)


def train(compiled, updates=300):
    """Losses of updates of make_update on the same rows: RND, Lagrange, bounds."""
    torch.manual_seed(0)
    args = ooo.Args(rnd_hidden_dims=(8, 8, 8), cql_target_gap=0.8, hidden_dims=(16, 16), critic_hidden_dims=(16, 16),
                    cql_actions=3, compile=compiled)
    buffer = make_buffer(1600)
    agent, rnd = ooo.make_agent(args, buffer, CPU, exploitation=True), ooo.make_rnd(args, buffer, CPU)
    agent.q_bounds.copy_(torch.tensor([-9.0, 9.0]))
    update = ooo.make_update(args, buffer, agent, rnd)
    losses = []
    for step in range(updates):
        torch.manual_seed(step)
        start = 16 * step % 1600
        losses.append({k: v.item() for k, v in update(buffer.data[start : start + 16]).items()})
    return {**agent.state_dict(), **{f"rnd.{k}": v for k, v in rnd.state_dict().items()}}, losses


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_update_equals_eager():
    """300 updates: each loss within 1e-4 of its largest eager value (seen: 2e-7), parameters within 1e-5 + 0.1 %."""
    (state, losses), (eager, eager_losses) = train("on"), train("off")
    for name, value in eager.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for name in eager_losses[0]:
        largest = max(abs(record[name]) for record in eager_losses)
        for step, (a, b) in enumerate(zip(losses, eager_losses, strict=True)):
            assert a[name] == pytest.approx(b[name], abs=1e-4 * largest), (name, step)


# === batches ===


def test_batches_have_fixed_numbers_of_offline_rows():
    buffer = make_buffer(60, 40)
    buffer.data[:, buffer.columns["rewards"]] = torch.arange(100)
    extra = torch.tensor([7, 8])

    def draw(size, ratio, k=0):
        return buffer.split(ooo.mixed_rows(buffer, size, 40, ratio, extra, k))["rewards"]

    # None: 60 of 80, or of 62. Shares are rounded down (choice 19): 0.49 of 40 is 19.6, 60 / 62 of 40 is 38.7.
    cases = ((80, 0.25, 10), (80, 0.5, 20), (80, 1.0, 40), (80, 0.0, 0), (80, None, 30), (80, 0.49, 19), (62, None, 38))
    for size, ratio, want in cases:
        for _ in range(20):
            rows = draw(size, ratio)
            assert len(rows) == 40 and (rows < 60).sum() == want and rows.max() < size
    assert (draw(60, 0.25) < 60).all()  # nothing online yet
    rows = draw(80, 0.5, 16)
    assert len(rows) == 56 and set(rows[-16:].tolist()) == {7.0, 8.0}


def test_upsampled_rows_are_online_rows_of_the_largest_reward():
    """Choice 19: never offline ones, never beyond t; without a success all online rows have the largest reward."""
    buffer = make_buffer(60, 40)
    rewards = buffer.data[:, buffer.columns["rewards"]]
    rewards[:] = 0
    rewards[5] = rewards[70] = rewards[80] = 1
    rewards[99] = 30
    args = ooo.Args(retrain_upsample=32)

    def rows(t, **settings):
        return list(map(int, ooo.high_reward_rows(replace(args, **settings), buffer, t)))

    assert rows(39) == [70, 80] and rows(40) == [99] and rows(10) == [*range(60, 70)]
    assert rows(40, upsample_reward=1.0) == [70, 80, 99] and rows(40, upsample_reward=31.0) == []
    assert rows(39, upsample_reward=25.0) == [] and rows(40, upsample_reward=25.0) == [99]  # hammer's
    assert rows(0) == rows(40, retrain_upsample=0) == []


def test_value_ceiling():
    """The largest |reward| with its bonus / (1 - gamma); none where the target has an unbounded entropy."""
    rnd = ooo.RND(5, (8, 8), 1e-4, CPU, "max", "paper")
    given = [rnd.update(torch.randn(16, 5), torch.randn(16, 5))[0].max().item() for _ in range(3)]
    raw = torch.tensor([-1.0, 0.0, 0.5])
    args = ooo.Args(reward_scale=10.0, reward_bias=0.25, retrain_reward_scale=1.0, intrinsic_reward_scale=2.0,
                    gamma=0.9)
    assert ooo.value_ceiling(args, raw, rnd) == pytest.approx((7.5 + 2 * max(given)) / 0.1)
    assert ooo.value_ceiling(args, raw) == pytest.approx(75)
    assert ooo.value_ceiling(args, raw, exploitation=True) == pytest.approx(7.5)
    assert ooo.value_ceiling(replace(args, backup_entropy=True), raw, rnd) == 0


def test_bounds_widen():
    bounds = torch.tensor([-1.0, 1.0])
    ooo.widen(bounds, torch.tensor([-0.3, 0.1]), 0.9)
    assert bounds.tolist() == pytest.approx([-3.0, 1.0])
    half = torch.tensor([-float("inf"), 1.0])
    ooo.widen(half, torch.tensor([-0.3, 0.2]), 0.9)
    assert half.tolist() == pytest.approx([-float("inf"), 2.0])


def test_reasons_to_stop():
    def reason(q, gap=0.0, share=0.2, **settings):
        losses = {"losses/q_mean": torch.tensor(q), "losses/cql": torch.tensor(gap)}
        return ooo.reason_to_stop(ooo.Args(retrain_early_stop=share, **settings), losses, 5.0, (-40.0, 60.0))

    assert reason(-14.0) is None and "fell" in reason(-16.0) and reason(-16.0, share=0.0) is None
    assert reason(5.0, 99.0) is None and "exceeds" in reason(5.0, 101.0) and reason(5.0, 101.0, share=0.0) is None
    above = ooo.reason_to_stop(ooo.Args(retrain_early_stop=0.2), {"losses/q_mean": torch.tensor(5.0), "losses/cql":
                               torch.tensor(61.0)}, 5.0, (20.0, 60.0))
    assert above.endswith("range 60 of possible Q values")  # 0 is in it


# === arguments ===


def test_task_settings():
    """Tables of the reference: networks, weight, gap, importance sampling, steps, mixing, reward, bonus, upsampling."""
    table = {
        "binary": ((512, 512), (512,) * 3, 1.0, None, True, 20_000, 1_000_000, 0.5, (10, 5), 0.5, 500_000, 0),
        "kitchen": ((512,) * 3, (512,) * 3, 5.0, None, False, 500_000, 4_000_000, 0.25, (1, -5), 10.0, 1_000_000, 0),
        "antmaze": ((256, 256), (256,) * 4, 5.0, 0.8, True, 1_000_000, 2_000_000, 0.5, (10, -5), 50.0, 1_000_000, 0),
        "maze2d": ((256, 256), (256,) * 4, 5.0, 0.8, True, 500_000, 1_000_000, 0.5, (10, -5), 10.0, 1_000_000, 32),
        "hammer": ((512, 512), (512,) * 3, 1.0, None, True, 20_000, 1_000_000, 0.5, (1, 0), 0.5, 1_000_000, 32),
    }
    for env_id in ooo.TASKS:
        args = parse("--env-id", env_id)
        (want,) = [row for name, row in table.items() if name in env_id]
        assert (args.hidden_dims, args.critic_hidden_dims, args.cql_alpha, args.cql_target_gap,
                args.cql_importance_sampling, args.offline_steps, args.online_steps, args.offline_ratio,
                (args.reward_scale, args.reward_bias * args.reward_scale), args.intrinsic_reward_scale,
                args.retrain_steps, args.retrain_upsample) == want, env_id
        assert (args.learning_rate, args.actor_learning_rate, args.tau, args.gamma, args.batch_size) == (
            3e-4, 1e-4, 0.005, 0.99, 256)
        assert args.rnd_hidden_dims == (512, 512, 512) and args.calibrate and args.bound_uniform_actions
        assert (args.rnd_normalizer, args.rnd_reward) == ("paper", "max")
        assert not args.backup_entropy and args.max_target_backup and not args.intrinsic_bound
        assert args.retrain_feature_norm and args.retrain_q_bounds and args.infinite_horizon == ("kitchen" in env_id)
    assert parse("--env-id", "kitchen-complete-v0").retrain_critic_hidden_dims == (256, 256, 256)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--retrain-at", "2000000"], "2000000"),
        (["--retrain-at", "5", "5"], "--retrain-at"),
        (["--offline-ratio", "1.5"], "--offline-ratio"),
        (["--retrain-offline-ratio", "-0.1"], "--retrain-offline-ratio"),
        (["--intrinsic-bound", "--intrinsic-reward-scale", "0"], "--intrinsic-bound"),
        (["--intrinsic-bound", "--no-calibrate"], "--intrinsic-bound"),
        (["--q-reward-bounds", "1", "0"], "--q-reward-bounds"),
        (["--q-reward-bounds", "nan", "0"], "--q-reward-bounds"),
        (["--gamma", "1"], "--gamma"),
        (["--critic-hidden-dims", "0"], "--critic-hidden-dims"),
        (["--cql-actions", "0"], "--cql-actions"),
        (["--cql-alpha", "-1"], "--cql-alpha"),
        (["--retrain-early-stop", "-1"], "--retrain-early-stop"),
        (["--intrinsic-returns-every", "0"], "--intrinsic-returns-every"),
    ],
)
def test_values_that_cannot_work(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err


# === runs ===

TINY = [*SMALL, "--critic-hidden-dims", "16", "16", "--rnd-hidden-dims", "16", "16", "16", "--cql-actions", "2",
        "--retrain-critic-hidden-dims", "12", "12", "--intrinsic-returns-every", "50"]


@pytest.fixture
def session(monkeypatch, in_tmp):
    """run(*words) -> (result, agents in the order in which they were built, arguments of make_update)."""
    agents, updates = [], []
    build, make_update = ooo.Agent.__init__, ooo.make_update

    def init(agent, *args, **options):
        build(agent, *args, **options)
        agents.append((agent, copy.deepcopy(agent.state_dict())))

    def remember(args, buffer, agent, rnd=None, exploitation=False):
        updates.append((args, buffer, agent, rnd, exploitation))
        return make_update(args, buffer, agent, rnd, exploitation)

    monkeypatch.setattr(ooo.Agent, "__init__", init)
    monkeypatch.setattr(ooo, "make_update", remember)
    for env_id, task in ooo.TASKS.items():
        monkeypatch.setitem(ooo.TASKS, env_id, task._replace(horizon=12 if task.family == "kitchen" else 30))

    def run(*words):
        agents.clear()
        updates.clear()
        return ooo.main(parse(*words)), agents, updates

    return run


def directory(env_id, name="calql_ooo"):
    return Path("runs") / f"{env_id}__{name}__1"


def metrics(run, phase=None):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if phase in (None, r["phase"])]


def stored(run):
    """Columns of the online transitions in the file of a run."""
    columns = json.loads((run / "config.json").read_text())["replay_columns"]
    rows = np.fromfile(run / "replay.bin", np.float32).reshape(-1, max(stop for _, stop in columns.values()))
    return {name: rows[:, start:stop] if name in ("observations", "actions", "next_observations") else rows[:, start]
            for name, (start, stop) in columns.items()}


@pytest.mark.parametrize("env_id", ooo.TASKS)
def test_all_phases(env_id, tiny, session):
    """Finite losses everywhere, all networks move, and each phase has its own rewards, bounds and Q functions."""
    tiny(env_id)
    times = [0, 40, 80]
    rows, agents, updates = session("--env-id", env_id, *TINY, "--offline-steps", 30, "--online-steps", 80,
                                    "--retrain-at", *times, "--retrain-steps", 25)
    run, args = directory(env_id), parse("--env-id", env_id, *TINY)
    assert [row["env_step"] for row in rows if row["exploration"] and row["exploitation"]] == times
    for record in metrics(run):
        assert all(isinstance(value, str | bool) or math.isfinite(value) for value in record.values()), record
    shared = {"critic", "actor", "alpha", "alpha_value", "entropy", "q_mean", "q_magnitude", "next_q_mean", "cql"}
    shared |= {"alpha_prime", "alpha_prime_value"} if args.cql_target_gap else set()
    explored = {"bound_rate_uniform", "bound_rate_policy", "rnd"}
    for phase, more in (("pretrain", explored), ("online", explored), ("retrain", set())):
        logged = [r for r in metrics(run, phase) if "losses/critic" in r]
        assert logged and {n for n in logged[-1] if n.startswith("losses")} == {f"losses/{n}" for n in shared | more}
    assert len(agents) == 4
    for agent, first in agents:
        state = agent.state_dict()
        assert [name for name in state if torch.equal(state[name], first[name])] in ([], ["q_bounds"])

    explore, *exploit = updates  # pretraining and online phase, retrainings
    _, buffer, explorer, rnd, exploitation = explore
    assert rnd is not None and not exploitation and not explorer.critic.unit_features
    assert [tuple(w.shape[1:]) for w in explorer.critic.weights][1:] == [(16, 16), (16, 1)]
    family = ooo.TASKS[env_id].family
    scale, bias, mask = {"hammer": (0.01, 0.0, None), "kitchen": (1.0, -4.0, 4.0), "antmaze": (10.0, -0.5, None),
                         "maze2d": (10.0, -0.5, None)}.get(family, (10.0, 0.5, None))
    raw = buffer.split(buffer.data)["rewards"]
    for t, (_, _, agent, no_rnd, exploitation) in zip(times, exploit, strict=True):
        assert exploitation and no_rnd is None and agent.critic.unit_features
        assert [tuple(w.shape[1:]) for w in agent.critic.weights][1:] == [(12, 12), (12, 1)]
        scaled = (raw[: buffer.offline_size + t] + bias) * scale / (1 - 0.99)
        assert agent.q_bounds.tolist() == pytest.approx([scaled.min().item(), scaled.max().item()], rel=1e-4)
    want = {"reward_scale": scale, "reward_bias": bias, "mask_reward": mask}
    assert {name: ooo.phase_setting(args, name, True) for name in want} == want
    assert ooo.phase_setting(args, "mask_reward", False) is None

    # A saved policy is the agent's, and knows its run.
    run_id = json.loads((run / "config.json").read_text())["run_id"]
    policies = [*run.glob("exploration_*.pt"), *run.glob("exploitation_*.pt"), run / "pretrained.pt"]
    assert len(policies) == 7
    assert all(torch.load(path, weights_only=True)["run_id"] == run_id for path in policies)
    agent = ooo.load_policy(run / f"exploitation_{times[-1]}.pt")
    obs = np.ones(buffer.obs_dim, np.float32)
    np.testing.assert_array_equal(agent.act(obs), exploit[-1][2].act(obs))
    assert all(torch.equal(value, exploit[-1][2].state_dict()[name]) for name, value in agent.state_dict().items())
    # Every online step was stored, with the return that its trajectory had.
    online = stored(run)
    assert len(online["rewards"]) == 80
    returns = ooo.monte_carlo_returns(args, torches(online))
    np.testing.assert_allclose(online["lower_bounds"], returns, rtol=1e-5)
    if family == "pen":
        assert returns[0] == pytest.approx(-500) if not (online["rewards"][:30] == 0).any() else True
    if args.q_reward_bounds:  # widened to what was observed, or as given
        scaled = (online["rewards"] + args.reward_bias) * args.reward_scale
        low, high = args.q_reward_bounds
        want = [min(low, scaled.min()) / (1 - 0.99), max(high, scaled.max()) / (1 - 0.99)]
        assert agents[0][0].q_bounds.tolist() == pytest.approx(want, rel=1e-4)


def test_as_many_updates_as_steps(tiny, session, monkeypatch):
    """A trajectory is collected with a policy that stands still; offline rows have their share of each batch."""
    tiny(PEN)
    sizes, offline_rows = [], []
    mixed = ooo.mixed_rows

    def watch(buffer, size, *rest):
        rows = mixed(buffer, size, *rest)
        sizes.append(size - buffer.offline_size)
        offline_rows.append(int((buffer.split(rows)["episodes"] < buffer.offline_episodes).sum()))
        return rows

    monkeypatch.setattr(ooo, "mixed_rows", watch)
    session("--env-id", PEN, *TINY, "--online-steps", 75, "--retrain-at", "--offline-ratio", 0.25)
    assert sizes == [30] * 30 + [60] * 30 + [75] * 15 and set(offline_rows) == {4}
    assert metrics(directory(PEN), "online")[-1]["grad_step"] == 30 + 75


def test_success_ends_an_episode(tiny, session, monkeypatch):
    """In training, not in evaluation; the return of the last step is its reward."""
    tiny(PEN)
    step = ooo.TaskEnv.step

    def lucky(env, action):
        obs, reward, terminated, truncated, info = step(env, action)
        env.count = 1 if truncated else getattr(env, "count", 0) + 1
        if env.count % 7 == 0:
            reward, info = 0.0, {"success": True}
        return obs, reward, terminated, truncated, info

    monkeypatch.setattr(ooo.TaskEnv, "step", lucky)
    session("--env-id", PEN, *TINY, "--online-steps", 21, "--retrain-at", "--offline-steps", 1)
    episodes = [r for r in metrics(directory(PEN), "online") if "charts/episodic_length" in r]
    assert [r["charts/episodic_length"] for r in episodes] == [7, 7, 7]
    online = stored(directory(PEN))
    assert np.flatnonzero(online["terminations"]).tolist() == [6, 13, 20]
    np.testing.assert_allclose(online["lower_bounds"][4:7], [-5 + 0.99 * (-5 + 0.99 * 5), -5 + 0.99 * 5, 5], rtol=1e-6)
    lengths = [e["length"] for line in (directory(PEN) / "evals.jsonl").read_text().splitlines()
               for e in json.loads(line)["episodes"]]
    assert set(lengths) == {30}


def test_intrinsic_returns(tiny, session, monkeypatch):
    """Computed anew at the stated steps, for all transitions, with the RND as it stands; in the bound if asked for."""
    tiny(PEN)
    renewed, seen = [], []
    renew, update = ooo.renew_bounds, ooo.calql_update

    def returns(args, batch):
        return torch.from_numpy(ooo.monte_carlo_returns(args, batch)).float()

    def watch(run, buffer, rnd, bound_rnd, phase):
        renew(run, buffer, rnd, bound_rnd, phase)
        batch = buffer.first(buffer.size)
        rewards = rnd.intrinsic_rewards(batch["next_observations"])
        added = batch["lower_bounds"] - returns(run.args, batch)
        # The end of a trajectory: its own reward; the one before adds the discounted last.
        assert added[-1].item() == pytest.approx(2 * rewards[-1].item(), rel=1e-3, abs=1e-3)
        both = 2 * (rewards[-2] + 0.99 * rewards[-1]).item()
        assert added[-2].item() == pytest.approx(both, rel=1e-3, abs=1e-3)
        assert all(map(torch.equal, rnd.state_dict().values(), bound_rnd.state_dict().values()))
        renewed.append((run.progress["grad_step"], buffer.size - buffer.offline_size))

    def spy(args, agent, batch, bonus, calibrate):
        seen.append(batch["lower_bounds"].clone())
        return update(args, agent, batch, bonus, calibrate)

    monkeypatch.setattr(ooo, "renew_bounds", watch)
    monkeypatch.setattr(ooo, "calql_update", spy)
    words = ["--env-id", PEN, *TINY, "--offline-steps", 60, "--online-steps", 60, "--retrain-at",
             "--intrinsic-reward-scale", 2]
    session(*words)
    plain = seen.copy()
    assert not renewed and not any("rnd/intrinsic_return_mean" in r for r in metrics(directory(PEN)))
    seen.clear()
    session(*words, "--intrinsic-bound", "--exp-name", "in_bound")
    assert renewed == [(0, 0), (50, 0), (100, 60)]  # gradient step 100 belongs to the second trajectory
    logged = [r for r in metrics(directory(PEN, "in_bound")) if "rnd/intrinsic_return_mean" in r]
    assert [r["grad_step"] for r in logged] == [0, 50, 100] and all(r["rnd/intrinsic_return_mean"] > 0 for r in logged)
    for with_bonus, without in zip(seen[50:60], plain[50:60], strict=True):  # of pretraining: the same rows
        assert (with_bonus > without).all()
    # What is stored are the returns of the task reward, from which --resume computes the rest.
    online = torches(stored(directory(PEN, "in_bound")))
    torch.testing.assert_close(online["lower_bounds"], returns(parse(*words), online))


def test_divergence_is_said(tiny, session, monkeypatch, capsys):
    """Once for each policy, with the ceiling of its own rewards: pen's are 10 (r + 0.5), here 2 r in the retraining."""
    tiny(PEN)
    update = ooo.calql_update
    monkeypatch.setattr(ooo, "calql_update", lambda *args: update(*args) | {"losses/q_magnitude": torch.tensor(1e4)})
    session("--env-id", PEN, *TINY, "--online-steps", 40, "--retrain-at", 40, "--retrain-steps", 40, "--gamma", 0.9,
            "--retrain-reward-scale", 2, "--retrain-reward-bias", 0)
    diverged = json.loads((directory(PEN) / "results.json").read_text())["diverged"]
    assert diverged["exploitation 40"] == {"phase": "retrain", "env_step": 40, "grad_step": 20, "magnitude": 1e4,
                                           "ceiling": pytest.approx(2 / 0.1, rel=1e-4)}
    assert diverged["exploration"]["grad_step"] == 20 and diverged["exploration"]["ceiling"] > 5 / 0.1  # and the bonus
    assert [r["diverged"] for r in metrics(directory(PEN)) if "diverged" in r] == ["exploration", "exploitation 40"]
    assert capsys.readouterr().err.count("diverges") == 2


def test_without_intrinsic_reward_there_is_no_rnd(tiny, session):
    tiny(PEN)
    _, _, updates = session("--env-id", PEN, *TINY, "--intrinsic-reward-scale", 0, "--online-steps", 30,
                            "--retrain-at", 30, "--retrain-steps", 3)
    assert updates[0][3] is None
    assert not any("rnd" in name for record in metrics(directory(PEN)) for name in record)


def test_upsampling_comes_on_top(tiny, session, monkeypatch):
    """Of the online rows; so there is none at t = 0, nor without a reward that high."""
    tiny(MAZE)
    drawn = []
    mixed = ooo.mixed_rows

    def watch(buffer, *args):
        rows = mixed(buffer, *args)
        drawn.append((len(rows), bool((buffer.split(rows[16:])["episodes"] >= buffer.offline_episodes).all())))
        return rows

    monkeypatch.setattr(ooo, "mixed_rows", watch)
    words = ["--env-id", MAZE, *TINY, "--offline-steps", 1, "--online-steps", 5, "--retrain-at", 0, 5,
             "--retrain-steps", 4]
    session(*words)
    session(*words, "--upsample-reward", 2, "--exp-name", "none")
    assert drawn == [(16, True)] * 9 + [(48, True)] * 4 + [(16, True)] * 13


def test_early_stop(tiny, session, monkeypatch, capsys):
    """It says why in the metrics and on the terminal, after an evaluation, and the run goes on."""
    tiny(PEN)
    words = ["--env-id", PEN, *TINY, "--offline-steps", 2, "--online-steps", 40, "--retrain-at", 20, 40,
             "--retrain-steps", 30, "--eval-every", 5, "--retrain-early-stop", 1e-9]
    peaks = []

    def reason(args, losses, peak, bounds):
        assert bounds == pytest.approx([-500, 500])
        peaks.append((losses["losses/q_mean"].item(), peak))
        return "enough" if len(peaks) % 3 == 0 else None

    monkeypatch.setattr(ooo, "reason_to_stop", reason)
    rows, *_ = session(*words)
    assert [peak for _, peak in peaks] == [max(q for q, _ in part[: i + 1]) for part in (peaks[:3], peaks[3:])
                                           for i in range(3)]
    for t in (20, 40):
        records = [r for r in metrics(directory(PEN), "retrain") if r["env_step"] == t]
        assert records[-1]["early_stop"] == "enough" and records[-1]["grad_step"] == 15
        assert "eval/return" in records[-2] and records[-2]["grad_step"] == 15
    assert rows[1]["exploitation"] and "enough" in capsys.readouterr().out


def test_exploit_only_and_eval_only(tiny, session):
    """The same settings repeat the retraining exactly; others change it."""
    tiny(PEN)
    session("--env-id", PEN, *TINY, "--online-steps", 60, "--retrain-at", 20, 60)
    source = directory(PEN)
    again, *_ = session("--exploit-only", source, "--exp-name", "again")
    assert metrics(directory(PEN, "again")) == metrics(source, "retrain")
    assert again == json.loads((source / "results.json").read_text())["rows"]
    first = torch.load(source / "exploitation_60.pt", weights_only=True)["agent"]
    for words, name in ((["--no-retrain-feature-norm"], "critic.weights.0"), (["--no-retrain-q-bounds"], "q_bounds"),
                        (["--retrain-offline-ratio", 1], "critic.weights.0")):
        session("--exploit-only", source, "--exp-name", words[0][5:], "--retrain-at", 60, *words)
        other = torch.load(directory(PEN, words[0][5:]) / "exploitation_60.pt", weights_only=True)["agent"]
        assert not torch.equal(first[name], other[name]), words
    summary = ooo.main(parse("--eval-only", source, "--episodes", 2))
    assert summary["eval/episodes"] == 2 and (source / "exploitation_60_eval.json").exists()


# === a process of its own: resume and errors ===

RUN = ["--env-id", PEN, *TINY, *"""--offline-steps 15 --online-steps 110 --retrain-at 70 110 --retrain-steps 12
--log-every 7 --checkpoint-every 5 --intrinsic-returns-every 8 --intrinsic-bound --q-reward-bounds -1 0.5 --eval-every 6
--cql-target-gap 0.8 --retrain-early-stop 9""".split()]
MOMENTS = {
    "pretraining": ("os.rename", "/checkpoint.pt", 4),
    "online, after a checkpoint": ("os.rename", "/checkpoint.pt", 6),
    "online, between the data and their checkpoint": ("os.rename", "/exploration_110.pt", 1),
    "retraining, after a checkpoint": ("os.rename", "/checkpoint.pt", 8),
    "retraining, between the policy and its checkpoint": ("os.rename", "/exploitation_70.pt", 1),
}


@pytest.fixture(scope="module")
def calql_box(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("calql"), script="calql_ooo.py")
    yield box
    box.stop()


def outcome(box, name):
    """What two runs must have in common: everything but their names and ids."""
    run = box.work / directory(PEN, name)
    found = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl", "replay.bin")}
    results = json.loads((run / "results.json").read_text())
    found["results.json"] = {key: value for key, value in results.items() if key not in ("run_id", "exp_name")}
    for path in run.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        found[path.name] = digest({key: content[key] for key in ("agent", "progress", "models") if key in content})
    return found


@pytest.fixture(scope="module")
def whole(tiny, calql_box):
    """Outcome of a run that nothing interrupted."""
    tiny(PEN)
    child = calql_box.run(*RUN)
    assert child.code == 0, child.err
    return outcome(calql_box, "calql_ooo")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(whole, calql_box, moment):
    """SIGKILL just before a file operation; with --resume the run ends with the bytes of one that was not killed."""
    name = f"killed_{list(MOMENTS).index(moment)}"
    child = calql_box.run(*RUN, "--exp-name", name, signal_at=(signal.SIGKILL, *MOMENTS[moment]))
    assert child.code == -signal.SIGKILL
    child = calql_box.run(*RUN, "--exp-name", name, "--resume")
    assert child.code == 0, child.err
    found = outcome(calql_box, name)
    assert found.keys() == whole.keys()
    assert not [name for name in found if found[name] != whole[name]]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--env-id", "pen-binary"], "pen-binary-v0"),
        (["--env-id", PEN, "--device", "cuda:97"], "cuda:97"),
        (["--env-id", PEN, "--offline-ratio", 2], "--offline-ratio"),
        (["--env-id", PEN, "--dataset-path", "no.npz"], "no.npz"),
        (["--env-id", PEN, "--dataset-id", "mine/large-v0"], "mine/large-v0"),
        (["--exploit-only", "nowhere"], "nowhere"),
        (["--eval-only", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(tiny, tmp_path, words, named):
    """One line on stderr, exit status 2, nothing written."""
    tiny(PEN)
    box = Box(tmp_path, script="calql_ooo.py")
    child = box.run(*words)
    assert child.code == 2 and child.err.startswith("error: ") and child.err.count("\n") == 1, child.err
    assert named in child.err and box.files() == []


def test_a_damaged_loss_stops_the_run(tiny, session, monkeypatch, capsys):
    tiny(PEN)
    monkeypatch.setattr(ooo, "calql_update", lambda *args: {"losses/critic": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as stop:
        session("--env-id", PEN, *TINY, "--online-steps", 1, "--retrain-at")
    assert stop.value.code == 1 and "error: losses/critic is nan at pretrain step 20" in capsys.readouterr().err


def test_same_settings_in_the_config(tiny, session):
    tiny(PEN)
    session("--env-id", PEN, *TINY, "--online-steps", 1, "--retrain-at", "--offline-steps", 1)
    config = json.loads((directory(PEN) / "config.json").read_text())
    assert config["script"] == "calql_ooo" and config["args"].keys() == asdict(ooo.Args()).keys()
    assert config["dataset"]["kept_of_successful_episodes"] > 0
