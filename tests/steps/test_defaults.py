"""Defaults that a run needs to learn at any size: what they make of a step, not what they are."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxrlhf.algorithms.advantages import gae
from jaxrlhf.config import AdapterConfig, AdvantageConfig, OptimizerConfig, PPOConfig
from jaxrlhf.config.steps import LEARNING_RATES, RATED_WIDTH
from jaxrlhf.models.adapters import init_adapter, value_head
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step, with_rate
from jaxrlhf.steps.ppo import complete, init_ppo, ppo_update

ROOT = Path(__file__).parent.parent.parent
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def whole(tiny):
    return init_adapter(tiny, AdapterConfig(kind="full"), KEY)


@pytest.mark.parametrize("role", sorted(LEARNING_RATES))
def test_the_rate_is_chosen_by_the_tree_and_one_that_is_given_stays(tiny, roles, whole, role):
    rates = LEARNING_RATES[role]
    assert rates.lora > rates.full
    of = lambda tree: with_rate(OptimizerConfig(), role, tree).learning_rate  # noqa: E731
    assert of(roles.policy) == of(roles.value) == of(value_head(tiny)) == rates.lora
    assert of(whole) == of({**whole, **value_head(tiny)}) == rates.full * RATED_WIDTH / tiny.config.hidden_size
    wide = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((9, 4096), jnp.float32)}}
    assert of(wide) == rates.full, "narrow models alone get more"
    assert of({**roles.policy, "embed_tokens": whole["embed_tokens"]}) == rates.lora, "LoRA with a module beside it"
    assert with_rate(OptimizerConfig(learning_rate=0.0), role, whole).learning_rate == 0.0


def test_the_librarys_update_takes_and_logs_these_rates(programs, tiny, roles, experience):
    """The same update as with the rates written out, so that stages, which write them out, and library agree."""
    policy, value = (LEARNING_RATES[role].lora for role in ("policy", "value"))
    written = PPOConfig(
        minibatches=4, optimizer=OptimizerConfig(learning_rate=policy),
        value_optimizer=OptimizerConfig(learning_rate=value),
    )  # fmt: skip
    start = init_ppo(roles.policy, roles.value, written)
    (left, metrics), (right, _) = (programs.update(start, tiny, experience, KEY, c) for c in (PPOConfig(), written))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), left, right)
    assert float(metrics["optimizer/learning_rate"]) == pytest.approx(policy)
    assert float(metrics["optimizer/value_learning_rate"]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("rows", "size", "wanted"),
    [(64, None, 4), (6, None, 3), (2, None, 2), (1, None, 1), (7, None, 1), (8, 4, 2), (64, 64, 1), (12, 3, 4)],
)
def test_any_number_of_answers_divides_into_the_default_minibatches(rows, size, wanted):
    found = complete(PPOConfig(microbatch_size=size), rows).minibatches
    assert found == wanted and rows % found == 0 and rows // found % (size or 1) == 0
    assert complete(PPOConfig(minibatches=5), rows).minibatches == 5, "a number that is given stays"


def test_rows_that_do_not_divide_by_four_are_learnt_from(tiny, roles, experience):
    six = jax.tree.map(lambda x: x[:6], experience)
    start = init_ppo(roles.policy, roles.value, PPOConfig())
    state, _ = jax.eval_shape(ppo_update, start, tiny, six, KEY, PPOConfig())
    assert jax.tree.map(jnp.shape, state.policy) == jax.tree.map(jnp.shape, start.policy)


def test_a_step_does_not_shrink_with_the_gradient():
    """At 8B parameters a gradient of norm 0.1 is 1e-6 in each: the step is to be as large as at norm 1."""
    params = {"kernel": jnp.zeros((4, 3))}
    config = OptimizerConfig(learning_rate=1.0)
    for each in (1e-3, 1e-6):
        grads = jax.tree.map(lambda x: jnp.full_like(x, each), params)  # noqa: B023
        moved, _, _ = optimizer_step(config, grads, init_optimizer(params), params, jnp.int32(0))
        np.testing.assert_allclose(moved["kernel"], -1.0, rtol=0.02)


def test_a_final_score_reaches_the_first_token_of_a_long_answer_while_the_value_knows_nothing():
    config, length = AdvantageConfig(), 320
    rewards = jnp.zeros((1, length)).at[0, -1].set(1.0)
    mask = jnp.ones((1, length), bool)
    advantages, _ = gae(rewards, jnp.zeros((1, length)), mask, config.gamma, config.lam)
    assert float(advantages[0, 0]) > 0.5 * float(advantages[0, -1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_iteration_at_the_defaults_stays_near_the_old_policy(kind):
    """On a random model of width 256 it moves, and no token of a hundred leaves the clip range."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        benchmark = importlib.import_module("defaults")
    (kl, outside), (former, far) = benchmark.moved(256, kind, [PPOConfig(), PPOConfig(**benchmark.FORMER)])
    assert 0 < kl < 0.1 * former and outside < 0.01
    if kind == "full":
        assert far > 0.1, "the settings that were the defaults before move a whole model out of it"


MEASURED = ["quickstart", "stories", "gsm8k", "bench"]


@pytest.mark.parametrize("name", MEASURED)
def test_a_config_with_measured_figures_states_what_they_hang_on(name):
    """Else another default would make its figures those of another run."""
    given = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    update = given["ppo"]["update"]
    assert "dtype" in given["model"] and "lam" in given["ppo"]["advantage"]
    assert {"epochs", "minibatches", "value_clip", "remat"} <= set(update)
    stages = [given[stage] for stage in ("sft", "reward_model") if stage in given]
    assert all("remat" in stage for stage in stages)
    optimizers = [update["optimizer"], update["value_optimizer"], *(stage["optimizer"] for stage in stages)]
    assert all({"learning_rate", "epsilon"} <= set(optimizer) for optimizer in optimizers)
