"""Formulas of the updates against independent ones: plain numpy, written in another way than the script's.

tests/test_golden.py compares whole updates with the authors' code; here each piece is derived from its definition.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import iql_ooo as ooo

OBS, ACT, HIDDEN, BATCH = 5, 3, (16, 12), 40
CPU = torch.device("cpu")
IQL = dict(gamma=0.99, tau=0.005, expectile=0.7, temperature=3.0)
TD3 = dict(gamma=0.99, tau=0.005)


def array(tensor):
    return tensor.detach().double().numpy()


def close(got, want, tolerance=1e-5):
    got = array(got) if isinstance(got, torch.Tensor) else got
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def make_agent(seed=0, learning_rate=1e-2, **actor_options):
    torch.manual_seed(seed)
    agent = ooo.Agent(OBS, ACT, HIDDEN, learning_rate, CPU, **actor_options)
    with torch.no_grad():  # the target must differ from the critic, and log_std from 0
        for parameter in agent.critic_target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.actor.log_std.copy_(torch.tensor([-0.5, 0.2, -1.0]))
        agent.value.biases[-1].sub_(2.0)  # advantages of both signs
    return agent


def make_batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"observations": draw(BATCH, OBS), "actions": draw(BATCH, ACT).clamp(-1, 1), "rewards": draw(BATCH),
            "masks": (torch.rand(BATCH, generator=generator) > 0.3).float(), "next_observations": draw(BATCH, OBS)}


def forward(weights, biases, x):
    """A ReLU network in numpy; weights (in, out)."""
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        x = x * (x > 0) if number + 1 < len(weights) else x
    return x


def linears(network):
    """Weights (in, out) and biases of a Stack of one network, or of a network of nn.Linear."""
    if isinstance(network, nn.Sequential):
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        return [array(layer.weight).T for layer in layers], [array(layer.bias) for layer in layers]
    assert len(network.weights[0]) == 1
    return member(network, 0)


def member(stack, number):
    return [array(w[number]) for w in stack.weights], [array(b[number, 0]) for b in stack.biases]


def q_values(critic, observations, actions):
    """(num_qs, batch), one network at a time."""
    x = np.concatenate([array(observations), array(actions)], axis=1)
    return np.stack([forward(*member(critic, i), x)[:, 0] for i in range(len(critic.weights[0]))])


def log_density(x, mean, log_std):
    """Log density of independent Gaussians, from exp(-(x - m)^2 / 2 s^2) / (s sqrt(2 pi))."""
    total = np.zeros(len(x))
    for i in range(x.shape[1]):
        std = math.exp(log_std[i])
        total += np.log(np.exp(-((x[:, i] - mean[:, i]) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi)))
    return total


def gradients(network):
    """After one step of Adam from nothing: 10 times its first moment."""
    return lambda optimizer: [array(optimizer.state[p]["exp_avg"]) * 10 for p in network.parameters()]


# === losses ===


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_expectile_loss(expectile):
    diff = np.random.default_rng(0).normal(size=1000)
    want = sum((expectile if u > 0 else 1 - expectile) * u * u for u in diff) / len(diff)
    assert ooo.expectile_loss(torch.from_numpy(diff), expectile).item() == pytest.approx(want)


def test_expectile_loss_is_smallest_at_the_expectile():
    """The tau-expectile m of a sample solves tau E[(x - m)+] = (1 - tau) E[(m - x)+]."""
    x, expectile = np.random.default_rng(0).exponential(size=500), 0.8
    low, high = x.min(), x.max()
    for _ in range(100):
        middle = (low + high) / 2
        above, below = np.maximum(x - middle, 0).mean(), np.maximum(middle - x, 0).mean()
        low, high = (middle, high) if expectile * above > (1 - expectile) * below else (low, middle)
    v = torch.tensor(middle, requires_grad=True)
    ooo.expectile_loss(torch.from_numpy(x) - v, expectile).backward()
    assert abs(v.grad.item()) < 1e-10


@pytest.mark.parametrize("log_std_min", [-5.0, -2.0])
def test_log_prob(log_std_min):
    torch.manual_seed(0)
    actor = ooo.Actor(OBS, 4, HIDDEN, log_std_min=log_std_min)
    raw = [-7.0, -3.0, 0.3, 6.0]
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor(raw))
        actor.net.weights[-1].mul_(3)
    observations = torch.randn(BATCH, OBS)
    mean = np.tanh(forward(*linears(actor.net), array(observations)))
    log_std = np.clip(raw, log_std_min, 2.0)
    actions = np.clip(mean + np.exp(log_std) * np.random.default_rng(0).normal(size=mean.shape), -1, 1)
    got = actor.log_prob(observations, torch.from_numpy(actions).float())
    np.testing.assert_allclose(array(got), log_density(actions, mean, log_std), rtol=2e-4, atol=2e-3)
    got.sum().backward()
    outside = (np.array(raw) < log_std_min) | (np.array(raw) > 2.0)
    assert ((actor.log_std.grad == 0).numpy() == outside).all()  # beyond the clip there is no gradient


@pytest.mark.parametrize("bounds", [{}, dict(q_min=-0.4, q_max=0.5)], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
def test_iql_update(bounds, bonus):
    """All three losses, the target, and which network which loss moves."""
    agent, batch = make_agent(), make_batch()
    intrinsic = 3.0 * torch.rand(BATCH) if bonus else torch.zeros(BATCH)
    before = copy.deepcopy(agent)
    losses = ooo.iql_update(agent, batch, intrinsic, gamma=0.9, tau=0.01, expectile=0.8, temperature=4.0, **bounds)
    b = {name: array(value) for name, value in batch.items()}
    low, high = bounds.get("q_min", -np.inf), bounds.get("q_max", np.inf)

    # V: regression of the old V on the old target critics; each clipped, then the smaller of the two.
    q_target = q_values(before.critic_target, batch["observations"], batch["actions"])
    q_bounded = np.minimum(*np.minimum(np.maximum(q_target, low), high))
    u = q_bounded - forward(*linears(before.value), b["observations"])[:, 0]
    close(losses["losses/value"], np.mean(np.where(u < 0, 0.2, 0.8) * u**2))

    # Q: target from the new V, clipped, and only then the bonus.
    next_v = forward(*linears(agent.value), b["next_observations"])[:, 0]
    target = np.clip(b["rewards"] + 0.9 * b["masks"] * next_v, low, high)
    if bounds:
        assert (target == low).any() and (target == high).any()
    target = target + array(intrinsic)
    q = q_values(before.critic, batch["observations"], batch["actions"])
    close(losses["losses/critic"], np.mean((q - target) ** 2))
    close(losses["losses/q_mean"], q.mean())

    # Policy: weights exp(temperature A), at most 100; A from the old target critics without bounds and the new V.
    v = forward(*linears(agent.value), b["observations"])[:, 0]
    advantage = np.minimum(*q_target) - v
    weight = np.array([min(math.exp(4.0 * a), 100.0) for a in advantage])
    assert (weight == 100.0).any() and (weight < 100.0).any()
    mean = np.tanh(forward(*linears(before.actor.net), b["observations"]))
    density = log_density(b["actions"], mean, array(before.actor.log_std))
    close(losses["losses/actor"], -np.mean(weight * density), 1e-4)
    close(losses["losses/advantage_mean"], advantage.mean())
    close(losses["losses/v_mean"], v.mean())
    assert (v < 0).any() and (q < 0).any() and (q > 0).any()  # so that a magnitude is not the mean
    close(losses["losses/v_magnitude"], np.abs(v).mean())
    close(losses["losses/q_magnitude"], np.abs(q).mean())

    # Each network was moved by its own loss alone.
    def expected(network, loss):
        return [array(g) for g in torch.autograd.grad(loss, list(network.parameters()))]

    as_float = lambda x: torch.from_numpy(x).float()  # noqa: E731
    diff = as_float(q_bounded) - before.value(batch["observations"])[0, :, 0]
    value_loss = ((0.8 - 0.6 * (diff < 0).float()) * diff * diff).mean()
    critic_loss = ((before.critic(batch["observations"], batch["actions"]) - as_float(target)) ** 2).mean()
    actor_loss = -(as_float(weight) * before.actor.log_prob(batch["observations"], batch["actions"])).mean()
    for network, old, loss, optimizer in [
        (agent.value, before.value, value_loss, agent.value_optimizer),
        (agent.critic, before.critic, critic_loss, agent.critic_optimizer),
        (agent.actor, before.actor, actor_loss, agent.actor_optimizer),
    ]:
        for got, want in zip(gradients(network)(optimizer), expected(old, loss), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_target_network_only_follows():
    agent, batch = make_agent(), make_batch()
    assert not any(p.requires_grad for p in agent.critic_target.parameters())
    optimised = [id(p) for o in agent.optimizers for group in o.param_groups for p in group["params"]]
    assert len(optimised) == len(set(optimised))  # in one optimiser only
    assert set(optimised) == {id(p) for p in agent.parameters()} - {id(p) for p in agent.critic_target.parameters()}
    for _ in range(3):
        old = [array(p).copy() for p in agent.critic_target.parameters()]
        ooo.iql_update(agent, batch, **IQL | dict(tau=0.2))
        for was, now, source in zip(old, agent.critic_target.parameters(), agent.critic.parameters(), strict=True):
            close(now, 0.8 * was + 0.2 * array(source), 1e-6)
            assert now.grad is None


def test_minimize_is_a_step_of_torch():
    """Against torch.optim.Adam's own step, in which gradients are neither kept nor shared between calls."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    other = copy.deepcopy(layer)
    mine, theirs = ooo.Adam(layer.parameters(), 0.1), torch.optim.Adam(other.parameters(), 0.1)
    for _ in range(4):
        x = torch.randn(5, 3)
        mine.minimize(layer(x).square().mean())
        theirs.zero_grad()
        other(x).square().mean().backward()
        theirs.step()
    assert all(p.grad is None for p in layer.parameters())
    for one, two in zip(layer.parameters(), other.parameters(), strict=True):
        close(one, array(two), 1e-6)
    for one, two in zip(mine.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        for name, value in two.items():
            torch.testing.assert_close(one[name], value)


def test_dropout_is_active_in_the_actor_loss_only():
    agent, batch = make_agent(), make_batch()
    results = []
    for seed, rate in ((1, 0.5), (2, 0.5), (1, 0.0), (2, 0.0)):
        one = copy.deepcopy(agent)
        torch.manual_seed(seed)
        results.append((ooo.iql_update(one, batch, **IQL, dropout=rate), one))
    (first, one), (second, two), (third, three), (fourth, _) = results
    assert {name for name in first if first[name] != second[name]} == {"losses/actor"}
    assert third == fourth  # without dropout nothing is drawn
    for name in ("critic", "critic_target", "value"):
        same = zip(getattr(one, name).parameters(), getattr(three, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(one.actor.net.weights[0], two.actor.net.weights[0])
    obs = np.ones(OBS, np.float32)
    assert (agent.act(obs) == agent.act(obs)).all()  # the policy itself has none


@pytest.mark.parametrize("exploitation", [False, True])
def test_rewards_and_masks_of_a_batch(monkeypatch, exploitation):
    """Shift, then scale; masks are 0 at terminations, and at the raw reward that says so. What is stored stays raw."""
    rewards, terminations = [0.0, 4.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0]
    data = {"observations": np.zeros((4, OBS)), "actions": np.zeros((4, ACT)), "rewards": np.float32(rewards),
            "next_observations": np.zeros((4, OBS)), "terminations": np.float32(terminations), "episodes": np.zeros(4)}
    buffer = ooo.ReplayBuffer(data, 0, CPU)

    def batch(**settings):
        args, seen = ooo.Args(compile="off", **settings), []
        monkeypatch.setattr(ooo, "iql_update", lambda agent, batch, bonus, **options: seen.append(batch) or {})
        ooo.make_update(args, buffer, make_agent(), None, exploitation=exploitation)(buffer.data)
        return seen[0]["rewards"].tolist(), seen[0]["masks"].tolist()

    kitchen = dict(reward_bias=-4.0, reward_scale=2.0, mask_reward=4.0)
    assert batch(**kitchen) == ([-8.0, 0.0, -2.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    assert batch() == (rewards, [1.0, 1.0, 0.0, 0.0])
    own = batch(**kitchen, retrain_reward_scale=0.5)
    assert own[0] == ([-2.0, 0.0, -0.5, 0.0] if exploitation else [-8.0, 0.0, -2.0, 0.0])
    assert buffer.first(4)["rewards"].tolist() == rewards


# === networks ===


def test_a_stack_is_separate_networks():
    torch.manual_seed(0)
    stack, x = ooo.Stack(3, (OBS, *HIDDEN, 2)), torch.randn(BATCH, OBS)
    got = stack(x)
    assert got.shape == (3, BATCH, 2)
    for number in range(3):
        close(got[number], forward(*member(stack, number), array(x)))
    got[1].sum().backward()  # one member's loss touches that member alone
    for parameter in stack.parameters():
        moved = parameter.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, False]


def test_shapes_of_value_and_critic():
    value, critic = ooo.Stack(1, (OBS, *HIDDEN, 1)), ooo.Critic(OBS, ACT, HIDDEN)
    observations, actions = torch.randn(BATCH, OBS), torch.randn(BATCH, ACT)
    assert value(observations).shape == (1, BATCH, 1) and critic(observations, actions).shape == (2, BATCH)
    close(value(observations)[0], forward(*linears(value), array(observations)))
    close(critic(observations, actions), q_values(critic, observations, actions))


@pytest.mark.parametrize("width", [1, 2])
def test_affine_is_the_same_in_a_compiled_update(monkeypatch, width):
    """Where the compiler is at work the product is written in other ways."""
    x, weight, bias = torch.randn(2, 7, 5), torch.randn(2, 5, width), torch.randn(2, 1, width)
    want = np.einsum("nbi,nio->nbo", array(x), array(weight)) + array(bias)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        close(ooo.affine(x, weight, bias), want)


def test_initialisation_is_orthogonal():
    torch.manual_seed(0)
    critic = ooo.Critic(OBS, ACT, HIDDEN)
    matrices = [w for weights in critic.weights for w in weights]
    matrices += [layer.weight for layer in ooo.RND.network((OBS, *HIDDEN)) if isinstance(layer, nn.Linear)]
    for matrix in map(array, matrices):
        small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        np.testing.assert_allclose(small @ small.T, 2 * np.eye(len(small)), atol=1e-5)
    assert all((b == 0).all() for b in critic.biases)
    assert not np.allclose(array(critic.weights[0][0]), array(critic.weights[0][1]))


@pytest.mark.parametrize("squash", [False, True], ids=["iql", "td3"])
def test_actions(squash):
    torch.manual_seed(0)
    actor = ooo.Actor(OBS, ACT, HIDDEN, squash=squash)
    with torch.no_grad():
        actor.log_std.fill_(0.5)
    observations, noise = torch.randn(BATCH, OBS), torch.randn(BATCH, ACT)
    net = forward(*linears(actor.net), array(observations))
    close(actor.act(observations), np.tanh(net))
    spread = math.exp(0.5) * array(noise)
    want = np.tanh(net + spread) if squash else np.minimum(np.maximum(np.tanh(net) + spread, -1), 1)
    got = actor.act(observations, noise)
    close(got, want)
    assert got.abs().max() <= 1 and (squash or (got.abs() == 1).any())


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    """Of hidden units, after the ReLU; the kept ones are scaled so that the mean stays."""
    torch.manual_seed(0)
    network, x = ooo.Stack(1, (3, 400, 400)), torch.randn(1000, 3)
    with torch.no_grad():
        network.biases[0].fill_(10.0)  # no unit is off by its ReLU
        network.weights[1].copy_(torch.eye(400))  # the output is what dropout left of the hidden layer
    hidden, y = x @ network.weights[0] + network.biases[0], network(x, dropout=rate)
    kept = y != 0
    deviation = math.sqrt(rate * (1 - rate) / y.numel())
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * deviation
    assert torch.allclose(y[kept], hidden[kept] / (1 - rate), rtol=1e-4)
    again = network(x, dropout=rate) != 0
    both = ((kept.float() - (1 - rate)) * (again.float() - (1 - rate))).mean().item()
    assert abs(both) < 5 * rate * (1 - rate) / math.sqrt(y.numel())  # two calls are independent


def test_dropout_rate_zero_changes_nothing():
    network, x = ooo.Stack(1, (OBS, *HIDDEN, 1)), torch.randn(7, OBS)
    close(network(x, dropout=0.0)[0], forward(*linears(network), array(x)))


# === random network distillation ===


def make_rnd(learning_rate=1e-2, seed=0, **options):
    torch.manual_seed(seed)
    return ooo.RND(OBS, (16, 8), learning_rate, CPU, **options)


def test_running_statistics():
    """After any batches: mean and variance of all samples and of 1e-4 samples of mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    statistics = ooo.RunningMeanStd(3)
    mean, var, count = statistics.mean, statistics.var, statistics.count
    seen = np.zeros((0, 3))
    for size in (1, 7, 256, 30):
        x = rng.normal([0, 3, -5], [1, 0.2, 30], (size, 3))
        statistics.update(torch.from_numpy(x))
        seen = np.concatenate([seen, x])
        weight = len(seen) + 1e-4
        exact = seen.sum(0) / weight
        np.testing.assert_allclose(count, [weight])
        np.testing.assert_allclose(mean, exact, rtol=1e-12)
        second = ((seen - exact) ** 2).sum(0) + 1e-4 * (1 + exact**2)
        np.testing.assert_allclose(var, second / weight, rtol=1e-9)
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, seen.var(0), rtol=1e-3)
    assert mean.dtype == var.dtype == count.dtype == torch.float64


@pytest.mark.parametrize("form", ["max", "l2"])
@pytest.mark.parametrize("normalizer", ["code", "paper"])
def test_rnd_normalisation_on_a_known_sequence(form, normalizer):
    """The predictor stands still (rate 0). Statistics used for a batch are those of the batches before it; paper: the
    rewards' are those of the raw errors, with the batch itself."""
    rnd, rng = make_rnd(learning_rate=0.0, reward=form, normalizer=normalizer), np.random.default_rng(1)
    seen, rewards, mean, var = np.zeros((0, OBS)), np.zeros(0), np.zeros(OBS), np.ones(OBS)
    reward_var = 1.0
    for _ in range(4):
        observations, following = rng.normal(3, 2, (2, 32, OBS)).astype(np.float32)
        following[0, 0] = 1e4  # clipped
        z = np.minimum(np.maximum((following - mean) / np.sqrt(var), -5), 5)
        error = (forward(*linears(rnd.predictor), z) - forward(*linears(rnd.target), z)) ** 2
        raw = error.max(1) if form == "max" else error.sum(1)
        close(rnd.intrinsic_rewards(torch.from_numpy(following)), raw / math.sqrt(reward_var), 1e-4)
        got, loss = rnd.update(torch.from_numpy(observations), torch.from_numpy(following), 0.25, torch.zeros(32))
        close(loss, error.mean(), 1e-4)
        if normalizer == "paper":
            rewards = np.concatenate([rewards, raw])
            close(got, raw / rewards.std(), 1e-4)
        else:  # fed with what it has divided already
            close(got, raw / math.sqrt(reward_var), 1e-4)
            rewards = np.concatenate([rewards, array(got)])
        seen = np.concatenate([seen, observations])
        mean, var = array(rnd.obs_statistics.mean), array(rnd.obs_statistics.var)
        np.testing.assert_allclose(mean, seen.mean(0), atol=1e-3)  # of s, not of s'
        np.testing.assert_allclose(var, seen.var(0), rtol=1e-2)
        reward_var = rnd.reward_statistics.var.item()
        np.testing.assert_allclose(reward_var, rewards.var(), rtol=1e-2)
    count = rnd.reward_statistics.count.item()
    assert count == pytest.approx(4 * 32 + (1e-4 if normalizer == "code" else 0), abs=1e-6)


def test_rnd_reward_comes_from_the_predictor_after_its_step():
    rnd, observations = make_rnd(learning_rate=0.1), torch.randn(32, OBS)
    old = copy.deepcopy(rnd)
    got, _ = rnd.update(observations, observations, 0.25, torch.zeros(32))
    as_was = old.intrinsic_rewards(observations)
    old.predictor.load_state_dict(rnd.predictor.state_dict())
    after_step = old.intrinsic_rewards(observations)
    assert not torch.allclose(as_was, after_step, rtol=0.01)
    close(got, array(after_step))


@pytest.mark.parametrize("share", [0.25, 1.0, 0.0], ids=["some rows", "all rows", "no row"])
def test_rnd_loss_of_chosen_rows_equals_masked_loss(share):
    rnd, observations = make_rnd(), torch.randn(64, OBS)
    uniform = torch.rand(64) * 0.25 / share if share else torch.ones(64)
    mask = uniform < 0.25
    z = rnd.normalize(observations)
    predicted, features = rnd.predictor(z), rnd.target(z).detach()
    full = ((predicted - features) ** 2).mean(1)
    want = (full * mask).sum() / max(int(mask.sum()), 1)
    expected = [array(g) for g in torch.autograd.grad(want, list(rnd.predictor.parameters()))]
    target = copy.deepcopy(rnd.target.state_dict())
    _, loss = rnd.update(observations, observations, 0.25, uniform)
    close(loss, want.item())
    for got, wanted in zip(gradients(rnd.predictor)(rnd.optimizers[0]), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(value, target[name]) for name, value in rnd.target.state_dict().items())
    assert not any(p.requires_grad for p in rnd.target.parameters())
    assert {id(p) for p in rnd.optimizers[0].param_groups[0]["params"]} == {id(p) for p in rnd.predictor.parameters()}


def test_rnd_draws_a_quarter_of_the_rows():
    rnd, drawn = make_rnd(), []
    rnd.predictor.register_forward_hook(lambda module, inputs, output: drawn.append(len(inputs[0])))
    torch.manual_seed(0)
    for _ in range(50):
        rnd.update(torch.randn(256, OBS), torch.randn(256, OBS), 0.25)
    assert drawn[1::2] == [256] * 50  # the rewards, of all rows
    assert abs(np.mean(drawn[0::2]) - 64) < 5 * math.sqrt(256 * 0.25 * 0.75 / 50)


def test_frozen_rnd_changes_nothing():
    rnd = make_rnd()
    rnd.update(torch.randn(32, OBS), torch.randn(32, OBS), 0.25)
    state = copy.deepcopy(rnd.state_dict())
    rnd.intrinsic_rewards(torch.randn(32, OBS))
    assert all(torch.equal(value, state[name]) for name, value in rnd.state_dict().items())


# === scores ===


class Played:
    """An environment of a task in which every episode has the same rewards; in the last step success, or not."""

    def __init__(self, env_id, rewards, success):
        self.task, self.rewards, self.success = ooo.TASKS[env_id], rewards, success

    def reset(self, seed):
        self.left = list(self.rewards)
        return np.zeros(OBS, np.float32), {}

    def step(self, action):
        reward = self.left.pop(0)
        return np.zeros(OBS, np.float32), reward, False, not self.left, {"success": self.success and not self.left}


@pytest.mark.parametrize(
    ("env_id", "rewards", "success", "score"),
    [
        ("hammer-truncated-expert-v1", [-200.0, -74.856578], False, 0.0),
        ("hammer-truncated-expert-v1", [12700.0, 94.134825], True, 100.0),
        ("hammer-truncated-expert-v1", [13317.0], True, 104.0),
        ("maze2d-missing-data-large-v1", [0.0], False, -2.5066),
        ("maze2d-missing-data-large-v1", [346.0], True, 126.94),
        ("maze2d-missing-data-large-v1", [200.0, 73.99], True, 100.0),
        ("antmaze-goal-missing-large-v2", [0.0, 0.0], False, 0.0),
        ("antmaze-goal-missing-large-v2", [0.0, 1.0], True, 100.0),
        ("kitchen-mixed-v0", [*range(4), *[3.0] * 698, 2.0], False, 75.0),
        ("kitchen-complete-v0", [0.0, 4.0], True, 100.0),
        ("kitchen-partial-v0", [0.0, 0.0], False, 0.0),
        ("pen-binary-v0", [-1.0, -1.0, -1.0, 0.0], True, 100.0),
        ("door-binary-v0", [-1.0] * 200, False, 0.0),
        ("relocate-binary-v0", [*[-1.0] * 199, 0.0], True, 100.0),
    ],
)
def test_normalized_score(env_id, rewards, success, score):
    _, summary = ooo.evaluate(Played(env_id, rewards, success), make_agent(), 2, seed=1)
    assert summary["eval/normalized_score"] == pytest.approx(score, abs=0.01)
    assert summary["eval/return"] == pytest.approx(sum(rewards)) and summary["eval/success_rate"] == success


def test_summary_is_the_mean_over_episodes():
    env = Played("pen-binary-v0", [-1.0] * 3, True)
    reset, env.episodes = env.reset, iter([([-1.0] * 2 + [-1.0], True), ([-3.0] * 3, False)])

    def other(seed):
        env.rewards, env.success = next(env.episodes)
        return reset(seed)

    env.reset = other
    _, summary = ooo.evaluate(env, make_agent(), 2, seed=1)
    want = {"eval/return": -6.0, "eval/success_rate": 0.5, "eval/normalized_score": 50.0, "eval/episodes": 2}
    assert summary == want
