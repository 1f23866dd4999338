"""Tests run on the CPU, whatever the machine has, and never log in; `pytest -m accelerator` runs on the device."""

import os
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with SIGINT ignored

if "accelerator" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, here and in the processes that tests start
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/tpuchat/xla"))  # also with another HOME
for secret in ("HF_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(secret, None)

import pytest  # noqa: E402

from tools.notebooks import load  # noqa: E402

pytest.register_assert_rewrite("tests.helpers")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Tests that load libtpu come last: once it is loaded where there is no TPU, jax.profiler crashes the process."""
    items.sort(key=lambda item: item.path.name == "test_tpu_compile.py")


@pytest.fixture(autouse=True)
def unread_secrets():
    """A notebook reads a secret once in a process; each test has its own."""
    for name in [name for name in sys.modules if name.startswith(("nb_", "subject_"))]:
        if hasattr(sys.modules[name], "get_secret"):
            sys.modules[name].get_secret.cache_clear()


@pytest.fixture(scope="session")
def root():
    """The root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)  # it sets XLA's flags, which must precede the first computation
def nb():
    """02_train as a module."""
    return load(ROOT / "02_train.py")


@pytest.fixture(scope="session")
def nb01():
    """01_tokenizer as a module."""
    return load(ROOT / "01_tokenizer.py")


@pytest.fixture(scope="session")
def worker():
    """03_worker as a module."""
    return load(ROOT / "03_worker.py")


@pytest.fixture(scope="session")
def mt():
    """04_maxtext as a module."""
    return load(ROOT / "04_maxtext.py")


@pytest.fixture(scope="session")
def recipe():
    """06_recipe as a module."""
    return load(ROOT / "06_recipe.py")


@pytest.fixture(scope="session")
def tokenizer(nb):
    """The embedded tokenizer."""
    return nb.load_tokenizer(ROOT / "data" / "embedded" / "tokenizer")


@pytest.fixture(scope="session")
def finished(nb, tmp_path_factory):
    """(Config, what train returned) of a run of twelve steps that nothing happened to. Read only: copy the folder."""
    from tests.helpers import tiny

    config = tiny(nb, tmp_path_factory.mktemp("finished") / "run", profile_steps=3)
    return config, nb.train(config)
