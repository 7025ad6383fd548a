"""Tool calls in episodes: the chat template gets the schemas, and writes the answers of the tools."""

import pytest

from jaxrlhf.config import EnvironmentConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.environments.text_environments import TextEnvironments, Turn
from jaxrlhf.environments.tools import ToolEnvironment

TEMPLATE = (
    "<bos>{% for tool in tools or [] %} tool= {{ tool.function.name }}{% endfor %}{% for m in messages %}"
    " {{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)
WORDS = ["user:", "assistant:", "tool:", "tool=", "calculator", ":", "1", "+", "2", "3", "what", "is"]
SCHEMAS = {"good": None, "text": "calculator", "words": ["calculator"]}


class Schemas(ToolEnvironment):
    """The calculator, with the schemas of the tools as `kind` says."""

    def __init__(self, kind):
        super().__init__(["jaxrlhf.environments.calculator:calculator"], "plain", "jaxrlhf.rewards.library:exact_match")
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        messages, info = super().reset(seed=seed, options=options)
        return messages, info if SCHEMAS[self.kind] is None else {"tools": SCHEMAS[self.kind]}


@pytest.fixture
def start():
    tokenizer = build_word_tokenizer(WORDS, chat_template=TEMPLATE)
    made = []

    def make(kind):
        config = EnvironmentConfig(factory=f"{__file__}:Schemas", arguments={"kind": kind}, mode="sequential")
        environments = TextEnvironments(config, 1, tokenizer, [tokenizer.eos_id], 32, "stop", lambda line: None)
        made.append(environments)
        return tokenizer, environments, environments.start([0], [{"prompt": "what is 1 + 2", "answer": "3"}])[0]

    yield make
    for environments in made:
        environments.close()


def test_schemas_reach_the_template_and_answers_follow_the_turn(start):
    tokenizer, environments, first = start("good")
    prompt = "tool= calculator user: what is 1 + 2 assistant:"
    assert first.failed is None and tokenizer.decode(first.ids) == prompt
    call = [*tokenizer.encode_prompt("calculator : 1 + 2")[1:], tokenizer.eos_id]
    result = environments.step({0: Turn(first.ids, call, stopped=True, last=False)})[0]
    assert tokenizer.decode(result.ids) == "tool: 3 assistant:"
    answer = [*tokenizer.encode_prompt("3")[1:], tokenizer.eos_id]
    context = [*first.ids, *call, *result.ids]
    end = environments.step({0: Turn(context, answer, stopped=True, last=False)})[0]
    assert (end.reward, end.terminated, end.success) == (1.0, True, 1.0)


@pytest.mark.parametrize("kind", ["text", "words"])
def test_schemas_in_another_form_are_refused(start, kind):
    _, _, first = start(kind)
    assert "tools in info must be a list of JSON schemas" in first.failed
