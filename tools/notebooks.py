"""Notebook tooling: load a notebook as a module, stamp the shared cells, build the .ipynb files, check for drift.

A notebook is a jupytext percent script, `NN_name.py` in the root folder. The .py is the source of truth:

  - `load("02_train.py")` executes the code cells that are not tagged `run`, and returns a module, for the tests;
  - `./update_notebooks.sh` writes `NN_name.ipynb`, which is committed so that Colab can open it. A rebuild is
    byte-identical.

`./update_notebooks.sh` also keeps two things equal in files that cannot import each other:

  - Shared cells. `# %% Attention tags=["shared"]` belongs to the lowest-numbered notebook with a shared cell of that
    title. The tool copies its source and tags into the other notebooks, where the cell is collapsed.
  - The repository's address, `[tool.tpuchat] github = "owner/repo"` in pyproject.toml. The tool finds our addresses by
    their use: in a Colab link to one of our notebooks, or in `GITHUB = "owner/repo"`. It rewrites these, and links to
    the same owner/repo on github.com and raw.githubusercontent.com, in the notebooks, the *.md files of the root
    folder, and docs/. All other links stay.

A collapsed cell has a marker with `cellView="form"`, which Colab reads, and begins with its title as a comment:

    # %% Attention cellView="form" tags=["shared"]
    # @title Attention

In the .ipynb it gets `jupyter.source_hidden`, too, for JupyterLab.

`--check` changes nothing: it names each file that would change, and exits with status 1. A mistake in a notebook is
one line on stderr and status 2.

After editing a notebook in Colab or Jupyter, run `jupytext --to py:percent 02_train.ipynb` before
`./update_notebooks.sh`, which overwrites the .ipynb.
"""

import argparse
import hashlib
import itertools
import linecache
import re
import sys
import tomllib
import types
from collections import Counter
from pathlib import Path

try:
    import jupytext
except ImportError:
    jupytext = None  # only load() works without

ROOT = Path(__file__).resolve().parents[1]
TAGS = {"run", "shared", "parameters"}  # the last is papermill's: it sets values in a cell after that one
METADATA = {"title", "tags", "cellView", "lines_to_next_cell", "cell_marker"}  # the last two keep blank lines
CELL_FILTER = "title,tags,cellView,-all"
MARKER = re.compile(r"^(?=# %%(?: |$))", re.M)  # where a cell starts
NOT_LOADED = re.compile(r'# %%.*(\[markdown\]|tags=\[[^\]]*"run")')
TAGS_FIRST = re.compile(r'^(# %% .*?)( tags=\[[^\]\n]*\])( cellView="form")$', re.M)


class NotebookError(ValueError):
    """A mistake in a notebook that its author has to correct; the message is one line."""


def read_text(path):
    return path.read_bytes().decode()  # not read_text: it would hide a \r


def tags(cell):
    return cell.metadata.get("tags", [])


def first_difference(have, want):
    """Returns (line number, line of `have`, line of `want`) of the first line that differs."""
    lines = itertools.zip_longest(have.split("\n"), want.split("\n"), fillvalue="<end of file>")
    return next((i, a, b) for i, (a, b) in enumerate(lines, 1) if a != b)


def parse(name, text):
    """Returns (notebook node, text above the first cell, [(cell, its line number, its text)]) of a .py notebook.

    The text is in jupytext's order of metadata, cellView before tags. Raises NotebookError for an author's mistake.
    """
    text = TAGS_FIRST.sub(r"\1\3\2", text)
    nb = jupytext.reads(text, fmt="py:percent")
    if nb.metadata.get("jupytext", {}).get("comment_magics") is not False:
        raise NotebookError(f"{name}: the header must say comment_magics: false, or '# cat x' becomes a shell command")
    head, *texts = MARKER.split(text)
    # Not from nb.metadata: reading a cell, jupytext adds its unknown keys to the filter.
    if f"\n#     cell_metadata_filter: {CELL_FILTER}\n" not in head:
        raise NotebookError(f"{name}: the header must say cell_metadata_filter: {CELL_FILTER}")
    if len(texts) != len(nb.cells):
        raise NotebookError(
            f"{name}: {len(texts)} lines start with '# %%' but jupytext reads {len(nb.cells)} cells: "
            "is there code before the first '# %%', or a '# %%' inside a string?"
        )
    lines = itertools.accumulate((part.count("\n") for part in [head, *texts[:-1]]), initial=1)
    cells = list(zip(nb.cells, list(lines)[1:], texts, strict=True))
    for cell, line, _ in cells:
        check_cell(f"{name}:{line}", cell)
    again = jupytext.writes(jupytext.reads(jupytext.writes(nb, fmt="ipynb"), fmt="ipynb"), fmt="py:percent")
    if again != text:
        line, a, b = first_difference(text, again)
        raise NotebookError(f"{name}:{line}: .py -> .ipynb -> .py is not lossless: {a!r} becomes {b!r}")
    return nb, head, cells


