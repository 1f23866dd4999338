"""The runtime itself."""

from pathlib import Path


def unassign():
    """Colab takes the machine away. Here a file in the home says that it would."""
    (Path.home() / "unassigned").touch()
