"""Checkpoints read in part, without the tree that was saved and without a trace in the folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint.checkpoints import Checkpoints, stored_arrays, stored_best, stored_steps
from jaxrlhf.errors import UserError

TREE = {
    "policy": {"layers.0.q": {"lora_a": jnp.arange(6.0).reshape(2, 3), "scale": jnp.float32(2)},
               "norm": {"scale": jnp.ones(4, "bfloat16")}, "none": {"x": jnp.zeros((0, 2))}},
    "policy_optimizer": {"m": np.arange(5)}, "value": {}, "step": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "ppo"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, TREE)
    return folder


def test_the_arrays_below_a_path_are_those_of_the_tree(folder):
    found = stored_arrays(folder, 3, "policy")
    leaves = jax.tree_util.tree_leaves_with_path(TREE["policy"])
    saved = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert set(found) == set(saved)
    for name, leaf in saved.items():
        assert isinstance(found[name], jax.Array) and found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)
    assert stored_arrays(folder, 3, "value") == stored_arrays(folder, 3, "pol") == {}


def test_a_folder_without_checkpoints_has_none_and_stays_as_it_is(folder, tmp_path):
    assert stored_steps(tmp_path / "none") == [] and stored_best(tmp_path / "none", "a") is None
    assert not (tmp_path / "none").exists()
    (folder / "7.saving").mkdir()  # another process is writing it
    assert stored_steps(folder) == [3] and (folder / "7.saving").exists()


def test_damage_is_named(folder):
    with pytest.raises(UserError, match=r"ppo/1: the run has just removed this checkpoint; run the command again"):
        stored_arrays(folder, 1, "policy")
    data = next(path for path in (folder / "3" / "state" / "d").iterdir())
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"ppo/3: this checkpoint is damaged: .*; restore the folder"):
        stored_arrays(folder, 3, "policy")
    data.write_bytes(whole)
