"""Callbacks of `PPO.learn`, in Stable-Baselines3's form."""

from collections.abc import Callable
from typing import Any


class BaseCallback:
    """A callback with Stable-Baselines3's methods. A subclass overrides what it needs.

    `model` is the model in training, `num_timesteps` the timesteps so far, `n_calls` the calls of `on_step`, and
    `locals` has "rewards", "dones", "infos" and "new_obs" of the last step.
    """

    def __init__(self, verbose: int = 0) -> None:
        self.verbose, self.n_calls, self.num_timesteps = verbose, 0, 0
        self.model: Any = None
        self.locals: dict[str, Any] = {}
        self.globals: dict[str, Any] = {}

    def init_callback(self, model: Any) -> None:
        self.model, self.training_env = model, model.get_env()
        self._init_callback()

    def step(self, values: dict[str, Any]) -> bool:
        self.locals, self.n_calls, self.num_timesteps = values, self.n_calls + 1, self.model.num_timesteps
        return self._on_step()

    def on_training_start(self, values: dict[str, Any], _: dict[str, Any]) -> None:
        self.locals, self.num_timesteps = values, self.model.num_timesteps
        self._on_training_start()

    def on_training_end(self) -> None:
        self._on_training_end()

    def on_rollout_start(self) -> None:
        self._on_rollout_start()

    def on_rollout_end(self) -> None:
        self.num_timesteps = self.model.num_timesteps
        self._on_rollout_end()

    def _init_callback(self) -> None:
        """Called before the training, with `model` set."""

    def _on_training_start(self) -> None:
        """Called before the first step."""

    def _on_rollout_start(self) -> None:
        """Called before an iteration samples."""

    def _on_step(self) -> bool:
        """Called after each step of all environments. If it returns False, the training ends."""
        return True

    def _on_rollout_end(self) -> None:
        """Called before the update of an iteration."""

    def _on_training_end(self) -> None:
        """Called after the last update."""


class Functions(BaseCallback):
    """Functions of (locals, globals), each called after every step. If one returns False, the training ends."""

    def __init__(self, functions: list[Callable[[dict[str, Any], dict[str, Any]], Any]]) -> None:
        super().__init__()
        self._functions = functions

    def _on_step(self) -> bool:
        return all([function({**self.locals, "self": self.model}, {}) is not False for function in self._functions])


class CallbackList(BaseCallback):
    """Several callbacks as one."""

    def __init__(self, callbacks: list[BaseCallback]) -> None:
        super().__init__()
        self.callbacks = callbacks

    def init_callback(self, model: Any) -> None:
        super().init_callback(model)
        for callback in self.callbacks:
            callback.init_callback(model)

    def step(self, values: dict[str, Any]) -> bool:
        return all([callback.step(values) is not False for callback in self.callbacks])

    def on_training_start(self, values: dict[str, Any], _: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_training_start(values, _)

    def on_training_end(self) -> None:
        for callback in self.callbacks:
            callback.on_training_end()

    def on_rollout_start(self) -> None:
        for callback in self.callbacks:
            callback.on_rollout_start()

    def on_rollout_end(self) -> None:
        for callback in self.callbacks:
            callback.on_rollout_end()


def as_callback(callback: Any) -> BaseCallback | None:
    """Returns a callback made from a callback, a function of (locals, globals), or a list of these; None for None."""
    if callback is None or isinstance(callback, BaseCallback):
        return callback
    several = list(callback) if isinstance(callback, list | tuple) else [callback]
    return CallbackList([c if isinstance(c, BaseCallback) else Functions([c]) for c in several])
