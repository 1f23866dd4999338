# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: title,tags,cellView,-all
#     comment_magics: false
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a tokenizer
#
# A language model reads numbers. This notebook makes the table that turns text into them: byte-level BPE, 32,768
# tokens, trained on two billion characters of FineWeb-Edu in some minutes. It needs no accelerator: run it on a free
# CPU runtime and save the TPU for `02_train`. Without a network it trains the demo, 4,096 tokens on the 12 MB of
# English that come with the repository, in seconds. Press *Run all*.
#
# - **Part I, the essay**: config → BPE → training → round trip → compression → what it learned → upload.
# - **Part II, the machinery**: shards, the Hub, the command line. `02_train` has the same cells; they are collapsed.
# - **Part III, run**: train the tokenizer, check that no byte is lost, compare it with those of GPT-2 and GPT-4.
#
# The first cell installs what the runtime lacks. No account is needed: `HF_TOKEN`, as a Colab secret or an environment
# variable, raises the Hub's rate limits and allows the upload.

# %% Install what is missing cellView="form" tags=["shared"]
# @title Install what is missing
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile


def install(*packages):
    """Installs, in a notebook, the packages that the runtime lacks. Pins all installed versions: pip replaces none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing or "get_ipython" not in globals():
        return
    print("installing", *missing)
    pins = {}
    for package in importlib.metadata.distributions():
        name, version = package.name, package.version
        # pip refuses versions such as Debian's own 2.22.1ubuntu1.
        if name and re.fullmatch(r"[\d.]+(?:(?:a|b|rc|\.post|\.dev)\d+)*(?:\+[\w.]+)?", version or ""):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # the first in the path is the one in use
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in pins.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *missing]
        subprocess.run(command, check=True)


# %% Install tags=["run"]
install("numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "datasets", "matplotlib", "tqdm")

# %% Environment cellView="form" tags=["shared"]
# @title Environment
import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()
warnings.filterwarnings("ignore", "IProgress not found")  # huggingface_hub looks for ipywidgets
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # shards arrive beside the training, whose bar they break
# A container may run a user without a home folder; Docker then says that it is /.
if (home := os.path.expanduser("~")) == "~" or (home == "/" and not os.access("/", os.W_OK)):
    os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")
SAID = set()


class InputError(ValueError):
    """A wrong input: a Config value, a file, a checkpoint. The message is one line: what was wrong, the value, and what
    to do. A script prints it to stderr and exits with status 2."""


@functools.cache
def get_secret(name):
    """Returns a secret, or None: from Colab's secrets panel, else from the environment. It is read once, at the start,
    in the main thread: Colab asks the browser, and a background thread would wait for a closed tab without an end."""
    try:
        from google.colab import userdata

        value = userdata.get(name)
    except Exception:  # not in Colab, not granted, or not there: Colab raises a different class for each
        value = os.environ.get(name)
    return (value or "").strip() or None  # it may have been pasted with the end of its line


def keep_writable(name):
    """Makes a script's stdout or stderr take any text in any locale, and lead nowhere once nobody reads it: a closed
    pipe, or a terminal that is gone, must not stop a run."""
    if getattr(sys, name) is None:  # closed before the start
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    stream = getattr(sys, name)

    def guarded(call):
        def attempt(*args):
            try:
                return call(*args)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return attempt

    stream.reconfigure(errors="backslashreplace")
    stream.write, stream.flush = guarded(stream.write), guarded(stream.flush)


if __name__ == "__main__" and not IN_NOTEBOOK:
    keep_writable("stdout"), keep_writable("stderr")


def progress_bar(*args, **options):
    """Returns a tqdm bar, silent in a log file. A notebook shows stderr in red, so there the bar goes to stdout."""
    shown = IN_NOTEBOOK or sys.stderr.isatty()
    return tqdm(*args, disable=not shown, file=sys.stdout if IN_NOTEBOOK else sys.stderr, **options)


def cache_dir():
    """Returns ~/.cache/tpuchat: tokenizers, downloads, compiled programs."""
    return Path.home() / ".cache" / "tpuchat"


def say_once(kind, line):
    """Prints a line, above a progress bar, unless one of its kind was printed before."""
    if kind not in SAID:
        SAID.add(kind)
        with contextlib.suppress(OSError, ValueError):  # a thread that reads data goes on without stdout
            tqdm.write(line)


def first_line(error):
    """Returns the first line of an exception's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_background(function):
    """Returns a Future of function(), run in a daemon thread: unlike a pool's, it does not keep the process alive."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future


# %% [markdown]
# # Part I: the essay
#
# ## Config
#
# 32,768 tokens is what a model of a few hundred million parameters can afford: the embedding and the head have a row
# for each token, 67 of the reference model's 268 million parameters. A larger vocabulary packs more bytes into a token,
# and learns each row more slowly.


# %% Options cellView="form" tags=["shared"]
# @title Options
def option(default, help, rule=("", lambda value: True), *, compiled=True, resume=False):
    """Returns a dataclass field of a Config. `rule`: a sentence, and a function that says whether a value obeys it.
    `compiled=False`: changing it compiles nothing. `resume`: a resumed run may change it."""
    metadata = {"help": help, "rule": rule, "resume": resume}
    return dataclasses.field(default=default, compare=compiled, metadata=metadata)


free = functools.partial(option, compiled=False)
runtime = functools.partial(option, resume=True)
host = functools.partial(option, compiled=False, resume=True)

POSITIVE = "must be positive", lambda value: value > 0
POSITIVE_OR_AUTO = "must be positive, or -1 for the default rule", lambda value: value > 0 or value == -1
NOT_NEGATIVE = "must not be negative", lambda value: value >= 0
BELOW_ONE = "must lie in [0, 1)", lambda value: 0 <= value < 1
SHARE = "must lie in [0, 1]", lambda value: 0 <= value <= 1


def one_of(*choices):
    """Returns the rule that a value is one of `choices`."""
    return f"must be one of {', '.join(choices)}", lambda value: value in choices


def at_least(least, why):
    """Returns the rule that a value is at least `least`."""
    return f"must be at least {least}: {why}", lambda value: value >= least


def require(ok, name, value, rule):
    """Raises an InputError that names the field, its value and the rule that it breaks, unless `ok`."""
    if not ok:
        raise InputError(f"{name}={value!r}: {rule}")


def check_options(config):
    """Raises InputError for a field that is not of its type (an int serves as a float) or breaks its rule."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), (int, float) if field.type is float else field.type
        rule = f"must be of type {getattr(field.type, '__name__', field.type)}, not {type(value).__name__}"
        fits = isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool)
        require(fits, field.name, value, rule)
        if field.type is float:
            require(abs(value) <= 3.4e38, field.name, value, "must be a finite number that float32 holds")  # no NaN
            object.__setattr__(config, field.name, float(value))
        sentence, holds = field.metadata["rule"]
        require(holds(value), field.name, value, sentence)


