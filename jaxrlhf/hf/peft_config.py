"""Reads and writes the `adapter_config.json` of a PEFT LoRA adapter: its target modules, their ranks and scales.

Module names are those of the checkpoint. DoRA and `modules_to_save` are supported. Any other entry that adds more than
LoRA pairs raises a `UserError`. The error names the entry.
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.errors import UserError, short

HEADS = {"score", "classifier"}  # PEFT's modules_to_save for task_type SEQ_CLS; jaxrlhf always names the head `score`
# Old -> new names of modules. transformers 5 uses the new names, but not in checkpoints.
NEWER_NAMES = {"embed_out": "lm_head"}
ALL_LINEAR = "all-linear"  # means the linear layers of the blocks, without the head

# If one of these entries is not null, false or empty, the adapter computes something that is not supported.
UNSUPPORTED = (
    "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora",
)  # fmt: skip
PLAIN_INITIALIZERS = ("gaussian", "eva", "orthogonal", "mica")  # other initializers change the base's weights
MERGE_IT = "merge the adapter into its base with PEFT (merge_and_unload) and use the merged folder as the model"


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings in an `adapter_config.json`: ranks, scales and modules."""

    rank: int
    alpha: float
    root: bool  # use_rslora
    ranks: dict[str, int]  # pattern of module names -> rank
    alphas: dict[str, float]  # pattern of module names -> alpha
    targets: str | list[str] | None  # target_modules; None if the entry is absent
    excluded: str | list[str]  # exclude_modules
    layers: list[int]  # layers_to_transform; empty means all layers
    saved: list[str]  # modules_to_save
    dora: bool
    base: str | None  # base_model_name_or_path

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def scale(self, module: str) -> float:
        """Returns alpha / r. If the adapter is rank-stabilised (2312.03732), returns alpha / sqrt(r)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (rank**0.5 if self.root else rank)

    def targets_module(self, module: str) -> bool:
        """Returns True if PEFT puts a LoRA pair on this module: a linear layer of a block, or the head."""
        if _named(self.excluded, module) or self.targets is None:
            return False
        layer = re.search(r"\.(\d+)\.", module)
        if self.targets == ALL_LINEAR:
            return layer is not None
        if isinstance(self.targets, str) or module in self.targets:
            return _named(self.targets, module)
        return _named(self.targets, module) and (not self.layers or (layer and int(layer[1]) in self.layers))

    def saves(self, module: str) -> bool:
        """Returns True if PEFT trains a full copy of this module (`modules_to_save`)."""
        return any(module.endswith(name) for name in self.saved)

    @property
    def has_head(self) -> bool:
        """True if the adapter belongs to a sequence classifier. Its `modules_to_save` then lists the head."""
        return bool(HEADS & set(self.saved))


def read_peft_config(document: dict[str, Any], file: Path) -> PeftConfig:
    """Reads the settings of a LoRA adapter. Raises `UserError` with the name of the entry if one is not supported."""
    if document.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type must be 'LORA', not {document.get('peft_type')!r}")
    unsupported = [entry for entry in UNSUPPORTED if document.get(entry)]
    if document.get("bias") not in (None, "none"):
        unsupported.append("bias")
    initializer = document.get("init_lora_weights")
    if isinstance(initializer, str) and initializer.lower() not in PLAIN_INITIALIZERS:
        unsupported.append("init_lora_weights")
    if unsupported:
        entry = unsupported[0]
        raise UserError(f"{file}: {entry} {short(document[entry])} is not supported; {MERGE_IT}")
    settings = PeftConfig(
        rank=_number(document.get("r"), "r", int, file),
        alpha=_number(document.get("lora_alpha"), "lora_alpha", float, file),
        root=bool(document.get("use_rslora")),
        ranks=_patterns(document, "rank_pattern", int, file),
        alphas=_patterns(document, "alpha_pattern", float, file),
        targets=_newer(_strings(document, "target_modules", file)),
        excluded=_newer(_strings(document, "exclude_modules", file) or []),
        layers=_layer_numbers(document, file),
        saved=_newer(_strings(document, "modules_to_save", file) or []),
        dora=bool(document.get("use_dora")),
        base=document.get("base_model_name_or_path"),
    )
    for entry in ("target_modules", "exclude_modules"):
        if isinstance(document.get(entry), str):
            _check_expression(document[entry], entry, file)
    return settings


def _number(value: Any, entry: str, kind: type, file: Path) -> Any:
    allowed = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, allowed) or not abs(value) < float("inf"):
        raise UserError(f"{file}: {entry} must be a {'whole ' if kind is int else ''}number, not {short(value)}")
    if kind is int and value < 1:
        raise UserError(f"{file}: {entry} must be at least 1, not {value}")
    return value


def _patterns(document: dict[str, Any], entry: str, kind: type, file: Path) -> dict[str, Any]:
    value = document.get(entry) or {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: {entry} must be an object that maps module names to numbers, not {short(value)}")
    for pattern, number in value.items():
        _check_expression(pattern, entry, file)
        _number(number, f"{entry}: {pattern}", kind, file)
    return value


def _strings(document: dict[str, Any], entry: str, file: Path) -> str | list[str] | None:
    value = document.get(entry)
    listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not (value is None or listed or (isinstance(value, str) and entry != "modules_to_save")):
        raise UserError(f"{file}: {entry} must be a list of module names, not {short(value)}")
    return value


def _newer(names: Any) -> Any:
    return [NEWER_NAMES.get(name, name) for name in names] if isinstance(names, list) else names


def _layer_numbers(document: dict[str, Any], file: Path) -> list[int]:
    value = document.get("layers_to_transform")
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise UserError(f"{file}: layers_to_transform must be a list of layer numbers, not {short(value)}")
    return numbers


def _check_expression(pattern: str, entry: str, file: Path) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{file}: {entry}: {short(pattern)} must be a regular expression ({error})") from None


def _by_pattern(values: dict[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of the module's name, as PEFT does."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _named(targets: str | list[str], module: str) -> bool:
    """Returns True if the module's name matches `targets`.

    `targets` is a regular expression for the whole name, or a list of names and ends of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def peft_document(
    pairs: dict[str, tuple[int, np.float32]],
    modules: list[str],
    base_path: str | None,
    fan_in_fan_out: bool,
    saved: list[str],
) -> dict[str, Any]:
    """Returns an `adapter_config.json`.

    `pairs` maps a module to (rank, scale) of its LoRA pair. `saved` names the modules with full weights. `modules`
    names all linear layers of the blocks and the head. The entry `r` is the largest rank, because serving engines
    allocate memory for rank `r`. The entry `lora_alpha` is scale * r.
    """
    numbers = {module: (rank, _alpha(rank, scale)) for module, (rank, scale) in pairs.items()}
    largest = max(rank for rank, _ in numbers.values())
    rank, alpha = Counter(pair for pair in numbers.values() if pair[0] == largest).most_common(1)[0][0]
    ranks = _by_name({module: r for module, (r, _) in numbers.items()}, list(pairs))
    alphas = _by_name({module: a for module, (_, a) in numbers.items()}, list(pairs))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(_by_name(dict.fromkeys(pairs, True), modules)),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "modules_to_save": saved or None,
    }


def _alpha(rank: int, scale: np.float32) -> int | float:
    """Returns alpha such that alpha / rank is exactly the scale. If possible, alpha is a round number."""
    exact = float(scale) * rank
    short = float(str(np.float32(exact)))
    alpha = short if np.float32(short / rank) == scale else exact
    return int(alpha) if alpha == int(alpha) else alpha


def _by_name(values: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Returns the values by ends of module names.

    For each module, the end is the shortest one that belongs only to modules with the same value.
    """

    def ends(module: str) -> list[str]:
        inner = re.sub(r"^.*?\.\d+\.", "", module)  # the part of the name after the layer number
        return [inner.split(".")[-1], inner, module]

    named = {}
    for module, value in values.items():
        for end in ends(module):
            if all(values.get(other) == value for other in modules if _named([end], other)):
                named[end] = value
                break
    return named
