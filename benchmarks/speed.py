"""The estimate of 05_preflight.py against published steps of a real TPU v6e.

    python benchmarks/speed.py [--rows einsum …] [--keep FOLDER]

The published figures are those of vorushin/tpuchat (README, log and blog, February 2026), one v6e, T=2048; its step
is in reference.py. Its last two rows ran in bfloat16. The last one took 302 ms, then 275: here it is the mean.

Columns: published ms; the estimate and its error; of it the kernels; the compiler's peak HBM and the published one; the
seconds to compile. --keep writes the compiled programs to a folder, and reads those that are there: a change of the
estimate then takes seconds.

Not known of the published steps: how their data were fed, the version of the compiler, the form of the loss. LEAST_STEP
was chosen with these rows in view. No row is held out, so the error is that of a fit.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from common import load  # noqa: E402
from reference import reference_step  # noqa: E402
from step import their_kernels  # noqa: E402

preflight = load("05_preflight.py")
WIDE = dict(heads=4, kv_heads=1, head_dim=256, impl="splash", pattern="L")
ROWS = {  # published ms, published peak GiB or None, arguments of reference_step
    "einsum, B=2": (65, 13.3, dict(B=2)),
    "einsum, B=4": (127, 19.9, dict(B=4)),
    "einsum, B=6": (198, 28.8, dict(B=6)),
    "splash 128, B=8": (400, None, dict(B=8, impl="splash", block=128)),
    "splash 256, B=8": (208, 23.8, dict(B=8, impl="splash", block=256)),
    "splash 512, B=8": (161, 23.3, dict(B=8, impl="splash", block=512)),
    "splash 1024, B=8, 2 KV heads": (137, None, dict(B=8, impl="splash", kv_heads=2)),
    "splash 1024, B=8, 4×256, 1 KV": (118, None, dict(B=8, **WIDE)),
    "8 layers, SwiGLU, B=4": (22, None, dict(B=4, depth=8, swiglu=3072, dtype=jnp.bfloat16, **WIDE)),
    "the same, 16×4 accumulated": (288.5, 5.6, dict(B=4, depth=8, swiglu=3072, dtype=jnp.bfloat16, parts=16, **WIDE)),
}


def compiled(name, arguments, folder):
    """Returns (Compiled, kernels) of a row, from `folder` if they are there."""
    path = folder and Path(folder, f"{name}.json")
    if path and path.exists():
        program, kernels = json.loads(path.read_text(encoding="utf-8"))
        return preflight.Compiled(*program), {(kernel, window): seconds for kernel, window, seconds in kernels}
    step, leaves, donated, _ = reference_step(**arguments)
    program = preflight.compile_for("v6e", step, leaves, donated)
    kernels = their_kernels("v6e", **arguments)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([program, [(*key, seconds) for key, seconds in kernels.items()]]), encoding="utf-8")
    return program, kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of the names of the rows to compute")
    parser.add_argument("--keep", metavar="FOLDER", help="where compiled programs stay")
    args = parser.parse_args()

    x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    program = preflight.compile_for("v6e", lambda a, b: a @ b, [x, x])
    rate = 2e-12 * 8192**3 / preflight.estimate(program.text, "v6e", [0], {}).seconds
    print(f"8192³ bfloat16 matmul on a v6e: {rate:.0f} TFLOP/s; published 622 to 638")
    print(f"{'v6e, ms a step':32}{'published':>10}{'estimate':>10}{'error':>8}{'kernels':>9}{'peak GiB':>10}"
          f"{'published':>11}{'compile':>9}")  # fmt: skip
    errors = []
    for name, (published, peak, arguments) in ROWS.items():
        if not any(word in name for word in args.rows):
            continue
        started = time.perf_counter()
        program, kernels = compiled(name, arguments, args.keep)
        seconds = time.perf_counter() - started
        answer = preflight.estimate(program.text, "v6e", reference_step(**arguments)[3], kernels)
        own = sum(seconds for (part, _), seconds in answer.parts.items() if part == "attention kernel")
        errors.append(1e3 * answer.seconds / published - 1)
        print(f"{name:32}{published:10.1f}{1e3 * answer.seconds:10.1f}{errors[-1]:+8.1%}{1e3 * own:9.1f}"
              f"{program.peak / 2**30:10.1f}{peak or 'n/a':>11}{seconds:8.0f}s", flush=True)  # fmt: skip
        if any("online-softmax" not in kernel for kernel in answer.uncounted):  # that one is XLA's own: its bytes do
            print(f"    not counted but for their bytes: {answer.uncounted[:4]}")
    print(f"mean absolute error {statistics.mean(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}, "
          f"mean {statistics.mean(errors):+.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
