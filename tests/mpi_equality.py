"""Run under ``mpirun -n 4``: rank 0 generates with 1 to 3 of the other ranks and compares with the references."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastdecode import LLM, SamplingParams, mpi_main


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    params = SamplingParams(temperature=0, max_tokens=job["new_tokens"])
    for case in job["cases"]:
        for workers, micro_batches in job["splits"]:
            ranks = [f"mpi://{rank}" for rank in range(1, workers + 1)]
            with LLM(
                case["directory"], r_worker_addresses=ranks, micro_batches=micro_batches, skip_tokenizer_init=True
            ) as llm:
                outputs = llm.generate(case["prompts"], params, use_tqdm=False)
            tokens = [output.outputs[0].token_ids for output in outputs]
            print(
                case["family"],
                workers,
                micro_batches,
                "equal" if tokens == case["reference"] else "DIFFERENT",
                flush=True,
            )
    return 0


sys.exit(mpi_main(main, kv_cache_bytes=256 << 20, num_threads=1))
