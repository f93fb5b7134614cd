"""Echo, as OpenAI's completions have it: the prompt's text and tokens stand in the answer, before what is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdecode.text.prompts import Prompt
from fastdecode.text.tokenizer import Tokenizer

_UNDECODABLE = "\ufffd"


@dataclass(frozen=True)
class Echo:
    """A prompt as an answer shows it."""

    text: str
    token_ids: Sequence[int]
    text_offsets: list[int]  # per token: where in `text` its own begins
    first_token: str  # its name, as log-probabilities have it; it has none itself


def make_echo(
    tokenizer: Tokenizer, prompt: Prompt, token_ids: Sequence[int], *, skip_special_tokens: bool, is_all: bool
) -> Echo:
    """prompt: as it was given, which is how it is shown; of token ids, what they say.  is_all: nothing is generated.

    Raises RequestError like `Tokenizer.encode`.
    """
    shown = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    given = shown if isinstance(shown, str) else None
    # With a beginning of sequence that the tokenizer has put there, or with special tokens that stand in the text.
    for are_skipped in (skip_special_tokens, not skip_special_tokens):
        said = tokenizer.output_text((), None, skip_special_tokens=are_skipped)
        for token_id in token_ids:
            said.push(token_id)
        num_certain = said.num_characters
        said.finish()
        whole, offsets = said.whole(said.num_characters), said.offsets
        if given is None or whole == given:
            break
    else:  # the tokenizer changes texts
        assert given is not None
        offsets = tokenizer.places(given) or offsets
    text = whole if given is None else given
    if given is None and not is_all:  # what is generated begins with a character that the prompt ends inside of
        text = whole[:num_certain] + whole[num_certain:].rstrip(_UNDECODABLE)
    name = tokenizer.piece(token_ids[0]).name
    return Echo(text, token_ids, [min(offset, len(text)) for offset in offsets], name)
