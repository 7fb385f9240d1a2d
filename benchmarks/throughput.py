"""Time of one update of each script, eager and compiled, in turn in one process.

    python benchmarks/throughput.py                                          # all six scripts
    python benchmarks/throughput.py --scripts iql_ooo --beside ../before     # and the scripts of another checkout
    python benchmarks/throughput.py --scripts iql_ooo --d3rlpy-python benchmarks/.venv/bin/python
    python benchmarks/throughput.py --device cuda --cudagraphs

An update is what a loop of the script does between two steps: seed, sample a batch, update. Sizes are those of the
script's default task; data are random numbers. A short chunk of every row in turn, round after round, so that a noisy
machine disturbs all alike.
"""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import which
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("iql_ooo", "calql_ooo", "rlpd_ooo", "td3_rnd", "pex", "pointmass_didactic")
CHUNK = 0.1  # seconds
ROWS = 50_000  # of offline data, and as many online


@dataclass
class Args:
    scripts: tuple[Literal[SCRIPTS], ...] = SCRIPTS  # which to measure
    beside: str = ""  # another checkout, whose scripts of the same names are measured in the same turns
    rounds: int = 40  # chunks of each row
    threads: int = 1  # CPU threads of torch
    device: str = "auto"  # auto, cpu or cuda
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    compile: bool = True  # measure compiled updates too
    cudagraphs: bool = False  # replay the compiled updates as CUDA graphs (cuda only)
    d3rlpy_python: str = ""  # Python of an environment that has d3rlpy: its IQL, at iql_ooo.py's sizes
    out: str = ""  # JSON file for the results


@dataclass
class Row:
    script: str
    update: str
    how: str  # eager or compiled, and of which checkout
    chunk: object  # chunk(n) does it n times and returns the seconds that took
    start: float = 0.0  # seconds of the first two calls
    n: int = 1
    times: list = field(default_factory=list)  # seconds for one, of every chunk


