"""01_tokenizer.py as a script: it trains, checks, compares, uploads, and says in a line what is wrong; its checks."""

import os
import subprocess
import sys
import threading
import types

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken

from tests.helpers import EMBEDDED, ROOT, documents, fetcher, one_line, script, shard, without_hub, write_shard
from tests.hub_server import HubServer

FILES = ("tokenizer.tiktoken", "tokenizer.json")
FINEWEB = "karpathy/fineweb-edu-100b-shuffle"
SECRET = "hf_planted_secret"


# ---- the whole notebook


def test_without_network_it_rebuilds_the_embedded_tokenizer(nb01, tmp_path):
    """As a script, from another folder, with an empty home: every line that a person looks for is there."""
    done = script("01_tokenizer.py", cwd=tmp_path, env=without_hub(tmp_path))
    assert done.returncode == 0, done.stderr
    for line in (
        "this will be the demo", "4,096 tokens from 4 shards", "byte for byte the tokenizer beside the shards",
        "40 documents, 1,187,692 bytes, 291,015 tokens: all come back", "Unicode, all 17 planes", "arbitrary bytes",
        "no comparison with GPT-2", "no comparison with GPT-4", "bytes per token",
        "first merges:   ' ' + 't',  'h' + 'e'", "longest tokens: ' Representatives' (16)",
        "no upload to the Hub: set hf_repo_id=owner/name and HF_TOKEN", "in ~/.cache/tpuchat/tokenizers/",
    ):  # fmt: skip
        assert line in done.stdout, (line, done.stdout)
    (made,) = (tmp_path / ".cache" / "tpuchat" / "tokenizers").iterdir()
    assert all((made / name).read_bytes() == (EMBEDDED / "tokenizer" / name).read_bytes() for name in FILES)
    assert not done.stderr and "first merges: 'he'" not in done.stdout  # no bar in a log, no try-it cell in a script
    (picture,) = (tmp_path / "runs" / "tokenizer-demo").iterdir()
    assert picture.name == "tokenizer.png" and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--vocab_size=264", ["vocab_size=264", "at least 265"]),
        ("--vocab_size=many", ["--vocab_size", "'many'", "int"]),
        ("--doc_chars=0", ["doc_chars=0", "positive"]),
        ("--vocab_sise=300", ["--vocab_sise", "did you mean 'vocab_size'?"]),
        ("--run_dir=/proc/nowhere", ["cannot write to /proc/nowhere", "run_dir"]),
        ("--vocab_size=4000000", ["vocab_size=4000000", "yields only", "give more text"]),
        ("--dataset=numbers", ["a.parquet", "text (int64)"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, option, words):
    (tmp_path / "numbers").mkdir()
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "numbers" / name)
    done = script("01_tokenizer.py", option, cwd=tmp_path, env=without_hub(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert one_line(done.stderr.strip(), "error: ", *words)
    assert not list(tmp_path.rglob("tokenizer.*"))


def test_a_user_without_a_home_folder(tmp_path):
    """As in a container whose /etc/passwd does not have the user: the cache is a folder of temporary files."""
    code = """
import pwd
pwd.getpwuid = {}.__getitem__
from tools.notebooks import load
for path in ("01_tokenizer.py", "02_train.py", "04_maxtext.py"):
    print(load(path).cache_dir())
"""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "JAX_COMPILATION_CACHE_DIR")}
    env |= {"TMPDIR": str(tmp_path)}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
    assert printed.split() == [str(tmp_path / f"home-{os.getuid()}" / ".cache" / "tpuchat")] * 3


