"""Where answers end: the union of what the files name, the same token in every stage, and each row's own BOS once."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.tokenizers import Tokenizer, load_tokenizer
from jaxrlhf.errors import UserError

OPEN = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}{% endfor %}"
    + OPEN + "{{'<|im_start|>assistant\n'}}{% endif %}"
)  # fmt: skip
GEMMA = (
    "{{bos_token}}{% for m in messages %}{{'<start_of_turn>' + m.role + '\n' + m.content|trim + '<end_of_turn>\n'}}"
    "{% endfor %}" + OPEN + "{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{'<|' + m.role + '|>\n' + m.content + '<|end|>\n'}}{% endfor %}"
    + OPEN + "{{'<|assistant|>\n'}}{% else %}{{eos_token}}{% endif %}"
)  # fmt: skip
LLAMA3 = (
    "{{bos_token}}{% for m in messages %}{{'<|start|>' + m.role + '<|stop|>\n\n' + m.content|trim + '<|eot|>'}}"
    "{% endfor %}" + OPEN + "{{'<|start|>assistant<|stop|>\n\n'}}{% endif %}"
)
MISTRAL = (
    "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}{{'[INST] ' + m.content + ' [/INST]'}}"
    "{% else %}{{' ' + m.content + eos_token}}{% endif %}{% endfor %}"
)
NEXT_TURN = (  # always opens the next turn
    "{% for m in messages %}{% if m.role == 'user' %}{{m.content + '<|im_end|>\n<|im_start|>assistant\n'}}"
    "{% else %}{{m.content + ' <|im_end|>\n<|im_start|>user\n'}}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{m.role + ': ' + m.content + '\n'}}{% endfor %}" + OPEN + "{{'assistant:'}}{% endif %}"
REFUSES = "{{ raise_exception('no') }}"
ENDS = {  # template: (the token behind an answer, what the tokenizer calls EOS)
    "chatml": (CHATML, "<|im_end|>", "<eos>"), "gemma": (GEMMA, "<end_of_turn>", "<eos>"),
    "phi3": (PHI3, "<|end|>", "<eos>"), "llama3": (LLAMA3, "<|eot|>", "<eos>"), "mistral": (MISTRAL, "</s>", "</s>"),
    "next turn": (NEXT_TURN, "<|im_end|>", "<eos>"), "plain": (PLAIN, None, "<eos>"),
    "refuses": (REFUSES, None, "<eos>"),
}  # fmt: skip
SPECIALS = [
    "<pad>", "<eos>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|end|>", "<|start|>", "<|stop|>", "<|eot|>",
]  # fmt: skip
USER = [{"role": "user", "content": "sky"}]


def tokenizer_with(template=None, eos="<eos>", plain=(), bos=True, extra=()) -> Tokenizer:
    """Bytes and special tokens; those of `plain` are added tokens that are not special, as OpenHermes has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for token in (*SPECIALS, *extra):
        backend.add_tokens([AddedToken(token, special=token not in plain, normalized=False)])
    if bos:
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return Tokenizer(fast, "bytes")