def suggest(name, known):
    """Returns ', did you mean X?', or ''."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


# %% Config
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All choices of this notebook. `Config()` is the reference tokenizer. Raises InputError for a wrong value."""

    vocab_size: int = option(32768, "tokens, special ones included", at_least(265, "256 bytes and 9 special tokens"))
    max_chars: int = option(2_000_000_000, "characters to train on, at most", POSITIVE)
    doc_chars: int = option(10_000, "characters of a document, at most: a long one should not outweigh many", POSITIVE)
    dataset: str = option("karpathy/fineweb-edu-100b-shuffle", "'embedded', a file or folder, or a dataset of the Hub")
    text_column: str = option("text", "the column of the texts")
    document_separator: str = option("", "what ends a document of a text file, such as '\\n\\n'; '' = the file is one")
    skip_bad_rows: bool = option(False, "leave broken rows out, and count them")
    num_shards: int = option(8, "train on at most so many shards; -1 = all", POSITIVE_OR_AUTO)
    hf_repo_id: str = option("", "your own Hub repo, owner/name, to upload to; made if it is not there")
    run_dir: str = option("runs/tokenizer", "the folder for the picture")

    def __post_init__(self):
        check_options(self)

    def replace(self, **changes):
        """Returns a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def demo(cls):
        """Returns a small tokenizer of the embedded corpus: seconds, without network."""
        return cls(vocab_size=4096, dataset="embedded", run_dir="runs/tokenizer-demo")

    @classmethod
    def for_network(cls):
        """Returns the reference where its shards are in the cache or the Hub answers, else the demo."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        train, validation = list_shards(cls())
        files = [shard.args[0].files[0][:2] for shard in (*train, validation)]  # (repo, file name)
        try:
            if not all(isinstance(try_to_load_from_cache(*file, repo_type="dataset"), str) for file in files):
                get_hf_file_metadata(hf_hub_url(*files[0], repo_type="dataset"), token=False, timeout=5)
        except Exception as error:  # a refusal is an answer, and a wrong proxy an error: the download explains them
            if getattr(error, "response", None) is None and not cannot_pass(error):
                print(f"the Hugging Face Hub does not answer ({type(error).__name__}): this will be the demo")
                return cls.demo()
        return cls()


# %% [markdown]
# ## Byte-level BPE
#
# BPE ([Sennrich et al. 2016](https://arxiv.org/abs/1508.07909)) cuts the text into words, counts the pairs of
# neighbouring tokens within words, makes the most frequent pair a new token, and counts again. The first 256 tokens are
# the bytes, so any text can be written. Encoding repeats the merges in the order in which they were learned. The
# definition below counts all pairs again for each merge; [rustbpe](https://github.com/karpathy/rustbpe) updates the
# counts that a merge changes, and learns the same tokens.
#
# No merge crosses the border of a word. The split pattern decides where words end: it keeps "dog", "dog." and "dog!"
# from becoming three tokens, and long numbers from becoming thousands. The nine special tokens never come out of text:
# `<|bos|>` opens each document in pretraining, the others mark turns and tools for those who finetune.

# %% Tokenizer format cellView="form" tags=["shared"]
# @title Tokenizer format
# GPT-4's split pattern, but with at most two digits a token: a small vocabulary has no room for 1,000 numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip


