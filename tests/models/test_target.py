"""What follows from the target, seen without the device: programs traced and lowered for a CPU and for a card."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, Sampling
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.attention import attend_causal
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import abstract_decoder, with_target
from jaxrlhf.models.quantize import abstract_quantized
from jaxrlhf.models.scoring import from_logits
from jaxrlhf.models.target import ON_CPU, Target, target_of
from jaxrlhf.records import Experience, PreferenceBatch, Prompts, Rollout, SFTBatch, TrainState
from jaxrlhf.rewards.model import score_rollout
from jaxrlhf.rewards.pretrained import score_tokens
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate_for_update
from jaxrlhf.steps.optimizer import init_optimizer
from jaxrlhf.steps.ppo import init_ppo, ppo_update
from jaxrlhf.steps.reward_model import pair_scores, reward_model_update
from jaxrlhf.steps.sft import sft_evaluate, sft_update

CARD = Target("gpu")
SHAPE = DecoderConfig(12, 16, 24, 1, 2, 1, 8, 64, stop_tokens=(4,), pad_token=0)
B, P, R = 4, 5, 6  # tokens enough for LoRA pairs to be merged into their kernels
KEY = jax.random.key(0)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lowered(function, *args) -> str:
    """The program for CUDA, before XLA has it."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# ---------------------------------------------------------------- attention, and logits at a time


@pytest.mark.parametrize("target", [ON_CPU, CARD], ids=lambda target: target.platform)
def test_attention_goes_in_blocks_on_a_cpu_and_at_once_on_a_card(target):
    T = 256
    q, k, v, mask = shape(2, T, 4, 8), shape(2, 2, 8, T), shape(2, 2, T, 8), shape(2, T, T, dtype=bool)
    text = lowered(lambda *given: attend_causal(*given, target=target), q, k, v, mask)
    made = [shape.split("x")[:-1] for shape in re.findall(r"stablehlo.dot_general.* -> tensor<(\S+)>", text)]
    largest = max(np.prod(list(map(int, sizes))) for sizes in made)
    assert largest == 2 * 4 * T * T // (1 if target is CARD else 4), "weights of all queries, or of a quarter"


@pytest.mark.parametrize(("devices", "on_cpu", "on_card"), [(1, 256, 8), (8, 32, 1)])
def test_a_card_holds_more_logits_at_a_time(devices, on_cpu, on_card):
    """64 x 512 positions of 32,000 tokens: 16 MiB of them on a CPU, 512 on a card."""

    def parts(target: Target) -> int:
        model = abstract_decoder(dataclasses.replace(SHAPE, vocab_size=32000, target=target))
        mesh = jax.sharding.AbstractMesh((devices,), ("data",))
        with jax.sharding.use_abstract_mesh(mesh):
            program = jax.make_jaxpr(lambda *given: from_logits(*given, lambda x, _: jnp.max(x, -1)))
            found = program(model, shape(64, 512, 16), shape(64, 512, dtype=jnp.int32))
        return next((e.params["length"] for e in found.eqns if e.primitive.name == "scan"), 1)

    assert (parts(ON_CPU), parts(CARD)) == (on_cpu, on_card)


# ---------------------------------------------------------------- whose devices


def test_the_target_is_that_of_the_mesh_and_not_of_the_host():
    mesh = SimpleNamespace(devices=np.array([[SimpleNamespace(platform="gpu")]]))
    assert target_of(mesh, "tf32") == Target("gpu", "xla", "tf32")
    assert target_of() == Target(jax.devices()[0].platform)
    with jax.default_device(jax.devices("cpu")[0]):
        assert target_of() == ON_CPU


# ---------------------------------------------------------------- programs


