"""A Kubernetes cluster for tests: its API on this machine, which runs a job's container as a process of its own.

What the workflow asks of a cluster is checked as the API server does, and recorded. Not here: images, isolation, and
the scheduling of pods on nodes.
"""

import base64
import contextlib
import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[\w.]+))/v1/namespaces/[\w-]+/(?P<kind>\w+)(?:/(?P<name>[\w-]+))?(?P<sub>/\w+)?"
)
VERBS = {"POST": "create", "DELETE": "delete", "GET": "get"}


class Cluster:
    """`pods` holds the container of every job, `asked` what role-based access control must allow."""

    def __init__(self, path: Path, environment: Mapping[str, str]):
        self.path, self.environment = path, dict(environment)
        self.lock = threading.Lock()
        self.secrets: dict[str, dict[str, str]] = {}
        self.pods: dict[str, dict] = {}
        self.states: dict[str, str] = {}
        self.asked: set[tuple[str, str, str]] = set()

    def answer(self, method: str, path: str, body: dict) -> tuple[int, dict]:
        match = PATH.fullmatch(urlsplit(path).path)
        assert match, path
        group, kind, name, sub = match["group"] or "", match["kind"], match["name"], match["sub"] or ""
        verb = VERBS[method] if name or method != "GET" else "list"
        self.asked.add((verb, group, kind + sub))
        if (verb, kind) == ("create", "secrets"):
            data = {key: base64.b64decode(value).decode() for key, value in (body.get("data") or {}).items()}
            self.secrets[body["metadata"]["name"]] = data
        if (verb, kind) == ("create", "jobs"):
            return self.submit(body)
        if (verb, kind) == ("get", "jobs"):
            return 200, {"status": {self.states[name]: 1}}
        return 200, {"items": []}

    def submit(self, body: dict) -> tuple[int, dict]:
        spec = body["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        fault = fault_of(container["resources"])
        if fault:
            return 422, {"message": fault}
        name = body["metadata"]["name"]
        self.pods[name] = {**container, "volumes": spec["volumes"], "nodeSelector": spec.get("nodeSelector")}
        self.states[name] = "active"
        threading.Thread(target=self.run, args=(name, container), daemon=True).start()
        return 201, body

    def run(self, name: str, container: dict) -> None:
        secret = {
            item["name"]: self.secrets[item["valueFrom"]["secretKeyRef"]["name"]][
                item["valueFrom"]["secretKeyRef"]["key"]
            ]
            for item in container.get("env") or []
        }
        with (
            self.lock,
            tempfile.TemporaryDirectory(dir=self.path) as folder,
            (self.path / f"{name}.log").open("w") as log,
        ):
            code = subprocess.run(
                [*container["command"], *container["args"]],
                cwd=folder,
                env=self.environment | secret,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        self.states[name] = "failed" if code else "succeeded"


def fault_of(resources: dict) -> str:
    """Of an extended resource, such as GPUs, the limit must be given, and equal to the request."""
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name in requests:
        if "/" in name and limits.get(name) != requests[name]:
            return f"spec.containers[0].resources.limits: Required value: Limit must be set for {name}"
    return ""


@contextlib.contextmanager
def cluster(path: Path, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """The API, on a free port of this machine; `path`/kubeconfig tells its address."""
    path.mkdir()
    state = Cluster(path, environment)

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            code, answer = state.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = reply

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (path / "kubeconfig").write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "test", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "current-context": "test",
            }
        )
    )
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
