"""``OUT.manifest.json``: what an output was begun with, so that nothing else is ever mixed into it.

    format            of this file
    input...          which requests; with num_lines, nameless and num_contested, see Survey
    settings          what decides what is answered: weights, tokenizer, dtype, versions, ...
    changes           when somebody went on with other settings knowingly, or with an input that had grown; what was
                      and what is, and how many results had been written

Settings come in turns, as soon as each is known: those of the command line, then those of the model's files, and last
what only the loaded model tells.  Each turn is compared, so that most is refused before a model is loaded.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fastdecode.batch.replacing import replacing
from fastdecode.batch.survey import Survey, prefix_sha256
from fastdecode.errors import ConfigError

_FORMAT = 2
_MOST_TOLD = 12  # differences, in a message
_MOST_SHOWN = 200  # characters of a value


class Difference(NamedTuple):
    name: str
    was: Any
    is_now: Any


class Manifest:
    def __init__(self, output: Path, survey: Survey, *, num_bytes: int, is_forced: bool) -> None:
        """num_bytes: that the output has; without any, what was there before does not count.

        is_forced: go on although settings differ, and note it.  Raises ConfigError: it is another input's, or no
        manifest.
        """
        self.path = output.with_name(output.name + ".manifest.json")
        self._output, self._is_forced = output, is_forced
        self._is_begun = num_bytes > 0
        if self.path.exists() and survey.path.exists() and self.path.samefile(survey.path):
            raise ConfigError(
                f"the input is {self.path.name}, where the manifest of the output {output.name} belongs; give another "
                "path for the output"
            )
        held = self._read()
        if self._is_begun and held is None:
            raise ConfigError(f"{output} is no output of run-batch: {self.path.name} is not beside it")
        self._change: dict[str, Any] = {}  # of this run
        self._grown: dict[str, Any] = {}
        self._held: dict[str, Any] = (held or {}) if self._is_begun else {}
        self._settings: dict[str, Any] = self._held.get("settings", {})
        self._changes: list[dict[str, Any]] = self._held.get("changes", [])
        if self._is_begun:
            self._check_input(survey)
            if "settings" not in self._held and not is_forced:
                raise ConfigError(
                    f"{output} was begun by a version of FastDecode that did not record all that decides results; "
                    "give another output, or --resume-anyway"
                )
        self._input = {
            "input": survey.name, "input_sha256": survey.sha256, "input_bytes": survey.num_bytes,
            "num_lines": survey.num_lines, "nameless": survey.nameless, "num_contested": len(survey.contested),
        }  # fmt: skip

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the output was begun with; empty for a new one."""
        return self._settings

    def settle(self, settings: Mapping[str, Any], num_results: int) -> None:
        """One more turn of settings: recorded for a new output, compared for one that was begun.

        Values are JSON's; a mapping is compared entry by entry.  Raises ConfigError, OSError.
        """
        ours = json.loads(json.dumps(settings))
        if self._is_begun:
            found = [d for name, value in ours.items() for d in _differences(name, self._settings.get(name), value)]
            if found and not self._is_forced:
                raise ConfigError(
                    f"{self._output} was begun with other settings: {_told(found)}. Give those again, or another "
                    "output; --resume-anyway goes on with these, and notes it in the manifest"
                )
            self._note(self._grown | {d.name: {"was": d.was, "is": d.is_now} for d in found}, num_results)
        self._settings = {**self._settings, **ours}
        if not self._is_begun:
            self.write()

    def write(self) -> None:
        """Only what is new; that of an output that was begun is not touched before.  Raises OSError."""
        now = {"format": _FORMAT, **self._input, "settings": self._settings, "changes": self._changes}
        if now == self._held:
            return
        with replacing(self.path) as file:
            file.write((json.dumps(now, indent=1) + "\n").encode())
        self._held = json.loads(json.dumps(now))

    def _note(self, changed: dict[str, Any], num_results: int) -> None:
        if not changed:
            return
        if not self._change:
            self._change = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "num_results": num_results}
            self._change["changed"] = {}
            self._changes = [*self._changes, self._change]
        self._change["changed"].update(changed)

    def _read(self) -> dict[str, Any] | None:
        """None: there is none.  Raises ConfigError for what is none of ours."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise ConfigError(f"{self.path} is no regular file; move it away, or give another output")
            held = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.path} cannot be read: {error}; if it is yours, give another output, it is to be kept"
            ) from error
        is_ours = isinstance(held, dict) and isinstance(held.get("input_sha256"), str)
        if not is_ours or not isinstance(held.get("num_lines"), int):
            raise ConfigError(f"{self.path} is no manifest of run-batch; it is kept: give another output")
        if not isinstance(held.get("settings", {}), dict) or not isinstance(held.get("changes", []), list):
            raise ConfigError(f"{self.path} cannot be read: its settings or changes are damaged")
        return held

    def _check_input(self, survey: Survey) -> None:
        """The same, or one that has only grown since: then results that are there stay right."""
        theirs = self._held
        if theirs["input_sha256"] == survey.sha256:
            return
        num_bytes, num_lines = theirs.get("input_bytes"), theirs["num_lines"]
        # What lines without an id are called may change with the lines that come later.
        same_names = survey.nameless == theirs.get("nameless") and theirs.get("num_contested") == int(
            (survey.contested < num_lines).sum()
        )
        if not (
            isinstance(num_bytes, int)
            and 0 < num_bytes < survey.num_bytes
            and same_names
            and prefix_sha256(survey.path, num_bytes) == theirs["input_sha256"]
        ):
            raise ConfigError(
                f"the input is not the one that {self._output} was begun with ({theirs.get('input')}), nor one that "
                "begins with all its lines; give that one, or another output"
            )
        self._grown = {"num_lines": {"was": num_lines, "is": survey.num_lines}}


def _differences(name: str, was: Any, is_now: Any) -> Iterator[Difference]:
    if isinstance(is_now, dict):
        theirs = was if isinstance(was, dict) else {}
        for key in sorted({*theirs, *is_now}):
            yield from _differences(f"{name}[{key}]", theirs.get(key), is_now.get(key))
    elif was != is_now:
        yield Difference(name, was, is_now)


def _told(differences: list[Difference]) -> str:
    told = [f"{d.name} was {_shown(d.was)} and is {_shown(d.is_now)}" for d in differences[:_MOST_TOLD]]
    rest = len(differences) - len(told)
    return ", ".join(told) + (f", and {rest} more" if rest else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
