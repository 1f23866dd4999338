"""What the benchmarks share: notebooks as modules, the data of a run, timings in turn. Nothing to run.

Other work on the machine changes every timing, and often by more than what is measured. So what is compared runs in
turn, and the benchmarks print ratios beside their milliseconds.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from tools import notebooks  # noqa: E402


def load(name):
    """Returns a notebook as a module: its cells that define."""
    return notebooks.load(ROOT / name)


def embedded_data(nb, config):
    """Returns (training shards, path of the validation shard, tokenizer) of config.dataset, the embedded corpus."""
    shards, fetch_validation = nb.list_shards(config)
    return shards, fetch_validation(), nb.find_tokenizer(config, shards[0]())


def timed(function, *args):
    """Returns (seconds, result) of function(*args), arrays waited for."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - started, result


def in_turn(functions, rounds):
    """Returns {name: [seconds of each round]} of {name: function}: in each round every function runs once."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function)[0])
    return seconds
