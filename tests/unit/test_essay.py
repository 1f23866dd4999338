"""The notebooks as texts: the order of their parts, what is collapsed, and cells that try what was defined above."""

import ast
import builtins
import re
import symtable

import pytest

from tests.helpers import ROOT
from tools.notebooks import parse, read_text, tags

NOTEBOOKS = sorted(path.name for path in ROOT.glob("[0-9]*.py"))
TRY_IT = "Try it: "
ALWAYS_THERE = {*dir(builtins), "__file__", "get_ipython"}


def cells(name):
    """[(title, tags, whether it is collapsed, source)] of the code cells."""
    return [
        (cell.metadata.get("title", ""), tags(cell), "cellView" in cell.metadata, cell.source)
        for cell, *_ in parse(name, read_text(ROOT / name))[2]
        if cell.cell_type == "code"
    ]


def parts(name):
    """{heading of a part: the code cells under it}; what stands above the first is under ''."""
    found, part = {"": []}, ""
    for cell, *_ in parse(name, read_text(ROOT / name))[2]:
        first = cell.source.split("\n")[0]
        if cell.cell_type == "markdown" and first.startswith("# ") and found != {"": []}:
            part = first[2:].split(":")[0]
            assert part not in found
            found[part] = []
        elif cell.cell_type == "code":
            found[part].append((cell.metadata.get("title", ""), tags(cell), "cellView" in cell.metadata))
    return found


def defined(source):
    """The global names that a cell binds."""
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}


def used(table):
    """The global names that a cell, or a function in it, reads."""
    top = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*map(used, table.get_children()))


# ---- all notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_try_it_cell_needs_only_what_stands_above(name):
    """A reader runs the cells from the top. It runs in a notebook alone, is never collapsed, and is not copied."""
    known, tried = set(ALWAYS_THERE), 0
    for title, kinds, collapsed, source in cells(name):
        if title.startswith(TRY_IT):
            tried += 1
            assert kinds == ["run"] and not collapsed, title
            [guard] = ast.parse(source).body
            assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "IN_NOTEBOOK" and not guard.orelse, title
            missing = used(symtable.symtable(source, "cell", "exec")) - known - defined(source)
            assert not missing, (title, missing)
        known |= defined(source)
    assert tried or name.startswith("05")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_that_runs_is_collapsed(name):
    assert not [title for title, kinds, collapsed, _ in cells(name) if "run" in kinds and collapsed]


def test_a_name_from_below_is_seen():
    """The check of try-it cells does see one, also in a function, and not what the cell itself binds."""
    source = "if IN_NOTEBOOK:\n    f = lambda x: x + below\n    print([y for y in range(3)], f(1))"
    assert used(symtable.symtable(source, "cell", "exec")) - ALWAYS_THERE - defined(source) == {"IN_NOTEBOOK", "below"}


# ---- 02


def test_the_three_parts_of_02():
    """Essay, infrastructure, run. In the essay only what a reader can skip is collapsed, in Part II every cell, in
    Part III every cell that does not run; what runs before Part III tries something, or installs."""
    found = parts("02_train.py")
    assert list(found) == ["", "Part I", "Part II", "Part III"]
    collapsed = {part: {title for title, _, form in cells if form} for part, cells in found.items()}
    assert collapsed["Part I"] == {
        "Options", "Checks of options", "Checks of a Config", "Mesh", "Attention by libraries", "Devices of the mesh",
        "Norms",
    }  # fmt: skip
    assert len(collapsed["Part II"]) == len(found["Part II"])
    for part in ("", "Part III"):
        assert all(form != ("run" in kinds) for _, kinds, form in found[part]), part
    early = [title for part in ("", "Part I", "Part II") for title, kinds, _ in found[part] if "run" in kinds]
    assert early[0] == "Install" and all(title.startswith(TRY_IT) for title in early[1:]) and len(early) > 8


def test_the_essay_of_02_is_short():
    """Lines of Part I that Colab shows: its collapsed cells do not count."""
    text = read_text(ROOT / "02_train.py")
    essay = text[text.index("# # Part I:") : text.index("# # Part II:")]
    shown = [cell for cell in re.split(r"(?m)^(?=# %%)", essay) if 'cellView="form"' not in cell.split("\n")[0]]
    assert 800 < sum(cell.count("\n") for cell in shown) <= 1300


def test_every_public_function_of_02_says_what_it_does():
    silent = []
    for title, kinds, _, source in cells("02_train.py"):
        for node in ast.parse(source).body if "run" not in kinds else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                silent += [f"{title}: {node.name}"] * (not ast.get_docstring(node))
    assert not silent
