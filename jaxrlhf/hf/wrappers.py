"""Reads the text part of a multimodal model as a text-only model, if the family of the text part is supported.

For inputs without images, the multimodal model and the text-only model have the same outputs. The text-only model is
trained and exported.

Two groups of models are not supported. The text parts of Llama 3.2 Vision and PaliGemma have another kind of attention.
The text parts of Llama 4 and Qwen3-VL are not in the table of families.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrlhf.errors import UserError, short
from jaxrlhf.tracking.notices import notice

TIED = "tie_word_embeddings"


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """How the `config.json` of a multimodal `model_type` holds its text part.

    The entry TIED outside `text_config` decides whether the head is tied to the embedding. If `inner_tied` is True and
    the entry outside is false, the entry TIED inside `text_config` decides.
    """

    text: str  # family of the text part if text_config has no model_type
    tied: bool = False  # transformers' default of the entry TIED outside text_config
    inner_tied: bool = False
    flat: bool = False  # True if older files have the entries of the text part at the top level
    # transformers' defaults of entries in text_config that differ from the family's defaults.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


QWEN_VL = Wrapper(
    "qwen2",
    inner_tied=True,
    flat=True,
    defaults={
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
        "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151645,
    },
)  # fmt: skip
WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text", tied=True),  # Gemma 3 4B to 27B
    "mistral3": Wrapper("mistral", tied=True),  # Mistral Small 3.1 and 3.2
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "llava": Wrapper("llama", inner_tied=True),
    "llava_next": Wrapper("llama"),
    "llava_onevision": Wrapper("qwen2", inner_tied=True),
    "internvl": Wrapper("qwen2", tied=True),
    "idefics3": Wrapper("llama"),
    "smolvlm": Wrapper("llama"),
}
SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}  # model_type of a text part -> the same family
INNER = (  # (prefix of the text part's tensors, prefix in the text-only model)
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.", "model."),
)


def text_document(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the text part of a multimodal `config.json` as the `config.json` of a text-only model.

    The `config.json` of a text-only model is returned unchanged.
    """
    model_type = document.get("model_type")
    wrapper = WRAPPERS.get(model_type) if isinstance(model_type, str) else None
    if wrapper is None:
        return document
    text = document.get("text_config")
    if text is None and wrapper.flat:
        text = {key: value for key, value in document.items() if key not in ("model_type", TIED)}
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_config must be an object with the text model's entries, not {short(text)}")
    text = dict(wrapper.defaults) | text
    family = text.get("model_type", wrapper.text)
    text["model_type"] = SAME_AS.get(family, family) if isinstance(family, str) else family
    for entry in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if document.get(entry) is not None:
            text.setdefault(entry, document[entry])
    outer, inner = document.get(TIED), text.pop(TIED, None)
    text[TIED] = wrapper.tied if outer is None else outer
    if wrapper.inner_tied and not text[TIED]:
        text[TIED] = inner  # None means the family's default
    for entry in ("rope_parameters", "rope_scaling"):
        rope = text.get(entry)
        if isinstance(rope, dict) and "mrope" in (rope.get("rope_type"), rope.get("type")):
            text[entry] = rope | {"rope_type": "default"}
    notice(
        f"{where}: only the text part of this {model_type} model is read; it is trained and exported as a text-only "
        f"{text['model_type']} model"
    )
    return text


def plain_name(tensor: str) -> str:
    """Returns the name of a tensor or module in the text-only model. `tensor` is a name in the multimodal model."""
    for start, plain in INNER:
        if tensor.startswith(start):
            return plain + tensor.removeprefix(start)
    return tensor
