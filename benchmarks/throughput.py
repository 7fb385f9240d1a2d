"""Speed of a script at a task's real sizes, beside the bare matrix products of one update and beside d3rlpy's IQL.

    python benchmarks/throughput.py --compile on --d3rlpy-python benchmarks/.venv/bin/python --out throughput.json
    python benchmarks/throughput.py --device cuda --compile on --cudagraphs
    python benchmarks/throughput.py --script rlpd_ooo --compile on                   # halfcheetah
    python benchmarks/throughput.py --script calql_ooo --env-id pen-binary-v0

All rows are measured in turns, a short chunk of each, round after round, so that a noisy machine disturbs all alike.
"x floor" is a row's time divided by its floor's: the median over the rounds, and the best chunk by the best chunk.
--compile on also times the start of each compiled update, and says from how many updates on it pays.
"""

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import which
from statistics import median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CHUNK = 0.1  # seconds
START = 20  # updates after which nothing is compiled any more
OFFLINE, ONLINE = 100_000, 500_000  # rows of the buffer, as hammer at the end
EXACT = 1e-6  # largest relative error of a product that still counts as float32


@dataclass
class Args:
    script: Literal["iql_ooo", "calql_ooo", "rlpd_ooo"] = "iql_ooo"
    env_id: str = ""  # gives sizes, settings and environment (default: the script's)
    seconds: float = 20.0  # measuring time of each row
    threads: int = 1  # CPU threads of torch
    device: str = "auto"  # auto, cpu or cuda
    compile: Literal["on", "off"] = "off"  # on: also measure the updates under torch.compile
    cudagraphs: bool = False  # also measure the updates as CUDA graphs (cuda only)
    d3rlpy_python: str = ""  # Python of an environment that has d3rlpy; without it those rows are left out
    cpu_time: bool = False  # count processor time: a rough look on a busy machine (one thread, no GPU)
    rows: str = ""  # measure only rows with this text in their name, and the floors
    out: str = ""  # JSON file for the results


@dataclass
class Row:
    name: str
    chunk: object  # chunk(n) does it n times and returns the seconds that took
    flops: int = 0  # of the matrix products in one
    floor: str = ""  # name of the row to compare with
    start: float = 0.0  # seconds of the first updates, of a compiled row
    n: int = 1
    times: list = field(default_factory=list)  # seconds for one, of every chunk


