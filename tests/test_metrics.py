"""What is counted is what was done, by a parser that is not ours; and whatever a dashboard names is there."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from conftest import Case
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from fastdecode import LLM, SamplingParams
from fastdecode.api.outputs import CompletionOutput, RequestOutput
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.engine import Engine
from fastdecode.engine.opening import open_engine
from fastdecode.errors import RequestError
from fastdecode.observe.step_log import StepRecord
from fastdecode.observe.totals import PoolTotals, Standing
from fastdecode.server.activity import Activity
from fastdecode.server.counts import Histogram
from fastdecode.server.dashboard import dashboard_router
from fastdecode.server.history import History
from fastdecode.server.metrics import Metrics, metrics_router
from fastdecode.server.service import Health, Service
from fastdecode.server.stream import deltas_of
from transport import PeerLost

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=32)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
Samples = dict[tuple[str, str], float]  # (name, label beside the model's) -> value


async def scrape(client: httpx.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    samples: Samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert sample.labels.pop("model_name", None) == (None if sample.name.startswith("process_") else "tiny")
            samples[sample.name, ",".join(sample.labels.values())] = sample.value
    return samples


@asynccontextmanager
async def serving(
    model: Path, max_queue: int = 100, **options: Any
) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    metrics, app = Metrics("tiny"), FastAPI()
    app.include_router(metrics_router(metrics))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        assert await scrape(client) == {
            ("fastdecode:health", state): float(state == "loading")
            for state in ("loading", "ready", "degraded", "draining", "dead")
        }
        config = EngineConfig.from_options({"model": model, "num_r_workers": 2, "skip_tokenizer_init": True, **options})
        opened = open_engine(config, on_step=metrics.on_step)
        try:
            service = Service(opened, max_queue=max_queue, on_finished=metrics.on_finished)
            service.start()
            metrics.begin(service)
            yield service, client
            await service.drain(10)
        finally:
            opened.close()


def test_what_a_run_did(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory, max_num_seqs=4) as (service, client):
            before = await scrape(client)
            assert before["vllm:generation_tokens_total", ""] == 0 and before["fastdecode:health", "ready"] == 1
            streams = [await service.submit(prompt, GREEDY) for prompt in llama.prompts]
            tasks = [asyncio.create_task(stream.output()) for stream in streams]
            scrapes = [before]
            while not all(task.done() for task in tasks):
                scrapes.append(await scrape(client))
                await asyncio.sleep(0.01)
            outputs = [await task for task in tasks]
            after = await scrape(client)
            for one, next_one in zip(scrapes, [*scrapes[1:], after], strict=True):
                for key, value in one.items():
                    assert next_one[key] >= value or "_total" not in key[0], key
            assert any(one["vllm:num_requests_running", ""] == 4 for one in scrapes)
            assert any(one["vllm:num_requests_waiting", ""] > 0 for one in scrapes)
            assert any(0 < one["vllm:kv_cache_usage_perc", ""] < 1 for one in scrapes)
            assert any(
                one["fastdecode:kv_load_tokens", ""]
                == one["fastdecode:r_worker_kv_tokens", "0"] + one["fastdecode:r_worker_kv_tokens", "1"]
                > 0
                for one in scrapes
            )

            num_new = sum(len(output.outputs[0].token_ids) for output in outputs)
            prompts, num = sum(map(len, llama.prompts)), len(outputs)
            assert after["vllm:prompt_tokens_total", ""] == after["vllm:request_prompt_tokens_sum", ""] == prompts
            assert (
                after["vllm:generation_tokens_total", ""] == after["vllm:request_generation_tokens_sum", ""] == num_new
            )
            reasons = [output.outputs[0].finish_reason for output in outputs]
            for reason in ("stop", "length", "abort", "error"):
                assert after["vllm:request_success_total", reason] == reasons.count(reason)
            for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
                assert after[f"vllm:{name}_seconds_count", ""] == after[f"vllm:{name}_seconds_bucket", "+Inf"] == num
            assert all(output.metrics for output in outputs)
            for name, field in (("time_to_first_token", "first_token_s"), ("e2e_request_latency", "total_s")):
                expected = sum(getattr(output.metrics, field) for output in outputs)
                assert after[f"vllm:{name}_seconds_sum", ""] == pytest.approx(expected)
            assert after["vllm:inter_token_latency_seconds_count", ""] == num_new - num
            # All gaps of a sequence are what lies between its first token and its end.
            gaps = sum(output.metrics.total_s - output.metrics.first_token_s for output in outputs if output.metrics)
            assert after["vllm:inter_token_latency_seconds_sum", ""] == pytest.approx(gaps, rel=0.1, abs=0.01)
            assert after["vllm:iteration_tokens_total_sum", ""] == prompts + num_new - num
            assert after["vllm:iteration_tokens_total_count", ""] == after["fastdecode:steps_total", ""]
            assert after["vllm:num_requests_running", ""] == after["vllm:kv_cache_usage_perc", ""] == 0

            layers = service.opened.facts.layers
            of_layers = sum(4 * 2 * layer.num_kv_heads * layer.head_dim for layer in layers)  # k and v of a token, fp32
            queries = sum(4 * layer.num_q_heads * layer.head_dim for layer in layers)
            workers = [after["fastdecode:r_worker_bytes_sent_total", number] for number in "01"]
            assert (
                sum(workers) == (prompts + num_new - num) * of_layers + (num_new - num) * queries and min(workers) > 0
            )
            answers = [after["fastdecode:r_worker_bytes_received_total", number] for number in "01"]
            assert sum(answers) == (num_new - num) * queries
            seconds = after["fastdecode:step_seconds_total", ""]
            for number in "01":
                attention = after["fastdecode:r_worker_attention_seconds_total", number]
                idle = after["fastdecode:r_idle_seconds_total", number]
                assert 0 < attention < seconds and attention + idle == pytest.approx(seconds)
            assert 0 < after["fastdecode:s_idle_seconds_total", ""] < seconds

    asyncio.run(run())


def test_requests_that_fail_are_counted_by_code(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving(llama.directory) as (service, client):
            before = await scrape(client)
            assert before["fastdecode:request_failures_total", "invalid_logits"] == 0
            sworker = service._engine._sworker
            sample = sworker.sample
            monkeypatch.setattr(sworker, "sample", lambda logits, rows: sample(logits * torch.nan, rows))
            stream = await service.submit([5], SamplingParams(n=2))
            with pytest.raises(RequestError, match="NaN") as failed:
                await stream.output()
            assert failed.value.code == "invalid_logits"
            after = await scrape(client)
            assert after["fastdecode:request_failures_total", "invalid_logits"] == 1
            assert after["fastdecode:request_failures_total", "worker_lost"] == 0
            assert after["vllm:request_success_total", "error"] == 2

    asyncio.run(run())


def test_what_went_wrong(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue, a timeout, a client that leaves, a lost R-worker that comes back."""

    async def run() -> None:
        async with serving(llama.directory, 3, max_num_seqs=1, transport="shm") as (service, client):
            first = await service.submit([5], LONG, stream=True)
            async for _ in deltas_of([first]):
                break
            late = [await service.submit([6], GREEDY, timeout_s=0.01) for _ in range(3)]
            with pytest.raises(RequestError):
                await service.submit([7], GREEDY)
            for stream in late:
                with pytest.raises(RequestError):
                    await stream.output()
            first.abort()
            long = await service.submit([8], LONG)
            while not service.num_running:
                await asyncio.sleep(0.01)
            pool = service._engine._rpool

            def gone(*_: object, **__: object) -> None:
                raise PeerLost("pulled")

            (holder,) = [i for i, s in enumerate(service._engine._scheduler.kv_tokens) if s]
            monkeypatch.setattr(pool._workers[holder].channel, "send", gone)
            assert len((await long.output()).outputs[0].token_ids) == 400
            for _ in range(600):
                after = await scrape(client)
                if after["fastdecode:r_worker_rejoins_total", ""]:
                    break
                await asyncio.sleep(0.05)
            assert after["fastdecode:queue_rejections_total", ""] == 1
            assert after["vllm:request_success_total", "timeout"] == 3
            assert after["vllm:request_success_total", "abort"] == 1
            assert after["vllm:request_success_total", "length"] == 1
            for name in ("r_worker_losses", "recoveries", "r_worker_rejoins"):
                assert after[f"fastdecode:{name}_total", ""] == 1, name
            assert after["fastdecode:r_workers_lost", ""] == 0 and after["fastdecode:health", "ready"] == 1

    asyncio.run(run())


