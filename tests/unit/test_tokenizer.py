"""The tokenizer keeps every byte, its files are exact, and it is found where the Config says."""

import base64
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import EMBEDDED, one_line, shard, write_shard

FILES = ("tokenizer.tiktoken", "tokenizer.json")
FOLDER = EMBEDDED / "tokenizer"


@pytest.fixture(scope="module")
def validation(nb):
    """The documents of the embedded validation shard."""
    return [text for _, text in nb.read_documents(nb.list_shards(nb.Config.demo())[1]())]


@pytest.fixture
def home(nb, tmp_path, monkeypatch):
    """Nothing is found in, or written to, the cache of whoever runs the tests."""
    monkeypatch.setattr(nb, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def texts_of_all_kinds(nb):
    """Source code, odd white space, and a seeded sample of each of Unicode's planes."""
    rng = random.Random(0)
    planes = [
        "".join(chr(c) for c in rng.sample(range(plane << 16, (plane + 1) << 16), 2000) if not 0xD800 <= c < 0xE000)
        for plane in range(17)
    ]
    with open(nb.__file__, encoding="utf-8") as file:
        code = file.read()
    return [code, code.replace("\n", "\r\n"), "\0\t \n\n  \r\n x ", "1234567 3.14", "don't DON'T I'LL", "", *planes]


# ---- the round trip


def test_text_survives(nb, tokenizer, validation):
    for text in [*validation, *texts_of_all_kinds(nb)]:
        bos, *tokens = nb.encode_document(tokenizer, text).tolist()
        assert tokenizer.decode(tokens, errors="strict") == text
        assert bos == tokenizer.encode_single_token("<|bos|>") not in tokens


def test_token_bytes_sum_to_the_length_of_the_text(nb, tokenizer, validation):
    """BOS stands for none: bits per byte divide by this sum."""
    lengths = nb.token_bytes(tokenizer)
    assert lengths.shape == (tokenizer.n_vocab,) and lengths.dtype == np.int32
    for text in [*validation, *texts_of_all_kinds(nb)]:
        assert lengths[nb.encode_document(tokenizer, text)].sum() == len(text.encode())
    assert (lengths[:-9] > 0).all() and not lengths[-9:].any()
    tokenizer = nb.train_tokenizer(["日本語の文 🙂🙂 naïve"] * 9, 275)  # with merges of parts of characters
    lengths = nb.token_bytes(tokenizer)
    assert lengths[nb.encode_document(tokenizer, "日本🙂")].sum() == 10 and lengths.max() > 2


# ---- the files


def test_save_and_load(nb, tokenizer, validation, tmp_path):
    """The same ids, and the same bytes on the disk, however often."""
    nb.save_tokenizer(tokenizer, tmp_path / "new" / "one")
    assert same_files(FOLDER, tmp_path / "new" / "one")
    again = nb.load_tokenizer(tmp_path / "new" / "one")
    nb.save_tokenizer(again, tmp_path / "two")
    assert same_files(FOLDER, tmp_path / "two")
    assert again._special_tokens == tokenizer._special_tokens
    for text in [*validation[:3], *texts_of_all_kinds(nb)]:
        assert again.encode(text, disallowed_special=()) == tokenizer.encode(text, disallowed_special=())


def test_the_files_are_text():
    """tiktoken's own format, and JSON: nothing is pickled."""
    ranks = [line.split(" ") for line in (FOLDER / "tokenizer.tiktoken").read_text("ascii").splitlines()]
    assert [int(rank) for _, rank in ranks] == list(range(4096 - 9))
    assert base64.b64decode(ranks[0][0]) == b"\0" and len({token for token, _ in ranks}) == len(ranks)
    assert set(json.loads((FOLDER / "tokenizer.json").read_text("ascii"))) == {"pattern", "special_tokens"}


RANKS, META = FILES
DAMAGED = {  # what: (file, how)
    "bad base64": (RANKS, lambda text: text.replace("AA== 0", "AA*== 0", 1)),
    "missing rank": (RANKS, lambda text: text.replace("AQ== 1\n", "", 1)),
    "missing last byte": (RANKS, lambda text: text.replace("/w== 255\n", "AAAA 255\n", 1)),
    "duplicate token": (RANKS, lambda text: text.replace("AQ== 1\n", "AA== 1\n", 1)),
    "no rank": (RANKS, lambda text: text.replace(" 300\n", "\n", 1)),
    "truncated": (RANKS, lambda text: text[:-3]),
    "binary": (RANKS, lambda text: b"\x80\x04\xff"),
    "no bos": (META, lambda text: text.replace("<|bos|>", "<|start|>")),
    "no pattern": (META, lambda text: text.replace('"pattern"', '"patern"')),
    "a pattern with holes": (META, lambda text: text.replace("{N}{1,2}", "{N}{9,9}", 1)),
    "no JSON file": (META, lambda text: None),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tokenizer_is_a_clear_error(nb, tmp_path, name, damage):
    """A wrong tokenizer that loads would be worse: the run would be about other text."""
    copy = shutil.copytree(FOLDER, tmp_path / "tokenizer")
    before = (copy / name).read_text()
    after = damage(before)
    assert nb.load_tokenizer(copy).n_vocab == 4096 and after != before
    (copy / name).unlink()
    if after is not None:
        (copy / name).write_bytes(after if isinstance(after, bytes) else after.encode())
    with pytest.raises(nb.InputError) as error:
        nb.load_tokenizer(copy)
    assert one_line(str(error.value), str(copy))


# ---- training


def test_the_embedded_tokenizer_is_that_of_the_training_shards(nb, tokenizer, tmp_path):
    """4,096 tokens, and training anew gives the same bytes: on any machine, with any number of threads."""
    assert tokenizer.n_vocab == 4096 == nb.Config.demo().vocab_size
    ids = [tokenizer.encode_single_token(token) for token in nb.SPECIAL_TOKENS]
    assert ids == list(range(4096 - 9, 4096)) and nb.SPECIAL_TOKENS[0] == "<|bos|>"
    shards, _ = nb.list_shards(nb.Config.demo())
    texts = (text for fetch in shards for _, text in nb.read_documents(fetch()))
    nb.save_tokenizer(nb.train_tokenizer(texts, 4096), tmp_path)
    assert same_files(FOLDER, tmp_path)


def test_training_agrees_with_hugging_face(nb, validation):
    """Token for token with `tokenizers`, another implementation of BPE, on the same pieces.

    The agreement has to be exact, in the order too: a token's id is its place in this order. Many pairs are equally
    frequent, and both take the one with the smaller ids. For the ids to compare alike the text is ASCII: Hugging Face's
    alphabet, the characters of the text in order, is then in the order of the bytes.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    texts = [text for text in validation if text.isascii()][:4]
    alphabet = len(set("".join(texts)))
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.Split(Regex(nb.SPLIT_PATTERN), "isolated")
    oracle.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=alphabet + 800, show_progress=False))
    want = [token.encode() for token, i in sorted(oracle.get_vocab().items(), key=lambda x: x[1]) if i >= alphabet]

    ranks = nb.train_tokenizer(texts, 256 + 800 + 9, doc_chars=10**9)._mergeable_ranks
    assert [ranks[bytes([b])] for b in range(256)] == list(range(256))
    assert sorted(ranks, key=ranks.get)[256:] == want and len(want) == 800


def test_how_much_text_is_read(nb):
    """doc_chars of each document, max_chars of all; then the stream is left alone, however long it is."""
    read = []

    def endless():
        while len(read) < 100:  # as good as endless, and a failure ends
            read.append(1)
            yield "ab" * 3 + "cd" * 100

    ranks = nb.train_tokenizer(endless(), 256 + 1 + 9, max_chars=50, doc_chars=6)._mergeable_ranks
    assert len(read) == 9  # 8 documents of 6 characters, and 2 characters of the next
    assert b"ab" in ranks and b"cd" not in ranks


def test_training_refuses(nb):
    for vocab_size in (1, 264):
        with pytest.raises(nb.InputError, match=f"vocab_size={vocab_size}: must be at least 265"):
            nb.train_tokenizer(["text"], vocab_size)
    assert nb.train_tokenizer(["text"], 265).n_vocab == 265
    for texts in (["too little text"], []):
        with pytest.raises(
            nb.InputError, match="vocab_size=4096: this text yields only (2..) tokens; set vocab_size=\\1, or"
        ):
            nb.train_tokenizer(texts, 4096)


# ---- where it is found


def corpus(folder, seed=0):
    """A folder of one shard, of seeded words: its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(2000))
    return write_shard(folder / "a.parquet", [text])


def test_a_tokenizer_beside_the_shards_comes_first(nb, tmp_path, home):
    first = corpus(tmp_path / "corpus")
    shutil.copytree(FOLDER, tmp_path / "corpus" / "tokenizer")
    config = nb.Config.demo().replace(dataset=str(first.parent), hf_repo_id="me/none")
    assert nb.find_tokenizer(config, shard(nb, first)).n_vocab == 4096 and not home.exists()


def test_a_tokenizer_larger_than_the_model_is_refused(nb, home):
    config = nb.Config.demo().replace(vocab_size=4095)
    with pytest.raises(nb.InputError, match="vocab_size=4095: .*embedded has 4096 tokens; set vocab_size"):
        nb.find_tokenizer(config, shard(nb, EMBEDDED / "shard_00000.parquet"))
    assert (
        nb.find_tokenizer(config.replace(vocab_size=5000), shard(nb, EMBEDDED / "shard_00000.parquet")).n_vocab == 4096
    )


def test_a_tokenizer_is_trained_once(nb, tmp_path, home, capsys):
    """On the first shard, for this size of vocabulary, and kept; not beside the shards."""
    first = corpus(tmp_path / "corpus")
    config = nb.Config.demo().replace(dataset=str(first.parent), vocab_size=300)
    one, again = nb.find_tokenizer(config, shard(nb, first)), nb.find_tokenizer(config, shard(nb, first))
    assert one.n_vocab == 300 and one._mergeable_ranks == again._mergeable_ranks
    assert capsys.readouterr().out == "training a tokenizer of 300 tokens on a.parquet\n"
    assert nb.find_tokenizer(config.replace(vocab_size=310), shard(nb, first)).n_vocab == 310
    assert not (first.parent / "tokenizer").exists()


def test_a_tokenizer_is_not_that_of_another_folder(nb, tmp_path, home, monkeypatch):
    """Two projects, each with a folder `corpus`; names alike; shards that are links into one store, as `hf download`
    leaves them. A folder has one name, whether it is named from / or from here."""
    folders = [tmp_path / name for name in ("one/corpus", "two/corpus", "one--corpus", f"long/{'x' * 250}")]
    for seed, folder in enumerate(folders):
        store = corpus(tmp_path / "blobs" / str(seed), seed)
        folder.mkdir(parents=True)
        (folder / "a.parquet").symlink_to(store)
    names = set()
    for folder in folders:
        monkeypatch.chdir(folder.parent)
        for spelling in (folder, Path(folder.name), Path(".") / ".." / folder.parent.name / folder.name):
            config = nb.Config.demo().replace(dataset=str(spelling), vocab_size=300)
            names.add(nb.tokenizer_folders(config)[-1])
        trained = nb.find_tokenizer(config, shard(nb, spelling / "a.parquet"))
        assert trained._mergeable_ranks == nb.find_tokenizer(config, shard(nb, folder / "a.parquet"))._mergeable_ranks
    assert len(names) == len(folders) and all(len(name.name) < 70 for name in names)


def test_an_interrupted_save_is_not_taken_for_a_tokenizer(nb, tmp_path, home, monkeypatch):
    """Colab may end at any time: what is half written must not stop the next run."""
    first = corpus(tmp_path / "corpus")
    config = nb.Config.demo().replace(dataset=str(first.parent), vocab_size=300)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nb.json, "dumps", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        nb.find_tokenizer(config, shard(nb, first))
    assert nb.find_tokenizer(config, shard(nb, first)).n_vocab == 300
