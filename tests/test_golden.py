"""The updates against inputs and outputs of the authors' own learners (tests/README.md says where they come from).

Those of pex.py and td3_rnd.py: test_pex.py and test_td3_rnd.py, with the helpers of this file.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import iql_ooo as ooo

GOLDEN = ROOT / "tests" / "golden"
PARAMETERS, GRADIENTS, INFOS, RND_STATE = 1e-5, 1e-4, 1e-4, 1e-5  # tolerances of the vectors' README


def read(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        data = {key: file[key] for key in file.files}
    return data, json.loads(str(data["hyper_json"]))


def tensors(data, prefix, step):
    """The arrays under a prefix, of one update, as tensors."""
    return {key[len(prefix):]: torch.from_numpy(value[step].copy())
            for key, value in data.items() if key.startswith(prefix)}


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}."""
    out = {"actor.log_std": (agent.actor.log_std, None)}
    out |= stack_parameters(agent.actor.net, ["actor.0", "actor.1", "actor.mean"], single=True)
    for prefix, critic in (("critic", agent.critic), ("target_critic", agent.critic_target)):
        out |= stack_parameters(critic, [f"{prefix}.{i}" for i in range(len(critic.weights))])
    if hasattr(agent, "value"):
        out |= stack_parameters(agent.value, [f"value.{i}" for i in range(len(agent.value.weights))], single=True)
    return out | (rnd_parameters(rnd) if rnd else {})


def stack_parameters(stack, names, single=False):
    """Golden weights are (out, in) or, of an ensemble, (num, out, in); a Stack's (num, in, out)."""
    kind, out = "single" if single else "ensemble", {}
    for name, weight, bias in zip(names, stack.weights, stack.biases, strict=True):
        out[f"{name}.weight"], out[f"{name}.bias"] = (weight, f"{kind} weight"), (bias, f"{kind} bias")
    return out


def rnd_parameters(rnd):
    """RND's networks are of nn.Linear, as golden files have them."""
    out = {}
    for prefix, network in (("rnd_predictor", rnd.predictor), ("rnd_target", rnd.target)):
        layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        for i, layer in enumerate(layers):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    return out


def oriented(value, how):
    """A view of a parameter as the golden file has it; how may be a function, of a layer that two heads share."""
    views = {None: lambda v: v, "single weight": lambda v: v[0].T, "single bias": lambda v: v[0, 0],
             "ensemble weight": lambda v: v.mT, "ensemble bias": lambda v: v.squeeze(1)}
    return views.get(how, how)(value)


def load(data, named):
    with torch.no_grad():
        for name, (parameter, how) in named.items():
            oriented(parameter, how).copy_(torch.from_numpy(data[f"step0/{name}"]))


def close(got, want, tolerance, what):
    got, want = got.detach().double().numpy(), np.asarray(want, np.float64)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-12)
    assert error <= tolerance, f"{what}: {error:.1e} > {tolerance:.0e}"


def check_step(data, named, optimizers, step, skip=()):
    """Parameters after an update, and after the first one the gradients (10 x Adam's first moment)."""
    moments = {id(p): state["exp_avg"] for o in optimizers for p, state in o.state.items()}
    compared = 0
    for name, (parameter, how) in named.items():
        if f"step{step}/{name}" in data and not name.startswith(skip):
            close(oriented(parameter, how), data[f"step{step}/{name}"], PARAMETERS, f"step {step} {name}")
            compared += 1
        if step == 1 and f"step1/adam_m/{name}" in data and not name.startswith(skip):
            gradient = oriented(moments[id(parameter)], how) * 10
            close(gradient, 10 * data[f"step1/adam_m/{name}"], GRADIENTS, f"gradient {name}")
    return compared


def make(hyper, squash=False, script=ooo):
    """The agent, and what an update of it takes beside the batch."""
    agent = script.Agent(hyper["obs_dim"], hyper["act_dim"], hyper["hidden_dims"], hyper["actor_lr"],
                         torch.device("cpu"), squash=squash)
    options = dict(gamma=hyper["discount"], tau=hyper["tau"])
    if not squash:
        options |= dict(expectile=hyper["expectile"], temperature=hyper["temperature"])
        if hyper.get("minimum_q") is not None:
            options |= dict(q_min=hyper["minimum_q"], q_max=hyper["maximum_q"])
    return agent, options


