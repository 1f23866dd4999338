"""Stands in for google.colab where there is no Colab: what our notebooks call, behaving as Colab's does.

COLAB_STAND_IN names a JSON file with any of these keys, read anew at each call. Without it a browser is there, and no
secret:

    {"browser": true, "secrets": {"HF_TOKEN": "hf_x"}, "denied": ["WANDB_API_KEY"]}

  - browser: whether a tab is open. Without one, whatever asks the browser waits until one is there.
  - secrets: the secrets of this notebook's owner.
  - denied: the secrets to which this notebook has no access.
"""

from google.colab import drive, output, runtime, userdata

__all__ = ["drive", "output", "runtime", "userdata"]


def load_ipython_extension(shell):
    """Colab's kernel loads google.colab as an extension: hence every notebook finds it in sys.modules."""
