"""What a checkpoint costs: how long a save holds up the training, against copying the state to host memory.

    python benchmarks/checkpoint.py [--n_head 4] [--repeats 5]

A model of the demo's kind, but larger. Prints the time of a step, of the copy of the state to host memory alone, of
save() and of the step after it, while the file is being written; and the bytes on the disk against those of the state.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "02_train.py")


def timed(function):
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_head", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    config = nb.Config.demo().replace(n_head=args.n_head, vocab_size=16384)
    tokens = np.zeros((config.device_batch_size, config.seq_len), np.int32)
    state = nb.init_train_state(config)
    size = sum(x.nbytes for x in jax.tree.leaves(state._replace(hyper={})))
    times = {name: [] for name in ("step", "copy", "save", "step after it", "written after")}

    def step():
        nonlocal state
        state, _ = nb.train_step(config, state, tokens, tokens)
        jax.block_until_ready(state)

    step()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            saver = nb.Checkpointer(config, Path(folder))
            times["step"].append(timed(step)[0])
            times["copy"].append(timed(lambda: nb.host_parts(config, state))[0])
            times["save"].append(timed(lambda saver=saver: saver.save(state))[0])
            times["step after it"].append(timed(step)[0])
            times["written after"].append(timed(saver.close)[0])
        written = sum(path.stat().st_size for path in saver.newest.iterdir())
    print(f"state of {size / 2**20:.1f} MiB, on the disk {written / 2**20:.1f} MiB, {written / size - 1:+.2%}")
    for name, values in times.items():
        print(f"{name:16}{1e3 * statistics.median(values):8.0f} ms   {[round(1e3 * x) for x in values]}")
    print(f"save / copy {statistics.median(times['save']) / statistics.median(times['copy']):.2f}")


if __name__ == "__main__":
    main()
