"""Simon Willison's llm, a command: its models are told of the server by a file."""

from __future__ import annotations

import os

from checks import NAME, Given, command, main, shell


def ask(given: Given, *words: str, text: str = "") -> str:
    folder = given.scratch / "llm"
    os.environ["LLM_USER_PATH"] = str(folder)
    if not folder.exists():
        folder.mkdir()
        named = f"- model_id: {NAME}\n  model_name: {NAME}\n  api_base: {given.api}\n  supports_schema: true\n"
        completes = f"- model_id: {NAME}-completes\n  model_name: {NAME}\n  api_base: {given.api}\n  completion: true\n"
        (folder / "extra-openai-models.yaml").write_text(named + completes)
    return shell([command("llm"), *words], text=text).strip()


_QUESTION = ("-m", NAME, "What is the capital of France?", "-o", "max_tokens", "24", "-o", "temperature", "0")


def a_question(given: Given) -> object:
    return ask(given, *_QUESTION)


def a_question_answered_whole(given: Given) -> object:
    whole = ask(given, *_QUESTION, "--no-stream")
    assert whole == a_question(given)
    return whole


def a_system_prompt_and_a_pipe(given: Given) -> object:
    return ask(given, "-m", NAME, "-s", "Translate to French.", "-o", "max_tokens", "24", text="Good morning")


def a_conversation_that_goes_on(given: Given) -> object:
    return ask(given, "-c", "And of Italy?", "-o", "max_tokens", "24")


def a_template_with_every_option(given: Given) -> object:
    options = {"max_tokens": "16", "temperature": "1", "top_p": "0.9", "frequency_penalty": "0.1", "seed": "3"}
    said = [word for name, value in options.items() for word in ("-o", name, value)]
    return ask(given, "-m", NAME, "Hello", *said, "-o", "presence_penalty", "0.1", "-o", "stop", "zzz")


def logit_bias(given: Given) -> object:
    return ask(given, "-m", NAME, "Hello", "-o", "max_tokens", "4", "-o", "logit_bias", '{"30": 10}')


def a_conversation_typed(given: Given) -> object:
    return ask(given, "chat", "-m", NAME, "-o", "max_tokens", "12", text="Hello\nAnd again\nquit\n")


def a_completion(given: Given) -> object:
    return ask(given, "-m", f"{NAME}-completes", "One, two, three,", "-o", "max_tokens", "8")


def what_was_logged(given: Given) -> object:
    return len(ask(given, "logs", "-n", "0", "--json"))


def json_object(given: Given) -> object:
    return ask(given, "-m", NAME, "A dog, as JSON", "-o", "json_object", "1", "-o", "max_tokens", "16")


def schema(given: Given) -> object:
    return ask(given, "-m", NAME, "--schema", "name, age int", "Invent a dog", "-o", "max_tokens", "16")


if __name__ == "__main__":
    main(
        a_question, a_question_answered_whole, a_system_prompt_and_a_pipe, a_conversation_that_goes_on,
        a_template_with_every_option, logit_bias, a_conversation_typed, a_completion, what_was_logged,
        json_object, schema,
    )  # fmt: skip
