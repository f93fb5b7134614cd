"""An output is gone on with by the run that began it alone; and nothing of the user's is ever written over."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdecode.api.outputs import CompletionOutput, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.batch import identity
from fastdecode.batch.identity import as_begun, decided_by, identify, versions
from fastdecode.batch.journal import Journal
from fastdecode.batch.result import BatchResult
from fastdecode.batch.runner import run_batch, settled_by
from fastdecode.batch.survey import lines, survey
from fastdecode.cli import main
from fastdecode.errors import ConfigError

AUTO = {"device": "auto", "dtype": "auto", "kv_cache_dtype": "auto", "linear_kernel": "auto", "max_model_len": None}


def request(custom_id: str, **fields: Any) -> str:
    body = {"prompt": [5, 6], "max_tokens": 1, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


def write(path: Path, *records: str) -> Path:
    path.write_text("".join(records))
    return path


class FakeLLM:
    """Answers every request with token 7; `meanwhile` happens after so many answers."""

    def __init__(self, after: int = 0, meanwhile: Callable[[], object] | None = None, **facts: Any) -> None:
        told = {"device": "cpu", "dtype": "float32", "linear_kernel": "plain", **facts}
        self.facts = SimpleNamespace(**{name: told[name] for name in ("device", "dtype", "linear_kernel")})
        self.config = SimpleNamespace(kv_cache_dtype=facts.get("kv_cache_dtype", "auto"), model="m")
        self.max_model_len, self.tokenizer = facts.get("max_model_len", 512), None
        self._defaults = facts.get("defaults", SamplingParams())
        self.kv_places: list[str] = []
        self._after, self._meanwhile, self.num_answers = after, meanwhile, 0

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def get_default_sampling_params(self) -> SamplingParams:
        return self._defaults

    def stream(self, requests: Any, *, timeout_s: float | None = None) -> Iterator[tuple[int, RequestOutput]]:
        for place, _ in enumerate(requests):
            if self._meanwhile and self.num_answers == self._after:
                self._meanwhile()
            self.num_answers += 1
            completion = CompletionOutput(0, "x", [7], None, None, "length")
            yield (
                place,
                RequestOutput(request_id=str(place), prompt=None, prompt_token_ids=[5, 6], outputs=[completion]),
            )


def run(source: Path, out: Path, llm: Any = None, settings: Any = None, **flags: Any) -> BatchResult:
    flags = {"resume": False, "retry_errors": False, **flags}
    found = survey(source)
    with Journal(out, found, settings or {}, **flags) as journal:
        return run_batch(llm or FakeLLM(), found, journal, model_names=["m"], seed=0)


def ids(out: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]


def manifest(out: Path) -> Any:
    return json.loads(out.with_name(out.name + ".manifest.json").read_text())


def command(source: Path, out: Path, model: Path, *flags: str) -> int:
    """In this process."""
    return main(["run-batch", "-i", str(source), "-o", str(out), "--model", str(model),
                 "--kv-cache-memory", "64MiB", *flags])  # fmt: skip


# What decides results


@pytest.fixture(scope="module")
def begun(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, an input, and an output that has one of its two lines; by the command itself."""
    base = tmp_path_factory.mktemp("begun")
    shutil.copytree(demo_model, base / "model")
    write(base / "in", request("a"), request("b"))
    assert command(base / "in", base / "out", base / "model", "--device", "cpu") == 0
    first = (base / "out").read_bytes().splitlines(True)[0]
    (base / "out").write_bytes(first)
    return base


@pytest.fixture
def place(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "elsewhere")


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))

    return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return edit


def one_number(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values())).flat[4321] += 1


def all_numbers(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] = tensors[name] * np.float32(1.5).astype(tensors[name].dtype)


