"""The columns of the table of model families, and functions that read and write `config.json` and tensor names by it.

The rows are in `family_rows.py`. A row says how to read the values of `DecoderConfig`. The forward pass depends on
these values only, not on the family.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.config.base import LARGEST, LARGEST_FLOAT, MAX_LAYERS
from jaxrlhf.errors import UserError, short
from jaxrlhf.hf.family_ropes import FULL, SLIDING, Ropes, read_ropes, rope_entries
from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.rope import Rope

# The decoder's name of a leaf -> the checkpoint's name.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of `config.json`."""

    ours: str  # the value's name in DecoderConfig
    theirs: str  # the entry's name in config.json
    kind: str  # a key of KINDS
    default: Any  # value if the entry is absent or null; a function is called with the values that were read before


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a fused tensor that belongs to one module of the decoder.

    The outputs of the fused tensor are split into groups, and each group is split into pieces. The module has one piece
    of every group.
    """

    sizes: Callable[[DecoderConfig], tuple[int, ...]]  # number of outputs of each piece
    index: int  # which piece belongs to the module
    groups: Callable[[DecoderConfig], int] = lambda config: 1  # number of groups


@dataclasses.dataclass(frozen=True)
class Module:
    """A rule that maps module names of the decoder to module names of a checkpoint."""

    ours: str  # regular expression for a full module path of the decoder
    theirs: str  # the checkpoint's module name; \1 and \2 are the groups of the expression
    transposed: bool = True  # whether the checkpoint's kernel is [out, in], as in torch.nn.Linear, not [in, out]
    part: Part | None = None  # the module's part of a fused tensor; None: the tensor is not fused


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a family describes the layers that have a sliding window."""

    # (config.json, layer) -> whether the layer has a window; for a config.json without `layer_types`.
    slides: Callable[[dict[str, Any], int], bool]
    default: int | None = 4096  # transformers' window if config.json has no entry
    switch: str | None = None  # the entry that turns windows on; None: the family has no such entry
    typed: bool = True  # whether transformers supports `layer_types` for the family


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of a `model_type`."""

    architecture: str  # transformers' class, without ForCausalLM
    fields: tuple[Field, ...]
    modules: tuple[Module, ...]
    prefix: str  # prefix of tensor names; checkpoints of the model without a head lack it
    ropes: Ropes | None = dataclasses.field(default_factory=Ropes)  # None: learned positions
    windows: Windows | None = None
    # Name in DecoderConfig -> its value for all models of the family, or a function of the values of `fields`.
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # regular expressions for unused tensors in old checkpoints
    fixed: tuple[tuple[str, Any], ...] = ()  # (entry of config.json, the only value that is supported)
    classifier: str | None = None  # transformers' class, without ForSequenceClassification; None: as `architecture`


@dataclasses.dataclass(frozen=True)
class TensorAddress:
    """Where a checkpoint stores one parameter of the decoder."""

    tensor: str  # name of the tensor
    transposed: bool  # whether the tensor is the transpose of the parameter
    part: Part | None  # the parameter's part of a fused tensor; None: the whole tensor


# ---------------------------------------------------------------- config.json


def read_family_config(family: Family, model_type: str, document: dict[str, Any], where: str) -> DecoderConfig:
    """Returns the decoder's config from a `config.json`; absent entries get transformers' defaults.

    `where` names the file in error messages. Raises `UserError` naming file and entry if a value is not supported.
    """
    for entry, value in (("quantization_config", None), *family.fixed):
        if document.get(entry) not in (None, value):
            raise UserError(f"{where}: {entry} {short(document[entry])} is not supported; it must be {value}")
    read: dict[str, Any] = {}
    for field in family.fields:
        value = document.get(field.theirs)
        try:
            # An explicit null means "none" for a token id or an optional number, and "the default" for other entries.
            if value is None and not (field.kind in NULLABLE and field.theirs in document):
                value = field.default(read) if callable(field.default) else field.default
            read[field.ours] = KINDS[field.kind](value)
        except ValueError as error:
            raise UserError(
                f"{where}: {field.theirs} must be {error}, not {short(document.get(field.theirs))}"
            ) from None
    for name, value in family.constants.items():
        read[name] = value(read) if callable(value) else value
    read["layer_kinds"] = _layer_kinds(family, document, read, where)
    config = DecoderConfig(family=model_type, **read)
    _check(config, where)
    return config


def family_document(family: Family, config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns a `config.json` that transformers opens; rope and dtype are in the style of versions 4 and 5."""
    document: dict[str, Any] = {"architectures": [f"{family.architecture}ForCausalLM"], "model_type": config.family}
    for field in family.fields:
        value = getattr(config, field.ours)
        document[field.theirs] = token_entry(value) if field.kind == "tokens" else value
    document |= {entry: value for entry, value in family.fixed if value is not None}
    kinds = [config.layer_kind(i) for i in range(config.layers)]
    if family.windows is not None:
        document |= _window_entries(family.windows, kinds)
    if family.ropes is not None:
        document |= rope_entries(family.ropes, kinds)
    document["dtype"] = document["torch_dtype"] = dtype
    return document


