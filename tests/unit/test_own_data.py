"""Your own data: every format that others write, what is chosen of it, every bad input in one line, and resumption."""

import bz2
import csv
import gzip
import json
import math
import os
import subprocess
import sys

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest

from tests.helpers import ROOT, documents, fetcher, one_line, shaken, shard, small_config, within, write_shard

# Two lines each, in a script each; and all planes of Unicode, without surrogates.
SCRIPTS = {
    "Russian": "Все счастливые семьи похожи друг на друга,\nкаждая несчастливая семья несчастлива по-своему.",
    "Chinese": "學而時習之，不亦說乎？\n有朋自遠方來，不亦樂乎？",
    "Arabic": "اقرأ باسم ربك الذي خلق\nخلق الإنسان من علق",
    "Thai": "กรุงเทพมหานคร อมรรัตนโกสินทร์\nมหินทรายุธยา มหาดิลกภพ",
    "code": "def f(x: int) -> str:\n\treturn f'{x:>08b}'  # \\n\r\n",
    "planes": "".join(map(chr, [*range(1, 0xD800, 37), *range(0xE000, 0x110000, 1009)])),
}
TEXTS = [*SCRIPTS.values(), *documents(3, 194)]  # 200 documents


def config_of(nb, dataset, **changes):
    return nb.Config.demo().replace(dataset=str(dataset), **changes)


def read(nb, dataset, **changes):
    """(texts that train, texts that validate) of a dataset."""
    train, validation = nb.list_shards(config_of(nb, dataset, **changes))
    return [[text for fetch in part for _, text in nb.read_documents(fetch())] for part in (train, [validation])]


def message(nb, dataset, **changes):
    with pytest.raises(nb.InputError) as error:
        read(nb, dataset, **changes)
    return str(error.value)


# ---- formats


def save_arrow(path, make):
    with make(str(path), pa.schema([("text", pa.string())])) as writer:
        for i in range(0, 200, 30):
            writer.write_batch(pa.record_batch({"text": TEXTS[i : i + 30]}))


FRAME = {"id": range(200), "text": TEXTS}
LINES = "".join(json.dumps(dict(id=i, text=text), ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))
DUCK = duckdb.connect()
DUCK.register("texts", pa.table({"text": TEXTS}))

