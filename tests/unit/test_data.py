"""Shards: which of them train and validate, refused by name when they are not whole, read from any row."""

import itertools
import shutil
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import EMBEDDED, documents, fetcher, one_line, shard, write_shard


def folder_config(nb, folder, **changes):
    return nb.Config.demo().replace(**{"dataset": str(folder)} | changes)


@pytest.mark.parametrize("num_shards", [1, 4, -1])
def test_the_last_shard_validates_whatever_num_shards_is(nb, tmp_path, num_shards):
    names = [f"shard_{i:05d}.parquet" for i in (3, 0, 11, 2, 7)]
    for name in names:
        write_shard(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("not a shard")
    train, validation = nb.list_shards(folder_config(nb, tmp_path, num_shards=num_shards))
    assert [fetch().files[0].name for fetch in train] == sorted(names)[:4][: None if num_shards == -1 else num_shards]
    assert validation().files == (tmp_path / "shard_00011.parquet",)


def test_list_shards_refuses(nb, tmp_path):
    def message(**changes):
        with pytest.raises(nb.InputError) as error:
            nb.list_shards(folder_config(nb, tmp_path, **changes))
        return str(error.value)

    assert one_line(message(), "has no files that can be read", ".jsonl", str(tmp_path))
    write_shard(tmp_path / "a.parquet", ["a"])
    assert one_line(message(), "is one document, and some must validate; give more")
    write_shard(tmp_path / "b.parquet", ["b"])
    assert len(nb.list_shards(folder_config(nb, tmp_path, num_shards=2))[0]) == 1  # at most so many
    for dataset in ("/no/such/folder", "corpus", "me/", "", "~/no such"):
        assert one_line(message(dataset=dataset), repr(dataset), "'embedded', a file or folder of text", "owner/name")


# name: (files, those that train, the one that validates), or (files, words of the message)
SPLITS = {
    "no words": ("b/1 a b/0 b/deep/2", "a b/0 b/1", "b/deep/2"),
    "words within words": ("latest brain devout evaluate contest", "brain contest devout evaluate", "latest"),
    "imdb": ("plain/train-0 plain/test-0 plain/unsupervised-0", "plain/train-0", "plain/test-0"),
    "all three": ("train-1 train-0 validation-0 validation-1 test-0", "train-0 train-1", "validation-1"),
    "folders": ("data/train/1 data/dev/0 data/train/0", "data/train/0 data/train/1", "data/dev/0"),
    "folders of a language": ("train-en/0 train-en/1 dev-en/0", "train-en/0 train-en/1", "dev-en/0"),
    "validation, then dev": ("x_dev x_val x_train", "x_train", "x_val"),
    "the nearest word": ("train-test/train.0 train-test/test.0", "train-test/train.0", "train-test/test.0"),
    "a word for some": ("s0 s1 Valid2", "s0 s1", "Valid2"),
    "wikitext": ("w-103/train w-103/test w-2/train", "several data sets; name one of them: me/x/w-103, me/x/w-2"),
    "a folder of folders": ("data/20BT/0 data/20BT/1 sample/0", "me/x/data/20BT, me/x/sample"),
    "languages": ("train/en/0 train/ru/0 dev/en/0", "me/x/dev/en, me/x/train/en, me/x/train/ru"),
    "many": (" ".join(f"c{i}/0" for i in range(10)), "me/x/c6, me/x/c7, …"),
    "tests alone": ("test-0 test-1", "has files for test, and none for training"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_names_that_say_train_validation_or_test_are_followed(nb, name):
    """As the Hub's own library follows them; test splits are never trained on, and data sets never mixed."""
    names, *expected = SPLITS[name]
    names = [f"{name}.parquet" for name in names.split()]
    if len(expected) == 2:
        train, held_out = nb.choose_splits("me/x", nb.split_names("me/x", names))
        train, held_out = (train, held_out) if held_out else (train[:-1], train[-1:])  # as list_shards does
        assert [" ".join(train).replace(".parquet", ""), held_out[-1].removesuffix(".parquet")] == expected
    else:
        with pytest.raises(nb.InputError) as error:
            nb.choose_splits("me/x", nb.split_names("me/x", names))
        assert one_line(str(error.value), "dataset='me/x': has ", *expected)


def test_splits_of_a_folder(nb, tmp_path, monkeypatch, capsys):
    """Hidden files and folders are none of it, and ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data/train/a", "data/train/b", "data/train/.b", "data/dev/a", "data/_old/c", ".cache/d", "_d"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(tmp_path / "corpus" / f"{name}.parquet", [name])
    for dataset in (tmp_path / "corpus", "~/corpus"):
        train, validation = nb.list_shards(folder_config(nb, dataset, num_shards=-1))
        paths = [tmp_path / "corpus/data/train" / f"{x}.parquet" for x in "ab"]
        assert [fetch().files[0] for fetch in train] == paths
    nb.describe_data(train, validation)
    words = "data    2 documents, 0.0 MB of text in 2 training shards; validation: "
    assert capsys.readouterr().out.strip() == words + str(tmp_path / "corpus/data/dev/a.parquet")


def test_the_embedded_corpus_is_found_from_another_folder(nb, tmp_path, monkeypatch):
    """Also by a kernel that does not run in the folder of its notebook; else GitHub is asked for it."""
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    monkeypatch.setattr(nb, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(nb.urllib.request, "urlopen", lambda *args, **how: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.delitem(nb.__dict__, "__file__")
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "notebooks" / "02_train.ipynb"))
    with pytest.raises(nb.InputError, match="no network; start in a clone of https://github.com/.*, or set dataset"):
        nb.embedded_folder()
    for place in ("", "work/deep", "notebooks"):  # above, here, beside the notebook: the later comes before
        folder = tmp_path / place / "data" / "embedded"
        shutil.copytree(EMBEDDED, folder)
        assert nb.embedded_folder() == folder


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
    "damaged page": (damage_a_page, ["cannot be read from row 0 on", "get it again"]),  # its footer is whole
    "no text": (lambda path: pq.write_table(pa.table({"n": [1, 2], "x": GOOD, "y": ["long", "longer"]}), path),
                ["n (int64)", "the likeliest: text_column='y'"]),
    "bytes": (lambda path: pq.write_table(pa.table({"text": [b"a", b"b"]}), path), ["`text`", "binary"]),
    "lists": (lambda path: pq.write_table(pa.table({"text": [["a"], ["b"]]}), path), ["`text`", "list"]),
    "no rows": (lambda path: write_shard(path, []), ["has no rows"]),
    "nothing but empty texts": (lambda path: write_shard(path, [None, ""] * 4), ["none of its 8 rows has a text"]),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_shard_is_refused_by_name(nb, tmp_path, make, words):
    """By check_shard where the footer tells; else by read_documents, at the row."""
    path = tmp_path / "shard_00007.parquet"
    make(path)
    with pytest.raises(nb.InputError) as error:
        list(nb.read_documents(fetcher(nb, path)()))
    assert str(error.value).startswith(f"{path}: ") and one_line(str(error.value), *words)


def test_a_column_that_the_embedded_corpus_does_not_have(nb):
    shards, _ = nb.list_shards(nb.Config.demo().replace(text_column="body"))
    with pytest.raises(nb.InputError) as error:
        shards[0]()
    assert one_line(str(error.value), "shard_00000.parquet: must have a `body` column", "its columns: text (string)")


STRINGS = {
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "string_view, as polars writes": lambda texts: pa.array(texts, pa.string_view()),
    "dictionary, as pandas writes a category": lambda texts: pa.array(texts).dictionary_encode(),
    "chunks": lambda texts: pa.chunked_array([texts[:3], [], texts[3:]]),
}


@pytest.mark.parametrize("make", STRINGS.values(), ids=STRINGS)
def test_strings_of_other_tools_from_any_row(nb, tmp_path, make):
    """Nested columns stand to the left of the text."""
    texts = documents(4, 12)
    nested = pa.array([{"a": None, "text": ""}] * len(texts), pa.struct([("a", pa.int64()), ("text", pa.string())]))
    pq.write_table(pa.table({"meta": nested, "text": make(texts)}), tmp_path / "a.parquet", row_group_size=5)
    for start in (0, 4, 5, 11, 12, 99):
        found = nb.read_documents(fetcher(nb, tmp_path / "a.parquet")(), start)
        assert list(found) == list(enumerate(texts))[start:]


def test_empty_texts_are_left_out_and_counted_once(nb, tokenizer, tmp_path, capsys):
    """The others keep their row numbers, from any row on. A process says so once, of its first such shard."""
    texts = ["one", "", "two", None, "", "three", None]
    paths = [write_shard(tmp_path / name, texts) for name in ("a.parquet", "b.parquet")]
    nb.SAID.clear()
    for start in (0, 2, 3, 6):
        found = [(row, texts[row]) for row in (0, 2, 5) if row >= start]
        assert [list(nb.read_documents(shard(nb, path), start)) for path in paths] == [found, found]
    assert capsys.readouterr().out == "data    4 of 7 documents of a.parquet are empty: skipped\n"
    groups = nb.document_groups([fetcher(nb, path) for path in paths], nb.Position())
    read = [(place, text) for group in itertools.islice(groups, 4) for place, text in group]
    assert read == [(nb.Position(0, shard, row), texts[row]) for shard in (0, 1) for row in (0, 2, 5)]


def test_a_row_group_is_read_in_parts(nb, tmp_path):
    """One of more than 2 GiB does not fit an Arrow array of strings, nor three times into the memory of Colab."""
    path = write_shard(tmp_path / "a.parquet", [f"{i:0100000}" for i in range(1000)], row_group_size=1000)
    tracemalloc.start()
    assert sum(len(text) for _, text in nb.read_documents(shard(nb, path))) == 100_000_000
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


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
