"""Arguments: precedence of defaults, task rows, source runs and the command line; --scale; values that cannot be."""

import json
import typing
from dataclasses import asdict
from pathlib import Path

import pytest

import iql_ooo as ooo


def parse(*words):
    return ooo.parse_args([str(word) for word in words])


def source_run(tmp_path, *words, **changes):
    """A run directory with nothing but its config."""
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    config = {"script": "iql_ooo", "run_id": "0" * 16, "source_run_id": None,
              "args": asdict(parse(*words)) | changes, "versions": {}, "dataset": {"sha256": "0" * 64}, "resumed": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(capsys, *words):
    """One line and status 2; returns the line. parse_args writes nothing: see the fixture."""
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out, (err, out)
    return err


@pytest.fixture(autouse=True)
def nothing_is_written(in_tmp):
    yield
    assert {path.name for path in in_tmp.rglob("*")} <= {"source", "config.json"}


def test_precedence():
    assert parse("--env-id", "kitchen-mixed-v0").temperature == 0.5  # the task's row
    assert parse("--env-id", "kitchen-mixed-v0").expectile == 0.7  # Args
    assert parse("--env-id", "kitchen-mixed-v0", "--temperature", 2).temperature == 2.0  # the command line
    assert parse().env_id == "hammer-truncated-expert-v1"


@pytest.mark.parametrize("env_id", ooo.TASKS)
def test_task_rows(env_id):
    args = asdict(parse("--env-id", env_id))
    want = {**asdict(ooo.Args()), **ooo.TASKS[env_id].settings, "env_id": env_id}
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
    assert (args.batch_size, args.truncate_episodes) == (100, 20)  # no budgets
    assert (args.eval_episodes, args.final_episodes) == (5, 5)  # these shrink, to 5 at least
    assert parse("--scale", 3, "--eval-episodes", 2).eval_episodes == 2  # and are never raised
    assert args.scale == 1.0  # applied: the config shows what was run


def test_scale_leaves_at_least_one_step_and_keeps_zero():
    args = parse("--scale", 1e-9, "--offline-steps", 0, "--retrain-at")
    assert (args.offline_steps, args.online_steps, args.log_every, args.retrain_at) == (0, 1, 1, ())


@pytest.mark.parametrize("option", ["--exploit-only", "--eval-only"])
def test_a_source_run_gives_the_defaults(tmp_path, option):
    """Of its settings, as scaled then; not its name, its folder, or what was about that process."""
    words = ["--env-id", "maze2d-missing-data-large-v1", "--scale", 0.01, "--exp-name", "first", "--seed", 4,
             "--retrain-at", 100_000, "--runs-dir", "elsewhere", "--track", "--resume", "--dataset-id", "a/b-v0",
             "--device", "cuda:3", "--torch-threads", 5]
    folder = source_run(tmp_path, *words)
    args = parse(option, folder, "--retrain-upsample", 3)
    want = parse(*words)
    changes = {option[2:].replace("-", "_"): str(folder), "retrain_upsample": 3, "exp_name": "iql_ooo",
               "runs_dir": "runs", "track": False, "resume": False, "device": "auto", "torch_threads": 1}
    assert asdict(args) == {**asdict(want), **changes}  # lists of the JSON are tuples again
    assert parse(option, folder, "--scale", 0.5).retrain_at == (1000,)  # the source's times stay


def test_discs():
    def discs(*words):
        return parse("--env-id", "maze2d-missing-data-large-v1", *words).remove_discs

    assert len(discs()) == 3
    assert discs("--remove-discs", 1, 2, 0.5, -3, 4, 1.5) == ((1.0, 2.0, 0.5), (-3.0, 4.0, 1.5))
    assert discs("--remove-discs") == ()


def test_episodes_is_another_name():
    assert parse("--episodes", 3).eval_episodes == parse("--eval-episodes", 3).eval_episodes == 3


# === what cannot be ===


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--retrain-at", "600000"], "600000"),
        (["--retrain-at", "50000", "40000"], "--retrain-at must rise"),
        (["--retrain-at", "40000", "40000"], "--retrain-at must rise"),
        (["--scale", "1e-9"], "--retrain-at must rise"),
        (["--retrain-upsample", "257"], "--batch-size"),
        (["--q-reward-bounds", "1", "-1"], "--q-reward-bounds"),
        (["--intrinsic-reward-scale", "0", "--retrain-frozen-rnd"], "--intrinsic-reward-scale"),
        (["--retrain-frozen-rnd", "--offline-steps", "0", "--retrain-at", "0", "10"], "--offline-steps"),
        (["--truncate-episodes", "0", "--no-bootstrap-at-cut"], "--truncate-episodes"),
        (["--sync", "--retrain-algorithm", "td3"], "--sync"),
        (["--dataset-id", "a/b-v0", "--dataset-path", "x.npz"], "not both"),
        (["--eval-only", "source", "--exploit-only", "source"], "not both"),
        (["--exploit-only", "source", "--retrain-at"], "--retrain-at"),
        (["--exploit-only", "source", "--sync"], "--sync"),
        (["--exploit-only", "source", "--env-id", "pen-binary-v0"], "--env-id"),
        (["--eval-only", "source", "--env-id", "pen-binary-v0"], "--env-id"),
        (["--eval-only", "elsewhere"], "elsewhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_exclude_each_other(tmp_path, capsys, words, named):
    source_run(tmp_path)
    assert named in refused(capsys, *words)


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "a/b", "/x", "~", "-x", "a b", "a\nb", "x\n", "x" * 101])
def test_a_name_is_one_part_of_a_path(capsys, name):
    assert "--exp-name" in refused(capsys, f"--exp-name={name}")


