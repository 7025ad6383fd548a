"""What a run makes of the text of well-known hub folders, against tokenizers and transformers on the same files."""

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxrlhf.config import PromptsConfig
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.weights import save_pretrained

FORWARD = jax.jit(Decoder.__call__)
TEXTS = (
    "what colour is the sky ?", " the  sky   is\tblue ", "hello", "a", "1234567 and 10.5",
    "Here:\n\n1. one\n2. two\n\n\n", "é ü ß 日本 😀 e\u0301", "<|im_end|>", "x<s>hello</s>\nworld",
    "<end_of_turn>\n<eos> x",
    "[INST] hi [/INST]", "<|eot_id|><|end|> x", "user\nassistant", "it's you'll I'M", "          ", "x<|endoftext|>  y",
    "def f(x):\n    return x",
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


def test_logits_are_those_of_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder.path), dtype="float32")
    ids = [folder.file.encode(text).ids for text in (TEXTS[0] * 4, TEXTS[5] * 4)]
    for row in ids:
        tokens = np.array([row[:40]])  # longer than the windows and Llama 3's original length
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(FORWARD(folder.base, tokens), expected, atol=1e-4 * np.abs(expected).max())
