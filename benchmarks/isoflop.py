"""Which size is best for a budget of FLOPs? Sizes of 02_train.py or 06_recipe.py, each trained for the same FLOPs.

    python benchmarks/free_text.py /tmp/free                     # 24 million tokens, so that little is read twice
    python benchmarks/isoflop.py run 02 --dataset /tmp/free      # a line of isoflop.jsonl a run
    python benchmarks/isoflop.py run 06 --dataset /tmp/free
    python benchmarks/isoflop.py fit                             # the fits with their errors, and isoflop.png

The sizes have about the shape of the reference, D / L = 64 to 96, and heads of 32. A run has 2,048 tokens a step,
T = 256, and a learning rate that falls with √D. Runs that stand in the file are not run again; a run takes one core, so
start one process a core, each for one recipe.

The *size* of a model is that of its matrices and its head, as nanochat counts it. For each budget a parabola in its
logarithm is fitted to bits per byte, and errors are those of 1,000 fits to values with the noise of the residuals.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
from common import embedded_data, load

WIDTHS = 64, 96, 128, 160  # D
BUDGETS = {4e12: (32, *WIDTHS), 8e12: (32, *WIDTHS, 192), 1.6e13: (*WIDTHS, 192)}  # FLOPs
NOTEBOOKS = {"02": "02_train.py", "06": "06_recipe.py"}


def shape(nb, width, dataset):
    """Returns the Config of a width, without its number of steps."""
    demo = nb.Config.demo()
    return demo.replace(
        n_head=width // 32, head_dim=32, aspect_ratio=width // max(1, width // 64), dataset=dataset, mesh=(1, 1),
        learning_rate=demo.learning_rate * (256 / width) ** 0.5,
    )  # fmt: skip


def train(nb, width, budget, seed, dataset):
    """Trains one size for a budget. Returns a dict: size, tokens, bits per byte of the validation shard, seconds."""
    config, started = shape(nb, width, dataset), time.perf_counter()
    steps = round(budget / nb.flops_per_token(config) / config.tokens_per_step)
    config = config.replace(num_iterations=steps, seed=seed)
    shards, validation, tokenizer = embedded_data(nb, config)
    state, losses = nb.init_train_state(config), []
    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        for _ in range(steps):
            state, metrics = nb.train_step(config, state, *next(loader))
            losses = [*losses[-2:], metrics["loss"]]
            nb.jax.block_until_ready(losses[0])
    counts = nb.count_params(config)
    bpb = nb.evaluate(config, state.params, nb.validation_batches(config, tokenizer, validation))["bpb"]
    return {
        "width": width, "depth": config.depth, "size": counts["attn"] + counts["mlp"] + counts["lm_head"],
        "parameters": counts["total"], "steps": steps, "tokens": steps * config.tokens_per_step, "bpb": float(bpb),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args):
    nb = load(NOTEBOOKS[args.recipe])
    for budget in args.budgets:
        for width in BUDGETS[budget]:
            wanted = {"recipe": args.recipe, "budget": budget, "width": width, "seed": args.seed,
                      "dataset": args.dataset}  # fmt: skip
            if any(wanted.items() <= row.items() for row in read(args.results)):
                continue
            row = wanted | train(nb, width, budget, args.seed, args.dataset)
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{args.recipe} {budget:.1e} FLOPs, D = {width}: {row['bpb']:.4f} bpb, {row['seconds']:.0f} s",
                flush=True,
            )


def vertex(sizes, bpb):
    """Returns (ln of the best size, bits per byte there, curvature) of a parabola through the points."""
    x = np.log(sizes)
    a, b, c = np.polyfit(x - x.mean(), bpb, 2)
    return x.mean() - b / (2 * a), c - b * b / (4 * a), a


def fits(rows, seed, draws=1000):
    """Returns {budget: [(ln size, bits per byte, curvature), …]}: the fit, then `draws` fits to noisy values."""
    rng, found = np.random.default_rng(seed), {}
    for budget in sorted({row["budget"] for row in rows}):
        some = [row for row in rows if row["budget"] == budget]
        if len(some) < 5:  # its runs are not done
            continue
        sizes, bpb = (np.array([row[name] for row in some]) for name in ("size", "bpb"))
        x = np.log(sizes)
        curve = np.polyval(np.polyfit(x - x.mean(), bpb, 2), x - x.mean())
        noise = math.sqrt(np.sum((bpb - curve) ** 2) / max(1, len(bpb) - 3))
        noisy = [vertex(sizes, curve + noise * rng.normal(size=len(bpb))) for _ in range(draws)]
        found[budget] = np.array([vertex(sizes, bpb), *noisy])
    return found


def fit(args):
    from matplotlib.figure import Figure

    have = read(args.results)
    if {row["recipe"] for row in have} != {*NOTEBOOKS} or len({row.get("dataset") for row in have}) > 1:
        raise SystemExit(f"error: {args.results} must have runs of 02 and of 06, all on one dataset")
    panels, best = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2, sharey=True), {}
    for panel, recipe in zip(panels, NOTEBOOKS, strict=True):
        rows = [row for row in have if row["recipe"] == recipe]
        found = best[recipe] = fits(rows, int(recipe))
        print(f"{recipe}: | FLOPs | best size, million | its tokens a parameter | bits per byte | curvature |")
        for budget, values in found.items():
            some = sorted((row["size"], row["bpb"], row["tokens"]) for row in rows if row["budget"] == budget)
            size, error = np.exp(values[0, 0]), np.std(np.exp(values[1:, 0]))
            tokens = np.exp(np.interp(math.log(size), *np.log([(s, t) for s, _, t in some]).T))
            print(f"| {budget:.1e} | {size / 1e6:.2f} ± {error / 1e6:.2f} | {tokens / size:.1f} | {values[0, 1]:.4f} ± "
                  f"{values[1:, 1].std():.4f} | {values[0, 2]:.4f} ± {values[1:, 2].std():.4f} |")  # fmt: skip
            (line,) = panel.plot(
                [s / 1e6 for s, *_ in some], [bpb for _, bpb, _ in some], "o", label=f"{budget:.1e} FLOPs"
            )
            x = np.linspace(*np.log([some[0][0], some[-1][0]]), 50)
            panel.plot(np.exp(x) / 1e6, values[0, 1] + values[0, 2] * (x - values[0, 0]) ** 2, color=line.get_color())
        if len(found) > 1:
            for name, column in (("size ∝ FLOPs^", 0), ("bits per byte ∝ FLOPs^", 1)):
                y = np.array([values[:, column] for values in found.values()])
                slopes = np.polyfit(np.log([*found]), y if column == 0 else np.log(y), 1)[0]
                print(f"{recipe}: {name}{slopes[0]:.3f} ± {slopes[1:].std():.3f}")
        print(f"{recipe}: curvature / bits per byte {np.mean([v[0, 2] / v[0, 1] for v in found.values()]):.4f}")
        panel.set(xscale="log", title=f"{recipe}", xlabel="size: matrices and head, million parameters")
        panel.set_xticks([0.2, 0.5, 1, 2], labels=["0.2", "0.5", "1", "2"])
        panel.minorticks_off()
        panel.legend()
    logs = {recipe: np.log([values[:, 1] for values in found.values()]) for recipe, found in best.items()}
    slopes = [np.polyfit(np.log([*best["06"]]), y, 1)[0] for y in logs.values()]
    if [*best["02"]] != [*best["06"]]:
        raise SystemExit(f"error: done are {[*best['02']]} FLOPs of 02 and {[*best['06']]} of 06")
    needed = np.exp((logs["06"] - logs["02"]) / np.mean(slopes, axis=0))  # FLOPs of 02 over those of 06, same bpb
    for budget, values in zip(best["06"], needed, strict=True):
        print(f"{budget:.1e} FLOPs: 02 needs {values[0]:.2f} ± {values[1:].std():.2f} times those of 06")
    panels[0].set_ylabel("bits per byte")
    panels[0].figure.savefig(args.results.with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("runs/isoflop.jsonl"))
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("recipe", choices=NOTEBOOKS)
    runs.add_argument("--budgets", nargs="+", type=float, choices=BUDGETS, default=[*BUDGETS])
    runs.add_argument("--seed", type=int, default=0)
    runs.add_argument("--dataset", default="embedded", help="'embedded', or a folder")
    runs.set_defaults(action=run)
    commands.add_parser("fit").set_defaults(action=fit)
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.action(args)


if __name__ == "__main__":
    main()
