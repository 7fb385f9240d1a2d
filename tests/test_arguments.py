"""Arguments: precedence of defaults, task rows, source runs and the command line; --scale; values that cannot be."""

import json
from dataclasses import asdict

import pytest

import iql_ooo as ooo


def parse(*words):
    return ooo.parse_args([str(word) for word in words])


def source_run(tmp_path, *words):
    """A run directory with nothing but its config."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"script": "iql_ooo", "args": asdict(parse(*words))}))
    return folder


def test_precedence():
    assert parse("--env-id", "kitchen-mixed-v0").temperature == 0.5  # the task's row
    assert parse("--env-id", "kitchen-mixed-v0").expectile == 0.7  # Args
    assert parse("--env-id", "kitchen-mixed-v0", "--temperature", 2).temperature == 2.0  # the command line
    assert parse().env_id == "hammer-truncated-expert-v1"


@pytest.mark.parametrize("env_id", ooo.TASKS)
def test_task_rows(env_id):
    args = asdict(parse("--env-id", env_id))
    want = {**asdict(ooo.Args()), **ooo.TASKS[env_id], "env_id": env_id}
    assert args == {name: want[name] for name in args}


def test_paper_values():
    """Table of the reference: expectile, temperature, dropout; steps; bonus; exploitation's own values."""
    table = {
        "pen-binary-v0": (0.8, 3.0, 0.1, 25_000, 1_000_000, 0.5, 0.0, (-1.0, 5.0), 0),
        "door-binary-v0": (0.8, 3.0, 0.1, 25_000, 1_000_000, 0.5, 0.0, (-1.0, 5.0), 0),
        "relocate-binary-v0": (0.8, 3.0, 0.1, 25_000, 1_000_000, 0.5, 0.0, (-1.0, 5.0), 0),
        "kitchen-partial-v0": (0.7, 0.5, 0.1, 1_000_000, 4_000_000, 10.0, -4.0, None, 8),
        "kitchen-mixed-v0": (0.7, 0.5, 0.1, 1_000_000, 4_000_000, 10.0, -4.0, None, 8),
        "kitchen-complete-v0": (0.7, 0.5, 0.1, 1_000_000, 4_000_000, 10.0, -4.0, None, 8),
        "antmaze-goal-missing-large-v2": (0.9, 10.0, 0.0, 500_000, 2_000_000, 10.0, -1.0, None, 8),
        "maze2d-missing-data-large-v1": (0.9, 3.0, 0.0, 500_000, 500_000, 10.0, -1.0, None, 8),
        "hammer-truncated-expert-v1": (0.8, 3.0, 0.0, 50_000, 500_000, 0.5, 0.0, None, 0),
    }
    names = ("expectile", "temperature", "dropout", "offline_steps", "online_steps", "intrinsic_reward_scale",
             "reward_bias", "q_reward_bounds", "retrain_upsample")
    for env_id, want in table.items():
        args = parse("--env-id", env_id)
        assert tuple(getattr(args, name) for name in names) == want, env_id
        assert (args.gamma, args.tau, args.batch_size, args.learning_rate) == (0.99, 0.005, 256, 3e-4)
        assert (args.hidden_dims, args.rnd_hidden_dims, args.rnd_learning_rate) == ((256, 256), (512, 512), 1e-4)
        assert (args.rnd_update_proportion, args.retrain_steps, args.reward_scale) == (0.25, 2_000_000, 1.0)
        assert args.mask_reward == (4.0 if env_id.startswith("kitchen") else None)
    hammer = parse()
    assert (hammer.log_std_min, hammer.retrain_log_std_min) == (-2.0, -5.0)
    assert (hammer.retrain_expectile, hammer.retrain_dropout) == (None, None)  # those of exploration


def test_scale_multiplies_budgets_and_intervals():
    args = parse("--scale", 0.02, "--retrain-at", 1000, 500_000, "--batch-size", 100, "--eval-episodes", 7)
    assert (args.offline_steps, args.online_steps, args.retrain_steps) == (1000, 10_000, 40_000)
    assert args.retrain_at == (20, 10_000)
    assert (args.eval_every, args.log_every, args.checkpoint_every) == (1000, 20, 200)
    assert (args.batch_size, args.eval_episodes, args.truncate_episodes) == (100, 7, 20)  # no budgets
    assert args.scale == 1.0  # applied: the config shows what was run


def test_scale_leaves_at_least_one_step_and_keeps_zero():
    args = parse("--scale", 1e-9, "--offline-steps", 0, "--retrain-at")
    assert (args.offline_steps, args.online_steps, args.log_every, args.retrain_at) == (0, 1, 1, ())


@pytest.mark.parametrize("option", ["--exploit-only", "--eval-only"])
def test_a_source_run_gives_the_defaults(tmp_path, option):
    """Of its settings, as scaled then; not its name, its folder, or what was about that process."""
    words = ["--env-id", "maze2d-missing-data-large-v1", "--scale", 0.01, "--exp-name", "first", "--seed", 4,
             "--retrain-at", 100_000, "--runs-dir", "elsewhere", "--track", "--resume", "--dataset-id", "a/b-v0"]
    folder = source_run(tmp_path, *words)
    args = parse(option, folder, "--retrain-upsample", 3)
    want = parse(*words)
    changes = {option[2:].replace("-", "_"): str(folder), "retrain_upsample": 3, "exp_name": "iql_ooo",
               "runs_dir": "runs", "track": False, "resume": False}
    assert asdict(args) == {**asdict(want), **changes}  # lists of the JSON are tuples again
    assert parse(option, folder, "--scale", 0.5).retrain_at == (500,)


def test_discs():
    def discs(*words):
        return parse("--env-id", "maze2d-missing-data-large-v1", *words).remove_discs

    assert len(discs()) == 3
    assert discs("--remove-discs", 1, 2, 0.5, -3, 4, 1.5) == ((1.0, 2.0, 0.5), (-3.0, 4.0, 1.5))
    assert discs("--remove-discs") == ()


def test_episodes_is_another_name():
    assert parse("--episodes", 3).eval_episodes == parse("--eval-episodes", 3).eval_episodes == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--retrain-at", "600000"], "600000"),
        (["--retrain-at", "0", "5"], "--retrain-at 0"),
        (["--retrain-at", "50000", "40000"], "50000 40000"),
        (["--retrain-at", "40000", "40000"], "40000 40000"),
        (["--scale", "1e-9"], "1 1"),
        (["--retrain-upsample", "257"], "257"),
        (["--intrinsic-reward-scale", "0", "--retrain-frozen-rnd"], "--intrinsic-reward-scale"),
        (["--sync", "--retrain-algorithm", "td3"], "--sync"),
        (["--cudagraphs", "--device", "cpu"], "--cudagraphs"),
        (["--seed", "-1"], "--seed"),
        (["--batch-size", "0"], "--batch-size"),
        (["--log-every", "0"], "--log-every"),
        (["--eval-episodes", "0"], "--eval-episodes"),
        (["--torch-threads", "0"], "--torch-threads"),
        (["--online-steps", "-5", "--retrain-at"], "--online-steps"),
        (["--offline-steps", "-5"], "--offline-steps"),
        (["--retrain-steps", "0"], "--retrain-steps"),
        (["--gamma", "1.0"], "--gamma"),
    ],
)
def test_values_that_cannot_work(words, named, capsys):
    with pytest.raises(SystemExit) as stop:
        ooo.check_args(parse(*words))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err
