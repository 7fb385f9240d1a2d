"""What the scripts compute and by which settings, against the paper and, where it is silent, the authors' code.

Settings are read from parse_args; the rest is seen in updates, evaluations and what a run saves.
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
from baseline import Session, losses_of, small_words
from test_losses import OBS, array, forward, linears

import calql_ooo
import iql_ooo
import pex
import rlpd_ooo
import td3_rnd

SCRIPTS = {script.SCRIPT: script for script in (iql_ooo, td3_rnd, pex, rlpd_ooo, calql_ooo)}
WITH_RND = [iql_ooo, td3_rnd, rlpd_ooo, calql_ooo]
PEN = "pen-binary-v0"

# Table 4: expectile, temperature and dropout, of both phases. Kitchen is not in it.
ADROIT_4 = (0.8, 3.0, 0.1)
TABLE_4 = {
    "pen-binary-v0": ADROIT_4, "door-binary-v0": ADROIT_4, "relocate-binary-v0": ADROIT_4,
    "antmaze-goal-missing-large-v2": (0.9, 10.0, 0.0), "maze2d-missing-data-large-v1": (0.9, 3.0, 0.0),
    "hammer-truncated-expert-v1": (0.8, 3.0, 0.0),
}
CODE_KITCHEN = (0.7, 0.5, 0.1)
PAPER_RND = {"rnd_reward": "l2", "rnd_hidden_dims": (512, 512, 512), "rnd_normalizer": "paper"}


def settings_of(script, env_id, *words):
    return script.parse_args(["--env-id", env_id, *map(str, words)])


def items(script):
    """The header's numbered list, an item one line."""
    _, *found = re.split(r"^ ?\d+\. ", script.__doc__, flags=re.MULTILINE)
    return [" ".join(item.split()) for item in found]


# === settings ===


@pytest.mark.parametrize("env_id", iql_ooo.TASKS)
def test_policy_settings_are_table_4s(env_id):
    """Without an exception, in both phases and in the baselines that take them over."""
    want = TABLE_4.get(env_id, CODE_KITCHEN if "kitchen" in env_id else TABLE_4["maze2d-missing-data-large-v1"])
    args = settings_of(iql_ooo, env_id)
    assert (args.expectile, args.temperature, args.dropout) == want
    assert args.retrain_expectile in (None, want[0]) and args.retrain_dropout in (None, want[2])
    other = settings_of(pex, env_id)
    assert (other.expectile, other.temperature, other.dropout) == want
    assert settings_of(td3_rnd, env_id).dropout == want[2]


def test_log_std_min_is_the_codes():
    """Of which the paper says nothing."""
    for env_id in iql_ooo.TASKS:
        args = settings_of(iql_ooo, env_id)
        exploit = args.log_std_min if args.retrain_log_std_min is None else args.retrain_log_std_min
        assert (args.log_std_min, exploit) == (-2.0 if "hammer" in env_id else -5.0, -5.0)
        assert settings_of(pex, env_id).log_std_min == settings_of(td3_rnd, env_id).log_std_min == args.log_std_min


def test_bonus_settings_are_the_papers_but_for_the_named_exceptions():
    differ = set()
    for script in WITH_RND:
        for env_id in script.TASKS:
            args = settings_of(script, env_id)
            small = args.env_id.startswith(("pen", "door", "relocate", "hammer"))
            want = PAPER_RND | {"intrinsic_reward_scale": 0.5 if small else 10.0}
            differ |= {(script.SCRIPT, name, env_id.split("-")[0] if name == "intrinsic_reward_scale" else "")
                       for name, value in want.items() if getattr(args, name) != value}
    assert differ == {
        *((script.SCRIPT, name, "") for script in WITH_RND for name in PAPER_RND if script is not calql_ooo),
        ("calql_ooo", "rnd_reward", ""), ("calql_ooo", "intrinsic_reward_scale", "antmaze"),
    }
    for script in (iql_ooo, rlpd_ooo, calql_ooo):  # td3_rnd.py says that its RND is iql_ooo.py's
        for word in ("--rnd-reward l2", "--rnd-normalizer"):
            assert any(word in item for item in items(script)), (script.SCRIPT, word)
    assert any("--rnd-normalizer" in item for item in items(td3_rnd))
    assert any("ntmaze" in item and "50" in item and "tuned" in item for item in items(calql_ooo))


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_states_the_rule_and_names_readings(name):
    said = " ".join(SCRIPTS[name].__doc__.split())
    rule = ("the paper wins where it is explicit, else the code, except where the published coefficients were tuned "
            "with the code's form")
    assert rule in said
    readings = [item for item in items(SCRIPTS[name]) if "reading" in item]
    assert any("itchen" in item and "30 of" in item for item in readings)
    if name == "calql_ooo":
        assert any("ammer" in item and "1M" in item for item in readings)
        assert any("ntmaze" in item and "50" in item for item in readings)


def test_td3s_default_is_the_authors_variant():
    for env_id in td3_rnd.TASKS:
        assert settings_of(td3_rnd, env_id).variant == "official"
        assert settings_of(td3_rnd, env_id, "--variant", "fujimoto").variant == "fujimoto"


