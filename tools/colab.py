"""Runs our notebooks in Colab's runtimes, rebuilt here from the lists in tests/colab.

    python tools/colab.py tpu 02_train.ipynb             # one notebook, with the packages of Colab's TPU image
    python tools/colab.py cpu all                        # all notebooks
    python tools/colab.py all all --out looked           # and keep what they wrote: notebook, HTML, run folders
    python tools/colab.py tpu 02_train.ipynb --set num_iterations=20 LENGTH=10

A runtime is a virtual environment of Python 3.13, made once and kept in ~/.cache/tpuchat/colab. Each notebook runs in a
copy of its own, made of hard links: what its first cell installs is gone afterwards. It runs top to bottom in a real
kernel, alone in a folder, with a home of its own, google.colab's stand-in, and none of the caller's settings. The
machine has no TPU and no GPU, so jax computes on the CPU.

A notebook fails if a cell does, or if a package of the runtime is not there afterwards as it was. The exit status is 0
if all is well, 1 if a notebook failed, 2 for a wrong argument, 3 where there is no Python 3.13.
"""

import argparse
import ast
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "colab"
CACHE = Path.home() / ".cache" / "tpuchat" / "colab"
KINDS = ("tpu", "gpu", "cpu")
CELL_SECONDS = 3600  # a cell that takes longer counts as one that never ends

# Prints what the listed packages need and the lists do not name.
MISSING = """
from importlib.metadata import distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
there = {canonicalize_name(d.name) for d in distributions()}
for needed in (Requirement(text) for d in distributions() for text in d.requires or []):
    if canonicalize_name(needed.name) not in there and (not needed.marker or needed.marker.evaluate({"extra": ""})):
        needed.marker = None
        print(needed)
"""

# Executes the notebook in the current folder. Processes that its cells started, such as TensorBoard, end with it.
EXECUTE = """
import contextlib, os, signal, sys
import nbclient, nbformat
from jupyter_client import AsyncKernelManager
name, seconds = sys.argv[1:]
notebook, manager = nbformat.read(name, 4), AsyncKernelManager(kernel_name="python3")
try:
    nbclient.NotebookClient(notebook, km=manager, timeout=int(seconds)).execute()
except nbclient.exceptions.CellExecutionError:
    pass  # it stands in the notebook
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
finally:
    nbformat.write(notebook, name)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(manager.provisioner.pgid, signal.SIGKILL)
"""


class Wrong(Exception):
    """(exit status, one line)."""


