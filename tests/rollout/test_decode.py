"""The jitted rollout against a plain loop that runs the whole model again for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.rope import Rope
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.sampling import draw, row_uniforms

KEY = jax.random.key(28)  # answers of every kind that the tests below want
STOPS = (4, 5, 9)
FIELDS = ("tokens", "mask", "response_mask", "sample_logprobs", "ended")


@pytest.fixture(scope="module")
def deep(make_decoder):
    """Two layers: what one layer writes into its cache must not reach the other's."""
    return make_decoder(layers=2, stop_tokens=(4,))


@pytest.fixture(scope="module")
def policy(deep, make_adapter):
    return make_adapter(deep, 6)


@pytest.fixture(scope="module")
def answer(programs, deep, policy, prompts):
    """`answer(max_new_tokens=6, key=KEY, prompts=prompts, **sampling)`: a rollout in numpy."""

    def run(max_new_tokens=6, key=KEY, prompts=prompts, **settings):
        settings = Sampling(max_new_tokens=max_new_tokens, **settings)
        return jax.device_get(programs.rollout(deep, policy, prompts, key, settings))

    return run


@pytest.fixture(scope="module")
def by_hand(programs, deep, policy, prompts):
    """The same without a cache and without a batch's early end: per row, one full forward pass per token."""
    model = bind(deep, policy)

    def run(max_new_tokens=6, key=KEY, temperature=1.0, stop_tokens=(4,), pad_token=0):
        R, (B, P) = max_new_tokens, prompts.tokens.shape
        uniforms = np.asarray(jax.jit(row_uniforms, static_argnums=(1, 2))(key, B, R))
        tokens = np.full((B, P + R), pad_token, np.int32)
        tokens[:, :P] = prompts.tokens
        mask = np.zeros((B, P + R), bool)
        mask[:, :P] = prompts.mask
        logprobs, ended = np.zeros((B, R)), np.zeros(B, bool)
        for t in range(P, P + R):
            logits = np.asarray(programs.forward(model, tokens, mask), np.float64)[:, t - 1]
            for b in np.flatnonzero(~ended):
                scaled = logits[b] / (temperature or 1.0)
                p = np.exp(scaled - scaled.max())
                p /= p.sum()
                greedy = temperature == 0
                # What `draw` is worth stands in test_sampling.py.
                token = p.argmax() if greedy else int(draw(np.float32(scaled)[None], uniforms[b, None, t - P])[0])
                tokens[b, t], mask[b, t], logprobs[b, t - P] = token, True, np.log(p[token])
                ended[b] = token in stop_tokens
        return dict(tokens=tokens, mask=mask, response_mask=mask[:, P:], sample_logprobs=logprobs, ended=ended)

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"stop_tokens": STOPS, "pad_token": 1},
        {"stop_tokens": STOPS, "pad_token": 5, "max_new_tokens": 12},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_a_rollout_equals_the_plain_loop(answer, by_hand, settings):
    got, want = answer(**settings), by_hand(**settings)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(got, name), want[name], atol=1e-5, err_msg=name)
    assert (got.temperature == (settings.get("temperature") or 1.0)).all()


def test_the_stop_token_is_kept_and_real_and_pads_follow(answer):
    out = answer(stop_tokens=STOPS, pad_token=1)
    answers = out.tokens[:, -6:]
    for tokens, real, logprobs, ended in zip(answers, out.response_mask, out.sample_logprobs, out.ended):
        n = real.sum()
        assert real[:n].all() and n >= 1
        assert not np.isin(tokens[: n - 1], STOPS).any()
        assert ended == np.isin(tokens[n - 1], STOPS)
        assert ended or n == 6
        assert (tokens[n:] == 1).all() and (logprobs[n:] == 0).all() and (logprobs[:n] < 0).all()
    np.testing.assert_array_equal(out.mask[:, -6:], out.response_mask)
    # The case is one of every kind: each stop token, answers of several lengths, one that did not end.
    assert set(answers[out.response_mask]) >= set(STOPS)
    assert not out.ended.all() and len(set(out.response_mask.sum(1))) > 3


def test_neither_pad_nor_the_limit_changes_what_is_real(answer):
    """Pad is one of the stop tokens; with a limit of twelve all answers have ended before: the loop stops early."""
    short = answer(stop_tokens=STOPS, pad_token=1)
    long = answer(stop_tokens=STOPS, pad_token=5, max_new_tokens=12)
    assert long.ended.all() and not long.response_mask[:, -1].any()
    np.testing.assert_array_equal(long.response_mask[:, :6], short.response_mask)
    np.testing.assert_array_equal(np.where(short.mask, short.tokens, 5)[:, 5:], long.tokens[:, 5:11])
    np.testing.assert_allclose(long.sample_logprobs[:, :6], short.sample_logprobs, atol=2e-6)


