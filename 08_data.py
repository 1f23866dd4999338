# ---
# jupyter:
#   colab:
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
# # Your own data: any text, any data set of the Hub
#
# `dataset` of 01, 02, 04 and 06 names a file, a folder, or a data set of the Hub. FineWeb-Edu and the embedded corpus
# are parquet files with a column `text`, which those notebooks read by themselves. Everything else is read by Part I of
# this notebook: where `dataset` asks for it, those notebooks execute Part I of `08_data.py`, from beside them or from
# GitHub. Run this notebook to see what they will read, on a free CPU runtime, before you pay for a TPU: the files, the
# splits, the column, the documents.

# %% [markdown]
# ## Setup
#
# The collapsed cells are copies from `01_tokenizer.py`: what is missing is installed, then imports and errors, options,
# downloads from the Hub, and the shards of parquet. Part I stands below them.

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
install("numpy", "tiktoken", "pyarrow", "huggingface_hub", "datasets", "tqdm")

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


# %% [markdown]
# # Part I: how data are read
#
# ## Files and splits
#
# Of several kinds of files in a folder parquet is read, else the most frequent kind. Whole words of a path say what
# trains and what validates; the word nearest to the end decides. What is called `test` never trains. On the Hub the
# card of a data set may declare configurations and splits, which the library
# [datasets](https://huggingface.co/docs/hub/datasets-data-files-configuration) resolves.

# %% Imports of the readers
import csv
import io
from urllib.parse import unquote

# %% Files and splits
KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
KINDS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "json") | dict.fromkeys((".txt", ".md"), "text")
# As the Hub reads names: no letter stands before or after such a word.
SPLIT_WORD = re.compile(r"(?<![^\W\d_])(train|val|dev|test|eval)(ing|id|idation|uation)?(?![^\W\d_])", re.I)
NO_DATA = re.compile(r"(^|/)([._]|(readme|licen[cs]e|dataset_infos?|dataset_dict|state|tokenizer)\.)", re.I)
# owner/name, folder, configuration, revision
HUB_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/([^:@]+?))?/?(?::([^@]+))?(?:@(.+))?")


def kind_of(file):
    """Returns 'parquet', 'arrow', 'json', 'csv', 'text' or None, by the suffix of a file's name, .gz and .zst aside."""
    name, packed = re.subn(r"\.(gz|zst)$", "", str(file).lower())
    kind = KINDS.get(os.path.splitext(name)[1])
    return None if packed and kind in ("parquet", "arrow") else kind


def hub_files(dataset):
    """Returns ({name: HubFile}, {split: [names]} or None) of 'owner/name[/folder][:configuration][@revision]'.

    The splits are those that the card of the dataset declares, as the library `datasets` resolves them."""
    rule = (
        "must be 'embedded', a file or folder of text (there is none here of this name), or a dataset of the Hugging "
    )
    rule += "Face Hub: owner/name, such as "
    match = None if kind_of(dataset) else HUB_NAME.fullmatch(dataset)
    require(match, "dataset", dataset, rule + next(iter(HUB_SHARDS)))
    repo_id, folder, configuration, revision = match.groups()
    require(not (folder and configuration), "dataset", dataset, "name a folder or a configuration, not both")
    what = f"find the dataset {repo_id} (no file or folder here has this name)"
    info = read_hub(what, lambda api: api.dataset_info(repo_id, revision=revision or "main"))
    tree = {"path_in_repo": folder, "recursive": True, "revision": info.sha, "repo_type": "dataset"}
    found = read_hub(f"list {repo_id}", lambda api: [*api.list_repo_tree(repo_id, **tree)])
    found = [entry for entry in found if hasattr(entry, "blob_id")]  # files, not folders
    oids = [entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found]
    files = {e.path: HubFile(repo_id, e.path, info.sha, e.size, oid) for e, oid in zip(found, oids)}
    program, parquet = f"{repo_id.split('/')[1]}.py", f"{repo_id}@refs/convert/parquet"
    rule = f"is made by a program, {program}, which is not run; try the Hub's own parquet files of it: {parquet}"
    require(program not in files, "dataset", dataset, rule)
    if folder:
        return {name.removeprefix(f"{folder}/"): file for name, file in files.items()}, None
    return files, declared_splits(dataset, info, configuration)


