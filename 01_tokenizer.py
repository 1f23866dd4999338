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
# tokens, trained on two billion characters of FineWeb-Edu in some minutes. It needs no accelerator, so run it on a
# free CPU runtime and save the TPU for `02_train`. Where there is no network it does the same on the 12 MB of English
# that come with the repository, with 4,096 tokens, in seconds. Press *Run all*.
#
# You get the tokenizer as two small text files, proof that no byte is ever lost, a comparison with the tokenizers of
# GPT-2 and GPT-4, and a look at what was learned. No account is needed; with a token of the Hugging Face Hub and a
# repo of yours, the tokenizer is uploaded, and `02_train` finds it from any machine.

# %% [markdown]
# ## Setup
#
# The install cell adds only what the runtime lacks. `HF_TOKEN`, as a Colab secret or an environment variable, raises
# the Hub's rate limits and allows the upload.

# %% Install what is missing tags=["shared"]
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile


def install(*packages):
    """In a notebook, installs those of the packages that the runtime lacks. A constraints file pins every installed
    version, so that pip replaces none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing or "get_ipython" not in globals():
        return
    print("installing", *missing)
    here = {}
    for package in importlib.metadata.distributions():
        name, version = package.name, package.version
        # pip refuses versions such as Debian's own 2.22.1ubuntu1.
        if name and re.fullmatch(r"[\d.]+(?:(?:a|b|rc|\.post|\.dev)\d+)*(?:\+[\w.]+)?", version or ""):
            here.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)  # of two, the first in the path is in use
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{name}=={version}\n" for name, version in here.items()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *missing]
        subprocess.run(command, check=True)


# %% Install tags=["run"]
install("numpy", "tiktoken", "rustbpe", "pyarrow", "huggingface_hub", "matplotlib", "tqdm")

# %% Imports
import argparse
import base64
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

# %% Environment tags=["shared"]
GITHUB = "tpuchat/tpuchat"
IN_NOTEBOOK = "get_ipython" in globals()
warnings.filterwarnings("ignore", "IProgress not found")  # huggingface_hub's bars look for ipywidgets, and do without


class InputError(ValueError):
    """Something that a person gave is wrong: a Config value, a file, a checkpoint. The message is one line that says
    what was wrong, the value, and what to do. As a script, it is printed to stderr and the exit status is 2."""


def get_secret(name):
    """A secret by name, or None: Colab's secrets panel first, then the environment. Never required."""
    try:
        from google.colab import userdata

        value = userdata.get(name)
    except Exception:  # not in Colab, not granted, or not there: Colab raises a different class for each
        value = os.environ.get(name)
    return (value or "").strip() or None  # it may have been pasted with the end of its line


def someone_watches():
    """Whether a progress bar has a reader: a notebook or a terminal, not a log file."""
    return IN_NOTEBOOK or sys.stderr.isatty()


def bar_file():
    """Where a progress bar is written to: a notebook shows what comes on stderr in red."""
    return sys.stdout if IN_NOTEBOOK else sys.stderr


def cache_dir():
    """Where what takes long to make or to get stays between runs."""
    return Path.home() / ".cache" / "tpuchat"


def format_time(seconds):
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def in_background(function):
    """A Future of function(), run in a daemon thread: unlike a pool's, it does not keep a finished process waiting."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future


# %% [markdown]
# ## Config
#
# 32,768 tokens is what a model of a few hundred million parameters can afford: the embedding and the head have a row
# for each token, 67 of the reference model's 268 million parameters. A larger vocabulary would pack more bytes into a
# token and learn each row more slowly. Two billion characters are far more than the merges need to settle, and cost
# little.


# %% Config helpers tags=["shared"]
def free(default):
    """A Config field that is not part of the compiled program: changing it compiles nothing."""
    return dataclasses.field(default=default, compare=False)


def require(ok, name, value, rule):
    """Raises an InputError that names the Config field, its value and the rule that it breaks, unless `ok`."""
    if not ok:
        raise InputError(f"{name}={value!r}: {rule}")


def type_name(field):
    """'int', or 'str | tuple'."""
    return getattr(field.type, "__name__", str(field.type))


def check_types(config):
    """Every field has its declared type (an int serves as a float), and a device has numbers as large."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = (int, float) if field.type is float else field.type
        require(
            isinstance(value, kinds) and not isinstance(value, bool), field.name, value,
            f"must be of type {type_name(field)}, not {type(value).__name__}",
        )  # fmt: skip
        if field.type is int:
            require(abs(value) < 2**63, field.name, value, "must be below 2^63")
        if field.type is float:
            largest = float(np.finfo(np.float32).max)
            require(abs(value) <= largest, field.name, value, f"must be a finite number up to {largest:.1e}")  # no NaN
            object.__setattr__(config, field.name, float(value))


