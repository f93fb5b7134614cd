"""What storing K and V in fewer bits costs in quality, measured on the model that this repository ships.

    python bench/kv_quality.py                     contexts of 128 and 1024 tokens, about two minutes
    python bench/kv_quality.py --outliers          with channels of K that are eight times larger, as large models have

Every layer's K (after RoPE) and V go through the R-worker's own store and back, token by token as a decode would
store them; attention over what comes out is fp32.  Compared are the next-token distributions with those of unrounded
KV, over the second half of each window of held-out text: the mean and the 99th percentile of the KL divergence, how
often the most likely token is the same, and by how much perplexity differs.

The shipped model has no outliers of its own.  With --outliers four pairs of K's channels per head and layer (a pair
shares a RoPE frequency) are multiplied by 8 and the same channels of q divided by 8, which changes no score.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from cpu_attention import KV_DTYPES, HeadFormat, kernel, reference

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "scripts" / "demo_model"
BLOCK = 64
OUTLIER_PAIRS, OUTLIER_FACTOR = 4, 8.0
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Quality:
    dtype: str
    bits_per_number: float  # scales included
    context: int
    positions: int
    mean_kld: float
    p99_kld: float
    top1_percent: float
    perplexity: float
    perplexity_change_percent: float


class StoredAttention:
    """An attention function for transformers whose K and V have been in the store."""

    def __init__(self, config: Any, with_outliers: bool) -> None:
        self.dtype: str | None = None  # None: nothing is stored
        generator = np.random.default_rng(1)
        half = config.head_dim // 2
        self._factors = torch.ones(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        for heads in self._factors if with_outliers else ():
            for head in heads:
                pairs = generator.permutation(half)[:OUTLIER_PAIRS]
                head[pairs] = head[pairs + half] = OUTLIER_FACTOR

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """# query [n, q_heads, T, head_dim], key and value [n, kv_heads, T, head_dim] -> [n, T, q_heads, head_dim]"""
        factors = self._factors[module.layer_idx][None, :, None]
        query = query / factors.repeat_interleave(query.shape[1] // key.shape[1], 1)
        key, value = self._stored(key * factors, value)
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def _stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dtype is None:
            return key, value
        num_rows, num_heads, num_tokens, head_dim = key.shape
        head = HeadFormat(self.dtype, head_dim, BLOCK)
        blocks_each = -(-num_tokens // BLOCK)
        data = np.zeros((num_rows * blocks_each, num_heads, head.nbytes), np.uint8)
        positions = np.arange(num_tokens)
        for row in range(num_rows):
            k, v = (part[row].transpose(0, 1).contiguous().numpy() for part in (key, value))
            blocks = (row * blocks_each + positions // BLOCK).astype(np.int32)
            kernel.append(k, v, blocks, (positions % BLOCK).astype(np.int32), data, head)
        parts = []
        for part in reference.read(data, head):  # [blocks, heads, BLOCK, head_dim]
            rows = part.reshape(num_rows, blocks_each, num_heads, BLOCK, head_dim).swapaxes(1, 2)
            parts.append(torch.from_numpy(rows.reshape(num_rows, num_heads, -1, head_dim)[:, :, :num_tokens]).float())
        return parts[0], parts[1]


def held_out_windows(context: int, most: int | None) -> torch.Tensor:
    """Windows of the text that the model was not trained on, half overlapping, so that second halves do not.

    # [num_windows, context + 1] int64
    """
    training = load_script("train_demo_model")
    stream = training.to_stream(AutoTokenizer.from_pretrained(MODEL), training.read_corpus()[1], None)
    starts = torch.arange(0, len(stream) - context, context // 2)
    if most is not None and most < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, most).round().long()]
    return torch.stack([stream[start : start + context + 1] for start in starts.tolist()])


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.inference_mode()
def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """# [num_windows, context + 1] -> [num_windows, context / 2, vocabulary], of the second halves"""
    context = windows.shape[1] - 1
    hidden = model.model(input_ids=windows[:, :context]).last_hidden_state[:, context // 2 :]
    return functional.log_softmax(model.lm_head(hidden), -1)


def measure(model: Any, attention: StoredAttention, dtype: str, windows: torch.Tensor) -> Quality:
    context = windows.shape[1] - 1
    divergences, losses, exact_losses, same = [], [], [], 0
    for batch in windows.split(max(1, TOKENS_AT_ONCE // context)):
        attention.dtype = None
        exact = log_probabilities(model, batch)
        attention.dtype = dtype
        stored = log_probabilities(model, batch)
        divergences.append((exact.exp() * (exact - stored)).sum(-1).flatten())
        same += int((exact.argmax(-1) == stored.argmax(-1)).sum())
        labels = batch[:, context // 2 + 1 :, None]
        losses.append(-stored.gather(-1, labels).flatten())
        exact_losses.append(-exact.gather(-1, labels).flatten())
    divergence, loss, exact_loss = torch.cat(divergences), torch.cat(losses).mean(), torch.cat(exact_losses).mean()
    head = HeadFormat(dtype, model.config.head_dim, BLOCK)
    return Quality(
        dtype=dtype,
        bits_per_number=(head.k.end + head.v.end - head.v.begin) * 8 / (2 * BLOCK * head.head_dim),
        context=context,
        positions=divergence.numel(),
        mean_kld=float(divergence.mean()),
        p99_kld=float(divergence.quantile(0.99)),
        top1_percent=100 * same / divergence.numel(),
        perplexity=math.exp(loss),
        perplexity_change_percent=100 * math.expm1(loss - exact_loss),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(KV_DTYPES), default=list(KV_DTYPES))
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--windows", type=int, help="at most so many of each context; default: all of the text")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    attention = StoredAttention(model.config, args.outliers)
    AttentionInterface.register("stored", attention)
    model.set_attn_implementation("stored")
    results = []
    columns = "{:9} {:>5} {:>8} {:>10} {:>9} {:>9} {:>7} {:>11} {:>8}"
    print(columns.format("KV", "bits", "context", "positions", "mean KLD", "p99 KLD", "top-1", "perplexity", "change"))
    for context in args.context:
        windows = held_out_windows(context, args.windows)
        for dtype in args.dtype:
            q = measure(model, attention, dtype, windows)
            results.append(asdict(q))
            print(
                columns.format(
                    q.dtype, f"{q.bits_per_number:.2f}", q.context, q.positions, f"{q.mean_kld:.1e}",
                    f"{q.p99_kld:.1e}", f"{q.top1_percent:.2f}%", f"{q.perplexity:.3f}",
                    f"{q.perplexity_change_percent:+.2f}%",
                ),
                flush=True,
            )  # fmt: skip
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps({"outliers": args.outliers, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
