"""Small tokenizers of each kind, and files of rows."""

import json

import pytest

from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WORDS = ["<user>", "<assistant>", "<system>", *"abcdefghijk:", "hello", "there", "my", "friend", "Human:", "Assistant:"]


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return build_word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def chat() -> Tokenizer:
    """The word tokenizer with a chat template, `<role> content <eos>` and a newline per turn."""
    pytest.importorskip("jinja2", reason="chat templates are written in jinja2")
    return build_word_tokenizer(WORDS, chat_template=CHAT)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows as JSON Lines and gives the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
