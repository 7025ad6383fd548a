"""`evaluate_policy`: returns of a policy over whole episodes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrlhf.environments.vector import as_vec_env
from jaxrlhf.errors import Fault, UserError


def evaluate_policy(
    model: Any,
    env: Any,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    callback: Callable[[dict[str, Any], dict[str, Any]], Any] | None = None,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
) -> Any:
    """Runs whole episodes and returns (mean, deviation) of their returns.

    With several environments, each runs its share of the episodes, so that short episodes are not preferred.

    Args:
      model: anything with Stable-Baselines3's `predict`.
      env: an environment, an id, or a `VecEnv`.
      n_eval_episodes: number of episodes.
      deterministic: take the likeliest action, instead of sampling.
      render: call the environment's render after each step.
      callback: called after each step with ({"rewards", "dones", "infos", ...}, {}).
      reward_threshold: raises `Fault` if the mean return is below it.
      return_episode_rewards: return (list of returns, list of lengths) instead.
      warn: not used; for code that was written for Stable-Baselines3.
    """
    if n_eval_episodes < 1:
        raise UserError(f"n_eval_episodes: must be at least 1, not {n_eval_episodes}")
    envs = as_vec_env(env)
    count = envs.num_envs
    left = np.array([(n_eval_episodes + i) // count for i in range(count)])
    returns, lengths = [], []
    totals, steps = np.zeros(count), np.zeros(count, np.int64)
    observations, state, starts = envs.reset(), None, np.ones(count, bool)
    while (left > 0).any():
        actions, state = model.predict(observations, state=state, episode_start=starts, deterministic=deterministic)
        observations, rewards, dones, infos = envs.step(actions)
        totals, steps, starts = totals + rewards, steps + 1, dones
        if callback is not None:
            callback({"rewards": rewards, "dones": dones, "infos": infos, "observations": observations}, {})
        for i in np.flatnonzero(dones):
            # An environment that fails has no return; its share is used up, so that the evaluation ends.
            if left[i] > 0 and "failed" not in infos[i]:
                episode = infos[i].get("episode", {"r": totals[i], "l": steps[i]})
                returns.append(float(episode["r"]))
                lengths.append(int(episode["l"]))
            left[i] -= 1
            totals[i], steps[i] = 0.0, 0
        if render:
            envs.render()
    if not returns:
        raise Fault("no episode was evaluated: every environment failed")
    mean, deviation = float(np.mean(returns)), float(np.std(returns))
    if reward_threshold is not None and mean < reward_threshold:
        raise Fault(f"the mean return is {mean:.2f}, below reward_threshold {reward_threshold:.2f}")
    return (returns, lengths) if return_episode_rewards else (mean, deviation)
