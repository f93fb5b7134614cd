"""--config: the command line, then the file, then defaults; a mistake in the file is told as the file's."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdecode.api.config_file import add_config_flags, parse_arguments
from fastdecode.cli import main
from fastdecode.commands import generate, run_batch
from fastdecode.errors import ConfigError


def make_parser(command: Any, kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = kind(prog="x")
    command.add_arguments(parser)
    return parser


def parse(tmp_path: Path, text: str, *words: str, command: Any = generate) -> argparse.Namespace:
    (tmp_path / "c.yaml").write_text(text)
    return parse_arguments(partial(make_parser, command), [*words, "--config", str(tmp_path / "c.yaml")])


def test_precedence(tmp_path: Path) -> None:
    text = "model: m\nprompt: [a, '-b']\ndtype: float32\nmax-tokens: 5\nignore-eos: true\nstop: [x, y]\njson: false\n"
    args = parse(tmp_path, text)
    assert (args.model, args.prompts, args.dtype, args.max_tokens) == ("m", ["a", "-b"], "float32", 5)
    assert args.ignore_eos and not args.json and args.stop == ["x", "y"] and args.max_num_seqs == 256  # by default
    args = parse(tmp_path, text, "other", "--prompt", "c", "--dtype", "bfloat16", "--stop", "z")
    assert (args.model, args.prompts, args.dtype, args.max_tokens) == ("other", ["c"], "bfloat16", 5)
    assert args.stop == ["z"]  # instead of the file's, not beside them
    args = parse(tmp_path, text, "--prompts-file", "f")  # which rules the file's prompt out
    assert args.prompts is None and args.prompts_file == "f"
    assert parse(tmp_path, "", "m", "--prompt", "x").model == "m"


def test_a_flag_that_can_be_said_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, words = "enable-prefix-caching", ["m", "--prompt", "x"]
    for said, value in (("true", True), ("false", False), ("null", None)):
        text = f"{name}: {said}\n"
        assert parse(tmp_path, text, *words).enable_prefix_caching is value
        assert parse(tmp_path, text, *words, f"--{name}").enable_prefix_caching is True
        assert parse(tmp_path, text, *words, f"--no-{name}").enable_prefix_caching is False
        with pytest.raises(SystemExit):
            parse(tmp_path, text, *words, "--print-config")
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed[name] is value and f"no-{name}" not in printed
    with pytest.raises(ConfigError, match=f"there is no flag 'no-{name}'; did you mean '{name}'"):
        parse(tmp_path, f"no-{name}: true", *words)
    with pytest.raises(ConfigError, match=f"{name} takes true or false, not 1"):
        parse(tmp_path, f"{name}: 1", *words)


def test_flags_that_take_several(tmp_path: Path) -> None:
    text = (
        "input-file: i\noutput-file: o\nmodel: m\nserved-model-name: [a, b]\nr-worker-address: [shm:///a, shm:///b]\n"
    )
    args = parse(tmp_path, text, command=run_batch)
    assert (args.input_file, args.model, args.served_model_name) == ("i", "m", ["a", "b"])
    assert args.r_worker_addresses == ["shm:///a", "shm:///b"]
    args = parse(tmp_path, text, "--served-model-name", "c", "-i", "j", command=run_batch)
    assert args.served_model_name == ["c"] and args.input_file == "j" and args.output_file == "o"


@pytest.mark.parametrize(
    "text, why",
    [
        ("max_num_seqs: 3", "there is no flag 'max_num_seqs'; did you mean 'max-num-seqs'"),
        ("max-tokans: 3", "did you mean 'max-tokens'"),
        ("qqqq: 3", "there is no flag 'qqqq'; Known: block-tokens,"),
        ("config: other.yaml", "there is no flag 'config'"),
        ("3: 4", "there is no flag 3"),
        ("dtype: float8", "argument --dtype: invalid choice: 'float8'"),
        ("max-tokens: many", "argument --max-tokens: invalid int value: 'many'"),
        ("max-tokens: [1, 2]", r"max-tokens takes one value .*, not \[1, 2\]"),
        ("max-tokens: true", "max-tokens takes one value .*, not True"),
        ("ignore-eos: 1", "ignore-eos takes true or false, not 1"),
        ("prompt: {a: b}", "prompt takes a value or a list of them, not {'a': 'b'}"),
        ("prompt: [null]", "prompt takes a value or a list of them"),
        ("prompt: a\nprompts-file: b", "not allowed with argument"),
        ("just words", "lines of `flag: value`"),
        ("a: [", "cannot read the configuration"),
        ("!!python/object/apply:os.system [true]", "cannot read the configuration"),
    ],
)
def test_mistakes_are_the_files(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        parse(tmp_path, text, "m", "--dtype", "float32", "--max-num-seqs", "4")
    assert "c.yaml" in str(raised.value)


def test_mistakes_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "max-tokens: 5")
    assert "the following arguments are required: model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        parse_arguments(partial(make_parser, generate), ["m", "--config", str(tmp_path / "none.yaml")])
    assert main(["generate", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the configuration")


def test_what_is_printed_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["m", "--prompt", "-x: y", "--prompt", "b", "--max-num-seqs", "7", "--print-config"]
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, "kv-cache-memory: 8GiB\nmax-num-seqs: 9\nignore-eos: true\n", *words)
    printed = capsys.readouterr().out
    told = yaml.safe_load(printed)
    assert ended.value.code == 0 and told["max-num-seqs"] == 7 and told["kv-cache-memory"] == "8GiB"
    assert told["model"] == "m" and told["prompt"] == ["-x: y", "b"] and told["ignore-eos"] is True
    assert told["max-model-len"] is None and told["temperature"] == 0.0 and "config" not in told and "help" not in told
    again = vars(parse(tmp_path, printed))
    first = vars(parse(tmp_path, "kv-cache-memory: 8GiB\nmax-num-seqs: 9\nignore-eos: true\n", *words[:-1]))
    assert again == first


def test_secrets_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_key(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        parser = kind(prog="x")
        parser.add_argument("--api-key", action="append", dest="api_keys")
        add_config_flags(parser)
        return parser

    for words, is_told in ((["--api-key", "sesame"], True), ([], False)):
        with pytest.raises(SystemExit):
            parse_arguments(with_key, [*words, "--print-config"])
        printed = capsys.readouterr().out
        assert "sesame" not in printed and ("api-key is set" in printed) == is_told
        assert yaml.safe_load(printed) == ({} if is_told else {"api-key": None})


def test_a_run(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {demo_model}\nprompt: 'def f(x):'\nmax-tokens: 3\njson: true\n")
    assert main(["generate", "--config", str(tmp_path / "c.yaml"), "--max-tokens", "4"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) == 4
