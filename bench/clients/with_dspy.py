"""dspy: programs of signatures, which ask through litellm."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it looks for prices on the net when it is imported

import dspy

from checks import NAME, Given, main


def model(given: Given, kind: str = "chat", **more: object) -> dspy.LM:
    provider = "openai" if kind == "chat" else "text-completion-openai"
    return dspy.LM(
        f"{provider}/{NAME}", api_base=given.api, api_key="none", model_type=kind, cache=False, max_tokens=64,
        temperature=0.0, timeout=600, num_retries=0, **more,
    )  # fmt: skip


def the_model_itself(given: Given) -> object:
    return model(given)("What is the capital of France?")


def the_model_as_text(given: Given) -> object:
    return model(given, "text")("One, two, three,")


def the_model_with_messages(given: Given) -> object:
    return model(given)(
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}], n=2
    )


def a_prediction(given: Given) -> object:
    """The model is small: what it answers may not have the fields that are asked for."""
    with dspy.context(lm=model(given), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        return _answer(dspy.Predict("question -> answer"))


def a_prediction_as_json(given: Given) -> object:
    with dspy.context(lm=model(given), adapter=dspy.JSONAdapter()):
        return _answer(dspy.Predict("question -> answer"))


def a_prediction_in_two_steps(given: Given) -> object:
    with dspy.context(lm=model(given), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        return _answer(dspy.ChainOfThought("question -> answer"))


def _answer(program: dspy.Module) -> object:
    try:
        return program(question="What is the capital of France?").answer
    except Exception as error:  # by its name: where the class lies differs between versions
        if "AdapterParseError" not in type(error).__name__:
            raise
        return "answered, but not in the form that the adapter reads"


if __name__ == "__main__":
    main(
        the_model_itself, the_model_as_text, the_model_with_messages, a_prediction, a_prediction_in_two_steps,
        a_prediction_as_json,
    )  # fmt: skip
