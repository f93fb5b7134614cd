"""Rotary positions: how far the model's scaling carries, and frequencies that depend on a sequence's length.

Two kinds of scaling look at the longest sequence of a call and choose the frequencies of all its tokens by it: dynamic
NTK and LongRoPE.  A flat batch is many sequences, so here each token's frequencies are those that transformers computes
for its own sequence.  Its length is that of the call in which ``generate`` would compute the token: of the whole prompt
for the prompt's tokens, up to itself for one that was sampled.  So neither chunks, nor other sequences, nor computing
it again change a token's frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig

from gpu_sworker.staging import on_device
from gpu_sworker.suspension import current_forward

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])  # of what is installed

_BY_LENGTH = ("dynamic", "longrope")
# ``generate`` of these drops its cache once a sequence outgrows the original length, and computes all of it again.
_ALL_ANEW = ("phi3", "phimoe", "phi4_multimodal")


@dataclass(frozen=True)
class Reach:
    """How long a sequence the model has positions for."""

    longest: int | None  # tokens; None: no bound
    reason: str
    restart_tokens: int | None = None  # a sequence that grows to so many tokens is computed anew from its first one
    is_by_length: bool = False  # what positions are depends on how long a sequence is


def reach(config: PretrainedConfig) -> Reach:
    """From the configuration alone, as transformers has read it: legacy keys are gone."""
    text = config.get_text_config(decoder=True)
    declared = getattr(text, "max_position_embeddings", None)
    if not declared or declared < 0:
        return Reach(None, "its configuration sets no bound")
    said = f"its config.json says max_position_embeddings = {declared}"
    layers = _layer_ropes(text)
    scaled = {kind: rope for kind, rope in layers.items() if rope.get("rope_type", "default") != "default"}
    if not scaled:
        return Reach(declared, f"{said}, and no rope scaling that stretches it")
    # Rotary positions are relative: what a sliding window sees is never far away.
    is_mixed = len(scaled) < len(layers)
    is_bound = any(kind not in scaled and kind != "sliding_attention" for kind in layers)
    longest, by = min((_scaled_length(text, declared, rope, is_mixed), kind) for kind, rope in scaled.items())
    rope, is_by_length = scaled[by], any(one["rope_type"] in _BY_LENGTH for one in scaled.values())
    how = f"{rope['rope_type']} rope scaling" + (f" by {rope['factor']:g}" if rope.get("factor") else "")
    if is_bound and longest > declared:
        return Reach(declared, f"{said}, and not all of its layers have the {how}", is_by_length=is_by_length)
    original: Any = rope.get("original_max_position_embeddings")  # LongRoPE has one
    over = f" over {original}" if original and original != declared else ""
    is_anew = rope["rope_type"] == "longrope" and text.model_type in _ALL_ANEW and original < longest
    return Reach(longest, f"{said}, and {how}{over} gives no more", original + 1 if is_anew else None, is_by_length)


def make_rope_per_sequence(model: torch.nn.Module) -> None:
    """Replaces what would choose frequencies by the longest sequence of a batch."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer: Mapping[Any, Any] = kinds if isinstance(kinds, Mapping) else {None: kinds}
        if any(kind in _BY_LENGTH for kind in by_layer.values()):
            module.forward = _PerSequenceRope(module, by_layer)


