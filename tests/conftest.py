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
