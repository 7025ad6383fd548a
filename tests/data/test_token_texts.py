"""The text of each token of a completion: nothing lost or invented, also where tokens split characters."""

import random

import pytest

from jaxrlhf.data.tokenizers import Tokenizer, load_tokenizer

TEXTS = [
    "plain words", " a b", "naïve — ça", "🙂🙃 </script>", "שלום עולם", "مرحبا", "𠜎x", "\n\n", "a\u200d\u202eb", "�x"
]  # fmt: skip


def byte_level() -> Tokenizer:
    """One token a byte, as GPT-2 writes them, and an EOS: an emoji is four tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<end>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), "bytes")


@pytest.fixture(params=["bytes", "words", "stories260k"])
def tokenizer(request):
    if request.param == "stories260k":  # SentencePiece: a word's token brings its blank, a foreign letter is bytes
        return load_tokenizer(str(request.getfixturevalue("stories260k")))
    return byte_level() if request.param == "bytes" else request.getfixturevalue("words")


def joined(tokenizer, prompt, ids):
    text = tokenizer.decode_after(prompt, ids)
    parts = tokenizer.token_texts(prompt, ids, text)
    assert len(parts) == len(ids) and "".join(parts) == text
    return parts


def test_they_join_to_the_completion(tokenizer, monkeypatch):
    seen = []
    slow = Tokenizer._token_texts_from_start
    monkeypatch.setattr(Tokenizer, "_token_texts_from_start", lambda *given: seen.append(1) or slow(*given))
    for text in TEXTS:
        for prompt in ("hello there", ""):
            ids = tokenizer.encode_pair(prompt, text)[1]
            assert joined(tokenizer, tokenizer.encode_prompt(prompt), ids)[-1] == "", "the end token has no text"
    assert not seen, "the linear way suffices for whole texts"


def test_any_ids_join(tokenizer):
    """A policy may write half characters, special tokens and texts that no tokenizer would make."""
    rng = random.Random(0)
    for _ in range(200):
        prompt, ids = ([rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))] for _ in range(2))
        joined(tokenizer, prompt, ids)


def test_the_last_of_its_tokens_has_the_character():
    tokenizer = byte_level()
    ids = tokenizer.encode_pair("q", "a🙂b")[1]
    assert joined(tokenizer, tokenizer.encode_prompt("q"), ids) == ["a", "", "", "", "🙂", "b", ""]
    assert joined(tokenizer, [], ids[:3])[0] == "a", "the emoji was cut"


def test_both_ways_agree(stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    prompt, ids = tokenizer.encode_pair("Once upon a time", " there was a 🙂 girl, and she — ran.")
    text = tokenizer.decode_after(prompt, ids)
    assert tokenizer.token_texts(prompt, ids, text) == tokenizer._token_texts_from_start(prompt, ids, text)