class _PerSequenceRope:
    """Calls transformers' own rotary embedding for each length there is, as if its sequences were alone."""

    def __init__(self, module: torch.nn.Module, kinds: Mapping[str | None, str]) -> None:
        self._module, self._forward, self._kinds = module, module.forward, kinds
        self._newest: dict[tuple[str | None, int], tuple[torch.Tensor, ...]] = {}

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """x: of the model's dtype and device, else unused.  position_ids: [..., T]"""
        kind = self._kinds.get(layer_type)
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        if kind not in _BY_LENGTH:
            return self._forward(x, position_ids, **arguments)
        lengths, order, sizes = self._groups(kind, layer_type)
        if len(lengths) == 1:
            return self._alone(kind, lengths[0], x, position_ids, arguments)
        sorted_ids = position_ids[..., on_device(order, position_ids.device)]
        forward = current_forward()
        is_newest = np.split((forward.lengths == forward.positions + 1)[order], np.cumsum(sizes)[:-1])
        tables = []
        for length, ids, newest in zip(lengths, sorted_ids.split(sizes, dim=-1), is_newest, strict=True):
            if kind == "dynamic" and length and newest.all():
                tables += [self._of_newest(kind, length, x, ids[..., :1], arguments)] * len(newest)
            else:
                tables.append(self._alone(kind, length, x, ids, arguments))
        back = on_device(np.argsort(order), position_ids.device)
        return tuple(torch.cat(parts, dim=-2)[..., back, :] for parts in zip(*tables, strict=True))

    def _of_newest(
        self, kind: str, length: int, x: torch.Tensor, position_ids: torch.Tensor, arguments: dict[str, str]
    ) -> tuple[torch.Tensor, ...]:
        """Of the last token of a sequence, kept: decoding sequences have as many lengths as there are of them."""
        key = arguments.get("layer_type"), length
        if key not in self._newest:
            self._newest[key] = self._alone(kind, length, x, position_ids, arguments)
        return self._newest[key]

    def _groups(self, kind: str, layer_type: str | None) -> tuple[list[int], np.ndarray, list[int]]:
        """Lengths that differ in their frequencies, 0 for all up to the original one; rows by them; rows of each."""
        lengths, original = current_forward().lengths, self._original(kind, layer_type)
        beyond = lengths if kind == "dynamic" else np.minimum(lengths, original + 1)
        keys, sizes = np.unique(np.where(lengths > original, beyond, 0), return_counts=True)
        order = np.argsort(np.where(lengths > original, beyond, 0), kind="stable")
        return keys.tolist(), order, sizes.tolist()

    def _original(self, kind: str, layer_type: str | None) -> int:
        config: Any = self._module.config
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        return int(config.max_position_embeddings if kind == "dynamic" else rope["original_max_position_embeddings"])

    def _alone(
        self, kind: str, length: int, x: torch.Tensor, position_ids: torch.Tensor, arguments: dict[str, str]
    ) -> tuple[torch.Tensor, ...]:
        """Of tokens whose sequences have this length, or 0: are not longer than the original one."""
        module, prefix = self._module, f"{arguments['layer_type']}_" if arguments else ""
        if kind == "dynamic":  # it remembers the longest sequence so far
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(x.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        if kind == "longrope" and prefix and TRANSFORMERS < (5, 21):  # a second use of what it keeps is an error there
            vars(module).pop(f"{prefix}long_inv_freq", None)
        if not length:
            return tuple(self._forward(x, position_ids, **arguments))
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)  # what tells it the length
        tables = self._forward(x, torch.cat([position_ids, last], dim=-1), **arguments)
        return tuple(table[..., :-1, :] for table in tables)


def _layer_ropes(text: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its rope parameters; those without rotary positions left out."""
    ropes = getattr(text, "rope_parameters", None) or {}
    nested = {kind: rope for kind, rope in ropes.items() if isinstance(rope, dict)}
    return nested or ({"all": ropes} if ropes else {})


def _scaled_length(text: PretrainedConfig, declared: int, rope: Mapping[str, Any], is_mixed: bool) -> int:
    """How far this scaling carries.

    Where the configuration tells the length before scaling, what it declares may be that length or the stretched one.
    """
    kind, factor = rope["rope_type"], rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if kind in ("yarn", "longrope"):
        return max(declared, int((original or declared) * factor))
    if kind in ("linear", "proportional"):
        if original:
            return max(declared, int(original * factor))
        # Beside layers without scaling it is the stretched length (Gemma 3).
        return declared if is_mixed else max(declared, int(declared * factor))
    if kind == "dynamic" and "alpha" not in rope:  # a fixed alpha (HunYuan) is already in what is declared
        return max(declared, int(declared * factor))
    return declared  # llama3 tells the stretched length; of kinds not known here only this is known
