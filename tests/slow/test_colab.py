"""Colab's runtimes: their lists, the stand-in for google.colab, and tools/colab.py, which runs notebooks in them.

The test marked `colab` rebuilds a runtime (a minute, a gigabyte in ~/.cache/tpuchat/colab) and runs a notebook in it:

    pytest -m colab tests/slow/test_colab.py
"""

import importlib
import json
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import nbformat
import pytest

from tests.helpers import EMBEDDED
from tools import colab

SHORT = ["num_iterations=20", "eval_tokens=4096", "final_eval_tokens=8192", "LENGTH=10"]


# ---- the lists


def test_the_lists_name_versions_and_have_what_they_have_in_common():
    for kind in colab.KINDS:
        lines = (colab.LISTS / f"{kind}.txt").read_text().splitlines()
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        versions = dict(line.split("==") for line in lines)
        assert len(versions) == len(lines)
        assert (versions["jax"], versions["jaxlib"], versions["ipython"]) == ("0.7.2", "0.7.2", "7.34.0")
        assert not {"rustbpe", "xprof"} & versions.keys()
        assert ("libtpu" in versions, "tensorflow" in versions) == (kind == "tpu", kind != "tpu")


# ---- the stand-in


@pytest.fixture
def standin(monkeypatch, tmp_path):
    """(google.colab, set): set(browser=…, secrets=…, denied=…) is what is so in Colab."""
    monkeypatch.syspath_prepend(str(colab.LISTS))
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=None))
    monkeypatch.setenv("COLAB_STAND_IN", str(tmp_path / "colab.json"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def set_(**settings):
        (tmp_path / "new.json").write_text(json.dumps(settings))
        (tmp_path / "new.json").replace(tmp_path / "colab.json")

    set_()
    yield importlib.import_module("google.colab"), set_
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]  # a notebook finds it there and believes that it is in Colab


def test_a_secret_is_there_or_not_or_not_granted(standin):
    """And without a browser it is waited for."""
    google_colab, set_ = standin
    get, userdata = google_colab.userdata.get, google_colab.userdata
    set_(secrets={"HF_TOKEN": "hf_x", "OTHER": "x"}, denied=["OTHER"])
    assert get("HF_TOKEN") == "hf_x"
    with pytest.raises(userdata.NotebookAccessError, match="does not have access to secret OTHER"):
        get("OTHER")
    with pytest.raises(userdata.SecretNotFoundError, match="Secret NONE does not exist"):
        get("NONE")
    assert issubclass(userdata.TimeoutException, Exception)
    set_(browser=False, secrets={"HF_TOKEN": "hf_x"})
    answers = []
    thread = threading.Thread(target=lambda: answers.append(get("HF_TOKEN")), daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not answers
    set_(browser=True, secrets={"HF_TOKEN": "hf_x"})
    thread.join(10)
    assert answers == ["hf_x"]


def test_in_a_script_there_is_no_kernel_to_ask_through(standin, monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    with pytest.raises(AttributeError, match="kernel"):
        standin[0].userdata.get("HF_TOKEN")


def test_drive_is_mounted_and_unmounted(standin, tmp_path, capsys):
    google_colab, set_ = standin
    drive, place = google_colab.drive, tmp_path / "content" / "drive"
    drive.mount(str(place))
    (place / "MyDrive" / "kept").write_text("x")
    drive.mount(str(place))
    assert f"Mounted at {place}" in (said := capsys.readouterr().out) and "already mounted" in said
    drive.flush_and_unmount()
    assert not list(place.iterdir())
    drive.mount(str(place))
    assert (place / "MyDrive" / "kept").read_text() == "x"
    drive.flush_and_unmount()
    set_(browser=False)
    with pytest.raises(google_colab._message.MessageError, match="credential propagation"):
        drive.mount(str(place), timeout_ms=50)
    set_()
    (place / "file").touch()
    with pytest.raises(ValueError, match="must not already contain files"):
        drive.mount(str(place))


def test_the_rest_of_the_stand_in_can_be_called(standin, tmp_path):
    google_colab, _ = standin
    output = google_colab.output
    output.clear()
    output.enable_custom_widget_manager()
    output.serve_kernel_port_as_iframe(6006)
    output.serve_kernel_port_as_window(6006)
    assert output.eval_js("1 + 1", timeout_sec=1) is None
    google_colab.runtime.unassign()
    assert (tmp_path / "unassigned").exists()


# ---- the tool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v6e", "all"], "no runtime 'v6e': choose tpu, gpu, cpu, or all"),
        (["tpu", "02_train"], "no notebook '02_train': choose 01_tokenizer.ipynb, "),
        (["tpu", "all", "--set", "LENGTH"], "--set LENGTH: must be NAME=VALUE"),
        (["tpu", "02_train.ipynb", "--set", "RUNS=2"], "--set RUNS=2: 02_train.ipynb has no form with RUNS"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments, message):
    assert colab.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count("\n") == 1 and not out


def test_without_python_3_13_it_says_so(capsys, monkeypatch, tmp_path):
    (tmp_path / "python3.13").write_text("#!/bin/sh\necho 'pyenv: version not found' >&2\nexit 127\n")
    (tmp_path / "python3.13").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "")
    assert colab.main(["tpu", "02_train.ipynb"]) == 3
    out, err = capsys.readouterr()
    assert err.startswith("no Python 3.13 in PATH or ~/.pyenv/versions") and err.count("\n") == 1 and not out


@pytest.mark.parametrize("name", sorted(path.name for path in colab.ROOT.glob("0[1-6]*.ipynb")))  # 07 has forms only
def test_set_adds_a_cell_below_configure(name):
    notebook = json.loads((colab.ROOT / name).read_text())
    colab.change(notebook, name, ["seed=1", "run_dir=runs/x"])
    place = [colab.title(cell) for cell in notebook["cells"]].index("Set")
    assert colab.title(notebook["cells"][place - 1]) == "Configure"
    config = "base" if name.startswith("03") else "config"
    assert notebook["cells"][place]["source"] == f"{config} = {config}.replace(**{{'seed': 1, 'run_dir': 'runs/x'}})"
    nbformat.validate(notebook)


def test_set_fills_in_a_form():
    notebook = json.loads((colab.ROOT / "02_train.ipynb").read_text())
    before = len(notebook["cells"])
    colab.change(notebook, "02_train.ipynb", [r"PROMPT=C:\new", "LENGTH=10"])
    source = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert "PROMPT = 'C:\\\\new'  # @param {type:\"string\"}\n" in source and "\nLENGTH = 10  # @param" in source
    assert len(notebook["cells"]) == before
    with pytest.raises(colab.Wrong, match="--set seed=1: x.ipynb has no cell 'Configure'"):
        colab.change(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), "x.ipynb", ["seed=1"])


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    """A runtime with this Python and its packages, and one package more, and a way to run cells in it."""
    venv, root = tmp_path / "kept" / "venv", tmp_path / "root"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = colab.site_packages(venv)
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "some_package-1.0.dist-info").mkdir()
    (site / "some_package-1.0.dist-info" / "RECORD").write_text("as it was")
    (venv / "bin" / "some-script").write_text(f"#!{venv}/bin/python\n")
    monkeypatch.setattr(colab, "CACHE", tmp_path / "kept")
    monkeypatch.setattr(colab, "ROOT", root)
    monkeypatch.setattr(colab, "build", lambda kind: venv)
    (root / "data").mkdir(parents=True)
    (root / "data" / "embedded").symlink_to(EMBEDDED)

    def run(**cells):
        nb = nbformat.v4.new_notebook()
        nb.cells = [nbformat.v4.new_code_cell(source, metadata={"title": title}) for title, source in cells.items()]
        (root / "00_tiny.ipynb").write_text(nbformat.writes(nb))
        return colab.run("cpu", "00_tiny.ipynb", out=tmp_path / "out")

    run.content, run.venv = tmp_path / "out" / "cpu" / "00_tiny", venv
    return run


