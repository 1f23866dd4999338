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

from tests.helpers import documents, fetcher, within, write_shard

SECONDS = 20


def small(nb, B, T, A=1):
    """A Config of A microbatches of B rows of T tokens."""
    return nb.Config.demo().replace(seq_len=T, device_batch_size=B, total_batch_size=A * B * T)


@pytest.fixture
def load(nb, tokenizer, three):
    """PrefetchDataLoader of the three shards, 1 row of 8 tokens unless told otherwise."""

    def load(shards=None, *shape, encoder=tokenizer, **options):
        return nb.PrefetchDataLoader(small(nb, *(shape or (1, 8))), encoder, shards or three[0], **options)

    return load


def take(loader, count):
    """[(tokens, targets)] of the next batches, flat NumPy arrays."""
    return within(lambda: [tuple(np.asarray(x).ravel() for x in next(loader)) for _ in range(count)])


def take_tokens(loader, count):
    return np.concatenate([tokens for tokens, _ in take(loader, count)])


def reference(nb, tokenizer, shards, epochs=1):
    """The stream of tokens, written down directly: BOS and the document, one after the other, shard by shard."""
    bos, stream = tokenizer.encode_single_token("<|bos|>"), []
    for text in itertools.chain(*shards * epochs):
        stream.append(bos)
        for i in range(0, len(text), nb.PIECE_CHARS):
            stream += tokenizer.encode(text[i : i + nb.PIECE_CHARS], disallowed_special=())
    return np.array(stream)


@pytest.fixture
def three(nb, tmp_path):
    """(fetchers, texts) of three small training shards, of different lengths."""
    texts = [documents(0, 23), documents(1, 1), documents(2, 12)]
    paths = [write_shard(tmp_path / f"shard_{i:05d}.parquet", part) for i, part in enumerate(texts)]
    return [fetcher(nb, path) for path in paths], texts


