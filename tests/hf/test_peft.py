"""Adapters to and from PEFT, which is the reference; and merged folders, for each layout of tensors."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config import AdapterConfig
from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import load_adapter
from jaxrlhf.hf.peft import PEFT_INFO, PEFT_TENSORS, load_peft, save_peft
from jaxrlhf.hf.tensor_files import read_checkpoint
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import SCORE, bind, init_adapter, linear_shapes, merge, with_head, without_head
from jaxrlhf.models.decoder import named_parameters

GROUPED = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
SETTINGS = {
    "llama": GROUPED,
    "gpt2": dict(n_embd=24, n_head=3, n_inner=31),  # conv-style, one tensor for q, k and v side by side
    "gpt_neox": dict(hidden_size=24, num_attention_heads=3),  # q, k and v head by head
    "phi3": GROUPED,  # gate and up in one, too
    "qwen2": GROUPED,
}
FUSED = ("gpt2", "gpt_neox", "phi3")


class Model:
    """A random model on disk, ours and theirs."""

    def __init__(self, folder, family, make_model):
        make_model(folder, family, SETTINGS[family])
        self.folder, self.family = folder, family
        self.ours, _ = load_pretrained(folder)

    def theirs(self):
        """A fresh copy, because PEFT changes the model it is given."""
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager")


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory):
    """`models(family)`, each made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = Model(tmp_path_factory.mktemp(family), family, make_model)
        return made[family]

    return get


@pytest.fixture(params=SETTINGS)
def model(request, models):
    return models(request.param)


@pytest.fixture(scope="session")
def text():
    """Left-padded tokens and their mask."""
    mask = np.arange(9)[None] >= np.array([0, 3, 7])[:, None]
    return np.random.default_rng(1).integers(3, 61, (3, 9)).astype(np.int32), mask


def ours_with(model, adapter, text, forward):
    return forward(merge(model.ours, adapter), *text)[text[1]]


def random_adapter(base, ranks, targets=("all-linear",), seed=0, scales=None):
    """Pairs with nothing zero: `ranks` and `scales` are taken in turn, module by module."""
    generator = np.random.default_rng(seed)
    adapter = init_adapter(base, AdapterConfig(rank=1, target_modules=targets), jax.random.key(seed))
    scales = scales or [1.3]
    for i, (path, (fan_in, fan_out)) in enumerate((p, s) for p, s in linear_shapes(base).items() if p in adapter):
        rank = ranks[i % len(ranks)]
        adapter[path] = {
            "lora_a": jnp.asarray(0.3 * generator.standard_normal((fan_in, rank)), jnp.float32),
            "lora_b": jnp.asarray(0.3 * generator.standard_normal((rank, fan_out)), jnp.float32),
            "lora_scale": jnp.float32(scales[i % len(scales)]),
        }
    return adapter


def same(one, other):
    """Whether two adapters have the same leaves, bit by bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
    )


# ---------------------------------------------------------------- from PEFT

MADE = [
    ("llama", dict(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5)),
    ("llama", dict(target_modules="all-linear", r=4, lora_alpha=3, use_rslora=True)),
    ("llama", dict(target_modules=r".*\.1\.self_attn\.[vo]_proj", r=2, init_lora_weights="gaussian")),
    ("llama", dict(target_modules=["up_proj"], r=2, exclude_modules=["model.layers.0.mlp.up_proj"])),
    ("gpt2", dict(target_modules=["c_attn"], r=4, lora_alpha=7)),
    ("gpt2", dict(
        target_modules=["c_attn", "c_proj", "c_fc"], r=4, use_rslora=True, rank_pattern={"attn.c_proj": 2, "c_fc": 3},
        alpha_pattern={"h.1.attn.c_attn": 11},
    )),
    ("gpt_neox", dict(target_modules=["query_key_value"], r=4, lora_alpha=16)),
    ("gpt_neox", dict(target_modules="all-linear", r=2, layers_to_transform=None, rank_pattern={"dense": 5})),
    ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"], r=3, alpha_pattern={r"layers\.0\.mlp.*": 2})),
    ("phi3", dict(target_modules=["qkv_proj", "o_proj"], r=3, layers_to_transform=[1])),
    ("qwen2", dict(target_modules=["k_proj", "gate_proj", "v_proj"], r=2, rank_pattern={"v_proj": 6})),
    ("qwen2", dict(target_modules="all-linear", r=2, lora_alpha=1, alpha_pattern={r"^model.layers.0.*": 9})),
]  # fmt: skip


def peft_model(model, task_type="CAUSAL_LM", **settings):
    """transformers' model under a PEFT adapter whose weights are random."""
    peft, torch = pytest.importorskip("peft", reason="PEFT is the reference"), pytest.importorskip("torch")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("family, settings", MADE)
