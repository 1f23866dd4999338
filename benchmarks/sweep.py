"""03_worker's search: wandb's own engine on real trials, and what a process keeps from trial to trial.

    pip install --no-deps sweeps; pip install scikit-learn jsonref jsonschema pyyaml      # sweeps pins an old numpy
    python benchmarks/sweep.py [--trials 24] [--steps 120]

1. 20 trials of learning rate and weight decay: how often the step was compiled, when each trial had its first metrics,
   and resident memory after the 2nd and the 20th.
2. A sweep of `--trials` by wandb's Bayesian search with hyperband, on the definition of 03_worker.py: suggestions and
   stops are those of the package `sweeps`, trials are real. Its best against the base, which is the first trial; both
   again with two other seeds, since the best of many trials is partly luck.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")

import sweeps  # noqa: E402

from tools.notebooks import load  # noqa: E402

nb = load(ROOT / "03_worker.py")


class Stopped(Exception):
    """Hyperband has given up on the trial."""


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory_and_compilation(base):
    base, rows = base.replace(num_iterations=20, eval_tokens=2048, final_eval_tokens=2048), []
    for trial in range(20):
        run = nb.wandb.init(mode="offline", dir=base.run_dir, reinit="finish_previous")
        started, first = time.perf_counter(), []

        def first_line(step, values, started=started, first=first):
            first.append(time.perf_counter() - started)

        config = nb.trial_config(base, dict(learning_rate=1e-3 + 1e-4 * trial, weight_decay=0.01 * trial), run.id)
        nb.train(config, report=first_line)
        run.finish()
        rows.append((first[0], resident()))
    print(f"20 trials: the step was compiled {nb.train_step._cache_size()} times")
    print(f"first metrics after {rows[0][0]:.1f} s in trial 1, {statistics.median(r[0] for r in rows[1:]):.2f} s later")
    print(f"resident {rows[1][1] / 2**20:.0f} MiB after trial 2, {rows[-1][1] / 2**20:.0f} MiB after trial 20: "
          f"{rows[-1][1] / rows[1][1] - 1:+.1%}", flush=True)  # fmt: skip


def search(base, trials):
    definition = nb.sweep_definition(base, trials)
    history, done = [], []
    for trial in range(trials):
        if trial == 0:
            suggestion = nb.base_suggestion(base)
        else:
            found = sweeps.next_run(definition, history)
            if found is None:
                break
            suggestion = {name: entry["value"] for name, entry in found.config.items()}
        run = sweeps.SweepRun(
            name=str(trial), config={name: {"value": x} for name, x in suggestion.items()}, state="running"
        )
        history.append(run)

        def report(step, values, run=run):
            if "val_bpb" in values:
                run.history.append({"val_bpb": values["val_bpb"]})
                run.summary_metrics = {"val_bpb": values["val_bpb"]}
                if any(stopped.name == run.name for stopped in sweeps.stop_runs(definition, history)):
                    raise Stopped

        try:
            nb.train(nb.trial_config(base, suggestion, str(trial)), report=report)
            run.state, state = sweeps.RunState.finished, "finished"
            done.append((run.summary_metrics["val_bpb"], suggestion))
        except Stopped:
            run.state, state = sweeps.RunState.killed, f"stopped at evaluation {len(run.history)}"
        except nb.InputError as error:
            run.state, state = sweeps.RunState.failed, f"failed: {error}"
        shown = ", ".join(f"{name} {x:.3g}" for name, x in suggestion.items())
        print(f"trial {trial}: {run.summary_metrics.get('val_bpb', 0):.4f} {state}; {shown}", flush=True)
    return min(done, key=lambda pair: pair[0]), [run.state for run in history]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = nb.base_config().replace(run_dir=f"{folder}/sweep", num_iterations=args.steps)
        Path(base.run_dir).mkdir()
        memory_and_compilation(base)
        (best, suggestion), states = search(base, args.trials)
        print(f"{len(states)} trials, {states.count('killed')} stopped; best {best:.4f} with {suggestion}")
        for name, values in (("base", nb.base_suggestion(base)), ("best", suggestion)):
            ends = [
                nb.train(nb.trial_config(base.replace(seed=seed), values, f"{name}-{seed}"))["val_bpb"]
                for seed in (1, 2, 3)
            ]
            print(f"{name}, seeds 1, 2, 3: {'  '.join(f'{x:.4f}' for x in ends)}, mean {statistics.mean(ends):.4f}")


if __name__ == "__main__":
    main()
