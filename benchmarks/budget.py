"""How near a run with a budget ends: the demo of 02_train.py, again and again, some killed, some beside other work.

    python benchmarks/budget.py --runs 20            # 70 minutes; a line a run, and the largest errors at the end
    taskset -c 0 python benchmarks/budget.py         # all of it on one core, which a busy process then halves

Each run has 2 to 5 minutes. Every third is killed (SIGKILL) after its first checkpoint, at a random moment, and started
again 10 seconds later; the break does not count. Beside every other one a process keeps a core busy, from a random
moment in the first 40% on: before the warmdown. The error is that of 02's own seconds, from the start of train to the
last checkpoint.
"""

import argparse
import contextlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(folder, seconds, options):
    command = [sys.executable, str(ROOT / "02_train.py"), f"--hours={seconds / 3600}", "--run_dir=run", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def busy(after):
    """Keeps a core busy from `after` seconds on."""
    spin = f"import time; time.sleep({after})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        yield
    finally:
        process.kill()


def run(seconds, kill, load, options):
    """Returns (seconds that a run says it took, its steps)."""
    with tempfile.TemporaryDirectory() as folder, busy(load) if load else contextlib.nullcontext():
        process = start(folder, seconds, options)
        if kill:
            time.sleep(kill)
            process.kill()
            process.wait()
            time.sleep(10)
            process = start(folder, seconds, options)
        printed, _ = process.communicate()
        if kill and "resumed at step" not in printed:
            raise SystemExit("error: there was no checkpoint before the kill")
        if process.returncode:
            raise SystemExit(f"error: 02_train.py ended with {process.returncode}")
        hours, steps = re.search(r"^cost +([\d.]+)", printed, re.M)[1], re.search(r" in ([\d,]+) steps", printed)[1]
        return 3600 * float(hours), steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--longest", type=float, default=300, help="seconds of the longest budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="of 02_train.py, after --")
    args = parser.parse_args()
    rng, errors = random.Random(args.seed), []
    for number in range(args.runs):
        seconds = rng.uniform(120, args.longest)
        kill = rng.uniform(0.6, 0.8) * seconds if number % 3 == 2 else 0
        load = rng.uniform(0, 0.4) * seconds if number % 2 else 0
        spent, steps = run(seconds, kill, load, args.options)
        errors.append(spent / seconds - 1)
        how = f"killed at {kill:.0f} s" * bool(kill) + f" a core busy from {load:.0f} s" * bool(load)
        print(f"{seconds:4.0f} s  {steps:>6} steps  {errors[-1]:+7.2%}  {how}", flush=True)
    print(f"median of |error| {statistics.median(map(abs, errors)):.2%}, most over {max(errors):+.2%}, "
          f"most under {min(errors):+.2%}")  # fmt: skip


if __name__ == "__main__":
    main()