def declared_splits(dataset, info, configuration):
    """Returns {split: [names of files]} of a configuration in the card of a dataset, None if it has no configurations.

    Without a name it is the only one, or the default. Raises InputError that lists them."""
    configs = (info.card_data or {}).get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    names = [str(config.get("config_name", "default")) for config in configs]
    default = [name for name, config in zip(names, configs) if config.get("default") or name == "default"]
    chosen = configuration or (default or names if len(default or names) == 1 else [""])[0] if names else None
    if chosen not in names:
        found = ", ".join(names[:20]) + ", …" * (len(names) > 20)
        hint = f"choose one of its configurations, dataset='owner/name:configuration': {found}"
        require(not names, "dataset", dataset, hint + suggest(configuration or "", names))
        require(not configuration, "dataset", dataset, "has no configurations; name a folder of it: owner/name/folder")
        return None
    import datasets

    token = False if "token" in SAID else hub_token()  # the Hub has refused it
    options = {"revision": info.sha, "token": token, "cache_dir": cache_dir() / "datasets"}
    try:
        found = datasets.load_dataset_builder(info.id, chosen, **options).config.data_files
    except Exception as error:  # of any class: a card may say anything
        hint = f"name a folder, or try {info.id}@refs/convert/parquet"
        raise InputError(f"dataset={dataset!r}: {chosen} cannot be found: {first_line(error)}; {hint}") from error
    splits, others = collections.defaultdict(list), []
    for split, urls in found.items():
        word = SPLIT_WORD.search(str(split))
        splits[word[1].lower() if word else ""] += [unquote(url.partition(f"@{info.sha}/")[2]) for url in urls]
        others += [] if word else [str(split)]
    if splits["train"] and others:
        say_once(("splits", dataset), f"data    left out: the splits {', '.join(others)}")
    one = splits["train"] or len(others) < 2
    require(one, "dataset", dataset, f"has the splits {', '.join(others)}, and none for training; name a folder of it")
    return splits


def split_names(dataset, names, text=False):
    """Returns {split: [names]}, by the words of names: train, val, dev, test, eval; '' for those without.

    The word nearest to the end of a path decides; the titles of text files hold words that mean nothing. Raises
    InputError if several folders hold a data set each. Folders of text files, and those like year=2026, are one."""
    splits, folders = collections.defaultdict(list), {}
    for *above, name in (name.split("/") for name in sorted(names)):
        parts = [part for part in (name, *above[::-1]) if not (text and " " in part)]
        words = [word[1].lower() for part in parts if (word := SPLIT_WORD.search(part))]
        splits[words[0] if words else ""].append("/".join([*above, name]))
        above = [part for part in above if "=" not in part]
        root = list(itertools.takewhile(lambda part: not SPLIT_WORD.fullmatch(part), above)) or above
        folders["/".join([dataset, *root])] = SPLIT_WORD.sub("", "/".join(above)).strip("-_./ ")
    # One data set: each folder, without the words of splits, lies in the one before it.
    one = all(not a or f"{b}/".startswith(f"{a}/") for a, b in itertools.pairwise(sorted({*folders.values()})))
    found = ", ".join([*folders][:8]) + ", …" * (len(folders) > 8)
    require(one or text, "dataset", dataset, f"has several data sets; name one of them: {found}")
    return splits


def local_files(dataset):
    """Returns {name: path} of what may be data in a folder. Raises InputError if it cannot be read."""
    path = local_path(dataset)
    require(path.is_dir(), "dataset", dataset, "is neither a file nor a folder")
    try:
        found = [p for p in path.rglob("*") if kind_of(p) and p.is_file()] if list(path.iterdir()) else []
    except OSError as error:
        raise InputError(f"dataset={dataset!r}: cannot be read: {error.strerror}") from error
    return {p.relative_to(path).as_posix(): p for p in found}


def is_empty(path):
    """Whether a file has no bytes, or is parquet without rows, such as Spark leaves beside others."""
    with contextlib.suppress(*DAMAGED):  # it is refused when it is opened
        return path.stat().st_size == 0 or kind_of(path) == "parquet" and pq.read_metadata(path).num_rows == 0


