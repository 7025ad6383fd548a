"""Reward models against transformers' sequence classifiers: scores in, folders out, and what cannot be read."""

import json
from contextlib import nullcontext

import jax
import numpy as np
import pytest

from jaxrlhf.config import AdapterConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.distributed.mesh import MeshConfig, make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.hf.classifiers import load_sequence_classifier, save_sequence_classifier
from jaxrlhf.hf.families import FAMILIES
from jaxrlhf.hf.tensor_files import read_checkpoint
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind, init_adapter
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.models.scoring import sequence_scores

GROUPED = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
CASES = {
    "llama": GROUPED | dict(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}),
    "mistral": GROUPED | dict(sliding_window=5),
    "qwen2": GROUPED | dict(tie_word_embeddings=True),
    "qwen3": GROUPED | dict(head_dim=6),
    "gemma2": GROUPED | dict(head_dim=10, sliding_window=3, attn_logit_softcapping=2.0),
    "gemma3_text": GROUPED | dict(head_dim=8, sliding_window=6, num_hidden_layers=3, sliding_window_pattern=2),
    "gpt2": dict(n_embd=40, n_head=5),
    "gpt_neox": dict(hidden_size=40, num_attention_heads=5),
    "phi3": GROUPED | dict(partial_rotary_factor=0.5),
    "olmo2": GROUPED,
    "smollm3": GROUPED | dict(no_rope_layer_interval=2),
}
EOS = 2
LENGTHS = (14, 9, 4, 1)

score = jax.jit(lambda base, adapter, tokens, mask: sequence_scores(bind(base, adapter), tokens, mask))


def rows(side, pad=0):
    """The same four texts, each ending with EOS, as tokens i32[4,14] padded on one side; and their mask."""
    width, noise = max(LENGTHS), np.random.default_rng(3)
    tokens, mask = np.full((len(LENGTHS), width), pad, np.int32), np.zeros((len(LENGTHS), width), bool)
    for row, length in enumerate(LENGTHS):
        places = slice(0, length) if side == "right" else slice(width - length, width)
        tokens[row, places] = [*noise.integers(3, 61, length - 1), EOS]
        mask[row, places] = True
    return tokens, mask


def torch_scores(model, tokens, mask=None):
    """What transformers' classifier says of tokens [B,T], positions counted as ours are."""
    import torch

    real = torch.tensor(np.ones_like(tokens) if mask is None else np.asarray(mask), dtype=torch.long)
    with torch.no_grad():
        ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
        out = model(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0))
    return out.logits[:, 0].float().numpy()


def open_classifier(folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="torch is the reference")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


@pytest.fixture(scope="module")
def made(make_model, tmp_path_factory):
    """`made(family)`: folder and model of a classifier with one label, made by transformers."""
    kept = {}

    def make(family):
        if family not in kept:
            folder = tmp_path_factory.mktemp(family)
            kept[family] = folder, make_model(folder, family, CASES[family], "SequenceClassification", num_labels=1)
        return kept[family]

    return make


@pytest.fixture
def llama(made, tmp_path):
    """A copy of a classifier's folder that may be spoilt."""
    for file in made("llama")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_family_is_scored():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("family", CASES)
def test_scores_are_those_of_transformers(family, made, tmp_path):
    folder, theirs = made(family)
    base, adapter, tokenizer = load_sequence_classifier(folder)
    assert base.lm_head is None and tokenizer is None and base.config.pad_token == 0
    expected = torch_scores(theirs, *rows("left"))
    assert expected.std() > 0.2, "scores that hardly vary would prove nothing"
    for side in ("left", "right"):
        tokens, mask = rows(side)
        np.testing.assert_allclose(score(base, adapter, tokens, mask), expected, atol=1e-4)
        np.testing.assert_allclose(torch_scores(theirs, tokens, mask), expected, atol=1e-4)
    alone = rows("right")[0][1:2, : LENGTHS[1]]
    np.testing.assert_allclose(score(base, adapter, alone, np.ones_like(alone, bool)), expected[1], atol=1e-4)
    np.testing.assert_allclose(torch_scores(theirs, alone), expected[1], atol=1e-4)

    save_sequence_classifier(tmp_path / "out", base, adapter)
    ours, stored = read_checkpoint(tmp_path / "out"), read_checkpoint(folder)
    assert set(ours) == set(stored)
    assert all(ours[name].view().tobytes() == stored[name].view().tobytes() for name in stored)
    again = open_classifier(tmp_path / "out")
    assert type(again).__name__ == type(theirs).__name__ and again.config.num_labels == 1
    np.testing.assert_allclose(torch_scores(again, *rows("left")), expected, atol=1e-4)


