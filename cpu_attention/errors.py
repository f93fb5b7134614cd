"""What an R-worker refuses.  All are the caller's fault except where said; the worker's state is as before.

MessageRefused
├── KVBudgetExceeded     more KV than the budget holds; the text shows the arithmetic
├── UnknownSequence      a sequence that was never admitted, or is released
├── SequenceExists       admitted twice
└── BadRequest           out of turn or out of shape: wrong session, step, layer, position
"""

from __future__ import annotations


class MessageRefused(Exception):
    """Root of what an R-worker answers with a Failure."""


class KVBudgetExceeded(MessageRefused):
    pass


class UnknownSequence(MessageRefused, KeyError):
    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0])


class SequenceExists(MessageRefused):
    pass


class BadRequest(MessageRefused):
    pass
