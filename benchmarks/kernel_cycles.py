"""How many cycles splash attention takes, by the instruction schedule of its own kernels: the tables of preflight.

    python benchmarks/kernel_cycles.py [--chips v6e v5e] [--head_dims 128 256] [--blocks 128 256 512 1024]

The TPU's compiler writes the final schedule of a kernel where it is told to: one line is one bundle of instructions,
and takes one cycle if nothing stalls. For T=2048, bfloat16, a causal mask (L) and one with a window of 1024 (S), it
prints for the forward, dkv and dq kernels

  - step: bundles of the grid's loop outside of any branch, paid by each of its steps;
  - row: of the branches at the first and the last block of a row;
  - block: of the branch that an active block takes, and its ratio to what stands in 02_train.py (S with its factor).

Then every entry of the tables in 02_train.py, of its cell "Splash kernels": what stands there, what is found here and
the largest difference. BLOCK_CYCLES are the blocks of L; WINDOW_FACTOR is S / L for blocks of 512 and 1024;
ROW_CYCLES are those of a row for each of its tokens, for the block nearest to 512; STEP_CYCLES the mean of all. 02 has
one number for all head_dims in the last three, so they are compared with each. A new libtpu may schedule otherwise:
run this, and correct the tables. A minute or two on two cores.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "02_train.py")
T, WINDOWS, KERNELS = 2048, {"L": 2048, "S": 1024}, ("fwd", "dkv", "dq")


def count(schedule):
    """(step, row, block) bundles of a splash kernel."""

    def within(a, b):
        return a != b and b[0] <= a[0] and a[0] + a[1] <= b[0] + b[1] + 2

    found = nb.branches(schedule)
    # The block is the longest branch that is not merely a wrapper of one that is nearly as long.
    block = max((r for r in found if not any(within(x, r) and x[1] > r[1] / 2 for x in found)), key=lambda r: r[1])
    others = [r for r in found if r != block and not within(r, block) and not within(block, r)]
    row = sum(r[1] for r in others if not any(within(r, other) for other in others))
    return sum(depth > 0 for depth, _ in schedule) - block[1] - row, row, block[1]


def kernels(chip, head_dim, block, window):
    """{'fwd' | 'dkv' | 'dq': (step, row, block)} of splash attention, compiled alone. Compile errors pass through."""

    def attend(q, k, v, g):
        y, pullback = jax.vjp(
            lambda q, k, v: nb.attention(q, k, v, window=window, impl="splash", block_size=block), q, k, v
        )
        return y, *pullback(g)

    with tempfile.TemporaryDirectory() as folder:
        nb.compile_for(chip, attend, [jax.ShapeDtypeStruct((8, 8, T, head_dim), jnp.bfloat16)] * 4, schedules=folder)
        found = {}
        for path in sorted(Path(folder).glob("*splash_mha_*-final_bundles.txt")):
            found.setdefault(re.search(r"splash_mha_(fwd|dkv|dq)", path.name)[1], count(nb.bundles(path)))
    return found


def expected(chip, kind, head_dim, block, window):
    """Cycles of an active block by 02_train.py's tables."""
    i = nb.BLOCK_SIZES.index(block)
    cycles = nb.BLOCK_CYCLES[chip, kind][head_dim][i]
    return cycles * (nb.WINDOW_FACTOR[chip, kind][i - 2] if window < T and i >= 2 else 1)


def tables(found):
    """Yields (name of an entry, [what 02_train.py has], [what is found]) for all its tables."""
    for chip, head_dim in dict.fromkeys(key[:2] for key in found):
        counts = {key[2:]: value for key, value in found.items() if key[:2] == (chip, head_dim)}
        steps = [value[kind][0] for value in counts.values() for kind in KERNELS]
        yield f"STEP_CYCLES   {chip}     {head_dim:4}", [nb.STEP_CYCLES[chip]], [sum(steps) / len(steps)]
        for kind in KERNELS:
            label = f"{chip} {kind:3} {head_dim:4}"
            causal = {block: value[kind] for (block, name), value in counts.items() if name == "L"}
            if causal:
                there = [nb.BLOCK_CYCLES[chip, kind][head_dim][nb.BLOCK_SIZES.index(block)] for block in causal]
                yield f"BLOCK_CYCLES  {label}", there, [cycles for _, _, cycles in causal.values()]
                middle = min(causal, key=lambda block: abs(block - 512))
                yield f"ROW_CYCLES    {label}", [nb.ROW_CYCLES[chip, kind]], [causal[middle][1] / middle]
            if long := [block for block in causal if block >= 512 and (block, "S") in counts]:
                there = [nb.WINDOW_FACTOR[chip, kind][nb.BLOCK_SIZES.index(block) - 2] for block in long]
                here = [counts[block, "S"][kind][2] / causal[block][2] for block in long]
                yield f"WINDOW_FACTOR {label}", there, here


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="*", default=list(nb.CHIPS), choices=list(nb.CHIPS))
    parser.add_argument("--head_dims", nargs="*", type=int, default=[128, 256], choices=(128, 256))
    parser.add_argument("--blocks", nargs="*", type=int, default=list(nb.BLOCK_SIZES), choices=nb.BLOCK_SIZES)
    args = parser.parse_args()
    print("chip   H  block  window   " + "".join(f"{kind + ': step  row  block  ratio':>34}" for kind in KERNELS))
    found = {}
    for chip, head_dim, block, name in itertools.product(args.chips, args.head_dims, args.blocks, WINDOWS):
        row = f"{chip} {head_dim:4} {block:6}  {name:6}"
        try:
            found[chip, head_dim, block, name] = counts = kernels(chip, head_dim, block, WINDOWS[name])
        except nb.CompileError as error:
            print(row, nb.reason(error)[0])
            continue
        for kind in KERNELS:
            step, ends, cycles = counts[kind]
            ratio = cycles / expected(chip, kind, head_dim, block, WINDOWS[name])
            row += f"{step:16}{ends:5}{cycles:7}{ratio:6.2f}"
        print(row, flush=True)
    print(f"\n{'entry, chip, kernel, head_dim':29}{'in 02_train.py':>24}{'here':>24}  largest difference")
    for entry, there, here in sorted(tables(found), key=lambda row: row[0].split()[0]):
        digits = 0 if max(there) > 9 else 2
        columns = (" ".join(f"{value:.{digits}f}" for value in values) for values in (there, here))
        worst = max((new / old - 1 for new, old in zip(here, there)), key=abs)
        print(f"{entry:29}" + "".join(f"{column:>24}" for column in columns) + f"{worst:+8.0%}")


if __name__ == "__main__":
    main()
