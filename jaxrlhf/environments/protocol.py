"""The environment contract: the two methods of Gymnasium, on an object of any class. gym's older form works as well.

    reset(seed=None, options=None) -> (observation, info)            older: observation
    step(action) -> (observation, reward, terminated, truncated, info)   older: (observation, reward, done, info)

An observation is an array or a number of `env.observation_space`, or it is text: a str, or chat messages, a list of
{"role", "content"}. If observations are text, an action is a str. Nothing here needs Gymnasium to be installed.
"""

import inspect
from typing import Any

from jaxrlhf.errors import UserError, short


class Adapted:
    """Gives an environment of either form the current form. Other attributes are read from the environment."""

    def __init__(self, env: Any) -> None:
        missing = [name for name in ("reset", "step") if not callable(getattr(env, name, None))]
        if missing:
            raise UserError(f"{name_of(env)}: an environment needs the methods reset and step; {missing[0]} is missing")
        self.env = env
        self.takes_seed, self.takes_options = (_takes(env.reset, name) for name in ("seed", "options"))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        given: dict[str, Any] = {}
        if seed is not None and self.takes_seed:
            given["seed"] = seed
        elif seed is not None and callable(getattr(self.env, "seed", None)):
            self.env.seed(seed)  # the older form
        if options is not None and self.takes_options:
            given["options"] = options
        return reset_result(self.env.reset(**given))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        return result if isinstance(result, tuple) and len(result) == 5 else step_result(result, self.env)

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)


def adapt(env: Any) -> Adapted:
    """Returns the environment in the current form. Raises `UserError` if reset or step is missing."""
    return env if isinstance(env, Adapted) else Adapted(env)


def reset_result(result: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (observation, info) from what reset returned in either form."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        return result
    return result, {}


def step_result(result: Any, env: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """Returns the five values from what step returned in either form. Raises `UserError` for any other result."""
    if isinstance(result, tuple) and len(result) == 4:
        observation, reward, done, info = result
        truncated = bool(done) and isinstance(info, dict) and bool(info.get("TimeLimit.truncated", False))
        return observation, reward, bool(done) and not truncated, truncated, info
    if isinstance(result, tuple) and len(result) == 5:
        return result
    found = f"{len(result)} values" if isinstance(result, tuple) else short(result)
    raise UserError(
        f"{name_of(env)}: step must return (observation, reward, terminated, truncated, info), not {found}"
    )


def is_text(observation: Any) -> bool:
    """Whether an observation is text: a str, or chat messages."""
    return isinstance(observation, str) or is_chat(observation)


def is_chat(observation: Any) -> bool:
    return (
        isinstance(observation, list)
        and bool(observation)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in observation)
    )


def name_of(env: Any) -> str:
    """Returns the name of an environment for messages: its registered id, or its class."""
    spec = getattr(env, "spec", None)
    inner = getattr(env, "unwrapped", env)
    inner = env.env if inner is None and hasattr(env, "env") else inner
    return str(getattr(spec, "id", None) or type(inner).__name__)


def _takes(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
