"""tools/film.py: what is filmed, from which starts, how large; mazes and a rendered task."""

import io
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import iql_ooo
import pex
import rlpd_ooo
from tools import film

UMAZE, PEN, CPU = "maze2d-missing-data-umaze-v1", "pen-binary-v0", torch.device("cpu")


def make_run(path, env_id, names, script=iql_ooo, run_id="one", source_run_id=None, **settings):
    """A run directory with untrained policies."""
    path.mkdir()
    args = script.Args(**script.TASKS[env_id].settings | {"env_id": env_id, "hidden_dims": (8, 8)} | settings)
    (path / "config.json").write_text(json.dumps({
        "script": script.SCRIPT, "run_id": run_id, "source_run_id": source_run_id, "args": asdict(args),
        "dataset": {"sha256": ""}, "resumed": []}))
    env = script.make_env(env_id)
    agent = iql_ooo.Agent(*env.observation_space.shape, *env.action_space.shape, (8, 8), 1e-3, CPU)
    for name in names:
        script.save_policy(SimpleNamespace(path=path, id=run_id, args=args), agent, name)
    return path


def test_a_maze(tmp_path):
    run = make_run(tmp_path / "run", UMAZE, ("exploration_5.pt", "exploitation_5.pt", "exploration_40.pt",
                                             "exploitation_40.pt"))
    film.main([str(run), "--episodes", "2"])
    with Image.open(run / "film.gif") as picture:
        assert (run / "film.gif").stat().st_size <= film.LIMIT and picture.n_frames > 2 * film.PAUSE
        assert picture.width > 1.5 * picture.height > 300
    _, _, policies = film.open_policies(run)
    assert list(policies) == ["Explorer", "Exploitation policy (OOO)"]


def test_starts_are_far_and_those_of_both_policies():
    env, seeds = iql_ooo.make_env(UMAZE), film.far_starts(iql_ooo, iql_ooo.make_env(UMAZE), 1)
    found = [next(seeds) for _ in range(3)]
    still, away = (SimpleNamespace(act=lambda obs, a=a: np.full(2, a, np.float32)) for a in (0, 1))
    for seed in found:
        assert env.reset(seed=seed)[1]["start_distance"] > 1
        one, other = (film.roll_out(iql_ooo, env, policy, seed, 1) for policy in (still, away))
        assert (one[0][0] == other[0][0]).all() and (one[0][9] != other[0][9]).any()
        assert len(one[0]) == one[2] + 1 == 301 and one[1] is None


def test_a_panel_says_what_happened():
    env = iql_ooo.make_env(UMAZE)
    env.reset(seed=1)
    with film.plt.rc_context(film.STYLE):
        _, ax = film.plt.subplots()
    views = [np.array([k / 100, 0.0]) for k in range(301)]
    panel = film.Panel(ax, env, 0.5, "Explorer", film.EXPLORE, (views, 70, 300, env.goal))
    reached = "goal reached at step 70"
    for step, text, drawn in ((30, "step 30", 30), (70, reached, 70), (250, reached, 70)):
        panel.show(step, 1)
        assert panel.text.get_text() == text and len(panel.line.get_xdata()) == drawn + 1
    film.plt.close("all")


def test_the_explorer_of_a_retraining_is_its_source_s(tmp_path):
    source = make_run(tmp_path / "source", UMAZE, ("exploration_40.pt", "exploitation_40.pt"), run_id="first")
    words = dict(env_id=UMAZE, names=("exploitation_40.pt",), exploit_only=str(source))
    mine = make_run(tmp_path / "mine", run_id="second", source_run_id="first", **words)
    other = make_run(tmp_path / "other", run_id="third", source_run_id="another", **words)
    assert len(film.open_policies(mine)[2]) == 2
    assert list(film.open_policies(other)[2]) == ["Exploitation policy (OOO)"]


def test_a_baseline_has_one_policy(tmp_path):
    run = make_run(tmp_path / "run", UMAZE, ("pretrained.pt", "policy_9.pt"), script=pex)
    assert list(film.open_policies(run)[2]) == ["Policy"]


def test_a_rendered_task(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "no such back end")
    monkeypatch.setattr(film, "FRAMES", 4)
    try:
        film.choose_gl()
    except SystemExit:
        pytest.skip("nothing renders here")
    run = make_run(tmp_path / "run", PEN, ("exploration_5.pt", "exploitation_5.pt"))
    film.main([str(run), "--episodes", "1", "--out", str(tmp_path / "pen.gif")])
    with Image.open(tmp_path / "pen.gif") as picture:
        assert picture.convert("RGB").getextrema() != ((255, 255),) * 3


def test_a_goal_of_the_run_is_in_the_film(monkeypatch):
    made, cheetah = [], "halfcheetah-sparse-v2"
    monkeypatch.setattr(film, "choose_gl", lambda: None)
    script = SimpleNamespace(TASKS={cheetah: rlpd_ooo.TASKS[cheetah]})
    script.make_env = lambda env_id, mode: made.append(script.TASKS[env_id].kwargs["goal_x"]) or 1 / 0
    with pytest.raises(SystemExit):
        film.film(script, SimpleNamespace(env_id=cheetah, goal_x=-0.5), {}, 1)
    assert made == [-0.5]


def test_a_film_is_cut_to_its_limit(monkeypatch):
    pictures = list(np.random.default_rng(0).integers(0, 256, (32, 60, 90, 3), dtype=np.uint8))
    whole = film.gif(pictures)
    monkeypatch.setattr(film, "LIMIT", len(whole) // 3)
    content = film.gif(pictures)
    with Image.open(io.BytesIO(content)) as picture:
        assert len(content) <= film.LIMIT and picture.n_frames == 8 and picture.info["duration"] == 4 * film.DURATION


@pytest.mark.parametrize(("words", "said"), [
    (["nowhere"], "nowhere"), (["empty"], "empty"), (["new"], "exploitation_*.pt"),
    (["run", "--episodes", "0"], "--episodes 0"),
    (["run", "--out", "x.mp4"], "x.mp4"), (["point"], "pointmass_didactic"),
])
def test_bad_input_is_one_line(words, said, in_tmp, capsys):
    (in_tmp / "empty").mkdir()
    make_run(in_tmp / "new", UMAZE, ())
    make_run(in_tmp / "run", UMAZE, ("exploitation_5.pt",))
    (in_tmp / "point").mkdir()
    (in_tmp / "point" / "config.json").write_text('{"script": "pointmass_didactic"}')
    with pytest.raises(SystemExit) as stop:
        film.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert not list(in_tmp.rglob("*.gif"))
