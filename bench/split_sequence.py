"""One long sequence on one R-worker, and in parts on several: how much faster its attention is, and its tokens.

    python bench/split_sequence.py [--context 65536] [--r-workers 2] [--groups 1 4] [--json FILE]

Each R-worker is a process with one core.  Speed: decode steps of a sequence with an S-worker that takes no time, one
R-worker and several in turns; of attention as the busiest R-worker times it, and of whole steps, wire and merge
included.  Beside it what these cores read together, as a multiple of what one does: no more can be had of it where
reading is what takes the time.

Tokens: a small random model whose prompt is as long, greedily, one R-worker against several, and against R-workers
none of which could hold it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from bench.overlap import run
from cpu_attention import available_cores, cpu_name
from cpu_attention.roofs import Roofs
from fastdecode import LLM, SamplingParams
from fastdecode.holders.rpool import Ticket
from fastdecode.scheduling.plan import Step

_VOCAB = 997


def speed(args: argparse.Namespace, group: int, num_workers: int) -> tuple[float, float]:
    """ms of a decode step: attention on the busiest R-worker, and all of it."""
    settings = argparse.Namespace(**vars(args))
    settings.r_workers, settings.threads, settings.sequences = num_workers, 1, 1
    settings.kv_heads, settings.group = args.query_heads // group, group
    steps = run(settings, 1, 1e-6)
    return steps.r_ms, steps.step_ms


def tokens(args: argparse.Namespace) -> dict[str, tuple[list[int], int]]:
    """What the model says on one R-worker, on several, and on ones that are smaller than the sequence; and on how many
    R-workers it lay."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * args.context, eos_token_id=None,
    )  # fmt: skip
    token_bytes = 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, fp32
    prompt = torch.randint(_VOCAB, (args.context,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=args.tokens)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        for name, num_workers, num_tokens in (
            ("whole", 1, 2 * args.context),
            ("in parts", args.r_workers, 2 * args.context),
            ("larger than any", args.r_workers, 3 * args.context // (2 * args.r_workers)),
        ):
            memory = num_tokens * token_bytes
            with LLM(
                directory, num_r_workers=num_workers, r_worker_threads=1, transport=args.transport,
                kv_cache_memory=memory, skip_tokenizer_init=True, min_part_tokens=8192,
            ) as llm:  # fmt: skip
                workers = noted_r_workers(llm)
                (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                assert not output.error, output.error
                found[name] = output.outputs[0].token_ids, len(workers)
    return found


def noted_r_workers(llm: LLM) -> set[int]:
    """Filled with those that have rows of the steps to come."""
    workers, rpool = set[int](), llm._engine._rpool
    begin = rpool.begin

    def noting(step: Step) -> Ticket:
        workers.update(step.r_workers)
        return begin(step)

    rpool.begin = noting  # type: ignore[method-assign]
    return workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("context", 65536), ("r-workers", 2), ("layers", 4), ("query-heads", 8), ("head-dim", 128), ("steps", 24),
        ("repeats", 5), ("tokens", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8], help="query heads to a KV head")
    parser.add_argument("--kv-dtype", default="float32")
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    cores = available_cores()[: args.r_workers]
    one, several = Roofs(1, cores[:1]), Roofs(len(cores), cores)
    print(
        f"fastdecode {fastdecode.__version__}, {cpu_name()}, {args.r_workers} R-workers of one core, {args.kv_dtype} KV"
    )
    print(f"{'':10}{'attention, ms':>22}{'':>8}{'step, ms':>22}{'':>8}{'reads of the cores':>20}")
    record: dict[str, object] = {"machine": cpu_name(), "settings": vars(args)}
    for group in args.groups:
        rounds = []
        for _ in tqdm(range(args.repeats), desc=f"{group} to a KV head", disable=None):
            reads = statistics.median(several.read_bandwidth() / one.read_bandwidth() for _ in range(3))
            rounds.append((*speed(args, group, 1), *speed(args, group, args.r_workers), reads))
        r_one, step_one, r_several, step_several, reads = (statistics.median(c) for c in zip(*rounds, strict=True))
        by_attention, by_step = (statistics.median(r[i] / r[i + 2] for r in rounds) for i in (0, 1))
        print(
            f"G = {group:<6}{r_one:10.2f} →{r_several:10.2f}{by_attention:8.2f}{step_one:10.2f} →{step_several:10.2f}"
            f"{by_step:8.2f}{reads:20.2f}",
            flush=True,
        )
        record[f"group {group}"] = rounds
    one.close()
    several.close()
    said = tokens(args)
    expected, _ = said["whole"]
    for name, (told, num_workers) in said.items():
        same = sum(a == b for a, b in zip(told, expected, strict=True))
        print(f"{name}: on {num_workers} R-workers, {same} of {len(expected)} tokens as on one")
    record["tokens"] = {name: [told == expected, num_workers] for name, (told, num_workers) in said.items()}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    assert all(told == expected for told, _ in said.values())


if __name__ == "__main__":
    main()
