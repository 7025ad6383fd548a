"""Tools for language models: typed Python functions, which a model calls in the format of its family.

A tool is a function with type hints and a docstring that describes it and each parameter (Google style). Its schema is
that of `transformers.utils.get_json_schema`, for the chat template. Its result becomes a message of the role `tool`. A
bad call gets an error message as the answer of the tool, and never raises.
"""

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data.time_limit import TookTooLong, within
from jaxrlhf.environments.tool_calls import PARSERS, Call
from jaxrlhf.errors import UserError, one_line, short
from jaxrlhf.rewards.functions import FunctionReward, load_function

NO_CALLS_LEFT = "error: no calls are left; give the answer"
CUT = " ... (cut)"


class Tool:
    """A function that a model may call.

    Args:
      function: the function. Raises `UserError` if a type hint or the description of a parameter is missing. If it has
        an attribute `prepare`, a function without arguments, that is called, so that a tool that cannot work here
        raises its `UserError` before the first episode.
      place: where the function is named, for messages.
    """

    def __init__(self, function: Callable[..., Any], place: str = "tools") -> None:
        from pydantic import ConfigDict, PydanticUserError, create_model
        from transformers.utils import get_json_schema

        if not isinstance(getattr(function, "__name__", None), str):
            raise UserError(f"{place}: {short(function)} cannot be a tool: it has no name; define a function with def")
        self.function, self.name = function, function.__name__
        try:
            self.schema: dict[str, Any] = get_json_schema(function)
            parameters = inspect.signature(function, eval_str=True).parameters.values()
            fields = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in parameters}
            if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
                raise TypeError("a tool takes keywords only, no *args or **kwargs")
            self._arguments = create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)
        except (PydanticUserError, NameError, TypeError, ValueError) as error:
            raise UserError(f"{place}: {self.name} cannot be a tool: {one_line(error)}") from error
        except Exception as error:  # transformers' own classes: a docstring or a type hint is missing
            raise UserError(
                f"{place}: {self.name} cannot be a tool: {one_line(error)} Give it type hints, and a docstring with a "
                "description of each parameter under Args"
            ) from error
        try:
            getattr(function, "prepare", lambda: None)()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{place}: {self.name} cannot be prepared: {_reason(error)}") from error

    def run(self, call: Call, seconds: float = 10.0, max_chars: int = 2000) -> tuple[str, bool]:
        """Returns (answer, whether the call succeeded). Never raises, except KeyboardInterrupt."""
        from pydantic import ValidationError

        try:
            given = call.arguments if call.text is None else self._read_text(call.text)
            model = self._arguments(**given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            return f"error: {where}: {first['msg']}; {self.usage()}"[:max_chars], False
        except (TypeError, ValueError) as error:  # for example a name that is no text
            return f"error: {one_line(error)}; {self.usage()}"[:max_chars], False
        arguments = {name: getattr(model, name) for name in type(model).model_fields}
        try:
            answer = _as_text(within(seconds, lambda: self.function(**arguments)))
        except TookTooLong:
            return f"error: {self.name} took more than {seconds:g} s", False
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit: a tool must not end the run
            return f"error: {_reason(error)}"[:max_chars], False
        if len(answer) > max_chars:
            answer = answer[: max(max_chars - len(CUT), 0)] + CUT
        return answer, True

    def usage(self) -> str:
        """Returns the call's form in words, for error messages."""
        required = self.schema["function"]["parameters"].get("required", [])
        properties = self.schema["function"]["parameters"].get("properties", {})
        words = [f"{name}: {properties[name].get('type', 'value')}" for name in properties]
        return f"{self.name} takes {', '.join(words) or 'no arguments'} (required: {', '.join(required) or 'none'})"

    def _read_text(self, text: str) -> dict[str, str]:
        names = list(self._arguments.model_fields)
        if len(names) == 1:
            return {names[0]: text}
        values = [value.strip() for value in text.split(",")] if text else []
        if len(values) > len(names):
            raise ValueError(f"{len(values)} arguments are too many")
        return dict(zip(names, values))


def run_call(tools: Mapping[str, Tool], call: Call, seconds: float = 10.0, max_chars: int = 2000) -> tuple[str, bool]:
    """Runs a call by the tool's name. Returns (answer, whether it succeeded); never raises."""
    if call.error is not None:
        return f"error: {call.error}"[:max_chars], False
    tool = tools.get(call.name)
    if tool is None:
        return f"error: no tool {call.name[:40]!r}; the tools are: {', '.join(tools) or 'none'}"[:max_chars], False
    return tool.run(call, seconds, max_chars)


def load_tools(tools: Sequence[str | Callable[..., Any] | Tool], place: str = "tools") -> dict[str, Tool]:
    """Returns the tools by name, from functions and from texts `module:function` or `path.py:function`.

    Raises UserError if one cannot be imported or used, or if two have one name.
    """
    found: dict[str, Tool] = {}
    for given in tools:
        function = load_function(given, place) if isinstance(given, str) else given
        tool = function if isinstance(function, Tool) else Tool(function, place)
        if tool.name in found:
            raise UserError(f"{place}: two tools have the name {tool.name}; rename one of the functions")
        found[tool.name] = tool
    return found


class ToolEnvironment:
    """An environment around a row of data: asks its question, runs tool calls, and scores the final answer.

    `reset` gets the row as `options`. The question is the row's `prompt` (text or messages), or its `messages` up to
    the last turn of the user. A turn with calls is answered with one message of the role `tool` for each call. A turn
    without a call is the answer, and ends the episode. `info` of reset has `tools`, the schemas for the chat template.
    The last `info` has `success`, `calls` and `failed_calls`.

    Args:
      tools: functions, or texts `module:function`.
      parser: the name of the model family's format in `tool_calls.PARSERS`.
      reward: a reward function (see `jaxrlhf/rewards/functions.py`) or its name, such as
        "jaxrlhf.rewards.library:exact_match". It gets the question, the answer and the columns of the row.
      reward_options: options of the reward function.
      max_calls: calls in an episode. Further calls get an error, and a second turn with them truncates the episode
        with the reward 0.
      seconds: longest time of a call.
      max_chars: longest answer of a tool; longer ones are cut.
      success_at: an answer with at least this reward is a success.
      system: text of a system message before the question; null has none.
    """

    def __init__(
        self,
        tools: Sequence[str | Callable[..., Any] | Tool],
        parser: str,
        reward: str | Callable[..., Any],
        max_calls: int = 4,
        reward_options: Mapping[str, Any] | None = None,
        seconds: float = 10.0,
        max_chars: int = 2000,
        success_at: float = 1.0,
        system: str | None = None,
    ) -> None:
        if parser not in PARSERS:
            raise UserError(f"parser: must be one of {', '.join(PARSERS)}, not {parser!r}")
        if max_calls < 0:
            raise UserError(f"max_calls: must be at least 0, not {max_calls}")
        self.tools, self.parse = load_tools(tools), PARSERS[parser]
        self.reward = FunctionReward(reward, "reward", reward_options)
        self.max_calls, self.seconds, self.max_chars = max_calls, seconds, max_chars
        self.success_at, self.system = success_at, system
        self._row: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Asks the question of a row. Raises UserError if the row has none."""
        row = dict(options or {})
        messages = question_of(row)
        self._prompt = messages[-1]["content"]
        self._row = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
        self._calls = self._failed = 0
        self._warned = False
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages, {"tools": [tool.schema for tool in self.tools.values()]} if self.tools else {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Runs the calls of a turn, or scores it as the answer. Raises RuntimeError before reset and after the end."""
        if self._row is None:
            raise RuntimeError("there is no episode; call reset with a row")
        calls = self.parse(action, self.tools)
        if not calls:
            return self._end(action, truncated=False)
        if self._warned:
            return self._end(action, truncated=True)
        return [self._answer(call) for call in calls], 0.0, False, False, {}

    def _answer(self, call: Call) -> dict[str, str]:
        if self._calls >= self.max_calls:
            self._warned = True
            text, succeeded = NO_CALLS_LEFT, False
        else:
            text, succeeded = run_call(self.tools, call, self.seconds, self.max_chars)
        self._calls += 1
        self._failed += not succeeded
        # Some chat templates (Mistral's) need an id of nine characters.
        return {"role": "tool", "name": call.name, "content": text, "tool_call_id": f"call{self._calls:05d}"}

    def _end(self, action: str, truncated: bool) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        row, self._row = self._row, None
        reward = 0.0  # a turn with calls is no answer, even if it has the right words
        if not truncated:
            answered = types.SimpleNamespace(prompts=[self._prompt], texts=[action], rows=[row])
            reward = float(np.ma.filled(self.reward(answered), 0.0)[0])  # an answer without a score gets 0
        info = {"success": not truncated and reward >= self.success_at}
        return "", reward, not truncated, truncated, info | {"calls": self._calls, "failed_calls": self._failed}


def question_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a row's question. Raises UserError if it has none.

    A `prompt` is the question as it is. `messages` are cut after the last turn of the user, because the calls and the
    answer after it are for the policy to write.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    question = messages = list(prompt or row.get("messages") or [])
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        raise UserError(f"a row's messages must be objects with role and content, not {short(messages)}")
    if not prompt:
        ends = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
        question = messages[: ends[-1]] if ends else []
    if not question:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(f"a row needs a prompt, or messages with a turn of the user; its columns are: {columns}")
    return [dict(message) for message in question]


def _as_text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    try:
        return json.dumps(answer, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(answer)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