@pytest.mark.parametrize(
    "change, flags, told",
    [
        (edit_weights(one_number), (), r"weights\[model.safetensors\] was"),
        (edit_weights(all_numbers), (), r"weights\[model.safetensors\] was"),
        (lambda m: (m / "model.safetensors").rename(m / "other.safetensors"), (), "weights.*and is None"),
        (edit_json("config.json", rms_norm_eps=0.5), (), r"model_files\[config.json\] was"),
        (edit_json("generation_config.json", top_k=3), (), r"model_files\[generation_config.json\]"),
        (edit_json("tokenizer.json", normalizer={"type": "Lowercase"}), (), r"tokenizer_files\[tokenizer.json\]"),
        (edit_json("tokenizer_config.json", add_bos_token=True), (), r"tokenizer_files\[tokenizer_config.json\]"),
        (edit_json("special_tokens_map.json"), (), r"tokenizer_files\[special_tokens_map.json\] was None"),
        (lambda m: (m / "chat_template.jinja").write_text("x"), (), r"tokenizer_files\[chat_template.jinja\] was None"),
        (None, ("--chat-template", "{place}/in"), "chat_template_sha256 was None"),
        (None, ("--tokenizer", "{place}/other"), r"tokenizer_files\[tokenizer.json\] was .* and is"),
        (None, ("--device", "emulated:a10"), "is_emulated was False and is True, device was 'cpu' and is 'emulated'"),
        (None, ("--device", "cuda"), "device was 'cpu' and is 'cuda'"),
        (None, ("--dtype", "bfloat16"), "dtype was 'float32' and is 'bfloat16'"),
        (None, ("--kv-cache-dtype", "int8"), "kv_cache_dtype was 'float32' and is 'int8'"),
        (None, ("--max-model-len", "100"), "max_model_len was .* and is 100"),
        (None, ("--seed", "1"), "seed was 0 and is 1"),
    ],
    ids=range(17),
)  # fmt: skip
def test_each_thing_that_decides_results_is_refused(
    change: Any, flags: tuple[str, ...], told: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By itself, with what was and what is, before a model is loaded; what was there stays as it was."""
    monkeypatch.setattr("fastdecode.LLM", None, raising=False)
    shutil.copytree(place / "model", place / "other")
    edit_json("tokenizer.json", normalizer={"type": "Lowercase"})(place / "other")
    if change:
        change(place / "model")
    before = {path: path.read_bytes() for path in (place / "out", place / "out.manifest.json")}
    given = [flag.format(place=place) for flag in flags]
    assert command(place / "in", place / "out", place / "model", "--resume", "--retry-errors", *given) == 2
    said = capfd.readouterr().err
    assert re.search(told, said), said
    assert "begun with other settings" in said and "--resume-anyway" in said
    assert said.count(" and is ") == 1 + ("emulated" in told), said
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("package", ["fastdecode", "torch", "transformers", "tokenizers", "numba"])
def test_versions_that_move_numbers_are_refused(package: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch version, too."""
    was = versions()[package]
    monkeypatch.setattr(identity, "version", lambda name: version(name) + (".1" if name == package else ""))
    if package == "fastdecode":
        monkeypatch.setattr("fastdecode.__version__", f"{was}.1")
    told = re.escape(f"versions[{package}] was '{was}' and is '{was}.1'. Give")
    with pytest.raises(ConfigError, match=told):
        Journal(place / "out", survey(place / "in"), {"versions": versions()}, resume=True, retry_errors=False)


@pytest.mark.parametrize(
    "facts",
    [{"device": "cuda:0"}, {"dtype": "float16"}, {"kv_cache_dtype": "int4"}, {"linear_kernel": "onednn"},
     {"max_model_len": 511}, {"defaults": SamplingParams(temperature=0.5)}],
    ids=str,
)  # fmt: skip
def test_what_only_a_loaded_model_tells_is_refused(facts: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a"), "torn\n"), tmp_path / "out"
    run(source, out)
    before, llm = out.read_bytes(), FakeLLM(**facts)
    write(source, request("a"), "torn\n", request("b"))
    name = "sampling_defaults" if "defaults" in facts else next(iter(facts))
    with pytest.raises(ConfigError, match=rf"other settings: {name}"):
        run(source, out, llm, resume=True, retry_errors=True)
    assert out.read_bytes() == before and llm.num_answers == 0 and manifest(out)["num_lines"] == 2


def test_a_model_that_was_moved_is_the_same(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also with other times, and with files beside it that decide nothing."""
    model = (place / "model").rename(place / "another name")
    (model / "README.md").write_text("x")
    (model / "training.json").touch()
    os.utime(model / "model.safetensors", (0, 0))
    assert command(place / "in", place / "out", model, "--resume") == 0
    said = capfd.readouterr().err
    assert "2 of 2 lines, 0 errors" in said and "goes on as it was begun: device=cpu, dtype=float32" in said
    assert ids(place / "out") == ["a", "b"] and manifest(place / "out")["changes"] == []


def test_knowingly_and_noted(place: Path) -> None:
    edit_weights(one_number)(place / "model")
    was = manifest(place / "out")["settings"]
    assert command(place / "in", place / "out", place / "model", "--resume-anyway", "--seed", "3") == 0
    held = manifest(place / "out")
    (change,) = held["changes"]
    assert change["num_results"] == 1 and change["at"].endswith("+00:00")
    assert change["changed"]["seed"] == {"was": 0, "is": 3} and len(change["changed"]) == 2
    weights = held["settings"]["weights"]["model.safetensors"]
    named = {"was": was["weights"]["model.safetensors"], "is": weights}
    assert change["changed"]["weights[model.safetensors]"] == named and weights != named["was"]
    assert command(place / "in", place / "out", place / "model", "--resume", "--seed", "3") == 0, "it is those now"
    assert manifest(place / "out")["changes"] == [change]


def test_what_auto_came_to_is_kept() -> None:
    """On a machine where it would come to something else, too."""
    settings = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "linear_kernel": "plain",
                "max_model_len": 512}  # fmt: skip
    assert as_begun(AUTO, settings) == settings
    assert as_begun(AUTO | {"dtype": "float32", "max_model_len": 9}, settings).keys() == {
        "device", "kv_cache_dtype", "linear_kernel"
    }  # fmt: skip
    assert as_begun(AUTO, {}) == {} and as_begun(AUTO | {"device": "emulated:a10"}, settings) == {}
    assert as_begun(AUTO, settings | {"device": "emulated"}) == {}
    assert decided_by(AUTO) == {"is_emulated": False}
    assert decided_by(AUTO | {"linear_kernel": "onednn"}) == {"is_emulated": False}, "which may be not to be had"
    assert decided_by(AUTO | {"device": "emulated:v100", "dtype": "float32"}) == {
        "is_emulated": True, "device": "emulated"
    }  # fmt: skip
    assert decided_by(AUTO | {"device": "cuda:1"})["device"] == "cuda"
    assert settled_by(FakeLLM(device="cuda:1"))["device"] == "cuda"  # type: ignore[arg-type]


@pytest.mark.parametrize("is_sampled", [False, True])
def test_weights_are_told_apart(is_sampled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of many GiB, of which parts are read, if a tensor or its shape differs; others beside them do not count."""
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 0 if is_sampled else 1 << 30)
    generator, read = np.random.default_rng(0), 0
    tensors = {f"t{i}": generator.random((300, 1000), np.float32) for i in range(4)} | {"norm": np.ones(7, np.float32)}
    shards = {"one.safetensors": list(tensors)[:3], "two.safetensors": list(tensors)[3:]}
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def digests(**changed: np.ndarray) -> Any:
        nonlocal read
        for shard, names in shards.items():
            save_file({name: changed.get(name, tensors[name]) for name in names}, tmp_path / shard)
        read = 0

        def count(num_bytes: int) -> None:
            nonlocal read
            read += num_bytes

        return identify(tmp_path, tmp_path, count)["weights"]

    first = digests()
    assert list(first) == ["one.safetensors", "two.safetensors"] and first == digests()
    assert (read < 100_000) == is_sampled and all(("sampled" in told) == is_sampled for told in first.values())
    (tmp_path / "other.safetensors").write_bytes(b"x")
    assert digests() == first
    for name in tensors:
        assert digests(**{name: tensors[name] * np.float32(1.001)}) != first
        assert digests(**{name: tensors[name].reshape(-1, 1)}) != first
    (tmp_path / "two.safetensors").write_bytes(b"\xff" * 99_999)
    assert identify(tmp_path, tmp_path)["weights"]["two.safetensors"] != first["two.safetensors"], "damaged"


def test_nothing_left_to_do_loads_no_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(place / "in", request("a"))
    assert command(place / "in", place / "new", place / "model") == 0
    with (place / "new").open("a") as file:
        file.write('{"torn')
    monkeypatch.setattr("fastdecode.LLM", None, raising=False)
    assert command(place / "in", place / "new", place / "model", "--resume") == 0
    assert "1 of 1 lines, 0 errors" in capfd.readouterr().err and ids(place / "new") == ["a"]


def test_lines_done_are_counted_though_the_load_fails(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(place / "in", place / "out", place / "model", "--resume", "--kv-cache-memory", "1KiB") == 2
    assert "1 of 2 lines are done and written" in capfd.readouterr().err.splitlines()[-1]


# Inputs that change


def test_an_input_that_only_grew_goes_on(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a"), "torn\n"), tmp_path / "out"
    run(source, out)
    write(source, request("a"), "torn\n", request("b"), request("c"))
    llm = FakeLLM()
    result = run(source, out, llm, resume=True)
    assert (result.num_done, result.num_lines, llm.num_answers) == (4, 4, 2) and ids(out) == ["a", "line-2", "b", "c"]
    (change,) = manifest(out)["changes"]
    assert change["changed"] == {"num_lines": {"was": 2, "is": 4}} and change["num_results"] == 2
    write(source, request("a"), "torn\n")
    with pytest.raises(ConfigError, match="the input is not the one"):
        run(source, out, resume=True)


@pytest.mark.parametrize(
    "before, after",
    [
        ([request("a")], [request("b"), request("a")]),
        ([request("a"), '{"custom_id": "b"'], [request("a"), '{"custom_id": "b", "body": {}}\n']),  # was half written
        (["torn\n"], ["torn\n", request("line-1")]),  # what a line without an id is called is an id now
        (['{"custom_id": "a", torn\n'], ['{"custom_id": "a", torn\n', request("a")]),
    ],
)
def test_inputs_that_changed_in_other_ways_are_refused(before: Any, after: Any, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *before), tmp_path / "out"
    run(source, out)
    write(source, *after)
    with pytest.raises(ConfigError, match="the input is not the one"):
        run(source, out, resume=True)


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda path: path.write_text(request("r0")), "shorter.*1 lines are left of 3|has changed"),
        (lambda path: path.write_text(request("r0") + request("x") + request("r2")), "line 2 is another one now"),
        (lambda path: path.write_text(path.read_text().replace("[5, 6]", "[5, 9]")), "has changed while it was read"),
        (lambda path: path.write_text(path.read_text() + request("new")), "has become longer"),
        (lambda path: path.unlink(), "cannot read the input"),
    ],
    ids=["shorter", "other", "body", "longer", "gone"],
)
def test_an_input_that_changes_meanwhile_is_told(change: Any, told: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *(request(f"r{i}") for i in range(3))), tmp_path / "out"
    found = survey(source)
    change(source)
    with Journal(out, found, {}, resume=False, retry_errors=False) as journal, pytest.raises(ConfigError, match=told):
        run_batch(FakeLLM(), found, journal, model_names=["m"], seed=0)  # type: ignore[arg-type]


# Names of lines, and what is said of them


def test_a_line_that_is_no_json_keeps_its_id_if_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdecode.batch.survey.MAX_LINE_BYTES", 500)
    cases = {
        '{"custom_id": "torn", "bo': "torn",
        '{"method": "POST", "custom_id" : "later", "body": {"prompt": "': "later",
        '{"custom_id": "comma", }': "comma",
        '{"custom_id": "deep", "body": ' + "[" * 100_000: "deep",
        '{"custom_id": "long", "body": {"prompt": "' + "x" * 1000 + '"}}': "long",
        '{"custom_id": "tw': None,
        '{"body": {"custom_id": "inner"': None,
        '{"prompt": "\\"custom_id\\": \\"said\\"", ': None,
        '{"custom_id": 5, "body': None,
        "custom_id": None,
        '["custom_id", "x"': None,
    }
    source = write(tmp_path / "in", *(text + "\n" for text in cases))
    with source.open("ab") as file:
        file.write(b'{"custom_id": "\xff", \n')
    found = survey(source)
    expected = [name or f"line-{number}" for number, name in enumerate([*cases.values(), None], 1)]
    assert [line.custom_id for line in lines(source, found.nameless, found.contested)] == expected
    assert all(line.error for line in lines(source))
    run(source, tmp_path / "out")
    assert ids(tmp_path / "out") == expected


def test_but_not_if_another_line_has_it(tmp_path: Path) -> None:
    torn = '{"custom_id": "a", "bo\n'
    source, out = write(tmp_path / "in", torn, request("a"), torn, '{"custom_id": "b", \n'), tmp_path / "out"
    run(source, out)
    assert sorted(ids(out)) == ["a", "b", "line-1", "line-3"]
    before = out.read_bytes()
    assert run(source, out, resume=True).is_complete and out.read_bytes() == before


def test_what_is_quoted_is_cut_short(tmp_path: Path) -> None:
    long = "y" * 5000
    source = write(tmp_path / "in", *(request(name, **{field: value}) for name, field, value in [
        ("model", "model", long), ("field", long, 1), ("type", "n", long), ("format", "response_format", {long: long}),
    ]))  # fmt: skip
    run(source, tmp_path / "out")
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(found) == 4 and all(record["error"] for record in found)
    for record in found:
        assert len(record["error"]["message"]) <= 1100
        assert record["response"]["body"]["error"]["message"] == record["error"]["message"]
    with pytest.raises(ConfigError) as raised:
        survey(write(tmp_path / "twice", request(long), request(long)))
    assert len(str(raised.value)) < 500


def test_ids_of_results_differ_between_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"), "torn\n")
    records = []
    for name in ("one", "two"):
        run(source, tmp_path / name)
        records += [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert len({record["id"] for record in records}) == len({r["response"]["request_id"] for r in records}) == 4
    assert len({record["response"]["body"].get("id") for record in records}) == 3, "two answers, and errors have none"


# Where results go


def test_no_pipe_is_waited_for(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor is anything written beside it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    read, written = os.pipe()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    names = sorted(path.name for path in tmp_path.iterdir())
    for out, kind in {
        tmp_path / "pipe": "a pipe", tmp_path / "link": "a pipe", Path(f"/dev/fd/{written}"): "a pipe",
        Path("/dev/null"): "a device", tmp_path: "a directory", tmp_path / "socket": "a socket",
        Path("-"): "stdout", Path("/dev/stdout"): "stdout",
    }.items():  # fmt: skip
        assert command(place / "in", out, place / "model", "--resume") == 2
        said = capfd.readouterr().err
        assert kind in said and "a file with a name of its own" in said
    os.close(read)
    os.close(written)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not list(Path("/dev").glob("*.manifest.json")) and not Path("-").exists()


@pytest.mark.parametrize("text", ["", "mine", "{}", "[]", request("a"), '{"input_sha256": 1}'])
def test_a_file_where_the_manifest_belongs_is_kept(text: str, tmp_path: Path) -> None:
    source, out, theirs = write(tmp_path / "in", request("a")), tmp_path / "out", tmp_path / "out.manifest.json"
    theirs.write_text(text)
    with pytest.raises(ConfigError, match="give another output"):
        run(source, out)
    assert theirs.read_text() == text and not out.exists()


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_an_input_where_the_manifest_belongs_is_kept(link: Any, tmp_path: Path) -> None:
    source = write(tmp_path / ("in" if link else "out.manifest.json"), request("a"))
    if link:
        link(source, tmp_path / "out.manifest.json")
    with pytest.raises(ConfigError, match="the input is out.manifest.json"):
        run(source, tmp_path / "out")
    assert source.read_text() == request("a") and not (tmp_path / "out").exists()


def test_outputs_keep_links_modes_and_neighbours(tmp_path: Path) -> None:
    """When they are rewritten without their errors; a file called OUT.new is not ours."""
    source, mine, store = write(tmp_path / "in", request("a"), "torn\n"), tmp_path / "out.new", tmp_path / "store"
    store.mkdir()
    out, real = tmp_path / "out", store / "real"
    out.symlink_to(os.path.relpath(real, tmp_path))
    mine.write_text("mine")
    run(source, out)
    real.chmod(0o640)
    out.with_name("out.manifest.json").chmod(0o604)
    if os.geteuid() == 0:
        os.chown(real, 12345, 54321)
    was = real.stat()
    write(source, request("a"), "torn\n", request("b"))
    assert run(source, out, resume=True, retry_errors=True).num_errors == 1
    now = real.stat()
    assert now.st_ino != was.st_ino, "it was rewritten"
    assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid)
    assert out.is_symlink() and not real.is_symlink() and mine.read_text() == "mine" and len(ids(real)) == 3
    assert stat.S_IMODE((tmp_path / "out.manifest.json").stat().st_mode) == 0o604
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.manifest.json", "out.new", "store"]
    assert [path.name for path in store.iterdir()] == ["real"]


def _replace(out: Path) -> None:
    shutil.copy(out, out.with_name("copy"))
    os.replace(out.with_name("copy"), out)


@pytest.mark.parametrize("when", [0, 1, 2])
@pytest.mark.parametrize(
    "harm, told",
    [
        (Path.unlink, "was removed"),
        (lambda out: out.rename(out.with_name("moved")), "was removed or renamed"),
        (_replace, "was replaced by another file"),
        (lambda out: os.truncate(out, 0), "was cut from"),
        (lambda out: out.write_bytes(out.read_bytes() + b"{}\n"), "was written by somebody else"),
    ],
    ids=["removed", "renamed", "replaced", "emptied", "written"],
)
def test_an_output_that_goes_meanwhile_is_told(harm: Any, told: str, when: int, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *(request(f"r{i}") for i in range(3))), tmp_path / "out"
    if when == 0 and told == "was cut from":
        return  # there is nothing yet
    with pytest.raises(ConfigError, match=told):
        run(source, out, FakeLLM(when, lambda: harm(out)))


def test_an_output_that_was_removed_ends_the_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With 2, and no word of lines that are written."""
    out = place / "new"
    monkeypatch.setattr("fastdecode.LLM", lambda model, **options: FakeLLM(1, out.unlink), raising=False)
    assert command(place / "in", out, place / "model") == 2
    said = capfd.readouterr().err
    assert "was removed" in said and "are done and written" not in said and not out.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is told; results go on, also where they are rewritten."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    source, out = write(tmp_path / "in", request("a"), "torn\n"), tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        assert run(source, out).is_complete
        assert run(source, out, resume=True, retry_errors=True).is_complete
    assert "nothing guards it against a second run" in caplog.text and os.strerror(code) in caplog.text


def test_what_killed_runs_left_beside_it_goes(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a")), tmp_path / "out"
    ours, mine = [".out.fastdecode-0123456789abcdef", ".out.manifest.json.fastdecode-0123456789abcdef"], [
        ".out.fastdecode-mine", ".other.fastdecode-0123456789abcdef", "out.fastdecode-0123456789abcdef"
    ]  # fmt: skip
    for name in (*ours, *mine):
        (tmp_path / name).touch()
    run(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "out.manifest.json", *mine}


def test_an_output_of_an_older_version_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a"), request("b")), tmp_path / "out"
    run(source, out)
    held = {name: manifest(out)[name] for name in ("input", "input_sha256", "num_lines")}
    out.with_name("out.manifest.json").write_text(json.dumps(held | {"model": "m", "seed": 0}))
    with pytest.raises(ConfigError, match="did not record.*--resume-anyway"):
        run(source, out, resume=True)
    assert run(source, out, resume=True, is_forced=True).is_complete
    assert manifest(out)["changes"] and manifest(out)["settings"]["dtype"] == "float32"


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a")), tmp_path / "out"

    def again() -> None:
        with pytest.raises(ConfigError, match="another run writes"):
            run(source, out, resume=True)

    assert run(source, out, FakeLLM(0, again)).is_complete


def test_a_journal_that_was_opened_has_changed_nothing(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", request("a"), "torn\n"), tmp_path / "out"
    run(source, out)
    with out.open("a") as file:
        file.write("{torn")
    before = out.read_bytes(), manifest(out)
    found = replace(survey(source), name="elsewhere")
    with Journal(out, found, {"seed": 3}, resume=True, retry_errors=True, is_forced=True) as journal:
        assert (journal.progress().num_done, journal.progress().num_errors) == (1, 0)
        assert (out.read_bytes(), manifest(out)) == before
        journal.start()
    assert ids(out) == ["a"] and manifest(out)["input"] == "elsewhere" and manifest(out)["settings"]["seed"] == 3
