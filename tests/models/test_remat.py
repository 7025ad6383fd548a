"""What each policy of rematerialisation keeps for the backward pass, and that it changes no gradient."""

import contextlib
import io
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from jaxrlhf.config import AdapterConfig
from jaxrlhf.models.adapters import bind, init_adapter
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.models.quantize import quantize_decoder
from jaxrlhf.models.remat import REMAT

POLICIES = ("none", *REMAT)
# (dtype, quantised, adapter, tokens of a row): each way in which a layer computes its product.
WAYS = {
    "plain": ("float32", None, "full", 9),
    "merged": ("float32", None, "lora", 40),  # more tokens than a layer is wide: one product with its pair
    "pair": ("float32", None, "lora", 6),
    "bfloat16": ("bfloat16", None, "lora", 9),
    "int8": ("float32", "int8", "lora", 9),
    "nf4": ("float32", "nf4", "lora", 9),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request, small):
    """(loss of an adapter and a policy, adapter, layer products as "dtype[shape]", rows of the input as that)."""
    dtype, kind, adapter, T = request.param
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), small)
    base = base if kind is None else quantize_decoder(base, kind)
    given = init_adapter(base, AdapterConfig(kind=adapter, rank=2), jax.random.key(1))
    if adapter == "lora":
        given = jax.tree.map(lambda x: x + 0.1 if x.ndim == 2 else x, given)  # pairs that change something
    tokens = np.random.default_rng(2).integers(0, 31, (2, T))
    segments = (np.arange(T) >= np.array([0, 3])[:, None]).astype(np.int32)

    def loss(adapter, remat):
        model = bind(base, adapter)
        hidden = model.encode(tokens, segments, remat)
        return jnp.sum(model.logits(hidden) ** 2 * segments[:, :, None]) / 100

    config, short = small.config, {"float32": "f32", "bfloat16": "bf16"}[dtype]
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    widths = [config.heads * H, config.kv_heads * H, config.kv_heads * H, D, F, F]  # q k v o gate up; down nobody reads
    return loss, given, Counter(f"{short}[2,{T},{width}]" for width in widths), f"{short}[2,{T},{D}]"


def kept(loss, adapter, remat) -> tuple[Counter, Counter]:
    """(products, all else) that is computed and kept for the backward pass: how often each "dtype[shape]"."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(lambda adapter: loss(adapter, remat), adapter)
    lines = re.findall(r"^(\S+) (.*)$", text.getvalue(), re.MULTILINE)
    made = [(shape, how) for shape, how in lines if not how.startswith(("from the argument", "from a constant"))]
    products = Counter(shape for shape, how in made if how.startswith("named"))
    return products, Counter(shape for shape, how in made if not how.startswith("named"))


def test_dots_keeps_each_layer_s_products_and_full_only_its_input(way, small):
    loss, adapter, products, rows = way
    found = {remat: kept(loss, adapter, remat) for remat in REMAT}
    layers = small.config.layers
    assert found["full"][0] == Counter()
    assert found["dots"][0] == Counter({shape: layers * count for shape, count in products.items()})
    # Beside products both keep the same: what all layers read, each layer's input, and what the head wants.
    assert found["dots"][1] == found["full"][1]
    assert found["full"][1][rows] >= layers
    plain = sum(map(lambda c: sum(c.values()), kept(loss, adapter, "none")))
    assert plain > 2 * sum(map(lambda c: sum(c.values()), found["dots"]))


def test_gradients_are_those_without(way):
    loss, adapter, _, rows = way
    rtol, atol = (0.02, 1e-3) if rows.startswith("bf16") else (1e-3, 1e-5)  # XLA rounds where it keeps, or does not
    compiled = {r: jax.jit(jax.grad(loss), static_argnums=1).lower(adapter, r) for r in POLICIES}
    gradients = {r: named_parameters(jax.device_get(c.compile()(adapter))) for r, c in compiled.items()}
    largest = max(np.abs(leaf.astype(np.float32)).max() for leaf in gradients["none"].values())
    assert largest > 0.1
    for remat in REMAT:
        for name, leaf in gradients["none"].items():
            np.testing.assert_allclose(gradients[remat][name], leaf, rtol, atol * largest, err_msg=name)
        # What jax.checkpoint leaves in a program; without it this would compare a function with itself.
        assert "optimization_barrier" in compiled[remat].as_text()
        traced = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(adapter, remat))
        assert ("Host" in traced) == (remat == "offload")


def test_a_policy_that_is_none_of_them_is_an_error(small, batch):
    tokens, mask = batch
    with pytest.raises(KeyError):
        small.encode(tokens, mask.astype(np.int32), "some")
