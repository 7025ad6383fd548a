"""A PEFT adapter's folder where a model's is asked for: the base that it names, with the adapter merged."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.classifiers import load_sequence_classifier
from jaxrlhf.hf.folders import PEFT_INFO
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.scoring import sequence_scores

SETTINGS = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
TARGETS = ["q_proj", "down_proj"]
TOKENS = np.random.default_rng(1).integers(3, 61, (2, 9)).astype(np.int32)
REAL = np.ones((2, 9), bool)


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory):
    """base, classifier; adapters on them: causal, reward (on the base), rewarded (on the classifier), tied"""
    peft, torch = pytest.importorskip("peft", reason="PEFT is the reference"), pytest.importorskip("torch")
    import transformers

    root = tmp_path_factory.mktemp("folders")
    make_model(root / "base", "llama", SETTINGS)
    make_model(root / "base-tied", "llama", SETTINGS | dict(tie_word_embeddings=True))
    make_model(root / "classifier", "llama", SETTINGS, "SequenceClassification", num_labels=1)
    theirs = {}
    for name, base, kind, save in (
        ("causal", "base", "CAUSAL_LM", None), ("tied", "base-tied", "CAUSAL_LM", ["embed_tokens"]),
        ("reward", "base", "SEQ_CLS", None), ("rewarded", "classifier", "SEQ_CLS", None),
    ):  # fmt: skip
        head = transformers.AutoModelForCausalLM if kind == "CAUSAL_LM" else (
            transformers.AutoModelForSequenceClassification)  # fmt: skip
        model = head.from_pretrained(root / base, **({} if kind == "CAUSAL_LM" else dict(num_labels=1)))
        config = peft.LoraConfig(task_type=kind, r=3, target_modules=TARGETS, modules_to_save=save)
        model = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name)
        theirs[name] = model
    return root, theirs


def scores(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS).long()).logits.numpy()[:, 0]


@pytest.mark.parametrize("name", ["causal", "tied"])
def test_the_policy_is_the_base_with_the_adapter(folders, forward, torch_logits, capsys, name):
    root, theirs = folders
    model, tokenizer = load_pretrained(root / name)
    assert tokenizer is None and "merged into its base" in capsys.readouterr().err
    assert model.config.tie_embeddings == (model.lm_head is None) == False  # noqa: E712
    expected = torch_logits(theirs[name], TOKENS, REAL)
    np.testing.assert_allclose(forward(model, TOKENS, REAL), expected, atol=1e-4)
    with pytest.raises(UserError, match="quantised as nf4"):
        load_pretrained(root / name, quantize="nf4")


@pytest.mark.parametrize("name", ["reward", "rewarded"])
def test_the_reward_is_the_base_with_adapter_and_head(folders, name):
    root, theirs = folders
    base, adapter, _ = load_sequence_classifier(root / name)
    assert set(adapter) == {"score"} and base.lm_head is None
    ours = sequence_scores(bind(base, adapter), jnp.asarray(TOKENS), jnp.asarray(REAL))
    np.testing.assert_allclose(ours, scores(theirs[name]), atol=1e-4)


def test_bases_beside_the_adapter_and_tokenizers_of_their_own(folders, tmp_path, forward):
    root, _ = folders
    for name in ("base", "causal"):
        shutil.copytree(root / name, tmp_path / name)
    build_word_tokenizer(["blue", "sky"]).save(str(tmp_path / "base"))
    document = json.loads((tmp_path / "causal" / PEFT_INFO).read_text()) | {"base_model_name_or_path": "../base"}
    (tmp_path / "causal" / PEFT_INFO).write_text(json.dumps(document))
    model, tokenizer = load_pretrained(tmp_path / "causal")
    expected = forward(load_pretrained(root / "causal")[0], TOKENS, REAL)
    np.testing.assert_array_equal(forward(model, TOKENS, REAL), expected)
    assert tokenizer.vocab_size == 6
    build_word_tokenizer(["blue", "sky", "green"]).save(str(tmp_path / "causal"))
    assert load_pretrained(tmp_path / "causal")[1].vocab_size == 7


@pytest.mark.parametrize(
    "load, name, base, words",
    [
        (load_pretrained, "causal", "/nowhere/base", [PEFT_INFO, "base_model_name_or_path", "/nowhere/base", "merge"]),
        (load_pretrained, "causal", None, [PEFT_INFO, "base_model_name_or_path", "None"]),
        (load_sequence_classifier, "reward", "../none", [PEFT_INFO, "../none", "no such folder"]),
        (load_sequence_classifier, "causal", None, [PEFT_INFO, "base_model_name_or_path"]),
        (load_sequence_classifier, "causal", "same", ["no scalar head", "not a sequence classifier"]),
    ],
)
def test_what_cannot_be_used_is_named(folders, tmp_path, load, name, base, words):
    root, _ = folders
    shutil.copytree(root / name, tmp_path / name)
    if base != "same":
        document = json.loads((tmp_path / name / PEFT_INFO).read_text()) | {"base_model_name_or_path": base}
        (tmp_path / name / PEFT_INFO).write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        load(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
