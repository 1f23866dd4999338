"""The notebook tooling, on small notebooks in tmp_path; then the repository's own notebooks, as they are."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
import types
from pathlib import Path

import jupytext
import nbformat
import pytest

from tools import notebooks
from tools.notebooks import NotebookError, build, load, main, stamp

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path.name for path in ROOT.glob("[0-9]*.py"))

HEADER = """\
# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V6E1
#     machine_shape: hm
#     provenance: []
#     toc_visible: true
#   jupytext:
#     cell_metadata_filter: title,tags,cellView,-all
#     comment_magics: false
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""
FIRST = (
    HEADER
    + '''\
# %% [markdown]
# # First
#
# [Colab](https://colab.research.google.com/github/me/mine/blob/main/01_first.ipynb),
# [code](https://github.com/me/mine), [nanochat](https://github.com/karpathy/nanochat)

# %% tags=["run"]
# cat what a shell would take for a command
ran = True
raise RuntimeError("a run cell was executed")

# %%
import dataclasses

GITHUB = "me/mine"

# %% Double tags=["shared"]
@dataclasses.dataclass(frozen=True)
class Point:
    """
    # %timeit in a string stays what it is
    """
    x: int


def double(x):
    return 2 * x


# %% [markdown]
# Text with trailing spaces  
# and a line.

# %%
def fail():
    return 1 / 0

# %% Machinery cellView="form"
# @title Machinery
def machinery():
    return "collapsed"


# %% tags=["run"]
ran = "twice"



# %%
last = double(21)
'''
)
SECOND = (
    HEADER
    + """\
# %% Setup
import dataclasses

# %% Double tags=["shared"]
def double(x):
    return x + x

# %% Own
own = 1
"""
)
README = """\
# Mine

[![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/me/mine/blob/main/02_second.ipynb)
`git clone https://github.com/me/mine.git`, https://raw.githubusercontent.com/me/mine/main/x.txt
https://github.com/me/mine-too, https://colab.research.google.com/github/you/yours/blob/main/yours.ipynb
"""


@pytest.fixture
def repo(tmp_path):
    """A repository of two notebooks, brought up to date."""
    (tmp_path / "01_first.py").write_text(FIRST)
    (tmp_path / "02_second.py").write_text(SECOND)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "pyproject.toml").write_text('[tool.tpuchat]\ngithub = "me/mine"\n')
    assert main([], tmp_path) == 0
    return tmp_path


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def line_of(part, text):
    return text[: text.index(part)].count("\n") + 1


def replace(path, old, new):
    """Replace the first `old` in a file; the number of its line."""
    text = path.read_text()
    line = line_of(old, text)
    path.write_text(text.replace(old, new, 1))
    return line


def to_py(ipynb):
    return jupytext.writes(jupytext.reads(ipynb, fmt="ipynb"), fmt="py:percent")


# Build


def test_round_trip_is_lossless_also_after_what_colab_adds():
    assert to_py(build("01_first.py", FIRST)) == FIRST
    nb = json.loads(build("01_first.py", FIRST))
    nb["nbformat_minor"] = 0
    nb["metadata"] |= {"language_info": {"name": "python"}, "widgets": {}}
    for i, cell in enumerate(nb["cells"]):
        del cell["id"]
        cell["metadata"] |= {"id": f"c{i}", "outputId": "o", "colab": {"base_uri": "x"}, "collapsed": True}
        if cell["cell_type"] == "code":
            cell["execution_count"] = i
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "hi"}]
    assert to_py(json.dumps(nb)) == FIRST


def test_build_says_nothing_of_the_jupytext_version(monkeypatch):
    before = build("01_first.py", FIRST)
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "jupytext"]:
        if hasattr(module, "__version__"):
            monkeypatch.setattr(module, "__version__", "99.9.9")
    assert build("01_first.py", FIRST) == before
    with pytest.raises(NotebookError, match="jupytext_version: 99.9.9"):  # the patch above does reach the header
        build("01_first.py", FIRST.replace(",-jupytext.text_representation.jupytext_version", ""))


def test_build_is_deterministic_and_valid():
    text = build("01_first.py", FIRST)
    assert build("01_first.py", FIRST) == text
    nb = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids) == 9
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in nb.cells)
    assert nb.cells[3].metadata == {"tags": ["shared"], "title": "Double"}
    hidden = {"source_hidden": True}  # JupyterLab's word for what Colab calls a form
    assert nb.cells[6].metadata == {"cellView": "form", "jupyter": hidden, "title": "Machinery"}
    assert nb.cells[1].source.startswith("# cat what a shell")


