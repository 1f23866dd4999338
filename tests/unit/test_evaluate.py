"""Evaluation: the loss of the validation shard, bits per byte, the loss by position, and what a passage costs."""

import math
import re

import numpy as np
import pytest

from tests.helpers import shaken, small_config


@pytest.fixture(scope="module")
def model(nb):
    config = small_config(nb, vocab_size=4096, seq_len=64, dataset="embedded", num_shards=-1)
    return config, shaken(nb, config)


@pytest.fixture(scope="module")
def validation(nb):
    """The path of the embedded validation shard."""
    return nb.list_shards(nb.Config.demo())[1]()


def test_every_token_counts_once(nb, model, tokenizer, validation):
    """As sums over the stream of documents, whether or not it fills the last batch; bytes are those of the text."""
    config, params = model
    for max_tokens in (1000, 1024):
        result = nb.evaluate(config, params, nb.validation_batches(config, tokenizer, validation, max_tokens))
        stream = []
        for _, text in nb.read_documents(validation):
            stream += nb.encode_document(tokenizer, text).tolist()
            if len(stream) > max_tokens:
                break
        tokens, targets = np.zeros((2, 16, 64), np.int32)
        tokens.ravel()[:max_tokens], targets.ravel()[:max_tokens] = stream[:max_tokens], stream[1 : max_tokens + 1]
        losses = np.asarray(nb.token_losses(config, params, tokens, targets), np.float64)
        losses.ravel()[max_tokens:] = 0
        assert result["loss"] == pytest.approx(losses.sum() / max_tokens, rel=1e-6)
        size = nb.token_bytes(tokenizer)[stream[1 : max_tokens + 1]].sum()
        assert result["bpb"] == pytest.approx(losses.sum() / math.log(2) / size, rel=1e-6)
        counts = np.bincount(np.arange(max_tokens) % 64)
        np.testing.assert_allclose(result["by_position"], losses.sum(0) / counts, rtol=1e-5)


def test_surprise(nb, model, tokenizer):
    """The bits of a passage add up to its loss; the page holds every character once, escaped, redder where it costs."""
    config, params = model
    text = 'Is 1 < 2 & "so"?\nThe café, 東京'
    ids = [tokenizer.encode_single_token("<|bos|>"), *tokenizer.encode_ordinary(text)]
    found = nb.surprise(config, params, tokenizer, text)
    assert b"".join(piece for piece, _ in found).decode() == text
    tokens = np.zeros((2, 64), np.int32)
    tokens[0, : len(ids)] = ids
    losses = nb.token_losses(config, params, tokens, np.roll(tokens, -1, axis=1))[0, : len(ids) - 1]
    np.testing.assert_allclose([bits for _, bits in found], np.asarray(losses) / math.log(2), rtol=1e-5)
    page = nb.surprise_html(found)
    plain = re.sub(r"<br>|<[^>]*>", "", page).replace("↵", "\n").rstrip("\n")
    assert plain == "Is 1 &lt; 2 &amp; &quot;so&quot;?\nThe café, 東京"
    page = nb.surprise_html([(b"a", 1.0), (b"b", 9.0), ("é".encode()[:1], 3.0), ("é".encode()[1:], 4.0)])
    assert [float(x) for x in re.findall(r"rgba\(220, 50, 30, ([\d.]+)\)", page)] == [0.05, 0.45, 0.35]
    assert len(nb.surprise(config, params, tokenizer, "word " * 500)) == config.seq_len
