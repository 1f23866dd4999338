"""01_tokenizer.py as a script: it trains, checks, compares, uploads, and says in a line what is wrong."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import EMBEDDED, documents, one_line, run_code, script, without_hub, write_shard
from tests.hub_server import HubServer

FILES = ("tokenizer.tiktoken", "tokenizer.json")
FINEWEB = "karpathy/fineweb-edu-100b-shuffle"
SECRET = "hf_planted_secret"


def test_without_network_it_rebuilds_the_embedded_tokenizer(tmp_path):
    """From another folder, with an empty home: every line that a person looks for is there."""
    done = script("01_tokenizer.py", cwd=tmp_path, env=without_hub(tmp_path))
    assert done.returncode == 0, done.stderr
    for line in (
        "this will be the demo", "4,096 tokens from 4 shards", "byte for byte the tokenizer beside the shards",
        "40 documents, 1,187,692 bytes, 291,015 tokens: all come back", "Unicode, all 17 planes", "arbitrary bytes",
        "no comparison with GPT-2", "no comparison with GPT-4", "bytes per token",
        "first merges:   ' ' + 't',  'h' + 'e'", "longest tokens: ' Representatives' (16)", "no upload: set hf_repo_id",
    ):  # fmt: skip
        assert line in done.stdout, (line, done.stdout)
    (made,) = (tmp_path / ".cache" / "tpuchat" / "tokenizers").iterdir()
    assert all((made / name).read_bytes() == (EMBEDDED / "tokenizer" / name).read_bytes() for name in FILES)
    run = tmp_path / "runs" / "tokenizer-demo"
    assert {path.name for path in run.iterdir()} == {"compression.png", "token_lengths.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.iterdir())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--vocab_size=264", ["vocab_size=264", "at least 265"]),
        ("--doc_chars=0", ["doc_chars=0", "positive"]),
        ("--vocab_sise=300", ["--vocab_sise", "did you mean 'vocab_size'?"]),
        ("--run_dir=/proc/nowhere", ["cannot write to /proc/nowhere", "run_dir"]),
        ("--vocab_size=4000000", ["vocab_size=4000000", "yields only", "give more text"]),
        ("--dataset=numbers", ["a.parquet", "holds int64, not strings"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, option, words):
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "numbers").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "numbers" / name)
    done = script("01_tokenizer.py", option, cwd=tmp_path, env=without_hub(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ") and one_line(last, *words), done.stderr
    assert not list(tmp_path.rglob("tokenizer.*"))


def test_from_the_hub_and_back(nb, tmp_path):
    """Two shards of FineWeb-Edu from a Hub on loopback, a tokenizer from them, uploaded to a repo that was not there;
    02_train in a new home, with the same repo, takes that one. The secret is in no output."""
    texts = [documents(i, 200) for i in range(3)]
    files = {
        f"/datasets/{FINEWEB}/resolve/main/shard_{i:05d}.parquet": write_shard(tmp_path / f"{i}", part).read_bytes()
        for i, part in zip((0, 1, 1822), texts)
    }
    with HubServer(files) as hub:
        one, two = (hub.environment(tmp_path / home) | {"HF_TOKEN": SECRET} for home in ("one", "two"))
        one |= {name: "http://127.0.0.1:9" for name in ("https_proxy", "http_proxy")} | {"NO_PROXY": "127.0.0.1"}
        options = dict(vocab_size=300, num_shards=2, hf_repo_id="me/mine")
        done = script("01_tokenizer.py", cwd=tmp_path, env=one, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 of 3 shards of karpathy/fineweb-edu-100b-shuffle" in done.stdout
        assert "300 tokens from 2 shards" in done.stdout and "uploaded to" in done.stdout
        code = f"""
config = nb.Config.demo().replace(dataset={FINEWEB!r}, num_shards=1, vocab_size=300, hf_repo_id="me/mine")
shards, _ = nb.list_shards(config)
nb.save_tokenizer(nb.find_tokenizer(config, shards[0]()), Path.home() / "found")
"""
        _, printed = run_code(code, two)
        assert not any("training" in line for line in printed)
    (made,) = (tmp_path / "one" / ".cache" / "tpuchat" / "tokenizers").iterdir()
    assert all((made / name).read_bytes() == (tmp_path / "two" / "found" / name).read_bytes() for name in FILES)
    ranks = nb.train_tokenizer(texts[0] + texts[1], 300)._mergeable_ranks  # and not the shard that validates
    assert nb.load_tokenizer(made)._mergeable_ranks == ranks
    assert SECRET not in done.stdout + done.stderr + str(printed)
