"""pointmass_didactic.py: geometry, data, counts, losses, batching, whole runs, resume, errors.

    python -m pytest tests/test_pointmass.py
"""

import hashlib
import json
import math
import shutil
import signal
import zipfile
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runner import Box

import pointmass_didactic as pm

SMALL = """--num-seeds 2 --offline-episodes 5 --offline-steps 12 --online-steps 40 --retrain-steps 12 --eval-every 20
--eval-episodes 3 --final-episodes 4 --log-every 7 --checkpoint-every 10 --batch-size 8 --retrain-batch-size 8
--retrain-upsample 2 --hidden-dims 8 8""".split()
RUN = "point-mass-wall__pointmass_didactic__1"
CPU = torch.device("cpu")
RENAME = "os.rename"  # audit event; os.replace is a rename


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path, "pointmass_didactic.py")
    yield box
    box.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: (its Box, its outcome)."""
    box = Box(tmp_path_factory.mktemp("whole"), "pointmass_didactic.py")
    child = box.run(*SMALL)
    assert child.code == 0, child.err
    yield box, outcome(box)
    box.stop()


def digest(content):
    """A fingerprint of nested dicts and lists of tensors and numbers."""
    if isinstance(content, torch.Tensor):
        return hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(content, dict):
        return {str(key): digest(value) for key, value in content.items()}
    return [digest(x) for x in content] if isinstance(content, list | tuple) else content


def outcome(box, name=RUN):
    """What equal runs have in common."""
    run = box.work / "runs" / name
    found = {file: (run / file).read_bytes() for file in ("metrics.jsonl", "evals.jsonl", "replay.bin", "figure2.png")}
    found["results.json"] = json.loads((run / "results.json").read_text())
    found |= {path.name: digest(torch.load(path, weights_only=True)) for path in sorted(run.glob("*.pt"))}
    del found["checkpoint.pt"]["sizes"]  # timing.jsonl is in it
    run_id = json.loads((run / "config.json").read_text())["run_id"]
    assert {found[name].pop("run_id") for name in found if name.endswith((".pt", "results.json"))} == {run_id}
    return found


def records(box, file="metrics.jsonl", name=RUN):
    return [json.loads(line) for line in (box.work / "runs" / name / file).read_text().splitlines()]


# === geometry ===

S = 0.05 * math.sqrt(0.5)


def step(position, action):
    """move() of one point, as lists of floats and a bool."""
    new, goal = pm.move(torch.tensor(position, dtype=torch.float32), torch.tensor(action, dtype=torch.float32))
    return new.tolist(), bool(goal)


@pytest.mark.parametrize(
    ("position", "action", "expected"),
    [
        pytest.param((0.0, 0.5), (1, 0.5), (S, 0.5 + S / 2), id="free"),
        pytest.param((0.0, 0.5), (7, -7), (S, 0.5 - S), id="actions are clipped"),
        pytest.param((-0.24, 0.5), (-1, 0), (-0.25, 0.5), id="left end of the room"),
        pytest.param((1.24, 1.44), (1, 1), (1.25, 1.45), id="upper right corner of the room"),
        pytest.param((0.2, -0.24), (0, -1), (0.2, -0.25), id="floor of the room"),
        pytest.param((0.49, 0.5), (1, 0.2), (0.49, 0.5), id="through the wall: the whole move is cancelled"),
        pytest.param((0.51, 0.5), (-1, 0.2), (0.51, 0.5), id="through the wall from the right"),
        pytest.param((0.49, 0.5), (0.2, 1), (0.49 + S / 5, 0.5 + S), id="along the wall"),
        pytest.param((0.49, 0.09), (1, 0), (0.49 + S, 0.09), id="just under the wall"),
        pytest.param((0.49, 1.21), (1, 0), (0.49 + S, 1.21), id="just over the wall"),
        pytest.param((0.49, 0.11), (1, 0), (0.49, 0.11), id="just above its lower end"),
        pytest.param((0.49, 1.19), (1, 0), (0.49, 1.19), id="just below its upper end"),
        pytest.param((0.49, 0.1), (1, 0), (0.49 + S, 0.1), id="through its lower end: not strictly between"),
        pytest.param((0.49, 1.2), (1, 0), (0.49 + S, 1.2), id="through its upper end"),
        # The line is reached 0.01 / S of the way through the step, where y has changed by 0.01 times the slope.
        pytest.param((0.49, 0.105), (1, -1), (0.49 + S, 0.105 - S), id="diagonally under its lower end"),
        pytest.param((0.49, 0.115), (1, -1), (0.49, 0.115), id="diagonally into its lower end"),
        pytest.param((0.49, 1.195), (1, 1), (0.49 + S, 1.195 + S), id="diagonally over its upper end"),
        pytest.param((0.49, 1.185), (1, 1), (0.49, 1.185), id="diagonally into its upper end"),
    ],
)
def test_move(position, action, expected):
    assert step(position, action)[0] == pytest.approx(expected, abs=1e-6)


def test_the_line_of_the_wall_belongs_to_its_right():
    """So two moves that meet on the line cannot pass the wall."""
    assert step((0.5, 0.5), (1, 0))[0] == pytest.approx((0.5 + S, 0.5))
    assert step((0.5, 0.5), (-1, 0))[0] == pytest.approx((0.5, 0.5))
    half = torch.tensor((0.5 - 2**-6, 0.5))
    action = torch.tensor(((0.5 - half[0]) / pm.STEP, 0.0))
    assert float(half[0] + pm.STEP * action[0]) == 0.5  # the move would end on the line exactly
    assert torch.equal(pm.move(half, action)[0], half)


def test_goal_radius_is_strict():
    goal = torch.tensor([1.0, 0.15])
    for distance, reached in ((0.0, True), (0.0099, True), (0.0101, False)):
        for direction in (torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])):
            assert bool(pm.move(goal + distance * direction, torch.zeros(2))[1]) is reached


def test_move_of_many_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(pm.LOW), torch.tensor(pm.HIGH)
    positions = low + (high - low) * torch.rand(5, 400, 2, generator=generator)
    actions = 3 * torch.rand(5, 400, 2, generator=generator) - 1.5
    new, goal = pm.move(positions, actions)
    one, one_goal = pm.move(positions[3, 7], actions[3, 7])
    assert torch.equal(new[3, 7], one) and bool(goal[3, 7]) == bool(one_goal)
    # Another formula for the wall, in float64: the height at which the move meets the line.
    p, free = positions.double(), (positions.double() + pm.STEP * actions.double().clamp(-1, 1)).clamp(low, high)
    share = (0.5 - p[..., 0]) / (free[..., 0] - p[..., 0])
    height = p[..., 1] + share * (free[..., 1] - p[..., 1])
    blocked = (share > 0) & (share <= 1) & (height > 0.1) & (height < 1.2)
    assert 3 < int(blocked.sum()) < 200
    torch.testing.assert_close(new.double(), torch.where(blocked[..., None], p, free), atol=1e-6, rtol=0)


@pytest.mark.parametrize("over", [False, True])
def test_shortest_steps_against_full_speed(over):
    """No way is shorter than the closed form, and a controller that always saturates an axis needs two steps more
    at most (it passes the wall's end in a whole step, and must not go past the goal)."""
    starts = pm.start_positions("gaussian", torch.Generator().manual_seed(1), 200)
    bound = pm.shortest_steps(starts, over)
    position, taken = starts, torch.full((200,), math.inf)
    corner = torch.tensor((pm.WALL_X, pm.WALL_HIGH + 1e-3 if over else pm.WALL_LOW - 1e-3))
    for t in range(70):
        way = torch.where(position[:, :1] >= pm.WALL_X, torch.tensor(pm.GOAL), corner) - position
        action = way / way.abs().amax(-1, keepdim=True).clamp(min=1e-9)
        near = (position[:, :1] >= pm.WALL_X) & (way.abs().amax(-1, keepdim=True) < pm.STEP)
        position, goal = pm.move(position, torch.where(near, way / pm.STEP, action))
        taken[goal & taken.isinf()] = t + 1
    assert (taken >= bound).all() and (taken <= bound + 2).all()
    assert bound.mean() == pytest.approx(50 if over else 28.5, abs=1)


def test_ways():
    """Trajectories drawn by hand: under, over, under and back over, never across."""
    paths = [[(0.4, 0.0), (0.6, 0.0), (0.7, 0.0), (0.8, 0.0)], [(0.4, 1.3), (0.4, 1.3), (0.6, 1.3), (0.8, 1.3)],
             [(0.4, 0.0), (0.6, 0.0), (0.4, 1.3), (0.6, 1.3)], [(0.4, 0.0), (0.3, 0.0), (0.4, 1.3), (0.4, 1.3)]]
    under, over = pm.ways(torch.tensor(paths))
    assert under.tolist() == [True, False, True, False] and over.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("kind", "std"), [("gaussian", 0.02), ("uniform", 0.02 / math.sqrt(3))])
