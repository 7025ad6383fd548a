"""What the update can do beside plain PPO: a shared trunk, value warm-up, KL stop, PPO-ptx, a moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig, PPOConfig
from jaxrlhf.models.adapters import bind, value_head
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.records import SFTBatch
from jaxrlhf.steps.annotate import annotate
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step
from jaxrlhf.steps.ppo import init_ppo, ppo_loss
from jaxrlhf.steps.sft import learned_tokens, sft_loss

KEY = jax.random.key(21)
FAST = OptimizerConfig(learning_rate=1e-2)
QUICK = dict(optimizer=FAST, value_optimizer=FAST)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ---------------------------------------------------------------- KL in the loss


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_token_far_from_the_reference_does_not_turn_the_step(programs, tiny, roles, experience, estimator):
    """One of about 30 tokens; without a bound k3 of 20 nats decides the step and of 99 nats spoils it."""
    still = OptimizerConfig(learning_rate=1.0, epsilon=1e6)  # far above any gradient: a step is along the gradient
    config = PPOConfig(
        epochs=1, minibatches=1, kl_loss=estimator, optimizer=still.model_copy(update={"max_grad_norm": 1e9})
    )
    start = init_ppo(roles.policy, roles.value, config)
    row, position = np.argwhere(np.asarray(experience.response_mask))[-1]

    def step(gap, config):
        far = experience.replace(
            kl_coef=jnp.full(8, 0.05), ref_logprobs=experience.ref_logprobs.at[row, position].add(gap)
        )
        state, metrics = programs.update(start, tiny, far, KEY, config)
        moved = [np.ravel(x - y) for x, y in zip(jax.tree.leaves(state.policy), jax.tree.leaves(start.policy))]
        return np.concatenate(moved), metrics

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    plain, _ = step(0.0, config)
    for gap in (10.0, 20.0, 99.0):
        moved, metrics = step(gap, config)
        assert float(metrics["optimizer/skipped"]) == 0 and np.isfinite(float(metrics["policy/kl_loss"]))
        assert cosine(moved, plain) > 0.5, gap
    if estimator == "k3":
        free = config.model_copy(update={"kl_bound": None})
        assert abs(cosine(step(20.0, free)[0], plain)) < 0.5
        assert float(step(99.0, free)[1]["optimizer/skipped"]) == 1


# ---------------------------------------------------------------- shared trunk


@pytest.fixture(scope="module")
def head(tiny):
    kernel = np.random.default_rng(2).standard_normal((tiny.config.hidden_size, 1))
    return {"score": {"kernel": jnp.asarray(kernel, jnp.float32)}}


def test_one_pass_of_a_shared_trunk_equals_two(tiny, roles, head, sampled):
    both = bind(tiny, {**roles.policy, **head})
    given = (sampled.tokens, sampled.mask, sampled.response_mask)
    noted = jax.jit(annotate, static_argnames="value_trunk")(
        tiny, roles.policy, head, None, sampled, value_trunk="policy"
    )
    close(noted.logprobs, response_logprobs(both, *given, sampled.temperature)[0], 1e-5)
    close(noted.values, response_values(both, *given), 1e-5)


def test_the_value_loss_reaches_a_shared_trunk_alone(tiny, roles, head, experience):
    """With no advantage the policy's gradient is the value loss's, through the trunk; with trunks of their own, 0."""
    still = experience.replace(advantages=jnp.zeros_like(experience.advantages))

    def gradient(trunk, value):
        config = PPOConfig(value_trunk=trunk, value_clip=1e3)
        loss = lambda policy: ppo_loss(policy, value, tiny, still, config, 10, 8)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(roles.policy)

    shared, own = gradient("policy", head), gradient("own", roles.value)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(shared)) > 1e-4
    assert not any(x.any() for x in jax.tree.leaves(own))


def test_a_shared_trunk_wants_a_head_and_an_own_one_an_adapter(tiny, roles):
    with pytest.raises(ValueError, match="must be only a head"):
        init_ppo(roles.policy, roles.value, PPOConfig(value_trunk="policy"))
    with pytest.raises(ValueError, match="must be only a head"):
        init_ppo(roles.policy, value_head(tiny), PPOConfig())


# ---------------------------------------------------------------- value warm-up


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_in_warm_up_only_the_value_learns(programs, tiny, roles, head, experience, trunk):
    rising = {"optimizer": FAST.model_copy(update={"warmup_steps": 5}), "value_optimizer": FAST}
    config = PPOConfig(epochs=2, minibatches=2, value_warmup=2, value_trunk=trunk, ema_decay=0.5, **rising)
    start = init_ppo(roles.policy, head if trunk == "policy" else roles.value, config)
    first, told = programs.update(start, tiny, experience, KEY, config)
    assert told["optimizer/learning_rate"] == 0
    second, _ = programs.update(first, tiny, experience, KEY, config)
    third, _ = programs.update(second, tiny, experience, KEY, config)
    assert same(second.policy, roles.policy) and same(second.policy_optimizer, start.policy_optimizer)
    assert same(second.average, roles.policy)
    assert not same(first.value, start.value) and not same(second.value, first.value)
    assert not same(third.policy, roles.policy), "after two iterations of four steps the policy moves"
    # Adam and the schedule begin then, as if nothing had been before.
    alone = config.model_copy(update={"value_warmup": 0})
    anew = second.replace(policy_optimizer=start.policy_optimizer, step=jnp.int32(0))
    fresh, _ = programs.update(anew, tiny, experience, KEY, alone)
    close(third.policy, fresh.policy)


# ---------------------------------------------------------------- KL stop


def test_steps_after_too_much_kl_are_left_out(programs, tiny, start, experience):
    """The bound rises from step to step: each time one more is taken, and the state is that of so many steps."""
    config = PPOConfig(epochs=4, minibatches=1, optimizer=FAST)
    bound, kls = 1e-6, [0.0]  # of the minibatch before each step: before the first one the policy is the old one
    for steps in (1, 2, 3):
        state, metrics = programs.update(
            start, tiny, experience, KEY, config.model_copy(update={"kl_stop": float(bound)})
        )
        assert float(metrics["policy/steps"]) == steps == int(state.step)
        # Means are over the steps that were looked at, the one above the bound among them.
        kls.append(float(metrics["policy/approx_kl"]) * (steps + 1) - sum(kls))
        assert kls[-1] > bound and all(np.isfinite(x) for x in metrics.values())
        bound = kls[-1] * 1.001
        if steps == 2:
            two = PPOConfig(epochs=2, minibatches=1, optimizer=FAST)
            plain, metrics = programs.update(start, tiny, experience, KEY, two)
            close(state, plain)
            assert "policy/steps" not in metrics, "without a bound nothing is left out, and nothing told"


# ---------------------------------------------------------------- PPO-ptx


@pytest.fixture(scope="module")
def mix():
    """Four rows of texts, of one to six learnt tokens."""
    tokens = jnp.asarray(np.random.default_rng(6).integers(3, 12, (4, 7)), jnp.int32)
    real = jnp.arange(7) < jnp.array([2, 4, 7, 5])[:, None]
    return SFTBatch(tokens, real.astype(jnp.int32), real & (jnp.arange(7) > 0))


def test_the_mix_adds_the_gradient_of_its_mean_loss(programs, tiny, roles, experience, mix):
    """One step equals a step along the sum of both gradients, made apart."""
    even = OptimizerConfig(learning_rate=0.1, epsilon=1.0, max_grad_norm=1e3)  # no small gradient is blown up
    config = PPOConfig(epochs=1, minibatches=1, pretraining_coef=0.7, optimizer=even)
    start = init_ppo(roles.policy, roles.value, config)
    after, metrics = programs.update(start, tiny, experience, KEY, config, mix)
    tokens, learnt = jnp.sum(experience.response_mask), jnp.sum(learned_tokens(mix))
    ppo = jax.jit(jax.grad(lambda p: ppo_loss(p, roles.value, tiny, experience, config, tokens, 8)[0]))(roles.policy)
    loss, text = jax.jit(jax.value_and_grad(lambda p: sft_loss(tiny, p, mix) / learnt))(roles.policy)
    total = jax.tree.map(lambda g, h: g + 0.7 * h, ppo, text)
    want, _, noted = optimizer_step(even, total, init_optimizer(roles.policy), roles.policy, jnp.int32(0))
    close(after.policy, want, 1e-5)
    assert float(metrics["policy/pretraining_loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["optimizer/grad_norm"]) == pytest.approx(float(noted["grad_norm"].value), rel=1e-4)


def test_each_step_takes_its_own_rows_of_the_mix_and_parts_equal_the_whole(programs, tiny, roles, experience, mix):
    config = PPOConfig(epochs=2, minibatches=1, pretraining_coef=1.0, optimizer=FAST)
    start = init_ppo(roles.policy, roles.value, config)
    still = experience.replace(advantages=jnp.zeros_like(experience.advantages))
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), mix)
    whole = programs.update(start, tiny, still, KEY, config, doubled)
    parts = programs.update(start, tiny, still, KEY, config.model_copy(update={"microbatch_size": 2}), doubled)
    close(parts[0].policy, whole[0].policy, 1e-5)
    turned = jax.tree.map(lambda x: jnp.concatenate([x[::-1], x]), mix)  # another order within a step
    close(programs.update(start, tiny, still, KEY, config, turned)[0].policy, whole[0].policy, 1e-5)
    other = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:2], x]), mix)  # another first step
    moved = programs.update(start, tiny, still, KEY, config, other)[0].policy
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), moved, whole[0].policy)))


def test_learning_from_the_mix_lowers_its_loss(programs, tiny, roles, experience, mix):
    config = PPOConfig(epochs=2, minibatches=1, pretraining_coef=1.0, optimizer=FAST)  # a program that is there already
    still = experience.replace(advantages=jnp.zeros_like(experience.advantages))
    state = init_ppo(roles.policy, roles.value, config)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 2), mix)
    losses = []
    for _ in range(8):
        state, metrics = programs.update(state, tiny, still, KEY, config, rows)
        losses.append(float(metrics["policy/pretraining_loss"]))
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- moving average


def test_the_average_follows_step_by_step(programs, tiny, roles, experience):
    config = PPOConfig(minibatches=1, ema_decay=0.75, **QUICK)
    start = init_ppo(roles.policy, roles.value, config)
    # Every epoch is one step on the whole batch: the update of two epochs ends where that of three goes through.
    states = [
        programs.update(start, tiny, experience, KEY, config.model_copy(update={"epochs": epochs}))[0]
        for epochs in (1, 2, 3)
    ]
    expected = roles.policy
    for state in states:
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, expected, state.policy)
        close(state.average, expected, 1e-5)
    assert init_ppo(roles.policy, None, PPOConfig()).average == {}