# %% Config
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All choices of this notebook. `Config()` is the reference tokenizer; wrong values raise InputError."""

    vocab_size: int = 32768  # the nine special tokens included
    max_chars: int = 2_000_000_000  # read at most so many
    doc_chars: int = 10_000  # of each document use at most so many: a long one should not outweigh a hundred others
    dataset: str = "karpathy/fineweb-edu-100b-shuffle"  # 'embedded', a folder of parquet shards, or a Hub dataset
    num_shards: int = 8  # train on at most so many shards, from the first; -1 = all but the last, which validates
    hf_repo_id: str = ""  # your own Hub repo, owner/name, to upload to; made if it is not there
    run_dir: str = "runs/tokenizer"  # for the pictures

    def __post_init__(self):
        check_types(self)
        check_vocab_size(self.vocab_size)
        for name in ("max_chars", "doc_chars"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(self.num_shards == -1 or self.num_shards > 0, "num_shards", self.num_shards, "must be positive, or -1")

    def replace(self, **changes):
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def demo(cls):
        """The embedded corpus: seconds, without network."""
        return cls(vocab_size=4096, dataset="embedded", run_dir="runs/tokenizer-demo")

    @classmethod
    def for_network(cls):
        """The reference where its shards are here or the Hub answers, else the demo."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        config = cls()
        train, validation = list_shards(config)
        if all(cached_shard(*fetch.args) for fetch in (*train, validation)):
            return config
        repo_id, name = train[0].args
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, name, repo_type="dataset"), timeout=5)
        except Exception as error:  # a refusal is an answer, too, and will be explained when the shards are fetched
            if getattr(error, "response", None) is None:
                print(f"the Hugging Face Hub does not answer ({type(error).__name__}): this will be the demo")
                return cls.demo()
        return config


