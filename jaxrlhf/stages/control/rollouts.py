"""Samples of an iteration: T steps of N environments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrlhf.environments.vector import VecEnv


@dataclasses.dataclass
class Samples:
    """The fields of `steps.control.Transitions`, as numpy arrays."""

    observations: np.ndarray
    next_observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    failed: np.ndarray


def collect(
    policy: Any,
    envs: VecEnv,
    inputs: np.ndarray,
    steps: int,
    random: np.random.Generator,
    on_step: Callable[[dict[str, Any]], bool],
) -> tuple[Samples, np.ndarray, bool]:
    """Samples `steps` steps of each environment.

    `inputs` f32[N,I] is the input of the networks at the first step. `on_step` is called after each step with its
    results. If it returns False, the sampling ends.

    Returns:
      (samples, inputs of the next step, whether all steps were sampled).
    """
    count, normalization = envs.num_envs, policy.normalization
    draws = policy.draws(random, (steps, count))
    shape = (steps, count)
    samples = Samples(
        np.empty((*shape, policy.inputs), np.float32), np.empty((*shape, policy.inputs), np.float32),
        np.empty((*shape, policy.actions.width), policy.actions.dtype), np.empty(shape, np.float32),
        *(np.zeros(shape, bool) for _ in range(3)),
    )  # fmt: skip
    for t in range(steps):
        samples.observations[t] = inputs
        samples.actions[t] = actions = policy.act(inputs, draws[t])
        observations, rewards, dones, infos = envs.step(policy.for_env(actions))
        features = policy.features(observations)
        normalization.see(features)
        inputs = normalization.observe(features)
        samples.next_observations[t] = inputs
        samples.rewards[t] = normalization.reward(rewards, dones)
        for i in np.flatnonzero(dones) if dones.any() else ():
            info = infos[i]
            samples.next_observations[t, i] = policy.read(np.asarray(info["terminal_observation"])[None])[0]
            kind = "failed" if "failed" in info else "truncated" if info["TimeLimit.truncated"] else "terminated"
            getattr(samples, kind)[t, i] = True
        if not on_step({"rewards": rewards, "dones": dones, "infos": infos, "new_obs": observations}):
            return samples, inputs, False
    return samples, inputs, True
