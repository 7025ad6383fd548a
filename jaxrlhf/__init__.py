"""jaxrlhf aligns language models with human preferences, in JAX and Flax. This is the public API.

A name is imported when it is first used. So commands start quickly, and can configure jax before jax is imported.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_NAMES = {
    "jaxrlhf.algorithms.advantages": ("gae",),
    "jaxrlhf.algorithms.kl": ("shape_rewards",),
    "jaxrlhf.config": (
        "AdapterConfig", "AdvantageConfig", "KLConfig", "OptimizerConfig", "PPOConfig", "Sampling", "ScoreConfig"
    ),
    "jaxrlhf.data.prompts": ("left_pad",),
    "jaxrlhf.environments.check": ("check_env",),
    "jaxrlhf.environments.statistics": ("Monitor",),
    "jaxrlhf.environments.vector": ("VecEnv", "make_vec_env"),
    "jaxrlhf.hf.adapter_files": ("load_adapter", "save_adapter"),
    "jaxrlhf.hf.peft": ("load_peft", "save_peft"),
    "jaxrlhf.hf.weights": ("load_pretrained", "save_pretrained"),
    "jaxrlhf.models.adapters": ("bind", "init_adapter", "merge", "parameter_count", "value_head"),
    "jaxrlhf.models.choices": ("Choices",),
    "jaxrlhf.models.precision": ("compiler_options",),
    "jaxrlhf.records": ("Annotated", "Experience", "PPOState", "Prompts", "Rollout"),
    "jaxrlhf.rollout.decode": ("rollout",),
    "jaxrlhf.stages.control.callbacks": ("BaseCallback",),
    "jaxrlhf.stages.control.evaluate": ("evaluate_policy",),
    "jaxrlhf.stages.control.ppo": ("PPO",),
    "jaxrlhf.steps.annotate": ("Control", "ExperienceSettings", "annotate", "annotate_experience", "build_experience"),
    "jaxrlhf.steps.ppo": ("init_ppo", "ppo_update"),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(types.ModuleType):
    """Keeps `jaxrlhf.rollout` a function. Without it, an import of the subpackage would replace the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _MODULES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
