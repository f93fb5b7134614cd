"""The engine's scheduler under a virtual clock: a cost model tells how long each step takes.

    jobs ──arrive──► Scheduler.schedule ─► Step of each lane ─► Cost: seconds ─► the clock ─► Scheduler.commit ─► …

The loop is `Engine.step` without workers: the same scheduler, the same steps, in the same order, a round at a time.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field

import numpy as np

from fastdecode.api.sampling_params import SamplingParams
from fastdecode.errors import RequestError
from fastdecode.modelling.simulation.cost import Cost
from fastdecode.modelling.simulation.workload import Arrivals, Job
from fastdecode.observe.step_log import StepRecord, round_record
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.scheduling.scheduler import Scheduler

_END, _OTHER = 1, 2  # token ids


@dataclass
class Served:
    """What became of a job.  Times are seconds of the virtual clock."""

    job: Job
    arrived: float
    started: float | None = None
    tokens: list[float] = field(default_factory=list)  # when each was there
    num_preemptions: int = 0
    refused: str | None = None


@dataclass
class Simulation:
    served: list[Served]
    steps: list[StepRecord]
    seconds: float


def simulate(
    scheduler: Scheduler,
    jobs: abc.Sequence[Job],
    arrivals: Arrivals,
    cost: Cost,
    num_r_workers: int,
    on_step: abc.Callable[[StepRecord], None] | None = None,
) -> Simulation:
    """Runs all jobs to their ends."""
    now, records = 0.0, list[StepRecord]()
    waiting, coming = _arrive(jobs, arrivals)
    served: list[Served] = []
    live: dict[int, tuple[Sequence, Served]] = {}
    while waiting or coming or live:
        while coming and coming[0].arrived <= now:
            one = coming.popleft()
            sequence = _sequence(len(served), one.job)
            served.append(one)
            try:
                scheduler.add(sequence)
                live[sequence.seq_id] = sequence, one
            except RequestError as error:
                one.refused = error.code
                _next_client(waiting, coming, now)
        steps = [step for lane in range(scheduler.num_lanes) if (step := scheduler.schedule(lane))]
        if not steps:
            assert not live, "jobs are live, and nothing is to be done"
            now = max(now, coming[0].arrived) if coming else now
            continue
        seconds = cost.round_seconds(steps, num_r_workers)
        record = round_record(
            steps,
            begin_s=now,
            seconds=seconds,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_tokens=scheduler.kv_tokens,
            device_kv_tokens=scheduler.device_kv_tokens,
        )
        for admission in (admission for step in steps for admission in step.admissions):
            one = live[admission.seq_id][1]
            one.started = now if one.started is None else one.started
        now += seconds
        for step in steps:
            finished = scheduler.commit(step, _tokens(step, live, now))
            scheduler.remove(finished)
            for sequence in finished:
                live.pop(sequence.seq_id)[1].num_preemptions = sequence.num_preemptions
                _next_client(waiting, coming, now)
        records.append(record)
        if on_step:
            on_step(record)
    return Simulation(served, records, now)


def _tokens(step: Step, live: dict[int, tuple[Sequence, Served]], now: float) -> np.ndarray:
    """That come after it.  # [num_sampled] int64"""
    tokens = []
    for seq_id in step.sampled:
        _, one = live[seq_id]
        one.tokens.append(now)
        is_end = one.job.output_tokens == len(one.tokens) < one.job.max_tokens
        tokens.append(_END if is_end else _OTHER)
    return np.array(tokens, np.int64)


def _arrive(jobs: abc.Sequence[Job], arrivals: Arrivals) -> tuple[deque[Job], deque[Served]]:
    """Those that wait for a client, and those whose time is known."""
    if arrivals.times is not None:
        return deque(), deque(Served(job, time) for job, time in zip(jobs, arrivals.times, strict=True))
    first = jobs[: arrivals.num_clients]
    return deque(jobs[arrivals.num_clients :]), deque(Served(job, 0.0) for job in first)


def _next_client(waiting: deque[Job], coming: deque[Served], now: float) -> None:
    """A client has its answer and sends the next job."""
    if waiting:
        coming.append(Served(waiting.popleft(), now))


def _sequence(seq_id: int, job: Job) -> Sequence:
    request = Request(
        request_id=str(seq_id),
        prompt_token_ids=(_OTHER,) * job.prompt_tokens,
        params=SamplingParams(max_tokens=job.max_tokens),
        max_new_tokens=job.max_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset() if job.is_known else frozenset({_END}),
        true_output_tokens=job.output_tokens,
    )
    return Sequence(seq_id, request, 0, 0)
