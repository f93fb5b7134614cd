"""Whether the tokens are those of `transformers.generate` on the same device, wherever K and V lie.

    r-workers   all of them on R-workers          device    all of them on the S-worker's device
    mixed       the device first, and what does not fit there on an R-worker

In fp32, family by family: equal, or apart at a near tie (bench/near_ties.py).  In bf16 both round so much that more
ties come up: counted is the share of tokens before the first difference, and a difference is a near tie if the two
logits are as close as the reference's own rounding moves them (twice its largest error against float64 there).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))  # for models.py
sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np
import torch
from transformers import PreTrainedModel

from bench.gpu.report import Report, arguments
from bench.near_ties import assert_same_tokens
from fastdecode import LLM, SamplingParams
from gpu_sworker import describe_model, load_reference
from models import FAMILIES, VOCAB, make_model

# What differs most comes first, for the time may not do for all.
_ORDER = ["llama", "gemma2", "gpt-oss", "qwen3", "mistral-window", "opt", "gpt-neox", "mixtral", "phi3", "gpt2"]
_WAYS = ("r-workers", "device", "mixed")
_BF16_FAMILIES = ("llama", "qwen3", "gemma2")
_DEVICE_TOKENS = 256  # of K and V on the device, where it has a part of them
_FAMILY_SECONDS = 4.0


@dataclass(frozen=True)
class Case:
    family: str
    directory: Path
    prompts: list[list[int]]
    params: SamplingParams
    reference: list[list[int]]


def main(args: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("highest")
    with Report("equality", args) as report:
        families = ["llama"] if report.is_dry else [*_ORDER, *(f for f in FAMILIES if f not in _ORDER)]
        bf16 = [f for f in _BF16_FAMILIES if f in families]
        for dtype, chosen in (("float32", families[:1]), ("bfloat16", bf16), ("float32", families[1:])):
            for family in chosen:
                if report.has_time(f"{family}, {dtype}", 0 if report.is_dry else _FAMILY_SECONDS):
                    with report.surviving(f"{family}, {dtype}"):
                        _compare(report, _make_case(report, family, dtype), dtype)
        for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
            for way in _WAYS:
                _hold(report, dtype, name, way)


def _hold(report: Report, dtype: str, name: str, way: str) -> None:
    """A case that failed has no sequence that is right."""
    points = [point for point in report.results if (point["dtype"], point["way"]) == (dtype, way)]
    ends = f", {dtype}", f", {dtype}, {way}"
    num_failed = sum(failure["what"].endswith(ends) for failure in report.failures)
    if not points and not num_failed:
        return
    sequences = sum(point["sequences"] for point in points) + num_failed * len(_lengths(report.is_dry))
    equal = sum(point["equal"] for point in points)
    ties = sum(point["near_ties"] for point in points)
    note = f"{len(points)} families, {num_failed} failed; {equal} of {sequences} sequences equal, {ties} near ties"
    if points and dtype == "bfloat16":
        share = sum(point["tokens_before_difference"] for point in points) / len(points)
        note += f"; {share:.4f} of the tokens before a difference"
    report.hold(
        f"{name}, {way}: sequences equal or apart at a near tie", (equal + ties) / sequences, "share", at_least=1.0,
        is_of_speed=False, note=note,
    )  # fmt: skip


def _lengths(is_dry: bool) -> tuple[int, ...]:
    """Of prompts."""
    return (3, 33) if is_dry else (1, 2, 31, 32, 33, 75, 140, 200)


def _make_case(report: Report, family: str, dtype: str) -> Case:
    directory = report.args.work / f"equality-{family}"
    if not directory.exists():
        make_model(family, directory)
    lengths, new_tokens = _lengths(report.is_dry), 8 if report.is_dry else 32
    generator = np.random.default_rng(7)
    prompts = [generator.integers(3, VOCAB, length).tolist() for length in lengths]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    model = _load(directory, dtype, report.device)
    reference = [_generate(model, prompt, new_tokens) for prompt in prompts]
    return Case(family, directory, prompts, params, reference)


def _compare(report: Report, case: Case, dtype: str) -> None:
    few = _token_bytes(case.directory, dtype) * (64 if report.is_dry else _DEVICE_TOKENS)
    options_of: dict[str, dict[str, Any]] = {
        "r-workers": {"num_r_workers": 2, "micro_batches": 2, "device_kv_memory": 0},
        "device": {"num_r_workers": 0},
        "mixed": {"num_r_workers": 1, "micro_batches": 2, "device_kv_memory": few, "placement": "device-first"},
    }
    for way in _WAYS[-1:] if report.is_dry and dtype == "bfloat16" else _WAYS:
        with report.surviving(f"{case.family}, {dtype}, {way}"):
            with LLM(
                case.directory, skip_tokenizer_init=True, dtype=dtype, device=report.device.type, **options_of[way]
            ) as llm:
                outputs = llm.generate(case.prompts, case.params, use_tqdm=False)
            errors = [output.error for output in outputs if output.error]
            assert not errors, errors[0]
            tokens = [output.outputs[0].token_ids for output in outputs]
            report.add(family=case.family, dtype=dtype, way=way, **_judge(case, tokens, dtype, report.device))


def _token_bytes(directory: Path, dtype: str) -> int:
    """K and V of a token over all layers."""
    facts, _ = describe_model(directory, "cpu")
    return sum(2 * spec.num_kv_heads * spec.head_dim for spec in facts.layers) * getattr(torch, dtype).itemsize


def _judge(case: Case, tokens: list[list[int]], dtype: str, device: torch.device) -> dict[str, Any]:
    differing = [i for i, (got, wanted) in enumerate(zip(tokens, case.reference, strict=True)) if got != wanted]
    num_ties, faults = 0, []
    for i in differing:
        fault = _fault_in_fp32(case, tokens, i) if dtype == "float32" else _fault_in_bf16(case, tokens, i, device)
        num_ties += fault is None
        faults += [] if fault is None else [fault]
    common = sum(_equal_so_far(got, wanted) for got, wanted in zip(tokens, case.reference, strict=True))
    return {
        "sequences": len(tokens),
        "equal": len(tokens) - len(differing),
        "near_ties": num_ties,
        "tokens_before_difference": common / sum(len(wanted) for wanted in case.reference),
        "faults": faults,
    }


def _fault_in_fp32(case: Case, tokens: list[list[int]], index: int) -> str | None:
    try:
        assert_same_tokens(case.directory, [case.prompts[index]], case.params, [tokens[index]], [case.reference[index]])
    except AssertionError as error:
        return f"prompt {index}: {error}"
    return None


def _fault_in_bf16(case: Case, tokens: list[list[int]], index: int, device: torch.device) -> str | None:
    got, wanted = tokens[index], case.reference[index]
    position = _equal_so_far(got, wanted)
    if position == min(len(got), len(wanted)):
        return f"prompt {index}: {len(got)} tokens where {len(wanted)} were due, equal so far"
    prefix = case.prompts[index] + wanted[:position]
    model = _load(case.directory, "bfloat16", device)
    rounded, exact = _logits(model, prefix), _logits(model.double(), prefix)  # of the same weights
    noise = float((rounded - exact).abs().max())
    gap = float(exact.max() - torch.min(exact[got[position]], exact[wanted[position]]))
    if gap <= 2 * noise:
        return None
    return f"prompt {index}, new token {position}: logits apart by {gap:.3f}, where bf16 moves them by {noise:.3f}"


def _equal_so_far(got: Sequence[int], wanted: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))


def _load(directory: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    model = load_reference(directory, getattr(torch, dtype))
    return model.to(device)


def _generate(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def _logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """After the last token.  # [vocab] float64, on the host"""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids], device=model.device)).logits[0, -1].double().cpu()
    return logits


if __name__ == "__main__":
    main(arguments(__doc__))
