"""The rewards that the settings name, read and checked before anything is compiled."""

import datetime
from collections.abc import Callable, Mapping

import jax

from jaxrlhf.config import (
    ClassifierRewardConfig,
    FunctionRewardConfig,
    HTTPRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
)
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.classifier import ClassifierReward
from jaxrlhf.rewards.completions import Reward
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.from_first import on_first
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.pretrained import PretrainedReward
from jaxrlhf.rewards.remote import HTTPReward

Say = Callable[[str], None]
Rewards = Mapping[str, tuple[Reward | None, float]]
"""Name -> (reward, weight); None is the run's own reward adapter. A reward that is no sum has the name \"\"."""


def load_rewards(
    config: RewardConfig,
    mesh: jax.sharding.Mesh,
    key_path: str,
    say: Say | None = None,
    time: datetime.datetime | None = None,
    matmul_precision: str = "highest",
) -> Rewards:
    """The reward, or the parts of a sum. `key_path` is the section, for messages; `say` gets a server's troubles.

    `time` is what the chat templates of reward models take for now; None: the clock. `matmul_precision` is that of
    decoders with a base of their own.
    Raises `UserError` where function, folder, label or URL cannot be used.
    """
    if isinstance(config, SumRewardConfig):
        rewards: Rewards = {
            name: (_load(part, mesh, f"{key_path}.parts.{name}", say, matmul_precision), part.weight)
            for name, part in config.parts.items()
        }
    else:
        rewards = {"": (_load(config, mesh, key_path, say, matmul_precision), 1.0)}
    for reward, _ in rewards.values():
        if isinstance(reward, (PretrainedReward, ClassifierReward)):
            reward.chats.time = time
    return rewards


def compose(rewards: Rewards, own: Callable[[], Reward]) -> Reward:
    """One reward of what `load_rewards` gave; `own` makes the run's own."""
    called = {name: own() if reward is None else on_first(reward) for name, (reward, _) in rewards.items()}
    whole = {name: (called[name], weight) for name, (_, weight) in rewards.items()}
    return whole[""][0] if "" in whole else ComposedReward(whole)


def needs_own(config: RewardConfig) -> bool:
    """Whether the run's own reward adapter is the reward, or a part of it."""
    return any(_is_own(part) for part in parts_of(config))


def own_gain(config: RewardConfig) -> float | None:
    """The number with which the run's own reward adapter is multiplied where it alone is the reward; else None."""
    if not isinstance(config, SumRewardConfig):
        return 1.0 if _is_own(config) else None
    weighed = [part for part in config.parts.values() if part.weight]
    return weighed[0].weight if len(weighed) == 1 and _is_own(weighed[0]) else None


def parts_of(config: RewardConfig) -> list[RewardConfig]:
    """The parts of a sum; of another reward, itself."""
    return [*config.parts.values()] if isinstance(config, SumRewardConfig) else [config]


def _is_own(config: RewardConfig) -> bool:
    """Whether a reward is the run's own reward adapter."""
    return isinstance(config, ModelRewardConfig) and config.path is None


def check_prompts(rewards: Rewards, prompts: PromptSet, key_path: str) -> None:
    """`UserError` where a reward could not score answers to these prompts."""
    for name, (reward, _) in rewards.items():
        where = f"{key_path}.parts.{name}" if name else key_path
        if isinstance(reward, FunctionReward):
            reward.check_columns(set().union(*prompts.columns), f"{where}.function")
        elif isinstance(reward, (PretrainedReward, ClassifierReward)):
            reward.check_prompts(prompts)


def _load(
    config: RewardConfig, mesh: jax.sharding.Mesh, key_path: str, say: Say | None, matmul_precision: str
) -> Reward | None:
    if isinstance(config, FunctionRewardConfig):
        options = (config.options, config.columns, config.timeout)
        return FunctionReward(config.function, f"{key_path}.function", *options)
    if isinstance(config, ClassifierRewardConfig):
        return ClassifierReward(config, key_path)
    if isinstance(config, HTTPRewardConfig):
        settings = {"timeout": config.timeout, "retries": config.retries, "headers_env": config.token_env}
        try:
            return HTTPReward(config.url, batch_size=config.batch_size, say=say, **settings)
        except UserError as error:
            raise UserError(f"{key_path}.url: {error}") from None
    return None if config.path is None else PretrainedReward(config, mesh, key_path, matmul_precision)
