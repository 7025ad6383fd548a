"""Counts of small programs whose answers are known: products in loops, loops' turns, memory, parts of a line."""

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.planning.compiling import _compile
from jaxrlhf.planning.count import Count, Layout, count, groups_of
from jaxrlhf.planning.hlo import parse

ONE = Layout({"data": 1, "fsdp": 1, "tensor": 1})
N = 64
PRODUCT = 2 * N**3
X = jax.ShapeDtypeStruct((N, N), jnp.float32)


def _counted(function, *shapes, **options) -> Count:
    _, text = _compile(jax.jit(function, **options).lower(*shapes))
    return count(parse(text), ONE)


def test_products():
    tall = jax.ShapeDtypeStruct((128, N), jnp.float32)
    assert _counted(lambda a, b: a @ b, tall, X).flops == 2 * 128 * N * N
    batch = jax.ShapeDtypeStruct((3, N, 16), jnp.bfloat16)
    found = _counted(lambda a: jnp.einsum("bnk,bmk->bnm", a, a, preferred_element_type=jnp.float32), batch)
    assert found.flops == 3 * 2 * N * N * 16
    assert found.bytes == pytest.approx(3 * N * 16 * 2 + 3 * N * N * 4, rel=0.01)  # bfloat16 in, float32 out


def _scan(turns: int, body):
    return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=turns)[0]


def test_products_in_nested_scans_count_as_often_as_they_turn():
    inner = _scan(5, lambda c: c @ c)
    found = _counted(_scan(7, inner), X)
    assert (found.flops, found.unknown_loops) == (35 * PRODUCT, 0)
    around = _counted(lambda x: _scan(7, inner)(x) @ x, X)
    assert around.flops == 36 * PRODUCT


def test_while_turns_to_its_bound_and_at_most_so_where_it_may_stop_early():
    def early(x):
        going = lambda s: (s[0] < 11) & (s[1][0, 0] > 0)  # noqa: E731
        return jax.lax.while_loop(going, lambda s: (s[0] + 1, s[1] @ s[1]), (jnp.int32(2), x))[1]

    found = _counted(early, X)
    assert (found.flops, found.unknown_loops) == (9 * PRODUCT, 0)


def test_loop_of_unknown_length_is_counted_once_and_told():
    def unknown(x, n):
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ s[1]), (jnp.int32(0), x))[1]

    found = _counted(unknown, X, jax.ShapeDtypeStruct((), jnp.int32))
    assert (found.flops, found.unknown_loops) == (PRODUCT, 1)


def test_of_branches_the_largest_counts():
    found = _counted(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x), X)
    assert found.flops == 2 * PRODUCT


def test_gradients_cost_twice_the_forward_pass_and_recomputation_once_more():
    weights = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 3
    rows = jax.ShapeDtypeStruct((512, 256), jnp.float32)

    def loss(weights, x, wrap):
        def layers(w, x):
            for kernel in w:
                x = jnp.sin(x @ kernel)
            return x

        return jnp.sum(jnp.sin(wrap(layers)(weights, x)))

    forward = 3 * 2 * 512 * 256 * 256
    plain = _counted(jax.grad(lambda w, x: loss(w, x, lambda f: f)), weights, rows)
    again = _counted(jax.grad(lambda w, x: loss(w, x, jax.checkpoint)), weights, rows)
    assert plain.flops == pytest.approx(3 * forward - forward / 3, rel=0.01)  # none for the rows themselves
    assert plain.flops < again.flops <= plain.flops + forward


def test_recomputed_layers_are_not_held_at_once():
    rows = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    size = 1024 * 64 * 4

    def loss(kernels, x, wrap):
        for kernel in kernels:
            x = wrap(lambda k, x: jnp.sin(jnp.sin(jnp.sin(x @ k) @ k) @ k))(kernel, x)
        return jnp.sum(x * x)

    def peak(layers: int, wrap) -> float:
        return _counted(jax.grad(lambda w, x: loss(w, x, wrap)), [X] * layers, rows).peak

    plain, again = (peak(8, wrap) - peak(4, wrap) for wrap in (lambda f: f, jax.checkpoint))
    assert again == pytest.approx(4 * size, rel=0.1)  # a layer keeps its input
    assert plain >= 4 * 3 * size * 0.9  # without, also what lies between its products


def test_memory_of_a_chain_is_two_of_its_values():
    big = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    size = 512 * 512 * 4
    assert _counted(lambda x: x @ x, big).peak == size  # the result
    assert _counted(lambda x: ((x @ x) @ x) @ x, big).peak == 2 * size
    def both(x):
        y = x @ x
        return [y, y @ x]

    kept = _counted(both, big)
    assert (kept.peak, kept.outputs) == (2 * size, 2 * size)


def test_what_is_given_away_is_taken_over():
    big = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert _counted(lambda x: x + 1, big).outputs == 512 * 512 * 4
    given = _counted(lambda x: x + 1, big, donate_argnums=0)
    assert (given.outputs, given.peak) == (0, 0)


def test_what_is_given_back_as_it_came_is_copied():
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # without, jax itself hands it through
    found = _counted(lambda x, y: (x, y + 1.0), X, X, out_shardings=placed)
    assert (found.peak, found.outputs, found.temporaries) == (2 * 4 * N * N, 2 * 4 * N * N, 0)
    assert found.bytes == 4 * 4 * N * N


def test_a_row_written_into_a_cache_moves_the_row():
    cache, row = jax.ShapeDtypeStruct((4096, 256), jnp.float32), jax.ShapeDtypeStruct((1, 256), jnp.float32)
    write = lambda c, r: jax.lax.dynamic_update_slice(c, r, (7, 0))  # noqa: E731
    assert _counted(write, cache, row, donate_argnums=0).bytes <= 4 * 256 * 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=2,'tensor'=2], device_ids=([2,2]T(1,0)) {'data'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=4] {'data':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0},{2,2}}", [[0, 1], [1, 0]]),
    ],
    ids=[
        "listed", "iota", "transposed", "first-axis", "second-axis", "named", "renumbered", "part", "empty", "none",
        "pairs",
    ],
)  # fmt: skip
def test_groups_in_each_spelling(text, groups):
    assert groups_of(text, 4).tolist() == groups


def test_groups_in_an_unknown_spelling_are_no_guess():
    with pytest.raises(ValueError, match="not known"):
        groups_of("replica_groups=@everyone", 4)


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("nothing")
