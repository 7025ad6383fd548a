"""From settings to rewards: what each kind needs, and which key is at fault."""

import re

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from jaxrlhf.config import MeshConfig, RewardConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.load import compose, load_rewards, needs_own
from jaxrlhf.rewards.remote import HTTPReward

LENGTH = {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}}


def load(**settings):
    return load_rewards(RewardConfig.model_validate(settings), make_mesh(MeshConfig(), jax.devices()[:1]), "ppo.reward")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "sum"}, "needs parts"),
        ({"kind": "model", "parts": {"a": {}}}, "only that kind takes them"),
        ({"kind": "sum", "parts": {"a": {"kind": "sum", "parts": {"b": {}}}}}, "a sum within a sum"),
        ({"kind": "http"}, "needs url"),
        ({"kind": "http", "url": "http://x", "path": "y"}, "takes no path"),
        ({"kind": "model", "options": {"a": 1}}, "options and columns are for kind: function"),
        ({"kind": "sum", "parts": {"a": {"weight": float("nan")}}}, "finite"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "http", "url": "ftp://host/score"}, r"ppo\.reward\.url: .*http"),
        ({"kind": "sum", "parts": {"s": LENGTH | {"options": {"goal": 3}}}}, r"ppo\.reward\.parts\.s\.function"),
        ({"kind": "function", "function": "missing.py:f"}, r"ppo\.reward\.function: .*missing\.py"),
    ],
)
def test_what_cannot_be_loaded_is_named_by_its_key(settings, message):
    with pytest.raises(UserError) as caught:
        load(**settings)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_a_server_gets_its_settings():
    (server, weight) = load(kind="http", url="http://localhost:1/score", timeout=2.5, retries=0, batch_size=3)[""]
    assert isinstance(server, HTTPReward) and weight == 1.0 and server.name == "http://localhost:1/score"


def test_a_sum_may_hold_the_runs_own_reward():
    config = {"kind": "sum", "parts": {"own": {"weight": 2.0}, "short": LENGTH | {"weight": 0.5}}}
    assert needs_own(RewardConfig.model_validate(config)) and not needs_own(RewardConfig.model_validate(LENGTH))
    assert needs_own(RewardConfig()) and not needs_own(RewardConfig(path="folder"))
    rewards = load(**config)
    assert rewards["own"] == (None, 2.0)

    class Own:
        name = "own"

        def __call__(self, answers):
            return np.float32([1.0, 2.0])

    class Answers:
        prompts, completions, rows = ["a", "b"], ["one two three", "one"], [{}, {}]

    whole = compose(rewards, Own)
    assert isinstance(whole, ComposedReward)
    np.testing.assert_allclose(whole(Answers()), [2.0, 4.0 + 0.5 * (-2 / 3)], rtol=1e-6)
    assert isinstance(compose(load(), Own), Own)
