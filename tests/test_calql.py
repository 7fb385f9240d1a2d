"""calql_ooo.py: updates against the authors' own learner, returns, hand-made cases of the conservative term, mixing,
what each task makes of its data, all phases, resume, errors.

What the shared blocks do is tested on iql_ooo.py; here is what only this script does.
"""

import copy
import json
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import SMALL, Box
from test_golden import INFOS, check_rnd_state, check_step, close, load, read, tensors

import calql_ooo as ooo

PEN, CPU = "pen-binary-v0", torch.device("cpu")

# === golden vectors ===


def make(hyper):
    """Agent, settings and RND as a golden file's hyper-parameters want them."""
    dims = {name: tuple(int(d) for d in hyper[name].split("-")) for name in ("policy_arch", "qf_arch")}
    agent = ooo.Agent(hyper["obs_dim"], hyper["act_dim"], dims["policy_arch"], dims["qf_arch"], CPU,
                      learning_rate=hyper["qf_lr"], actor_learning_rate=hyper["policy_lr"],
                      unit_features=hyper["feature_normalization"], lagrange=hyper["cql_lagrange"])
    if hyper["bound_q_functions"]:
        agent.q_bounds.copy_(torch.tensor([hyper["min_q"], hyper["max_q"]]))
    settings = ooo.Settings(
        hyper["target_entropy"], hyper["discount"], hyper["soft_target_update_rate"],
        hyper["cql_min_q_weight"] if hyper["use_cql"] else 0.0, hyper["cql_n_actions"], hyper["cql_importance_sample"],
        hyper["cql_target_action_gap"] if hyper["cql_lagrange"] else None, hyper["enable_calql"],
        max_target_backup=hyper["cql_max_target_backup"], backup_entropy=hyper["backup_entropy"],
        intrinsic_reward_scale=hyper.get("rnd_reward_scale", 0.0))
    rnd = None
    if hyper["use_rnd"]:
        args = ooo.Args(rnd_hidden_dims=(*hyper["rnd_hidden_dims"], hyper["rnd_hidden_dims"][-1]),
                        rnd_learning_rate=hyper["rnd_lr"], rnd_update_proportion=hyper["rnd_update_proportion"])
        rnd = ooo.make_rnd(args, hyper["obs_dim"], CPU, reward_before_step=True)
    return agent, settings, rnd


def parameters(agent, rnd=None):
    """{golden name: (parameter, orientation)}; each critic is a slice of the ensemble."""
    out = {"log_alpha": (agent.log_alpha, None)}
    if agent.log_alpha_prime is not None:
        out["log_alpha_prime"] = (agent.log_alpha_prime, None)
    for name in ("log_std_multiplier", "log_std_offset"):
        out[f"policy.{name}"] = (getattr(agent.actor, name), None)
    networks = {"policy": agent.actor.net}
    networks |= {"rnd_predictor": rnd.predictor, "rnd_target": rnd.target} if rnd else {}
    for prefix, network in networks.items():
        for i, layer in enumerate(m for m in network if isinstance(m, torch.nn.Linear)):
            out[f"{prefix}.{i}.weight"], out[f"{prefix}.{i}.bias"] = (layer.weight, None), (layer.bias, None)
    return out


def critics(agent):
    """(golden prefix, member, critic) of the four Q functions."""
    return [(f"{kind}qf{member + 1}", member, critic) for member in (0, 1)
            for kind, critic in (("", agent.critic), ("target_", agent.critic_target))]


@torch.no_grad()
def load_all(data, agent, rnd):
    load(data, parameters(agent, rnd))
    for prefix, member, critic in critics(agent):
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            weight[member] = torch.from_numpy(data[f"step0/{prefix}.{i}.weight"]).T
            bias[member, 0] = torch.from_numpy(data[f"step0/{prefix}.{i}.bias"])