def _layer_kinds(family: Family, document: dict[str, Any], read: dict[str, Any], where: str) -> tuple[LayerKind, ...]:
    """Returns window and rotary positions of each layer; only one `LayerKind` if all layers are alike."""
    layers = read["layers"]
    window, sliding = None, [False] * layers
    if family.windows is not None:
        window, sliding = _windows(family.windows, document, layers, where)
    ropes: dict[bool, Rope | None] = {True: None, False: None}
    without_rope = None
    if family.ropes is not None:
        ropes = {local: read_ropes(family.ropes, document, read, local, where) for local in (False, True)}
        without_rope = family.ropes.skipped
    try:
        no_rope = [without_rope is not None and without_rope(document, i) for i in range(layers)]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    kinds = tuple(
        LayerKind(window if slides else None, None if skip else ropes[slides]) for slides, skip in zip(sliding, no_rope)
    )
    return kinds[:1] if len(set(kinds)) == 1 else kinds


def _windows(windows: Windows, document: dict[str, Any], layers: int, where: str) -> tuple[int | None, list[bool]]:
    """Returns (the window in tokens or None, for each layer whether it has the window)."""
    window = document.get("sliding_window", windows.default)
    if windows.switch is not None:
        switched = document.get(windows.switch) or False
        if not isinstance(switched, bool):
            raise UserError(f"{where}: {windows.switch} must be true or false, not {short(switched)}")
        window = window if switched else None
    if window is None:
        return None, [False] * layers
    if not _is_int(window) or window < 1:
        raise UserError(f"{where}: sliding_window must be a whole number, at least 1, or null, not {short(window)}")
    types = document.get("layer_types") if windows.typed else None
    if types is None:
        try:
            return window, [windows.slides(document, i) for i in range(layers)]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise UserError(
            f"{where}: layer_types must be a list of {layers} values, each {SLIDING} or {FULL}, not {short(types)}"
        )
    return window, [name == SLIDING for name in types]


def _window_entries(windows: Windows, kinds: list[LayerKind]) -> dict[str, Any]:
    window = next((kind.window for kind in kinds if kind.window is not None), None)
    entries: dict[str, Any] = {"sliding_window": window}
    if windows.typed:
        entries["layer_types"] = [FULL if kind.window is None else SLIDING for kind in kinds]
    if windows.switch is not None:
        entries[windows.switch] = window is not None
    return entries


def _check(config: DecoderConfig, where: str) -> None:
    """Raises `UserError` for combinations of values that no decoder can have."""
    if config.heads % config.kv_heads:
        raise UserError(
            f"{where}: num_attention_heads ({config.heads}) must be a multiple of"
            f" num_key_value_heads ({config.kv_heads})"
        )
    for rope in {kind.rope for kind in config.layer_kinds if kind.rope is not None}:
        rotated = int(config.head_dim * rope.share)
        if rotated < 2 or rotated + rotated % 2 > config.head_dim:
            raise UserError(
                f"{where}: head_dim ({config.head_dim}) does not fit rope, which rotates {rotated} dimensions in pairs"
            )


# ---------------------------------------------------------------- tensors


def address_in(family: Family, name: str) -> TensorAddress:
    """Returns where the family's checkpoints store the parameter `module/leaf`; `KeyError` if no rule covers it."""
    module, _, leaf = name.rpartition("/")
    for rule in family.modules:
        if match := re.fullmatch(rule.ours, module):
            tensor = f"{match.expand(rule.theirs)}.{LEAVES[leaf]}"
            return TensorAddress(tensor, rule.transposed and leaf == "kernel", rule.part)
    raise KeyError(f"no rule of {family.architecture} covers the parameter {name!r}")


def is_ignored_by(family: Family, config: DecoderConfig, tensor: str) -> bool:
    """Whether a checkpoint may hold this tensor although the decoder does not use it."""
    if config.tie_embeddings and tensor == address_in(family, "lm_head/kernel").tensor:
        return True  # a second copy of the embedding
    return any(re.fullmatch(pattern, tensor) for pattern in family.ignored)


# ---------------------------------------------------------------- kinds of entries


def count(document: dict[str, Any], entry: str, default: int, least: int = 1) -> int:
    """Returns an entry of `config.json` that must be a whole number of at least `least`, else raises `ValueError`.

    An entry that is absent or null is `default`.
    """
    value = document.get(entry)
    value = default if value is None else value
    if not _is_int(value) or not least <= value <= LARGEST:
        raise ValueError(f"{entry} must be a whole number, at least {least}, not {short(value)}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Returns the token ids of an entry that is null, one id or a list.

    The id -1, which some files use for "none", is dropped.
    """
    values = value if isinstance(value, list) else [value]
    if not all(v is None or _is_int(v) for v in values):
        raise ValueError("a token id, a list of them or null")
    return tuple(dict.fromkeys(v for v in values if v is not None and v >= 0))


def token_entry(tokens: tuple[int, ...]) -> int | list[int] | None:
    """Returns the entry of `config.json` for these tokens; `token_ids` reads it back."""
    return list(tokens) if len(tokens) > 1 else next(iter(tokens), None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(value: Any) -> int:
    if not _is_int(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"a whole number, at least 1 and at most {LARGEST}")
    return value


def _layers(value: Any) -> int:
    if not _is_int(value) or not 1 <= value <= MAX_LAYERS:
        raise ValueError(f"a whole number, at least 1 and at most {MAX_LAYERS}")
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_FLOAT:
        raise ValueError("a number, at least 0, that float32 holds")
    return float(value)


def _cap(value: Any) -> float | None:
    if value is not None and _float(value) == 0:
        raise ValueError("a number above 0, or null")
    return None if value is None else float(value)


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


KINDS: dict[str, Callable[[Any], Any]] = {
    "size": _size,
    "layers": _layers,
    "float": _float,
    "cap": _cap,
    "bool": _bool,
    "token": _token,
    "tokens": token_ids,
    "activation": _activation,
}
NULLABLE = ("token", "tokens", "cap")
