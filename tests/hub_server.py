"""A Hugging Face Hub of a few files on the loopback interface: downloads, listings, uploads, and what goes wrong.

    path = "/datasets/me/corpus/resolve/main/shard_00000.parquet"
    with HubServer({path: data}, {path: [Fault(status=500, times=2), Fault(cut=1000)]}) as hub:
        subprocess.run([...], env=hub.environment(tmp_path))

huggingface_hub reads HF_ENDPOINT when it is imported: hence a process of its own, with its own home and cache.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs

ALWAYS = 10**9


class Fault(NamedTuple):
    """What goes wrong with the next `times` requests of one method for a path."""

    method: str = "GET"
    status: int = 200  # of the answer; other than 200: no body
    code: str = ""  # the Hub's X-Error-Code
    headers: dict = {}
    body: bytes | None = None  # in place of the file
    cut: int | None = None  # after so many bytes of the body the connection ends, or,
    wait: threading.Event | None = None  # with `wait`, what is left follows when that is set
    times: int = 1


class HubServer:
    """Serves `files`, {URL path: bytes}, and nothing else; `faults`, {URL path: [Fault, …]}, are used up in order.

    `requests` is what was asked for, [(method, path)], and `sent` which bytes of files went out, [(path, start, stop)].
    """

    def __init__(self, files, faults=None):
        self.files, self.repos = dict(files), {path.split("/resolve/")[0] for path in files}
        self.faults = {path: list(faults) for path, faults in (faults or {}).items()}
        self.requests, self.sent, self.page_size, self.commits = [], [], 1000, 1
        self.expired = "hf_expired"  # a token that is refused, whatever it is used for
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                path = re.sub("/(resolve|tree)/[0-9a-f]{40}", r"/\1/main", path)  # a commit's files are those of today
                hub.requests.append((self.command, path))
                fault = hub.next_fault(self.command, path)
                if self.headers.get("Authorization") == f"Bearer {hub.expired}":
                    fault = Fault(status=401)
                api = path.startswith("/api/")
                data, more = hub.listing(path, query) if api else (hub.files.get(path), {})
                if fault.status != 200:
                    return self.answer(fault.status, b"", {"X-Error-Code": fault.code, **fault.headers})
                if data is None:  # the real Hub's words for "no such file" and "no such repo"
                    there = hub.repo(path) in hub.repos
                    return self.answer(
                        404 if there else 401, b"", {"X-Error-Code": f"{'Entry' if there else 'Repo'}NotFound"}
                    )
                headers = more if api else {"ETag": f'"{etag(path, data)}"'}
                data = data if fault.body is None else fault.body
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.answer(206 if start else 200, data[start:], headers | fault.headers, path, start, fault)

            do_HEAD = do_GET

            def do_POST(self):
                hub.requests.append((self.command, self.path))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = hub.next_fault(self.command, self.path).status, {}
                if status == 200:
                    status, answer = hub.post(self.path, [json.loads(line) for line in body.splitlines()])
                self.answer(status, json.dumps(answer).encode(), {})

            def answer(self, status, data, headers, path="", start=0, fault=Fault()):  # noqa: B008
                self.send_response(status)
                for name, value in {"X-Repo-Commit": f"{hub.commits:040x}", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                cut = len(data) if fault.cut is None else max(0, fault.cut - start)
                for part in (data[:cut], data[cut:]):
                    self.wfile.write(part)
                    if path and part:
                        hub.sent.append((path, start, start + len(part)))
                    start += len(part)
                    if fault.cut is not None and (not fault.wait or not fault.wait.wait(600)):
                        break

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # a client that goes away in the middle
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def next_fault(self, method, path):
        with self.lock:
            faults = self.faults.get(path, [])
            for i, fault in enumerate(faults):
                if fault.method == method:
                    faults[i : i + 1] = [fault._replace(times=fault.times - 1)] if fault.times > 1 else []
                    return fault
        return Fault()

    def repo(self, path):
        """The repo of a URL path, as it stands before /resolve/: '/datasets/me/corpus' or '/me/model'."""
        if path.startswith("/api/"):
            kind, owner, name = path.split("/")[2:5]
            return f"/{owner}/{name}" if kind == "models" else f"/{kind}/{owner}/{name}"
        return path.split("/resolve/")[0]

    def listing(self, path, query):
        """(JSON, headers) of a page of a listing, or of all of a repo; (None, …) if there is no such repo or folder."""
        if "/tree/" not in path:
            files = [name.partition("/resolve/main/")[2] for name in self.files if self.repo(name) == self.repo(path)]
            found = {"id": "", "sha": f"{self.commits:040x}", "siblings": [{"rfilename": name} for name in files]}
            return json.dumps(found).encode() if self.repo(path) in self.repos else None, {}
        query, folder = parse_qs(query), path.partition("/tree/main")[2].strip("/")
        names = {name.partition("/resolve/main/")[2]: name for name in self.files if self.repo(name) == self.repo(path)}
        within = f"{folder}/" if folder else ""
        names, folders = {name: full for name, full in names.items() if name.startswith(within)}, []
        if query.get("recursive", [""])[0].lower() != "true":
            folders = sorted({name[len(within) :].split("/")[0] for name in names if "/" in name[len(within) :]})
            names = {name: full for name, full in names.items() if "/" not in name[len(within) :]}
        start = int(query.get("cursor", ["0"])[0])
        entries = [{"type": "directory", "path": within + name, "oid": "0" * 40} for name in folders]
        entries += [
            {"type": "file", "path": name, "size": len(self.files[full]), "oid": etag(full, self.files[full])}
            for name, full in names.items()
        ]
        stop = start + self.page_size
        link = {"Link": f'<{self.url}{path}?recursive=true&cursor={stop}>; rel="next"'} if stop < len(entries) else {}
        there = entries or not folder and self.repo(path) in self.repos
        return (json.dumps(entries[start:stop]).encode() if there else None), link

    def post(self, path, lines):
        """(status, JSON) of what an upload asks for; what is committed is served from then on."""
        if path == "/api/repos/create":
            repo = f"/{lines[0]['organization']}/{lines[0]['name']}"
            status = 409 if repo in self.repos else 200
            self.repos.add(repo)
            return status, {"url": self.url + repo}
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return 200, {"files": files}
        for line in lines:
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.files[f"{self.repo(path)}/resolve/main/{line['value']['path']}"] = data
        self.commits += 1
        return 200, {"commitOid": f"{self.commits:040x}", "commitUrl": f"{self.url}{self.repo(path)}/commit/main"}

    def environment(self, home):
        """os.environ with this Hub for the Hub and `home` for the home folder."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        mine |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
        return mine | {"HOME": str(home), "NO_PROXY": "*"}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def etag(path, data):
    """As the Hub has it: SHA-256 of large files, and git's own hash of others."""
    if path.endswith(".parquet"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
