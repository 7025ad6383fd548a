"""Settings of the environment in which the ppo stage plays episodes."""

from typing import Any, Literal

from pydantic import Field, field_validator

from jaxrlhf.config.base import FREE, PositiveInt, Seconds, Settings
from jaxrlhf.config.paths import FunctionPath


class EnvironmentConfig(Settings):
    """An environment that answers the policy with text. It replaces the reward, and it may replace the prompts."""

    factory: FunctionPath = Field(description="function or class that returns an environment, as module:function or path.py:function; environment: module:function is short for this setting alone")
    arguments: dict[str, Any] = Field({}, description="keyword arguments of the factory, such as {digits: 2}")
    max_turns: PositiveInt = Field(8, description="largest number of turns of the policy in an episode; a turn has at most sampling.max_new_tokens tokens")
    max_episode_tokens: PositiveInt | None = Field(None, description="largest number of tokens of an episode after its first observation: those of the policy and those of the environment; an episode without room for the next observation is truncated; null means twice max_turns x sampling.max_new_tokens, or sampling.max_new_tokens if max_turns is 1")
    mode: Literal["sequential", "threads", "processes"] = Field("threads", description="how environments step: one after another (sequential), in a thread each, which suits environments that wait (threads), or in a process each, which suits environments that compute much or may end the process (processes)", json_schema_extra=FREE)
    step_timeout: Seconds = Field(60.0, description="longest time of a reset or a step, in seconds; a slower environment loses its episode and is replaced; there is no limit with mode: sequential", json_schema_extra=FREE)

    @field_validator("arguments")
    @classmethod
    def _names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"{name!r} is not a name of an argument")
        return arguments
