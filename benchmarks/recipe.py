"""Trains recipes side by side: 02_train.py and 06_recipe.py, whole and without each part, some seeds each.

    python benchmarks/recipe.py run 02 06 06-muon              # three seeds each; a line of results.jsonl a run
    python benchmarks/recipe.py table                          # the table, and recipe.png: loss against tokens and time

A recipe is `reference` (02's model with the AdamW of the reference: 3e-4 for all weights, β2 0.95), `02`, `04`, `06`,
`06-PART` (without a part), `06@0.8` (80% of the steps), or a notebook with fields of its Config, `02:beta2=0.99`.

Shapes: `demo` is the demo (2 layers, T = 256), 800 steps of 2,048 tokens; `deep` has 4 layers and T = 512, 800 steps of
4,096 tokens. Both are scored on the whole validation shard. Runs that stand in results.jsonl are not run again: after
a change of a notebook, name another file. A run is nearly as fast on one core as on two, so start one process a core:
`taskset -c 0 python benchmarks/recipe.py --results runs/recipe/2.jsonl run …`.
"""

import argparse
import collections
import json
import re
import statistics
import time
from pathlib import Path

import numpy as np
from common import embedded_data, load

SHAPES = {"demo": {}, "deep": {"aspect_ratio": 64, "seq_len": 512}}  # changes of the demos of 02 and 06
STEPS, CURVE = 800, 20  # steps of a run; a point of its curve is the mean loss of so many


def parse(recipe, shape):
    """Returns (notebook, changes of its demo, share of the steps). Raises SystemExit for what is no recipe."""
    match = re.fullmatch(r"(reference|02|04|06)(?:-([a-z_,]+))?(?::([^@]+))?(?:@([\d.]+))?", recipe)
    if not match or (match[2] and match[1] != "06"):
        raise SystemExit(f"error: recipe {recipe!r}: must be like reference, 02, 06, 06-muon, 06@0.8 or 02:beta2=0.99")
    name, without, fields, share = match.groups()
    if name == "04" and shape != "demo":
        raise SystemExit(f"error: recipe {recipe!r}: the shape {shape!r} is one of 02 and 06")
    changes = {"learning_rate": 3e-4, "beta2": 0.95} if name == "reference" else {"without": without} if without else {}
    nb = load({"04": "04_maxtext.py", "06": "06_recipe.py"}.get(name, "02_train.py"))
    nb.HEAD_RATE = 1 if name == "reference" else 4  # 06 has none
    nb.jax.clear_caches()  # it is a constant of the compiled step
    fields = fields.split(",") if fields else []
    given = nb.parse_args([f"--{field}" for field in fields], nb.Config.demo())
    changes |= {name: getattr(given, name) for name, _, _ in (field.partition("=") for field in fields)}
    return nb, changes, float(share or 1)


def train(recipe, shape, seed, dataset):
    """Trains a recipe. Returns a dict: bits per byte of the validation shard, the curve, parameters, seconds."""
    nb, changes, share = parse(recipe, shape)
    steps = round(STEPS * share)
    config = nb.Config.demo().replace(
        **{"seed": seed, "num_iterations": steps, "dataset": dataset, "mesh": (1, 1)} | SHAPES[shape] | changes
    )
    shards, validation, tokenizer = embedded_data(nb, config)
    batches = nb.validation_batches(config, tokenizer, validation)
    state, losses = nb.init_train_state(config), []
    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        for step in range(steps):
            if step == 1:  # the first one compiles
                started = time.perf_counter()
            state, metrics = nb.train_step(config, state, *next(loader))
            losses.append(metrics["loss"])
            nb.jax.block_until_ready(losses[-3:][0])
        seconds = time.perf_counter() - started
    curve = np.array(nb.jax.device_get(losses))[: steps // CURVE * CURVE].reshape(-1, CURVE).mean(axis=1)
    return {
        "recipe": recipe, "shape": shape, "seed": seed, "dataset": Path(dataset).name, "steps": steps,
        "tokens": steps * config.tokens_per_step, "parameters": nb.count_params(config)["total"],
        "bpb": float(nb.evaluate(config, state.params, batches)["bpb"]), "seconds": round(seconds, 1),
        "curve": [round(float(x), 4) for x in curve],
    }  # fmt: skip


def key(run):
    return run["recipe"], run["shape"], run["seed"], run["dataset"]


def read(path):
    """Returns the runs of results.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args):
    for seed in args.seeds:
        for recipe in args.recipes:
            wanted = {"recipe": recipe, "shape": args.shape, "seed": seed, "dataset": Path(args.dataset).name}
            if key(wanted) in map(key, read(args.results)):
                continue
            result = train(recipe, args.shape, seed, args.dataset)
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{recipe:24} {args.shape} seed {seed}: {result['bpb']:.4f} bpb, {result['seconds']:.0f} s", flush=True
            )


def table(args):
    groups = collections.defaultdict(list)
    for result in read(args.results):
        groups[result["dataset"], result["shape"], result["recipe"]].append(result)
    print("| data, shape | recipe | parameters | tokens | bits per byte | seeds | seconds |")
    print("|---|---|---|---|---|---|---|")
    for (dataset, shape, recipe), runs in sorted(groups.items()):
        bits = [r["bpb"] for r in runs]
        spread = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        size, tokens = runs[0]["parameters"] / 1e6, runs[0]["tokens"] / 1e6
        print(f"| {dataset}, {shape} | {recipe} | {size:.2f}M | {tokens:.2f}M | {statistics.mean(bits):.4f}{spread} | "
              f"{len(bits)} | {statistics.median(r['seconds'] for r in runs):.0f} |")  # fmt: skip
    draw(groups, args.results.with_name("recipe.png"))


def draw(groups, path):
    """Draws the mean curves of 02, 06 and the reference on the demo: loss against tokens and seconds of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        recipe: runs
        for (dataset, shape, recipe), runs in groups.items()
        if (dataset, shape) == ("embedded", "demo") and recipe in ("reference", "02", "06")
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for recipe, runs in shown.items():
        curve = np.mean([r["curve"] for r in runs], axis=0)
        share = np.arange(1, len(curve) + 1) / len(curve)
        seconds = statistics.median(r["seconds"] for r in runs)
        for axis, x in zip(axes, (share * runs[0]["tokens"] / 1e6, share * seconds), strict=True):
            axis.plot(x, curve, label=recipe)
    for axis, label in zip(axes, ("million tokens", "seconds"), strict=True):
        axis.set(xlabel=label, ylim=(3.8, 6.5))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss, nats a token")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("runs/recipe/results.jsonl"))
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("recipes", nargs="+")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--shape", choices=SHAPES, default="demo")
    runs.add_argument("--dataset", default="embedded", help="'embedded', or a folder")
    runs.set_defaults(action=run)
    commands.add_parser("table").set_defaults(action=table)
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.action(args)


if __name__ == "__main__":
    main()
