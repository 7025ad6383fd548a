import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig, PPOConfig
from jaxrlhf.config.base import metadata
from jaxrlhf.models.adapters import bind
from jaxrlhf.records import SFTBatch
from jaxrlhf.steps.metrics import plain
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.ppo import init_ppo, ppo_loss, ppo_update

KEY = jax.random.key(13)


def assert_close(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def drifted(experience):
    """The experience of another policy: ratios far enough from 1 that some are clipped."""
    return experience.replace(logprobs=0.6 * experience.logprobs + 0.4 * experience.ref_logprobs)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_gradients_of_microbatches_sum_to_that_of_the_whole(tiny, roles, drifted, how):
    """Answers of one to six tokens: equal weights per microbatch would be wrong."""
    config = PPOConfig(epochs=2, aggregation=how, entropy_coef=0.1)
    tokens = jnp.sum(drifted.response_mask)
    assert len(set(drifted.response_mask.reshape(4, 2, -1).sum((1, 2)).tolist())) > 1
    last = "layers.0.mlp.down_proj"
    few, value = {last: roles.policy[last]}, {last: roles.value[last], "score": roles.value["score"]}

    def run(trees, parts):
        return accumulate(lambda t, part: ppo_loss(*t, tiny, part, config, tokens, 8), trees, drifted, parts)

    whole, parts = (jax.jit(run, static_argnums=1)((few, value), n) for n in (1, 4))
    assert_close((parts[0], parts[2]), (whole[0], whole[2]), 1e-6)
    assert_close(parts[1], whole[1], 1e-5)
    assert float(whole[1]["policy/clip_high"].value) > 0 and float(whole[1]["policy/clip_low"].value) > 0
    assert all(np.abs(x).max() > 1e-3 for x in (whole[2][0][last]["lora_a"], whole[2][1]["score"]["kernel"]))


def test_microbatches_and_recomputed_layers_change_no_update(programs, start, tiny, drifted):
    whole = PPOConfig(epochs=1, minibatches=1, remat="none")
    parts = whole.model_copy(update={"microbatch_size": 2, "remat": "dots"})
    old, new = (programs.update(start, tiny, drifted, KEY, config) for config in (whole, parts))
    assert_close(new[1], old[1], 1e-5)
    assert_close((new[0].policy, new[0].value), (old[0].policy, old[0].value), 1e-6)


def test_the_loss_is_its_three_terms_and_metrics_are_means_over_tokens(programs, tiny, roles, drifted):
    """Against numpy, from the logprobs and values that annotate gives."""
    mask, old = np.asarray(drifted.response_mask), np.asarray(drifted.logprobs)
    config = PPOConfig(epochs=2, clip_low=0.1, clip_high=0.3, value_clip=0.05, value_coef=0.7, entropy_coef=0.2)
    tokens = mask.sum()
    run = jax.jit(ppo_loss)
    loss, got = run(roles.policy, roles.value, tiny, drifted, config, tokens, 8)
    got = plain(got)
    new, entropy = programs.logprobs(
        bind(tiny, roles.policy), drifted.tokens, drifted.mask, drifted.response_mask, drifted.temperature
    )
    ratio, A = np.exp(np.asarray(new) - old), np.asarray(drifted.advantages)
    policy = np.maximum(-A * ratio, -A * np.clip(ratio, 0.9, 1.3))
    want = {
        "policy/loss": policy,
        "policy/entropy": np.asarray(entropy),
        "policy/approx_kl": ratio - 1 - np.log(ratio),
        "policy/clip_low": (A < 0) & (ratio < 0.9),
        "policy/clip_high": (A > 0) & (ratio > 1.3),
        "policy/ratio_mean": ratio,
    }
    for name, x in want.items():
        assert float(got[name]) == pytest.approx((x * mask).sum() / tokens, abs=2e-6), name
    assert float(got["policy/ratio_max"]) == pytest.approx(ratio[mask].max(), rel=1e-5)
    total = got["policy/loss"] + 0.7 * got["value/loss"] - 0.2 * got["policy/entropy"]
    assert float(loss) == pytest.approx(float(total), abs=1e-6)


def numbers_of(config, above=()):
    """Path of every number in nested settings that is traced."""
    for name, value in config:
        if metadata(type(config), name, "traced") and value is not None:
            yield (*above, name)
        elif hasattr(value, "model_fields_set"):
            yield from numbers_of(value, (*above, name))


def changed(config, path, factor, add=0.01):
    name, *rest = path
    value = getattr(config, name)
    if isinstance(value, int):
        value += 2
    else:
        value = changed(value, rest, factor, add) if rest else value * factor + add
    return config.model_copy(update={name: value})


def test_changing_any_number_compiles_nothing(programs, start, tiny, experience, sixteen):
    programs.update(start, tiny, experience, KEY, sixteen)
    count = programs.update._cache_size()
    paths = list(numbers_of(sixteen))
    assert len(paths) == 8 + 2 * 7 and ("value_optimizer", "beta2") in paths
    for path in paths:
        programs.update(start, tiny, experience, KEY, changed(sixteen, path, 0.9))
    assert programs.update._cache_size() == count


def test_each_number_reaches_the_update(programs, start, tiny, drifted, sixteen):
    """One that is traced and never used would pass the test above."""
    mix = SFTBatch(jnp.full((16, 5), 4), jnp.ones((16, 5), jnp.int32), jnp.ones((16, 5), bool))
    before = jax.device_get(programs.update(start, tiny, drifted, KEY, sixteen, mix)[0])
    for path in numbers_of(sixteen):
        if path == ("kl_bound",):  # there is no KL in this loss: test_ppo_options.py has it
            continue
        # A small factor: far below the ratios, value steps and norms that occur. Zeros become 0.01.
        other = changed(sixteen, path, 0.01)
        moved = programs.update(start, tiny, drifted, KEY, other, mix)[0]
        assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(moved), before))), path


