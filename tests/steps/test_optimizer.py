import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.steps.optimizer import init_optimizer, learning_rate, optimizer_step

SHAPES = {"kernel": (5, 3), "bias": (3,), "scale": ()}
step_jit = jax.jit(optimizer_step)


def drawn(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {name: np.float32(scale * generator.standard_normal(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_ten_steps_equal_torch(decay):
    """torch.optim.AdamW after clip_grad_norm_, with gradients on both sides of the clip."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    config = OptimizerConfig(
        learning_rate=0.02, weight_decay=decay, max_grad_norm=1.5, beta1=0.8, beta2=0.95, epsilon=1e-5
    )
    params = drawn(0)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in params.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": decay},
        {"params": [theirs["bias"], theirs["scale"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-5)
    state = init_optimizer(params)
    for step in range(10):
        grads = drawn(step + 1, scale=0.1 if step % 3 == 0 else 2.0)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.5)
        adam.step()
        params, state, metrics = step_jit(config, grads, state, params, jnp.int32(step))
        assert float(metrics["grad_norm"].value) == pytest.approx(norm.item(), rel=1e-5)  # before the clip
        for name in SHAPES:
            np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), atol=2e-6, err_msg=name)


def test_decay_spares_vectors_and_scalars():
    """With no gradient only decay moves anything: matrices by the factor 1 - rate * decay."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    params = drawn(0)
    moved, _, _ = step_jit(
        config, jax.tree.map(jnp.zeros_like, params), init_optimizer(params), params, jnp.int32(0)
    )
    np.testing.assert_allclose(moved["kernel"], 0.95 * params["kernel"], rtol=1e-6)
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(moved[name], params[name])


def test_rate_0_changes_no_bit_and_half_precision_stays():
    params = drawn(0) | {"half": jnp.asarray([1.5, -2.0], jnp.bfloat16)}
    grads = drawn(1) | {"half": jnp.asarray([0.5, 1.0], jnp.bfloat16)}
    for rate, same in ((0.0, True), (0.5, False)):
        moved, _, _ = step_jit(
            OptimizerConfig(learning_rate=rate, weight_decay=0.1), grads, init_optimizer(params), params, jnp.int32(3)
        )
        for name, x in params.items():
            assert moved[name].dtype == x.dtype
            assert (np.asarray(moved[name]).tobytes() == np.asarray(x).tobytes()) is same


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, {0: 1, 5: 1, 1000: 1}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        ({"schedule": "linear", "total_steps": 10}, {0: 1, 1: 0.9, 9: 0.1, 10: 0, 50: 0}),
        (
            {"schedule": "linear", "warmup_steps": 4, "total_steps": 12},
            {0: 0.25, 3: 1, 4: 1, 5: 0.875, 8: 0.5, 11: 0.125, 12: 0},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 2, "total_steps": 10},
            {0: 0.5, 1: 1, 2: 1, 4: 0.5 + 0.5 * np.cos(np.pi / 4), 6: 0.5, 10: 0, 20: 0},
        ),
    ],
)
def test_schedules(settings, rates):
    config = OptimizerConfig(learning_rate=0.3, **settings)
    for step, factor in rates.items():
        assert float(learning_rate(config, jnp.int32(step))) == pytest.approx(0.3 * factor, abs=1e-7), step


def test_a_decay_needs_an_end():
    with pytest.raises(ValueError, match="total_steps must be a number for schedule cosine"):
        learning_rate(OptimizerConfig(learning_rate=0.1, schedule="cosine"), jnp.int32(0))


def test_changing_a_number_compiles_nothing():
    run = jax.jit(lambda *args: optimizer_step(*args))
    params = jax.tree.map(jnp.asarray, drawn(0))
    state = init_optimizer(params)
    for x in (0.1, 0.2, 0.3):
        config = OptimizerConfig(
            learning_rate=x, schedule="linear", warmup_steps=int(10 * x), total_steps=int(100 * x), weight_decay=x,
            max_grad_norm=x, beta1=x, beta2=x, epsilon=x,
        )  # fmt: skip
        params, state, _ = run(config, drawn(1), state, params, jnp.int32(0))
    assert run._cache_size() == 1


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where, bad):
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    config, state = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1), init_optimizer(params)
    grads = jax.tree.map(jnp.ones_like, params)
    run = jax.jit(optimizer_step)
    params, state, noted = run(config, grads, state, params, jnp.int32(0), jnp.float32(1.0))
    assert noted["skipped"].value == 0
    if where == "gradient":
        broken, loss = grads | {"bias": jnp.array([1.0, bad])}, 1.0
    else:
        broken, loss = grads, bad
    after, after_state, noted = run(config, broken, state, params, jnp.int32(1), jnp.float32(loss))
    assert noted["skipped"].value == 1
    jax.tree.map(np.testing.assert_array_equal, (after, after_state), (params, state))
    moved, _, noted = run(config, grads, after_state, after, jnp.int32(2), jnp.float32(1.0))
    assert noted["skipped"].value == 0 and (moved["kernel"] != params["kernel"]).all()
