"""A rollout as a GPU decodes it, with its kernels run by Pallas' interpreter, against the rollout on a CPU."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.models import decode_attention, decoder, joined
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.decoder import with_target
from jaxrlhf.models.target import ON_CPU, Target
from jaxrlhf.rollout import sampling
from jaxrlhf.rollout.decode import rollout

KEY = jax.random.key(28)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs each kernel in the interpreter, also for heads that are too small for a card. Counts the calls."""
    calls = dict.fromkeys(("attend_newest", "product_of_parts", "draw_from_cube"), 0)
    for module, name in ((decoder, "attend_newest"), (joined, "product_of_parts"), (sampling, "draw_from_cube")):
        kernel = getattr(module, name)

        def run(*args, name=name, kernel=kernel):
            calls[name] += 1
            return kernel(*args, interpret=True)

        monkeypatch.setattr(module, name, run)
    monkeypatch.setattr(decode_attention, "_LEAST_HEAD", 8)
    monkeypatch.setattr(joined, "_PARTS", 1)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "samples_per_prompt": 2, "slots": 5},
        {"temperature": 0.0},
        {"top_k": 5, "min_p": 0.01},
    ],
    ids=str,
)
def test_a_rollout_with_kernels_equals_one_without(interpreted, make_decoder, make_adapter, prompts, settings):
    """Prompts of several lengths, a sliding window, a layer without rotation, and a soft cap.

    Each case is traced anew, so that no trace of another case is counted.
    """
    kinds = LayerKind(window=3), LayerKind(rope=None)
    base = make_decoder(layers=2, layer_kinds=kinds, attention_softcap=3.0)
    policy, settings = make_adapter(base, 6), Sampling(max_new_tokens=6, **settings)
    plain, ours = (
        jax.jit(lambda *given: rollout(*given))(with_target(base, target), policy, prompts, KEY, settings)
        for target in (ON_CPU, Target("gpu", decode_kernels=True))
    )
    assert interpreted["attend_newest"] and interpreted["draw_from_cube"]
    for name in ("tokens", "mask", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(ours.sample_logprobs, plain.sample_logprobs, atol=1e-5)


def test_joined_pairs_in_16_bits_sample_as_scoring_scores(interpreted, make_decoder, make_adapter, prompts, programs):
    """The gap to scoring is that of a CPU, where pairs are not joined: some roundings of bfloat16."""
    base = make_decoder(dtype=jnp.bfloat16)
    policy = make_adapter(base, 1)
    base = with_target(base, Target("gpu", decode_kernels=True))
    answers = jax.jit(rollout)(base, policy, prompts, KEY, Sampling(max_new_tokens=6))
    assert all(interpreted.values())
    model, rows = bind(with_target(base, ON_CPU), policy), (answers.tokens, answers.mask, answers.response_mask)
    scored = programs.logprobs(model, *rows, answers.temperature)[0]
    gap = np.abs(answers.sample_logprobs - scored)[np.asarray(answers.response_mask)]
    assert gap.max() < 16 * float(jnp.finfo(jnp.bfloat16).eps)