def test_from_the_hub_and_back(nb, tmp_path):
    """A tokenizer of two shards of FineWeb-Edu from a Hub on loopback, uploaded to a repo that was not there: to where
    tests/unit/test_hub.py finds one. The secret is in no output."""
    texts = [documents(i, 200) for i in range(3)]
    files = {
        f"/datasets/{FINEWEB}/resolve/main/shard_{i:05d}.parquet": write_shard(tmp_path / f"{i}", part).read_bytes()
        for i, part in zip((0, 1, 1822), texts)
    }
    with HubServer(files) as hub:
        env = hub.environment(tmp_path) | {"HF_TOKEN": SECRET, "NO_PROXY": "127.0.0.1"}
        env |= {name: "http://127.0.0.1:9" for name in ("https_proxy", "http_proxy")}
        options = dict(vocab_size=300, num_shards=2, hf_repo_id="me/mine")
        done = script("01_tokenizer.py", cwd=tmp_path, env=env, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "in 2 training shards; validation: shard_01822.parquet" in done.stdout
        assert "300 tokens from 2 shards" in done.stdout and "uploaded to" in done.stdout
    (made,) = (tmp_path / ".cache" / "tpuchat" / "tokenizers").iterdir()
    assert all((made / name).read_bytes() == hub.files[f"/me/mine/resolve/main/tokenizer/{name}"] for name in FILES)
    ranks = nb.train_tokenizer(texts[0] + texts[1], 300)._mergeable_ranks  # and not the shard that validates
    assert nb.load_tokenizer(made)._mergeable_ranks == ranks
    assert SECRET not in done.stdout + done.stderr


# ---- reading


def test_the_next_shard_is_fetched_while_one_is_read(nb01, tmp_path):
    asked = [threading.Event() for _ in range(3)]

    def numbered(i):
        def fetch():
            asked[i].set()
            return i

        return fetch

    paths = nb01.fetch_ahead([numbered(i) for i in range(3)])
    assert next(paths) == 0 and asked[1].wait(10) and not asked[2].is_set()
    assert list(paths) == [1, 2]
    paths = nb01.fetch_ahead([numbered(0), fetcher(nb01, tmp_path / "none.parquet")])
    assert next(paths) == 0
    with pytest.raises(nb01.InputError, match="none.parquet"):
        next(paths)


def test_bpe_by_definition_learns_the_tokens_of_rustbpe(nb01):
    """On real text and over many ties: the cell that explains BPE explains the BPE that is used."""
    _, text = next(nb01.read_documents(shard(nb01, EMBEDDED / "shard_00000.parquet")))
    ranks = nb01.train_tokenizer([text[:10_000]], 256 + 200 + 9)._mergeable_ranks
    words = regex.findall(nb01.SPLIT_PATTERN, text[:10_000])
    assert "".join(words) == text[:10_000]
    assert nb01.bpe_by_definition(words, 200) == sorted(ranks, key=ranks.get)


# ---- the Hub


def test_the_reference_needs_all_of_its_shards_or_a_hub(nb01, monkeypatch, capsys):
    """A refusal is an answer of the Hub; so is an error that cannot pass: the download explains both."""
    error, here = ConnectionError("nobody there"), set()

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    found = lambda repo, name, repo_type: name if name in here else None  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    assert nb01.Config.for_network() == nb01.Config.demo() and "does not answer" in capsys.readouterr().out
    here |= {"shard_01822.parquet", *(f"shard_{i:05d}.parquet" for i in range(8))}
    assert nb01.Config.for_network() == nb01.Config() and not capsys.readouterr().out
    here.remove("shard_01822.parquet")
    assert nb01.Config.for_network() == nb01.Config.demo()
    error.response = types.SimpleNamespace(status_code=429)
    assert nb01.Config.for_network() == nb01.Config()
    error = ImportError("socksio")
    assert nb01.Config.for_network() == nb01.Config()


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_a_refused_upload_is_one_line(nb01, tmp_path, monkeypatch, method):
    """A token that may not write: it is asked once, and the line names the repo and the Hub's own reason."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        error = ConnectionError("403 Forbidden: this token may only read.\nRequest ID: 1")
        error.response = types.SimpleNamespace(status_code=403)
        raise error

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub.HfApi, method, refuse)
    with pytest.raises(nb01.InputError, match="me/mine.*: 403 Forbidden: this token may only read.; [^\n]+$") as raised:
        nb01.upload_tokenizer(nb01.open_repo("me/mine"), tmp_path, "me/mine")
    assert len(calls) == 1 and SECRET not in str(raised.value)


def test_without_a_repo_and_a_token_it_says_what_is_missing(nb01, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    both = "hf_repo_id=owner/name and HF_TOKEN"
    for repo_id, token, words in (("", "", both), ("me/mine", "", "HF_TOKEN"), ("", SECRET, "hf_repo_id=owner/name")):
        monkeypatch.setenv("HF_TOKEN", token)
        nb01.get_secret.cache_clear()
        assert nb01.open_repo(repo_id) is None and f"set {words} to" in capsys.readouterr().out


# ---- the checks


def broken(tokenizer, **methods):
    """`tokenizer` with some methods replaced."""
    names = ("encode_ordinary", "decode", "decode_bytes", "_encode_bytes")
    return types.SimpleNamespace(**{name: getattr(tokenizer, name) for name in names} | methods)


def test_a_lossy_tokenizer_is_caught(nb01, tokenizer):
    lossy = broken(tokenizer, decode=lambda tokens, errors: tokenizer.decode(tokens).replace("\r", ""))
    nb01.check_round_trip(lossy, ["a\n"])
    assert nb01.check_round_trip(tokenizer, ["naïve 日本語 🙂", "", "x"])[0] == 22
    with pytest.raises(nb01.InputError, match=r"text 1 \('b\\r\\n'…\) is changed"):
        nb01.check_round_trip(lossy, ["a\n", "b\r\n"])
    deaf = broken(tokenizer, decode_bytes=lambda tokens: tokenizer.decode_bytes(tokens).replace(b"\xff\xfe", b"?"))
    with pytest.raises(nb01.InputError, match="bytes .* are changed"):
        nb01.check_bytes(deaf)
    assert nb01.check_bytes(tokenizer) == 2 * 256**2 + 2**20


def test_the_table_of_bytes_per_token(nb01, tokenizer, capsys):
    bytewise = tiktoken.Encoding(
        "bytes", pat_str=nb01.SPLIT_PATTERN, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    tokenizers, texts = {"ours": tokenizer, "bytes": bytewise}, {"one": ["naïve"], "two": ["a", "the"]}
    rates = nb01.bytes_per_token(tokenizers, texts)
    assert rates["two"] == {"ours": 4 / 2, "bytes": 1} and rates["one"]["bytes"] == 1
    nb01.show_compression(rates, tokenizers)
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["bytes", "per", "token", "ours,", "4,096", "bytes,", "256"]
    assert row.split() == ["two", "2.000", "1.000", "(+100.0%)"]


def test_every_code_point_is_tried(nb01):
    seen = set().union(*map(set, nb01.unicode_planes()))
    assert seen == {chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000}


def test_the_first_merges_are_the_pairs_that_were_merged(nb01, tokenizer):
    """Redone by hand: merging the two tokens of the pair gives the token, and both are older."""
    ranks = tokenizer._mergeable_ranks
    for token, rank in ranks.items():
        if rank >= 256:
            a, b = nb01.pair_of(ranks, token)
            assert a + b == token and max(ranks[a], ranks[b]) < rank
