"""A Hugging Face Hub of a few files on the loopback interface, as much of it as hf_hub_download asks for.

    with HubServer({"/datasets/me/corpus/resolve/main/shard_00000.parquet": data}) as hub:
        subprocess.run([...], env=hub.environment(tmp_path))

huggingface_hub reads HF_ENDPOINT when it is imported: hence a process of its own, with its own home and cache.
"""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"


class HubServer:
    """Serves `files`, {URL path: bytes}, and nothing else. `requests` is what was asked for: [(method, path)]."""

    def __init__(self, files):
        self.files, self.requests = dict(files), []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                path = self.path.split("?")[0]
                hub.requests.append((self.command, path))
                data = hub.files.get(path)
                repo = any(name.startswith(path.split("/resolve/")[0] + "/resolve/") for name in hub.files)
                self.send_response(200 if data is not None else 404 if repo else 401)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data or b"")))
                if data is None:  # the real Hub's words for "no such file" and "no such repo"
                    self.send_header("X-Error-Code", "EntryNotFound" if repo else "RepoNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.end_headers()
                return data

            def do_GET(self):
                self.wfile.write(self.do_HEAD() or b"")

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home):
        """os.environ with this Hub for the Hub and `home` for the home folder."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        return mine | {"HF_ENDPOINT": self.url, "HOME": str(home), "HF_HOME": str(home / "hf"), "NO_PROXY": "*"}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