def test_start_noise(kind, std):
    starts = pm.start_positions(kind, torch.Generator().manual_seed(0), 20_000)
    assert starts.mean(0).tolist() == pytest.approx((0, 0.5), abs=1e-3)
    assert starts.std(0).tolist() == pytest.approx((std, std), rel=0.03)
    assert kind == "gaussian" or float((starts - torch.tensor((0, 0.5))).abs().max()) <= 0.02 + 1e-6


# === data and counts ===


def test_scripted_data():
    args = pm.Args()
    rows = pm.scripted_data(args, 1)
    ends = rows[:, 6].nonzero().squeeze(1)
    assert len(ends) == 100 and ends[-1] == len(rows) - 1  # every one of 100 trajectories ends at the goal
    lengths = ends.diff(prepend=torch.tensor([-1]))
    assert 50 <= lengths.min() and lengths.max() <= 90
    new, goal = pm.move(rows[:, :2], rows[:, 2:4])
    assert torch.equal(new, rows[:, 4:6]) and torch.equal(goal.float(), rows[:, 6])
    inside = torch.ones(len(rows) - 1, dtype=torch.bool)
    inside[ends[:-1]] = False
    assert torch.equal(rows[1:, :2][inside], rows[:-1, 4:6][inside])
    for path in torch.tensor_split(rows[:, :2], ends[:-1] + 1):
        assert [bool(x) for x in pm.ways(path)] == [False, True]
    assert torch.equal(rows, pm.scripted_data(args, 1)) and not torch.equal(rows[:60], pm.scripted_data(args, 2)[:60])


