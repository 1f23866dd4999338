"""Colab's secrets panel."""

from google.colab import _message


class SecretNotFoundError(Exception):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class TimeoutException(Exception):
    def __init__(self, key):
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI."
        )


def get(key):
    """The secret. Colab asks without a timeout, hence TimeoutException is never raised, and no browser is no end."""
    now = _message.blocking_request()
    if key not in now["secrets"] and key not in now["denied"]:
        raise SecretNotFoundError(key)
    if key in now["denied"]:
        raise NotebookAccessError(key)
    return now["secrets"][key]