@pytest.mark.parametrize(("family", "head"), [("llama", "reward"), ("gpt_neox", "reward"), ("llama", "value")])
def test_an_adapter_becomes_a_folder_whose_scores_are_ours(family, head, make_model, tmp_path):
    """Merged with its LoRA pairs, without the lm_head, and read at the EOS though the base pads with EOS.

    A value head's bias is not transformers': a warning says so, and we read it back.
    """
    make_model(tmp_path / "base", family, CASES[family] | dict(tie_word_embeddings=False, pad_token_id=EOS))
    base, _ = load_pretrained(tmp_path / "base")
    assert base.config.pad_token == EOS and base.lm_head is not None
    adapter = init_adapter(base, AdapterConfig(rank=2, alpha=4.0), jax.random.key(1), head=head)
    noise = np.random.default_rng(1)
    moved = {
        path: {
            name: leaf if name == "lora_scale" else leaf + 0.2 * noise.standard_normal(leaf.shape).astype(np.float32)
            for name, leaf in leaves.items()
        }
        for path, leaves in adapter.items()
    }
    bias = float(moved["score"]["bias"][0]) if head == "value" else 0.0
    told = pytest.warns(UserWarning, match=rf"head's bias of {bias:.6g} to its scores") if bias else nullcontext()
    with told:
        save_sequence_classifier(tmp_path / "reward", base, moved)
    theirs = open_classifier(tmp_path / "reward")
    assert theirs.config.pad_token_id not in (None, EOS)
    for side in ("left", "right"):
        tokens, mask = rows(side, pad=theirs.config.pad_token_id)
        ours = score(base, moved, tokens, mask)
        np.testing.assert_allclose(torch_scores(theirs, tokens, mask) + bias, ours, atol=1e-4)
    assert np.abs(ours - score(base, adapter, tokens, mask)).max() > 0.1
    again, loaded, _ = load_sequence_classifier(tmp_path / "reward")
    assert set(loaded["score"]) == ({"kernel", "bias"} if bias else {"kernel"})
    np.testing.assert_allclose(score(again, loaded, tokens, mask), ours, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_of_choice(made, tmp_path, dtype):
    folder, _ = made("llama")
    base, adapter, _ = load_sequence_classifier(folder)
    save_sequence_classifier(tmp_path, base, adapter, dtype=dtype)
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path).values()} == {"BF16" if dtype == "bfloat16" else "F16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    half, head, _ = load_sequence_classifier(tmp_path, dtype)
    assert {leaf.dtype.name for leaf in named_parameters(half).values()} == {dtype}
    assert head["score"]["kernel"].dtype == np.float32
    tokens, mask = rows("left")
    if dtype == "float16":  # which attention on CPU does not compute in
        half, head, _ = load_sequence_classifier(tmp_path)
    np.testing.assert_allclose(score(half, head, tokens, mask), score(base, adapter, tokens, mask), atol=0.3)


def test_onto_a_mesh(made):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    base, adapter, _ = load_sequence_classifier(made("llama")[0], mesh=mesh)
    placed = [*named_parameters(base).values(), adapter["score"]["kernel"]]
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in placed)


