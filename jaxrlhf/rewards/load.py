"""The reward that the settings name, read and checked before anything is compiled."""

import jax

from jaxrlhf.config import RewardConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.rewards.answers import Reward
from jaxrlhf.rewards.classifier import TransformersReward
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.pretrained import PretrainedReward


def load_reward(config: RewardConfig, mesh: jax.sharding.Mesh, key_path: str) -> Reward | None:
    """The reward; None where it is the run's own reward adapter. `key_path` is the section, for messages.

    Raises `UserError` where function, folder or label cannot be used.
    """
    if config.kind == "function":
        return FunctionReward(config.function, f"{key_path}.function")
    if config.kind == "transformers":
        return TransformersReward(config, key_path)
    return None if config.path is None else PretrainedReward(config, mesh, key_path)


def check_prompts(reward: Reward | None, prompts: PromptSet, key_path: str) -> None:
    """`UserError` where the reward could not score answers to these prompts."""
    if isinstance(reward, FunctionReward):
        reward.check_columns(set().union(*prompts.columns), f"{key_path}.function")
    elif reward is not None:
        reward.check_prompts(prompts)
