"""Settings of `jaxrlhf.PPO`, with Stable-Baselines3's names and defaults."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    UnitFloat,
    number,
)


def _schedule(value: Any) -> Any:
    if callable(value) or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")):
        return value
    if isinstance(value, str) and re.fullmatch(r"lin_\d+(\.\d+)?(e-?\d+)?", value):
        return value
    raise ValueError("must be a number of at least 0, a text such as lin_0.001 (falls linearly from 0.001 to 0), or a function of the remaining share of timesteps")


def _activation(value: Any) -> Any:
    """Returns the name of an activation, which is given as text, class or function, such as torch.nn.ReLU."""
    name = value if isinstance(value, str) else getattr(value, "__name__", repr(value))
    name = name.lower()
    return {"leakyrelu": "leaky_relu", "swish": "silu"}.get(name, name)


Schedule = Annotated[Any, BeforeValidator(_schedule)]
Widths = list[PositiveInt]


class NetArch(Settings):
    """Hidden layers of the two networks."""

    pi: Widths = Field([64, 64], description="widths of the policy's hidden layers")
    vf: Widths = Field([64, 64], description="widths of the value network's hidden layers")


class PolicyKwargs(Settings):
    """The networks of MlpPolicy."""

    net_arch: NetArch | Widths = Field(NetArch(), description="hidden layers: a list for both networks, or {pi: [...], vf: [...]}")
    activation_fn: Annotated[Literal["tanh", "relu", "elu", "leaky_relu", "silu"], BeforeValidator(_activation)] = Field("tanh", description="activation, as a name, or as a class or function of this name")
    ortho_init: bool = Field(True, description="orthogonal initial weights, with gain 0.01 at the policy's output")
    log_std_init: FiniteFloat = Field(0.0, description="initial logarithm of the deviation of actions in a Box")


class ControlConfig(Settings):
    """PPO on control tasks (1707.06347)."""

    learning_rate: Schedule = Field(3e-4, description="learning rate, or its schedule")
    n_steps: PositiveInt = Field(2048, description="steps of each environment per iteration")
    batch_size: PositiveInt = Field(64, description="transitions per minibatch; the last one of an epoch is smaller where the size does not divide n_steps times environments")
    n_epochs: PositiveInt = Field(10, description="passes over the transitions of an iteration")
    gamma: UnitFloat = number(0.99, "discount")
    gae_lambda: UnitFloat = number(0.95, "lambda of GAE")
    clip_range: Schedule = Field(0.2, description="the ratio is clipped to 1 - clip_range and 1 + clip_range; a number or a schedule")
    clip_range_vf: Schedule | None = Field(None, description="clips the change of values; depends on the scale of rewards; null means no clipping")
    normalize_advantage: bool = Field(True, description="whiten the advantages of each minibatch")
    ent_coef: NonNegativeFloat = number(0.0, "weight of the entropy bonus")
    vf_coef: NonNegativeFloat = number(0.5, "weight of the value loss")
    max_grad_norm: PositiveFloat = number(0.5, "largest global norm of the gradient")
    target_kl: PositiveFloat | None = number(None, "an iteration ends early when the approximate KL passes 1.5 times this number; null means no limit")
    stats_window_size: PositiveInt = Field(100, description="episodes over which returns and lengths are averaged")
    policy_kwargs: PolicyKwargs = Field(PolicyKwargs(), description="the networks")
    normalize_observations: bool = Field(False, description="subtract the running mean of observations and divide by their deviation, then clip at 10, as VecNormalize does")
    normalize_rewards: bool = Field(False, description="divide rewards by the running deviation of discounted returns, then clip at 10, as VecNormalize does")
    seed: NonNegativeInt | None = Field(None, description="seed of weights, actions, minibatches and environments; null draws one")
    verbose: Literal[0, 1, 2] = Field(0, description="1 prints a table per iteration, 2 also remarks")


def at(schedule: Any, left: float) -> float:
    """Returns the value of a schedule. `left` is the remaining share of timesteps: 1 at the start, 0 at the end."""
    if isinstance(schedule, str):
        return float(schedule.removeprefix("lin_")) * left
    return float(schedule(left)) if callable(schedule) else float(schedule)
