"""A reward from an HTTP server. Requests and responses are JSON.

Each batch of completions is one POST request with content type application/json:

    {"prompts": ["..."], "completions": ["..."], "columns": {"NAME": [...], ...}}

All lists have the same length. `columns` holds the other columns of the data. A row without a column has null in this
column. The server responds with status 200 and a list with one entry per completion, in the same order. An entry is a
finite number, or null for a completion without a score:

    {"scores": [0.25, null, ...]}

After a failed connection, a timeout or a status 429 or 5xx, the request is sent again. The pause before it grows with
each retry. A Retry-After header can make the pause longer, up to `max_wait` seconds. Other failures raise `RewardFault`
immediately: any other status, a body of more than `max_bytes`, and a body of another form. A redirect also raises
`RewardFault`, because the data must go only to the configured host.
"""

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np

from jaxrlhf.data.sources import one_line
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, abstained_rows, with_abstained
from jaxrlhf.rewards.event_loop import run_async
from jaxrlhf.rewards.functions import RewardFault, checked_scores, columns_of

if TYPE_CHECKING:
    import httpx2


class HTTPReward:
    """A reward (see `completions.Reward`) from a server. The module docstring describes requests and responses.

    url         http or https; user and password in the URL are sent as basic authentication
    batch_size  completions per request
    timeout     seconds for one request, including the connection and the response
    retries     number of retries of a request
    backoff     seconds before the first retry; they double at each retry, up to `max_wait`, and a random part of up to
                half is subtracted
    max_bytes   longest response body, in bytes
    headers_env name of an environment variable that holds a token; sent as `Authorization: Bearer TOKEN`
    concurrency number of simultaneous requests
    say         receives one line before each retry; it is called from another thread

    Messages show the URL without user, password and query. The constructor raises `UserError` if the URL or the
    environment variable cannot be used. A call raises `RewardFault` if the server fails.
    """

    may_abstain = True

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_bytes: int = 10_000_000,
        headers_env: str | None = None,
        concurrency: int = 4,
        max_wait: float = 30.0,
        say: Callable[[str], None] | None = None,
    ):
        parts = _checked_url(url)
        host = parts.netloc.rpartition("@")[2]
        self.name = f"{parts.scheme}://{host}{parts.path}"
        self._url = parts._replace(netloc=host, fragment="").geturl()
        self._login = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
        if self._login and headers_env:
            raise UserError(
                f"reward URL {self.name}: the URL has a user, and {headers_env} has a token; use only one of them"
            )
        self._token = _token(headers_env, self.name) if headers_env else None
        self.batch_size, self.timeout, self.retries, self.backoff = batch_size, timeout, retries, backoff
        self.max_bytes, self.concurrency, self.max_wait = max_bytes, concurrency, max_wait
        self.say = say

    def __call__(self, completions: Completions) -> np.ndarray:
        count = len(completions.prompts)
        batches = [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        requests = [self._request(completions, rows) for rows in batches]
        try:
            return run_async(self._score(requests, [rows.stop - rows.start for rows in batches]))
        except RewardFault:
            raise
        except Exception as error:  # such as an invalid proxy URL in the environment, or an invalid host name
            raise self._fault(f"{type(error).__name__}: {one_line(error)}") from error

    async def _score(self, requests: list[bytes], counts: list[int]) -> np.ndarray:
        import httpx2

        # Compression is not accepted, because a small body could expand to much more than max_bytes.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(
            headers=headers, auth=self._login, timeout=None, follow_redirects=False
        ) as client:

            async def batch(request: bytes, count: int) -> np.ndarray:
                async with slots:
                    scores = await self._exchange(client, request)
                    return checked_scores(scores, count, f"reward server {self.name}")

            tasks = [asyncio.ensure_future(batch(*pair)) for pair in zip(requests, counts)]
            try:
                parts = [np.zeros(0, np.float32), *await asyncio.gather(*tasks)]
                return with_abstained(np.concatenate(parts), np.concatenate([abstained_rows(part) for part in parts]))
            finally:
                for task in tasks:  # after a fault, the results of the other tasks are not needed
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _request(self, completions: Completions, rows: slice) -> bytes:
        columns = columns_of(completions.rows[rows])
        for name, values in columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise self._fault(f"column {name} cannot be sent as JSON: {one_line(error)}") from error
        request = {"prompts": list(completions.prompts[rows]), "completions": completions.texts[rows]}
        return json.dumps(request | {"columns": columns}).encode()

    async def _exchange(self, client: "httpx2.AsyncClient", request: bytes) -> list:
        """Sends one request and returns the server's scores. A failed request is sent again."""
        import httpx2

        for attempt in range(self.retries + 1):
            retry_after = None
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._try(client, request)
            except Unavailable as error:
                problem, retry_after = str(error), error.retry_after
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            if attempt < self.retries:
                delay = retry_delay(attempt, retry_after, self.backoff, self.max_wait, random.random())
                if self.say is not None:
                    self.say(f"reward server {self.name}: {problem}; trying again in {delay:.1f} s")
                await asyncio.sleep(delay)
        raise self._fault(f"{problem} (tried {self.retries + 1} times)")

    async def _try(self, client: "httpx2.AsyncClient", request: bytes) -> list:
        async with client.stream("POST", self._url, content=request) as response:
            status = response.status_code
            if status == 429 or status >= 500:
                raise Unavailable(f"status {status}", _seconds(response.headers.get("Retry-After"), time.time()))
            if 300 <= status < 400:
                raise self._fault(f"status {status}, a redirect; set url to the target of the redirect")
            if status != 200:
                raise self._fault(f"the status must be 200, not {status}")
            return self._scores(await self._body(response))

    async def _body(self, response: "httpx2.Response") -> bytes:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise self._fault(f"the response is encoded as {encoding[:40]!r}; the server must not encode responses")
        body = bytearray()
        async for chunk in response.aiter_raw(65536):
            body += chunk
            if len(body) > self.max_bytes:
                raise self._fault(f"the response is longer than {self.max_bytes} bytes")
        return bytes(body)

    def _scores(self, body: bytes) -> list:
        try:
            response = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._fault(f"the response is not JSON: {one_line(error)}") from error
        if not isinstance(response, dict) or not isinstance(response.get("scores"), list):
            raise self._fault('the response must be {"scores": [numbers]}')
        return response["scores"]

    def _fault(self, what: str) -> RewardFault:
        return RewardFault(f"reward server {self.name}: {what}")


