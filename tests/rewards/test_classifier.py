"""Text classifiers as rewards, against direct calls of transformers."""

import json

import numpy as np
import pytest

from jaxrlhf.config import ClassifierRewardConfig
from jaxrlhf.data.chats import Chat
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.classifier import ClassifierReward
from jaxrlhf.rewards.functions import RewardFault

torch = pytest.importorskip("torch", reason="classifiers are torch models")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "is", "it", "good", "bad", "very", "so", "not", ".", "?"]
NAMES = ["angry", "calm", "glad"]
SMALL = dict(vocab_size=19, max_position_embeddings=32)
CASES = {
    "bert": SMALL | dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=28),
    "distilbert": SMALL | dict(dim=24, n_heads=3, n_layers=2, hidden_dim=28),
    "deberta-v2": SMALL | dict(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=28, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, pooler_hidden_size=24,
    ),
}  # fmt: skip


def tokenizer_of(template=None):
    """Whole words, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], and which segment each is in."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def save_model(folder, kind, names=tuple(NAMES), head="SequenceClassification", **settings):
    """A random model whose weights are large enough that scores differ."""
    transformers.utils.logging.disable_progress_bar()
    labels = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    labels = {} if head == "MaskedLM" else labels
    config = transformers.AutoConfig.for_model(kind, **CASES.get(kind, {}) | labels | settings)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.3 * noise)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each architecture: three labels and a tokenizer."""
    made = {}
    for kind in CASES:
        made[kind] = tmp_path_factory.mktemp(kind)
        save_model(made[kind], kind)
        tokenizer_of().save_pretrained(made[kind])
    return made


def make(folder, **settings):
    return ClassifierReward(ClassifierRewardConfig(path=str(folder), **settings), "ppo.reward")


