"""inspect-ai: small evaluations of questions with known answers, by its names of OpenAI-like servers."""

from __future__ import annotations

import os
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import choice, includes
from inspect_ai.solver import generate, multiple_choice, system_message, use_tools
from inspect_ai.tool import Tool, tool

from checks import NAME, Given, main

_ASKED = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin", "Spain": "Madrid"}
QUESTIONS = [Sample(input=f"What is the capital of {land}?", target=city) for land, city in _ASKED.items()]
CHOICES = [
    Sample(input=f"What is the capital of {land}?", choices=list(_ASKED.values()), target="ABCDE"[i])
    for i, land in enumerate(_ASKED)
]


@tool
def weather() -> Tool:
    async def execute(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name
        """
        return f"sun in {city}"

    return execute


def evaluate(
    given: Given,
    task: Task,
    provider: str = "openai-api/local",
    model_args: dict[str, Any] | None = None,
    **config: object,
) -> object:
    os.environ |= {"LOCAL_API_KEY": "none", "LOCAL_BASE_URL": given.api}
    model = get_model(
        f"{provider}/{NAME}", base_url=given.api, api_key="none",
        config=GenerateConfig(temperature=0.0, max_tokens=24, timeout=1200, max_retries=0, **config),
        **(model_args or {}),
    )  # fmt: skip
    (log,) = eval(task, model=model, log_dir=str(given.scratch / "logs"), display="plain", fail_on_error=True)
    if log.status != "success":
        raise RuntimeError(f"{log.status}: {log.error.message if log.error else ''}")
    return {score.name: {name: metric.value for name, metric in score.metrics.items()} for score in log.results.scores}


def answers_that_include(given: Given) -> object:
    return evaluate(given, Task(dataset=QUESTIONS, solver=[generate()], scorer=includes()))


def a_system_message(given: Given) -> object:
    solver = [system_message("You answer in one word."), generate()]
    return evaluate(given, Task(dataset=QUESTIONS, solver=solver, scorer=includes()), max_connections=4)


def choices(given: Given) -> object:
    return evaluate(given, Task(dataset=CHOICES, solver=[multiple_choice()], scorer=choice()))


def as_openai_by_chat_completions(given: Given) -> object:
    task = Task(dataset=QUESTIONS, solver=[generate()], scorer=includes())
    return evaluate(given, task, "openai", {"responses_api": False})


def as_openai_by_responses(given: Given) -> object:
    return evaluate(given, Task(dataset=QUESTIONS[:1], solver=[generate()], scorer=includes()), "openai")


def as_vllm(given: Given) -> object:
    return evaluate(given, Task(dataset=QUESTIONS, solver=[generate()], scorer=includes()), "vllm")


def logprobs_seed_and_penalties(given: Given) -> object:
    task = Task(dataset=QUESTIONS[:2], solver=[generate()], scorer=includes())
    return evaluate(
        given, task, logprobs=True, top_logprobs=2, seed=3, frequency_penalty=0.1, presence_penalty=0.1, top_p=0.9,
        stop_seqs=["\n\n"],
    )  # fmt: skip


def some_choices_of_each(given: Given) -> object:
    return evaluate(given, Task(dataset=QUESTIONS[:2], solver=[generate()], scorer=includes()), num_choices=2)


def tools(given: Given) -> object:
    return evaluate(given, Task(dataset=QUESTIONS[:1], solver=[use_tools(weather()), generate()], scorer=includes()))


if __name__ == "__main__":
    main(
        answers_that_include, a_system_message, choices, as_openai_by_chat_completions, as_openai_by_responses, as_vllm,
        logprobs_seed_and_penalties, some_choices_of_each, tools,
    )  # fmt: skip
