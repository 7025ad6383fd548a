"""Rotary positions in the table of model families; reads them from `config.json` and writes them.

Both styles of `config.json` are supported: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`
(older versions).
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
    """A family's defaults for rotary positions, and its names of entries in older files."""

    theta: float = 10000.0  # transformers' default of the entry `theta_entry`
    theta_entry: str = "rope_theta"
    share: float = 1.0  # default fraction of a head's dimensions that are rotated
    share_entry: str | None = None  # None: all dimensions are rotated
    local_theta: float | None = None  # theta of layers with a window; None: all layers have the same theta
    types: tuple[str, ...] = tuple(SCALINGS)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"su": "longrope"})  # older names of types
    trained_length: int | None = None  # transformers' default of the entry LENGTH outside the rope, if it has one
    # (config.json, layer) -> whether the layer has no rotary positions; None: all layers have them.
    skipped: Callable[[dict[str, Any], int], bool] | None = None


def read_ropes(ropes: Ropes, document: dict[str, Any], read: dict[str, Any], local: bool, where: str) -> Rope:
    """Returns the rotary positions of the layers that have a window (`local`), or of the layers that have none.

    `read` holds the values of `DecoderConfig` that were read before. Entries that the rope type does not use are
    ignored with a notice; transformers prints a warning for them. Raises `UserError` naming file and entry.
    """
    # If both are present, transformers uses rope_scaling.
    entry = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    given = document.get(entry) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {entry} must be an object with rope_theta and rope_type, not {short(given)}")
    theta = document.get(ropes.theta_entry)
    theta = ropes.theta if theta is None else theta
    if ropes.local_theta is not None:  # one rope for each type of layer
        parameters = document.get("rope_parameters") or {}
        scaling = document.get("rope_scaling") or {}
        given = (isinstance(parameters, dict) and parameters.get(SLIDING if local else FULL)) or {}
        if not all(isinstance(part, dict) for part in (parameters, scaling, given)):
            raise UserError(f"{where}: rope_parameters must be an object that holds the objects {SLIDING} and {FULL}")
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
        # Numbers of a scaling whose type is missing are an error. So are objects, which other families have for each
        # type of layer.
        untyped = given.get("rope_type", given.get("type")) is None
        if extra and (untyped or any(isinstance(given[name], dict) for name in extra)):
            raise ValueError(f"{', '.join(extra)} is not supported with rope_type {kind!r}")
        if extra:
            notice(f"{where}: {entry}: {', '.join(extra)} is not used by rope_type {kind!r} and is ignored")
        outer = document.get(LENGTH, ropes.trained_length)
        if outer is not None and ropes.local_theta is None:
            given = given | {LENGTH: outer}  # as in transformers, the entry outside the rope object takes precedence
        rope = read_rope(given, defaults, kind)
        if rope.kind not in ropes.types:
            raise ValueError(f"rope_type {rope.kind!r} is not supported; known: {', '.join(ropes.types)}")
        if rope.share != 1 and ropes.share_entry is None:
            raise ValueError("partial_rotary_factor is not supported in this family; remove it or set it to 1")
        factors, pairs = factor_count(rope), int(read["head_dim"] * rope.share) // 2 if "head_dim" in read else None
        if factors is not None and factors != pairs:
            raise ValueError(f"short_factor and long_factor must have {pairs} numbers, not {factors}")
    except ValueError as error:
        raise UserError(f"{where}: {entry if given else ropes.theta_entry}: {error}") from None
    return rope


def rope_entries(ropes: Ropes, kinds: list[LayerKind]) -> dict[str, Any]:
    """Returns the rope entries of `config.json` in the newer and the older style.

    If no layer has a window, or every layer has one, the other kind of layer gets the family's default.
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