def find_python():
    """(path, full version) of a Python 3.13."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.13*/bin/python"))
    for command in filter(None, [sys.executable, shutil.which("python3.13"), *pyenv]):
        code = "import sys; print(sys.executable, sys.version.split()[0])"
        answer = subprocess.run([command, "-c", code], capture_output=True, text=True).stdout  # pyenv's shim may refuse
        path, _, version = answer.strip().rpartition(" ")
        if version.startswith("3.13."):
            return path, version
    raise Wrong(3, "no Python 3.13 in PATH or ~/.pyenv/versions: Colab's runtimes need one; pyenv install 3.13")


def relocate(venv, old, new):
    """Makes the scripts of `venv` start the Python below `new`: they name it by its full path, below `old`."""
    for script in (venv / "bin").iterdir():
        if not script.is_symlink() and os.fsencode(old) in (text := script.read_bytes()):
            mode = script.stat().st_mode
            script.unlink()  # writing in place would change what the hard link shares
            script.write_bytes(text.replace(os.fsencode(old), os.fsencode(new)))
            script.chmod(mode)


def build(kind):
    """Returns the folder of this kind's runtime, and makes it if it is not there."""
    python, version = find_python()
    packages = LISTS / f"{kind}.txt"
    venv = CACHE / f"{kind}-{hashlib.sha256(packages.read_bytes() + version.encode()).hexdigest()[:12]}"
    if venv.exists():
        return venv
    print(f"{kind}  building the runtime in {venv}", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=CACHE) as folder:  # an interrupted build is never used
        made = Path(folder) / "venv"
        python_in_it = made / "bin" / "python"
        pip = [python_in_it, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run([python, "-m", "venv", made], check=True)
            subprocess.run([*pip, "--no-deps", "-r", packages], check=True)
            missing = subprocess.run([python_in_it, "-c", MISSING], check=True, capture_output=True, text=True).stdout
            # Colab's versions of these are not known here: the newest that the listed packages accept.
            subprocess.run([*pip, "-c", packages, *missing.splitlines()], check=True)
        except subprocess.CalledProcessError as error:
            raise Wrong(1, f"cannot install {packages}: exit status {error.returncode}, see above") from None
        relocate(made, made, venv)
        if not venv.exists():  # someone else may have been faster
            made.rename(venv)
    return venv


def site_packages(venv):
    return next((venv / "lib").glob("python3.*")) / "site-packages"


def packages_of(venv):
    """{'numpy 2.1.3': a number that changes when numpy is installed again}."""
    found = {path.name.removesuffix(".dist-info"): path / "RECORD" for path in site_packages(venv).glob("*.dist-info")}
    return {name.replace("-", " "): record.stat().st_ino for name, record in found.items()}


def prepare(folder, venv):
    """Makes a copy of the runtime and a home in `folder`. Returns the copy and the environment of its processes."""
    copy, home = folder / "venv", folder / "home"
    shutil.copytree(venv, copy, symlinks=True, copy_function=os.link)  # pip replaces files, it never writes into them
    relocate(copy, venv, copy)
    shutil.copytree(LISTS / "google", site_packages(copy) / "google", dirs_exist_ok=True)
    profile = home / ".ipython" / "profile_default"
    profile.mkdir(parents=True)
    settings = 'get_config().InteractiveShellApp.extensions = ["google.colab"]\n'
    (profile / "ipython_config.py").write_text(settings, encoding="utf-8")
    # In Colab a lone notebook fetches the embedded corpus from GitHub. Here it gets this commit's, without a network.
    shutil.copytree(ROOT / "data" / "embedded", home / ".cache" / "tpuchat" / "embedded")
    (home / "tmp").mkdir()  # TensorBoard looks in the temporary folder for one that already runs
    # Without a key wandb stays off.
    kept = re.compile(r"LANG|LC_.*|PIP_.*|SSL_.*|REQUESTS_CA_BUNDLE|.*_proxy|.*_PROXY|COLAB_STAND_IN")
    environment = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    path = f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return copy, environment | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PATH": path}


def title(cell):
    return cell["metadata"].get("title", "")


def last_line(text):
    return text.strip().splitlines()[-1]


def moment(times, state):
    return datetime.datetime.fromisoformat(times[f"iopub.status.{state}"]).timestamp()


def change(notebook, name, settings):
    """Changes a notebook as a person would: a NAME in a form, or a field of the Config in a cell below Configure."""
    fields = {}
    for setting in settings:
        field, _, text = setting.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        form = re.compile(rf"^{field} = .*(?=  # @param)", re.M)
        cells = [cell for cell in notebook["cells"] if form.search("".join(cell["source"]))]
        if not field.isupper():
            fields[field] = value
        elif not cells:
            raise Wrong(2, f"--set {setting}: {name} has no form with {field}; fields of its Config are in lower case")
        for cell in cells:
            cell["source"] = form.sub(f"{field} = {value!r}".replace("\\", r"\\"), "".join(cell["source"]))
    if fields:
        cells = [i for i, cell in enumerate(notebook["cells"]) if title(cell) == "Configure"]
        place = cells[0] if cells else 0
        config = re.search(r"^ *(config|base) = ", "".join(notebook["cells"][place]["source"]), re.M)
        if not config:
            raise Wrong(2, f"--set {' '.join(settings)}: {name} has no cell 'Configure' that makes a config or a base")
        cell = {"cell_type": "code", "id": "set", "execution_count": None, "metadata": {"title": "Set"}, "outputs": []}
        notebook["cells"].insert(place + 1, cell | {"source": f"{config[1]} = {config[1]}.replace(**{fields!r})"})


def run(kind, name, settings=(), out=None):
    """Runs a notebook in a runtime, prints how it went, and returns whether all is well."""
    notebook = json.loads((ROOT / name).read_text(encoding="utf-8"))
    change(notebook, name, settings)
    venv = build(kind)
    with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE, ignore_cleanup_errors=True) as folder:
        content = Path(out, kind, Path(name).stem).absolute() if out else Path(folder) / "content"
        if content.exists():
            raise Wrong(2, f"--out {out}: {content} is already there; remove it, or name another folder")
        content.mkdir(parents=True)
        (content / name).write_text(json.dumps(notebook), encoding="utf-8")
        for needed in ROOT.glob("0[28]*.py"):  # in Colab they are fetched from GitHub, where they are needed
            shutil.copyfile(needed, content / needed.name)
        copy, environment = prepare(Path(folder), venv)
        options = dict(cwd=content, env=environment, capture_output=True, encoding="utf-8")
        python, before, start = copy / "bin" / "python", packages_of(copy), time.monotonic()
        done = subprocess.run([python, "-c", EXECUTE, name, str(CELL_SECONDS)], **options)
        seconds, after = time.monotonic() - start, packages_of(copy)
        if out:
            subprocess.run([python, "-m", "nbconvert", "--to", "html", name], **options)
        cells = json.loads((content / name).read_text(encoding="utf-8"))["cells"]

    started = [cell for cell in cells if "execution" in cell["metadata"]]
    errors = [(title(cell), output) for cell in started for output in cell["outputs"] if "ename" in output]
    problems = [f"{where}: {last_line(error['ename'] + ': ' + error['evalue'])}" for where, error in errors]
    if done.returncode:  # the kernel died, or a cell did not end
        problems.append(f"{title(started[-1]) if started else name}: {last_line(done.stderr or 'killed')}")
    if replaced := sorted(package for package, number in before.items() if after.get(package) != number):
        problems.append(f"it replaced or removed {', '.join(replaced)}")
    times = [cell["metadata"]["execution"] for cell in started if title(cell) == "Install"]
    install = sum(moment(time, "idle") - moment(time, "busy") for time in times if "iopub.status.idle" in time)
    added = ", ".join(sorted(after.keys() - before.keys())) or "nothing"
    print(f"{kind}  {name}  {'FAILED' if problems else 'ok'}  {seconds:.0f} s")
    print(f"     installed in {install:.0f} s: {added}")
    for problem in problems:
        print(f"     {problem}")
    sys.stdout.flush()
    return not problems