def programs(base, adapter: AdapterConfig) -> dict:
    """Every program that runs a base: name -> (function, arguments), all of it shapes."""
    policy, scored = (jax.eval_shape(lambda b, h=h: init_adapter(b, adapter, KEY, h), base) for h in (None, "value"))
    tokens, mask, answer = shape(B, P + R, dtype=jnp.int32), shape(B, P + R, dtype=bool), shape(B, R, dtype=bool)
    numbers, rows = shape(B, R), shape(B)
    answers = Rollout(tokens, mask, answer, numbers, shape(B, dtype=bool), rows)
    experience = Experience(tokens, mask, answer, rows, *[numbers] * 6, rows)
    rate, update = OptimizerConfig(learning_rate=1e-3), PPOConfig(minibatches=2)
    pairs = PreferenceBatch(tokens, mask, tokens, mask, rows, rows)
    demonstrations = SFTBatch(tokens, tokens, mask)

    def state(adapter):
        return TrainState(adapter, jax.eval_shape(init_optimizer, adapter), shape(dtype=jnp.int32))

    prompts = Prompts(shape(B, P, dtype=jnp.int32), shape(B, P, dtype=bool))
    ppo = jax.eval_shape(lambda *roles: init_ppo(*roles, update), policy, scored)
    return {
        "rollout": (rollout, base, policy, prompts, KEY, Sampling(max_new_tokens=R)),
        "annotate": (annotate_for_update, base, policy, scored, None, answers, update),
        "reward": (score_rollout, base, scored, answers),
        "reward of its own": (score_tokens, base, scored, tokens, mask),
        "update": (ppo_update, ppo, base, experience, KEY, update),
        "sft_update": (sft_update, state(policy), base, demonstrations, rate),
        "sft_evaluate": (sft_evaluate, base, policy, demonstrations),
        "reward_model_update": (reward_model_update, state(scored), base, pairs, rate, 0.01),
        "pair_scores": (pair_scores, base, scored, pairs),
    }


def precisions(text: str) -> list[tuple[str, bool]]:
    """(what a product says of its precision, whether its operands are float32) of each product."""
    products = re.findall(r"stablehlo\.dot_general (.*) : \(tensor<([^>]+)>, tensor<([^>]+)>\)", text)
    assert len(products) == text.count("stablehlo.dot_general")
    said = [re.search(r"precision = \[(\w+), (\w+)\]", how) for how, *_ in products]
    exact = [left.endswith("xf32") and right.endswith("xf32") for _, left, right in products]
    return [("DEFAULT" if s is None else s[1], e) for s, e in zip(said, exact) if s is None or s[1] == s[2]]


LORA = AdapterConfig(rank=2, target_modules=("all-linear",))
FULL = AdapterConfig(kind="full")
CASES = {  # dtype or codes of the base, what is trained, which programs
    "LoRA": ("float32", LORA, None),
    "full": ("float32", FULL, {"update"}),
    "int8": ("int8", LORA, {"rollout", "sft_update"}),
    "nf4": ("nf4", LORA, {"rollout", "sft_update"}),
    "bfloat16": ("bfloat16", AdapterConfig(rank=2, target_modules=("q_proj",)), {"update", "reward"}),
}


@pytest.mark.parametrize("said", ["highest", "tf32"])
@pytest.mark.parametrize("case", CASES)
def test_float32_products_say_their_precision_in_every_program(monkeypatch, case, said):
    """Forward and backward, whatever the caller's own default is; and nothing asks what the host has."""
    kind, adapter, named = CASES[case]
    # jax 0.12 lowers Triton kernels only for a card that it knows, so the kernels of decoding are off.
    target = Target("gpu", matmul_precision=said)
    model = dataclasses.replace(SHAPE, tie_embeddings=kind == "nf4", target=target)
    base = abstract_decoder(model, "bfloat16" if kind == "bfloat16" else "float32")
    base = abstract_quantized(base, kind) if kind in ("int8", "nf4") else base
    calls = programs(base, adapter)

    def asks(*_):
        raise AssertionError("asks the host while it is traced")

    for name in ("default_backend", "devices", "local_devices"):
        monkeypatch.setattr(jax, name, asks)
    for name in named or calls:
        function, *args = calls[name]
        with jax.default_matmul_precision("tensorfloat32" if said == "highest" else "highest"):
            found = precisions(lowered(function, *args))
        exact = {how for how, float32 in found if float32}
        assert exact == {"HIGHEST" if said == "highest" else "DEFAULT"}, (name, exact)


def test_a_model_on_another_target_shares_its_arrays(small):
    other = with_target(small, CARD)
    assert other.config.target == CARD and small.config.target == ON_CPU
    assert {block.attention.config.target for block in other.layers} == {CARD}
    assert all(a is b for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(other), strict=True))