def test_rlpd_retrains_without_q_bounds():
    for env_id in rlpd_ooo.TASKS:
        assert settings_of(rlpd_ooo, env_id).retrain_q_bounds is False


# === random network distillation ===


def make_rnd(script, args):
    return script.RND(OBS, args.rnd_hidden_dims, args.rnd_learning_rate, torch.device("cpu"), args.rnd_reward,
                      args.rnd_normalizer)


@pytest.mark.parametrize("script", WITH_RND, ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("form", ["paper", "code"])
def test_scale_of_the_features_cancels_in_the_papers_normaliser_alone(script, form):
    """Both networks' outputs times 0.01."""
    args = settings_of(script, PEN, "--rnd-normalizer", form, "--rnd-hidden-dims", 16, 8)
    args.rnd_learning_rate = 0.0
    torch.manual_seed(0)
    one = make_rnd(script, args)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for network in (other.predictor, other.target):
            network.layers[-1].weight.mul_(0.01)
    generator = torch.Generator().manual_seed(1)
    bonuses = []
    for _ in range(40):
        observations, following = torch.randn(2, 256, OBS, generator=generator)
        bonuses.append([rnd.update(observations, following)[0] for rnd in (one, other)])
    if form == "paper":
        for bonus, scaled in bonuses:
            torch.testing.assert_close(scaled, bonus, rtol=1e-4, atol=1e-6)
            assert 0.3 < bonus.std() < 3  # of the order of one
    bonus, scaled = bonuses[-1]
    assert scaled.mean() / bonus.mean() == pytest.approx(1.0 if form == "paper" else 0.0, abs=0.15)
    torch.testing.assert_close(other.intrinsic_rewards(following) / one.intrinsic_rewards(following),
                               scaled / bonus, rtol=0.05, atol=0)


def test_the_papers_normaliser_divides_by_the_standard_deviation_of_all_errors():
    args = settings_of(iql_ooo, PEN, "--rnd-normalizer", "paper", "--rnd-hidden-dims", 16, 8)
    torch.manual_seed(0)
    rnd, seen = make_rnd(iql_ooo, args), np.zeros(0)
    for _ in range(4):
        observations = torch.randn(64, OBS)
        with torch.no_grad():
            z = rnd.normalize(observations)
        got, _ = rnd.update(observations, observations)
        error = ((forward(*linears(rnd.predictor), array(z)) - forward(*linears(rnd.target), array(z))) ** 2).max(1)
        seen = np.concatenate([seen, error])
        np.testing.assert_allclose(array(got), error / seen.std(), rtol=1e-3)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_a_batch_of_one_row_leaves_the_bonus_finite(form):
    args = settings_of(iql_ooo, PEN, "--rnd-normalizer", form, "--rnd-hidden-dims", 16, 8)
    rnd = make_rnd(iql_ooo, args)
    for _ in range(3):
        observations = torch.randn(1, OBS)
        assert rnd.update(observations, observations)[0].isfinite().all()


def test_rlpds_rnd_is_initialised_as_rlpds_networks(monkeypatch, in_tmp):
    """Xavier's uniform bound for every matrix of the fixed network, which a run saves as it was made."""
    Session(rlpd_ooo, monkeypatch).run(
        "--env-id", "halfcheetah-sparse-v2", *small_words(), "--utd-ratio", 1, "--rnd-hidden-dims", 64, 48,
        "--online-steps", 5, "--learning-starts", 5, "--retrain-at", 5, "--retrain-steps", 1)
    saved = torch.load("runs/halfcheetah-sparse-v2__rlpd_ooo__1/rnd_5.pt", weights_only=True)["rnd"]
    matrices = [value for name, value in saved.items() if name.startswith(("target", "predictor")) and value.ndim == 2]
    assert len(matrices) == 4
    for matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_frozen_bonus_has_its_value(tiny, monkeypatch, in_tmp):
    """Without extrinsic reward, a bonus of 10 in every step and gamma 0.9: V is 10 / (1 - 0.9)."""
    tiny(PEN)
    session = Session(iql_ooo, monkeypatch)
    session.run("--env-id", PEN, *small_words("--rnd-hidden-dims", 16, 16), "--offline-steps", 5, "--online-steps", 30,
                "--retrain-at", 30, "--retrain-steps", 1)
    monkeypatch.setattr(iql_ooo.RND, "intrinsic_rewards", lambda rnd, following: torch.full((len(following),), 10.0))
    session.run("--exploit-only", f"runs/{PEN}__iql_ooo__1", "--exp-name", "frozen", "--retrain-frozen-rnd", "--gamma",
                0.9, "--reward-scale", 0, "--intrinsic-reward-scale", 1, "--tau", 0.2, "--learning-rate", 0.01,
                "--retrain-steps", 1500, "--log-every", 100)
    (run,) = in_tmp.glob("runs/*frozen*")
    assert losses_of(run, "retrain")[-1]["losses/v_mean"] == pytest.approx(100, rel=0.05)
