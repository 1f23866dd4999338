"""Shards: which of them train and validate, refused by name when they are not whole, read from any row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import documents, one_line, write_shard


def folder_config(nb, folder, **changes):
    return nb.Config.demo().replace(**{"dataset": str(folder)} | changes)


@pytest.mark.parametrize("num_shards", [1, 4, -1])
def test_the_last_shard_validates_whatever_num_shards_is(nb, tmp_path, num_shards):
    names = [f"shard_{i:05d}.parquet" for i in (3, 0, 11, 2, 7)]
    for name in names:
        write_shard(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("not a shard")
    train, validation = nb.list_shards(folder_config(nb, tmp_path, num_shards=num_shards))
    assert [fetch().name for fetch in train] == sorted(names)[:4][: None if num_shards == -1 else num_shards]
    assert validation() == tmp_path / "shard_00011.parquet"


def test_hub_datasets_pin_their_last_shard(nb):
    """Listing downloads nothing."""
    for dataset, count in {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}.items():
        for num_shards in (1, -1):
            train, validation = nb.list_shards(nb.Config(dataset=dataset, num_shards=num_shards))
            assert len(train) == (count - 1 if num_shards == -1 else num_shards)
            assert train[0].args == (dataset, "shard_00000.parquet")
            assert validation.args == (dataset, f"shard_{count - 1:05d}.parquet")


def test_list_shards_refuses(nb, tmp_path):
    def message(**changes):
        with pytest.raises(nb.InputError) as error:
            nb.list_shards(folder_config(nb, tmp_path, **changes))
        return str(error.value)

    assert one_line(message(), "0 parquet shards", str(tmp_path))
    write_shard(tmp_path / "a.parquet", ["a"])
    assert one_line(message(), "1 parquet shards", "at least two")
    write_shard(tmp_path / "b.parquet", ["b"])
    assert len(nb.list_shards(folder_config(nb, tmp_path, num_shards=2))[0]) == 1  # at most so many
    for dataset in ("/no/such/folder", "corpus", "me/", ""):
        assert one_line(message(dataset=dataset), repr(dataset), "'embedded', a folder of parquet shards", "owner/name")


def damage_a_page(path):
    data = bytearray(write_shard(path, documents(5, 99), compression="zstd").read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(data)


GOOD = pa.array(["one", "two"])

# name: (what makes the shard, words of the message)
BAD_SHARDS = {
    "missing": (lambda path: None, ["cannot be read", "get it again"]),
    "not parquet": (lambda path: path.write_bytes(b"<html>404</html>"), ["cannot be read as parquet"]),
    "truncated": (lambda path: path.write_bytes(write_shard(path, GOOD).read_bytes()[:-20]), ["get it again"]),
    "damaged page": (damage_a_page, ["row group 0 is damaged", "get it again"]),  # its footer is whole
    "no text": (lambda path: pq.write_table(pa.table({"id": GOOD, "n": [1, 2]}), path), ["n (int64)"]),
    "bytes": (lambda path: pq.write_table(pa.table({"text": [b"a", b"b"]}), path), ["`text`", "binary"]),
    "no rows": (lambda path: write_shard(path, []), ["must have rows", "0 rows"]),
    "null": (lambda path: write_shard(path, ["x"] * 7 + [None]), ["row 7", "null or empty"]),  # of row group 1
    "empty among long": (lambda path: write_shard(path, ["x" * 10_000] * 6 + [""]), ["row 6", "null or empty"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_shard_is_refused_by_name(nb, tmp_path, make, words):
    """By check_shard where the footer tells; else by read_documents, at the row."""
    path = tmp_path / "shard_00007.parquet"
    make(path)
    with pytest.raises(nb.InputError) as error:
        list(nb.read_documents(nb.check_shard(path)))
    assert str(error.value).startswith(f"{path}: ") and one_line(str(error.value), *words)


@pytest.mark.parametrize("start", [0, 4, 5, 11, 12, 99])
def test_read_documents_from_a_row(nb, tmp_path, start):
    texts = documents(4, 12)
    path = write_shard(tmp_path / "a.parquet", texts)
    assert list(nb.read_documents(path, start)) == list(enumerate(texts))[start:]


def test_large_strings_and_other_columns(nb, tmp_path):
    """What other tools write: large_string, and nested columns to the left of the text."""
    texts = documents(4, 6)
    nested = pa.array([{"a": None, "b": ""}] * len(texts), pa.struct([("a", pa.int64()), ("b", pa.string())]))
    table = pa.table({"meta": nested, "text": pa.array(texts, pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [text for _, text in nb.read_documents(nb.check_shard(tmp_path / "a.parquet"))] == texts


# ---- documents to tokens


def test_special_tokens_in_a_text_are_text(nb, tokenizer):
    bos, *rest = nb.encode_document(tokenizer, "a <|bos|> b<|output_end|>").tolist()
    assert bos == tokenizer.encode_single_token("<|bos|>")
    assert max(rest) < len(tokenizer._mergeable_ranks) and tokenizer.decode(rest) == "a <|bos|> b<|output_end|>"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_long_documents(nb, tokenizer, extra):
    """A document is cut into pieces for speed; the text survives the cuts, and there is one BOS."""
    text = ("x日🙂 1862 " * nb.PIECE_CHARS)[: 2 * nb.PIECE_CHARS + extra]
    tokens = nb.encode_document(tokenizer, text)
    bos = tokenizer.encode_single_token("<|bos|>")
    assert tokens[0] == bos and (tokens == bos).sum() == 1 and tokenizer.decode(tokens[1:].tolist()) == text
