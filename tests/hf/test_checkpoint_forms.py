"""Checkpoints whose tensors and config.json disagree: read as transformers reads them, with a line that says so."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import UserError
from jaxrlhf.hf.tensor_files import SINGLE
from jaxrlhf.hf.weights import load_pretrained, save_pretrained

SETTINGS = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, Q_BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias"


def noise(*shape):
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def as_it_is(tensors):
    pass


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def same_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].copy()


def other_head(tensors):
    tensors[HEAD] = noise(61, 32)


def one_number(tensors):
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][60, 31] += 3


def beside(**tensors):
    return lambda held: held.update({name.replace("__", "."): value for name, value in tensors.items()})


# name: (tie_word_embeddings, what becomes of the tensors, entries of config.json, words of the line that is said)
CASES = {
    "tied": (True, as_it_is, {}, []),
    "tied, with the head alone": (True, head_alone, {}, []),
    "tied, with a copy": (True, same_head, {}, []),
    "tied, with another head": (True, other_head, {}, ["ties", HEAD, "differ"]),
    "tied, with a head that differs in its last number": (True, one_number, {}, ["differ"]),
    "a value head": (
        False, beside(v_head__summary__weight=noise(1, 32), v_head__summary__bias=noise(1)), {},
        ["skipped", "v_head.summary (2 tensors)"],
    ),
    "a classifier's head": (False, beside(score__weight=noise(1, 32)), {}, ["skipped", "score.weight"]),
    "a layer too many": (
        False, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": noise(44, 32)}), {},
        ["skipped", "model.layers.2.mlp.up_proj.weight"],
    ),
    "biases too many": (False, lambda t: t.update({Q_BIAS: noise(32)}), {}, [Q_BIAS]),
    "fewer layers in config.json": (False, as_it_is, {"num_hidden_layers": 1}, ["model.layers (9 tensors)"]),
}  # fmt: skip


@pytest.mark.parametrize("tied, change, entries, words", CASES.values(), ids=CASES.keys())
def test_tensors_decide_as_in_transformers(
    make_llama, torch_logits, forward, tmp_path, capsys, tied, change, entries, words
):
    transformers = pytest.importorskip("transformers")
    make_llama(tmp_path / "m", tie_word_embeddings=tied, **SETTINGS)
    tensors = load_file(tmp_path / "m" / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / "m" / SINGLE, metadata={"format": "pt"})
    document = json.loads((tmp_path / "m" / "config.json").read_text()) | entries
    (tmp_path / "m" / "config.json").write_text(json.dumps(document))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    capsys.readouterr()
    ours, _ = load_pretrained(tmp_path / "m")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(words) and all(word in line for line in said for word in words), said
    tokens, mask = np.random.default_rng(0).integers(0, 61, (2, 7)), np.arange(7)[None] >= np.array([[0], [3]])
    expected = torch_logits(theirs, tokens, mask)[mask]
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], expected, atol=1e-4)
    save_pretrained(tmp_path / "again", ours)
    assert load_pretrained(tmp_path / "again")[0].config == ours.config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    np.testing.assert_allclose(torch_logits(back, tokens, mask)[mask], expected, atol=1e-5)


@pytest.mark.parametrize(
    "tied, change, entries, words",
    [
        (False, lambda t: t.pop(HEAD), {}, [HEAD, "missing", "tie_word_embeddings: true"]),
        (False, lambda t: t.pop(EMBEDDING), {}, [EMBEDDING, "missing"]),
        (True, lambda t: t.pop(EMBEDDING), {}, [EMBEDDING, "missing"]),
        (True, lambda t: t.update({HEAD: noise(60, 32)}), {}, [HEAD, "[60, 32]", "[61, 32]"]),
        (False, as_it_is, {"vocab_size": 60}, [EMBEDDING, "[61, 32]", "[60, 32]"]),
        (False, as_it_is, {"attention_bias": True}, ["k_proj.bias", "missing"]),
        (False, lambda t: t.pop(Q), {}, [Q, "missing"]),
    ],
)
def test_what_transformers_would_fill_with_noise_is_refused(make_llama, tmp_path, tied, change, entries, words):
    make_llama(tmp_path, tie_word_embeddings=tied, **SETTINGS)
    tensors = load_file(tmp_path / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    document = json.loads((tmp_path / "config.json").read_text()) | entries
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
