"""Whatever the Hugging Face Hub does, a run gets the right bytes, or one line that says what is wrong.

The real client, in processes of its own, asks tests.hub_server on the loopback interface.
"""

import hashlib
import importlib.util
import io
import math
import random
import socket
import threading
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import EMBEDDED, SECONDS, TINY, answers_of, one_line, run_code, script, started_code, until
from tests.hub_server import ALWAYS, Fault, HubServer

FILES = ("tokenizer.tiktoken", "tokenizer.json")
FINEWEB, CLIMBMIX = "karpathy/fineweb-edu-100b-shuffle", "karpathy/climbmix-400b-shuffle"
MB = 1 << 20

FIRST = f"""
config = nb.Config.demo().replace(dataset={FINEWEB!r}, num_shards=1, vocab_size=300)
(first, *_), validation = nb.list_shards(config)

def wrong_files():
    "Files of the cache that are whole by their name, and are not."
    blobs = Path(os.environ["HF_HOME"]).glob("hub/*/blobs/*")
    return [str(path) for path in blobs if len(path.name) == 64 and path.name != sha(path)]
"""


def asked(env, code):
    """What `code` has put into `answers`, with the first shard of FineWeb-Edu as `first`."""
    return run_code(FIRST + code, env)


def closed_port():
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def parquet(seed, count=1, size=8000):
    """The bytes of a shard of `count` seeded documents of so many characters, not compressed."""
    rng, file = random.Random(seed), io.BytesIO()
    texts = [rng.randbytes(size // 2).hex() for _ in range(count)]
    pq.write_table(pa.table({"text": texts}), file, compression="none", use_dictionary=False)
    return file.getvalue()


def digest(data):
    return hashlib.sha256(data).hexdigest()


def url(repo_id, filename="shard_00000.parquet"):
    return f"/datasets/{repo_id}/resolve/main/{filename}"


@pytest.fixture
def hub():
    """A Hub with the first and the last shard of FineWeb-Edu, and two repos of a user, one of them with a tokenizer."""
    files = {url(FINEWEB, f"shard_{i:05d}.parquet"): parquet(i) for i in (0, 1822)}
    files |= {f"/me/mine/resolve/main/tokenizer/{name}": (EMBEDDED / "tokenizer" / name).read_bytes() for name in FILES}
    files["/me/other/resolve/main/README.md"] = b"no tokenizer here"
    with HubServer(files) as server:
        yield server


# ---- what goes wrong with one shard


class Case(NamedTuple):
    faults: list = []
    words: list = []  # of the message; none if the right bytes come
    data: bytes | None = parquet(7)


GOOD, PAGE = Case().data, b"<html>Please log in to the Wi-Fi.</html>"
LARGE, CUT = parquet(8, size=24 * MB), 21 * MB
WRONG = Fault(body=GOOD[:100] + bytes(100) + GOOD[200:])
ALL = dict(times=ALWAYS)

CASES = {
    "well": Case(),
    "404": Case(data=None, words=["404", "check the name"]),
    "401": Case([Fault("HEAD", 401, "RepoNotFound", **ALL)], ["401"]),
    "gated": Case([Fault("HEAD", 403, "GatedRepo", **ALL)], ["403", "HF_TOKEN"]),
    "403 on GET": Case([Fault(status=403, **ALL)], ["403", "HF_TOKEN"]),
    "429 on HEAD": Case([Fault("HEAD", 429, headers={"Retry-After": "1"})]),
    "429 for ever": Case([Fault("HEAD", 429, headers={"Retry-After": "1"}, **ALL)], ["429"]),
    "500 on GET, twice": Case([Fault(status=500, times=2)]),
    "500 on HEAD for ever": Case([Fault("HEAD", 500, **ALL)], ["500", "check the network"]),
    "cut": Case([Fault(cut=CUT)], data=LARGE),
    "cut early": Case([Fault(cut=0), Fault(cut=1000)]),
    "cut for ever": Case([Fault(cut=1000, **ALL)], ["cannot download"]),
    "stalled": Case([Fault(cut=1000, wait=threading.Event())]),
    "shorter than the Hub says": Case([Fault(body=GOOD[:-9])]),
    "wrong bytes": Case([WRONG]),
    "wrong bytes for ever": Case([WRONG._replace(**ALL)], ["SHA-256"]),
    "not parquet": Case(data=PAGE, words=["cannot be read as parquet", "get it again"]),
}


def case_repo(name):
    return f"case/{name.replace(' ', '-').replace(',', '')}"


@pytest.fixture(scope="module", autouse=True)
def background(tmp_path_factory):
    """Two processes that wait for most of their time, while other tests run: one that meets each of CASES in a thread,
    and one without a network. {name: process}, and the Hub of the first."""
    files, faults = {"/datasets/case/404/resolve/main/README.md": b"no shard here"}, {}
    for name, case in CASES.items():
        path = url(case_repo(name))
        faults[path] = case.faults
        if case.data is not None:
            files[path] = case.data
    repos = {name: case_repo(name) for name in CASES}
    code = """
def meet(case, call):
    started, answer = time.monotonic(), {}
    answer["said"] = message(lambda: answer.update(sha=sha(call())))
    answers[case] = answer | {"seconds": time.monotonic() - started}

def meet_all(calls):
    threads = [threading.Thread(target=meet, args=call) for call in calls.items()]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    answers["wrong files"] = wrong_files()
"""
    every = f"meet_all({{n: lambda r=r: hub_shard(r, 'shard_00000.parquet') for n, r in {repos!r}.items()}})"
    with HubServer(files, faults) as hub:
        env = hub.environment(tmp_path_factory.mktemp("cases"))
        cases = started_code(FIRST + code + every, env | {"HF_HUB_DOWNLOAD_TIMEOUT": "5"})
        env = hub.environment(tmp_path_factory.mktemp("alone")) | {"HF_ENDPOINT": closed_port()}
        processes = {"cases": cases, "alone": started_code(FIRST + code + "meet_all({'alone': first})", env)}
        yield processes | {"hub": hub}
        for process in processes.values():
            process.kill()
            process.communicate()


# ---- downloads


def test_hub_shards(hub, tmp_path):
    """What is asked for is downloaded, once; a tokenizer is trained on the first shard, once; what is not there is an
    error that names it."""
    code = """
answers["names"] = [fetch().files[0].name for fetch in (first, validation, first)]
answers["sizes"] = [nb.find_tokenizer(config, first()).n_vocab for _ in range(2)]
(_, second), _ = nb.list_shards(config.replace(num_shards=2))
answers["missing shard"] = message(second)
answers["no such repo"] = message(lambda: nb.hub_download("me/none", "shard_00000.parquet"))
answers["no repo name"] = message(lambda: nb.hub_download("not a repo", "shard_00000.parquet"))
"""
    answers, printed = asked(hub.environment(tmp_path), code)
    assert answers["names"] == ["shard_00000.parquet", "shard_01822.parquet", "shard_00000.parquet"]
    got = [path.split("/")[-1] for method, path in hub.requests if method == "GET" and path in hub.files]
    assert got == answers["names"][:2] and answers["sizes"] == [300, 300]
    assert printed == ["training a tokenizer of 300 tokens on shard_00000.parquet"]
    for case, words in {
        "missing shard": ["shard_00001.parquet", FINEWEB, "404"],
        "no such repo": ["shard_00000.parquet", "me/none"],
        "no repo name": ["shard_00000.parquet", "not a repo"],
    }.items():
        assert one_line(answers[case], "the Hugging Face Hub: cannot download", "; check the name", *words)


@pytest.mark.parametrize("how", ["no network", "HF_HUB_OFFLINE"])
def test_what_was_downloaded_serves_without_the_hub(hub, tmp_path, how):
    """At once, and nothing is asked; what was not is an error that says so."""
    env = hub.environment(tmp_path)
    asked(env, "first(), validation()")
    seen = len(hub.requests)
    code = """
started = time.monotonic()
answers["there"] = [sha(first()), sha(validation())]
answers["seconds"] = time.monotonic() - started
if os.environ.get("HF_HUB_OFFLINE"):  # without a network the client would wait
    answers["not there"] = message(lambda: hub_shard("me/none", "a.parquet"))
"""
    env |= {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": closed_port()}
    answers, printed = asked(env, code)
    assert answers["there"] == [digest(hub.files[url(FINEWEB, f"shard_0{i}.parquet")]) for i in ("0000", "1822")]
    assert answers["seconds"] < 10 and len(hub.requests) == seen and not printed
    assert how == "no network" or one_line(answers["not there"], "cannot download a.parquet")


def test_a_full_disk(hub, tmp_path):
    """One line, after one attempt; and when there is room, the same call goes well."""
    code = """
import errno
from huggingface_hub import file_download

def on_a_full_disk(link, file, **options):
    file.write(b"the first of it")
    raise OSError(errno.ENOSPC, "No space left on device")

get, file_download.http_get = file_download.http_get, on_a_full_disk
answers["said"], answers["left"], file_download.http_get = message(first), wrong_files(), get
answers["sha"] = sha(first())
"""
    answers, _ = asked(hub.environment(tmp_path), code)
    words = "cannot download shard_00000.parquet", "No space left", "make room, or set HF_HOME"
    assert one_line(answers["said"], *words) and hub.requests.count(("HEAD", url(FINEWEB))) == 2
    assert answers["left"] == [] and answers["sha"] == digest(hub.files[url(FINEWEB)])


def test_secrets_are_read_in_the_main_thread_once(hub, tmp_path):
    """Colab's userdata.get waits for the browser: in a background thread, with the tab closed, without an end."""
    code = """
import types
asked = []

def get(name):
    asked.append([name, threading.current_thread() is threading.main_thread()])
    raise LookupError(name)

sys.modules |= {"google": types.ModuleType("google"), "google.colab": types.ModuleType("google.colab")}
sys.modules["google.colab"].userdata = types.SimpleNamespace(get=get)
nb.get_secret.cache_clear()
shards, validation = nb.list_shards(config)
answers["got"] = [nb.in_background(fetch).result().name for fetch in (*shards, validation)]
answers["asked"] = asked
"""
    answers, _ = asked(hub.environment(tmp_path), code)
    assert answers["got"] == ["shard_00000.parquet", "shard_01822.parquet"]
    assert answers["asked"] == [["WANDB_API_KEY", True], ["HF_TOKEN", True]]


@pytest.mark.parametrize("source", ["HF_TOKEN", "hf/token"])
def test_a_refused_token_is_named_and_left_out(hub, tmp_path, source):
    """Public data need none, be it of the environment or left by an old `hf auth login`. Private data do."""
    env = hub.environment(tmp_path)
    if source == "HF_TOKEN":
        env |= {"HF_TOKEN": hub.expired}
    else:
        (tmp_path / "hf").mkdir()
        (tmp_path / source).write_text(hub.expired)
    hub.files[url("me/private")] = parquet(1)
    hub.faults[url("me/private")] = [Fault("HEAD", 401, "RepoNotFound", **ALL)]
    code = """
answers["sha"] = [sha(first()), sha(validation())]
answers["private"] = message(lambda: hub_shard("me/private", "shard_00000.parquet"))
answers["upload"] = message(lambda: nb.ask_hub("upload", lambda: nb.hub_api().list_repo_files("me/mine")))
for token in ("hf_secret\\n", "hf_\\nsecret"):  # the end of a line was pasted with it
    os.environ["HF_TOKEN"] = token
    nb.get_secret.cache_clear()
    answers[token] = message(lambda: nb.hub_download(*first.args[0].files[0][:2]).name)
"""
    answers, printed = asked(env, code)
    assert answers["sha"] == [digest(hub.files[url(FINEWEB, f"shard_0{i}.parquet")]) for i in ("0000", "1822")]
    assert len(printed) == 1 and one_line(printed[0], "the Hub refuses the token of ", source)
    assert one_line(answers["private"], "401", "me/private", "the token is that of ", source)
    assert one_line(answers["upload"], "cannot upload", "401") and hub.expired not in str(answers) + str(printed)
    assert answers["hf_secret\n"] == "no error, but shard_00000.parquet"
    assert one_line(answers["hf_\nsecret"], "HF_TOKEN: holds a space") and "secret" not in answers["hf_\nsecret"]


def test_what_cannot_pass_is_not_tried_again(hub, tmp_path):
    """A SOCKS proxy without the package for it: at once, with a remedy; and 01 trains nothing else instead."""
    if importlib.util.find_spec("socksio"):
        pytest.skip("the package is there")
    env = hub.environment(tmp_path) | {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": ""}
    code = """
started = time.monotonic()
answers["said"], answers["seconds"] = message(first), time.monotonic() - started
"""
    answers, _ = asked(env, code)
    assert one_line(answers["said"], "SOCKS", "pip install 'httpx[socks]'", "unset ALL_PROXY")
    assert answers["seconds"] < 3
    done = script("01_tokenizer.py", cwd=tmp_path, env=env)
    assert done.returncode == 2 and one_line(done.stderr.strip(), "SOCKS") and "demo" not in done.stdout


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_damaged_in_the_cache_is_fetched_anew(hub, tmp_path, shared):
    """Whether bytes have changed, or the end is missing, as after a power cut; also in the store that repositories
    share since huggingface_hub 1.32: snapshot → blobs/SHA-256 → store. Xet's own protocol is left out."""
    if shared:
        pytest.importorskip("huggingface_hub.utils._shared_blobs")
        xet = {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": "/none"}
        hub.faults[url(FINEWEB)] = [Fault("HEAD", headers=xet, **ALL)]
    code = """
import urllib.request
from huggingface_hub import file_download

def xet_get(*, incomplete_path, **options):
    where = "/datasets/%s/resolve/main/%s" % first.args[0].files[0][:2]
    urllib.request.urlretrieve(os.environ["HF_ENDPOINT"] + where, incomplete_path)

file_download.xet_get, file_download.is_xet_available = xet_get, lambda: True
for damage in (lambda data: b"\\0" * 99 + data[99:], lambda data: data[:-99], lambda data: b""):
    file = first().files[0].resolve()
    file.chmod(0o600)
    file.write_bytes(damage(file.read_bytes()))
    answers.setdefault("sha", []).extend([sha(first()), sha(file)])
answers["file"] = file.name
"""
    answers, _ = asked(hub.environment(tmp_path) | {"HF_HUB_DISABLE_XET": str(int(not shared))}, code)
    sha = digest(hub.files[url(FINEWEB)])
    assert answers == {"sha": [sha] * 6, "file": "ab" * 32 if shared else sha}


def test_any_dataset_of_the_hub(hub, tmp_path):
    """By its name, or a folder of it; the last shard validates; a listing is asked for again when it fails."""
    names = ["b/1.parquet", "b/0.parquet", "b/2.parquet", "a.parquet", "README.md", "b/deep/3.parquet", "c/x.csv"]
    hub.files |= {url("me/corpus", name): parquet(name) for name in [*names, "b/.hidden.parquet", "_b/4.parquet"]}
    hub.files |= {url("me/two", f"{name}/{split}-0.parquet"): b"" for name in "xy" for split in ("train", "test")}
    hub.files |= {url("me/none", "README.md"): b"", url("me/one", "a.parquet"): parquet(0)}
    hub.repos |= {f"/datasets/me/{name}" for name in ("corpus", "none", "one", "two")}
    hub.page_size = 2
    code = """
def names(dataset):
    train, last = nb.list_shards(config.replace(dataset=dataset, num_shards=-1))
    return [fetch.args[0].name for fetch in (*train, last)]

for dataset in ("me/corpus", "me/corpus/b", "me/none", "me/one", "me/nothing", "me/two", "me/two/y"):
    answers[dataset] = message(lambda: names(dataset))
train, last = nb.list_shards(config.replace(dataset="me/corpus/b", num_shards=2))
answers["got"] = [sha(fetch()) for fetch in (*train, last)]
"""
    hub.faults["/api/datasets/me/corpus/tree/main"] = [Fault(status=500), Fault(cut=5)]
    answers, _ = asked(hub.environment(tmp_path), code)
    folder = ["b/0.parquet", "b/1.parquet", "b/2.parquet", "b/deep/3.parquet"]
    assert answers["me/corpus"] == f"no error, but {['a.parquet', *folder]}"
    assert answers["me/corpus/b"] == f"no error, but {folder}"
    assert answers["got"] == [digest(hub.files[url("me/corpus", folder[i])]) for i in (0, 1, 3)]
    assert one_line(answers["me/two"], "name one of them: me/two/x, me/two/y")
    assert answers["me/two/y"] == "no error, but ['y/train-0.parquet', 'y/test-0.parquet']"
    assert one_line(answers["me/none"], "'me/none'", "has no files that can be read", "@refs/convert/parquet")
    assert one_line(answers["me/one"], "dataset='me/one': is one document, and some must validate; give more")
    assert one_line(answers["me/nothing"], "cannot find the dataset me/nothing (no file or folder here", "401")


def test_hub_tokenizer(hub, tmp_path):
    """The user's Hub repo comes before training, and before what an earlier run had trained. A repo without a tokenizer
    is no obstacle; a repo that is not there is a mistake. What is uploaded anew under the name is found anew."""
    code = """
mine = config.replace(vocab_size=4096, hf_repo_id="me/mine")
nb.save_tokenizer(nb.find_tokenizer(mine, first()), Path.home() / "found")
nb.find_tokenizer(config, first())
answers["small"] = message(lambda: nb.find_tokenizer(mine.replace(vocab_size=300), first()))
answers["wrong name"] = message(lambda: nb.find_tokenizer(config.replace(hf_repo_id="me/none"), first()))
answers["other"] = nb.find_tokenizer(config.replace(hf_repo_id="me/other", vocab_size=310), first()).n_vocab
nb.save_tokenizer(nb.train_tokenizer(["some other text " * 9], 270), Path.home() / "new")
"""
    answers, _ = asked(hub.environment(tmp_path), code)
    wanted = {name: hub.files[f"/me/mine/resolve/main/tokenizer/{name}"] for name in FILES}
    assert {name: (tmp_path / "found" / name).read_bytes() for name in FILES} == wanted
    assert one_line(answers["small"], "vocab_size=300", "4096 tokens")
    assert one_line(answers["wrong name"], "cannot download", "me/none")
    assert answers["other"] == 310
    hub.files |= {f"/me/mine/resolve/main/tokenizer/{name}": (tmp_path / "new" / name).read_bytes() for name in FILES}
    hub.commits += 1
    code = "answers['n'] = nb.find_tokenizer(config.replace(hf_repo_id='me/mine'), first()).n_vocab"
    assert asked(hub.environment(tmp_path), code)[0]["n"] == 270


def test_a_run_begins_before_the_validation_shard_is_there(hub, tmp_path):
    """And ends with what it measures on a folder of the same shards. One that never comes is the end."""
    shards = {"shard_00000.parquet": parquet(21, 4), "shard_01822.parquet": parquet(22, 4)}
    (tmp_path / "shards").mkdir()
    for name, data in shards.items():
        hub.files[url(FINEWEB, name)] = data
        (tmp_path / "shards" / name).write_bytes(data)
    hub.files[url(CLIMBMIX)] = shards["shard_00000.parquet"]
    hub.repos.add(f"/datasets/{CLIMBMIX}")
    arrives = threading.Event()
    hub.faults[url(FINEWEB, "shard_01822.parquet")] = [Fault(cut=1000, wait=arrives, times=ALWAYS)]
    settings = TINY | dict(
        shuffle=0, num_iterations=6, eval_interval=0, save_interval=0, sample_interval=0, log_interval=1
    )
    code = f"""
config = config.replace(**{settings!r})
for name, dataset in {{"hub": config.dataset, "folder": str(Path.home() / "shards")}}.items():
    result = nb.train(config.replace(dataset=dataset, run_dir=str(Path.home() / name)))
    answers[name] = [result["step"], result["loss"], result["val_loss"], result["val_bpb"]]
never = config.replace(dataset={CLIMBMIX!r}, run_dir=str(Path.home() / "never"))
answers["never"] = message(lambda: nb.train(never))
"""
    process = started_code(FIRST + code, hub.environment(tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"})
    try:
        metrics = tmp_path / "hub" / "metrics.jsonl"
        until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), process)
        assert "val_loss" not in metrics.read_text() and not arrives.is_set()
    finally:
        arrives.set()
    answers, _ = answers_of(process)
    assert answers["hub"] == answers["folder"] and answers["hub"][0] == 6 and all(map(math.isfinite, answers["hub"]))
    assert one_line(answers["never"], "cannot download shard_06542.parquet of " + CLIMBMIX, "404")


# ---- what the processes of the fixture have met meanwhile


@pytest.fixture(scope="module")
def met(background):
    """What became of each of CASES."""
    return answers_of(background["cases"])[0]


@pytest.mark.parametrize("name", CASES)
def test_the_right_bytes_or_one_clear_line(met, name):
    case, answer = CASES[name], met[name]
    if case.data is not None and "sha" in answer:
        assert answer["sha"] == digest(case.data)
    if not case.words:
        assert answer["said"].startswith("no error"), answer["said"]
    else:
        where = ["cannot download", f"of {case_repo(name)}"] if name != "not parquet" else []
        assert one_line(answer["said"], "shard_00000.parquet", *where, *case.words)
    assert answer["seconds"] < SECONDS and met["wrong files"] == []


def test_what_is_asked_again(met, background):
    """A Hub that refuses is not asked again and again; one in trouble is, some times. A cut download goes on from the
    last block that its client had written: what came before is not sent again."""

    def asked(name, method):
        return background["hub"].requests.count((method, url(case_repo(name))))

    assert [asked(name, "HEAD") for name in ("404", "401", "gated")] == [1] * 3
    assert asked("403 on GET", "GET") == 1 and asked("not parquet", "GET") == 1
    assert asked("500 on GET, twice", "GET") == 3 and asked("wrong bytes", "GET") == 2
    assert 2 < asked("wrong bytes for ever", "GET") < 9
    first, second = [part[1:] for part in background["hub"].sent if part[0] == url(case_repo("cut"))]
    assert first == (0, CUT) and second == (20 * MB, len(LARGE))


def test_no_network(background):
    """The client tries for some time; then it is one line."""
    answer = answers_of(background["alone"])[0]["alone"]
    hint = "check the network, or use dataset='embedded'"
    assert one_line(answer["said"], "cannot download shard_00000.parquet", hint) and answer["seconds"] < 60