def check_critics(data, agent, step):
    moments = dict(zip(map(id, agent.critic_parameters), agent.critic_optimizer.exp_avg, strict=True))
    for prefix, member, critic in critics(agent):
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            for name, parameter in (("weight", weight), ("bias", bias)):
                key = f"{prefix}.{i}.{name}"
                if f"step{step}/{key}" in data:
                    close(parameter[member].T.squeeze(-1) if name == "bias" else parameter[member].T,
                          data[f"step{step}/{key}"], 1e-5, f"step {step} {key}")
                if step == 1 and f"step1/adam_m/{key}" in data:
                    moment = moments[id(parameter)][member].T
                    moment = moment.squeeze(-1) if name == "bias" else moment
                    close(10 * moment, 10 * data[f"step1/adam_m/{key}"], 1e-4, f"gradient {key}")


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


def replay(name, results, **changes):
    """Replay golden inputs `name`; compare with the results of the file `results`."""
    data, hyper = read(name)
    agent, settings, rnd = make(hyper)
    settings = replace(settings, **changes)
    load_all(data, agent, rnd)
    wanted = read(results)[0]
    named = parameters(agent, rnd)
    for step in range(hyper["steps"]):
        batch = tensors(data, "batch/", step)
        batch |= {"masks": 1 - batch["dones"], "lower_bounds": batch["mc_returns"]}
        bonus = None
        if rnd:
            uniform = torch.from_numpy(data["noise/rnd_mask_uniform"][step])
            bonus, rnd_loss = rnd.update(batch["observations"], batch["next_observations"], uniform)
            close(bonus, data["rnd/intrinsic_reward"][step], INFOS, f"intrinsic reward {step}")
            close(rnd_loss, wanted["info/rnd_loss"][step], INFOS, f"rnd loss {step}")
        # The authors evaluate the model once for each loss, with other random numbers each time.
        found = {}
        for loss in hyper["loss_order"]:
            *losses, info = ooo.calql_losses(agent, batch, settings, draws(data, loss, step, hyper), bonus)
            found[loss] = ooo.gradients(agent, *losses)
        policy = [*found["policy"][0][:-1], found["log_alpha"][0][-1]]
        layers = len(agent.critic_parameters) - ("log_alpha_prime" in found)
        critic = [torch.stack([found["qf1"][1][i][0], found["qf2"][1][i][1]]) for i in range(layers)]
        critic += [found["log_alpha_prime"][1][-1]] if "log_alpha_prime" in found else []
        for i, gradient in enumerate(("qf1_loss_gradient", "qf2_loss_gradient")):
            norm = torch.stack([g[i].square().sum() for g in critic[:layers]]).sum().sqrt()
            close(norm, wanted[f"info/{gradient}"][step], INFOS, gradient)
        agent.step(policy, critic, settings.tau)
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
            if settings.calibrate:
                rates = [wanted[f"info/cql.bound_rate_{x}"][step] for x in (
                    "cql_q1_current_actions", "cql_q1_next_actions", "cql_q2_current_actions", "ql_q2_next_actions")]
                close(info["losses/bound_rate_policy"], np.mean(rates), INFOS, f"step {step} bound rate")
        if hyper["cql_lagrange"]:
            close(info["losses/alpha_prime"], wanted["info/cql.alpha_prime_loss"][step], INFOS, "multiplier's loss")
            close(info["losses/alpha_prime_value"], wanted["info/cql.alpha_prime"][step], INFOS, "multiplier")
        optimizers = [agent.policy_optimizer, agent.critic_optimizer, *([rnd.optimizer] if rnd else [])]
        if f"step{step + 1}/log_alpha" in wanted:
            assert check_step(wanted, named, optimizers, step + 1) >= 9
        check_critics(wanted, agent, step + 1)
        if rnd:
            check_rnd_state(rnd, {key[len(f"step{step + 1}/"):]: value for key, value in wanted.items()
                                  if key.startswith(f"step{step + 1}/rnd_")})
    assert "step2/log_alpha" in wanted and step == 1


@pytest.mark.parametrize("name", ["calql", "calql_lagrange", "cql_featnorm_qbounds", "sac_no_cql", "calql_rnd"])
def test_update_equals_the_authors(name):
    replay(name, name)


def test_original_bound_equals_upstream():
    """Upstream Cal-QL, on the same inputs, leaves the uniform actions' Q unbounded."""
    replay("calql", "calql_upstream", bound_uniform_actions=False)
    with pytest.raises(AssertionError, match="loss_gradient"):
        replay("calql", "calql_upstream")
