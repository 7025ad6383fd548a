"""Families: how a Hugging Face `config.json` and its tensors map to our decoder, one row of data per family.

`FAMILIES` is keyed by `model_type`. The forward pass knows no family: what a row reads ends as values of
`DecoderConfig`. A new family is a row here (and, where it computes something new, a value in the decoder's
tables).

Not here: rope scaling, quantised weights, and what the decoder lacks: these are refused by name.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import ACTIVATIONS, DecoderConfig

Parse = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of `config.json`."""

    ours: str  # name in DecoderConfig
    theirs: str  # name in config.json
    kind: str  # a key of KINDS
    default: Any  # where the entry is absent or null; a function is called with what the rows above it read


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One rule from our parameter names to the checkpoint's; a pattern and what its groups are put into."""

    ours: str  # regular expression for a whole name of `decoder.named_parameters`
    theirs: str  # tensor name; \1, \2 are the groups
    transposed: bool = False  # our kernels are [in, out], torch's [out, in]


@dataclasses.dataclass(frozen=True)
class Family:
    """All that is particular to a `model_type`."""

    architecture: str  # transformers' class
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]
    rope_theta: float  # transformers' default for this family
    ignored: tuple[str, ...] = ()  # expressions for tensors that old checkpoints carry and nobody needs
    fixed: tuple[tuple[str, Any], ...] = ()  # (entry of config.json, the one value the decoder computes)


def _equal_heads(read: dict[str, Any]) -> int:
    if read["hidden_size"] % read["heads"]:
        raise ValueError(f"given where hidden_size is no multiple of the number of heads ({read['heads']})")
    return read["hidden_size"] // read["heads"]


LLAMA = Family(
    architecture="LlamaForCausalLM",
    rope_theta=10000.0,
    fields=(
        Field("vocab_size", "vocab_size", "size", 32000),
        Field("hidden_size", "hidden_size", "size", 4096),
        Field("intermediate_size", "intermediate_size", "size", 11008),
        Field("layers", "num_hidden_layers", "size", 32),
        Field("heads", "num_attention_heads", "size", 32),
        Field("kv_heads", "num_key_value_heads", "size", lambda read: read["heads"]),
        Field("head_dim", "head_dim", "size", _equal_heads),
        Field("max_positions", "max_position_embeddings", "size", 2048),
        Field("norm_eps", "rms_norm_eps", "float", 1e-6),
        Field("activation", "hidden_act", "activation", "silu"),
        Field("tie_embeddings", "tie_word_embeddings", "bool", False),
        Field("attention_bias", "attention_bias", "bool", False),
        Field("mlp_bias", "mlp_bias", "bool", False),
        Field("initializer_range", "initializer_range", "float", 0.02),
        Field("bos_token", "bos_token_id", "token", 1),
        Field("stop_tokens", "eos_token_id", "tokens", 2),
        Field("pad_token", "pad_token_id", "token", None),
    ),
    tensors=(
        Tensor(r"embed_tokens/embedding", r"model.embed_tokens.weight"),
        Tensor(r"layers\.(\d+)\.attention_norm/scale", r"model.layers.\1.input_layernorm.weight"),
        Tensor(r"layers\.(\d+)\.attention\.(\w+)/kernel", r"model.layers.\1.self_attn.\2.weight", transposed=True),
        Tensor(r"layers\.(\d+)\.attention\.(\w+)/bias", r"model.layers.\1.self_attn.\2.bias"),
        Tensor(r"layers\.(\d+)\.mlp_norm/scale", r"model.layers.\1.post_attention_layernorm.weight"),
        Tensor(r"layers\.(\d+)\.mlp\.(\w+)/kernel", r"model.layers.\1.mlp.\2.weight", transposed=True),
        Tensor(r"layers\.(\d+)\.mlp\.(\w+)/bias", r"model.layers.\1.mlp.\2.bias"),
        Tensor(r"final_norm/scale", r"model.norm.weight"),
        Tensor(r"lm_head/kernel", r"lm_head.weight", transposed=True),
    ),
    ignored=(r".*rotary_emb\.inv_freq",),
    fixed=(("quantization_config", None),),
)

FAMILIES: dict[str, Family] = {"llama": LLAMA}


