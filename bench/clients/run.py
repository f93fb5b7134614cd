"""Unmodified clients against `fastdecode serve`, each in an environment of its own: what ran to its end, what did not.

    bash bench/clients/make_smollm2.sh smollm2
    python bench/clients/run.py all|NAME... --model smollm2 [--environments .venv-clients] [--json FILE] [--logs FOLDER]

A client is a program with_NAME.py or with_NAME.mjs beside this one and requirements/NAME.txt, which pins all that its
environment has.  The programs say for each thing they try how it ended; a wire between client and server, which passes
on bytes as they are, says which fields were sent and which were refused.  Records in the file given by --json are
replaced for the clients that ran, and kept for the others.  Other flags go to `fastdecode serve`.  Exit code 1 if
something ended badly that was not refused by the name of a field or of a route.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.clients.checks import NAME
from bench.clients.wire import Exchange, Wire
from cpu_attention import cpu_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLIENTS = {path.stem.removeprefix("with_"): path for path in sorted(HERE.glob("with_*.*"))}


def environment(client: str, folder: Path) -> Path:
    """Its folder, made if it is not there or the requirements have changed."""
    wanted = (HERE / "requirements" / f"{client}.txt").read_text()
    stamp = folder / client / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return folder / client
    print(f"{client}: making {folder / client}", flush=True)
    pins = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    (folder / client).mkdir(parents=True, exist_ok=True)
    if CLIENTS[client].suffix == ".mjs":
        subprocess.run(["npm", "install", "--no-save", *pins], cwd=folder / client, check=True)
    else:
        subprocess.run([os.environ.get("PYTHON", sys.executable), "-m", "venv", str(folder / client)], check=True)
        pip = [
            str(folder / client / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        # torch first and alone: anything else that wants it would take the newest, with gigabytes of CUDA.
        for torch in (pin for pin in pins if pin.startswith("torch==")):
            subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, *pins], check=True)
    stamp.write_text(wanted)
    return folder / client


class Server:
    def __init__(self, model: Path, flags: list[str], log: Path) -> None:
        command = [
            sys.executable, "-m", "fastdecode", "serve", str(model), "--port", "0", "--served-model-name", NAME,
            "--kv-cache-memory", "2GiB", *flags,
        ]  # fmt: skip
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=file, stderr=file
            )
        self.port = self._wait(log)

    def _wait(self, log: Path) -> int:
        while self._process.poll() is None:
            time.sleep(0.5)
            for line in log.read_text().splitlines():
                if "listening on " in line:
                    port = int(line.rpartition(":")[2])
                    if self._is_healthy(port):
                        return port
        raise SystemExit(f"the server ended with {self._process.returncode}:\n{log.read_text()[-2000:]}")

    @staticmethod
    def _is_healthy(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:  # loading
            return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def try_client(client: str, args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    place = environment(client, args.environments)
    server = Server(args.model, args.flags, logs / f"{client}-server.log")
    wire = Wire(server.port)
    record = logs / f"{client}.jsonl"
    record.unlink(missing_ok=True)
    # npm's package `node` is the one that the client's version asks for.
    program = place / "node_modules" / ".bin" / "node" if CLIENTS[client].suffix == ".mjs" else place / "bin" / "python"
    try:
        with tempfile.TemporaryDirectory() as scratch, (logs / f"{client}.log").open("w") as log:
            words = [str(program), str(CLIENTS[client]), "--url", wire.url, "--model", str(args.model)]
            # Nothing of the caller's: no keys, no proxies, no other packages; and no look outside this machine.
            kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "HOME": scratch}
            ended = subprocess.run(
                [*words, "--scratch", scratch, "--record", str(record)],
                cwd=scratch, env={**kept, **offline, "NODE_PATH": str(place / "node_modules")}, stdout=log, stderr=log,
            )  # fmt: skip
        exchanges = wire.exchanges()
    finally:
        wire.close()
        server.stop()
    if ended.returncode:
        raise SystemExit(f"{CLIENTS[client].name} ended with {ended.returncode}: see {logs / client}.log")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {
        "versions": versions(client),
        "asked": sorted({f"{exchange.path} {name}" for exchange in exchanges for name in exchange.fields}),
        "tried": [judged(line, exchanges) for line in lines],
    }


def versions(client: str) -> list[str]:
    """Of what was asked for by name; the rest came with it."""
    lines = (HERE / "requirements" / f"{client}.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("# ")).removeprefix("# ").split()


def judged(line: dict[str, Any], exchanges: list[Exchange]) -> dict[str, Any]:
    """How one thing ended: well, refused (by a field, or a route that is not there), or badly."""
    own = [exchange for exchange in exchanges if line["began"] <= exchange.began <= line["ended"]]
    refusals = sorted({
        f"{exchange.status} {exchange.refusal.get('param') or exchange.path}: {exchange.refusal.get('message')}"
        for exchange in own if exchange.refusal
    })  # fmt: skip
    unexplained = [exchange for exchange in own if exchange.status >= 500 or not exchange.status]
    ended = "well" if line["error"] is None else "refused" if refusals and not unexplained else "badly"
    return {
        "what": line["what"], "ended": ended, "seconds": round(line["ended"] - line["began"], 1), "requests": len(own),
        "refusals": refusals, "told": line["told"],
        "error": line["error"] and re.sub(r"/[^\s\"]*/site-packages/", "", line["error"][-600:]),
    }  # fmt: skip


def table(records: dict[str, Any]) -> str:
    rows = ["| client | tried | ended | requests | refused |", "|---|---|---|---|---|"]
    for client, record in records.items():
        for tried in record["tried"]:
            why = "; ".join(tried["refusals"]) or (tried["error"] if tried["ended"] == "badly" else "") or ""
            cells = (client, tried["what"], tried["ended"], str(tried["requests"]), " ".join(why.split())[:160])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="+", choices=["all", *CLIENTS], metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--model", type=Path, required=True, help="a directory; make_smollm2.sh makes one")
    default = os.environ.get("CLIENT_ENVIRONMENTS", ROOT / ".venv-clients")
    parser.add_argument("--environments", type=Path, default=Path(default), metavar="FOLDER")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="what clients and servers wrote (default: not kept)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args, args.flags = parser.parse_known_args()
    args.model, args.environments = args.model.resolve(), args.environments.resolve()
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        logs = args.logs.resolve() if args.logs else Path(name)
        logs.mkdir(parents=True, exist_ok=True)
        for client in CLIENTS if "all" in args.clients else args.clients:
            records[client] = try_client(client, args, logs)
            print(table({client: records[client]}), flush=True)
    if args.json:
        kept = json.loads(args.json.read_text())["clients"] if args.json.exists() else {}
        facts = {"machine": cpu_name(), "model": args.model.name, "clients": dict(sorted({**kept, **records}.items()))}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(any(tried["ended"] == "badly" for record in records.values() for tried in record["tried"]))


if __name__ == "__main__":
    main()
