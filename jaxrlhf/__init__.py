"""jaxrlhf: aligns language models with human preferences, in JAX and Flax. The programmatic API."""

from jaxrlhf.algorithms.advantages import gae
from jaxrlhf.algorithms.kl import shape_rewards
from jaxrlhf.config import AdapterConfig, AdvantageConfig, KLConfig, OptimizerConfig, PPOConfig, Sampling, ScoreConfig
from jaxrlhf.data.prompts import left_pad
from jaxrlhf.hf.adapter_files import load_adapter, save_adapter
from jaxrlhf.hf.peft import load_peft, save_peft
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind, init_adapter, merge, parameter_count, value_head
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Annotated, Experience, PPOState, Prompts, Rollout
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import Control, ExperienceSettings, annotate, annotate_experience, build_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

__all__ = [
    "AdapterConfig",
    "AdvantageConfig",
    "Annotated",
    "Control",
    "Experience",
    "ExperienceSettings",
    "KLConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOState",
    "Prompts",
    "Rollout",
    "Sampling",
    "ScoreConfig",
    "annotate",
    "annotate_experience",
    "bind",
    "build_experience",
    "compiler_options",
    "gae",
    "init_adapter",
    "init_ppo",
    "left_pad",
    "load_adapter",
    "load_peft",
    "load_pretrained",
    "merge",
    "parameter_count",
    "ppo_update",
    "rollout",
    "save_adapter",
    "save_peft",
    "save_pretrained",
    "shape_rewards",
    "value_head",
]
