"""A run with `model.attention: cudnn`, where XLA computes what cuDNN is asked: every stage asks, decoding does not.

And with `model.matmul_precision: tf32`, which every stage's programs are traced with.
"""

import inspect
import json

import jax
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.models.target import PRECISIONS
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

LAYERS = 2
CONFIG = {
    "model": {
        "dtype": "bfloat16", "attention": "cudnn", "matmul_precision": "tf32",
        "new": {"hidden_size": 32, "layers": LAYERS, "heads": 2, "kv_heads": 1, "intermediate_size": 32,
                "max_positions": 64},
    },
    "adapter": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
    "compilation_cache": None,
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 32}, "adapter": {"kind": "full"},
        "batch_size": 8, "max_length": 48, "evaluation": {"heldout": 4},
    },
    "reward_model": {
        "data": {"path": "builtin:assistant-preferences", "limit": 16}, "batch_size": 8, "max_length": 48, "buckets": 1,
        "evaluation": {"heldout": 4}, "start": "fresh",
    },
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 16}, "iterations": 1, "batch_size": 8,
        "max_prompt_tokens": 15, "sampling": {"max_new_tokens": 6}, "update": {"epochs": 1, "minibatches": 2},
        "evaluation": {"prompts": 8},
    },
}  # fmt: skip


STEPS = {"sft_update", "sft_evaluate", "reward_model_update", "pair_scores", "rollout", "score_rollout",
         "annotate_for_update", "ppo_update"}  # fmt: skip


def _step() -> str:
    """The step of ours that is being traced: the outermost, as some call others."""
    return [frame.function for frame in inspect.stack() if frame.function in STEPS][-1]


def test_every_stage_asks_it_of_whole_sequences(tmp_path, monkeypatch):
    asked, computed = {}, jax.nn.dot_product_attention

    def by_xla(q, k, v, implementation=None, **how):
        assert implementation == "cudnn" and q.shape[1] > 1 and q.dtype == k.dtype == v.dtype == "bfloat16"
        assert jax.config.jax_default_matmul_precision == PRECISIONS["tf32"]
        asked[_step()] = asked.get(_step(), 0) + 1
        return computed(q, k, v, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr("jaxrlhf.stages.run.check_device", lambda model, dtype: None)
    roles = run_stages(RunConfig.model_validate({**CONFIG, "run_dir": str(tmp_path / "run")}))
    assert roles.base.config.target.attention == "cudnn", "also of the base that was trained whole"
    assert set(asked) == STEPS
    assert asked["rollout"] == LAYERS - 1, "the prompts, but for the last layer's one query; and no step of decoding"
    assert "cudnn" not in json.dumps(json.loads((tmp_path / "run/roles/base/config.json").read_text()))
