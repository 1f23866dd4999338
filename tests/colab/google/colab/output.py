"""What is shown below a cell."""

from google.colab import _message
from IPython import display


def clear(wait=False, output_tags=()):
    display.clear_output(wait)


def eval_js(script, ignore_result=False, timeout_sec=None):
    """Colab runs the script in the browser. Here nothing runs it, and its result is None."""
    display.display(display.Javascript(script))
    if not ignore_result:
        _message.blocking_request(timeout_sec)


def enable_custom_widget_manager():
    pass


def disable_custom_widget_manager():
    pass


def serve_kernel_port_as_iframe(port, path="/", width="100%", height="400", cache_in_notebook=False):
    display.display(display.IFrame(f"http://localhost:{port}{path}", width, height))


def serve_kernel_port_as_window(port, path="/", anchor_text=None):
    address = f"http://localhost:{port}{path}"
    display.display(display.HTML(f'<a href="{address}" target="_blank">{anchor_text or address}</a>'))
