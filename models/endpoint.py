# SPDX-License-Identifier: Apache-2.0
"""Language models behind any OpenAI-compatible endpoint, under a cap on what they may cost."""

import ipaddress
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from ..core.errors import ConfigError, FedsynthError
from .language import LanguageModel, Prompt, digest_of, side_by_side, tokens_likely
from .variation import Capabilities, Estimate

_MILLION = 1_000_000
_TURN_TOKENS = 64  # at most, that an endpoint puts around a turn
_SYSTEM_TOKENS = 1024  # at most, that it puts before a conversation
_CHARACTERS_A_TOKEN = 64  # a reply with more than that has not kept to max_tokens
_MOST_BYTES = 1 << 20  # of an answer, beyond its text
_MOST_WAIT_S = 300.0
_BUSY_S = 60.0
_UNREADABLE = "its answers are no chat completions"
_PASSING = {408, 409, 425, 429}  # beside all from 500 on: another try may mend it
_FREE = {429, 503}  # what nobody charges for
_THIS_PROMPT = {  # codes and types of a 4xx that concern one prompt alone
    "content_filter",
    "content_policy_violation",
    "context_length_exceeded",
    "exceed_context_size_error",
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REQUESTS = """
CREATE TABLE IF NOT EXISTS requests (
  number INTEGER PRIMARY KEY, endpoint TEXT NOT NULL, outcome TEXT NOT NULL, cost REAL NOT NULL,
  tokens_in INTEGER NOT NULL DEFAULT 0, tokens_out INTEGER NOT NULL DEFAULT 0)
"""


@dataclass(frozen=True)
class Spent:
    """What an endpoint was asked and what that cost, tries that failed among it.

    Attributes:
      requests: Sent.
      answered: That brought a reply.
      refused: Whose answer was that there is none: a filter, or a prompt that is too long.
      garbage: Whose answer was none that could be read.
      failed: Timed out, were turned away or broke off.
      tokens_in: Read, as the endpoint says.
      tokens_out: Written, as the endpoint says.
      cost: At the declared prices; the most that it can be where the endpoint did not say.
    """

    requests: int
    answered: int
    refused: int
    garbage: int
    failed: int
    tokens_in: int
    tokens_out: int
    cost: float


@dataclass(frozen=True)
class Endpoint(LanguageModel):
    """A model behind `POST {base_url}/chat/completions`, as OpenAI's, vLLM's and llama.cpp's.

    Time-outs, broken connections and statuses 408, 409, 425, 429 and 5xx are tried again, each
    time after twice as long, or as long as `Retry-After` says; if that does not mend them, the
    run stops and can be begun again. Answers that cannot be read are tried again too, and count
    as refusals in the end, unless the endpoint has said nothing else. Redirects are not followed.
    Beyond this machine, TLS is a must. No error and no log shows a prompt, a reply or the key.

    Attributes:
      base_url: Up to and with `/v1`; it holds no user, password or query.
      model: As the endpoint calls it.
      key_env: Environment variable that holds the key; empty: none is sent.
      timeout_s: Of one try, for connecting and for each part of the answer.
      max_retries: Tries after the first.
      backoff_s: Pause before the second try.
      requests_per_minute: At most, in this process; 0: any number.
      at_once: Requests side by side; so many replies a killed process may lose.
      price_in: Of a million tokens read.
      price_out: Of a million tokens written.
      max_cost: Never passed, in the currency of the prices: before a request is sent, the most
        that it can cost must fit beside all that was spent.
      spending: File that remembers what was spent. Empty: this process's memory alone, so that a
        run which is begun again may spend `max_cost` again.
      prefill: The endpoint goes on from a last turn of the model, as llama.cpp does, so that a
        reply can be made to begin with its opening.
      tokens_field: What the endpoint calls the limit of a reply.
      dry_run: Estimates only; nothing is sent.

    Privacy:
      The endpoint is shown all prompts, with the key's owner's name on them: candidates that came
      out of noisy votes, and public words.
    """

    base_url: str
    model: str
    key_env: str = ""
    timeout_s: float = 60.0
    max_retries: int = 4
    backoff_s: float = 1.0
    requests_per_minute: float = 0.0
    at_once: int = 4
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float = 0.0
    spending: str = ""
    prefill: bool = False
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    dry_run: bool = False
    name: ClassVar[str] = "endpoint"

    def __post_init__(self) -> None:
        """Check the address, the ranges, and that what costs has a cap."""
        _check_address(self.base_url)
        if self.key_env and not _VARIABLE.fullmatch(self.key_env):
            raise ConfigError(  # not its value: it may be the key itself
                "key_env is the name of an environment variable that holds the key, such as"
                " API_KEY; what it was set to is no such name"
            )
        if not (
            self.timeout_s > 0
            and 0 <= self.max_retries <= 100
            and self.backoff_s >= 0
            and self.requests_per_minute >= 0
            and 1 <= self.at_once <= 256
            and min(self.price_in, self.price_out, self.max_cost) >= 0
        ):
            raise ConfigError(
                "an endpoint needs timeout_s above 0, max_retries of 0 to 100, at_once of 1 to 256,"
                " and no negative backoff_s, requests_per_minute, price or max_cost"
            )
        if self.price_in + self.price_out > 0 and self.max_cost == 0:
            raise ConfigError("an endpoint with a price needs max_cost, the most that it may cost")

    @property
    def forces_openings(self) -> bool:
        """As `prefill` says."""
        return self.prefill

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """Each prompt's position and reply; `None` where the endpoint refused or told nonsense.

        Raises:
          ConfigError: The endpoint, the model or the key is wrong; or this is a dry run.
          FedsynthError: The endpoint cannot be had now, or `max_cost` would be passed. What was
            received is handed over first.
        """
        if self.dry_run:
            guess = self.estimate(prompts)
            raise ConfigError(
                f"a dry run sends nothing: {len(prompts)} prompts of about {guess.tokens_in:,}"
                f" tokens, with replies of up to {guess.tokens_out:,}, would cost about"
                f" {guess.cost:.4g}. Take dry_run out to send them"
            )
        import httpx

        self._purse()
        halt = _Halt()
        with httpx.Client(
            headers=self._headers(),
            timeout=self.timeout_s,
            follow_redirects=False,
            trust_env=not _is_here(self.base_url),  # proxies are for what is not on this machine
            limits=httpx.Limits(max_connections=self.at_once),
        ) as client:

            def ask(position: int) -> str | None:
                try:
                    return self._reply(client, prompts[position], halt)
                except FedsynthError as error:
                    raise halt.first(error) from None

            try:
                yield from side_by_side(ask, len(prompts), self.at_once)
            finally:
                halt.now.set()

    def fingerprint(self) -> str:
        """SHA-256 of address and model; what the endpoint runs under that name, only it knows."""
        return digest_of(
            {"model": [self.name, self.base_url, self.model], "prefill": self.prefill, "version": 1}
        )

    def capabilities(self) -> Capabilities:
        """Texts, from the endpoint, which need not say the same twice."""
        return Capabilities("text", sends_to=self.base_url, is_exact=False)

    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        """Tokens by a rule of thumb, and what they cost at the declared prices."""
        tokens_in, tokens_out = tokens_likely(prompts)
        return Estimate(tokens_in, tokens_out, cost=self._cost(tokens_in, tokens_out))

    def spent(self) -> Spent:
        """What this endpoint was asked and what it cost, as far as `spending` remembers."""
        return self._purse().spent(self._account())

    def _reply(self, client: Any, prompt: Prompt, halt: "_Halt") -> str | None:
        """The reply to one prompt, after as many tries as it takes.

        Raises:
          ConfigError: No try can help.
          FedsynthError: No try of those allowed helped, or none may be paid for.
        """
        body = json.dumps(self._request(prompt)).encode()
        problem = ""
        for tried in range(self.max_retries + 1):
            _pace(self.base_url, self.requests_per_minute).wait(halt.now)
            if halt.now.is_set():
                raise FedsynthError("nothing more was asked, since the replies are not wanted")
            answer = self._tried(client, prompt, body)
            if isinstance(answer, _Reply):
                halt.is_understood.set()
                return self._whole(prompt, answer.text)
            problem = answer.problem
            if tried < self.max_retries:
                halt.now.wait(max(answer.wait_s, self.backoff_s * 2.0**tried))
        if problem == _UNREADABLE and halt.is_understood.is_set():
            return None
        raise FedsynthError(
            f"{self._host()} could not be had: {problem}, after {self.max_retries + 1} tries. What"
            " was received is kept; begin again when it can be had"
        )

    def _tried(self, client: Any, prompt: Prompt, body: bytes) -> "_Reply | _Failure":
        """One try, and what it cost set down: the most it can be, until the answer says better."""
        import httpx

        purse, ticket = self._purse(), self._reserved(prompt)
        try:
            status, wait_s, answer = _exchange(client, self._url(), body, self._limits(prompt))
        except httpx.ConnectError as error:
            purse.settle(ticket, "failed", 0.0)
            if "CERTIFICATE" in str(error):
                raise ConfigError(
                    f"{self._host()} has no certificate that this machine trusts"
                ) from None
            return _Failure("no connection")
        except httpx.TimeoutException:
            purse.settle(ticket, "failed")
            return _Failure(f"no answer within {self.timeout_s:g} s")
        except httpx.TransportError:
            purse.settle(ticket, "failed")
            return _Failure("the connection broke off")
        if status in _PASSING or status >= 500:
            purse.settle(ticket, "failed", 0.0 if status in _FREE else None)
            return _Failure(f"status {status}", self._bearable(wait_s))
        if status == 200:
            return self._read(ticket, prompt, answer)
        is_refused = status in (400, 413, 422) and _codes(answer) & _THIS_PROMPT
        purse.settle(ticket, "refused" if is_refused else "failed", 0.0)
        if is_refused:
            return _Reply(None)
        raise ConfigError(f"{self._host()} turned a request down with {self._why(status)}")

    def _read(self, ticket: int, prompt: Prompt, answer: bytes | None) -> "_Reply | _Failure":
        """What a successful answer says."""
        said = _parsed(answer)
        tokens = _usage(said)
        cost = None if tokens is None else self._cost(*tokens)
        reply = _reply_in(said, most=_CHARACTERS_A_TOKEN * prompt.max_tokens)
        if reply is None:
            self._purse().settle(ticket, "garbage", cost, tokens)
            return _Failure(_UNREADABLE)
        self._purse().settle(ticket, "answered" if reply.text else "refused", cost, tokens)
        return reply

    def _whole(self, prompt: Prompt, text: str | None) -> str | None:
        """A reply with its opening, which some endpoints do not repeat."""
        if text is None or not self.prefill or text.startswith(prompt.opening):
            return text
        return prompt.opening + text

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        """What is sent."""
        request: dict[str, Any] = {
            "model": self.model,
            "messages": prompt.messages(is_opened=self.prefill),
            self.tokens_field: prompt.max_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stream": False,
        }
        return request | ({"stop": list(prompt.stop)} if prompt.stop else {})

    def _headers(self) -> dict[str, str]:
        """The key, and that answers come as they are.

        Raises:
          ConfigError: The variable is not set, or holds what no header can.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key_env:
            key = os.environ.get(self.key_env, "").strip()
            if not key or not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"the environment variable {self.key_env} should hold the key of"
                    f" {self._host()}, and is {'not set' if not key else 'not printable ASCII'}"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _reserved(self, prompt: Prompt) -> int:
        """Number under which the most that a request can cost was set aside.

        Raises:
          FedsynthError: It does not fit under the cap; nothing was sent.
        """
        turns = prompt.messages(is_opened=self.prefill)
        # a token has at least one byte
        tokens_in = sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in turns)
        worst = self._cost(tokens_in + _SYSTEM_TOKENS, prompt.max_tokens)
        return self._purse().reserve(self._account(), worst, self.max_cost)

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        """Of so many tokens, at the declared prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / _MILLION

    def _purse(self) -> "_Purse":
        """What remembers the spending, one for all models of this process that name the file."""
        return _purse(os.getpid(), self.spending)

    def _account(self) -> str:
        """Under which spending is remembered."""
        return f"{self.base_url} {self.model}"

    def _url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def _host(self) -> str:
        """The endpoint in an error's words."""
        return f"endpoint {urlsplit(self.base_url).netloc}"

    def _limits(self, prompt: Prompt) -> "_Limits":
        """What an answer may take."""
        most = _MOST_BYTES + 4 * _CHARACTERS_A_TOKEN * prompt.max_tokens
        return _Limits(most, time.monotonic() + self.timeout_s)

    def _bearable(self, wait_s: float) -> float:
        """The pause that an endpoint asks for.

        Raises:
          FedsynthError: It is longer than a run should wait.
        """
        if wait_s > _MOST_WAIT_S:
            raise FedsynthError(
                f"{self._host()} asks to wait {wait_s:.0f} s. What was received is kept; begin"
                " again then"
            )
        return wait_s

    def _why(self, status: int) -> str:
        """A status and what to do about it."""
        if status in (401, 403):
            return f"status {status}: check the key that {self.key_env or 'key_env'} names"
        if status == 404:
            return f"status 404: it has no {urlsplit(self._url()).path} or no {self.model!r}"
        if 300 <= status < 400:
            return f"status {status}: a redirect is not followed; set base_url to where it leads"
        return f"status {status}: a request like this is not one that it takes"


@dataclass(frozen=True)
class _Reply:
    """A final answer; `None`: that there is none."""

    text: str | None


@dataclass(frozen=True)
class _Failure:
    """What another try may mend, and how long the endpoint asks to wait before it."""

    problem: str
    wait_s: float = 0.0


@dataclass(frozen=True)
class _Limits:
    """What is read of an answer: so many bytes, until this moment of the monotonic clock."""

    most_bytes: int
    until: float


def _exchange(
    client: Any, url: str, body: bytes, limits: _Limits
) -> tuple[int, float, bytes | None]:
    """Status, seconds that `Retry-After` asks for, and content if that is within the limits."""
    import httpx

    with client.stream("POST", url, content=body) as response:
        wait_s = _seconds(response.headers.get("Retry-After", ""))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            return response.status_code, wait_s, None
        content = bytearray()
        for part in response.iter_raw():
            content += part
            if len(content) > limits.most_bytes:
                return response.status_code, wait_s, None
            if time.monotonic() > limits.until:
                raise httpx.ReadTimeout("the answer came too slowly")
        return response.status_code, wait_s, bytes(content)


def _parsed(answer: bytes | None) -> Any:
    """An answer's JSON, or `None`."""
    try:
        return json.loads((answer or b"").decode())
    except (ValueError, RecursionError):
        return None


def _reply_in(said: Any, *, most: int) -> _Reply | None:
    """The reply in an answer; `None`: the answer is none."""
    try:
        choice = said["choices"][0]
        message = choice["message"]
        text = message.get("content")
        is_refused = choice.get("finish_reason") == "content_filter" or message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    if is_refused or text is None or text == "":
        return _Reply(None)
    if not isinstance(text, str) or len(text) > most:
        return None
    return _Reply(text)


def _usage(said: Any) -> tuple[int, int] | None:
    """Tokens read and written, if an answer says."""
    try:
        tokens = said["usage"]["prompt_tokens"], said["usage"]["completion_tokens"]
    except (TypeError, KeyError):
        return None
    if any(type(count) is not int or not 0 <= count < 1 << 53 for count in tokens):
        return None
    return tokens


def _codes(answer: bytes | None) -> set[str]:
    """Code and type of an error's answer."""
    said = _parsed(answer)
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict):
        return set()
    return {str(error.get("code")), str(error.get("type"))}


