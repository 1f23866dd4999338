"""The embedded corpus is what its README says, reads like prose, and its validation shard is unseen in training."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

FOLDER = Path(__file__).parents[1] / "data" / "embedded"
PATHS = sorted(FOLDER.glob("shard_*.parquet"))
NOVELS = ["Sense and Sensibility", "Pride and Prejudice", "Mansfield Park", "Emma", "Northanger Abbey", "Persuasion"]

# stray space, an entity, a note of the archive or the publisher, an italic
UGLY = r"^\s|\s$| \n|\n |\n{3}|  |&(amp|lt|gt|quot|nbsp|mdash);|APP Note|Gutenberg|Jump to|THE END|FINIS|(?<!_)_(?!_)"


@pytest.fixture(scope="module")
def shards():
    return [pq.read_table(path)["text"].to_pylist() for path in PATHS]


@pytest.fixture(scope="module")
def documents(shards):
    return [text for shard in shards for text in shard]


def is_austen(text):
    return text.startswith("Jane Austen, ")


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def readme_rows():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (shard_\d{5}\.parquet) \|(.*)\| `([0-9a-f]{64})` \|$", readme, re.M)
    return {name: ([int(n.replace(",", "")) for n in numbers.split("|")], digest) for name, numbers, digest in rows}


def test_files_and_schema():
    assert [path.name for path in PATHS] == [f"shard_{i:05d}.parquet" for i in range(5)]
    for path in PATHS:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"] and file.schema_arrow.field("text").type == pa.string()
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_readme_has_the_counts_and_the_digests(shards):
    rows = readme_rows()
    assert list(rows) == [path.name for path in PATHS]
    for path, shard in zip(PATHS, shards):
        chapters = sum(map(is_austen, shard))
        data = path.read_bytes()
        sizes = [len(shard) - chapters, chapters, sum(map(len, shard)), len("".join(shard).encode()), len(data)]
        assert rows[path.name] == (sizes, hashlib.sha256(data).hexdigest()), path.name


def test_documents_are_clean(documents):
    for text in documents:
        title, *paragraphs = text.split("\n\n")
        assert "\n" not in title and paragraphs and all(paragraphs), title
        assert unicodedata.is_normalized("NFC", text), title
        bad = [c for c in set(text) if c != "\n" and unicodedata.category(c)[0] == "C" or c in "\ufffd“”‘’<>|#"]
        assert not bad, (title, bad)
        ugly = re.search(UGLY, text)
        assert not ugly, (title, text[max(0, ugly.start() - 40) : ugly.end() + 40])


def test_no_hard_wraps(documents):
    """A wrapped text breaks its lines in mid-sentence at some 70 characters. What single line breaks there are belong
    to verse and to the ends of letters."""
    broken = [p for text in documents for p in text.split("\n\n") if "\n" in p]
    assert len(broken) < 40 and all(len(line) < 65 for p in broken for line in p.split("\n"))
    assert not [text[:60] for text in documents if not is_austen(text) and re.search(r"[^\n]\n[^\n]", text)]
    resumed = re.findall(r"[A-Za-z]\n\n[a-z][^\n]{0,40}", "\n\n\n".join(documents))
    assert not resumed, resumed
    paragraphs = [p for text in documents for p in text.split("\n\n")]
    assert sum(len(p) > 200 for p in paragraphs) > 0.5 * len(paragraphs)


def test_titles(documents):
    titles = [text.split("\n")[0] for text in documents]
    years = []
    for title in titles:
        chapter = re.fullmatch(r"Jane Austen, (.+?)(, Volume I+)?, (Chapter [IVXL\d]+|Advertisement by .*)", title)
        address = re.fullmatch(r"[A-Z][^,]+, State of the Union, [A-Z][a-z]+ \d+, (\d{4})", title)
        assert chapter and chapter[1] in NOVELS or address, title
        years += [int(address[1])] if address else []
    assert len(set(titles)) == len(titles) == 410
    assert sorted(set(years)) == list(range(1790, 1929)) and len(years) == 140  # two in 1790


def test_each_shard_has_both_sources(shards):
    for shard in shards:
        assert 0 < sum(map(is_austen, shard)) < len(shard)
    validation, sizes = shards[-1], [sum(map(len, shard)) for shard in shards]
    assert 0.08 < sizes[-1] / sum(sizes) < 0.12
    for novel in NOVELS:
        assert any(text.startswith(f"Jane Austen, {novel}, ") for text in validation), novel
    addresses = [text.split("\n")[0] for text in validation if not is_austen(text)]
    years = sorted(int(title[-4:]) for title in addresses)
    assert max(b - a for a, b in zip([1790, *years], [*years, 1928])) < 25, years


def test_validation_is_unseen_in_training(shards, documents):
    """No document twice, and no run of 25 words (some 150 characters) of validation in training. Such a run covers at
    least one whole block when the training text is cut into blocks of 12 words; each block found is then extended."""
    assert len(set(documents)) == len(documents)
    run, block = 25, 12
    train = [words(text) for shard in shards[:-1] for text in shard]
    blocks = defaultdict(list)
    for doc in train:
        for i in range(0, len(doc) - block + 1, block):
            blocks[" ".join(doc[i : i + block])].append((doc, i))
    for text in shards[-1]:
        doc = words(text)
        for i in range(len(doc) - block + 1):
            for other, j in blocks.get(" ".join(doc[i : i + block]), ()):
                start, end = 0, block
                while min(i, j) + start > 0 and doc[i + start - 1] == other[j + start - 1]:
                    start -= 1
                while max(i + end - len(doc), j + end - len(other)) < 0 and doc[i + end] == other[j + end]:
                    end += 1
                assert end - start < run, (text[:60], " ".join(doc[i + start : i + end]))
