"""guidellm: whole sweeps, from one request at a time through the most that is served to the rates between, streamed."""

from __future__ import annotations

import json
import statistics

from checks import NAME, Given, command, main, shell

_STRATEGIES, _REQUESTS = 4, 8


def sweep(given: Given, route: str, *, is_streamed: bool = True) -> object:
    out = given.scratch / f"sweep-{len(list(given.scratch.iterdir()))}.json"
    said = shell([
        command("guidellm"), "run",
        "--backend", f"kind=openai_http,target={given.url},model={NAME},request_format={route},stream={is_streamed}",
        "--profile", f"kind=sweep,sweep_size={_STRATEGIES}", "--constraint", f"kind=max_requests,count={_REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={given.model}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8,prompt_tokens_stdev=4",
        "--output", f"kind=json,path={out}", "--disable-progress",
    ])  # fmt: skip
    benchmarks = json.loads(out.read_text())["benchmarks"]
    told = [_told(benchmark) for benchmark in benchmarks]
    if len(told) != _STRATEGIES or any(one["errored"] or not one["successful"] for one in told):
        raise RuntimeError(f"{told} {said[-400:]}")
    return told


def _told(benchmark: dict) -> dict:
    requests = benchmark["requests"]
    numbers = {kind: len(requests[kind] or []) for kind in ("successful", "errored", "incomplete")}
    tokens = [one["output_metrics"]["text_tokens"] for one in requests["successful"]]
    return {**numbers, "output tokens of each": statistics.mean(tokens) if tokens else None}


def completions_streamed(given: Given) -> object:
    return sweep(given, "/v1/completions")


def chats_streamed(given: Given) -> object:
    return sweep(given, "/v1/chat/completions")


def completions_answered_whole(given: Given) -> object:
    return sweep(given, "/v1/completions", is_streamed=False)


if __name__ == "__main__":
    main(completions_streamed, chats_streamed, completions_answered_whole)