def _seconds(retry_after: str) -> float:
    """What `Retry-After` asks for, be it seconds or a date; 0 if neither."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(until.tzinfo or UTC)).total_seconds())


class _Halt:
    """Whether the requests that run side by side should end, and what ended them.

    Attributes:
      now: They should.
      is_understood: The endpoint has said something that could be read.
    """

    def __init__(self) -> None:
        self.now = threading.Event()
        self.is_understood = threading.Event()
        self._error: FedsynthError | None = None
        self._lock = threading.Lock()

    def first(self, error: FedsynthError) -> FedsynthError:
        """Halt; the first error of all, which the others only follow."""
        with self._lock:
            self._error = self._error or error
            self.now.set()
            return self._error


class _Pace:
    """Lets requests begin no faster than so many a minute."""

    def __init__(self, per_minute: float) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, halt: threading.Event) -> None:
        """Return when it is this request's turn, or when all is to halt."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap_s
        halt.wait(max(0.0, turn - time.monotonic()))


_opening = threading.Lock()


def _pace(base_url: str, per_minute: float) -> _Pace:
    """The pace of all requests of this process to one endpoint."""
    with _opening:
        return _paces(base_url, per_minute)


@cache
def _paces(base_url: str, per_minute: float) -> _Pace:
    """One pace for each endpoint."""
    return _Pace(per_minute)


