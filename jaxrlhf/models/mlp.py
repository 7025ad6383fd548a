"""The small networks of control tasks: a policy and a value network, separate, and the distributions of actions.

Functions that take `xp` compute with numpy or jax.numpy. Actions are sampled on the host with numpy, because the call
of a compiled program would take longer than these networks. Updates are compiled, with jax.numpy.

    params = {"policy": layers, "value": layers, "log_std": f32[A]}     layers: a list of {"kernel" [I,O], "bias" [O]}
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf.algorithms.losses import token_logprobs

GAINS = {"hidden": math.sqrt(2), "policy": 0.01, "value": 1.0}  # of orthogonal initialisation (2005.12729)


@dataclasses.dataclass(frozen=True)
class Actions:
    """The kind of actions and the number of outputs that the policy needs. Hashable, so that programs depend on it."""

    kind: str  # Box, Discrete, MultiDiscrete or MultiBinary
    sizes: tuple[int, ...]  # Box: (A,); Discrete: (n,); MultiDiscrete: nvec; MultiBinary: (n,)

    @property
    def outputs(self) -> int:
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """K: how many numbers describe an action."""
        return len(self.sizes) if self.kind in ("Discrete", "MultiDiscrete") else self.sizes[0]

    @property
    def dtype(self) -> Any:
        return np.float32 if self.kind == "Box" else np.int32


def init_mlp_policy(
    random: np.random.Generator,
    inputs: int,
    policy: tuple[int, ...],
    value: tuple[int, ...],
    actions: Actions,
    orthogonal: bool = True,
    log_std: float = 0.0,
) -> dict[str, Any]:
    """Returns the params of a policy and a value network with hidden layers of the given widths.

    numpy computes them: to compile jax's initialisers takes longer than some hundred updates.
    """
    initialise = _orthogonal if orthogonal else _uniform
    params: dict[str, Any] = {}
    for name, widths, outputs in (("policy", policy, actions.outputs), ("value", value, 1)):
        shapes = list(itertools.pairwise((inputs, *widths, outputs)))
        gains = [GAINS["hidden"]] * len(widths) + [GAINS[name]]
        params[name] = [
            {"kernel": initialise(random, shape, gain), "bias": np.zeros(shape[1], np.float32)}
            for shape, gain in zip(shapes, gains)
        ]
    if actions.kind == "Box":
        params["log_std"] = np.full(actions.outputs, log_std, np.float32)
    return jax.device_put(params)


def _orthogonal(random: np.random.Generator, shape: tuple[int, int], gain: float) -> np.ndarray:
    """Returns f32[I,O] with orthonormal rows or columns times `gain`, uniformly distributed (1312.6120)."""
    rows, columns = max(shape), min(shape)
    q, r = np.linalg.qr(random.standard_normal((rows, columns)))
    q *= np.sign(np.diag(r))
    return (gain * (q if shape[0] == rows else q.T)).astype(np.float32)


def _uniform(random: np.random.Generator, shape: tuple[int, int], gain: float) -> np.ndarray:
    """Returns f32[I,O] between -1 / sqrt(I) and 1 / sqrt(I), as PyTorch's linear layers start. The gain is unused."""
    bound = shape[0] ** -0.5
    return random.uniform(-bound, bound, shape).astype(np.float32)


def mlp(layers: list[dict[str, Any]], x: Any, activation: str, xp: Any = jnp) -> Any:
    """Returns the outputs [B,O] for inputs f32[B,I]."""
    for layer in layers[:-1]:
        x = _activate(x @ layer["kernel"] + layer["bias"], activation, xp)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def _activate(x: Any, name: str, xp: Any) -> Any:
    if name == "tanh":
        return xp.tanh(x)
    if name == "relu":
        return xp.maximum(x, 0.0)
    if name == "leaky_relu":
        return xp.where(x > 0, x, 0.01 * x)
    if name == "elu":
        return xp.where(x > 0, x, xp.expm1(xp.minimum(x, 0.0)))
    return x / (1.0 + xp.exp(-x))  # silu


def noise(actions: Actions, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns f32[*shape, outputs]: what `choose` needs to sample."""
    shape = (*shape, actions.outputs)
    if actions.kind == "Box":
        return random.standard_normal(shape, np.float32)
    gumbel = -np.log(random.standard_exponential(shape, np.float32))
    if actions.kind == "MultiBinary":  # the difference of two Gumbel variables is logistic
        gumbel += np.log(random.standard_exponential(shape, np.float32))
    return gumbel


def choose(actions: Actions, outputs: np.ndarray, log_std: np.ndarray | None, noise: np.ndarray | None) -> np.ndarray:
    """Returns actions [B,K] for the policy's outputs f32[B,outputs], on the host. Without noise, the likeliest ones.

    Discrete actions are sampled as argmax(logits + Gumbel noise). Actions of a Box are not clipped.
    """
    if actions.kind == "Box":
        return outputs if noise is None else outputs + np.exp(log_std) * noise
    if noise is not None:
        outputs = outputs + noise
    if actions.kind == "MultiBinary":
        return (outputs > 0).astype(np.int32)
    if len(actions.sizes) == 1:
        return outputs.argmax(-1)[:, None].astype(np.int32)
    parts = np.split(outputs, np.cumsum(actions.sizes)[:-1], axis=-1)
    return np.stack([part.argmax(-1) for part in parts], axis=-1).astype(np.int32)


def logprobs_and_entropies(
    actions: Actions, outputs: Array, log_std: Array | None, chosen: Array
) -> tuple[Array, Array]:
    """Returns the logprob and the entropy of actions [B,K], f32[B] each, in nats."""
    if actions.kind == "Box":
        z = (chosen - outputs) * jnp.exp(-log_std)
        constant = 0.5 * math.log(2 * math.pi)
        logprobs = jnp.sum(-0.5 * jnp.square(z) - log_std - constant, axis=-1)
        return logprobs, jnp.broadcast_to(jnp.sum(log_std + 0.5 + constant), logprobs.shape)
    if actions.kind == "MultiBinary":
        logits = jnp.stack([jnp.zeros_like(outputs), outputs], axis=-1)  # [B,K,2]
        logprobs, entropies = token_logprobs(logits, chosen, 1.0)
        return jnp.sum(logprobs, axis=-1), jnp.sum(entropies, axis=-1)
    ends = np.cumsum(actions.sizes)
    parts = [
        token_logprobs(outputs[:, None, end - size : end], chosen[:, i : i + 1], 1.0)
        for i, (size, end) in enumerate(zip(actions.sizes, ends))
    ]
    return sum(part[0][:, 0] for part in parts), sum(part[1][:, 0] for part in parts)