# %% Config from the command line tags=["shared"]
def suggest(name, known):
    """', did you mean X?', or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def parse_args(argv, config, epilog=""):
    """`--field value` pairs on top of `config`. An unknown field or a bad value raises InputError; --help lists all."""
    parser = argparse.ArgumentParser(
        description="Every option is a Config field; without options the Config fits the machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, epilog=epilog,
    )  # fmt: skip

    def refuse(message):  # argparse would print the usage, a screenful
        raise InputError(f"{message} (--help lists the fields)")

    parser.error = refuse
    fields = dataclasses.fields(config)
    for field in fields:
        parser.add_argument(f"--{field.name}", default=getattr(config, field.name), help=type_name(field))
    given, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].lstrip("-").split("=")[0]
        raise InputError(
            f"unknown option {rest[0]!r}{suggest(name, [f.name for f in fields])} (--help lists the fields)"
        )
    changes = {}
    for field in fields:
        value = getattr(given, field.name)
        if isinstance(value, str) and field.type in (int, float):
            try:
                value = field.type(value)
            except ValueError:
                raise InputError(f"{field.name}={value!r}: must be of type {field.type.__name__}") from None
        changes[field.name] = value
    return config.replace(**changes)


@contextlib.contextmanager
def one_line_errors():
    """As a script, an InputError is one line on stderr and exit status 2; in a notebook it is raised as it is."""
    try:
        yield
    except InputError as error:
        if IN_NOTEBOOK:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        if seconds := os.environ.get("TPUCHAT_LEAVE_AFTER"):  # one of several hosts: a proper end waits for all others
            time.sleep(float(seconds))
            os._exit(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if IN_NOTEBOOK:
            raise
        print("interrupted; the same command goes on from the newest checkpoint, if there is one", file=sys.stderr)
        raise SystemExit(130) from None


# %% [markdown]
# ## Tokenizer
#
# BPE in three lines: cut the text into words; count the pairs of neighbouring tokens inside the words; make a new
# token of the most frequent pair, and count again. The first tokens are the 256 bytes, so whatever the bytes, there is
# a way to write them. No merge crosses a cut, and that is what the split pattern is for: it keeps "dog", "dog." and
# "dog!" from becoming three tokens, and long numbers from becoming thousands.
#
# The nine special tokens never come out of text. `<|bos|>` opens each document in pretraining; the others mark the
# turns of a conversation and the calls of a tool, for those who go on to finetune. The files are tiktoken's own text
# format (base64 token, rank) and a small JSON with the pattern and the special tokens: nothing is pickled, and each
# can be read in an editor.

# %% Tokenizer format tags=["shared"]
# GPT-4's split pattern, but with at most two digits a token: a small vocabulary has no room for 1,000 numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip


def check_vocab_size(vocab_size):
    """InputError if there is no room for a token for each byte and the special tokens."""
    least = 256 + len(SPECIAL_TOKENS)
    require(vocab_size >= least, "vocab_size", vocab_size, f"must be at least {least}: bytes and specials")


def make_tokenizer(ranks, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
    """A tiktoken.Encoding from `ranks` (bytes → rank, 0 … n-1); the special tokens take the ids from n on."""
    special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding("tpuchat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.tiktoken and, last and at once, tokenizer.json to `folder`: without the second there is none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = sorted((rank, token) for token, rank in tokenizer._mergeable_ranks.items())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    special = sorted(tokenizer._special_tokens, key=tokenizer._special_tokens.get)
    meta = {"pattern": tokenizer._pat_str, "special_tokens": special}
    (folder / "tokenizer.json.part").write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(folder / "tokenizer.json.part", folder / "tokenizer.json")


# Characters of all kinds, spaces and line ends in company: what a pattern does not match would be lost without a word.
PROBE = "It's  2026 —\r\n\n\tdef f(x): \n  return x! 東京🙂 " + "".join(map(chr, range(0x3000)))


def load_tokenizer(folder):
    """Reads what save_tokenizer wrote. InputError if a file is missing or is not what it should be."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "tokenizer.json").read_text())
        pairs = [line.split() for line in (folder / "tokenizer.tiktoken").read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("the ranks must be 0 … n-1, one a token, with all 256 single bytes among them")
        special = meta["special_tokens"]
        if "<|bos|>" not in special or len(set(special)) < len(special):
            raise ValueError("the special tokens must be different, with <|bos|> among them")
        tokenizer = make_tokenizer(ranks, meta["pattern"], special)
        if tokenizer.decode(tokenizer.encode_ordinary(PROBE)) != PROBE:
            raise ValueError("its pattern leaves characters out")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tiktoken panics, which is no Exception, if a pattern matches the empty string
        raise InputError(f"tokenizer in {folder}: {error}; delete the folder to train it anew") from error


def token_bytes(tokenizer):
    """UTF-8 bytes that each token id stands for, int32 `[n_vocab]`; special tokens stand for none."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token, rank in tokenizer._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# %% [markdown]
# Training is `rustbpe`'s: it counts words in parallel as they stream by, so that two billion characters never sit in
# memory, and then merges on the table of different words. When the bar is full, the merging begins; it takes some more
# seconds and says nothing.


# %% Train a tokenizer tags=["shared"]
def train_tokenizer(texts, vocab_size, max_chars=2_000_000_000, doc_chars=10_000, expected_chars=None):
    """Byte-level BPE of `vocab_size` tokens, the special ones included, on at most `max_chars` characters.

    Of each document only the first `doc_chars` characters are used, so that one long document does not weigh more
    than a hundred short ones. The texts stream through: what grows is the table of different words and their counts.
    `expected_chars`, of whole documents, is where the progress bar ends. InputError if there is too little text.
    """
    import rustbpe

    check_vocab_size(vocab_size)
    merges = vocab_size - len(SPECIAL_TOKENS)
    bar = tqdm(
        total=expected_chars, desc="reading", unit=" chars", unit_scale=True, leave=False,
        disable=not someone_watches(), file=bar_file(),
    )

    def stream():
        left = max_chars
        for text in texts:
            bar.update(len(text))
            text = text[: min(doc_chars, left)]
            left -= len(text)
            yield text
            if left == 0:
                break
        bar.set_description("merging")

    with bar:
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(stream(), merges, buffer_size=1024, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < merges:
        raise InputError(
            f"vocab_size={vocab_size}: this text yields only {len(ranks)} tokens; give more text or ask for fewer"
        )
    return make_tokenizer(ranks)


# %% Where a tokenizer lies tags=["shared"]
def tokenizer_folder(config, first_shard):
    """The folder, of this machine, for the tokenizer that 01_tokenizer.py trains for config.dataset."""
    source = config.dataset if on_hub(config.dataset) else str(Path(first_shard).resolve().parent)
    return cache_dir() / "tokenizers" / f"{source.strip('/').replace('/', '--')}-{config.vocab_size}"


# %% [markdown]
# ## Data: shards
#
# A dataset is a list of parquet shards with one `text` column. FineWeb-Edu comes from the Hugging Face Hub, already
# shuffled, about 250M characters a shard; the embedded corpus, 12 MB of public-domain English, lies in the repository;
# a folder of shards and any other Hub dataset (`owner/name`, or `owner/name/folder` for a part of it) work alike.
# **The last shard is validation**, whatever `num_shards` is: a number that moves when you train on more data is not a
# validation loss.
#
# Networks fail in ways that look like success: a proxy's error page saved as a shard, a cut connection, a file that is
# full length and wrong. So a shard counts only when its SHA-256 is the one that the Hub gives; what may pass (a 500, a
# cut) is tried again; and what does not pass ends in one line that names the shard, the cause and the remedy.

# %% Hub tags=["shared"]
HUB_SHARDS = {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}  # the last validates


class MissingFileError(InputError):
    """A Hub repo is there, and has no such file."""


def hub_token():
    """The user's token, or None. Of a bad one the HTTP library would complain by quoting it."""
    token = get_secret("HF_TOKEN")
    if token and not re.fullmatch("[!-~]+", token):
        raise InputError("HF_TOKEN: holds a space, a line end or another character that no token has; copy it again")
    return token


def is_intact(path, etag=""):
    """Whether a file of huggingface_hub's cache is what the Hub has: large files are stored under their SHA-256, and
    where there are no symbolic links to tell it, it is `etag`."""
    digest = Path(os.readlink(path)).name if path.is_symlink() else etag
    if len(digest) != 64:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def explain(error, repo_id, repo_type):
    """(what a failed request to the Hub means, what to do about it)."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # what went wrong before the cache was asked
    status = getattr(getattr(error, "response", None), "status_code", 0)
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is not the name of a repo", "a name has the form owner/name"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"access is refused ({status})",
            f"accept its terms on {page} and set HF_TOKEN to a token that may read it",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        hint = "" if repo_id in HUB_SHARDS else suggest(repo_id, HUB_SHARDS)
        remedy = f"check the name{hint}; a private repo wants a valid HF_TOKEN"
        return f"there is no such {repo_type} repo, or it is private ({status})", remedy
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "the repo has no such file (404)", f"look for it on {page}"
    if status == 429:
        return "it limits the rate of requests (429)", "wait some minutes, or set HF_TOKEN: accounts have higher limits"
    if status >= 500:
        return f"it is in trouble ({status})", "try again later; what has been downloaded is kept"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set", f"it is not in the cache, {constants.HF_HUB_CACHE}: unset it and download once"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error.strerror})", f"make room, or move {constants.HF_HOME}: set HF_HOME elsewhere"
    if isinstance(error, OSError) and error.errno:
        return reason, "set HF_HOME to a folder to write to"
    return f"no connection, or a broken one ({reason})", "check the network, or use dataset='embedded'"


def may_pass(error):
    """Whether it makes sense to ask again: not where the Hub refuses, nothing is found, or a disk is full."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    final = isinstance(error, (errors.EntryNotFoundError, errors.HFValidationError)) or 400 <= status < 500
    return not final and not getattr(error, "errno", None)  # EntryNotFoundError includes a HEAD tried often enough


def ask_hub(what, repo_id, repo_type, call, attempts=1):
    """call(), again if the reason for its failure may pass. InputError that names `what`, the cause and the remedy."""
    from huggingface_hub import errors

    for attempt in range(attempts):
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # its client raises its own, those of its HTTP library, and OSError
            if may_pass(error) and attempt < attempts - 1:
                time.sleep(2**attempt)  # its client has its own patience with connections, not with a 500
                continue
            cause, remedy = explain(error, repo_id, repo_type)
            missing = isinstance(error, errors.EntryNotFoundError) and "404" in cause
            raise (MissingFileError if missing else InputError)(
                f"cannot get {what} of {repo_id} from the Hugging Face Hub: {cause}; {remedy}"
            ) from error


def hub_download(repo_id, filename, repo_type="dataset"):
    """The local path of a file of a Hub repo, in huggingface_hub's cache; downloaded if it is not there or outdated."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    def download():
        watched = threading.current_thread() is threading.main_thread() and someone_watches()
        (enable_progress_bars if watched else disable_progress_bars)()  # one bar at a time: in the background, none
        path, etag = Path(hf_hub_download(repo_id, filename, repo_type=repo_type, token=hub_token())), ""
        if not path.is_symlink():
            with contextlib.suppress(Exception):  # no network: then it is what an earlier process has checked
                etag = get_hf_file_metadata(hf_hub_url(repo_id, filename, repo_type=repo_type), token=hub_token()).etag
        if not is_intact(path, etag):
            if path.is_symlink():
                (path.parent / os.readlink(path)).unlink()
            path.unlink()
            raise ConnectionError("the SHA-256 of what arrived is not the Hub's")
        return path

    return ask_hub(filename, repo_id, repo_type, download, attempts=5)


def hub_shard(repo_id, filename):
    """The local path of a shard: a shard that is there and whole is used without asking the Hub."""
    path = cached_shard(repo_id, filename)
    return path if path and is_intact(path) else hub_download(repo_id, filename)


def cached_shard(repo_id, filename):
    """The path of a shard in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, filename, repo_type="dataset")
    return Path(path) if isinstance(path, str) else None