def test_a_notebook_runs_as_in_colab(runtime, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "ours")
    look = """
import json, os, subprocess, sys
script = open(os.path.join(sys.prefix, "bin", "some-script")).read()
print(json.dumps([sys.prefix, os.environ["HOME"], os.listdir(), "google.colab" in sys.modules, script,
    os.environ.get("JAX_PLATFORMS"), sorted(os.listdir(os.path.expanduser("~/.cache/tpuchat/embedded")))[-1]]))
subprocess.Popen(["sleep", "600"])
"""
    install = """
from pathlib import Path
import sys
(new,) = Path(sys.prefix).glob("lib/python3.*/site-packages")
(new / "added-2.0.dist-info").mkdir()
(new / "added-2.0.dist-info" / "RECORD").touch()
"""
    assert runtime(Install=install, Look=look)
    said = capsys.readouterr().out
    assert re.fullmatch(r"cpu  00_tiny.ipynb  ok  \d+ s\n     installed in \d+ s: added 2.0\n", said)
    cells = json.loads((runtime.content / "00_tiny.ipynb").read_text())["cells"]
    prefix, home, files, in_colab, script, platforms, corpus = json.loads("".join(cells[1]["outputs"][0]["text"]))
    assert Path(prefix).name == "venv" and prefix != str(runtime.venv) and not Path(prefix).exists()
    assert home == str(Path(prefix).parent / "home") and files == ["00_tiny.ipynb"] and in_colab
    assert script == f"#!{prefix}/bin/python\n" and platforms is None and corpus == "tokenizer"
    assert (runtime.venv / "bin" / "some-script").read_text() == f"#!{runtime.venv}/bin/python\n"
    assert not (colab.site_packages(runtime.venv) / "added-2.0.dist-info").exists()
    assert not (colab.site_packages(runtime.venv) / "google").exists()
    sleepers = [path for path in Path("/proc").glob("[0-9]*/environ") if f"HOME={home}\0".encode() in read(path)]
    assert not sleepers


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_cell_that_fails_and_a_package_that_is_replaced_are_named(runtime, capsys):
    replace = """
from pathlib import Path
import os, sys
(record,) = Path(sys.prefix).glob("lib/python3.*/site-packages/some_package-1.0.dist-info/RECORD")
record.with_name("NEW").write_text("anew")
record.with_name("NEW").replace(record)
"""
    assert not runtime(Install=replace, Boom='raise ValueError("one\\nthe reason")', After="1")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("cpu  00_tiny.ipynb  FAILED") and said[1].endswith("s: nothing")
    assert said[2:] == ["     Boom: the reason", "     it replaced or removed some_package 1.0"]
    cells = json.loads((runtime.content / "00_tiny.ipynb").read_text())["cells"]
    assert cells[1]["outputs"] and cells[2]["execution_count"] is None
    record = colab.site_packages(runtime.venv) / "some_package-1.0.dist-info" / "RECORD"
    assert record.read_text() == "as it was"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import os; os._exit(1)", "DeadKernelError: Kernel died"),
        ("while True: pass", "CellTimeoutError: A cell timed"),
    ],
)
def test_a_kernel_that_dies_or_hangs_is_named(runtime, capsys, monkeypatch, cell, message):
    monkeypatch.setattr(colab, "CELL_SECONDS", 3)
    assert not runtime(Install="1", Bad=cell)
    assert capsys.readouterr().out.splitlines()[2].startswith(f"     Bad: {message}")


# ---- what Colab's TPU runtime makes of 02_train


@pytest.mark.colab
def test_02_train_runs_in_the_runtime_of_the_tpu(tmp_path, capsys):
    """With a Config of a few steps. Every cell ends well, and what Colab has installed stays as it is."""
    try:
        colab.find_python()
    except colab.Wrong as wrong:
        pytest.skip(wrong.args[1])
    well = colab.run("tpu", "02_train.ipynb", SHORT, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert well, said
    assert int(re.search(r"installed in (\d+) s", said)[1]) < 60
    cells = json.loads((tmp_path / "out" / "tpu" / "02_train" / "02_train.ipynb").read_text())["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert (tmp_path / "out" / "tpu" / "02_train" / "02_train.html").stat().st_size > 100_000
