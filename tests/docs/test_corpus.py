"""The embedded corpus is what its README says: files, counts and digests."""

import hashlib
import re

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers import EMBEDDED

PATHS = sorted(EMBEDDED.glob("shard_*.parquet"))


def test_files_and_schema():
    assert [path.name for path in PATHS] == [f"shard_{i:05d}.parquet" for i in range(5)]
    for path in PATHS:
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names == ["text"] and file.schema_arrow.field("text").type == pa.string()
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_readme_has_the_counts_and_the_digests():
    readme = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (shard_\d{5}\.parquet) \|(.*)\| `([0-9a-f]{64})` \|$", readme, re.M)
    rows = {name: ([int(n.replace(",", "")) for n in numbers.split("|")], digest) for name, numbers, digest in rows}
    assert list(rows) == [path.name for path in PATHS]
    for path in PATHS:
        texts, data = pq.read_table(path)["text"].to_pylist(), path.read_bytes()
        chapters = sum(text.startswith("Jane Austen, ") for text in texts)
        sizes = [len(texts) - chapters, chapters, sum(map(len, texts)), len("".join(texts).encode()), len(data)]
        assert rows[path.name] == (sizes, hashlib.sha256(data).hexdigest()), path.name
