"""The free text of Debian packages, without a network: markup stripped, long documents split, some held out."""

import struct
import zlib

import pyarrow.parquet as pq
import pytest

from benchmarks import free_text

PAGE = """<head><title>no</title></head><!-- no --><h1>Spin&nbsp;locks<a class="headerlink" href="#">¶</a></h1>
<p>Take the <code>lock</code>,
then  <b>leave</b> &lt;it&gt;.</p><ul><li><p>one</p></li><li>two</li></ul>
<table><tr><td>a</td><td><p>b</p></td></tr></table><pre>if (<span>x</span>)

\treturn;  </pre>"""
CHAPTER = """<chapter osisID="Ps.1" sID="a"/><title>A Psalm</title><lg sID="b"/><l sID="c"/><w lemma="x">He</w>
is<note>or, <rdg>was</rdg></note> my<l eID="c"/> <l sID="d"/>rock. <l eID="d"/><lg eID="b"/><div sID="p1"/>Selah."""
ENTRY = r"""Larine \La"rine\ (l[=a]"r[i^]n), a.; pl. {Larines} (-r[i^]nz). [OE. l[ae]r, Gr. ?.]
   (Zool.)
   Of the Gull family ({Larid[ae]}); as, caf['e]. [R.]
   [1913 Webster]

         Full fathom five
         thy father lies.                    --Shak.
   [1913 Webster + PJC] Lark wing"""


def test_html():
    text = "Spin locks\n\nTake the lock, then leave <it>.\n\n- one\n- two\n\n| a | b\n\nif (x)\n\n        return;"
    assert free_text.strip_markup(PAGE) == text


def test_osis():
    assert free_text.strip_markup(CHAPTER) == "A Psalm\n\nHe is my\nrock.\n\nSelah."


def test_entry():
    lines = free_text.strip_entry(ENTRY).split("\n")
    assert lines == [
        "Larine, a.; pl. Larines. [OE. lær, Gr.] (Zool.) Of the Gull family (Laridæ); as, café. [R.]",
        "Full fathom five thy father lies. --Shak.",
    ]


def test_sword_module(tmp_path):
    """Blocks of zlib, and the chapters that cross them."""
    folder = tmp_path / "usr/share/sword/modules/texts"
    folder.mkdir(parents=True)
    blocks = [zlib.compress(part) for part in (b"One <chapter eID='1'/>Tw", b"o <chapter eID='2'/>")]
    (folder / "ot.bzz").write_bytes(b"".join(blocks))
    starts = [0, len(blocks[0])]
    (folder / "ot.bzs").write_bytes(b"".join(struct.pack("<III", s, len(b), 0) for s, b in zip(starts, blocks)))
    assert [text.strip() for text in free_text.sword(tmp_path)] == ["One", "Two", ""]


@pytest.mark.parametrize("end", ["\n\n", "\n", ". ", " ", ""])
def test_long_documents_are_split(end):
    text = end.join(f"{i:04}" + "x" * 40 for i in range(500))
    pieces = free_text.split_long(text, 1000)
    assert max(map(len, pieces)) <= 1000 and min(map(len, pieces)) >= 400
    assert "".join(pieces).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert not end or all(piece.endswith("x" + end.strip()) for piece in pieces[:-1])
    assert free_text.split_long("short", 1000) == ["short"]


def test_held_out_documents_are_others():
    documents = [f"document {i % 900}" for i in range(1000)]
    train, validation = free_text.hold_out(documents, least=0)
    assert len(validation) == 9 and sorted(train + validation) == sorted(set(documents))
    assert (train, validation) == free_text.hold_out(documents[::-1], least=0) and train != sorted(train)
    assert sum(map(len, free_text.hold_out(documents, least=500)[1])) in range(500, 512)


def test_written_documents_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(free_text, "SHARD", 25)
    free_text.write(tmp_path, "train", ["a" * 10, "b" * 20, "c"])
    tables = [pq.read_table(tmp_path / f"train-00{i}.parquet")["text"].to_pylist() for i in (0, 1)]
    assert tables == [["a" * 10, "b" * 20], ["c"]]


def test_a_missing_command_is_one_line():
    with pytest.raises(
        SystemExit, match=r"^no-such-apt x failed \(.*No such file.*\): use Debian, and apt-get update as"
    ):
        free_text.run("no-such-apt", "x")