def main(argv=None):
    parser = argparse.ArgumentParser(description="Runs our notebooks in Colab's runtimes, rebuilt here.")
    parser.add_argument("kind", help=f"{', '.join(KINDS)}, or all")
    parser.add_argument("notebook", help="such as 02_train.ipynb, or all")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the Config, or of forms")
    parser.add_argument("--out", help="a folder that keeps each notebook, its HTML and its run folders")
    options = parser.parse_args(argv)
    names = sorted(path.name for path in ROOT.glob("0*.ipynb"))
    try:
        if options.kind not in (*KINDS, "all"):
            raise Wrong(2, f"no runtime {options.kind!r}: choose {', '.join(KINDS)}, or all")
        if options.notebook not in (*names, "all"):
            raise Wrong(2, f"no notebook {options.notebook!r}: choose {', '.join(names)}, or all")
        if wrong := [setting for setting in options.set if not re.match(r"\w+=", setting)]:
            raise Wrong(2, f"--set {wrong[0]}: must be NAME=VALUE, such as num_iterations=20")
        kinds = KINDS if options.kind == "all" else [options.kind]
        if not any(setting.startswith("RUN=") for setting in options.set):
            names = [name for name in names if not name.startswith("07")]  # it needs a run
        names = names if options.notebook == "all" else [options.notebook]
        return 0 if all([run(kind, name, options.set, options.out) for kind in kinds for name in names]) else 1
    except Wrong as error:
        status, line = error.args
        print(line, file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
