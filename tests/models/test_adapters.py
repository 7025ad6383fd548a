import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import (
    SCORE,
    as_kind,
    bare,
    bind,
    init_adapter,
    is_full,
    linear_shapes,
    merge,
    parameter_count,
    scaled_head,
    value_head,
    with_head,
    without_head,
)
from jaxrlhf.models.decoder import named_parameters

LORA = AdapterConfig(kind="lora", rank=2, alpha=6.0)
FULL = AdapterConfig(kind="full")


def moved(adapter, seed=0):
    """The adapter with noise on every leaf but the constants, so that it changes what the base computes."""
    generator = np.random.default_rng(seed)

    def move(name, leaf):
        return leaf if name == "lora_scale" else leaf + 0.1 * generator.standard_normal(leaf.shape).astype(np.float32)

    return {path: {name: move(name, leaf) for name, leaf in leaves.items()} for path, leaves in adapter.items()}


@pytest.fixture(scope="module")
def lora(small):
    return jax.device_get(init_adapter(small, LORA, jax.random.key(3)))


@pytest.mark.parametrize("config", [LORA, FULL], ids=lambda c: c.kind)
def test_a_fresh_adapter_changes_nothing(small, batch, forward, config):
    bound = bind(small, init_adapter(small, config, jax.random.key(0)))
    np.testing.assert_allclose(forward(bound, *batch), forward(small, *batch), atol=1e-6)


def test_bound_to_nothing_is_the_base(small):
    assert bind(small, None) is small and merge(small, None) is small


@pytest.mark.parametrize("kind", ["lora", "full", "mixed"])
def test_merged_equals_bound_and_differs_from_the_base(small, batch, forward, lora, kind):
    adapter = lora if kind == "lora" else init_adapter(small, FULL, jax.random.key(0))
    adapter = moved(jax.device_get(adapter))
    if kind == "mixed":  # LoRA pairs on some modules, replaced leaves elsewhere
        pairs = {path: leaves for path, leaves in moved(lora).items() if ".mlp." in path}
        adapter = {path: leaves for path, leaves in adapter.items() if ".mlp." not in path} | pairs
    merged = merge(small, adapter)
    assert set(named_parameters(merged)) == set(named_parameters(small))
    bound = forward(bind(small, adapter), *batch)
    np.testing.assert_allclose(forward(merged, *batch), bound, atol=1e-4)
    assert np.abs(bound - forward(small, *batch)).max() > 0.1


def test_a_lora_pair_adds_its_scaled_product(small, lora):
    adapter = moved(lora)
    merged = named_parameters(merge(small, adapter))
    for name, leaf in named_parameters(small).items():
        pair = adapter.get(name.removesuffix("/kernel")) if name.endswith("/kernel") else None
        added = 3.0 * pair["lora_a"] @ pair["lora_b"] if pair else 0  # alpha / rank = 6 / 2
        np.testing.assert_allclose(merged[name], np.asarray(leaf) + added, atol=1e-5, err_msg=name)


