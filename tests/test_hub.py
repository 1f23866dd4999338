"""Whatever the Hugging Face Hub does, a run gets the right bytes, or one line that says what is wrong.

The real client, in processes of its own, asks tests.hub_server on the loopback interface.
"""

import hashlib
import io
import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import ALWAYS, Fault, HubServer

SECONDS = 120  # a hang is a failure: nothing here takes a minute
FILES = ("tokenizer.tiktoken", "tokenizer.json")
FINEWEB, CLIMBMIX = "karpathy/fineweb-edu-100b-shuffle", "karpathy/climbmix-400b-shuffle"
MB = 1 << 20

PROLOGUE = """
import hashlib, json, os, sys, threading, time
from pathlib import Path
from tools.notebooks import load

nb, answers = load(sys.argv[1]), {}
config = nb.Config.demo().replace(dataset="karpathy/fineweb-edu-100b-shuffle", num_shards=1, vocab_size=300)
(first, *_), validation = nb.list_shards(config)

def message(call):
    try:
        return f"no error, but {call()}"
    except nb.InputError as error:
        return str(error)
    except BaseException as error:
        return f"not an InputError, but {error!r}"

def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def wrong_files():
    "Files of the cache that are whole by their name, and are not."
    blobs = Path(os.environ["HF_HOME"]).glob("hub/*/blobs/*")
    return [str(path) for path in blobs if len(path.name) == 64 and path.name != sha(path)]
"""


def start(root, env, code):
    """A process that runs `code`, and prints what it puts into `answers`."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{PROLOGUE}\n{code}\nprint(json.dumps(answers))", str(root / "02_train.py")],
        cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    """(what `code` put into `answers`, the lines that it printed before)."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    *printed, answers = output.splitlines()
    return json.loads(answers), printed


def in_a_process_of_its_own(root, env, code):
    return finish(start(root, env, code))