def make_rnd(hyper):
    return ooo.RND(hyper["obs_dim"], hyper["rnd_hidden_dims"], hyper["rnd_lr"], torch.device("cpu"), "max", "code")


def check_rnd_state(rnd, wanted):
    """wanted: {golden name: array} after an update."""
    for ours, theirs in ((rnd.obs_statistics, "rnd_obs_rms"), (rnd.reward_statistics, "rnd_reward_rms")):
        for part in ("mean", "var", "count"):
            want = wanted[f"{theirs}.{part}"]
            close(getattr(ours, part).reshape(want.shape), want, RND_STATE, f"{theirs}.{part}")


@pytest.mark.parametrize("name", ["iql_plain", "iql_qbounds", "iql_intrinsic_qbounds", "iql_rnd"])
def test_iql(name):
    data, hyper = read(name)
    agent, options = make(hyper)
    rnd = make_rnd(hyper) if hyper["use_rnd"] else None
    named = parameters(agent, rnd)
    load(data, named)
    infos = {"losses/value": "value_loss", "losses/critic": "critic_loss", "losses/actor": "actor_loss"}
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        bonus = batch.pop("intrinsic_rewards", 0.0)
        if rnd:
            uniform = torch.from_numpy(data["noise/rnd_mask_uniform"][step])
            bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"],
                                         hyper["rnd_update_proportion"], uniform)
            close(rnd_loss, data["info/rnd_loss"][step], INFOS, "rnd_loss")
            check_rnd_state(rnd, {key[4:]: value[step] for key, value in data.items() if key.startswith("rnd/")})
        losses = ooo.iql_update(agent, batch, hyper["intrinsic_reward_scale"] * bonus, **options)
        for ours, theirs in infos.items():
            close(losses[ours], data[f"info/{theirs}"][step], INFOS, f"step {step} {theirs}")
        close(losses["losses/advantage_mean"], data["info/adv"][step].mean(), INFOS, "advantage")
        compared = 0
        if f"step{step + 1}/critic.0.weight" in data:
            optimizers = (*agent.optimizers, *(rnd.optimizers if rnd else ()))
            compared = check_step(data, named, optimizers, step + 1)
            assert compared >= len(named) - 4  # the fixed RND target is stored once
    assert compared, "the last update must be one of the stored ones"
    assert step + 1 == hyper["steps"]


def test_rnd_alone():
    data, hyper = read("rnd_only")
    rnd = make_rnd(hyper)
    named = rnd_parameters(rnd)
    load(data, named)
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        uniform = torch.from_numpy(data["noise/rnd_mask_uniform"][step])
        rewards, loss = rnd.update(batch["observations"], batch["next_observations"], hyper["rnd_update_proportion"],
                                   uniform)
        close(rewards, data["info/intrinsic_reward"][step], INFOS, f"step {step} intrinsic reward")
        close(loss, data["info/rnd_loss"][step], INFOS, f"step {step} loss")
        assert check_step(data, named, rnd.optimizers, step + 1) == 4
        check_rnd_state(rnd, {key[6:]: value for key, value in data.items() if key.startswith(f"step{step + 1}/")})
    frozen = rnd.intrinsic_rewards(tensors(data, "batch/", 0)["next_observations"])
    close(frozen, data["frozen_reward_batch0"], INFOS, "frozen reward")


@pytest.mark.parametrize("name", ["td3_plain", "td3_qbounds_intrinsic"])
def test_td3(name):
    check_td3(name, ooo)


def check_td3(name, script):
    """The value network, which the authors' code trains on the side, has no influence and is not compared."""
    data, hyper = read(name)
    agent, options = make(hyper, squash=True, script=script)
    named = parameters(agent)
    load(data, named)
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        noise = torch.from_numpy(data["noise/action_eps"][step]).expand(2, -1, -1)
        bonus = hyper["intrinsic_reward_scale"] * batch.pop("intrinsic_rewards", 0.0)
        losses = script.td3_update(agent, batch, bonus, noise=noise, **options)
        for ours, theirs in {"losses/critic": "critic_loss", "losses/actor": "actor_loss"}.items():
            close(losses[ours], data[f"info/{theirs}"][step], INFOS, f"step {step} {theirs}")
        if f"step{step + 1}/critic.0.weight" in data:
            check_step(data, named, agent.optimizers, step + 1, skip=("value",))
    assert f"step{hyper['steps']}/critic.0.weight" in data
