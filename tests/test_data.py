"""Shards are refused by name when they are not whole; the loader loses, repeats and hides nothing."""

import itertools
import json
import queue
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SECONDS = 20  # a hang is a failure: nothing here takes a second


def write(path, texts, **options):
    """A shard of texts; row groups of 5 rows, unless `options` say otherwise."""
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **({"row_group_size": 5} | options))
    return path


def within(call, seconds=SECONDS):
    """call() or the exception that it raises; a failure if it takes longer than `seconds`."""
    box = queue.Queue()

    def target():
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=target, daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"hangs: no answer within {seconds} s")
    if error is not None:
        raise error
    return value


def take(loader, count):
    """The next `count` batches, as pairs of NumPy arrays."""
    return within(lambda: [tuple(map(np.asarray, next(loader))) for _ in range(count)])


def documents(seed, count, low=1, high=60):
    """`count` seeded documents of a few words, with what is hard about text in some of them."""
    rng = random.Random(seed)
    words = ["the", "President", " of", "1862", "\n\n", "naïve", "日本語", "🙂", "<|bos|>", "<|output_end|>", "  ", "x"]
    return [" ".join(rng.choices(words, k=rng.randint(low, high))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(nb, root):
    return nb.load_tokenizer(root / "data" / "embedded" / "tokenizer")


def reference(nb, tokenizer, shards, epochs):
    """The stream of tokens, written down directly: BOS and the document, one after the other, shard by shard."""
    bos, stream = tokenizer.encode_single_token("<|bos|>"), []
    for text in itertools.chain(*shards * epochs):
        stream.append(bos)
        for i in range(0, len(text), nb.PIECE_CHARS):
            stream += tokenizer.encode(text[i : i + nb.PIECE_CHARS], disallowed_special=())
    return np.array(stream)


@pytest.fixture
def three(tmp_path):
    """(fetchers, texts) of three small training shards, of different lengths."""
    texts = [documents(0, 23), documents(1, 1), documents(2, 12)]
    paths = [write(tmp_path / f"shard_{i:05d}.parquet", part) for i, part in enumerate(texts)]
    return [lambda path=path: path for path in paths], texts


def small(nb, B, T, rows=-1):
    """A Config of rows of T tokens, B a microbatch, `rows` a step."""
    return nb.Config.demo().replace(seq_len=T, device_batch_size=B, total_batch_size=rows if rows == -1 else rows * T)


# ---- shards


def folder_config(nb, folder, **changes):
    return nb.Config.demo().replace(**{"dataset": str(folder)} | changes)


@pytest.mark.parametrize("num_shards", [1, 2, 4, -1])
def test_the_last_shard_validates_whatever_num_shards_is(nb, tmp_path, num_shards):
    names = [f"shard_{i:05d}.parquet" for i in (3, 0, 11, 2, 7)]
    for name in names:
        write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("not a shard")
    train, validation = nb.list_shards(folder_config(nb, tmp_path, num_shards=num_shards))
    assert [fetch().name for fetch in train] == sorted(names)[:4][: None if num_shards == -1 else num_shards]
    assert validation() == tmp_path / "shard_00011.parquet"


def test_hub_datasets_pin_their_last_shard(nb):
    """Listing downloads nothing."""
    for dataset, count in {"karpathy/fineweb-edu-100b-shuffle": 1823, "karpathy/climbmix-400b-shuffle": 6543}.items():
        for num_shards in (1, 50, -1):
            train, validation = nb.list_shards(nb.Config(dataset=dataset, num_shards=num_shards))
            assert len(train) == (count - 1 if num_shards == -1 else num_shards)
            assert train[0].args == (dataset, "shard_00000.parquet")
            assert validation.args == (dataset, f"shard_{count - 1:05d}.parquet")


def test_embedded_shards_are_whole(nb):
    train, validation = nb.list_shards(nb.Config.demo())
    names = [nb.check_shard(fetch()).name for fetch in (*train, validation)]
    assert names == [f"shard_0000{i}.parquet" for i in range(5)]


def test_list_shards_refuses(nb, tmp_path):
    def message(**changes):
        with pytest.raises(nb.InputError) as error:
            nb.list_shards(folder_config(nb, tmp_path, **changes))
        return str(error.value)

    assert "0 parquet shards" in message() and str(tmp_path) in message()
    write(tmp_path / "a.parquet", ["a"])
    assert "1 parquet shards" in message() and "at least two" in message()
    write(tmp_path / "b.parquet", ["b"])
    assert len(nb.list_shards(folder_config(nb, tmp_path, num_shards=2))[0]) == 1  # at most so many
    for dataset in ("/no/such/folder", "./corpus", "corpus", "me/", ""):
        said = message(dataset=dataset)
        assert repr(dataset) in said and "'embedded', a folder of parquet shards" in said and "owner/name" in said


def damage_a_page(path):
    data = bytearray(write(path, documents(5, 99), compression="zstd").read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(data)


GOOD = pa.array(["one", "two"])
NULL, EMPTY = (["x"] * 7 + [bad] + ["x"] * 5 for bad in (None, ""))  # row 7 is in the second row group

# name: (what makes the shard, words of the message)
BAD_SHARDS = {
    "missing": (lambda path: None, ["no such shard"]),
    "empty file": (lambda path: path.write_bytes(b""), ["not a whole parquet file"]),
    "not parquet": (lambda path: path.write_bytes(b"<html>404</html>"), ["not a whole parquet file"]),
    "truncated": (lambda path: path.write_bytes(write(path, GOOD).read_bytes()[:-20]), ["delete it and get it again"]),
    "damaged page": (damage_a_page, ["delete it and get it again"]),  # its footer is whole
    "no text": (lambda path: pq.write_table(pa.table({"id": GOOD, "body": GOOD}), path), ["`text`", "id, body"]),
    "integers": (lambda path: pq.write_table(pa.table({"text": [1, 2]}), path), ["`text`", "int64"]),
    "bytes": (lambda path: pq.write_table(pa.table({"text": [b"a", b"b"]}), path), ["`text`", "binary"]),
    "no rows": (lambda path: write(path, []), ["no documents"]),
    "null": (lambda path: write(path, NULL), ["row 7", "null or empty"]),
    "empty": (lambda path: write(path, EMPTY), ["row 7", "null or empty"]),
    # What the footer does not tell must end at the row: no statistics, or no minimum, as above some KB of text.
    "null, no statistics": (lambda path: write(path, NULL, write_statistics=False), ["row 7", "null or empty"]),
    "empty, no statistics": (lambda path: write(path, EMPTY, write_statistics=False), ["row 7", "null or empty"]),
    "empty among long": (lambda path: write(path, ["x" * 10_000] * 6 + [""]), ["row 6", "null or empty"]),
}


@pytest.mark.parametrize(("make", "words"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_shard_is_refused_by_name(nb, tmp_path, make, words):
    """By check_shard where the footer tells; else by read_documents, at the row."""
    path = tmp_path / "shard_00007.parquet"
    make(path)
    with pytest.raises(nb.InputError) as error:
        list(nb.read_documents(nb.check_shard(path)))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_a_footer_that_lies_about_its_rows(nb, tmp_path):
    """Each byte that may be the 40 rows of a row group says 41, in turn: refused, or it was another number."""
    path, said = write(tmp_path / "shard.parquet", documents(3, 120), row_group_size=40), []
    whole = path.read_bytes()
    for at in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
        if whole[at] == 2 * 40:  # thrift doubles integers
            path.write_bytes(whole[:at] + bytes([2 * 41]) + whole[at + 1 :])
            try:
                list(nb.read_documents(nb.check_shard(path)))
            except nb.InputError as error:
                said.append(str(error))
    assert any("row group 0 has 40 rows, not 41" in words for words in said), said


def test_statistics_tell_null_and_empty_before_a_token_is_used(nb, tmp_path):
    """With statistics, check_shard itself refuses; a good shard costs it nothing but the footer."""
    good = write(tmp_path / "good.parquet", documents(3, 12))
    assert nb.check_shard(good) == good
    for i, bad in enumerate((None, "")):
        with pytest.raises(nb.InputError, match="row 7"):
            nb.check_shard(write(tmp_path / f"{i}.parquet", ["x"] * 7 + [bad]))


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 11, 12, 99])
def test_read_documents_from_a_row(nb, tmp_path, start):
    texts = documents(4, 12)
    path = write(tmp_path / "a.parquet", texts)
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


# ---- the loader


@pytest.mark.parametrize(("B", "T", "rows"), [(1, 2, -1), (1, 7, -1), (3, 5, -1), (4, 64, -1), (2, 9, 6), (2, 700, -1)])
def test_the_stream_is_every_token_once(nb, tokenizer, three, B, T, rows):
    """Over two epochs and more: inputs are the reference stream, cut into rows; targets are it, one token later."""
    fetchers, texts = three
    stream = reference(nb, tokenizer, texts, 3)
    n = B * T if rows == -1 else rows * T
    count = min(2 * len(stream) // 3 // n + 2, 400)
    with nb.PrefetchDataLoader(small(nb, B, T, rows), tokenizer, fetchers) as loader:
        batches = take(loader, count)
    tokens, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    assert tokens.shape == targets.shape == (count * n // T, T)
    np.testing.assert_array_equal(tokens.ravel(), stream[: count * n])
    np.testing.assert_array_equal(targets.ravel(), stream[1 : count * n + 1])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_documents_in_pieces_and_any_number_of_threads(nb, tokenizer, three, monkeypatch, threads):
    monkeypatch.setattr(nb, "PIECE_CHARS", 10)
    fetchers, texts = three
    stream = reference(nb, tokenizer, texts, 2)
    with nb.PrefetchDataLoader(small(nb, 2, 32), tokenizer, fetchers, threads=threads) as loader:
        tokens = np.concatenate([tokens.ravel() for tokens, _ in take(loader, len(stream) // 64)])
    np.testing.assert_array_equal(tokens, stream[: len(tokens)])


def test_resume_continues_with_the_next_token(nb, tokenizer, three):
    """After each of the first batches, and over the end of an epoch: what a saved position gives is what came next.
    Read-ahead must not count: the position is that of the batch that was taken, not of what threads have encoded."""
    fetchers, texts = three
    config = small(nb, 2, 16)
    per_epoch = len(reference(nb, tokenizer, texts, 1)) // 32
    # 15 batches around the start, 15 around the end of the first epoch
    points = [*range(15), *range(per_epoch - 8, per_epoch + 7)]
    loader = nb.PrefetchDataLoader(config, tokenizer, fetchers)
    batches, states = [], []
    for _ in range(points[-1] + 4):
        states.append(json.dumps(loader.state_dict()))
        batches += take(loader, 1)
    assert json.loads(states[points[-1]])["epoch"] == 1
    for k in points:
        fresh = nb.PrefetchDataLoader(config, tokenizer, fetchers)
        for resumed in (fresh, loader):  # a new process; and a loader that has already read elsewhere
            resumed.load_state_dict(json.loads(states[k]))
            assert json.dumps(resumed.state_dict()) == states[k]
            np.testing.assert_array_equal(take(resumed, 3), batches[k : k + 3], err_msg=f"after {k} batches")
            assert json.dumps(resumed.state_dict()) == states[k + 3]
        fresh.close()
    loader.close()


def test_resume_into_a_long_document(nb, tokenizer, tmp_path):
    """A position hundreds of batches into one document, in a shard of nothing else."""
    texts = [["A House of Representatives. " * 2000]]
    path = write(tmp_path / "a.parquet", texts[0])
    stream, config = reference(nb, tokenizer, texts, 2), small(nb, 1, 50)
    with nb.PrefetchDataLoader(config, tokenizer, [lambda: path]) as loader:
        take(loader, 100)
        state = loader.state_dict()
    with nb.PrefetchDataLoader(config, tokenizer, [lambda: path]) as loader:
        loader.load_state_dict(state)
        [(tokens, targets)] = take(loader, 1)
    np.testing.assert_array_equal(tokens.ravel(), stream[5000:5050])
    np.testing.assert_array_equal(targets.ravel(), stream[5001:5051])


@pytest.mark.parametrize(
    "state",
    [dict(shard=3), dict(shard=0, row=-1), dict(epoch=-1), dict(place=3), dict(row=1.5), dict(row=True), None],
    ids=str,
)
def test_a_wrong_position_is_refused(nb, tokenizer, three, state):
    with nb.PrefetchDataLoader(small(nb, 2, 8), tokenizer, three[0]) as loader:
        with pytest.raises(nb.InputError, match="position"):
            loader.load_state_dict(state)


@pytest.mark.parametrize(("row", "offset"), [(99, 0), (0, 10**6)])
def test_a_position_that_the_shard_does_not_have_is_an_error(nb, tokenizer, three, row, offset):
    """The shards are not those of the checkpoint: going on with the next document would be silent."""
    with nb.PrefetchDataLoader(small(nb, 2, 8), tokenizer, three[0]) as loader, pytest.raises(nb.InputError):
        loader.load_state_dict(dict(epoch=0, shard=0, row=row, offset=offset))
        take(loader, 1)


def test_batches_are_on_the_device(nb, tokenizer, three):
    with nb.PrefetchDataLoader(small(nb, 2, 8, rows=4), tokenizer, three[0]) as loader:
        for batch in within(lambda: next(loader)):
            assert isinstance(batch, jax.Array) and batch.dtype == jnp.int32 and batch.shape == (4, 8)
            assert batch.devices() == {jax.devices()[0]} and not batch.weak_type


# ---- the loader's threads


def test_an_error_in_a_thread_is_raised_by_next(nb, tokenizer, three):
    """The very exception of the fetcher, after the tokens before it, and as often as one asks."""
    error = OSError("the disk is gone")

    def broken():
        raise error

    fetchers, texts = three
    stream = reference(nb, tokenizer, [texts[0]], 1)
    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [fetchers[0], broken], threads=1) as loader:
        np.testing.assert_array_equal(take(loader, 1)[0][0].ravel(), stream[:8])
        with pytest.raises(OSError) as raised:
            take(loader, 1000)
        assert raised.value is error
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                take(loader, 1)


def test_an_error_at_the_first_shard(nb, tokenizer, tmp_path):
    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [lambda: tmp_path / "none.parquet"]) as loader:
        with pytest.raises(nb.InputError, match=r"none\.parquet: there is no such shard"):
            take(loader, 1)


@pytest.mark.parametrize("statistics", [True, False])
def test_a_bad_second_shard_is_named(nb, tokenizer, three, tmp_path, statistics):
    bad = write(tmp_path / "bad.parquet", ["x"] * 3 + [None], write_statistics=statistics)
    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [three[0][0], lambda: bad], threads=1) as loader:
        take(loader, 1)
        for _ in range(2):
            with pytest.raises(nb.InputError, match=r"bad\.parquet: the text of row 3 is null or empty"):
                take(loader, 1000)


def test_a_tokenizer_that_fails(nb, three):
    """An exception in the threads that encode, too."""

    class Broken:
        def encode_to_numpy(self, *args, **kwargs):
            raise RuntimeError("cannot encode")

    with nb.PrefetchDataLoader(small(nb, 1, 8), Broken(), three[0]) as loader:
        with pytest.raises(RuntimeError, match="cannot encode"):
            take(loader, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_training_starts_with_the_first_shard(nb, tokenizer, three, threads):
    """The second is fetched ahead, while the first is read, and keeps nobody waiting while it is not there."""
    fetchers, _ = three
    asked, there = threading.Event(), threading.Event()

    def slow():
        asked.set()
        there.wait(SECONDS)
        return fetchers[1]()

    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [fetchers[0], slow, fetchers[2]], threads=threads) as loader:
        first = take(loader, 3)
        assert asked.wait(SECONDS) and len(first) == 3
        there.set()
        take(loader, 100)


def test_closing_early_leaks_no_thread(nb, tokenizer, three):
    """50 loaders, closed before, during and after the first batches, and closed twice."""
    before = set(threading.enumerate())
    for i in range(50):
        with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, three[0], depth=1000) as loader:
            if i % 3:
                take(loader, i % 3)
        loader.close()
    deadline = time.monotonic() + SECONDS
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"{len(left)} threads are left: {left}"
        time.sleep(0.01)


def test_close_does_not_wait_for_a_full_queue(nb, tokenizer, three):
    """The thread that packs batches waits for room; close() must wake it, or every test and error would be slow."""
    loader = nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, three[0], depth=1)
    take(loader, 1)
    within(loader.close, 2)
    assert not loader.thread.is_alive()


def test_next_after_close_does_not_hang(nb, tokenizer, three):
    loader = nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, three[0], depth=1)
    loader.close()
    with pytest.raises((RuntimeError, ValueError, StopIteration)):
        for _ in range(3):  # batches that were ready may still come
            within(lambda: next(loader), 2)


def test_wait_seconds(nb, tokenizer, three):
    """The time that the training loop has waited for data, and not the time that it took itself."""

    def slow():
        time.sleep(0.3)
        return three[0][0]()

    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [slow]) as loader:
        assert loader.wait_seconds == 0
        take(loader, 1)
        assert 0.2 < loader.wait_seconds < SECONDS
        time.sleep(0.3)
        waited = loader.wait_seconds
        take(loader, 1)
        assert loader.wait_seconds - waited < 0.2  # it was ready
