"""The model families: a table with one row for each `model_type`. A new family needs only a row here.

A row gives the meaning of the entries of `config.json` (`fields`, `constants`, `ropes`, `windows`). It also gives the
tensor names of the checkpoint for the modules of the decoder (`modules`). `family.py` describes the columns. If a new
family needs a computation that is not in the decoder, first add a setting for it to `DecoderConfig`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jaxrlhf.hf.family import Family, Field, Module, Part, Windows, count
from jaxrlhf.hf.family_ropes import Ropes
from jaxrlhf.models.config import DecoderConfig

FEED_FORWARD, ATTENTION, BLOCK = r"layers\.(\d+)\.mlp\.", r"layers\.(\d+)\.attention\.", r"layers\.(\d+)\."
QKV = [ATTENTION + f"{name}_proj" for name in "qkv"]


def _equal_heads(read: dict[str, Any]) -> int:
    if read["hidden_size"] % read["heads"]:
        raise ValueError(f"a whole number (hidden_size is not a multiple of the number of heads, {read['heads']})")
    return read["hidden_size"] // read["heads"]


def _fields(*changed: Field, without: tuple[str, ...] = (), **defaults: Any) -> tuple[Field, ...]:
    """Returns the fields of Llama with changes. The names of fields are those of `DecoderConfig`.

    `changed` replaces or adds fields. `without` removes fields. `defaults` sets the defaults of fields.
    """
    fields = {field.ours: field for field in (*LLAMA_FIELDS, *changed) if field.ours not in without}
    for name, default in defaults.items():
        fields[name] = dataclasses.replace(fields[name], default=default)
    return tuple(fields.values())


def _parts(names: Iterable[str], theirs: str, sizes: Callable, **rest: Any) -> tuple[Module, ...]:
    """Returns the rules for the modules `names` of the decoder. In the checkpoint they form one fused tensor.

    The fused tensor holds the outputs of the modules in the order of `names`.
    """
    groups = {"groups": rest.pop("groups")} if "groups" in rest else {}
    return tuple(Module(name, theirs, part=Part(sizes, i, **groups), **rest) for i, name in enumerate(names))


LLAMA_FIELDS = (
    Field("vocab_size", "vocab_size", "size", 32000),
    Field("hidden_size", "hidden_size", "size", 4096),
    Field("intermediate_size", "intermediate_size", "size", 11008),
    Field("layers", "num_hidden_layers", "layers", 32),
    Field("heads", "num_attention_heads", "size", 32),
    Field("kv_heads", "num_key_value_heads", "size", lambda read: read["heads"]),
    Field("head_dim", "head_dim", "size", _equal_heads),
    Field("max_positions", "max_position_embeddings", "size", 2048),
    Field("norm_eps", "rms_norm_eps", "float", 1e-6),
    Field("activation", "hidden_act", "activation", "silu"),
    Field("tie_embeddings", "tie_word_embeddings", "bool", False),
    Field("initializer_range", "initializer_range", "float", 0.02),
    Field("bos_token", "bos_token_id", "token", 1),
    Field("stop_tokens", "eos_token_id", "tokens", 2),
    Field("pad_token", "pad_token_id", "token", None),
)
QKV_BIAS = Field("qkv_bias", "attention_bias", "bool", False)
OUTPUT_BIAS = Field("output_bias", "attention_bias", "bool", False)
MLP_BIAS = Field("mlp_bias", "mlp_bias", "bool", False)

LLAMA_MODULES = (
    Module("embed_tokens", "model.embed_tokens"),
    Module(BLOCK + "attention_norm", r"model.layers.\1.input_layernorm"),
    Module(ATTENTION + r"(\w+)", r"model.layers.\1.self_attn.\2"),
    Module(BLOCK + "mlp_norm", r"model.layers.\1.post_attention_layernorm"),
    Module(FEED_FORWARD + r"(\w+)", r"model.layers.\1.mlp.\2"),
    Module("final_norm", "model.norm"),
    Module("lm_head", "lm_head"),
    Module("score", "score"),
)
# In these families `post_attention_layernorm` normalises the output of attention, and in Llama the input of the MLP.
POST_NORM_MODULES = (
    Module(BLOCK + "attention_post_norm", r"model.layers.\1.post_attention_layernorm"),
    Module(BLOCK + "mlp_norm", r"model.layers.\1.pre_feedforward_layernorm"),
    Module(BLOCK + "mlp_post_norm", r"model.layers.\1.post_feedforward_layernorm"),
    *LLAMA_MODULES,
)


def _fused_columns(config: DecoderConfig) -> tuple[int, int, int]:
    """Returns the numbers of query, key and value outputs of a fused projection."""
    return (config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2)


def _by_head(config: DecoderConfig) -> tuple[int, int, int]:
    """Returns the numbers of query, key and value outputs of one head."""
    return (config.head_dim,) * 3


LLAMA = Family(
    architecture="Llama",
    prefix="model.",
    fields=_fields(QKV_BIAS, OUTPUT_BIAS, MLP_BIAS),
    modules=LLAMA_MODULES,
    ignored=(r".*rotary_emb\.inv_freq",),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="Mistral",
    fields=_fields(intermediate_size=14336, kv_heads=8, max_positions=131072),
    windows=Windows(slides=lambda document, layer: True, typed=False),
)


def _late_layers(document: dict[str, Any], layer: int) -> bool:
    return layer >= count(document, "max_window_layers", 28, least=0)


QWEN_DEFAULTS = {
    "vocab_size": 151936, "intermediate_size": 22016, "kv_heads": 32, "max_positions": 32768, "bos_token": None,
    "stop_tokens": None,
}  # fmt: skip

QWEN2 = dataclasses.replace(
    LLAMA,
    architecture="Qwen2",
    fields=_fields(**QWEN_DEFAULTS),
    windows=Windows(slides=_late_layers, switch="use_sliding_window"),
    constants={"qkv_bias": True},
)

QWEN3 = dataclasses.replace(
    QWEN2,
    architecture="Qwen3",
    fields=_fields(QKV_BIAS, OUTPUT_BIAS, **QWEN_DEFAULTS, head_dim=128),
    constants={"qk_norm": "head"},
)

GEMMA_FIELDS = _fields(
    Field("activation", "hidden_activation", "activation", "gelu_pytorch_tanh"),
    QKV_BIAS,
    OUTPUT_BIAS,
    Field("query_scalar", "query_pre_attn_scalar", "size", 256),
    Field("attention_softcap", "attn_logit_softcapping", "cap", 50.0),
    Field("logit_softcap", "final_logit_softcapping", "cap", 30.0),
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, layers=26, heads=8, kv_heads=4, head_dim=256,
    max_positions=8192, tie_embeddings=True, bos_token=2, stop_tokens=1, pad_token=0,
)  # fmt: skip
GEMMA_CONSTANTS = {
    "norm": "rms_plus_one",
    "post_norms": True,
    "embedding_scale": lambda read: read["hidden_size"] ** 0.5,
}

GEMMA2 = dataclasses.replace(
    LLAMA,
    architecture="Gemma2",
    fields=GEMMA_FIELDS,
    modules=POST_NORM_MODULES,
    windows=Windows(slides=lambda document, layer: layer % 2 == 0),
    constants=GEMMA_CONSTANTS,
    fixed=(("use_bidirectional_attention", False),),
)


def _five_to_one(document: dict[str, Any], layer: int) -> bool:
    return (layer + 1) % count(document, "sliding_window_pattern", 6) != 0


GEMMA3_DEFAULTS = {"vocab_size": 262208, "max_positions": 131072, "logit_softcap": None}
GEMMA3 = dataclasses.replace(
    GEMMA2,
    architecture="Gemma3",
    classifier="Gemma3Text",
    fields=tuple(
        dataclasses.replace(field, default=GEMMA3_DEFAULTS.get(field.ours, field.default))
        for field in GEMMA_FIELDS
        if field.ours != "attention_softcap"  # transformers has this entry but does not use it
    ),
    ropes=Ropes(theta=1e6, local_theta=1e4),
    windows=Windows(slides=_five_to_one),
    constants=GEMMA_CONSTANTS | {"qk_norm": "head"},
)

GPT2 = Family(
    architecture="GPT2",
    prefix="transformer.",
    ropes=None,
    fields=_fields(
        Field("hidden_size", "n_embd", "size", 768),
        Field("intermediate_size", "n_inner", "size", lambda read: 4 * read["hidden_size"]),
        Field("layers", "n_layer", "layers", 12),
        Field("heads", "n_head", "size", 12),
        Field("max_positions", "n_positions", "size", 1024),
        Field("norm_eps", "layer_norm_epsilon", "float", 1e-5),
        Field("activation", "activation_function", "activation", "gelu_new"),
        without=("kv_heads", "head_dim"),
        vocab_size=50257, tie_embeddings=True, bos_token=50256, stop_tokens=50256,
    ),
    constants={
        "kv_heads": lambda read: read["heads"],
        "head_dim": _equal_heads,
        "norm": "layer",
        "learned_positions": True,
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    modules=(
        Module("embed_tokens", "transformer.wte"),
        Module("embed_positions", "transformer.wpe"),
        Module(BLOCK + "attention_norm", r"transformer.h.\1.ln_1"),
        *_parts(QKV, r"transformer.h.\1.attn.c_attn", _fused_columns, transposed=False),
        Module(ATTENTION + "o_proj", r"transformer.h.\1.attn.c_proj", transposed=False),
        Module(BLOCK + "mlp_norm", r"transformer.h.\1.ln_2"),
        Module(FEED_FORWARD + "up_proj", r"transformer.h.\1.mlp.c_fc", transposed=False),
        Module(FEED_FORWARD + "down_proj", r"transformer.h.\1.mlp.c_proj", transposed=False),
        Module("final_norm", "transformer.ln_f"),
        Module("lm_head", "lm_head"),
        Module("score", "score"),
    ),
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    fixed=(
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ),
)

GPT_NEOX = Family(
    architecture="GPTNeoX",
    prefix="gpt_neox.",
    ropes=Ropes(theta_entry="rotary_emb_base", share=0.25, share_entry="rotary_pct"),
    fields=_fields(
        Field("norm_eps", "layer_norm_eps", "float", 1e-5),
        Field("parallel_residual", "use_parallel_residual", "bool", True),
        QKV_BIAS,
        OUTPUT_BIAS,
        without=("kv_heads", "head_dim"),
        vocab_size=50432, hidden_size=6144, intermediate_size=24576, layers=44, heads=64, activation="gelu",
        bos_token=0, qkv_bias=True, output_bias=True,
    ),
    constants={
        "kv_heads": lambda read: read["heads"],
        "head_dim": _equal_heads,
        "norm": "layer",
        "gated_mlp": False,
        "mlp_bias": True,
    },
    modules=(
        Module("embed_tokens", "gpt_neox.embed_in"),
        Module(BLOCK + "attention_norm", r"gpt_neox.layers.\1.input_layernorm"),
        *_parts(QKV, r"gpt_neox.layers.\1.attention.query_key_value", _by_head, groups=lambda config: config.heads),
        Module(ATTENTION + "o_proj", r"gpt_neox.layers.\1.attention.dense"),
        Module(BLOCK + "mlp_norm", r"gpt_neox.layers.\1.post_attention_layernorm"),
        Module(FEED_FORWARD + "up_proj", r"gpt_neox.layers.\1.mlp.dense_h_to_4h"),
        Module(FEED_FORWARD + "down_proj", r"gpt_neox.layers.\1.mlp.dense_4h_to_h"),
        Module("final_norm", "gpt_neox.final_layer_norm"),
        Module("lm_head", "embed_out"),
        Module("score", "score"),
    ),
    ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
)

PHI3 = dataclasses.replace(
    LLAMA,
    architecture="Phi3",
    ropes=Ropes(
        share_entry="partial_rotary_factor",
        types=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},
        trained_length=4096,
    ),
    windows=Windows(slides=lambda document, layer: True, default=None, typed=False),
    fields=_fields(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_positions=4096, norm_eps=1e-5,
        stop_tokens=32000, pad_token=32000,
    ),
    modules=(
        *_parts(QKV, r"model.layers.\1.self_attn.qkv_proj", _fused_columns),
        *_parts(
            [FEED_FORWARD + "gate_proj", FEED_FORWARD + "up_proj"],
            r"model.layers.\1.mlp.gate_up_proj",
            lambda config: (config.intermediate_size,) * 2,
        ),
        *LLAMA_MODULES,
    ),
)

OLMO2 = dataclasses.replace(
    LLAMA,
    architecture="Olmo2",
    fields=_fields(
        QKV_BIAS, OUTPUT_BIAS, vocab_size=50304, norm_eps=1e-5, bos_token=None, stop_tokens=50279, pad_token=1
    ),
    modules=POST_NORM_MODULES,
    constants={"pre_norms": False, "post_norms": True, "qk_norm": "projection"},
)


def _without_rope(document: dict[str, Any], layer: int) -> bool:
    """Returns True if the layer has no rotary positions. SmolLM3's `no_rope_layers` holds 0 for these layers."""
    rope_layers = document.get("no_rope_layers")
    if rope_layers is None:
        return (layer + 1) % count(document, "no_rope_layer_interval", 4) == 0
    if not isinstance(rope_layers, list) or len(rope_layers) <= layer or rope_layers[layer] not in (0, 1):
        raise ValueError(f"no_rope_layers must be a list with 0 or 1 for each layer, not {rope_layers!r}")
    return not rope_layers[layer]


SMOLLM3 = dataclasses.replace(
    LLAMA,
    architecture="SmolLM3",
    fields=_fields(
        QKV_BIAS,
        OUTPUT_BIAS,
        MLP_BIAS,
        vocab_size=128256, hidden_size=2048, layers=36, heads=16, kv_heads=4, max_positions=32768, tie_embeddings=True,
        bos_token=128000, stop_tokens=128001, pad_token=128004,
    ),
    ropes=Ropes(theta=2e6, skipped=_without_rope),
    windows=Windows(slides=_without_rope, default=None, switch="use_sliding_window"),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,  # Llama 2, 3, 3.x; SmolLM 1 and 2; and other models of this architecture
    "mistral": MISTRAL,
    "qwen2": QWEN2,  # Qwen2 and Qwen2.5
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,  # GPT-NeoX and Pythia
    "phi3": PHI3,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
}
