"""MlpPolicy: small separate networks for policy and value, on Box, Discrete, MultiDiscrete and MultiBinary spaces."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrlhf.config.control import ControlConfig, NetArch, at
from jaxrlhf.environments import spaces
from jaxrlhf.environments.normalization import Normalization
from jaxrlhf.errors import UserError
from jaxrlhf.models.mlp import Actions, choose, init_mlp_policy, mlp, noise
from jaxrlhf.stages.control.rollouts import Samples
from jaxrlhf.steps.control import Numbers, Transitions, control_update, init_control

_update = jax.jit(control_update, static_argnames=("actions", "activation", "normalize_advantage"))


class MlpPolicy:
    """Networks, the optimizer's state and the statistics of normalisation.

    `state` is a pytree of all that the next update depends on. Actions are sampled on the host (see `models.mlp`).
    """

    def __init__(self, config: ControlConfig, observed: Any, acted: Any, seed: int) -> None:
        for space, use in ((observed, "observation_space"), (acted, "action_space")):
            if fault := spaces.fault(space, use):
                raise UserError(f"MlpPolicy: {fault}")
        self.config, self.observed, self.acted = config, observed, acted
        self.actions = actions_of(acted)
        self.features, inputs = features_of(observed)
        arch = config.policy_kwargs.net_arch
        pi, vf = (arch.pi, arch.vf) if isinstance(arch, NetArch) else (arch, arch)
        self.activation = config.policy_kwargs.activation_fn
        params = init_mlp_policy(
            np.random.default_rng(seed), inputs, tuple(pi), tuple(vf), self.actions,
            config.policy_kwargs.ortho_init, config.policy_kwargs.log_std_init,
        )  # fmt: skip
        self.inputs = inputs
        self.normalization = Normalization(
            inputs, 1, config.normalize_observations, config.normalize_rewards, config.gamma
        )
        self.load(init_control(params))

    def load(self, state: Any) -> None:
        """Sets the state, and copies the params to the host for sampling."""
        self.state = state
        self._host = jax.tree.map(np.asarray, state.params)

    def read(self, observations: np.ndarray) -> np.ndarray:
        """Returns the input f32[N,I] of the networks for observations [N, ...]."""
        return self.normalization.observe(self.features(observations))

    def act(self, inputs: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """Returns actions [N,K].

        `draws` f32[N,outputs] comes from the method `draws`. If it is None, the likeliest actions are taken.
        """
        outputs = mlp(self._host["policy"], inputs, self.activation, np)
        return choose(self.actions, outputs, self._host.get("log_std"), draws)

    def draws(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return noise(self.actions, random, shape)

    def for_env(self, actions: np.ndarray) -> np.ndarray:
        """Returns actions as the environments take them: [N, *shape], clipped to the bounds of a Box."""
        if self.actions.kind == "Discrete":
            return actions[:, 0].astype(np.int64) + getattr(self.acted, "start", 0)
        actions = actions.reshape(-1, *self.acted.shape)
        if self.actions.kind == "Box":
            actions = np.clip(actions, self.acted.low, self.acted.high)
        return actions.astype(self.acted.dtype)

    def update(self, samples: Samples, left: float, random: np.random.Generator) -> dict[str, float]:
        """Runs the update of an iteration and returns its metrics. `left` is the remaining share of the timesteps."""
        config, infinity = self.config, float("inf")
        numbers = Numbers(
            at(config.learning_rate, left), at(config.clip_range, left),
            infinity if config.clip_range_vf is None else at(config.clip_range_vf, left),
            config.ent_coef, config.vf_coef, config.max_grad_norm, config.gamma, config.gae_lambda,
            infinity if config.target_kl is None else config.target_kl,
        )  # fmt: skip
        numbers = jax.tree.map(np.float32, numbers)
        order = minibatches(samples.rewards.size, config.batch_size, config.n_epochs, random)
        transitions = Transitions(**vars(samples))
        state, metrics = _update(
            self.state, transitions, order, numbers, actions=self.actions, activation=self.activation,
            normalize_advantage=config.normalize_advantage,
        )  # fmt: skip
        self.load(state)
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return {**found, "learning_rate": float(numbers.learning_rate), "clip_range": float(numbers.clip_range)}


def minibatches(count: int, size: int, epochs: int, random: np.random.Generator) -> np.ndarray:
    """Returns i32[M,b]: a new order of `count` transitions for each epoch, in minibatches. -1 is padding."""
    size = min(size, count)
    rows = -(-count // size)
    order = np.full((epochs, rows * size), -1, np.int32)
    order[:, :count] = random.permuted(np.tile(np.arange(count, dtype=np.int32), (epochs, 1)), axis=1)
    return order.reshape(epochs * rows, size)


def actions_of(space: Any) -> Actions:
    """Returns the kind and sizes of the actions of a space."""
    kind = spaces.kind(space)
    if kind == "Discrete":
        return Actions(kind, (int(space.n),))
    if kind == "MultiDiscrete":
        return Actions(kind, tuple(int(n) for n in space.nvec))
    return Actions(kind, (int(np.prod(space.shape)),))


def features_of(space: Any) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Returns (a function from observations [N, ...] to f32[N,I], I). Discrete numbers become one-hot vectors."""
    kind = spaces.kind(space)
    if kind == "Discrete":
        count, start = int(space.n), int(getattr(space, "start", 0))
        table = np.eye(count, dtype=np.float32)
        return lambda x: table[np.asarray(x, np.int64).reshape(-1) - start], count
    if kind == "MultiDiscrete":
        tables = [np.eye(int(n), dtype=np.float32) for n in space.nvec]
        return lambda x: np.concatenate([t[x[:, i]] for i, t in enumerate(tables)], axis=-1), int(np.sum(space.nvec))
    size = int(np.prod(space.shape))
    return lambda x: np.asarray(x, np.float32).reshape(-1, size), size
