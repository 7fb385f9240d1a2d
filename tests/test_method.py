"""What the scripts compute and by which settings, against the paper and, where it is silent, the authors' code.

Settings are read from parse_args; the rest is seen in updates, evaluations and what a run saves.
"""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from baseline import Session, losses_of, read_lines, small_words
from test_losses import ACT, CPU, HIDDEN, IQL, OBS, array, forward, linears, make_batch
from torch.cuda._utils import _get_device_index

import calql_ooo
import iql_ooo
import pex
import rlpd_ooo
import td3_rnd

SCRIPTS = {script.SCRIPT: script for script in (iql_ooo, td3_rnd, pex, rlpd_ooo, calql_ooo)}
WITH_RND = [iql_ooo, td3_rnd, rlpd_ooo, calql_ooo]
PEN, UMAZE = "pen-binary-v0", "maze2d-missing-data-umaze-v1"

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
    """In both phases and in the baselines that take them over. TD3 + RND on hammer: its official configuration."""
    want = TABLE_4.get(env_id, CODE_KITCHEN if "kitchen" in env_id else TABLE_4["maze2d-missing-data-large-v1"])
    args = settings_of(iql_ooo, env_id)
    assert (args.expectile, args.temperature, args.dropout) == want
    assert args.retrain_expectile in (None, want[0]) and args.retrain_dropout in (None, want[2])
    other = settings_of(pex, env_id)
    assert (other.expectile, other.temperature, other.dropout) == want
    assert settings_of(td3_rnd, env_id).dropout == (0.1 if "hammer" in env_id else want[2])


def test_log_std_min_is_the_codes():
    """Of which the paper says nothing."""
    for env_id in iql_ooo.TASKS:
        args = settings_of(iql_ooo, env_id)
        exploit = args.log_std_min if args.retrain_log_std_min is None else args.retrain_log_std_min
        assert (args.log_std_min, exploit) == (-2.0 if "hammer" in env_id else -5.0, -5.0)
        assert settings_of(pex, env_id).log_std_min == args.log_std_min
        assert settings_of(td3_rnd, env_id).log_std_min == -5.0  # also on hammer: its learner's default


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
def test_header_states_the_rule_and_names_what_is_our_interpretation(name):
    said = " ".join(SCRIPTS[name].__doc__.split())
    assert re.search("paper .*explicit, else (the|PEX's own) code", said)
    if SCRIPTS[name] in WITH_RND:
        assert "published coefficients were tuned with the code's form" in said
    ours = [item for item in items(SCRIPTS[name]) if "our interpretation" in item]
    assert any("itchen" in item and "30 of" in item for item in ours)
    if name == "calql_ooo":
        assert any("ammer" in item and "1M" in item for item in ours)
        assert any("ntmaze" in item and "50" in item for item in ours)


def test_choices_are_cited_where_they_act():
    """"# choice N" beside the code names an item of the header, and the items that act in one place are cited."""
    for script in SCRIPTS.values():
        cited = {int(n) for n in re.findall(r"choice (\d+)(?! of iql_ooo.py)", Path(script.__file__).read_text())}
        assert cited and cited <= set(range(1, len(items(script)) + 1)), script.SCRIPT


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
            network[-1].weight.mul_(0.01)
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
    """Xavier's uniform bound for every matrix; before the first update both networks are as they were made."""
    Session(rlpd_ooo, monkeypatch).run(
        "--env-id", "halfcheetah-sparse-v2", *small_words(), "--utd-ratio", 1, "--rnd-hidden-dims", 64, 48,
        "--online-steps", 5, "--learning-starts", 5, "--retrain-at", 5, "--retrain-steps", 1, "--final-episodes", 1)
    checkpoint = torch.load("runs/halfcheetah-sparse-v2__rlpd_ooo__1/checkpoint.pt", weights_only=True)
    saved = checkpoint["models"]["rnd"]["networks"]
    matrices = [value for name, value in saved.items() if name.startswith(("target", "predictor")) and value.ndim == 2]
    assert len(matrices) == 4
    for matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_frozen_bonus_has_its_value(tiny, monkeypatch, in_tmp):
    """Without extrinsic reward, a bonus of 10 in every step and gamma 0.8: V is 10 / (1 - 0.8). No bound of the rewards
    cuts it off."""
    tiny(PEN)
    session = Session(iql_ooo, monkeypatch)
    small = small_words("--rnd-hidden-dims", 16, 16, "--final-episodes", 1)
    session.run("--env-id", PEN, *small, "--offline-steps", 5, "--online-steps", 30, "--retrain-at", 30,
                "--retrain-steps", 1)
    monkeypatch.setattr(iql_ooo.RND, "intrinsic_rewards", lambda rnd, following: torch.full((len(following),), 10.0))
    session.run("--exploit-only", f"runs/{PEN}__iql_ooo__1", "--exp-name", "frozen", "--retrain-frozen-rnd", "--gamma",
                0.8, "--reward-scale", 0, "--intrinsic-reward-scale", 1, "--tau", 0.05, "--learning-rate", 0.01,
                "--retrain-steps", 800, "--log-every", 20)
    (run,) = in_tmp.glob("runs/*frozen*")
    values = [record["losses/v_mean"] for record in losses_of(run, "retrain")]
    assert np.mean(values[-10:]) == pytest.approx(50, rel=0.05)


