"""Reads the rotary positions of a model family from `config.json`, and writes them.

Both styles of `config.json` are supported. transformers 5 writes `rope_parameters`. Older versions write `rope_theta`
and `rope_scaling`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.errors import UserError, short
from jaxrlhf.models.config import LayerKind
from jaxrlhf.models.rope import SCALINGS, Rope, factor_count, read_rope, rope_entry, rope_kind, unused_entries
from jaxrlhf.tracking.notices import notice

SLIDING, FULL = "sliding_attention", "full_attention"  # names in `layer_types`
LENGTH = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Ropes:
    """The defaults of a family for rotary positions, and the names of its entries in older files."""

    theta: float = 10000.0  # transformers' default of the entry `theta_entry`
    theta_entry: str = "rope_theta"
    share: float = 1.0  # default fraction of a head's dimensions that is rotated
    share_entry: str | None = None  # None means that all dimensions are rotated
    local_theta: float | None = None  # theta of layers with a window; None means the same theta for all layers
    types: tuple[str, ...] = tuple(SCALINGS)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"su": "longrope"})  # older names of types
    trained_length: int | None = None  # transformers' default of the entry LENGTH outside the rope object, or None
    # (config.json, layer) -> True if the layer has no rotary positions. None means that all layers have them.
    skipped: Callable[[dict[str, Any], int], bool] | None = None


def read_ropes(ropes: Ropes, document: dict[str, Any], read: dict[str, Any], local: bool, where: str) -> Rope:
    """Returns the rotary positions of one kind of layer: with a sliding window if `local` is True, else without.

    `read` holds the values of `DecoderConfig` that were read before. Entries that the rope type does not use are
    ignored, and a notice is printed. transformers prints a warning in this case. Raises `UserError` if an entry is
    wrong. The error names the file and the entry.
    """
    # If both entries are present, transformers uses rope_scaling.
    entry = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    given = document.get(entry) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {entry} must be an object with rope_theta and rope_type, not {short(given)}")
    theta = document.get(ropes.theta_entry)
    theta = ropes.theta if theta is None else theta
    if ropes.local_theta is not None:  # each type of layer has its own rope
        parameters = document.get("rope_parameters") or {}
        scaling = document.get("rope_scaling") or {}
        given = (isinstance(parameters, dict) and parameters.get(SLIDING if local else FULL)) or {}
        if not all(isinstance(part, dict) for part in (parameters, scaling, given)):
            raise UserError(f"{where}: rope_parameters must hold the two objects {SLIDING} and {FULL}")
        given = given if local else given | scaling
        local_theta = document.get("rope_local_base_freq")
        if local:
            theta = ropes.local_theta if local_theta is None else local_theta
    share = document.get(ropes.share_entry or "partial_rotary_factor")
    defaults = {
        "rope_theta": theta,
        "partial_rotary_factor": ropes.share if share is None else share,
        LENGTH: read["max_positions"],
        "max_position_embeddings": read["max_positions"],
    }
    try:
        kind = rope_kind(given, ropes.aliases)
        extra = unused_entries(given, kind)
        # Unused entries are an error in two cases: the rope type is missing, or an entry is an object. Other families
        # have one object for each type of layer.
        untyped = given.get("rope_type", given.get("type")) is None
        if extra and (untyped or any(isinstance(given[name], dict) for name in extra)):
            raise ValueError(
                f"rope_type {kind!r} does not use {', '.join(extra)}; remove unused entries, or correct rope_type"
            )
        if extra:
            notice(f"{where}: {entry}: rope_type {kind!r} does not use {', '.join(extra)}; unused entries are ignored")
        outer = document.get(LENGTH, ropes.trained_length)
        if outer is not None and ropes.local_theta is None:
            given = given | {LENGTH: outer}  # the entry outside the rope object counts, as in transformers
        rope = read_rope(given, defaults, kind)
        if rope.kind not in ropes.types:
            raise ValueError(
                f"rope_type {rope.kind!r} is not supported; the supported types are {', '.join(ropes.types)}"
            )
        if rope.share != 1 and ropes.share_entry is None:
            raise ValueError("partial_rotary_factor must be 1 in this model family, or must be removed")
        factors, pairs = factor_count(rope), int(read["head_dim"] * rope.share) // 2 if "head_dim" in read else None
        if factors is not None and factors != pairs:
            raise ValueError(f"short_factor and long_factor must have {pairs} numbers, not {factors}")
    except ValueError as error:
        raise UserError(f"{where}: {entry if given else ropes.theta_entry}: {error}") from None
    return rope


def rope_entries(ropes: Ropes, kinds: list[LayerKind]) -> dict[str, Any]:
    """Returns the rope entries of `config.json`, in the newer and in the older style.

    There are entries for layers with a window and for layers without a window. If the model has only one of these two
    kinds, the entries of the other kind get the default of the family.
    """
    full = next((k.rope for k in kinds if k.window is None and k.rope), None)
    local = next((k.rope for k in kinds if k.window is not None and k.rope), None)
    main = full or (local if ropes.local_theta is None else None) or Rope(ropes.theta, ropes.share)
    entries: dict[str, Any] = {"rope_parameters": rope_entry(main), ropes.theta_entry: main.theta}
    if main.kind != "default":
        entries["rope_scaling"] = rope_entry(main)
    if ropes.trained_length is not None and LENGTH in dict(main.numbers):
        entries[LENGTH] = dict(main.numbers)[LENGTH]
    if ropes.share_entry is not None:
        entries[ropes.share_entry] = main.share
        entries["rope_parameters"]["partial_rotary_factor"] = main.share
    if ropes.local_theta is not None:
        local = local or Rope(ropes.local_theta)
        entries["rope_parameters"] = {FULL: rope_entry(main), SLIDING: rope_entry(local)}
        entries["rope_local_base_freq"] = local.theta
    if ropes.skipped is not None:
        entries["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    return entries
