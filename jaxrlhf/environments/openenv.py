"""Environments behind an OpenEnv server, by its HTTP or WebSocket protocol.

Source: https://huggingface.co/docs/openenv/guides/concepts and `src/openenv/core/env_server` (http_server.py, types.py,
serialization.py) of https://github.com/meta-pytorch/OpenEnv. TextArena games on an OpenEnv server have the same form,
see https://huggingface.co/docs/openenv/en/environments/textarena.
"""

import json
from typing import Any
from urllib.parse import urlsplit

from jaxrlhf.environments.remote import JsonServer, number_of, object_of
from jaxrlhf.errors import Fault, UserError, one_line, short
from jaxrlhf.rewards.client import without_secrets

# Fields of observations that hold text, in the order in which they are looked for.
TEXT_FIELDS = ("prompt", "text", "message", "content", "output", "stdout", "result")
SUCCESS = ("success", "is_success")


class OpenEnv:
    """A text environment on an OpenEnv server.

    The action of a turn is sent as `{action_field: text}`. The observation is the text of `observation_field`; if that
    is None, it is `prompt` and `messages` (TextArena's form), or the first field of `TEXT_FIELDS` that the observation
    has, or the whole observation as JSON. The row of data is sent as further parameters of reset.

    Args:
      url: `ws://HOST/ws` for a session, in which the server keeps an environment for this client; needs the package
        websockets. `http://HOST` uses the endpoints /reset and /step; current servers make a new environment for each
        HTTP request, so this fits only servers that keep one.
      action_field: field of the action that holds the text, such as "message" (TextArena) or "code".
      observation_field: field of the observation.
      timeout: seconds for a request.
    """

    def __init__(
        self, url: str, action_field: str = "message", observation_field: str | None = None, timeout: float = 60.0
    ) -> None:
        self.action_field, self.observation_field, self._seen = action_field, observation_field, 0
        self._server: _Socket | _Http
        self._server = _Socket(url, timeout) if urlsplit(url).scheme in ("ws", "wss") else _Http(url, timeout)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode. Raises `Fault` if the server does not answer in the protocol's form."""
        self._seen = 0
        result = self._server.reset(dict(options or {}) | ({} if seed is None else {"seed": seed}))
        return self._observation(result), self._info(result)

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Sends an action. `info` has `success` if the server tells it, and the server's `metadata`."""
        result = self._server.step({self.action_field: action})
        reward = number_of(result.get("reward"), self._server.name)
        return self._observation(result), reward, bool(result.get("done", False)), False, self._info(result)

    def close(self) -> None:
        self._server.close()

    def _observation(self, result: dict[str, Any]) -> list[dict[str, str]]:
        observation = result.get("observation")
        if not isinstance(observation, dict):
            raise Fault(f"{self._server.name}: the observation must be an object, not {short(observation)}")
        return [{"role": "user", "content": self._text(observation)}]

    def _text(self, observation: dict[str, Any]) -> str:
        if self.observation_field is not None:
            if self.observation_field not in observation:
                fields = ", ".join(observation) or "none"
                raise Fault(
                    f"{self._server.name}: the observation has no {self.observation_field}; its fields are: {fields}"
                )
            return _as_text(observation[self.observation_field])
        if isinstance(messages := observation.get("messages"), list):
            # The prompt is that of the game, in every observation. Messages may be all so far, or only the new ones.
            contents = [_as_text(message.get("content")) for message in messages if isinstance(message, dict)]
            first, self._seen = self._seen == 0, self._seen + 1
            prompt = _as_text(observation.get("prompt", ""))
            return "\n".join(text for text in ([prompt] if first else []) + contents if text)
        found = next((observation[name] for name in TEXT_FIELDS if name in observation), observation)
        return _as_text(found)

    def _info(self, result: dict[str, Any]) -> dict[str, Any]:
        info: dict[str, Any] = {}
        for source in (result, result.get("observation"), result.get("metadata")):
            if isinstance(source, dict):
                for name in SUCCESS:
                    if name in source:
                        info["success"] = bool(source[name])
        return info | ({"metadata": result["metadata"]} if "metadata" in result else {})


class _Http:
    def __init__(self, url: str, timeout: float) -> None:
        self._server = JsonServer(url, timeout)
        self.name = self._server.name

    def reset(self, parameters: dict[str, Any]) -> dict[str, Any]:
        self._server.forget()
        return self._server.ask("/reset", parameters)

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        return self._server.ask("/step", {"action": action})

    def close(self) -> None:
        self._server.close()


class _Socket:
    def __init__(self, url: str, timeout: float) -> None:
        try:
            from websockets.sync import client
        except ImportError:
            raise UserError("url: ws:// needs the package websockets: pip install websockets") from None
        self._url, self.name, self._timeout = url, without_secrets(url), timeout
        self._connect, self._socket = client.connect, None

    def reset(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            try:
                self._socket = self._connect(self._url, open_timeout=self._timeout, max_size=10_000_000)
            except Exception as error:  # OSError, or a class of the package
                raise Fault(f"{self.name}: {type(error).__name__}: {one_line(error)}") from error
        return self._exchange("reset", parameters)

    def step(self, action: dict[str, Any]) -> dict[str, Any]:
        return self._exchange("step", action)

    def _exchange(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            raise Fault(f"{self.name}: there is no session; call reset")
        try:
            self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = object_of(self._socket.recv(timeout=self._timeout), self.name)
        except Fault:
            raise
        except Exception as error:  # TimeoutError, or a class of the package
            self.close()
            raise Fault(f"{self.name}: {type(error).__name__}: {one_line(error)}") from error
        if answer.get("type") != "observation" or not isinstance(answer.get("data"), dict):
            raise Fault(f"{self.name}: {kind} was answered with {short(answer)}")
        return answer["data"]

    def close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
