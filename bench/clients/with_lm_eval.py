"""EleutherAI's lm_eval on tasks of our own: what it computes itself with transformers, and what it asks of a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checks import NAME, Given, command, main, shell

_QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "Berlin", "Madrid"]),
    ("The largest planet of the solar system is", ["Jupiter", "Mars", "Venus", "Mercury"]),
    ("Water is made of hydrogen and", ["oxygen", "carbon", "iron", "helium"]),
    ("The opposite of hot is", ["cold", "warm", "wet", "loud"]),
    ("Two plus two equals", ["four", "five", "three", "ten"]),
    ("The author of Hamlet is", ["William Shakespeare", "Charles Dickens", "Jane Austen", "Mark Twain"]),
    ("A baby cat is called a", ["kitten", "puppy", "calf", "foal"]),
    ("日本の首都は", ["東京", "大阪", "京都", "札幌"]),
    ("Das Gegenteil von groß ist", ["klein", "hoch", "schön", "müde"]),
    ("The smiling face is 🙂 and the red heart is", ["❤️", "🙂", "🌍", "🚗"]),
    ("In Python, a list is written with", ["[1, 2, 3]", "{1: 2}", "<1, 2>", "(: 1 :)"]),
    ("The sun rises in the", ["east", "west", "north", "south"]),
    ("The chemical symbol of gold is", ["Au", "Ag", "Fe", "Pb"]),
    ("A triangle has this many sides:", ["3", "4", "5", "6"]),
    ("The first month of the year is", ["January", "March", "June", "December"]),
    ("Bees make", ["honey", "milk", "wool", "silk"]),
    ("The language spoken in Brazil is", ["Portuguese", "Spanish", "French", "Dutch"]),
    ("ประเทศไทยมีเมืองหลวงคือ", ["กรุงเทพ", "เชียงใหม่", "ภูเก็ต", "พัทยา"]),
    ("The fastest land animal is the", ["cheetah", "elephant", "tortoise", "cow"]),
    ("Ice is water that is", ["frozen solid", "boiling", "salty", "in the air"]),
]
_TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps on, dreaming of foxes.",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n",
    "Grüße aus München! 🙂 東京からこんにちは。 สวัสดี",
    "one two three four five six seven eight nine ten " * 12,
]
_COMMON = (
    "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {file}\nmetadata:\n  version: 1\n"
)
_TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "generation": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
""",
    "perplexity": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
}
_NEAR = 2e-3  # log-probabilities of whole answers, in float32 on both sides


def evaluate(given: Given, task: str, kind: str, model_args: str, *flags: str) -> tuple[dict[str, Any], list[Any]]:
    """Its metrics, and what the model answered to each document."""
    tasks = given.scratch / "tasks"
    if not tasks.exists():
        _write_tasks(tasks)
    out = given.scratch / f"{task}-{len(list(given.scratch.iterdir()))}"
    shell([
        command("lm_eval"), "run", "--model", kind, "--model_args", model_args, "--tasks", task, "--include_path",
        str(tasks), "--output_path", str(out), "--log_samples", *flags,
    ])  # fmt: skip
    (result,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    metrics = json.loads(result.read_text())["results"][task]
    documents = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda document: document["doc_id"])
    return {name: value for name, value in metrics.items() if "," in name}, [one["filtered_resps"] for one in documents]


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    questions = [json.dumps({"question": question, "choices": choices}) for question, choices in _QUESTIONS]
    texts = [json.dumps({"text": text}) for text in _TEXTS]
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    for name, task in _TASKS.items():
        file = folder / ("texts.jsonl" if name == "perplexity" else "questions.jsonl")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{_COMMON.format(file=file)}{task}")


_own: dict[str, tuple[dict[str, Any], list[Any]]] = {}


def own(given: Given, task: str) -> tuple[dict[str, Any], list[Any]]:
    """By lm_eval itself, with transformers."""
    if task not in _own:
        _own[task] = evaluate(given, task, "hf", f"pretrained={given.model},dtype=float32", "--device", "cpu")
    return _own[task]


def asked(given: Given, task: str, more: str, *flags: str) -> tuple[dict[str, Any], list[Any]]:
    arguments = f"model={NAME},base_url={given.api}/completions,tokenizer={given.model},timeout=1200,max_retries=1"
    return evaluate(given, task, "local-completions", f"{arguments},tokenizer_backend=huggingface,{more}", *flags)


def compared_choices(given: Given, more: str) -> object:
    (own_metrics, expected), (metrics, found) = own(given, "choices"), asked(given, "choices", more)
    pairs = [
        (float(a[0]), float(b[0]), str(a[1]) == str(b[1]))
        for mine, theirs in zip(expected, found, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    largest = max(abs(a - b) for a, b, _ in pairs)
    told = {"loglikelihoods": len(pairs), "largest difference": largest, "metrics": metrics, "hf": own_metrics}
    assert largest < _NEAR and metrics == own_metrics and all(same for *_, same in pairs), told
    return told


def compared_generation(given: Given, more: str) -> object:
    (own_metrics, expected), (metrics, found) = own(given, "generation"), asked(given, "generation", more)
    equal = sum(a == b for a, b in zip(expected, found, strict=True))
    told = {"generations": len(expected), "equal to hf's": equal, "metrics": metrics, "hf": own_metrics}
    assert equal == len(expected), (told, expected, found)
    return told


def choices_by_transformers(given: Given) -> object:
    return own(given, "choices")[0]


def choices_as_token_ids(given: Given) -> object:
    return compared_choices(given, "tokenized_requests=True")


def choices_as_text(given: Given) -> object:
    return compared_choices(given, "tokenized_requests=False")


def choices_eight_in_a_request(given: Given) -> object:
    return compared_choices(given, "tokenized_requests=True,batch_size=8")


def choices_four_requests_at_once(given: Given) -> object:
    return compared_choices(given, "tokenized_requests=True,num_concurrent=4")


def generation_as_token_ids(given: Given) -> object:
    return compared_generation(given, "tokenized_requests=True")


def generation_as_text(given: Given) -> object:
    return compared_generation(given, "tokenized_requests=False,num_concurrent=4")


def perplexity(given: Given) -> object:
    (own_metrics, expected), (metrics, found) = (
        own(given, "perplexity"), asked(given, "perplexity", "tokenized_requests=True")
    )  # fmt: skip
    differences = [abs(float(a) - float(b)) for a, b in zip(_flat(expected), _flat(found), strict=True)]
    told = {"texts": len(differences), "largest difference": max(differences), "metrics": metrics, "hf": own_metrics}
    assert max(differences) < 10 * _NEAR, told
    return told


def _flat(answers: list[Any]) -> list[Any]:
    return [answer[0] if isinstance(answer, list) else answer for answer in answers]


def generation_by_chat(given: Given) -> object:
    arguments = f"model={NAME},base_url={given.api}/chat/completions,num_concurrent=4,timeout=1200,max_retries=1"
    metrics, found = evaluate(given, "generation", "local-chat-completions", arguments, "--apply_chat_template")
    return metrics, found[0]


if __name__ == "__main__":
    main(
        choices_by_transformers, choices_as_token_ids, choices_as_text, choices_eight_in_a_request,
        choices_four_requests_at_once, generation_as_token_ids, generation_as_text, generation_by_chat, perplexity,
    )  # fmt: skip