# === the floor: the matrix products of one update and nothing else ===
class Products:
    """Matrix products as (out, a, b), with operands and outputs that exist once for each tensor of the update."""

    def __init__(self, device):
        self.list, self.device = [], device

    @classmethod
    def iql(cls, s, rnd):
        """The products of one IQL update of session s, and with rnd also those of RND."""
        self, args, batch = cls(s.device), s.args, s.args.batch_size
        critic_dims, value_dims = (s.obs_dim + s.act_dim, *args.hidden_dims, 1), (s.obs_dim, *args.hidden_dims, 1)
        value = self.weights(value_dims)
        if rnd:
            self.rnd(s, batch)
        self.passes(self.weights(critic_dims, members=2), batch)  # target critic: one pass for V and policy
        self.passes(value, batch, backward=True)  # V(s), its loss
        self.passes(value, 2 * batch)  # the new V of s' and s, for Q's target and the advantage
        self.passes(self.weights(critic_dims, members=2), batch, backward=True)  # Q(s, a), its loss
        self.passes(self.weights((s.obs_dim, *args.hidden_dims, s.act_dim)), batch, backward=True)  # policy, its loss
        return self

    @classmethod
    def sac(cls, s, num_qs, utd_ratio, batch, rnd):
        """The same for a SAC update of utd_ratio critic steps on `batch` rows each; targets take num_min_qs critics."""
        self, args = cls(s.device), s.args
        critic_dims = (s.obs_dim + s.act_dim, *args.hidden_dims, 1)
        actor, critic = self.weights((s.obs_dim, *args.hidden_dims, 2 * s.act_dim)), self.weights(critic_dims, num_qs)
        if rnd:
            self.rnd(s, utd_ratio * batch)
        self.passes(actor, utd_ratio * batch)  # next actions
        step = cls(s.device)
        step.passes(self.weights(critic_dims, args.num_min_qs), batch)  # target critics
        step.passes(critic, batch, backward=True)  # Q(s, a), its loss
        self.list += utd_ratio * step.list
        self.passes(actor, batch, backward=True)
        self.passes(critic, batch, inputs=True)  # Q of the policy's actions, and its gradient
        return self

    @classmethod
    def calql(cls, s, rnd):
        """The products of one Cal-QL (rnd=False: CQL) update."""
        self, args, batch = cls(s.device), s.args, s.args.batch_size
        critic_dims, n = (s.obs_dim + s.act_dim, *args.critic_hidden_dims, 1), args.cql_actions
        actor, critic = self.weights((s.obs_dim, *args.hidden_dims, 2 * s.act_dim)), self.weights(critic_dims, 2)
        if rnd:
            self.rnd(s, batch)
        self.passes(actor, batch, backward=True)  # policy at s, its loss
        self.passes(actor, batch)  # policy at s'
        self.passes(critic, batch, inputs=True)  # Q of the new actions, and its gradient to them
        self.passes(self.weights(critic_dims, members=2), n * batch)  # target
        self.passes(critic, (1 + 3 * n) * batch, backward=True)  # Q of the data's and the sampled actions, its loss
        return self

    def rnd(self, s, batch):
        """RND's update on `batch` rows."""
        dims = (s.obs_dim, *s.args.rnd_hidden_dims)
        predictor = self.weights(dims)
        self.passes(self.weights(dims), batch)  # target features of s'
        self.passes(predictor, round(batch * s.args.rnd_update_proportion), backward=True)  # predictor step
        self.passes(predictor, batch)  # the predictor of s', for the intrinsic reward

    def weights(self, dims, members=0):
        """Weights of an MLP: transposed (out, in), as a Linear has them, or one (members, in, out) for an ensemble."""
        shapes = [(members, i, o) if members else (o, i) for i, o in zip(dims[:-1], dims[1:], strict=True)]
        weights = [torch.randn(shape, device=self.device) / max(shape[-2:]) ** 0.5 for shape in shapes]
        return weights if members else [weight.t() for weight in weights]

    def passes(self, weights, rows, backward=False, inputs=False):
        """One pass of `rows` inputs through an MLP; backward: also the gradients of the weights, or with inputs those
        of the inputs."""
        members = weights[0].shape[:-2]  # () or (members,)
        x = [torch.randn(*members, rows, w.shape[-2], device=self.device) for w in weights]  # inputs of the layers
        x.append(torch.randn(*members, rows, weights[-1].shape[-1], device=self.device))  # the output
        g = [torch.randn_like(value) for value in x]  # gradients of the same
        if members:
            x[0] = x[0][:1].expand(*members, -1, -1)  # every member sees the same input
        for i, weight in enumerate(weights):
            self.list.append((x[i + 1], x[i], weight))  # forward: layer i's output
        for i in reversed(range(len(weights) if backward or inputs else 0)):
            if inputs:
                self.list.append((g[i], g[i + 1], weights[i].mT))
                continue
            if members:
                self.list.append((torch.empty_like(weights[i]), x[i].mT, g[i + 1]))  # gradient of weight i
            else:
                self.list.append((torch.empty_like(weights[i].t()), g[i + 1].t(), x[i]))  # the same, (out, in)
            if i > 0:
                self.list.append((g[i], g[i + 1], weights[i].mT))  # gradient of layer i's input; data needs none

    def __call__(self):
        for out, a, b in self.list:
            torch.matmul(a, b, out=out)

    def flops(self):
        return sum(2 * out.numel() * a.shape[-1] for out, a, _ in self.list)

    def error(self):
        """Largest relative error (Frobenius) of a product against float64."""
        exact = [a.double() @ b.double() for _, a, b in self.list]
        got = [torch.matmul(a, b).double() for _, a, b in self.list]
        return max(((x - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True))


# === measuring ===
def timed(step, device, precision, cpu_time):
    """chunk(n) of a Row for a function without arguments."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def now():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # the compiler
        used = time.process_time() + children.ru_utime + children.ru_stime
        return used if cpu_time else time.perf_counter()

    def chunk(n):
        torch.set_float32_matmul_precision(precision)
        wait()
        start = now()
        for _ in range(n):
            step()
        wait()
        return now() - start

    return chunk


def measure(rows, seconds):
    """Fill row.times: a chunk of every row in turn, until each has had its time (at least 3 rounds)."""
    for row in rows:
        with fresh_cache():
            row.start = row.chunk(START)  # compiles, from nothing, and captures
        row.n = max(1, round(CHUNK / max(row.chunk(2) / 2, 1e-5)))
    for _ in tqdm(range(max(3, round(seconds / CHUNK))), desc=f"{len(rows)} rows", unit="round"):
        for row in rows:
            row.times.append(row.chunk(row.n) / row.n)


def choose_precision(products, device, cpu_time, seconds):
    """Error and time of each of torch's float32 settings on the floor; returns (fastest exact one, {setting: ...})."""
    rows, found = [Row(name, timed(products, device, name, cpu_time)) for name in ("highest", "high", "medium")], {}
    measure(rows, seconds)
    for row in rows:
        torch.set_float32_matmul_precision(row.name)
        found[row.name] = {"relative_error": products.error(), "best_ms": min(row.times) * 1e3}
    exact = [name for name in found if found[name]["relative_error"] < EXACT]
    # Where settings lead to the same kernels, 3% of noise must not choose: then it is the default.
    return min(exact, key=lambda name: found[name]["best_ms"] * (0.97 if name == "highest" else 1)), found


# === the script's phases ===
def make_session(script, settings, device, files):
    """What main of the script builds, with random numbers in the replay buffer instead of a dataset."""
    env = script.make_env(settings.env_id)
    obs, action = env.observation_space.shape, env.action_space.shape
    shapes = dict(observations=obs, actions=action, rewards=(), next_observations=obs, terminations=(), episodes=())
    if script.SCRIPT == "calql_ooo":
        shapes["lower_bounds"] = ()
    data = {name: np.zeros((OFFLINE, *shape), np.float32) for name, shape in shapes.items()}
    buffer = script.ReplayBuffer(data, ONLINE, device)
    buffer.data.normal_().clamp_(-1, 1)
    buffer.split(buffer.data)["terminations"].zero_()
    buffer.size = OFFLINE + ONLINE
    replay = open(Path(files) / "replay.bin", "ab", buffering=0)
    run = SimpleNamespace(args=settings, updates=0, path=Path(files), sizes=defaultdict(int), sums=defaultdict(int),
                          files={"replay.bin": replay})
    return SimpleNamespace(script=script, args=settings, device=device, env=env, obs_dim=obs[0], act_dim=action[0],
                           buffer=buffer, run=run)


def learner(s, update, sample):
    """One gradient step as the phases do it: seed, sample, update, look at the losses every log_every steps."""
    steps = 0

    def step():
        nonlocal steps
        s.script.Run.seed(s.run, "benchmark", steps)
        losses = update(sample())
        steps += 1
        if steps % s.args.log_every == 0:
            [value.item() for value in losses.values()]

    return step


def player(s, choose_action, learn=lambda: None):
    """One environment step of the online phase: act, step, store, learn. The buffer's last row is overwritten."""
    obs = None

    def step():
        nonlocal obs
        obs = s.env.reset()[0] if obs is None else obs
        action = choose_action(obs)
        next_obs, reward, terminated, truncated, _ = s.env.step(action)
        s.buffer.size = len(s.buffer.data) - 1
        others = {"lower_bounds": 0.0} if "lower_bounds" in s.buffer.columns else {}
        s.script.Run.append(s.run, "replay.bin", s.buffer.add(
            observations=obs, actions=action, rewards=reward, next_observations=next_obs, terminations=terminated,
            episodes=0, **others))
        obs = None if terminated or truncated else next_obs
        learn()

    return step


def variants(s, args):
    """(settings, mark in the row's name): eager updates, and each of the options that wrap them."""
    yield s.args, ""
    if args.compile == "on":
        yield replace(s.args, compile="on"), " (compile)"
    if args.cudagraphs:
        yield replace(s.args, cudagraphs=True), " (cudagraphs)"
    if args.compile == "on" and args.cudagraphs:
        yield replace(s.args, compile="on", cudagraphs=True), " (compile, cudagraphs)"


def iql_rows(s, add, args, iql, both):
    script, buffer, batch = s.script, s.buffer, s.args.batch_size
    add("floor IQL", iql, iql.flops())
    add("floor IQL + RND", both, both.flops())
    for own, mark in variants(s, args):
        for dropout in sorted({0.0, script.pick(s.args, "dropout", True), 0.1}):
            agent = script.make_agent(own, buffer, s.device, exploitation=True)
            update = script.make_update(replace(own, retrain_dropout=dropout), buffer, agent, (-1.0, 1.0),
                                        exploitation=True)
            step = learner(s, update, lambda: buffer.sample(batch, buffer.size))
            add(f"retrain{mark}: IQL, dropout {dropout:g}", step, iql.flops(), "floor IQL")
        agent, rnd = script.make_agent(own, buffer, s.device), script.make_rnd(own, buffer, s.device)
        update = script.make_update(own, buffer, agent, own.q_reward_bounds, rnd)
        step = learner(s, update, lambda: buffer.sample(batch, buffer.size))
        add(f"pretrain{mark}: IQL + RND", step, both.flops(), "floor IQL + RND")
        step = player(s, lambda obs, agent=agent: agent.act(obs, sample=True), step)
        add(f"online{mark}: act, environment, IQL + RND", step, both.flops(), "floor IQL + RND")


def calql_rows(s, add, args, cql, both):
    script, buffer, a = s.script, s.buffer, s.args
    add("floor CQL", cql, cql.flops())
    add("floor Cal-QL + RND", both, both.flops())
    for own, mark in variants(s, args):
        agent = script.make_agent(own, buffer, s.device, exploitation=True)
        agent.q_bounds.copy_(torch.tensor([-100.0, 100.0]))
        update = script.make_update(own, buffer, agent, exploitation=True)
        step = learner(s, update, lambda: script.mixed_rows(buffer, buffer.size, a.batch_size, a.retrain_offline_ratio))
        add(f"retrain{mark}: CQL", step, cql.flops(), "floor CQL")
        agent, rnd = script.make_agent(own, buffer, s.device), script.make_rnd(own, buffer, s.device)
        agent.q_bounds.copy_(torch.tensor([-np.inf, np.inf]))
        update = script.make_update(own, buffer, agent, rnd)
        step = learner(s, update, lambda: script.mixed_rows(buffer, buffer.size, a.batch_size, a.offline_ratio))
        add(f"pretrain{mark}: Cal-QL + RND", step, both.flops(), "floor Cal-QL + RND")
        step = player(s, lambda obs, agent=agent: agent.act(obs, sample=True), step)
        add(f"online{mark}: act, environment, Cal-QL + RND", step, both.flops(), "floor Cal-QL + RND")


def rlpd_rows(s, add, args, rlpd, both):
    """An update is utd_ratio minibatches; the retraining's has one, of batch_size and the upsampled rows."""
    script, buffer, a = s.script, s.buffer, s.args
    rows = round(a.batch_size / (1 - a.retrain_upsample))
    sac = Products.sac(s, a.retrain_critics, 1, rows, rnd=False)
    add("floor RLPD", rlpd, rlpd.flops())
    add("floor RLPD + RND", both, both.flops())
    add("floor SAC", sac, sac.flops())
    for own, mark in variants(s, args):
        for rnd, floor, products in ((None, "floor RLPD", rlpd),
                                     (script.make_rnd(own, buffer, s.device), "floor RLPD + RND", both)):
            agent = script.make_agent(own, buffer, s.device)
            update = script.make_update(own, buffer, agent, None, rnd, a.utd_ratio)
            step = learner(s, update, lambda: script.sample_symmetric(buffer, a.utd_ratio, a.batch_size, 0.0))
            name = f"update{mark}: {floor.removeprefix('floor ')}, {a.utd_ratio} minibatches"
            add(name, step, products.flops(), floor)
        step = player(s, lambda obs, agent=agent: agent.act(obs, sample=True), step)
        add(f"online{mark}: act, environment, RLPD + RND", step, both.flops(), "floor RLPD + RND")
        agent = script.make_agent(own, buffer, s.device, exploitation=True)
        update = script.make_update(own, buffer, agent, (-1.0, 1.0))
        step = learner(s, update, lambda: buffer.sample(rows, buffer.size))
        add(f"retrain{mark}: SAC", step, sac.flops(), "floor SAC")


def start_d3rlpy(python, job):
    """d3rlpy_iql.py in its own Python, waiting for orders: (chunk(row, n), what it says about itself)."""
    command, pipe = [python, Path(__file__).with_name("d3rlpy_iql.py"), json.dumps(job)], subprocess.PIPE
    if not which(python) or subprocess.run([python, "-c", "import d3rlpy"], capture_output=True).returncode:
        sys.exit(f"error: --d3rlpy-python: {python} cannot import d3rlpy; see benchmarks/README.md")
    child = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    info = json.loads(child.stdout.readline())

    def chunk(row, n):
        print(json.dumps({"row": row, "n": n}), file=child.stdin, flush=True)
        info.update(json.loads(child.stdout.readline()))
        return info.pop("seconds")

    return chunk, info


# === report ===
def report(rows):
    """The rows as a Markdown table on stdout, and as a list of dicts."""
    by_name, results = {row.name: row for row in rows}, []
    digits = dict(median_ms=3, best_ms=3, per_second=0, gflop_per_second=1, x_floor_median=2, x_floor_best=2)
    print("| row | median ms | best ms | per second | GFLOP/s | x floor (median) | x floor (best) |")
    print("|---" + "|---:" * len(digits) + "|")
    for row in rows:
        middle, best, floor = median(row.times), min(row.times), by_name.get(row.floor)
        result = {"row": row.name, "median_ms": middle * 1e3, "best_ms": best * 1e3, "per_second": 1 / middle,
                  "flops": row.flops, "gflop_per_second": row.flops / middle / 1e9}
        if floor:
            ratios = [mine / its for mine, its in zip(row.times, floor.times, strict=True)]
            result |= {"x_floor_median": median(ratios), "x_floor_best": best / min(floor.times)}
        cells = [f"{result[key]:.{n}f}" if result.get(key) else "" for key, n in digits.items()]
        print(f"| {row.name} | {' | '.join(cells)} |")
        results.append(result | {"chunk_size": row.n, "chunk_ms": [round(t * 1e3, 4) for t in row.times]})
    return results


def break_even(rows):
    """Of each compiled row: the seconds that its start takes, and from how many updates on compiling saves time."""
    by_name, found = {row.name: row for row in rows}, {}
    for row in rows:
        eager = by_name.get(row.name.replace(" (compile)", ""))
        if eager and eager is not row and not row.name.startswith("online"):  # which continues with pretrain's update
            slow, fast = median(eager.times), median(row.times)
            start = row.start - START * fast
            updates = start / (slow - fast) if slow > fast else None
            found[row.name] = {"start_seconds": start, "pays_from_updates": updates}
            print(f"{row.name}: {start:.1f} s to start; " + (f"pays from {updates:,.0f} updates on" if updates else
                                                              "does not pay"))
    return found


def main(args):
    script = importlib.import_module(args.script)
    if args.out and not Path(args.out).parent.is_dir():
        script.fail(f"--out {args.out}: there is no such folder")
    if args.script != "iql_ooo" and args.d3rlpy_python:
        script.fail("--d3rlpy-python is for IQL; leave it out here")
    words = ["--device", args.device, "--torch-threads", args.threads, "--compile", "off"]
    settings = script.parse_args([*words, *(["--env-id", args.env_id] if args.env_id else [])])
    device = script.setup_torch(replace(settings, cudagraphs=args.cudagraphs, compile=args.compile))
    if args.cpu_time:
        torch._inductor.config.compile_threads = 1
    with tempfile.TemporaryDirectory() as files:  # of replay.bin
        run(args, script, settings, device, files)


def run(args, script, settings, device, files):
    s = make_session(script, settings, device, files)
    products = {"iql_ooo": Products.iql, "calql_ooo": Products.calql}.get(args.script)
    if products:
        small, largest = (products(s, rnd) for rnd in (False, True))
        probe = largest
    else:
        small, largest = (Products.sac(s, settings.num_qs, settings.utd_ratio, settings.batch_size, rnd)
                          for rnd in (False, True))
        probe = Products.sac(s, settings.num_qs, 1, settings.batch_size, rnd=True)  # the same kernels, 20 times faster
    precision, precisions = choose_precision(probe, device, args.cpu_time, min(args.seconds, 3.0))

    def add(name, step, flops, floor="", precision=precision):
        rows.append(Row(name, timed(step, device, precision, args.cpu_time), flops, floor))

    rows = []
    {"rlpd_ooo": rlpd_rows, "calql_ooo": calql_rows, "iql_ooo": iql_rows}[args.script](s, add, args, small, largest)
    add("environment step, stored", player(s, lambda obs: s.env.action_space.sample()), 0)
    for name in (name for name in precisions if name != precision):  # for information
        inexact = "not float32, " if precisions[name]["relative_error"] >= EXACT else ""
        add(f"products with RND, {inexact}{name}", largest, largest.flops(), rows[1].name, name)
    job = asdict(settings) | dict(obs_dim=s.obs_dim, act_dim=s.act_dim, threads=args.threads, precision=precision,
                                  device=device.type, cpu_time=args.cpu_time)
    chunk, d3rlpy = start_d3rlpy(args.d3rlpy_python, job) if args.d3rlpy_python else (None, None)
    for row in ("update", "sampling and update") if chunk else ():
        rows.append(Row(f"d3rlpy IQL: {row}", lambda n, row=row: chunk(row, n), small.flops(), "floor IQL"))
    rows = [row for row in rows if args.rows in row.name or not row.floor and row.flops]
    measure(rows, args.seconds)

    print(f"{settings.env_id}: obs {s.obs_dim}, act {s.act_dim}, batch {settings.batch_size}, {args.threads} "
          f"thread(s); {small.flops() / 1e6:.0f} MFLOP for an update, {largest.flops() / 1e6:.0f} with RND; setting "
          f"{precision}; relative errors of torch's settings: "
          + ", ".join(f"{name} {found['relative_error']:.0e}" for name, found in precisions.items()) + "\n")
    results = report(rows)
    starts = break_even(rows)
    memory = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # bytes
              "cuda_peak": torch.cuda.max_memory_allocated(),
              "replay_buffer": s.buffer.data.numel() * s.buffer.data.element_size()}
    print("\nmemory in MiB: " + ", ".join(f"{name} {value / 2**20:.0f}" for name, value in memory.items()))
    print(f"d3rlpy: {d3rlpy or 'not measured'}")
    if args.out:
        text = json.dumps(dict(script.provenance(device), precision=precision, args=asdict(args),
            precisions=precisions, rows=results, compile=starts, memory_bytes=memory, d3rlpy=d3rlpy), indent=1)
        for path in filter(None, (args.d3rlpy_python, args.out)):  # where files lie on this machine is no result
            text = text.replace(path, Path(path).name)
        script.atomic_write(args.out, text.encode())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
