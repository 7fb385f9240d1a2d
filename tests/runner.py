"""Runs a copy of the script as a process of its own, in a folder that holds nothing else.

Starting Python and importing torch costs seconds each time. So most tests fork the process from a server that has
imported the packages (never the script): the child executes the copied file as `__main__`, with its own working
directory, output files, exit status and signals. `fresh=True` starts a new interpreter instead.
"""

import builtins
import errno
import functools
import io
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["torch", "torch._dynamo", "numpy", "gymnasium", "gymnasium_robotics", "mujoco", "minari", "h5py", "tyro",
            "tqdm", "pydantic", "huggingface_hub.constants"]

# Networks and budgets that take about a second; episodes of pen-binary-v0 have 100 steps.
SMALL = """--hidden-dims 16 16 --rnd-hidden-dims 16 16 --batch-size 16 --eval-episodes 1 --final-episodes 1
--eval-every 10000 --log-every 20 --checkpoint-every 10 --offline-steps 30 --online-steps 130 --retrain-at 70 130
--retrain-steps 30""".split()


class Box:
    """A folder with a copy of one script, where it can be run many times."""

    def __init__(self, folder, script="iql_ooo.py"):
        self.script, self.work, self.logs = script, Path(folder) / "work", Path(folder) / "logs"
        self.work.mkdir(parents=True)
        self.logs.mkdir()
        shutil.copy(ROOT / script, self.work)
        self.started = []

    def start(self, *args, fresh=False, env=None, file_limit=None, signal_at=None, limit_of=None):
        """Start `python SCRIPT ARGS` and return a Child. file_limit: largest size of a file that it may write, in
        bytes. signal_at: (signal, audit event, end of a path, n): it is sent the signal just before it does that for
        the nth time; a SIGKILL at a moment that can be repeated. limit_of: (end of a path, size): the disk is full when
        that file has this many bytes, of which the last write takes what fits, as a file system does."""
        child = Child(self, [str(arg) for arg in args], fresh, env or {}, file_limit, signal_at, limit_of)
        self.started.append(child)
        return child

    def run(self, *args, timeout=240, **options):
        """Run to the end; returns the Child, with code, out and err."""
        return self.start(*args, **options).wait(timeout)

    def files(self):
        """Paths of all files and folders that the script has written."""
        found = (path.relative_to(self.work).as_posix() for path in self.work.rglob("*"))
        return sorted(path for path in found if path != self.script)

    def stop(self):
        for child in self.started:
            child.stop()


class Child:
    def __init__(self, box, args, fresh, env, file_limit, signal_at, limit_of):
        number = len(box.started)
        self.paths = [box.logs / f"{number}.{name}" for name in ("out", "err")]
        self.fresh, self.code = fresh, None
        if fresh:
            assert file_limit is None and signal_at is None
            out, err = (open(path, "wb") for path in self.paths)
            with out, err:
                self.process = subprocess.Popen([sys.executable, box.script, *args], cwd=box.work,
                                                stdout=out, stderr=err, env={**os.environ, **env})
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PACKAGES)
            env = {**{k: v for k, v in os.environ.items() if k.startswith("MINARI")}, **env}
            work = (box.work, box.script, args, self.paths, env, file_limit, signal_at, limit_of)
            self.process = context.Process(target=run_as_main, args=work)
            self.process.start()
        self.pid = self.process.pid

    def poll(self):
        """Exit status, negative for a signal, or None while it runs."""
        return self.process.poll() if self.fresh else self.process.exitcode

    def wait(self, timeout=240):
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"still running after {timeout} s: {self.err}"
            time.sleep(0.01)
        self.code = self.poll()
        return self

    def stop(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def out(self):
        return self.paths[0].read_text()

    @property
    def err(self):
        return self.paths[1].read_text()


def run_as_main(folder, script, args, paths, env, file_limit, signal_at, limit_of):
    """In the forked child: what `cd FOLDER && python SCRIPT ARGS >OUT 2>ERR` does."""
    for path, descriptor in zip(paths, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.chdir(folder)
    os.environ.update(env)
    sys.argv = [script, *args]
    # Nothing of the repository but its .venv: a script stands alone.
    packages = [path for path in sys.path if path and (Path(path).is_relative_to(sys.prefix)
                                                       or not Path(path).resolve().is_relative_to(ROOT))]
    sys.path[:] = [str(folder), *packages]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if signal_at is not None:
        sys.addaudithook(Signaller(*signal_at))
    if limit_of is not None:
        builtins.open = io.open = functools.partial(limited_open, builtins.open, *limit_of)
    runpy.run_path(script, run_name="__main__")


class LimitedFile(io.FileIO):
    def write(self, data):
        room = self.limit - os.fstat(self.fileno()).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(data[:room])


def limited_open(plain, end, limit, path, mode="r", *args, **options):
    if not (mode == "ab" and os.fspath(path).endswith(end)):
        return plain(path, mode, *args, **options)
    file = LimitedFile(path, "ab")
    file.limit = limit
    return file


class Signaller:
    """An audit hook; the events are those of Python's documentation, e.g. open and os.rename (os.replace too)."""

    def __init__(self, number, event, path, times):
        self.number, self.event, self.path, self.left = number, event, path, times

    def __call__(self, event, args):
        if event != self.event or not args:
            return
        path = args[1] if event == "os.rename" else args[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(self.path):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