def until(happened, process=None):
    """Waits for happened(), and not for ever; nor for a process that has ended."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.01)


def closed_port():
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def documents(seed, count=1, words=2000):
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefgh", k=rng.randint(1, 5)))  # noqa: E731
    return [" ".join(word() for _ in range(words)) for _ in range(count)]


def parquet(texts, **options):
    """The bytes of a shard."""
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, **options)
    return file.getvalue()


def large(seed, size):
    """A shard of more than `size` bytes: of one long text, and not compressed."""
    return parquet([random.Random(seed).randbytes(size // 2 + 1).hex()], compression="none")


def url(repo_id, filename="shard_00000.parquet"):
    return f"/datasets/{repo_id}/resolve/main/{filename}"


def said(message, *words):
    """Whether a message is one line, with these words."""
    assert "\n" not in message and all(word in message for word in words), message
    return True


@pytest.fixture(scope="module")
def folder(root):
    """The embedded tokenizer."""
    return root / "data" / "embedded" / "tokenizer"


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


@pytest.fixture
def hub(folder):
    """A Hub with the first and the last shard of FineWeb-Edu, and two repos of a user, one of them with a tokenizer."""
    files = {url(FINEWEB, f"shard_{i:05d}.parquet"): parquet(documents(i)) for i in (0, 1822)}
    files |= {f"/me/mine/resolve/main/tokenizer/{name}": (folder / name).read_bytes() for name in FILES}
    files["/me/other/resolve/main/README.md"] = b"no tokenizer here"
    with HubServer(files) as server:
        yield server


# ---- what goes wrong with one shard


class Case(NamedTuple):
    faults: list = []
    words: list = []  # of the message; none if the right bytes come
    repo: str = ""
    data: bytes | None = parquet(documents(7))


GOOD, PAGE = Case().data, b"<html>Please log in to the Wi-Fi.</html>"
LARGE, CUT = large(8, 24 * MB), 21 * MB
WRONG = Fault(body=GOOD[:100] + bytes(100) + GOOD[200:])
ALL = dict(times=ALWAYS)
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
SUGGESTION = f"did you mean {FINEWEB!r}"

CASES = {
    "well": Case(),
    "404": Case(data=None, words=["no such file (404)"]),
    "no such repo": Case(data=None, repo="karpathy/fineweb-edu-100b-shufle", words=["(401)", SUGGESTION]),
    "no such repo for an account": Case(
        [Fault("HEAD", 404, "RepoNotFound", **ALL)], ["(404)", SUGGESTION], repo="karpathy/finewebedu-100b-shuffle"
    ),
    "401": Case([Fault("HEAD", 401, **ALL)], ["private (401)", "HF_TOKEN"]),
    "bad token": Case([Fault("HEAD", 401, headers=BAD_TOKEN, **ALL)], ["(401)", "HF_TOKEN"], repo=FINEWEB),
    "403": Case([Fault("HEAD", 403, **ALL)], ["refused (403)", "HF_TOKEN"]),
    "403 on GET": Case([Fault(status=403, **ALL)], ["refused (403)", "HF_TOKEN"]),
    "gated": Case([Fault("HEAD", 403, "GatedRepo", **ALL)], ["refused (403)", "terms", "HF_TOKEN"]),
    "gated without a token": Case([Fault("HEAD", 401, "GatedRepo", **ALL)], ["refused (401)", "terms", "HF_TOKEN"]),
    "429 on HEAD": Case([Fault("HEAD", 429, headers={"Retry-After": "1"})]),
    "429 on GET": Case([Fault(status=429, headers={"Retry-After": "1"})]),
    "429 for ever": Case([Fault("HEAD", 429, headers={"Retry-After": "1"}, **ALL)], ["(429)", "HF_TOKEN"]),
    "500 on HEAD": Case([Fault("HEAD", 500)]),
    "500 on GET, twice": Case([Fault(status=500, times=2)]),
    "500 on HEAD for ever": Case([Fault("HEAD", 500, **ALL)], ["in trouble (500)", "try again later"]),
    "500 on GET for ever": Case([Fault(status=500, **ALL)], ["in trouble (500)", "try again later"]),
    "cut": Case([Fault(cut=CUT)], data=LARGE),
    "cut early": Case([Fault(cut=0), Fault(cut=1000)]),
    "cut for ever": Case([Fault(cut=1000, **ALL)], ["broken", "network"]),
    "stalled": Case([Fault(cut=1000, wait=threading.Event())]),
    "shorter than the Hub says": Case([Fault(body=GOOD[:-9])]),
    "shorter than the Hub says, for ever": Case([Fault(body=GOOD[:-9], **ALL)], ["size", f"{len(GOOD)}"]),
    "wrong bytes": Case([WRONG]),
    "wrong bytes for ever": Case([WRONG._replace(**ALL)], ["SHA-256"]),
    "not parquet": Case(data=PAGE, words=["not a whole parquet file"]),
    "numbers": Case(data=parquet([1, 2]), words=["`text` column holds int64"]),
}


def case_repo(name):
    return CASES[name].repo or f"case/{name.replace(' ', '-').replace(',', '')}"


@pytest.fixture(scope="module", autouse=True)
def background(root, tmp_path_factory):
    """Two processes that wait for most of their time, while other tests run: one that meets each of CASES in a thread,
    and one without a network. {name: process}, and the Hub of the first."""
    files, faults = {"/datasets/case/404/resolve/main/README.md": b"no shard here"}, {}
    for name, case in CASES.items():
        path = url(case_repo(name))
        faults[path] = case.faults
        if case.data is not None:
            files[path] = case.data
    code = f"repos = { ({name: case_repo(name) for name in CASES})!r}"
    code += """
threads = []