def test_a_new_cell_keeps_the_ids_of_the_cells_under_later_titles():
    before = json.loads(build("02_second.py", SECOND))["cells"]
    after = json.loads(build("02_second.py", SECOND.replace("# %% Double", "# %%\nnew = 1\n\n# %% Double")))["cells"]
    assert [cell["id"] for cell in before] == [cell["id"] for cell in after[:1] + after[2:]]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('tags=["run"]', 'tags=["Run"]', ":LINE: cannot use Run"),
        ('tags=["run"]', 'tag=["run"]', ":LINE: cannot use tag"),
        ("title,tags,cellView,-all", "title,tags,-all", "must say cell_metadata_filter: title,tags,cellView,-all"),
        ('Machinery cellView="form"', 'Machinery cellView="code"', ":LINE: a collapsed cell needs a title and a form"),
        ('Machinery cellView="form"', 'cellView="form"', ":LINE: a collapsed cell needs a title and a form"),
        ('Machinery cellView="form"', 'Engine cellView="form"', ":LINE: .* must begin with the line: # @title Engine"),
        ("# %% [markdown]\n# # First", "x = 1\n\n# %% [markdown]\n# # First", "code before the first '# %%'"),
        ("    # %timeit in", "# %% in", "'# %%' inside a string"),
        ("#     comment_magics: false\n", "", "must say comment_magics: false"),
        ("\n#     gpuType: V6E1", "\n#     gpuType:  V6E1", r":5: .* not lossless: .* becomes '#     gpuType: V6E1'"),
        ("\nlast = double(21)\n", "\nlast = double(21)", r": .* not lossless: '<end of file>' becomes ''"),
        ("ran = True\n", "ran = True\r\n", ":LINE: .* not lossless"),
    ],
)
def test_mistakes_in_a_notebook_are_named(old, new, message):
    with pytest.raises(NotebookError, match=message.replace("LINE", str(line_of(old, FIRST)))) as error:
        build("01_first.py", FIRST.replace(old, new, 1))
    assert str(error.value).startswith("01_first.py") and "\n" not in str(error.value)


# Load


def test_load_runs_exactly_the_cells_not_tagged_run(repo):
    module = load(repo / "01_first.py")
    assert module.__name__ == "nb_01_first" and sys.modules["nb_01_first"] is module
    assert not hasattr(module, "ran")
    assert module.last == 42  # cells before and after run cells are there
    assert module.Point(x=3) == module.Point(x=3)


def test_load_keeps_line_numbers(repo):
    path = repo / "01_first.py"
    module = load(path)
    try:
        module.fail()
    except ZeroDivisionError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
    assert (frame.filename, frame.line) == (str(path), "return 1 / 0")
    assert frame.lineno == path.read_text().split("\n").index("    return 1 / 0") + 1
    assert inspect.getsource(module.double) == "def double(x):\n    return 2 * x\n"
    assert inspect.getsource(module.Point).startswith("@dataclasses.dataclass(frozen=True)\nclass Point:")


def test_load_runs_again_only_after_a_change(repo):
    module = load(repo / "01_first.py")
    assert load(repo / "01_first.py") is module
    replace(repo / "01_first.py", "double(21)", "double(4)")
    assert load(repo / "01_first.py").last == 8


def test_a_notebook_that_fails_is_not_left_half_loaded(repo):
    replace(repo / "01_first.py", "double(21)", "1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load(repo / "01_first.py")
    assert "nb_01_first" not in sys.modules


# Stamp


def test_stamping_copies_from_the_lowest_number(repo):
    assert (repo / "01_first.py").read_text() == FIRST
    collapsed = '\n# %% Double cellView="form" tags=["shared"]\n# @title Double\n@dataclasses'
    assert collapsed in (repo / "02_second.py").read_text()
    second = load(repo / "02_second.py")
    assert inspect.getsource(second.double) == "def double(x):\n    return 2 * x\n"
    assert second.Point(1).x == second.own == 1

    replace(repo / "01_first.py", "return 2 * x", "return x << 1")
    assert main([], repo) == 0
    assert "return x << 1" in (repo / "02_second.py").read_text()
    assert "return x << 1" in (repo / "02_second.ipynb").read_text()


@pytest.mark.parametrize("owner", ['Double cellView="form" tags=["shared"]', 'Double tags=["shared"] cellView="form"'])
def test_a_cell_that_its_owner_collapsed(owner):
    """Stays so in the copies, once; and jupytext's order of the metadata becomes everyone's."""
    first = FIRST.replace('Double tags=["shared"]\n', f"{owner}\n# @title Double\n")
    stamped = stamp({"01_first.py": first, "02_second.py": SECOND})
    for text in stamped.values():
        assert text.count('\n# %% Double cellView="form" tags=["shared"]\n# @title Double\n@dataclasses') == 1
        assert text.count("@title Double") == 1
    assert stamp(stamped) == stamped


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('Double cellView="form" tags=["shared"]\n# @title Double', 'tags=["shared"]', "a shared cell needs a title"),
        ("# %% Own", '# %% Double tags=["shared"]', "a shared cell 'Double' is already on line "),
    ],
)
def test_mistakes_in_shared_cells_are_one_line_and_exit_2(repo, capsys, old, new, message):
    line = replace(repo / "02_second.py", old, new)
    before = snapshot(repo)
    for argv in ([], ["--check"]):
        assert main(argv, repo) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"02_second.py:{line}: {message}") and error.count("\n") == 1
    assert snapshot(repo) == before


