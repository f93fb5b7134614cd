"""The kernels an R-worker has, one set for each kind of layer; and how many kinds it puts up with.

Compiling takes seconds, ten MiB stay behind, and no other message is read meanwhile: a peer that asks for layers that
all differ would have a worker for hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from cpu_attention import kernel as compiled
from cpu_attention.errors import BadRequest
from cpu_attention.layout import AttentionRule, HeadFormat

logger = logging.getLogger(__name__)

MAX_KINDS = 64  # in a worker's life; models have one to three


class WarmKernels:
    def __init__(self) -> None:
        self._known: set[tuple[HeadFormat, int, bool]] = set()

    def prepare(self, layers: Sequence[tuple[HeadFormat, int, AttentionRule]]) -> None:
        """Kernels for these layers: (head, query heads per KV head, rule).  Raises BadRequest, then before any work.

        Says what it does: the first time on a machine takes seconds.
        """
        kinds = {(head, group, rule.softcap is not None): rule for head, group, rule in layers}
        if len(kinds.keys() | self._known) > MAX_KINDS:
            raise BadRequest(
                f"{len(kinds)} kinds of layers were asked for, {len(self._known)} have been compiled; an R-worker "
                f"takes {MAX_KINDS}. If your model needs others than those, start the R-worker anew"
            )
        for (head, group, is_capped), rule in kinds.items():
            started = time.perf_counter()
            logger.info("kernels for %s KV, head_dim %d, %d query heads per KV head", head.dtype, head.head_dim, group)
            compiled.warm_up(head, group, rule)
            self._known.add((head, group, is_capped))
            logger.info("ready after %.1f s", time.perf_counter() - started)
