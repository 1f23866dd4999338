"""A stand-in for wandb's GraphQL API on loopback: a sweep whose suggestions are handed to the agents that ask."""

import base64
import contextlib
import http.server
import json
import re
import threading
import time

KEY = "0123456789" * 4


class WandbServer:
    """Serves `suggestions`, one to each agent that has none under way; then tells them to exit.

    `stop`: ids of runs (`run0`, `run1`, …) that are to be stopped as soon as their agent says that they are running.
    `down`: requests get a 503. `sweep`: the only id that is known, besides those that are created here.
    `results`: what is known of runs, `{name: (state, config, summary, history)}`.
    """

    def __init__(self, suggestions=(), sweep="sweep01", results=()):
        self.results = dict(results)
        self.waiting = [{"run_id": f"run{i}", "args": args} for i, args in enumerate(suggestions)]
        self.sweeps, self.stop, self.down = {sweep: None}, set(), False
        self.agents, self.handed, self.heartbeats, self.refused = [], {}, [], 0
        self.lock = threading.Lock()

    def __enter__(self):
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    status, answer = owner.answer(self.headers.get("Authorization", ""), content)
                self.reply(status, json.dumps(answer).encode())

            def do_GET(self):
                self.reply(404, b"")

            def reply(self, status, body):
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """Variables for a process that knows this server and its key, and logs its runs to files."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "offline", "HOME": str(home)}

    def answer(self, authorization, content):
        if self.down:
            return 503, {"errors": [{"message": "down"}]}
        if authorization != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
            self.refused += 1
            return 401, {"errors": [{"message": "user is not logged in"}]}
        query, variables = content["query"], content.get("variables") or {}
        if name := re.search(r"upsertSweep|createAgent|agentHeartbeat|viewer|sampledHistory|runs\(|sweep\(", query):
            return 200, getattr(self, name[0].strip("("))(variables)
        return 400, {"errors": [{"message": f"not known here: {query[:60]}"}]}

    def viewer(self, variables):
        return {
            "data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        }

    def upsertSweep(self, variables):
        name = f"created{len(self.sweeps)}"
        self.sweeps[name] = variables["config"]
        project = {"id": "1", "name": variables["projectName"], "entity": {"name": "me"}}
        return {"data": {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}}

    def createAgent(self, variables):
        if variables["sweep"] not in self.sweeps:
            return {
                "errors": [{"message": f"could not find sweep {variables['sweep']}"}],
                "data": {"createAgent": None},
            }
        self.agents.append(f"agent{len(self.agents)}")
        return {"data": {"createAgent": {"agent": {"id": self.agents[-1]}}}}

    def agentHeartbeat(self, variables):
        running = list(json.loads(variables["runState"] or "{}"))
        self.heartbeats.append((time.monotonic(), variables["id"], running))
        commands = [{"type": "stop", "run_id": run} for run in running if run in self.stop]
        self.stop -= set(running)
        if not running:
            if self.waiting:
                command = self.waiting.pop(0)
                self.handed[command["run_id"]] = variables["id"]
                args = {name: {"value": value} for name, value in command["args"].items()}
                commands = [{"type": "run", "run_id": command["run_id"], "args": args}]
            else:
                commands = [{"type": "exit"}]
        return {"data": {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}}

    def sweep(self, variables):
        if variables["name"] not in self.sweeps:
            return {"data": {"project": {"sweep": None}}}
        known = dict(id="1", name=variables["name"], state="FINISHED", method="bayes", config="method: bayes")
        rest = dict(displayName=None, description=None, bestLoss=None, updatedAt=None, runCountExpected=None)
        times = dict(createdAt="2026-01-01T00:00:00", runCount=len(self.results))
        return {"data": {"project": {"sweep": {"__typename": "Sweep", **known, **rest, **times}}}}

    def runs(self, variables):
        names = list(self.results) if json.loads(variables["filters"]) == {"$and": [{"sweep": "sweep01"}]} else []
        edges = [{"node": self.run(name), "cursor": name} for name in names]
        page = {"endCursor": None, "hasNextPage": False}
        return {"data": {"project": {"runCount": len(edges), "runs": {"edges": edges, "pageInfo": page}}}}

    def run(self, name):
        state, config, summary, history = self.results[name]
        config = {key: {"value": value} for key, value in config.items()}
        return {
            "name": name, "displayName": name, "sweepName": "sweep01", "state": state, "id": name, "projectId": 1,
            "config": json.dumps(config), "summaryMetrics": json.dumps(summary), "historyLineCount": len(history),
        }  # fmt: skip

    def sampledHistory(self, variables):
        lines = [
            dict(_step=i, step=step, val_bpb=bpb) for i, (step, bpb) in enumerate(self.results[variables["name"]][3])
        ]
        return {"data": {"project": {"run": {"sampledHistory": [lines]}}}}
