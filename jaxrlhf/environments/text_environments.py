"""Episodes of text environments on the host: tokens of the policy become actions, observations become tokens.

What the policy wrote is decoded for the environment, but never tokenized again: its tokens stay as they are. An
observation is tokenized once. The first one is a prompt, exactly as in a data set: a text is plain text after BOS, chat
messages go through the chat template. Later ones are what follows the policy's turn: a text as it is, or, in a chat,
the text that the template writes for the new messages, up to the start of the next turn.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.config import EnvironmentConfig, Overflow
from jaxrlhf.config.base import LARGEST_FLOAT
from jaxrlhf.config.functions import load_function
from jaxrlhf.data.chats import Chat, as_chat, content_text
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.data.turns import text_between_turns
from jaxrlhf.environments.pool import Pool
from jaxrlhf.environments.protocol import is_text
from jaxrlhf.environments.workers import Failed
from jaxrlhf.errors import Fault, UserError, one_line, short

_LONGEST = 1_000_000  # characters of an observation
_BOOLS = (bool, np.bool_)
_SUCCESS = ("success", "is_success")  # keys of info


class Factory:
    """Makes environments. It can be sent to another process, where it imports the function again."""

    def __init__(self, spec: str, arguments: Mapping[str, Any], key_path: str) -> None:
        self.spec, self.arguments, self.key_path = spec, dict(arguments), key_path
        self.function: Callable[..., Any] | None = load_function(spec, key_path)

    def __call__(self) -> Any:
        if self.function is None:
            self.function = load_function(self.spec, self.key_path)
        return self.function(**copy.deepcopy(self.arguments))  # an environment may change what it is given

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"function": None}


@dataclasses.dataclass
class Result:
    """What an environment returned, as values of JSON. A failed episode has only `failed`."""

    text: str = ""  # the observation, for people
    action: str = ""  # the text of the policy's turn before it
    ids: list[int] = dataclasses.field(default_factory=list)  # its tokens, if a turn of the policy follows
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: float | None = None
    failed: str | None = None  # why the episode is lost
    prompt: str = ""  # a first observation as a prompt of a data set: a chat as the text of its tokens


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the policy."""

    context: list[int]  # all tokens before the turn
    ids: list[int]  # tokens of the turn
    stopped: bool  # whether the last of them is a stop token
    last: bool  # whether no turn may follow


