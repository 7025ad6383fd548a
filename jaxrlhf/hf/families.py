"""Configs and tensor names for each `model_type`. The table of families is in `family_rows.py`."""

from typing import Any

from jaxrlhf.errors import UserError
from jaxrlhf.hf.family import (
    TensorAddress,
    address_in,
    family_document,
    is_ignored_by,
    read_family_config,
    token_entry,
    token_ids,
)
from jaxrlhf.hf.family_rows import FAMILIES
from jaxrlhf.hf.wrappers import WRAPPERS, text_document
from jaxrlhf.models.config import DecoderConfig

__all__ = ["FAMILIES", "address_of", "config_document", "is_ignored", "read_config", "token_entry", "token_ids"]


def read_config(document: dict[str, Any], where: str) -> DecoderConfig:
    """Returns the decoder's config from a `config.json`. For a multimodal model, returns the config of the text part.

    `where` names the file in error messages. Raises `UserError` if `model_type` or a value is not supported.
    """
    document = text_document(document, where)
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = f"{', '.join(sorted(FAMILIES))}, and the text parts of {', '.join(sorted(WRAPPERS))}"
        raise UserError(f"{where}: model_type {model_type!r} is not supported; the supported types are {known}")
    return read_family_config(FAMILIES[model_type], model_type, document, where)


def config_document(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns a `config.json` for this decoder. transformers can open it."""
    return family_document(FAMILIES[config.family], config, dtype)


def address_of(config: DecoderConfig, name: str) -> TensorAddress:
    """Returns the place of the decoder's parameter `name` ("module/leaf") in checkpoints of the family."""
    return address_in(FAMILIES[config.family], name)


def is_ignored(config: DecoderConfig, tensor: str) -> bool:
    """Returns True if the decoder does not use this tensor, and the tensor should be skipped without a notice."""
    return is_ignored_by(FAMILIES[config.family], config, tensor)