def meet(case, repo):
    started, answer = time.monotonic(), {}
    def get():
        path = nb.hub_shard(repo, "shard_00000.parquet")
        answer["sha"] = sha(path)
        return nb.check_shard(path)
    answer["said"] = message(get)
    answers[case] = answer | {"seconds": time.monotonic() - started}

for case, repo in repos.items():
    threads.append(threading.Thread(target=meet, args=(case, repo)))
    threads[-1].start()
for thread in threads:
    thread.join()
answers["wrong files"] = wrong_files()
"""
    alone = """
started = time.monotonic()
answers["said"] = message(first)
answers["seconds"] = time.monotonic() - started
"""
    with HubServer(files, faults) as hub:
        env = hub.environment(tmp_path_factory.mktemp("cases"))
        cases = start(root, env | {"HF_HUB_DOWNLOAD_TIMEOUT": "5"}, code)
        env = hub.environment(tmp_path_factory.mktemp("alone")) | {"HF_ENDPOINT": closed_port()}
        processes = {"cases": cases, "alone": start(root, env, alone)}
        yield processes | {"hub": hub}
        for process in processes.values():
            process.kill()
            process.communicate()


# ---- downloads


def test_hub_shards(root, hub, tmp_path):
    """What is asked for is downloaded, and once; a tokenizer is trained on the first shard, and once; what is not there
    is an error that names it."""
    code = """
answers["names"] = [nb.check_shard(fetch()).name for fetch in (first, validation, first)]
answers["sizes"] = [nb.find_tokenizer(config, first()).n_vocab for _ in range(2)]
(_, second), _ = nb.list_shards(config.replace(num_shards=2))
answers["missing shard"] = message(second)
answers["no such repo"] = message(lambda: nb.hub_download("me/none", "shard_00000.parquet"))
answers["no repo name"] = message(lambda: nb.hub_download("not a repo", "shard_00000.parquet"))
"""
    answers, printed = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert answers["names"] == ["shard_00000.parquet", "shard_01822.parquet", "shard_00000.parquet"]
    got = [path.split("/")[-1] for method, path in hub.requests if method == "GET" and path in hub.files]
    assert got == answers["names"][:2]
    assert answers["sizes"] == [300, 300]
    training = [line for line in printed if "training" in line]
    assert training == ["training a tokenizer of 300 tokens on shard_00000.parquet"]
    for case, words in {
        "missing shard": ["shard_00001.parquet", FINEWEB, "404"],
        "no such repo": ["shard_00000.parquet", "me/none"],
        "no repo name": ["shard_00000.parquet", "not a repo"],
    }.items():
        assert answers[case].startswith("cannot get") and said(answers[case], *words)


@pytest.mark.parametrize("how", ["the Hub is there", "no network", "HF_HUB_OFFLINE"])
def test_what_was_downloaded_serves_without_the_hub(root, hub, tmp_path, how):
    """At once, and nothing is asked; what was not is an error that says so."""
    env = hub.environment(tmp_path)
    in_a_process_of_its_own(root, env, "first(), validation()")
    seen = len(hub.requests)
    offline = how == "HF_HUB_OFFLINE"
    code = """
started = time.monotonic()
shards, last = nb.list_shards(config)
nb.announce_downloads(config, [*shards, last])
answers["there"] = [sha(shards[0]()), sha(last())]
answers["seconds"] = time.monotonic() - started
"""
    if offline:  # without a network the client would wait
        code += """
(_, second), _ = nb.list_shards(config.replace(num_shards=2))
nb.announce_downloads(config, [second])
answers["not there"] = message(second)
"""
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": closed_port()} if how == "no network" else {}
    answers, printed = in_a_process_of_its_own(root, env, code)
    assert answers["there"] == [
        hashlib.sha256(hub.files[url(FINEWEB, f"shard_0{i}.parquet")]).hexdigest() for i in ("0000", "1822")
    ]
    asked = [path for _, path in hub.requests[seen:] if path.startswith("/datasets/")]
    assert answers["seconds"] < 10 and not asked and not printed
    assert not offline or said(answers["not there"], "cannot get shard_00001.parquet", "HF_HUB_OFFLINE", "unset")


def test_downloads_are_announced(root, hub, tmp_path):
    """How many and how large, before they begin; nothing when all are there."""
    data = hub.files[url(FINEWEB)] = large(1, 2 * MB)
    code = """
