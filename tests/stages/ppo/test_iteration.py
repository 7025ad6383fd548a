"""Warnings of an iteration."""

from types import SimpleNamespace

from jaxrlhf.config import PPOStageConfig
from jaxrlhf.stages.ppo.iteration import Iteration


def test_an_iteration_with_only_truncated_completions_is_reported_once():
    said = []
    iteration = object.__new__(Iteration)
    iteration.run, iteration._warned_truncated = SimpleNamespace(say=said.append), False
    iteration.config = PPOStageConfig.model_validate({"data": {"path": "p"}, "sampling": {"max_new_tokens": 9}})
    for share in (0.0, 0.99):
        iteration._warn_truncated({"length/masked_share": share})
    iteration._warn_truncated({})  # without mask_truncated
    assert not said
    for _ in range(2):
        iteration._warn_truncated({"length/masked_share": 1.0})
    assert len(said) == 1 and "within 9 tokens" in said[0] and "\n" not in said[0]
