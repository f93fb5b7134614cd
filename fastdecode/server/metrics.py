"""``GET /metrics``: what is counted of a server, under the names that dashboards for vLLM know and some of our own.

    engine's thread     on_step, on_finished: additions to plain numbers, once a step and once a request
    whoever scrapes     those numbers, and how the service says that things stand

Times are taken in the S-worker's process, both ends of them.  A request counts when it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector, openmetrics
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.registry import Collector

from fastdecode.api.outputs import RequestMetrics, RequestOutput
from fastdecode.observe.step_log import StepRecord
from fastdecode.observe.totals import PoolTotals, Standing
from fastdecode.server.counts import Families, Histogram
from fastdecode.server.service import Service

# vLLM's buckets, so that quantiles of both can be compared.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_NEXT_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_REQUEST_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_STEP_TOKENS = tuple(float(1 << power) for power in (0, *range(3, 15)))

_REASONS = ("stop", "length", "abort", "error")  # of an end; vLLM's words
# Codes of what fails in the middle
_FAILURES = ("invalid_logits", "tokenizer_failed", "worker_lost", "out_of_memory", "invalid_request")
_STATES = ("loading", "ready", "degraded", "draining", "dead")


class Metrics:
    """Pass `on_step` to `open_engine` and `on_finished` to `Service`, then `begin`; scraped before, it is loading."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self._service: Service | None = None
        self._lock = threading.Lock()  # once a step; so that what is scraped is of whole steps
        self._num_steps = self._num_preemptions = self._prompt_tokens = self._new_tokens = 0
        self._step_s = self._wait_s = 0.0
        self._kv_tokens: tuple[int, ...] = ()
        self._device_kv_tokens = 0
        self._idle_s: list[float] = []  # [num_r_workers]
        self._last_end_s: dict[int, float] = {}  # of the last step, by lane
        self._finished = dict.fromkeys(_REASONS, 0)
        self._failed = dict.fromkeys(_FAILURES, 0)
        self._first_token, self._queue = Histogram(_FIRST_TOKEN_S), Histogram(_REQUEST_S)
        self._next_token, self._whole = Histogram(_NEXT_TOKEN_S), Histogram(_REQUEST_S)
        self._request_prompt, self._request_new = Histogram(_REQUEST_TOKENS), Histogram(_REQUEST_TOKENS)
        self._step_tokens = Histogram(_STEP_TOKENS)
        self._prefill, self._decode, self._inference = (Histogram(_REQUEST_S) for _ in range(3))
        self._per_token, self._longest = Histogram(_NEXT_TOKEN_S), Histogram(_REQUEST_TOKENS)

    @property
    def has_begun(self) -> bool:
        return self._service is not None

    def begin(self, service: Service) -> None:
        self._service = service

    def on_step(self, record: StepRecord) -> None:
        """In the engine's thread."""
        with self._lock:
            self._num_steps += 1
            self._num_preemptions += record.num_preempted
            self._prompt_tokens += record.num_prompt_tokens
            self._new_tokens += record.num_sampled
            self._step_s += record.busy_s
            self._wait_s += record.wait_s
            self._kv_tokens, self._device_kv_tokens = record.kv_tokens, record.device_kv_tokens
            self._step_tokens.observe(record.num_decodes + record.num_prompt_tokens)
            # Whoever decodes has its last token of the step before, be it by its prompt.  What a sequence waits when
            # it has to be computed again is no gap here: then it comes as a prompt.
            end_s = record.begin_s + record.seconds
            if record.num_decodes:
                self._next_token.observe(end_s - self._last_end_s.get(record.lane, 0.0), record.num_decodes)
            self._last_end_s[record.lane] = end_s
            self._idle_s += [0.0] * (len(record.attention_s) - len(self._idle_s))
            for worker, attention_s in enumerate(record.attention_s):
                if attention_s is not None:  # that of a step broken off counts in the next one, and may exceed it
                    self._idle_s[worker] += max(0.0, record.busy_s - attention_s)

    def on_finished(self, output: RequestOutput) -> None:
        """In the engine's thread.  What was cut short is not told; see `Service.num_cut_short`."""
        with self._lock:
            for completion in output.outputs:
                reason = completion.finish_reason
                self._finished[reason] = self._finished.get(reason, 0) + 1
            if output.error:
                self._failed[output.error.code] = self._failed.get(output.error.code, 0) + 1
            if output.metrics is None:
                return
            lengths = [len(completion.token_ids) for completion in output.outputs]
            self._observe_parts(output.metrics, max(lengths, default=0))
            self._queue.observe(output.metrics.queue_s)
            self._whole.observe(output.metrics.total_s)
            self._request_prompt.observe(len(output.prompt_token_ids))
            for length in lengths:
                self._request_new.observe(length)

    def _observe_parts(self, times: RequestMetrics, num_longest: int) -> None:
        """Of a request's time; num_longest: new tokens of its longest sample."""
        self._longest.observe(num_longest)
        self._inference.observe(times.total_s - times.queue_s)
        if times.first_token_s is None:
            return
        decode_s = times.total_s - times.first_token_s
        self._first_token.observe(times.first_token_s)
        self._prefill.observe(times.first_token_s - times.queue_s)
        self._decode.observe(decode_s)
        self._per_token.observe(decode_s / (num_longest - 1) if num_longest > 1 else 0.0)  # 0: as vLLM counts it

    def families(self) -> Families:
        families, service = Families("model_name", self.model_name), self._service
        state = service.health().state if service else "loading"
        states = [(name, float(name == state)) for name in _STATES]
        families.gauges("fastdecode:health", "1: the state it is in.", "state", states)
        if service:
            standing = service.standing  # one for all of it
            with self._lock:
                self._tell_requests(families, service, standing)
                self._tell_steps(families, standing)
            self._tell_r_workers(families, standing.totals, len(service.health().lost))
        return families

    def _tell_requests(self, families: Families, service: Service, standing: Standing) -> None:
        ends = self._finished | service.num_cut_short
        families.gauge("vllm:num_requests_running", "Sequences with KV on an R-worker.", standing.num_running)
        families.gauge("vllm:num_requests_waiting", "Sequences in the queue.", standing.num_waiting)
        families.counters(
            "vllm:request_success", "Samples that have ended, by reason.", "finished_reason", list(ends.items())
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self._first_token),
            ("inter_token_latency_seconds", "From a token to the next one of its sequence.", self._next_token),
            ("e2e_request_latency_seconds", "From arrival to the last token.", self._whole),
            ("request_queue_time_seconds", "From arrival to the first step with its prompt.", self._queue),
            ("request_prefill_time_seconds", "From the first step with its prompt to the first token.", self._prefill),
            ("request_decode_time_seconds", "From the first token to the last one.", self._decode),
            ("request_inference_time_seconds", "From the first step with its prompt to the end.", self._inference),
            ("request_time_per_output_token_seconds", "A request's mean, after its first token.", self._per_token),
            ("request_prompt_tokens", "Prompt tokens of a request.", self._request_prompt),
            ("request_generation_tokens", "New tokens of a sample.", self._request_new),
            ("request_max_num_generation_tokens", "New tokens of a request's longest sample.", self._longest),
            ("iteration_tokens_total", "Tokens in a step.", self._step_tokens),
        ):
            families.histogram(f"vllm:{name}", text, histogram)
        failures = [(code, float(count)) for code, count in self._failed.items()]
        families.counters("fastdecode:request_failures", "Requests ended by an error, by its code.", "code", failures)
        families.counter(
            "fastdecode:queue_rejections", "Requests refused because the queue was full (429).", service.num_refused
        )

    def _tell_steps(self, families: Families, standing: Standing) -> None:
        families.counter("vllm:num_preemptions", "Sequences thrown out to be computed again.", self._num_preemptions)
        families.counter("vllm:prompt_tokens", "Prompt tokens computed, again included.", self._prompt_tokens)
        families.counter("vllm:generation_tokens", "New tokens.", self._new_tokens)
        for name, text, value in (
            ("queries", "Prompt tokens of sequences that have started.", standing.num_prefix_queried),
            ("hits", "Of them those whose KV was found.", standing.num_prefix_found),
        ):
            families.counter(f"vllm:prefix_cache_{name}", text, value)
        families.counter("fastdecode:steps", "Steps.", self._num_steps)
        families.counter("fastdecode:step_seconds", "Time of steps.", self._step_s)
        families.counter("fastdecode:s_idle_seconds", "In steps, waiting for R-workers alone.", self._wait_s)
        capacity = standing.kv_capacity_tokens
        kv_tokens = _padded(self._kv_tokens if standing.num_running else (), len(capacity))
        on_device = self._device_kv_tokens if standing.num_running else 0
        held, serving = sum(kv_tokens), [kv for kv, room in zip(kv_tokens, capacity, strict=True) if room]
        on_device_at_most = standing.device_kv_capacity_tokens
        share = (held + on_device) / max(1, sum(capacity) + on_device_at_most)
        families.gauge("vllm:kv_cache_usage_perc", "Share of the KV in use, 0 to 1.", share)
        families.gauge("fastdecode:device_kv_tokens", "KV on the S-worker's device.", on_device)
        families.gauge("fastdecode:device_kv_capacity_tokens", "KV it has room for there.", on_device_at_most)
        families.gauge("fastdecode:kv_load_tokens", "W: KV tokens that a step reads.", held)
        families.gauge("fastdecode:kv_load_limit_tokens", "W_lim: how many it may read.", standing.kv_load_limit)
        imbalance = max(serving, default=0.0) * len(serving) / held if held else 1.0
        families.gauge("fastdecode:r_worker_imbalance", "KV tokens of the fullest R-worker over the mean.", imbalance)
        for name, text, values in (
            ("kv_tokens", "KV it holds.", kv_tokens),
            ("kv_capacity_tokens", "KV it has room for; 0: it is lost.", capacity),
        ):
            families.gauges(f"fastdecode:r_worker_{name}", text, "r_worker", _numbered(values))
        idle_s = _numbered(_padded(self._idle_s, len(capacity)))
        families.counters("fastdecode:r_idle_seconds", "In steps, without attention to do.", "r_worker", idle_s)

    def _tell_r_workers(self, families: Families, totals: PoolTotals, num_lost: int) -> None:
        workers = [(str(number), worker) for number, worker in sorted(totals.workers.items())]
        for name, text, values in (
            ("attention_seconds", "In attention.", [(number, w.attention_ns / 1e9) for number, w in workers]),
            ("bytes_sent", "Of q, k and v to it.", [(number, float(w.bytes_sent)) for number, w in workers]),
            ("bytes_received", "Of o from it.", [(number, float(w.bytes_received)) for number, w in workers]),
        ):
            families.counters(f"fastdecode:r_worker_{name}", text, "r_worker", values)
        families.gauge("fastdecode:r_workers_lost", "R-workers that do not serve now.", num_lost)
        families.counter("fastdecode:r_worker_losses", "R-workers that were lost.", totals.num_lost)
        families.counter("fastdecode:recoveries", "Losses after which all went on.", totals.num_recoveries)
        families.counter("fastdecode:r_worker_rejoins", "R-workers that came back, or new.", totals.num_joined)