@pytest.mark.parametrize(
    ("samples", "length", "slots", "times"),
    [(1, 6, (1, 3, 8, 100), 1), (3, 9, (2, 5, 23), 1), (2, 1, (3,), 1), (8, 11, (20,), 1), (2, 6, (32,), 3)],
)
def test_completions_do_not_depend_on_the_slots(answer, prompts, samples, length, slots, times):
    """Of 8 or 24 prompts with 1 to 5 tokens, and up to 64 rows: from one slot to more slots than rows."""
    settings = {"stop_tokens": STOPS, "samples_per_prompt": samples, "max_new_tokens": length}
    settings |= {"prompts": jax.tree.map(lambda x: jnp.tile(x, (times, 1)), prompts)}
    whole = answer(**settings)
    lengths = whole.response_mask.sum(1)
    assert length == 1 or {1, length} <= set(lengths), "some end with the first token, some do not end"
    for number in slots:
        few = answer(slots=number, **settings)
        for name in FIELDS:
            if name != "sample_logprobs":
                np.testing.assert_array_equal(getattr(whole, name), getattr(few, name), err_msg=name)
        np.testing.assert_allclose(whole.sample_logprobs, few.sample_logprobs, atol=5e-6)


def test_the_same_key_gives_the_same_and_another_key_does_not(answer):
    first, again, other = answer(), answer(), answer(key=jax.random.key(22))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.tokens[:, 5] != other.tokens[:, 5]).any()
    assert (first.tokens != other.tokens).any(axis=1).mean() > 0.7


def test_equal_prompts_in_one_batch_get_answers_of_their_own(answer, prompts):
    same = Prompts(jnp.tile(prompts.tokens[1], (8, 1)), jnp.tile(prompts.mask[1], (8, 1)))
    assert len({tuple(row) for row in answer(prompts=same).tokens.tolist()}) > 4
    assert len({tuple(row) for row in answer(prompts=same, temperature=0.0).tokens.tolist()}) == 1


def test_truncation_narrows_what_is_sampled_and_not_its_logprobs(answer, programs, deep, policy):
    """Of the two likeliest tokens only, with the logprobs of the whole distribution."""
    out = answer(top_k=2, top_p=1.0, min_p=0.0)
    logits = np.asarray(programs.forward(bind(deep, policy), out.tokens, out.mask))[:, 4:-1]
    rank = (logits > np.take_along_axis(logits, out.tokens[:, 5:, None], -1)).sum(-1)
    assert (rank[out.response_mask] < 2).all()
    assert (rank[out.response_mask] == 1).any()
    whole = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), out.tokens[:, 5:, None], -1)[..., 0]
    np.testing.assert_allclose(out.sample_logprobs, np.where(out.response_mask, whole, 0), atol=1e-5)


def test_truncation_to_one_token_is_greedy_and_numbers_compile_nothing(answer, programs):
    wide = answer(top_k=2, top_p=1.0, min_p=0.0)
    count = programs.rollout._cache_size()
    by_top_p, by_min_p = answer(top_k=2, top_p=1e-6, min_p=0.0), answer(top_k=2, top_p=0.999, min_p=1.0)
    greedy = answer(top_k=2, top_p=1.0, min_p=0.0, temperature=0.0)
    cold = answer(top_k=2, top_p=1.0, min_p=0.0, temperature=1e-3)
    assert programs.rollout._cache_size() == count
    for other in (by_top_p, by_min_p, cold):
        np.testing.assert_array_equal(other.tokens, greedy.tokens)
    assert (wide.tokens != greedy.tokens).any()


@pytest.mark.parametrize("trained", [4, 7, 40])
def test_longrope_turns_alike_in_sampling_and_scoring(make_decoder, programs, prompts, trained):
    """Prompt and answer together decide, whether the prompt alone is past the trained length, or nothing is."""
    numbers = {
        "short_factor": (1.0, 1.5, 2.0, 3.0), "long_factor": (4.0, 6.0, 8.0, 9.0), "factor": 4.0,
        "original_max_position_embeddings": trained,
    }  # fmt: skip
    rope = Rope(100.0, kind="longrope", numbers=tuple(sorted(numbers.items())))
    base = make_decoder(layers=2, layer_kinds=(LayerKind(rope=rope),))
    sampled = programs.rollout(base, None, prompts, KEY, Sampling(max_new_tokens=6))
    given = sampled.tokens, sampled.mask, sampled.response_mask, jnp.ones(len(sampled.tokens))
    logprobs, _ = programs.logprobs(base, *given)
    np.testing.assert_allclose(sampled.sample_logprobs, logprobs, atol=1e-5)
