"""langchain-openai: its chat model and its completion model."""

from __future__ import annotations

import asyncio

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from checks import NAME, Given, main

QUESTION = "What is the capital of France? Answer in one word."


class City(BaseModel):
    name: str


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sun in {city}"


def chats(given: Given, **more: object) -> ChatOpenAI:
    return ChatOpenAI(
        model=NAME, base_url=given.api, api_key="none", temperature=0, max_tokens=16, timeout=600, max_retries=0, **more
    )


def texts(given: Given) -> OpenAI:
    return OpenAI(
        model=NAME, base_url=given.api, api_key="none", temperature=0, max_tokens=8, timeout=600, max_retries=0
    )


def chat(given: Given) -> object:
    answer = chats(given).invoke([("system", "You answer in one word."), ("human", QUESTION)])
    return answer.content, answer.usage_metadata


def chat_streamed(given: Given) -> object:
    text = "".join(chunk.content for chunk in chats(given, stream_usage=True).stream(QUESTION))
    assert text == chats(given).invoke(QUESTION).content, text
    return text


def chat_of_some(given: Given) -> object:
    return [answer.content for answer in chats(given).batch([QUESTION, "Hello", "One, two,"])]


def chat_asynchronous(given: Given) -> object:
    return asyncio.run(chats(given).ainvoke(QUESTION)).content


def chat_with_logprobs(given: Given) -> object:
    return len(chats(given, logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"])


def a_chain(given: Given) -> object:
    prompt = ChatPromptTemplate.from_messages([("system", "You translate to French."), ("human", "{text}")])
    return (prompt | chats(given) | StrOutputParser()).invoke({"text": "Good morning"})


def completion(given: Given) -> object:
    return texts(given).invoke("One, two, three,")


def completion_streamed(given: Given) -> object:
    return "".join(texts(given).stream("One, two, three,"))


def completion_of_some(given: Given) -> object:
    return [one[0].text for one in texts(given).generate(["One, two,", "A, B,"]).generations]


def structured_output(given: Given) -> object:
    return chats(given).with_structured_output(City, method="json_schema").invoke(QUESTION)


def tools(given: Given) -> object:
    return chats(given).bind_tools([weather]).invoke("What is the weather in Paris?").content


if __name__ == "__main__":
    main(
        chat, chat_streamed, chat_of_some, chat_asynchronous, chat_with_logprobs, a_chain, completion,
        completion_streamed, completion_of_some, structured_output, tools,
    )  # fmt: skip
