"""The commands that the README, docs/ and cloud/ tell a reader to type exist: files, options, values, verbs."""

import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from tools.notebooks import load

ROOT = Path(__file__).resolve().parents[2]
PAGES = "budget changes cloud data dependencies evaluate gpu interruptions many-chips recipe speed sweeps watch"
DOCS = ["README.md", *(f"docs/{name}.md" for name in PAGES.split())]
DOCS += sorted(f"cloud/{path.name}" for path in (ROOT / "cloud").glob("[!.]*.*"))
BEFORE = {"--preset", "--help"}  # options that a notebook takes from the command line before parse_args sees the rest
WORKER = {"--sweep_id", "--project", "--entity", "--runs", "--trials"}  # 03_worker's own
NUMBER = {f"--{name}" for name in ("runs", "trials")}
COMMAND = re.compile(r"(?:\bpython|host\.sh start) +(?:-u +)?(0\w+\.(?:py|ipynb))((?:'[^'\n]*'|[^\n`'#|;&)])*)")


def read(doc):
    return (ROOT / doc).read_text(encoding="utf-8")


def commands(text):
    """[(notebook, its options)] of each command line that starts a notebook, here or on a host."""
    return [
        (notebook, shlex.split(rest.replace('"', " "))) for notebook, rest in COMMAND.findall(text.replace("\\\n", " "))
    ]


def check_command(notebook, options):
    """Raises ValueError or FileNotFoundError if the notebook would refuse the options."""
    if notebook.startswith("05") and options[:1] == ["plan"]:
        return load(ROOT / notebook).parse_plan(options[1:])
    if notebook.startswith("05"):  # another notebook, chips, and options of the former
        notebook, _, own, options = load(ROOT / notebook).parse_command(options)
        if own.help:
            return
        options += [f"--preset={own.preset}"] if own.preset else []
    own = BEFORE
    if notebook.startswith("03"):  # another notebook, options of the search, and options of that notebook
        own = BEFORE | WORKER
        notebook = options.pop(0) if options and options[0].endswith(".py") else "02_train.py"
    module = load(ROOT / notebook)
    if notebook.startswith("07"):
        return module.parse_command(options)
    rest, words = [], [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        name = words.pop(0)
        value = [words.pop(0)] if words and not words[0].startswith("--") else []
        if not name.startswith("--"):
            raise ValueError(f"{name!r} is no option")
        if name not in own:
            rest += [name, *value]
        elif name in NUMBER:
            int(*value)
    default = module.Config.demo() if hasattr(module.Config, "demo") else module.Config()
    module.parse_args(rest, default)


def missing_files(doc, text):
    """Of the links, and of the paths below our folders and the requirements that a text names, those not there."""
    here = (ROOT / doc).parent
    links = [link for link in re.findall(r"\]\(([^)\s#]+)\)", text) if "://" not in link]
    paths = re.findall(r"(?<![\w.])((?:benchmarks|cloud|docs|tests|tools)/[\w/.-]*\w)", text)
    paths += re.findall(r"-r +([\w./-]+\w)", text) + [notebook for notebook, _ in commands(text)]
    lost = [link for link in links if not (here / link).exists()]
    return lost + [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("doc", DOCS)
def test_commands_are_understood(doc):
    for notebook, options in commands(read(doc)):
        check_command(notebook, options)


@pytest.mark.parametrize("doc", DOCS)
def test_named_files_exist(doc):
    assert not missing_files(doc, read(doc))


def test_every_page_is_checked():
    assert sorted(doc for doc in DOCS if doc.startswith("docs/")) == sorted(
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")
    )


def test_every_way_to_start_a_run_is_found():
    """Otherwise the tests above would pass on nothing."""
    found = {doc: [notebook for notebook, _ in commands(read(doc))] for doc in DOCS}
    assert {"02_train.py", "05_preflight.py"} <= set(found["README.md"])
    assert found["docs/cloud.md"].count("04_maxtext.py") == 2  # on hosts: by host.sh, and by xpk
    assert found["cloud/sky.yaml"] == ["04_maxtext.py"]
    text = 'on "tpuchat/cloud/host.sh start 04_maxtext.py --seed 1 --run_dir /mnt/a"  # again\n'
    text += "    'pip install x &&\n exec python 02_train.py --seed=2' && python 01_tokenizer.py \\\n  --help\n"
    assert commands(text) == [
        ("04_maxtext.py", ["--seed", "1", "--run_dir", "/mnt/a"]),
        ("02_train.py", ["--seed=2"]),
        ("01_tokenizer.py", ["--help"]),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "python 02_train.py --n_heads 6",
        "python 02_train.py --n_head six",
        "python 02_train.py --n_head 0",
        "python 04_maxtext.py run --seed 1",
        "python 02_train.py --trials 3",
        "python 02_train.py --preflight v6e",  # 05_preflight.py has replaced it
        "python 05_preflight.py 02_train.py v6e:2*4",
        "python 05_preflight.py plan v6e --creditz 12",
        "python 05_preflight.py 02_train.py v6e --n_heads 6",
        "python 05_nothing.py",
        "python 07_evaluate.py runs/demo --task quick",
        "python 07_evaluate.py --limit 500",
        "~/venv/bin/python 04_maxtext.py --presets v6e_8",
    ],
)
def test_a_wrong_command_is_refused(line):
    ((notebook, options),) = commands(line)
    with pytest.raises((ValueError, FileNotFoundError)):
        check_command(notebook, options)


def test_a_missing_file_is_named():
    text = "[a](nothing.md) [b](../README.md) [c](https://x.org/y) `bash cloud/none.sh` -r requirement.txt"
    assert missing_files("cloud/host.md", text) == ["nothing.md", "cloud/none.sh", "requirement.txt"]


def test_host_script():
    """It is bash, knows each verb that the docs use, and without one says what there is."""
    script = ROOT / "cloud" / "host.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    verbs = set(re.findall(r"^(\w+)\) ", read("cloud/host.sh"), re.M))
    used = {verb for doc in DOCS for verb in re.findall(r"cloud/host\.sh (\w+)", read(doc))}
    assert verbs == used == {"setup", "run", "start", "stop"}
    told = subprocess.run(["bash", script], capture_output=True, text=True)
    assert told.returncode == 2
    assert all(f"host.sh {verb}" in told.stderr for verb in verbs)


