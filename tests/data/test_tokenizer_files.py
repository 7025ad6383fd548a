"""Files in and out: ids and texts are those of `tokenizer.json` read with `tokenizers`, whatever stands beside it."""

import json
import sys

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.errors import UserError

TEXTS = [
    "Here are the steps:\n\n1. one\n2. two\n\n10. ten   5 and  7\n\n\n",
    " the quick brown fox", "12345 it's\tÜber 漢字", "hello</s>\nworld", "user: <|im_end|>  hi", "a  b ",
]  # fmt: skip
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
RAW_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN, LLAMA3 = (
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers +
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)
NAMES = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "unk_token": "<|begin|>"}
PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = PIECES | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


def of_bytes(pre_tokenizer, bos=False) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Qwen, Llama 3 and SmolLM have it."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizer, decoders.ByteLevel()
    specials = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    t.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
        ),
    )
    if bos:
        t.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]),
        ])  # fmt: skip
    return t


def of_pieces(kind: str) -> Tokenizer:
    """BPE with byte fallback as sentencepiece has it: TinyLlama's form, Llama's newer one, Gemma's."""
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    t.train_from_iterator(
        ["the quick brown fox hello world how are you"] * 20,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        ),
    )
    document = json.loads(t.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # bytes are no added tokens
    t = Tokenizer.from_str(json.dumps(document))
    blanks = normalizers.Replace(" ", "▁")
    t.pre_tokenizer, t.normalizer = {
        "prepend": (None, normalizers.Sequence([normalizers.Prepend("▁"), blanks])),
        "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None),
        "gemma": (pre_tokenizers.Split(" ", "merged_with_previous"), blanks),
    }[kind]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    t.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def of_words() -> Tokenizer:
    t = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "quick": 2, "</s>": 3}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(["<unk>", "</s>"])
    return t


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
FORMS = {
    "gpt2": (of_bytes(BYTES), NAMES | {"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "smollm": (of_bytes(DIGITS), NAMES | {"tokenizer_class": "GPT2Tokenizer"}, "llama"),
    "qwen": (
        of_bytes(pre_tokenizers.Sequence([pre_tokenizers.Split(QWEN, "isolated"), RAW_BYTES])),
        NAMES | {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False},
        "qwen2",
    ),
    "another pattern under qwen's name": (of_bytes(DIGITS), NAMES | {"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
    "llama 3": (
        of_bytes(pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, "isolated"), RAW_BYTES]), bos=True),
        NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"},
        "llama",
    ),
    "bytes under llama's name": (of_bytes(DIGITS, True), NAMES | {"tokenizer_class": "LlamaTokenizerFast"}, "llama"),
    "no config.json": (of_bytes(DIGITS), NAMES | {"tokenizer_class": "GPT2Tokenizer"}, None),
    "tinyllama": (of_pieces("prepend"), PIECES | {"tokenizer_class": "LlamaTokenizer", "legacy": False}, "llama"),
    "metaspace": (of_pieces("metaspace"), LLAMA, "llama"),
    "mistral": (of_pieces("prepend"), LLAMA, "mistral"),
    "gemma": (of_pieces("gemma"), PIECES | {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, "gemma2"),
    "yi": (of_pieces("gemma"), PIECES | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, "llama"),
    "pieces under qwen2": (of_pieces("prepend"), PIECES | {"tokenizer_class": "LlamaTokenizerFast"}, "qwen2"),
    "words": (of_words(), {"eos_token": "</s>", "unk_token": "<unk>"}, None),
}  # fmt: skip


def folder(path, backend: Tokenizer, config: dict, model_type: str | None):
    path.mkdir(exist_ok=True)
    # As hub files have it: not what `tokenizers` would write today.
    (path / "tokenizer.json").write_text(json.dumps(json.loads(backend.to_str()), indent=1) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_texts_are_the_files_own(form, tmp_path):
    given = folder(tmp_path / "given", *FORMS[form])
    raw = Tokenizer.from_file(str(given / "tokenizer.json"))
    tokenizer = load_tokenizer(str(given))
    tokenizer.save(str(tmp_path / "saved"), pad_id=tokenizer.eos_id)
    if FORMS[form][2]:  # an export has a config.json beside it
        (tmp_path / "saved" / "config.json").write_text((given / "config.json").read_text())
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    assert again.pad_id == again.eos_id == tokenizer.eos_id == raw.token_to_id(FORMS[form][1]["eos_token"])
    from transformers import AutoTokenizer

    # transformers reads every qwen2 folder as Qwen's own, whatever its files say.
    exported = tokenizer.fast if "under qwen" in form else AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        ids = raw.encode(text).ids
        for read in (tokenizer, again):
            assert read.encode_prompt(text) == ids
            assert read.decode(ids) == raw.decode(ids)
        assert tokenizer.fast(text)["input_ids"] == exported(text)["input_ids"] == ids


def test_what_only_the_files_beside_it_name_is_added(tmp_path):
    backend = of_bytes(BYTES)
    size = backend.get_vocab_size()
    token = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    config = NAMES | {
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            "2": {"content": "<|im_end|>", "special": True, **token},
            str(size): {"content": "<tool>", "special": False, **token},
            str(size + 1): {"content": "<pad>", "special": True, **token},
        },
    }
    given = folder(tmp_path / "given", backend, config, "llama")
    tokenizer = load_tokenizer(str(given))
    tokenizer.save(str(tmp_path / "saved"))
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    for read in (tokenizer, again):
        assert (read.pad_id, read.vocab_size) == (size + 1, size + 2)
        assert read.encode_prompt("<tool>x<pad>") == [size, backend.token_to_id("x"), size + 1]
        assert read.decode([size, size + 1]) == "<tool>"


def test_truncation_and_padding_of_the_file_are_not_ours(tmp_path):
    backend = of_bytes(BYTES)
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(str(folder(tmp_path, backend, NAMES, "llama")))
    backend.no_truncation()
    backend.no_padding()
    for text in ("x", TEXTS[0]):
        assert tokenizer.encode_prompt(text) == backend.encode(text).ids


# ---------------------------------------------------------------- sentencepiece models without a tokenizer.json


@pytest.fixture(params=["prefix", "no prefix"])
def pieces(request, tmp_path):
    """(folder with a tokenizer.model, the model)"""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(
        "\n".join(TEXTS[:2] * 40 + ["the dogs (a) = + Hello x b c quickly lazily how"] * 9)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=request.param == "prefix", normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    path = tmp_path / "model"
    path.mkdir()
    (tmp_path / "m.model").rename(path / "tokenizer.model")
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


@pytest.mark.parametrize(
    ("name", "model_type"), [("LlamaTokenizer", "llama"), ("GemmaTokenizer", "gemma"), (None, "mistral")]
)
def test_sentencepiece_models_are_read_as_they_are(pieces, tmp_path, name, model_type):
    path, model = pieces
    (path / "tokenizer_config.json").write_text(json.dumps(PIECES | ({"tokenizer_class": name} if name else {})))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(str(path))
    tokenizer.save(str(tmp_path / "saved"))
    again = load_tokenizer(str(tmp_path / "saved"))
    for text in (*TEXTS[:3], "a  b "):
        assert tokenizer.encode_prompt(text) == again.encode_prompt(text) == [model.bos_id(), *model.encode(text)]
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))


def test_a_sentencepiece_folder_may_leave_bos_out(pieces):
    path, _ = pieces
    (path / "tokenizer_config.json").write_text(json.dumps(PIECES | {"add_bos_token": False}))
    assert load_tokenizer(str(path)).prefix_ids == []


def test_a_missing_package_is_named(pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("jaxrlhf.data.tokenizer_files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizer\.model, run pip install sentencepiece"):
        load_tokenizer(str(pieces[0]))