def test_merging_rounds_once_in_bfloat16(small, lora):
    half = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), small)
    adapter, name = moved(lora), "layers.1.mlp.down_proj"
    merged = named_parameters(merge(half, adapter))[f"{name}/kernel"]
    kernel = np.asarray(named_parameters(half)[f"{name}/kernel"]).astype(np.float32)
    exact = kernel + 3.0 * adapter[name]["lora_a"] @ adapter[name]["lora_b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged).astype(np.float32), exact, rtol=2**-8)


def test_base_arrays_are_shared_and_never_written(small, batch, lora):
    before = {name: (leaf, np.array(leaf).tobytes()) for name, leaf in named_parameters(small).items()}
    tokens, mask = batch

    @jax.jit
    def step(adapter, base):
        gradient = jax.grad(lambda a: jnp.mean(bind(base, a)(tokens, mask) ** 2))(adapter)
        return jax.tree.map(lambda leaf, g: leaf - 0.1 * g, adapter, gradient), gradient

    adapter = moved(lora)
    bound = bind(small, adapter)
    shared = named_parameters(bound)
    for name, (leaf, _) in before.items():
        assert shared[name] is leaf  # not even a copy
    adapter, gradient = step(adapter, small)
    assert {name.split("/")[1] for name in named_parameters(bound)} > {"lora_a", "lora_b", "lora_scale"}
    after = named_parameters(small)
    assert set(after) == set(before)  # binding left nothing on the base
    for name, (leaf, content) in before.items():
        assert after[name] is leaf and np.array(leaf).tobytes() == content
    assert all((leaves["lora_scale"] == 0).all() for leaves in gradient.values())
    assert all((leaves["lora_a"] != 0).any() and (leaves["lora_b"] != 0).any() for leaves in gradient.values())


def test_stacked_adapters_under_vmap_equal_a_loop(small, batch, forward, lora):
    adapters = [moved(lora, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *adapters)
    together = jax.jit(jax.vmap(lambda a: bind(small, a)(*batch)))(stacked)
    for adapter, logits in zip(adapters, together):
        np.testing.assert_allclose(logits, forward(bind(small, adapter), *batch), atol=1e-5)


def test_a_full_adapter_is_every_weight_in_float32(small):
    half = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), small)
    adapter = init_adapter(half, FULL, jax.random.key(0))
    flat = {f"{path}/{name}": leaf for path, leaves in adapter.items() for name, leaf in leaves.items()}
    assert set(flat) == set(named_parameters(half))
    assert all(leaf.dtype == jnp.float32 for leaf in flat.values())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in named_parameters(bind(half, adapter)).values())
    assert parameter_count(adapter) == sum(leaf.size for leaf in jax.tree.leaves(small))


def test_lora_starts_as_in_peft(small, lora):
    assert set(lora) == set(linear_shapes(small)) and len(lora) == 2 * 7
    for path, (fan_in, fan_out) in linear_shapes(small).items():
        a, b, scale = (lora[path][name] for name in ("lora_a", "lora_b", "lora_scale"))
        assert a.shape == (fan_in, 2) and b.shape == (2, fan_out) and scale.shape == () and scale == 3.0
        assert (b == 0).all() and 0.6 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5
    assert len({leaves["lora_a"].tobytes() for leaves in lora.values()}) == len(lora)
    assert parameter_count(lora) == sum(2 * (i + o) for i, o in linear_shapes(small).values())


@pytest.mark.parametrize(
    "targets, count",
    [(("q_proj", "v_proj"), 4), (("layers.1.mlp.up_proj",), 1), (("all-linear",), 14), (("q_proj", "all-linear"), 14)],
)
def test_target_modules(small, targets, count):
    config = AdapterConfig(rank=2, target_modules=targets)
    adapter = jax.eval_shape(lambda key: init_adapter(small, config, key), jax.random.key(0))
    assert len(adapter) == count
    assert all(t == "all-linear" or any(t in (p, p.split(".")[-1]) for p in adapter) for t in targets)


@pytest.mark.parametrize("target", ["query", "layers.9.mlp.up_proj", "lm_head", "embed_tokens"])
def test_an_unknown_target_is_named(small, target):
    with pytest.raises(UserError, match=rf"target_modules: .*'{target}'.*q_proj"):
        init_adapter(small, AdapterConfig(target_modules=("q_proj", target)), jax.random.key(0))


def test_heads(small, batch, lora):
    tokens, mask = batch
    value = with_head(lora, small, "value", jax.random.key(0))
    assert SCORE not in lora and (value[SCORE]["kernel"] == 0).all() and value[SCORE]["kernel"].shape == (24, 1)
    reward = init_adapter(small, LORA, jax.random.key(3), head="reward")
    np.testing.assert_array_equal(reward["layers.0.mlp.up_proj"]["lora_a"], lora["layers.0.mlp.up_proj"]["lora_a"])
    assert 0.5 < reward[SCORE]["kernel"].std() * 25**0.5 < 1.5
    hidden, scores = jax.jit(lambda model: (h := model.encode(tokens, mask.astype(int)), model.scores(h)))(
        bind(small, reward)
    )
    assert scores.dtype == jnp.float32 and scores.shape == tokens.shape
    np.testing.assert_allclose(scores, (hidden @ reward[SCORE]["kernel"])[..., 0], atol=1e-5)
    assert set(without_head(reward)) == set(lora)
    assert set(named_parameters(merge(small, reward))) == set(named_parameters(small))
    assert small.score is None