def test_the_tokenizer_comes_along_and_pads_with_what_ends_no_text(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, adapter, _ = load_sequence_classifier(made("llama")[0])
    save_sequence_classifier(tmp_path / "a", base, adapter, build_word_tokenizer(["good", "bad"]))
    assert load_sequence_classifier(tmp_path / "a")[2].pad_id == 0
    assert open_classifier(tmp_path / "a").config.pad_token_id == 0
    # One that pads with EOS gets BOS for it: transformers' own batches are read at the EOS all the same.
    word = build_word_tokenizer(["good", "bad"])
    word.fast.pad_token = "<eos>"
    same = load_tokenizer_again(word, tmp_path / "tokenizer")
    assert same.pad_id == same.eos_id == EOS
    save_sequence_classifier(tmp_path / "b", base, adapter, same)
    theirs = open_classifier(tmp_path / "b")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.pad_token_id == theirs.config.pad_token_id != EOS and same.pad_id == EOS
    texts = ["good bad good <eos>", "bad <eos>"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    ours = score(base, adapter, batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool))
    np.testing.assert_allclose(torch_scores(theirs, batch["input_ids"], batch["attention_mask"]), ours, atol=1e-4)


def load_tokenizer_again(tokenizer, folder):
    tokenizer.save(str(folder))
    return load_tokenizer(str(folder))


def test_where_every_special_token_is_eos_a_warning_says_what_that_means(made, tmp_path):
    import dataclasses

    base, adapter, _ = load_sequence_classifier(made("gpt2")[0])
    base.config = dataclasses.replace(base.config, bos_token=EOS, pad_token=EOS)
    with pytest.warns(UserWarning, match=r"out: every special token ends texts.*token before EOS"):
        save_sequence_classifier(tmp_path / "out", base, adapter)


def entry(**changed):
    def spoil(folder):
        document = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return spoil


def tensor(name, change):
    """Rewrites the checkpoint with `change` of the tensor `name`; None takes it out."""

    def spoil(folder):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name, None))
        tensors |= {} if changed is None else {name: changed}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (entry(id2label={"0": "bad", "1": "good"}), ["config.json", "id2label", "one label"]),
        (entry(num_labels=3), ["config.json", "num_labels is 3", "one label"]),
        (entry(architectures=["LlamaForCausalLM"]), ["config.json", "architectures", "LlamaForSequenceClassification"]),
        (entry(architectures=None), ["config.json", "architectures", "LlamaForSequenceClassification"]),
        (entry(model_type="bert"), ["config.json", "model_type 'bert'", "llama"]),
        (tensor("score.weight", lambda x: None), ["score.weight is missing"]),
        (tensor("score.weight", lambda x: np.tile(x, (2, 1))), ["model.safetensors", "score.weight", "[2, 48]", "[1"]),
        (tensor("model.norm.weight", lambda x: None), ["model.norm.weight is missing"]),
        (tensor("model.norm.weight", lambda x: x[1:]), ["model.safetensors", "model.norm.weight", "[47]", "[48]"]),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), ["truncated"]),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "pickle"]),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_named_in_one_line(llama, spoil, words):
    spoil(llama)
    with pytest.raises(UserError) as error:
        load_sequence_classifier(llama)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [str(llama), *words]), error.value


def test_what_transformers_leaves_out_is_said(llama, capsys):
    tensor("score.bias", lambda x: np.ones(1, np.float32))(llama)
    _, adapter, _ = load_sequence_classifier(llama)
    assert set(adapter["score"]) == {"kernel"}
    assert "score.bias" in capsys.readouterr().err


def test_no_labels_named_leaves_it_to_the_head(llama):
    _, named, _ = load_sequence_classifier(llama)
    entry(id2label=None, label2id=None)(llama)
    _, unnamed, _ = load_sequence_classifier(llama)
    np.testing.assert_array_equal(unnamed["score"]["kernel"], named["score"]["kernel"])


def test_what_is_not_written(made, tmp_path):
    base, adapter, _ = load_sequence_classifier(made("llama")[0])
    with pytest.raises(UserError, match="no scalar head"):
        save_sequence_classifier(tmp_path / "out", base, {})
    with pytest.raises(UserError, match="dtype: must be one of"):
        save_sequence_classifier(tmp_path / "out", base, adapter, dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.pdf"):
        save_sequence_classifier(tmp_path / "full", base, adapter)
    save_pretrained(tmp_path / "older", base)
    save_sequence_classifier(tmp_path / "older", base, adapter)  # an older model may be replaced
    assert not (tmp_path / "older" / "generation_config.json").exists()
    assert not (tmp_path / "out").exists()