# %% Shards tags=["shared"]
EMBEDDED_SHARDS = 5


def on_hub(dataset):
    """Whether `dataset` names one of the Hub: one of ours, or neither 'embedded' nor a folder."""
    return dataset in HUB_SHARDS or not (dataset == "embedded" or (dataset and Path(dataset).is_dir()))


def embedded_folder():
    """data/embedded of the repository: beside this file, else fetched from GitHub (a lone notebook in Colab)."""
    here = Path(globals().get("__file__", "notebook")).resolve().parent / "data" / "embedded"
    if here.exists():
        return here
    folder = cache_dir() / "embedded"
    names = [f"shard_{i:05d}.parquet" for i in range(EMBEDDED_SHARDS)]
    for name in [*names, "tokenizer/tokenizer.tiktoken", "tokenizer/tokenizer.json"]:
        if not (folder / name).exists():
            url = f"https://raw.githubusercontent.com/{GITHUB}/main/data/embedded/{name}"
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                partial, _ = urllib.request.urlretrieve(url, folder / f"{name}.part")
            except OSError as error:
                raise InputError(
                    f"cannot get the embedded corpus from {url}: {error}; clone the repository instead"
                ) from error
            os.replace(partial, folder / name)
    return folder


def hub_listing(dataset):
    """(repo, [file name of each shard]) of a Hub dataset. The list is kept, for when the Hub cannot be reached."""
    repo_id, folder = "/".join(dataset.split("/")[:2]), "/".join(dataset.split("/")[2:])
    if dataset in HUB_SHARDS:
        return dataset, [f"shard_{i:05d}.parquet" for i in range(HUB_SHARDS[dataset])]
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(/.+)?", dataset):
        raise InputError(
            f"dataset={dataset!r}: must be 'embedded', a folder of parquet shards, or a dataset of the Hugging Face "
            f"Hub: owner/name, such as {next(iter(HUB_SHARDS))}"
        )
    from huggingface_hub import HfApi

    def ask():
        api = HfApi(token=hub_token())
        tree = api.list_repo_tree(repo_id, folder or None, recursive=True, repo_type="dataset")
        return sorted(entry.path for entry in tree if entry.path.endswith(".parquet"))

    kept = cache_dir() / "listings" / f"{dataset.replace('/', '--')}.json"
    try:
        names = ask_hub(f"the list of shards{folder and ' in '}{folder}", repo_id, "dataset", ask)
    except InputError:
        with contextlib.suppress(OSError, ValueError):
            return repo_id, json.loads(kept.read_text())
        raise
    with contextlib.suppress(OSError):  # a home that cannot be written to costs no more than this
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(names))
    return repo_id, names