# Addresses


def test_a_new_address_reaches_our_links_and_no_others(repo):
    replace(repo / "pyproject.toml", "me/mine", "you/fork.jax")
    assert main(["--check"], repo) == 1
    assert main([], repo) == 0
    assert (repo / "README.md").read_text() == README.replace("me/mine", "you/fork.jax").replace(
        "you/fork.jax-too", "me/mine-too"
    )
    assert (repo / "01_first.py").read_text() == FIRST.replace("me/mine", "you/fork.jax")
    assert "github.com/you/fork.jax" in (repo / "01_first.ipynb").read_text()
    replace(repo / "pyproject.toml", "you/fork.jax", "me/mine")
    assert main([], repo) == 0
    assert ((repo / "README.md").read_text(), (repo / "01_first.py").read_text()) == (README, FIRST)


@pytest.mark.parametrize("slug", ["", "mine", "https://github.com/me/mine", "me/mine/"])
def test_a_wrong_address_is_named(repo, capsys, slug):
    (repo / "pyproject.toml").write_text(f'[tool.tpuchat]\ngithub = "{slug}"\n')
    assert main([], repo) == 2
    assert capsys.readouterr().err == f"pyproject.toml: [tool.tpuchat] github is {slug!r}: it must be 'owner/repo'\n"


# Check


def test_an_up_to_date_repository_is_left_alone(repo):
    before = snapshot(repo)
    assert main(["--check"], repo) == 0
    assert main([], repo) == 0
    assert snapshot(repo) == before


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("02_second.py", "return 2 * x", "return 3 * x", " in cell 2 (# %% Double"),
        ("02_second.py", "    x: int", "    x: int ", " in cell 2 (# %% Double"),
        (
            "02_second.py",
            'Double cellView="form" tags=["shared"]',
            'Double cellView="form" tags=["run", "shared"]',
            " in cell 2 (# %% Double",
        ),
        ("01_first.ipynb", "ran = True", "ran = Trve", " in cell 2 has"),
        ("01_first.ipynb", '"outputs": []', '"outputs":  []', " in cell 2 has"),
        ("01_first.ipynb", '"outputs": [],\n', '"outputs": [],\r\n', " in cell 2 has"),
        ("01_first.ipynb", '"gpuType": "V6E1"', '"gpuType": "V5E1"', " in cell 9 has"),
        ("01_first.py", "/github/me/mine/", "/github/me/mime/", " in cell 1 (# %% [markdown]) has"),
        ("01_first.py", 'GITHUB = "me/mine"', 'GITHUB = "me/mime"', " in cell 3 (# %%) has"),
        ("README.md", "/github/me/mine/", "/github/me/mime/", " has"),
    ],
)
def test_check_names_each_kind_of_drift(repo, capsys, file, old, new, message):
    line = replace(repo / file, old, new)
    before = snapshot(repo)
    assert main(["--check"], repo) == 1
    assert capsys.readouterr().out.startswith(f"{file}:{line}:{message}")
    assert snapshot(repo) == before


def test_check_names_a_colab_link_to_nothing(repo, capsys):
    line = replace(repo / "README.md", "/02_second.ipynb", "/02_secomd.ipynb")
    assert main(["--check"], repo) == 1
    assert capsys.readouterr().out.startswith(f"README.md:{line}: Colab link to 02_secomd.ipynb, which is not there")


