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
  until: ["\\n", ".", ","]
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

Answers = dict[str, list[Any]]  # by task: of each document, as lm_eval's samples have them


def evaluate(given: Given, kind: str, model_args: str, *flags: str, tasks: tuple[str, ...] = tuple(_TASKS)) -> Any:
    """The metrics of each task, and its answers."""
    folder = given.scratch / "tasks"
    if not folder.exists():
        _write_tasks(folder)
    out = given.scratch / f"out-{len(list(given.scratch.iterdir()))}"
    shell([
        command("lm_eval"), "run", "--model", kind, "--model_args", model_args, "--tasks", ",".join(tasks),
        "--include_path", str(folder), "--output_path", str(out), "--log_samples", *flags,
    ])  # fmt: skip
    (result,) = out.rglob("results_*.json")
    metrics, answers = {}, {}
    for task, told in json.loads(result.read_text())["results"].items():
        metrics[task] = {name: value for name, value in told.items() if "," in name and "stderr" not in name}
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        documents = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[task] = [one["filtered_resps"] for one in sorted(documents, key=lambda one: one["doc_id"])]
    return metrics, answers


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    questions = [json.dumps({"question": question, "choices": choices}) for question, choices in _QUESTIONS]
    texts = [json.dumps({"text": text}) for text in _TEXTS]
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
    for name, task in _TASKS.items():
        file = folder / ("texts.jsonl" if name == "perplexity" else "questions.jsonl")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{_COMMON.format(file=file)}{task}")


_own: list[Any] = []


def by_transformers(given: Given) -> object:
    """What the others are held against: lm_eval's own way with the same model, no server."""
    _own[:] = evaluate(given, "hf", f"pretrained={given.model},dtype=float32", "--device", "cpu")
    return _own[0]


def asked(given: Given, more: str, *flags: str) -> object:
    """The three tasks by the server.  Raises AssertionError if the answers are not those of transformers."""
    arguments = f"model={NAME},base_url={given.api}/completions,tokenizer={given.model},timeout=1200,max_retries=1"
    arguments += f",tokenizer_backend=huggingface,{more}"
    metrics, found = evaluate(given, "local-completions", arguments, *flags)
    own_metrics, expected = _own
    pairs = [
        (float(a[0]), float(b[0]), str(a[1]) == str(b[1]))
        for mine, theirs in zip(expected["choices"], found["choices"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    rolling = [abs(float(a) - float(b)) for a, b in zip(*map(_numbers, (expected, found)), strict=True)]
    generated = list(zip(expected["generation"], found["generation"], strict=True))
    told = {
        "loglikelihoods": len(pairs),
        "largest difference": max(abs(a - b) for a, b, _ in pairs),
        "is_greedy alike": sum(is_alike for *_, is_alike in pairs),
        "generations": len(generated),
        "generations alike": sum(a == b for a, b in generated),
        "largest difference of a text": max(rolling),
        "metrics": metrics,
        "hf": own_metrics,
    }
    assert told["largest difference"] < _NEAR and told["largest difference of a text"] < 10 * _NEAR, told
    assert told["is_greedy alike"] == len(pairs) and told["generations alike"] == len(generated), (told, generated)
    assert metrics["choices"] == own_metrics["choices"] and metrics["generation"] == own_metrics["generation"], told
    return told


def _numbers(answers: Answers) -> list[Any]:
    return [answer[0] if isinstance(answer, list) else answer for answer in answers["perplexity"]]


def as_token_ids(given: Given) -> object:
    return asked(given, "tokenized_requests=True")


def as_text(given: Given) -> object:
    return asked(given, "tokenized_requests=False")


def eight_in_a_request(given: Given) -> object:
    return asked(given, "tokenized_requests=True", "--batch_size", "8")


def four_requests_at_once(given: Given) -> object:
    return asked(given, "tokenized_requests=True,num_concurrent=4")


def generation_by_chat(given: Given) -> object:
    arguments = f"model={NAME},base_url={given.api}/chat/completions,num_concurrent=4,timeout=1200,max_retries=1"
    metrics, _ = evaluate(given, "local-chat-completions", arguments, "--apply_chat_template", tasks=("generation",))
    return metrics


def generation_with_the_servers_tokenizer(given: Given) -> object:
    """It wants `/tokenizer_info`, which vLLM has if it is started with a flag."""
    arguments = f"model={NAME},base_url={given.api}/completions,tokenizer_backend=remote,timeout=1200,max_retries=1"
    metrics, _ = evaluate(given, "local-completions", arguments, tasks=("generation",))
    return metrics


if __name__ == "__main__":
    main(
        by_transformers, as_token_ids, as_text, eight_in_a_request, four_requests_at_once, generation_by_chat,
        generation_with_the_servers_tokenizer,
    )  # fmt: skip
