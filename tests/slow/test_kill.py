"""Kills training at random moments, and compares how it ends with a run that nothing happened to.

    python benchmarks/kill.py [--kills 25] [--seed 0]

A small run of the demo's kind, as a script, with a backup folder; SIGKILL after a random time, so that it falls into
steps, evaluations, the writing of checkpoints or their copies; the same start goes on. Every fifth time the run folder
is deleted as well, as with a runtime that is taken away: then the backup is all there is. At the end parameters,
moments and metrics must be those of the uninterrupted run, to the bit. Prints where each kill fell.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(
    n_head=2, head_dim=64, aspect_ratio=64, seq_len=64, device_batch_size=4, num_iterations=3000, log_interval=5,
    eval_interval=25, sample_interval=0, save_interval=4, eval_tokens=2048, final_eval_tokens=2048, profile_steps=0,
)  # fmt: skip


def command(folder):
    settings = SETTINGS | {"run_dir": folder / "run", "backup": folder / "backup"}
    return [sys.executable, ROOT / "02_train.py", *(f"--{name}={value}" for name, value in settings.items())]


def ending(folder):
    """(bytes of the last state, lines of the metrics without the rates) of a finished run."""
    state = (
        folder / "run" / "checkpoints" / f"step_{SETTINGS['num_iterations']:08d}" / "state.safetensors"
    ).read_bytes()
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return state, [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "data_wait_seconds")} for line in lines
    ]


def moment(folder):
    """What lies around after a kill: unfinished checkpoints and copies tell where it fell."""
    writing = bool(list(folder.glob("run/checkpoints/.*.tmp")))
    copying = bool(list(folder.glob("backup/run/checkpoints/.*.tmp")))
    return "writing a checkpoint" if writing else "copying it to the backup" if copying else "a step or an evaluation"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, killed, moments = random.Random(args.seed), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        whole.mkdir()
        broken.mkdir()
        started = time.perf_counter()
        subprocess.run(command(whole), cwd=whole, check=True, stdout=subprocess.DEVNULL)
        print(f"uninterrupted: {time.perf_counter() - started:.0f} s", flush=True)
        want = ending(whole)
        while killed < args.kills:
            process = subprocess.Popen(command(broken), cwd=broken, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:  # imports and the first step are always the same: the kill comes after them
                if line.startswith("first step"):
                    break
            time.sleep(rng.uniform(0, 4))
            process.kill()
            if process.wait() != -9:
                sys.exit(f"the run ended after {killed} kills: give it more steps")
            killed += 1
            where = moment(broken)
            moments[where] = moments.get(where, 0) + 1
            steps = sorted(int(path.name[5:]) for path in broken.glob("run/checkpoints/step_*"))
            lost = killed % 5 == 0
            if lost:
                shutil.rmtree(broken / "run")
            print(f"kill {killed}: {where}, newest checkpoint {steps[-1] if steps else None}"
                  f"{', run folder deleted' if lost else ''}", flush=True)  # fmt: skip
        subprocess.run(command(broken), cwd=broken, check=True, stdout=subprocess.DEVNULL)
        have = ending(broken)
        for name, a, b in zip(("weights and moments", "metrics"), have, want, strict=True):
            print(f"{name}: {'identical' if a == b else 'DIFFERENT'}")
        print(f"{killed} kills: {moments}")
        sys.exit(have != want)


if __name__ == "__main__":
    main()
