"""Token for token what ``transformers.generate`` gives: every family, split and transport."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from conftest import NEW_TOKENS, Case

from cpu_attention import LISTENING
from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import read_step_log
from gpu_sworker import SWorker, Transfer
from models import FAMILIES

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
SPLITS = [(workers, micro_batches) for workers in (1, 2, 3) for micro_batches in (1, 2)]
# With the kernel, so that each meets every number of micro-batches.
IN_THREADS = list(zip([*SPLITS, (2, 3), (1, 3), (3, 3)], cycle(("onednn", "onednn", "plain")), strict=False))


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Three R-worker processes per scheme, started by hand as a user would; sessions come and go."""
    directory = tmp_path_factory.mktemp("sockets")
    processes = []
    files = [f"{scheme}://{directory}/{scheme}{i}" for scheme in ("shm", "ipc") for i in range(3)]
    for bind in [*files, *["tcp://127.0.0.1:0"] * 3]:
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cpu_attention",
                    "--bind",
                    bind,
                    "--kv-cache-memory",
                    "256MiB",
                    "--threads",
                    "1",
                    "--log-level",
                    "warning",
                    "--exit-with-parent",
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    found = [process.stdout.readline().strip().removeprefix(LISTENING) for process in processes]  # type: ignore[union-attr]
    yield {"shm": found[:3], "ipc": found[3:6], "tcp": found[6:]}
    for process in processes:
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(10) == 0


