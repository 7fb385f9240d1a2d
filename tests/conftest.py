"""Shared by all tests: importable scripts, no network, a store of tiny datasets, a folder to run a script in."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there: no test downloads anything


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; --runslow runs it"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(env_id) makes the task's datasets in this session's Minari store (tiny.path)."""
    from tiny_data import TinyData

    data = TinyData(tmp_path_factory.mktemp("minari"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(data.path))
        yield data


@pytest.fixture
def box(tmp_path):
    """A folder with a copy of iql_ooo.py, to run it as a process of its own."""
    from runner import Box

    box = Box(tmp_path)
    yield box
    box.stop()


@pytest.fixture(scope="module")
def module_box(tmp_path_factory):
    """The same, shared by the tests of a file."""
    from runner import Box

    box = Box(tmp_path_factory.mktemp("box"))
    yield box
    box.stop()


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The test runs in an empty folder, for runs of the script inside this process."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """{script: directory of a small finished run of it}."""
    from runner import Box

    sizes = ("--hidden-dims 16 16 --batch-size 16 --eval-episodes 2 --final-episodes 2 --eval-every 50 --log-every 25 "
             "--checkpoint-every 50")
    ooo = f"{sizes} --rnd-hidden-dims 16 16 --online-steps 200 --retrain-at 100 200 --retrain-steps 60"
    words = {
        "iql_ooo": f"--env-id maze2d-missing-data-large-v1 {ooo} --offline-steps 60",
        "calql_ooo": f"--env-id pen-binary-v0 {ooo} --offline-steps 60 --critic-hidden-dims 16 16",
        "rlpd_ooo": f"--env-id halfcheetah-sparse-v2 {ooo} --learning-starts 50 --num-qs 2 --utd-ratio 1",
        "td3_rnd": f"--env-id pen-binary-v0 {sizes} --rnd-hidden-dims 16 16 --online-steps 200 --save-at 200",
        "pex": f"--env-id maze2d-missing-data-large-v1 {sizes} --offline-steps 60 --learning-starts 50 "
               "--online-steps 200 --save-at 200",
        "pointmass_didactic": "--num-seeds 2 --offline-episodes 5 --offline-steps 40 --online-steps 60 "
                              "--retrain-steps 40 --eval-every 20 --eval-episodes 5 --log-every 20",
    }
    paths = {}
    for env_id in ("maze2d-missing-data-large-v1", "pen-binary-v0"):
        tiny(env_id)
    for script, line in words.items():
        box = Box(tmp_path_factory.mktemp(script), f"{script}.py")
        child = box.run(*line.split())
        assert child.code == 0, child.err
        paths[script], = (box.work / "runs").iterdir()
        box.stop()
    return paths
