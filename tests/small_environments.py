"""Small environments without Gymnasium: in the current form, in the older form, in text, and faulty ones."""

import math
import sys
import time

import numpy as np

from jaxrlhf.environments.spaces import Box, Discrete, MultiBinary, MultiDiscrete


class CartPole:
    """A pole on a cart (Barto, Sutton and Anderson 1983): reward 1 per step, 200 steps at most."""

    observation_space = Box(-np.inf, np.inf, (4,))
    action_space = Discrete(2)

    def reset(self, seed=None, options=None):
        if seed is not None or not hasattr(self, "random"):
            self.random = np.random.default_rng(seed)
        self.state, self.steps = self.random.uniform(-0.05, 0.05, 4), 0
        return self.state.astype(np.float32), {}

    def step(self, action):
        _, speed, angle, turn = self.state
        force, sine, cosine = (10.0 if action == 1 else -10.0), math.sin(angle), math.cos(angle)
        push = (force + 0.05 * turn**2 * sine) / 1.1
        turning = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        moving = push - 0.05 * turning * cosine / 1.1
        self.state = self.state + 0.02 * np.array([speed, moving, turn, turning])
        self.steps += 1
        fallen = bool(abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.2095)
        return self.state.astype(np.float32), 1.0, fallen, self.steps >= 200, {}


class Older(CartPole):
    """The older form: reset returns the observation alone, step four values, and `seed` is a method."""

    def seed(self, seed):
        self.random = np.random.default_rng(seed)

    def reset(self):
        return super().reset()[0]

    def step(self, action):
        observation, reward, fallen, cut, _ = super().step(action)
        return observation, reward, fallen or cut, {"TimeLimit.truncated": cut and not fallen}


class Copy:
    """Reward 1 for each number of the action that repeats the observation; 8 steps."""

    def __init__(self, observed, acted):
        self.observation_space, self.action_space = observed, acted

    def reset(self, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.steps = 0
        return self._next(), {}

    def _next(self):
        self.shown = np.asarray(self.random.integers(2, size=self.observation_space.shape))
        return self.shown.astype(self.observation_space.dtype)

    def step(self, action):
        reward = float(np.mean(-np.abs(np.asarray(action, float) - self.shown)))
        self.steps += 1
        return self._next(), reward, self.steps == 8, False, {}


def copies():
    """One environment for each kind of actions and observations."""
    return {
        "Discrete": Copy(Discrete(2), Discrete(2)),
        "MultiDiscrete": Copy(MultiDiscrete([2, 2]), MultiDiscrete([2, 3])),
        "MultiBinary": Copy(MultiBinary(3), MultiBinary(3)),
        "Box": Copy(Box(0, 1, (2,)), Box(-1, 1, (2,))),
    }


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Faulty(CartPole):
    """Misbehaves at its third step, as `how` says."""

    def __init__(self, how):
        self.how = how

    def reset(self, **options):
        observation, info = super().reset(**options)
        return ([[1.0], [1.0, 2.0]] if self.how == "ragged reset" else observation), info

    def step(self, action):
        if self.steps < 2:
            return super().step(action)
        if self.how == "raises":
            raise RuntimeError("no more")
        if self.how == "raises what cannot be printed":
            raise Unprintable
        if self.how == "hangs":
            while True:
                time.sleep(0.01)
        if self.how == "exits":
            sys.exit(3)
        if self.how == "prints":
            print("x" * 300_000)
            return super().step(action)
        observation, reward, *rest = super().step(action)
        nan = observation * np.nan
        wrong = {"shape": (observation[:2], reward), "nan": (nan, reward), "reward": (observation, "x")}
        return (*wrong[self.how], *rest) if self.how in wrong else None


class Guess:
    """Text: guess a digit in at most three turns."""

    def reset(self, seed=None, options=None):
        self.number, self.turns = int(np.random.default_rng(seed).integers(10)), 0
        return "guess a digit", {}

    def step(self, action):
        self.turns += 1
        right = action.endswith(str(self.number))
        return "right" if right else "wrong", float(right), right, self.turns == 3, {}


def make_raising():
    return Faulty("raises")


def make_hanging():
    return Faulty("hangs")


def make_exiting():
    return Faulty("exits")


def make_printing():
    return Faulty("prints")
