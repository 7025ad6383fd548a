"""Text parts of multimodal folders against transformers' own wrappers, fed with text alone."""

import json

import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.hf.families import read_config
from jaxrlhf.hf.tensor_files import read_checkpoint
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.hf.wrappers import WRAPPERS

TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
)  # fmt: skip
GEMMA = TEXT | dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
VISION = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8,
              patch_size=4)  # fmt: skip
QWEN_VISION = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=20, out_hidden_size=32, embed_dim=16)
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
# name: (model_type, text_config, vision_config, entries outside)
CASES = {
    "gemma3": ("gemma3", GEMMA, VISION, dict(mm_tokens_per_image=4)),
    "gemma3, untied": ("gemma3", GEMMA, VISION, dict(mm_tokens_per_image=4, tie_word_embeddings=False)),
    "mistral3": ("mistral3", TEXT | dict(model_type="mistral", head_dim=10, sliding_window=None), VISION | dict(
        model_type="pixtral", head_dim=8), dict(tie_word_embeddings=False)),
    "mistral3, tied": ("mistral3", TEXT | dict(model_type="mistral"), VISION | dict(model_type="pixtral"), {}),
    "qwen2_vl": ("qwen2_vl", TEXT | dict(rope_parameters=MROPE), QWEN_VISION, {}),
    "qwen2_5_vl": ("qwen2_5_vl", TEXT | dict(rope_parameters=MROPE), QWEN_VISION, {}),
    "qwen2_5_vl, tied": ("qwen2_5_vl", TEXT | dict(rope_parameters=MROPE), QWEN_VISION, dict(tie_word_embeddings=True)),
    "llava": ("llava", TEXT | dict(model_type="llama"), VISION | dict(model_type="clip_vision_model"), {}),
    "llava, tied inside": ("llava", TEXT | dict(model_type="qwen2", tie_word_embeddings=True), VISION | dict(
        model_type="clip_vision_model"), {}),
    "llava_next": ("llava_next", TEXT | dict(model_type="mistral", sliding_window=4), VISION | dict(
        model_type="clip_vision_model"), {}),
    "llava_onevision": ("llava_onevision", TEXT | dict(model_type="qwen2"), VISION | dict(
        model_type="siglip_vision_model"), {}),
    "internvl": ("internvl", TEXT | dict(model_type="qwen3", head_dim=8), VISION | dict(
        image_size=[8, 8], patch_size=[4, 4]), {}),
    "idefics3": ("idefics3", TEXT | dict(model_type="llama"), VISION, dict(scale_factor=1)),
    "smolvlm": ("smolvlm", TEXT | dict(model_type="llama"), VISION, dict(scale_factor=1)),
}  # fmt: skip


def made(folder, model_type, text, vision, outside):
    """A random wrapper that transformers saves."""
    torch, transformers = pytest.importorskip("torch", reason="torch is the reference"), __import__("transformers")
    transformers.utils.logging.disable_progress_bar()
    text, vision = ({k: dict(v) if isinstance(v, dict) else v for k, v in part.items()} for part in (text, vision))
    config = transformers.AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **outside)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around = 1 if "norm" in name and model_type != "gemma3" else 0
            parameter.copy_(around + 0.2 * noise)
    model.eval().save_pretrained(folder)
    return model


def test_every_wrapper_is_tested():
    assert {case[0] for case in CASES.values()} == set(WRAPPERS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_text_alone_computes_the_same(case, forward, torch_logits, tmp_path, capsys):
    import transformers

    theirs = made(tmp_path / "theirs", *case)
    capsys.readouterr()
    ours, _ = load_pretrained(tmp_path / "theirs")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and case[0] in said[0] and "skipped" in said[1], said
    tokens = np.random.default_rng(3).integers(3, 61, (2, 12)).astype(np.int32)
    mask = np.arange(12)[None] >= np.array([0, 5])[:, None]
    expected = torch_logits(theirs, tokens, mask)[mask]
    assert expected.std() > 0.2
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], expected, atol=1e-4)
    save_pretrained(tmp_path / "ours", ours)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(back, tokens, mask)[mask], expected, atol=1e-4)
    assert type(back).__name__.startswith(("Gemma3ForCausal", "Mistral", "Qwen", "Llama"))


@pytest.mark.parametrize("style", ["model.language_model.", "language_model.model."])
def test_names_of_older_and_newer_folders(style, forward, tmp_path):
    from safetensors.numpy import load_file, save_file

    made(tmp_path, *CASES["mistral3"])
    ours, _ = load_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        if style.startswith("language_model"):
            name = name.replace("model.language_model.", style).replace("lm_head", "language_model.lm_head")
        renamed[name] = tensor
    save_file(renamed, file)
    assert any(name.startswith(style) for name in read_checkpoint(tmp_path))
    tokens = np.arange(12).reshape(2, 6)
    again, _ = load_pretrained(tmp_path)
    np.testing.assert_array_equal(forward(again, tokens, None), forward(ours, tokens, None))


def test_flat_files_of_qwen_vl_as_the_hub_has_them():
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    flat = {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "rope_theta": 1e6, "rope_scaling": rope, "vision_config": {"depth": 32},
        "max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False,
        "max_window_layers": 70, "eos_token_id": 151645, "bos_token_id": 151643,
    }  # fmt: skip
    config = read_config(flat, "config.json")
    assert (config.family, config.tie_embeddings, config.kv_heads, config.qkv_bias) == ("qwen2", True, 2, True)
    assert config.layer_kinds[0].rope.kind == "default" and config.layer_kinds[0].window is None
    assert config.stop_tokens == (151645,)


def test_absent_entries_take_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    for model_type, entries in {
        "gemma3": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
                   "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},  # Gemma 3 4B's
        "qwen2_vl": {}, "qwen2_5_vl": {},
    }.items():  # fmt: skip
        theirs = transformers.AutoConfig.for_model(model_type, text_config=dict(entries)).text_config
        ours = read_config({"model_type": model_type, "text_config": entries}, "config.json")
        for name, entry in dict(vocab_size="vocab_size", hidden_size="hidden_size", heads="num_attention_heads",
                                kv_heads="num_key_value_heads", intermediate_size="intermediate_size",
                                layers="num_hidden_layers", norm_eps="rms_norm_eps", bos_token="bos_token_id",
                                max_positions="max_position_embeddings").items():  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, entry), (model_type, entry)


@pytest.mark.parametrize(
    "document, words",
    [
        ({"model_type": "gemma3"}, ["text_config", "None"]),
        ({"model_type": "llava", "text_config": {"model_type": "llama4_text"}}, ["'llama4_text'", "supported types"]),
        ({"model_type": "mllama", "text_config": {}}, ["'mllama'", "the text parts of gemma3"]),
        ({"model_type": "gemma3", "text_config": {}, "quantization_config": {"bits": 4}}, ["quantization_config"]),
    ],
)
def test_what_cannot_be_used_is_named(document, words):
    with pytest.raises(UserError) as caught:
        read_config(json.loads(json.dumps(document)), "config.json")
    assert all(word in str(caught.value) for word in words), caught.value