def read_config(document: dict[str, Any], where: str) -> DecoderConfig:
    """The decoder that a `config.json` describes; absent entries take transformers' defaults.

    `where` names the file in messages. Raises `UserError` naming file and entry where a value cannot be used.
    """
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    for entry, value in family.fixed:
        if document.get(entry) not in (None, value):
            raise UserError(f"{where}: {entry} {_short(document[entry])} is not supported; it must be {value}")
    read: dict[str, Any] = {}
    for field in family.fields:
        value = document.get(field.theirs)
        try:
            # An explicit null means "none" for a token id and "the default" for everything else.
            if value is None and not (field.kind.startswith("token") and field.theirs in document):
                value = field.default(read) if callable(field.default) else field.default
            read[field.ours] = KINDS[field.kind](value)
        except ValueError as error:
            given = _short(document.get(field.theirs))
            raise UserError(f"{where}: {field.theirs} must be {error}, not {given}") from None
    read["rope_theta"] = _rope_theta(document, family, where)
    config = DecoderConfig(family=model_type, **read)
    _check(config, where)
    return config


def config_document(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """A `config.json` that transformers opens; rope and dtype are written in its newer and its older style."""
    family = FAMILIES[config.family]
    document: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.family}
    for field in family.fields:
        value = getattr(config, field.ours)
        document[field.theirs] = token_entry(value) if field.kind == "tokens" else value
    document["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    document["rope_theta"] = config.rope_theta
    document["dtype"] = document["torch_dtype"] = dtype
    return document


def tensor_name(config: DecoderConfig, name: str) -> tuple[str, bool]:
    """The checkpoint's name of our parameter, and whether it lies transposed there."""
    for rule in FAMILIES[config.family].tensors:
        if match := re.fullmatch(rule.ours, name):
            return match.expand(rule.theirs), rule.transposed
    raise KeyError(f"no rule of family {config.family!r} covers the parameter {name!r}")


def is_ignored(config: DecoderConfig, tensor: str) -> bool:
    """Whether a checkpoint may hold this tensor though the decoder has no place for it."""
    if config.tie_embeddings and tensor == tensor_name(config, "lm_head/kernel")[0]:
        return True  # a second copy of the embedding
    return any(re.fullmatch(pattern, tensor) for pattern in FAMILIES[config.family].ignored)


def token_ids(value: Any) -> tuple[int, ...]:
    """Token ids from an entry that is null, one id or a list; -1, which some files use for "none", is left out."""
    values = value if isinstance(value, list) else [value]
    if not all(v is None or _is_int(v) for v in values):
        raise ValueError("a token id, a list of them or null")
    return tuple(dict.fromkeys(v for v in values if v is not None and v >= 0))


def token_entry(tokens: tuple[int, ...]) -> int | list[int] | None:
    """The entry that `token_ids` reads back."""
    return list(tokens) if len(tokens) > 1 else next(iter(tokens), None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise ValueError("a whole number, at least 1")
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError("a number, at least 0")
    return float(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _token(value: Any) -> int | None:
    if isinstance(value, list):
        raise ValueError("a token id or null")
    return next(iter(token_ids(value)), None)


def _activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"one of {', '.join(sorted(ACTIVATIONS))}")
    return value


KINDS: dict[str, Parse] = {
    "size": _size,
    "float": _float,
    "bool": _bool,
    "token": _token,
    "tokens": token_ids,
    "activation": _activation,
}


def _rope_theta(document: dict[str, Any], family: Family, where: str) -> float:
    """Rope's base, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    # Where both stand, transformers lets rope_scaling win.
    entry = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    rope = document.get(entry) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {entry} must be an object with rope_theta and rope_type, not {_short(rope)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: {entry}: rope_type {kind!r} is not supported; known: default")
    if rope.get("partial_rotary_factor", document.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor is not supported; every dimension of a head must turn")
    extra = set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    # With rope_type "default", transformers reads no other number; a nested object is rope by layer type.
    if extra and ("rope_type" not in rope or any(isinstance(v, dict) for v in rope.values())):
        raise UserError(f"{where}: {entry}: {', '.join(sorted(extra))} is not supported; known: rope_theta, rope_type")
    theta = next((v for v in (rope.get("rope_theta"), document.get("rope_theta")) if v is not None), family.rope_theta)
    try:
        theta = _float(theta)
    except ValueError as error:
        raise UserError(f"{where}: rope_theta must be {error}, not {_short(theta)}") from None
    if theta == 0:
        raise UserError(f"{where}: rope_theta must be above 0")
    return theta


def _check(config: DecoderConfig, where: str) -> None:
    """Values that each alone are fine but not together."""
    if config.heads % config.kv_heads:
        raise UserError(
            f"{where}: num_attention_heads ({config.heads}) must be a multiple of"
            f" num_key_value_heads ({config.kv_heads})"
        )
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim ({config.head_dim}) must be even: rope turns pairs of dimensions")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
