"""Batch files: every line answered once, whatever is in it and however often the run is cut off."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import batch_kills
from fastdecode import LLM, SamplingParams
from fastdecode.api.model_names import default_names, is_called
from fastdecode.batch.journal import Journal
from fastdecode.batch.result import BatchResult
from fastdecode.batch.runner import run_batch
from fastdecode.batch.source import kept
from fastdecode.batch.survey import MAX_LINE_BYTES, lines, survey
from fastdecode.cli import main
from fastdecode.errors import ConfigError
from fastdecode.openai_api import read_line

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def request(custom_id: str, prompt: Any, url: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    said = {"messages": prompt} if "chat" in url else {"prompt": prompt}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**said, "temperature": 0, **fields}}


def write(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def results(path: Path) -> dict[str, Any]:
    """By custom_id; fails if one comes twice."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["custom_id"] for record in found}) == len(found)
    return {record["custom_id"]: record for record in found}


def texts(path: Path) -> dict[str, Any]:
    return {name: record["response"]["body"].get("choices") for name, record in results(path).items()}


def command(model: Path, source: Path, out: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "fastdecode", "run-batch", "-i", str(source), "-o", str(out), "--model", str(model),
        "--kv-cache-memory", "64MiB", *flags,
    ]  # fmt: skip


def cli(*arguments: Any, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def chatty_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(demo_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def llm(chatty_model: Path) -> Any:
    with LLM(chatty_model, kv_cache_memory="64MiB", max_num_waiting=64) as llm:
        yield llm


def run(
    llm: LLM, source: Path, out: Path, *, resume: bool = False, retry_errors: bool = False, **options: Any
) -> BatchResult:
    found = survey(source)
    with Journal(out, found, {"seed": 0}, resume=resume, retry_errors=retry_errors) as journal:
        return run_batch(llm, found, journal, model_names=["chatty"], seed=0, **options)


def test_every_kind_of_line(chatty_model: Path, tmp_path: Path) -> None:
    """Good ones are what `generate` gives; each bad one has its own error; the exit code tells."""
    source = write(tmp_path / "in.jsonl", [
        request("text", "def f(x):", max_tokens=6, model="chatty"),
        request("chat", [{"role": "user", "content": "import"}], "/v1/chat/completions", max_tokens=5, logprobs=True),
        request("ids", [5, 6, 7], max_tokens=4, ignore_eos=True),
        "\n",
        '{"custom_id": "torn", "bo\n',
        "[1, 2]\n",
        {"url": "/v1/completions", "body": {}},
        request("get", "x") | {"method": "GET"},
        request("url", "x", "/v1/embeddings"),
        request("field", "x", tools=[]),
        request("range", "x", temperature=-3),
        request("model", "x", model="gpt-5"),
        request("long", [5] * 5000),
        request("vocabulary", [10**6]),
        request("empty", ""),
    ])  # fmt: skip
    done = cli(chatty_model, source, tmp_path / "out.jsonl")
    assert done.returncode == 1, done.stderr
    assert "14 of 14 lines, 11 errors" in done.stderr
    found = results(tmp_path / "out.jsonl")
    codes = {name: record["error"] and record["error"]["code"] for name, record in found.items()}
    assert codes == {
        "text": None, "chat": None, "ids": None, "torn": "invalid_request", "line-6": "invalid_request",
        "line-7": "invalid_request", "get": "invalid_request", "url": "invalid_request", "field": "invalid_request",
        "range": "invalid_request", "model": "model_not_found", "long": "context_length_exceeded",
        "vocabulary": "invalid_request", "empty": "invalid_request",
    }  # fmt: skip
    for record in found.values():
        body = record["response"]["body"]
        assert (record["response"]["status_code"] == 200) == (record["error"] is None) == ("choices" in body)
    with LLM(chatty_model, kv_cache_memory="64MiB") as llm:
        (text,) = llm.generate("def f(x):", SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
        (chat,) = llm.chat(
            [{"role": "user", "content": "import"}], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False
        )
    assert found["text"]["response"]["body"]["choices"][0]["text"] == text.outputs[0].text
    choice = found["chat"]["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == chat.outputs[0].text and len(choice["logprobs"]["content"]) == 5
    assert found["ids"]["response"]["body"]["usage"]["completion_tokens"] == 4


def test_lines_that_begin_alike(chatty_model: Path, tmp_path: Path) -> None:
    """Compute that once, but for those with another salt; each line tells."""
    said, chat = "def read(path):\n" * 9, "/v1/chat/completions"
    messages = [{"role": "user", "content": said}]
    source = write(tmp_path / "in.jsonl", [
        request("none", said), request("a", said, cache_salt="a"), request("again", said),
        request("chat", messages, chat, cache_salt="b"), request("its", messages, chat, cache_salt="b"),
        request("empty", said, cache_salt=""),
    ])  # fmt: skip
    with LLM(chatty_model, kv_cache_memory="64MiB", max_num_seqs=1) as llm:
        run(llm, source, tmp_path / "out.jsonl")
    found = {name: record["response"]["body"] for name, record in results(tmp_path / "out.jsonl").items()}
    assert found["empty"]["error"]["param"] == "cache_salt" and "not empty" in found.pop("empty")["error"]["message"]
    usages = {name: body["usage"] for name, body in found.items()}
    cached = {name: usage["prompt_tokens_details"]["cached_tokens"] for name, usage in usages.items()}
    length, of_chat = usages["none"]["prompt_tokens"], usages["chat"]["prompt_tokens"]
    assert cached == {"none": 0, "a": 0, "again": length - 1, "chat": 0, "its": of_chat - 1}


def test_all_good_is_zero(chatty_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request("a", "x", max_tokens=2)])
    assert cli(chatty_model, source, tmp_path / "out.jsonl").returncode == 0
    again = cli(chatty_model, source, tmp_path / "out.jsonl", "--resume")
    assert again.returncode == 0 and "1 of 1 lines, 0 errors" in again.stderr


def test_refused_at_the_start(chatty_model: Path, tmp_path: Path) -> None:
    source, out = (
        write(tmp_path / "in.jsonl", [request("a", "x"), request("b", "x"), request("a", "y")]),
        tmp_path / "o",
    )
    done = cli(chatty_model, source, out)
    assert done.returncode == 2 and "'a' comes on line 1 and again on line 3" in done.stderr and not out.exists()
    write(source, [request("a", "x", max_tokens=2), request("b", "x", max_tokens=2)])
    done = cli(chatty_model, source, source)
    assert done.returncode == 2 and "the output is the input" in done.stderr
    assert len(results(source)) == 2, "and it is as it was"
    done = cli(chatty_model, tmp_path / "nowhere", out)
    assert done.returncode == 2 and "cannot read the input" in done.stderr


def test_outputs_of_another_job(tmp_path: Path, llm: LLM) -> None:
    source, out = write(tmp_path / "in.jsonl", [request("a", "x", max_tokens=2)]), tmp_path / "out.jsonl"
    assert run(llm, source, out).is_complete
    with pytest.raises(ConfigError, match="not empty"):
        run(llm, source, out)
    found = survey(source)
    with pytest.raises(ConfigError, match="other settings: seed was 0 and is 1"):
        Journal(out, found, {"seed": 1}, resume=True, retry_errors=False)
    with Journal(out, found, {"seed": 0}, resume=True, retry_errors=False) as journal:
        assert len(journal.recorded.ids) == 1
        with pytest.raises(ConfigError, match="another run"):
            Journal(out, found, {"seed": 0}, resume=True, retry_errors=False)
    before = out.read_bytes()
    write(source, [request("a", "y", max_tokens=2)])
    with pytest.raises(ConfigError, match="not the one that"):
        run(llm, source, out, resume=True)
    foreign = write(tmp_path / "mine.txt", ["my thesis\n"])
    with pytest.raises(ConfigError, match="no output of run-batch"):
        run(llm, source, foreign, resume=True)
    assert out.read_bytes() == before and foreign.read_text() == "my thesis\n"
    (tmp_path / "mine.txt.manifest.json").write_text((tmp_path / "out.jsonl.manifest.json").read_text())
    with pytest.raises(ConfigError, match="input is not the one"):
        run(llm, source, foreign, resume=True)
    assert foreign.read_text() == "my thesis\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_json_is_never_written(tmp_path: Path, number: float) -> None:
    found = survey(write(tmp_path / "in.jsonl", [request("a", [5])]))
    with (
        Journal(tmp_path / "out.jsonl", found, {}, resume=False, retry_errors=False) as journal,
        pytest.raises(ValueError, match="JSON"),
    ):
        journal.append({"custom_id": "a", "response": {"logprob": [number]}, "error": None})
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_line_torn_anywhere_is_done_again(tmp_path: Path, llm: LLM) -> None:
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", [5 + i], max_tokens=2) for i in range(3)])
    out = tmp_path / "out.jsonl"
    run(llm, source, out)
    whole, expected = out.read_bytes(), texts(out)
    last = len(whole) - len(whole.splitlines()[-1]) - 1
    for cut in [*range(last, len(whole), 37), len(whole) - 1]:
        out.write_bytes(whole[:cut])
        assert run(llm, source, out, resume=True).is_complete
        assert texts(out) == expected, cut


def test_errors_are_done_again_when_asked(tmp_path: Path, llm: LLM) -> None:
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", [5 + i], max_tokens=30, ignore_eos=True) for i in range(9)])
    out = tmp_path / "out.jsonl"
    assert run(llm, source, out, timeout_s=0.0).num_errors == 9
    assert {record["error"]["code"] for record in results(out).values()} == {"timeout"}
    assert run(llm, source, out, resume=True).num_errors == 9
    result = run(llm, source, out, resume=True, retry_errors=True)
    assert result.is_complete and result.num_errors == 0
    assert len(results(out)) == 9 and all(record["error"] is None for record in results(out).values())


def test_draws_do_not_depend_on_where_a_run_was_cut_off(tmp_path: Path, llm: LLM) -> None:
    source = write(
        tmp_path / "in.jsonl", [request(f"r{i}", "import", temperature=1.5, max_tokens=8, n=2) for i in range(12)]
    )
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    run(llm, source, whole)

    def stop(result: BatchResult) -> None:
        if result.num_done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llm, source, half, on_progress=stop)
    assert len(results(half)) == 5
    run(llm, source, half, resume=True)
    assert texts(half) == texts(whole) and len({str(choices) for choices in texts(whole).values()}) > 6


def test_input_that_grows_meanwhile(tmp_path: Path, llm: LLM) -> None:
    source = write(tmp_path / "in.jsonl", [request("a", "x", max_tokens=2)])
    found = survey(source)
    with source.open("a") as file:
        file.write(json.dumps(request("b", "x")) + "\n")
    with (
        Journal(tmp_path / "o", found, {}, resume=False, retry_errors=False) as journal,
        pytest.raises(ConfigError, match="has become longer"),
    ):
        run_batch(llm, found, journal, model_names=["m"], seed=0)


def test_requests_in_flight_are_bounded(tmp_path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file: what is taken and not answered is what the queue and the running ones hold."""
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", [5], max_tokens=1) for i in range(1000)])
    taken, most = 0, 0
    read = lines

    def counted(*arguments: Any) -> Any:
        nonlocal taken
        for line in read(*arguments):
            taken += 1
            yield line

    def note(result: BatchResult) -> None:
        nonlocal most
        most = max(most, taken - result.num_done)

    monkeypatch.setattr("fastdecode.batch.runner.lines", counted)
    assert run(llm, source, tmp_path / "o", on_progress=note).is_complete
    assert 64 <= most <= 64 + 256 + 2, "waiting, running, and the next one"


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "pack", [bytes, BOM.__add__, gzip.compress, lambda b: gzip.compress(BOM + b), bz2.compress, lzma.compress,
             lambda b: gzip.compress(b[:100]) + gzip.compress(b[100:])],
    ids=["plain", "mark", "gzip", "gzip-mark", "bzip2", "xz", "gzip-twice"],
)  # fmt: skip
@pytest.mark.parametrize("is_pipe", [False, True])
def test_inputs_are_read_packed_or_not_from_files_and_pipes(pack: Any, is_pipe: bool, tmp_path: Path) -> None:
    """And are the same input, whatever they came as; nothing stays beside the output."""
    plain = write(tmp_path / "plain.jsonl", ["\n", request("a", "x"), "\n", request("b", "\u2028ü"), "torn\n"])
    source, out = tmp_path / "in", tmp_path / "out.jsonl"
    given = pack(plain.read_bytes())
    if is_pipe:
        os.mkfifo(source)
        threading.Thread(target=source.write_bytes, args=(given,)).start()
    else:
        source.write_bytes(given)
    names = sorted(path.name for path in tmp_path.iterdir())
    with kept(source, out) as path:
        found = survey(path, str(source))
        assert [(line.index, line.number, line.custom_id) for line in lines(path)] == [
            (0, 2, "a"), (1, 4, "b"), (2, 5, "line-5")
        ]  # fmt: skip
        assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert found.sha256 == hashlib.sha256(plain.read_bytes()).hexdigest() and found.name == str(source)


@pytest.mark.parametrize(
    "given, told",
    [
        ("{}\n".encode("utf-16"), "UTF-16.*iconv -f UTF-16"),
        ("{}\n".encode("utf-16-le"), "UTF-16.*iconv"),
        ("{}\n".encode("utf-16-be"), "UTF-16.*iconv"),
        ("{}\n".encode("utf-32"), "UTF-32.*iconv -f UTF-32"),
        (gzip.compress("{}\n".encode("utf-16")), "UTF-16"),
        (gzip.compress(b"{}\n" * 999)[:-9], "damaged or cut off"),
        (gzip.compress(bytes(range(256)) * 4)[:200] + b"x" * 500, "damaged or cut off"),
        (b"\x1f\x8bno gzip", "damaged or cut off"),
        (bz2.compress(b"{}\n")[:-9] + b"123456789", "damaged or cut off|cannot read the input"),
        (b"\x28\xb5\x2f\xfd....", "is zstd: unpack it"),
        (b"PK\x03\x04....", "is a zip archive: unpack it"),
        (b'\n[{"custom_id": "a"}, {"custom_id": "b"}]', "not JSONL.*jq -c '.\\[\\]'"),
        (b'[{"custom_id": "a"},\n{"custom_id": "b"},\n{"custom_id": "c"}]\n', "not JSONL.*jq -c '.\\[\\]'"),
        (b'[\n{"custom_id": "a"},\n{"custom_id": "b"}\n]\n', "not JSONL.*jq -c '.\\[\\]'"),
        (b'{\n "custom_id": "a",\n "body": {}\n}\n', "not JSONL.*jq -c \\."),
        (b'{"custom_id": "a"}\r{"custom_id": "b"}\r', "not JSONL.*tr '"),
    ],
    ids=range(16),
)
def test_what_is_no_text_is_told_before_a_model_is_loaded(given: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(given)
    with pytest.raises(ConfigError, match=told):
        survey(tmp_path / "in")


def test_a_pipe_as_input_can_be_resumed(chatty_model: Path, tmp_path: Path) -> None:
    """Of the command itself, through its standard input; the results are a file's."""
    source = write(tmp_path / "in.jsonl", [request(name, "x", max_tokens=2) for name in "abc"])
    out = tmp_path / "out.jsonl"
    words = command(chatty_model, Path("-"), out)
    for flags, given in (([], source.read_bytes()), (["--resume"], gzip.compress(source.read_bytes()))):
        done = subprocess.run([*words, *flags], input=given, cwd=ROOT, capture_output=True, timeout=120)
        assert done.returncode == 0 and b"3 of 3 lines, 0 errors" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.manifest.json"]
    assert set(results(out)) == set("abc")
    done = subprocess.run([*words, "--resume"], input=b"{}\n", cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 2 and b"the input is not the one" in done.stderr


def test_names_of_lines_that_have_none(tmp_path: Path, llm: LLM) -> None:
    """Are no user's, and the same when the run goes on; what is wrong with an id is told as it is."""
    source = write(tmp_path / "in.jsonl", [
        "torn\n", request("line-1", "x", max_tokens=1), request("line-9", "x", max_tokens=1), "\n",
        request("", "x"), request("a", "x") | {"custom_id": 7}, request("b", "x") | {"method": "post"},
        request("c", "x") | {"method": None, "url": None}, request("d", "x") | {"url": 5}, "[]\n",
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert run(llm, source, out).is_complete
    found = results(out)
    assert {name for name, record in found.items() if record["error"] is None} == {"line-1", "line-9", "b", "c"}
    told = {name: record["error"]["message"] for name, record in found.items() if record["error"]}
    assert set(told) == {f"nameless-line-{number}" for number in (1, 5, 6, 10)} | {"d"}
    assert told["nameless-line-6"] == "custom_id must be a string that is not empty, got 7"
    assert told["nameless-line-5"].endswith('got ""') and told["d"] == "url must be a string, got 5"
    before = out.read_bytes()
    assert run(llm, source, out, resume=True).is_complete and out.read_bytes() == before
    write(source, [*(request(f"{prefix}{2}", "x") for prefix in ("line-", "nameless-line-")), "torn\n", "\n"])
    assert survey(source).nameless == "line-", "of another line"
    write(source, ["\n", "torn\n", *(request(f"{prefix}{2}", "x") for prefix in ("line-", "nameless-line-"))])
    found_names = survey(source)
    assert (
        found_names.num_lines == 3 and found_names.nameless.startswith("nameless-") and len(found_names.nameless) > 20
    )


def test_halves_of_surrogate_pairs_are_no_harm(tmp_path: Path, llm: LLM) -> None:
    """In an id, in a field's name, in a prompt, in a message: the output is UTF-8, and each line has its result."""
    half = "\ud800"
    source = write(tmp_path / "in.jsonl", [
        request("first", "x", max_tokens=1), request(half, "x", max_tokens=1), request("field", "x", **{half: 1}),
        request("prompt", half), request("chat", [{"role": "user", "content": half}], "/v1/chat/completions"),
        request("key", [{"role": "user", "content": "x", half: half}], "/v1/chat/completions", max_tokens=1),
        request("nested", "x", metadata={half: half}, max_tokens=1), request("model", "x", model=half),
        request("url", "x", half), request("stop", "x", stop=half, max_tokens=1), request("last", "x", max_tokens=1),
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert run(llm, source, out).is_complete
    out.read_bytes().decode()
    found = results(out)
    assert len(found) == 11 and found[half]["error"] is None and found["last"]["error"] is None
    assert {"field", "prompt", "chat", "model", "url"} <= {name for name, record in found.items() if record["error"]}
    before = out.read_bytes()
    assert run(llm, source, out, resume=True).is_complete and out.read_bytes() == before


def test_results_have_no_line_ends_of_unicodes(tmp_path: Path, llm: LLM) -> None:
    source = write(
        tmp_path / "in.jsonl", [request(f"a{end}b", "x", max_tokens=1) for end in "\x85\u2028\u2029\x0b\x0c\r"]
    )
    assert run(llm, source, tmp_path / "out.jsonl").is_complete
    assert len((tmp_path / "out.jsonl").read_bytes().decode().splitlines()) == 6


def test_a_fault_of_ours_costs_one_line(tmp_path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", [request(name, name, max_tokens=1) for name in ("a", "bad", "c")])

    def read(url: str | None, body: Any, *more: Any) -> Any:
        return read_line(url, body, *more) if body["prompt"] != "bad" else 1 // 0

    monkeypatch.setattr("fastdecode.batch.runner.read_line", read)
    assert run(llm, source, tmp_path / "o").num_errors == 1
    error = results(tmp_path / "o")["bad"]["error"]
    assert error["code"] == "internal_error" and "ZeroDivisionError" in error["message"]
    assert run(llm, source, tmp_path / "o", resume=True).is_complete


def test_errors_of_lines_name_their_place(tmp_path: Path, llm: LLM) -> None:
    """Also those that show when the line is read by the tokenizer."""
    chat = "/v1/chat/completions"
    source = write(tmp_path / "in.jsonl", [
        request("part", [{"role": "user", "content": [{"type": "image_url"}]}], chat), request("long", "x" * 10**6),
        request("number", [{"role": "user", "content": 5}], chat),
        request("tokens", "x", chat, max_completion_tokens=0),
        request("template", [{"role": "user", "content": "x"}], chat, chat_template="x"),
        request("thinking", [{"role": "user", "content": "x"}], chat, chat_template_kwargs={"a": 1}, max_tokens=1),
    ])  # fmt: skip
    run(llm, source, tmp_path / "o")
    errors = {name: record["response"]["body"].get("error") for name, record in results(tmp_path / "o").items()}
    assert errors["thinking"] is None
    assert errors["part"]["param"] == "messages[0].content[0]" and errors["number"]["param"] == "messages[0].content"
    assert errors["template"]["param"] == "chat_template" and errors["tokens"]["param"] == "messages"
    assert errors["long"]["code"] == "context_length_exceeded" and errors["long"]["n_ctx"] == llm.max_model_len


def test_a_chat_template_of_the_run(demo_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Which decides what is in the output; and a model without one says so."""
    source = write(tmp_path / "in.jsonl", [request("a", [{"role": "user", "content": "import"}], "chat/completions")])
    out, template = tmp_path / "out.jsonl", tmp_path / "template.jinja"

    def run(*flags: str) -> int:
        """In this process."""
        return main(command(demo_model, source, out, *flags)[3:])

    assert run() == 1 and "no chat template" in results(out)["a"]["error"]["message"]
    template.write_text(TEMPLATE)
    assert run("--resume", "--chat-template", str(template)) == 2
    assert "chat_template_sha256 was None" in capfd.readouterr().err
    out.unlink()
    assert run("--chat-template", str(template)) == 0
    assert run("--chat-template", str(tmp_path / "nowhere")) == 2


def test_a_directory_has_one_name(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_model.parent)
    for model in (str(demo_model), f"{demo_model}/", demo_model.name, f"./{demo_model.name}/"):
        names = default_names(model)
        assert names[1] == demo_model.name
        for name in (
            str(demo_model),
            f"{demo_model}//",
            demo_model.name,
            f"{demo_model.name}/",
            f"./{demo_model.name}",
        ):
            assert is_called(name, names, model), (name, model)
        assert not any(is_called(name, names, model) for name in ("gpt", "", "/", str(demo_model.parent), "a\0b"))
        assert not is_called(model, ("mine",), model), "its path is no name of it where it was given others"


def test_overlong_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdecode.batch.survey.MAX_LINE_BYTES", 1000)
    source = write(tmp_path / "in.jsonl", [request("a", "x" * 5000), request("b", "x")])
    found = [line.error for line in lines(source)]
    assert found[0] and "more than" in found[0] and found[1:] == [None]
    assert survey(source).num_lines == 2 and MAX_LINE_BYTES > 1 << 20


def test_all_of_the_input_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an overlong line ends in, too, though it is never held as a whole."""
    monkeypatch.setattr("fastdecode.batch.survey.MAX_LINE_BYTES", 1000)
    source = tmp_path / "in.jsonl"
    for rest in (b"end", b"END", b"e" * 5000 + b"\n" + json.dumps(request("b", "x")).encode()):
        source.write_bytes(b"x" * 4321 + rest)
        assert survey(source).sha256 == hashlib.sha256(source.read_bytes()).hexdigest()


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file may become longer meanwhile: what a full disk looks like to who writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_is_full_at_a_resume(tmp_path: Path, llm: LLM) -> None:
    """Whatever cannot be written, the results that are there stay as they are, and are found when there is room."""
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", [5 + i], max_tokens=3) for i in range(8)] + ["torn\n"])
    out = tmp_path / "out.jsonl"
    assert run(llm, source, out).num_errors == 1
    whole, names = out.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    for room in (0, 1, 500, len(whole) // 2):
        with disk_of(room), pytest.raises(ConfigError, match="cannot write beside.*as it was"):
            run(llm, source, out, resume=True, retry_errors=True)
        assert out.read_bytes() == whole and sorted(path.name for path in tmp_path.iterdir()) == names
    expected = texts(out)
    assert run(llm, source, out, resume=True, retry_errors=True).is_complete
    assert texts(out) == expected


def test_disk_that_is_full_at_the_manifest(demo_model: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [request("a", "x", max_tokens=2)]), tmp_path / "out.jsonl"
    with disk_of(10):
        done = cli(demo_model, source, out)
    assert done.returncode == 2 and "cannot write beside" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"] and not out.read_bytes()
    assert cli(demo_model, source, out).returncode == 0


@pytest.mark.parametrize("harm", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_before_there_is_a_model(harm: signal.Signals, demo_model: Path, tmp_path: Path) -> None:
    """While the input is read, which is a pipe here and never ends."""
    source = tmp_path / "in.jsonl"
    os.mkfifo(source)
    process = subprocess.Popen(
        command(demo_model, source, tmp_path / "out.jsonl"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with source.open("w"):  # which waits for the reader
        process.send_signal(harm)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + harm and said == "interrupted before the first line\n"


@pytest.mark.parametrize("harm", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_a_signal_ends_it_cleanly(harm: signal.Signals, demo_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", "x", max_tokens=200) for i in range(2000)])
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(command(demo_model, source, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for_results(process, out, 1)
    process.send_signal(harm)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + harm and "--resume" in said and "Traceback" not in said
    assert 0 < len(results(out)) < 2000


TWICE = """
import signal, sys
from fastdecode.cli import main
from fastdecode.commands.run_batch import _Progress
from fastdecode.scheduling.load_control import LoadControl
start, how_to_go_on, calls = LoadControl.start, _Progress.how_to_go_on, []

def interrupted_start(*arguments):
    calls.append(1)
    if len(calls) == 20:
        signal.raise_signal(signal.SIGINT)
    return start(*arguments)

def interrupted_end(progress):
    signal.raise_signal(signal.SIGINT)
    return how_to_go_on(progress)

LoadControl.start, _Progress.how_to_go_on = interrupted_start, interrupted_end
sys.exit(main())
"""


def test_interrupted_while_a_line_starts_and_again_at_the_end(demo_model: Path, tmp_path: Path) -> None:
    """Ctrl-C between two structures that have to agree, and another one before it is told how to go on."""
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", "x", max_tokens=20) for i in range(50)])
    out = tmp_path / "out.jsonl"
    arguments = command(demo_model, source, out)
    begin = arguments.index("run-batch")
    run = subprocess.run([sys.executable, "-c", TWICE, *arguments[begin:]], cwd=ROOT, capture_output=True, text=True)
    told = run.stderr.strip().splitlines()[-1]
    num_done = len(results(out)) if out.exists() else 0
    assert run.returncode == 130 and told.startswith(f"interrupted; {num_done} of 50 lines are done"), run.stderr


@pytest.mark.parametrize("num_lines, num_kills", [(160, 2), pytest.param(300, 5, marks=pytest.mark.slow)])
def test_killed_again_and_again(num_lines: int, num_kills: int, demo_model: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments: after the last resume every line is there once, as in a run that was left alone."""
    source, whole, out = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    batch_kills.make_input(source, num_lines)
    assert cli(demo_model, source, whole).returncode == 0
    generator = np.random.default_rng(int(os.environ.get("FASTDECODE_SEED", "0")))
    kills = batch_kills.kill_and_resume(demo_model, source, out, generator, num_lines, num_kills)
    for number, kill in enumerate(kills):  # every fifth comes at the start, before there is anything new
        got = kill["lines_after"] - kill["lines_before"]
        assert kill["was_running"] and (got > 0 or (number % 5 == 4 and got == 0)), kills
    assert texts(out) == texts(whole) and len(texts(out)) == num_lines


def _wait_for_results(process: subprocess.Popen[Any], out: Path, count: int) -> None:
    deadline = time.monotonic() + 150
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
