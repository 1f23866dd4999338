"""Fetches free English text from Debian packages: a data set of 95 million characters that 02_train.py reads.

    python benchmarks/free_text.py FOLDER
    python 02_train.py --dataset FOLDER

FOLDER gets train-000.parquet, … and validation-000.parquet: a document a row, column `text`, zstd. Needs Debian with
package lists (`apt-get update`), 500 MB in the temporary folder and a minute, but no root. Prints the packages with
their versions, licences, documents and characters.

A document is a chapter of a Bible, the commentary on a psalm, a section of the Anarchist FAQ, a page of the kernel's
documentation, or a run of entries of the dictionary. Longer ones are split at the ends of paragraphs. The hash of a
document decides its place and whether it validates, so the same packages give the same files. Equal documents are kept
once. Equal passages stay: 2% of the words that validate are in runs of 25 words that training has too.

The text is under the licences of its packages, so the data set as a whole is under the GPL, version 2.
"""

import argparse
import gzip
import hashlib
import html
import re
import struct
import subprocess
import tempfile
import unicodedata
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LONGEST, SHORTEST = 20_000, 200  # characters of a document
SHARD = 16_000_000  # characters of a training file

# ---- text without markup

# Elements that go with what they hold: of HTML, of Sphinx (contents, languages, ¶), of OSIS (footnotes, verse marks).
DROPPED = re.compile(
    r"<!--.*?-->|<(head|script|style|note)\b.*?</\1>|<a class=\"headerlink\".*?</a>|<li class=\"toctree-.*?</a>"
    r"|<div class=\"language-selection\">.*?</div>|<div type=\"x-milestone\"[^>]*>",
    re.DOTALL,
)
ITEM = r"(?:td|th|li|dd)\b"
BREAKS = [  # a tag → what it becomes
    (rf"(<{ITEM}[^>]*>)\s*<p\b[^>]*>", r"\1"),
    (rf"</p>\s*(</{ITEM})", r"\1"),
    (r"</?(?:p|div|section|h\d|dl|table|[uo]l|blockquote|title|list|lg|hr)\b[^>]*>", "\n\n"),
    (r"<li\b[^>]*>", "\n- "),
    (r"<(?:br|tr|dt|dd|lb|item|l (?=[^>]*sID))\b[^>]*>", "\n"),
    (r"<t[dh]\b[^>]*>", " | "),
    (r"<[^>]*>", ""),
    (r" {2,}", " "),
    (r" *\n *", "\n"),
]


def strip_markup(markup):
    """Returns the text of HTML or OSIS: paragraphs between empty lines, lines of <pre> as they are."""
    parts = re.split(r"<pre\b[^>]*>(.*?)</pre>", DROPPED.sub("", markup), flags=re.DOTALL)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = "\n\n" + re.sub(r"<[^>]*>", "", part).expandtabs() + "\n\n"
            continue
        part = re.sub(r"\s+", " ", part)
        for tag, text in BREAKS:
            part = re.sub(tag, text, part)
        parts[i] = part
    return tidy(html.unescape("".join(parts)))


def tidy(text):
    """Returns text without control characters, spaces at the ends of lines, and more than one empty line in a row."""
    text = re.sub(r"[^\S\n]", " ", unicodedata.normalize("NFC", text))
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\ufeff]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", text, flags=re.MULTILINE)).strip("\n")


# The dictionary is in ASCII: [=a] is ā, ["o] is ö, [ae] is æ.
MARKS = {"=": "\u0304", "-": "\u0304", "^": "\u0302", "'": "\u0301", "`": "\u0300", '"': "\u0308", "~": "\u0303"}
MARKS |= {".": "\u0307", ",": "\u0327", "*": "\u030c"}
LETTERS = {"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aum": "ä", "imac": "ī", "eth": "ð", "thorn": "þ", "yogh": "ȝ"}
LETTERS |= {"ng": "ŋ", "root": "√", "deg": "°", "sect": "§", "asl": "ā", "pounds": "£", "th": "th", "add": "ḍ"}
SYLLABLES = r" ?\\[^\\]*\\(?: ?\([^()]*\))?"  # \Read"y\ (r[e^]d"[y^])
PRONOUNCED = r" ?\((?!\")(?=[^\s()]*[\"?`^*])[^\s()]*\)"
SOURCE = re.compile(r"(?: AS)?\s*\[[^][]*(?:Webster|WordNet|PJC|Century Dict)[^][]*\](?: [^.\n]{1,40}\Z)?")


