"""Small tokenizers of the kinds that models have, trained here, as directories that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
ADDED = ["<tool call>", "n\u00e9", "\u2581both ", "  "]  # of no decoder's alphabet, of one, and in between
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [
    "def encode(self, text): return [self.ids[token] for token in text.split()]",
    "Once upon a time there was a king, and he didn't know what he'd do. 'Tis said! Isn't it? We've seen 're.",
    "the cat 's hat , the dog 'll run ; Hello World\n\tindented  twice",
    "Stra\u00dfe, na\u00efve caf\u00e9 \u2013 \u00fcber",
    "\u4f60\u597d\u4e16\u754c \u6771\u4eac \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e20\u0e32\u0e29\u0e32",
    "emoji \U0001f600 \U0001f680 done",
]


def _bpe(**options: Any) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, **options))


def _train(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _train(backend, trainer)


def _byte_fallback(strip: int) -> Tokenizer:
    """Llama 2's kind; its bytes are ordinary tokens, not added ones."""
    backend = _bpe(byte_fallback=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=440, special_tokens=[*SPECIAL, *BYTES], limit_alphabet=60, show_progress=False
    )
    made = json.loads(_train(backend, trainer).to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(made))
    chain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, decoders.Strip(" ", strip, 0)] if strip else chain)
    return backend


def llama() -> Tokenizer:
    """A space is put before every text, and taken away again."""
    backend = _byte_fallback(strip=1)
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return backend


def mistral() -> Tokenizer:
    backend = _byte_fallback(strip=1)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return backend


def gemma() -> Tokenizer:
    backend = _byte_fallback(strip=0)
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    return backend


def unigram() -> Tokenizer:
    """T5's kind."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _train(backend, trainer)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _train(backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))


def words() -> Tokenizer:
    """Without a decoder."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(backend, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def ends_of_words() -> Tokenizer:
    """GPT-1's kind: what a token says depends on the next."""
    backend = _bpe(end_of_word_suffix="</w>")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    return _train(backend, trainer)


KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "byte_level": (byte_level, {}),
    "llama": (llama, {}),
    "mistral": (mistral, {}),
    "gemma": (gemma, {}),
    "unigram": (unigram, {"clean_up_tokenization_spaces": True}),
    "word_piece": (word_piece, {"clean_up_tokenization_spaces": True}),
    "words": (words, {"clean_up_tokenization_spaces": True}),
    "ends_of_words": (ends_of_words, {}),
}
SLOW = "byt5"  # without a tokenizer.json


def make_tokenizer(kind: str, directory: Path) -> Path:
    if kind == SLOW:
        ByT5Tokenizer(extra_ids=0).save_pretrained(directory)
        return directory
    make, options = KINDS[kind]
    backend = make()
    backend.add_tokens(ADDED)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    ).save_pretrained(directory)
    return directory
