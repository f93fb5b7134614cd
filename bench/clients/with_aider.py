"""aider: one edit of a file in a git repository of its own.  So small a model may not write an edit that applies."""

from __future__ import annotations

import json
import os
from pathlib import Path

from checks import NAME, Given, command, main, shell

_FLAGS = (
    "--yes-always", "--no-check-update", "--no-show-model-warnings", "--analytics-disable", "--no-show-release-notes",
    "--no-gitignore", "--no-detect-urls", "--map-tokens", "0", "--no-pretty", "--no-suggest-shell-commands",
)  # fmt: skip
_BEFORE = 'def greet():\n    print("hello")\n'
# Words to repeat, since the model is small.
_WANTED = """Now the greeting is to say goodbye. Output the whole file greet.py:

greet.py
```
def greet():
    print("goodbye")
```"""


def repository(folder: Path) -> Path:
    folder.mkdir()
    (folder / "greet.py").write_text(_BEFORE)
    for words in (("init", "-q"), ("add", "greet.py"), ("commit", "-qm", "A greeting")):
        shell(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], folder=folder)
    for name, value in (("user.name", "a"), ("user.email", "a@b.c")):
        shell(["git", "config", name, value], folder=folder)
    return folder


def edit(given: Given, name: str, *flags: str) -> object:
    os.environ |= {"OPENAI_API_BASE": given.api, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    prices = (
        Path.home() / ".aider" / "caches" / "model_prices_and_context_window.json"
    )  # or it looks for them on the net
    prices.parent.mkdir(parents=True, exist_ok=True)
    prices.write_text(json.dumps({f"openai/{NAME}": {"max_input_tokens": 8192, "litellm_provider": "openai"}}))
    folder = repository(given.scratch / name)
    settings = given.scratch / "settings.yaml"
    settings.write_text(f"- name: openai/{NAME}\n  reminder: none\n  extra_params:\n    max_tokens: 200\n")
    said = shell(
        [
            command("aider"), "--model", f"openai/{NAME}", "--model-settings-file", str(settings), *_FLAGS, *flags,
            "--message", _WANTED, "greet.py",
        ],
        folder=folder,
    )  # fmt: skip
    if "litellm." in said and "Error" in said:  # it ends with 0 all the same
        raise RuntimeError(said.strip()[-600:])
    after = (folder / "greet.py").read_text()
    commits = shell(["git", "log", "--oneline"], folder=folder).strip().splitlines()
    tokens = [line for line in said.splitlines() if line.startswith("Tokens:")]
    return {"tokens": tokens, "commits": commits, "the file is another": after != _BEFORE, "the file": after[:400]}


def one_edit_streamed(given: Given) -> object:
    return edit(given, "streamed", "--edit-format", "whole")


def one_edit_answered_whole(given: Given) -> object:
    return edit(given, "whole", "--edit-format", "whole", "--no-stream")


def one_edit_as_a_diff(given: Given) -> object:
    return edit(given, "diff", "--edit-format", "diff")


if __name__ == "__main__":
    main(one_edit_streamed, one_edit_answered_whole, one_edit_as_a_diff)
