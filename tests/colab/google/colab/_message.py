"""Asks the browser, as google.colab._message does."""

import json
import os
import time
from pathlib import Path

import IPython


class MessageError(Exception):
    """The browser refused."""


def settings():
    path = os.environ.get("COLAB_STAND_IN")
    return {"browser": True, "secrets": {}, "denied": []} | (json.loads(Path(path).read_text()) if path else {})


def blocking_request(timeout_sec=None):
    """Waits for a browser: without end if there is no timeout. Returns the settings, or None after the timeout."""
    IPython.get_ipython().kernel  # noqa: B018  (in a script get_ipython() is None, and Colab raises AttributeError)
    deadline = None if timeout_sec is None else time.monotonic() + timeout_sec
    while deadline is None or time.monotonic() < deadline:
        if (now := settings())["browser"]:
            return now
        time.sleep(0.025)
    return None