# === divergence ===


def records_of_losses(sizes, policy="exploration", known=(), ceiling=100.0):
    """The records and the progress of a run whose updates return these mean |Q|."""
    records, progress = [], {"diverged": {name: {} for name in known}}
    run = SimpleNamespace(progress=progress, updates=0, clock=0.0,
                          log=lambda name, *where, **values: records.append(values) if name == "metrics.jsonl" else 0)
    for step, (q, v) in enumerate(sizes):
        losses = {"losses/critic": torch.tensor(1e9), "losses/q_magnitude": torch.tensor(q)}
        losses |= {} if v is None else {"losses/v_magnitude": torch.tensor(v)}
        iql_ooo.Run.log_losses(run, policy, "retrain", 7, step, losses, ceiling)
    return records, progress["diverged"]


@pytest.mark.parametrize(
    ("sizes", "at"),
    [
        ([(1.0, 2.0), (99.0, 99.0), (109.0, 109.0)], None),  # a tenth is left for the networks' error
        ([(1.0, 2.0), (111.0, 3.0), (5e6, 3.0)], 1),
        ([(1.0, 2.0), (3.0, 3.0), (3.0, 111.0)], 2),
        ([(1.0, None), (111.0, None)], 1),  # TD3 has no V
    ],
)
def test_divergence_is_said_once(capsys, sizes, at):
    records, diverged = records_of_losses(sizes)
    said = capsys.readouterr().err.splitlines()
    assert [number for number, record in enumerate(records) if "diverged" in record] == ([] if at is None else [at])
    assert len(said) == len(diverged) == (at is not None)
    if at is not None:
        assert "exploration" in said[0] and "retrain" in said[0] and records[at]["diverged"] == "exploration"
        assert diverged == {"exploration": {"phase": "retrain", "env_step": 7, "grad_step": at, "magnitude": 111.0,
                                            "ceiling": 100.0}}


def test_divergence_is_said_of_each_policy(capsys):
    sizes = [(200.0, 1.0)]
    assert records_of_losses(sizes, "exploitation 7", ["exploration"])[1]["exploitation 7"]["magnitude"] == 200.0
    assert records_of_losses(sizes, "exploitation 7", ["exploitation 7"])[1] == {"exploitation 7": {}}  # after --resume
    assert records_of_losses(sizes, ceiling=0.0)[1] == {}  # without a reward nothing is known
    assert capsys.readouterr().err.count("diverges") == 1


@pytest.mark.parametrize("exploitation", [False, True])
def test_value_ceiling(exploitation):
    """The largest |reward| as it is learnt from, bonus included, over 1 - gamma."""
    args, raw = iql_ooo.Args(gamma=0.9, reward_bias=-1.0, reward_scale=2.0, intrinsic_reward_scale=0.5), [-3.0, 2.0]
    ceiling = iql_ooo.value_ceiling(args, torch.tensor(raw), None, exploitation)
    assert ceiling == pytest.approx(80)  # |-3 - 1| * 2 = 8
    args.retrain_reward_scale = 0.25
    ceiling = iql_ooo.value_ceiling(args, torch.tensor(raw), None, exploitation)
    assert ceiling == pytest.approx(10 if exploitation else 80)
    rnd = SimpleNamespace(largest_reward=torch.tensor([6.0]))
    assert iql_ooo.value_ceiling(args, torch.tensor(raw), rnd, exploitation) == pytest.approx(ceiling + 30)


@pytest.mark.parametrize("script", [iql_ooo, td3_rnd], ids=lambda script: script.SCRIPT)
def test_the_largest_bonus_is_that_of_the_run_so_far(script):
    rnd = make_rnd(script, settings_of(script, PEN, "--rnd-hidden-dims", 16, 8))
    seen = [0.0]
    for size in (1.0, 100.0, 1.0, 10.0):
        seen.append(rnd.update(torch.randn(32, OBS), size * torch.randn(32, OBS))[0].max().item())
        assert rnd.largest_reward.item() == pytest.approx(max(seen)) and seen[-1] > 0
    assert rnd.largest_reward.item() > seen[-1]
    again = make_rnd(script, settings_of(script, PEN, "--rnd-hidden-dims", 16, 8))
    again.load_state_dict(rnd.state_dict())  # also after --resume
    assert again.largest_reward == rnd.largest_reward


# === states, devices ===