shards, last = nb.list_shards(config)
nb.announce_downloads(config, [*shards, last])
first()
print("--- one is there")
nb.announce_downloads(config, [*shards, last])
validation()
print("--- all are there")
nb.announce_downloads(config, [*shards, last])
"""
    _, printed = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    both, one, nothing = "\n".join(printed).split("---")
    assert nothing == " all are there"
    assert both.count("shards of") == one.count("shards of") == 1
    assert f"2 of 2 shards of {FINEWEB} are not here, {len(data) / 1e6:.0f} MB each" in both
    assert f"1 of 2 shards of {FINEWEB} are not here" in one and str(tmp_path / "hf") in both


def test_a_file_damaged_in_the_cache_is_fetched_anew(root, hub, tmp_path):
    """Whether bytes have changed, or the end is missing, as after a power cut."""
    code = """
for damage in (lambda data: b"\\0" * 99 + data[99:], lambda data: data[:-99], lambda data: b""):
    blob = first().resolve()
    blob.write_bytes(damage(blob.read_bytes()))
    answers.setdefault("wrong", []).append(len(wrong_files()))
    answers.setdefault("sha", []).append(sha(first()))
answers["left"] = wrong_files()
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert answers["wrong"] == [1, 1, 1] and answers["left"] == []
    assert answers["sha"] == [hashlib.sha256(hub.files[url(FINEWEB)]).hexdigest()] * 3


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_shard(root, hub, tmp_path):
    data = hub.files[url(FINEWEB)] = large(2, 13 * MB)
    hub.faults[url(FINEWEB)] = [Fault(cut=12 * MB, wait=threading.Event())]
    process = start(root, hub.environment(tmp_path), "first()")
    blobs = tmp_path / "hf" / "hub" / f"datasets--{FINEWEB.replace('/', '--')}" / "blobs"
    until(lambda: any(path.stat().st_size for path in blobs.glob("*")), process)  # some of it is on the disk
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code = """
answers["there"] = str(nb.cached_shard(*first.args))
answers["sha"] = sha(first())
answers["left"] = wrong_files()
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert answers == {"there": "None", "sha": hashlib.sha256(data).hexdigest(), "left": []}


@pytest.mark.parametrize("how", ["a small file system", "a limit on file sizes"])
def test_a_full_disk(root, hub, tmp_path, how):
    """One line; and when there is room, the same call goes well."""
    data = hub.files[url(FINEWEB)] = large(3, 3 * MB)
    env, small = hub.environment(tmp_path), tmp_path / "small"
    full, room = "", ""
    if how == "a small file system":
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        env |= {"HF_HOME": str(small)}
        room = f"os.system('mount -o remount,size=9m {small}')"
    else:
        full = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        full += "before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        full += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))"
        room = "resource.setrlimit(resource.RLIMIT_FSIZE, before)"
    code = f"""
{full}
answers["said"] = message(first)
answers["left"] = wrong_files()
{room}
answers["sha"] = sha(first())
"""
    try:
        answers, _ = in_a_process_of_its_own(root, env, code)
    finally:
        if small.exists():
            subprocess.run(["umount", small], check=True)
    assert said(answers["said"], "cannot get shard_00000.parquet", "disk is full", "HF_HOME")
    assert answers["left"] == [] and answers["sha"] == hashlib.sha256(data).hexdigest()
    assert hub.requests.count(("GET", url(FINEWEB))) == 2  # a full disk is no reason to try again


@pytest.mark.parametrize("how", ["no symbolic links", "no folder"])
def test_where_the_cache_lies(root, hub, tmp_path, how):
    """Hashes count where a file system has no symbolic links, too; HF_HOME in a place that cannot be is named."""
    env = hub.environment(tmp_path)
    env |= {"HF_HUB_DISABLE_SYMLINKS": "1"} if how == "no symbolic links" else {"HF_HOME": "/dev/null/hf"}
    data = hub.files[url(FINEWEB)]
    hub.faults[url(FINEWEB)] = [Fault(body=data[:100] + bytes(100) + data[200:])]
    answers, _ = in_a_process_of_its_own(root, env, "answers['said'] = message(lambda: sha(first()))")
    if how == "no folder":
        assert said(answers["said"], "cannot get shard_00000.parquet", "HF_HOME")
    else:
        assert answers["said"] == f"no error, but {hashlib.sha256(data).hexdigest()}"


def test_a_token_is_told_to_nobody(root, hub, tmp_path):
    """Pasted with the end of its line, as into a secrets panel, it works; and no message has it."""
    code = """