def strip_entry(entry):
    """Returns an entry of the dictionary without pronunciation, references and sources: a line a paragraph."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in entry.strip().split("\n\n")]
    paragraphs[0] = re.sub(r" +(?=[ ,;])", "", re.sub(SYLLABLES, " ", paragraphs[0]))
    text = re.sub(PRONOUNCED, "", SOURCE.sub("", "\n".join(paragraphs)))
    text = re.sub(r"\[([-=^'`\"~.,*])([A-Za-z]{1,2})\]", lambda m: m[2] + MARKS[m[1]], text)
    text = re.sub(r"\[(\w+)\]", lambda m: LETTERS.get(m[1], m[0]), text)
    text = re.sub(r"\{([^{}]*)\}", lambda m: re.sub('[*"`]', "", m[1]), text)  # {A*live"ly} → Alively
    return tidy(re.sub(r" \?+\.?(?=[ ,;\]])|[{}]", "", text))  # ? stands for a word in Greek


def split_long(text, limit=LONGEST):
    """Returns the pieces of text, of about equal length and at most limit characters, which end where paragraphs do.

    A paragraph that is too long ends at the end of a line, a sentence or a word."""
    pieces, start = [], 0
    while len(text) - start > limit:
        goal = (len(text) - start) // -(-(len(text) - start) // limit)
        cuts = (text.rfind(end, start + goal // 2, start + goal) for end in ("\n\n", "\n", ". ", " "))
        cut = next((cut for cut in cuts if cut > 0), start + goal - 1) + 1
        pieces.append(text[start:cut])
        start = cut
    return [piece.strip("\n ") for piece in [*pieces, text[start:]]]


def hold_out(documents, share=0.01, least=1_000_000):
    """Returns (training, validation documents): different ones in the order of their hashes, which is random.

    The first validate: so many that they are this share of the documents and have at least so many characters."""
    ordered = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    count, size = 0, 0
    while count < len(ordered) and (count < share * len(ordered) or size < least):
        size += len(ordered[count])
        count += 1
    return ordered[count:], ordered[:count]


# ---- packages


def sword(folder):
    """Yields the chapters of a SWORD module: blocks of zlib, whose (start, bytes, …) are in another file."""
    for index in sorted(folder.glob("usr/share/sword/modules/**/*.[bc]zs"), reverse=True):  # the Old Testament first
        data = index.with_suffix(index.suffix[:2] + "zz").read_bytes()
        blocks = [data[start : start + size] for start, size, _ in struct.iter_unpack("<III", index.read_bytes())]
        for chapter in re.split("<chapter eID[^>]*>", b"".join(map(zlib.decompress, blocks)).decode()):
            yield strip_markup(chapter)


def king_james(folder):
    """Yields the chapters of the Bible: lines 'Ge1:1 In the beginning …', by compress(1), which gzip reads."""
    data = (folder / "usr/lib/bible.data").read_bytes()
    lines = run("gzip", "-dc", stdin=data[data.index(b"\x1f\x9d") :]).decode().splitlines()
    chapters = {}
    for chapter, verse in re.findall(r"^(\w+):\d+ (.*)$", "\n".join(lines), re.MULTILINE):
        chapters.setdefault(chapter, []).append(verse)
    yield from map("\n".join, chapters.values())


def anarchism(folder):
    """Yields the sections of the FAQ, but not lists of links."""
    for page in sorted(folder.glob("usr/share/doc/anarchism/html/*.html")):
        if "links" not in page.name:
            yield from map(strip_markup, re.split("(?=<h2)", page.read_text(errors="replace")))


def linux(folder):
    """Yields the pages of the kernel's documentation in English, but not the index and the lists of maintainers."""
    for page in sorted(folder.glob("usr/share/doc/linux-doc*/html/**/*.html")):
        if not re.search("/translations/|/(genindex|search|maintainers).html", str(page)):
            body = page.read_text(errors="replace").partition('role="main">')[2]
            yield strip_markup(body.partition('<div class="footer"')[0])


def dictionary(folder):
    """Yields all entries of the dictionary, in the order of the alphabet, as one text."""
    text = gzip.decompress((folder / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("cp1252")
    entries = re.split(r"\n\n(?=\S[^\n]*\\)", text)[1:]  # the first is about the dictionary
    yield "\n\n".join(map(strip_entry, entries))


LINUX = "linux-doc-[0-9]+[.][0-9]+"  # the newest
PACKAGES = {
    "sword-comm-tdavid": ("public domain", sword),
    "sword-text-web": ("public domain", sword),
    "bible-kjv-text": ("public domain", king_james),
    "anarchism": ("GPL-2+", anarchism),
    LINUX: ("GPL-2", linux),
    "dict-gcide": ("GPL-2+", dictionary),
}


def run(*command, stdin=None, **options):
    """Returns what a command prints. Raises SystemExit with its last line where it fails."""
    try:
        return subprocess.run(command, input=stdin, check=True, capture_output=True, **options).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", b"") or str(error).encode()).decode().strip().splitlines()[-1]
        raise SystemExit(f"{' '.join(command)} failed ({reason}): use Debian, and apt-get update as root") from None


def fetch(package, folder):
    """Downloads a package and unpacks it into folder. Returns (name, version)."""
    if package == LINUX:
        names = run("apt-cache", "search", "--names-only", f"^{LINUX}$").decode().split("\n")[:-1] or [package]
        package = max((name.split()[0] for name in names), key=lambda name: [int(x) for x in re.findall(r"\d+", name)])
    run("apt-get", "download", package, cwd=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), str(folder))
    return package, run("dpkg-deb", "-f", str(archive), "Version").decode().strip()


# ---- the data set


def write(folder, name, documents):
    """Writes documents as folder/name-000.parquet, …, of about SHARD characters."""
    shards, size = [[]], 0
    for text in documents:
        if size > SHARD:
            shards, size = [*shards, []], 0
        shards[-1].append(text)
        size += len(text)
    for i, texts in enumerate(shards):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"{name}-{i:03}.parquet", compression="zstd", row_group_size=500)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    folder = parser.parse_args().folder
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    row, documents = "{:20} {:22} {:14} {:>9} {:>12}".format, {}
    print(row("package", "version", "licence", "documents", "characters"))
    for package, (licence, read) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as unpacked:
            name, version = fetch(package, Path(unpacked))
            pieces = [piece for text in read(Path(unpacked)) for piece in split_long(text)]
        new = dict.fromkeys(piece for piece in pieces if len(piece) >= SHORTEST and piece not in documents)
        documents |= new
        print(row(name, version, licence, f"{len(new):,}", f"{sum(map(len, new)):,}"), flush=True)
    for name, texts in zip(("train", "validation"), hold_out(documents)):
        write(folder, name, texts)
        print(row(name, "", "", f"{len(texts):,}", f"{sum(map(len, texts)):,}"))


if __name__ == "__main__":
    main()
