"""What may be wrong with a model directory, and that each fault is told as one, in a line, whatever noticed it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import Case, quiet
from safetensors.torch import load_file, save_file
from tokenizers import models as token_models
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastdecode import LLM, SamplingParams, cli
from fastdecode.errors import ConfigError
from fastdecode.text import loading
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import (
    ModelNotFound,
    SWorker,
    SWorkerError,
    UnsupportedModel,
    describe_model,
    foreign_errors,
    generate_reference,
)
from gpu_sworker.checkpoint import StoredTensor, refuse_quantised_tensors, stored_dtype
from gpu_sworker.model import choose_dtype
from models import VOCAB

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy(llama: Case, tmp_path: Path) -> Path:
    """A model directory to damage."""
    return Path(shutil.copytree(llama.directory, tmp_path / "model"))


def edit(directory: Path, name: str = "config.json", **changes: object) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# tensor names -> dtypes beside one another, part of the reason
QUANTISED: dict[str, tuple[dict[str, str], str]] = {
    "fp8": ({"a.weight": "F8_E4M3", "a.weight_scale": "F32"}, "fp8"),
    "fp8, scales lost": ({"a.weight": "F8_E5M2"}, "fp8"),
    "fp8, DeepSeek": ({"a.weight": "BF16", "a.weight_scale_inv": "F32"}, "fp8"),
    "int8": ({"a.weight": "I8"}, "int8"),
    "int8, bitsandbytes": ({"a.weight": "I8", "a.SCB": "F32"}, "bitsandbytes"),
    "nf4": ({"a.weight": "U8", "a.weight.absmax": "F32", "a.weight.quant_map": "F32"}, "bitsandbytes"),
    "gptq": ({"a.qweight": "I32", "a.qzeros": "I32", "a.scales": "F16", "a.g_idx": "I32"}, "gptq"),
    "awq": ({"a.qweight": "I32", "a.qzeros": "I32", "a.scales": "F16"}, "awq"),
    "packed": ({"a.weight_packed": "I32", "a.weight_scale": "BF16", "a.weight_shape": "I64"}, "compressed-tensors"),
    "nvfp4": ({"a.weight": "U8", "a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"}, "modelopt"),
    "mxfp4": ({"experts.down_proj_blocks": "U8", "experts.down_proj_scales": "U8"}, "mxfp4"),
    "mlx": ({"a.weight": "U32", "a.scales": "BF16", "a.biases": "BF16"}, "stored as U32"),
    "hqq": ({"a.W_q": "U8"}, "hqq"),
    "exl2": ({"a.q_weight": "I32", "a.q_scale": "I32"}, "exl2"),
    "scales of a kind not known here": ({"a.weight": "F16", "a.weight_scale": "F32"}, "a.weight_scale"),
    "whole numbers of 64 bits": ({"a.weight": "I64"}, "stored as I64"),
    "one bit": ({"a.weight": "BOOL"}, "stored as BOOL"),
    "zero points": ({"experts.up": "F16", "experts.up_zero_point": "F32"}, "up_zero_point"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_told_by_what_is_stored(name: str) -> None:
    dtypes, reason = QUANTISED[name]
    with pytest.raises(UnsupportedModel, match=f"quantised .*{reason}.*use the unquantised"):
        refuse_quantised_tensors({key: StoredTensor(dtype, (4, 4)) for key, dtype in dtypes.items()}, "llama")


def test_what_only_looks_quantised_is_not_refused() -> None:
    harmless = {
        "h.0.attn.bias": "U8", "h.0.attn.masked_bias": "F32", "gpt_neox.attention.bias": "BOOL", "position_ids": "I64",
        "router.per_expert_scale": "F32", "logit_scale": "F32", "a.weight": "BF16", "a.bias": "F16", "blocks": "F32",
    }  # fmt: skip
    refuse_quantised_tensors({key: StoredTensor(dtype, (4,)) for key, dtype in harmless.items()}, "gpt2")


def test_float8_weights_are_refused_whatever_the_configuration_says(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedModel, match=f"quantised \\(fp8\\): {WEIGHT} is stored as F8_E4M3"):
        SWorker(copy)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"compression_config": {"format": "float-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_quantised_by_its_configuration(changes: dict[str, Any], name: str, copy: Path) -> None:
    edit(copy, **changes)
    for load in (SWorker, lambda directory: describe_model(directory, "emulated")):
        with pytest.raises(UnsupportedModel, match=f"quantised \\({name}\\): config.json has"):
            load(copy)


@pytest.mark.parametrize(
    "file, content, name",
    [
        ("quantize_config.json", '{"bits": 4}', "gptq"),
        ("quant_config.json", '{"w_bit": 4}', "awq"),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}', "NVFP4"),
    ],
)
def test_quantised_by_a_file_beside_it(file: str, content: str, name: str, copy: Path) -> None:
    (copy / file).write_text(content)
    with pytest.raises(UnsupportedModel, match=f"quantised \\({name}\\): {file}"):
        SWorker(copy)


def test_tensors_nobody_asked_for_are_told_in_one_line(
    copy: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {f"mtp.{i}": torch.ones(2) for i in range(5)}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # older transformers stored it: harmless
    edit_tensors(copy, lambda tensors: tensors.update(more | old))
    SWorker(copy)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("5 tensors in") and line.endswith("left out: mtp.0, mtp.1, mtp.2, ...")
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_a_whole_model_is_loaded_without_a_word(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    SWorker(copy)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_tied_head_that_is_stored_too_is_no_surprise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    SWorker(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_missing_tensors(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(ModelNotFound, match=f"lack 1 tensors that LlamaForCausalLM needs \\({WEIGHT}"):
        SWorker(copy)
    assert not caplog.records


def test_shapes_that_differ(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({WEIGHT: torch.ones(3, 5)}))
    with pytest.raises(ModelNotFound, match=rf"{WEIGHT}: \[3, 5\] is stored, \[96, 64\] wanted"):
        SWorker(copy)


def test_other_weights_beside_the_models_own_are_left_alone(copy: Path) -> None:
    save_file({"a.qweight": torch.ones(2, dtype=torch.int32)}, copy / "consolidated.safetensors")
    assert SWorker(copy).facts.model_type == "llama"


@pytest.mark.parametrize("is_alone", [True, False])
def test_adapters_are_told_as_such(is_alone: bool, copy: Path) -> None:
    """Beside a model, too: its weights alone are not what was trained."""
    if is_alone:
        for path in copy.iterdir():
            path.unlink()
    save_file({"a.lora_A.weight": torch.ones(2)}, copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base", "peft_type": "LORA"}')
    for load in (SWorker, lambda directory: describe_model(directory, "emulated")):
        with pytest.raises(ModelNotFound, match="an adapter of acme/base: .*merge_and_unload"):
            load(copy)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_adapters_within_the_weights_are_not_left_out(prefix: str, copy: Path) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(copy / "model.safetensors").items()}
    tensors[f"{prefix}model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 2)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match="hold an adapter .*q_proj.lora_A"):
        SWorker(copy)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("model-Q4_K_M.gguf", b"GGUF", "model-Q4_K_M.gguf is GGUF"),
        ("model.fp16.safetensors", b"", "model.fp16.safetensors is none of"),
        ("model-00001-of-00002.safetensors", b"", "is none of model.safetensors and what model.safetensors.index.json"),
        ("pytorch_model.bin", b"PK", "is a pickle"),
        ("README.md", b"", "no \\*.safetensors weights to read$"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS.*git lfs pull"),
        ("model.safetensors", b"", "is missing, truncated or damaged"),
    ],
)
def test_what_lies_there_instead_of_weights(name: str, content: bytes, told: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content)
    with pytest.raises(ModelNotFound, match=told):
        SWorker(copy)


# Each of them raises another class somewhere in transformers, torch or pydantic.
NO_CONFIGURATION: list[dict[str, Any]] = [
    {"pad_token_id": 256},
    {"num_attention_heads": 0},
    {"torch_dtype": "fp16", "dtype": None},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"vocab_size": "many"},
    {"hidden_act": "nope"},
    {"layer_types": 7},
    {"layer_types": ["full_attention"]},
    {"rope_parameters": {"rope_type": "linear"}},
    {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
    {"rope_parameters": 7},
    {"max_position_embeddings": "x"},
    {"model_type": ["llama"]},
    {"num_key_value_heads": 3},
    {"head_dim": -16},
    {"text_config": {"a": 1}},
    {"eos_token_id": [2, None, "x"]},
]


@pytest.mark.parametrize("changes", NO_CONFIGURATION, ids=str)
def test_configurations_that_make_no_model(changes: dict[str, Any], copy: Path) -> None:
    edit(copy, **changes)
    for load in (SWorker, lambda directory: describe_model(directory, "emulated")):
        with pytest.raises(SWorkerError) as info:
            load(copy)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "[" * 100_000, "\x00", '"\ud800"'])
def test_config_json_that_is_none(content: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ModelNotFound, match="config.json is not JSON"):
        SWorker(copy)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 7}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_index_that_is_none(index: str, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelNotFound):
        SWorker(copy)


def test_exit_code(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(copy, pad_token_id=256)
    assert cli.main(["generate", str(copy), "--prompt", "x"]) == 2
    error = capfd.readouterr().err
    assert "AssertionError: Padding_idx" in error and "Traceback" not in error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_what_ends_the_process_is_no_foreign_error(kind: type[BaseException]) -> None:
    with pytest.raises(kind), foreign_errors(ModelNotFound):
        raise kind


def test_panics_of_rust_code_are_foreign_errors() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ModelNotFound, match="PanicException: index out of bounds"), foreign_errors(ModelNotFound):
        raise panic("index out of bounds\nmore")


@pytest.mark.parametrize(
    "said, stored, has_bfloat16, chosen, told",
    [
        (torch.bfloat16, "F16", True, torch.bfloat16, None),
        (None, "F16", True, torch.float16, "torch.float16 is taken, that of the weights"),
        (None, "BF16", True, torch.bfloat16, "torch.bfloat16 is taken, that of the weights"),
        (None, "F32", True, torch.bfloat16, "the weights are torch.float32; torch.bfloat16 is taken"),
        (None, "F32", False, torch.float16, "the weights are torch.float32; torch.float16 is taken"),
        (None, "F64", True, torch.bfloat16, "write dtype=float32"),
        (torch.float32, "F32", True, torch.float32, "dtype=bfloat16 takes half the memory"),
        (torch.float32, "F32", False, torch.float32, "dtype=float16 takes half the memory"),
    ],
)
def test_dtype_on_cuda(
    said: torch.dtype | None,
    stored: str,
    has_bfloat16: bool,
    chosen: torch.dtype,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That of the configuration, or that of most of what is stored, or 16 bits; what may surprise is told."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if has_bfloat16 else (7, 5))
    tensors = {
        "norm": StoredTensor("F32", (8,)),
        "weight": StoredTensor(stored, (8, 8)),
        "mask": StoredTensor("U8", ()),
    }
    config = LlamaConfig(dtype=said)
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    assert stored_dtype(tensors) == dtypes[stored]
    assert choose_dtype("auto", config, torch.device("cuda"), tensors) == chosen
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (told is not None) and all(told in message for message in messages if told)
    assert choose_dtype("auto", config, torch.device("cpu"), tensors) == torch.float32
    assert choose_dtype("float16", config, torch.device("cuda"), tensors) == torch.float16
    assert choose_dtype("float32", config, torch.device("cuda"), tensors) == torch.float32
    assert len(caplog.records) == len(messages)


@pytest.mark.parametrize(
    "wishes, expected, told",
    [
        ({}, {"temperature": 0.0}, ""),
        ({"do_sample": True, "top_p": 0.0, "temperature": 0.7}, {"temperature": 0.0}, ""),
        ({"do_sample": True, "top_p": 0, "top_k": 5}, {"temperature": 0.0, "top_k": 5}, ""),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}, ""),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": 0.9}, {"top_p": 0.9}, ""),
        ({"do_sample": True, "top_k": 50.0}, {"top_k": 50}, ""),
        ({"do_sample": True, "top_k": -5, "temperature": 0.7}, {"temperature": 0.7}, "top_k must be from 0"),
        ({"do_sample": True, "top_p": 1.5, "min_p": 0.1}, {"min_p": 0.1}, "top_p must be above 0"),
        ({"do_sample": True, "temperature": "hot"}, {}, "temperature must be a number"),
        ({"do_sample": True, "temperature": -1.0}, {}, "temperature must be from 0"),
        ({"repetition_penalty": -1.0}, {"temperature": 0.0}, "repetition_penalty must be from"),
        ({"repetition_penalty": 0.0}, {"temperature": 0.0}, "repetition_penalty must be from"),
        ({"max_new_tokens": 0}, {"temperature": 0.0}, "generation_config.json is left out"),
    ],
)
def test_generation_config_keeps_no_model_from_loading(
    wishes: dict[str, Any], expected: dict[str, Any], told: str, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A value that means something is taken for it; one that does not is left out, by name."""
    (copy / "generation_config.json").write_text(json.dumps(wishes))
    with LLM(copy, skip_tokenizer_init=True) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == bool(told) and all(told in warning for warning in warnings)