@pytest.mark.parametrize("shape", [(1, 2), (1, 7), (3, 5), (4, 64), (2, 9, 3), (2, 700)], ids=str)
def test_the_stream_is_every_token_once(nb, tokenizer, three, load, shape):
    """Over two epochs and more: inputs are the reference stream, cut into rows; targets are it, one token later."""
    stream, n = reference(nb, tokenizer, three[1], 3), np.prod(shape)
    count = min(2 * len(stream) // 3 // n + 2, 400)
    with load(None, *shape) as loader:
        tokens, targets = map(np.concatenate, zip(*take(loader, count), strict=True))
    np.testing.assert_array_equal(tokens, stream[: count * n])
    np.testing.assert_array_equal(targets, stream[1 : count * n + 1])


@pytest.mark.parametrize("threads", [1, 7])
def test_documents_in_pieces_and_any_number_of_threads(nb, tokenizer, three, load, monkeypatch, threads):
    monkeypatch.setattr(nb, "PIECE_CHARS", 10)
    stream = reference(nb, tokenizer, three[1], 2)
    with load(None, 2, 32, threads=threads) as loader:
        tokens = take_tokens(loader, len(stream) // 64)
    np.testing.assert_array_equal(tokens, stream[: len(tokens)])


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_reads_documents_of_its_own(nb, tokenizer, tmp_path, load, processes):
    """Rows r with r % processes == process: together they read every document once. Its rows of a step are the same
    share for all; what does not divide is refused."""
    texts = [f"{i} " * (1 + i * 7 % 30) for i in range(60)]
    path = write_shard(tmp_path / "shard.parquet", texts)
    for process in range(processes):
        want = reference(nb, tokenizer, [texts[process::processes]])
        with load([fetcher(nb, path)], 6, 16, process=process, processes=processes) as loader:
            assert loader.shape == (1, 6 // processes, 16)
            have = take_tokens(loader, len(want) // (6 // processes * 16))
        np.testing.assert_array_equal(have, want[: len(have)])
    with pytest.raises(nb.InputError, match="device_batch_size=6: must give each of 4 processes as many sequences"):
        load([fetcher(nb, path)], 6, 16, process=0, processes=4)


def test_batches_are_on_the_device(load):
    """As train_step takes them: [A, B, T]."""
    with load(None, 2, 8, 3) as loader:
        for batch in within(lambda: next(loader)):
            assert isinstance(batch, jax.Array) and batch.dtype == jnp.int32 and batch.shape == (3, 2, 8)
            assert batch.devices() == {jax.devices()[0]} and not batch.weak_type


# ---- positions


def test_resume_continues_with_the_next_token(nb, tokenizer, three, load):
    """After each of the first batches, and over the end of an epoch: what a saved position gives is what came next.
    Read-ahead must not count: the position is that of the batch that was taken, not of what threads have encoded."""
    per_epoch = len(reference(nb, tokenizer, three[1])) // 32
    points = [*range(12), *range(per_epoch - 5, per_epoch + 5)]
    loader, batches, states = load(None, 2, 16), [], []
    for _ in range(points[-1] + 4):
        states.append(json.dumps(loader.state_dict()))
        batches += take(loader, 1)
    assert json.loads(states[points[-1]])["epoch"] == 1
    for k in points:
        fresh = load(None, 2, 16)
        for resumed in (fresh, loader):  # a new process; and a loader that has already read elsewhere
            resumed.load_state_dict(json.loads(states[k]))
            assert json.dumps(resumed.state_dict()) == states[k]
            np.testing.assert_array_equal(take(resumed, 3), batches[k : k + 3], err_msg=f"after {k} batches")
            assert json.dumps(resumed.state_dict()) == states[k + 3]
        fresh.close()
    loader.close()


def test_resume_into_a_long_document(nb, tokenizer, tmp_path, load):
    """A position hundreds of batches into one document, in a shard of nothing else."""
    texts = ["A House of Representatives. " * 2000]
    path = write_shard(tmp_path / "a.parquet", texts)
    with load([fetcher(nb, path)], 1, 50) as loader:
        take(loader, 100)
        loader.load_state_dict(loader.state_dict())
        np.testing.assert_array_equal(take_tokens(loader, 1), reference(nb, tokenizer, [texts])[5000:5050])


@pytest.mark.parametrize(
    "state",
    [dict(shard=3), dict(shard=0, row=-1), dict(place=3), dict(row=1.5), None, dict(row=99), dict(offset=10**6)],
    ids=str,
)
def test_a_wrong_position_is_refused(nb, load, state):
    """At once, or with the first batch where the shards are not those of the checkpoint: going on would be silent."""
    with load() as loader, pytest.raises(nb.InputError):
        loader.load_state_dict(state)
        take(loader, 1)


def test_another_number_of_processes_restarts_at_the_lowest_row(nb, tokenizer, three, load, capsys):
    """And says so; the same number goes on where each was."""
    texts, places = three[1][0], [dict(epoch=0, shard=0, row=row, offset=1) for row in (4, 7)]
    with load(None, 2, 4, process=1, processes=2) as loader:
        loader.load_state_dict({"processes": places})
        np.testing.assert_array_equal(take_tokens(loader, 1), nb.encode_document(tokenizer, texts[7])[1:5])
    assert not capsys.readouterr().out
    with load(None, 2, 4) as loader:
        loader.load_state_dict({"processes": places})
        np.testing.assert_array_equal(take_tokens(loader, 1), reference(nb, tokenizer, [texts[4:]])[:8])
    assert "resumed by 1 processes after 2" in capsys.readouterr().out


# ---- the three generators


def groups_of(nb, shards, start=(), **options):
    """[[(row, offset, text), …], …] of the groups of documents, until the first shard comes again."""
    groups = nb.document_groups(shards, nb.Position(*start), **options)
    first = itertools.takewhile(lambda group: not group or group[0][0].epoch == 0, groups)
    return [[(place.row, place.offset, text) for place, text in group] for group in first]


def test_document_groups(nb, three, monkeypatch):
    """Every document once, with its place; groups of GROUP_CHARS, and an empty one at the end of each shard. The offset
    is that of the first document alone; of several processes each takes every n-th row."""
    fetchers, texts = three
    monkeypatch.setattr(nb, "GROUP_CHARS", 300)
    found = groups_of(nb, fetchers)
    assert list(itertools.chain(*found)) == [(i, 0, text) for part in texts for i, text in enumerate(part)]
    assert found.count([]) == 3 and found[-1] == [] and len(found[0]) < found.index([])
    assert all(sum(len(text) for *_, text in group[:-1]) < 300 for group in found)
    assert groups_of(nb, fetchers, (0, 0, 21, 5))[:2] == [[(21, 5, texts[0][21]), (22, 0, texts[0][22])], []]
    rows = [row for row, *_ in itertools.chain(*groups_of(nb, fetchers[2:], process=1, processes=3))]
    assert rows == [1, 4, 7, 10]
    for start, options, words in [((0, 1, 1), {}, "row 1"), ((0, 1, 0), dict(processes=2), "each of 2 processes")]:
        with pytest.raises(nb.InputError, match=f"shard_00001.parquet: has no document .*{words}"):
            groups_of(nb, fetchers, start, **options)


def test_encoded_groups(nb, tokenizer):
    """In order, whoever is first; the first document from its offset on; nothing is held back at a shard's end."""
    texts, taken = documents(3, 40), []

    def groups():
        for i, text in enumerate(texts):
            taken.append(i)
            yield [(nb.Position(row=i, offset=int(i == 0)), text)]
        yield []
        pytest.fail("the next shard was asked for while documents were held back")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        encoded = nb.encoded_groups(tokenizer, groups(), pool, 5)
        have = [next(encoded)]
        assert len(taken) == 6
        have += itertools.islice(encoded, len(texts) - 1)
    for i, [(place, tokens)] in enumerate(have):
        assert place.row == i
        np.testing.assert_array_equal(tokens, nb.encode_document(tokenizer, texts[i])[int(i == 0) :])


def test_packed_batches(nb):
    """All batches that a group completes, in a list; what is left waits; the position is that of the next token."""
    ranges = [range(0, 5), range(5, 6), range(6, 13), range(13, 30)]
    made = list(nb.packed_batches(([(nb.Position(row=i), np.array(r))] for i, r in enumerate(ranges)), (2, 1, 3)))
    assert [len(batches) for batches in made] == [2, 2]
    for i, (tokens, targets, place) in enumerate(itertools.chain(*made)):
        assert tokens.shape == targets.shape == (2, 1, 3) and tokens.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(tokens.ravel(), np.arange(6 * i, 6 * i + 6))
        np.testing.assert_array_equal(targets, tokens + 1)
        assert ranges[place.row][place.offset] == 6 * (i + 1)


# ---- the loader's threads


def test_an_error_in_a_thread_is_raised_by_next(nb, tokenizer, three, load):
    """The very exception of the fetcher, after the tokens before it, and as often as one asks."""
    error = OSError("the disk is gone")

    def broken():
        raise error

    with load([three[0][0], broken], threads=1) as loader:
        np.testing.assert_array_equal(take_tokens(loader, 1), reference(nb, tokenizer, three[1])[:8])
        for count in (1000, 1, 1):
            with pytest.raises(OSError) as raised:
                take(loader, count)
            assert raised.value is error


class BrokenTokenizer:
    def encode_to_numpy(self, *args, **kwargs):
        raise RuntimeError("cannot encode")


def test_what_is_wrong_is_named(nb, tokenizer, three, load, tmp_path):
    bad = write_shard(tmp_path / "bad.parquet", ["", None])
    missing = fetcher(nb, tmp_path / "none.parquet")
    for shards, encoder, message in [
        ([missing], tokenizer, r"none\.parquet: cannot be read"),
        ([three[0][0], fetcher(nb, bad)], tokenizer, r"bad\.parquet: none of its 2 rows has a text"),
        (three[0], BrokenTokenizer(), "cannot encode"),
    ]:
        with load(shards, encoder=encoder) as loader, pytest.raises((nb.InputError, RuntimeError), match=message):
            take(loader, 1000)


def test_a_shard_that_fails_ahead_of_its_use_is_asked_for_again(nb, tokenizer, three, load):
    """What fails while another shard is read, and is there when needed, stops nothing."""
    fetchers, texts = three
    tries = []

    def late():
        tries.append(1)
        if len(tries) == 1:
            raise nb.InputError("not there yet")
        return fetchers[1]()

    stream = reference(nb, tokenizer, texts[:2])
    with load([fetchers[0], late], threads=1, depth=1) as loader:
        tokens = take_tokens(loader, len(stream) // 8)
    np.testing.assert_array_equal(tokens, stream[: len(tokens)])


@pytest.mark.parametrize("threads", [1, 2])
def test_training_starts_with_the_first_shard(three, load, threads):
    """The second is fetched ahead, while the first is read, and keeps nobody waiting while it is not there."""
    fetchers, asked, there = three[0], threading.Event(), threading.Event()

    def slow():
        asked.set()
        there.wait(SECONDS)
        return fetchers[1]()

    with load([fetchers[0], slow, fetchers[2]], threads=threads) as loader:
        take(loader, 3)
        assert asked.wait(SECONDS)
        there.set()
        take(loader, 100)


def test_closing_early_leaks_nothing(load):
    """40 loaders, closed before, during and after the first batches, and twice: no thread and no file more than before.
    The thread that packs batches waits for room; close() must wake it."""

    def left():
        return threading.active_count(), len(os.listdir("/dev/fd"))

    for i in range(41):
        with load(depth=1 + i % 2 * 1000) as loader:
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
    with pytest.raises(RuntimeError, match="closed"):
        within(lambda: next(loader), 2)


def test_wait_seconds(three, load):
    """The time that the training loop has waited for data, and not the time that it took itself."""

    def slow():
        time.sleep(0.3)
        return three[0][0]()

    with load([slow]) as loader:
        assert loader.wait_seconds == 0
        take(loader, 1)
        assert 0.2 < loader.wait_seconds < SECONDS
        time.sleep(0.3)
        waited = loader.wait_seconds
        take(loader, 1)
        assert loader.wait_seconds - waited < 0.2  # it was ready
