"""Each notebook in a real Jupyter kernel, top to bottom, with a Config of a few steps and without a network."""

import base64

import pytest

from tests.helpers import ALIGNED, EMBEDDED, TINY, run_notebook, without_hub

FEW = TINY | dict(num_iterations=8, log_interval=1, eval_interval=4, sample_interval=4, profile_steps=2)
WIDE = {name: FEW[name] for name in FEW if name not in ("aspect_ratio", "head_dim", "seq_len")}
WIDE |= ALIGNED | dict(vocab_size=4096, n_layer=1, device_batch_size=2)
TRIAL = dict(n_head=8, head_dim=4, aspect_ratio=16, seq_len=32, device_batch_size=4, eval_tokens=512,
             final_eval_tokens=512, num_iterations=20)  # fmt: skip


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The home, where no Hub, no wandb and no other host answers."""
    for name, value in without_hub(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


def pictures(outputs):
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize(("name", "settings"), [("02_train.ipynb", FEW), ("04_maxtext.ipynb", WIDE)])
def test_training(offline, name, settings):
    text, outputs = run_notebook(name, offline, **settings | dict(run_dir=offline / "run", dataset=EMBEDDED))
    assert "bits per byte" in text and "The people of the United States" in text
    files = [(offline / "run" / name).read_bytes() for name in ("loss.png", "loss_by_position.png")]
    assert [base64.b64decode(picture) for picture in pictures(outputs)] == files  # the live curve ends as the file
    assert "traced steps of" in text and "new tokens in" in text
    (page,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert page.count("bits") > 50


def test_a_tokenizer(offline):
    text, outputs = run_notebook("01_tokenizer.ipynb", offline, dataset=EMBEDDED)
    assert "byte for byte the tokenizer beside the shards" in text and "bytes per token" in text
    assert len(pictures(outputs)) == 2


def test_a_search(offline):
    """Without an account: a table, two pictures, and code for 02."""
    settings = TRIAL | dict(run_dir=offline / "sweep", dataset=EMBEDDED)
    text, outputs = run_notebook("03_worker.ipynb", offline, LOCAL_TRIALS=2, **settings)
    assert "budget  2 trials of" in text and "a search on this machine" in text and "config = Config" in text
    assert len(pictures(outputs)) == 2
