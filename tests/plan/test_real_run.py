"""A plan against a run: the same programs with the same arguments, and memory that is held as the run holds it."""

import json

import jax
import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.plan import planner
from jaxrlhf.plan.cards import CARDS
from jaxrlhf.plan.planner import Options, cache_bytes, make_plan
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

LORA = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
CONFIG = {
    "model": {
        "new": {"hidden_size": 512, "layers": 5, "heads": 4, "kv_heads": 2, "intermediate_size": 1024,
                "max_positions": 64}
    },
    "adapter": LORA,
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 12}, "batch_size": 4, "max_length": 48,
        "microbatch_size": 2,
    },
    "reward_model": {
        "data": {"path": "builtin:assistant-preferences", "limit": 8}, "batch_size": 4, "max_length": 32, "buckets": 1,
    },
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 8}, "iterations": 1, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 8, "samples_per_prompt": 2},
        "update": {"epochs": 1, "minibatches": 2, "microbatch_size": 2}, "evaluation": {"prompts": 4},
    },
}  # fmt: skip

RUN = """
import json, sys
import jax
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.stages.run import run_stages

seen, call = {}, Program.__call__

def arrays(tree):
    return [[list(x.shape), str(x.dtype)] for x in jax.tree.leaves(tree) if getattr(x, "shape", ())]

def noting(self, *args, **kwargs):
    if self.name not in seen:
        held = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays()
                if not jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key)}
        seen[self.name] = {"arrays": arrays((args, kwargs)), "live": sum(held.values())}
    return call(self, *args, **kwargs)

Program.__call__ = noting
run_stages(RunConfig.model_validate(json.loads(sys.argv[1])))
json.dump(seen, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def running(processes, tmp_path_factory):
    """The run, in a process of its own while the plan is made in this one."""
    folder = tmp_path_factory.mktemp("plan")
    config = CONFIG | {"run_dir": str(folder / "run"), "stages": ["sft", "reward_model", "ppo"]}
    seen = folder / "seen.json"
    return processes.start("-c", RUN, json.dumps(config), seen, environment={"JAX_PLATFORMS": "cpu"}), seen


@pytest.fixture(scope="module")
def measured(running, planned):
    process, seen = running
    assert process.wait() == 0, process.errors[-2000:]
    return json.loads(seen.read_text())


@pytest.fixture(scope="module")
def config():
    return RunConfig.model_validate(CONFIG | {"run_dir": "run", "stages": ["sft", "reward_model", "ppo"]})


@pytest.fixture(scope="module")
def planned(config, running):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "missing", lambda: "no compiler for cards")
        return make_plan(config, Options(1, CARDS["h100"], memory=2.0**30))


def _arrays(tree) -> list:
    return [[list(x.shape), str(x.dtype)] for x in jax.tree.leaves(tree) if getattr(x, "shape", ())]


def test_the_programs_of_a_run_are_those_of_its_plan(measured, config):
    config = resolved(config)
    shapes = Shapes(config, make_mesh(config.mesh, jax.devices()[:1]), read_model(config.model))
    calls = {call.program.name: call for stage in config.stages for call in calls_of(stage, shapes)}
    assert set(measured) - set(calls) <= {"sft_evaluate", "pair_scores"}  # measure now and then, and take less
    assert set(calls) <= set(measured)
    for name, call in calls.items():
        assert _arrays((call.args, call.kwargs)) == measured[name]["arrays"], name
    results = {name: call.result for name, call in calls.items() if call.result is not None}
    for name, result in results.items():
        given = calls[name].program.lower(*calls[name].args, **calls[name].kwargs).out_info
        assert _arrays(result) == _arrays(given[:1] if isinstance(result, tuple) else given), name


def test_what_is_held_is_what_the_run_holds(measured, planned):
    compared = {}
    for stage in planned.stages:
        for program in stage.programs:
            compared[program.name] = sum(program.parts.values()) / measured[program.name]["live"]
    print({name: round(ratio, 3) for name, ratio in compared.items()})
    assert all(0.9 < ratio < 1.1 for ratio in compared.values()), compared


def test_parts_are_what_they_say(planned, config):
    model = read_model(config.model)
    D, F, L, V = model.hidden_size, model.intermediate_size, model.layers, model.vocab_size
    K = model.kv_heads * model.head_dim
    kernels = L * (2 * D * D + 2 * D * K + 3 * D * F)
    lora = 4 * L * (2 * D + F + D)
    ppo = planned.stages[-1]
    for program in ppo.programs:
        assert program.parts["weights"] == 4 * (kernels + V * D + (2 * L + 1) * D)
        moments = program.parts["optimizer"] / (4 * lora)
        assert moments == pytest.approx(4, rel=0.01)  # two of Adam for policy and value
    rollout = ppo.programs[0]
    B, S = 4 * 2, 16 + 8
    shapes = Shapes(resolved(config), make_mesh(config.mesh, jax.devices()[:1]), model)
    decoding, *others = calls_of("ppo", shapes)
    assert cache_bytes(decoding, shapes) == 2 * 4 * L * B * S * K
    assert not any(cache_bytes(call, shapes) for call in others)
    forward = 2 * kernels * (4 * 16 + B * 7) + 2 * V * D * (4 + 7 * B)
    late = 2 * D * D + 3 * D * F  # what only a position itself reads of the last layer: of prompts one position
    forward -= 2 * late * 4 * 15
    assert rollout.flops == pytest.approx(forward + 2 * lora * (4 * 16 + B * 7), rel=0.02)
    annotate, update = (next(p for p in ppo.programs if p.name == name) for name in ("annotate", "update"))
    tokens = kernels * B * S - late * B * 15
    assert annotate.flops == pytest.approx(3 * 2 * tokens, rel=0.06)
    assert update.flops == pytest.approx(2 * 4 * tokens, rel=0.12)  # LoRA: forward, and gradients of inputs