class Unavailable(Exception):
    """Raised if the server is temporarily unavailable. `retry_after` is the pause that it asks for, in seconds."""

    def __init__(self, what: str, retry_after: float | None):
        super().__init__(what)
        self.retry_after = retry_after


def retry_delay(attempt: int, retry_after: float | None, backoff: float, max_wait: float, jitter: float) -> float:
    """Returns the seconds to wait after attempt number `attempt`, counted from 0.

    `jitter` in [0, 1) shortens the wait by up to half, so that several clients do not retry at the same moment.
    """
    delay = min(max_wait, backoff * 2.0 ** min(attempt, 60)) * (1 - jitter / 2)
    return max(delay, min(retry_after or 0.0, max_wait))


def _seconds(retry_after: str | None, now: float) -> float | None:
    """Returns the seconds that a Retry-After header asks for.

    The header is a number or a date (RFC 9110, 10.2.3). Returns None for anything else.
    """
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _checked_url(url: str) -> SplitResult:
    """Returns the parts of a URL. Raises UserError if the URL is invalid.

    The message leaves out everything that may be a password.
    """
    import httpx2

    shown = _without_secrets(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is checked when it is read
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"reward URL {shown}: {_without_secrets(one_line(error))}") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"reward URL {shown}: the scheme is {parts.scheme or 'missing'}; a URL must begin with http:// or https://"
        )
    if re.search(r"[\s\x00-\x1f]", url):
        raise UserError(f"reward URL {shown}: the URL has blanks; write %20 instead of a blank")
    if not host:
        raise UserError(f"reward URL {shown}: the URL has no host; write a URL such as http://localhost:8000/score")
    return parts


def _without_secrets(url: str) -> str:
    bare = re.sub(r"[?#].*", "", url, flags=re.DOTALL)
    return re.sub(r"(//).*@", r"\1", bare, flags=re.DOTALL).encode("unicode_escape").decode()


def _token(variable: str, name: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"reward URL {name}: the environment variable {variable} is not set; set it to the token")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"reward URL {name}: the token in {variable} has blanks or other characters that a header must not contain"
        )
    return token