for name, token in {"line": "hf_secret\\n", "lines": "hf_\\nsecret"}.items():
    os.environ["HF_TOKEN"] = token
    answers[name] = message(lambda: nb.hub_download(*first.args).name)
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert answers["line"] == "no error, but shard_00000.parquet"
    assert "secret" not in answers["lines"] and said(answers["lines"], "HF_TOKEN")


# ---- datasets by name


def test_any_dataset_of_the_hub(root, hub, tmp_path):
    """By its name, or a folder of it; the last shard validates; the list is kept for when there is no network."""
    names = ["b/1.parquet", "b/0.parquet", "b/2.parquet", "a.parquet", "README.md", "b/deep/3.parquet", "c/x.csv"]
    hub.files |= {url("me/corpus", name): parquet(documents(name)) for name in names}
    hub.files |= {url("me/none", "README.md"): b"", url("me/one", "a.parquet"): parquet(["a"])}
    hub.repos |= {"/datasets/me/corpus", "/datasets/me/none", "/datasets/me/one"}
    hub.page_size = 2
    code = """
def names(dataset):
    train, last = nb.list_shards(config.replace(dataset=dataset, num_shards=-1))
    return [fetch.args[1] for fetch in (*train, last)]

for dataset in ("me/corpus", "me/corpus/b", "me/corpus/nowhere", "me/none", "me/one", "me/nothing"):
    answers[dataset] = message(lambda: names(dataset))
"""
    fetch = """
train, last = nb.list_shards(config.replace(dataset="me/corpus/b", num_shards=2))
answers["got"] = [sha(fetch()) for fetch in (*train, last)]
"""
    listing = "/api/datasets/me/corpus/tree/main"
    hub.faults[listing] = [Fault(status=500), Fault(cut=5)]
    hub.faults[listing + "/b"] = [Fault(status=429, headers={"Retry-After": "1"})]
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code + fetch)
    env = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": closed_port()}
    offline, _ = in_a_process_of_its_own(root, env, code + fetch)

    folder = ["b/0.parquet", "b/1.parquet", "b/2.parquet", "b/deep/3.parquet"]
    for there in (answers, offline):
        assert there["me/corpus"] == f"no error, but {['a.parquet', *folder]}"
        assert there["me/corpus/b"] == f"no error, but {folder}"
        want = [hub.files[url("me/corpus", folder[i])] for i in (0, 1, 3)]
        assert there["got"] == [hashlib.sha256(data).hexdigest() for data in want]
        assert said(there["me/none"], "'me/none'", "0 parquet shards")
        assert said(there["me/one"], "'me/one'", "1 parquet shards", "at least two")
    assert said(answers["me/corpus/nowhere"], "cannot get the list of shards", "me/corpus", "nowhere", "404")
    assert said(answers["me/nothing"], "cannot get the list of shards of me/nothing", "401", "check the name")
    for dataset, repo in {"me/corpus/nowhere": "me/corpus", "me/nothing": "me/nothing"}.items():
        assert said(offline[dataset], "cannot get the list of shards", repo, "HF_HUB_OFFLINE is set")


