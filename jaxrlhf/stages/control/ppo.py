"""`jaxrlhf.PPO`: proximal policy optimization in the form of Stable-Baselines3.

    model = PPO("MlpPolicy", env)
    model.learn(100_000)
    model.save("model")
    model = PPO.load("model", env=env)
    action, _ = model.predict(observation)
"""

import os
import secrets
import time
from collections import deque
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError
from rich.progress import Progress

from jaxrlhf.config.control import ControlConfig, Schedule
from jaxrlhf.environments import spaces
from jaxrlhf.environments.vector import VecEnv, as_vec_env
from jaxrlhf.errors import UserError, short
from jaxrlhf.stages.control.callbacks import BaseCallback, as_callback
from jaxrlhf.stages.control.files import filled, read_model, write_model
from jaxrlhf.stages.control.mlp_policy import MlpPolicy
from jaxrlhf.stages.control.rollouts import collect

POLICIES = {"MlpPolicy": MlpPolicy}
_ROLLOUT, _UPDATE, _PREDICT, _RESETS = range(4)  # purposes of random numbers
_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")


class PPO:
    """Proximal policy optimization (1707.06347) with Stable-Baselines3's arguments, defaults and methods.

    A timestep is one step of one environment. An iteration has n_steps timesteps per environment.

    Args:
      policy: "MlpPolicy".
      env: an environment in Gymnasium's or gym's form, an id registered with Gymnasium, or a `VecEnv`.
      settings: see `jaxrlhf.config.control.ControlConfig`, such as learning_rate, n_steps, batch_size, n_epochs, gamma,
        gae_lambda, clip_range, ent_coef, vf_coef, max_grad_norm, target_kl, policy_kwargs, seed, verbose.

    Attributes:
      num_timesteps: timesteps so far.
      metrics: the numbers of the last iteration, by name.
      ep_info_buffer: returns "r" and lengths "l" of the last episodes.
    """

    def __init__(self, policy: str, env: Any, **settings: Any) -> None:
        if policy not in POLICIES:
            raise UserError(f"policy: must be {' or '.join(POLICIES)}, not {short(policy)}")
        self.policy_name, self.config = policy, _settings(settings)
        self.seed = secrets.randbits(31) if self.config.seed is None else self.config.seed
        self.env: VecEnv | None = None if env is None else as_vec_env(env)
        self.num_timesteps = self.iterations = self._predictions = 0
        self.metrics: dict[str, float] = {}
        self.ep_info_buffer: deque[dict[str, Any]] = deque(maxlen=self.config.stats_window_size)
        if self.env is not None:
            self._build(self.env.observation_space, self.env.action_space)

    def _build(self, observed: Any, acted: Any) -> None:
        self.observation_space, self.action_space = observed, acted
        self.policy = POLICIES[self.policy_name](self.config, observed, acted, self.seed)

    # ------------------------------------------------------------------ environments

    def get_env(self) -> VecEnv | None:
        """Returns the environment as a `VecEnv`."""
        return self.env

    def set_env(self, env: Any) -> None:
        """Sets the environment. Raises `UserError` if its spaces are not those of the model."""
        envs = as_vec_env(env)
        if self.env is None and not hasattr(self, "policy"):
            self._build(envs.observation_space, envs.action_space)
        for name in ("observation_space", "action_space"):
            own, other = getattr(self, name), getattr(envs, name)
            if spaces.to_json(own) != spaces.to_json(other):
                raise UserError(
                    f"env: its {name} is {spaces.describe(other)}, but the model's is {spaces.describe(own)}; shape, "
                    "dtype and bounds must be the same; give an environment with the same spaces"
                )
        self.env = envs

    # ------------------------------------------------------------------ learning

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "PPO":
        """Trains for at least `total_timesteps` timesteps, in whole iterations, and returns the model.

        The environments are reset first, with seeds that follow from the model's seed and its iterations so far. So a
        model that was saved and loaded goes on as the model itself would, if the environments follow their seeds.

        Args:
          total_timesteps: number of timesteps.
          callback: a `BaseCallback`, a function of (locals, globals) that returns False to stop, or a list of these.
          log_interval: with verbose=1, a table is printed after every `log_interval` iterations.
          tb_log_name: not used; for code that was written for Stable-Baselines3.
          reset_num_timesteps: if False, the count of timesteps continues from `num_timesteps`.
          progress_bar: if True, shows a progress bar.
        """
        if total_timesteps < 1:
            raise UserError(f"total_timesteps: must be at least 1, not {total_timesteps}")
        if self.env is None:
            raise UserError("learn: the model has no environment; give one with set_env, or PPO.load(path, env=env)")
        if self.config.n_steps * self.env.num_envs < 2:
            raise UserError(f"n_steps: must be at least 2 with one environment, not {self.config.n_steps}")
        total = total_timesteps if reset_num_timesteps else total_timesteps + self.num_timesteps
        self.num_timesteps = 0 if reset_num_timesteps else self.num_timesteps
        call = as_callback(callback)
        if call is not None:
            call.init_callback(self)
            call.on_training_start({"total_timesteps": total}, {})
        with Progress(disable=not progress_bar) as progress:
            self._progress = (progress, progress.add_task("timesteps", total=total, completed=self.num_timesteps))
            self._learn(total, call, log_interval)
        if call is not None:
            call.on_training_end()
        return self

    def _learn(self, total: int, call: BaseCallback | None, log_interval: int) -> None:
        policy, envs, began, before = self.policy, self.env, time.perf_counter(), self.num_timesteps
        envs.seed(int(self._random(_RESETS).integers(2**31)))
        features = policy.features(envs.reset())
        policy.normalization.start(envs.num_envs)
        policy.normalization.see(features)
        inputs, rounds = policy.normalization.observe(features), 0
        while self.num_timesteps < total:
            if call is not None:
                call.on_rollout_start()
            random, on_step = self._random(_ROLLOUT), lambda values: self._count(values, call)
            samples, inputs, whole = collect(policy, envs, inputs, self.config.n_steps, random, on_step)
            self._show_progress()
            if not whole:
                self.iterations += 1  # the next random numbers are new
                return
            if call is not None:
                call.on_rollout_end()
            left = max(1.0 - self.num_timesteps / total, 0.0)
            trained = policy.update(samples, left, self._random(_UPDATE))
            self.iterations, rounds = self.iterations + 1, rounds + 1
            seconds = time.perf_counter() - began
            self.metrics = {
                **self._episodes(),
                "time/iterations": rounds,
                "time/fps": int((self.num_timesteps - before) / seconds),
                "time/time_elapsed": int(seconds),
                "time/total_timesteps": self.num_timesteps,
                **{f"train/{name}": value for name, value in trained.items()},
            }
            if self.config.verbose >= 1 and rounds % log_interval == 0:
                print(_table(self.metrics), flush=True)

    def _count(self, values: dict[str, Any], call: BaseCallback | None) -> bool:
        """Counts a step of all environments, and the episodes that it ends. Returns whether the training goes on."""
        self.num_timesteps += len(values["dones"])
        if values["dones"].any():
            self.ep_info_buffer.extend(info["episode"] for info in values["infos"] if "episode" in info)
        return call is None or call.step(values) is not False

    def _show_progress(self) -> None:
        progress, task = self._progress
        progress.update(task, completed=self.num_timesteps)

    def _episodes(self) -> dict[str, float]:
        if not self.ep_info_buffer:
            return {}
        length, total = (float(np.mean([episode[name] for episode in self.ep_info_buffer])) for name in "lr")
        return {"rollout/ep_len_mean": length, "rollout/ep_rew_mean": total}

    def _random(self, purpose: int) -> np.random.Generator:
        """Returns a generator seeded by seed, purpose, and the number of iterations (or of predictions) so far."""
        index = self._predictions if purpose == _PREDICT else self.iterations
        return np.random.Generator(np.random.Philox(key=[self.seed, purpose], counter=[0, 0, index, 0]))

    # ------------------------------------------------------------------ acting

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Returns (action, state) for one observation, or for several [N, ...].

        `state` is returned unchanged, because MlpPolicy has no state. The pair (observation, info), which Gymnasium's
        `reset` returns, is also accepted. Raises `UserError` if the shape is not that of the model's observations.
        """
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            observation = observation[0]
        array, shape = np.asarray(observation), tuple(self.observation_space.shape)
        single = array.shape == shape
        if array.dtype.kind not in "biuf" or not (single or (array.ndim and array.shape[1:] == shape)):
            raise UserError(
                f"predict: the observation must have shape {list(shape)}, or [N, ...] for N of them, not "
                f"{list(array.shape) if array.dtype.kind in 'biuf' else short(observation)}"
            )
        inputs = self.policy.read(array[None] if single else array)
        draws = None
        if not deterministic:
            draws = self.policy.draws(self._random(_PREDICT), (len(inputs),))
            self._predictions += 1
        actions = self.policy.for_env(self.policy.act(inputs, draws))
        return (actions[0] if single else actions), state

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model as a zip of JSON and safetensors, with all that predictions and further training need.

        Schedules that are functions are not written: give them to `load` again.
        """
        settings = self.config.model_dump(exclude={"seed"})
        functions = {name: settings[name] for name in _SCHEDULES if callable(settings[name])}
        settings |= {name: f"<{getattr(value, '__name__', 'function')}>" for name, value in functions.items()}
        about = {
            "policy": self.policy_name,
            "settings": settings,
            "seed": self.seed,
            "observation_space": spaces.to_json(self.observation_space),
            "action_space": spaces.to_json(self.action_space),
            "num_timesteps": self.num_timesteps,
            "iterations": self.iterations,
            "predictions": self._predictions,
            "episodes": [{"r": float(e["r"]), "l": int(e["l"])} for e in self.ep_info_buffer],
        }
        write_model(path, about, self._tree())

    def _tree(self) -> dict[str, Any]:
        return {"state": self.policy.state, "normalization": self.policy.normalization.arrays()}

    @classmethod
    def load(cls, path: str | os.PathLike, env: Any = None, device: str = "auto", **settings: Any) -> "PPO":
        """Returns the model of a file that `save` wrote. `settings` replace stored settings.

        Without `env` the model can predict, but it cannot learn before `set_env`. Raises `UserError` if `save` did not
        write the file, or if `env` has other spaces.
        """
        about, arrays = read_model(path)
        stored = dict(about["settings"])
        for name in _SCHEDULES:
            if str(stored[name]).startswith("<") and name not in settings:
                stored[name] = _missing(name, stored[name])
        model = cls(about["policy"], None, **{**stored, "seed": about["seed"], "device": device, **settings})
        model._build(*(spaces.from_json(about[name]) for name in ("observation_space", "action_space")))
        tree = filled(model._tree(), arrays, str(path))
        model.policy.load(jax.device_put(tree["state"]))
        model.policy.normalization.restore(tree["normalization"])
        model.num_timesteps, model.iterations = about["num_timesteps"], about["iterations"]
        model._predictions = about["predictions"]
        model.ep_info_buffer.extend(about["episodes"])
        if env is not None:
            model.set_env(env)
        return model


