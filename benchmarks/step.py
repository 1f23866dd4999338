"""How fast is our train step beside the reference's? Both in one run, with the same counting.

    python benchmarks/step.py [--chips v6e v5e] [--rows reference hero …]

With a TPU or a GPU both are run and the milliseconds are measured: the mean of 20 steps after two. Without, both are
compiled for a TPU that is not there, and the milliseconds are the estimate of 05_preflight.py; a row takes minutes.

Both train the same model on the same number of tokens, so the FLOPs are the same. MFU is ours (windowed, causal); T×T
is the MFU in which attention counts as if it had no mask, which is how the reference counts. Peak is the compiler's.
The last column is the ratio of the reference's milliseconds to ours. The reference is built as it was (reference.py),
with the attention and batch of the row that it published.
"""

import argparse
import functools
import os
import time
from pathlib import Path

DEVICES = [path for pattern in ("accel*", "vfio/*", "nvidia0") for path in Path("/dev").glob(pattern)]
if not DEVICES:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from common import load  # noqa: E402
from reference import T, reference_step  # noqa: E402

train, maxtext, preflight = load("02_train.py"), load("04_maxtext.py"), None if DEVICES else load("05_preflight.py")
CHIPS, REFUSED = ({}, ()) if DEVICES else (preflight.CHIPS, preflight.CompileError)
WIDE = dict(heads=4, head_dim=256, impl="splash", pattern="L", swiglu=3072)
ROWS = {  # notebook, Config, {name of a reference step: its arguments}
    "reference": (train, train.Config(), {"einsum": dict(B=4), "splash 1024": dict(B=4, impl="splash")}),
    "B=8": (train, train.Config(device_batch_size=8), {"splash 512": dict(B=8, impl="splash", block=512)}),
    "B=16": (train, train.Config(device_batch_size=16), {}),
    "hero": (
        maxtext, maxtext.Config.small(),
        {"16 × 4": dict(B=4, depth=8, kv_heads=1, dtype=jnp.bfloat16, parts=16, **WIDE)},
    ),
    "369M": (maxtext, maxtext.Config(), {"float32": dict(B=8, depth=24, kv_heads=2, **WIDE)}),
    "369M, B=4": (maxtext, maxtext.Config(device_batch_size=4), {"float32": dict(B=4, depth=24, kv_heads=2, **WIDE)}),
}  # fmt: skip


def full_flops_per_token(nb, config):
    """FLOPs by the reference's convention: 6 for each weight but the embedding's, and all T×T scores of attention."""
    counts = nb.count_params(config)
    matmuls = counts["total"] - counts["embed"]
    return 6 * matmuls + 12 * config.n_head * config.head_dim * config.seq_len * config.depth


def mean_seconds(step, state, rest, runs=20):
    """Seconds of step(*state, *rest), whose first results are the next state."""
    for i in range(runs + 2):
        if i == 2:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state = step(*state, *rest)[: len(state)]
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / runs


def our_step(nb, config, chip):
    """(seconds of a step, bytes at its peak)."""
    if not DEVICES:
        program, answer = preflight.compile_and_estimate(config, chip)
        return seconds_of(answer), program.peak
    state, tokens = nb.init_train_state(config), jnp.zeros(config.batch_shape, jnp.int32)
    step = nb.train_step.lower(config, state, tokens, tokens).compile()
    run = functools.partial(step, config)
    return mean_seconds(run, (state,), (tokens, tokens)), step.memory_analysis().peak_memory_in_bytes


def their_step(arguments, chip):
    """The same of the reference's step."""
    step, leaves, donated, windows = reference_step(**arguments)
    if not DEVICES:
        program, kernels = preflight.compile_for(chip, step, leaves, donated), their_kernels(chip, **arguments)
        return seconds_of(preflight.estimate(program.text, chip, windows, kernels)), program.peak
    step = jax.jit(step, donate_argnums=range(donated)).lower(*leaves).compile()
    arrays = [jnp.full(leaf.shape, 0.01, leaf.dtype) for leaf in leaves]
    return mean_seconds(step, arrays[:-2], arrays[-2:]), step.memory_analysis().peak_memory_in_bytes


def their_kernels(
    chip, B, heads=8, kv_heads=8, head_dim=128, impl="einsum", block=1024, pattern="SSSL", dtype=jnp.float32, **_
):
    """Seconds of the reference's attention kernels: those of a Config of ours with the same attention."""
    config = train.Config(
        n_head=heads, n_kv_head=kv_heads, head_dim=head_dim, device_batch_size=B, seq_len=T, window_pattern=pattern,
        attn_impl=impl, splash_block_size=block, compute_dtype=jnp.dtype(dtype).name, mesh=(1, 1),
    )  # fmt: skip
    return preflight.attention_kernels(config, chip)


def seconds_of(answer):
    if any("online-softmax" not in name for name in answer.uncounted):  # that one is XLA's own: its bytes do
        print(f"not counted but for their bytes: {answer.uncounted}")
    return answer.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="*", default=["v6e"], choices=list(CHIPS), help="to compile for")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    kind = jax.devices()[0].device_kind
    for chip in [""] if DEVICES else args.chips:
        peak_flops = train.peak_flops(kind if DEVICES else chip) or float("nan")
        print(f"{f'{kind}, measured' if DEVICES else f'{chip}, estimates':32}{'ms':>8}{'tok/s':>10}{'MFU':>7}{'T×T':>7}"
              f"{'peak GiB':>10}{'all of it s':>12}{'ratio':>7}")  # fmt: skip
        for name in args.rows:
            nb, config, references = ROWS[name]
            config, mine = config.replace(mesh=(1, 1)), None
            for label in ("ours", *references):
                row, started = f"{f'{name}: {label}':32}", time.perf_counter()
                try:
                    ours = label == "ours"
                    seconds, peak = our_step(nb, config, chip) if ours else their_step(references[label], chip)
                except REFUSED as error:
                    print(row, preflight.explain(error)[0], flush=True)
                    continue
                mine = mine or seconds
                rate, took = config.tokens_per_step / seconds, time.perf_counter() - started
                flops = nb.flops_per_token(config), full_flops_per_token(nb, config)
                mfu, full = (n * rate / peak_flops for n in flops)
                print(f"{row}{seconds * 1e3:8.1f}{rate:10,.0f}{mfu:7.1%}{full:7.1%}{peak / 2**30:10.2f}{took:12.0f}"
                      f"{seconds / mine:7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