def cell_by_search(row):
    """The nearest node on each axis, by looking at all of them."""
    axes = [np.linspace(*limits) for limits in ((-0.25, 1.25, 100), (-0.25, 1.45, 100), (-1, 1, 10), (-1, 1, 10))]
    return tuple(int(np.abs(axis - x).argmin()) for axis, x in zip(axes, row[:4], strict=True))


def test_counts_against_a_dictionary(tmp_path):
    """Offline data of unequal length for each member, then online steps; the bonus is read from the counts of now."""
    args = pm.Args(offline_episodes=2, num_seeds=2)
    offline = [pm.scripted_data(args, 1), pm.scripted_data(args, 2), pm.scripted_data(args, 2)]
    replay = pm.ReplayBuffer(offline, 30, CPU)
    kept = [list(rows.numpy()) for rows in offline]
    counts = [Counter(map(cell_by_search, rows)) for rows in kept]
    coefs, generator = torch.tensor([[0.0], [5.0], [25.0]]), torch.Generator().manual_seed(0)
    for t in range(31):
        uniform = torch.rand(3, 64, generator=generator, dtype=torch.float64)
        batch = replay.sample(uniform)
        bonuses = coefs / (replay.count(batch) + 1).sqrt()
        for member in range(3) if t % 10 == 0 else ():
            for k in range(64):
                row = kept[member][int(uniform[member, k] * len(kept[member]))]
                bonus = float(coefs[member]) / math.sqrt(counts[member][cell_by_search(row)] + 1)
                assert float(bonuses[member, k]) == pytest.approx(bonus, rel=1e-6)
                assert batch[member, k].tolist() == row.tolist()
        if t < 30:  # the same few cells again and again
            rows = torch.tensor([[0.3, 0.3, 0.5, -1.0, 0.31, 0.3, 0.0]]).repeat(3, 1) + 0.01 * (t % 3)
            replay.extend(rows[None])
            for member in range(3):
                kept[member].append(rows[member].numpy())
                counts[member][cell_by_search(rows[member].numpy())] += 1
    assert replay.counts.sum(1).tolist() == [len(rows) for rows in kept]
    assert max(counts[0].values()) >= 10
    assert replay.online().shape == (30, 3, 7)
    # replay.bin brings them back, the first rows or all; a damaged one is refused.
    content, path = replay.rows_since(0), tmp_path / "replay.bin"
    assert content == replay.rows_since(0)[: 84 * 20] + replay.rows_since(20)
    path.write_bytes(content)
    for count in (30, 17):
        again = pm.ReplayBuffer(offline, 30, CPU)
        again.load(path, len(content), zlib.crc32(content), count)
        assert again.rows_since(0) == content[: 84 * count]
        assert int(again.counts.sum()) == sum(map(len, offline)) + 3 * count
        assert count < 30 or torch.equal(again.data, replay.data) and torch.equal(again.counts, replay.counts)
    path.write_bytes(content[:-1] + b"x")
    for size, checksum, count in ((len(content), zlib.crc32(content), 30), (84, zlib.crc32(content[:84]), 2)):
        with pytest.raises(SystemExit):
            pm.ReplayBuffer(offline, 30, CPU).load(path, size, checksum, count)


