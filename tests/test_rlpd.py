"""rlpd_ooo.py: updates against the authors' own learners, the sparse environments, sampling, runs, resume, errors.

What the shared blocks do is tested on iql_ooo.py; here is what only this script does.
"""

import numpy as np
import pytest
import torch
from test_golden import GRADIENTS, INFOS, check_rnd_state, check_step, close, load, oriented, read, tensors

import rlpd_ooo as ooo

# === golden vectors ===


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}; the actor's two heads are halves of its last layer."""
    out, (*hidden, last) = {}, [m for m in agent.actor.net if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(hidden):
        out[f"actor.{i}.weight"], out[f"actor.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    halves = len(last.bias) // 2
    for name, half in (("mean", slice(None, halves)), ("log_std_head", slice(halves, None))):
        out[f"actor.{name}.weight"], out[f"actor.{name}.bias"] = (last.weight, half), (last.bias, half)
    for prefix, critic in (("critic", agent.critic), ("target_critic", agent.critic_target)):
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (weight, "ensemble"), (bias, "bias")
        for i, (scale, shift) in enumerate(zip(critic.scales, critic.shifts, strict=True)):
            out[f"{prefix}.ln{i}.weight"], out[f"{prefix}.ln{i}.bias"] = (scale, "bias"), (shift, "bias")
    for prefix, network in {"rnd_predictor": rnd.predictor, "rnd_target": rnd.target}.items() if rnd else ():
        for i, layer in enumerate(m for m in network if isinstance(m, torch.nn.Linear)):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    out["log_temp"] = (agent.log_alpha, None)
    return out


@pytest.mark.parametrize("name", ["rlpd_plain", "rlpd_rnd_qbounds"])
def test_update_equals_the_authors(name):
    data, hyper = read(name)
    device = torch.device("cpu")
    args = ooo.Args(hidden_dims=hyper["hidden_dims"], rnd_hidden_dims=hyper["rnd_hidden_dims"] or (), init_alpha=0.5,
                    rnd_learning_rate=hyper["rnd_lr"], rnd_update_proportion=hyper["rnd_update_proportion"])
    agent = ooo.make_agent(args, hyper["obs_dim"], hyper["act_dim"], device, hyper["num_qs"], layer_norm=True)
    rnd = ooo.make_rnd(args, hyper["obs_dim"], device, reward_before_step=True) if hyper["use_rnd"] else None
    bounds = {} if hyper["min_q"] is None else dict(q_min=hyper["min_q"], q_max=hyper["max_q"])
    scale = hyper["intrinsic_reward_scale"]
    settings = ooo.Settings(hyper["target_entropy"], hyper["discount"], hyper["tau"], hyper["num_min_qs"],
                            hyper["backup_entropy"], intrinsic_reward_scale=scale, **bounds)
    named = parameters(agent, rnd)
    load(data, named)
    optimizers = [*agent.optimizers.values(), *([rnd.optimizer] if rnd else [])]
    for step in range(hyper["steps"]):
        batch, noise = tensors(data, "batch/", step), tensors(data, "noise/", step)
        bonus = None
        if rnd:
            bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"], noise["rnd_mask_uniform"])
            close(bonus, data["rnd/intrinsic_reward"][step], 1e-5, f"intrinsic reward {step}")
            close(rnd_loss, data["info/rnd_loss"][step], INFOS, f"rnd loss {step}")
        draws = {"next": noise["target_eps"].flatten(0, 1), "actor": noise["actor_eps"],
                 "members": noise["redq_indices"].long()}
        losses = ooo.sac_update(agent, batch, settings, hyper["utd_ratio"], bonus, draws)
        for mine, its in {"critic": "critic_loss", "actor": "actor_loss", "alpha": "temperature_loss",
                          "q_mean": "q", "entropy": "entropy"}.items():
            close(losses[f"losses/{mine}"], data[f"info/{its}"][step], INFOS, f"step {step} {its}")
        assert check_step(data, named, optimizers, step + 1) >= 19
        if rnd:
            check_rnd_state(rnd, {key[len(f"step{step + 1}/"):]: value for key, value in data.items()
                                  if key.startswith(f"step{step + 1}/rnd_")})