def find_files(dataset):
    """Returns ({name: path or HubFile}, {split: [names]}) of the data of a dataset, all of one kind.

    That is parquet, else the most frequent kind. Hidden files, and names such as README, are no data. Tables in the
    folder itself hide those in folders below it, and empty ones are left out."""
    if on_hub(dataset):
        files, splits = hub_files(dataset)
    elif (path := local_path(dataset)).is_file():
        files, splits = {path.name: path}, {"": [path.name]}
    else:
        files, splits = local_files(dataset), None
    if not splits:
        data = [name for name in sorted(files) if kind_of(name) and not NO_DATA.search(name)]
        kinds = collections.Counter(map(kind_of, data))
        kind = max(kinds, key=lambda kind: (kind == "parquet", kinds[kind]), default="")
        names = [name for name in data if kind_of(name) == kind]
        if not on_hub(dataset) and kind != "text":
            names = [name for name in names if "/" not in name] or names
            names = [name for name in names if not is_empty(files[name])] or names
        if len(names) < len(data):
            say_once(("kinds", dataset), f"data    {dataset}: {len(names)} {kind} files of {len(data)} files are read")
        splits = split_names(dataset, names, kind == "text")
    readable = all(kind_of(name) for names in splits.values() for name in names) and any(splits.values())
    rule = f"has no files that can be read ({', '.join(KINDS)}; .gz, .zst)"
    require(readable, "dataset", dataset, rule + "; try owner/name@refs/convert/parquet" * on_hub(dataset))
    return files, splits


def choose_splits(dataset, splits):
    """Returns (names of the files that train, names of those that validate, perhaps none)."""
    train = splits.get("train") or splits.get("")
    require(train, "dataset", dataset, f"has files for {', '.join(splits)}, and none for training")
    if splits.get("train") and splits.get(""):
        left = f"left out: {len(splits[''])} files that are of no split, as {splits[''][0]}"
        say_once(("left out", dataset), f"data    {left}")
    held_out = next((splits[word] for word in ("val", "dev", "test", "eval") if splits.get(word)), [])
    return [name for name in train if name not in held_out] or train, held_out


# %% Try it: what trains, what validates tags=["run"]
if IN_NOTEBOOK:
    for names in (
        ["data/train-00000.parquet", "data/validation-00000.parquet"], ["a.jsonl", "b.jsonl"],
        ["latest.csv", "test.csv", "train.csv"], ["Training Day.txt", "Heat.txt"],
    ):  # fmt: skip
        train, held_out = choose_splits("mine", split_names("mine", names, text=names[0].endswith(".txt")))
        print(f"{', '.join(names):60} train: {', '.join(train)}; validate: {', '.join(held_out) or 'see below'}")

# %% [markdown]
# ## Columns, parquet and Arrow
#
# The texts are the column `text`, or `text_column`. Where no column has that name, the only column of strings is taken.
# A reader is a generator of (row, text) from any row on, so that a row number says where a run goes on. A text that
# cannot be had is a `ValueError` in its place: `read_documents` raises it, or counts it where `skip_bad_rows` is set.


# %% Columns, parquet and Arrow
def choose_column(file, kinds, sizes, wanted):
    """Returns the column of the texts: `wanted`, or for 'text' the only column of strings.

    `kinds`: {column: type}; `sizes`: {column of strings: size}. Raises InputError that names the largest of these."""
    if wanted in sizes:
        return wanted
    if wanted == "text" and len(sizes) == 1 and "text" not in kinds:
        say_once(("column", *sizes), f"data    the texts are the column `{min(sizes)}`, the only one of strings")
        return min(sizes)
    found = [f"{name[:40]} ({kind})" for name, kind in kinds.items()] or ["none"]
    found = ", ".join(found[:20]) + ", …" * (len(found) > 20)
    hint = f"; the likeliest: text_column={max(sizes, key=sizes.get)!r}" if sizes else ""
    raise InputError(f"{file}: must have a `{wanted}` column of strings; its columns: {found}{hint}")


def parquet_column(path, file, wanted):
    """Returns choose_column of an open parquet file. The column's type in parquet counts, a string, not what Arrow
    makes of it: string_view, a pandas category, …"""
    names, columns, sizes = file.schema_arrow.names, range(len(file.schema)), {}
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    for i, column in zip(columns, map(file.schema.column, columns)):
        if column.path in names and column.logical_type.type == "STRING":
            sizes[column.path] = sum(group.column(i).total_uncompressed_size for group in groups)
    return choose_column(path, dict(zip(names, file.schema_arrow.types)), sizes, wanted)