# What may be asked in any thread.
_ANYWHERE = {"check", "lost_workers", "num_places", "standing"}


class OfOneThread:
    """An engine that refuses other threads than its own, once it has one."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._refused = engine, list[str]()

    def __getattr__(self, name: str) -> Any:
        threads = {thread.name for thread in threading.enumerate()}
        if name not in _ANYWHERE and "engine" in threads and threading.current_thread().name != "engine":
            self._refused.append(name)
            raise RuntimeError(f"{name} is read while it may change")
        return getattr(self._engine, name)


def test_nobody_reads_what_the_engine_is_changing(llama: Case) -> None:
    """Metrics, dashboard, health and new requests go by what it has put down between two steps."""
    metrics, history, activity, app = Metrics("tiny"), History("tiny"), Activity(), FastAPI()
    app.include_router(metrics_router(metrics))
    app.include_router(dashboard_router(history))
    options = {"model": llama.directory, "num_r_workers": 2, "skip_tokenizer_init": True, "max_num_seqs": 2}
    opened = open_engine(EngineConfig.from_options(options), on_step=metrics.on_step)
    engine = OfOneThread(opened.engine)

    async def run() -> None:
        service = Service(dataclasses.replace(opened, engine=engine, cleanup=ExitStack()), max_queue=100)
        service.start()
        for each in (metrics, history, activity):
            each.begin(service)
        streams = [await service.submit(prompt, GREEDY) for prompt in llama.prompts]
        tasks = [asyncio.create_task(stream.output()) for stream in streams]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            while not all(task.done() for task in tasks):
                await scrape(client)
                assert (await client.get("/dashboard/data")).json()["capacity"] == opened.engine.kv_capacity_tokens
                assert service.health().state == "ready"
                await asyncio.sleep(0.01)
        assert [(await task).outputs[0].token_ids for task in tasks] == llama.reference
        await service.drain(10)

    try:
        asyncio.run(run())
    finally:
        opened.close()
    assert not engine._refused


def test_what_was_put_down_stays_as_it_was(llama: Case) -> None:
    with LLM(llama.directory, num_r_workers=2, skip_tokenizer_init=True) as llm:
        before = llm._engine.standing
        kept = dataclasses.asdict(before)
        llm.generate(llama.prompts, GREEDY, use_tqdm=False)
        after = llm._engine.standing
        assert dataclasses.asdict(before) == kept != dataclasses.asdict(after)
        assert after.totals.workers[0].bytes_sent > before.totals.workers[0].bytes_sent == 0


def test_all_r_workers_gone_at_once() -> None:
    """Between the loss of the last and the end of its sequences: numbers, and no division by what is not there."""
    metrics = Metrics("x")
    metrics.on_step(step(0, num_sampled=1, attention_s=(0.2, 0.2)))
    standing = Standing(1, 0, (0, 0), 0, 0, PoolTotals())
    service = SimpleNamespace(
        standing=standing, health=lambda: Health("degraded", ["a", "b"]), num_cut_short={}, num_refused=0
    )
    metrics.begin(service)  # type: ignore[arg-type]
    told = {sample.name: sample.value for family in metrics.families() for sample in family.samples}
    assert told["vllm:num_requests_running"] == 1 and told["fastdecode:r_workers_lost"] == 2


_PLAIN, _OPEN = "text/plain; version=0.0.4", "application/openmetrics-text; version="
_ACCEPTS = {  # what a scraper says -> the format that it gets
    "": _PLAIN,
    "*/*": _PLAIN,
    "text/html, application/xhtml+xml": _PLAIN,
    "application/openmetrics-text": _OPEN + "1.0.0",
    "application/openmetrics-text; version=1.0.0": _OPEN + "1.0.0",
    "application/openmetrics-text;version=0.0.1": _PLAIN,
    # Prometheus 2.x; 3.x; 3.x with metric_name_validation_scheme: legacy; and its other ways of escaping
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2": _OPEN + "1.0.0",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2": _OPEN
    + "1.0.0",
    "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.5,text/plain;version=0.0.4;q=0.2": _OPEN
    + "1.0.0",
    "application/openmetrics-text;version=1.0.0;escaping=dots": _PLAIN,
    "application/openmetrics-text;version=1.0.0;escaping=values": _PLAIN,
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5": "text/plain; version=1.0.0",
    "text/plain;version=1.0.0;escaping=underscores": "text/plain; version=1.0.0",
    "text/plain;version=1.0.0;escaping=values": _PLAIN,
}


def test_names_are_the_same_in_every_format(llama: Case) -> None:
    """Of families, too: a sample whose family has another name counts for nothing."""

    async def run() -> None:
        async with serving(llama.directory) as (service, client):
            await (await service.submit(llama.prompts[0], GREEDY)).output()
            expected = {name for name, _ in await scrape(client)}
            assert "vllm:num_requests_running" in expected
            for accept, content_type in _ACCEPTS.items():
                answer = await client.get("/metrics", headers={"accept": accept})
                assert answer.headers["content-type"].startswith(content_type), accept
                is_open = content_type.startswith(_OPEN)
                assert answer.text.endswith("# EOF\n") == is_open
                parse = openmetrics_families if is_open else text_string_to_metric_families
                families = list(parse(answer.text))
                assert all(family.type != "unknown" and family.documentation for family in families), accept
                assert {sample.name for family in families for sample in family.samples} == expected, accept

    asyncio.run(run())


def test_what_was_found_of_prompts(llama: Case) -> None:
    """In tokens; what it is computed again for is no question."""

    async def run() -> None:
        async with serving(llama.directory, num_r_workers=1) as (service, client):
            for _ in range(3):
                await (await service.submit(llama.prompts[-1], GREEDY)).output()
            after = await scrape(client)
            num = len(llama.prompts[-1])
            assert after["vllm:prefix_cache_queries_total", ""] == 3 * num
            assert after["vllm:prefix_cache_hits_total", ""] == 2 * (num - 1)
            assert after["vllm:prompt_tokens_total", ""] == num + 2

    asyncio.run(run())


# What the dashboards that come with vLLM ask for.
_OF_VLLM = """
    e2e_request_latency_seconds_bucket e2e_request_latency_seconds_count e2e_request_latency_seconds_sum
    generation_tokens_total inter_token_latency_seconds_bucket inter_token_latency_seconds_count
    inter_token_latency_seconds_sum kv_cache_usage_perc num_requests_running num_requests_waiting
    prefix_cache_hits_total prefix_cache_queries_total prompt_tokens_total
    request_decode_time_seconds_sum request_generation_tokens_bucket request_max_num_generation_tokens_sum
    request_prefill_time_seconds_sum request_prompt_tokens_bucket request_queue_time_seconds_sum
    request_success_total request_time_per_output_token_seconds_bucket request_time_per_output_token_seconds_count
    request_time_per_output_token_seconds_sum time_to_first_token_seconds_bucket time_to_first_token_seconds_count
    time_to_first_token_seconds_sum
