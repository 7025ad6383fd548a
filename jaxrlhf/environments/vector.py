"""Several environments as one, in the form of Stable-Baselines3's VecEnv, with arrays of actions and results."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.environments import spaces
from jaxrlhf.environments.pool import Pool, Single
from jaxrlhf.environments.protocol import adapt
from jaxrlhf.environments.workers import Failed
from jaxrlhf.errors import Fault, UserError, one_line, short

_TRIES = 4  # resets of one environment in a row; the pool retires it before


class VecEnv:
    """N environments with the same numeric spaces. When an episode ends, the environment is reset at once.

    An environment that raises, hangs or returns something that is not in its space loses its own episode and is
    replaced (see `Pool`). In the result of this step, its done is True, its reward is 0, and info["failed"] is the
    reason.

    Args:
      factories: functions that each return an environment; or a single environment, whose exceptions are not caught.
      mode, step_timeout, names: see `Pool`.
      seed: seed of all resets; None means that environments are reset without a seed.
    """

    def __init__(
        self,
        factories: Sequence[Callable[[], Any]] | Any,
        mode: str = "sequential",
        step_timeout: float | None = None,
        seed: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(factories, Sequence):
            self.pool: Pool | Single = Pool(factories, mode, step_timeout, names)
        else:
            self.pool = Single(adapt(factories))
        self.num_envs = len(self.pool)
        self.observation_space, self.action_space = self.pool.get(0, "observation_space", "action_space")
        for space, use in ((self.observation_space, "observation_space"), (self.action_space, "action_space")):
            if fault := spaces.fault(space, use):
                raise UserError(f"{self.pool.names[0]}: {fault}")
        self._shape = tuple(self.observation_space.shape)
        self._observations = np.zeros((self.num_envs, *self._shape), self.observation_space.dtype)
        self._float = self._observations.dtype.kind == "f"
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._started = time.time()
        self.reset_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Seeds later resets: episode e of environment i is reset with a seed that follows from (seed, i, e)."""
        self._seed, self._episodes = seed, [0] * self.num_envs

    def reset(self) -> np.ndarray:
        """Starts an episode in each environment and returns the observations [N, ...]."""
        self._reset(range(self.num_envs))
        return self._observations.copy()

    def step(
        self, actions: Sequence[Any] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Steps each environment, and returns (observations [N, ...], rewards f32[N], dones bool[N], infos).

        Where done is True, the observation is the first of the next episode. The info of an episode that did not fail
        then has "terminal_observation", "TimeLimit.truncated" (True if the episode was cut off before its end) and
        "episode" (return "r", length "l", and "t", the seconds since the VecEnv was made).
        """
        results = self.pool.step(dict(enumerate(actions)))
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = []
        self._lengths += 1
        for i in range(self.num_envs):
            result = results[i]
            if not isinstance(result, Failed):
                result = self._accept(i, result, rewards)
            if isinstance(result, Failed):
                dones[i] = True
                infos.append({"failed": str(result), "terminal_observation": self._observations[i].copy()})
                rewards[i] = 0.0
                continue
            terminated, truncated, info = result
            if terminated or truncated:
                dones[i] = True
                info = self._ended(i, info, truncated and not terminated)
            infos.append(info)
        if dones.any():
            self._reset(np.flatnonzero(dones).tolist())
        return self._observations.copy(), rewards, dones, infos

    def _accept(self, i: int, result: Any, rewards: np.ndarray) -> Any:
        """Stores observation and reward. Returns (terminated, truncated, info), or `Failed` if they are unusable."""
        try:
            observation, reward, terminated, truncated, info = result
            if reason := self._unusable(observation):
                return self.pool.fail(i, f"step: the observation {reason}")
            rewards[i] = reward
            if not np.isfinite(rewards[i]):
                return self.pool.fail(i, f"step: the reward must be a finite number, not {reward}")
            terminated, truncated, info = bool(terminated), bool(truncated), dict(info)
        except (TypeError, ValueError) as error:
            return self.pool.fail(i, f"step returned {short(result)}: {error}")
        self._observations[i] = observation
        self._returns[i] += rewards[i]
        return terminated, truncated, info

    def _unusable(self, observation: Any) -> str:
        """Returns why an observation cannot be used, or "". Bounds are checked only in `check_env`."""
        try:
            array = np.asarray(observation)
        except ValueError:  # lists of unequal lengths
            return spaces.misfit(self.observation_space, observation) or "is not numbers"
        if array.shape != self._shape or array.dtype.kind not in "biuf":
            return spaces.misfit(self.observation_space, observation) or "is not numbers"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return "has NaN or infinite numbers"
        return ""

    def _ended(self, i: int, info: dict[str, Any], truncated: bool) -> dict[str, Any]:
        self.pool.finished(i)
        info["terminal_observation"] = self._observations[i].copy()
        info["TimeLimit.truncated"] = truncated
        if not (isinstance(info.get("episode"), dict) and {"r", "l"} <= info["episode"].keys()):
            seconds = round(time.time() - self._started, 6)
            info["episode"] = {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": seconds}
        return info

    def _reset(self, rows: Sequence[int]) -> None:
        left = list(rows)
        for _ in range(_TRIES):
            again = []
            for i, result in self.pool.reset({i: self._next_seed(i) for i in left}).items():
                if isinstance(result, Failed):
                    again += [i] if str(result) != "retired" else []
                elif reason := self._unusable(result[0]):
                    self.pool.fail(i, f"reset: the observation {reason}")
                    again.append(i)
                else:
                    self._observations[i], self.reset_infos[i] = result
            if not again:
                break
            left = again
        self._returns[rows], self._lengths[rows] = 0.0, 0

    def _next_seed(self, i: int) -> int | None:
        if self._seed is None:
            return None
        self._episodes[i] += 1
        return int(np.random.SeedSequence([self._seed, i, self._episodes[i]]).generate_state(1)[0] >> 1)

    def get_attr(self, name: str) -> list[Any]:
        """Returns an attribute of each environment."""
        return [self.pool.get(i, name)[0] for i in range(self.num_envs)]

    def render(self) -> list[Any]:
        """Renders environments that run in this process, and returns what their `render` returned."""
        if isinstance(self.pool, Single):
            return [self.pool.env.render()]
        return [worker.env.render() for worker in self.pool.workers if hasattr(worker, "env")]

    def close(self) -> None:
        """Closes all environments."""
        self.pool.close()


def make_env(env: Any, **arguments: Any) -> Any:
    """Returns an environment. `env` is the environment, a class or function that makes it, or its id in Gymnasium."""
    if isinstance(env, str):
        try:
            import gymnasium
        except ImportError:
            raise UserError(
                f"{env}: an id needs the package Gymnasium; run pip install 'jaxrlhf[gym]', or give an environment"
            ) from None
        try:
            return gymnasium.make(env, **arguments)
        except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
            raise UserError(f"{env}: Gymnasium cannot make it: {one_line(error)}") from None
    if isinstance(env, type) or (callable(env) and not hasattr(env, "step")):
        return env(**arguments)
    return env


class _Maker:
    """A factory of environments that can be sent to a process."""

    def __init__(self, env: Any, arguments: Mapping[str, Any]) -> None:
        self.env, self.arguments = env, dict(arguments)

    def __call__(self) -> Any:
        return make_env(self.env, **self.arguments)


def make_vec_env(
    env_id: str | Callable[..., Any],
    n_envs: int = 1,
    seed: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    mode: str = "sequential",
    step_timeout: float | None = None,
) -> VecEnv:
    """Returns n environments of one kind as a `VecEnv`.

    Args:
      env_id: an id registered with Gymnasium, or a class or function that returns an environment.
      n_envs: number of environments.
      seed: seed of all resets; `PPO` sets its own.
      env_kwargs: arguments for the environment.
      mode: "sequential" for fast environments, "threads" for environments that wait, for example for a server, or
        "processes" for environments that compute much.
      step_timeout: seconds per reset or step, after which an environment is replaced; needs threads or processes.
    """
    if not (isinstance(env_id, str) or callable(env_id)):
        raise UserError(f"env_id: must be an id or a function that makes an environment, not {short(env_id)}")
    if n_envs < 1:
        raise UserError(f"n_envs: must be at least 1, not {n_envs}")
    label = env_id if isinstance(env_id, str) else getattr(env_id, "__name__", type(env_id).__name__)
    names = [f"environment {i} ({label})" for i in range(n_envs)]
    return VecEnv([_Maker(env_id, env_kwargs or {})] * n_envs, mode, step_timeout, seed, names)


def as_vec_env(env: Any) -> VecEnv:
    """Returns a `VecEnv` unchanged. Makes one from an environment, an id, or a class or function that makes one."""
    if isinstance(env, VecEnv):
        return env
    if env is None:
        raise Fault("there is no environment; give one with set_env, or as env of load")
    if isinstance(env, str | type):
        return make_vec_env(env)
    return VecEnv(make_env(env))
