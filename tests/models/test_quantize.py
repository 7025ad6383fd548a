"""Codes and scales against plain numpy; a quantised base against its float form: logits, gradients, bytes, learning."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, Sampling
from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import load_adapter, save_adapter
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind, init_adapter, linear_shapes, merge
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.models.quantize import (
    BLOCK,
    KINDS,
    NF4,
    dequantize,
    kind_of,
    quantization,
    quantize,
    quantize_decoder,
)
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.ppo import init_ppo

LORA = AdapterConfig(rank=2, alpha=4.0)
# Inputs and outputs: odd, less than a block, a block and one, several blocks, a last block that is shorter.
SHAPES = [(1, 3), (7, 5), (63, 1), (64, 4), (65, 2), (172, 6), (256, 3)]


def random_kernel(shape, seed=0):
    """Heavy-tailed, each output of a size of its own."""
    generator = np.random.default_rng(seed)
    return (generator.standard_t(4, shape) * 10.0 ** generator.uniform(-3, 1, shape[1])).astype(np.float32)


def there_and_back(kernel, kind):
    return np.asarray(dequantize(*map(jnp.asarray, quantize(kernel, kind)), kernel.shape[0]))


def blocks_of(kernel, kind):
    """Slices of rows that share a scale in each output."""
    size = BLOCK if kind == "nf4" else len(kernel)
    return [slice(start, start + size) for start in range(0, len(kernel), size)]


def nearest(weights, scale):
    return scale * NF4[np.abs(NF4 * scale - weights[:, None]).argmin(axis=1)].astype(np.float64)


def reference(weights, kind):
    """One block of one output in float64."""
    largest = np.abs(weights).max()
    if kind == "int8":
        return np.round(weights / largest * 127) / 127 * largest
    candidates = []
    for scale in (largest, -largest):
        first = nearest(weights, scale)
        candidates += [first, nearest(weights, scale * (first @ weights) / (first @ first))]
    return min(candidates, key=lambda made: np.linalg.norm(made - weights))


# ---------------------------------------------------------------- one kernel


def test_the_sixteen_values_are_the_quantiles_that_qlora_defines():
    """Eight steps up and seven down between equal shares of a normal distribution, zero, then scaled to [-1, 1]."""
    normal, outermost = statistics.NormalDist(), (1 - 1 / 32 + 1 - 1 / 30) / 2
    up = [normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    down = [-normal.inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    values = np.array(sorted([*up, 0.0, *down]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-6)
    assert NF4[7] == 0 and NF4[0] == -1 and NF4[-1] == 1 and len(NF4) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_come_back_as_the_reference_says(shape, kind):
    kernel = random_kernel(shape)
    made = there_and_back(kernel, kind)
    assert made.dtype == np.float32 and made.shape == shape
    for rows in blocks_of(kernel, kind):
        for ours, weights in zip(made[rows].T.astype(np.float64), kernel[rows].T.astype(np.float64)):
            expected = reference(weights, kind)
            # Where a weight lies between two values, or two scales do as well, rounding decides.
            error, least = np.linalg.norm(ours - weights), np.linalg.norm(expected - weights)
            np.testing.assert_allclose(error, least, rtol=1e-3, atol=1e-6 * np.abs(weights).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_int8_weight_is_off_by_half_a_step_at_most(shape):
    kernel = random_kernel(shape, seed=1)
    largest = np.abs(kernel).max(axis=0)
    assert (np.abs(there_and_back(kernel, "int8") - kernel) <= largest * 0.5 / 127 * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_nf4_weight_is_the_nearest_that_its_scale_allows(shape):
    kernel = random_kernel(shape, seed=1)
    made, (_, scale) = there_and_back(kernel, "nf4"), quantize(kernel, "nf4")
    for rows, scales in zip(blocks_of(kernel, "nf4"), scale):
        values = scales[:, None] * NF4  # [out, 16]
        gaps = np.abs(kernel[rows][:, :, None] - values)
        error = np.abs(made[rows] - kernel[rows])
        np.testing.assert_allclose(error, gaps.min(axis=2), rtol=1e-3, atol=1e-6 * np.abs(kernel).max())
        largest = np.abs(kernel[rows]).max(axis=0)
        plain = [np.linalg.norm(nearest(*pair) - pair[0]) for pair in zip(kernel[rows].T.astype(np.float64), largest)]
        assert (np.linalg.norm(error, axis=0) <= np.array(plain) * (1 + 1e-5) + 1e-30).all()  # QLoRA's scale


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_quantised_once_stays_as_it_is(kind):
    once = there_and_back(random_kernel((172, 9)), kind)
    np.testing.assert_allclose(there_and_back(once, kind), once, rtol=3e-7)
    codes, again = quantize(random_kernel((172, 9)), kind)[0], quantize(once, kind)[0]
    np.testing.assert_array_equal(again, codes)


def test_multiples_of_the_values_are_kept_exactly():
    generator = np.random.default_rng(2)
    picks = generator.integers(0, 16, (2 * BLOCK, 5))
    picks[[0, BLOCK]] = generator.choice([0, 15], (2, 5))  # each block holds a 1 or a -1
    scales = generator.uniform(0.01, 3, (2, 5)).astype(np.float32)
    scales[:, ::2] *= -1
    kernel = NF4[picks] * np.repeat(scales, BLOCK, axis=0)
    np.testing.assert_array_equal(there_and_back(kernel, "nf4"), kernel)
    whole = generator.integers(-127, 128, (9, 4)).astype(np.float32)
    whole[0] = 127
    np.testing.assert_array_equal(there_and_back(whole, "int8"), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_the_smallest_numbers_make_none_that_are_larger(kind):
    kernel = np.zeros((70, 3), np.float32)
    kernel[:, 1] = np.random.default_rng(0).uniform(-1e-43, 1e-43, 70)  # steps of 1.4e-45
    made = there_and_back(kernel, kind)
    assert (made[:, [0, 2]] == 0).all() and np.abs(made).max() <= 1.3e-43


@pytest.mark.parametrize("kind", KINDS)
def test_two_codes_of_four_bits_share_a_byte(kind):
    codes, scale = quantize(random_kernel((65, 4)), kind)
    assert scale.dtype == np.float32
    if kind == "int8":
        assert codes.dtype == np.int8 and codes.shape == (65, 4) and scale.shape == (1, 4)
    else:
        assert codes.dtype == np.uint8 and codes.shape == (33, 4) and scale.shape == (2, 4)


# ---------------------------------------------------------------- a base


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, small):
    """`small` as each kind: three query heads on one key and value head, 24 and 20 inputs."""
    return quantize_decoder(small, request.param)


@pytest.fixture(scope="module")
def lora(small):
    """A LoRA adapter that changes the base."""
    return moved(init_adapter(small, LORA, jax.random.key(3)))


def moved(adapter, seed=0):
    generator = np.random.default_rng(seed)

    def move(leaf):
        return leaf + jnp.float32(0.1 * generator.standard_normal(leaf.shape)) if leaf.ndim else leaf

    return jax.tree.map(move, adapter)


def test_only_the_linear_layers_of_the_blocks_are_codes(small, quantised):
    kind = quantization(quantised)
    assert kind in KINDS and quantization(small) is None
    parameters, before = named_parameters(quantised), named_parameters(small)
    assert linear_shapes(quantised) == linear_shapes(small)
    for path in linear_shapes(small):
        own = kind_of(small.config, path, kind)
        assert own == kind or path.endswith(("k_proj", "v_proj"))  # shared by three query heads
        assert f"{path}/kernel" not in parameters
        assert parameters.pop(f"{path}/kernel_{own}").dtype == {"int8": jnp.int8, "nf4": jnp.uint8}[own]
        assert parameters.pop(f"{path}/kernel_scale").dtype == jnp.float32
        before.pop(f"{path}/kernel")
    assert set(parameters) == set(before) and all(parameters[name] is before[name] for name in before)
    assert "lm_head/kernel" in parameters


def test_keys_and_values_that_no_heads_share_are_nf4():
    config = DecoderConfig(8, 16, 16, 1, heads=2, kv_heads=2, head_dim=8, max_positions=8)
    assert {kind_of(config, path, "nf4") for path in ("layers.0.attention.k_proj", "layers.0.mlp.up_proj")} == {"nf4"}


def test_a_quantised_base_computes_what_its_plain_form_does(quantised, lora, batch, forward, small):
    plain = merge(quantised, None)
    assert set(named_parameters(plain)) == set(named_parameters(small)) and quantization(plain) is None
    for adapter in (None, lora):
        expected = forward(bind(plain, adapter), *batch)
        np.testing.assert_allclose(forward(bind(quantised, adapter), *batch), expected, atol=2e-5)
        assert np.abs(expected - forward(bind(small, adapter), *batch)).max() > 1e-3
        np.testing.assert_allclose(forward(merge(quantised, adapter), *batch), expected, atol=1e-4)


def test_bfloat16(small, lora, batch, forward):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    quantised, real = quantize_decoder(half, "nf4"), batch[1]
    exact = forward(bind(quantize_decoder(small, "nf4"), lora), *batch)[real]
    merged = merge(quantised, lora)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    for model in (bind(quantised, lora), merged):
        np.testing.assert_allclose(forward(model, *batch)[real], exact, atol=0.15 * np.abs(exact).max())
    gradient = jax.jit(jax.grad(lambda a: bind(quantised, a)(*batch)[real].var()))(lora)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_merging_rounds_once(small, lora):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    quantised, name = quantize_decoder(half, "nf4"), "layers.1.mlp.down_proj"
    codes, scale = quantize(np.asarray(named_parameters(half)[f"{name}/kernel"], np.float32), "nf4")
    kernel = np.asarray(dequantize(jnp.asarray(codes), jnp.asarray(scale), 20))
    pair = {leaf: np.asarray(value) for leaf, value in lora[name].items()}
    exact = kernel + pair["lora_scale"] * pair["lora_a"] @ pair["lora_b"]
    merged = named_parameters(merge(quantised, lora))[f"{name}/kernel"]
    np.testing.assert_allclose(np.asarray(merged, np.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("kind, remat", [("int8", "none"), ("nf4", "full")])
def test_the_gradient_of_an_adapter_is_that_on_the_plain_form(kind, remat, small, lora, batch):
    quantised, (tokens, mask) = quantize_decoder(small, kind), batch

    @jax.jit
    def gradient(adapter, base):
        def loss(a):
            model = bind(base, a)
            logprobs = jax.nn.log_softmax(model.logits(model.encode(tokens, mask.astype(jnp.int32), remat)))
            return -(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0] * mask[:, :-1]).sum()

        return jax.grad(loss)(adapter)

    ours, expected = gradient(lora, quantised), gradient(lora, merge(quantised, None))
    for path, leaves in expected.items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(ours[path][name], leaf, rtol=1e-3, atol=1e-5, err_msg=f"{path}/{name}")
            assert name == "lora_scale" or np.abs(leaf).max() > 1e-3


def test_stacked_adapters_share_one_set_of_codes(small, lora, batch):
    quantised = quantize_decoder(small, "nf4")  # k_proj and v_proj are int8
    adapters = [moved(lora, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    loss = jax.value_and_grad(lambda a: jnp.mean(bind(quantised, a)(*batch) ** 2))
    run, alone = jax.jit(jax.vmap(loss)), jax.jit(loss)
    values, gradients = run(stacked)
    for i, adapter in enumerate(adapters):
        value, gradient = alone(adapter)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        for ours, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient)):
            np.testing.assert_allclose(ours[i], expected, rtol=1e-3, atol=1e-6)
    text = run.lower(stacked).as_text()
    for codes in ("24x8xi8", "12x20xui8"):  # of v_proj and up_proj
        assert f"tensor<{codes}>" in text and f"tensor<3x{codes}>" not in text


def test_other_platforms_get_a_barrier(quantised, batch):
    traced = jax.jit(Decoder.__call__).trace(quantised, *batch)
    assert "optimization_barrier" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("kind, program", [("int8", "rollout"), ("nf4", "rollout"), ("nf4", "gradient")])
def test_no_program_holds_the_whole_base_dequantised(kind, program):
    """Bytes that it takes beside its arguments: a few kernels, not those of all layers."""
    config = DecoderConfig(16, 256, 512, layers=6, heads=4, kv_heads=2, head_dim=64, max_positions=32, stop_tokens=())
    base = Decoder(config, jax.random.key(0))
    kernels = 4 * sum(i * o for i, o in linear_shapes(base).values())
    adapter = init_adapter(base, AdapterConfig(rank=2, target_modules=("q_proj",)), jax.random.key(1))
    quantised = quantize_decoder(base, kind)
    if program == "rollout":
        prompts = Prompts(jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool))
        lowered = jax.jit(rollout).lower(quantised, adapter, prompts, jax.random.key(0), Sampling(max_new_tokens=4))
    else:
        tokens = jnp.ones((2, 8), jnp.int32)
        lowered = jax.jit(jax.grad(lambda a, b: bind(b, a)(tokens).var())).lower(adapter, quantised)
    taken = lowered.compile().memory_analysis().temp_size_in_bytes
    print(f"{kind} {program}: {taken / kernels:.2f} of the base's float32 kernels")
    assert taken < 0.4 * kernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_adapter_is_refused(kind, small, tmp_path):
    quantised = quantize_decoder(small, kind)
    full = init_adapter(small, AdapterConfig(kind="full"), jax.random.key(0))
    with pytest.raises(UserError, match=rf"kind: must be lora, .*quantised \({kind}\).*lora"):
        init_adapter(quantised, AdapterConfig(kind="full"), jax.random.key(0))
    with pytest.raises(UserError, match=r"the adapter holds the full weight layers\.0\.\S+/kernel, but"):
        bind(quantised, full)
    save_adapter(tmp_path / "full", full)
    with pytest.raises(UserError, match=rf"adapter.safetensors: a full adapter .*quantised .{kind}."):
        load_adapter(tmp_path / "full", quantised)


def test_adapters_fit_both_forms(small, quantised, lora, tmp_path):
    fresh = init_adapter(quantised, LORA, jax.random.key(3), head="value")
    expected = init_adapter(small, LORA, jax.random.key(3), head="value")
    assert jax.tree.structure(fresh) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(fresh), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(ours, theirs)
    save_adapter(tmp_path / "lora", lora)
    loaded = load_adapter(tmp_path / "lora", quantised)
    assert set(loaded) == set(lora)


# ---------------------------------------------------------------- in and out


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_what_the_folder_holds(kind, small, lora, batch, forward, tmp_path):
    save_pretrained(tmp_path / "plain", small)
    loaded, _ = load_pretrained(tmp_path / "plain", quantize=kind)
    check_same(loaded, quantize_decoder(small, kind))
    half, _ = load_pretrained(tmp_path / "plain", dtype="bfloat16", quantize=kind)
    for name, leaf in named_parameters(half).items():  # codes come from the stored weights, not from rounded ones
        same = "/kernel_" in name
        expected = named_parameters(loaded)[name]
        np.testing.assert_array_equal(leaf, expected if same else expected.astype(jnp.bfloat16), err_msg=name)
    # An export holds plain weights, with the adapter in them.
    save_pretrained(tmp_path / "merged", loaded, lora)
    again, _ = load_pretrained(tmp_path / "merged")
    assert set(named_parameters(again)) == set(named_parameters(small))
    np.testing.assert_allclose(forward(again, *batch), forward(bind(loaded, lora), *batch), atol=1e-4)


def check_same(one, other):
    one, other = named_parameters(one), named_parameters(other)
    assert list(one) == list(other)
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype, name
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_large_kernels_are_quantised_in_parts_that_fit_together(tmp_path, monkeypatch):
    from jaxrlhf.models import quantize as module

    config = DecoderConfig(8, 72, 136, layers=1, heads=2, kv_heads=1, head_dim=36, max_positions=8)
    base = Decoder(config, jax.random.key(0))
    save_pretrained(tmp_path, base)
    monkeypatch.setattr(module, "_CHUNK", 72 * 5)
    for kind in KINDS:
        check_same(load_pretrained(tmp_path, quantize=kind)[0], quantize_decoder(base, kind))


@pytest.mark.parametrize(
    "family, settings",
    [
        ("gpt2", dict(n_embd=40, n_head=5)),  # kernels stored as ours, q, k and v in one
        ("gpt_neox", dict(hidden_size=40, num_attention_heads=5)),  # q, k and v of each head together
        ("phi3", dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1)),  # gate and up in one
    ],
)
def test_fused_tensors_are_quantised_apart(family, settings, make_model, tmp_path):
    make_model(tmp_path, family, settings)
    base, _ = load_pretrained(tmp_path)
    for kind in KINDS:
        check_same(load_pretrained(tmp_path, quantize=kind)[0], quantize_decoder(base, kind))


ON_A_MESH = """
import sys
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.sharding import parameter_sharding, shard
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
tokens = np.arange(12).reshape(2, 6) % 8
whole, _ = load_pretrained(sys.argv[1], quantize="nf4")
split, _ = load_pretrained(sys.argv[1], quantize="nf4", mesh=mesh)
for name, leaf in named_parameters(split).items():
    assert leaf.sharding == parameter_sharding(mesh, name, leaf.shape), name
    np.testing.assert_array_equal(leaf, named_parameters(whole)[name], err_msg=name)
    if "/kernel_" in name and "scale" not in name:
        assert leaf.addressable_shards[0].data.size == leaf.size // 4, name
assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(shard(mesh, whole))))
run = jax.jit(Decoder.__call__)
np.testing.assert_allclose(run(split, tokens), run(whole, tokens), atol=1e-5)
"""


def test_codes_lie_on_a_mesh_as_kernels_do(processes, tmp_path):
    config = DecoderConfig(8, 128, 256, layers=1, heads=4, kv_heads=2, head_dim=32, max_positions=8)
    save_pretrained(tmp_path, Decoder(config, jax.random.key(0)))
    processes.run("-c", ON_A_MESH, tmp_path, devices=4)


def test_what_cannot_be_quantised_is_named(small, tmp_path):
    save_pretrained(tmp_path, small)
    with pytest.raises(UserError, match="quantize: must be one of int8, nf4 or None, not 'int4'"):
        load_pretrained(tmp_path, quantize="int4")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.where(np.arange(24) == 3, np.inf, tensors[name]).astype(np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model.safetensors: tensor {name} has NaN or infinite values"):
        load_pretrained(tmp_path, quantize="nf4")


# ---------------------------------------------------------------- how near, how small


def distance(forward, quantised, base, tokens):
    """Relative norm of the difference of logits."""
    expected = forward(base, tokens, None)
    return np.linalg.norm(forward(quantised, tokens, None) - expected) / np.linalg.norm(expected)


def bytes_of(model):
    """(of the linear layers of the blocks, of the rest)."""
    sizes = {name: leaf.nbytes for name, leaf in named_parameters(model).items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("layers.") and "/kernel" in name)
    return layers, sum(sizes.values()) - layers


def check_bytes(kind, base, quantised, what):
    (before, rest), (after, same) = bytes_of(base), bytes_of(quantised)
    print(f"{what} {kind}: {after:,} bytes of linear layers, {after / before:.4f} of float32; {rest:,} of the rest")
    assert rest == same and after / before <= {"int8": 0.28, "nf4": 0.16}[kind]


@pytest.fixture(scope="module")
def trained():
    """A small decoder that has learnt a language: after each token one of three follows, at 70, 20 and 10%."""
    V, generator = 64, np.random.default_rng(0)
    followers = np.array([generator.permutation(V)[:3] for _ in range(V)])

    def text(rows):
        tokens = generator.integers(0, V, (rows, 24)).astype(np.int32)
        for t in range(1, 24):
            tokens[:, t] = followers[tokens[:, t - 1], generator.choice(3, rows, p=[0.7, 0.2, 0.1])]
        return tokens

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(model, state, tokens):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, value

    config = DecoderConfig(V, 64, 128, 2, heads=4, kv_heads=2, head_dim=16, max_positions=32, initializer_range=0.1)
    model = Decoder(config, jax.random.key(0))
    state = optimizer.init(model)
    for _ in range(120):
        model, state, value = step(model, state, text(32))
    assert value < 1.1, value  # log(64) is 4.2; the language's own entropy 0.8
    return model, text(16)


@pytest.fixture(scope="module")
def stories(stories260k):
    """A model that was trained on stories, text of its own, and its folder."""
    base, _ = load_pretrained(stories260k)
    begin = Prompts(jnp.ones((8, 1), jnp.int32), jnp.ones((8, 1), bool))
    sampling = Sampling(max_new_tokens=96, stop_tokens=())
    return base, np.asarray(jax.jit(rollout)(base, None, begin, jax.random.key(0), sampling).tokens), stories260k


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near_and_bytes_small_on_a_trained_model(kind, trained, forward):
    base, text = trained
    quantised = quantize_decoder(base, kind)
    far = distance(forward, quantised, base, text)
    print(f"trained {kind}: logits differ by {far:.4f}")
    assert far <= {"int8": 0.02, "nf4": 0.10}[kind]
    check_bytes(kind, base, quantised, "trained")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near_and_bytes_small_on_stories(kind, stories, forward):
    base, text, folder = stories
    quantised, _ = load_pretrained(folder, quantize=kind)
    noise = np.random.default_rng(0).integers(3, 512, (4, 64)).astype(np.int32)
    for name, tokens in (("its own text", text), ("random tokens", noise)):
        far = distance(forward, quantised, base, tokens)
        print(f"stories260K {kind}: logits differ by {far:.4f} on {name}")
        assert far <= {"int8": 0.02, "nf4": 0.10}[kind]
    check_bytes(kind, base, quantised, "stories260K")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_bytes_of_a_larger_model(kind, kv_heads):
    config = DecoderConfig(512, 512, 1376, layers=1, heads=8, kv_heads=kv_heads, head_dim=64, max_positions=8)
    base = Decoder(config, jax.random.key(0))
    check_bytes(kind, base, quantize_decoder(base, kind), f"512 wide, {kv_heads} of 8 heads")


# ---------------------------------------------------------------- learning


def learn(programs, base, make_adapter, wanted, length, iterations, rate):
    """PPO from a fresh adapter; the reward is the share of the token `wanted`, without a KL penalty."""
    B = 32
    prompts = Prompts(jnp.ones((B, 1), jnp.int32), jnp.ones((B, 1), bool))
    config = PPOConfig(
        epochs=2, minibatches=1, value_coef=1.0, optimizer=OptimizerConfig(learning_rate=rate),
        value_optimizer=OptimizerConfig(learning_rate=rate),
    )  # fmt: skip
    policy, value = (
        make_adapter(base, i, head, moved=False, rank=4, targets=("q_proj", "v_proj", "down_proj"))
        for i, head in enumerate((None, "value"))
    )
    state, rewards = init_ppo(policy, value, config), []
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)]
    for step in range(iterations):
        key = jax.random.key(step)
        out = programs.rollout(base, state.policy, prompts, key, Sampling(max_new_tokens=length, stop_tokens=()))
        scores = (np.asarray(out.tokens)[:, 1:] == wanted).mean(axis=1)
        noted = programs.annotate(base, state.policy, state.value, None, out)
        made, _ = programs.experience(out, noted, jnp.asarray(scores, jnp.float32), 0.0, gamma=1.0, lam=0.95)
        state, _ = programs.update(state, base, made, key, config)
        rewards.append(scores.mean())
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base)] == before
    return rewards


@pytest.mark.slow
def test_ppo_learns_on_a_quantised_base(programs, make_decoder, make_adapter):
    base = quantize_decoder(make_decoder(vocabulary=6, stop_tokens=(), scale=0.5, seed=11), "int8")
    rewards = learn(programs, base, make_adapter, 2, 4, 30, 0.03)
    print(f"int8: reward {np.mean(rewards[:3]):.3f} -> {np.mean(rewards[-3:]):.3f}")
    assert np.mean(rewards[:3]) < 0.4 and np.mean(rewards[-3:]) > 0.9


@pytest.mark.slow
def test_ppo_learns_on_quantised_stories(programs, stories, make_adapter):
    """The token is one that the model samples now and then: the third most frequent of its own text."""
    _, text, folder = stories
    tokens, counts = np.unique(text[:, 1:], return_counts=True)
    wanted = tokens[np.argsort(counts)[-3]]
    rewards = learn(programs, load_pretrained(folder, quantize="nf4")[0], make_adapter, wanted, 16, 25, 0.01)
    print(f"stories260K nf4: reward {np.mean(rewards[:3]):.3f} -> {np.mean(rewards[-3:]):.3f}")
    assert np.mean(rewards[:3]) < 0.1 and np.mean(rewards[-3:]) > 0.5
