"""Prompts and responses as ids: nothing lost, nothing invented, and the same prompt alone and in a pair."""

import json
import random
import shutil

import numpy as np
import pytest

from jaxrlhf.data.chats import as_messages
from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError

USER = [{"role": "user", "content": "hello there"}]


def letters(kind: str, chat_template: str | None = None) -> Tokenizer:
    """A BPE over a, b, blank and newline whose merges reach over any border; `prepend` as Llama 2 does it."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    blank = "\u2581" if kind == "prepend" else " "
    merges = [("a", "b"), ("b", "a"), (blank, "a"), (blank, "b"), ("ab", blank + "a"), ("\n", "\n")]
    pieces = ["<unk>", "<s>", "</s>", "a", "b", blank, "\n", *("".join(merge) for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend(blank), tokenizers.normalizers.Replace(" ", blank)]
        )
        backend.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace(blank, " "),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        backend.decoder = tokenizers.decoders.Fuse()
    single = {"plain": "$A", "prepend": "<s> $A", "both": "<s> $A </s>"}[kind]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    fast.chat_template = chat_template
    return Tokenizer(fast, "letters")


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("kind", ["plain", "prepend", "both"])
def test_pairs_lose_and_invent_nothing(kind):
    tokenizer = letters(kind)
    rng = random.Random(0)
    merged_over_border = 0
    for _ in range(300):
        prompt, response = ("".join(rng.choices("ab \n", k=rng.randint(1, 6))) for _ in range(2))
        prompt_ids, response_ids = tokenizer.encode_pair(prompt, response)
        assert prompt_ids == tokenizer.encode_prompt(prompt)
        assert response_ids.pop() == tokenizer.eos_id
        assert response_ids
        assert tokenizer.decode(prompt_ids + response_ids) == prompt + response
        assert tokenizer.decode_after(prompt_ids, response_ids) == response
        joint = tokenizer.encode_prompt(prompt + response)
        if joint[: len(prompt_ids)] == prompt_ids:
            assert response_ids == joint[len(prompt_ids) :]
        else:
            merged_over_border += 1
    assert merged_over_border > 20


def test_prompts_never_end_with_eos():
    assert letters("both").encode_prompt("ab a") == [1, *letters("plain").encode_prompt("ab a")]
    assert letters("both").encode_prompt("") == letters("prepend").encode_prompt("") == [1]
    assert letters("plain").encode_prompt("") == []


def test_bos_that_the_text_spells_out_is_not_doubled():
    assert letters("both").encode_prompt("<s>ab") == letters("both").encode_prompt("ab")
    prompt_ids, response_ids = letters("both").encode_pair("<s>ab", "b")
    assert prompt_ids == letters("both").encode_prompt("ab") and response_ids == [4, 2]


def test_eos_comes_once():
    tokenizer = letters("plain")
    assert tokenizer.encode_pair("a", " b")[1] == [*tokenizer.encode_prompt(" b"), 2]
    assert tokenizer.encode_pair("a", " b</s>") == tokenizer.encode_pair("a", " b")
    assert tokenizer.encode_pair("a", "b</s> b") == tokenizer.encode_pair("a", "b")


def test_tokens_longer_than_model_max_length_are_kept():
    assert len(letters("plain").encode_prompt("b" * 50)) == 50


def test_unknown_words_do_not_swallow_the_border(words):
    # Without a blank between them the two words are one unknown word, whose id the prompt has too.
    assert words.encode_pair("hello zz", "there my") == ([1, *ids(words, "hello"), 3], [*ids(words, "there my"), 2])
    assert words.encode_pair("hello zz", "there") == ([1, *ids(words, "hello"), 3], [*ids(words, "there"), 2])
    assert words.encode_pair("hello", "there") == ([1, *ids(words, "hello")], [*ids(words, "there"), 2])


def ids(tokenizer, text):
    return tokenizer.encode_prompt(text)[len(tokenizer.prefix_ids) :]


def test_many_are_each_as_alone(words):
    pairs = [("hello " * (i % 3), "there " * (1 + i % 5)) for i in range(1100)]
    assert list(words.encode_pairs(pairs)) == [words.encode_pair(*pair) for pair in pairs]
    prompts = [prompt for prompt, _ in pairs]
    assert list(words.encode_prompts(prompts)) == [words.encode_prompt(prompt) for prompt in prompts]


def test_cut_start_keeps_bos_and_the_end(words):
    prompt = words.encode_prompt("a b c d")
    assert words.cut_start(prompt, 5) == prompt
    assert words.cut_start(prompt, 3) == [1, *ids(words, "c d")]
    assert words.cut_start(prompt, 2) == [1, *ids(words, "d")]
    assert words.cut_start(prompt, 1) is words.cut_start(prompt, 0) is words.cut_start(prompt, -2) is None
    assert words.cut_start(prompt[1:], 1) == ids(words, "d")
    assert words.cut_start(prompt[1:], 0) is None


# ---------------------------------------------------------------- chats


def test_chat_pair_is_the_template(chat):
    prompt_ids, response_ids = chat.encode_pair(USER, "my friend")
    assert prompt_ids == chat.encode_prompt(USER) == [*ids(chat, "<user> hello there"), 2, *ids(chat, "<assistant>")]
    assert response_ids == [*ids(chat, "my friend"), 2]
    for response in ({"role": "assistant", "content": "my friend"}, [{"role": "assistant", "content": "my friend"}]):
        assert chat.encode_pair(USER, response) == (prompt_ids, response_ids)
    assert chat.encode_pair("hello there", as_messages("my friend", "assistant")) == (prompt_ids, response_ids)


def test_a_whole_chat_is_the_template_to_its_end():
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <eos> !' }}{% endfor %}"
    tokenizer = build_word_tokenizer(["user", "assistant", "a", "b", "!"], chat_template=template)
    turns = [{"role": "user", "content": "a"}]
    assert list(tokenizer.encode_chats([turns, turns])) == [[4, 6, 2, 8]] * 2
    with pytest.raises(UserError, match="no chat template"):
        list(build_word_tokenizer(["a"]).encode_chats([turns]))


def test_blanks_that_a_template_puts_after_eos_are_taken_off():
    pytest.importorskip("jinja2")
    template = (
        "{% for m in messages %}{{ m.role[0] + m.content }}{% if m.role == 'assistant' %}{{ '</s>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    tokenizer = letters("both", template)
    turns = [{"role": "b", "content": " b"}]
    prompt_ids, response_ids = tokenizer.encode_pair(turns, " b")
    assert response_ids == [*letters("plain").encode_prompt(" b"), 2]
    assert prompt_ids[:1] != [1]  # the template says whether BOS comes first, and this one does not


def test_template_that_opens_turns_otherwise_than_it_writes_them():
    pytest.importorskip("jinja2")
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '\nb\n' }}{% endif %}"
    )
    tokenizer = letters("plain", template)
    prompt_ids, response_ids = tokenizer.encode_pair([{"role": "user", "content": "a"}], "bb")
    assert tokenizer.decode(prompt_ids) == "a\nb\n"
    assert response_ids == [4, 4, 2]


def test_chats_that_cannot_be_rendered(words):
    with pytest.raises(UserError, match="x:3: chat messages need a chat template, but the tokenizer word"):
        list(words.encode_prompts(["a", USER], where=["x:2", "x:3"]))
    pytest.importorskip("jinja2")
    template = "{{ raise_exception('roles must alternate\nsecond line') }}"
    strict = build_word_tokenizer(["a"], chat_template=template)
    with pytest.raises(UserError, match=r"^the chat template .* refuses this chat: roles must alternate$"):
        strict.encode_pair(USER, "a")
    with pytest.raises(UserError, match="has no message"):
        strict.encode_prompt([])


# ---------------------------------------------------------------- word tokenizer, loading and saving


def test_word_tokenizer_ids(words):
    assert (words.pad_id, words.eos_id, words.prefix_ids) == (0, 2, [1])
    assert words.vocab_size == 4 + 21
    assert words.encode_prompt("hello  zz\nthere") == [1, *ids(words, "hello"), 3, *ids(words, "there")]
    assert words.decode(words.encode_prompt("hello \n there")) == "hello there"
    assert words.decode(np.array(words.encode_pair("a", "b")[1])) == "b"
    for bad in (["a", "a"], ["a b"], [""], ["<pad>"]):
        with pytest.raises(ValueError, match="distinct"):
            build_word_tokenizer(bad)


@pytest.mark.parametrize("beside", ["nothing", "llama config"])
def test_word_tokenizer_survives_saving(words, tmp_path, beside):
    words.save(str(tmp_path))
    load_tokenizer(str(tmp_path)).save(str(tmp_path / "again"))
    for file in tmp_path.glob("*.json"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), "the place it was read from shows"
    if beside == "llama config":
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_tokenizer(str(tmp_path))
    text = "hello there zz my <user>"
    assert again.encode_prompt(text) == words.encode_prompt(text)
    assert again.decode(again.encode_prompt(text)) == words.decode(words.encode_prompt(text)) == "hello there my <user>"
    for name in ("pad_id", "eos_id", "prefix_ids", "vocab_size", "has_chat_template"):
        assert getattr(again, name) == getattr(words, name)


def test_a_saved_tokenizer_may_pad_otherwise(words, tmp_path):
    assert words.special_ids == [0, 1, 2, 3]
    words.save(str(tmp_path), pad_id=1)
    again = load_tokenizer(str(tmp_path))
    assert (again.pad_id, again.eos_id, words.pad_id) == (1, 2, 0) and again.vocab_size == words.vocab_size
    assert again.encode_prompt("a b") == words.encode_prompt("a b")


def test_chat_template_survives_saving(chat, tmp_path):
    chat.save(str(tmp_path))
    assert load_tokenizer(str(tmp_path)).encode_pair(USER, "my") == chat.encode_pair(USER, "my")


def test_folder_without_tokenizer_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None


def test_tokenizers_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    for path in ("/no/where", str(tmp_path / "tokenizer.json"), "./a"):
        with pytest.raises(UserError, match="no such folder"):
            load_tokenizer(path)
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no way through\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"^owner/name: .*the hub .*: no way through$"):
        load_tokenizer("owner/name")


def test_hub_id_loads_what_was_downloaded(words, tmp_path, monkeypatch):
    import huggingface_hub

    words.save(str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    tokenizer = load_tokenizer("owner/name")
    assert tokenizer.name == "owner/name" and tokenizer.encode_prompt("a b") == words.encode_prompt("a b")


def test_remote_code_is_refused(words, tmp_path):
    words.save(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    try:
        tokenizer = load_tokenizer(str(tmp_path))
        assert tokenizer.encode_prompt("a b") == words.encode_prompt("a b")
    except UserError:
        pass
    assert not (tmp_path / "ran").exists()


def test_no_eos_cannot_end_answers():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), "bare")
    assert tokenizer.eos_id is tokenizer.pad_id is None and tokenizer.vocab_size == 2
    assert tokenizer.encode_prompt("a") == [0]
    with pytest.raises(UserError, match="bare: the tokenizer has no EOS"):
        tokenizer.encode_pair("", "a")


def test_stories_tokenizer(stories260k):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(str(stories260k))
    raw = tokenizers.Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.prefix_ids) == (None, 2, 512, [1])
    assert tokenizer.encode_prompt("Once upon a time") == raw.encode("Once upon a time").ids
    prompt_ids, response_ids = tokenizer.encode_pair("Once upon a time", ", there was")
    assert prompt_ids + response_ids == [*raw.encode("Once upon a time, there was").ids, 2]
    prompt_ids, response_ids = tokenizer.encode_pair("Once upon a time ", "there was")
    assert tokenizer.decode(prompt_ids + response_ids) == "Once upon a time there was"


@pytest.mark.parametrize("value", [{}, "many"])
def test_a_tokenizer_with_an_entry_of_the_wrong_type_is_refused_in_one_line(tmp_path, stories260k, value):
    folder = shutil.copytree(stories260k, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": value}))
    with pytest.raises(UserError, match="model: the tokenizer cannot be used: TypeError: "):
        load_tokenizer(str(folder))
