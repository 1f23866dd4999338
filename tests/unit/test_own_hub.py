"""Any data set of the Hub: configurations and splits by the real `datasets`, streamed files, and what is refused.

The real clients, in processes of their own, ask tests.hub_server on the loopback interface.
"""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import documents, one_line, run_code
from tests.hub_server import ALWAYS, Fault, HubServer

MB = 1 << 20
TEXTS = documents(9, 300)
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
LARGE = "".join(json.dumps({"text": f"{i} {'x' * 4000}"}) + "\n" for i in range(12_000)).encode()  # 48 MB


def url(repo, name):
    return f"/datasets/me/{repo}/resolve/main/{name}"


def parquet(texts):
    pq.write_table(pa.table({"text": texts}), file := io.BytesIO())
    return file.getvalue()


CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: "data/en-*"}
  - {split: validation, path: "held/en*"}
  - {split: test, path: tests/en.parquet}
- config_name: ru
  data_files: "ru/*.jsonl.gz"
---
# Two languages
"""
DEFAULT = b"""---
configs:
- {config_name: a, data_files: a.jsonl, default: true}
- {config_name: b, data_files: b.csv}
---
"""

SPLITS = b"""---
configs:
- config_name: default
  data_files:
  - {split: train_sft, path: data/train_sft*}
  - {split: test_sft, path: data/test_sft*}
  - {split: other, path: data/other*}
---
"""

FILES = {
    url("two", "README.md"): CARD,
    url("two", "data/en-1.parquet"): parquet(TEXTS[100:200]),
    url("two", "data/en-0.parquet"): parquet(TEXTS[:100]),
    url("two", "held/en.parquet"): parquet(TEXTS[200:250]),
    url("two", "tests/en.parquet"): parquet(TEXTS[250:]),
    url("two", "ru/a.jsonl.gz"): gzip.compress(LINES),
    url("default", "README.md"): DEFAULT,
    url("default", "a.jsonl"): LINES,
    url("default", "b.csv"): b"text\none\ntwo\n",
    url("plain", "README.md"): b"# no configurations",
    url("plain", "stories-train.txt"): b"<|eot|>".join(text.encode() for text in TEXTS[:200]),
    url("plain", "stories-valid.txt"): b"<|eot|>".join(text.encode() for text in TEXTS[200:]),
    url("made", "made.py"): b"raise SystemExit('this must not run')",
    url("made", "data.jsonl"): LINES,
    url("zip", "texts.zip"): b"PK",
    url("large", "large.jsonl"): LARGE,
    url("gated", "data.jsonl"): LINES,
    url("chat", "README.md"): SPLITS,
    url("chat", "data/train_sft.jsonl"): LINES,
    url("chat", "data/test_sft.jsonl"): b'{"text": "a test"}\n',
    url("chat", "data/other.jsonl"): b'{"text": "another"}\n',
    url("langs", "README.md"): SPLITS.replace(b"train_sft", b"en").replace(b"test_sft", b"de"),
    url("langs", "data/en.jsonl"): LINES,
    url("langs", "data/de.jsonl"): LINES,
    url("langs", "data/other.jsonl"): LINES,
    url("lost", "README.md"): b"---\nconfigs:\n- {data_files: none-*.jsonl}\n---\n",
    url("lost", "a.jsonl"): LINES,
    url("columns", "data.jsonl"): b'{"title": "a", "body": "longer"}\n{"title": "b", "body": "and longer"}\n',
}

READ = """
import gc

def read(dataset, **changes):
    "(texts that train, texts that validate, what names the first shard in a checkpoint)."
    config = nb.Config.demo().replace(dataset=dataset, **changes)
    train, validation = nb.list_shards(config)
    parts = [[text for fetch in part for _, text in nb.read_documents(fetch())] for part in (train, [validation])]
    return [*parts, nb.identity(train[0].args[0])]
"""


@pytest.fixture
def hub():
    with HubServer(FILES) as server:
        yield server


def asked(hub, home, code, **env):
    return run_code(READ + code, hub.environment(home) | env)


def test_configurations_and_splits(hub, tmp_path):
    """Those that the card declares, as the library `datasets` finds their files; else what names say."""
    code = """