def arrow_rows(shard, start):
    """Yields (row, text) of an Arrow file or stream, such as `datasets` saves."""
    with pa.memory_map(str(shard.files[0])) as source:
        try:
            file = pa.ipc.open_file(source)
            schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
            schema = batches.schema
        kinds, row = {name: str(kind) for name, kind in zip(schema.names, schema.types)}, 0
        strings = [
            name
            for name, kind in kinds.items()
            if re.fullmatch("(large_)?string(_view)?|dictionary<values=.*string.*", kind)
        ]
        first = [*itertools.islice(batches, 1)]
        sizes = {name: sum(batch.column(name).nbytes for batch in first) for name in strings}
        column = choose_column(shard.name, kinds, sizes, shard.column)
        for batch in itertools.chain(first, batches):
            for i in range(0, len(batch), 1000):
                texts = batch.column(column)[i : i + 1000]
                if row + len(texts) > start:
                    yield from enumerate(texts.to_pylist(), row)
                row += len(texts)


# %% [markdown]
# ## Text, JSON and CSV
#
# A text file is one document, or `document_separator` ends a document. JSON has an object a line, or one list. CSV has
# a header. Each of them may be `.gz` or `.zst`, and is read in blocks: memory does not grow with the file.


# %% Text files
def open_bytes(file):
    """Returns the bytes of a file, unpacked, as a buffered stream."""
    packing = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(str(file).lower())[1])
    raw = file.open("rb")
    return io.BufferedReader(pa.input_stream(raw, compression=packing) if packing else raw, 2**18)


def split_bytes(stream, separator):
    """Yields (what stands between two separators, bytes of the separator after it); without a separator, all."""
    held = bytearray()
    while block := stream.read(2**18 if separator else -1):
        searched = max(0, len(held) - len(separator) + 1)
        held += block
        if searched == 0 and separator not in held and (lines := separator.replace(b"\n", b"\r\n")) in held:
            separator = lines  # Windows ends lines so
        if separator and held.find(separator, searched) >= 0:
            *pieces, held = held.split(separator)
            yield from ((piece, len(separator)) for piece in pieces)
    if held or not separator:
        yield held, 0


def not_utf8(file, place, data):
    """Returns a ValueError about the byte at `place` of a file, the first of `data`."""
    words = f"byte {place:,} is {data[0]:#04x}, no UTF-8: binary, or to be converted (iconv -t UTF-8)"
    return ValueError(f"{file}: {words}")


def text_rows(shard, start):
    """Yields (row, text, or what is wrong with it) of text files: a file is a document, or a separator ends one."""
    row, separator = 0, shard.separator
    for written, meant in {"\\n": "\n", "\\r": "\r", "\\t": "\t"}.items():
        separator = separator.replace(written, meant)
    for file in shard.files:
        if not separator and row < start:
            row += 1
            continue
        with open_bytes(file) as stream:
            place = len(stream.read(3)) if stream.peek(3)[:3] == b"\xef\xbb\xbf" else 0
            for piece, gap in split_bytes(stream, separator.encode()):
                try:
                    yield row, piece.decode()
                except UnicodeDecodeError as error:
                    yield row, not_utf8(file, place + error.start, piece[error.start :])
                row, place = row + 1, place + len(piece) + gap


# %% JSON and CSV
def json_rows(lines):
    """Yields (where, object or exception) of JSON lines, or of one JSON list, which is held in memory."""
    numbered = enumerate(lines, 1)
    above, first = next(((n, line) for n, line in numbered if line.strip()), (1, ""))
    if first.lstrip().startswith("["):
        try:
            rows = json.loads("".join([first, *(line for _, line in numbered)]))
            yield from ((f"item {i:,}", row) for i, row in enumerate(rows, 1))
        except (ValueError, RecursionError) as error:
            yield f"line {above + getattr(error, 'lineno', 1) - 1:,}", error
        return
    for number, line in itertools.chain([(above, first)], numbered):
        if line.strip():
            try:
                yield f"line {number:,}", json.loads(line.strip())
            except (ValueError, RecursionError) as error:
                yield f"line {number:,}", error


def csv_rows(lines):
    """Yields (where, dict or exception) of CSV with a header, of commas, semicolons or tabs; a quoted field may hold
    lines, up to 16 MiB."""
    csv.field_size_limit(2**24)
    first = next(lines, "")
    delimiter, header = max(",;\t", key=first.count), None
    rows = csv.reader(itertools.chain([first], lines), strict=True, delimiter=delimiter)
    while True:
        try:
            fields = next(rows)
            header = header or fields
            if fields and len(fields) != len(header):
                raise csv.Error(f"{len(fields)} fields, and the header has {len(header)}")
            if fields and fields is not header:
                yield f"line {rows.line_num:,}", dict(zip(header, fields))
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {rows.line_num:,}", error


