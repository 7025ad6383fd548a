import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.hf.families import (
    FAMILIES,
    address_of,
    config_document,
    is_ignored,
    read_config,
    token_entry,
    token_ids,
)
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.decoder import abstract_decoder, named_parameters
from jaxrlhf.models.rope import Rope

MINIMAL = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
FULL = DecoderConfig(
    vocab_size=61, hidden_size=48, intermediate_size=44, layers=2, heads=6, kv_heads=2, head_dim=16, max_positions=99,
    norm_eps=1e-5, tie_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True, initializer_range=0.3,
    bos_token=3, stop_tokens=(4, 5), pad_token=6, layer_kinds=(LayerKind(rope=Rope(5e5)),),
)  # fmt: skip


def test_absent_fields_take_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    ours, theirs = read_config({"model_type": "llama"}, "config.json"), transformers.LlamaConfig()
    for field in FAMILIES["llama"].fields:
        value = getattr(ours, field.ours)
        assert (token_entry(value) if field.kind == "tokens" else value) == getattr(theirs, field.theirs), field
    assert ours.layer_kinds[0].rope.theta == theirs.rope_parameters["rope_theta"]
    assert (ours.kv_heads, ours.head_dim) == (32, 128)


def test_null_is_a_default_for_sizes_and_none_for_tokens():
    document = MINIMAL | {"num_key_value_heads": None, "head_dim": None, "bos_token_id": None, "eos_token_id": None}
    config = read_config(document, "config.json")
    assert (config.kv_heads, config.head_dim, config.bos_token, config.stop_tokens) == (4, 8, None, ())


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({}, 10000.0),
        ({"rope_theta": 500000}, 500000.0),
        ({"rope_theta": 500.0, "rope_scaling": None}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}}, 500.0),
        ({"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}, 300.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 200.0}, 200.0),
        ({"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}, "rope_theta": 200.0}, 300.0),
        ({"rope_parameters": None}, 10000.0),
    ],
)
def test_rope_theta_in_both_styles(rope, theta):
    assert read_config(MINIMAL | rope, "config.json").layer_kinds == (LayerKind(rope=Rope(theta)),)
    transformers = pytest.importorskip("transformers")
    settings = {k: (dict(v) if isinstance(v, dict) else v) for k, v in rope.items()}  # transformers writes into them
    assert transformers.LlamaConfig(**settings).rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "llama"]),
        ({"model_type": None}, ["model_type", "llama"]),
        ({"model_type": ["llama"]}, ["model_type", "llama"]),
        ({"hidden_act": "xielu"}, ["hidden_act", "silu", "'xielu'"]),
        ({"hidden_size": "32"}, ["hidden_size", "whole number", "'32'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "from 1 to"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"eos_token_id": ["</s>"]}, ["eos_token_id"]),
        ({"pad_token_id": [1]}, ["pad_token_id"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        ({"head_dim": 7}, ["head_dim (7)", "pairs"]),
        ({"hidden_size": 33}, ["head_dim", "hidden_size"]),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, ["rope_scaling", "'ntk'", "dynamic, linear, llama3"]),
        ({"rope_scaling": LONGROPE | {"long_factor": 2.0}}, ["rope_scaling", "long_factor", "list"]),
        ({"rope_scaling": LONGROPE | {"long_factor": [2.0]}}, ["short_factor and long_factor", "1 and 4"]),
        ({"rope_scaling": LONGROPE | {"short_factor": [1], "long_factor": [2]}}, ["rope_scaling", "must have 4", "1"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 4}}, ["rope_scaling", "long_factor"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, ["rope_parameters", "low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "full_attention"]),
        ({"rope_parameters": "default"}, ["rope_parameters", "'default'"]),
        ({"rope_theta": 0}, ["rope_theta", "above 0"]),
        ({"rope_theta": "10000"}, ["rope_theta", "a number"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(change, words):
    with pytest.raises(UserError) as caught:
        read_config(MINIMAL | change, "models/mine/config.json")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("models/mine/config.json: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "scaling, kind",
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True}, "yarn"),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 1.0}, "yarn"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 1000}, "dynamic"),
        ({"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "longrope"),
        ({"rope_type": "default", "mrope_section": [2, 1, 1], "type": "default"}, "default"),
    ],
)
def test_entries_of_a_rope_that_say_nothing_are_left_out(scaling, kind, capsys):
    config = read_config(MINIMAL | {"rope_scaling": scaling}, f"{kind}-{len(scaling)}/config.json")
    rope = config.layer_kinds[0].rope
    assert rope.kind == kind
    said = capsys.readouterr().err
    unread = {"attn_factor", "alpha"} & set(scaling)
    assert all(name in said for name in unread) and bool(said) == bool(unread) and said.count("\n") <= 1


def test_the_trained_length_beside_the_rope_wins():
    """As in transformers: Phi-3 keeps it there, with a default of 4096."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    document = MINIMAL | {"rope_scaling": yarn, "original_max_position_embeddings": 32}
    for given, length in ((document, 32), (MINIMAL | {"rope_scaling": yarn}, 16)):
        rope = read_config(given, "config.json").layer_kinds[0].rope
        assert dict(rope.numbers)["original_max_position_embeddings"] == length
    phi = MINIMAL | {"model_type": "phi3", "rope_scaling": LONGROPE, "max_position_embeddings": 8192}
    numbers = dict(read_config(phi, "config.json").layer_kinds[0].rope.numbers)
    assert (numbers["original_max_position_embeddings"], numbers["factor"]) == (4096, 2.0)


def test_written_and_read_again_is_the_same():
    assert read_config(config_document(FULL, "bfloat16"), "config.json") == FULL
    one = DecoderConfig(**{**FULL.__dict__, "stop_tokens": (4,), "pad_token": None, "bos_token": None})
    assert read_config(config_document(one, "float32"), "config.json") == one


def test_transformers_understands_what_is_written():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config_document(FULL, "bfloat16"))
    assert theirs.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert str(theirs.dtype) == "torch.bfloat16"
    assert theirs.architectures == ["LlamaForCausalLM"]
    for field in FAMILIES["llama"].fields:
        value = getattr(FULL, field.ours)
        assert getattr(theirs, field.theirs) == (token_entry(value) if field.kind == "tokens" else value)


def test_every_parameter_has_a_tensor_of_its_own():
    untied = DecoderConfig(**{**FULL.__dict__, "tie_embeddings": False})
    ours = named_parameters(abstract_decoder(untied))
    theirs = {address_of(untied, name).tensor for name in ours}
    assert len(theirs) == len(ours) == 3 + 2 * (2 + 4 * 2 + 3 * 2)
    with pytest.raises(KeyError, match="rotary"):
        address_of(untied, "layers.0.rotary/kernel")


def test_only_copies_and_constants_are_ignored():
    untied = DecoderConfig(**{**FULL.__dict__, "tie_embeddings": False})
    assert is_ignored(FULL, "lm_head.weight") and not is_ignored(untied, "lm_head.weight")
    assert is_ignored(untied, "model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_ignored(untied, "model.layers.3.self_attn.q_norm.weight")


@pytest.mark.parametrize("entry, tokens", [(None, ()), (7, (7,)), (-1, ()), ([1, 2, 1], (1, 2)), ([], ()), (0, (0,))])
def test_token_entries(entry, tokens):
    assert token_ids(entry) == tokens
    assert token_ids(token_entry(tokens)) == tokens