@pytest.fixture
def host(tmp_path):
    """host.sh, as on a host where the mount is there, with a Python that only notes what it is given."""
    tools, venv = tmp_path / "tools", tmp_path / "venv" / "bin"
    for folder in (tools, venv):
        folder.mkdir(parents=True)
    python = "#!/bin/bash\n[[ $1 == -c ]] && exit 1\n"  # asked for the version of jax: an old one
    python += "trap 'sleep 0.5; echo saved; exit 143' TERM\n"
    python += 'echo "$@" "$HF_TOKEN"\nwhile :; do sleep 0.1; done\n'
    for path, text in ((tools / "mountpoint", "#!/bin/sh\n"), (venv / "python", python)):
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "tpuchat.env").write_text("HF_TOKEN=hidden\n")
    env = {"HOME": str(tmp_path), "PATH": f"{tools}:/usr/bin:/bin"}

    def run(*words, **more):
        command = ["bash", ROOT / "cloud" / "host.sh", *words]
        return subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=30)

    run.home = tmp_path
    yield run
    run("stop")


def test_start_and_stop_on_a_host(host):
    """A second start is refused; stop waits for the checkpoint; then the same start is accepted."""
    log = host.home / "tpuchat.log"
    assert host("stop").returncode == 0  # nothing runs
    assert host("start", "02_train.py", "--seed", "1").returncode == 0
    while not log.read_text():
        time.sleep(0.05)
    again = host("start", "02_train.py")
    assert (again.returncode, "already running" in again.stderr) == (1, True)
    assert host("stop").returncode == 0
    *words, last = log.read_text().splitlines()
    assert words == ["-u 02_train.py --seed 1 hidden", "saved"]
    assert last.startswith("host.sh: stopped by SIGTERM, here or on another host; start the same command on all hosts")
    assert host("start", "02_train.py").returncode == 0


@pytest.mark.parametrize(
    ("ends", "status", "words"),
    [
        ("exit 0", 0, ""), ("exit 2", 2, ""), ("exit 1", 1, "ended with exit status 1, see above"),
        ("kill -ABRT $$", 134, "ended by SIGABRT, most likely since another host is gone"),
        ("kill -KILL $$", 137, "killed by SIGKILL, perhaps for its memory"),
    ],
)  # fmt: skip
def test_run_says_what_has_ended_the_process(host, ends, status, words):
    """The process has what several hosts need, the user's own flags last; its exit status is that of host.sh."""
    python = host.home / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exit\necho "$TPUCHAT_HOSTS" $LIBTPU_INIT_ARGS "$@"\n{ends}\n')
    done = host("run", python, "02_train.py", "--seed", "1", LIBTPU_INIT_ARGS="--own")
    hosts, *flags, own, _, _, _ = done.stdout.split()
    assert (hosts, own, len(flags)) == ("many", "--own", 5) and all(flag.endswith("=true") for flag in flags)
    last = done.stderr.splitlines()[-1] if words else ""
    assert done.returncode == status and words in last
    assert last.endswith("it goes on from the newest checkpoint" * bool(words))


def test_no_start_without_the_mount(host):
    (host.home / "tools" / "mountpoint").write_text("#!/bin/sh\nexit 1\n")
    start = host("start", "02_train.py")
    assert (start.returncode, "not mounted" in start.stderr) == (1, True)
    assert not (host.home / "tpuchat.log").exists()


def test_sky_task():
    """Its two scripts are bash, and use no variable that it does not declare."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load(read("cloud/sky.yaml"))
    assert task["envs"]["BUCKET"] is None  # nobody else's bucket by default
    assert task["resources"]["autostop"]["down"]  # a slice of several hosts cannot be stopped, only deleted
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
        assert set(re.findall(r"\$(\w+)", script)) <= set(task["envs"])


def test_no_secret_on_a_command_line():
    for doc in DOCS:
        assert not re.search(r"(--env|--secret|export) +(HF_TOKEN|WANDB_API_KEY)=", read(doc)), doc
