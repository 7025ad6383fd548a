"""check_env: sound environments pass, and each fault is one line that names it."""

import numpy as np
import pytest
from small_environments import CartPole, Faulty, Guess, Older, copies

from jaxrlhf.environments.check import check_env, find_problems
from jaxrlhf.environments.spaces import Box, Discrete
from jaxrlhf.errors import UserError


@pytest.mark.parametrize("env", [CartPole(), Guess(), *copies().values()], ids=lambda env: type(env).__name__)
def test_sound_environments_pass(env, capsys):
    assert check_env(env) == [] and not capsys.readouterr().out


def test_the_older_form_passes_with_remarks(capsys):
    remarks = check_env(Older())
    assert len(remarks) == 2 and "env.seed" in remarks[0] and "4 values" in remarks[1]
    assert capsys.readouterr().out.count("Older: ") == 2


class Chat(Guess):
    def reset(self, seed=None, options=None):
        return [{"role": "user", "content": super().reset(seed)[0]}], {}


def with_methods(base=CartPole, **members):
    return type("Mine", (base,), members)()


def now_and_then(self, action):
    observation, *rest = CartPole.step(self, action)
    return observation + np.float32(np.random.rand()), *rest


def step_with(**changes):
    """A step whose results are replaced by name."""
    names = ("observation", "reward", "terminated", "truncated", "info")

    def step(self, action):
        return tuple({**dict(zip(names, CartPole.step(self, action))), **changes}.values())

    return step


FAULTS = {
    "the method step is missing": type("Mine", (), {"reset": CartPole.reset})(),
    "the attribute action_space is missing": with_methods(action_space=None),
    "observation_space is Dict, which is not supported": with_methods(observation_space=type("Dict", (), {})()),
    "observation_space: low must be below high": with_methods(observation_space=Box(1, 1, (4,))),
    "reset raises ZeroDivisionError: ": with_methods(reset=lambda self, seed=None: 1 / 0),
    "reset must return (observation, info) with a dict as info": with_methods(reset=lambda self, seed=None: (1, 2)),
    "reset: the observation must have shape [4], not [3]": with_methods(
        reset=lambda self, seed=None: (np.zeros(3, np.float32), {})
    ),
    "reset: one seed gives two episodes that differ": with_methods(step=now_and_then),
    "step must return (observation, reward, terminated, truncated, info), not 3 values": with_methods(
        step=lambda self, action: (0, 0, {})
    ),
    "step: the reward must be a number, not 'x'": with_methods(step=step_with(reward="x")),
    "step: the reward must be a finite number, not nan": with_methods(step=step_with(reward=float("nan"))),
    "step: truncated must be True or False, not None": with_methods(step=step_with(truncated=None)),
    "step: info must be a dict, not []": with_methods(step=step_with(info=[])),
    "step: the observation has NaN": with_methods(step=step_with(observation=np.full(4, np.nan, np.float32))),
    "step: the observation must have an integer dtype, not float64": with_methods(
        observation_space=Discrete(3),
        reset=lambda self, seed=None: (len(CartPole.reset(self, seed)), {}),
        step=step_with(observation=1.0),
    ),
    "step: the observation is out of bounds: its least number is 5": with_methods(
        observation_space=Box(-1, 1, (4,)), step=step_with(observation=np.full(4, 5, np.float32))
    ),
    "raises RuntimeError: no more": Faulty("raises"),
    "step: messages must be dicts with role and content": with_methods(
        Chat, step=lambda self, a: ([1], 0.0, True, False, {})
    ),
    "step: the observation must be text or messages, not 3": with_methods(
        Guess, step=lambda self, a: (3, 0.0, True, False, {})
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", FAULTS)
def test_each_fault_is_one_line(line):
    problems, _ = find_problems(FAULTS[line])
    assert len(problems) == 1 and line in problems[0] and "\n" not in problems[0]
    with pytest.raises(UserError, match="one problem\n  "):
        check_env(FAULTS[line])


def test_gymnasiums_own_environments_pass():
    gymnasium = pytest.importorskip("gymnasium")
    for name in ("CartPole-v1", "Pendulum-v1", "Taxi-v4"):
        if name in gymnasium.registry:
            problems, _ = find_problems(gymnasium.make(name))
            assert problems == []
