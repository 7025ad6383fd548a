"""From settings to rewards: what each kind needs, and which key is at fault."""

import re

import jax
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxrlhf.config import MeshConfig, ModelRewardConfig, RewardConfig
from jaxrlhf.config.rewards import ModelPart
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.code_tests import CodeTestsReward
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.judge import JudgeReward
from jaxrlhf.rewards.load import check_prompts, compose, load_rewards, needs_own
from jaxrlhf.rewards.remote import HTTPReward

LENGTH = {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}}
REWARD = TypeAdapter(RewardConfig)


def load(**settings):
    return load_rewards(REWARD.validate_python(settings), make_mesh(MeshConfig(), jax.devices()[:1]), "ppo.reward")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "sum"}, r"kind=sum\.parts\n.*required"),
        ({"kind": "sum", "parts": {}}, "at least 1 item"),
        ({"kind": "model", "parts": {"a": {}}}, r"kind=model\.parts\n.*not permitted"),
        ({"kind": "sum", "parts": {"a": {"kind": "sum", "parts": {"b": {}}}}}, "'kind=sum' found"),
        ({"kind": "http"}, r"kind=http\.url\n.*required"),
        ({"kind": "http", "url": "http://x", "path": "y"}, r"kind=http\.path\n.*not permitted"),
        ({"kind": "model", "options": {"a": 1}}, r"kind=model\.options\n.*not permitted"),
        ({"kind": "sum", "parts": {"a": {"weight": float("nan")}}}, "finite"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        REWARD.validate_python(settings)


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


def test_parts_of_a_sum_are_checked_on_the_rows():
    judge = {"kind": "judge", "url": "http://localhost:1/v1", "model": "m", "rubric": "{{ fact }}", "cache": None}
    rewards = load(kind="sum", parts={"code": {"kind": "code_tests", "weight": 2.0}, "judge": judge})
    assert isinstance(rewards["code"][0], CodeTestsReward) and isinstance(rewards["judge"][0], JudgeReward)

    class Prompts:
        texts, chats, columns = ["p"], [None], [{"tests": "x = 1", "fact": "f"}]

    for columns, message in (
        ({"tests": "x = 1", "fact": "f"}, "ppo.reward.parts.code.column: prompt 1: the column tests has no assert"),
        ({"tests": ["assert f"]}, "ppo.reward.parts.judge.rubric: prompt 1: the rubric fails: 'fact' is undefined"),
    ):
        Prompts.columns = [columns]
        with pytest.raises(UserError, match=message):
            check_prompts(rewards, Prompts, "ppo.reward")


def test_a_sum_may_hold_the_runs_own_reward():
    config = {"kind": "sum", "parts": {"own": {"weight": 2.0}, "short": LENGTH | {"weight": 0.5}}}
    assert needs_own(REWARD.validate_python(config)) and not needs_own(REWARD.validate_python(LENGTH))
    assert needs_own(ModelRewardConfig()) and not needs_own(ModelRewardConfig(path="folder"))
    rewards = load(**config)
    assert rewards["own"] == (ModelPart(weight=2.0), 2.0)

    class Own:
        name = "own"

        def __init__(self, config):
            assert isinstance(config, ModelRewardConfig)

        def __call__(self, completions):
            return np.float32([1.0, 2.0])

    class FakeCompletions:
        prompts, texts, rows = ["a", "b"], ["one two three", "one"], [{}, {}]

    whole = compose(rewards, Own)
    assert isinstance(whole, ComposedReward)
    np.testing.assert_allclose(whole(FakeCompletions()), [2.0, 4.0 + 0.5 * (-2 / 3)], rtol=1e-6)
    assert isinstance(compose(load(), Own), Own)
