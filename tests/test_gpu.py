"""Compiled and captured updates against eager ones, machines that cannot compile, and the script on a CUDA device.

Most of this needs a GPU and is skipped without one. Compiling for the CPU takes some ten seconds: the update with RND
(and dropout), which holds plain IQL's, is always compared, the others with `--runslow`.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runner import SMALL

import iql_ooo as ooo
import rlpd_ooo

OBS, ACT, HIDDEN, BATCH, UPDATES = 6, 3, (32, 32), 64, 8
PEN = "pen-binary-v0"
MODES = {"compile": ["compile"], "cudagraphs": ["cudagraphs"], "both": ["compile", "cudagraphs"]}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")


def train(device, kind, modes=(), updates=UPDATES, dropout=0.1):
    """Parameters (and RND statistics) after some updates of make_update, each seeded and on the same rows every time.
    kind: iql and td3 (exploitation with bounds, of IQL), rnd (exploration), frozen (exploitation with a frozen RND)."""
    device = torch.device(device)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    args = ooo.Args(hidden_dims=HIDDEN, rnd_hidden_dims=(24, 16), batch_size=BATCH, mask_reward=1.0, dropout=dropout,
                    compile="on" if "compile" in modes else "off", cudagraphs="cudagraphs" in modes,
                    retrain_algorithm="td3" if kind == "td3" else "iql")
    shapes = dict(observations=(OBS,), actions=(ACT,), rewards=(), next_observations=(OBS,), terminations=(),
                  episodes=())
    data = {name: torch.randn(500, *shape).clamp(-0.9, 0.9).numpy() for name, shape in shapes.items()}
    buffer = ooo.ReplayBuffer(data, 0, device)
    exploitation = kind != "rnd"
    agent = ooo.make_agent(args, buffer, device, exploitation)
    rnd = ooo.make_rnd(args, buffer, device) if kind in ("rnd", "frozen") else None
    if kind == "rnd":
        uniform = torch.empty(BATCH, device=device)  # one place in memory, as a CUDA graph needs it; not the device's
        rnd.update = lambda *batch: ooo.RND.update(rnd, *batch, uniform)
    update = ooo.make_update(args, buffer, agent, (-0.09, 0.09), rnd, exploitation)
    generator, losses = torch.Generator().manual_seed(1), []
    for number in range(updates):
        rows = torch.randint(500, (BATCH,), generator=generator).to(device)
        if kind == "rnd":
            uniform.copy_(torch.rand(BATCH, generator=generator))
        torch.manual_seed(number)  # what the update draws itself: dropout, TD3's noise
        losses.append({name: value.item() for name, value in update(buffer.data[rows]).items()})
    state = {**agent.state_dict(), **{f"rnd.{k}": v for k, v in (rnd.state_dict() if rnd else {}).items()}}
    return {name: value.double().cpu() for name, value in state.items()}, losses


def train_rlpd(device, patch, modes=(), updates=UPDATES):
    """The same for updates of three critic steps of RLPD + RND. patch: pytest's monkeypatch; the random numbers lie in
    one place in memory and are the same for every device."""
    device = torch.device(device)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    args = rlpd_ooo.Args(hidden_dims=HIDDEN, rnd_hidden_dims=(24, 16), num_qs=4, intrinsic_reward_scale=0.5,
                         compile="on" if "compile" in modes else "off", cudagraphs="cudagraphs" in modes)
    shapes = dict(observations=(OBS,), actions=(ACT,), rewards=(), next_observations=(OBS,), terminations=(),
                  episodes=())
    data = {name: torch.randn(500, *shape).clamp(-0.9, 0.9).numpy() for name, shape in shapes.items()}
    buffer = rlpd_ooo.ReplayBuffer(data, 0, device)
    agent, rnd = rlpd_ooo.make_agent(args, buffer, device), rlpd_ooo.make_rnd(args, buffer, device)
    uniform = torch.empty(3 * BATCH, device=device)
    rnd.update = lambda *batch: rlpd_ooo.RND.update(rnd, *batch, uniform)
    draw = rlpd_ooo.draw_noise
    noise = {name: value.to(device) for name, value in draw(3, BATCH, ACT, 4, 2, torch.device("cpu")).items()}
    patch.setattr(rlpd_ooo, "draw_noise", lambda *sizes: noise)
    update = rlpd_ooo.make_update(args, buffer, agent, (-0.09, 0.09), rnd, utd_ratio=3)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(updates):
        torch.manual_seed(int(torch.randint(10**6, (), generator=generator)))
        for name, value in draw(3, BATCH, ACT, 4, 2, torch.device("cpu")).items():
            noise[name].copy_(value)
        uniform.copy_(torch.rand(3 * BATCH))
        rows = torch.randint(500, (3 * BATCH,)).to(device)
        losses.append({name: value.item() for name, value in update(buffer.data[rows]).items()})
    patch.setattr(rlpd_ooo, "draw_noise", draw)
    state = {**agent.state_dict(), **{f"rnd.{name}": value for name, value in rnd.state_dict().items()}}
    return {name: value.double().cpu() for name, value in state.items()}, losses


def check_equal(one, other):
    (state, losses), (state_, losses_) = one, other
    assert state.keys() == state_.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, state_[name], rtol=1e-4, atol=3e-5, msg=lambda text, n=name: f"{n}: {text}")
    for step, (a, b) in enumerate(zip(losses, losses_, strict=True)):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5), step


@needs_compiler
@pytest.mark.parametrize("kind", ["rnd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("iql", "td3", "frozen"))])
def test_compiled_update_equals_eager_over_300_updates_on_the_cpu(kind):
    """An array may differ by 1e-5 of its largest entry, a loss by 1e-5 of its largest value (TD3: 1e-4). Seen after 300
    updates: 1e-6 (TD3: 3e-5). Draws are the same. The whole update is one graph."""
    torch._dynamo.utils.counters.clear()
    (state, losses), (state_, losses_) = train("cpu", kind, ["compile"], 300), train("cpu", kind, updates=300)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert state.keys() == state_.keys() and losses[0].keys() == losses_[0].keys()
    pairs = {name: (value, state_[name]) for name, value in state.items()}
    pairs |= {name: [torch.tensor([record[name] for record in run]) for run in (losses, losses_)] for name in losses[0]}
    for name, (compiled, eager) in pairs.items():
        error = (compiled - eager).abs().max() / eager.abs().max().clamp(min=1e-9)
        assert error <= (1e-4 if kind == "td3" else 1e-5), (name, error)
    start = train("cpu", kind, updates=0)[0]
    moved = {name for name, value in state_.items() if not torch.equal(value, start[name])}
    assert {name.split(".")[0] for name in moved} >= {"actor", "critic", "critic_target"}


TRY = """
import sys
sys.path.insert(0, {root!r})
import iql_ooo as ooo
for compile in ("auto", "on"):
    args = ooo.Args(compile=compile, offline_steps=20_000)
    ooo.setup_torch(args)
    print(compile, "became", args.compile, flush=True)