class _Purse:
    """What was spent, request by request, each set down before it is sent."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._whole():
            self._db = sqlite3.connect(
                path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(_REQUESTS)

    def reserve(self, account: str, worst: float, cap: float) -> int:
        """Set the most that a request can cost aside, and its number in the file.

        Raises:
          FedsynthError: It would pass the cap.
        """
        with self._lock, self._whole():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                (spent,) = self._db.execute(
                    "SELECT total(cost) FROM requests WHERE endpoint = ?", (account,)
                ).fetchone()
                if spent + worst > cap and worst > 0:
                    raise FedsynthError(
                        f"the next request may cost up to {worst:.4g}, and {spent:.4g} of max_cost"
                        f" = {cap:.4g} is spent; it was not sent. What was received is kept: raise"
                        " max_cost and begin again"
                    )
                row = self._db.execute(
                    "INSERT INTO requests (endpoint, outcome, cost) VALUES (?, 'sent', ?)",
                    (account, worst),
                )
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        return int(row.lastrowid or 0)

    def settle(
        self,
        ticket: int,
        outcome: str,
        cost: float | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """Set down what became of a request, and what it really cost if that is known."""
        tokens_in, tokens_out = tokens or (0, 0)
        with self._lock, self._whole():
            self._db.execute(
                "UPDATE requests SET outcome = ?, cost = coalesce(?, cost), tokens_in = ?,"
                " tokens_out = ? WHERE number = ?",
                (outcome, cost, tokens_in, tokens_out, ticket),
            )

    def spent(self, account: str) -> Spent:
        """All that one endpoint was asked."""
        with self._lock, self._whole():
            rows = self._db.execute(
                "SELECT outcome, count(*), sum(tokens_in), sum(tokens_out), sum(cost)"
                " FROM requests WHERE endpoint = ? GROUP BY outcome",
                (account,),
            ).fetchall()
        counts = {outcome: count for outcome, count, *_ in rows}
        return Spent(
            requests=sum(counts.values()),
            answered=counts.get("answered", 0),
            refused=counts.get("refused", 0),
            garbage=counts.get("garbage", 0),
            failed=counts.get("failed", 0),
            tokens_in=sum(row[2] for row in rows),
            tokens_out=sum(row[3] for row in rows),
            cost=sum(row[4] for row in rows),
        )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn what SQLite says into an error of this package."""
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"cannot keep what was spent in {self._path}: {error}. Name a file that can be"
                " written to, and that holds nothing else"
            ) from error


def _purse(process: int, path: str) -> _Purse:
    """The purse of a file, or of this process."""
    with _opening:
        return _purses(process, path)


@cache
def _purses(process: int, path: str) -> _Purse:
    """One purse for each file; a forked child opens its own."""
    return _Purse(path)


def _check_address(base_url: str) -> None:
    """Refuse an address that is none, that would show a secret, or that is not safe.

    Raises:
      ConfigError: It is so.
    """
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError("base_url must be an address such as https://example.org/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "base_url must hold no user, password, query or fragment; a key goes into the"
            " environment variable that key_env names"
        )
    if parts.scheme == "http" and not _is_here(base_url):
        raise ConfigError(
            f"base_url: {host} is another machine, so its address must begin with https://"
        )


def _is_here(base_url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
