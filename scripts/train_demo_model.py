"""Train the small Llama that ships in ``scripts/demo_model``.

    python scripts/train_demo_model.py --output scripts/demo_model

What it learns from: the Python standard library's own sources on this machine, tests left out
(about 11 MB, PSF licence).  Every fiftieth file is held out; its loss is printed while training and
recorded, with everything else needed to judge the model, in ``training.json`` beside the weights.

What comes out is an ordinary Hugging Face directory: ``config.json``, ``model.safetensors`` (bf16),
``tokenizer.json``.  The shape is chosen for what FastDecode measures on it: grouped queries (two
query heads per KV head), head_dim 64, RoPE, six layers, so that KV quantisation and splitting have
something real to spoil.

One hour on two cores.  Needs torch >= 2.9 (Muon), transformers, tokenizers; none of FastDecode.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_FILE = "<|endoffile|>"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "idlelib", "turtledemo"}
HELD_OUT_EVERY = 50


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one context length; the second one teaches long contexts."""

    context_tokens: int
    sequences_per_step: int
    share_of_tokens: float


PHASES = (Phase(512, 16, 0.8), Phase(1024, 8, 0.2))
WARMUP_STEPS = 40
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 3e-3


def read_corpus() -> tuple[list[str], list[str]]:
    """The library's files in a fixed order, as (training, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in paths]
    held_out = [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY == 0]
    training = [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY]
    return training, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_FILE], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token=END_OF_FILE,
        bos_token=END_OF_FILE,
        pad_token=END_OF_FILE,
        clean_up_tokenization_spaces=False,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int | None) -> torch.Tensor:
    """All files behind one another, each opened by END_OF_FILE.  # [num_tokens] int64"""
    order = range(len(texts))
    if seed is not None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for encoded in tokenizer([END_OF_FILE + texts[i] for i in order], verbose=False)["input_ids"]:
        ids.extend(encoded)
    return torch.tensor(ids)


def batches(stream: torch.Tensor, phase: Phase, generator: torch.Generator):
    """Random windows for ever: input and label are the same tokens, shifted inside the model."""
    last_start = len(stream) - phase.context_tokens
    while True:
        starts = torch.randint(0, last_start, (phase.sequences_per_step,), generator=generator)
        yield torch.stack([stream[s : s + phase.context_tokens] for s in starts])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, context_tokens: int, num_windows: int) -> float:
    windows = stream[: len(stream) // context_tokens * context_tokens].view(-1, context_tokens)[:num_windows]
    return sum(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows) / len(windows)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    training_texts, held_out_texts = read_corpus()
    tokenizer = train_tokenizer(training_texts, args.vocab_size)
    stream = torch.cat([to_stream(tokenizer, training_texts, args.seed + epoch) for epoch in range(2)])
    held_out = to_stream(tokenizer, held_out_texts, None)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(stream) // 2:,} tokens, {num_parameters:,} parameters", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    phase_steps = [int(args.tokens * p.share_of_tokens) // (p.context_tokens * p.sequences_per_step) for p in PHASES]
    num_steps, step, started = sum(phase_steps), 0, time.monotonic()
    generator = torch.Generator().manual_seed(args.seed)
    for phase, steps_here in zip(PHASES, phase_steps, strict=True):
        source = batches(stream, phase, generator)
        for _ in range(steps_here):
            # Linear warm-up, then linear decay to zero.
            scale = min((step + 1) / WARMUP_STEPS, (num_steps - step) / num_steps)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * scale
            tokens = next(source)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0 or step == num_steps:
                seconds = time.monotonic() - started
                print(f"step {step}/{num_steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
            if step % 200 == 0:
                print(f"  held out {held_out_loss(model, held_out, 512, 40):.3f}", flush=True)

    loss = held_out_loss(model, held_out, 1024, 100)
    output = Path(args.output)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(output, safe_serialization=True)
    tokenizer.save_pretrained(output)
    record = {
        "source": f"Python {platform.python_version()} standard library without tests (PSF licence)",
        "training_tokens": args.tokens,
        "corpus_tokens": len(stream) // 2,
        "parameters": num_parameters,
        "held_out_loss_nats_per_token": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "seed": args.seed,
        "seconds": round(time.monotonic() - started),
        "command": "python scripts/train_demo_model.py --output scripts/demo_model",
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="directory to write the Hugging Face model to")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="training tokens in all")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