def test_a_state_is_copied_into_the_tensors_that_are_there():
    """A captured update goes on using them: with tensors of their own, --sync --cudagraphs trains on freed memory."""
    agents = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        agents.append(iql_ooo.Agent(OBS, ACT, HIDDEN, 1e-2, CPU))
        for _ in range(seed + 1):
            iql_ooo.iql_update(agents[-1], make_batch(seed), **IQL)
    one, other = agents

    def tensors(agent):
        found = {name: value for name, value in agent.state_dict(keep_vars=True).items()}
        for number, optimizer in enumerate(agent.optimizers):
            for place, p in enumerate(optimizer.param_groups[0]["params"]):
                found |= {f"{number}.{place}.{name}": value for name, value in optimizer.state[p].items()}
        return found

    places = {name: value.data_ptr() for name, value in tensors(one).items()}
    iql_ooo.load_state(one, copy.deepcopy(iql_ooo.state_of(other)))
    assert {name: value.data_ptr() for name, value in tensors(one).items()} == places
    assert len(places) == len(list(one.parameters())) + 3 * sum(len(o.state) for o in one.optimizers) == 82
    for name, value in tensors(other).items():
        assert torch.equal(tensors(one)[name], value), name
    for agent in agents:
        iql_ooo.iql_update(agent, make_batch(5), **IQL)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_device_that_is_used_is_the_one_that_is_seeded(script, monkeypatch):
    """torch.cuda.manual_seed seeds the current device: with --device cuda:1 that must be cuda:1."""
    chosen, seeded, zeros = [], [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((seed, chosen[-1])))
    for name, index in (("cuda:1", 1), ("cuda", 0)):
        device = script.setup_torch(settings_of(script, PEN, "--device", name, "--compile", "off"))
        script.seed_torch(3)
        assert device == torch.device(name) and chosen[-1] == index and seeded[-1] == (3, index)


# === phases of iql_ooo.py ===


def test_updates_per_step_and_t_0(tiny, monkeypatch, in_tmp, capsys):
    """Two updates after each step; a retraining at t = 0 sees D_off alone; the final evaluation of each policy."""
    tiny(UMAZE)
    session, learners, first_rows = Session(iql_ooo, monkeypatch), [], []
    session.spy("iql_update", lambda agent, *_, **__: learners.append(agent))
    sample = iql_ooo.ReplayBuffer.sample
    monkeypatch.setattr(iql_ooo.ReplayBuffer, "sample",
                        lambda buffer, *where: first_rows.append(where[1:2]) or sample(buffer, *where))
    monkeypatch.setattr(iql_ooo, "value_ceiling", lambda *_, **__: 1e-6)  # every policy is over it at once
    small = small_words("--rnd-hidden-dims", 16, 16, "--final-episodes", 3, "--eval-episodes", 2, "--log-every", 1)
    words = ["--env-id", UMAZE, *small, "--offline-steps", 6, "--online-steps", 40, "--updates-per-step", 2,
             "--retrain-at", 0, 40, "--retrain-steps", 5, "--retrain-upsample", 0]
    session.run(*words)
    err, (run,) = capsys.readouterr().err, in_tmp.glob("runs/*")

    assert [sum(agent is one for agent in learners) for one in session.agents] == [6 + 2 * 40, 5, 5]
    online = [(r["env_step"], r["grad_step"]) for r in losses_of(run, "online")]
    assert online == [(t, 6 + 2 * t) for t in range(1, 41)]
    offline = json.loads((run / "config.json").read_text())["dataset"]["transitions"]
    assert first_rows == [(offline,)] * 6 + [()] * 80 + [(offline,)] * 5 + [(offline + 40,)] * 5

    results = json.loads((run / "results.json").read_text())
    assert [row["env_step"] for row in results["rows"]] == [0, 40]
    one, other = (torch.load(run / name, weights_only=True)["agent"] for name in ("pretrained.pt", "exploration_0.pt"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for row in results["rows"]:
        for policy in ("exploration", "exploitation"):
            episodes = row[policy]["per_episode"]
            assert row[policy]["eval/episodes"] == len(episodes) == 3
            assert all(0 <= episode["start_distance"] <= 6 for episode in episodes)
    starts = {tuple(e["start_distance"] for e in row[p]["per_episode"]) for row in results["rows"]
              for p in ("exploration", "exploitation")}
    assert len(starts) == 1  # every policy on the same starts
    training = results["training_episodes"]
    assert [(episode["env_step"], episode["length"]) for episode in training] == [(30, 30), (40, 10)]
    assert all({"return", "success", "start_distance"} <= episode.keys() for episode in training)

    assert results["diverged"].keys() == {"exploration", "exploitation 0", "exploitation 40"}
    assert results["diverged"]["exploration"]["phase"] == "pretrain" and err.count("diverges") == 3
    said = [record["diverged"] for record in read_lines(run / "metrics.jsonl") if "diverged" in record]
    assert said == ["exploration", "exploitation 0", "exploitation 40"]


def test_t_0_needs_no_online_phase(tiny, monkeypatch, in_tmp):
    """The control that is trained on D_off alone: an exploration agent that has learnt nothing, and a retraining."""
    tiny(PEN)
    Session(iql_ooo, monkeypatch).run(
        "--env-id", PEN, *small_words("--rnd-hidden-dims", 16, 16, "--final-episodes", 1), "--offline-steps", 0,
        "--online-steps", 0, "--retrain-at", 0, "--retrain-steps", 3)
    (run,) = in_tmp.glob("runs/*")
    (row,) = json.loads((run / "results.json").read_text())["rows"]
    assert row["env_step"] == 0 and row["exploitation"]["eval/episodes"] == 1
