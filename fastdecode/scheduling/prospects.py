"""What a sequence will come to: how long its output gets, and what KV it will hold until then.  Pure."""

from __future__ import annotations

from typing import NamedTuple

from fastdecode.scheduling.load import Demand
from fastdecode.scheduling.predictor import Prediction, Predictor
from fastdecode.scheduling.request import Sequence


class Prospect(NamedTuple):
    """What a sequence will hold if it starts in the step at hand."""

    limit: Demand  # up to the end that was predicted with confidence
    mean: Demand | None  # up to the mean one; None: nothing is known but that it may take all it is allowed
    prediction: Prediction
    max_kv_tokens: int

    def less(self, num_tokens: int) -> Prospect:
        """If so many tokens of it are another's all the while."""
        if not num_tokens:
            return self
        mean = self.mean and self.mean._replace(first=self.mean.first - num_tokens)
        return self._replace(limit=self.limit._replace(first=self.limit.first - num_tokens), mean=mean)


class Prospects:
    def __init__(self, predictor: Predictor, quantile: float) -> None:
        """quantile: the share of outputs that are not to outlive what is expected of them."""
        self._predictor, self._quantile = predictor, quantile

    def of(self, sequence: Sequence, first_step: int, last_chunk: int) -> Prospect:
        """If it starts in `first_step` and the last part of its prompt comes in `last_chunk`."""
        done = len(sequence.output_token_ids)
        expected = max(self.expected_tokens(sequence) - done, 1)  # what generates nothing is there for its prompt
        limit = Demand(first_step, last_chunk + expected - 1, sequence.num_tokens)
        prediction = self._predict(sequence)
        if not prediction.is_informed:
            return Prospect(limit, None, prediction, sequence.max_kv_tokens)
        mean = min(round(prediction.mean(done)), sequence.request.max_new_tokens) - done
        until_mean = Demand(first_step, last_chunk + max(mean, 1) - 1, sequence.num_tokens)
        return Prospect(limit, until_mean, prediction, sequence.max_kv_tokens)

    def expected_tokens(self, sequence: Sequence) -> int:
        """Of output, in all: what it will not exceed, with the confidence asked for.  More than it has already."""
        done, most = len(sequence.output_token_ids), sequence.request.max_new_tokens
        return min(self._predict(sequence).quantile(self._quantile, done), most)

    def job_length(self, sequence: Sequence) -> float:
        """Tokens that it still takes through the model, as far as can be told."""
        done, most = len(sequence.output_token_ids), sequence.request.max_new_tokens
        return sequence.num_tokens + min(self._predict(sequence).mean(done), most) - done

    def learn(self, sequence: Sequence) -> None:
        """From one that has ended by itself or at its limit."""
        if sequence.finish_reason and not sequence.request.length_is_known:
            self._predictor.observe(
                len(sequence.request.prompt_token_ids),
                len(sequence.output_token_ids),
                was_cut=sequence.finish_reason == "length",
            )

    def _predict(self, sequence: Sequence) -> Prediction:
        if sequence.prediction is None:
            request = sequence.request
            if request.length_is_known:
                sequence.prediction = Prediction((request.max_new_tokens,), (1.0,))
            else:
                sequence.prediction = self._predictor.predict(
                    len(request.prompt_token_ids), request.max_new_tokens, request.true_output_tokens
                )
        return sequence.prediction
