"""Saved and restored is the same, bit for bit; what is not the same tree, or not whole, says so."""

import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.errors import UserError


@struct.dataclass
class State:
    adapter: Any
    optimizer: Any
    step: jax.Array
    name: str = struct.field(pytree_node=False, default="sft")


def _state(seed: int = 0, rank: int = 4) -> State:
    a, b = jax.random.normal(jax.random.key(seed), (2, 16, rank))
    adapter = {
        "layers.0.attention.q_proj": {"lora_a": a, "lora_b": b.astype(jnp.bfloat16), "lora_scale": jnp.float32(2.0)},
        "score": {"kernel": jnp.full((16, 1), jnp.nan)},
    }
    return State(adapter, optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(adapter), jnp.int32(seed))


def _tree(seed: int = 0) -> dict:
    return {
        "state": _state(seed),
        "none": None,
        "position": {"epoch": 3, "done": True, "coef": 0.1 + 0.2, "inf": float("inf"), "order": "x", "big": 2**80},
        "numpy": np.arange(6.0).reshape(2, 3),
        "scalar": np.float64(1 / 3),
        "empty": jnp.zeros((0, 3)),
        "flags": jnp.array([True, False]),
        "dots.and/slashes": (jnp.arange(3, dtype=jnp.uint8), [jnp.float16(0.1)]),
    }


def _bits(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return type(leaf).__name__, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
    return type(leaf).__name__, leaf


def _assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [_bits(x) for x in jax.tree.leaves(one)] == [_bits(x) for x in jax.tree.leaves(other)]


def test_round_trip_is_bit_identical_also_when_opened_again(tmp_path):
    tree = _tree(7)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(5, tree)
        checkpoints.wait()
        _assert_same(checkpoints.restore(5, _tree(0)), tree)
    with Checkpoints(tmp_path / "c") as again:
        assert again.latest_step() == 5
        _assert_same(again.restore(5, _tree(0)), tree)


def test_like_may_be_shapes(tmp_path):
    state = _state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        _assert_same(checkpoints.restore(1, jax.eval_shape(lambda: _state(0))), state)


def test_numpy_and_jax_leaves_may_stand_for_each_other(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": np.arange(3, dtype=np.float32), "b": jnp.arange(3)})
        found = checkpoints.restore(1, {"a": jnp.zeros(3), "b": np.zeros(3, np.int32)})
    assert isinstance(found["a"], jax.Array) and isinstance(found["b"], np.ndarray)
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    np.testing.assert_array_equal(found["b"], [0, 1, 2])


def test_tree_without_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"finished": True})
        assert checkpoints.restore(0, {"finished": False}) == {"finished": True}


def test_caller_may_donate_and_change_right_after_save(tmp_path):
    # Large enough that the write is still going on while the buffers are reused.
    tree = {str(i): jnp.full((1 << 20,), float(i)) for i in range(8)} | {"numpy": np.zeros(1 << 20)}
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    arrays = {k: v for k, v in tree.items() if k != "numpy"}
    step.lower(arrays).compile()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        tree["numpy"] += 1
        for _ in range(3):
            arrays = step(arrays)
        jax.block_until_ready(arrays)
        found = checkpoints.restore(1, {**arrays, "numpy": tree["numpy"]})
    assert {k: float(v.min()) for k, v in found.items()} == {**{str(i): float(i) for i in range(8)}, "numpy": 0.0}
    assert {k: float(v.max()) for k, v in found.items()} == {**{str(i): float(i) for i in range(8)}, "numpy": 0.0}


