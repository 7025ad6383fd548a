"""JSON requests to an environment server, with the session's cookies."""

import json
from typing import Any

from jaxrlhf.errors import Fault, UserError, one_line, short
from jaxrlhf.rewards.client import checked_url, without_secrets

MAX_BYTES = 10_000_000  # of a response


class JsonServer:
    """Sends JSON requests to the paths of one server. Cookies that it sets are sent back until `forget`.

    Raises `UserError` if the URL is not one of http or https. User and password in the URL are sent as basic
    authentication; messages show `name`, the URL without them. Redirects are not followed.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        import httpx2

        if not isinstance(url, str):
            raise UserError(f"url: must be text, not {short(url)}")
        checked_url(url, "url:")
        self._url, self.name = url.rstrip("/"), without_secrets(url).rstrip("/")
        # Compression is not accepted, because a small body could expand to much more than the limit.
        self._client = httpx2.Client(timeout=timeout, headers={"Accept-Encoding": "identity"}, follow_redirects=False)

    def forget(self) -> None:
        """Forgets the cookies, which ends the session on this side."""
        self._client.cookies.clear()

    def post(self, path: str, body: Any) -> tuple[int, str]:
        """Returns (status, text of the response). Raises `Fault` if the server does not answer."""
        import httpx2

        try:
            with self._client.stream("POST", self._url + path, json=body) as response:
                text = bytearray()
                for part in response.iter_bytes():
                    text += part
                    if len(text) > MAX_BYTES:
                        raise Fault(f"{self.name}{path}: the response has more than {MAX_BYTES:,} bytes")
                return response.status_code, text.decode(errors="replace")
        except httpx2.HTTPError as error:
            raise Fault(f"{self.name}{path}: {type(error).__name__}: {one_line(error)}") from error

    def ask(self, path: str, body: Any) -> dict[str, Any]:
        """Returns the JSON object of the response. Raises `Fault` for another status than 2xx or other content."""
        status, text = self.post(path, body)
        if not 200 <= status < 300:
            raise Fault(f"{self.name}{path}: status {status}: {short(text)}")
        return object_of(text, self.name + path)

    def close(self) -> None:
        self._client.close()


def object_of(text: str | bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object that a text holds. Raises `Fault` if it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Fault(f"{where}: the response is not a JSON object: {short(text)}")
    return value


def number_of(value: Any, where: str) -> float:
    """Returns a reward: null is 0. Raises `Fault` if it is no number."""
    if value is None:
        return 0.0
    if isinstance(value, int | float):
        return float(value)
    raise Fault(f"{where}: the reward must be a number or null, not {short(value)}")