def test_an_adapter_made_by_peft_computes_the_same_here(
    models, text, forward, torch_logits, tmp_path, family, settings
):
    model = models(family)
    wrapped = peft_model(model.theirs(), **settings)
    wrapped.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, model.ours)
    expected = torch_logits(wrapped, *text)[text[1]]
    np.testing.assert_allclose(ours_with(model, adapter, text, forward), expected, atol=1e-4)
    assert np.abs(expected - ours_with(model, None, text, forward)).max() > 0.1


def test_pairs_are_attached_as_they_were_merged(models, text, forward, tmp_path):
    model = models("phi3")
    peft_model(model.theirs(), target_modules=["qkv_proj"]).save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, model.ours)
    bound = forward(bind(model.ours, adapter), *text)[text[1]]
    np.testing.assert_allclose(bound, ours_with(model, adapter, text, forward), atol=1e-4)


def test_half_precision_and_names_with_the_adapters_name(models, tmp_path):
    model = models("gpt2")
    wrapped = peft_model(model.theirs(), target_modules=["c_attn"])
    wrapped.save_pretrained(tmp_path)
    plain = load_peft(tmp_path, model.ours)
    tensors = load_file(tmp_path / PEFT_TENSORS)
    save_file({n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, tmp_path / PEFT_TENSORS)
    assert same(load_peft(tmp_path, model.ours), plain)
    save_file({n: t.astype(jnp.bfloat16) for n, t in tensors.items()}, tmp_path / PEFT_TENSORS)
    half = load_peft(tmp_path, model.ours)
    for ours, theirs in zip(jax.tree.leaves(half), jax.tree.leaves(plain)):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_fresh_adapter_can_still_learn(models, tmp_path):
    """B is zero: that no rank is at work yet takes none away."""
    peft = pytest.importorskip("peft")
    model = models("gpt_neox")
    settings = peft.LoraConfig(target_modules=["query_key_value"], r=4)
    peft.get_peft_model(model.theirs(), settings).save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, model.ours)
    assert {path.split(".")[-1] for path in adapter} == {"q_proj", "k_proj", "v_proj"}
    assert all(leaves["lora_a"].shape == (24, 4) and not leaves["lora_b"].any() for leaves in adapter.values())


def test_a_reward_adapter_brings_its_head(models, text, forward, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = models("llama")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model.folder, num_labels=1)
    wrapped = peft_model(theirs, "SEQ_CLS", target_modules=["q_proj", "v_proj"])
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / PEFT_INFO).read_text())["modules_to_save"] == ["classifier", "score"]
    bound = bind(model.ours, load_peft(tmp_path, model.ours))
    tokens = text[0][:1]
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(tokens).long()).logits.numpy()[:, 0]
    scores = bound.scores(bound.encode(tokens, jnp.ones(tokens.shape, jnp.int32)))[:, -1]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


# ---------------------------------------------------------------- to PEFT