class _Collector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._process = metrics, ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.families()
        if self._metrics.has_begun:
            yield from self._process.collect()


def metrics_router(metrics: Metrics) -> APIRouter:
    """GET /metrics, in the text format that the scraper asks for."""
    registry, router = CollectorRegistry(auto_describe=False), APIRouter()
    registry.register(_Collector(metrics))

    @router.get("/metrics", include_in_schema=False)
    def scrape(request: Request) -> Response:
        encode, content_type = _encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return router


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """(encode, content type).  Names are the same in all of them, whatever way of escaping is asked for.

    They need none, but `prometheus_client` puts `_` for `:` in OpenMetrics' samples all the same, not in their TYPE
    lines (its issue 1177), unless all of UTF-8 is allowed.
    """
    _, content_type = choose_encoder(accept)
    told, _, escaping = content_type.partition("; escaping=")
    if escaping not in ("", openmetrics.exposition.UNDERSCORES, openmetrics.exposition.ALLOWUTF8):
        return generate_latest, CONTENT_TYPE_PLAIN_0_0_4  # the other ways change names that need no change
    if told.startswith("application/openmetrics-text"):
        return partial(openmetrics.exposition.generate_latest, escaping=openmetrics.exposition.ALLOWUTF8), content_type
    return generate_latest, content_type


def _padded(values: Sequence[float], length: int) -> list[float]:
    """As many as there are R-workers now; nothing was heard of the last ones yet."""
    return [*values, *([0.0] * length)][:length]


def _numbered(values: Sequence[float]) -> list[tuple[str, float]]:
    return [(str(number), float(value)) for number, value in enumerate(values)]
