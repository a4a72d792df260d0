"""Spend at most so many tokens, or so much money, over requests that are under way at the same time.

What an answer will take is known before it is asked as an estimate alone: of the prompt the estimated tokens times the largest
ratio of counted to estimated tokens so far, of the answer the limit that the request sends. Until the first count, one request
is under way at a time. So the limit holds as long as no prompt's ratio is larger than all before it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from srcfast.errors import SrcfastError

LEAST = 64  # tokens that an answer is given at least, if it is not to have fewer anyway


class LimitReached(SrcfastError):
    """What is left of a budget is too little for a further request."""


@dataclass(frozen=True)
class Limit:
    """A limit, and what a token of a prompt and one of an answer cost of it."""

    name: str
    most: float
    prompt: float = 1.0
    completion: float = 1.0


class Budget:
    """What may be spent by the requests of all threads.

    Args:
        limits: all of which hold.
        prompt_tokens, completion_tokens: spent by earlier processes.
    """

    def __init__(self, limits: Sequence[Limit], prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        self._limits = tuple(limits)
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self._ratio: float | None = None  # largest of counted to estimated tokens of a prompt
        self._under_way: dict[int, tuple[float, int]] = {}  # of each request that has been granted: prompt, completion
        self._requests = 0
        self._changed = threading.Condition()

    def grant(self, estimate: float, wanted: int) -> tuple[int, int]:
        """Wait until a request fits into what is left; return its number, and how many tokens its answer may have.

        Args:
            estimate: tokens of the prompt.
            wanted: tokens that the answer should be allowed.

        Raises:
            LimitReached: it doesn't fit, and no request is under way that may leave something.
        """
        with self._changed:
            while True:
                prompt = estimate * (self._ratio or 1.0)
                granted = min([wanted, *(self._left(limit, prompt) for limit in self._limits)])
                # Without a limit there is nothing to learn from the first request alone.
                is_known = not self._limits or self._ratio is not None or not self._under_way
                if granted == wanted and is_known:
                    break
                if not self._under_way:
                    if granted >= min(wanted, LEAST):
                        break
                    raise LimitReached(self._reached())
                self._changed.wait()
            self._requests += 1
            self._under_way[self._requests] = (prompt, granted)
            return self._requests, granted

    def settle(self, request: int, estimate: float, used: tuple[int, int] | None) -> None:
        """Count what a granted request has taken, tokens of prompt and answer; None where it was not answered."""
        with self._changed:
            del self._under_way[request]
            if used is not None:
                self.prompt_tokens += used[0]
                self.completion_tokens += used[1]
                self._ratio = max(self._ratio or 0.0, used[0] / estimate)
            self._changed.notify_all()

    def _left(self, limit: Limit, prompt: float) -> int:
        """Return how many tokens an answer may have under a limit, beside all requests that are under way."""
        prompts = self.prompt_tokens + sum(each for each, _ in self._under_way.values()) + prompt
        completions = self.completion_tokens + sum(each for _, each in self._under_way.values())
        left = limit.most - prompts * limit.prompt - completions * limit.completion
        return int(left // limit.completion) if limit.completion else (1 << 30 if left >= 0 else -1)

    def _reached(self) -> str:
        spent = [
            f"{limit.name} {self.prompt_tokens * limit.prompt + self.completion_tokens * limit.completion:g} of {limit.most:g}"
            for limit in self._limits
        ]
        return f"the limit leaves too little for a further request: {', '.join(spent)}"