def ids(tokenizer, text):
    return tokenizer.fast(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def rows(tmp_path):
    def write(*items):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        return str(tmp_path / "rows.jsonl")

    return write


# ---------------------------------------------------------------- the union


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_that_a_template_writes(name, special):
    template, end, eos = ENDS[name]
    tokenizer = tokenizer_with(template, eos, plain=() if special else ("<|im_end|>", "<|end|>"))
    token = None if end is None else ids(tokenizer, end)[0]
    assert tokenizer.turn_end_id == token
    assert tokenizer.stop_ids == tuple(dict.fromkeys([tokenizer.eos_id, *([] if token is None else [token])]))
    assert tokenizer.text_end_id == tokenizer.eos_id
    assert tokenizer.chat_end_id == (tokenizer.eos_id if token is None else token)
    notes = tokenizer.for_model(300, ()).notes
    assert bool(notes) == (end is None) and all("no end token after a response" in note for note in notes)


def test_stop_tokens_are_the_union():
    tokenizer = tokenizer_with(CHATML)
    end, eos, eot = (ids(tokenizer, text)[0] for text in ("<|im_end|>", "<eos>", "<|eot|>"))
    joined = tokenizer.for_model(300, (eot, 7, eos))
    assert joined.stop_ids == (eot, 7, eos, end) and joined.notes == ()
    assert tokenizer.stop_ids == (eos, end)
    assert joined.for_model(300, joined.stop_ids).stop_ids == joined.stop_ids
    answer = [{"role": "assistant", "content": "a<|eot|>b"}]
    assert joined.encode_pair(USER, answer)[1] == [*ids(tokenizer, "a"), eot]
    assert tokenizer.encode_pair(USER, answer)[1] == [*ids(tokenizer, "a<|eot|>b"), end]


def test_ends_of_another_tokenizer_are_left_out():
    tokenizer = tokenizer_with(CHATML)
    end, eos = (ids(tokenizer, text)[0] for text in ("<|im_end|>", "<eos>"))
    joined = tokenizer.for_model(eos + 1, (7, eos), foreign=True)
    assert joined.stop_ids == (eos,) and joined.chat_end_id == eos
    assert [note.split(": ")[1] for note in joined.notes] == [
        "id 7 is a stop token in the model's files, but no added token of this tokenizer, "
        "so it does not stop responses",
        f"<|im_end|> (id {end}) is no stop token, because the model has only {eos + 1} tokens",
    ]  # fmt: skip
    without = tokenizer_with(eos=None)
    assert without.for_model(300, (7,), foreign=True).stop_ids == (7,)
    assert "no token ends a response" in without.for_model(300, ()).notes[0]
    with pytest.raises(UserError, match="bytes: the tokenizer has no EOS"):
        without.encode_pair("a", "b")
    assert without.for_model(300, (7,)).encode_pair("a", "b")[1] == [*ids(without, "b"), 7]


# ---------------------------------------------------------------- what is taught


@pytest.mark.parametrize("name", [name for name in ENDS if name != "refuses"])
def test_demonstrations_and_pairs_end_where_answers_stop(name, rows):
    template, end, eos = ENDS[name]
    tokenizer = tokenizer_with(template, eos)
    answer = [{"role": "assistant", "content": "blue"}]
    path = rows({"prompt": USER, "response": answer, "chosen": answer, "rejected": "green", "messages": USER + answer})
    example, = load_demonstrations(DemonstrationsConfig(path=path), tokenizer, 99, "stop")[0]
    pair, = load_preferences(PreferencesConfig(path=path), tokenizer, 99, "stop")[0]
    prompt = load_prompts(PromptsConfig(path=path), tokenizer, 99, "stop").ids[0]
    whole = example.prompt_ids.tolist() + example.response_ids.tolist()
    assert whole == pair.chosen_ids.tolist()
    assert whole[: len(prompt)] == prompt.tolist()
    for sequence in (pair.chosen_ids, pair.rejected_ids):
        taught = sequence.tolist()[len(prompt) :]
        assert [token in tokenizer.stop_ids for token in taught] == [False] * (len(taught) - 1) + [True]
    assert whole[-1] == ids(tokenizer, end or eos)[0]
    assert tokenizer.decode(example.response_ids).strip() == "blue"
    chat, = load_demonstrations(DemonstrationsConfig(path=path, messages_field="messages"), tokenizer, 99, "stop")[0]
    assert chat.prompt_ids.tolist() + chat.response_ids.tolist() == whole


@pytest.mark.parametrize("rendered", [False, True])
def test_an_answer_of_several_turns_ends_with_its_last(rendered):
    tokenizer = tokenizer_with(CHATML)
    said = (("assistant", "a"), ("user", "b"), ("assistant", "c<eos>d"))
    turns = [{"role": role, "content": content} for role, content in said]
    pair = (USER, turns)
    if rendered:
        pair = tokenizer.chats.rendered_pair(*pair, "")
    text = "a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<eos>"
    assert tokenizer.encode_pair(*pair)[1] == ids(tokenizer, text)
    turns[-1] = {"role": "assistant", "content": "", "tool_calls": []}
    assert tokenizer.encode_pair(USER, turns)[1] == ids(tokenizer, text.removesuffix("c<eos>") + "<|im_end|>")


def test_texts(rows):
    tokenizer = tokenizer_with(CHATML)
    # An answer ends where sampling would stop.
    assert tokenizer.encode_pair("a", "b<|im_end|>\nc")[1] == ids(tokenizer, "b<|im_end|>")
    assert tokenizer.encode_pair("a", "b")[1] == ids(tokenizer, "b<eos>")
    # A document keeps what its separators separate, and ends once.
    for text, learnt in (
        ("a<eos>b", "a<eos>b<eos>"), ("a<eos>b<|im_end|>\n", "a<eos>b<|im_end|>"), ("a<eos>", "a<eos>"),
        ("a<|im_end|>\n<|im_start|>user\n", "a<|im_end|>\n<|im_start|>user\n<eos>"),
    ):  # fmt: skip
        example, = load_demonstrations(DemonstrationsConfig(path=rows({"text": text})), tokenizer, 99, "stop")[0]
        assert example.prompt_ids.tolist() == tokenizer.prefix_ids
        assert example.response_ids.tolist() == ids(tokenizer, learnt)


def test_text_that_is_cut_behind_a_stop_token_is_counted(rows):
    tokenizer = tokenizer_with(CHATML)
    texts = ("b<eos>c", "b<|im_end|>\n", "b", "b <eos> ", "b<|im_end|>\n<eos>")
    path = rows(*({"prompt": "a", "response": text, "chosen": text, "rejected": "d<eos>e"} for text in texts))
    for _ in range(2):
        report = load_demonstrations(DemonstrationsConfig(path=path), tokenizer, 99, "stop")[1]
        assert report.past_stop == 1 and "1 responses cut after a stop token" in str(report)
    assert load_preferences(PreferencesConfig(path=path), tokenizer, 99, "stop")[1].past_stop == 1 + len(texts)


@pytest.mark.parametrize("plain", [(), ("<|im_end|>",)])
def test_ends_are_no_text(plain):
    tokenizer = tokenizer_with(CHATML, plain=plain)
    assert tokenizer.decode(ids(tokenizer, "blue<|im_end|>")) == "blue"
    assert tokenizer.decode_after(ids(tokenizer, "sky "), ids(tokenizer, "blue<|im_end|>")) == "blue"


# ---------------------------------------------------------------- BOS


def test_bos_stands_once_in_every_kind_of_row(rows):
    tokenizer = tokenizer_with(MISTRAL, "</s>")
    text = "[INST] hi [/INST] hello</s>"
    path = rows({"text": "<s>" + text}, {"text": text})
    spelled, plain = load_demonstrations(DemonstrationsConfig(path=path), tokenizer, 99, "stop")[0]
    assert spelled.prompt_ids.tolist() == plain.prompt_ids.tolist() == tokenizer.prefix_ids
    assert spelled.response_ids.tolist() == plain.response_ids.tolist() == ids(tokenizer, text)
    for config in (PromptsConfig(path=path), PromptsConfig(path=rows({"prompt": "<s>" + text}, {"prompt": text}))):
        first, second = load_prompts(config, tokenizer, 99, "stop").ids
        assert first.tolist() == second.tolist()
    dialogue = "<s>\n\nHuman: x\n\nAssistant:"
    path = rows(
        {"prompt": "<s>[INST] hi [/INST]", "chosen": " a", "rejected": " b"},
        {"prompt": "", "chosen": dialogue + " a", "rejected": dialogue + " b"},
    )
    for pair in load_preferences(PreferencesConfig(path=path), tokenizer, 99, "stop")[0]:
        for sequence in (pair.chosen_ids.tolist(), pair.rejected_ids.tolist()):
            assert sequence[:1] == tokenizer.prefix_ids and sequence.count(tokenizer.prefix_ids[0]) == 1
    # As transformers has it: a chat has the BOS that its template writes, and no other.
    assert tokenizer.encode_prompt(USER) == tokenizer.fast.apply_chat_template(USER, return_dict=False)
    chatml = tokenizer_with(CHATML)
    assert chatml.prefix_ids and chatml.encode_prompt(USER)[0] != chatml.prefix_ids[0]


# ---------------------------------------------------------------- tokens without a row


def test_tokens_without_a_row_are_refused_where_they_occur(rows):
    tokenizer = tokenizer_with(CHATML, extra=("<image>",))
    size = tokenizer.vocab_size - 1
    assert tokenizer.text_size == 256
    joined = tokenizer.for_model(size, ())
    prompts = rows({"prompt": "sky", "response": "blue"}, {"prompt": "a <image>", "response": "b"})
    message = rf"rows.jsonl:2: the text contains <image> \(id {size}\), but the model has only {size} tokens"
    with pytest.raises(UserError, match=message):
        load_prompts(PromptsConfig(path=prompts), joined, 99, "stop")
    with pytest.raises(UserError, match=message):
        load_demonstrations(DemonstrationsConfig(path=prompts), joined, 99, "stop")
    pairs = rows({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "<image>"})
    with pytest.raises(UserError, match=message):
        load_preferences(PreferencesConfig(path=pairs), joined, 99, "stop")
    dropped = PreferencesConfig(path=pairs, unusable="drop")
    assert len(load_preferences(dropped, joined, 99, "stop")[0]) == 1
    assert joined.encode_prompt("sky") == tokenizer.encode_prompt("sky")
    assert tokenizer.encode_prompt("<image>")[-1] == size
    assert tokenizer.for_model(ids(tokenizer, "<pad>")[0], ()).pad_id is None


def test_a_saved_tokenizer_has_the_same_ends(tmp_path):
    tokenizer = tokenizer_with(GEMMA, plain=("<end_of_turn>",))
    tokenizer.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert (again.stop_ids, again.text_size, again.added) == (tokenizer.stop_ids, tokenizer.text_size, tokenizer.added)
