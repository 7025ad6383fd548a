"""What a run makes of the text of well-known hub folders, against tokenizers and transformers on the same files."""

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.errors import UserError
from jaxrlhf.hf.weights import save_pretrained
from jaxrlhf.models.decoder import Decoder

FORWARD = jax.jit(Decoder.__call__)
TEXTS = (
    "what colour is the sky ?", " the  sky   is\tblue ", "hello", "a", "1234567 and 10.5",
    "Here:\n\n1. one\n2. two\n\n\n", "é ü ß 日本 😀 e\u0301", "<|im_end|>", "x<s>hello</s>\nworld",
    "<end_of_turn>\n<eos> x", "[INST] hi [/INST]", "<|eot_id|><|end|> x", "user\nassistant", "it's you'll I'M",
    "          ", "x<|endoftext|>  y", "def f(x):\n    return x",
)  # fmt: skip
SYSTEM = {"role": "system", "content": "be brief ."}
ASKED = {"role": "user", "content": "what colour is the sky ?"}
ANSWER = {"role": "assistant", "content": "it is blue ."}
CHATS = {
    "one turn": [ASKED],
    "three turns": [ASKED, ANSWER, {"role": "user", "content": "is snow red ?"}],
    "system": [SYSTEM, ASKED],
    "blanks around": [{"role": "user", "content": "\n  name a river .  \n"}],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def rendered(folder, chat, **settings):
    """What transformers' template makes of a chat, cut by the folder's own tokenizer.json."""
    text = folder.theirs.apply_chat_template(chat, tokenize=False, **settings)
    return folder.file.encode(text, add_special_tokens=False).ids


def allowed(folder, chat):
    return folder.about.system or chat[0]["role"] != "system"


def test_ids_are_those_of_the_file(folder):
    for text in TEXTS:
        ids = folder.file.encode(text).ids
        assert folder.tokenizer.encode_prompt(text) == ids, text
        assert folder.tokenizer.decode(ids) == folder.file.decode(ids), text


def test_an_export_has_the_same_tokenizer(folder, tmp_path):
    save_pretrained(tmp_path / "x", folder.base, tokenizer=folder.tokenizer)
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (folder.path / "tokenizer.json").read_bytes()
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "x"))
    for name in ("bos_token", "eos_token", "chat_template"):
        assert getattr(again, name) == getattr(folder.theirs, name), name
    assert [again(text).input_ids for text in TEXTS] == [folder.file.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_prompts_are_what_the_template_makes_of_chats(chatting, chat, rows):
    config = PromptsConfig(path=rows("prompts", [{"prompt": chat}]))
    if not allowed(chatting, chat):
        with pytest.raises(UserError, match=r"prompts\.jsonl.*System role not supported"):
            load_prompts(config, chatting.tokenizer, 400, "stop")
        return
    expected = rendered(chatting, chat, add_generation_prompt=True)
    assert load_prompts(config, chatting.tokenizer, 400, "stop").ids[0].tolist() == expected
    if "bos_token" in chatting.about.template:
        assert expected.count(chatting.theirs.bos_token_id) == 1


@pytest.mark.parametrize("name", ["one turn", "system", "blanks around"])
def test_a_taught_answer_ends_where_answers_stop(chatting, name, rows):
    """SFT and the reward model teach the template's text up to its end of turn, the answer's one stop token."""
    chat = CHATS[name]
    if not allowed(chatting, chat):
        return
    end = chatting.file.token_to_id(chatting.about.turn_end)
    assert end in chatting.stops
    source = rows("rows", [{"messages": [*chat, ANSWER]}])
    example = load_demonstrations(DemonstrationsConfig(path=source), chatting.tokenizer, 400, "stop")[0][0]
    whole = rendered(chatting, [*chat, ANSWER])
    last = len(whole) - 1 - whole[::-1].index(end)
    prompt, response = example.prompt_ids.tolist(), example.response_ids.tolist()
    assert prompt + response == whole[: last + 1]
    assert response[-1] == end and not chatting.stops & {*response[:-1]}
    assert prompt == rendered(chatting, chat, add_generation_prompt=True)

    other = ANSWER | {"content": "no ."}
    source = rows("pairs", [{"prompt": chat, "chosen": [ANSWER], "rejected": [other]}])
    pair = load_preferences(PreferencesConfig(path=source), chatting.tokenizer, 400, "stop")[0][0]
    assert pair.chosen_ids.tolist() == prompt + response
    assert pair.rejected_ids[-1] == end and pair.rejected_ids[: len(prompt)].tolist() == prompt


def test_texts_are_taught_behind_one_bos_and_up_to_a_stop_token(folder, rows):
    """Prompt and response as text, and one text that spells out the BOS."""
    source = rows("texts", [{"prompt": "is snow red ?", "response": " no , white ."}])
    example = load_demonstrations(DemonstrationsConfig(path=source), folder.tokenizer, 400, "stop")[0][0]
    assert example.prompt_ids.tolist() == folder.file.encode("is snow red ?").ids
    whole = folder.file.encode("is snow red ? no , white .").ids
    assert [*example.prompt_ids, *example.response_ids[:-1]] == whole
    assert example.response_ids[-1] in folder.stops
    bos = folder.theirs.bos_token
    if bos is not None and folder.file.encode("a").ids[0] == folder.theirs.bos_token_id:
        source = rows("rendered", [{"text": f"{bos}hello"}])
        example = load_demonstrations(DemonstrationsConfig(path=source), folder.tokenizer, 400, "stop")[0][0]
        ids = [*example.prompt_ids, *example.response_ids]
        assert ids[:-1] == folder.file.encode(f"{bos}hello", add_special_tokens=False).ids


@pytest.mark.parametrize(
    "name",
    ["Llama-3.2-1B-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen3-0.6B", "SmolLM3-3B", "Mistral-7B-Instruct-v0.3"],
)
def test_tools_reach_the_template(hub, name, rows):
    folder = hub(name)
    row = {"prompt": [ASKED], "tools": TOOLS}
    prompts = load_prompts(PromptsConfig(path=rows("prompts", [row])), folder.tokenizer, 500, "stop")
    expected = rendered(folder, [ASKED], tools=TOOLS, add_generation_prompt=True)
    assert prompts.ids[0].tolist() == expected != rendered(folder, [ASKED], add_generation_prompt=True)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "SmolLM3-3B"])
def test_thinking_can_be_switched_off(hub, name, rows):
    folder, off = hub(name), {"enable_thinking": False}
    source = rows("rows", [{"messages": [ASKED, ANSWER], "chat_template_kwargs": off}])
    example = load_demonstrations(DemonstrationsConfig(path=source), folder.tokenizer, 400, "stop")[0][0]
    opened = rendered(folder, [ASKED], add_generation_prompt=True, **off)
    assert example.prompt_ids.tolist() == opened != rendered(folder, [ASKED], add_generation_prompt=True)
    whole = rendered(folder, [ASKED, ANSWER], **off)
    end = whole.index(folder.theirs.eos_token_id, len(opened))
    assert [*example.prompt_ids, *example.response_ids] == whole[: end + 1]


def test_logits_are_those_of_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder.path), dtype="float32")
    ids = [folder.file.encode(text).ids for text in (TEXTS[0] * 4, TEXTS[5] * 4)]
    for row in ids:
        tokens = np.array([row[:40]])  # longer than the windows and Llama 3's original length
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(FORWARD(folder.base, tokens), expected, atol=1e-4 * np.abs(expected).max())
