"""Tests run on the CPU, whatever the machine has, and never log in anywhere."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, here and in the Jupyter kernels that tests start
os.environ["WANDB_MODE"] = "disabled"
for secret in ("HF_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(secret, None)

import pytest  # noqa: E402

from tools.notebooks import load  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Tests that load libtpu come last: once it is loaded where there is no TPU, jax.profiler crashes the process."""
    items.sort(key=lambda item: item.path.name == "test_tpu_compile.py")


@pytest.fixture(scope="session")
def root():
    """The root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def nb():
    """02_train as a module."""
    return load(ROOT / "02_train.py")