def load(folder, name):
    """A script as a module of its own, whatever else of that name is loaded."""
    spec = importlib.util.spec_from_file_location(f"{name}_{abs(hash(folder))}", Path(folder) / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_buffer(script, args, device):
    """A replay buffer of the task's sizes, full of random numbers."""
    env = script.make_env(args.env_id)
    obs, action = env.observation_space.shape, env.action_space.shape
    shapes = dict(observations=obs, actions=action, rewards=(), next_observations=obs, terminations=(), episodes=())
    shapes |= {"lower_bounds": ()} if script.SCRIPT == "calql_ooo" else {}
    data = {name: np.zeros((ROWS, *shape), np.float32) for name, shape in shapes.items()}
    buffer = script.ReplayBuffer(data, ROWS, device)
    buffer.data.normal_().clamp_(-1, 1)
    buffer.split(buffer.data)["terminations"].zero_()
    buffer.size = 2 * ROWS
    return buffer


def updates(script, args, device):
    """(name, update, sample) of the updates that the script's phases make."""
    name, batch = script.SCRIPT, getattr(args, "batch_size", 0)
    if name == "pointmass_didactic":
        data, _ = script.load_dataset(args)
        buffer = script.ReplayBuffer(data, 0, device)
        draws = torch.rand(len(data), batch, dtype=torch.float64, device=device)
        for label, role, own in (("IQL + count", "explore", args), ("IQL", "retrain", script.exploitation_args(args))):
            update = script.make_update(own, buffer, script.Agents(own, role, device), role == "explore")
            yield f"{label}, {args.num_seeds} seeds", update, lambda draws=draws: buffer.sample(draws)
        return
    buffer = random_buffer(script, args, device)

    def uniform():
        return buffer.sample(batch)

    rnd = script.RND(buffer.obs_dim, args.rnd_hidden_dims, args.rnd_learning_rate, device) if name != "pex" else None
    sizes = (buffer.obs_dim, buffer.act_dim, args.hidden_dims, args.learning_rate, device)
    if name == "iql_ooo":
        agent = script.make_agent(args, buffer, device)
        yield "IQL + RND", script.make_update(args, buffer, agent, args.q_reward_bounds, rnd), uniform
        agent = script.make_agent(args, buffer, device, True)
        yield "IQL", script.make_update(args, buffer, agent, (-1.0, 1.0), exploitation=True), uniform
    elif name == "calql_ooo":
        agent = script.make_agent(args, buffer, device)
        yield "Cal-QL + RND", script.make_update(args, buffer, agent, rnd), (
            lambda: script.mixed_rows(buffer, buffer.size, batch, args.offline_ratio))
        agent = script.make_agent(args, buffer, device, True)
        yield "CQL", script.make_update(args, buffer, agent, exploitation=True), (
            lambda: script.mixed_rows(buffer, buffer.size, batch, args.retrain_offline_ratio))
    elif name == "rlpd_ooo":
        agent = script.make_agent(args, buffer, device)
        update = script.make_update(args, buffer, agent, None, rnd, args.utd_ratio)
        yield f"RLPD + RND, {args.utd_ratio} minibatches", update, (
            lambda: script.sample_symmetric(buffer, args.utd_ratio, batch, 0.5))
        agent = script.make_agent(args, buffer, device, True)
        yield "SAC", script.make_update(args, buffer, agent, (-1.0, 1.0)), uniform
    elif name == "td3_rnd":
        yield "TD3 + RND", script.make_update(args, buffer, script.Agent(*sizes), rnd), uniform
    else:
        yield "IQL", script.make_update(args, buffer, script.Agent(*sizes)), uniform
        agent = script.PEXAgent(*sizes, args.log_std_min, args.inv_temperature, args.epsilon)
        yield "PEX", script.make_update(args, buffer, agent), uniform


def script_rows(folder, name, args):
    """Rows of a script, eager and compiled."""
    script, other = load(folder, name), " (other)" if folder != ROOT else ""
    settings = script.parse_args(["--compile", "off", "--device", args.device])
    device = script.setup_torch(settings)
    for how in ("eager", "compiled")[: 1 + args.compile]:
        own = replace(settings, compile="on" if how == "compiled" else "off",
                      cudagraphs=args.cudagraphs and how == "compiled")
        for label, update, sample in updates(script, own, device):
            yield Row(name, label, how + other, timed(script, update, sample, device))


def timed(script, update, sample, device):
    """chunk(n) of a Row."""
    wait, step = torch.cuda.synchronize if device.type == "cuda" else lambda: None, 0

    def chunk(n):
        nonlocal step
        wait()
        start = time.perf_counter()
        for _ in range(n):
            torch.default_generator.manual_seed(script.derive_seed(1, "benchmark", step))
            update(sample())
            step += 1
        wait()
        return time.perf_counter() - start

    return chunk


def d3rlpy_rows(args):
    """d3rlpy_iql.py in its own Python, waiting for orders."""
    python, script = args.d3rlpy_python, load(ROOT, "iql_ooo")
    if not which(python) or subprocess.run([python, "-c", "import d3rlpy"], capture_output=True).returncode:
        sys.exit(f"error: --d3rlpy-python: {python} cannot import d3rlpy; see benchmarks/README.md")
    settings = script.parse_args(["--device", args.device])
    env = script.make_env(settings.env_id)
    job = asdict(settings) | dict(obs_dim=env.observation_space.shape[0], act_dim=env.action_space.shape[0],
                                  threads=args.threads, precision=args.matmul_precision, cpu_time=False,
                                  device="cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    command = [python, Path(__file__).with_name("d3rlpy_iql.py"), json.dumps(job)]
    child = subprocess.Popen(command, text=True, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
    print(f"d3rlpy: {child.stdout.readline().strip()}")

    def chunk(row, n):
        print(json.dumps({"row": row, "n": n}), file=child.stdin, flush=True)
        return json.loads(child.stdout.readline())["seconds"]

    for row in ("update", "sampling and update"):
        yield Row("d3rlpy", f"IQL: {row}", "eager", lambda n, row=row: chunk(row, n))


def report(rows, names):
    """A Markdown table: an update a line, ms as median (best), and the seconds to compile."""
    print(f"\n| script | update | {' | '.join(names)} | to compile |\n|---|---|{'---:|' * (len(names) + 1)}")
    for script, update in dict.fromkeys((row.script, row.update) for row in rows):
        found = {row.how: row for row in rows if (row.script, row.update) == (script, update)}
        cells = [f"{1e3 * median(found[how].times):.2f} ({1e3 * min(found[how].times):.2f})" if how in found else ""
                 for how in names]
        start = f"{found['compiled'].start:.0f} s" if "compiled" in found else ""
        print(f"| `{script}` | {update} | {' | '.join(cells)} | {start} |", flush=True)


def main(args):
    if args.out and not Path(args.out).parent.is_dir():
        sys.exit(f"error: --out {args.out}: there is no such folder")
    rows, folders = [], [ROOT, *([Path(args.beside)] if args.beside else [])]
    for name in args.scripts:
        turn = [row for folder in folders for row in script_rows(folder, name, args)]
        if name == "iql_ooo" and args.d3rlpy_python:
            turn += d3rlpy_rows(args)
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision(args.matmul_precision)
        for row in turn:
            row.start = row.chunk(2)
            row.chunk(5)  # with --cudagraphs the fourth call captures
            row.n = max(1, round(CHUNK / max(row.chunk(2) / 2, 1e-5)))
        print(f"{name}: {len(turn)} rows are compiled, measuring", flush=True)
        for _ in range(args.rounds):
            for row in turn:
                row.times.append(row.chunk(row.n) / row.n)
        rows += turn
        report(turn, list(dict.fromkeys(row.how for row in turn)))
    if args.out:
        script = load(ROOT, args.scripts[0])
        where = script.provenance(torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"))
        results = [{"script": r.script, "update": r.update, "how": r.how, "start_seconds": r.start,
                    "median_ms": 1e3 * median(r.times), "best_ms": 1e3 * min(r.times)} for r in rows]
        content = where | {"script_sha256": None, "rounds": args.rounds, "rows": results}
        Path(args.out).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