KINDS = {
    "all, one rank": dict(ranks=[3]),
    "ranks and scales differ": dict(ranks=[1, 3, 2, 5, 2], scales=[0.5, 1.3, 2 / 3]),
    "queries, values and down": dict(ranks=[2], targets=("q_proj", "v_proj", "down_proj")),
    "one layer's": dict(ranks=[2], targets=("layers.1.mlp.up_proj", "layers.0.attention.k_proj")),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_peft_opens_our_adapter(model, text, forward, torch_logits, tmp_path, kind):
    peft = pytest.importorskip("peft")
    adapter = random_adapter(model.ours, **kind)
    save_peft(tmp_path, model.ours, with_head(adapter, model.ours, "reward", jax.random.key(0)), str(model.folder))
    wrapped = peft.PeftModel.from_pretrained(model.theirs(), tmp_path)
    computed = torch_logits(wrapped, *text)[text[1]]
    np.testing.assert_allclose(computed, ours_with(model, adapter, text, forward), atol=1e-4)
    assert np.abs(computed - ours_with(model, None, text, forward)).max() > 0.1
    document = json.loads((tmp_path / PEFT_INFO).read_text())
    assert document["base_model_name_or_path"] == str(model.folder)
    assert document["fan_in_fan_out"] == (model.family == "gpt2")
    # PEFT has a pair on every module that it put one on, and on no other.
    names = {name.removesuffix(".default.weight") for name in wrapped.state_dict() if ".lora_" in name}
    assert names == {name.removesuffix(".weight") for name in load_file(tmp_path / PEFT_TENSORS)}
    again = load_peft(tmp_path, model.ours)
    if model.family not in FUSED or "scales" not in kind:
        assert same(again, adapter)
    else:  # a fused pair has one scale
        np.testing.assert_allclose(
            ours_with(model, again, text, forward), ours_with(model, adapter, text, forward), atol=1e-5
        )


def test_equal_modules_need_no_patterns(models, tmp_path):
    save_peft(tmp_path, models("llama").ours, random_adapter(models("llama").ours, [12], scales=[32 / 12]))
    document = json.loads((tmp_path / PEFT_INFO).read_text())
    assert (document["r"], document["lora_alpha"]) == (12, 32)
    assert document["rank_pattern"] == document["alpha_pattern"] == {}
    assert set(document["target_modules"]) == {path.split(".")[-1] for path in linear_shapes(models("llama").ours)}


def test_r_is_the_largest_rank_and_patterns_are_short(models, tmp_path):
    save_peft(tmp_path, models("gpt2").ours, random_adapter(models("gpt2").ours, [4], scales=[0.5]))
    document = json.loads((tmp_path / PEFT_INFO).read_text())
    assert (document["r"], document["lora_alpha"]) == (12, 6)  # q, k and v in one
    assert document["rank_pattern"] == {"c_proj": 4, "c_fc": 4}
    assert document["alpha_pattern"] == {"c_proj": 2, "c_fc": 2}
    assert document["target_modules"] == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.parametrize("scale", [0.1, 2 / 3, 1.0, 32 / 12, 1e-3, 7.77, 0.0])
@pytest.mark.parametrize("rank", [1, 3, 7, 64])
def test_the_scale_survives_bit_by_bit(models, tmp_path, scale, rank):
    adapter = random_adapter(models("llama").ours, [rank], targets=("v_proj",), scales=[scale])
    save_peft(tmp_path, models("llama").ours, adapter)
    assert same(load_peft(tmp_path, models("llama").ours), adapter)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_of_choice(models, tmp_path, dtype):
    base = models("phi3").ours
    adapter = random_adapter(base, [2])
    save_peft(tmp_path, base, adapter, dtype=dtype)
    assert {tensor.dtype.name for tensor in load_file(tmp_path / PEFT_TENSORS).values()} == {dtype}
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), adapter)
    for path, leaves in load_peft(tmp_path, base).items():
        for name in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(leaves[name], rounded[path][name])
        assert leaves["lora_scale"] == adapter[path]["lora_scale"]


# ---------------------------------------------------------------- merged