def make_tokenizer(ranks, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
    """Returns a tiktoken.Encoding of `ranks` (bytes → rank, 0 … n-1); the special tokens take the ids from n on."""
    special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding("tpuchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.tiktoken and then, atomically, tokenizer.json: a folder without the second has no tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = sorted((rank, token) for token, rank in tokenizer._mergeable_ranks.items())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    (folder / "tokenizer.tiktoken").write_text("".join(lines), encoding="utf-8")
    special = sorted(tokenizer._special_tokens, key=tokenizer._special_tokens.get)
    meta = {"pattern": tokenizer._pat_str, "special_tokens": special}
    (folder / "tokenizer.json.part").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")


# What a pattern does not match would be lost without a word.
PROBE = "It's  2026 —\r\n\n\tdef f(x): \n  return x! 東京🙂 " + "".join(map(chr, range(0x3000)))


def load_tokenizer(folder):
    """Returns the tokenizer that save_tokenizer wrote. Raises InputError if a file is missing or damaged."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        lines = (folder / "tokenizer.tiktoken").read_text(encoding="utf-8").splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
        if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("the ranks must be 0 … n-1, one a token, with all 256 single bytes among them")
        special = meta["special_tokens"]
        if "<|bos|>" not in special or len(set(special)) < len(special):
            raise ValueError("the special tokens must differ, with <|bos|> among them")
        tokenizer = make_tokenizer(ranks, meta["pattern"], special)
        if tokenizer.decode(tokenizer.encode_ordinary(PROBE)) != PROBE:
            raise ValueError("its pattern leaves characters out")
        return tokenizer
    except BaseException as error:  # tiktoken panics, which is no Exception, if a pattern matches the empty string
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(f"tokenizer in {folder}: {error}; delete the folder to train it anew") from error


def token_bytes(tokenizer):
    """Returns the UTF-8 bytes that each token id stands for, int32 [n_vocab]; special tokens stand for none."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token, rank in tokenizer._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# %% Try it: the split tags=["run"]
if IN_NOTEBOOK:
    import regex  # tiktoken depends on it

    print("▏".join(regex.findall(SPLIT_PATTERN, "The dog didn't see 12345 dogs... did it?\n  def f(x): return x")))


# %% BPE by definition
def bpe_by_definition(words, merges):
    """Returns the tokens, as bytes, in the order of their ids: the 256 bytes, then one for each merge."""
    counts = collections.Counter(word.encode().decode("latin-1") for word in words)  # a character stands for an id
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(merges):
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # of equally frequent pairs, the one of older tokens
        counts = {word.replace("".join(best), chr(len(tokens))): count for word, count in counts.items()}
        tokens.append(tokens[ord(best[0])] + tokens[ord(best[1])])
    return tokens


# %% Train a tokenizer cellView="form" tags=["shared"]
# @title Train a tokenizer
def train_tokenizer(texts, vocab_size, max_chars=2_000_000_000, doc_chars=10_000):
    """Returns a byte-level BPE of `vocab_size` tokens, special ones included, trained on at most `max_chars`.

    Only the first `doc_chars` characters of a document count, so that a long one does not outweigh a hundred others.
    Raises InputError if there is too little text.
    """
    import rustbpe

    merges, least = vocab_size - len(SPECIAL_TOKENS), 256 + len(SPECIAL_TOKENS)
    require(vocab_size >= least, "vocab_size", vocab_size, f"must be at least {least}: bytes and specials")

    def stream():
        left = max_chars
        for text in texts:
            text = text[: min(doc_chars, left)]
            left -= len(text)
            yield text
            if left == 0:
                break

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(stream(), merges, buffer_size=1024, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    most = len(ranks) + len(SPECIAL_TOKENS)
    hint = f"this text yields only {most} tokens; set vocab_size={most}, or give more text"
    require(len(ranks) >= merges, "vocab_size", vocab_size, hint)
    return make_tokenizer(ranks)


def tokenizer_folders(config):
    """Returns where the tokenizer of config.dataset may be, the first first: beside local data, and on this machine
    where 01_tokenizer.py saves it."""
    local = None if on_hub(config.dataset) else local_path(config.dataset).resolve()
    name = str(local or config.dataset) + (f":{config.text_column}" if config.text_column != "text" else "")
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]  # two folders may have the same name
    mine = cache_dir() / "tokenizers" / f"{Path(local or config.dataset).name[:40]}-{digest}-{config.vocab_size}"
    return [(local if local.is_dir() else local.parent) / "tokenizer", mine] if local else [mine]


# %% Try it: the first merges tags=["run"]
if IN_NOTEBOOK:
    sentences = [
        "The cat sat on the mat.",
        "The dog sat on the log; the cat saw the dog in 2026.",
        "Hard words: don't, can't, thermodynamics!",
    ]
    toy = train_tokenizer(sentences, 256 + 12 + len(SPECIAL_TOKENS))
    defined = bpe_by_definition([word for s in sentences for word in regex.findall(SPLIT_PATTERN, s)], merges=12)
    print("first merges:", *(repr(token.decode()) for token in defined[256:]))
    print("rustbpe has the same:", defined == sorted(toy._mergeable_ranks, key=toy._mergeable_ranks.get))

# %% [markdown]
# ## Train on shards
#
# A shard is a file with a document in each row. The next shard is downloaded while one is read. The texts stream
# through rustbpe, which counts words on all cores: memory holds the table of different words, never the text. Merging
# begins when the last text is read; it takes some more seconds and does not move the bar.


# %% Train on shards
def fetch_ahead(shards):
    """Yields each shard, ready to read, while the next one is being fetched."""
    following = in_background(shards[0])
    for shard in shards[1:]:
        ready, following = following.result(), in_background(shard)
        yield ready
    yield following.result()


def make_folder(folder):
    """Returns `folder`, made if it is not there. Raises InputError if nobody can write to it."""
    try:
        os.makedirs(folder := os.path.expanduser(folder), exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another (run_dir, HOME)") from error
    return Path(folder)


def train_on_shards(config):
    """Returns (tokenizer, its folder, validation shard): trained on config.dataset, and saved."""
    shards, validation = list_shards(config)
    size, started = describe_data(shards, validation), time.perf_counter()
    *beside, folder = tokenizer_folders(config)
    make_folder(folder)
    fetched = itertools.islice(fetch_ahead([*shards, validation]), len(shards))  # the last is fetched, and not read

    def texts():
        for shard in fetched:
            for _, text in read_documents(shard):
                yield text
                bar.update(len(text))

    with progress_bar(desc="reading, then merging", total=int(size), unit="B", unit_scale=True) as bar:
        tokenizer = train_tokenizer(texts(), config.vocab_size, config.max_chars, config.doc_chars)
    save_tokenizer(tokenizer, folder)
    print(f"{tokenizer.n_vocab:,} tokens from {len(shards)} shards in {time.perf_counter() - started:,.1f} s")
    where = str(folder).replace(str(Path.home()), "~", 1)
    print(f"in {where}, where 02_train with vocab_size={config.vocab_size} looks for it")
    if beside and (beside[0] / "tokenizer.json").exists():
        same = all((folder / file.name).read_bytes() == file.read_bytes() for file in beside[0].glob("tokenizer.*"))
        print("byte for byte the tokenizer beside the shards" if same else "02 prefers the tokenizer beside the shards")
    return tokenizer, folder, validation()


# %% [markdown]
# ## Round trip
#
# A tokenizer that drops or changes one character spoils every run that uses it, and no loss curve shows it. So decoding
# what was encoded must return the text: for the validation documents, up to 64 MiB of them, for every code point of
# Unicode, and for bytes that are not text.


# %% Round trip
def unicode_planes():
    """Yields every code point that a text may hold: 17 texts, one a plane, with a space after every 64 characters."""
    for plane in range(17):
        codes = [c for c in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= c < 0xE000]  # no surrogates
        yield " ".join("".join(map(chr, codes[i : i + 64])) for i in range(0, len(codes), 64))


def check_round_trip(tokenizer, texts):
    """Returns (bytes, tokens) of all texts. Raises InputError for the first text that does not come back unchanged."""
    n_bytes = n_tokens = 0
    for i, text in enumerate(texts):
        tokens = tokenizer.encode_ordinary(text)
        if tokenizer.decode(tokens, errors="strict") != text:
            raise InputError(f"text {i} ({text[:40]!r}…) is changed by the tokenizer; it must not be used")
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(tokens)
    return n_bytes, n_tokens


def check_bytes(tokenizer):
    """Returns the number of bytes, UTF-8 or not, that came back unchanged: every pair, and a megabyte at random."""
    pairs = itertools.product(range(256), repeat=2)
    data = bytes(itertools.chain.from_iterable(pairs)) + np.random.default_rng(0).bytes(2**20)
    for piece in (data[i : i + 1000] for i in range(0, len(data), 1000)):
        if tokenizer.decode_bytes(tokenizer._encode_bytes(piece)) != piece:
            raise InputError(f"bytes {piece[:10]!r}… are changed by the tokenizer; it must not be used")
    return len(data)


def check_everything(tokenizer, validation):
    """Runs all round trips and prints a line for each."""
    texts = [*beginning(validation, 2**26)]
    n_bytes, n_tokens = check_round_trip(tokenizer, progress_bar(texts, "validation", unit=" docs", leave=False))
    print(f"validation: {len(texts):,} documents, {n_bytes:,} bytes, {n_tokens:,} tokens: all come back")
    print(f"Unicode, all 17 planes: {check_round_trip(tokenizer, unicode_planes())[0]:,} bytes come back")
    print(f"arbitrary bytes: {check_bytes(tokenizer):,} come back")


# %% Try it: round trip tags=["run"]
if IN_NOTEBOOK:
    print(toy.decode_tokens_bytes(toy.encode_ordinary("The cat saw the naïve dog. 🙂")))
    print("bytes and tokens:", check_round_trip(toy, sentences))

# %% [markdown]
# ## Compression
#
# The measure is **bytes per token**: at equal context and compute, a model that gets more bytes from a token has read
# more text. Losses per token cannot be compared between tokenizers, bits per byte can. The rivals are GPT-2's tokenizer
# (50,257 tokens) and GPT-4's (100,277), if tiktoken can fetch them.
#
# A vocabulary is good at what it has seen. One trained on kernel documentation took 46% more bytes of it a token than
# GPT-2's and 4% more than GPT-4's; of other English, code and maths 8 to 19% fewer than GPT-4's (measured, LOG.md).
# Numbers cost more by design: two digits a token, where GPT-4's tokenizer takes three.


# %% Compression
def load_rivals(seconds=30):
    """Returns {name: tiktoken.Encoding} of those that tiktoken can fetch; left alone, tiktoken would wait for ever."""
    rivals = {}
    for name, encoding in {"GPT-2": "r50k_base", "GPT-4": "cl100k_base"}.items():
        try:
            rivals[name] = in_background(functools.partial(tiktoken.get_encoding, encoding)).result(seconds)
        except Exception as error:
            print(f"no comparison with {name}: its tokenizer cannot be fetched ({type(error).__name__})")
    return rivals


def texts_to_compare(validation, documents=2000):
    """Returns {kind: [texts]}: the first documents of the validation shard, a module that every Python has, numbers."""
    sample = [*itertools.islice(beginning(validation), documents)]
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    return {"validation": sample, "code": [code], "numbers": [" ".join(map(str, range(1000, 3000)))]}


def bytes_per_token(tokenizers, texts):
    """Returns {kind: {name of tokenizer: bytes per token}}."""

    def rate(tokenizer, group):
        return sum(len(text.encode()) for text in group) / sum(len(tokenizer.encode_ordinary(text)) for text in group)

    return {kind: {name: rate(t, group) for name, t in tokenizers.items()} for kind, group in texts.items()}


def show_compression(rates, tokenizers):
    """Prints the table of bytes per token; beside each rival, what ours gains on it."""
    ours = next(iter(tokenizers))
    print("bytes per token" + "".join(f"{f'{name}, {t.n_vocab:,}':>22}" for name, t in tokenizers.items()))
    for kind, row in rates.items():
        gains = {name: f" ({row[ours] / rate - 1:+7.1%})" if name != ours else "" for name, rate in row.items()}
        print(f"{kind:15}" + "".join(f"{f'{rate:.3f}{gains[name]}':>22}" for name, rate in row.items()))


# %% [markdown]
# ## What it learned
#
# The first merges are the most frequent pairs of the language; the last are rare words. A picture compares how many
# tokens of the vocabulary have each length with how often they are used: running text uses the short ones.


# %% What it learned
def show_token(token):
    """Returns the first 24 bytes of a token as a person would write them."""
    return repr(token[:24].decode(errors="backslashreplace")) + "…" * (len(token) > 24)


def pair_of(ranks, token):
    """Returns the two tokens that were merged into `token`: of all cuts, the one whose later part is the oldest."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return min((c for c in cuts if c[0] in ranks and c[1] in ranks), key=lambda c: max(ranks[c[0]], ranks[c[1]]))


def show_merges(tokenizer, count=16):
    """Prints the first merges and the longest tokens."""
    ranks = tokenizer._mergeable_ranks
    merged = sorted((token for token, rank in ranks.items() if rank >= 256), key=ranks.get)
    print("first merges:  ", ",  ".join(" + ".join(map(show_token, pair_of(ranks, token))) for token in merged[:count]))
    longest = sorted(merged, key=len, reverse=True)[:count]
    print("longest tokens:", ", ".join(f"{show_token(token)} ({len(token)})" for token in longest))


def plot_lengths(tokenizer, texts, path, longest=20):
    """Saves a bar chart: the share of tokens of each length, in the vocabulary and in the texts."""
    from matplotlib.figure import Figure

    lengths, figure = token_bytes(tokenizer), Figure(figsize=(7, 4), layout="constrained")
    used = np.concatenate([tokenizer.encode_to_numpy(text, disallowed_special=()) for text in texts])
    axes = figure.subplots()
    for i, (name, values) in enumerate({"vocabulary": lengths[lengths > 0], "validation text": lengths[used]}.items()):
        shares = 100 * np.bincount(np.minimum(values, longest), minlength=longest + 1)[1:] / len(values)
        axes.bar(np.arange(longest) + 0.4 * i, shares, 0.4, label=f"{name}, mean {values.mean():.2f}")
    axes.set_xticks(np.arange(longest) + 0.2, [*range(1, longest), f"{longest}+"])
    axes.set(ylabel="% of tokens", xlabel="bytes of a token")
    axes.legend()
    figure.savefig(path, dpi=150)


# %% Try it: what three sentences teach tags=["run"]
if IN_NOTEBOOK:
    show_merges(toy, 8)

# %% [markdown]
# ## Upload
#
# The same ids must mean the same bytes for as long as the weights live. With `hf_repo_id` and `HF_TOKEN` the tokenizer
# goes to your Hub repo, where `02_train` with the same `hf_repo_id` finds it. The repo is made, or found, before the
# training: a wrong name or a token that may not write is an error of the first seconds.


# %% Upload
def open_repo(repo_id):
    """Returns an HfApi that may write to `repo_id`, made if it is not there; None without a name or a token."""
    needed = {"hf_repo_id=owner/name": repo_id, "HF_TOKEN": hub_token()}
    missing = [words for words, given in needed.items() if not given]
    if missing:
        print("no upload to the Hub: set", " and ".join(missing), "to keep the tokenizer there")
        return None
    api = hub_api()
    ask_hub(f"write to hf_repo_id={repo_id!r}", lambda: api.create_repo(repo_id, exist_ok=True))
    return api


def upload_tokenizer(api, folder, repo_id):
    """Copies the two files of `folder` to tokenizer/ in the Hub repo. Raises InputError if that fails."""
    where = {"repo_id": repo_id, "folder_path": folder, "path_in_repo": "tokenizer", "commit_message": "tokenizer"}
    files = ["tokenizer.tiktoken", "tokenizer.json"]
    ask_hub(f"upload the tokenizer to {repo_id}", lambda: api.upload_folder(**where, allow_patterns=files))
    print(f"uploaded to https://huggingface.co/{repo_id}/tree/main/tokenizer")


# %% [markdown]
# # Part II: machinery
#
# Nothing below changes what is learned. Each cell is collapsed behind its title; `02_train` has all of them.
#
# A dataset is FineWeb-Edu from the Hub, any dataset of the Hub, the embedded corpus, or your own text: a file or a
# folder of parquet, Arrow, JSON lines, CSV or plain text. What names or the dataset's own splits call validation
# validates. Else **the last shard validates**, whatever `num_shards` is; a single file is divided by a hash of each
# text. So a validation loss does not move when you train on more data.

# %% Hub cellView="form" tags=["shared"]
# @title Hub
HUB_SHARDS = {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}  # the last validates


class MissingFileError(InputError):
    """A repository of the Hub exists, and has no such file."""


class RefusedError(InputError):
    """The Hub asks for a token, or refuses the one that it got: 401 or 403."""


def hub_token():
    """Returns HF_TOKEN, else the token that `hf auth login` has left, else None. Raises InputError on whitespace in
    HF_TOKEN: the HTTP library would print the token."""
    from huggingface_hub import get_token

    token = get_secret("HF_TOKEN")
    if token and not re.fullmatch("[!-~]+", token):
        raise InputError("HF_TOKEN: holds a space, a line end or another character that no token has; copy it again")
    return token or get_token()


def hub_api():
    """Returns huggingface_hub's HfApi with the user's token."""
    from huggingface_hub import HfApi

    return HfApi(token=hub_token())


def cannot_pass(error):
    """Whether a further attempt would fail alike: a package is missing, as for a SOCKS proxy, or a value is wrong."""
    lasting = isinstance(error, ImportError | TypeError | ValueError) and not isinstance(error, json.JSONDecodeError)
    return lasting or type(error).__name__ in ("InvalidURL", "UnsupportedProtocol")


def ask_hub(what, call):
    """Returns call(), tried again after a failure that may pass: no connection, or a server error.

    Raises InputError with the first line of huggingface_hub's own error and one hint: RefusedError on 401 and 403,
    MissingFileError if a repository lacks the file.
    """
    from huggingface_hub import errors

    for pause in (1, 2, 4, 8, 0):  # seconds before the next attempt
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # huggingface_hub raises its own, those of its HTTP library, and OSError
            # Its client has tried several times before it wraps an error so.
            wrapped = isinstance(error, errors.LocalEntryNotFoundError) or type(error) is ValueError
            cause = error.__cause__ if wrapped and error.__cause__ else error
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            disk = getattr(cause, "errno", 0) in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
            refused = 400 <= status < 500 and status != 429 or isinstance(cause, errors.HFValidationError)
            if pause and cause is error and not (refused or disk or cannot_pass(cause)):
                time.sleep(pause)
                continue
            page = str(getattr(getattr(cause, "response", None), "url", ""))
            page = re.sub(r"(/api)?(/datasets)?/([^/]+/[^/]+)/(resolve|revision|tree)/.*", r"\2/\3", page)
            token = "one is set" if hub_token() else "none is set"
            gated = isinstance(cause, errors.GatedRepoError)
            hints = {
                f"accept its conditions at {page}, and give that account's token: HF_TOKEN ({token})": gated,
                "make room, or set HF_HOME": disk,
                "wait, or set HF_TOKEN: accounts have higher limits": status == 429,
                "check the name, and that HF_TOKEN may read (for an upload: write) it": refused,
                "pip install 'httpx[socks]' for a SOCKS proxy, or unset ALL_PROXY, HF_ENDPOINT": cannot_pass(cause),
                "check the network, or use dataset='embedded'": True,
            }
            hint = next(hint for hint, fits in hints.items() if fits)
            kind = RefusedError if status in (401, 403) else InputError
            kind = MissingFileError if status == 404 and isinstance(cause, errors.EntryNotFoundError) else kind
            raise kind(f"the Hugging Face Hub: cannot {what}: {first_line(cause)}; {hint}") from error


def read_hub(what, call):
    """Returns call(HfApi) by ask_hub; where the Hub refuses the token, without it: public data need none."""
    from huggingface_hub import HfApi, constants

    token = ask_hub(what, hub_token) or False  # False: the client looks for none itself
    source = "HF_TOKEN" if get_secret("HF_TOKEN") else constants.HF_TOKEN_PATH
    try:
        return ask_hub(what, lambda: call(HfApi(token=token)))
    except RefusedError as error:
        if not token:
            raise
        try:
            found = ask_hub(what, lambda: call(HfApi(token=False)))
        except RefusedError:
            raise InputError(f"{error}; the token is that of {source}") from error
        say_once("token", f"data    the Hub refuses the token of {source}; public data is read without it")
        return found


def file_sha256(path):
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path):
    """Whether a file of huggingface_hub's cache has the SHA-256 that names it; small files have none, and count."""
    digest = Path(os.readlink(path)).name if path.is_symlink() else ""
    return len(digest) != 64 or file_sha256(path) == digest


def hub_download(repo_id, filename, repo_type="dataset", revision=None):
    """Returns the local path of a file of the Hub, downloaded if it is absent, and fetched anew if it is damaged."""
    damaged = []

    def download(api):
        # Forced, the client also replaces a file in the store that repositories share.
        options = {"repo_type": repo_type, "revision": revision, "force_download": bool(damaged)}
        path = Path(api.hf_hub_download(repo_id, filename, **options))
        if is_intact(path):
            return path
        damaged.append(path)
        path.resolve().unlink()
        path.unlink()
        raise ConnectionError("the SHA-256 of the file that arrived is not the Hub's")

    return read_hub(f"download {filename} of {repo_id}", download)


def hub_file(repo_id, filename, revision=None):
    """Returns the checked local path of a file of a dataset. One that is in the cache and intact costs no request."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, filename, repo_type="dataset", revision=revision)
    here = isinstance(cached, str) and is_intact(Path(cached))
    return Path(cached) if here else hub_download(repo_id, filename, revision=revision)


# %% Shards cellView="form" tags=["shared"]
# @title Shards
DAMAGED = pa.ArrowException, OSError, UnicodeDecodeError, KeyError  # what pyarrow raises
ALL = (0, 2**32)


class HubFile(NamedTuple):
    """A file of a dataset of the Hub. `oid`: its SHA-256, or git's hash of a small file; '' where it is not known."""

    repo_id: str
    name: str
    revision: str | None = None
    size: int = 0
    oid: str = ""

    def __str__(self):
        return self.name


def parquet_rows(shard, start):
    """Yields (row, text) of a parquet file. A row group, compressed, is in memory."""
    file, row, column = pq.ParquetFile(shard.files[0]), 0, shard.column
    for group in range(file.num_row_groups):
        found = file.metadata.row_group(group)
        stop = row + found.num_rows
        # In batches of 16 MiB: a row group may hold more than the 2 GiB of an Arrow array.
        size = min(4096, 1 + found.num_rows * 2**24 // max(1, found.total_byte_size))
        for batch in file.iter_batches(size, [group], [column]) if stop > start else ():
            texts = batch.column(column).to_pylist()
            yield from enumerate(texts, row)
            row += len(texts)
        if start < stop != row:
            raise OSError(f"row group {group} ends with row {row}")
        row = stop


class Shard(NamedTuple):
    """Documents in a fixed order: the rows of a file, or text files. read_documents reads them from any row on."""

    name: str
    files: tuple  # paths or HubFiles: one, or any number of text files
    column: str = "text"
    separator: str = ""  # between the documents of a text file
    skip_bad_rows: bool = False
    part: tuple = ALL  # [low, high): only texts whose CRC-32 lies there
    reader: Callable = parquet_rows  # (shard, start) → (row, text, or a ValueError that says what is wrong with it), …


def read_documents(shard, start=0):
    """Yields (row, text) from row `start` on. Leaves out empty and null texts, and the other part of a divided file.

    Raises InputError for a damaged file, for a bad row unless `skip_bad_rows`, and if all texts are empty."""
    row, empty, bad, damaged = start - 1, 0, 0, DAMAGED  # a name of its own: at the exit of Python globals are gone
    try:
        for row, text in shard.reader(shard, start):
            if row < start:
                continue
            if isinstance(text, ValueError):
                if not shard.skip_bad_rows:
                    raise InputError(f"{text}; mend it, or set skip_bad_rows")
                say_once("bad", f"data    {text}: skipped")
                bad += 1
            elif not text:
                empty += 1
            elif shard.part == ALL or shard.part[0] <= zlib.crc32(text.encode()) < shard.part[1]:
                yield row, text
    except damaged as error:
        what = f"{shard.name}: cannot be read from row {row + 1:,} on: {first_line(error)}"
        raise InputError(f"{what}; if it is damaged, get it again") from error
    if start == 0 and empty + bad == row + 1:
        raise InputError(f"{shard.name}: none of its {row + 1:,} rows has a text; leave it out")
    if bad:
        say_once(("bad", shard.name), f"data    {bad:,} bad rows of {shard.name} were skipped")
    if empty:
        say_once("empty", f"data    {empty:,} of {row + 1:,} documents of {Path(shard.name).name} are empty: skipped")


def shuffled(shard, place, size, seed):
    """Yields (row, text) as read_documents does, the documents of each block of `size` rows in an order of its own."""
    start = place.row // size * size
    for block, rows in itertools.groupby(read_documents(shard, start), lambda document: document[0] // size):
        texts, rng = [text for _, text in rows], np.random.default_rng((seed, place.epoch, place.shard, block))
        drawn = enumerate(rng.permutation(len(texts)).tolist(), block * size)
        yield from ((row, texts[source]) for row, source in drawn if row >= place.row)
        del texts  # before the next block is read


def beginning(shard, chars=2**24, least=20):
    """Yields the first texts of a shard: up to so many characters, but `least` texts."""
    left = chars
    for count, (_, text) in enumerate(read_documents(shard), 1):
        yield text
        left -= len(text)
        if left < 0 and count >= least:
            return


def on_hub(dataset):
    """Whether `dataset` is one of the Hub: neither 'embedded' nor a file or folder."""
    return dataset in HUB_SHARDS or not (dataset == "embedded" or os.path.exists(os.path.expanduser(dataset)))


def local_path(dataset):
    """Returns the file or folder of a dataset that is not on the Hub."""
    return embedded_folder() if dataset == "embedded" else Path(dataset).expanduser().absolute()


def find_here(name, above=False):
    """Returns a file of our repository: beside this file or the script, in the working folder or above it; or None."""
    names = globals()  # of this file: Python, VS Code and Jupyter each have one
    here = names.get("__file__") or names.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "notebook")
    beside = [Path(file).resolve().parent for file in (here, sys.argv[0])]
    places = *beside, Path.cwd(), *(Path.cwd().parents if above else ())
    return next((place / name for place in places if (place / name).exists()), None)


def fetch_ours(name, hint):
    """Returns the bytes of a file of our repository, from GitHub. Raises InputError with a hint."""
    url = f"https://raw.githubusercontent.com/{GITHUB}/main/{name}"
    try:
        return urllib.request.urlopen(url, timeout=30).read()
    except (OSError, ValueError) as error:
        hint = f"start in a clone of https://github.com/{GITHUB}, or {hint}"
        raise InputError(f"cannot get {url}: {error}; {hint}") from error


def embedded_folder():
    """Returns data/embedded: here, else fetched from GitHub."""
    if found := find_here("data/embedded/tokenizer/tokenizer.json", above=True):
        return found.parents[1]
    folder = cache_dir() / "embedded"
    names = [f"shard_{i:05d}.parquet" for i in range(5)]
    for name in [*names, "tokenizer/tokenizer.tiktoken", "tokenizer/tokenizer.json"]:
        if not (folder / name).exists():
            content = fetch_ours(f"data/embedded/{name}", "set dataset to your own folder")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.part").write_bytes(content)
            os.replace(folder / f"{name}.part", folder / name)
    return folder


def execute_part_one(name):
    """Executes Part I of another notebook of ours, but for shared cells and those that run, as if it stood here."""
    path = find_here(name)
    try:
        text = path.read_text(encoding="utf-8") if path else fetch_ours(name, f"put {name} beside this file").decode()
    except (OSError, UnicodeDecodeError):
        text = ""
    start, end = text.find("\n# # Part I:"), text.find("\n# # Part II")
    require(0 < start < end, name, str(path), "is not the notebook of this name: move it away")
    say_once(name, f"data    read by {path or f'{name} of GitHub'}")
    cells = re.split(r"^(?=# %%)", text[start:end], flags=re.M)
    code = "".join("\n" * cell.count("\n") if re.match(r"# %%.* tags=\[", cell) else cell for cell in cells)
    code = "\n" * text[:start].count("\n") + code  # line numbers stay
    exec(compile(code, str(path or name), "exec", dont_inherit=True), globals())


def list_own_shards(config):
    """Returns what list_shards does, of your own data. 08_data.py reads them, and defines this function anew."""
    execute_part_one("08_data.py")
    return list_own_shards(config)


def list_shards(config):
    """Returns ([a function that returns a training Shard, ready to read, …], the same for validation).

    The last shard of FineWeb-Edu, and of the embedded corpus, validates, whatever num_shards is."""
    dataset = config.dataset
    if on_hub(dataset):
        with contextlib.suppress(Exception):  # the first request raises it
            # In the main thread, with the tab still open: shards are fetched in other threads, wandb is opened later.
            get_secret("WANDB_API_KEY"), hub_token()
    if dataset in HUB_SHARDS:
        files = [HubFile(dataset, f"shard_{i:05d}.parquet") for i in range(HUB_SHARDS[dataset])]
    elif dataset == "embedded":
        files = sorted(embedded_folder().glob("*.parquet"))
    else:
        return list_own_shards(config)
    require(not config.document_separator, "document_separator", config.document_separator, "is for text files")
    *train, validation = [Shard(str(file), (file,), config.text_column) for file in files]
    train = train[: None if config.num_shards == -1 else config.num_shards]
    return [functools.partial(open_shard, shard) for shard in train], functools.partial(open_shard, validation)


def open_parquet(shard):
    """Returns (the Shard on disk, downloaded if it is of the Hub, its ParquetFile). Raises InputError if it is damaged
    or has no rows."""
    if isinstance(file := shard.files[0], HubFile):
        shard = shard._replace(files=(hub_file(file.repo_id, file.name, file.revision),))
    try:
        found = pq.ParquetFile(shard.files[0])
    except DAMAGED as error:
        raise InputError(f"{shard.name}: cannot be read as parquet ({first_line(error)}); get it again") from error
    if found.metadata.num_rows == 0:
        raise InputError(f"{shard.name}: has no rows; leave it out")
    return shard, found


def open_shard(shard):
    """Returns a parquet Shard whose documents can be read. Raises InputError without its column of strings."""
    shard, found = open_parquet(shard)
    kinds = {field.name: str(field.type) for field in found.schema_arrow}
    if kinds.get(shard.column) not in ("string", "large_string", "string_view"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"{shard.name}: must have a `{shard.column}` column of strings; its columns: {columns}")
    return shard


def size_of(file):
    """Returns the bytes of a file on disk or on the Hub; 1 where they are not known."""
    return file.stat().st_size if isinstance(file, Path) else file.size or 1


def identity(shard):
    """Returns what tells a shard from others: of files of the Hub their hashes, of local ones size, beginning, end."""
    files, digest = shard.files, hashlib.sha256()
    if len(files) == 1 and isinstance(files[0], HubFile):
        return f"{files[0].name} {files[0].oid[:8]}".strip()
    names = [os.fsencode(Path(str(file)).name) for file in files]
    for name, file in zip(names, files):
        digest.update(name if len(files) > 1 else b"")
        if isinstance(file, HubFile):
            digest.update(file.oid.encode())
            continue
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(opened.tell(), size_of(file) - 2**20))  # of parquet it has the footer: sizes of all columns
            digest.update(opened.read())
    name = names[0].decode(errors="replace") if len(files) == 1 else f"{len(files)} files"
    return f"{name}, {sum(map(size_of, files))} bytes, {digest.hexdigest()[:8]}"


def count_documents(shard, enough=2**24):
    """Returns (documents, bytes of text, share of the shard that was read, whether that is all of it).

    It stops when there is `enough` text in 100 documents."""
    documents = size = row = 0
    reading = read_documents(shard)  # its name keeps the file open
    for row, text in reading:  # noqa: B007
        documents, size = documents + 1, size + len(text.encode())
        if size > enough and documents >= 100:
            return documents, size, (row + 1) / pq.read_metadata(shard.files[0]).num_rows, False
    return documents, size, 1.0, True


def describe_data(shards, validation):
    """Prints what list_shards has chosen: documents and bytes for training, and what validates. Returns the bytes.

    Both are counted in the first 16 MiB of text, 100 documents at least. If there is more, they are projected by the
    sizes of the files."""
    sizes, documents, size, seen = [sum(map(size_of, fetch.args[0].files)) for fetch in shards], 0, 0, 0
    held_out, last = validation.args[0], shards[-1].args[0]
    for fetch, on_disk in zip(shards if isinstance(last.files[0], Path) else shards[:1], sizes):
        count, n_bytes, share, whole = count_documents(fetch(), 2**24 - size)
        documents, size, seen = documents + count, size + n_bytes, seen + share * on_disk
        if not whole:
            break
    ratio = max(1, sum(sizes) / seen)
    about = "about " if ratio > 1.001 else "" if whole else "more than "
    place = f"{len(shards):,} training shards" if len(shards) > 1 else last.name
    part = f"{held_out.part[1] / ALL[1]:.1%} of the documents, by the hash of their text"
    part = held_out.name if held_out.part == ALL else part
    amount = f"{documents * ratio:,.0f} documents, {size * ratio / 1e6:,.1f} MB of text"
    print(f"data    {about}{amount} in {place}; validation: {part}", flush=True)
    return size * ratio


# %% Command line cellView="form" tags=["shared"]
# @title Command line
def boolean(text):
    """Returns True for 'true', False for 'false'."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse_args(argv, config, epilog=""):
    """Returns `config` with the `--field value` pairs of argv. --help lists all. Raises InputError for a wrong one."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--FIELD VALUE ...]", epilog=epilog,
        description="Every option is a Config field; without options the Config fits the machine.",
        allow_abbrev=False, formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28, width=120),
    )  # fmt: skip

    def refuse(message):  # argparse would print the usage, a screenful
        raise InputError(f"{message} (--help lists the fields)")

    parser.error = refuse
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, field in fields.items():
        default, kind = getattr(config, name), field.type if field.type in (int, float, bool) else str
        sentence = "; ".join(filter(None, (field.metadata["help"], field.metadata["rule"][0])))
        text = f"{sentence} (here {default!r})".replace("%", "%%")
        how = {"nargs": "?", "const": True} if kind is bool else {}  # --flag alone is true
        convert = boolean if kind is bool else kind
        parser.add_argument(f"--{name}", default=default, help=text, type=convert, metavar=kind.__name__.upper(), **how)
    given, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith(("--preflight", "--scaling")):
        refuse(f"--preflight and --scaling have a notebook of their own: python 05_preflight.py {parser.prog} v6e")
    if rest:
        refuse(f"unknown option {rest[0]!r}{suggest(rest[0].lstrip('-').split('=')[0], fields)}")
    return config.replace(**vars(given))


@contextlib.contextmanager
def one_line_errors():
    """Turns an InputError of a script into one line on stderr and exit status 2; in a notebook it is raised."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        if IN_NOTEBOOK:
            raise
        interrupted = "interrupted; the same command goes on from the newest checkpoint, if there is one"
        print(f"error: {error}" if isinstance(error, InputError) else interrupted, file=sys.stderr, flush=True)
        if sys.excepthook.__name__ == "leave_at_once":  # one of several hosts: an orderly exit would wait for all
            os._exit(2)
        raise SystemExit(2 if isinstance(error, InputError) else 130) from None


# %% [markdown]
# # Part III: run
#
# `Config.for_network()` is the reference where the Hub answers, else the demo. Change it with `config.replace(...)`. As
# a script, every field is an option: `python 01_tokenizer.py --vocab_size 16384 --num_shards 2`.

# %% Configure tags=["run"]
with one_line_errors():
    config = parse_args([] if IN_NOTEBOOK else sys.argv[1:], Config.for_network())
    picture, api = make_folder(config.run_dir) / "tokenizer.png", open_repo(config.hf_repo_id)
print(config)

# %% Train, check and keep it tags=["run"]
with one_line_errors():
    tokenizer, folder, validation = train_on_shards(config)
    check_everything(tokenizer, validation)
    if api:
        upload_tokenizer(api, folder, config.hf_repo_id)

# %% Compare it, look at it tags=["run"]
tokenizers, texts = {"tpuchat": tokenizer, **load_rivals()}, texts_to_compare(validation)
show_compression(bytes_per_token(tokenizers, texts), tokenizers)
show_merges(tokenizer)
plot_lengths(tokenizer, texts["validation"], picture)
print("picture:", picture)
if IN_NOTEBOOK:
    from IPython.display import Image, display

    display(Image(str(picture)))
