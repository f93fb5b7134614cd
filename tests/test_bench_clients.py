"""What is told of other people's clients: which fields they sent, and which were refused."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.clients.run import CLIENTS, HERE, ROOT, judged, versions
from bench.clients.wire import Wire


class _Answers(BaseHTTPRequestHandler):
    """Refuses `tools`; streams whatever else."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "tools" in asked:
            body = json.dumps({"error": {"message": "tools: not here", "param": "tools"}}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (b"data: {}\r\n\r\n", b"data: [DONE]\r\n\r\n"):
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def wire() -> Iterator[Wire]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wire = Wire(server.server_port)
    yield wire
    wire.close()
    server.shutdown()
    server.server_close()


def test_fields_and_refusals_are_read_off_the_wire(wire: Wire) -> None:
    """Also of requests that share a connection, and of answers in chunks."""
    began = time.time()
    connection = http.client.HTTPConnection("127.0.0.1", int(wire.url.rpartition(":")[2]), timeout=60)
    for body in ({"model": "m", "stream": True}, {"model": "m", "tools": [1]}, {"prompt": "ü"}):
        connection.request("POST", "/v1/completions?a=b", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.read() and answer.status == (400 if "tools" in body else 200)
    connection.close()
    first, second, third = wire.exchanges()
    assert [one.path for one in (first, second, third)] == ["/v1/completions"] * 3
    assert [one.fields for one in (first, second, third)] == [["model", "stream"], ["model", "tools"], ["prompt"]]
    assert [one.status for one in (first, second, third)] == [200, 400, 200]
    assert first.refusal is None and second.refusal == {"message": "tools: not here", "param": "tools"}
    line = {"what": "tools", "began": began, "ended": time.time(), "told": None, "error": "BadRequestError: ..."}
    told = judged(line, wire.exchanges())
    assert (told["ended"], told["requests"], told["refusals"]) == ("refused", 3, ["400 tools: tools: not here"])
    assert judged({**line, "error": None}, wire.exchanges())["ended"] == "well"
    assert judged(line, [first, third])["ended"] == "badly"


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_is_pinned(client: str) -> None:
    pins = [line for line in (HERE / "requirements" / f"{client}.txt").read_text().splitlines() if line[:1] != "#"]
    named = {pin.replace("@", "==").replace("-", "_").lower() for pin in pins}
    assert all("==" in pin for pin in named)
    assert {version.replace("-", "_").lower() for version in versions(client)} <= named


def test_the_page_tells_of_every_client_as_it_was_run() -> None:
    """Versions are those that are pinned and those of the record, in which nothing ended badly."""
    records = json.loads((ROOT / "bench" / "results" / "clients.json").read_text())["clients"]
    rows = (ROOT / "docs" / "clients.md").read_text().replace("`", "").splitlines()
    assert records.keys() == CLIENTS.keys()
    for client, record in records.items():
        assert record["versions"] == versions(client)
        name, _, version = record["versions"][0].partition("==")
        row = next(row for row in rows if row.startswith(f"| {name.replace('_', '-')} {version} "))
        tried = record["tried"]
        assert {one["ended"] for one in tried} <= {"well", "refused"}
        refused = {
            refusal.split()[1].rstrip(":") for one in tried if one["ended"] == "refused" for refusal in one["refusals"]
        }
        assert not [field for field in refused if field not in row]
