"""How many cycles splash attention takes, by the instruction schedule of its own kernels: the tables of preflight.

    python benchmarks/kernel_cycles.py [--chips v6e v5e] [--head_dims 128 256] [--blocks 128 256 512 1024]

The TPU's compiler writes the final schedule of a kernel where it is told to: one line is one bundle of instructions,
and takes one cycle if nothing stalls. For T=2048, bfloat16, a causal mask (L) and one with a window of 1024 (S), it
prints for the forward, dkv and dq kernels

  - step: bundles of the grid's loop outside of any branch, paid by each of its steps;
  - row: of the branches at the first and the last block of a row;
  - block: of the branch that an active block takes, and its ratio to what stands in 02_train.py (S with its factor).

A new libtpu may schedule otherwise: run this, and correct the tables in the cell "Splash kernels".
"""

import argparse
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
T, WINDOWS = 2048, {"L": 2048, "S": 1024}
BUNDLE = re.compile(r"^\s*0?x?[0-9a-f]+\s+(?:\w\w)?\s*:\s*((?:>\s*)*)\{(.*)$")


def bundles(path):
    """[(depth of the loop that it is in, text)] of each bundle of a schedule."""
    found = []
    for line in path.read_text(errors="replace").split("\n"):
        if match := BUNDLE.match(line):
            found.append([match[1].count(">"), match[2]])
        elif found:
            found[-1][1] += line
    return found


def branches(schedule):
    """[(first bundle, number of bundles)] inside the loop that a predicated branch can jump over, the long ones."""
    ends, found = {}, []
    for i, (_, text) in enumerate(schedule):
        for region in re.findall(r"(?:Start/End empty|End|Start) region (\d+)", text):
            ends.setdefault(region, i)
    for i, (depth, text) in enumerate(schedule):
        branch = re.search(r"sbr\.rel \([^)]*\) target = \$region(\d+)", text)
        if branch and depth and ends.get(branch[1], 0) > i + 20:
            found.append((i + 1, ends[branch[1]] - i))
    return found


def count(schedule):
    """(step, row, block) bundles of a splash kernel."""

    def within(a, b):
        return a != b and b[0] <= a[0] and a[0] + a[1] <= b[0] + b[1] + 2

    found = branches(schedule)
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
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final_bundles"
        nb.compile_for(chip, attend, [jax.ShapeDtypeStruct((8, 8, T, head_dim), jnp.bfloat16)] * 4)
        found = {}
        for path in sorted(Path(folder).glob("*splash_mha_*-final_bundles.txt")):
            found.setdefault(re.search(r"splash_mha_(fwd|dkv|dq)", path.name)[1], count(bundles(path)))
    return found


def expected(chip, kind, head_dim, block, window):
    """Cycles of an active block by 02_train.py's tables."""
    i = nb.BLOCK_SIZES.index(block)
    cycles = nb.BLOCK_CYCLES[chip, kind][head_dim][i]
    return cycles * (nb.WINDOW_FACTOR[chip, kind][i - 2] if window < T and i >= 2 else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="*", default=list(nb.CHIPS))
    parser.add_argument("--head_dims", nargs="*", type=int, default=[128, 256])
    parser.add_argument("--blocks", nargs="*", type=int, default=list(nb.BLOCK_SIZES))
    args = parser.parse_args()
    print(
        "chip   H  block  window   "
        + "".join(f"{kind + ': step  row  block  ratio':>34}" for kind in ("fwd", "dkv", "dq"))
    )
    for chip in args.chips:
        for head_dim in args.head_dims:
            for block in args.blocks:
                for name, window in WINDOWS.items():
                    row = f"{chip} {head_dim:4} {block:6}  {name:6}"
                    try:
                        found = kernels(chip, head_dim, block, window)
                    except nb.CompileError as error:
                        print(row, nb.reason(error)[0])
                        continue
                    for kind in ("fwd", "dkv", "dq"):
                        step, ends, cycles = found[kind]
                        ratio = cycles / expected(chip, kind, head_dim, block, window)
                        row += f"{step:16}{ends:5}{cycles:7}{ratio:6.2f}"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
