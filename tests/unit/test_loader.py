"""The loader loses, repeats and hides no token, goes on where it was, and leaves nothing behind."""

import concurrent.futures
import itertools
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import documents, within, write_shard

SECONDS = 20


def small(nb, B, T, rows=-1):
    """A Config of rows of T tokens, B a microbatch, `rows` a step."""
    return nb.Config.demo().replace(seq_len=T, device_batch_size=B, total_batch_size=rows if rows == -1 else rows * T)


def take(loader, count):
    """(tokens, targets) of the next `count` batches, as pairs of NumPy arrays [rows, T]."""
    batches = within(lambda: [tuple(map(np.asarray, next(loader))) for _ in range(count)])
    return [tuple(x.reshape(-1, x.shape[-1]) for x in batch) for batch in batches]


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
    paths = [write_shard(tmp_path / f"shard_{i:05d}.parquet", part) for i, part in enumerate(texts)]
    return [lambda path=path: path for path in paths], texts


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


@pytest.mark.parametrize("threads", [1, 7])
def test_documents_in_pieces_and_any_number_of_threads(nb, tokenizer, three, monkeypatch, threads):
    monkeypatch.setattr(nb, "PIECE_CHARS", 10)
    fetchers, texts = three
    stream = reference(nb, tokenizer, texts, 2)
    with nb.PrefetchDataLoader(small(nb, 2, 32), tokenizer, fetchers, threads=threads) as loader:
        tokens = np.concatenate([tokens.ravel() for tokens, _ in take(loader, len(stream) // 64)])
    np.testing.assert_array_equal(tokens, stream[: len(tokens)])


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_reads_documents_of_its_own(nb, tokenizer, tmp_path, processes):
    """Rows r with r % processes == process: together they read every document once. Its rows of a step are the same
    share for all; what does not divide is refused."""
    texts = [f"{i} " * (1 + i * 7 % 30) for i in range(60)]
    path, config = write_shard(tmp_path / "shard.parquet", texts), small(nb, 6, 16)
    for process in range(processes):
        want = reference(nb, tokenizer, [texts[process::processes]], 1)
        options = dict(process=process, processes=processes)
        with nb.PrefetchDataLoader(config, tokenizer, [lambda: path], **options) as loader:
            assert loader.shape == (1, 6 // processes, 16)
            batches = take(loader, len(want) // (6 // processes * 16))
        have = np.concatenate([tokens.ravel() for tokens, _ in batches])
        np.testing.assert_array_equal(have, want[: len(have)])
    with pytest.raises(nb.InputError, match="device_batch_size=6: must give each of 4 processes as many sequences"):
        nb.PrefetchDataLoader(config, tokenizer, [lambda: path], process=0, processes=4)


def test_batches_are_on_the_device(nb, tokenizer, three):
    """As train_step takes them: [A, B, T]."""
    with nb.PrefetchDataLoader(small(nb, 2, 8, rows=4), tokenizer, three[0]) as loader:
        for batch in within(lambda: next(loader)):
            assert isinstance(batch, jax.Array) and batch.dtype == jnp.int32 and batch.shape == (2, 2, 8)
            assert batch.devices() == {jax.devices()[0]} and not batch.weak_type


# ---- positions


def test_resume_continues_with_the_next_token(nb, tokenizer, three):
    """After each of the first batches, and over the end of an epoch: what a saved position gives is what came next.
    Read-ahead must not count: the position is that of the batch that was taken, not of what threads have encoded."""
    fetchers, texts = three
    config = small(nb, 2, 16)
    per_epoch = len(reference(nb, tokenizer, texts, 1)) // 32
    points = [*range(12), *range(per_epoch - 5, per_epoch + 5)]
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
    path = write_shard(tmp_path / "a.parquet", texts[0])
    stream, config = reference(nb, tokenizer, texts, 2), small(nb, 1, 50)
    with nb.PrefetchDataLoader(config, tokenizer, [lambda: path]) as loader:
        take(loader, 100)
        state = loader.state_dict()
        loader.load_state_dict(state)
        [(tokens, targets)] = take(loader, 1)
    np.testing.assert_array_equal(tokens.ravel(), stream[5000:5050])
    np.testing.assert_array_equal(targets.ravel(), stream[5001:5051])


@pytest.mark.parametrize(
    "state",
    [dict(shard=3), dict(shard=0, row=-1), dict(place=3), dict(row=1.5), None, dict(row=99), dict(offset=10**6)],
    ids=str,
)
def test_a_wrong_position_is_refused(nb, tokenizer, three, state):
    """At once, or with the first batch where the shards are not those of the checkpoint: going on would be silent."""
    if state and {"row", "offset"} & set(state):
        state = dict(epoch=0, shard=0, row=0, offset=0) | state
    with nb.PrefetchDataLoader(small(nb, 2, 8), tokenizer, three[0]) as loader, pytest.raises(nb.InputError):
        loader.load_state_dict(state)
        take(loader, 1)


def test_another_number_of_processes_restarts_at_the_lowest_row(nb, tokenizer, three, capsys):
    """And says so; the same number goes on where each was."""
    fetchers, texts = three
    places = [dict(epoch=0, shard=0, row=row, offset=2) for row in (4, 7)]
    options = dict(process=1, processes=2)
    with nb.PrefetchDataLoader(small(nb, 2, 8), tokenizer, fetchers, **options) as loader:
        loader.load_state_dict({"processes": places})
        want = nb.encode_document(tokenizer, texts[0][7])[2:]
        np.testing.assert_array_equal(take(loader, 1)[0][0].ravel()[: len(want)], want[:8])
    assert not capsys.readouterr().out
    with nb.PrefetchDataLoader(small(nb, 2, 8), tokenizer, fetchers) as loader:
        loader.load_state_dict({"processes": places})
        stream = reference(nb, tokenizer, [texts[0][4:]], 1)
        np.testing.assert_array_equal(take(loader, 1)[0][0].ravel(), stream[:16])
    assert "resumed by 1 processes after 2" in capsys.readouterr().out


# ---- the three generators


def groups_of(nb, shards, start=(), count=99, **options):
    """The first groups of documents: [[(row, offset, text), …] or "end", …] until the first shard comes again."""
    found = []
    for group in itertools.islice(nb.document_groups(shards, nb.Position(*start), **options), count):
        if group and group[0][0].epoch > 0:
            break
        found.append([(place.row, place.offset, text) for place, text in group] or "end")
    return found


def test_document_groups(nb, three, monkeypatch):
    """Every document once, with its place; groups of GROUP_CHARS, and an empty one at the end of each shard. The offset
    is that of the first document alone; of several processes each takes every n-th row."""
    fetchers, texts = three
    monkeypatch.setattr(nb, "GROUP_CHARS", 300)
    found = groups_of(nb, fetchers)
    parts = " ".join("|" if group == "end" else "x" for group in found).split("|")
    assert len(parts) == 4 and parts[0].count("x") > 1 and not parts[3]
    rows = [row for group in found if group != "end" for row in group]
    assert rows == [(i, 0, text) for part in texts for i, text in enumerate(part)]
    for group in found:
        assert group == "end" or sum(len(text) for *_, text in group[:-1]) < 300
    found = groups_of(nb, fetchers, (0, 0, 21, 5), 2)
    assert found == [[(21, 5, texts[0][21]), (22, 0, texts[0][22])], "end"]
    found = groups_of(nb, fetchers[2:], process=1, processes=3)
    assert [row for group in found if group != "end" for row, *_ in group] == [1, 4, 7, 10]
    for start, options, words in [((0, 1, 1), {}, "row 1"), ((0, 1, 0), dict(processes=2), "2 at least")]:
        with pytest.raises(nb.InputError, match=f"shard_00001.parquet: has 1 documents; .*{words}"):
            groups_of(nb, fetchers, start, **options)


def test_encoded_groups(nb, tokenizer):
    """In order, whoever is first; the first document from its offset on; and nothing is held back at a shard's end."""
    texts = documents(3, 40)
    groups = [[(nb.Position(row=i, offset=3 * (i == 0)), text)] for i, text in enumerate(texts)]
    taken = []

    def source():
        for group in [*groups, []]:
            taken.append(group)
            yield group
        pytest.fail("the next shard was asked for while documents were held back")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        encoded = nb.encoded_groups(tokenizer, source(), pool, 5)
        have = [next(encoded)]
        assert len(taken) == 6
        have += itertools.islice(encoded, len(groups) - 1)
    for i, (((place, tokens),), text) in enumerate(zip(have, texts, strict=True)):
        assert place.row == i
        np.testing.assert_array_equal(tokens, nb.encode_document(tokenizer, text)[3 * (i == 0) :])


def test_packed_batches(nb):
    """All batches that a group completes, in a list; what is left waits; the position is that of the next token."""
    documents = [np.arange(start, stop) for start, stop in ((0, 5), (5, 6), (6, 13), (13, 30))]
    groups = [[(nb.Position(row=i), tokens)] for i, tokens in enumerate(documents)]
    made = list(nb.packed_batches(iter(groups), (2, 1, 3)))
    assert [len(batches) for batches in made] == [2, 2]
    for i, (tokens, targets, place) in enumerate(itertools.chain(*made)):
        assert tokens.shape == targets.shape == (2, 1, 3) and tokens.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(tokens.ravel(), np.arange(6 * i, 6 * i + 6))
        np.testing.assert_array_equal(targets, tokens + 1)
        following = 6 * (i + 1)
        row = next(row for row, tokens in enumerate(documents) if following in tokens)
        assert place == nb.Position(row=row, offset=following - documents[row][0])


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
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                take(loader, 1)


class BrokenTokenizer:
    def encode_to_numpy(self, *args, **kwargs):
        raise RuntimeError("cannot encode")


@pytest.mark.parametrize("what", ["no shard", "a bad second shard", "a tokenizer that fails"])
def test_what_is_wrong_is_named(nb, tokenizer, three, tmp_path, what):
    bad = write_shard(tmp_path / "bad.parquet", ["x"] * 3 + [None])
    shards, encoder, message = {
        "no shard": ([lambda: nb.check_shard(tmp_path / "none.parquet")], tokenizer, r"none\.parquet: cannot be read"),
        "a bad second shard": (
            [three[0][0], lambda: bad],
            tokenizer,
            r"bad\.parquet: the text of row 3 is missing, null",
        ),
        "a tokenizer that fails": (three[0], BrokenTokenizer(), "cannot encode"),
    }[what]
    with nb.PrefetchDataLoader(small(nb, 1, 8), encoder, shards) as loader:
        with pytest.raises((nb.InputError, RuntimeError), match=message):
            take(loader, 1000)


def test_a_shard_that_fails_ahead_of_its_use_is_asked_for_again(nb, tokenizer, three):
    """What fails while another shard is read, and is there when needed, stops nothing."""
    fetchers, texts = three
    tries = []

    def late():
        tries.append(1)
        if len(tries) == 1:
            raise nb.InputError("not there yet")
        return fetchers[1]()

    stream = reference(nb, tokenizer, texts[:2], 1)
    with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, [fetchers[0], late], threads=1, depth=1) as loader:
        batches = take(loader, len(stream) // 8)
    np.testing.assert_array_equal(np.concatenate([tokens.ravel() for tokens, _ in batches]), stream[: len(batches) * 8])


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


def test_closing_early_leaks_nothing(nb, tokenizer, three):
    """40 loaders, closed before, during and after the first batches, and twice: no thread and no file more than before.
    The thread that packs batches waits for room; close() must wake it."""

    def left():
        return threading.active_count(), len(os.listdir("/dev/fd"))

    for i in range(41):
        with nb.PrefetchDataLoader(small(nb, 1, 8), tokenizer, three[0], depth=1 + i % 2 * 1000) as loader:
            if i % 3:
                take(loader, i % 3)
            started = time.monotonic()
        loader.close()
        assert time.monotonic() - started < 2
        if i == 0:
            before = left()
    deadline = time.monotonic() + SECONDS
    while any(now > was for now, was in zip(left(), before, strict=True)):
        assert time.monotonic() < deadline, (before, left(), threading.enumerate())
        time.sleep(0.01)


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