def text_of(row, column):
    """Returns the text of a row, or None. Raises ValueError if the row has none that is a string of Unicode."""
    if isinstance(row, Exception):
        raise ValueError(f"{row.msg}: column {row.colno}" if isinstance(row, json.JSONDecodeError) else row)
    if not isinstance(row, dict) or column not in row:
        raise ValueError(f"no object with `{column}`")
    if not isinstance(text := row[column], str | None):
        raise ValueError(f"`{column}` is of type {type(text).__name__}, no string")
    if text and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            what = f"byte {code - 0xDC00:#04x}, no UTF-8" if 0xDC80 <= code < 0xDD00 else "half of a surrogate pair"
            raise ValueError(f"character {error.start + 1:,} of `{column}` is {what}") from None
    return text


def table_column(file, rows, wanted):
    """Returns the column of the texts, by the first rows of a JSON or CSV file: `wanted` if it may hold strings."""
    values = collections.defaultdict(list)
    for name, value in (item for row in rows if isinstance(row, dict) for item in row.items()):
        values[name].extend([] if value is None else [value])
    kinds = {name: "/".join(sorted({type(value).__name__ for value in found})) for name, found in values.items()}
    if wanted in values and "str" in (kinds[wanted] or "str") or not values:
        return wanted
    for name, found in values.items() if kind_of(file) == "csv" else ():
        if all(re.fullmatch(r"[-+.\deE]*", value) for value in found):
            kinds[name] = "numbers"
    sizes = {name: sum(map(len, values[name])) for name, kind in kinds.items() if kind == "str"}
    return choose_column(file, kinds, sizes, wanted)


def table_rows(shard, start):
    """Yields (row, text, or what is wrong with it) of a JSON or CSV file."""
    with open_bytes(file := shard.files[0]) as stream:
        if (begin := stream.peek(2)[:2]) in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16
            yield 0, not_utf8(file, 0, begin)
            return
        lines = (line.decode(errors="surrogateescape") for line in stream)
        lines = itertools.chain([next(lines, "").removeprefix("\ufeff")], lines)
        rows, head, size = csv_rows(lines) if kind_of(file) == "csv" else json_rows(lines), [], 0
        while len(head) < 100 and size < 2**20 and (item := next(rows, None)):
            head.append(item)
            size += len(str(item[1]))
        column = table_column(file, [row for _, row in head], shard.column)
        for row, (where, found) in enumerate(itertools.chain(head, rows)):
            try:
                yield row, text_of(found, column)
            except ValueError as error:
                yield row, ValueError(f"{file}: {where}: {error}")


# %% Try it: a broken line tags=["run"]
if IN_NOTEBOOK:
    for where, row in json_rows(iter(['{"text": "one"}\n', '{"text": "two"\n', '{"text": 3}\n'])):
        try:
            print(f"{where}: {text_of(row, 'text')!r}")
        except ValueError as error:
            print(f"{where}: {error}")

# %% [markdown]
# ## Streams of the Hub
#
# Parquet and Arrow files of the Hub are downloaded whole. Of other files no more is downloaded than is read: blocks of
# 16 MiB are appended to a copy on disk. (`datasets` can stream, too. To go on after half of a file of 48 MB, it fetched
# the first half again: measured with datasets 5.2.)