def _settings(given: dict[str, Any]) -> ControlConfig:
    """Checks and returns the settings. Raises `UserError` for the first invalid setting."""
    device = given.pop("device", "auto")
    if device not in ("auto", "cpu"):
        raise UserError(f'device: must be "auto" or "cpu", not {device!r}; JAX_PLATFORMS sets the device of jax')
    try:
        return ControlConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ControlConfig.model_fields)
            raise UserError(f"{name}: unknown setting; the settings are {known}") from None
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}: {said[:1].lower()}{said[1:]}, not {short(first['input'])}") from None


def _missing(name: str, shown: str) -> Schedule:
    def schedule(left: float) -> float:
        raise UserError(f"{name}: the function {shown} is not in the file; give it again: PPO.load(path, {name}=...)")

    schedule.__name__ = shown.strip("<>")
    return schedule


def _table(metrics: dict[str, float]) -> str:
    """Returns the metrics as Stable-Baselines3 prints them."""
    lines, section = [], ""
    for name, value in metrics.items():
        head, _, tail = name.partition("/")
        lines += [(f"{head}/", "")] if head != section else []
        section = head
        lines.append((f"   {tail}", f"{value:.3g}" if isinstance(value, float) else str(value)))
    left, right = (max(len(line[i]) for line in lines) for i in (0, 1))
    bar = "-" * (left + right + 7)
    return "\n".join([bar, *(f"| {a:<{left}} | {b:<{right}} |" for a, b in lines), bar])