def list_shards(config):
    """(fetchers of the training shards, fetcher of the validation shard); a fetcher returns the shard's local path."""
    if on_hub(config.dataset):
        repo_id, names = hub_listing(config.dataset)
        fetchers = [functools.partial(hub_shard, repo_id, name) for name in names]
    else:
        folder = embedded_folder() if config.dataset == "embedded" else Path(config.dataset)
        fetchers = [functools.partial(Path, path) for path in sorted(folder.glob("*.parquet"))]
    if len(fetchers) < 2:
        raise InputError(
            f"dataset={config.dataset!r}: has {len(fetchers)} parquet shards; it takes at least two, "
            "the last one for validation"
        )
    *train, validation = fetchers
    return train[: None if config.num_shards == -1 else config.num_shards], validation


def announce_downloads(config, fetchers):
    """Prints how much is to be downloaded, where to, and about how long that takes; nothing if all of it is here."""
    if not on_hub(config.dataset):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    absent = [fetch for fetch in fetchers if not cached_shard(*fetch.args)]
    if not absent or constants.HF_HUB_OFFLINE:
        return
    repo_id, name = absent[0].args
    url = hf_hub_url(repo_id, name, repo_type="dataset")
    with contextlib.suppress(Exception):  # a courtesy: whatever is wrong, the download itself will say
        size = get_hf_file_metadata(url, token=hub_token(), timeout=10).size
        total = size * len(absent)
        print(f"data    {len(absent)} of {len(fetchers)} shards of {repo_id} are not here, {size / 1e6:,.0f} MB each")
        print(f"        {total / 1e9:,.1f} GB, {format_time(total * 8 / 100e6)} at 100 Mbit/s, fetched ahead of use")
        print(f"        into {constants.HF_HUB_CACHE}", flush=True)


# %% [markdown]
# A row of a shard is a document. A shard that is not what it should be is refused by name before one of its tokens is
# used, not skipped: a training run that silently saw half of its data is worse than one that stopped.


# %% Read documents tags=["shared"]
DAMAGED_PARQUET = pa.ArrowException, OSError, UnicodeDecodeError  # what pyarrow raises


def check_shard(path):
    """`path`, if it is a whole shard: InputError that names the shard and what is wrong with it otherwise.

    Only the parquet footer is read: its statistics tell whether a text is null (null_count) or empty (the minimum).
    """
    try:
        shard = pq.ParquetFile(path)
        groups = [shard.metadata.row_group(g) for g in range(shard.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == "text" and chunk.statistics]
        doubtful = any(s.null_count or (s.has_min_max and s.min in ("", b"")) for s in statistics)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such shard") from None
    except DAMAGED_PARQUET as error:
        raise InputError(
            f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); delete it and get it again"
        ) from error
    columns = shard.schema_arrow.names
    if "text" not in columns:
        raise InputError(f"{path}: has no `text` column, only {', '.join(columns)}")
    kind = shard.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{path}: its `text` column holds {kind}, not strings")
    if shard.metadata.num_rows == 0:
        raise InputError(f"{path}: holds no documents")
    if doubtful:
        for _ in read_documents(path):  # raises at the row in question
            pass
    return path


def count_chars(path):
    """Bytes of text in a shard, from its footer: about its characters."""
    metadata = pq.read_metadata(path)
    columns = [
        metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in range(metadata.num_columns)
    ]
    lengths = 4 * metadata.num_rows  # parquet puts its length before each text
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text") - lengths


def read_documents(path, start=0, step=1):
    """Yields (row, text) of rows start, start + step, …, with one row group in memory at a time."""
    shard, row = pq.ParquetFile(path), 0
    for group in range(shard.num_row_groups):
        rows = shard.metadata.row_group(group).num_rows
        wanted = range(start - row if start > row else (start - row) % step, rows, step)
        if wanted:
            try:
                column = shard.read_row_group(group, columns=["text"]).column("text")
                texts = (column.take(pa.array(wanted)) if len(column) == rows and step > 1 else column).to_pylist()
            except DAMAGED_PARQUET as error:
                raise InputError(
                    f"{path}: row group {group} is damaged ({str(error).splitlines()[0]}); delete it and get it again"
                ) from error
            if len(column) != rows:
                raise InputError(
                    f"{path}: row group {group} has {len(column)} rows, not {rows}; delete it and get it again"
                )
            for i, text in zip(wanted, texts if step > 1 else texts[wanted.start :], strict=True):
                if not text:
                    raise InputError(
                        f"{path}: the text of row {row + i} is null or empty; drop such rows from the shard"
                    )
                yield row + i, text
        row += rows