"""


def test_what_vllms_dashboards_and_those_of_processes_ask_for(llama: Case) -> None:
    async def run() -> None:
        async with serving(llama.directory) as (service, client):
            params = SamplingParams(temperature=0, max_tokens=9, n=2, ignore_eos=True)
            one = await (await service.submit(llama.prompts[0], params)).output()
            after = await scrape(client)
            assert {f"vllm:{name}" for name in _OF_VLLM.split()} <= {name for name, _ in after}
            assert one.metrics and one.metrics.first_token_s is not None
            of_prompt, decode_s = (
                one.metrics.first_token_s - one.metrics.queue_s,
                one.metrics.total_s - one.metrics.first_token_s,
            )
            for name, value in (
                ("request_prefill_time_seconds", of_prompt),
                ("request_decode_time_seconds", decode_s),
                ("request_inference_time_seconds", of_prompt + decode_s),
                ("request_time_per_output_token_seconds", decode_s / 8),
                ("request_max_num_generation_tokens", 9),
            ):
                assert after[f"vllm:{name}_sum", ""] == pytest.approx(value), name
                assert after[f"vllm:{name}_count", ""] == 1, name
            if Path("/proc/self/stat").exists():
                assert after["process_resident_memory_bytes", ""] > 1 << 20
                assert 0 < after["process_open_fds", ""] < after["process_max_fds", ""]

    asyncio.run(run())


def test_histogram() -> None:
    histogram = Histogram((1.0, 2.5))
    for value, times in ((1.0, 2), (1.5, 3), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.buckets() == [("1.0", 2), ("2.5", 5), ("+Inf", 6)] and histogram.total == 15.5


def step(number: int, **fields: Any) -> StepRecord:
    usual = {"num_decodes": 1, "num_prompt_tokens": 0, "num_running": 1, "num_waiting": 0, "num_preempted": 0}
    return StepRecord(**{"number": number, "begin_s": number, "seconds": 0.5, "kv_tokens": (8, 0), **usual, **fields})


def test_steps_alone() -> None:
    """Gaps from end to end of steps; an R-worker that does not serve is not idle; a preemption counts."""
    metrics = Metrics("x")
    metrics.on_step(step(0, num_decodes=0, num_prompt_tokens=4, num_sampled=2, attention_s=(0.2, None)))
    metrics.on_step(step(1, num_decodes=2, num_preempted=1, num_sampled=2, wait_s=0.1, attention_s=(0.2, 0.4)))
    metrics.on_step(step(2, num_decodes=1, num_sampled=1, wait_s=0.1, attention_s=(0.7, 0.1)))
    assert metrics._next_token.total == 3.0 and sum(metrics._next_token.counts) == 3
    assert metrics._idle_s == pytest.approx([0.6, 0.5]) and metrics._wait_s == pytest.approx(0.2)
    assert (metrics._num_preemptions, metrics._prompt_tokens, metrics._new_tokens) == (1, 4, 5)
    lost = [CompletionOutput(index, "", [], None, None, "error") for index in range(2)]
    metrics.on_finished(RequestOutput("0", None, [1], lost))
    assert metrics._finished["error"] == 2 and sum(metrics._whole.counts) == 0


def test_the_grafana_dashboard_asks_for_what_is_there(llama: Case) -> None:
    board = json.loads((ROOT / "scripts" / "grafana_dashboard.json").read_text())
    asked: set[str] = set()
    for panel in board["panels"]:
        assert panel["type"] == "timeseries" and panel["targets"] and panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")") and "$model_name" in expression
            asked |= set(re.findall(r"(?:vllm|fastdecode):\w+", expression))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "model_name"}

    async def run() -> set[str]:
        async with serving(llama.directory) as (_, client):
            return {name for name, _ in await scrape(client)}

    exported = asyncio.run(run())
    assert len(asked) > 20 and asked <= exported, asked - exported