def direct(folder, *texts):
    """All logits of one text or pair, by transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer_of()(*texts, return_tensors="pt")
    assert inputs["token_type_ids"].max() == len(texts) - 1
    if model.config.model_type == "distilbert":  # which knows no segments
        del inputs["token_type_ids"]
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


@pytest.mark.parametrize("kind", CASES)
def test_scores_are_those_of_a_direct_call_whatever_the_batch(kind, folders, answered, rows):
    completions = answered(rows)
    settings = {
        "text": lambda prompt, answer: (f"{prompt} {answer}",),
        "completion": lambda prompt, answer: (answer,),
        "pair": lambda prompt, answer: (prompt, answer),
    }
    for read, texts in settings.items():
        expected = np.array([direct(folders[kind], *texts(prompt, answer))[2] for prompt, answer, _ in rows])
        assert expected.std() > 0.01
        for size in (1, 4, 16):
            scores = make(folders[kind], label="glad", input=read, batch_size=size)(completions)
            assert scores.dtype == np.float32 and scores.shape == (6,)
            np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_auto_is_text_and_a_template_spells_it(folders, answered, rows):
    completions, folder = answered(rows), folders["bert"]
    np.testing.assert_array_equal(make(folder, label=2)(completions), make(folder, label=2, input="text")(completions))
    spelt = make(folder, label=2, template="{completion} {x} . {prompt} ?")(completions)
    expected = [direct(folder, f"{answer} {{x}} . {prompt} ?")[2] for prompt, answer, _ in rows]
    np.testing.assert_allclose(spelt, expected, atol=1e-5)


def test_what_of_the_label_is_the_score(folders, answered, rows, tmp_path):
    completions, folder = answered(rows), folders["bert"]
    logits = np.array([direct(folder, f"{prompt} {answer}") for prompt, answer, _ in rows])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for index, name in enumerate(NAMES):
        for label in (name, index, str(index)):
            np.testing.assert_allclose(make(folder, label=label)(completions), logits[:, index], atol=1e-5)
    probable = make(folder, label="calm", score="probability")(completions)
    np.testing.assert_allclose(probable, shares[:, 1], atol=1e-5)
    logarithm = make(folder, label="calm", score="log_probability")(completions)
    np.testing.assert_allclose(logarithm, np.log(probable), atol=1e-5)
    # Labels that do not exclude each other, and one alone: a sigmoid.
    many = {"problem_type": "multi_label_classification"}
    for names, settings, label in ((NAMES, many, "calm"), (["glad"], {}, None)):
        save_model(tmp_path, "bert", names, **settings)
        tokenizer_of().save_pretrained(tmp_path)
        logit = make(tmp_path, label=label)(completions)
        share = 1 / (1 + np.exp(-logit))
        np.testing.assert_allclose(make(tmp_path, label=label, score="probability")(completions), share, atol=1e-5)
        logarithm = make(tmp_path, label=label, score="log_probability")(completions)
        np.testing.assert_allclose(logarithm, np.log(share), atol=1e-5)


def test_a_long_text_loses_its_start(folders, answered):
    """At most max_length tokens, and no more than the model has positions, [CLS] and [SEP] among them."""
    long = answered([("is it good", "very " * 40 + "bad", True)])
    expected = direct(folders["bert"], " ".join(["very"] * 29 + ["bad"]))[0]
    np.testing.assert_allclose(make(folders["bert"], label=0)(long), [expected], atol=1e-5)
    expected = direct(folders["bert"], "very very bad")[0]
    np.testing.assert_allclose(make(folders["bert"], label=0, max_length=5)(long), [expected], atol=1e-5)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[CLS] {{ m.content }} [SEP] {% endfor %}"
)


def test_a_chat_goes_through_the_template_where_there_is_one(folders, answered, tmp_path):
    chat = Chat([{"role": "user", "content": "is it bad"}, {"role": "assistant", "content": "so so"}])
    completions = answered([("is it bad so so", "not good", True), ("is it", "good", True)], chats=[chat, None])
    plain = [direct(folders["bert"], "is it bad so so not good")[1], direct(folders["bert"], "is it good")[1]]
    np.testing.assert_allclose(make(folders["bert"], label=1)(completions), plain, atol=1e-5)
    save_model(tmp_path, "bert")
    tokenizer_of(TEMPLATE).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    whole = ["CLS", "is", "it", "bad", "SEP", "CLS", "so", "so", "SEP", "CLS", "not", "good", "SEP"]
    ids = tokenizer_of().convert_tokens_to_ids([f"[{x}]" if x.isupper() else x for x in whole])
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, 1]
    np.testing.assert_allclose(make(tmp_path, label=1)(completions), [wanted, plain[1]], atol=1e-5)
    turned = make(tmp_path, label=1, input="chat")(completions)  # a text is one turn of a user
    np.testing.assert_allclose(turned[0], wanted, atol=1e-5)
    assert abs(turned[1] - plain[1]) > 1e-4


def test_a_beginning_tools_and_arguments_reach_the_template(tmp_path):
    save_model(tmp_path, "bert")
    more = "{% for t in tools or [] %}{{ t.name + ' ' }}{% endfor %}{% if so %}{{ 'so ' }}{% endif %}" + TEMPLATE
    tokenizer_of(more).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    messages = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "it is "}]
    read = [(Chat(messages, [{"name": "?"}], {"so": True}, continued=True), "not bad"), (Chat(messages), "not bad")]
    asked = "[CLS] is it [SEP] [CLS] it is"
    whole = [f"? so {asked} not bad [SEP]", f"{asked} [SEP] [CLS] not bad [SEP]"]
    ids = [[tokenizer_of().convert_tokens_to_ids(text.split())] for text in whole]
    with torch.no_grad():
        wanted = [model(torch.tensor(row)).logits[0, 1] for row in ids]
    np.testing.assert_allclose(make(tmp_path, label=1).scores(read), wanted, atol=1e-5)


def test_a_decoder_without_pad_token_is_scored_row_by_row(answered, rows, tmp_path):
    settings = dict(vocab_size=19, n_embd=24, n_head=3, n_layer=1, n_positions=32, bos_token_id=1, eos_token_id=2)
    save_model(tmp_path, "gpt2", ["score"], **settings)
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    expected = [direct(tmp_path, f"{prompt} {answer}")[0] for prompt, answer, _ in rows]
    np.testing.assert_allclose(make(tmp_path)(answered(rows)), expected, atol=1e-5)
    # With one, right-padded batches are read at each row's own end.
    tokenizer_of().save_pretrained(tmp_path)
    np.testing.assert_allclose(make(tmp_path)(answered(rows)), expected, atol=1e-5)


def error_of(folder, **settings):
    with pytest.raises(UserError) as error:
        make(folder, **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith("ppo.reward."), error.value
    return str(error.value)


def test_labels_are_listed_where_none_fits(folders):
    listed = "'angry' (0), 'calm' (1), 'glad' (2)"
    assert error_of(folders["bert"], label="sad").endswith(f"has no label 'sad'; the labels are {listed}")
    assert error_of(folders["bert"], label=3).endswith(f"has no label '3'; the labels are {listed}")
    assert error_of(folders["bert"]).endswith(f"has 3 labels; set label to one of them: {listed}")


def test_without_torch_one_line_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert "pip install torch" in error_of(folders["bert"], label=0)


def test_folders_that_cannot_be_used(folders, tmp_path):
    assert "no such folder" in error_of(tmp_path / "absent", label=0)
    save_model(tmp_path / "masked", "bert", head="MaskedLM")
    tokenizer_of().save_pretrained(tmp_path / "masked")
    assert "has no tensor bert.pooler.dense.bias" in error_of(tmp_path / "masked", label=0)  # never random weights
    save_model(tmp_path / "pickled", "bert")
    tokenizer_of().save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    assert "model.safetensors" in error_of(tmp_path / "pickled", label=0)
    save_model(tmp_path / "mute", "bert")
    assert "tokenizer" in error_of(tmp_path / "mute", label=0)
    save_model(tmp_path / "narrow", "bert", vocab_size=9)
    tokenizer_of().save_pretrained(tmp_path / "narrow")
    assert "has 13 tokens, but the model has only 9" in error_of(tmp_path / "narrow", label=0)
    assert "no chat template" in error_of(folders["bert"], label=0, input="chat")
    assert "max_length: must be at least 3, not 2" in error_of(folders["bert"], label=0, max_length=2)
    # RoBERTa counts positions from behind its pad token: two fewer fit than its config says.
    sizes = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=28, pad_token_id=1)
    save_model(tmp_path / "roberta", "roberta", **SMALL, **sizes)
    tokenizer_of().save_pretrained(tmp_path / "roberta")
    assert "max_length: the model cannot score a text of 32 tokens" in error_of(tmp_path / "roberta", label=0)
    make(tmp_path / "roberta", label=0, max_length=30)


def test_code_that_a_folder_brings_is_never_run(tmp_path):
    save_model(tmp_path, "bert")
    tokenizer_of().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document |= {"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    error_of(tmp_path, label=0)
    assert not (tmp_path / "ran").exists()


def test_a_score_that_is_no_number_is_a_fault(folders, answered, rows):
    reward = make(folders["bert"], label=0)
    with torch.no_grad():
        reward.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(RewardFault, match="returned nan for completion 0 of 6"):
        reward(answered(rows))
