"""Where KV pays: GPU-only, full offload and both, in virtual time over devices, models, outputs and CPU sockets.

    python bench/placement.py [--out bench/results/placement.json] [--plot docs/placement.png]
    python bench/placement.py --brute-force            the best of fixed choices beside, for some of the cells

The engine's scheduler on the step times of a performance model:

    T(B)         of the named GPU, for the model's blocks (fastdecode/modelling/simulation/devices.py)
    device       memory beside the weights in 16 bits, and attention at 0.7 of its bandwidth
    R            a socket reads KV at 135 GB/s, as those of the paper do
    link         PCIe at 20 GB/s for q, k, v and o of a row, and 100 us for the messages of a block

GPU-only has one lane and no R-workers, full offload no KV on the device; both are given what serves them best: as many
lanes as pay.  The brute force tries lanes, shares of the device's memory and limits of the R-workers' load, each held
throughout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from fastdecode import __version__
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.cost import SplitCost
from fastdecode.modelling.simulation.devices import MEMORY, gpu_model
from fastdecode.modelling.simulation.latency import summary
from fastdecode.modelling.simulation.simulator import simulate
from fastdecode.modelling.simulation.workload import make_jobs, parse_arrivals
from fastdecode.observe.plots import check_plotting
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.scheduler import Scheduler

SOCKET_BYTES_PER_S, SOCKET_MEMORY = 135e9, 256 * 10**9
LINK_BYTES_PER_S, MESSAGES_S = 20e9, 100e-6
OVERLAP = 3.3  # as fitted to the paper's steps, see modelling/simulation/cost.py
BLOCK_TOKENS, MAX_NUM_SEQS, PROMPT_TOKENS = 16, 1024, 128


@dataclass(frozen=True)
class Model:
    num_layers: int
    block_parameters: int
    parameters: int
    q_size: int  # numbers of a row's q
    kv_size: int  # and of its k, or v


MODELS = {
    "7B MHA": Model(32, 202_400_000, 6_738_000_000, 4096, 4096),
    "8B GQA": Model(32, 218_100_000, 8_030_000_000, 4096, 1024),
}
DEVICES = ("a10", "h100")
OUTPUTS = (64, 512, 4096)
SOCKETS = (0, 1, 2, 4, 10)


@dataclass(frozen=True)
class Cell:
    device: str
    model: str
    output_tokens: int
    sockets: int

    @property
    def times(self) -> PerfModel:
        model, memory = MODELS[self.model], MEMORY[self.device]
        s_part = gpu_model(self.device, model.block_parameters, model.num_layers)
        kv_bytes = 4 * model.kv_size  # K and V of a token in a block, 16 bits
        return replace(
            s_part,
            kv_token_seconds=kv_bytes / SOCKET_BYTES_PER_S,
            r_fixed_seconds=MESSAGES_S,
            r_row_seconds=2 * (2 * model.q_size + 2 * model.kv_size) / LINK_BYTES_PER_S,
            overlap=OVERLAP,
            device_kv_token_seconds=kv_bytes / memory.bytes_per_s,
            device_fixed_seconds=memory.attention_seconds(0),
        )

    @property
    def device_blocks(self) -> int:
        model = MODELS[self.model]
        free = 0.9 * MEMORY[self.device].num_bytes - 2 * model.parameters
        return int(free / (4 * model.kv_size * model.num_layers * BLOCK_TOKENS))

    @property
    def socket_blocks(self) -> int:
        model = MODELS[self.model]
        return int(SOCKET_MEMORY / (4 * model.kv_size * model.num_layers * BLOCK_TOKENS))


@dataclass(frozen=True)
class Run:
    tokens_per_s: float
    mean_running: float
    mean_load: float
    peak_device_kv: int
    seconds: float  # simulated
    lane_changes: int = 0
    plans: int = 0


def run(cell: Cell, num_requests: int, **options: object) -> Run:
    """One simulation.  options: of the scheduler, and times=None for one without a model."""
    generator = np.random.default_rng(0)
    length = cell.output_tokens
    jobs = make_jobs(num_requests, str(PROMPT_TOKENS), f"normal:{length}:0.3:{2 * length}", None, generator)
    config: dict[str, object] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 4096,
        "num_lanes": 2,
        "block_tokens": BLOCK_TOKENS,
        "capacity_blocks": (cell.socket_blocks,) * cell.sockets,
        "device_blocks": cell.device_blocks,
        "times": cell.times,
    }
    scheduler = Scheduler(SchedulerConfig(**(config | options)))  # type: ignore[arg-type]
    lanes: list[int] = []
    simulation = simulate(
        scheduler, jobs, parse_arrivals("offline", generator, num_requests), SplitCost(cell.times), cell.sockets,
        on_step=lambda _: lanes.append(scheduler.num_lanes_in_use),
    )  # fmt: skip
    figures = summary(simulation)
    return Run(
        float(figures["output_tokens_per_s"]),  # type: ignore[arg-type]
        float(figures["mean_running"]),  # type: ignore[arg-type]
        float(figures["mean_load"]),  # type: ignore[arg-type]
        int(figures["peak_device_kv"]),  # type: ignore[call-overload]
        simulation.seconds,
        int(np.count_nonzero(np.diff(lanes))),
        scheduler.num_plans,
    )


def modes(cell: Cell, num_requests: int) -> dict[str, Run]:
    """GPU-only, where sockets are none; otherwise full offload and both."""
    if not cell.sockets:
        return {"GPU-only": run(cell, num_requests, num_lanes=1)}
    return {"full offload": run(cell, num_requests, device_blocks=0), "both": run(cell, num_requests)}


def brute_force(cell: Cell, num_requests: int, **options: object) -> tuple[float, dict[str, object]]:
    """Tokens per second of the best of fixed choices, and which one that is.  options: of the scheduler, beside."""
    best: tuple[float, dict[str, object]] = (0.0, {})
    most = cell.socket_blocks * BLOCK_TOKENS * cell.sockets
    needed = int(options.get("max_num_seqs", MAX_NUM_SEQS)) * (PROMPT_TOKENS + cell.output_tokens)  # type: ignore[call-overload]
    loads = sorted({min(most, int(needed * share)) for share in (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)})
    for lanes, share, load in product((1, 2), (0.0, 0.5, 1.0), loads):
        choice: dict[str, object] = {
            "num_lanes": lanes, "device_blocks": int(share * cell.device_blocks), "max_kv_load": load,
        }  # fmt: skip
        tokens_per_s = run(cell, num_requests, **options, times=None, **choice).tokens_per_s
        best = max(best, (tokens_per_s, choice), key=lambda one: one[0])
    alone = run(replace(cell, sockets=0), num_requests, num_lanes=1, times=None, **options).tokens_per_s
    return max(
        best, (alone, {"num_lanes": 1, "device_blocks": cell.device_blocks, "max_kv_load": 0}), key=lambda o: o[0]
    )


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    for device, model, length, sockets in product(args.devices, args.models, args.outputs, args.sockets):
        yield Cell(device, model, length, sockets)


def _work(task: tuple[Cell, int, bool]) -> tuple[Cell, dict[str, Run], tuple[float, dict[str, object]] | None]:
    cell, num_requests, with_brute_force = task
    best = brute_force(cell, num_requests) if with_brute_force and cell.sockets else None
    return cell, modes(cell, num_requests), best


def rows_of(
    results: Iterable[tuple[Cell, dict[str, Run], tuple[float, dict[str, object]] | None]],
) -> list[dict[str, object]]:
    """A row for each cell with sockets, GPU-only beside it."""
    results = list(results)
    alone = {(c.device, c.model, c.output_tokens): of["GPU-only"] for c, of, _ in results if not c.sockets}
    rows: list[dict[str, object]] = []
    for cell, of, best in results:
        if cell.sockets:
            gpu = alone[cell.device, cell.model, cell.output_tokens].tokens_per_s
            offload, both = of["full offload"].tokens_per_s, of["both"].tokens_per_s
            rows.append(
                asdict(cell)
                | {
                    "gpu_only": gpu,
                    "full_offload": offload,
                    "both": both,
                    "runs": {k: asdict(v) for k, v in of.items()},
                }
                | {"over_gpu_only": both / gpu, "over_full_offload": both / offload}
                | ({"brute_force": best[0], "choice": best[1], "over_brute_force": both / best[0]} if best else {})
            )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"{'device':7}{'model':8}{'outputs':>8}{'sockets':>8}{'GPU-only':>10}{'offload':>9}{'both':>9}", end="")
    print(f"{'/GPU-only':>11}{'/offload':>10}{'/brute':>8}{'lanes changed':>15}{'plans':>7}")
    for row in rows:
        print(f"{row['device']:7}{row['model']:8}{row['output_tokens']:8}{row['sockets']:8}", end="")
        print(f"{row['gpu_only']:10.0f}{row['full_offload']:9.0f}{row['both']:9.0f}", end="")
        print(f"{row['over_gpu_only']:11.2f}{row['over_full_offload']:10.2f}", end="")
        print(f"{row['over_brute_force']:8.2f}" if "over_brute_force" in row else f"{'':8}", end="")
        both = row["runs"]["both"]  # type: ignore[index]
        print(f"{both['lane_changes']:15}{both['plans']:7}")


def plot(rows: list[dict[str, object]], path: str) -> None:
    """A panel for each device and model: tokens per second over GPU-only, by sockets and outputs."""
    pyplot = check_plotting()
    kinds = sorted({(row["device"], row["model"]) for row in rows})
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(3.2 * len(kinds), 3.2), constrained_layout=True, squeeze=False
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        own = [row for row in rows if (row["device"], row["model"]) == kind]
        outputs, sockets = sorted({r["output_tokens"] for r in own}), sorted({r["sockets"] for r in own})  # type: ignore[type-var]
        table = np.zeros((len(outputs), len(sockets)))
        for row in own:
            table[outputs.index(row["output_tokens"]), sockets.index(row["sockets"])] = row["over_gpu_only"]
        panel.imshow(np.log2(table), cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(table):
            panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9)
        panel.set_xticks(range(len(sockets)), [str(n) for n in sockets])
        panel.set_yticks(range(len(outputs)), [str(n) for n in outputs])
        panel.set_title(f"{kind[0].upper()}, {kind[1]}", fontsize=10)
        panel.set_xlabel("CPU sockets")
    panels[0][0].set_ylabel("output tokens")
    figure.suptitle("tokens/s with R-workers beside the GPU's own KV, over GPU-only", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--outputs", nargs="+", type=int, default=list(OUTPUTS), help="mean output tokens")
    parser.add_argument("--sockets", nargs="+", type=int, default=list(SOCKETS), help="0, for GPU-only, is one of them")
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=1 << 21, help="of all requests together, at most")
    parser.add_argument("--brute-force", action="store_true", help="dozens of simulations for each cell")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", help="JSON")
    parser.add_argument("--plot", help="PNG: the map")
    args = parser.parse_args()
    if args.plot:
        check_plotting()
    args.sockets = sorted({0, *args.sockets})
    tasks = [
        (cell, min(args.requests, args.output_tokens // cell.output_tokens), args.brute_force) for cell in cells(args)
    ]
    began, results = time.monotonic(), []
    with ProcessPoolExecutor(args.processes) as pool:
        for number, result in enumerate(pool.map(_work, tasks), 1):
            results.append(result)
            print(f"{number}/{len(tasks)} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    rows = rows_of(results)
    print_table(rows)
    if args.out:
        options = {name: value for name, value in vars(args).items() if name not in ("out", "plot")}
        content = {"version": __version__, "options": options, "rows": rows}
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
