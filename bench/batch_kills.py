"""`run-batch` killed again and again, and resumed: nothing is lost, nothing comes twice, and nothing differs.

    python bench/batch_kills.py [--lines 500] [--kills 20] [--model DIR] [--chats] [--transport inproc] [--json FILE]

Lines are completions of the demonstration's model, or with --chats conversations for a model that has a chat template
(bench/clients/make_smollm2.sh makes one).  A run is left alone first.  Then the same file is done by runs that get
SIGKILL at random moments, at the start as well as between and within results; the last one is left alone, and the
joined output has to have every custom_id once with the same choices as the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]

_THINGS = ("a river", "日本の朝ごはん", "the number {}", "Grüße aus Köln 🙂", "a train that is {} minutes late")


def make_input(path: Path, num_lines: int, max_tokens: int = 60, *, is_chat: bool = False) -> Path:
    """Prompts that are all different, outputs of many lengths, half of them drawn."""
    with path.open("w") as file:
        for i in range(num_lines):
            body: dict[str, Any] = {"max_tokens": 1 + i % max_tokens, "temperature": i % 2}
            if is_chat:
                thing = _THINGS[i % len(_THINGS)].format(i)
                body["messages"] = [{"role": "user", "content": f"{i}: write a sentence about {thing}."}]
                if i % 3 == 0:
                    body["messages"].insert(0, {"role": "system", "content": "You answer in one short sentence."})
            else:
                body["prompt"] = f"# {i}\nimport"
            url = "/v1/chat/completions" if is_chat else "/v1/completions"
            file.write(json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}) + "\n")
    return path


def start(model: Path, source: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "fastdecode", "run-batch", "-i", str(source), "-o", str(out), "--model", str(model),
        "--kv-cache-memory", "64MiB", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"run-batch ended with {process.returncode}:\n{said}")


def choices(path: Path) -> dict[str, Any]:
    """By custom_id.  Raises ValueError if one comes twice, or a line is torn."""
    found: dict[str, Any] = {}
    for raw in path.read_text().splitlines():
        record = json.loads(raw)
        if record["custom_id"] in found:
            raise ValueError(f"{record['custom_id']} comes twice")
        found[record["custom_id"]] = record["response"]["body"]["choices"]
    return found


def lines_written(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def kill_and_resume(
    model: Path, source: Path, out: Path, generator: np.random.Generator, num_lines: int, num_kills: int, *flags: str
) -> list[dict[str, Any]]:
    """Moments and how far each run got.

    A kill comes a random time after a random number of new results, so few that all the kills find work to break off;
    one in five comes at a random moment of the start, before the first.
    """
    kills = []
    for number in range(num_kills):
        before = lines_written(out)
        left = num_lines - before
        wanted = 0 if number % 5 == 4 else int(generator.integers(1, max(2, 2 * left // (num_kills - number + 2))))
        pause_s = float(generator.uniform(0.0, 4.0 if wanted == 0 else 0.05))
        began = time.monotonic()
        process = start(model, source, out, "--resume", *flags)
        while lines_written(out) < before + wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(pause_s)
        was_running = process.poll() is None
        process.kill()
        process.communicate()
        kills.append({
            "after_s": time.monotonic() - began, "lines_before": before, "lines_after": lines_written(out),
            "was_running": was_running, "is_torn": out.exists() and not out.read_bytes().endswith(b"\n"),
        })  # fmt: skip
    finish(start(model, source, out, "--resume", *flags))
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("lines", 500), ("kills", 20), ("max-tokens", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, default=ROOT / "scripts" / "demo_model")
    parser.add_argument("--chats", action="store_true", help="conversations; the model has to have a chat template")
    parser.add_argument("--transport", default="inproc", choices=("inproc", "shm", "ipc", "tcp"))
    parser.add_argument("--kv-cache-memory", default="64MiB", metavar="BYTES")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as name:
        source, whole, out = (Path(name) / file for file in ("in.jsonl", "whole.jsonl", "out.jsonl"))
        make_input(source, args.lines, args.max_tokens, is_chat=args.chats)
        flags = ("--transport", args.transport, "--kv-cache-memory", args.kv_cache_memory)
        finish(start(args.model, source, whole, *flags))
        kills = kill_and_resume(args.model, source, out, generator, args.lines, args.kills, *flags)
        expected, found = choices(whole), choices(out)
    print(f"{'kill':>4} {'after':>8} {'lines before':>13} {'after':>6}")
    for number, kill in enumerate(kills, 1):
        note = "" if kill["was_running"] else "  it had ended"
        print(f"{number:4} {kill['after_s']:6.2f} s {kill['lines_before']:13} {kill['lines_after']:6}{note}")
    missing = sorted(expected.keys() - found.keys())
    differing = [name for name in found if found[name] != expected.get(name)]
    is_equal = len(expected) == args.lines and not missing and not differing
    num_struck = sum(kill["was_running"] for kill in kills)
    print(
        f"{num_struck} kills struck a run, {sum(a['lines_after'] > a['lines_before'] for a in kills)} of them in the "
        f"middle of results; {len(found)} lines, {len(missing)} missing, {len(differing)} differ"
    )
    if args.json:
        names = ("lines", "kills", "chats", "max_tokens", "seed", "transport")
        settings = {"model": args.model.name, **{name: getattr(args, name) for name in names}}
        facts = {"settings": settings, "kills": kills, "is_equal": is_equal}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(0 if is_equal and num_struck == args.kills else 1)


if __name__ == "__main__":
    main()