def check_cell(where, cell):
    """Raises NotebookError if a cell has unknown metadata or tags, or is collapsed without its title."""
    if unknown := (set(cell.metadata) - METADATA) | (set(tags(cell)) - TAGS):
        raise NotebookError(
            f"{where}: cannot use {', '.join(sorted(map(str, unknown)))}: the form of this "
            'line is: # %% Title tags=["run"], and the tags are run, shared and parameters'
        )
    if "cellView" in cell.metadata:
        title = cell.metadata.get("title")
        if cell.metadata["cellView"] != "form" or not title:
            raise NotebookError(f'{where}: a collapsed cell needs a title and a form: # %% Title cellView="form"')
        if cell.source.split("\n")[0] != f"# @title {title}":
            raise NotebookError(f"{where}: a collapsed cell must begin with the line: # @title {title}")


def load(path):
    """Imports a notebook: returns a module made of exactly the code cells not tagged `run`.

    `02_train.py` becomes the module `nb_02_train`. Lines of other cells are blanked, not removed, so that tracebacks,
    inspect.getsource and coverage point into the .py. A file that has not changed is loaded once.
    """
    path = Path(path).resolve()
    text = read_text(path)
    name = "nb_" + re.sub(r"\W", "_", path.stem)
    module = sys.modules.get(name)
    if module and (module.__file__, module.__text__) == (str(path), text):
        return module

    if jupytext:
        parse(path.name, text)  # raises for a mistake
    code = "".join("\n" * part.count("\n") if NOT_LOADED.match(part) else part for part in MARKER.split(text))
    linecache.checkcache(str(path))
    module = types.ModuleType(name)
    module.__file__, module.__text__ = str(path), text
    sys.modules[name] = module  # before the code runs: dataclasses look their module up
    try:
        exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def collapsed(title, part):
    """Returns the text of a code cell in its collapsed form."""
    marker, _, body = part.partition("\n")
    if "cellView=" in marker:
        return part
    head = f"# %% {title}"
    return f'{head} cellView="form"{marker[len(head) :]}\n# @title {title}\n{body}'


def stamp(notebooks):
    """Returns {file name: text} with every shared cell equal to its owner's, and collapsed where it is a copy."""
    owners, stamped = {}, {}
    for name, text in sorted(notebooks.items()):
        _, head, cells = parse(name, text)
        seen, stamped[name] = {}, head
        for cell, line, part in cells:
            if "shared" in tags(cell):
                title = cell.metadata.get("title")
                if not title:
                    raise NotebookError(f'{name}:{line}: a shared cell needs a title: # %% Title tags=["shared"]')
                if title in seen:
                    raise NotebookError(f"{name}:{line}: a shared cell {title!r} is already on line {seen[title]}")
                seen[title] = line
                body = part.rstrip("\n")  # the blank lines below a cell are the notebook's own
                blank = part[len(body) :]
                part = (collapsed(title, owners[title]) if title in owners else body) + blank
                owners.setdefault(title, body)
            stamped[name] += part
    return stamped