# %% Streams of the Hub
class HubStream(io.RawIOBase):
    """Reads a HubFile from its copy on disk. Where the copy ends, the next 16 MiB are downloaded and appended: a file
    is downloaded as far as it is read, and no byte of it twice.

    The length of the copy is the whole state, so a killed process loses nothing. A complete copy must have the Hub's
    hash. Raises InputError if a download fails or the file is damaged."""

    def __init__(self, file):
        self.file, self.place = file, 0
        digest = hashlib.sha256(f"{file.repo_id} {file.name} {file.oid}".encode()).hexdigest()
        self.path = cache_dir() / "streams" / f"{digest[:16]}-{Path(file.name).name[-80:]}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.copy = self.path.open("ab+")
        except OSError as error:
            raise InputError(f"cannot keep {self.path}: {error.strerror}; make room, or set HOME") from error

    def readable(self):
        return True

    def tell(self):
        return self.place

    def readinto(self, buffer):
        if os.fstat(self.copy.fileno()).st_size <= self.place < self.file.size:
            self._append()
        self.copy.seek(self.place)
        count = self.copy.readinto(buffer)
        self.place += count
        return count

    def _append(self):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        repo_id, name, revision, size, oid = self.file
        url = hf_hub_url(repo_id, name, repo_type="dataset", revision=revision)
        fcntl.flock(self.copy, fcntl.LOCK_EX)  # other threads and processes read the same copy
        try:
            start = self.copy.seek(0, os.SEEK_END)
            if start > self.place:
                return
            stop = min(start + 2**24, size)

            def fetch(api):
                headers = build_hf_headers(token=api.token) | {"Range": f"bytes={start}-{stop - 1}"}
                hf_raise_for_status(answer := get_session().get(url, headers=headers, timeout=30))
                if len(answer.content) != stop - start:
                    raise ConnectionError(f"{len(answer.content)} of {stop - start} bytes arrived")
                return answer.content

            block = read_hub(f"read {name} of {repo_id}", fetch)
            try:
                self.copy.write(block)
                self.copy.flush()
            except OSError as error:
                raise InputError(f"cannot keep {self.path}: {error.strerror}; make room, or set HOME") from error
            git = hashlib.sha1(b"blob %d\0" % size)
            if stop == size and len(oid) == len(git.hexdigest()):
                git.update(self.path.read_bytes())
            if stop == size and oid not in ("", git.hexdigest()) and file_sha256(self.path) != oid:
                self.path.unlink()
                raise InputError(f"{name} of {repo_id}: the hash of what arrived is not the Hub's; start again")
        finally:
            fcntl.flock(self.copy, fcntl.LOCK_UN)

    def close(self):
        self.copy.close()
        super().close()


HubFile.open = lambda file, mode="rb": HubStream(file)  # as a Path has it


# %% [markdown]
# ## Shards
#
# A shard is a file, or all text files. The last shard validates, unless names say which. A single file is divided: the
# documents whose CRC-32 lies in the lowest 2% validate, so that a document stays in its part when others are added.


# %% Shards of your own data
READERS = {"parquet": parquet_rows, "arrow": arrow_rows, "text": text_rows, "json": table_rows, "csv": table_rows}


