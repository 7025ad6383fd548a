"""Builds the rewards that a run's settings describe, and checks these rewards before anything is compiled."""

import datetime
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxrlhf.config import (
    ClassifierRewardConfig,
    CodeTestsRewardConfig,
    FunctionRewardConfig,
    HTTPRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
)
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.distributed.processes import alone, from_first
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.classifier import ClassifierReward
from jaxrlhf.rewards.code_tests import CodeTestsReward
from jaxrlhf.rewards.completions import Completions, Reward, abstained_rows, by_step, may_abstain, with_abstained
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.functions import FunctionReward, RewardFault
from jaxrlhf.rewards.judge import JudgeReward
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.pretrained import PretrainedReward
from jaxrlhf.rewards.reading import check_chats
from jaxrlhf.rewards.remote import HTTPReward
from jaxrlhf.rewards.steps import granularity_of

Say = Callable[[str], None]
Rewards = Mapping[str, tuple[Reward | ModelRewardConfig, float]]
"""Name -> (reward, weight). Settings mean the run's reward adapter. A reward that is not a sum has the name \"\"."""


def load_rewards(
    config: RewardConfig,
    mesh: jax.sharding.Mesh,
    key_path: str,
    say: Say | None = None,
    time: datetime.datetime | None = None,
    matmul_precision: str = "highest",
) -> Rewards:
    """Loads the reward, or all parts of a sum.

    `key_path` is the config section. Error messages contain it. `say` receives a line when a reward server fails.
    `time` is the date that the chat templates of reward models write. If `time` is None, they write the current date.
    `matmul_precision` applies to pretrained reward models. Raises `UserError` if a function, folder, label or URL
    cannot be used.
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


def compose(rewards: Rewards, own: Callable[[ModelRewardConfig], Reward]) -> Reward:
    """Returns one reward, combined from the result of `load_rewards`.

    `own` returns the reward that uses the run's reward adapter with these settings.
    """
    parts = {
        name: (own(part) if isinstance(part, ModelRewardConfig) else on_first(part), weight)
        for name, (part, weight) in rewards.items()
    }
    return parts[""][0] if "" in parts else ComposedReward(parts)


def needs_own(config: RewardConfig | None) -> bool:
    """Whether the run's reward adapter is the reward or a part of the reward."""
    return any(is_own(part) for part in parts_of(config))


def own_gain(config: RewardConfig | None) -> float | None:
    """Returns the weight of the run's reward adapter if no other part has a weight, else None.

    The result is also None if the adapter scores steps, because the value model must then predict a sum of scores.
    """
    weighted = _weighted_parts(config)
    if len(weighted) != 1 or not is_own(weighted[0][0]) or gives_steps(config):
        return None
    return weighted[0][1]


def gives_steps(config: RewardConfig | None) -> bool:
    """Whether the reward, or a part with a nonzero weight, scores inside completions."""
    return any(granularity_of(part) is not None for part, _ in _weighted_parts(config))


def _weighted_parts(config: RewardConfig | None) -> list[tuple[RewardConfig, float]]:
    """Returns the parts with a nonzero weight, with their weights. A reward that is no sum has the weight 1."""
    weighted = [(part, getattr(part, "weight", 1.0)) for part in parts_of(config)]
    return [(part, weight) for part, weight in weighted if weight]


def parts_of(config: RewardConfig | None) -> list[RewardConfig]:
    """Returns a list with the settings of all parts of a sum. If the reward is not a sum, the list has one entry.

    The list is empty if there is no reward, because an environment gives the rewards.
    """
    if config is None:
        return []
    return [*config.parts.values()] if isinstance(config, SumRewardConfig) else [config]


def is_own(config: RewardConfig) -> bool:
    """Whether the settings mean the run's reward adapter."""
    return isinstance(config, ModelRewardConfig) and config.path is None


def check_prompts(rewards: Rewards, prompts: PromptSet, key_path: str) -> None:
    """Raises `UserError` if a reward cannot score completions of these prompts."""
    for name, (reward, _) in rewards.items():
        section = f"{key_path}.parts.{name}" if name else key_path
        if isinstance(reward, (CodeTestsReward, JudgeReward)):
            reward.check_rows(prompts.texts, prompts.columns, section)
        elif isinstance(reward, FunctionReward):
            reward.check_columns(set().union(*prompts.columns), f"{section}.function")
        elif isinstance(reward, (PretrainedReward, ClassifierReward)):
            check_chats(prompts, reward.config, reward.chats)


class FirstProcessReward:
    """A reward (see `completions.Reward`) that process 0 computes on the whole batch for all processes.

    A function, a server or a torch classifier may return different scores at each call, may keep state, or may work on
    one host only. If every process called the reward, the processes could get different scores and then train different
    weights. A fault on process 0 is raised on all processes.
    """

    def __init__(self, reward: Reward):
        self.reward, self.name = reward, reward.name
        self.may_abstain, self.by_step = may_abstain(reward), by_step(reward)

    def __call__(self, completions: Completions) -> np.ndarray:
        completions.gather()

        def score() -> bytes:
            scores = self.reward(completions)
            masked = np.ma.getmaskarray(scores) if self.by_step else abstained_rows(scores)
            return np.stack([np.asarray(scores, np.float32), masked.astype(np.float32)]).tobytes()

        both = np.frombuffer(from_first(score, RewardFault), np.float32)
        if self.by_step:
            rewards, masked = both.reshape(2, *completions.response_mask.shape)
            return np.ma.MaskedArray(rewards, masked > 0)
        scores, abstained = both.reshape(2, -1)
        return with_abstained(scores, abstained > 0)


def on_first(reward: Reward) -> Reward:
    """Returns a reward that only process 0 computes. A reward that the devices compute is returned unchanged.

    In a run with one process, every reward is returned unchanged.
    """
    return reward if alone() or isinstance(reward, (ModelReward, PretrainedReward)) else FirstProcessReward(reward)


def _load(
    config: RewardConfig, mesh: jax.sharding.Mesh, key_path: str, say: Say | None, matmul_precision: str
) -> Reward | ModelRewardConfig:
    if isinstance(config, FunctionRewardConfig):
        options = (config.options, config.columns, config.timeout, granularity_of(config))
        return FunctionReward(config.function, f"{key_path}.function", *options)
    if isinstance(config, ClassifierRewardConfig):
        return ClassifierReward(config, key_path)
    if isinstance(config, CodeTestsRewardConfig):
        return CodeTestsReward(config, key_path, say)
    if isinstance(config, JudgeRewardConfig):
        return JudgeReward(config, key_path, say)
    if isinstance(config, HTTPRewardConfig):
        settings = {"timeout": config.timeout, "retries": config.retries, "headers_env": config.token_env}
        try:
            granularity = granularity_of(config)
            return HTTPReward(config.url, batch_size=config.batch_size, granularity=granularity, say=say, **settings)
        except UserError as error:
            raise UserError(f"{key_path}.url: {error}") from None
    return config if config.path is None else PretrainedReward(config, mesh, key_path, matmul_precision)