def test_a_list_that_cannot_be_kept_or_read(root, hub, tmp_path):
    """Neither a home that cannot be written nor a list that was cut short is in the way of a run that has a network."""
    hub.files |= {url("me/corpus", f"{i}.parquet"): parquet(documents(i)) for i in range(2)}
    code = """
ours, nb.cache_dir = nb.cache_dir, lambda: Path("/dev/null/cache")
corpus = config.replace(dataset="me/corpus")
answers["not kept"] = message(lambda: len(nb.list_shards(corpus)))
nb.cache_dir = ours
nb.list_shards(corpus)
(kept,) = (ours() / "listings").iterdir()
kept.write_text(kept.read_text()[:9])
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = True
answers["cut"] = message(lambda: nb.list_shards(corpus))
huggingface_hub.constants.HF_HUB_OFFLINE = False
answers["later"] = message(lambda: len(nb.list_shards(corpus)))
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert answers["later"] == answers["not kept"] == "no error, but 2"
    assert said(answers["cut"], "cannot get the list of shards of me/corpus")


# ---- tokenizers


def test_hub_tokenizer(root, hub, folder, tmp_path):
    """The user's Hub repo comes before training, and before what an earlier run had trained. A repo without a tokenizer
    is no obstacle; a repo that is not there is a mistake."""
    code = """
mine = config.replace(vocab_size=4096, hf_repo_id="me/mine")
nb.save_tokenizer(nb.find_tokenizer(mine, first()), nb.Path.home() / "found")
answers["small"] = message(lambda: nb.find_tokenizer(mine.replace(vocab_size=300), first()))
nb.find_tokenizer(config, first())
answers["after training"] = message(lambda: nb.find_tokenizer(mine.replace(vocab_size=300), first()))
answers["wrong name"] = message(lambda: nb.find_tokenizer(config.replace(hf_repo_id="me/none"), first()))
answers["other"] = nb.find_tokenizer(config.replace(hf_repo_id="me/other", vocab_size=310), first()).n_vocab
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert same_files(folder, tmp_path / "found")
    assert "vocab_size=300" in answers["small"] and "4096 tokens" in answers["small"]
    assert answers["after training"] == answers["small"]
    assert "cannot get" in answers["wrong name"] and "me/none" in answers["wrong name"]
    assert answers["other"] == 310


def test_an_uploaded_tokenizer_is_found(root, hub, folder, tmp_path):
    """Byte for byte, and so is the next one under the same name; the Hub may be gone afterwards."""
    shutil.copytree(folder, tmp_path / "one")
    code = """
from huggingface_hub import HfApi

nb.save_tokenizer(nb.train_tokenizer(["some other text " * 9], 270), Path.home() / "two")
for name in ("one", "two"):
    for _ in range(2):
        HfApi().create_repo("me/new", exist_ok=True)
    HfApi().upload_folder(repo_id="me/new", folder_path=Path.home() / name, path_in_repo="tokenizer")
    found = nb.find_tokenizer(config.replace(vocab_size=4096, hf_repo_id="me/new"), first())
    nb.save_tokenizer(found, Path.home() / "found" / name)
"""
    env = hub.environment(tmp_path)
    in_a_process_of_its_own(root, env, code)
    code = """
found = nb.find_tokenizer(config.replace(vocab_size=4096, hf_repo_id="me/new"), first())
nb.save_tokenizer(found, Path.home() / "found" / "offline")
"""
    in_a_process_of_its_own(root, env | {"HF_HUB_OFFLINE": "1"}, code)
    for name, want in {"one": "one", "two": "two", "offline": "two"}.items():
        assert same_files(tmp_path / want, tmp_path / "found" / name), name
    assert not same_files(tmp_path / "one", tmp_path / "two")


