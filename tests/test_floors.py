"""The floors of the house: who may import whom, read from the source, and what must not be in it at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("transport", "cpu_attention", "gpu_sworker", "fastdecode")
# room -> rooms it may import
ALLOWED = {
    "transport": set(),
    "cpu_attention": {"transport"},
    "gpu_sworker": set(),
    "fastdecode": {"transport", "cpu_attention", "gpu_sworker"},
}
# Of cpu_attention only the worker and the process around it look down.
LOOKS_DOWN = {"rworker.py", "serve.py", "process.py", "__main__.py"}
# Pure rooms of fastdecode: no torch, no clock, no sockets.
PURE = sorted(
    str(path.relative_to(ROOT / "fastdecode"))
    for path in (
        *(ROOT / "fastdecode" / "scheduling").glob("*.py"),
        *(ROOT / "fastdecode" / "modelling" / "simulation").glob("*.py"),
        ROOT / "fastdecode" / "modelling" / "perf_model.py",
        *(ROOT / "fastdecode" / "api" / f"{name}.py" for name in ("outputs", "sampling_params", "token_rules")),
        ROOT / "fastdecode" / "errors.py",
    )
)
# The rooms of fastdecode, from the ground up: each imports from those before it alone.
STOREYS = (
    ("errors", "ending", "signals"),
    ("api",),  # what users say and get
    ("scheduling", "text"),
    ("observe",),
    ("modelling", "holders"),
    ("engine",),
    ("llm", "benchmark", "openai_api"),  # the doors, from here on
    ("batch", "server"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# The two places that import by name, so that `import fastdecode` and `--help` stay cheap; see their docstrings.
IMPORT_BY_NAME = {"fastdecode/__init__.py", "fastdecode/cli.py"}

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, ast.Import | ast.ImportFrom, bool]]:
    """(module, node, whether inside a function) of every import in the file."""
    tree = ast.parse(path.read_text())
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", node, id(node) in inner


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for module, _, inside_function in imports(path):
        first, *rest = module.split(".")
        if first not in ROOMS:
            continue
        assert not inside_function, f"{module} is imported inside a function"
        if first != room:
            assert first in ALLOWED[room], f"{room} must not import {first}"
            assert not rest, f"{module}: another room is entered through its door, `{first}`"
            if room == "cpu_attention":
                assert path.name in LOOKS_DOWN, f"{path.name} must not know the transport"


def test_storeys() -> None:
    storey = {name: number for number, names in enumerate(STOREYS) for name in names}
    for path in FILES:
        room, *rest = path.relative_to(ROOT).with_suffix("").parts
        if room != "fastdecode" or rest == ["__init__"]:
            continue
        assert rest[0] in storey, f"{rest[0]} is on no storey"
        for module, _, _ in imports(path):
            first, *names = module.split(".")
            if first == "fastdecode" and names and names[0] != rest[0]:
                assert storey[names[0]] < storey[rest[0]], f"{'/'.join(rest)} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_hidden_imports(path: Path) -> None:
    source = path.read_text()
    assert "TYPE_CHECKING" not in source
    if str(path.relative_to(ROOT)) not in IMPORT_BY_NAME:
        assert "import_module" not in source and "__import__" not in source


def test_no_import_cycles() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    graph: dict[str, set[str]] = {name: set() for name in names.values()}
    for path, name in names.items():
        for module, node, _ in imports(path):
            submodules = {f"{module}.{alias.name}" for alias in node.names} & graph.keys()  # from package import file
            graph[name] |= submodules or {module} & graph.keys()
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in finished:
            for target in graph[name]:
                visit(target, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms(name: str) -> None:
    for module, _, _ in imports(ROOT / "fastdecode" / name):
        assert module.split(".")[0] not in {
            "torch",
            "time",
            "socket",
            "zmq",
            "os",
            "transport",
            "gpu_sworker",
            "threading",
        }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path: Path) -> None:
    """No pickle, no torch.load, no remote code, by name; see also what gets imported, below."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"recv_pyobj", "send_pyobj", "eval_str"}, node.attr
            if isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("pickle", "loads")}
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec"}
    assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {m.split(".")[0] for m, _, _ in imports(path)}


@pytest.mark.parametrize(
    "module",
    [
        "transport",
        "cpu_attention",
        "fastdecode",
        "fastdecode.cli",
        "fastdecode.commands.rworker",
        "fastdecode.commands.generate",
        "fastdecode.commands.serve",
        "fastdecode.scheduling.scheduler",
    ],
)
def test_no_torch(module: str) -> None:
    """A CPU node, and a user who asks for help, need no torch."""
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"
