"""`check_env` tries an environment out and reports everything that is wrong with it."""

from typing import Any

import numpy as np

from jaxrlhf.environments import spaces
from jaxrlhf.environments.protocol import adapt, is_chat, is_text, name_of, reset_result, step_result
from jaxrlhf.errors import UserError, one_line, short

_STEPS = 20  # steps per trial episode
_BOOLS = (bool, np.bool_)


def check_env(env: Any, warn: bool = True, skip_render_check: bool = True) -> list[str]:
    """Tries an environment out. Returns remarks if it can be used, else raises an error that lists all problems.

    It checks the methods, the spaces, what reset and step return (number of values, types, shapes, bounds, NaN), the
    form of chat messages, and whether the same seed gives the same episode twice. The environment is reset several
    times and not closed.

    Args:
      env: an environment in the current or the older form.
      warn: whether to print the remarks that are returned.
      skip_render_check: ignored, because render is never called. Code for Stable-Baselines3 may give this argument.

    Returns:
      A list of remarks: lines about things that work but could be better.

    Raises:
      UserError: something is wrong. The message has one line for each problem.
    """
    problems, remarks = find_problems(env)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{name_of(env)}: {count}\n{lines}")
    if warn:
        for line in remarks:
            print(f"{name_of(env)}: {line}")
    return remarks


def find_problems(env: Any) -> tuple[list[str], list[str]]:
    """Returns (problems, remarks), one line each."""
    missing = [name for name in ("reset", "step") if not callable(getattr(env, name, None))]
    if missing:
        return [f"the method {name} is missing" for name in missing], []
    if isinstance(env, type):
        return ["this is a class; give an environment, such as Class()"], []
    trial = _Trial(env)
    trial.run()
    return list(dict.fromkeys(trial.problems)), list(dict.fromkeys(trial.remarks))


class _Trial:
    """Runs some episodes of an environment, and collects problems and remarks."""

    def __init__(self, env: Any) -> None:
        self.env, self.problems, self.remarks = env, [], []
        self.observed = getattr(env, "observation_space", None)
        self.acted = getattr(env, "action_space", None)
        self.text = False

    def run(self) -> None:
        first = self._reset(0)
        if first is None:
            return
        self.text = is_text(first[0]) or (
            spaces.kind(self.observed) == "Text" or (self.observed is None and isinstance(first[0], list))
        )
        if not self.text:
            self._check_spaces()
            if self.problems:
                return
        self._remark_on_reset()
        episodes = [[] if self.problems else self._episode(seed) for seed in (0, 0, 1)]
        if not self.problems and not _same(episodes[0], episodes[1]):
            self.problems.append("reset: one seed gives two episodes that differ; draw random numbers from the seed")

    def _check_spaces(self) -> None:
        for space, use in ((self.observed, "observation_space"), (self.acted, "action_space")):
            if space is None:
                self.problems.append(f"the attribute {use} is missing")
            elif fault := spaces.fault(space, use):
                self.problems.append(fault)
        if not self.problems and spaces.kind(self.acted) == "Box":
            low, high = np.asarray(self.acted.low, float), np.asarray(self.acted.high, float)
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                self.remarks.append("action_space has no bounds: actions are not clipped")
            elif not (np.allclose(low, -high) and (high <= 2).all()):
                self.remarks.append("action_space is best about -1 to 1: the first actions have deviation 1")

    def _remark_on_reset(self) -> None:
        adapted = adapt(self.env)
        if not adapted.takes_seed and not callable(getattr(self.env, "seed", None)):
            self.remarks.append("reset takes no seed: episodes cannot be reproduced")
        elif not adapted.takes_seed:
            self.remarks.append("reset takes no seed: this is the older form, env.seed is called instead")

    def _reset(self, seed: int) -> tuple[Any, dict[str, Any]] | None:
        adapted = adapt(self.env)
        given = {"seed": seed} if adapted.takes_seed else {}
        try:
            if not adapted.takes_seed and callable(getattr(self.env, "seed", None)):
                self.env.seed(seed)
            result = self.env.reset(**given)
        except Exception as error:
            self.problems.append(f"reset raises {type(error).__name__}: {one_line(error)}")
            return None
        if isinstance(result, tuple) and not (len(result) == 2 and isinstance(result[1], dict)):
            values = f"{len(result)} values" if len(result) != 2 else f"(observation, {short(result[1])})"
            self.problems.append(f"reset must return (observation, info) with a dict as info, not {values}")
            return None
        return reset_result(result)

    def _episode(self, seed: int) -> list[Any]:
        """Runs some steps of an episode with random actions from the seed. Returns the results without the infos."""
        started = self._reset(seed)
        if started is None:
            return []
        random, seen = np.random.default_rng(seed), [started[0]]
        self._check_observation(started[0], "reset")
        for _ in range(0 if self.problems else _STEPS):
            action = f"action {random.integers(10)}" if self.text else spaces.sample(self.acted, random)
            try:
                result = self.env.step(action)
            except Exception as error:
                self.problems.append(f"step({short(action)}) raises {type(error).__name__}: {one_line(error)}")
                return seen
            if not self._check_step(result):
                return seen
            observation, reward, terminated, truncated, _ = step_result(result, self.env)
            self._check_observation(observation, "step")
            seen += [observation, reward, bool(terminated), bool(truncated)]
            if terminated or truncated or self.problems:
                break
        return seen

    def _check_step(self, result: Any) -> bool:
        if not isinstance(result, tuple) or len(result) not in (4, 5):
            found = f"{len(result)} values" if isinstance(result, tuple) else short(result)
            self.problems.append(f"step must return (observation, reward, terminated, truncated, info), not {found}")
            return False
        if len(result) == 4:
            self.remarks.append("step returns 4 values: this is the older form; time limits need truncated, a fifth")
        _, reward, *ends, info = result
        if isinstance(reward, _BOOLS) or not isinstance(reward, int | float | np.integer | np.floating):
            self.problems.append(f"step: the reward must be a number, not {short(reward)}")
        elif not np.isfinite(reward):
            self.problems.append(f"step: the reward must be a finite number, not {reward}")
        for end, name in zip(ends, ("terminated", "truncated") if len(ends) == 2 else ("done",)):
            if not isinstance(end, _BOOLS):
                self.problems.append(f"step: {name} must be True or False, not {short(end)}")
        if not isinstance(info, dict):
            self.problems.append(f"step: info must be a dict, not {short(info)}")
        return not self.problems

    def _check_observation(self, observation: Any, method: str) -> None:
        if self.text:
            if isinstance(observation, list):
                if not is_chat(observation):
                    self.problems.append(
                        f"{method}: messages must be dicts with role and content, not {short(observation)}"
                    )
            elif not isinstance(observation, str):
                self.problems.append(f"{method}: the observation must be text or messages, not {short(observation)}")
            return
        if spaces.kind(self.observed) == "Box" and not isinstance(observation, np.ndarray | np.generic):
            self.remarks.append(f"{method}: the observation is a {type(observation).__name__}; a numpy array is faster")
        if reason := spaces.misfit(self.observed, observation):
            self.problems.append(f"{method}: the observation {reason}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, str | dict) or one is None:
        return one == other
    return np.array_equal(one, other)
