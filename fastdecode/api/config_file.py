"""``--config FILE.yaml``: flags from a file.  The command line goes before the file, the file before defaults.

    kv-cache-memory: 8GiB                           # long flag names, without the dashes in front
    r-worker-address: [shm:///tmp/w0, shm:///tmp/w1]
    ignore-eos: true                                # a flag without a value
    enable-prefix-caching: false                    # one that can be said both ways: the other one

What the command line does not give is put before it in the flags' own words, so that there is one parser, one set of
checks, one help.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastdecode.errors import ConfigError

_OWN = ("help", "config", "print-config")
_SECRET = ("api-key",)  # not to be found in the log of a job that prints its configuration


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """For `parse_arguments`; last, so that they come last in the help."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="flags from a file, by their long names; those given here go before it"
    )
    group.add_argument("--print-config", action="store_true", help="print what all of that comes to, as YAML, and end")


def parse_arguments(
    make_parser: Callable[[type[argparse.ArgumentParser]], argparse.ArgumentParser], words: Sequence[str]
) -> argparse.Namespace:
    """Like ``parse_args``, with what the file says.  make_parser: of that class, anew for each call.

    Raises ConfigError; ends by itself like argparse, and after --print-config.
    """
    parser = make_parser(argparse.ArgumentParser)
    if "--config" not in parser._option_string_actions or not {"-h", "--help"}.isdisjoint(words):
        return parser.parse_args(words)
    given = vars(_bare(make_parser(argparse.ArgumentParser)).parse_args(words))
    if given.get("config"):
        path = given["config"]
        said = _read(path, _keys(parser))
        only_file = _bare(make_parser(_Complaining), path)
        only_file.parse_args(_words(said, only_file, {}))  # its own mistakes, told as such
        words = [*_words(said, parser, given), *words]
    args = parser.parse_args(words)
    if args.print_config:
        print(_effective(parser, args), end="")
        sys.exit(0)
    return args


class _Complaining(argparse.ArgumentParser):
    path = ""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {message}")


def _bare(parser: argparse.ArgumentParser, path: str = "") -> Any:
    """The same one, that knows no defaults and requires nothing: it shows what was given."""
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
        if not action.option_strings:
            action.nargs = "?"
    for group in parser._mutually_exclusive_groups:
        group.required = False
    parser._defaults.clear()
    if isinstance(parser, _Complaining):
        parser.path = path
    return parser


def _keys(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a file may say: long flag names, and the names of what has no flag."""
    keys = {action.dest: action for action in parser._actions if not action.option_strings}
    for action in parser._actions:
        options = action.option_strings[:1] if _says_no_too(action) else action.option_strings
        keys |= {option[2:]: action for option in options if option.startswith("--")}
    return {key: action for key, action in keys.items() if key not in _OWN}


def _read(path: str, keys: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        content = _from_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is lines of `flag: value`")
    for key, value in content.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key).replace("_", "-"), keys, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{path}: there is no flag {key!r}; {hint}Known: {', '.join(sorted(keys))}")
        if value is not None and not _is_of_kind(value, keys[key]):
            raise ConfigError(f"{path}: {key} takes {_kind(keys[key])}, not {value!r}")
    return content


def _words(said: Mapping[str, Any], parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> list[str]:
    """As one would type them; without what is given already, or rules out what is."""
    keys = _keys(parser)
    ruled_out = {
        action.dest
        for group in parser._mutually_exclusive_groups
        if any(action.dest in given for action in group._group_actions)
        for action in group._group_actions
    }
    first, rest = [], []
    for key, value in said.items():
        action = keys[key]
        if value is None or action.dest in given or action.dest in ruled_out:
            continue
        if value is False:
            rest += [f"--no-{key}"] if _says_no_too(action) else []
            continue
        values = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if not action.option_strings:
            first += values
        elif action.nargs == 0:
            rest.append(f"--{key}")
        elif action.nargs is None:
            rest += [f"--{key}={one}" for one in values]  # also for what begins with a dash
        elif values:
            rest += [f"--{key}", *values]
    return [*first, *rest]


def _is_of_kind(value: Any, action: argparse.Action) -> bool:
    if action.nargs == 0:
        return isinstance(value, bool)
    values = value if isinstance(value, list) and _takes_many(action) else [value]
    return not any(one is None or isinstance(one, bool | list | dict) for one in values)


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true or false"
    return "a value or a list of them" if _takes_many(action) else "one value (in quotes, if YAML takes it for another)"


def _says_no_too(action: argparse.Action) -> bool:
    """The second one of its flags is the first one's opposite."""
    return isinstance(action, argparse.BooleanOptionalAction)


def _takes_many(action: argparse.Action) -> bool:
    return action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)


def _effective(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What can be given as a file again, to the same effect."""
    values = {}
    for key, action in _keys(parser).items():
        value = getattr(args, action.dest)
        if key in _SECRET and value:
            continue
        values[key] = list(value) if isinstance(value, tuple) else value
    hidden = [f"# {key} is set, and not shown" for key in _SECRET if getattr(args, _dest(parser, key), None)]
    return "\n".join([*hidden, _to_yaml(values)])


def _dest(parser: argparse.ArgumentParser, key: str) -> str:
    action = _keys(parser).get(key)
    return action.dest if action else key


def _from_yaml(text: str) -> Any:
    """Raises ValueError.  Read here, because who asks for help need not wait for it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _to_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