def test_a_rank_stabilised_scale_is_that_of_peft(small):
    """alpha / sqrt(rank): PEFT's own layer is asked."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    config = AdapterConfig(rank=8, alpha=6.0, rank_stabilised=True)
    adapter = init_adapter(small, config, jax.random.key(0))
    toy = torch.nn.ModuleDict({"proj": torch.nn.Linear(3, 3)})
    given = peft.LoraConfig(r=8, lora_alpha=6, use_rslora=True, target_modules=["proj"])
    scaling = peft.get_peft_model(toy, given).base_model.model["proj"].scaling["default"]
    assert {float(leaves["lora_scale"]) for leaves in adapter.values()} == {float(np.float32(scaling))}


@pytest.mark.parametrize("head", [False, True])
def test_a_lora_adapter_as_a_whole_one(small, batch, forward, lora, head):
    """The same model, now with every weight to train; and its head goes along."""
    adapter = moved(lora)
    if head:
        adapter = with_head(adapter, small, "reward", jax.random.key(4))
    whole = as_kind(small, adapter, "full")
    paths = {name.split("/")[0] for name in named_parameters(small)}
    assert set(whole) == paths | ({SCORE} if head else set())
    assert not any("lora_a" in leaves for leaves in whole.values())
    np.testing.assert_allclose(forward(bind(small, whole), *batch), forward(bind(small, adapter), *batch), atol=1e-5)
    if head:
        np.testing.assert_array_equal(whole[SCORE]["kernel"], adapter[SCORE]["kernel"])
    assert is_full(whole) and not is_full(adapter)
    jax.tree.map(np.testing.assert_array_equal, as_kind(small, whole, "full"), whole)
    jax.tree.map(np.testing.assert_array_equal, as_kind(small, adapter, "lora"), adapter)
    with pytest.raises(UserError, match="holds full weights"):
        as_kind(small, whole, "lora")


@pytest.mark.parametrize("head", ["value", "reward"])
def test_a_scaled_head_says_gain_times_what_it_said_and_a_bias(small, batch, head):
    adapter = moved(init_adapter(small, AdapterConfig(rank=2), jax.random.key(3), head))
    score = jax.jit(lambda adapter: bind(small, adapter).scores(small.encode(batch[0], jnp.ones_like(batch[0]))))
    before, after = score(adapter), score(scaled_head(adapter, -0.5, 3.0))
    assert float(jnp.std(before)) > 0.05
    np.testing.assert_allclose(after, 3.0 - 0.5 * before, rtol=1e-5, atol=1e-5)
    unscaled, expected = scaled_head(adapter, 1.0, 0.0)[SCORE], {"bias": np.zeros(1)} | adapter[SCORE]
    jax.tree.map(np.testing.assert_array_equal, unscaled, expected)


def test_a_head_without_a_bias_is_one_of_bias_0(small, batch):
    adapter = moved(init_adapter(small, AdapterConfig(rank=2), jax.random.key(3), "reward"))
    assert set(adapter[SCORE]) == {"kernel"}
    hidden = small.encode(batch[0], jnp.ones_like(batch[0]))
    plain, biased = (bind(small, a).scores(hidden) for a in (adapter, scaled_head(adapter, 1.0, 0.0)))
    np.testing.assert_array_equal(plain, biased)


@pytest.mark.parametrize("config", [LORA, FULL], ids=lambda c: c.kind)
def test_a_bare_adapter_has_the_leaves_and_does_nothing(small, batch, forward, config):
    adapter = with_head(moved(init_adapter(small, config, jax.random.key(3))), small, "value", jax.random.key(0))
    nothing = bare(small, adapter)
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (nothing, without_head(adapter))]
    assert shapes[0] == shapes[1]
    np.testing.assert_array_equal(forward(bind(small, nothing), *batch), forward(small, *batch))


def test_a_value_head_alone(small):
    head = value_head(small)
    shapes = {name: leaf.shape for name, leaf in head[SCORE].items()}
    assert set(head) == {SCORE} and shapes == {"kernel": (small.config.hidden_size, 1), "bias": (1,)}
    assert not any(leaf.any() for leaf in head[SCORE].values())
