"""`fastdecode bench`: workloads as asked for, peers behind one contract, records that say what ran."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import gguf
import pytest
from conftest import Case
from safetensors.torch import load_file

from fastdecode.benchmark.engines import LlamaCppEngine, PeerEngine, Run
from fastdecode.benchmark.llamacpp import convert
from fastdecode.benchmark.throughput import format_table, make_record
from fastdecode.benchmark.workload import BenchRequest, custom_requests, random_requests, sharegpt_requests
from fastdecode.cli import main
from fastdecode.errors import ConfigError

SETTINGS = {"dtype": "float32", "max_num_seqs": 3, "max_model_len": 512, "threads": 1}


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_random_requests() -> None:
    requests = random_requests(50, 20, 10, vocab_size=7, range_ratio=0.5, seed=3)
    assert {len(r.prompt_token_ids) for r in requests} <= set(range(10, 31)) and len(requests) == 50
    assert {r.output_len for r in requests} <= set(range(5, 16)) and len({r.output_len for r in requests}) > 3
    assert {token for r in requests for token in r.prompt_token_ids} == set(range(7))
    assert requests == random_requests(50, 20, 10, vocab_size=7, range_ratio=0.5, seed=3)
    assert {(len(r.prompt_token_ids), r.output_len) for r in random_requests(9, 20, 10, vocab_size=7)} == {(20, 10)}


def test_sharegpt_requests(tmp_path: Path) -> None:
    def talk(prompt_words: int, answer_words: int) -> dict[str, object]:
        return {"conversations": [{"value": "a " * prompt_words}, {"value": "b " * answer_words}]}

    path = tmp_path / "sharegpt.json"
    # too short an answer, too long a prompt, too long together, no answer: these do not count
    path.write_text(
        json.dumps([talk(5, 9), talk(8, 3), talk(1025, 9), talk(1000, 1049), {"conversations": [{}]}, talk(6, 30)])
    )
    lengths = {(len(r.prompt_token_ids), r.output_len) for r in sharegpt_requests(path, 2, words)}
    assert lengths == {(5, 9), (6, 30)}
    assert {r.output_len for r in sharegpt_requests(path, 2, words, output_len=12)} == {12}
    with pytest.raises(ConfigError, match="has 2 usable requests, 3 were asked for"):
        sharegpt_requests(path, 3, words)
    path.write_text('{"conversations": 3}')
    with pytest.raises(ConfigError, match="no ShareGPT file"):
        sharegpt_requests(path, 1, words)


def test_custom_requests(tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "ab c"}\n\n{"prompt_token_ids": [5, 6, 7], "output_len": 2}\n')
    assert custom_requests(path, 2, words, output_len=9) == [BenchRequest((2, 1), 9), BenchRequest((5, 6, 7), 2)]
    for line, why in (("{", "line 1"), ('{"text": 1}', "KeyError"), ('{"prompt_token_ids": []}', "needs a prompt")):
        path.write_text(line)
        with pytest.raises(ConfigError, match=why):
            custom_requests(path, 1, words, output_len=9)
    with pytest.raises(ConfigError, match="cannot read"):
        custom_requests(tmp_path / "none", 1, words, output_len=9)


def test_transformers_as_a_peer_serves_prompts_of_all_lengths(llama: Case) -> None:
    settings = SETTINGS | {"model": str(llama.directory)}
    engine = PeerEngine("hf", sys.executable, settings)
    try:
        run = engine.run([BenchRequest(tuple(prompt), 5 + i) for i, prompt in enumerate(llama.prompts)])
    finally:
        engine.close()
    assert run.token_ids is not None and run.seconds > 0 and run.prefill_seconds > 0
    for i, (tokens, expected) in enumerate(zip(run.token_ids, llama.reference, strict=True)):
        assert len(tokens) == 5 + i
        common = expected[: 5 + i]  # the reference ends at an end of sequence, a benchmark goes on
        assert tokens[: len(common)] == common


@pytest.mark.parametrize("python, why", [("/no/such/python", "cannot run"), (sys.executable, "(?s)hf: .*its log is")])
def test_a_peer_that_does_not_come_up_says_why(python: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        PeerEngine("hf", python, SETTINGS | {"model": "no-such-model"})
    if "its log is" in why:
        log = Path(str(raised.value).rsplit(" ", 1)[1].rstrip(")"))
        assert "Traceback" in log.read_text()
        log.unlink()


@pytest.mark.parametrize("weights", ["f32", "f16"])
def test_gguf_holds_the_same_numbers(weights: str, llama: Case, tmp_path: Path) -> None:
    convert(llama.directory, tmp_path / "model.gguf", weights)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    source = load_file(llama.directory / "model.safetensors")
    tolerance = 0 if weights == "f32" else 1e-3
    down = source["model.layers.2.mlp.down_proj.weight"].numpy()
    assert abs(tensors["blk.2.ffn_down.weight"].astype("float32") - down).max() <= tolerance
    # Neighbours in llama.cpp's order are a rotated pair: number i of the first half and of the second.
    q, theirs = source["model.layers.0.self_attn.q_proj.weight"].numpy(), tensors["blk.0.attn_q.weight"]
    head_dim = len(q) // 4
    assert abs(theirs[2].astype("float32") - q[1]).max() <= tolerance
    assert abs(theirs[3].astype("float32") - q[1 + head_dim // 2]).max() <= tolerance
    assert len(tensors) == len(source) + ("output.weight" in tensors and "lm_head.weight" not in source)


def test_only_llama_is_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(ConfigError, match="only Llama"):
        convert(tmp_path, tmp_path / "x.gguf", "f32")


def fake_batched_bench(directory: Path, body: str) -> str:
    path = directory / "llama-batched-bench"
    path.write_text(f"#!{sys.executable}\nimport json, sys\nargs = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_llamacpp_takes_the_better_attention(llama: Case, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    binary = fake_batched_bench(
        tmp_path,
        f"open({str(calls)!r}, 'a').write(args['-fa'] + ' ' + args['-ntg'] + '\\n')\n"
        "print('noise')\nprint(json.dumps({'t_pp': 2.0, 't_tg': {'on': 5.0, 'off': 3.0}[args['-fa']]}))",
    )
    engine = LlamaCppEngine(binary, llama.directory, "f32", threads=2)
    try:
        requests = [BenchRequest((1, 2, 3), 8)] * 4
        assert engine.run(requests) == engine.run(requests) == Run(5.0, 2.0)
        assert engine.settings["flash_attention"] is False
        assert calls.read_text().split("\n")[:-1] == ["on 7", "off 7", "off 7"]
        with pytest.raises(ConfigError, match="equal lengths"):
            engine.run([BenchRequest((1,), 2), BenchRequest((1, 2), 2)])
    finally:
        engine.close()


def test_llamacpp_that_fails_says_why(llama: Case, tmp_path: Path) -> None:
    engine = LlamaCppEngine(fake_batched_bench(tmp_path, "sys.exit('bad model')"), llama.directory, "f32", threads=2)
    with pytest.raises(ConfigError, match="exit code 1: bad model"):
        engine.run([BenchRequest((1, 2, 3), 8)])
    engine.close()


def test_rates_are_those_of_medians() -> None:
    class Engine:
        name, settings = "some", {"threads": 1}

    runs = [Run(9.0, 2.0), Run(5.0, 1.0), Run(6.0, 4.0)]
    record = make_record(Engine(), runs, [BenchRequest((1,) * 10, 5)] * 4, {"dataset": "x"})  # type: ignore[arg-type]
    assert record["decode_tokens_per_s"] == 4 * 4 / (6 - 2) and record["prefill_tokens_per_s"] == 40 / 2
    assert record["total_tokens_per_s"] == 60 / 6 and record["workload"]["output_tokens"] == 20
    assert "4 (1.00x)" in format_table([record])


def test_command(llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    arguments = ["bench", "throughput", str(llama.directory), "--backend", "fastdecode", "hf", "--num-prompts", "6"]
    arguments += ["--input-len", "9", "--output-len", "7", "--repeats", "1", "--output-json", str(path)]
    assert main(arguments) == 0 and main([*arguments, "--kv-cache-dtype", "float16"]) == 0
    out = capsys.readouterr()
    assert "hf" in out.out and "6 of 6 requests" in out.err
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["backend"] for record in records] == ["fastdecode", "hf"] * 2
    assert records[2]["settings"]["kv_cache_dtype"] == "float16" and "kv_cache_dtype" not in records[0]["settings"]
    assert records[0]["workload"]["input_len"] == 9 and records[0]["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--backend", "vllm"], "--vllm-python"),
        (["--backend", "llamacpp"], "--llamacpp-binary"),
        (["--dataset-name", "sharegpt"], "--dataset-path"),
        (["--random-range-ratio", "1"], "share from 0"),
        (["--output-json", "/no/such/dir/x", "--num-prompts", "1", "--repeats", "1"], "cannot write"),
    ],
)
def test_command_refuses(arguments: list[str], why: str, llama: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", str(llama.directory), *arguments]) == 2
    assert why in capsys.readouterr().err


def test_command_refuses_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", str(tmp_path / "none")]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["inproc", "shm", "ipc", "tcp"])
def test_transport_table(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wire.jsonl"
    arguments = ["--scheme", scheme, "--tokens", "1", "100", "--kv-heads", "2", "--dtype", "float16"]
    assert main(["bench", "transport", *arguments, "--output-json", str(path)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [[scheme, "1"], [scheme, "100"]]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["num_bytes"] for record in records] == [(2 * 8 + 2 * 2) * 128 * 2 * tokens for tokens in (1, 100)]
    assert all(0 < record["median_s"] <= record["p99_s"] for record in records)


def test_latency(llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.jsonl"
    arguments = ["--batch-size", "3", "--input-len", "9", "--output-len", "5", "--num-iters", "4"]
    assert main(["bench", "latency", str(llama.directory), *arguments, "--output-json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert "mean latency" in capsys.readouterr().out and record["workload"]["batch_size"] == 3
    percentiles = list(record["percentiles_s"].values())
    assert percentiles == sorted(percentiles) and percentiles[0] <= record["mean_s"] <= percentiles[-1]
