"""What does the host's work cost: saving, logging, loading? In parts of the work that it stands beside.

    python benchmarks/host.py [checkpoint log loader formats] [--rounds 7]

checkpoint: a model of the demo's kind, but larger. Prints the time that save() holds up the training, as a ratio to the
    copy of the state to host memory alone, and to a step; the step beside which the file is written, as a ratio to one
    without; and the bytes on the disk beside those of the state.

log: blocks of the demo's steps with norms, metrics.jsonl, TensorBoard and wandb offline, every 5 steps as in the demo,
    and without. Prints the ratio of the two, the median of the pairs with its quartiles, and the time of the norms and
    of a line as a share of the steps, which is less noisy.

loader: tokens per second of PrefetchDataLoader, from parquet to packed batches on the device, as a ratio to
    ThreadPoolExecutor.map of `encode_ordinary` with as many threads (the target is 0.85), for documents of the embedded
    corpus as they are (29,000 characters on average) and cut to 4,700, about the average of FineWeb-Edu. The ratio of
    tokens per second of CPU time of all threads says how much work the loader adds; other work on the machine hardly
    changes it. As many tokens are read ahead at the end as at the start.

formats: the same ratio for the short documents in other formats, with two threads, shuffled and not, and for JSON lines
    that are streamed from a Hub on the loopback interface for the first time.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["WANDB_SILENT"] = "true"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from common import embedded_data, in_turn, load, timed  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.hub_server import HubServer  # noqa: E402

TARGET = 0.85
nb = load("02_train.py")


def quartiles(values, form=".2f"):
    """Returns 'median (first to third quartile)'."""
    low, middle, high = (format(x, form) for x in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle} ({low} to {high})"


def checkpoint(rounds):
    config = nb.Config.demo().replace(n_head=8, vocab_size=16384, keep_checkpoints=1)
    tokens, state = np.zeros(config.batch_shape, np.int32), nb.init_train_state(config)
    size = sum(x.nbytes for x in nb.named_arrays(state).values())

    def step():
        nonlocal state
        state, _ = nb.train_step(config, state, tokens, tokens)
        return state

    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        saver = nb.Checkpointer(config, Path(folder))
        parts = {
            "step": step, "copy": lambda: nb.host_copy(Path(folder), state)[0], "another step": step,
            "save": lambda: saver.save(state), "step beside the writing": step, "rest of the writing": saver.close,
        }  # fmt: skip
        seconds = {name: statistics.median(values) for name, values in in_turn(parts, rounds).items()}
        written = sum(path.stat().st_size for path in saver.newest.iterdir())
    print(f"a state of {size / 2**20:.1f} MiB, on the disk {written / 2**20:.1f} MiB, {written / size - 1:+.2%}")
    print(", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items()))
    for name, other in (("save", "copy"), ("save", "step"), ("step beside the writing", "step")):
        print(f"{name} / {other}: {seconds[name] / seconds[other]:.2f}")


def log(rounds, block=25):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = Path(folder)
        config = nb.Config.demo().replace(run_dir=folder, wandb_mode="offline", num_iterations=10_000)
        shards, _, tokenizer = embedded_data(nb, config)
        state, first, lines = nb.init_train_state(config), 0, itertools.count()
        live = nb.open_wandb(config, run, None)
        stack.callback(live.finish)
        sinks = {
            "file": nb.file_sink(run),
            "events": nb.tensorboard_sink(config, run, stack),
            "wandb": nb.wandb_sink(live),
        }
        watch = nb.RunLog(config, run, 0, sinks, report=lambda *_: None)
        loader = stack.enter_context(nb.PrefetchDataLoader(config, tokenizer, shards))

        def steps(logged):
            nonlocal state, first
            for step in range(first, first + block):
                state, metrics = nb.train_step(config, state, *next(loader))
                if logged:
                    if nb.due(step, config.log_interval):
                        metrics |= nb.state_norms(state)
                    watch.train_step(step, metrics)
            first += block
            return state

        def line():
            watch.write(next(lines), **dict.fromkeys(norms, 1.0), loss=1.0, grad_norm=1.0)

        norms = jax.device_get(nb.state_norms(steps(True)))  # compiles
        seconds = in_turn({"with": lambda: steps(True), "without": lambda: steps(False)}, rounds)
        ratios = [a / b for a, b in zip(*seconds.values())]
        print(f"{rounds} pairs of {block} steps: with the log / without {quartiles(ratios, '.3f')}")
        interval = config.log_interval * statistics.median(seconds["without"]) / block
        parts = {"norms": lambda: nb.state_norms(state), "a line": line}
        for name, values in in_turn(parts, 20).items():
            cost = statistics.median(values)
            print(f"{name}: {1e3 * cost:.1f} ms, {cost / interval:.2%} of {config.log_interval} steps")


def loader_rates(config, tokenizer, shards, threads, tokens):
    """Returns tokens per second, and per second of CPU time, of the loader."""
    steps = tokens // config.tokens_per_step
    with nb.PrefetchDataLoader(config, tokenizer, shards, threads=threads) as loader:
        next(loader)
        cpu = time.process_time()
        seconds, _ = timed(lambda: [next(loader) for _ in range(steps)][-1])
        return np.array([steps * config.tokens_per_step / s for s in (seconds, time.process_time() - cpu)])


def map_rates(tokenizer, texts, threads):
    """The same of encode_ordinary in a pool of threads."""
    cpu = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        seconds, counts = timed(lambda: list(pool.map(lambda text: len(tokenizer.encode_ordinary(text)), texts)))
    return np.array([sum(counts) / s for s in (seconds, time.process_time() - cpu)])


def shard_of(file):
    """Returns a function that returns the Shard of one file."""
    if not hasattr(nb, "READERS"):
        nb.execute_part_one("08_data.py")
    return functools.partial(nb.open_own_shard, nb.Shard(str(file), (file,), reader=nb.READERS[nb.kind_of(file)]))


def formats(rounds):
    config = nb.Config.demo()
    shards, _, tokenizer = embedded_data(nb, config)
    texts = [text for fetch in shards for _, text in nb.read_documents(fetch())]
    short = [text[i : i + 4700] for text in texts for i in range(0, len(text), 4700)]
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in short)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in short).encode()
    with tempfile.TemporaryDirectory() as folder, HubServer({"/datasets/me/x/resolve/main/a.jsonl": lines}) as hub:
        folder = Path(folder)
        os.environ |= {"HF_ENDPOINT": hub.url, "HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
        (folder / "a.jsonl").write_bytes(lines)
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in short)])
        pq.write_table(pa.table({"text": short}), folder / "a.parquet", row_group_size=1000)
        files = {name: folder / name for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv")}
        files["streamed a.jsonl"] = nb.HubFile("me/x", "a.jsonl", "main", len(lines), hashlib.sha256(lines).hexdigest())
        print("format                   shuffled  ratio to map (quartiles)   of CPU time")
        for name, file in files.items():
            for shuffle in (0, 1000):
                pairs = []
                for _ in range(rounds):
                    want = map_rates(tokenizer, short, 2)
                    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the stream is downloaded anew
                    pairs.append(
                        loader_rates(config.replace(shuffle=shuffle), tokenizer, [shard_of(file)], 2, tokens) / want
                    )
                wall, cpu = zip(*pairs)
                print(f"{name:25}{shuffle:8}  {quartiles(wall):25}  {quartiles(cpu)}", flush=True)


def loader(rounds):
    config = nb.Config.demo()
    shards, _, tokenizer = embedded_data(nb, config)
    texts = [text for fetch in shards for _, text in nb.read_documents(fetch())]
    short = [text[i : i + 4700] for text in texts for i in range(0, len(text), 4700)]
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    print("documents  threads    batch         map      loader  ratio (quartiles)      of CPU time")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "short.parquet"
        pq.write_table(pa.table({"text": short}), path, row_group_size=1000)
        for documents, files in ((texts, shards), (short, [shard_of(path)])):
            for threads in (1, 2):
                for shape in (config, config.replace(device_batch_size=4, seq_len=2048)):
                    pairs = [
                        (map_rates(tokenizer, documents, threads),
                         loader_rates(shape, tokenizer, files, threads, tokens))
                        for _ in range(rounds)
                    ]  # fmt: skip
                    mapped, loaded = (statistics.median(rates[0] for rates in side) for side in zip(*pairs))
                    wall, cpu = zip(*(have / want for want, have in pairs))
                    verdict = "ok" if statistics.median(wall) >= TARGET else f"below {TARGET}"
                    print(f"{len(documents):9,}{threads:9}  {shape.device_batch_size:2} × {shape.seq_len:<4}"
                          f"{mapped:12,.0f}{loaded:12,.0f}  {quartiles(wall):22} {quartiles(cpu):22} {verdict}",
                          flush=True)  # fmt: skip


def main():
    parts = {"checkpoint": checkpoint, "log": log, "loader": loader, "formats": formats}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(parts), choices=list(parts), metavar="|".join(parts))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in args.parts:
        print(f"--- {name}, {os.cpu_count()} cores", flush=True)
        parts[name](args.rounds)


if __name__ == "__main__":
    main()
