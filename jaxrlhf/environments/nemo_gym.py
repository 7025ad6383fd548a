"""Environments behind a resources server of NeMo Gym: tools and a verifier, by HTTP.

Source: https://docs.nvidia.com/nemo/gym (resources servers: /seed_session, one endpoint for each tool, /verify) and, in
https://github.com/NVIDIA-NeMo/Gym, nemo_gym/base_resources_server.py and the loop of responses_api_agents/simple_agent.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from jaxrlhf.environments.remote import JsonServer, number_of
from jaxrlhf.environments.tool_calls import PARSERS, Call
from jaxrlhf.environments.tools import NO_CALLS_LEFT
from jaxrlhf.errors import UserError, short

PARAMETERS = "responses_create_params"


class NeMoGym:
    """A text environment on a NeMo Gym resources server.

    `reset` gets a row of a NeMo Gym data set: `responses_create_params` with `input` (text or messages) and `tools`,
    and the columns that the verifier needs. A turn with tool calls sends each call to the tool's endpoint and answers
    with messages of the role `tool`. A turn without a call ends the episode: the whole transcript goes to /verify,
    whose `reward` is the reward. `info` of reset has `tools`, the schemas for the chat template.

    Args:
      url: URL of the resources server.
      parser: the name of the model family's format in `tool_calls.PARSERS`, but not `plain`: an endpoint takes named
        arguments.
      max_calls: calls in an episode. Further calls get an error, and a second turn with them truncates the episode
        with the reward 0.
      success_at: an answer with at least this reward is a success.
      timeout: seconds for a request.
      max_chars: longest answer of a tool; longer ones are cut for the model.
    """

    def __init__(
        self,
        url: str,
        parser: str = "hermes",
        max_calls: int = 8,
        success_at: float = 1.0,
        timeout: float = 60.0,
        max_chars: int = 4000,
    ) -> None:
        known = [name for name in PARSERS if name != "plain"]  # its calls have no names of arguments
        if parser not in known:
            raise UserError(f"parser: must be one of {', '.join(known)}, not {parser!r}")
        self.parse, self.max_calls, self.success_at, self.max_chars = PARSERS[parser], max_calls, success_at, max_chars
        self._server = JsonServer(url, timeout)
        self._row: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Opens a session for a row. Raises `UserError` if the row has no question, `Fault` if the server fails."""
        row = dict(options or {})
        parameters = row.get(PARAMETERS)
        asked = parameters.get("input") if isinstance(parameters, Mapping) else None
        if not asked:
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(f"a row of NeMo Gym needs {PARAMETERS} with an input; its columns are: {columns}")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(m) for m in asked]
        self._server.forget()
        self._server.ask("/seed_session", row)
        self._row, self._output, self._calls, self._warned = row, [], 0, False
        tools = [_chat_schema(tool) for tool in parameters.get("tools") or []]
        self._names = [tool["function"]["name"] for tool in tools]
        return messages, {"tools": tools} if tools else {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Runs the calls of a turn, or has the answer verified. Raises RuntimeError outside an episode."""
        if self._row is None:
            raise RuntimeError("there is no episode; call reset with a row")
        calls = self.parse(action, self._names)
        if calls and not self._warned:
            return [self._run(call) for call in calls], 0.0, False, False, {}
        content = [{"type": "output_text", "text": action, "annotations": []}]
        self._output.append(self._item("message", "msg", role="assistant", status="completed", content=content))
        response = {
            "id": "resp_0", "object": "response", "created_at": 0, "model": "policy", "output": self._output,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": self._row[PARAMETERS].get("tools") or [],
        }  # fmt: skip
        row, self._row = self._row, None
        verdict = self._server.ask("/verify", row | {"response": response})
        reward = number_of(verdict.get("reward"), f"{self._server.name}/verify")
        reward = 0.0 if calls else reward  # a turn with calls is no answer, even if it has the right words
        success = not calls and reward >= self.success_at
        return "", reward, not calls, bool(calls), {"success": success, "calls": self._calls}

    def close(self) -> None:
        self._server.close()

    def _run(self, call: Call) -> dict[str, str]:
        self._calls += 1
        identity = f"call{self._calls:05d}"
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self._output.append(
            self._item("function_call", "fc", name=call.name, arguments=arguments, call_id=identity, status="completed")
        )
        if self._calls > self.max_calls:
            self._warned, text = True, NO_CALLS_LEFT
        elif call.error is not None or call.text is not None:
            text = f"error: {call.error or 'give the arguments as a JSON object'}"
        elif call.name not in self._names:
            # A name that is no tool could be another endpoint, such as verify.
            text = f"error: no tool {short(call.name)}; the tools are: {', '.join(self._names) or 'none'}"
        else:
            status, text = self._server.post("/" + quote(call.name, safe=""), call.arguments)
            text = text if 200 <= status < 300 else f"error: status {status}: {text}"
        self._output.append(self._item("function_call_output", "fco", call_id=identity, output=text))
        return {"role": "tool", "name": call.name, "content": text[: self.max_chars], "tool_call_id": identity}

    def _item(self, kind: str, prefix: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "id": f"{prefix}_{len(self._output)}", **fields}


def _chat_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool of the Responses API, whose fields are flat, in the form of chat templates."""
    if "function" in tool:
        return dict(tool)
    if not isinstance(tool.get("name"), str):
        raise UserError(f"{PARAMETERS}.tools: a tool needs a name, not {short(dict(tool))}")
    function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": function}
