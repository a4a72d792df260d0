"""Send one chat request to an OpenAI-compatible endpoint, again where that helps; the key is in no message of an error.

The protocol is `POST {url}/chat/completions` of OpenAI's API, as vLLM, SGLang, llama.cpp and providers serve it. The standard
library's HTTP client does: requests are few and long.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srcfast.data.jsonl import parse_object
from srcfast.errors import ConfigError, SrcfastError, shorten

KEY = "OPENAI_API_KEY"  # environment variable
MAX_REPLY = 16 << 20  # bytes
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529)  # statuses that may pass
THIS_REQUEST = (400, 413, 415, 422)  # what is asked can't be answered; another request can
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(SrcfastError):
    """The endpoint refuses this request, and would again; others may be answered."""


class Unanswered(SrcfastError):
    """All attempts at a request failed in ways that may pass: the same request may be answered later."""


class EndpointError(SrcfastError):
    """The endpoint refuses all requests: the key, the address or the model's name is wrong."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, whom, and how long to wait.

    Attributes:
        url: base address, as http://HOST:PORT/v1.
        model: name that the endpoint has for the model.
        timeout: seconds until an attempt counts as failed.
        attempts: at one request, before it counts as unanswered.
        key: sent as a bearer token; None where the environment has none.
    """

    url: str
    model: str
    timeout: float = 120.0
    attempts: int = 8
    key: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, url: str, model: str, timeout: float, option: str = "--endpoint") -> Endpoint:
        """Check an address, and read the key from the environment.

        Args:
            option: that names the address in errors.

        Raises:
            ConfigError: the address is none of HTTP, or has a name and password in it; or the key can't be sent.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{option}: expected no name or password in the address, found some. Fix: set {KEY}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            shown = parts._replace(query="", fragment="").geturl()  # a query may be a key
            more = " with a query" if parts.query or parts.fragment else ""
            raise ConfigError(f"{option}: expected http://HOST:PORT/v1, found {shown!r}{more}")
        key = os.environ.get(KEY, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError(f"{KEY}: expected a key of visible ASCII characters, found others")
        return cls(url.rstrip("/"), model, timeout, key=key or None)

    def without_key(self, text: str) -> str:
        """Return a text of the endpoint without the key, which some servers quote."""
        return text if self.key is None else text.replace(self.key, f"${KEY}")


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: of the message.
        truncated: whether the limit of tokens ended it.
        prompt_tokens, completion_tokens: that the endpoint counted; None where it doesn't say.
        first_token: log-probabilities of what the first token may be, the likeliest ones; None where it doesn't say.
    """

    text: str
    truncated: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    first_token: Mapping[str, float] | None = None


def ask(endpoint: Endpoint, body: Mapping[str, Any], stop: threading.Event) -> Answer:
    """Send a chat request until it is answered.

    Args:
        body: of the request, without the model's name.
        stop: ends the wait between two attempts.

    Raises:
        Refused: the endpoint refuses this request.
        Unanswered: all attempts failed, or `stop` was set between two.
        EndpointError: the endpoint refuses every request.
    """
    data = json.dumps({"model": endpoint.model, **body}).encode("utf-8")
    for attempt in range(endpoint.attempts):
        try:
            return read_answer(_post(endpoint, data))
        except _MayPass as error:
            reason = endpoint.without_key(str(error))
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)
            if attempt + 1 == endpoint.attempts or stop.wait(max(wait, min(error.wait, LONGEST_WAIT))):
                break
    raise Unanswered(f"{endpoint.url}: expected an answer, found {reason} at attempt {attempt + 1}")


def read_answer(reply: bytes) -> Answer:
    """Read the first choice of a reply. Raises an error that may pass where the reply is not what the protocol says."""
    try:
        row = parse_object(reply)
        choice = row["choices"][0]
        text, usage = choice["message"]["content"], row.get("usage") or {}
        if text is None and choice.get("finish_reason") == "length":
            text = ""  # all of its tokens were thoughts, which the server sets apart
        if not isinstance(text, str):
            raise TypeError(f"a content of type {type(text).__name__}")
        counts = [usage.get(f"{part}_tokens") for part in ("prompt", "completion")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _MayPass(f"a reply that is no chat completion ({type(error).__name__}: {error})") from error
    prompt, completion = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return Answer(
        text, choice.get("finish_reason") == "length", prompt, completion, _first_token(choice.get("logprobs"))
    )


def without_thoughts(text: str) -> str:
    """Return an answer without what a model that thinks before it replies has written first."""
    return _THOUGHTS.sub("", text)


def _first_token(logprobs: Any) -> dict[str, float] | None:
    """Read the alternatives of an answer's first token; None where they are not there in the protocol's form."""
    try:
        alternatives = logprobs["content"][0]["top_logprobs"]
        read = {str(each["token"]): each["logprob"] for each in alternatives}
    except (LookupError, TypeError):
        return None
    return read if read and all(type(value) in (int, float) and value <= 0 for value in read.values()) else None


class _MayPass(Exception):
    """An attempt failed, and another may not; `wait`: seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key would be sent to another address."""

    def redirect_request(self, *_: Any) -> None:
        """Return that there is no further request, so that the status is an error."""


def _post(endpoint: Endpoint, data: bytes) -> bytes:
    """Send one attempt and return the reply's body."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", data, headers, method="POST")
    # A proxy of the environment can't reach this machine's own servers.
    is_local = urllib.parse.urlsplit(endpoint.url).hostname in LOOPBACK
    opener = urllib.request.build_opener(_NoRedirect(), *([urllib.request.ProxyHandler({})] if is_local else []))
    deadline = time.monotonic() + endpoint.timeout
    try:
        with opener.open(request, timeout=endpoint.timeout) as response:
            return _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _error_of(endpoint, error, deadline) from None
    except (OSError, http.client.HTTPException) as error:  # refused, cut, timed out, no name of a host, no HTTP
        raise _MayPass(f"{type(error).__name__}: {error}") from error


def _read(response: Any, deadline: float) -> bytes:
    """Read a body until its end, at most MAX_REPLY bytes, and until the deadline: a timeout of the socket is for each piece."""
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_REPLY:
            raise _MayPass(f"a reply of more than {MAX_REPLY >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return b"".join(pieces)  # a body that was cut is no JSON


def _error_of(endpoint: Endpoint, error: urllib.error.HTTPError, deadline: float) -> Exception:
    """Return the exception that stands for an HTTP status other than 200."""
    try:
        said = _read(error, deadline).decode("utf-8", "replace").strip()
    except (_MayPass, OSError, http.client.HTTPException):
        said = ""
    status = f"HTTP status {error.code}" + (f": {shorten(endpoint.without_key(said))}" if said else "")
    if error.code in AGAIN:
        return _MayPass(status, _seconds(error.headers.get("Retry-After")))
    if error.code in THIS_REQUEST:
        return Refused(f"{endpoint.url}: expected an answer, found {status}")
    fix = f"see to the address, the model's name ({endpoint.model}) and the key in {KEY}"
    return EndpointError(f"{endpoint.url}: expected an answer, found {status}. Fix: {fix}")


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a Retry-After header asks to wait: a number, or a date; 0 for anything else."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
