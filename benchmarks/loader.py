"""How much of the tokenizer's speed does the data pipeline keep?

    python benchmarks/loader.py [--repeats 7]

In one process, in turn, for 1 and for 2 threads, on the training text of the embedded corpus, with its documents whole
(29,000 characters on average) and cut to 4,700, about the average of FineWeb-Edu, where work per document weighs more:

  - loop: `encode_ordinary` of every document, in memory, one after the other;
  - map: the same by ThreadPoolExecutor.map with n threads;
  - loader: what a training loop gets from PrefetchDataLoader(threads=n), from reading parquet to packed batches on the
    device, for the demo's batch shape and for 4 sequences of 2,048 tokens. The clock starts when the first batch is
    there and stops as many tokens later as the text has: as much is read ahead at the end as at the start.

Prints medians of tokens/s, and the median ratio of the loader to map (as many threads; with quartiles; the target is
0.85) and to the loop, of the same round. `CPU` is the ratio to map in tokens per second of CPU time of all threads.

On a machine that is busy with something else the rates and even their ratio vary. The CPU ratio hardly does: it says
how much work the pipeline adds. Packing has a thread of its own beside those that encode, so with a core to spare the
ratio can pass 1. The loop has two advantages over any thread: tiktoken is some 15% slower in threads other than the
first that used it, and two threads fight for the GIL to build their Python lists.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.notebooks import load  # noqa: E402

TARGET = 0.85
SHORT = 4700  # characters


def clocks():
    return time.perf_counter(), time.process_time()


def rates(tokens, started):
    """Tokens per second, and per second of CPU time, since `started`."""
    return tuple(tokens / (now - then) for now, then in zip(clocks(), started))


def bare(tokenizer, texts, threads):
    """The rates of encode_ordinary alone; threads = 0 is the loop."""
    started = clocks()
    if threads == 0:
        count = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    else:
        with ThreadPoolExecutor(threads) as pool:
            count = sum(map(len, pool.map(tokenizer.encode_ordinary, texts)))
    return rates(count, started)


def loader(nb, config, tokenizer, shards, threads, tokens):
    """The rates at which PrefetchDataLoader delivers `tokens` tokens."""
    steps = tokens // config.tokens_per_step
    with nb.PrefetchDataLoader(config, tokenizer, shards, threads=threads) as batches:
        next(batches)
        started = clocks()
        for _ in range(steps):
            batch = next(batches)
        batch[1].block_until_ready()
        return rates(steps * config.tokens_per_step, started)


def compare(nb, tokenizer, shards, repeats):
    """Prints a row for each number of threads and each batch shape."""
    texts = [text for fetch in shards for _, text in nb.read_documents(fetch())]
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in texts)  # warms up, too
    demo = nb.Config.demo()
    configs = demo, demo.replace(device_batch_size=4, seq_len=2048)
    for threads in (1, 2):
        rounds = {config: [] for config in configs}
        for _ in range(repeats):
            for config, results in rounds.items():
                loop, mapped = (bare(tokenizer, texts, n) for n in (0, threads))
                results.append((loop, mapped, loader(nb, config, tokenizer, shards, threads, tokens)))
        for config, results in rounds.items():
            speeds = "".join(f"{statistics.median(wall for wall, _ in side):12,.0f}" for side in zip(*results))
            ratios = [have[0] / mapped[0] for _, mapped, have in results]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            to_loop = statistics.median(have[0] / loop[0] for loop, _, have in results)
            cpu = statistics.median(have[1] / mapped[1] for _, mapped, have in results)
            print(
                f"{len(texts):9,}{threads:9}  {config.device_batch_size:2} × {config.seq_len:<4}{speeds}"
                f"    {ratio:.2f} ({low:.2f} … {high:.2f})    {to_loop:.2f}   {cpu:.2f}"
                f"   {'ok' if ratio >= TARGET else f'below {TARGET}'}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    repeats = parser.parse_args().repeats

    nb = load(ROOT / "02_train.py")
    whole, _ = nb.list_shards(nb.Config.demo())
    tokenizer = nb.find_tokenizer(nb.Config.demo(), whole[0]())
    texts = (text for fetch in whole for _, text in nb.read_documents(fetch()))
    print(f"{os.cpu_count()} cores, {repeats} rounds")
    print("documents  threads    batch        loop         map      loader    / map (quartiles)  / loop    CPU")
    compare(nb, tokenizer, whole, repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "short.parquet"
        short = [text[i : i + SHORT] for text in texts for i in range(0, len(text), SHORT)]
        pq.write_table(pa.table({"text": short}), path, row_group_size=1000)
        compare(nb, tokenizer, [lambda: path], repeats)


if __name__ == "__main__":
    main()