def list_own_shards(config):
    """Returns ([a function that returns a training Shard, ready to read, …], the same for validation). It takes the
    place of the function of this name in the cell Shards.

    What names, or the splits of the dataset, call validation, else dev or test, validates. Else it is the last shard. A
    single file and text files are divided: 2% of the documents validate, or one, by the hash of their text."""
    files, splits = find_files(config.dataset)
    train, held_out = choose_splits(config.dataset, splits)
    text, separator = kind_of(train[0]) == "text", config.document_separator
    require(text or not separator, "document_separator", separator, f"is for text files, and this is {train[0]}")

    def shard(names):
        name = str(files[names[0]]) if len(names) == 1 else f"{config.dataset}: {len(names):,} text files"
        found, reader = tuple(files[n] for n in names), READERS[kind_of(names[0])]
        return Shard(name, found, config.text_column, separator, config.skip_bad_rows, reader=reader)

    shards = [shard(train)] if text else [shard([name]) for name in train]
    if held_out:
        validation = shard(held_out if text else held_out[-1:])
    elif len(shards) > 1:
        validation = shards.pop()
    else:
        hashes = {zlib.crc32(document.encode()) for document in beginning(open_own_shard(shards[0]))}
        hint = "set document_separator='\\n\\n', or give more files" if text and not separator else "give more"
        none = f", without {separator!r} in it," if separator else ","
        rule = f"is one document{none} and some must validate; {hint}"
        require(len(hashes) > 1, "dataset", config.dataset, rule)
        limit = max(ALL[1] // 50, min(hashes) + 1)
        validation, shards = shards[0]._replace(part=(0, limit)), [shards[0]._replace(part=(limit, ALL[1]))]
    chosen = shards[: None if config.num_shards == -1 else config.num_shards]
    if len(chosen) < len(shards):
        dataset = config.dataset
        say_once(("shards", dataset), f"data    {dataset}: num_shards={len(chosen)} of {len(shards)} train")
    return [functools.partial(open_own_shard, shard) for shard in chosen], functools.partial(open_own_shard, validation)


def open_own_shard(shard):
    """Returns a Shard whose documents can be read: a parquet or Arrow file of the Hub is downloaded, other files of the
    Hub are streams. Raises InputError for a shard that is damaged or has no texts, as far as its beginning tells."""
    file = shard.files[0]
    if kind_of(file) == "parquet":
        shard, found = open_parquet(shard)
        return shard._replace(column=parquet_column(shard.name, found, shard.column))
    if isinstance(file, HubFile) and kind_of(file) == "arrow":
        shard = shard._replace(files=(hub_file(file.repo_id, file.name, file.revision),))
    next(read_documents(shard), None)
    return shard


class Probe:
    """A file that tells how many of its bytes have been read."""

    def __init__(self, file):
        self.file, self.raw = file, None

    def __str__(self):
        return str(self.file)

    def open(self, mode):
        self.raw = self.file.open(mode)
        return self.raw

    def seen(self):
        """Returns bytes, before they are unpacked."""
        return 0 if self.raw is None else size_of(self.file) if self.raw.closed else self.raw.tell()


def count_documents(shard, enough=2**24):
    """Returns (documents, bytes of text, share of the shard that was read, whether that is all of it), of any format.

    It stops when there is `enough` text in 100 documents. It takes the place of the function in the cell Shards."""
    documents = size = row = 0
    kind, total = kind_of(shard.files[0]), sum(map(size_of, shard.files))
    probes = shard.files if kind in ("parquet", "arrow") else tuple(map(Probe, shard.files))
    reading = read_documents(shard._replace(files=probes))  # its name keeps the file open
    for row, text in reading:  # noqa: B007
        documents, size = documents + 1, size + len(text.encode())
        if size > enough and documents >= 100:
            break
    else:
        return documents, size, 1.0, True
    if kind == "parquet":
        read = (row + 1) / pq.read_metadata(shard.files[0]).num_rows
    elif kind == "arrow":  # it holds the text as it is
        read = size / total * ALL[1] / (shard.part[1] - shard.part[0])
    else:
        read = sum(probe.seen() for probe in probes) / total
    return documents, size, min(max(read, 1e-9), 1.0), False


# %% [markdown]
# # Part II: machinery


# %% Config cellView="form"
# @title Config
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The options of data, as in 01 and 02. Raises InputError for a wrong value."""

    dataset: str = option("embedded", "'embedded', a file or folder, or a dataset of the Hub, owner/name")
    text_column: str = option("text", "the column of the texts")
    document_separator: str = option("", "what ends a document of a text file, such as '\\n\\n'; '' = the file is one")
    skip_bad_rows: bool = option(False, "leave broken rows out, and count them")
    num_shards: int = option(50, "train on at most so many shards; -1 = all", POSITIVE_OR_AUTO)

    def __post_init__(self):
        check_options(self)

    def replace(self, **changes):
        """Returns a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


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
# As a script: `python 08_data.py --dataset my.jsonl --text_column body`.

# %% Parameters tags=["parameters", "run"]
CHANGES = {}  # fields of Config, such as {"dataset": "reviews.csv", "text_column": "review"}

# %% Configure tags=["run"]
with one_line_errors():
    config = parse_args([] if IN_NOTEBOOK else sys.argv[1:], Config().replace(**CHANGES))

# %% [markdown]
# **What to look for.** Is the validation part what you want to be judged by? Do the documents begin where a document
# begins, and hold text and not markup?

# %% Look at it tags=["run"]
with one_line_errors():
    shards, validation = list_shards(config)
    describe_data(shards, validation)
    for what, shard in (("trains", shards[0]()), ("validates", validation())):
        documents = [text for _, text in itertools.islice(read_documents(shard), 1000)]
        lengths = sorted(map(len, documents))
        print(f"\n{what}: {shard.name}, column {shard.column}")
        print(f"of the first {len(documents):,} documents half have up to {lengths[len(lengths) // 2]:,} characters")
        for text in documents[:3]:
            print(f"  {text[:100]!r}" + " …" * (len(text) > 100))

# %% Train on it tags=["run"]
import shlex

given = [f"--{field.name} {shlex.quote(str(getattr(config, field.name)))}" for field in dataclasses.fields(config)
         if getattr(config, field.name) != field.default or field.name == "dataset"]  # fmt: skip
print(f"python 01_tokenizer.py {' '.join(given)}    # its tokenizer, beside GPT-2's and GPT-4's")
print(f"python 02_train.py {' '.join(given)}    # in its notebook: CHANGES = {CHANGES}")
