"""Each notebook in a real Jupyter kernel, top to bottom, with a Config of a few steps, an empty home and no network.

Every cell ends well, every try-it cell prints, and nothing is red: bars and warnings would be.
"""

import base64
import json
import shutil

import nbclient
import nbformat
import pytest

from tests.helpers import ALIGNED, EMBEDDED, ROOT, TINY, without_hub
from tests.unit.test_evaluate_tasks import write_bundle
from tools import colab

FEW = TINY | dict(num_iterations=8, log_interval=1, eval_interval=4, sample_interval=4, profile_steps=2)
WIDE = {name: FEW[name] for name in FEW if name not in ("aspect_ratio", "head_dim", "seq_len")}
WIDE |= ALIGNED | dict(vocab_size=4096, n_layer=1, device_batch_size=2)
TRIAL = dict(n_head=8, head_dim=4, aspect_ratio=16, seq_len=32, device_batch_size=4, eval_tokens=512,
             final_eval_tokens=512, num_iterations=20)  # fmt: skip
SMALL = "--n_head 1 --aspect_ratio 128 --vocab_size 512 --seq_len 256"
SETTINGS = {  # of a Config, or of forms; then what is printed, and how many pictures are shown
    "01": (dict(dataset=EMBEDDED), ["byte for byte the tokenizer beside the shards", "merging: 100%", "per token"], 1),
    "02": (FEW, ["this model", "sample: 'It is a truth", "a step takes", "new tokens in", "most surprising:"], 1),
    "03": (TRIAL | dict(LOCAL_TRIALS=2), ["budget  2 trials of", "a search on this machine", "CHANGES = {"], 2),
    "04": (WIDE, ["this model", "sample: 'It is a truth", "a step takes", "new tokens in", "most surprising:"], 1),
    "05": (dict(NOTEBOOK=ROOT / "02_train.py", OPTIONS=SMALL), ["attention kernel"], 0),
    "06": (FEW, ["this model", "sample: 'It is a truth", "a step takes", "new tokens in", "most surprising:"], 1),
    "07": (dict(TASKS="core", LIMIT=6), ["the mean of 3 tasks", "question"], 1),
    "08": (
        dict(dataset="notes.jsonl"),
        ["trains: ", "validates: ", "'Note 0.'", "02_train.py --dataset notes.jsonl"],
        0,
    ),
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The home, where no Hub, no wandb and no other host answers."""
    for name, value in without_hub(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("0*.ipynb")))
def test_run_all(offline, finished, name):
    settings, says, count = SETTINGS[name[:2]]
    for needed in ("02_train.py", "08_data.py"):  # else they are fetched from GitHub
        shutil.copyfile(ROOT / needed, offline / needed)
    if name[:2] == "07":
        shutil.copytree(finished[0].run_dir, offline / "run")
        settings = settings | dict(RUN=offline / "run", BUNDLE=write_bundle(offline / "bundle"))
    if name[:2] == "08":
        lines = (json.dumps({"text": f"Note {i}."}) + "\n" for i in range(99))
        (offline / "notes.jsonl").write_text("".join(lines))
    notebook = nbformat.read(ROOT / name, 4)
    if name[:2] in ("02", "03", "04", "06"):
        settings = settings | dict(run_dir=offline / "run", dataset=EMBEDDED)
    colab.change(notebook, name, [f"{field}={value}" for field, value in settings.items()])
    notebook = nbformat.from_dict(notebook)
    where = {"metadata": {"path": str(offline)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert not [word for word in says if word not in text], text
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    tries = {colab.title(cell): cell.outputs for cell in cells if colab.title(cell).startswith("Try it")}
    assert tries and all(tries.values()), tries
    shown = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == count
    if name[:2] in ("02", "04", "06"):
        assert [base64.b64decode(picture) for picture in shown] == [(offline / "run" / "loss.png").read_bytes()]
        (page,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
        assert page.count("bits") > 50