def stored(folder):
    tensors = read_checkpoint(folder)
    return {name: (tensor.dtype, tensor.shape, tensor.view().tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_bit_identical_in_the_stored_dtype(model, tmp_path, dtype):
    model.theirs().to(getattr(pytest.importorskip("torch"), dtype)).save_pretrained(tmp_path / "theirs")
    base, _ = load_pretrained(tmp_path / "theirs", dtype=dtype)
    save_pretrained(tmp_path / "ours", base, max_shard_bytes=4000)
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


def test_transformers_opens_a_merged_folder(model, text, forward, torch_logits, tmp_path):
    import transformers

    adapter = random_adapter(model.ours, [2])
    save_pretrained(tmp_path, model.ours, adapter)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    computed = torch_logits(opened, *text)[text[1]]
    np.testing.assert_allclose(computed, forward(bind(model.ours, adapter), *text)[text[1]], atol=1e-4)
    assert np.abs(computed - ours_with(model, None, text, forward)).max() > 0.1


@pytest.mark.parametrize("memory", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_weights_are_rounded_once(models, tmp_path, memory, dtype):
    base, _ = load_pretrained(models("gpt_neox").folder, dtype=memory)
    adapter = random_adapter(base, [2])
    save_pretrained(tmp_path, base, adapter, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    exact = merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), adapter)
    reloaded, _ = load_pretrained(tmp_path, dtype=dtype)
    for name, leaf in named_parameters(reloaded).items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, named_parameters(exact)[name].astype(dtype), err_msg=name)


# ---------------------------------------------------------------- what cannot be used


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def entry(**changed):
    def apply(folder):
        document = json.loads((folder / PEFT_INFO).read_text()) | changed
        (folder / PEFT_INFO).write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return apply


def tensors(change):
    def apply(folder):
        held = load_file(folder / PEFT_TENSORS)
        change(held)
        save_file(held, folder / PEFT_TENSORS)

    return apply


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
SPOILT = {
    "not LoRA": (entry(peft_type="IA3"), [PEFT_INFO, "peft_type", "'IA3'"]),
    "dora": (entry(use_dora=True), [PEFT_TENSORS, "lora_magnitude_vector", "use_dora"]),
    "biases": (entry(bias="lora_only"), [PEFT_INFO, "bias", "'lora_only'"]),
    "whole modules": (entry(modules_to_save=["embed_tokens"]), [PEFT_TENSORS, "embed_tokens", "modules_to_save"]),
    "another start": (entry(init_lora_weights="pissa_niter_4"), [PEFT_INFO, "init_lora_weights", "pissa"]),
    "new tokens": (entry(trainable_token_indices=[3]), [PEFT_INFO, "trainable_token_indices"]),
    "no rank": (entry(r="gone"), [PEFT_INFO, "r must", "None"]),
    "rank 0": (entry(r=0), [PEFT_INFO, "r must be at least 1"]),
    "alpha is text": (entry(lora_alpha="16"), [PEFT_INFO, "lora_alpha", "'16'"]),
    "patterns are a list": (entry(rank_pattern=[3]), [PEFT_INFO, "rank_pattern", "object"]),
    "a pattern's rank is text": (entry(rank_pattern={"q_proj": "3"}), [PEFT_INFO, "rank_pattern: q_proj", "'3'"]),
    "no expression": (entry(alpha_pattern={"(q": 3}), [PEFT_INFO, "alpha_pattern", "(q"]),
    "targets are a number": (entry(target_modules=3), [PEFT_INFO, "target_modules"]),
    "another rank": (entry(rank_pattern={"q_proj": 3}), [PEFT_TENSORS, "q_proj.lora_A", "[2, 24]", "[3, 24]"]),
    "a module without": (entry(target_modules=["q_proj", "k_proj"]), [PEFT_TENSORS, "k_proj.lora_A", "missing"]),
    "A alone": (tensors(lambda t: t.pop(B)), [PEFT_TENSORS, B, "missing"]),
    "a layer without": (tensors(lambda t: (t.pop(A), t.pop(B))), [PEFT_TENSORS, A, "missing", "target_modules"]),
    "A of another width": (tensors(lambda t: t.update({A: t[A][:, :20]})), [PEFT_TENSORS, A, "[2, 20]", "[2, 24]"]),
    "B of another width": (tensors(lambda t: t.update({B: t[B][:20]})), [PEFT_TENSORS, B, "[20, 2]", "[24, 2]"]),
    "an embedding": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]})),
        [PEFT_TENSORS, "half a LoRA pair on the embedding"],
    ),
    "the head": (
        tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A]})),
        [PEFT_TENSORS, "lm_head.lora_B", "missing"],
    ),
    "magnitudes without DoRA": (
        tensors(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[A][0]})),
        [PEFT_TENSORS, "lora_magnitude_vector", "use_dora"],
    ),
    "tokens added": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.ones((62, 24), np.float32)})),
        [PEFT_TENSORS, "embed_tokens.weight", "[62, 24]", "[61, 24]", "merge_and_unload"],
    ),
    "a saved module of another shape": (
        tensors(lambda t: t.update({"base_model.model.model.norm.weight": np.ones(23, np.float32)})),
        [PEFT_TENSORS, "norm.weight", "[23]", "[24]"],
    ),
    "a saved module of another model": (
        tensors(lambda t: t.update({"base_model.model.model.ln_f.weight": np.ones(24, np.float32)})),
        [PEFT_TENSORS, "model.ln_f.weight", "does not belong"],
    ),
    "another depth": (
        tensors(lambda t: t.update({A.replace("layers.1", "layers.7"): t[A]})), [PEFT_TENSORS, "layers.7", "not belong"]
    ),
    "two adapters": (
        tensors(lambda t: t.update({A.replace("weight", "other.weight"): t[A]})), [PEFT_TENSORS, "several", "other"]
    ),
    "no pairs": (tensors(lambda t: t.clear()), [PEFT_TENSORS, "no LoRA pair"]),
    "an absent head": (entry(modules_to_save=["score"]), [PEFT_TENSORS, "score.weight", "missing"]),
    "truncated": (lambda f: os.truncate(f / PEFT_TENSORS, 1500), [PEFT_TENSORS, "truncated"]),
    "no tensors": (lambda f: (f / PEFT_TENSORS).unlink(), [f"no {PEFT_TENSORS}"]),
    "a pickle": (lambda f: (f / PEFT_TENSORS).rename(f / "adapter_model.bin"), ["adapter_model.bin", "pickle"]),
    "no JSON": (lambda f: (f / PEFT_INFO).write_text("{"), [PEFT_INFO, "JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoiled_folder_is_named_in_one_line(models, tmp_path, spoil, words):
    base = models("llama").ours
    save_peft(tmp_path / "adapter", base, random_adapter(base, [2], targets=("q_proj", "down_proj")))
    load_adapter(tmp_path / "adapter", base)
    spoil(tmp_path / "adapter")
    refused(lambda: load_adapter(tmp_path / "adapter", base), str(tmp_path / "adapter"), *words)


def test_an_adapter_that_peft_cannot_hold(models, tmp_path):
    base = models("llama").ours
    full = init_adapter(base, AdapterConfig(kind="full"), jax.random.key(0))
    refused(lambda: save_peft(tmp_path / "x", base, full), "full weights", "merged")
    adapter = random_adapter(base, [2])
    deep = {"layers.9.mlp.up_proj": adapter["layers.0.mlp.up_proj"]}
    refused(lambda: save_peft(tmp_path / "x", base, deep), "layers.9.mlp.up_proj", "another model")
    headed = {SCORE: with_head({}, base, "value", jax.random.key(0))[SCORE]}
    assert without_head(headed) == {}
    refused(lambda: save_peft(tmp_path / "x", base, headed), "no LoRA pair")
    refused(lambda: save_peft(tmp_path / "x", base, adapter, dtype="int8"), "dtype", "'int8'")
    wide = jax.tree.map(lambda leaf: leaf * 1e6, adapter)
    refused(lambda: save_peft(tmp_path / "x", base, wide, dtype="float16"), "lora_A.weight", "float16")
    refused(lambda: save_pretrained(tmp_path / "x", base, wide, dtype="float16"), "proj.weight", "float16")
    assert not (tmp_path / "x").exists()


def test_only_another_peft_folder_is_replaced(models, tmp_path):
    base = models("llama").ours
    save_peft(tmp_path / "x", base, random_adapter(base, [2]))
    save_peft(tmp_path / "x", base, random_adapter(base, [5]))
    assert json.loads((tmp_path / "x" / PEFT_INFO).read_text())["r"] == 5
    (tmp_path / "x" / "README.md").write_text("notes")
    refused(lambda: save_peft(tmp_path / "x", base, random_adapter(base, [2])), "README.md", "empty folder")
