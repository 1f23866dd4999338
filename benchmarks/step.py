"""Our train step beside the reference's, in one run, with the same counting.

    python benchmarks/step.py [--chips v6e v5e] [--rows reference hero …]

Without an accelerator both are compiled for a TPU that is not there, and the milliseconds are preflight's estimate:
Pallas kernels counted by their instruction schedules, everything else by the slowest of HBM, matrix unit and vector
unit. With a TPU or a GPU both are run, and the milliseconds are measured: the mean of 20 steps after two.

Both train the same model on the same number of tokens, so the FLOPs are the same: MFU is ours (windowed, causal), "T×T"
is the MFU in which attention counts as if it had no mask, which is how the reference counts. Peak is the compiler's.
The reference is built as it was (reference.py), with the attention and batch of the row that it published.
"""

import argparse
import os
import sys
import time
from pathlib import Path

DEVICES = [path for pattern in ("accel*", "vfio/*", "nvidia0") for path in Path("/dev").glob(pattern)]
if not DEVICES:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reference import reference_step  # noqa: E402
from tools.notebooks import load  # noqa: E402

train, maxtext = load(ROOT / "02_train.py"), load(ROOT / "04_maxtext.py")
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


def estimated(nb, program, chip, windows, ours):
    """(seconds, bytes at the peak) of a compiled program."""
    parts, unknown = nb.estimate(program.text, chip, windows, ours)
    if any("online-softmax" not in name for name in unknown):  # that one is XLA's own: its bytes do
        print(f"not counted but for their bytes: {unknown}")
    return sum(parts.values()), program.peak


def timed(step, state, rest, runs=20):
    """Seconds of step(*state, *rest), whose first results are the next state."""
    for i in range(runs + 2):
        if i == 2:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state = step(*state, *rest)[: len(state)]
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / runs


def our_step(nb, config, chip):
    """(seconds of a step, bytes at its peak or None, seconds to compile)."""
    started = time.perf_counter()
    if not DEVICES:
        program = nb.compile_step(config, chip)
        compiled = time.perf_counter() - started
        return *estimated(nb, program, chip, config.windows, nb.attention_seconds(config, chip)), compiled
    tokens = jnp.zeros((config.tokens_per_step // config.seq_len, config.seq_len), jnp.int32)
    state = nb.init_train_state(config)
    step = nb.train_step.lower(config, state, tokens, tokens).compile()
    compiled = time.perf_counter() - started
    peak = step.memory_analysis().peak_memory_in_bytes
    return timed(lambda state, *batch: step(state, *batch), (state,), (tokens, tokens)), peak, compiled


def their_step(nb, arguments, chip):
    """The same of the reference's step."""
    started = time.perf_counter()
    step, leaves, donated, windows = reference_step(**arguments)
    if not DEVICES:
        program = nb.compile_for(chip, step, leaves, donated)
        return *estimated(nb, program, chip, windows, {}), time.perf_counter() - started
    step = jax.jit(step, donate_argnums=range(donated)).lower(*leaves).compile()
    compiled = time.perf_counter() - started
    arrays = [jnp.full(leaf.shape, 0.01, leaf.dtype) for leaf in leaves]
    return timed(step, arrays[:-2], arrays[-2:]), step.memory_analysis().peak_memory_in_bytes, compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="*", default=["v6e"], choices=list(train.CHIPS), help="to compile for")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    kind = jax.devices()[0].device_kind
    for chip in [""] if DEVICES else args.chips:
        peak_flops = train.peak_flops(kind if DEVICES else train.CHIPS[chip].kind) or float("nan")
        print(f"{f'{kind}, measured' if DEVICES else f'{chip}, estimates':32}{'ms':>8}{'tok/s':>10}{'MFU':>7}{'T×T':>7}"
              f"{'peak GiB':>10}{'compile s':>11}{'ratio':>7}")  # fmt: skip
        for name in args.rows:
            nb, config, references = ROWS[name]
            mine = None
            for label in ("ours", *references):
                row = f"{f'{name}: {label}':32}"
                try:
                    found = our_step(nb, config, chip) if label == "ours" else their_step(nb, references[label], chip)
                except nb.CompileError as error:
                    print(row, nb.reason(error)[0], flush=True)
                    continue
                seconds, peak, compiled = found
                mine = mine or seconds
                rate = config.tokens_per_step / seconds
                mfu, full = (f(config) * rate / peak_flops
                             for f in (nb.flops_per_token, lambda c, nb=nb: full_flops_per_token(nb, c)))  # fmt: skip
                print(f"{row}{seconds * 1e3:8.1f}{rate:10,.0f}{mfu:7.1%}{full:7.1%}{peak / 2**30:10.2f}{compiled:11.0f}"
                      f"{seconds / mine:7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