# ---- through the loop


def test_the_loader_over_a_failing_hub(root, hub, tmp_path):
    """A shard that fails ahead of its use and is there when needed stops nothing; one that is never there is the error
    of the next batch, after all tokens of the shard before."""
    texts = [documents(11, 60), documents(12, 3)]
    for repo in ("me/late", "me/never"):
        hub.files |= {url(repo, f"{i}.parquet"): parquet(text, row_group_size=5) for i, text in enumerate(texts)}
        hub.files[url(repo, "9.parquet")] = parquet(["validation"])
        hub.repos.add(f"/datasets/{repo}")
    late, never = url("me/late", "1.parquet"), url("me/never", "1.parquet")
    hub.faults[late] = [Fault("HEAD", 404, "EntryNotFound")]
    hub.faults[never] = [Fault("HEAD", 404, "EntryNotFound", times=ALWAYS)]
    code = """
import itertools
import numpy as np
import pyarrow.parquet as pq

tokenizer = nb.load_tokenizer("data/embedded/tokenizer")
config = config.replace(seq_len=64, device_batch_size=8, num_shards=-1)

def tokens_of(path):
    bos = tokenizer.encode_single_token("<|bos|>")
    texts = pq.read_table(path).column("text").to_pylist()
    return [token for text in texts for token in (bos, *tokenizer.encode_ordinary(text))]

def ahead():
    return [thread for thread in threading.enumerate() if thread.name == "background"]

for case in ("late", "never"):
    shards, _ = nb.list_shards(config.replace(dataset=f"me/{case}"))
    with nb.PrefetchDataLoader(config, tokenizer, shards, threads=1, depth=1) as loader:
        got, stream = [next(loader)], tokens_of(shards[0]())
        while ahead():
            time.sleep(0.01)
        answers[f"{case}, shard"] = loader.queue.full() and loader.position.shard
        whole = (len(stream) - 1) // 512
        got += itertools.islice(loader, whole - 1)
        answers[f"{case}, said"] = message(lambda: got.append(next(loader)))
        answers[f"{case}, again"] = message(lambda: got.append(next(loader)))
        if case == "late":
            stream += tokens_of(shards[1]()) + stream
    for i in (0, 1):
        flat = np.concatenate([np.asarray(batch[i]).ravel() for batch in got])
        answers[f"{case}, {i}"] = flat.tolist() == stream[i : i + len(flat)]
    answers[f"{case}, batches"] = len(got) - whole
"""
    answers, _ = in_a_process_of_its_own(root, hub.environment(tmp_path), code)
    assert all(answers[f"{case}, {i}"] for case in ("late", "never") for i in (0, 1))
    assert answers["late, shard"] == answers["never, shard"] == 0
    assert answers["late, said"].startswith("no error") and answers["late, batches"] == 2
    assert hub.requests.count(("GET", late)) == 1
    assert answers["never, batches"] == 0 and answers["never, again"] == answers["never, said"]
    assert said(answers["never, said"], "cannot get 1.parquet of me/never", "404")


