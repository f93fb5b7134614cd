"""Stop strings in a text that comes in parts: which is complete first, and how much may still become one.

The automaton of Aho and Corasick (1975): a step for each character, however many strings there are, wherever the
parts begin and end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Node:
    depth: int  # characters from the root
    next: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest other node that this one's string ends with; None: of the root
    longest: int = 0  # length of the longest stop string that ends here; 0: none does
    can_become: int = 0  # characters at the end of the text that the next ones may make a stop string of


class StopStrings:
    """Immutable; shared by all who look for them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.root = _Node(0)
        for stop in stops:
            node = self.root
            for character in stop:
                node = node.next.setdefault(character, _Node(node.depth + 1))
            node.longest = len(stop)
        queue = deque([self.root])
        while queue:
            node = queue.popleft()
            for character, child in node.next.items():
                child.fallback = self.root if node is self.root else self.step(node.fallback or self.root, character)
                child.longest = max(child.longest, child.fallback.longest)
                child.can_become = child.depth if child.next else child.fallback.can_become
                queue.append(child)

    def step(self, node: _Node, character: str) -> _Node:
        """From one node to that of the longest end of the text which begins a stop string."""
        while True:
            if (child := node.next.get(character)) is not None:
                return child
            if node.fallback is None:
                return node
            node = node.fallback


@dataclass(frozen=True)
class StopMatch:
    position: int  # in the text, where it begins
    stop: str

    @property
    def end(self) -> int:
        return self.position + len(self.stop)


class StopScan:
    """Of one text."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops, self._node, self._num_characters = stops, stops.root, 0
        self._recent = ""  # what the node stands for

    @property
    def num_uncertain(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return self._node.can_become

    def push(self, text: str) -> StopMatch | None:
        """The first that is complete in it; of several that end with the same character the longest."""
        match: StopMatch | None = None
        recent = self._recent + text
        for i, character in enumerate(text):
            self._node = self._stops.step(self._node, character)
            if match is None and (length := self._node.longest):
                end = len(self._recent) + i + 1
                match = StopMatch(self._num_characters + i + 1 - length, recent[end - length : end])
        self._num_characters += len(text)
        self._recent = recent[len(recent) - self._node.depth :]
        return match