def test_check_names_files_that_are_missing_or_left_over(repo, capsys):
    (repo / "01_first.ipynb").unlink()
    (repo / "02_second.ipynb").rename(repo / "03_third.ipynb")
    assert main(["--check"], repo) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "01_first.ipynb: missing" in lines and "02_second.ipynb: missing" in lines
    assert any(line.startswith("03_third.ipynb: there is no 03_third.py") for line in lines)
    assert main([], repo) == 1  # what is left over may be someone's work: it is named, not deleted
    assert (repo / "03_third.ipynb").exists()


# The repository itself


def test_the_repository_is_up_to_date(capsys):
    status = main(["--check"])
    assert status == 0, capsys.readouterr()


@pytest.fixture
def copy(tmp_path):
    """A copy of what the tool works on."""
    for path in [*ROOT.glob("[0-9]*.py"), *ROOT.glob("[0-9]*.ipynb"), *ROOT.glob("*.md")]:
        shutil.copy(path, tmp_path)
    for name in ("update_notebooks.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def update(copy, *args):
    """update_notebooks.sh of a copy, from another working directory."""
    env = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([copy / "update_notebooks.sh", *args], cwd="/", env=env, capture_output=True, text=True)


def test_the_script_finds_and_mends_drift(copy):
    broken = sorted(copy.glob("[0-9]*.ipynb"))[0]
    good = broken.read_bytes()
    broken.write_bytes(good.replace(b"e", b"f", 1))
    result = update(copy, "--check")
    assert result.returncode == 1 and result.stdout.startswith(f"{broken.name}:2: "), result
    assert update(copy).stdout == f"wrote {broken.name}\n"
    assert broken.read_bytes() == good
    result = update(copy, "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert update(copy, "--chekc").returncode == 2


def test_one_byte_in_any_copy_of_a_shared_cell_is_mended():
    texts = {name: (ROOT / name).read_text() for name in NOTEBOOKS}
    broken, owned = {}, set()
    for name, text in texts.items():
        titles = re.findall(r'^# %% (.+?)(?: cellView="form")? tags=\[.*"shared".*\]$', text, re.M)
        for title in owned.intersection(titles):
            text = re.sub(rf"^# @title {re.escape(title)}\n", r"\g<0>#", text, flags=re.M)
        broken[name] = text
        owned.update(titles)
    assert broken != texts or len(texts) == 1
    assert stamp(broken) == texts


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_notebook(name):
    text = (ROOT / name).read_text()
    nb = nbformat.read((ROOT / name).with_suffix(".ipynb"), as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    if name[:2] in ("05", "08"):  # on a free CPU runtime, before a TPU is rented
        assert "accelerator" not in nb.metadata and "gpuType" not in nb.metadata.colab
    else:
        assert nb.metadata.accelerator == "TPU"
        assert (nb.metadata.colab.gpuType, nb.metadata.colab.machine_shape) == ("V6E1", "hm")
    assert nb.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    assert {file for _, file in notebooks.colab_links(text)} <= {Path(name).with_suffix(".ipynb").name}
    compile(text, name, "exec")  # the .py is a script, too: no magics


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_notebook_loads_without_side_effects(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / name, tmp_path / f"9{name}")  # another name: other tests keep their module
    if name.startswith("03"):
        (tmp_path / "02_train.py").symlink_to(ROOT / "02_train.py")  # its subject
    before = sorted(tmp_path.iterdir())
    module = load(tmp_path / f"9{name}")
    del sys.modules[module.__name__]
    assert sorted(tmp_path.iterdir()) == before


def test_install_pins_what_is_there(monkeypatch):
    """By canonical names, the first version in the path; what pip would not read is left out."""
    nb = load(ROOT / "02_train.py")
    there = [("typing_extensions", "4.16.0"), ("typing-extensions", "4.1.1"), ("torch", "2.9.0+cpu"), ("a", None)]
    there += [("devscripts", "2.22.1ubuntu1"), (None, "1.0"), ("black", "24.1a1.dev3"), ("x", "1.0.post1")]
    found = []

    def run(command, check):
        found.append((Path(command[command.index("--constraint") + 1]).read_text(), command[-2:]))

    monkeypatch.setattr(nb.importlib.util, "find_spec", lambda name: None)
    distributions = [types.SimpleNamespace(name=name, version=version) for name, version in there]
    monkeypatch.setattr(nb.importlib.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(nb.subprocess, "run", run)
    nb.install("one", "two")
    assert not found  # a script installs nothing
    monkeypatch.setattr(nb, "get_ipython", None, raising=False)
    nb.install("one", "two")
    pins = "typing-extensions==4.16.0\ntorch==2.9.0+cpu\nblack==24.1a1.dev3\nx==1.0.post1\n"
    assert found == [(pins, ["one", "two"])]
