"""Sampling with the cache against a forward pass for every token, on the demo model with a context of 512 tokens.

    python benchmarks/generate.py

Greedy, float32, one prompt of a single token, 511 new ones; both are compiled before they are timed. Prints tokens per
second of both, their ratio, and whether they agree token for token; then three prompts at once in bfloat16.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "02_train.py")


def main():
    config = nb.Config.demo().replace(seq_len=512, compute_dtype="float32")
    params, T = nb.init_params(config, jax.random.key(0)), 512
    rng = np.random.default_rng(0)  # at its start every layer writes zeros: weights with opinions instead
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.05), jnp.float32), params)

    def uncached():
        tokens, last = jnp.zeros((1, T), jnp.int32), jnp.full((), 7, jnp.int32)
        tokens = tokens.at[0, 0].set(7)
        for position in range(T - 1):
            last, tokens = one_more(params, tokens, position)
        return np.asarray(tokens)[0, 1:].tolist()

    @jax.jit
    def one_more(params, tokens, position):
        last = jnp.argmax(nb.forward(config, params, tokens)[0, position])
        return last, tokens.at[0, position + 1].set(last)

    def cached(config=config, prompts=1):
        out = nb.generate_tokens(
            config, params, [[]] * prompts, 7, max_new_tokens=T - 1, temperature=0, top_k=1, top_p=1.0, seed=0
        )
        return out[0]

    one_more(params, jnp.zeros((1, T), jnp.int32), 0)
    found, seconds = {}, {}
    for name, function in (("uncached", uncached), ("cached", cached)):
        times = []
        for _ in range(4 if name == "cached" else 1):
            started = time.perf_counter()
            found[name] = function()
            times.append(time.perf_counter() - started)
        seconds[name] = min(times)  # the first compiles
        print(f"{name:9} {(T - 1) / seconds[name]:8,.0f} tok/s, {1e3 * seconds[name] / (T - 1):.2f} ms a token")
    ended = len(found["cached"])
    print(f"ratio {seconds['uncached'] / seconds['cached']:.1f}; the same tokens: "
          f"{found['cached'] == found['uncached'][:ended]}, {ended} of them")  # fmt: skip
    short = config.replace(compute_dtype="bfloat16")
    cached(short, 3)
    started = time.perf_counter()
    cached(short, 3)
    print(f"3 prompts, bfloat16: {3 * (T - 1) / (time.perf_counter() - started):,.0f} tok/s")


if __name__ == "__main__":
    main()
