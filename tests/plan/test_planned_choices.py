"""A plan of a run whose answers are choices: its programs take the trie, and their head has few tokens."""

import jax
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import AXES, make_mesh
from jaxrlhf.plan.work import work_of
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

CHOICES = ["moo", "woof woof", "woof"]


def calls(mesh=None, **sampling):
    config = resolved(RunConfig.model_validate({
        "run_dir": "run", "stages": ["ppo"],
        "model": {"new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16}},
        "ppo": {"data": {"path": "prompts.jsonl"}, "batch_size": 4, "sampling": {"max_new_tokens": 3} | sampling,
                "reward": {"kind": "function", "function": "jaxrlhf.toy.world:gold_score"}},
    }))  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:1]) if mesh is None else mesh
    return config, {call.name: call for call in calls_of("ppo", Shapes(config, mesh, read_model(config.model)))}


@pytest.mark.parametrize("mesh", [None, jax.sharding.AbstractMesh((1,) * 4, AXES)], ids=["devices", "cards"])
def test_the_programs_take_the_choices(mesh):
    config, with_choices = calls(mesh, choices=CHOICES)
    _, without = calls(mesh)
    for name in ("rollout", "annotate", "update"):
        choices = with_choices[name].kwargs["choices"]
        assert choices.allowed.shape == (4, 3)  # the empty beginning, moo, woof, woof woof; moo, woof, stop
        assert without[name].kwargs["choices"] is None
        less, more = (
            work_of(name, call.args, call.kwargs, call.result, config).flops.sum()
            for call in (with_choices[name], without[name])
        )
        assert less < more
    if mesh is None:
        assert with_choices["annotate"].kwargs["choices"].allowed.tolist()[0] == [True, True, False]