def build(name, text):
    """Returns the text of the .ipynb of a .py notebook."""
    nb, _, _ = parse(name, text)
    title, count = "", Counter()
    for cell in nb.cells:
        # An id counts from the last title, so that a new cell does not change the ids of all that follow.
        title = cell.metadata.get("title", title)
        cell.id = hashlib.sha256(f"{Path(name).stem}/{title}/{count[title]}".encode()).hexdigest()[:12]
        count[title] += 1
        if "cellView" in cell.metadata:
            cell.metadata["jupyter"] = {"source_hidden": True}  # jupytext's filter drops it on the way back
    return jupytext.writes(nb, fmt="ipynb").rstrip("\n") + "\n"


def github(root):
    slug = tomllib.loads(read_text(root / "pyproject.toml")).get("tool", {}).get("tpuchat", {}).get("github", "")
    if not re.fullmatch(r"[\w-]+/[\w.-]+", slug):
        raise NotebookError(f"pyproject.toml: [tool.tpuchat] github is {slug!r}: it must be 'owner/repo'")
    return slug


def colab_links(text):
    """Returns [(owner/repo, file name)] of the Colab links in a text."""
    return re.findall(r"colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/[^/\s]+/([\w.-]+\.ipynb)", text)


def address(texts, slug):
    """Returns {file name: text} with our own owner/repo set to `slug`; the docstring above says which are ours."""
    ours = set()
    for text in texts.values():
        ours |= {repo for repo, file in colab_links(text) if file.replace(".ipynb", ".py") in texts}
        ours |= set(re.findall(r'^GITHUB = "([^"]+)"', text, re.M))
    if not ours:
        return texts
    names = "|".join(re.escape(repo) for repo in sorted(ours, key=len, reverse=True))
    hosts = r"colab\.research\.google\.com/github|github\.com|raw\.githubusercontent\.com"
    link = re.compile(rf"({hosts})/(?:{names})(?![\w-])")
    constant = re.compile(r'^GITHUB = "[^"]+"', re.M)
    return {name: constant.sub(f'GITHUB = "{slug}"', link.sub(rf"\1/{slug}", text)) for name, text in texts.items()}


def expected(root):
    """Returns {file name: text}, as it should be, of the notebooks, of *.md in the root folder, and of docs/."""
    paths = sorted([*root.glob("[0-9]*.py"), *root.glob("*.md"), *root.glob("docs/**/*.md")])
    texts = {path.relative_to(root).as_posix(): read_text(path) for path in paths}
    texts = address(texts, github(root))
    texts |= stamp({name: text for name, text in texts.items() if name.endswith(".py")})
    texts |= {name.replace(".py", ".ipynb"): build(name, text) for name, text in texts.items() if name.endswith(".py")}
    return texts


def describe(name, have, want):
    """Returns one line about the first difference: file, line, cell, the line as it is and as it should be."""
    line, a, b = first_difference(have, want)
    marker = {".py": "# %%", ".ipynb": '   "cell_type"'}.get(Path(name).suffix)
    starts = [text for text in have.split("\n")[:line] if marker and text.startswith(marker)]
    where = f" in cell {len(starts)}" if starts else ""
    where += f" ({starts[-1]})" if starts and name.endswith(".py") else ""
    return f"{name}:{line}:{where} has {a!r}, should have {b!r}"


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description="Stamp the shared cells and rebuild the .ipynb files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything would change")
    check = parser.parse_args(argv).check
    if not jupytext:
        sys.exit("tools/notebooks.py needs jupytext: pip install -r requirements.txt, or point PYTHON at one with it")
    try:
        want = expected(root)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2

    problems = []
    for path in sorted(root.glob("[0-9]*.ipynb")):
        if path.name not in want:
            problems.append(f"{path.name}: there is no {path.stem}.py; delete it, or make one with jupytext")
    for name, text in want.items():
        if name.endswith((".py", ".md")):
            for line, part in enumerate(text.split("\n"), 1):
                for repo, file in colab_links(part):
                    if repo == github(root) and file not in want:
                        problems.append(f"{name}:{line}: Colab link to {file}, which is not there")
        path = root / name
        have = read_text(path) if path.exists() else None
        if have == text:
            continue
        if check:
            problems.append(f"{name}: missing" if have is None else describe(name, have, text))
        else:
            path.write_bytes(text.encode())
            print(f"wrote {name}")
    for problem in problems:
        print(problem)
    if check and problems:
        print("drift: run ./update_notebooks.sh")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
