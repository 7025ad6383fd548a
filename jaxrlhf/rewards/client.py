"""A client for JSON requests to one URL, with retries and a limited number of simultaneous requests.

After a failed connection, a timeout or a status 429 or 5xx, a request is sent again. The pause before it grows with
each retry. A Retry-After header can make the pause longer, up to `max_wait` seconds. Other failures raise `RewardFault`
immediately: any other status, a body of more than `max_bytes`, and a body that is not JSON. A redirect also raises
`RewardFault`, because the data must go only to the configured host.
"""

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from jaxrlhf.errors import UserError, one_line
from jaxrlhf.rewards.event_loop import run_async
from jaxrlhf.rewards.functions import RewardFault

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")


class Client:
    """Sends JSON requests to one URL.

    url         http or https; user and password in the URL are sent as basic authentication
    what        kind of server, for messages
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

    def __init__(
        self,
        url: str,
        what: str = "reward server",
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_bytes: int = 10_000_000,
        headers_env: str | None = None,
        concurrency: int = 4,
        max_wait: float = 30.0,
        say: Callable[[str], None] | None = None,
    ):
        parts = checked_url(url, "reward URL")
        host = parts.netloc.rpartition("@")[2]
        self.name = f"{parts.scheme}://{host}{parts.path}"
        self._url = parts._replace(netloc=host, fragment="").geturl()
        self._login = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
        if self._login and headers_env:
            raise UserError(
                f"reward URL {self.name}: the URL has a user, and {headers_env} has a token; use only one of them"
            )
        self._token = _token(headers_env, self.name) if headers_env else None
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_bytes, self.concurrency, self.max_wait = max_bytes, concurrency, max_wait
        self.say, self.source = say, f"{what} {self.name}"

    def send(self, requests: Sequence[bytes], read: Callable[[int, Any], T]) -> list[T]:
        """Returns `read(number, JSON of the response)` of each request, in the order of the requests."""
        try:
            return run_async(self._send(requests, read))
        except RewardFault:
            raise
        except Exception as error:  # such as an invalid proxy URL in the environment, or an invalid host name
            raise self.fault(f"{type(error).__name__}: {one_line(error)}") from error

    def fault(self, what: str) -> RewardFault:
        """Returns an error that names the server."""
        return RewardFault(f"{self.source}: {what}")

    async def _send(self, requests: Sequence[bytes], read: Callable[[int, Any], T]) -> list[T]:
        import httpx2

        # Compression is not accepted, because a small body could expand to much more than max_bytes.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx2.AsyncClient(
            headers=headers, auth=self._login, timeout=None, follow_redirects=False
        ) as client:

            async def one(number: int, request: bytes) -> T:
                async with slots:
                    return read(number, await self._exchange(client, request))

            tasks = [asyncio.ensure_future(one(*pair)) for pair in enumerate(requests)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # after a fault, the results of the other tasks are not needed
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _exchange(self, client: "httpx2.AsyncClient", request: bytes) -> Any:
        """Sends one request and returns the JSON of the response. A failed request is sent again."""
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
                    self.say(f"{self.source}: {problem}; trying again in {delay:.1f} s")
                await asyncio.sleep(delay)
        raise self.fault(f"{problem} (tried {self.retries + 1} times)")

    async def _try(self, client: "httpx2.AsyncClient", request: bytes) -> Any:
        async with client.stream("POST", self._url, content=request) as response:
            status = response.status_code
            if status == 429 or status >= 500:
                raise Unavailable(f"status {status}", _seconds(response.headers.get("Retry-After"), time.time()))
            if 300 <= status < 400:
                raise self.fault(f"status {status}, a redirect; set url to the target of the redirect")
            if status != 200:
                raise self.fault(f"the status must be 200, not {status}")
            body = await self._body(response)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.fault(f"the response is not JSON: {one_line(error)}") from error

    async def _body(self, response: "httpx2.Response") -> bytes:
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise self.fault(f"the response is encoded as {encoding[:40]!r}; the server must not encode responses")
        body = bytearray()
        async for chunk in response.aiter_raw(65536):
            body += chunk
            if len(body) > self.max_bytes:
                raise self.fault(f"the response is longer than {self.max_bytes} bytes")
        return bytes(body)


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


def checked_url(url: str, what: str) -> SplitResult:
    """Returns the parts of a URL. Raises UserError if the URL is invalid. `what` names it in the message.

    The message leaves out everything that may be a password.
    """
    import httpx2

    shown = without_secrets(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is checked when it is read
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"{what} {shown}: {without_secrets(one_line(error))}") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"{what} {shown}: the scheme is {parts.scheme or 'missing'}; a URL must begin with http:// or https://"
        )
    if re.search(r"[\s\x00-\x1f]", url):
        raise UserError(f"{what} {shown}: the URL has blanks; write %20 instead of a blank")
    if not host:
        raise UserError(f"{what} {shown}: the URL has no host; write a URL such as http://localhost:8000/score")
    return parts


def without_secrets(url: str) -> str:
    """Returns a URL for messages: without user, password, query and fragment."""
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