# %% Train on shards
def make_folder(folder):
    """`folder`, made if it is not there. InputError if it cannot be written to: better now than after the training."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another folder (run_dir, HOME)"
        ) from error
    return folder


def fetch_ahead(shards):
    """Yields the local path of each shard, checked, while the next one is on its way."""
    following = [in_background(lambda: check_shard(shards[0]()))]
    for shard in [*shards[1:], None]:
        path = following.pop().result()
        if shard:
            following.append(in_background(lambda shard=shard: check_shard(shard())))
        yield path


def train_on_shards(config):
    """(tokenizer, its folder, path of the validation shard): trained on the shards of config.dataset, and saved."""
    shards, fetch_validation = list_shards(config)
    announce_downloads(config, [*shards, fetch_validation])
    first = check_shard(shards[0]())
    expected = count_chars(first) * len(shards)
    if not on_hub(config.dataset):
        expected = sum(count_chars(check_shard(fetch())) for fetch in shards)
    folder = make_folder(tokenizer_folder(config, first))
    started = time.perf_counter()
    texts = (text for path in fetch_ahead(shards) for _, text in read_documents(path))
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_chars, config.doc_chars, expected)
    save_tokenizer(tokenizer, folder)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"{tokenizer.n_vocab:,} tokens from {len(shards)} shards in {seconds:,.1f} s, peak {peak / 2**30:.2f} GiB")
    print(f"in {folder}, where 02_train looks for it")
    return tokenizer, folder, check_shard(fetch_validation())


# %% [markdown]
# ## Is anything lost?
#
# A tokenizer that drops or changes one character poisons every run that uses it, and no loss curve will say so. So the
# round trip is checked where it hurts: every document of the validation shard, source code, every code point of
# Unicode, and bytes that are not text at all.


# %% Round trip
def unicode_planes():
    """Every code point that a text may hold, 17 texts: one for each plane, with a space after every 64 characters."""
    for plane in range(17):
        codes = [c for c in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= c < 0xE000]  # no surrogates
        yield " ".join("".join(map(chr, codes[i : i + 64])) for i in range(0, len(codes), 64))


def python_source():
    """The source of a module that every Python has, 100 KB of ordinary code."""
    return Path(argparse.__file__).read_text(encoding="utf-8")


def check_round_trip(tokenizer, texts):
    """(bytes, tokens) of all texts. InputError that names the first text that does not come back as it was."""
    n_bytes = n_tokens = 0
    for i, text in enumerate(texts):
        tokens = tokenizer.encode_ordinary(text)
        if tokenizer.decode(tokens, errors="strict") != text:
            raise InputError(f"text {i} ({text[:40]!r}…) is changed by the tokenizer; it must not be used")
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(tokens)
    return n_bytes, n_tokens


def check_bytes(tokenizer, seed=0):
    """Bytes that are not UTF-8 survive, too: every pair of bytes, and a megabyte at random. Returns how many."""
    data = bytes(itertools.chain.from_iterable(itertools.product(range(256), repeat=2)))
    data += random.Random(seed).randbytes(2**20)
    for start in range(0, len(data), 1000):
        piece = data[start : start + 1000]
        if tokenizer.decode_bytes(tokenizer._encode_bytes(piece)) != piece:
            raise InputError(f"bytes {piece[:10]!r}… are changed by the tokenizer; it must not be used")
    return len(data)


def check_everything(tokenizer, validation):
    """All round trips, with a line for each."""
    started = time.perf_counter()
    documents = (text for _, text in read_documents(validation))
    total = pq.read_metadata(validation).num_rows
    watched = {"disable": not someone_watches(), "leave": False, "file": bar_file()}
    documents = tqdm(documents, "validation", total, unit=" docs", **watched)
    n_bytes, n_tokens = check_round_trip(tokenizer, documents)
    seconds = time.perf_counter() - started
    print(
        f"validation shard: {total:,} documents, {n_bytes:,} bytes, {n_tokens:,} tokens: all come back, {seconds:.1f} s"
    )
    print(f"code: {check_round_trip(tokenizer, [python_source()])[0]:,} bytes come back")
    print(f"Unicode, all 17 planes: {check_round_trip(tokenizer, unicode_planes())[0]:,} bytes come back")
    print(f"arbitrary bytes: {check_bytes(tokenizer):,} come back")


# %% [markdown]
# ## Is it any good?
#
# The measure is **bytes per token**: at equal context and equal compute a model that gets more bytes from a token has
# read more text. It is also why losses per token cannot be compared between tokenizers, and bits per byte can. The
# rivals are GPT-2's tokenizer (50,257 tokens) and GPT-4's (100,277), if tiktoken can fetch them. A vocabulary is
# good at what it has seen: trained on two billion characters of kernel documentation and a dictionary, ours packed 46%
# more bytes into a token of such text than GPT-2's, and 4% more than GPT-4's with three times the tokens, and lost 8 to
# 19% to GPT-4's on the English, code and maths below (LOG.md). Numbers cost it more by design: two digits a token,
# where GPT-4 takes three.


# %% Texts to compare on
ENGLISH = """The harbour froze on the ninth of January, and for the first time in forty years people walked across it.
By noon somebody had set up a stall that sold chestnuts; by evening there were lanterns, a fiddler and an argument
about who owned the ice. Engineers from the university drilled a row of small holes and measured the thickness every
hour. "It is thinner than it looks," their spokeswoman told reporters, "and the current underneath has not stopped."
Nobody went home. The mayor, who had opposed the new bridge in three elections, remarked that nature had built one for
nothing, and that it would be closed in spring for the usual reasons. When the thaw came, on a Tuesday, the last of
the stalls was pulled ashore with ropes, and the newspaper printed the names of everyone who had helped. Insurance
companies have since asked for a rule. The council's draft, forty pages long, permits walking in single file after a
week of hard frost, provided that the walker has signed a form; it says nothing about fiddlers."""
MATHS = r"""Let $f : [a, b] \to \mathbb{R}$ be continuous on $[a, b]$ and differentiable on $(a, b)$. Then there is a
$\xi \in (a, b)$ with $f'(\xi) = \frac{f(b) - f(a)}{b - a}$. \begin{proof} Put $g(x) = f(x) - f(a) - \frac{f(b) -
f(a)}{b - a} (x - a)$, so that $g(a) = g(b) = 0$. If $g \equiv 0$ there is nothing to show; otherwise $g$ takes a
maximum or a minimum at some $\xi \in (a, b)$, and there $g'(\xi) = 0$. \end{proof} For example, with $f(x) = x^3 - 2x
+ 1$ on $[0, 2]$ we have $f(2) = 5$, $f(0) = 1$, a slope of $2$, and $3\xi^2 - 2 = 2$ gives $\xi = \sqrt{4/3} \approx
1.1547$. Similarly \begin{align} \sum_{k=0}^{n} \binom{n}{k} x^k y^{n-k} &= (x + y)^n, & \int_0^1 x^{m}(1-x)^{n}\,dx
&= \frac{m!\,n!}{(m+n+1)!}, \\ e^{i\pi} + 1 &= 0, & \sum_{n \ge 1} n^{-2} &= \frac{\pi^2}{6} \approx 1.644934.
\end{align}
12 + 34 = 46; 123 * 456 = 56088; 2^{10} = 1024; 1/7 = 0.142857142857..."""


def texts_to_compare(validation, max_chars=10_000_000):
    """{kind: [texts]}; of the validation shard its first documents, up to `max_chars` characters."""
    sample, left = [], max_chars
    for _, text in read_documents(validation):
        sample.append(text)
        left -= len(text)
        if left < 0:
            break
    return {"validation": sample, "English": [ENGLISH], "code": [python_source()], "maths": [MATHS]}


# %% Compression
RIVALS = {"GPT-2": "r50k_base", "GPT-4": "cl100k_base"}  # r50k_base is GPT-2's, in one file instead of two


def load_rivals(seconds=30):
    """{name: tiktoken.Encoding} of those that can be had; tiktoken fetches them, and would wait for ever."""
    rivals = {}
    for name, encoding in RIVALS.items():
        try:
            rivals[name] = in_background(functools.partial(tiktoken.get_encoding, encoding)).result(seconds)
        except Exception as error:
            print(f"no comparison with {name}: its tokenizer cannot be fetched ({type(error).__name__})")
    return rivals


def bytes_per_token(tokenizers, texts):
    """{kind: {name of tokenizer: bytes per token}}."""
    return {
        kind: {
            name: sum(len(text.encode()) for text in group) / sum(len(t.encode_ordinary(text)) for text in group)
            for name, t in tokenizers.items()
        }
        for kind, group in texts.items()
    }


def show_compression(rates, tokenizers):
    """Prints the table of bytes per token; beside each rival, what ours gains on it."""
    ours = next(iter(tokenizers))
    print("bytes per token" + "".join(f"{f'{name}, {t.n_vocab:,}':>22}" for name, t in tokenizers.items()))
    for kind, row in rates.items():
        gains = [
            f"{rate:.3f}" + (f" ({row[ours] / rate - 1:+7.1%})" if name != ours else "") for name, rate in row.items()
        ]
        print(f"{kind:15}" + "".join(f"{gain:>22}" for gain in gains))


def plot_compression(rates, path):
    """Bar chart of bytes_per_token's result, saved to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(rates.values())))
    for i, name in enumerate(names):
        places = [kind + (i - (len(names) - 1) / 2) * 0.8 / len(names) for kind in range(len(rates))]
        bars = axes.bar(places, [row[name] for row in rates.values()], 0.8 / len(names), label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(rates)), list(rates))
    axes.set_ylabel("bytes per token (more is better)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# %% [markdown]
# ## What did it learn?
#
# The first merges are the commonest pairs of the language; the last are rare words. Two pictures in one: how many
# tokens of the vocabulary have each length, and how often tokens of each length are used. The vocabulary holds many
# long words; running text is made of the short ones.


# %% What it learned
def show_token(token):
    """A token's bytes as a person would write them, the first 24 of them."""
    return repr(token[:24].decode(errors="backslashreplace")) + "…" * (len(token) > 24)


def pair_of(ranks, token):
    """The two tokens that were merged into `token`: of all cuts, that whose later part is the oldest."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return min((c for c in cuts if c[0] in ranks and c[1] in ranks), key=lambda c: max(ranks[c[0]], ranks[c[1]]))


def show_merges(tokenizer, count=16):
    """Prints the first merges and the longest tokens."""
    ranks = tokenizer._mergeable_ranks
    merged = sorted((token for token, rank in ranks.items() if rank >= 256), key=ranks.get)
    first = [" + ".join(map(show_token, pair_of(ranks, token))) for token in merged[:count]]
    print("first merges:  ", ",  ".join(first))
    longest = sorted(merged, key=len, reverse=True)[:count]
    print("longest tokens:", ", ".join(f"{show_token(token)} ({len(token)})" for token in longest))


def plot_lengths(tokenizer, texts, path):
    """Share of the vocabulary, and of the tokens in `texts`, by the token's length in bytes; saved to `path`."""
    from matplotlib.figure import Figure

    lengths = token_bytes(tokenizer)
    used = np.concatenate([tokenizer.encode_to_numpy(text, disallowed_special=()) for text in texts])
    longest = 20
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate({"vocabulary": lengths[lengths > 0], "validation text": lengths[used]}.items()):
        share = np.bincount(np.minimum(values, longest), minlength=longest + 1)[1:] / len(values)
        axes.bar(np.arange(1, longest + 1) + 0.4 * i - 0.2, 100 * share, 0.4, label=f"{name}, mean {values.mean():.2f}")
    axes.set_xticks(range(1, longest + 1), [*range(1, longest), f"{longest}+"])
    axes.set_xlabel("bytes of a token")
    axes.set_ylabel("% of tokens")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


# %% [markdown]
# ## Keep it
#
# A tokenizer is part of a model: the same ids must mean the same bytes for as long as the weights live. With
# `hf_repo_id` and `HF_TOKEN` it goes to your Hub repo, where `02_train` with the same `hf_repo_id` finds it. The repo
# is made, or found, before the training starts, so that a wrong name or a token without the right to write is an error
# of the first second.


# %% Upload
def open_repo(repo_id):
    """An HfApi with which upload_tokenizer can write to `repo_id`, made if it is not there; None if nobody asked.

    InputError if it cannot be.
    """
    token = hub_token()
    if not (repo_id and token):
        print("no upload: set hf_repo_id to owner/name" + ("" if token else ", and HF_TOKEN"), "to keep it on the Hub")
        return None
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, exist_ok=True)
    except Exception as error:
        cause, remedy = explain(error, repo_id, "model")
        raise InputError(f"hf_repo_id={repo_id!r}: cannot upload to it: {cause}; {remedy}") from error
    return api