# name: (file, what writes it, options of the Config)
WRITERS = {
    "pandas parquet": ("a.parquet", lambda path: pandas.DataFrame(FRAME).to_parquet(path)),
    "polars parquet": ("a.parquet", lambda path: polars.DataFrame({"text": TEXTS}).write_parquet(path)),
    "duckdb parquet": ("a.parquet", lambda path: DUCK.execute(f"COPY texts TO '{path}'")),
    "pandas json lines": ("a.jsonl", lambda path: pandas.DataFrame(FRAME).to_json(path, orient="records", lines=True)),
    "pandas json.gz": ("a.json.gz", lambda path: pandas.DataFrame(FRAME).to_json(path, orient="records", lines=True)),
    "pandas json list": ("a.json", lambda path: pandas.DataFrame(FRAME).to_json(path, orient="records", indent=1)),
    "polars ndjson": ("a.jsonl", lambda path: polars.DataFrame({"text": TEXTS}).write_ndjson(path)),
    "duckdb json": ("a.json", lambda path: DUCK.execute(f"COPY texts TO '{path}' (FORMAT json)")),
    "duckdb json list": ("a.json", lambda path: DUCK.execute(f"COPY texts TO '{path}' (FORMAT json, ARRAY true)")),
    "python json lines": ("a.jsonl", lambda path: path.write_text(LINES, encoding="utf-8")),
    "byte order mark": ("a.jsonl", lambda path: path.write_text(LINES, encoding="utf-8-sig")),
    "two gzip members": (
        "a.jsonl.gz",
        lambda path: path.write_bytes(gzip.compress(LINES[:9000].encode()) + gzip.compress(LINES[9000:].encode())),
    ),
    "zstd": (
        "a.jsonl.zst",
        lambda path: path.write_bytes(pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
    ),
    "pandas csv": ("a.csv", lambda path: pandas.DataFrame(FRAME).to_csv(path)),
    "pandas csv.gz": ("a.csv.gz", lambda path: pandas.DataFrame(FRAME).to_csv(path, index=False)),
    "polars csv": ("A.CSV", lambda path: polars.DataFrame({"text": TEXTS}).write_csv(path)),
    "duckdb csv": ("a.csv", lambda path: DUCK.execute(f"COPY texts TO '{path}' (HEADER)")),
    "arrow stream": ("a.arrow", lambda path: save_arrow(path, pa.ipc.new_stream)),
    "arrow file": ("a.arrow", lambda path: save_arrow(path, pa.ipc.new_file)),
    "save_to_disk": ("saved", lambda path: datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)),
    "text": ("a.txt", lambda path: path.write_text("\n<eot>\n".join(TEXTS), encoding="utf-8", newline="")),
    "text.zst": (
        "a.txt.zst",
        lambda path: path.write_bytes(pa.compress("\n<eot>\n".join(TEXTS).encode(), codec="zstd", asbytes=True)),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_others_write_is_read(nb, tmp_path, name):
    """Every document once, in one of two parts. The part is that of the text: the same in every format."""
    file, write = WRITERS[name]
    write(tmp_path / file)
    separator = "\\n<eot>\\n" if "text" in name.partition(".")[0].split() else ""
    train, validation = read(nb, tmp_path / file, document_separator=separator)
    assert sorted(train + validation) == sorted(TEXTS) and [text for text in TEXTS if text in train] == train
    limit = 2**32 // 50
    assert validation == [text for text in TEXTS if nb.zlib.crc32(text.encode()) < limit] and len(validation) > 2


def test_a_table_is_read_from_any_row(nb, tmp_path):
    for name in ("pandas json lines", "pandas csv", "arrow stream", "arrow file", "polars parquet", "duckdb json list"):
        file, write = WRITERS[name]
        write(path := tmp_path / f"{name}.{file.partition('.')[2]}")
        for start in (0, 1, 29, 30, 100, 101, 199, 200):
            found = list(nb.read_documents(shard(nb, path), start))
            assert found == list(enumerate(TEXTS))[start:], (name, start)


def test_text_files_are_documents(nb, tmp_path):
    """In all folders, README aside; a file is read only when its row is asked for."""
    for i, text in enumerate(TEXTS):
        path = tmp_path / "notes" / f"{i % 3}" / f"{i:03d}.{'md' if i % 2 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    (tmp_path / "notes" / "README.md").write_text("about these notes")
    train, validation = read(nb, tmp_path / "notes")
    assert sorted(train + validation) == sorted(TEXTS) and validation
    (fetch,), _ = nb.list_shards(config_of(nb, tmp_path / "notes"))
    whole = fetch()._replace(part=nb.ALL)
    everything = list(nb.read_documents(whole))
    for path in whole.files[:150]:
        path.unlink()
    assert list(nb.read_documents(whole, 150)) == everything[150:]


def test_separators_at_the_border_of_a_block(nb, tmp_path):
    """A text file is read in blocks of 256 KiB; a separator and a character may lie on the border."""
    texts = ["é" * (2**23 - 3), "a", "б" * 50, "end"]
    for shift in range(12):
        (tmp_path / "a.txt").write_text("<|eot|>".join(["x" * shift + texts[0], *texts[1:]]), encoding="utf-8")
        found = [text for _, text in nb.read_documents(shard(nb, tmp_path / "a.txt", separator="<|eot|>"))]
        assert found == ["x" * shift + texts[0], *texts[1:]]


# ---- what is chosen


def test_splits_of_any_kind_of_file(nb, tmp_path):
    """Names are followed; else the last file of a table validates, and of texts a part."""
    for name in ("train/a.jsonl", "train/b.jsonl", "val/a.jsonl", "test/a.jsonl"):
        (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "named" / name).write_text(json.dumps({"text": name}) + "\n")
    assert read(nb, tmp_path / "named") == [["train/a.jsonl", "train/b.jsonl"], ["val/a.jsonl"]]
    (tmp_path / "texts" / "valid").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "valid/c.txt", "valid/d.txt"):
        (tmp_path / "texts" / name).write_text(name)
    assert read(nb, tmp_path / "texts" / "valid") in ([["c.txt"], ["d.txt"]], [["valid/c.txt"], ["valid/d.txt"]])
    (tmp_path / "texts" / "Training Day.txt").write_text("a title, not a split")
    train, _ = read(nb, tmp_path / "texts")
    assert len(train) == 3  # with a.txt and b.txt
    (tmp_path / "named" / "val" / "a.jsonl").unlink()
    (tmp_path / "named" / "test" / "a.jsonl").unlink()
    assert read(nb, tmp_path / "named") == [["train/a.jsonl"], ["train/b.jsonl"]]


def test_the_smallest_dataset_is_divided(nb, tmp_path):
    """Two documents: one trains, one validates, also when others are added later, unless their hash is lower."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}\n')
    train, validation = read(nb, tmp_path / "a.jsonl")
    assert sorted([set(train).pop(), set(validation).pop()]) == ["one", "two"] and not {*train} & {*validation}


def test_the_kind_that_is_read(nb, tmp_path, capsys):
    """Parquet, else the most frequent; a line says what is left out."""
    nb.SAID.clear()
    for name in ("a.txt", "b.txt", "c.csv", "d.csv", "e.csv"):
        (tmp_path / name).write_text(f"text\n{name}\n")
    assert read(nb, tmp_path) == [["c.csv", "d.csv"], ["e.csv"]]
    for name in ("x.parquet", "y.parquet"):
        write_shard(tmp_path / name, [name])
    nb.SAID.clear()
    assert read(nb, tmp_path) == [["x.parquet"], ["y.parquet"]]
    out = capsys.readouterr().out
    assert f"data    {tmp_path}: 3 csv files of 5 files are read" in out
    assert f"data    {tmp_path}: 2 parquet files of 7 files are read" in out


def test_what_was_chosen_is_printed(nb, tmp_path, capsys):
    """Documents and bytes are exact up to 16 MiB, and projected beyond it, within 2% for equal documents."""

    def said(dataset, **changes):
        size = nb.describe_data(*nb.list_shards(config_of(nb, dataset, **changes)))
        return capsys.readouterr().out, size

    (tmp_path / "a.jsonl").write_text(LINES)
    train, validation = read(nb, tmp_path / "a.jsonl")
    out, size = said(tmp_path / "a.jsonl")
    assert size == sum(len(text.encode()) for text in train)
    start = f"data    {len(train)} documents, {size / 1e6:,.1f} MB of text in {tmp_path / 'a.jsonl'}; validation: "
    assert out == f"{start}2.0% of the documents, by the hash of their text\n"
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(30_000)]  # 30 MB
    lines = "".join(json.dumps({"other": "x" * 99, "text": text}) + "\n" for text in texts).encode()
    (tmp_path / "b.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (tmp_path / "b.txt").write_text("\n\n".join(texts))
    write_shard(tmp_path / "b.parquet", texts, row_group_size=1000)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "b")
    for name in ("b.jsonl", "b.jsonl.gz", "b.txt", "b.parquet", "b"):
        out, size = said(tmp_path / name, document_separator="\n\n" * name.endswith("txt"))
        count = float(out.split()[2].replace(",", ""))
        assert out.startswith("data    about ") and count == pytest.approx(0.98 * 30_000, rel=0.02), (name, out)
        assert size == pytest.approx(0.98 * 30e6, rel=0.02)


def test_empty_tables_beside_others_are_left_out(nb, tmp_path, capsys):
    nb.SAID.clear()
    for i, texts in enumerate((["one"], [], ["two"], [])):
        write_shard(tmp_path / f"part-{i}.parquet", texts)
    assert read(nb, tmp_path) == [["one"], ["two"]]
    assert f"data    {tmp_path}: 2 parquet files of 4 files are read" in capsys.readouterr().out
    (tmp_path / "lines").mkdir()
    for i, text in enumerate(('{"text": "one"}\n', "", '{"text": "two"}\n')):
        (tmp_path / "lines" / f"{i}.jsonl").write_text(text)
    assert read(nb, tmp_path / "lines") == [["one"], ["two"]]


def test_the_column_of_the_texts(nb, tmp_path, capsys):
    """The only one of strings is taken, and named; of several, the likeliest is proposed."""
    nb.SAID.clear()
    for name in ("one.csv", "one.jsonl", "one.parquet"):
        table = pandas.DataFrame({"n": range(200), "body": TEXTS, "price": [1.5] * 200})
        how = {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[4:])
        how(tmp_path / name) if how else table.to_json(tmp_path / name, orient="records", lines=True)
        train, validation = read(nb, tmp_path / name)
        assert sorted(train + validation) == sorted(TEXTS)
    assert capsys.readouterr().out == "data    the texts are the column `body`, the only one of strings\n"
    for name in ("two.csv", "two.jsonl", "two.parquet", "two"):
        table = pandas.DataFrame({"title": ["short"] * 200, "n": range(200), "body": TEXTS})
        how = {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[4:])
        if name == "two":
            datasets.Dataset.from_pandas(table).save_to_disk(tmp_path / name)
        else:
            how(tmp_path / name) if how else table.to_json(tmp_path / name, orient="records", lines=True)
        words = message(nb, tmp_path / name)
        assert one_line(words, "must have a `text` column", "title (", "the likeliest: text_column='body'"), name
        train, validation = read(nb, tmp_path / name, text_column="body")
        assert sorted(train + validation) == sorted(TEXTS)


def test_the_first_rows_do_not_decide_alone(nb, tmp_path):
    """Nulls first, a number first, numerals in CSV: the column `text` is taken where it is."""
    rows = [{"text": None, "title": "a title"}] * 150 + [{"text": text, "title": "b"} for text in TEXTS]
    (tmp_path / "nulls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n' + LINES)
    (tmp_path / "numerals.csv").write_text("text,other\n" + "17,x\n" * 150 + "words,y\n")
    (tmp_path / "excel.csv").write_text("id;text\n1;one\n2;two\n")
    (tmp_path / "tabs.tsv").write_text("id\ttext\n1\tone\n2\ttwo\n")
    for name in ("nulls.jsonl", "number.jsonl"):
        train, validation = read(nb, tmp_path / name, skip_bad_rows=True)
        assert sorted(train + validation) == sorted(TEXTS)
    assert {*sum(read(nb, tmp_path / "numerals.csv"), [])} == {"17", "words"}
    for name in ("excel.csv", "tabs.tsv"):
        assert sorted(sum(read(nb, tmp_path / name), [])) == ["one", "two"]


def test_lines_that_end_as_those_of_windows(nb, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\nthree")
    for separator in ("\n\n", "\\n\\n", "\\r\\n\\r\\n"):
        found = nb.read_documents(shard(nb, tmp_path / "a.txt", separator=separator))
        assert [text for _, text in found] == ["one", "two", "three"]


def test_a_changed_file_is_another(nb, tmp_path):
    """At its beginning, at its end, in any of many; and a copy elsewhere is the same."""

    def named(folder):
        return nb.identity(nb.list_shards(config_of(nb, folder))[0][0].args[0])

    for name in ("a", "copy"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(f"note {i}")
    assert named(tmp_path / "a") == named(tmp_path / "copy")
    (tmp_path / "copy" / "7.txt").write_text("NOTE 7")
    assert named(tmp_path / "a") != named(tmp_path / "copy")
    text = LINES * (1 + 3_000_000 // len(LINES))
    (tmp_path / "a.jsonl").write_text(text)
    before = named(tmp_path / "a.jsonl")
    for changed in (text.replace("text", "TEXT", 1), text[:-3] + "x}\n"):
        (tmp_path / "a.jsonl").write_text(changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nb, "open_own_shard", lambda shard: shard)
            patch.setattr(nb, "beginning", lambda shard: ["one", "two"])
            assert named(tmp_path / "a.jsonl") != before


# ---- bad input


def bad_files(folder):
    """{name: (Config fields, words of the message)} of files that are refused; it writes them."""
    good = json.dumps({"text": "good"})

    def write(name, data):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return name

    (folder / "empty").mkdir()
    cut, lists = gzip.compress(LINES.encode())[:-3000], [{"text": ["a"]}, {"text": ["b"]}]
    return {
        "empty": ({}, ["has no files that can be read", ".jsonl"]),
        write("pictures/a.png", b"\x89PNG"): ({}, ["pictures/a.png'", "has no files that can be read"]),
        write("binary.txt", "text" * 9 + "\n\n" + "\x00\n\n") and write("image.txt", b"GIF89a\x00\xff\xfe"): (
            {}, ["image.txt: byte 7 is 0xff, no UTF-8"]),
        write("latin.txt", "ab\n\ncafé".encode("latin-1")): (
            {"document_separator": "\\n\\n"}, ["latin.txt: byte 7 is 0xe9", "iconv"]),
        write("utf16.txt", "ab\n\ncafé".encode("utf-16")): ({}, ["utf16.txt: byte 0 is 0xff"]),
        write("latin.csv", "id,text\n1,a\n2,caf\u00e9\n".encode("latin-1")): (
            {}, ["latin.csv: line 3: character 4 of `text` is byte 0xe9, no UTF-8"]),
        write("broken.jsonl", f'{good}\n{good}\n{{"text": "bad\n{good}\n'): (
            {}, ["broken.jsonl: line 3: Unterminated string", "skip_bad_rows"]),
        write("surrogate.jsonl", good + '\n{"text": "x\\ud800"}\n'): ({}, ["line 2: character 2", "surrogate pair"]),
        write("broken.json", f"[{good},\n{good},\n{good}"): ({}, ["broken.json: line 3: Expecting ',' delimiter"]),
        write("numbers.jsonl", f'{good}\n{good}\n{{"text": 3}}\n'): ({}, ["line 3: `text` is of type int"]),
        write("scalar.jsonl", f"{good}\n3\n"): ({}, ["scalar.jsonl: line 2: no object with `text`"]),
        write("lists.jsonl", "".join(json.dumps(row) + "\n" for row in lists)): ({}, ["text (list)"]),
        write("late.jsonl", f"{good}\n" * 150 + '{"text": ["a"]}\n'): ({}, ["line 151: `text` is of type list"]),
        write("fields.csv", "id,text\n1,a\n2,b,c\n"): ({}, ["fields.csv: line 3: 3 fields, and the header has 2"]),
        write("quote.csv", 'text\n"a"\n"b\n'): ({}, ["quote.csv: line 3: unexpected end of data"]),
        write("cut.jsonl.gz", cut): ({}, ["cut.jsonl.gz: cannot be read from row ", "Truncated"]),
        write("wrong.jsonl.zst", b"no zstd at all"): ({}, ["wrong.jsonl.zst: cannot be read from row 0 on"]),
        write("wrong.arrow", b"no arrow at all"): ({}, ["wrong.arrow: cannot be read from row 0 on"]),
        write("utf16.jsonl", LINES.encode("utf-16")): ({}, ["utf16.jsonl: byte 0 is 0xff, no UTF-8"]),
        write("bom.txt", b"\xef\xbb\xbfabc\xe9"): ({}, ["bom.txt: byte 6 is 0xe9"]),
        write("mac.csv", "text\ra\rb\r"): ({}, ["mac.csv: line 1: new-line character"]),
        write("deep.json", "[" * 200_000): ({}, ["deep.json: line 1: maximum recursion depth"]),
        write("digits.json", "[" + "1" * 5000 + "]"): ({}, ["digits.json: line 1: Exceeds the limit"]),
        write("separated.txt", "one\ntwo"): ({"document_separator": "<eot>"}, ["one document, without '<eot>' in it,"]),
        write("sub/file", "") and os.mkfifo(folder / "fifo") or "fifo": ({}, ["is neither a file nor a folder"]),
        "./missing": ({}, ["(there is none here of this name)"]),
        write("nothing.jsonl", ""): ({}, ["nothing.jsonl: none of its 0 rows has a text"]),
        write("one.txt", "the only document"): ({}, ["is one document, and some must validate", "document_separator="]),
        write("packed.jsonl.bz2", bz2.compress(LINES.encode())): ({}, ["has no files that can be read", ".gz, .zst"]),
        write("table.csv", "text\na\nb\n"): ({"document_separator": "x"}, ["is for text files, and this is table.csv"]),
        write("column.csv", "text\na\nb\n"): ({"text_column": "body"}, ["a `body` column", "text_column='text'"]),
    }  # fmt: skip


def test_bad_input_is_one_line(nb, tmp_path):
    for name, (changes, words) in bad_files(tmp_path).items():
        assert one_line(message(nb, tmp_path / name, **changes), *words), name


def test_bad_rows_can_be_skipped(nb, tmp_path, capsys):
    """And are counted; the others keep their rows, so that a position means the same."""
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[3], rows[50], rows[199] = '{"text": "cut', '{"no": 1}', '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.txt").write_bytes(b"one\n\ncaf\xe9\n\ntwo\n\nthree")
    with open(tmp_path / "c.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], ["one", 1], ["bad"], ["two", 2]])
    nb.SAID.clear()
    good = [(row, text) for row, text in enumerate(TEXTS) if row not in (3, 50, 199)]
    assert list(nb.read_documents(shard(nb, tmp_path / "a.jsonl", skip_bad_rows=True))) == good
    assert list(nb.read_documents(shard(nb, tmp_path / "a.jsonl", skip_bad_rows=True), 51)) == good[49:]
    options = {"skip_bad_rows": True, "separator": "\n\n"}
    texts = [text for _, text in nb.read_documents(shard(nb, tmp_path / "b.txt", **options))]
    assert texts == ["one", "two", "three"]
    assert list(nb.read_documents(shard(nb, tmp_path / "c.csv", skip_bad_rows=True))) == [(0, "one"), (2, "two")]
    out = capsys.readouterr().out.splitlines()
    assert one_line(out[0], "data    ", "a.jsonl: line 4: Unterminated string", "skipped")
    assert out[1:] == [f"data    {n} bad rows of {tmp_path / name} were skipped" for n, name in
                       ((3, "a.jsonl"), (1, "b.txt"), (1, "c.csv"))]  # fmt: skip


def test_fewer_tokens_than_a_batch(nb, tokenizer, tmp_path):
    """A batch that held all documents twice would be no training."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    config = config_of(nb, tmp_path / "a.jsonl", shuffle=0)
    shards, _ = nb.list_shards(config)
    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        with pytest.raises(nb.InputError, match="have fewer tokens than a batch, 2,048; give more text"):
            within(lambda: next(loader))


# ---- shuffling


def rows_of(groups, ends):
    """The (Position, text) of document_groups, up to so many ends of shards."""
    found = []
    while ends:
        group = next(groups)
        found += group
        ends -= not group
    return found


def test_shuffled_documents(nb, tmp_path, monkeypatch):
    """Each pass has every document once, in an order of its own; a position goes on to the document."""
    monkeypatch.setattr(nb, "GROUP_CHARS", 300)
    shards = []
    for i, count in enumerate((23, 40, 12)):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": f"{i}-{j}"}) + "\n" for j in range(count)))
        shards.append(fetcher(nb, tmp_path / f"{i}.jsonl"))
    found = rows_of(nb.document_groups(shards, nb.Position(), shuffle=16, seed=5), 9)
    passes = [[text for place, text in found if place.epoch == epoch] for epoch in range(3)]
    everything = [f"{i}-{j}" for i, count in enumerate((23, 40, 12)) for j in range(count)]
    assert all(sorted(texts) == sorted(everything) for texts in passes)
    assert len({*map(tuple, passes)} | {tuple(everything)}) == 4
    assert len({tuple(dict.fromkeys(text[0] for text in texts)) for texts in passes}) > 1  # shards, too
    for start in range(0, len(found), 7):
        rest = rows_of(nb.document_groups(shards, found[start][0], shuffle=16, seed=5), 1)
        assert rest == found[start : start + len(rest)] and rest
    assert rows_of(nb.document_groups(shards, nb.Position(), shuffle=16, seed=6), 9) != found
    split = [rows_of(nb.document_groups(shards, nb.Position(), p, 2, shuffle=16, seed=5), 3) for p in (0, 1)]
    assert sorted(text for part in split for _, text in part) == sorted(everything)


def test_shuffling_is_for_your_own_data(nb, tmp_path):
    assert [nb.Config(dataset=name).shuffle_block for name in ("embedded", nb.FINEWEB, "me/x")] == [0, 0, 1000]
    assert nb.Config(dataset="me/x", shuffle=0).shuffle_block == 0 and nb.Config(shuffle=7).shuffle_block == 7


def test_a_shuffled_run_resumes_with_the_next_token(nb, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(LINES.splitlines(True)[6:100]))
    config = config_of(nb, tmp_path / "a.jsonl", seq_len=16, device_batch_size=2, total_batch_size=32, shuffle=16)
    shards, _ = nb.list_shards(config)
    with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
        batches, states = [], []
        for _ in range(900):
            states.append(json.loads(json.dumps(loader.state_dict())))
            batches.append(np.asarray(within(lambda: next(loader))[0]))
    assert states[-1]["epoch"] > 0
    for k in (0, 1, 77, 450, 896):
        with nb.PrefetchDataLoader(config, tokenizer, shards) as loader:
            loader.load_state_dict(states[k])
            for batch in batches[k : k + 3]:
                np.testing.assert_array_equal(np.asarray(within(lambda: next(loader))[0]), batch)  # noqa: B023


# ---- any script


@pytest.mark.parametrize("name", SCRIPTS)
def test_bits_per_byte_of_any_script(nb, tmp_path, name):
    """With a tokenizer trained on it: it comes back, and bits are divided by the bytes of its UTF-8."""
    texts = [SCRIPTS[name], SCRIPTS[name][::-1]] * 4
    tokenizer = nb.train_tokenizer(texts, 265)
    assert all(tokenizer.decode(nb.encode_document(tokenizer, text)[1:].tolist()) == text for text in texts)
    config = small_config(nb, seq_len=64, device_batch_size=4)
    path = write_shard(tmp_path / "a.parquet", texts)
    batches = nb.validation_batches(config, tokenizer, shard(nb, path))
    size = sum(len(text.encode()) for text in texts)
    assert sum(n_bytes.sum() for *_, n_bytes in batches) == size
    params = shaken(nb, config)
    found = nb.evaluate(config, params, batches)
    losses = [np.where(targets < 0, 0, nb.token_losses(config, params, tokens, np.maximum(targets, 0)))
              for tokens, targets, _ in batches]  # fmt: skip
    assert found["bpb"] == pytest.approx(np.sum(losses, dtype=np.float64) / math.log(2) / size, rel=1e-6)


# ---- size


@pytest.mark.parametrize("megabytes", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_memory_stays_flat_over_a_large_file(tmp_path, megabytes):
    """JSON lines, packed and not, and text with separators: the peak is that of a small file, within 100 MB."""
    code = """
import json, re, sys
from pathlib import Path
from tools.notebooks import load
nb, path, size, how = load("02_train.py"), Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
line = b"".join((json.dumps({"text": "words of a text " * 60 + str(i)}) + "\\n").encode() for i in range(1000))
with nb.pa.output_stream(path, compression="detect" if how != "text" else None) as file:
    for _ in range(size * 10**6 // len(line)):
        file.write(line)
config = nb.Config.demo().replace(dataset=str(path), document_separator="}" * (how == "text"))
shards, validation = nb.list_shards(config)
def peak():  # ru_maxrss begins with that of the process that starts this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
count = sum(1 for _ in nb.read_documents(shards[0]()._replace(part=nb.ALL)))
print(count, (peak() - before) // 1024)
"""
    for name, how in (("a.jsonl", "lines"), ("a.jsonl.gz", "lines"), ("a.txt", "text")):
        command = [sys.executable, "-c", code, str(tmp_path / name), str(megabytes), how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        count, grown = map(int, done.stdout.split()[-2:])
        assert count >= megabytes * 900 and grown < 100, (name, count, grown)
        (tmp_path / name).unlink()


# ---- the notebook that reads it


def test_what_is_not_08_is_not_executed(nb, tmp_path, monkeypatch):
    """A file of its name that lies in the way; a notebook that is nowhere."""
    (tmp_path / "08_data.py").write_text("raise SystemExit(9)")
    monkeypatch.setattr(nb, "find_here", lambda name: tmp_path / name)
    with pytest.raises(nb.InputError) as error:
        nb.execute_part_one("08_data.py")
    assert one_line(str(error.value), "08_data.py=", str(tmp_path), "move it away")
    monkeypatch.setattr(nb, "find_here", lambda name: None)
    monkeypatch.setattr(nb.urllib.request, "urlopen", lambda *_, **how: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(nb.InputError) as error:
        nb.execute_part_one("08_data.py")
    assert one_line(str(error.value), "main/08_data.py: no network", "put 08_data.py beside this file")


def test_a_traceback_points_into_08(nb):
    """Its lines keep their numbers."""
    nb.execute_part_one("08_data.py")
    line = nb.text_rows.__code__.co_firstlineno
    assert (ROOT / "08_data.py").read_text().splitlines()[line - 1].startswith("def text_rows(")
