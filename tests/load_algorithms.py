"""Other ways to decide when sequences start, to compare ours with, and a clock of steps to run them by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastdecode.scheduling.load import Demand, Projection, SteadyStream


@dataclass(frozen=True)
class Job:
    prompt: int  # tokens
    steps: int

    def demand(self, start: int) -> Demand:
        return Demand(start, start + self.steps - 1, self.prompt + 1)


Policy = Callable[[int, Job], bool]  # (step, who waits in front) -> whether it starts now; called until it says no


def all_that_fits(limit: int) -> Policy:
    """Brute force: starts whoever keeps the load within the limit in every later step, looked at one by one."""
    loads = np.zeros(1 << 20, np.int64)  # of all steps, by those that have started

    def may_start(step: int, job: Job) -> bool:
        new = job.prompt + 1 + np.arange(job.steps)
        steps = slice(step, step + job.steps)
        if (loads[steps] + new).max() > limit:
            return False
        loads[steps] += new
        return True

    return may_start


def at_once(limit: int) -> Policy:
    """A batch whose peak is the limit; the next when all of it has ended."""
    batch: list[Demand] = []

    def may_start(step: int, job: Job) -> bool:
        new = job.demand(step)
        if batch and batch[0].start != step:
            if any(demand.end >= step for demand in batch):
                return False
            batch.clear()
        if batch and any(sum(d.at(t) for d in [*batch, new]) > limit for t in {d.end for d in [*batch, new]}):
            return False
        batch.append(new)
        return True

    return may_start


def published(limit: int, longest: int) -> Policy:
    """The paper's Algorithm 1 as printed: one common length for all, prompts ignored, the limit constant."""
    live: list[list[int]] = []  # [end step, load at that step]

    def may_start(step: int, job: Job) -> bool:
        live[:] = [entry for entry in live if entry[0] > step]
        if any(step < end - (limit - load) + 1 for end, load in live):
            return False
        for entry in live:
            entry[1] += entry[0] - step
        live.append([step + longest, longest])
        return True

    return may_start


def steady(limit: int, interval: int = 1) -> Policy:
    """Ours, for equal lengths."""
    projection, stream, live, earned = Projection(), SteadyStream(limit, interval), [], [-1]

    def may_start(step: int, job: Job) -> bool:
        for demand in [demand for demand in live if demand.end < step]:
            projection.remove(demand)
            live.remove(demand)
        new = job.demand(step)
        if earned[0] != step:
            stream.earn(step, stream.cost(new))
            earned[0] = step
        if not stream.allows(stream.cost(new)) or projection.peak(new) > limit:
            return False
        stream.spend(stream.cost(new))
        projection.add(new)
        live.append(new)
        return True

    return may_start


def run(jobs: Sequence[Job], policy: Policy) -> tuple[list[int], list[int]]:
    """The load of every step, and the step in which each job started."""
    waiting, starts, live, loads, step = list(jobs), [], [], [], 0
    while waiting or live:
        while waiting and policy(step, waiting[0]):
            live.append(waiting.pop(0).demand(step))
            starts.append(step)
        live = [demand for demand in live if demand.end >= step]
        loads.append(sum(demand.at(step) for demand in live))
        step += 1
        live = [demand for demand in live if demand.end >= step]
        assert step < 10**6, "nothing starts any more"
    return loads, starts