def upload_tokenizer(api, folder, repo_id):
    """Copies the two files of `folder` to tokenizer/ in the Hub repo. InputError if that fails; the folder stays."""
    try:
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, path_in_repo="tokenizer", allow_patterns=["tokenizer.*"],
            ignore_patterns=["*.part"], commit_message="tokenizer",
        )  # fmt: skip
    except Exception as error:
        cause, remedy = explain(error, repo_id, "model")
        raise InputError(f"cannot upload {folder} to {repo_id}: {cause}; {remedy}. Nothing is lost") from error
    print(f"uploaded to https://huggingface.co/{repo_id}/tree/main/tokenizer")


# %% [markdown]
# # Run
#
# Everything above only defined things. Change what you like with `config.replace(...)`. As a script, every field is an
# option: `python 01_tokenizer.py --vocab_size 16384 --num_shards 2`.

# %% Configure tags=["run"]
with one_line_errors():
    config = parse_args([] if IN_NOTEBOOK else sys.argv[1:], Config.for_network())
    run = make_folder(config.run_dir)
    api = open_repo(config.hf_repo_id)
print(config)

# %% Train it tags=["run"]
with one_line_errors():
    tokenizer, folder, validation = train_on_shards(config)
beside = Path(validation).parent / "tokenizer"
if beside.exists():
    same = all((folder / file.name).read_bytes() == file.read_bytes() for file in beside.glob("tokenizer.*"))
    print(
        "byte for byte the tokenizer beside the shards" if same else f"not the tokenizer of {beside}, which 02 prefers"
    )

# %% Check it tags=["run"]
with one_line_errors():
    check_everything(tokenizer, validation)

# %% Keep it tags=["run"]
with one_line_errors():
    if api:
        upload_tokenizer(api, folder, config.hf_repo_id)

# %% Compare it tags=["run"]
tokenizers = {"tpuchat": tokenizer, **load_rivals()}
texts = texts_to_compare(validation)
rates = bytes_per_token(tokenizers, texts)
show_compression(rates, tokenizers)

# %% Look at it tags=["run"]
show_merges(tokenizer)
plot_compression(rates, run / "compression.png")
plot_lengths(tokenizer, texts["validation"], run / "token_lengths.png")
print("pictures:", *run.glob("*.png"))
if IN_NOTEBOOK:
    from IPython.display import Image, display

    display(Image(str(run / "compression.png")), Image(str(run / "token_lengths.png")))
