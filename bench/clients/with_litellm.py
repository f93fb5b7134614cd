"""litellm, which other clients stand on: by its names of OpenAI-like servers, and through its router."""

from __future__ import annotations

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it looks for prices on the net when it is imported

import litellm

from checks import NAME, Given, main

ASKED = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def ask(given: Given, provider: str = "openai", **more: object) -> object:
    return litellm.completion(
        model=f"{provider}/{NAME}", messages=ASKED, api_base=given.api, api_key="none", temperature=0, max_tokens=16,
        timeout=600, num_retries=0, **more,
    )  # fmt: skip


def chat(given: Given) -> object:
    return ask(given).choices[0].message.content


def chat_as_hosted_vllm(given: Given) -> object:
    return ask(given, "hosted_vllm", top_k=5, repetition_penalty=1.1).choices[0].message.content


def chat_streamed(given: Given) -> object:
    chunks = list(ask(given, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(given).choices[0].message.content, text
    return text, litellm.stream_chunk_builder(chunks).usage.total_tokens


def chat_with_logprobs(given: Given) -> object:
    return len(ask(given, logprobs=True, top_logprobs=2).choices[0].logprobs.content)


def chat_of_some(given: Given) -> object:
    async def both() -> list[str]:
        answers = await asyncio.gather(*(
            litellm.acompletion(
                model=f"openai/{NAME}", messages=ASKED, api_base=given.api, api_key="none", max_tokens=8, timeout=600
            )
            for _ in range(4)
        ))  # fmt: skip
        return [answer.choices[0].message.content for answer in answers]

    return asyncio.run(both())


def chat_through_the_router(given: Given) -> object:
    where = {"model": f"openai/{NAME}", "api_base": given.api, "api_key": "none", "timeout": 600}
    router = litellm.Router(model_list=[{"model_name": "small", "litellm_params": where}], num_retries=1)
    return router.completion("small", ASKED, max_tokens=8).choices[0].message.content


def completion(given: Given) -> object:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{NAME}", prompt="One, two, three,", api_base=given.api, api_key="none",
        max_tokens=8, temperature=0, timeout=600,
    )  # fmt: skip
    return answer.choices[0].text


def completion_streamed(given: Given) -> object:
    chunks = litellm.text_completion(
        model=f"text-completion-openai/{NAME}", prompt="One, two, three,", api_base=given.api, api_key="none",
        max_tokens=8, temperature=0, timeout=600, stream=True,
    )  # fmt: skip
    return "".join(chunk.choices[0].text or "" for chunk in chunks)


def reasoning_effort(given: Given) -> object:
    return ask(given, reasoning_effort="low", allowed_openai_params=["reasoning_effort"]).choices[0].message.content


def json_object(given: Given) -> object:
    return ask(given, response_format={"type": "json_object"}).choices[0].message.content


def tools(given: Given) -> object:
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    return ask(given, tools=[weather]).choices[0].message.content


if __name__ == "__main__":
    main(
        chat, chat_as_hosted_vllm, chat_streamed, chat_with_logprobs, chat_of_some, chat_through_the_router, completion,
        completion_streamed, reasoning_effort, json_object, tools,
    )  # fmt: skip