def test_usual_names():
    for name in ("x", "ooo_td3", "lr=1e-3,tau=0.02", "v1.2", "été", "x" * 100, "é" * 50):
        assert parse("--exp-name", name).exp_name == name


# === ranges ===


@pytest.mark.parametrize(("option", "wrong"), [
    ("--seed", "-1"), ("--offline-steps", "-1"), ("--online-steps", "1.5"), ("--retrain-steps", "0"),
    ("--updates-per-step", "0"), ("--batch-size", "0"), ("--gamma", "1"), ("--gamma", "nan"), ("--tau", "0"),
    ("--expectile", "1"), ("--temperature", "inf"), ("--dropout", "1"), ("--log-std-min", "3"), ("--scale", "0"),
    ("--learning-rate", "2"), ("--hidden-dims", "0"), ("--final-episodes", "0"), ("--torch-threads", "0")])
@pytest.mark.parametrize("mode", [(), ("--eval-only", "source"), ("--exploit-only", "source")], ids=" ".join)
def test_a_number_outside_its_range(tmp_path, capsys, option, wrong, mode):
    """The line names the option and the value."""
    source_run(tmp_path)
    line = refused(capsys, *mode, option, wrong)
    assert option in line and wrong in line


def test_two_wrong_settings_are_one_line(capsys):
    line = refused(capsys, "--hidden-dims", 0, 0)
    assert "--hidden-dims" in line and "http" not in line


def test_a_config_with_a_number_outside_its_range(tmp_path, capsys):
    for name, x in (("gamma", 1.0), ("retrain_at", [200, "--device=meta"]), ("hidden_dims", [0]), ("batch_size", -1)):
        assert "source/config.json" in refused(capsys, "--eval-only", source_run(tmp_path, **{name: x}))


# === configs ===


def test_a_config_with_a_value_of_another_kind(tmp_path, capsys):
    """Text for a list, a list for a number, a choice that there is not: one line that names the file."""
    wrong = (None, "text", [], [["x"]], [1, 2, 3], {"a": 1}, 1.5)
    hints = typing.get_type_hints(ooo.Args)
    taken = set(ooo.PROCESS_SETTINGS) | {"exp_name", "eval_only", "exploit_only"}  # not from the source
    names = [name for name in hints if name not in taken and "str" not in str(hints[name])]
    assert len(names) > 40
    for number, name in enumerate(names):
        hint, option = str(hints[name]), ("--eval-only", "--exploit-only")[number % 2]
        could_be = {0: "None" in hint or "Optional" in hint, 2: "..." in hint, 4: "..." in hint, 6: "float" in hint}
        x = wrong[next(i % 7 for i in range(number, number + 7) if not could_be.get(i % 7))]
        if "bool" in hint:  # pydantic takes 1.0 and "yes" for a bool, nothing else
            x = "text"
        assert "source/config.json" in refused(capsys, option, source_run(tmp_path, **{name: x})), (name, x)


@pytest.mark.parametrize("change", [
    {"script": "td3_rnd"}, {"script": None}, {"args": 3}, {"args": {}}, {"run_id": None}, {"dataset": None},
    {"dataset": {}}, {"resumed": None}], ids=str)
@pytest.mark.parametrize("option", ["--eval-only", "--exploit-only"])
def test_a_config_that_is_none(tmp_path, capsys, option, change):
    """An entry of another kind, or (None) a missing one."""
    path = source_run(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    assert "source" in refused(capsys, option, "source")


def test_a_setting_of_another_version(tmp_path, capsys):
    assert "no_such_setting" in refused(capsys, "--eval-only", source_run(tmp_path, no_such_setting=1))
    path = Path("source/config.json")
    config = json.loads(path.read_text())
    del config["args"]["no_such_setting"], config["args"]["gamma"]
    path.write_text(json.dumps(config))
    assert "gamma" in refused(capsys, "--exploit-only", "source")