def test_keeps_the_last_ones_only(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 4, 9):
            checkpoints.save(step, {"x": jnp.float32(step)})
        assert checkpoints.latest_step() == 9
        assert float(checkpoints.restore(4, {"x": jnp.float32(0)})["x"]) == 4
        with pytest.raises(UserError, match=r"no checkpoint of step 1; the latest checkpoint has step 9"):
            checkpoints.restore(1, {"x": jnp.float32(0)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "9", "latest.json"]


def test_saving_the_latest_again_changes_nothing_and_an_earlier_one_is_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"x": jnp.float32(1)})
        checkpoints.save(3, {"x": jnp.float32(1)})
        with pytest.raises(ValueError, match="must be greater than 3, the step of the latest checkpoint, not 2"):
            checkpoints.save(2, {"x": jnp.float32(1)})
        with pytest.raises(ValueError, match="leaf x must be an array, a number or text, not a object"):
            checkpoints.save(4, {"x": object()})


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"x": {"a": jnp.zeros((2, 4))}}, r"x/a is float32\[2,3\] in the checkpoint, .* float32\[2,4\]"),
        ({"x": {"a": jnp.zeros((2, 3), jnp.bfloat16)}}, r"x/a is float32\[2,3\] .* bfloat16\[2,3\]"),
        ({"x": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1)}}, r"x/b is absent in the checkpoint, .* float32\[1\]"),
        ({"x": {}}, r"x/a is float32\[2,3\] in the checkpoint, .* absent"),
        ({"x": {"a": 1.0}}, r"x/a is float32\[2,3\] .* float"),
    ],
)
def test_another_tree_names_the_first_leaf_that_differs(tmp_path, like, words):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"x": {"a": jnp.zeros((2, 3))}})
        with pytest.raises(UserError, match=words) as error:
            checkpoints.restore(2, like)
    assert "\n" not in str(error.value) and str(tmp_path / "2") in str(error.value)


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be written to this folder"):
        Checkpoints(tmp_path / "file" / "checkpoints")


KILLED = """
import sys, time, threading, os, signal
import jax.numpy as jnp
from jaxrlhf.checkpoint.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
tree = {str(i): jnp.full((1 << 18,), float(i)) for i in range(16)}
for step in range(1, 3):
    checkpoints.save(step, tree)
checkpoints.wait()
print("saved 2", flush=True)
for step in range(3, 10_000):
    checkpoints.save(step, tree)
"""


def test_killed_while_saving_goes_on_from_the_last_whole_one(processes, tmp_path):
    process = processes.start("-c", KILLED, tmp_path)
    process.wait_until(lambda: process.output == "saved 2\n")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # stop it where a save is half-written
        if list(tmp_path.glob("*.saving*")):
            process.send(signal.SIGSTOP)
            if list(tmp_path.glob("*.saving*")):
                break
            process.send(signal.SIGCONT)
    process.kill()
    assert process.errors == ""  # quiet
    assert list(tmp_path.glob("*.saving*"))
    with Checkpoints(tmp_path) as checkpoints:
        assert not list(tmp_path.glob("*.saving*"))
        latest = checkpoints.latest_step()
        assert latest >= 2
        found = checkpoints.restore(latest, {str(i): jnp.zeros(1 << 18) for i in range(16)})
        assert all(float(v.min()) == float(v.max()) == float(k) for k, v in found.items())
        checkpoints.save(latest + 1, found)
        assert checkpoints.latest_step() == latest + 1


def test_half_deleted_older_checkpoint_does_not_matter(tmp_path):
    tree = {"a": jnp.arange(4.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.save(2, tree)
    for path in (tmp_path / "1").iterdir():
        if path.is_file():
            path.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(3, tree)
        checkpoints.save(4, tree)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "latest.json"]


def test_a_small_save_costs_little(tmp_path):
    tree = {f"layers.{i}.q_proj": {n: jnp.ones((64, 8)) for n in ("lora_a", "lora_b")} for i in range(20)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree)
        checkpoints.wait()
        times = []
        for step in range(1, 4):
            start = time.perf_counter()
            checkpoints.save(step, tree)
            times.append(time.perf_counter() - start)
            checkpoints.wait()
    assert min(times) < 1.0
