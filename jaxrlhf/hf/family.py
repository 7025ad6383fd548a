"""The columns of the table of families, and how a row reads and writes a `config.json` and tensor names.

The rows are in `family_rows.py`. A row reads values of `DecoderConfig`; the forward pass does not know the family.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.errors import UserError, short
from jaxrlhf.hf.family_ropes import FULL, SLIDING, Ropes, read_ropes, rope_entries
from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.rope import Rope

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}  # ours -> the checkpoint's


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of `config.json`."""

    ours: str  # name in DecoderConfig
    theirs: str  # name in config.json
    kind: str  # a key of KINDS
    default: Any  # if the entry is absent or null; a function is called with the values read so far


@dataclasses.dataclass(frozen=True)
class Part:
    """Our outputs of a fused tensor, whose outputs are split into `groups`, each group into `sizes`."""

    sizes: Callable[[DecoderConfig], tuple[int, ...]]
    index: int  # of `sizes`
    groups: Callable[[DecoderConfig], int] = lambda config: 1


@dataclasses.dataclass(frozen=True)
class Module:
    """A rule from our module names to the checkpoint's."""

    ours: str  # regular expression for a full module path
    theirs: str  # the checkpoint's module name, with the groups as \1, \2
    transposed: bool = True  # of the kernel: ours are [in, out], torch's linear layers [out, in]
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Windows:
    """The layers with a sliding window, for families that have any."""

    slides: Callable[[dict[str, Any], int], bool]  # (config.json, layer), if there are no `layer_types`
    default: int | None = 4096  # transformers' window if config.json has no entry
    switch: str | None = None  # the entry that turns windows on, for families that have one
    typed: bool = True  # whether transformers supports `layer_types` for the family


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of a `model_type`."""

    architecture: str  # transformers' class, without ForCausalLM
    fields: tuple[Field, ...]
    modules: tuple[Module, ...]
    prefix: str  # of the tensors' names; checkpoints of the bare model lack it
    ropes: Ropes | None = dataclasses.field(default_factory=Ropes)  # None: learned positions
    windows: Windows | None = None
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of DecoderConfig; or a function of fields
    ignored: tuple[str, ...] = ()  # expressions for unused tensors in old checkpoints
    fixed: tuple[tuple[str, Any], ...] = ()  # (entry of config.json, the one value the decoder computes)
    classifier: str | None = None  # transformers' class, without ForSequenceClassification; None: `architecture`


@dataclasses.dataclass(frozen=True)
class TensorAddress:
    """The tensor of a checkpoint that holds one of our parameters, and how."""

    tensor: str
    transposed: bool
    part: Part | None


# ---------------------------------------------------------------- config.json


def read_family_config(family: Family, model_type: str, document: dict[str, Any], where: str) -> DecoderConfig:
    """The decoder's config from a `config.json`; absent entries get transformers' defaults.

    `where` is the file in messages. Raises `UserError` naming file and entry if a value is not supported.
    """
    for entry, value in (("quantization_config", None), *family.fixed):
        if document.get(entry) not in (None, value):
            raise UserError(f"{where}: {entry} {short(document[entry])} is not supported; it must be {value}")
    read: dict[str, Any] = {}
    for field in family.fields:
        value = document.get(field.theirs)
        try:
            # An explicit null means "none" for a token id or an optional number, and "the default" for all else.
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
    """A `config.json` that transformers opens; rope and dtype are written in the newer and the older style."""
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
    """Window and rotary positions of each layer; a single kind if all layers are alike."""
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
    """(the window in tokens or None, whether each layer has it)."""
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
        raise UserError(f"{where}: layer_types must be {layers} of {SLIDING} and {FULL}, not {short(types)}")
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
                f"{where}: head_dim ({config.head_dim}) must hold pairs: rope rotates {rotated} of its dimensions"
            )


# ---------------------------------------------------------------- tensors


def address_in(family: Family, name: str) -> TensorAddress:
    """The address of the parameter `module/leaf` in the family's checkpoints; `KeyError` if no rule covers it."""
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
    """A whole number of `config.json`, or `default` if it is absent or null; `ValueError` if it is another value."""
    value = document.get(entry)
    value = default if value is None else value
    if not _is_int(value) or value < least:
        raise ValueError(f"{entry} must be a whole number, at least {least}, not {short(value)}")
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Token ids from an entry that is null, one id or a list; -1, which some files use for "none", is dropped."""
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
    "float": _float,
    "cap": _cap,
    "bool": _bool,
    "token": _token,
    "tokens": token_ids,
    "activation": _activation,
}
NULLABLE = ("token", "tokens", "cap")