def test_ends_of_both_configurations(copy: Path) -> None:
    edit(copy, eos_token_id=[5, 2])
    edit(copy, "generation_config.json", eos_token_id=7)
    assert SWorker(copy).facts.eos_token_ids == (7, 5, 2)
    (copy / "generation_config.json").unlink()
    assert SWorker(copy).facts.eos_token_ids == (5, 2)
    edit(copy, eos_token_id=-1)
    assert SWorker(copy).facts.eos_token_ids == ()


def with_tokenizer(directory: Path, eos: str) -> None:
    """Of words "w0" to "w255", each its own number."""
    tokenizer = tokenizers.Tokenizer(token_models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(directory)


def test_the_end_that_only_the_tokenizer_names(llama: Case, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a chat fine-tune has it.  transformers goes on; it stops there, too, where it is given the same ends."""
    prompt, unstopped = llama.prompts[2], llama.reference[2]
    end = next(token for token in unstopped[4:] if token != 2 and token not in unstopped[:4])
    expected = unstopped[: unstopped.index(end) + 1]
    with_tokenizer(copy, f"w{end}")
    caplog.set_level(logging.INFO, "fastdecode")
    with LLM(copy) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=len(unstopped))
        (output,) = quiet(llm, [prompt], greedy)
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (expected, "stop")
        (output,) = quiet(llm, [prompt], SamplingParams(temperature=0, max_tokens=len(expected) + 1, ignore_eos=True))
        longer = output.outputs[0].token_ids
        assert longer[:-1] == expected
    told = [record.getMessage() for record in caplog.records if "also stops" in record.getMessage()]
    assert told == [f"also stops at w{end} ({end}), the tokenizer's end of sequence"]
    assert generate_reference(copy, [prompt], len(unstopped), eos_token_ids=[2, end]) == [expected]
    with LLM(copy, skip_tokenizer_init=True) as llm:
        assert quiet(llm, [prompt], greedy)[0].outputs[0].token_ids == unstopped
    edit(copy, eos_token_id=[2, end])
    caplog.clear()
    with LLM(copy):
        assert not [record for record in caplog.records if "also stops" in record.getMessage()]


SENTENCEPIECE_MODEL = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN_VOCABULARY = b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(
    "content, installed, reason",
    [
        (
            SENTENCEPIECE_MODEL,
            (),
            "needs sentencepiece and protobuf: pip install sentencepiece protobuf\\)",
        ),
        (SENTENCEPIECE_MODEL, ("sentencepiece",), "SentencePiece model.*pip install protobuf\\)"),
        (SENTENCEPIECE_MODEL, ("google.protobuf",), "SentencePiece model.*pip install sentencepiece\\)"),
        (TIKTOKEN_VOCABULARY, ("sentencepiece",), "tiktoken vocabulary.*pip install tiktoken\\)"),
    ],
)
def test_the_package_that_a_vocabulary_needs_is_named(
    content: bytes, installed: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers tries one after the other and names the last one, tiktoken."""
    monkeypatch.setattr(loading, "is_installed", lambda module: module in installed)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match=f"no tokenizer could be loaded.*{reason}"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("tokenizer.json", "{", "JSONDecodeError"),
        ("tokenizer.json", '{"model": {"type": "nope"}}', "KeyError: 'added_tokens'"),
        ("tokenizer.model", "garbage", "ValueError"),
        ("README.md", "", "no vocabulary"),
    ],
)
def test_tokenizers_that_are_none(name: str, content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    with pytest.raises(ConfigError, match=f"no tokenizer could be loaded from .*{reason}") as info:
        Tokenizer(tmp_path)
    assert "\n" not in str(info.value)


def test_packages_are_looked_for() -> None:
    assert loading.is_installed("os.path") and not loading.is_installed("no_package.of_this_name")
