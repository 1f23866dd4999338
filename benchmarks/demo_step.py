"""The demo's train step under one change at a time, as ratios to the demo itself: how its settings were chosen.

    python benchmarks/demo_step.py

Every variant is timed in turn, several rounds over, and its best step counts: on a shared machine the minimum is what
the program costs, and the rest is the neighbours.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from tools.notebooks import load  # noqa: E402

ROUNDS, STEPS = 3, 3


def main():
    nb = load(ROOT / "02_train.py")
    demo = nb.Config.demo()
    tokens_per_step = demo.device_batch_size * demo.seq_len
    variants = {"demo": demo} | {
        f"compute_dtype={dtype}": demo.replace(compute_dtype=dtype)
        for dtype in ("bfloat16", "float32")
        if dtype != demo.compute_dtype
    }
    variants |= {f"attn_impl={impl}": demo.replace(attn_impl=impl) for impl in ("einsum", "jax")}
    for T in (128, 256, 512):
        for B in (tokens_per_step // T, tokens_per_step // T * 2):
            if (B, T) != (demo.device_batch_size, demo.seq_len):
                variants[f"B={B}, T={T}"] = demo.replace(seq_len=T, device_batch_size=B)
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(ROUNDS):
        for name, config in variants.items():
            state = nb.init_train_state(config)
            shape = (config.device_batch_size, config.seq_len)
            tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
            for i in range(1 + STEPS):  # the first one compiles, or warms the caches
                started = time.perf_counter()
                state, _ = nb.train_step(config, state, tokens, tokens)
                jax.block_until_ready(state)
                if i:
                    best[name] = min(best[name], time.perf_counter() - started)
    speed = {name: config.tokens_per_step / best[name] for name, config in variants.items()}
    print(f"{'variant':28} {'ms/step':>8} {'tok/s':>8} {'GFLOP/s':>8} {'ratio':>6}")
    for name, config in variants.items():
        gflops = speed[name] * nb.flops_per_token(config) / 1e9
        print(f"{name:28} {best[name] * 1e3:8.0f} {speed[name]:8,.0f} {gflops:8.0f} {speed[name] / speed['demo']:6.2f}")


if __name__ == "__main__":
    main()