def test_upsampling_takes_the_first_transitions_of_a_batch_from_those_into_the_goal():
    args = pm.Args(offline_episodes=4)
    offline = [pm.scripted_data(args, seed) for seed in (1, 2)]
    online = torch.tensor([[0.99, 0.15, 0.3, 0.0, 1.0, 0.15, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    replay = pm.ReplayBuffer(offline, 1, CPU)
    replay.extend(online[None])
    into_goal = [[row for row in rows.tolist() if row[6]] for rows in offline]
    into_goal[0].append(online[0].tolist())
    assert [len(x) for x in into_goal] == [5, 4]
    uniform = torch.rand(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch, plain = replay.sample(uniform, *replay.goal_rows(), 16), replay.sample(uniform)
    for member in range(2):
        for k in range(16):
            row = into_goal[member][int(uniform[member, k] * len(into_goal[member]))]
            assert batch[member, k].tolist() == row
    assert torch.equal(batch[:, 16:], plain[:, 16:])


def test_where_the_members_are_follows_from_their_rows():
    """A resumed run knows when episodes end without having saved it."""
    replay = pm.ReplayBuffer([pm.scripted_data(pm.Args(offline_episodes=1), 1)] * 2, 200, CPU)
    age = torch.zeros(2, dtype=torch.long)
    for t in range(200):
        obs, found = replay.last_positions()
        assert torch.equal(found, age) and torch.equal(obs, replay.data[replay.size - 1, :, 4:6])
        goal = torch.tensor([t == 20, t in (3, 4, 170)])
        replay.extend(torch.cat([torch.rand(2, 6), goal[:, None]], 1)[None])
        age = (age + 1).masked_fill(goal, 0)


# === updates ===


def agents_of(seed, num_seeds=1, bonus_coef=(0.0,), **options):
    args = pm.Args(hidden_dims=(16, 16), seed=seed, num_seeds=num_seeds, bonus_coef=bonus_coef, **options)
    return pm.Agents(args, "explore", CPU)


def seen(agents, position):
    """The features of one position of the first member, one by one."""
    phases = [float((position * agents.frequencies[0, :, i]).sum()) for i in range(agents.frequencies.shape[2])]
    return torch.tensor([*(2 * position - 1).tolist(), *map(math.sin, phases), *map(math.cos, phases)])


def random_batch(members, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"observations": (2,), "actions": (2,), "next_observations": (2,), "rewards": (), "masks": ()}
    batch = {name: torch.rand(members, 32, *shape, generator=g) for name, shape in shapes.items()}
    return {**batch, "masks": (batch["masks"] > 0.2).float()}


def test_losses_against_a_plain_formula():
    """One member, everything written out sample by sample, before any parameter has moved (the V of the target is
    the new one, so it is read off the updated network)."""
    agents, before, batch = agents_of(5), agents_of(5), random_batch(1)
    bonus = torch.rand(1, 32, generator=torch.Generator().manual_seed(1))
    losses = pm.iql_update(agents, batch, bonus, gamma=0.9, expectile=0.8, temperature=2.0, tau=0.01)
    value = critic = actor = 0.0
    with torch.no_grad():
        for k in range(32):
            obs, new = (seen(before, batch[name][0, k]) for name in ("observations", "next_observations"))
            action = batch["actions"][0, k]
            one = lambda net, x: net(x.expand(len(net.weights[0]), 1, -1))[:, 0, :]  # noqa: E731
            q_both = one(before.critic, torch.cat([obs, action]))[:, 0]
            q = q_both.min()
            diff = q - one(before.value, obs)[0, 0]
            value += (0.8 if diff > 0 else 0.2) * diff**2 / 32
            target = bonus[0, k] + batch["rewards"][0, k] + 0.9 * batch["masks"][0, k] * one(agents.value, new)[0, 0]
            critic += ((q_both - target) ** 2).mean() / 32
            weight = min(math.exp(2 * (q - one(agents.value, obs)[0, 0])), 100.0)
            density = torch.distributions.Normal(one(before.actor, obs)[0].tanh(), 1.0).log_prob(action).sum()
            actor -= weight * (density + math.log(2 * math.pi)) / 32
    for name, expected in (("value", value), ("critic", critic), ("actor", actor)):
        assert float(losses[f"losses/{name}"]) == pytest.approx(float(expected), rel=1e-4), name
    assert losses["losses/q_magnitude"].shape == losses["losses/v_magnitude"].shape == (1,)
    for target, old, new in zip(*(x.parameters() for x in (agents.critic_target, before.critic_target, agents.critic)),
                                strict=True):
        torch.testing.assert_close(target, 0.99 * old + 0.01 * new)


def test_the_bonus_of_an_update_takes_the_counts_as_they_stand():
    """Optimistic and pessimistic update on the same rows: the target of Q differs by c / sqrt(n + 1), masks and
    rewards come from the goal."""
    args = pm.Args(num_seeds=1, bonus_coef=(5.0,), offline_episodes=1, compile="off")
    replay = pm.ReplayBuffer([pm.scripted_data(args, 1)], 3, CPU)
    rows, received = replay.sample(torch.rand(1, 16, dtype=torch.float64)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pm, "iql_update", lambda agents, batch, bonus, **options: received.append((batch, bonus)))
        pm.make_update(args, replay, None, True)(rows)
        replay.extend(rows[:, :1].repeat(3, 1, 1))
        pm.make_update(args, replay, None, True)(rows)
        pm.make_update(args, replay, None, False)(rows)
    (batch, before), (_, after), (_, none) = received
    assert none == 0.0 and torch.equal(batch["rewards"], rows[..., 6]) and torch.equal(batch["masks"], 1 - rows[..., 6])
    n = (5 / before[0, 0]) ** 2 - 1
    assert float(after[0, 0]) == pytest.approx(5 / math.sqrt(n + 4), rel=1e-5)


def test_members_do_not_see_each_other():
    """A batch of three members learns what each learns alone."""
    batch, options = random_batch(3), dict(gamma=0.95, expectile=0.9, temperature=10.0, tau=0.01)
    together, alone = agents_of(1, num_seeds=3), [agents_of(seed) for seed in (1, 2, 3)]
    for _ in range(5):
        pm.iql_update(together, batch, **options)
        for i, agents in enumerate(alone):
            pm.iql_update(agents, {name: value[i : i + 1] for name, value in batch.items()}, **options)
    observations = torch.rand(3, 10, 2, generator=torch.Generator().manual_seed(1))
    for i, agents in enumerate(alone):
        torch.testing.assert_close(together.mean(observations)[i], agents.mean(observations[i : i + 1])[0],
                                   atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.std()[i], agents.std()[0], atol=1e-6, rtol=1e-5)


def test_the_members_that_diverge_are_said_each_once():
    """Ceilings: 1 / (1 - gamma), with the bonus (1 + c / sqrt(2)) / (1 - gamma); exploitation has no bonus."""
    args, said = pm.Args(num_seeds=2, gamma=0.9), []
    run = SimpleNamespace(progress={"diverged": {}})
    run.log_losses = lambda name, *where, **extra: said.append((name, *where))
    for policy in ("exploration", "exploration", "exploration", "exploitation 9"):
        losses = {"losses/critic": torch.tensor(1.0), "losses/q_magnitude": torch.tensor([9.0, 40.0, 12.0, 44.0]),
                  "losses/v_magnitude": torch.tensor([5.0, 46.0, 13.0, 6.0])}
        pm.log_losses(run, args, policy, "online", 5, 6, losses)
        run.progress["diverged"][said[-1][0]] = {}
    assert [name for name, *_ in said] == ["exploration, seed 2, c = 0", "exploration, seed 1, c = 5",
                                           "exploration, seed 2, c = 5", "exploitation 9, seed 1, c = 5"]
    for (_, *where, losses, ceiling), magnitudes, expected in zip(
            said, ((12, 13), (40, 46), (44, 6), (40, 46)), (10, 45.36, 45.36, 10), strict=True):
        assert where == ["online", 5, 6] and ceiling == pytest.approx(expected, abs=0.01)
        assert (float(losses["losses/q_magnitude"]), float(losses["losses/v_magnitude"])) == magnitudes


def test_std_has_a_floor():
    agents = agents_of(1, log_std_min=-2.0)
    with torch.no_grad():
        agents.log_std.fill_(-9.0)
    assert agents.std().flatten().tolist() == pytest.approx([math.exp(-2)] * 2)


# === whole runs ===


def test_run(whole):
    box, found = whole
    assert {"metrics.jsonl", "evals.jsonl", "results.json", "figure2.png", "replay.bin", "pretrained.pt",
            "exploration_40.pt", "exploitation_40.pt", "checkpoint.pt"} <= found.keys()
    assert found["figure2.png"].startswith(b"\x89PNG")
    table = box.started[0].out
    for word in ("IQL", "IQL + bonus 5", "OOO on the data of IQL + bonus 5", "shortest way under", "reach the goal"):
        assert word in table
    losses = [r for r in records(box) if "losses/value" in r]
    assert {r["phase"] for r in losses} == {"pretrain", "online", "retrain"}
    assert all(math.isfinite(r[name]) for r in losses for name in r if name.startswith("losses/"))
    evaluations = records(box, "evals.jsonl")
    assert {(r["seed"], r["bonus_coef"]) for r in evaluations} == {(1, 0.0), (1, 5.0), (2, 0.0), (2, 5.0)}
    assert all(len(r["steps"]) == 3 for r in evaluations)
    # No curve uses a start of the tables.
    assert not torch.isin(*(pm.evaluation_starts(pm.Args(), name, 9) for name in ("evaluation", "final"))).any()
    results = found["results.json"]
    assert [results[k] for k in ("script", "env_id", "exp_name", "seed", "source_run_id", "diverged")] == [
        "pointmass_didactic", "point-mass-wall", "pointmass_didactic", 1, None, {}]
    for row in results["rows"]:
        for name in ("steps", "success", "under", "over"):
            assert np.shape(row["per_episode"][name]) == (2, 4)
            assert row[name] == np.mean(row["per_episode"][name], axis=1).tolist()
    states = [torch.load(box.work / "runs" / RUN / f"{name}.pt", weights_only=True)["agents"]
              for name in ("pretrained", "exploration_40", "exploitation_40")]
    for one, other in ((0, 1), (1, 2)):
        assert all(not torch.equal(states[one][name], states[other][name]) for name in states[0] if "freq" not in name)
    assert torch.equal(states[0]["frequencies"], states[1]["frequencies"])
    # The members of a seed begin equal, and only the bonus parts them.
    first = agents_of(1, bonus_coef=(0.0, 5.0))
    assert torch.equal(first.actor.weights[0][0], first.actor.weights[0][1])
    assert not torch.equal(states[0]["value.weights.0"][0], states[0]["value.weights.0"][1])


def test_same_seed_same_bytes_in_a_new_interpreter(whole, box):
    child = box.run(*SMALL, fresh=True)
    assert child.code == 0, child.err
    assert outcome(box) == whole[1]


def test_a_seed_does_not_depend_on_the_others(whole, box):
    """Data, starts and evaluation of seed 2 alone are those of seed 2 beside seed 1; losses up to rounding."""
    assert box.run(*SMALL, "--seed", 2, "--num-seeds", 1).code == 0
    name = RUN[:-1] + "2"
    alone, beside = (np.fromfile(b.work / "runs" / n / "replay.bin", np.float32).reshape(40, -1, 7)
                     for b, n in ((box, name), (whole[0], RUN)))
    np.testing.assert_allclose(alone, beside[:, 2:], atol=1e-4, rtol=1e-3)


def test_exploit_only_repeats_the_retraining(whole):
    """With the same settings the same bytes; with others, other exploitation agents on the same data. The source is
    known by its id: it may be moved, and another run in its place is refused."""
    box, found = whole
    runs, source = box.work / "runs", json.loads((box.work / "runs" / RUN / "config.json").read_text())["run_id"]
    for name, words in (("again", []), ("other", ["--retrain-temperature", 1])):
        child = box.run("--exploit-only", f"runs/{RUN}/", "--exp-name", name, *words)
        assert child.code == 0, child.err
        other = outcome(box, f"point-mass-wall__{name}__1")
        assert (other["exploitation_40.pt"] == found["exploitation_40.pt"]) == (name == "again")
        assert other["results.json"]["source_run_id"] == source
        if name == "again":
            assert other["results.json"]["rows"] == found["results.json"]["rows"]
            assert other["figure2.png"] == found["figure2.png"]
    shutil.copytree(runs / RUN, runs / "moved")
    words = ["--exploit-only", runs / "moved", "--exp-name", "third"]
    assert box.run(*words, signal_at=(signal.SIGKILL, RENAME, "/checkpoint.pt", 2)).code == -signal.SIGKILL
    shutil.move(runs / "moved", runs / "elsewhere")
    child = box.run("--exploit-only", "runs/point-mass-wall__again__1", "--exp-name", "third", "--resume")
    assert child.code == 2 and child.err.count("\n") == 1 and "was started with" in child.err
    child = box.run("--exploit-only", "runs/elsewhere", "--exp-name", "third", "--resume")
    assert child.code == 0, child.err
    assert outcome(box, "point-mass-wall__third__1")["exploitation_40.pt"] == found["exploitation_40.pt"]


@pytest.mark.parametrize("words", ["--online-steps 5", "--num-seeds 1", "--seed 3", "--bonus-coef 0 1",
                                   "--bonus-coef 0", "--offline-episodes 4", "--start-noise uniform",
                                   "--hidden-dims 9", "--num-frequencies 3"])
def test_exploit_only_refuses_what_its_data_is_not_of(words, whole, monkeypatch, capsys):
    """Other seeds or coefficients would be labels that the data does not bear out."""
    monkeypatch.chdir(whole[0].work)
    before = whole[0].files()
    with pytest.raises(SystemExit) as stop:
        pm.main(pm.parse_args(["--exploit-only", f"runs/{RUN}", "--exp-name", "other_members", *words.split()]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {words.split()[0]}: ") and err.count("\n") == 1
    assert whole[0].files() == before


def test_exploit_only_refuses_an_unfinished_run_and_one_without_data(box):
    assert box.run(*SMALL, signal_at=(signal.SIGKILL, RENAME, "/checkpoint.pt", 5)).code == -signal.SIGKILL
    child = box.run("--exploit-only", f"runs/{RUN}", "--exp-name", "other")
    assert child.code == 2 and child.err.count("\n") == 1 and "holds 10 of 40 online steps" in child.err
    assert box.run(*SMALL, "--resume").code == 0
    assert box.run("--exploit-only", f"runs/{RUN}", "--exp-name", "other").code == 0
    child = box.run("--exploit-only", "runs/point-mass-wall__other__1", "--exp-name", "third")
    assert child.code == 2 and child.err.count("\n") == 1 and "holds 0 of 40 online steps" in child.err


def test_a_drawing_needs_no_backend(whole, box):
    """The variable of another environment (a notebook's, a window's) does not end the run at its last step."""
    assert box.run(*SMALL, env={"MPLBACKEND": "nonsense"}).code == 0
    assert outcome(box)["figure2.png"] == whole[1]["figure2.png"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_run_is_the_eager_one_but_for_rounding(whole, box):
    child = box.run(*SMALL, "--compile", "on")
    assert child.code == 0, child.err
    eager, compiled = ([r for r in records(b) if "losses/critic" in r] for b in (whole[0], box))
    assert len(eager) == len(compiled) > 6
    for a, b in zip(eager, compiled, strict=True):
        for name in (x for x in a if x.startswith("losses/")):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (name, a["phase"], a["grad_step"])


def test_sweep_in_one_command(box):
    child = box.run(*SMALL, "--bonus-coef", 0, 0.5, 1, 5, 25, "--num-seeds", 1, "--online-steps", 5)
    assert child.code == 0, child.err
    rows = json.loads((box.work / "runs" / RUN / "results.json").read_text())["rows"]
    assert [row["bonus_coef"] for row in rows] == [0, 0, 0.5, 0.5, 1, 1, 5, 5, 25, 25]


# === resume ===

MOMENTS = {  # the first checkpoint is that of the start
    "before the first checkpoint of a phase": ("/checkpoint.pt", 2),
    "pretraining": ("/checkpoint.pt", 3),
    "online": ("/checkpoint.pt", 6),
    "between the exploration policies and their checkpoint": ("/checkpoint.pt", 7),
    "retraining": ("/checkpoint.pt", 9),
    "before the figure": ("/figure2.png", 1),
    "before the results": ("/results.json", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(whole, box, moment):
    """A real SIGKILL, then --resume: the same bytes as without it."""
    assert box.run(*SMALL, signal_at=(signal.SIGKILL, RENAME, *MOMENTS[moment])).code == -signal.SIGKILL
    child = box.run(*SMALL, "--resume")
    assert child.code == 0, child.err
    assert outcome(box) == whole[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint(number, whole, box):
    child = box.run(*SMALL, signal_at=(number, RENAME, "/pretrained.pt", 1))
    assert child.code == 128 + number
    assert f"stopped by {number.name}" in child.err and "Traceback" not in child.err
    assert box.run(*SMALL, "--resume").code == 0
    assert outcome(box) == whole[1]


def test_resuming_a_finished_run_changes_nothing(whole):
    box, _ = whole
    files = sorted((box.work / "runs" / RUN).iterdir())
    before = [path.read_bytes() for path in files]
    child = box.run(*SMALL, "--resume")
    assert child.code == 0 and child.out.endswith("is finished: see its results.json\n")
    assert [path.read_bytes() for path in sorted((box.work / "runs" / RUN).iterdir())] == before


# === errors ===


def check_refused(child, box, word):
    assert child.code == 2, child.err
    assert child.err.startswith("error: ") and child.err.count("\n") == 1 and word in child.err
    assert box.files() == []


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--env-id", "point-mass-wal"], "point-mass-wall"),
        (["--bonus-coef", "5"], "begin with 0"),
        (["--bonus-coef", "0", "5", "1"], "rise"),
        (["--bonus-coef", "0", "inf"], "--bonus-coef"),
        (["--bonus-coef", "0", "nan"], "--bonus-coef"),
        (["--retrain-tau", "-1"], "--retrain-tau"),
        (["--exp-name", "../x"], "--exp-name"),
        (["--scale", "0"], "--scale"),
        (["--gamma", "1"], "--gamma"),
        (["--expectile", "1"], "--expectile"),
        (["--num-seeds", "0"], "--num-seeds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--online-steps", "0"], "--online-steps"),
        (["--device", "cuda:99"], "--device"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_values(words, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        pm.main(pm.parse_args([*SMALL, *words]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert list(tmp_path.iterdir()) == []


def test_a_process_says_it_in_one_line(box):
    check_refused(box.run(*SMALL, "--bonus-coef", 5), box, "begin with 0")
    check_refused(box.run(*SMALL, "--retrain-upsample", 9), box, "more than --retrain-batch-size")


def test_existing_run_and_changed_settings_are_refused(whole):
    box, found = whole
    for words, word in (([], "--resume"), (["--resume", "--batch-size", 9], "--batch-size was 8")):
        child = box.run(*SMALL, *words)
        assert child.code == 2 and child.err.count("\n") == 1 and word in child.err
    assert outcome(box) == found


@pytest.mark.parametrize("name", ["checkpoint.pt", "replay.bin"])
def test_damage_is_refused(name, whole, tmp_path):
    """One flipped bit: neither --resume nor --exploit-only goes on, and nothing is changed."""
    shutil.copytree(whole[0].work / "runs" / RUN, tmp_path / "runs" / RUN)
    (tmp_path / "runs" / RUN / "results.json").unlink()  # as if it were not finished
    path = tmp_path / "runs" / RUN / name
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if name == "checkpoint.pt":  # not in the padding between two tensors
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            place = content.index(archive.read(largest)) + largest.file_size // 2
    content[place] ^= 1
    path.write_bytes(content)
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for words in ([*SMALL, "--resume"], ["--exploit-only", f"runs/{RUN}", "--exp-name", "other"]):
            with pytest.raises(SystemExit) as stop:
                pm.main(pm.parse_args(words))
            assert stop.value.code == 2
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")} == before


def test_full_disk(whole, box):
    """The operating system refuses larger files: one line, and the run goes on where there is room again."""
    child = box.run(*SMALL, file_limit=20_000)
    assert child.code == 1 and "Traceback" not in child.err
    assert child.err.splitlines()[-1].startswith("error: ") and "--resume" in child.err
    assert box.run(*SMALL, "--resume").code == 0
    assert outcome(box) == whole[1]


def test_the_shortest_chain_joins_transitions_within_cells():
    from tools import pointmass_chain

    def row(x0, x1, goal=0):
        return [x0, 0.05, 0, 0, x1, 0.05, goal]

    # 0 -> 1 -> 2 -> goal in cells of 0.1, and a detour 0 -> 3 -> 4 -> 2; the goal's row starts in cell 2.
    rows = np.array([row(0.01, 0.11), row(0.19, 0.21), row(0.25, 0.29, 1), row(0.02, 0.31), row(0.35, 0.41)])
    assert pointmass_chain.shortest_chain(rows, (0.05, 0.05), 0.1) == 3
    assert pointmass_chain.shortest_chain(rows, (0.35, 0.05), 0.1) is None
    assert pointmass_chain.shortest_chain(rows, (0.05, 0.05), 0.01) is None
