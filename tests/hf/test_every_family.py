"""Every row of the table against transformers: logits, decoding, and the way out and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.hf.families import FAMILIES
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import for_decoding
from jaxrlhf.models.attention import causal_mask, positions_of
from jaxrlhf.models.cache import CacheIndex
from jaxrlhf.models.decoder import Decoder

T = 20  # tokens in the longest row; windows below are shorter

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WITHOUT_LENGTH = {entry: value for entry, value in LLAMA3.items() if not entry.startswith("original")}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
MULTI_HEAD = dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
GROUPED = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
ONE_KV_TIED = dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)
UNTIED = dict(tie_word_embeddings=False)



def longrope(pairs, length=None):
    """Every pair has a stretch of its own, in short rows and in long ones."""
    stretches = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    trained = {} if length is None else {"original_max_position_embeddings": length, "factor": 4.0}
    return {"rope_type": "longrope", "rope_theta": 100.0} | stretches | trained


CASES = {
    "llama": [
        MULTI_HEAD | dict(rope_parameters=LLAMA3),
        GROUPED | dict(rope_parameters=LINEAR, head_dim=10),
        ONE_KV_TIED | dict(rope_parameters=YARN),
        GROUPED | dict(
            rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=2.0, attention_factor=1.3, truncate=False)
        ),
        GROUPED | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5)),
        GROUPED | dict(max_position_embeddings=64, rope_parameters=WITHOUT_LENGTH),
        GROUPED | dict(max_position_embeddings=T, rope_parameters=DYNAMIC, hidden_act="gelu_fast"),
        GROUPED | dict(rope_parameters=longrope(4, 32)),  # the rows are shorter than the trained length
        GROUPED | dict(rope_parameters=longrope(4, 16)),  # and longer
    ],
    "mistral": [
        MULTI_HEAD | dict(sliding_window=7),
        GROUPED | dict(sliding_window=None, head_dim=14),
        ONE_KV_TIED | dict(sliding_window=1, rope_parameters=LINEAR),
    ],
    "qwen2": [
        MULTI_HEAD | UNTIED,
        GROUPED | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3),
        ONE_KV_TIED | dict(rope_parameters=YARN),
        GROUPED | dict(use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    ],
    "qwen3": [
        MULTI_HEAD | dict(head_dim=12),
        GROUPED | dict(head_dim=6, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        ONE_KV_TIED | dict(head_dim=8, attention_bias=True, rope_parameters=YARN),
    ],
    "gemma2": [
        MULTI_HEAD | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=13, num_hidden_layers=3),
        GROUPED | UNTIED | dict(head_dim=10, sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        ONE_KV_TIED | dict(head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    ],
    "gemma3_text": [
        MULTI_HEAD | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=13, num_hidden_layers=7),
        GROUPED | UNTIED | dict(head_dim=10, sliding_window=3, final_logit_softcapping=3.0, sliding_window_pattern=2),
        GROUPED | dict(head_dim=10, attn_logit_softcapping=5.0),  # which transformers keeps and does not use
        ONE_KV_TIED | dict(
            head_dim=8,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}
            },
        ),
    ],
    "gpt2": [
        dict(n_embd=40, n_head=5),
        dict(n_embd=24, n_head=3, n_inner=50, activation_function="gelu"),
        dict(n_embd=32, n_head=2, n_inner=31, activation_function="relu", tie_word_embeddings=False, n_layer=3),
    ],
    "gpt_neox": [
        dict(hidden_size=40, num_attention_heads=5),  # a quarter of 8 dimensions turns
        dict(hidden_size=48, num_attention_heads=3, use_parallel_residual=False, hidden_act="gelu_new",
             rope_parameters={"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}),
        dict(hidden_size=24, num_attention_heads=2, attention_bias=False, tie_word_embeddings=True,
             rope_parameters=LINEAR | {"partial_rotary_factor": 1.0}),
    ],
    "phi3": [
        MULTI_HEAD | dict(sliding_window=6),
        GROUPED | dict(partial_rotary_factor=0.5),
        ONE_KV_TIED | dict(rope_parameters={"rope_type": "default", "rope_theta": 70.0}),
        GROUPED | dict(
            rope_parameters=longrope(3), original_max_position_embeddings=8, partial_rotary_factor=0.75,
            max_position_embeddings=64,
        ),
        GROUPED | dict(rope_parameters=longrope(4), original_max_position_embeddings=32, max_position_embeddings=64),
    ],
    "olmo2": [
        MULTI_HEAD,
        GROUPED | dict(attention_bias=True, rope_parameters=YARN),
        ONE_KV_TIED | dict(rms_norm_eps=0.01),
    ],
    "smollm3": [
        MULTI_HEAD | UNTIED | dict(no_rope_layer_interval=2),
        GROUPED | dict(no_rope_layers=[1, 0, 1], num_hidden_layers=3, rope_parameters=YARN),
        ONE_KV_TIED | dict(use_sliding_window=True, sliding_window=5, no_rope_layers=[0, 1], attention_bias=True),
    ],
}  # fmt: skip
FLAT = [(family, settings) for family, all_settings in CASES.items() for settings in all_settings]
FLAT_NAMES = [f"{family}-{i}" for family, cases in CASES.items() for i in range(len(cases))]


@pytest.fixture(params=FLAT, ids=FLAT_NAMES)
def case(request):
    """(model_type, settings)"""
    return request.param


def rows():
    """Left-padded rows of 20, 13 and 2 real tokens; and their mask."""
    tokens = np.random.default_rng(3).integers(0, 61, (3, T)).astype(np.int32)
    return tokens, np.arange(T)[None] >= np.array([0, 7, 18])[:, None]


def decoded(model, tokens, mask, prompt):
    """Logits of a prefill of `prompt` tokens followed by one token at a time, through a cache, as a rollout does."""
    model = for_decoding(model)
    first = mask[:, :prompt]
    inputs = tokens[:, :prompt], np.asarray(positions_of(first)), np.asarray(causal_mask(first))
    hidden, fresh = jax.jit(Decoder.hidden, static_argnames="slots")(model, *inputs, slots=T)
    cache, logits = [layer.as_ring(T, T - 2) for layer in fresh], jax.jit(Decoder.logits)
    step, parts = jax.jit(Decoder.decode), [np.asarray(logits(model, hidden))]
    for at in range(prompt, T):
        index = CacheIndex.ring(jnp.int32(at - prompt + T - 2), jnp.asarray(mask[:, : at + 1].sum(1)), T)
        hidden, cache = step(model, tokens[:, at], cache, index)
        parts.append(np.asarray(logits(model, hidden)))
    return np.concatenate(parts, axis=1)


def test_the_table_is_tested():
    assert set(CASES) == set(FAMILIES) and min(map(len, CASES.values())) >= 3


def test_logits_decoding_and_the_way_back(case, make_model, torch_logits, forward, tmp_path):
    theirs = make_model(tmp_path / "theirs", *case)
    ours, _ = load_pretrained(tmp_path / "theirs")
    tokens, mask = rows()
    expected = torch_logits(theirs, tokens, mask)
    assert expected[mask].std() > 0.2, "a model whose logits hardly vary would prove nothing"
    got = forward(ours, tokens, mask)
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4)
    np.testing.assert_allclose(decoded(ours, tokens, mask, prompt=12)[mask], got[mask], atol=1e-4)

    save_pretrained(tmp_path / "ours", ours)
    again, _ = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    check_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(torch_logits(back, tokens, mask)[mask], expected[mask], atol=1e-6)


def check_same_tensors(one, other):
    from safetensors.numpy import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.tobytes() == second[name].tobytes(), name


def older(model_type, document):
    """A config.json as transformers 4 wrote it."""
    rope = document.pop("rope_parameters")
    document["torch_dtype"] = document.pop("dtype")
    document.pop("layer_types", None)
    if model_type == "gemma3_text":
        document["rope_theta"] = rope["full_attention"]["rope_theta"]
        document["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    elif model_type == "gpt_neox":
        document |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.pop("partial_rotary_factor")}
    else:
        document["rope_theta"] = rope["rope_theta"]
    kind = rope.pop("rope_type")
    rope.pop("rope_theta")
    document["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return document


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("llama", CASES["llama"][0]),
        ("llama", CASES["llama"][1]),
        ("llama", CASES["llama"][2]),
        ("mistral", CASES["mistral"][0]),
        ("qwen2", CASES["qwen2"][1]),
        ("gemma2", CASES["gemma2"][0]),
        ("gemma3_text", CASES["gemma3_text"][0]),
        ("gpt_neox", CASES["gpt_neox"][1]),
        ("olmo2", CASES["olmo2"][1]),
    ],
)
def test_an_older_config_means_the_same(model_type, settings, make_model, torch_logits, forward, tmp_path):
    theirs = make_model(tmp_path, model_type, settings)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(older(model_type, json.loads(file.read_text()))))
    tokens, mask = rows()
    ours, _ = load_pretrained(tmp_path)
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], torch_logits(theirs, tokens, mask)[mask], atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_a_checkpoint_of_the_bare_model_loads(model_type, make_model, forward, tmp_path):
    """Such as GPT-2's own, whose tensors have no prefix."""
    from safetensors.numpy import load_file, save_file

    make_model(tmp_path / "whole", model_type, CASES[model_type][2])
    whole, _ = load_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    prefix = FAMILIES[model_type].prefix
    bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
    masks = {"gpt2": "h.{}.attn.bias", "gpt_neox": "layers.{}.attention.bias"}
    if model_type in masks:  # old files carry the causal mask, in one dtype or another
        for layer, dtype in enumerate((np.uint8, bool)):
            bare[masks[model_type].format(layer)] = np.ones((1, 1, 8, 8), dtype)
    save_file(bare, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    again, _ = load_pretrained(tmp_path / "whole")
    tokens, mask = rows()
    np.testing.assert_array_equal(forward(again, tokens, mask), forward(whole, tokens, mask))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_absent_entries_take_transformers_defaults(model_type):
    transformers = pytest.importorskip("transformers")
    from jaxrlhf.hf.families import config_document, read_config

    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    ours = read_config({"model_type": model_type}, "config.json")
    written = config_document(ours, "float32")
    absent = {"head_dim", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "architectures", "rope_theta"}
    absent |= {"rotary_pct", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor", "n_inner"}
    for entry in set(written) - absent:
        assert entry in theirs, entry
        want = theirs[entry]
        if entry == "sliding_window" and not theirs.get("use_sliding_window", True):
            want = None
        if entry == "use_bidirectional_attention":
            want = bool(want)
        assert written[entry] == want, entry
    assert ours.head_dim == theirs.get("head_dim") or ours.head_dim == ours.hidden_size // ours.heads
    rope = theirs.get("rope_parameters")
    assert rope is None or written["rope_parameters"] == rope


ON_A_MESH = """
import sys
from pathlib import Path
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.sharding import parameter_sharding
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, _ = load_pretrained(folder / "theirs", mesh=mesh)
    split = 0
    for name, leaf in named_parameters(model).items():
        assert leaf.sharding == parameter_sharding(mesh, name, leaf.shape), name
        split += leaf.addressable_shards[0].data.size < leaf.size
    assert split > 10, split
    given = np.load(folder / "expected.npz")
    logits = np.asarray(jax.jit(Decoder.__call__)(model, given["tokens"], given["mask"]))
    np.testing.assert_allclose(logits[given["mask"]], given["logits"][given["mask"]], atol=2e-5)
    save_pretrained(folder / "ours", model)
"""


def test_every_layout_loads_onto_a_mesh_and_comes_back(make_model, forward, processes, tmp_path):
    tokens, mask = rows()
    families = ["gpt2", "gpt_neox", "phi3", "olmo2", "gemma2"]
    for family in families:
        make_model(tmp_path / family / "theirs", family, CASES[family][0], vocab_size=62)
        logits = forward(load_pretrained(tmp_path / family / "theirs")[0], tokens, mask)
        np.savez(tmp_path / family / "expected.npz", tokens=tokens, mask=mask, logits=logits)
    processes.run("-c", ON_A_MESH, tmp_path, devices=4)
    for family in families:
        check_same_tensors(tmp_path / family / "theirs", tmp_path / family / "ours")


@pytest.mark.parametrize(
    "model_type, tensor, wanted",
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "[40, 120]"),
        ("gpt2", "transformer.wpe.weight", "[64, 40]"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias", "[120]"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "[88, 40]"),
        ("gemma3_text", "model.layers.0.self_attn.q_norm.weight", "[8]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(model_type, tensor, wanted, make_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    make_model(tmp_path, model_type, CASES[model_type][0])
    whole = load_file(tmp_path / "model.safetensors")
    for spoilt, words in (
        (whole | {tensor: whole[tensor][1:]}, ("model.safetensors", "must have shape", wanted)),
        ({name: value for name, value in whole.items() if name != tensor}, ("is missing", "config.json")),
    ):
        save_file(spoilt, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_pretrained(tmp_path)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in (tensor, *words))


@pytest.mark.parametrize(
    "model_type, entries, words",
    [
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern", "at least 1"]),
        ("gemma3_text", {"rope_parameters": {"full_attention": "x"}}, ["rope_parameters", "full_attention"]),
        ("gemma3_text", {"layer_types": [[1]] * 26}, ["layer_types", "sliding_attention"]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, ["max_window_layers", "'x'"]),
        ("qwen2", {"use_sliding_window": "no"}, ["use_sliding_window", "true or false"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window", "at least 1"]),
        ("smollm3", {"no_rope_layer_interval": 0}, ["no_rope_layer_interval", "at least 1"]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "each layer"]),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, ["rope_scaling", "['linear']"]),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}, ["rope_theta", "above 1"]),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, ["rope_scaling", "'longrope'"]),
    ],
)
def test_entries_that_cannot_be_are_named_in_one_line(model_type, entries, words):
    from jaxrlhf.hf.families import read_config

    with pytest.raises(UserError) as caught:
        read_config({"model_type": model_type} | entries, "mine/config.json")
    message = str(caught.value)
    assert message.startswith("mine/config.json: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "model_type, entry", [("gemma3_text", "sliding_window_pattern"), ("smollm3", "no_rope_layer_interval")]
)
def test_null_is_absent(model_type, entry):
    from jaxrlhf.hf.families import read_config

    document = {"model_type": model_type}
    assert read_config(document | {entry: None}, "config.json") == read_config(document, "config.json")
