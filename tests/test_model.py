"""What the S-worker accepts, what it refuses and why; prompt attention against its plain version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Case
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gpu_sworker import AttentionSpec, FlatBatch, ModelNotFound, SWorker, UnsupportedModel
from gpu_sworker.device_kv import DeviceKV, token_bytes
from gpu_sworker.errors import DeviceKVFull, DeviceKVMisused
from gpu_sworker.prefill import PromptChunk, PromptKV, prompt_attention
from models import VOCAB

SMALL = {"hidden_size": 64, "vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4}
WITH_KV = SMALL | {"num_key_value_heads": 2, "intermediate_size": 64}

# model type -> (configuration, part of the reason)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": (SMALL, "does not go through transformers' attention interface"),
    "falcon-alibi": (SMALL | {"alibi": True}, "ALiBi"),
    "bloom": ({"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB}, "ALiBi"),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}, "ALiBi"),
    "gptj": ({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "vocab_size": VOCAB}, "attention interface"),
    "mamba": ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB}, "not attention"),
    "rwkv": ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB}, "not attention"),
    "jamba": (WITH_KV | {"num_hidden_layers": 8, "use_mamba_kernels": False}, "not attention"),
    "qwen3_next": (WITH_KV | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}, "linear_attention"),
    "t5": ({"d_model": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}, "encoder-decoder"),
    "deepseek_v3": (
        SMALL
        | {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        },
        "keys of 48 and values of 32",
    ),
    "llama4_text": (
        WITH_KV
        | {
            "intermediate_size_mlp": 64,
            "head_dim": 16,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
            "pad_token_id": 0,
        },
        "neither causal nor a causal sliding window",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_type_reason_and_what_works(name: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[name]
    config = CONFIG_MAPPING[name.removesuffix("-alibi")](**settings)
    make = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    make.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as info:
        SWorker(tmp_path)
    assert info.value.model_type == config.model_type and reason in info.value.reason
    assert f"cannot run a '{config.model_type}' model" in str(info.value) and "supported are" in str(info.value)


@pytest.mark.parametrize("name", ["bart", "marian", "blenderbot"])
def test_decoders_that_count_positions_in_the_batch_are_refused(name: str, tmp_path: Path) -> None:
    """Halves of encoder-decoders: their configuration looks fine, but they ignore position_ids."""
    settings = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
    }
    made = CONFIG_MAPPING[name](**settings, vocab_size=VOCAB, pad_token_id=0, is_decoder=True, is_encoder_decoder=False)
    getattr(transformers, f"{name.capitalize()}ForCausalLM")(made).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="place in the batch"):
        SWorker(tmp_path)


def test_mask_of_its_own_is_refused(tmp_path: Path) -> None:
    """Doge adds a learned bias to the mask that transformers made for it."""
    made = CONFIG_MAPPING["doge"](**WITH_KV, pad_token_id=0)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="attention mask of its own"):
        SWorker(tmp_path)


@pytest.fixture
def copy(llama: Case, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(llama.directory, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(directory: Path, kind: type[Exception], text: str, **options: str) -> None:
    with pytest.raises(kind, match=text):
        SWorker(directory, **options)


def test_missing_directory(tmp_path: Path) -> None:
    refuses(tmp_path / "nothing", ModelNotFound, "is no directory.*Nothing is downloaded")


def test_no_config(tmp_path: Path) -> None:
    refuses(tmp_path, ModelNotFound, "has no config.json")


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    refuses(copy, ModelNotFound, "is not JSON")


def test_config_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refuses(copy, ModelNotFound, "no \\*.safetensors weights")


def test_pickled_weights_are_not_opened(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuses(copy, ModelNotFound, "is a pickle, which is never opened")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(keep: float, copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 or keep == 0 else keep * len(data))])
    refuses(copy, ModelNotFound, "missing, truncated or damaged")


def test_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refuses(copy, ModelNotFound, "model-1.safetensors is missing")


def test_weights_of_another_model(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=5)
    refuses(copy, ModelNotFound, "lack .* tensors that LlamaForCausalLM needs")


def test_wrong_shapes(copy: Path) -> None:
    edit_config(copy, intermediate_size=50)
    refuses(copy, ModelNotFound, "cannot be loaded")


def test_unknown_architecture(copy: Path) -> None:
    edit_config(copy, model_type="brandnew")
    refuses(copy, UnsupportedModel, "brandnew.*transformers does not know it")


def test_remote_code_is_never_run(copy: Path) -> None:
    (copy / "modeling.py").write_text("raise SystemExit('executed')")
    edit_config(
        copy, model_type="brandnew", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    )
    refuses(copy, UnsupportedModel, "its own code, which is never run")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "64"}, {"hidden_size": 66}, {"rope_parameters": {"rope_type": "new"}}]
)
def test_configuration_that_is_not_valid(changes: dict[str, Any], copy: Path) -> None:
    edit_config(copy, **changes)
    with pytest.raises((UnsupportedModel, ModelNotFound)) as info:
        SWorker(copy)
    assert "attention interface" not in str(info.value).split(";")[0]


def test_return_dict_in_the_configuration_does_not_matter(copy: Path) -> None:
    edit_config(copy, return_dict=False)
    assert SWorker(copy).facts.model_type == "llama"


def test_quantised_weights(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    refuses(copy, UnsupportedModel, "quantised \\(gptq\\)")


@pytest.mark.parametrize(
    "device, text", [("cuda:63", "is not there"), ("tpu", "is no device"), ("meta", "not supported")]
)
def test_device_that_is_not_there(device: str, text: str, llama: Case) -> None:
    refuses(llama.directory, UnsupportedModel, text, device=device)


def test_facts(case: Callable[[str], Case]) -> None:
    facts = SWorker(case("gemma2").directory).facts
    assert [layer.window for layer in facts.layers] == [24, None, 24]
    assert facts.layers[0].softcap == 50.0 and facts.layers[0].scale == pytest.approx(24**-0.5)
    assert (facts.vocab_size, facts.max_positions, facts.eos_token_ids, facts.dtype) == (VOCAB, 512, (2,), "float32")
    sinks = SWorker(case("gpt-oss").directory).facts.layers[1].sinks
    assert sinks is not None and len(sinks) == 4


def test_suspended_forwards_do_not_mix(llama: Case) -> None:
    """Two forwards, resumed in turn, one abandoned halfway: the other's logits are those it has alone."""
    sworker = SWorker(llama.directory)
    batches = [FlatBatch(np.array(p, np.int64), np.arange(len(p)), np.array([len(p) - 1])) for p in llama.prompts[4:7]]

    def drive(forward: Any, call: Any, steps: int = 99) -> torch.Tensor:
        for _ in range(steps):
            try:
                call = forward.send(sworker.attend_prompt(call, PromptChunk(0, 0, len(call.q), 0, len(call.q))))
            except StopIteration as end:
                return end.value
        return call

    with sworker.inference():
        alone = [drive(forward, next(forward)) for forward in map(sworker.forward, batches)]
        forwards = [sworker.forward(batch) for batch in batches]
        calls = [next(forward) for forward in forwards]
        halfway = [drive(forward, call, 1) for forward, call in zip(forwards, calls, strict=True)]
        forwards[1].close()
        for i in (2, 0):
            assert torch.equal(drive(forwards[i], halfway[i]), alone[i])


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(4, 2, 16, 0.25, None, None, None),
        AttentionSpec(4, 4, 16, 0.3, 200, None, None),
        AttentionSpec(4, 2, 16, 0.25, 5, None, None),
        AttentionSpec(4, 1, 16, 0.25, 1, 10.0, None),
        AttentionSpec(2, 2, 16, 0.25, 9, None, (0.5, -2.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_prompt_attention(spec: AttentionSpec, num_tokens: int) -> None:
    """Sinks and all, whole and in chunks, against one softmax over everything, in float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_tokens, spec.num_q_heads, 16, generator=generator)
    k, v = (torch.randn(num_tokens, spec.num_kv_heads, 16, generator=generator) for _ in "kv")
    group = spec.num_q_heads // spec.num_kv_heads
    scores = spec.scale * torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1))
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    scores = scores.masked_fill((distance < 0) | (distance >= (spec.window or 10**9)), -torch.inf).exp()
    sinks = torch.tensor(spec.sinks or [-torch.inf] * spec.num_q_heads).double().exp()[:, None, None]
    expected = torch.einsum(
        "hqk,khd->qhd", scores / (scores.sum(2, keepdim=True) + sinks), v.double().repeat_interleave(group, 1)
    )
    torch.testing.assert_close(prompt_attention(q, k, v, spec).double(), expected, atol=1e-5, rtol=1e-5)
    for begin in range(0, num_tokens, 7):  # the same in chunks, each of which sees what came before it
        end = min(begin + 7, num_tokens)
        chunk = prompt_attention(q[begin:end], k[:end], v[:end], spec)
        torch.testing.assert_close(chunk.double(), expected[begin:end], atol=1e-5, rtol=1e-5)


PROMPT_SPECS = (
    AttentionSpec(4, 2, 16, 0.25, None, None, (0.5, -1.0, 0.0, 2.0)),
    AttentionSpec(2, 2, 8, 0.3, 5, 9.0, None),
)


class Prompts:
    """Prompts of made-up K and V, of which chunks are attended to and compared with the whole."""

    def __init__(self, num_blocks: int) -> None:
        budget = num_blocks * 16 * token_bytes(PROMPT_SPECS, torch.float32)
        store = DeviceKV(
            PROMPT_SPECS, dtype=torch.float32, device=torch.device("cpu"), budget_bytes=budget, block_tokens=16
        )
        self.kept = PromptKV(store, PROMPT_SPECS)

    def attend(self, seq_id: int, start: int, end: int, of: int, layers: tuple[int, ...] = (0, 1)) -> None:
        for layer in layers:
            spec, generator = PROMPT_SPECS[layer], torch.Generator().manual_seed(1000 * seq_id + layer)
            q = torch.randn(of, spec.num_q_heads, spec.head_dim, generator=generator)
            k, v = (torch.randn(of, spec.num_kv_heads, spec.head_dim, generator=generator) for _ in "kv")
            chunk, part = PromptChunk(seq_id, 0, end - start, start, of), slice(start, end)
            o = self.kept.attend(chunk, layer, q[part], k[part], v[part])
            torch.testing.assert_close(o, prompt_attention(q, k, v, spec)[part], atol=1e-5, rtol=1e-5)
            self.kept.store.check_integrity()


def test_prompts_on_their_way_are_kept_until_their_last_chunk() -> None:
    prompts = Prompts(num_blocks=8)
    prompts.attend(1, 0, 40, of=40)
    assert len(prompts.kept) == 0  # whole: nothing to keep
    prompts.attend(2, 0, 30, of=50)
    prompts.attend(3, 0, 1, of=64, layers=(0,))
    prompts.attend(2, 30, 47, of=50, layers=(0,))  # its step is broken off
    prompts.attend(2, 30, 47, of=50, layers=(0,))
    prompts.attend(2, 30, 40, of=50, layers=(0,))  # once more, and two chunks behind one another
    prompts.attend(2, 40, 47, of=50, layers=(0,))
    prompts.attend(2, 30, 40, of=50, layers=(1,))
    prompts.attend(2, 40, 47, of=50, layers=(1,))
    assert len(prompts.kept) == 2
    prompts.attend(2, 47, 50, of=50)
    prompts.kept.forget([3, 4])
    assert len(prompts.kept) == 0 and prompts.kept.store.num_free_blocks == 8
    for start in (0, 20):  # begun anew, at another length, and then whole
        prompts.attend(5, 0, 20, of=70 + start)
        prompts.attend(5, 20, 60, of=70 + start)
    prompts.attend(5, 0, 25, of=25)
    assert len(prompts.kept) == 0
    with pytest.raises(DeviceKVMisused, match="tokens 20 to 60 of the prompt of sequence 5 come, of which 0 are here"):
        prompts.attend(5, 20, 60, of=70)


def test_prompts_that_have_begun_to_come_find_room_to_the_end() -> None:
    prompts = Prompts(num_blocks=8)
    prompts.attend(1, 0, 1, of=100)
    assert prompts.kept.has_room(16) and not prompts.kept.has_room(17)
    with pytest.raises(DeviceKVFull, match="needs 2 blocks; 1 of 8 are free on cpu .* or let R-workers attend"):
        prompts.attend(2, 0, 1, of=17)
    prompts.attend(2, 0, 1, of=16)
    prompts.attend(1, 1, 99, of=100)
    prompts.attend(1, 99, 100, of=100)
    prompts.attend(2, 1, 16, of=16)
    assert len(prompts.kept) == 0


def test_a_budget_for_prompts(llama: Case) -> None:
    sworker = SWorker(llama.directory, prompt_kv_bytes=0)
    assert sworker.prompt_kv.num_blocks == 0 and not sworker.prompt_kv_room(1)
    token = token_bytes(sworker.facts.layers, sworker.dtype)
    sworker = SWorker(llama.directory, prompt_kv_bytes=token * 100, block_tokens=32)
    assert (sworker.prompt_kv.num_free_blocks, sworker.prompt_kv.block_tokens) == (3, 32)
    assert sworker.prompt_kv_room(96) and not sworker.prompt_kv_room(97)
    assert SWorker(llama.directory).prompt_kv_room(512)
    with pytest.raises(DeviceKVFull, match="are not to be had on cpu"):
        SWorker(llama.directory, prompt_kv_bytes=1 << 60)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_prompt_attention_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Scores of thousands before scaling: they overflow half precision, or lose what the exponential needs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, 2, 64, generator=generator) for _ in range(3))
    q, k = (q + 30).to(dtype), (k + 30).to(dtype)
    spec = AttentionSpec(2, 2, 64, 0.125, 7, None, None)
    exact = prompt_attention(q.double(), k.double(), v.to(dtype).double(), spec)
    result = prompt_attention(q, k, v.to(dtype), spec)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=0)