"""
NO_OPENMP = """#!/bin/sh
case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac
exec {compiler} "$@"
"""


@pytest.mark.parametrize("compiler", ["none", pytest.param("without OpenMP", marks=needs_compiler)])
def test_what_cannot_compile_goes_on_eager(tmp_path, compiler):
    """--compile auto never ends a run; --compile on says in one line why it cannot be."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if compiler == "none":
        env["CXX"] = "/bin/false"
    else:  # as on macOS and slim images
        (tmp_path / "g++").write_text(NO_OPENMP.format(compiler=shutil.which("g++") or shutil.which("c++")))
        (tmp_path / "g++").chmod(0o755)
        env |= {"PATH": f"{tmp_path}:{env['PATH']}", "CXX": str(tmp_path / "g++")}
    child = subprocess.run([sys.executable, "-c", TRY.format(root=str(ROOT))], env=env, capture_output=True, text=True,
                           timeout=240)
    said = child.stdout.splitlines()
    assert len(said) == 3 and said[0].startswith("torch.compile does not work here, going on without it"), child
    assert said[1].startswith("--compile auto: off") and said[2] == "auto became off"
    last = child.stderr.splitlines()[-1]
    assert child.returncode == 2 and last.startswith("error: --compile on: ") and "Traceback" not in child.stderr


@pytest.mark.slow
@needs_compiler
def test_compiled_rlpd_equals_eager_on_the_cpu(monkeypatch):
    """The critic step, which is called three times, and the one of actor and alpha."""
    check_equal(train_rlpd("cpu", monkeypatch, ["compile"], 3), train_rlpd("cpu", monkeypatch, updates=3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_rlpd_equal_eager(mode, monkeypatch):
    check_equal(train_rlpd("cuda", monkeypatch, MODES[mode]), train_rlpd("cuda", monkeypatch))


@pytest.mark.gpu
@needs_gpu
def test_rlpd_on_gpu_equals_cpu(monkeypatch):
    check_equal(train_rlpd("cuda", monkeypatch), train_rlpd("cpu", monkeypatch))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["iql", "rnd", "td3", "frozen"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_eager(mode, kind):
    """With the random numbers of the eager update, inside a CUDA graph too."""
    check_equal(train("cuda", kind, MODES[mode]), train("cuda", kind))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["iql", "rnd"])
def test_gpu_equals_cpu(kind):
    """RND's loss is taken over chosen rows on the CPU and over masked rows on the GPU. Devices draw differently."""
    check_equal(train("cuda", kind, dropout=0.0), train("cpu", kind, dropout=0.0))


def finish(box, *words, resume=False):
    words = ["--env-id", PEN, *SMALL, "--device", "cuda", *words, *["--resume"] * resume]
    child = box.run(*words, fresh=True, timeout=500)
    assert child.code == 0, child.err
    run = box.work / "runs" / f"{PEN}__iql_ooo__1"
    policy = torch.load(run / "exploitation_130.pt", weights_only=True, map_location="cpu")["agent"]
    return [(run / name).read_bytes() for name in ("metrics.jsonl", "evals.jsonl", "replay.bin")], policy


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", [(), ("--cudagraphs",), ("--compile", "on"), ("--sync", "--cudagraphs")], ids=" ".join)
def test_run_and_resume(tiny, tmp_path, mode):
    """All phases on the GPU; killed in the middle of the online phase, it ends with the same numbers."""
    from runner import Box

    tiny(PEN)
    once = finish(Box(tmp_path / "once"), *mode)
    box = Box(tmp_path / "killed")
    child = box.start("--env-id", PEN, *SMALL, "--device", "cuda", *mode, fresh=True)
    while not any(path.stat().st_size for path in box.work.glob("runs/*/replay.bin")):
        assert child.poll() is None, child.err
    child.stop()
    assert child.wait().code in (-signal.SIGKILL, 0)
    records, policy = finish(box, *mode, resume=True)
    if not mode:  # a captured or compiled update is not the same after a new start
        assert records == once[0]
        assert all(torch.equal(value, once[1][name]) for name, value in policy.items())