def test_a_run_begins_before_the_validation_shard_is_there(root, hub, tmp_path):
    """And ends with what it measures on a folder of the same shards. One that fails at first and is there when needed
    stops nothing; one that never comes is the end."""
    shards = {"shard_00000.parquet": parquet(documents(21, 4)), "shard_01822.parquet": parquet(documents(22, 4))}
    (tmp_path / "shards").mkdir()
    for name, data in shards.items():
        hub.files[url(FINEWEB, name)] = data
        (tmp_path / "shards" / name).write_bytes(data)
    hub.files[url(CLIMBMIX)] = shards["shard_00000.parquet"]
    hub.repos.add(f"/datasets/{CLIMBMIX}")
    hub.files |= {url("me/late", name): data for name, data in shards.items()}
    hub.faults[url("me/late", "shard_01822.parquet")] = [Fault("HEAD", 404, "EntryNotFound")]
    arrives = threading.Event()
    hub.faults[url(FINEWEB, "shard_01822.parquet")] = [Fault(cut=1000, wait=arrives, times=ALWAYS)]
    code = f"""
config = config.replace(
    n_head=2, head_dim=32, aspect_ratio=64, seq_len=64, device_batch_size=4, num_iterations=6, log_interval=1,
    eval_interval=0, save_interval=0, sample_interval=0, profile_steps=0, final_eval_tokens=4096,
)
for name, dataset in {{"hub": config.dataset, "folder": str(Path.home() / "shards")}}.items():
    result = nb.train(config.replace(dataset=dataset, run_dir=str(Path.home() / name)))
    answers[name] = [result["step"], result["loss"], result["val_loss"], result["val_bpb"]]
for name, dataset in {{"never": {CLIMBMIX!r}, "late": "me/late"}}.items():
    again = config.replace(dataset=dataset, run_dir=str(Path.home() / name))
    answers[name] = message(lambda: nb.train(again)["val_loss"])
"""
    process = start(root, hub.environment(tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}, code)
    try:
        metrics = tmp_path / "hub" / "metrics.jsonl"
        until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), process)
        assert "val_loss" not in metrics.read_text() and not arrives.is_set()
    finally:
        arrives.set()
    answers, _ = finish(process)
    assert answers["hub"] == answers["folder"] and answers["hub"][0] == 6 and all(map(math.isfinite, answers["hub"]))
    assert said(answers["never"], "cannot get shard_06542.parquet of " + CLIMBMIX, "404")
    assert answers["late"] == f"no error, but {answers['hub'][2]}"


# ---- what the processes of the fixture have met meanwhile


@pytest.fixture(scope="module")
def met(background):
    """What became of each of CASES."""
    return finish(background["cases"])[0]


@pytest.mark.parametrize("name", CASES)
def test_the_right_bytes_or_one_clear_line(met, name):
    case, answer = CASES[name], met[name]
    if case.data is not None and "sha" in answer:
        assert answer["sha"] == hashlib.sha256(case.data).hexdigest()
    if not case.words:
        assert answer["said"].startswith("no error"), answer["said"]
    else:
        assert said(answer["said"], "shard_00000.parquet", *case.words)
        assert "sha" in answer or said(answer["said"], "cannot get", f"of {case_repo(name)} from")
        if case_repo(name) == FINEWEB:
            assert "did you mean" not in answer["said"]  # it is the right name
    assert answer["seconds"] < SECONDS


def test_no_wrong_file_is_left(met):
    assert met["wrong files"] == []


def test_a_cut_download_is_resumed(met, background):
    """From the last block that its client had written: what came before is not sent again."""
    first, second = [part[1:] for part in background["hub"].sent if part[0] == url(case_repo("cut"))]
    assert first == (0, CUT) and second == (20 * MB, len(LARGE))


def test_what_is_final_is_asked_for_once(met, background):
    """A Hub that refuses is not asked again and again; one in trouble is, some times."""

    def asked(name, method):
        return background["hub"].requests.count((method, url(case_repo(name))))

    assert [asked(name, "HEAD") for name in ("404", "401", "403", "gated", "no such repo")] == [1] * 5
    assert asked("403 on GET", "GET") == 1 and asked("not parquet", "GET") == 1
    assert asked("500 on GET, twice", "GET") == 3 and asked("wrong bytes", "GET") == 2
    assert 2 < asked("wrong bytes for ever", "GET") < 9


def test_no_network(background):
    """The client tries for some time; then it is one line."""
    answers, _ = finish(background["alone"])
    assert said(answers["said"], "cannot get shard_00000.parquet", "no connection", "dataset='embedded'")
    assert answers["seconds"] < 60