def test_a_population_equals_single_runs(programs, tiny, make_adapter, experience, sixteen):
    """Three policies and values with learning rates and clips of their own, on one base."""
    states = [init_ppo(make_adapter(tiny, s), make_adapter(tiny, s + 10, head="value"), sixteen) for s in (1, 2, 3)]
    rates, clips = (1e-4, 1e-3, 5e-3), (0.1, 0.2, 0.3)

    def config(rate, clip):
        optimizer = sixteen.optimizer.model_copy(update={"learning_rate": rate})
        return sixteen.model_copy(update={"optimizer": optimizer, "value_optimizer": optimizer, "clip_low": clip})

    single = [
        programs.update(state, tiny, experience, KEY, config(rate, clip))
        for state, rate, clip in zip(states, rates, clips)
    ]
    together = jax.jit(
        jax.vmap(lambda state, rate, clip: ppo_update(state, tiny, experience, KEY, config(rate, clip)))
    )(jax.tree.map(lambda *x: jnp.stack(x), *states), jnp.array(rates), jnp.array(clips))
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *single), 1e-5)


def test_weight_decay_spares_lora_scales(programs, start, tiny, experience, sixteen):
    def after(decay):
        optimizer = OptimizerConfig(learning_rate=1e-4, weight_decay=decay)
        config = sixteen.model_copy(update={"optimizer": optimizer, "value_optimizer": optimizer})
        return programs.update(start, tiny, experience, KEY, config)[0]

    plain, decayed = after(0.0), after(30.0)
    for tree, old, first in (
        (decayed.policy, plain.policy, start.policy), (decayed.value, plain.value, start.value)
    ):  # fmt: skip
        for path, leaves in tree.items():
            for name, leaf in leaves.items():
                if name == "lora_scale":
                    assert np.array_equal(leaf, first[path][name])
                elif leaf.ndim > 1:  # a head's bias is spared too
                    assert np.abs(leaf).sum() < 0.99 * np.abs(old[path][name]).sum(), f"{path}/{name}"


def test_metrics_have_the_names_of_the_contract(programs, start, tiny, experience, sixteen):
    _, metrics = programs.update(start, tiny, experience, KEY, sixteen)
    assert set(metrics) >= {
        "policy/loss", "policy/entropy", "policy/approx_kl", "policy/clip_low", "policy/clip_high",
        "policy/first_ratio_error", "policy/ratio_mean", "policy/ratio_max", "value/loss", "value/clip",
        "optimizer/grad_norm", "optimizer/learning_rate",
    }  # fmt: skip
    for name, x in metrics.items():
        assert x.shape == () and x.dtype == jnp.float32 and np.isfinite(x), name
    assert not any(name.startswith("gap/") for name in metrics)  # those are annotate's here


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"minibatches": 3}, "8 rows cannot be split into 3 minibatches"),
        ({"minibatches": 2, "microbatch_size": 3}, "4 rows cannot be split into microbatches of 3"),
    ],
)
def test_rows_that_do_not_divide_are_refused(start, tiny, experience, settings, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ppo_update, start, tiny, experience, KEY, PPOConfig(**settings))