class TextEnvironments:
    """N environments that play N episodes at a time.

    An environment that raises, hangs or returns something that is not in the contract loses its episode only, and is
    replaced. Its first failure is reported by name.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        count: int,
        tokenizer: Tokenizer,
        stop_tokens: Sequence[int],
        max_prompt_tokens: int,
        overflow: Overflow,
        say: Callable[[str], None],
    ) -> None:
        """Raises UserError if the environments cannot be made. `overflow` is about first observations."""
        factory = Factory(config.factory, config.arguments, "ppo.environment.factory")
        names = [f"environment {i} ({config.factory.rpartition(':')[2]})" for i in range(count)]
        self.tokenizer, self.stop_tokens, self._say = tokenizer, frozenset(stop_tokens), say
        self.max_prompt_tokens, self.overflow, self.max_turns = max_prompt_tokens, overflow, config.max_turns
        self._reported: set[int] = set()
        self._chats: list[Chat | None] = [None] * count
        limit = None if config.mode == "sequential" else config.step_timeout
        self.pool = Pool([factory] * count, config.mode, limit, names, self._report)

    def close(self) -> None:
        """Closes all environments."""
        self.pool.close()

    def start(self, seeds: Sequence[int], rows: Sequence[dict[str, Any] | None]) -> list[Result]:
        """Resets the environments. The ids of the results are those of prompts."""
        # What a draw gives must not depend on earlier draws, because a resumed run has not seen them.
        self.pool.renew()
        options = {i: copy.deepcopy(row) for i, row in enumerate(rows) if row}  # as above; rows are used again
        answers = self._guarded(lambda: self.pool.reset(dict(enumerate(seeds)), options), range(len(seeds)))
        return [self._checked(i, answers[i], self._first) for i in range(len(seeds))]

    def step(self, turns: Mapping[int, Turn]) -> dict[int, Result]:
        """Steps the environments that `turns` names. The ids of the results follow the tokens of the turns."""
        actions = {i: self.tokenizer.decode_after(turn.context, turn.ids) for i, turn in turns.items()}
        answers = self._guarded(lambda: self.pool.step(actions), turns)
        return {
            i: self._checked(i, answers[i], lambda i, answer, turn=turn: self._next(i, answer, turn, actions[i]))
            for i, turn in turns.items()
        }

    def try_out(self, seed: int, row: dict[str, Any] | None) -> str:
        """Begins one episode, and returns its first observation as text.

        Raises UserError if this fails, or if the chat template cannot write a second turn.
        """
        result = self.start([seed], [row])[0]
        if result.failed is not None:
            raise UserError(f"ppo.environment: the first observation cannot be used: {result.failed}")
        if (chat := self._chats[0]) is not None and self.max_turns > 1:
            following = [{"role": "user", "content": "next"}]
            text_between_turns(self.tokenizer.chats, chat, following, "ppo.environment: ")
        return result.text

    def _guarded(self, call: Callable[[], dict[int, Any]], rows: Sequence[int] | Mapping[int, Any]) -> dict[int, Any]:
        """Returns `call()`. If no environment is left, all results are failures; the next draw makes them again."""
        try:
            return call()
        except Fault as fault:
            return {i: Failed(str(fault)) for i in rows}

    def _checked(self, i: int, answer: Any, read: Callable[[int, Any], Result]) -> Result:
        """Returns what `read` makes of an answer. If the answer is unusable, the environment is replaced."""
        if isinstance(answer, Failed):
            return Result(failed=str(answer))
        try:
            return read(i, answer)
        except UserError as error:
            reason = str(error)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            reason = f"it returned {short(answer)}: {one_line(error)}"
        try:
            return Result(failed=str(self.pool.fail(i, reason)))
        except Fault as fault:
            return Result(failed=str(fault))

    def _report(self, i: int, line: str) -> None:
        if i not in self._reported:
            self._reported.add(i)
            self._say(f"ppo: {line}; the metric environment/failed counts further failures of this environment")

    def _first(self, i: int, answer: Any) -> Result:
        """Returns the result of a reset."""
        observation, info = answer
        _check_observation(observation, "reset")
        tools = info.get("tools") or None
        if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
            raise UserError(f"reset: tools in info must be a list of JSON schemas, not {short(tools)}")
        self._chats[i] = None
        if isinstance(observation, str):
            prompt = observation
        else:
            self._chats[i] = dataclasses.replace(as_chat(observation), tools=tools)
            prompt = self.tokenizer.chats.rendered_prompt(self._chats[i], "reset: ")
        ids = self.tokenizer.encode_prompt(prompt)
        if reason := self.tokenizer.fault(ids):
            raise UserError(f"reset: {reason}")
        if not ids:
            raise UserError("reset: the observation is empty, and the tokenizer has no BOS; it must have text")
        kept = self.tokenizer.cut_start(ids, self.max_prompt_tokens) if self.overflow == "cut" else ids
        if kept is None or len(kept) > self.max_prompt_tokens:
            raise UserError(
                f"reset: the observation has {len(ids)} tokens, but ppo.max_prompt_tokens is {self.max_prompt_tokens}; "
                "raise it, or set ppo.overflow: cut"
            )
        text = observation if isinstance(observation, str) and len(kept) == len(ids) else self.tokenizer.decode(kept)
        return Result(_text_of(observation), ids=[int(token) for token in kept], prompt=text)

    def _next(self, i: int, answer: Any, turn: Turn, action: str) -> Result:
        """Returns the result of a step."""
        observation, reward, terminated, truncated, info = answer
        if isinstance(reward, (*_BOOLS, str)) or not abs(float(reward)) < LARGEST_FLOAT:
            raise UserError(f"step: the reward must be a finite number, not {short(reward)}")
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(end, _BOOLS):
                raise UserError(f"step: {name} must be True or False, not {short(end)}")
        if not isinstance(info, dict):
            raise UserError(f"step: info must be a dict, not {short(info)}")
        _check_observation(observation, "step")
        ends = bool(terminated), bool(truncated)
        result = Result(_text_of(observation), action, [], float(reward), *ends, _success(info))
        if terminated or truncated or turn.last:
            return result
        result.ids = self._ids_after(i, observation, turn, action)
        if reason := self.tokenizer.fault(result.ids):
            raise UserError(f"step: {reason}")
        return result

    def _ids_after(self, i: int, observation: Any, turn: Turn, action: str) -> list[int]:
        """Returns the tokens between two turns, and adds both the turn and the observation to the chat."""
        chat = self._chats[i]
        if chat is None:
            if not isinstance(observation, str):
                raise UserError("step: the observation is a chat, but that of reset was a text; return a text")
            return self.tokenizer.encode_continuations([observation])[0]
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        text = text_between_turns(self.tokenizer.chats, chat, messages, "step: ")
        ids = self.tokenizer.encode_continuations([text])[0]
        answered = chat.followed_by(action)
        self._chats[i] = dataclasses.replace(answered, messages=[*answered.messages, *messages])
        # The template ends every turn, some after a blank. A turn that ended itself must not end twice.
        end = next((k for k, token in enumerate(ids) if token in self.stop_tokens), None)
        if turn.stopped and end is not None and not self.tokenizer.decode(ids[:end]).strip():
            return ids[end + 1 :]
        return ids


def _check_observation(observation: Any, method: str) -> None:
    if not is_text(observation):
        raise UserError(f"{method}: the observation must be text or chat messages, not {short(observation)}")
    if not isinstance(observation, str):
        for message in observation:
            if not isinstance(message["content"], str | list | type(None)):
                raise UserError(f"{method}: the content of a message must be text, not {short(message['content'])}")
    if (length := len(_text_of(observation))) > _LONGEST:
        raise UserError(f"{method}: the observation has {length:,} characters, but at most {_LONGEST:,} are allowed")


def _text_of(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    return "\n".join(f"{message['role']}: {content_text(message)}" for message in observation)


def _success(info: Mapping[str, Any]) -> float | None:
    for name in _SUCCESS:
        value = info.get(name)
        if isinstance(value, (*_BOOLS, int, float, np.integer, np.floating)) and abs(value) < LARGEST_FLOAT:
            return float(value)
    return None
