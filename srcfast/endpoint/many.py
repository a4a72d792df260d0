"""Ask many requests at the same time, within a limit, a budget and a log of answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from srcfast.endpoint.answer_log import AnswerLog, content_key
from srcfast.endpoint.budget import Budget, LimitReached
from srcfast.endpoint.client import Answer, Endpoint, EndpointError, Refused, Unanswered, ask
from srcfast.errors import InputError
from srcfast.run import signals

FAILURES = 8  # requests that fail one after the other before the endpoint counts as unreachable

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Body:
    """A request, and what identifies it: the content has hashes in place of pictures.

    The body is written only if the log has no answer: its pictures take longest.
    """

    body: Callable[[], Mapping[str, Any]]
    content: Mapping[str, Any]
    estimate: float  # tokens of the prompt
    max_tokens: int  # that the answer should be allowed


@dataclass(frozen=True)
class Request(Generic[Owner]):
    """A request of a sample; its body is built when it is sent, so that the pictures of few are in memory."""

    owner: Owner
    build: Callable[[], Body]


Outcome = Answer | Refused | Unanswered | InputError  # the last: the body can't be built
Following = Callable[[Owner, Outcome], Request[Owner] | None]  # returns what is to be asked next


def ask_many(
    endpoint: Endpoint,
    requests: Iterator[Request[Owner]],
    following: Following[Owner],
    log: AnswerLog,
    budget: Budget,
    concurrency: int,
) -> None:
    """Ask requests and those that follow from their answers, up to `concurrency` at a time.

    Answers are in the log before `following`, which this thread calls, has them. A signal ends it once the requests that are
    under way are answered; a second one at once.

    Raises:
        LimitReached: the budget is spent; what was under way has been answered.
        EndpointError: the endpoint refuses all requests, or FAILURES of them failed one after the other.
        Interrupted: a signal.
    """
    from srcfast import distributed  # here, since commands that need no PyTorch read settings of judges, too

    jobs: queue.SimpleQueue[Request[Owner] | None] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[Request[Owner], Outcome | BaseException]] = queue.SimpleQueue()
    stop = threading.Event()  # no further request is sent

    def work() -> None:
        while (job := jobs.get()) is not None:
            try:
                outcomes.put((job, _answer(endpoint, job.build(), log, budget, stop)))
            except BaseException as error:  # the main thread handles it
                outcomes.put((job, error))

    # As daemons, they end with the process when a second signal stops it.
    for _ in range(concurrency):
        threading.Thread(target=work, daemon=True).start()
    under_way, failures, is_answering = 0, 0, False
    ended: BaseException | None = None  # why nothing more is asked
    try:
        with signals.at_boundaries():
            while True:
                while not stop.is_set() and under_way < concurrency and (request := next(requests, None)) is not None:
                    jobs.put(request)
                    under_way += 1
                if not under_way:
                    break
                distributed.heartbeat()  # other ranks may wait while an attempt is repeated
                try:
                    job, outcome = outcomes.get(timeout=0.2)
                except queue.Empty:
                    continue
                finally:
                    if signals.pending():
                        stop.set()
                under_way -= 1
                if isinstance(outcome, Answer):
                    is_answering, failures = True, 0
                elif isinstance(outcome, Unanswered) or (isinstance(outcome, Refused) and not is_answering):
                    failures += 1
                if not isinstance(outcome, Answer | Refused | Unanswered | InputError):
                    ended = ended or outcome
                elif failures == FAILURES:
                    ended = ended or EndpointError(f"{FAILURES} requests failed in a row; the last: {outcome}")
                elif (more := following(job.owner, outcome)) is not None and not stop.is_set():
                    jobs.put(more)
                    under_way += 1
                if ended is not None:
                    stop.set()
            if ended is None:
                signals.stop_if_pending()
    finally:
        stop.set()
        for _ in range(concurrency):
            jobs.put(None)
    if ended is not None:
        raise ended


def _answer(endpoint: Endpoint, body: Body, log: AnswerLog, budget: Budget, stop: threading.Event) -> Answer:
    """Return the answer to a request: the log's, else the endpoint's, which is then in the log."""
    key = content_key({"model": endpoint.model, **body.content})
    with log.claimed(key) as known:
        if known is not None:
            return known
        number, granted = budget.grant(body.estimate, body.max_tokens)
        used = None
        try:
            if stop.is_set():
                raise Unanswered("stopped before the request was sent")
            answer = ask(endpoint, {**body.body(), "max_tokens": granted}, stop)
            used = (
                round(body.estimate) if answer.prompt_tokens is None else answer.prompt_tokens,
                granted if answer.completion_tokens is None else answer.completion_tokens,
            )
            # What the rest of a budget has cut off is no answer to the request, but has been paid.
            is_cut = answer.truncated and granted < body.max_tokens
            log.add(key, None if is_cut else answer, used)
        finally:
            budget.settle(number, body.estimate, used)
        if is_cut:
            raise LimitReached(f"the limit left {granted} tokens for an answer, which were too few")
        return answer