answers["en"] = read("me/two:en")
answers["ru"] = read("me/two:ru")
answers["default"] = read("me/default")
answers["b"] = read("me/default:b")
answers["folder"] = read("me/two/ru")
answers["revision"] = read(f"me/two:ru@{'0' * 39}1")
answers["chat"] = read("me/chat")
answers["plain"] = read("me/plain", document_separator="<|eot|>")
"""
    answers, printed = asked(hub, tmp_path, code)
    assert answers["en"][:2] == [TEXTS[:200], TEXTS[200:250]]
    for name, first in {"ru": "ru/a.jsonl.gz", "default": "a.jsonl", "folder": "ru/a.jsonl.gz"}.items():
        train, validation, shard = answers[name]
        assert sorted(train + validation) == sorted(TEXTS) and validation and shard.startswith(f"{first} ")
    assert answers["revision"] == answers["ru"] and sorted(answers["b"][0] + answers["b"][1]) == ["one", "two"]
    assert answers["chat"][:2] == [TEXTS, ["a test"]]
    assert "data    left out: the splits other" in printed
    assert answers["plain"][:2] == [TEXTS[:200], TEXTS[200:]]


def test_what_is_refused(hub, tmp_path):
    """One line, before anything is downloaded; nothing is run."""
    hub.faults[url("gated", "data.jsonl")] = [Fault(status=403, code="GatedRepo", times=ALWAYS)]
    names = (
        "langs",
        "lost",
        "two/ru:en",
        "two",
        "two:fr",
        "plain:en",
        "made",
        "zip",
        "columns",
        "gated",
        "none",
        "two/ru/none",
    )
    code = f"for name in {names!r}: answers[name] = message(lambda: read('me/' + name))"
    answers, _ = asked(hub, tmp_path, code)
    words = {
        "langs": ["has the splits en, de, other, and none for training"],
        "lost": ["'me/lost': default cannot be found", "name a folder, or try me/lost@refs/convert/parquet"],
        "two/ru:en": ["name a folder or a configuration, not both"],
        "two": ["choose one of its configurations", "en, ru"],
        "two:fr": ["'me/two:fr'", "en, ru"],
        "plain:en": ["has no configurations", "owner/name/folder"],
        "made": ["made.py, which is not run", "me/made@refs/convert/parquet"],
        "zip": ["has no files that can be read", "@refs/convert/parquet"],
        "columns": ["data.jsonl: must have a `text` column", "title (str), body (str)", "text_column='body'"],
        "gated": ["accept its conditions at http", "/datasets/me/gated, and give", "HF_TOKEN (none is set)"],
        "none": ["cannot find the dataset me/none (no file or folder here has this name)", "401"],
        "two/ru/none": ["cannot list me/two", "404"],
    }  # fmt: skip
    for name in names:
        assert one_line(answers[name], *words[name]), name
    assert not [path for method, path in hub.requests if method == "GET" and path.endswith((".py", ".zip"))]


def test_a_file_is_streamed_as_far_as_it_is_read_and_never_twice(hub, tmp_path):
    """Not by two readers at once, not by the next process, not after a kill; and the whole file has the Hub's hash."""
    code = """
def rows(shard, count, start=0):
    return [row for row, _ in nb.itertools.islice(nb.read_documents(shard), start, start + count)]

(fetch,), validation = nb.list_shards(nb.Config.demo().replace(dataset="me/large"))
shards = [fetch()._replace(part=nb.ALL), validation()]
"""
    part = "answers['rows'] = rows(shards[0], 5000)"
    answers, _ = asked(hub, tmp_path, code + part)
    assert answers["rows"] == list(range(5000))
    sent = [(start, stop) for path, start, stop in hub.sent if path == url("large", "large.jsonl")]
    assert sent == [(0, 16 * MB), (16 * MB, 32 * MB)]  # 20 MB were read
    kill = """
import signal
rows(shards[0], 9000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(AssertionError):
        asked(hub, tmp_path, code + kill)
    all_of_it = """
found = [nb.in_background(lambda: rows(shard, 10**6)) for shard in shards * 2]
answers["counts"] = [len(future.result()) for future in found]
"""
    answers, _ = asked(hub, tmp_path, code + all_of_it)
    assert answers["counts"][0] == answers["counts"][2] == 12_000 and 100 < answers["counts"][1] < 400
    sent = [(start, stop) for path, start, stop in hub.sent if path == url("large", "large.jsonl")]
    assert sent == [(0, 16 * MB), (16 * MB, 32 * MB), (32 * MB, len(LARGE))]


def test_streams_that_fail(hub, tmp_path):
    """A server in trouble is asked again. What is damaged, too short, or has no room is named, and nothing is lost."""
    path = url("large", "large.jsonl")
    code = "answers['said'] = message(lambda: len(read('me/large')[0]))"
    late = Fault(status=429, headers={"Retry-After": "1"})
    hub.faults[path] = [Fault(status=500), Fault(cut=1000), late, Fault(body=LARGE[: 20 * MB])]
    answers, _ = asked(hub, tmp_path, code)
    assert one_line(answers["said"], "no error, but 11")
    damaged = LARGE[:-9] + b"damaged!\n"
    hub.faults[path] = [Fault(body=damaged, times=3)]
    answers, _ = asked(hub, tmp_path / "other", code)
    assert one_line(answers["said"], "large.jsonl of me/large: the hash of what arrived is not the Hub's; start again")
    assert not list((tmp_path / "other" / ".cache" / "tpuchat" / "streams").iterdir())
    (tmp_path / "third" / ".cache").mkdir(parents=True)
    (tmp_path / "third" / ".cache" / "tpuchat").write_text("a file in the place of the folder")
    answers, _ = asked(hub, tmp_path / "third", code)
    assert one_line(answers["said"], "cannot keep ", "Not a directory", "set HOME")


def test_the_tokenizer_of_a_configuration(hub, tmp_path):
    """01's rules are those of 02: one for each configuration, column and size."""
    code = """
def folder(dataset, **changes):
    return str(nb.tokenizer_folders(nb.Config.demo().replace(dataset=dataset, **changes))[-1])

answers["folders"] = [folder("me/two:en"), folder("me/two:ru"), folder("me/two:ru", text_column="x"), folder("me/two")]
"""
    answers, _ = asked(hub, tmp_path, code)
    assert len({*answers["folders"]}) == 4
