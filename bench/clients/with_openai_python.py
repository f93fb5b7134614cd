"""The openai package for Python."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI, NotFoundError, OpenAI

from checks import NAME, Given, main

ASKED = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def client(given: Given) -> OpenAI:
    return OpenAI(base_url=given.api, api_key="none", timeout=600, max_retries=0)


def models(given: Given) -> object:
    listed = [model.id for model in client(given).models.list()]
    return listed, client(given).models.retrieve(NAME).id


def chat(given: Given) -> object:
    answer = client(given).chat.completions.create(model=NAME, messages=ASKED, max_completion_tokens=16, temperature=0)
    return answer.choices[0].message.content, answer.usage.total_tokens


def chat_streamed_with_usage(given: Given) -> object:
    whole = client(given).chat.completions.create(model=NAME, messages=ASKED, max_tokens=16, temperature=0)
    chunks = list(
        client(given).chat.completions.create(
            model=NAME,
            messages=ASKED,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[-1].usage == whole.usage
    return text


def chat_through_the_stream_helper(given: Given) -> object:
    with client(given).chat.completions.stream(model=NAME, messages=ASKED, max_tokens=16, temperature=0) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message.content


def chat_with_logprobs(given: Given) -> object:
    answer = client(given).chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=16, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    named = choice.logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in named)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in named)
    text = b"".join(bytes(token.bytes) for token in named).decode()
    assert text.removesuffix("<|im_end|>") == choice.message.content, (text, choice)
    return text


def chat_of_a_developer(given: Given) -> object:
    told = {"role": "developer", "content": "Answer in capitals."}
    answer = client(given).chat.completions.create(model=NAME, messages=[told, *ASKED], max_tokens=16)
    return answer.choices[0].message.content


def chat_with_every_harmless_field(given: Given) -> object:
    answer = client(given).chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=8, n=2, temperature=1, top_p=0.9, seed=7, stop=["\n\n"], logit_bias={},
        frequency_penalty=0.1, presence_penalty=0.1, modalities=["text"], parallel_tool_calls=True,
        prompt_cache_key="a", response_format={"type": "text"}, safety_identifier="b", service_tier="auto", store=False,
        metadata={"a": "b"}, tool_choice="none", tools=[], top_logprobs=0, logprobs=False, user="c", verbosity="medium",
        extra_body={"chat_template_kwargs": {}, "top_k": 20, "min_p": 0.0, "ignore_eos": False},
    )  # fmt: skip
    return [choice.message.content for choice in answer.choices]


def chat_with_logit_bias(given: Given) -> object:
    answer = client(given).chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=4, temperature=0, logit_bias={"30": 100}
    )
    return answer.choices[0].message.content


def completion(given: Given) -> object:
    answer = client(given).completions.create(model=NAME, prompt="One, two, three,", max_tokens=8, temperature=0)
    return answer.choices[0].text


def completion_of_token_ids_and_lists(given: Given) -> object:
    answer = client(given).completions.create(model=NAME, prompt=[[1, 2, 3], [4, 5]], max_tokens=4, temperature=0)
    return [choice.text for choice in answer.choices]


def completion_streamed(given: Given) -> object:
    whole = client(given).completions.create(model=NAME, prompt="Ünïcödé 🙂 日本", max_tokens=24, temperature=0)
    chunks = client(given).completions.create(
        model=NAME, prompt="Ünïcödé 🙂 日本", max_tokens=24, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole.choices[0].text, (text, whole)
    return text


def completion_with_echo_and_logprobs(given: Given) -> object:
    prompt = "One, two, three, four"
    answer = client(given).completions.create(model=NAME, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    told = answer.choices[0].logprobs
    assert answer.choices[0].text == prompt == "".join(told.tokens)
    assert told.token_logprobs[0] is None
    assert all(text == prompt[at : at + len(text)] for text, at in zip(told.tokens, told.text_offset, strict=True))
    return told.token_logprobs


def completion_best_of(given: Given) -> object:
    answer = client(given).completions.create(model=NAME, prompt="One,", max_tokens=4, best_of=2)
    return answer.choices[0].text


def completion_with_suffix(given: Given) -> object:
    return client(given).completions.create(model=NAME, prompt="One,", suffix="three", max_tokens=4).choices[0].text


def many_at_once(given: Given) -> object:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=given.api, api_key="none", timeout=600) as asynchronous:
            answers = await asyncio.gather(*(
                asynchronous.completions.create(model=NAME, prompt=f"{i}, {i + 1},", max_tokens=8, temperature=0)
                for i in range(16)
            ))  # fmt: skip
        return [answer.choices[0].text for answer in answers]

    return asyncio.run(ask())


def another_model(given: Given) -> object:
    try:
        client(given).chat.completions.create(model="gpt-4o", messages=ASKED)
    except NotFoundError as error:
        return str(error)
    raise AssertionError("a model that is not served was answered")


def tools(given: Given) -> object:
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    answer = client(given).chat.completions.create(model=NAME, messages=ASKED, tools=[weather], max_tokens=16)
    return answer.choices[0].message.content


def json_object(given: Given) -> object:
    answer = client(given).chat.completions.create(
        model=NAME, messages=ASKED, response_format={"type": "json_object"}, max_tokens=16
    )
    return answer.choices[0].message.content


def an_image(given: Given) -> object:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    answer = client(given).chat.completions.create(model=NAME, messages=[{"role": "user", "content": [part]}])
    return answer.choices[0].message.content


def responses(given: Given) -> object:
    return client(given).responses.create(model=NAME, input="Hello").output_text


def embeddings(given: Given) -> object:
    return len(client(given).embeddings.create(model=NAME, input="Hello").data)


if __name__ == "__main__":
    main(
        models, chat, chat_streamed_with_usage, chat_through_the_stream_helper, chat_with_logprobs, chat_of_a_developer,
        chat_with_every_harmless_field, chat_with_logit_bias, completion, completion_of_token_ids_and_lists,
        completion_streamed, completion_with_echo_and_logprobs, many_at_once, another_model, completion_best_of,
        completion_with_suffix, tools, json_object, an_image, responses, embeddings,
    )  # fmt: skip
