"""Answers restricted to choices, against plain dictionaries and one full forward pass per beginning of a choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ANSWERS

from jaxrlhf.models.adapters import bind
from jaxrlhf.models.choice_logprobs import Paths, choice_logprobs
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.packing import pack_rows, take_pass
from jaxrlhf.models.scoring import response_logprobs
from jaxrlhf.records import Rollout

STOP, R = 4, 4
# One token, several tokens, and beginnings of each other; tokens 9 and 11 are in none.
KEY = jax.random.key(3)


def followers(beginning):
    """The tokens that may follow, by looking at every choice."""
    return sorted({answer[len(beginning)] for answer in ANSWERS if answer[: len(beginning)] == tuple(beginning)})


@pytest.fixture(scope="module")
def rows(prompts):
    """Every choice after every prompt, as a rollout."""
    B = len(prompts.tokens)
    answers = np.array([answer + (0,) * (R - len(answer)) for answer in ANSWERS], np.int32)
    real = np.array([np.arange(R) < len(answer) for answer in ANSWERS])
    tokens = np.concatenate([np.repeat(prompts.tokens, len(ANSWERS), 0), np.tile(answers, (B, 1))], axis=1)
    real = np.tile(real, (B, 1))
    mask = np.concatenate([np.repeat(prompts.mask, len(ANSWERS), 0), real], axis=1)
    temperature = np.full(len(tokens), 0.7, np.float32)
    return Rollout(tokens, mask, real, np.zeros(real.shape, np.float32), np.ones(len(tokens), bool), temperature)


@pytest.fixture(scope="module")
def by_hand(programs, rows):
    """`by_hand(model)`: logprobs and entropies of `rows` in numpy, from the logits of all tokens."""

    def run(model):
        logits = np.asarray(programs.forward(model, rows.tokens, rows.mask), np.float64)
        logprobs, entropies = np.zeros(rows.response_mask.shape), np.zeros(rows.response_mask.shape)
        for b, answer in enumerate(rows.tokens[:, -R:]):
            for t in range(rows.response_mask[b].sum()):
                allowed = followers(answer[:t].tolist())
                scaled = logits[b, rows.tokens.shape[1] - R + t - 1][allowed] / 0.7
                p = np.exp(scaled - scaled.max())
                p /= p.sum()
                logprobs[b, t] = np.log(p[allowed.index(answer[t])])
                entropies[b, t] = -(p * np.log(p)).sum()
        return logprobs, entropies

    return run


def test_the_trie_allows_what_the_choices_allow(choices):
    beginnings = sorted({answer[:n] for answer in ANSWERS for n in range(len(answer))})
    choices = jax.device_get(choices)
    assert choices.allowed.dtype == bool and len(choices.allowed) == len(choices.first) == len(beginnings)
    assert choices.tokens[-1] == STOP and {*choices.tokens.tolist()} == {t for answer in ANSWERS for t in answer}
    answers = np.array([answer + (0,) * (R - len(answer)) for answer in ANSWERS], np.int32)
    nodes = np.asarray(jax.jit(lambda choices, x: choices.nodes(choices.index_of(x)))(choices, answers))
    seen = {}
    for answer, of_answer in zip(ANSWERS, nodes):
        for t in range(len(answer)):
            assert choices.tokens[choices.allowed[of_answer[t]]].tolist() in (
                [*[x for x in followers(answer[:t]) if x != STOP], *[STOP] * (STOP in followers(answer[:t]))],
            )
            assert seen.setdefault(of_answer[t], answer[:t]) == answer[:t]
    assert len(seen) == len(beginnings)
    for bad in ([(5, 4)], [(5, 4), (5, 4)], [(5, 4), (6, 3)], [(5, 4, 6, 4), (6, 4)]):
        with pytest.raises(ValueError, match="stop token"):
            Choices.of(bad)


@pytest.mark.parametrize("head", ["tied", "own", "lora"])
def test_the_head_computes_the_same_logits(make_decoder, choices, head):
    base = make_decoder(tie_embeddings=head != "own")
    adapter = None
    if head == "lora":
        a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((16, 2), (2, 12))))
        adapter = {"lm_head": {"lora_a": a, "lora_b": b, "lora_scale": jnp.float32(0.5)}}
    hidden = jax.random.normal(KEY, (2, 3, 16))
    model = bind(base, adapter)
    np.testing.assert_allclose(
        choices.head_of(model).logits(hidden), model.logits(hidden)[..., choices.tokens], rtol=1e-5, atol=1e-6
    )


def test_logprobs_are_those_of_the_enumeration(programs, tiny, roles, rows, by_hand, choices):
    model = bind(tiny, roles.policy)
    given = rows.tokens, rows.mask, rows.response_mask, rows.temperature
    logprobs, entropies = programs.logprobs(model, *given, choices=choices)
    wanted = by_hand(model)
    np.testing.assert_allclose(logprobs, wanted[0], atol=1e-5)
    np.testing.assert_allclose(entropies, wanted[1], atol=1e-5)
    of_choices = np.exp(np.asarray(logprobs, np.float64).sum(1)).reshape(-1, len(ANSWERS))
    np.testing.assert_allclose(of_choices.sum(1), 1, atol=1e-5)
    forced = [[t < len(answer) and len(followers(answer[:t])) == 1 for t in range(R)] for answer in ANSWERS]
    forced = np.tile(forced, (len(rows.tokens) // len(ANSWERS), 1))
    assert forced.any() and not np.asarray(logprobs)[forced].any() and not np.asarray(entropies)[forced].any()

    @jax.jit
    def packed(model, rows):
        layout = pack_rows(rows, len(rows.tokens) // 4)  # a pass has a quarter of the rows' slots
        parts = [response_logprobs(model, *given, packed=take_pass(layout, i), choices=choices) for i in range(4)]
        return layout.passes, *(sum(part) for part in zip(*parts))

    passes, *found = packed(model, rows)
    assert 1 < passes <= 4
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


def test_an_answer_that_is_no_choice_is_impossible(programs, tiny, rows, choices):
    few = jax.tree.map(lambda x: jnp.asarray(x[:8]), rows)
    for place, token in ((0, 11), (0, 8), (1, 3)):  # in no choice; not the first; not after 5
        tokens = few.tokens.at[:2, few.tokens.shape[1] - R + place].set(token)
        given = tokens, few.mask, few.response_mask, few.temperature
        logprobs, _ = programs.logprobs(tiny, *given, choices=choices)
        assert np.all(np.asarray(logprobs)[:2, place] == -np.inf)
        assert np.isfinite(np.asarray(logprobs)[2:]).all()


@pytest.mark.parametrize("answers", [ANSWERS, ((5, 4), (7, 4), (10, 4)), ((5, 6, 7, 4), (5, 6, 4))])
def test_one_pass_gives_the_probability_of_every_choice(programs, tiny, roles, prompts, answers):
    """As the sum over tokens of each choice; labels that differ in their first token take no pass beside the prompt."""
    model, choices, paths = bind(tiny, roles.policy), Choices.of(answers), Paths.of(answers)
    found = jax.jit(choice_logprobs)(model, prompts, choices, paths, 0.7)
    for number, answer in enumerate(answers):
        tail = np.tile(np.array(answer, np.int32), (len(prompts.tokens), 1))
        tokens = np.concatenate([prompts.tokens, tail], axis=1)
        mask = np.concatenate([prompts.mask, np.ones(tail.shape, bool)], axis=1)
        logits, wanted = np.asarray(programs.forward(model, tokens, mask), np.float64), 0.0
        for t, token in enumerate(answer):
            allowed = sorted({other[t] for other in answers if other[:t] == answer[:t]})
            weights = np.exp(logits[:, tokens.shape[1] - len(answer) + t - 1][:, allowed] / 0.7)
            wanted = wanted + np.log(weights[:, allowed.index(token)] / weights.sum(1))
        np.testing.assert_allclose(found[:, number], wanted, atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)
    shapes = {ANSWERS: (2, 2), ((5, 4), (7, 4), (10, 4)): (1, 0), ((5, 6, 7, 4), (5, 6, 4)): (1, 2)}
    assert paths.beginnings.shape == shapes[answers]
