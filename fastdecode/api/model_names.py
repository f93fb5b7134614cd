"""What requests may call a model: the names it is served by, and, if its directory is one of them, any path of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def default_names(model: str) -> tuple[str, str]:
    """As it was given, and the last part of its path."""
    return model, Path(model).resolve().name


def is_called(name: str, names: Sequence[str], model: str) -> bool:
    """model: its directory.  Whether its path is relative, or ends in a slash, makes no other name of it."""
    if name in names:
        return True
    paths = {os.path.abspath(model), os.path.realpath(model)}
    return os.path.abspath(name) in paths and any(os.path.abspath(known) in paths for known in names)
