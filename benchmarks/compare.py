"""02_train.py and 04_maxtext.py on the embedded corpus: the demos, equal tokens, equal parameters, three seeds.

    python benchmarks/compare.py [--seeds 0 1 2] [--steps 800] [--picture docs/02_and_04.png]

Both have two layers of width 256, a vocabulary of 4,096, the same data in the same order and the same schedule; each
keeps its own demo's settings otherwise, but for 04's `mlp_dim`: 683, so that three matmuls have as many weights as the
two of 02. Prints the bits per byte of every run on the whole validation shard, and draws
the validation curves. A quarter of an hour or more on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "02_and_04.png")
    args = parser.parse_args()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, ends, labels = figure.subplots(), {}, []
    for name, color in (("02_train.py", "tab:blue"), ("04_maxtext.py", "tab:orange")):
        nb = load(ROOT / name)
        config = nb.Config.demo().replace(
            num_iterations=args.steps, eval_interval=50, sample_interval=0, save_interval=0, profile_steps=0
        )
        if name == "04_maxtext.py":  # past Config's check: no multiple of 256, and this CPU has no matrix unit
            object.__setattr__(config, "mlp_dim", 683)
        label = f"{name}, {nb.count_params(config)['total'] / 1e6:.2f}M parameters"
        for seed in args.seeds:
            object.__setattr__(config, "seed", seed)
            with tempfile.TemporaryDirectory() as folder:
                object.__setattr__(config, "run_dir", f"{folder}/run")
                result = nb.train(config)
                lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "val_bpb" in row]
            ends.setdefault(name, []).append(result["val_bpb"])
            tokens = [row["step"] * config.tokens_per_step / 1e6 for row in rows]
            axes.plot(tokens, [row["val_bpb"] for row in rows], color=color, alpha=0.7)
        labels.append((axes.lines[-1], label))
        print(f"{label}: {'  '.join(f'{x:.4f}' for x in ends[name])} bits per byte", flush=True)
    axes.set(xlabel="million tokens", ylabel="validation bits per byte", ylim=(None, 2.6))
    axes.legend(*zip(*labels, strict=True))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    means = [statistics.mean(values) for values in ends.values()]
    spread = [statistics.stdev(values) if len(values) > 1 else float("nan") for values in ends.values()]
    print(f"04 - 02: {means[1] - means[0]:+.4f}; standard deviations over seeds {spread[0]:.4f}, {spread[1]:.4f}")
    print(f"picture {args.picture}")


if __name__ == "__main__":
    main()
