"""What it costs to log everything: blocks of the demo's steps with the log and without it, in turn, in one run.

    python benchmarks/log_cost.py [--pairs 12] [--steps 25]

With: norms by part, metrics.jsonl, TensorBoard, wandb offline, every 5 steps as in the demo. Without: the steps alone.
Prints the median ratio of the pairs with its quartiles, and the seconds of the log's own parts, which are less noisy.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "02_train.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = nb.Config.demo().replace(run_dir=folder, wandb_mode="offline", num_iterations=10_000)
        shards, _ = nb.list_shards(config)
        tokenizer = nb.find_tokenizer(config, shards[0]())
        state = nb.init_train_state(config)
        with (
            nb.wandb_run(config, Path(folder), None) as live,
            nb.PrefetchDataLoader(config, tokenizer, shards) as loader,
        ):
            log = nb.RunLog(config, Path(folder), 0, wandb_run=live)

            def block(state, steps, logged):
                started = time.perf_counter()
                for step in steps:
                    state, metrics = nb.train_step(config, state, *next(loader))
                    if logged:
                        if nb.due(step, config.log_interval):
                            metrics |= nb.state_norms(state)
                        log.train_step(step, metrics, "", loader.wait_seconds)
                jax.block_until_ready(state.step)
                return state, time.perf_counter() - started

            state, _ = block(state, range(10), True)  # compiles
            ratios, times = [], collections.defaultdict(float)
            for pair in range(args.pairs):
                seconds = {}
                for logged in (True, False) if pair % 2 else (False, True):
                    start = (2 * pair + logged) * args.steps
                    state, seconds[logged] = block(state, range(start, start + args.steps), logged)
                    times[logged] += seconds[logged]
                ratios.append(seconds[True] / seconds[False])
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            print(f"{args.pairs} pairs of {args.steps} steps: with / without {middle:.4f} ({low:.4f} to {high:.4f})")
            step = times[False] / args.pairs / args.steps
            norms, writing = [], []
            for i in range(20):
                started = time.perf_counter()
                values = jax.block_until_ready(nb.state_norms(state))
                norms.append(time.perf_counter() - started)
                started = time.perf_counter()
                log.write(i, **{name: float(value) for name, value in values.items()}, loss=1.0, grad_norm=1.0)
                writing.append(time.perf_counter() - started)
            for name, found in (("norms", norms), ("writing a line everywhere", writing)):
                cost = np.median(found)
                share = cost / config.log_interval / step
                print(f"{name}: {1e3 * cost:.1f} ms, {share:.2%} of {config.log_interval} steps of {1e3 * step:.0f} ms")
            log.close()


if __name__ == "__main__":
    main()
