"""d3rlpy's IQL under the clock of throughput.py, which starts this file with the Python of another environment.

Argument: the sizes and settings as JSON. Then for each line {"row": ..., "n": ...} on stdin, n updates are made and a
line {"seconds": ..., "peak_rss_mib": ...} is printed. Rows: "update" repeats one batch that is at hand; "sampling and
update" draws each batch from d3rlpy's replay buffer first, as its fit() does. Sizes and coefficients: iql_ooo.py's.
"""

import json
import resource
import sys
import time

import numpy as np
import torch

replies, sys.stdout = sys.stdout, sys.stderr  # d3rlpy logs to stdout, which is ours for the replies
import d3rlpy  # noqa: E402

EPISODES, LENGTH = 100, 200  # of the random data


def main(job):
    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["precision"])
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    steps = EPISODES * LENGTH
    dataset = d3rlpy.dataset.MDPDataset(
        observations=generator.standard_normal((steps, job["obs_dim"]), dtype=np.float32),
        actions=generator.uniform(-1, 1, (steps, job["act_dim"])).astype(np.float32),
        rewards=generator.standard_normal(steps, dtype=np.float32),
        terminals=np.zeros(steps, np.float32),
        timeouts=(np.arange(1, steps + 1) % LENGTH == 0).astype(np.float32),
    )
    encoder = d3rlpy.models.VectorEncoderFactory(hidden_units=list(job["hidden_dims"]))
    algorithm = d3rlpy.algos.IQLConfig(
        batch_size=job["batch_size"], actor_learning_rate=job["learning_rate"],
        critic_learning_rate=job["learning_rate"], actor_encoder_factory=encoder, critic_encoder_factory=encoder,
        value_encoder_factory=encoder, gamma=job["gamma"], tau=job["tau"], n_critics=2, expectile=job["expectile"],
        weight_temp=job["temperature"], max_weight=100.0,
    ).create(device="cuda:0" if job["device"] == "cuda" else "cpu:0")
    algorithm.build_with_dataset(dataset)
    batch = dataset.sample_transition_batch(job["batch_size"])

    def reply(content):
        print(json.dumps(content), file=replies, flush=True)

    clock = time.process_time if job["cpu_time"] else time.perf_counter
    reply({"d3rlpy": d3rlpy.__version__, "torch": torch.__version__})
    for line in sys.stdin:
        order = json.loads(line)
        start = clock()
        for _ in range(order["n"]):
            # update() returns its losses as Python numbers, so on a GPU it has finished when it returns.
            algorithm.update(dataset.sample_transition_batch(job["batch_size"]) if order["row"] != "update" else batch)
        seconds = clock() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        reply({"seconds": seconds, "peak_rss_mib": round(peak)})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
