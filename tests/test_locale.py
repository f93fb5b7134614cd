"""Whatever the locale: files are UTF-8, a model's words are printed, and a command line's come as they were typed."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest

from fastdecode import cli
from fastdecode.commands.generate import _as_utf8

ROOT = Path(__file__).parents[1]
ROOMS = ("fastdecode", "cpu_attention", "gpu_sworker", "transport")


def reads_by_the_locale(call: ast.Call) -> bool:
    named = {keyword.arg for keyword in call.keywords}
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
        return "encoding" not in named
    is_open = (isinstance(call.func, ast.Name) and call.func.id == "open") or (
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "open"
        and not (isinstance(call.func.value, ast.Name) and call.func.value.id == "os")
        and len(call.args) == 1
        and isinstance(call.args[0], ast.Constant)
    )
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return is_open and "encoding" not in named and any(isinstance(mode, str) and "b" not in mode for mode in modes)


def test_no_file_is_read_by_the_locale() -> None:
    found = []
    for path in (path for room in ROOMS for path in (ROOT / room).glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and reads_by_the_locale(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
    assert reads_by_the_locale(ast.parse("open(path, 'w')", mode="eval").body)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", "é 漢 \\ud83d".encode()), ("utf-8", "é 漢 \\ud83d".encode()), ("latin-1", b"\xe9 \\u6f22 \\ud83d")],
)
def test_any_text_is_printed(encoding: str, written: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    cli._write_any_text()
    print("é 漢 \ud83d", end="", flush=True)
    assert out.getvalue() == written


def test_arguments_are_utf_8() -> None:
    typed = "é € 漢"
    assert _as_utf8(typed) == typed == _as_utf8(typed.encode().decode("ascii", "surrogateescape"))
