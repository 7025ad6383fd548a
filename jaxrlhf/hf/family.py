"""The columns of the table of model families. Functions here use a row to read and write `config.json`.

The rows are in `family_rows.py`. A row says how to read the values of `DecoderConfig`, and gives the tensor names of a
checkpoint. The forward pass depends only on the values of `DecoderConfig`, and not on the family.
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

# Name of a leaf in the decoder -> name of the leaf in the checkpoint.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of `config.json`."""

    ours: str  # name of the value in DecoderConfig
    theirs: str  # name of the entry in config.json
    kind: str  # a key of KINDS
    default: Any  # value of an absent or null entry, or a function of the values that were read before


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a fused tensor that belongs to one module of the decoder.

    The outputs of the fused tensor are split into groups, and each group is split into pieces. The module has one piece
    of every group.
    """

    sizes: Callable[[DecoderConfig], tuple[int, ...]]  # number of outputs of each piece
    index: int  # index of the module's piece
    groups: Callable[[DecoderConfig], int] = lambda config: 1  # number of groups


@dataclasses.dataclass(frozen=True)
class Module:
    """A rule that maps module names of the decoder to module names of a checkpoint."""

    ours: str  # regular expression for a full module path of the decoder
    theirs: str  # module name in the checkpoint; \1 and \2 are the groups of the regular expression
    transposed: bool = True  # True if the checkpoint's kernel is [out, in], as in torch.nn.Linear; False if [in, out]
    part: Part | None = None  # the module's part of a fused tensor; None if the tensor is not fused


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a family describes the layers that have a sliding window."""

    # (config.json, layer) -> True if the layer has a window. Called only if config.json has no `layer_types`.
    slides: Callable[[dict[str, Any], int], bool]
    default: int | None = 4096  # transformers' window if config.json has no entry
    switch: str | None = None  # the entry that turns windows on; None if the family has no such entry
    typed: bool = True  # True if transformers supports `layer_types` for the family


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of a `model_type`."""

    architecture: str  # name of transformers' class without the ending ForCausalLM
    fields: tuple[Field, ...]
    modules: tuple[Module, ...]
    prefix: str  # prefix of tensor names; a checkpoint without a head lacks the prefix
    ropes: Ropes | None = dataclasses.field(default_factory=Ropes)  # None means learned positions
    windows: Windows | None = None
    # Name in DecoderConfig -> the value for all models of the family, or a function of the values of `fields`.
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # regular expressions for unused tensors in old checkpoints
    fixed: tuple[tuple[str, Any], ...] = ()  # (entry of config.json, the only value that is supported)
    classifier: str | None = None  # name of transformers' classifier without its ending; None means `architecture`


@dataclasses.dataclass(frozen=True)
class TensorAddress:
    """The place of one parameter of the decoder in a checkpoint."""

    tensor: str  # name of the tensor
    transposed: bool  # True if the tensor is the transpose of the parameter
    part: Part | None  # the parameter's part of a fused tensor; None means the whole tensor


# ---------------------------------------------------------------- config.json


def read_family_config(family: Family, model_type: str, document: dict[str, Any], where: str) -> DecoderConfig:
    """Returns the decoder's config from a `config.json`. Absent entries get transformers' defaults.

    `where` names the file in error messages. Raises `UserError` if a value is not supported. The error names the file
    and the entry.
    """
    for entry, value in (("quantization_config", None), *family.fixed):
        if document.get(entry) not in (None, value):
            raise UserError(f"{where}: {entry} {short(document[entry])} is not supported; the value must be {value}")
    read: dict[str, Any] = {}
    for field in family.fields:
        value = document.get(field.theirs)
        try:
            # For a token id or an optional number, null means "none". For other entries, null means the default.
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
    """Returns a `config.json` for transformers. Rope and dtype are written in the styles of transformers 4 and 5."""
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
    """Returns the window and the rotary positions of each layer. If all layers are equal, returns one `LayerKind`."""
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
    """Returns (window, sliding). The window is in tokens, or None. `sliding[i]` is True if layer i has the window."""
    window = document.get("sliding_window", windows.default)
    if windows.switch is not None:
        switched = document.get(windows.switch) or False
        if not isinstance(switched, bool):
            raise UserError(f"{where}: {windows.switch} must be true or false, not {short(switched)}")
        window = window if switched else None
    if window is None:
        return None, [False] * layers
    if not _is_int(window) or window < 1:
        raise UserError(f"{where}: sliding_window must be null or a whole number of at least 1, not {short(window)}")
    types = document.get("layer_types") if windows.typed else None
    if types is None:
        try:
            return window, [windows.slides(document, i) for i in range(layers)]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise UserError(
            f"{where}: layer_types must be a list with {SLIDING} or {FULL} for each of the {layers} layers, "
            f"not {short(types)}"
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
    """Raises `UserError` if values do not fit together."""
    if config.heads % config.kv_heads:
        raise UserError(
            f"{where}: num_attention_heads ({config.heads}) must be a multiple of"
            f" num_key_value_heads ({config.kv_heads})"
        )
    for rope in {kind.rope for kind in config.layer_kinds if kind.rope is not None}:
        rotated = int(config.head_dim * rope.share)
        if rotated < 2 or rotated + rotated % 2 > config.head_dim:
            raise UserError(
                f"{where}: the rotated dimensions ({rotated}) must form whole pairs within head_dim ({config.head_dim})"
            )


# ---------------------------------------------------------------- tensors


def address_in(family: Family, name: str) -> TensorAddress:
    """Returns the place of the parameter `name` ("module/leaf") in the family's checkpoints.

    Raises `KeyError` if no rule of the family covers the parameter.
    """
    module, _, leaf = name.rpartition("/")
    for rule in family.modules:
        if match := re.fullmatch(rule.ours, module):
            tensor = f"{match.expand(rule.theirs)}.{LEAVES[leaf]}"
            return TensorAddress(tensor, rule.transposed and leaf == "kernel", rule.part)
    raise KeyError(f"no rule of {family.architecture} covers the parameter {name!r}")


def is_ignored_by(family: Family, config: DecoderConfig, tensor: str) -> bool:
    """Returns True if the decoder does not use this tensor, and the tensor should be skipped without a notice."""
    if config.tie_embeddings and tensor == address_in(family, "lm_head/kernel").tensor:
        return True  # this tensor is a second copy of the embedding
    return any(re.fullmatch(pattern, tensor) for pattern in family.ignored)


# ---------------------------------------------------------------- kinds of entries


def count(document: dict[str, Any], entry: str, default: int, least: int = 1) -> int:
    """Returns an entry of `config.json`. If the entry is absent or null, returns `default`.

    Raises `ValueError` if the entry is not a whole number of at least `least`.
    """
    value = document.get(entry)
    value = default if value is None else value
    if not _is_int(value) or not least <= value <= LARGEST:
        raise ValueError(f"{entry} must be a whole number of at least {least}, not {short(value)}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Returns the token ids of an entry. The entry is null, one id or a list of ids.

    The id -1 is dropped, because some files use -1 for "none".
    """
    values = value if isinstance(value, list) else [value]
    if not all(v is None or _is_int(v) for v in values):
        raise ValueError("null, a token id or a list of token ids")
    return tuple(dict.fromkeys(v for v in values if v is not None and v >= 0))


def token_entry(tokens: tuple[int, ...]) -> int | list[int] | None:
    """Returns the entry of `config.json` for these tokens. `token_ids` reads this entry."""
    return list(tokens) if len(tokens) > 1 else next(iter(tokens), None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(value: Any) -> int:
    if not _is_int(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"a whole number from 1 to {LARGEST}")
    return value


def _layers(value: Any) -> int:
    if not _is_int(value) or not 1 <= value <= MAX_LAYERS:
        raise ValueError(f"a whole number from 1 to {MAX_LAYERS}")
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_FLOAT:
        raise ValueError("a number of at least 0 in the range of float32")
    return float(value)


def _cap(value: Any) -> float | None:
    if value is not None and _float(value) == 0:
        raise ValueError("null or a number above 0")
    return None if value is None else float(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _token(value: Any) -> int | None:
    if isinstance(value, list):
        raise ValueError("null or a token id")
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
