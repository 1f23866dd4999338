"""What 01_tokenizer has of its own: reading ahead, its checks, its comparison with other tokenizers."""

import threading
import types

import pytest
import tiktoken

from tests.helpers import EMBEDDED, documents, write_shard


def shards(folder):
    return [write_shard(folder / f"shard_{i:05d}.parquet", documents(i, 20)) for i in range(3)]


# ---- reading


def test_the_next_shard_is_fetched_while_one_is_read(nb01, tmp_path):
    """And one that cannot be had stops the training."""
    paths, asked = shards(tmp_path), [threading.Event() for _ in range(3)]
    fetchers = [lambda i=i: asked[i].set() or paths[i] for i in range(3)]
    fetched = nb01.fetch_ahead(fetchers)
    assert next(fetched) == paths[0]
    assert asked[1].wait(10) and not asked[2].is_set()
    assert list(fetched) == paths[1:]
    with pytest.raises(nb01.InputError, match="none.parquet: there is no such shard"):
        list(nb01.fetch_ahead([fetchers[0], lambda: tmp_path / "none.parquet"]))


def test_count_chars_is_the_length_of_the_text(nb01):
    """To 1%, from the footer alone: the progress bar ends where the text does."""
    for path in sorted(EMBEDDED.glob("*.parquet")):
        chars = sum(len(text) for _, text in nb01.read_documents(path))
        assert abs(nb01.count_chars(path) / chars - 1) < 0.01


# ---- the checks


def broken(tokenizer, **methods):
    """`tokenizer` with some methods replaced."""
    names = ("encode_ordinary", "decode", "decode_bytes", "_encode_bytes")
    return types.SimpleNamespace(**{name: getattr(tokenizer, name) for name in names} | methods)


def test_round_trip_counts(nb01, tokenizer):
    texts = ["naïve 日本語 🙂", "", "x"]
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    assert nb01.check_round_trip(tokenizer, texts) == (sum(len(text.encode()) for text in texts), tokens)


def test_a_lossy_tokenizer_is_caught(nb01, tokenizer):
    lossy = broken(tokenizer, decode=lambda tokens, errors: tokenizer.decode(tokens).replace("\r", ""))
    nb01.check_round_trip(lossy, ["a\n"])
    with pytest.raises(nb01.InputError, match=r"text 1 \('b\\r\\n'…\) is changed"):
        nb01.check_round_trip(lossy, ["a\n", "b\r\n"])
    deaf = broken(tokenizer, decode_bytes=lambda tokens: tokenizer.decode_bytes(tokens).replace(b"\xff\xfe", b"?"))
    with pytest.raises(nb01.InputError, match="bytes .* are changed"):
        nb01.check_bytes(deaf)
    assert nb01.check_bytes(tokenizer) == 2 * 256**2 + 2**20


def test_every_code_point_is_tried(nb01):
    seen = set().union(*map(set, nb01.unicode_planes()))
    assert seen == {chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000}


def test_bytes_per_token(nb01, tokenizer):
    bytewise = tiktoken.Encoding(
        "bytes", pat_str=nb01.SPLIT_PATTERN, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    rates = nb01.bytes_per_token({"ours": tokenizer, "bytes": bytewise}, {"one": ["the naïve"], "two": ["a", "the"]})
    assert rates["one"]["bytes"] == rates["two"]["bytes"] == 1
    assert rates["one"]["ours"] == 10 / len(tokenizer.encode_ordinary("the naïve"))
    assert rates["two"]["ours"] == 4 / 2


def test_the_table_says_who_wins(nb01, tokenizer, capsys):
    rates = {"ours": 3.0, "GPT-2": 2.0, "GPT-4": 4.0}
    nb01.show_compression({"code": rates}, dict.fromkeys(rates, tokenizer))
    head, row = capsys.readouterr().out.splitlines()
    assert head.split(",")[0] == "bytes per token           ours" and "GPT-4, 4,096" in head
    assert "3.000" in row and "2.000 ( +50.0%)" in row and "4.000 ( -25.0%)" in row


def test_the_first_merges_are_the_pairs_that_were_merged(nb01, tokenizer):
    """Redone by hand: merging the two tokens of the pair gives the token, and both are older."""
    ranks = tokenizer._mergeable_ranks
    for token, rank in ranks.items():
        if rank >= 256:
            a, b = nb01.pair_of(ranks, token)
            assert a + b == token and max(ranks[a], ranks[b]) < rank


def test_texts_to_compare_are_bounded(nb01):
    path = EMBEDDED / "shard_00004.parquet"
    documents = [text for _, text in nb01.read_documents(path)]
    texts = nb01.texts_to_compare(path, max_chars=len(documents[0]) + 1)
    assert texts["validation"] == documents[:2] and set(texts) == {"validation", "English", "code", "maths"}
    assert len(nb01.texts_to_compare(path)["validation"]) == len(documents)


def test_the_reference_needs_all_of_its_shards_or_a_hub(nb01, monkeypatch, capsys):
    import huggingface_hub

    def refused(*args, **kwargs):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refused)
    monkeypatch.setattr(nb01, "cached_shard", lambda *args: None)
    assert nb01.Config.for_network() == nb01.Config.demo() and "does not answer" in capsys.readouterr().out
    monkeypatch.setattr(nb01, "cached_shard", lambda repo, name: name)
    assert nb01.Config.for_network() == nb01.Config() and not capsys.readouterr().out