def tokens(llm: LLM, case: Case) -> list[list[int]]:
    outputs = llm.generate(case.prompts, GREEDY, use_tqdm=False)
    assert not any(output.error for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads(family: str, is_whole: bool, case: Callable[[str], Case]) -> None:
    """In every split, or in three of them, others for each family; the plain kernel in one."""
    made, first = case(family), [*FAMILIES].index(family)
    assert len({token for line in made.reference for token in line}) > 8, "a model that says one thing proves nothing"
    chosen = IN_THREADS if is_whole else [IN_THREADS[(first + 4 * step) % len(IN_THREADS)] for step in range(3)]
    for (workers, micro_batches), linear_kernel in chosen:
        with LLM(
            made.directory,
            num_r_workers=workers,
            micro_batches=micro_batches,
            linear_kernel=linear_kernel,
            skip_tokenizer_init=True,
        ) as llm:
            assert tokens(llm, made) == made.reference, (workers, micro_batches, linear_kernel)


class Late:
    """A transfer that is done after some looks at it, as that of a device that works by itself."""

    block_ns = None

    def __init__(self, transfer: Transfer, looks: int) -> None:
        self._transfer, self._looks = transfer, looks

    def is_done(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def wait(self) -> list[np.ndarray]:
        self._looks = 0
        return self._transfer.wait()


@pytest.mark.parametrize("workers, micro_batches", [(1, 1), (1, 2), (2, 3)])
def test_a_device_that_works_by_itself(
    workers: int, micro_batches: int, case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks launched ahead, answers before and after what is computed beside them: the tokens are the same."""
    stage, looks = SWorker.stage, np.random.default_rng(workers + micro_batches)
    monkeypatch.setattr(SWorker, "stage", lambda *args: Late(stage(*args), int(looks.choice([0, 1, 3, 300]))))
    made = case("llama")
    with LLM(
        made.directory, num_r_workers=workers, micro_batches=micro_batches, max_num_batched_tokens=64,
        skip_tokenizer_init=True,
    ) as llm:  # fmt: skip
        assert tokens(llm, made) == made.reference


@pytest.mark.parametrize("family", [*FAMILIES][::3])
def test_prompts_without_room_on_the_s_worker(family: str, case: Callable[[str], Case]) -> None:
    """They attend on their R-workers, chunk by chunk."""
    made = case(family)
    for workers, micro_batches in ((1, 1), (2, 2)):
        with LLM(
            made.directory, num_r_workers=workers, micro_batches=micro_batches, max_num_batched_tokens=24,
            prompt_kv_memory=0, skip_tokenizer_init=True,
        ) as llm:  # fmt: skip
            assert tokens(llm, made) == made.reference, (workers, micro_batches)


SCHEMES = ("shm", "ipc", "tcp")


@pytest.mark.parametrize(
    "family, scheme",
    [
        pytest.param(family, scheme, marks=[] if (i - j) % len(SCHEMES) == 0 else pytest.mark.slow)
        for i, family in enumerate(FAMILIES)
        for j, scheme in enumerate(SCHEMES)
    ],
)
def test_processes(family: str, scheme: str, addresses: dict[str, list[str]], case: Callable[[str], Case]) -> None:
    made = case(family)
    for workers, micro_batches in SPLITS:
        with LLM(
            made.directory,
            r_worker_addresses=addresses[scheme][:workers],
            micro_batches=micro_batches,
            skip_tokenizer_init=True,
        ) as llm:
            assert tokens(llm, made) == made.reference, (workers, micro_batches)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "families, splits",
    [([*FAMILIES][::4], SPLITS[2::3]), pytest.param([*FAMILIES], SPLITS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_mpi(
    families: list[str], splits: list[tuple[int, int]], mpirun: list[str], case: Callable[[str], Case], tmp_path: Path
) -> None:
    """Families and splits in one job of four ranks."""
    job = [
        {
            "family": family,
            "directory": str(case(family).directory),
            "prompts": case(family).prompts,
            "reference": case(family).reference,
        }
        for family in families
    ]
    (tmp_path / "job.json").write_text(json.dumps({"cases": job, "splits": splits, "new_tokens": NEW_TOKENS}))
    out = subprocess.run(
        [*mpirun, "-n", "4", sys.executable, ROOT / "tests" / "mpi_equality.py", tmp_path / "job.json"],
        capture_output=True,
        text=True,
        timeout=880,  # waiting ranks poll, so on a busy machine all of it takes some hundred seconds
    )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    assert out.stdout.count("equal") == len(families) * len(splits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 37, "num_r_workers": 2, "micro_batches": 2},
        {"start_policy": "at-once", "max_num_seqs": 3},
        {"max_kv_load": 300, "start_interval": 4},
        {"order": "ljf", "order_window": 4, "max_num_seqs": 2, "max_num_waiting": 2},
        {"micro_batches": 5, "num_r_workers": 3},
        {"block_tokens": 16},
        {"block_tokens": 256},
        {"r_worker_threads": 3},
        {"kv_cache_memory": "400KB", "num_r_workers": 2, "max_model_len": 240},
    ],
)
def test_no_option_changes_tokens(family: str, options: dict[str, object], case: Callable[[str], Case]) -> None:
    made = case(family)
    with LLM(made.directory, skip_tokenizer_init=True, **options) as llm:
        assert tokens(llm, made) == made.reference


@pytest.mark.parametrize("family, token_bytes", [("llama", 768), ("gemma2", 1536), ("gpt-oss", 768)])
def test_preemption_does_not_change_tokens(
    family: str, token_bytes: int, case: Callable[[str], Case], tmp_path: Path
) -> None:
    """Greedy, with KV for a third of what the sequences become: those thrown out are computed again."""
    made, log = case(family), tmp_path / "steps.jsonl"
    with LLM(
        made.directory,
        skip_tokenizer_init=True,
        kv_cache_memory=token_bytes * 240,
        block_tokens=16,
        kv_policy="greedy",
        start_policy="eager",
        max_num_batched_tokens=64,
        step_log=log,
    ) as llm:
        assert tokens(llm, made) == made.reference
    assert sum(record.num_preempted for record in read_step_log(log)) >= 3


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_half_precision_kv_stays_close(kv_dtype: str, llama: Case) -> None:
    """Rounded K and V may turn a close call; on these prompts at least the beginnings agree."""
    with LLM(llama.directory, kv_cache_dtype=kv_dtype, skip_tokenizer_init=True) as llm:
        result = tokens(llm, llama)
    agreed = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(result, llama.reference, strict=True)
    ]
    assert sum(agreed) / sum(map(len, llama.reference)) > (0.9 if kv_dtype == "float16" else 0.3), agreed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_run(dtype: str, llama: Case) -> None:
    """The S-Part, the wire and the KV in half precision; first tokens follow the same model's fp32 ones mostly."""
    with LLM(llama.directory, dtype=dtype, num_r_workers=2, skip_tokenizer_init=True) as llm:
        result = tokens(llm, llama)
        assert llm.facts.dtype == dtype
    assert sum(x[0] == y[0] for x, y in zip(result, llama.reference, strict=True)) >= len(result) - 2
