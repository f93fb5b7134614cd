"""What fits where, by arithmetic that can be done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Case
from transformers import LlamaConfig, MixtralConfig

from cpu_attention import KV_DTYPES
from fastdecode import LLM
from fastdecode.cli import main
from fastdecode.modelling.memory_plan import ModelSize, plan
from fastdecode.modelling.model_size import read_model_size

GIB = 1 << 30
SMALL = ModelSize("llama", 32, 32, 8, 128, 8192, 8_000_000_000, 8_000_000_000)  # 128 KiB of KV a token in 16 bits


def test_by_hand() -> None:
    [there] = plan(
        SMALL, dtype="bfloat16", device_bytes=24 * GIB, r_worker_bytes=64 * GIB, sequences=256, tokens=4096,
        kv_dtypes=("float16",),
    )  # fmt: skip
    assert there.token_bytes == there.device_token_bytes == 2 * 32 * 8 * 128 * 2
    room = int(0.8 * (0.9 * 24 * GIB - 16_000_000_000))
    assert there.on_device == room // (GIB // 2) == 10
    assert there.on_r_workers == 128 and there.missing == 256 - 10 - 128 and not there.fits
    assert there.r_worker_bytes == 246 * GIB // 2


def test_fewer_bits_hold_more() -> None:
    plans = plan(SMALL, dtype="bfloat16", device_bytes=24 * GIB, r_worker_bytes=64 * GIB, sequences=9999, tokens=4000)
    assert [one.kv_dtype for one in plans] == list(KV_DTYPES)
    by_size = sorted(plans, key=lambda one: one.token_bytes)
    assert [one.on_r_workers for one in by_size] == sorted((one.on_r_workers for one in plans), reverse=True)
    for one in plans:
        assert one.on_device + one.on_r_workers + one.missing == one.wanted == 9999
        assert one.on_r_workers * one.token_bytes * 4000 <= 64 * GIB


@pytest.mark.parametrize("device, r_workers, told", [
    (200 * GIB, 0, "All of them fit on the device"),
    (24 * GIB, 200 * GIB, "10 of 256 fit on the device; with float32 KV on R-workers, 246.0 GiB"),
    (17 * GIB, GIB, "They fit nowhere: with int4 KV R-workers need"),
])  # fmt: skip
def test_the_verdict(device: int, r_workers: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("fastdecode.read_model_size", lambda directory: SMALL, raising=False)
    r_workers = 250 * GIB if r_workers == 200 * GIB else r_workers
    memory = ["--device-memory", str(device), "--r-worker-memory", str(r_workers)]
    assert main(["plan-memory", "any", *memory, "--tokens", "4096"]) == 0
    assert told in capsys.readouterr().out


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("fastdecode.read_model_size", lambda directory: SMALL, raising=False)
    assert main(["plan-memory", "any", "--device-memory", "8GiB"]) == 2
    assert "14.9 GiB of bfloat16 weights do not fit a device of 8.0 GiB" in capsys.readouterr().err
    assert main(["plan-memory", "any", "--sequences", "0"]) == 2


def test_a_model_that_is_not_there(capsys: Any) -> None:
    assert main(["plan-memory", "/nowhere"]) == 2
    assert "/nowhere is no directory" in capsys.readouterr().err


def test_experts_that_are_not_chosen_do_not_work(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    for name, config in (
        ("dense", LlamaConfig(**shape)),
        ("experts", MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2)),
    ):
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(tmp_path / name)
    dense, experts = (read_model_size(str(tmp_path / name)) for name in ("dense", "experts"))
    assert dense.num_active == dense.num_parameters
    assert experts.num_parameters - experts.num_active == 2 * 6 * 3 * 64 * 96, "six of eight experts in each layer"


def test_a_model_says_what_it_is(llama: Case, capsys: Any) -> None:
    """And what an engine finds."""
    assert main(["plan-memory", str(llama.directory), "--json", "--sequences", "3", "--dtype", "float32"]) == 0
    told = json.loads(capsys.readouterr().out)
    with LLM(llama.directory, skip_tokenizer_init=True, num_r_workers=0, device_kv_memory="8MiB") as llm:
        facts = llm._engine._sworker.facts
        assert told["model"]["num_parameters"] == facts.num_parameters
        room, token_bytes = llm._engine.standing.device_kv_capacity_tokens, told["plans"][0]["token_bytes"]
    assert room == (8 << 20) // (64 * token_bytes) * 64
