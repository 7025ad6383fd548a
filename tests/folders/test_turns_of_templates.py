"""Episodes of several turns with the chat templates of many models: the text between two turns."""

import hub_templates
import pytest

from jaxrlhf.data.chats import Chat
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.data.turns import text_between_turns

TEMPLATES = [name for name in vars(hub_templates) if name.isupper() and isinstance(getattr(hub_templates, name), str)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_join_to_what_the_template_writes(name):
    """Also after earlier turns, and with several new messages where the template takes them."""
    template = build_word_tokenizer(["a"], chat_template=getattr(hub_templates, name)).chats
    messages = [{"role": "user", "content": "first"}]
    for answer in ("one", "two"):
        chat = Chat(messages)
        before, new = template.prompt_text(chat, ""), [{"role": "user", "content": f"after {answer}"}]
        between = text_between_turns(template, chat, new, "")
        messages = [*messages, {"role": "assistant", "content": answer}, *new]
        whole = template.prompt_text(Chat(messages), "")
        assert whole in (f"{before}{answer}{between}", f"{before} {answer}{between}")
        assert f"after {answer}" in between
