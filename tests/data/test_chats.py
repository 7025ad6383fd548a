"""Chats become the text that transformers' `apply_chat_template` makes of them; a pair splits that text in two."""

import datetime
import json

import pytest

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig
from jaxrlhf.data.chats import Chat, as_chat
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError

pytest.importorskip("jinja2", reason="chat templates are written in jinja2")

# Tools first, a turn per message with its calls, and thinking that can be switched off, as Qwen 3 has it.
TOOLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}{{ '<eos>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "parameters": {"enum": ["a", None]}}}
SWITCH = {"enable_thinking": False}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name="f", arguments=None):
    return {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}


def characters(template: str) -> Tokenizer:
    """A tokenizer of single characters: ids and text say the same."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = template
    return Tokenizer(fast, "characters")


@pytest.fixture(scope="module")
def tokenizer():
    return characters(TOOLS)


def rendered(tokenizer, messages, **arguments):
    return tokenizer.fast.apply_chat_template(messages, tokenize=False, **arguments)


def prompt_of(tokenizer, path, **settings):
    found = load_prompts(PromptsConfig(path=path, **settings), tokenizer, 512, "stop")
    return [tokenizer.fast.decode(ids) for ids in found.ids]


def pair_of(tokenizer, path, **settings):
    found, _ = load_demonstrations(DemonstrationsConfig(path=path, **settings), tokenizer, 512, "stop")
    return [(tokenizer.fast.decode(e.prompt_ids), tokenizer.fast.decode(e.response_ids)) for e in found]


def preferred(tokenizer, path, **settings):
    found, _ = load_preferences(PreferencesConfig(path=path, **settings), tokenizer, 512, "stop")
    return [(tokenizer.fast.decode(p.chosen_ids), tokenizer.fast.decode(p.rejected_ids)) for p in found]


# ---------------------------------------------------------------- tools and template arguments


@pytest.mark.parametrize("stored", ["values", "text"])
def test_tools_and_template_arguments_of_rows_and_settings(jsonl, tokenizer, stored):
    def column(value):
        return value if stored == "values" else json.dumps(value)

    chat = [user("hi")]
    own = {"tools": column([OTHER_TOOL]), "chat_template_kwargs": column(SWITCH)}
    settings = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
    of_row = rendered(tokenizer, chat, tools=[OTHER_TOOL], add_generation_prompt=True, **SWITCH)
    of_settings = rendered(tokenizer, chat, tools=[TOOL], add_generation_prompt=True)
    assert "null" in of_row and "<think>" in of_row and of_settings != of_row  # a null in a list stays
    bare = {"tools": None, "chat_template_kwargs": None}
    for form in ({"messages": chat}, {"prompt": chat}):
        path = jsonl([form | own, form | bare, form])
        assert prompt_of(tokenizer, path, **settings) == [of_row, of_settings, of_settings]
        assert prompt_of(tokenizer, path)[1] == rendered(tokenizer, chat, add_generation_prompt=True)
    for form in ({"messages": [*chat, assistant("b")]}, {"prompt": chat, "response": "b"}):
        got = pair_of(tokenizer, jsonl([form | own, form | bare]), **settings)
        assert got == [(of_row, "b<eos>"), (of_settings, "b<eos>")]
    pair = {"prompt": chat, "chosen": "b", "rejected": "c"}
    whole = {"chosen": [*chat, assistant("b")], "rejected": [*chat, assistant("c")]}
    for form in (pair, whole):
        got = preferred(tokenizer, jsonl([form | own, form | bare]), **settings)
        assert got == [(before + "b<eos>", before + "c<eos>") for before in (of_row, of_settings)]


def test_tools_in_other_columns_and_none(jsonl, tokenizer):
    row = {"prompt": [user("hi")], "tools": "hammer", "functions": [TOOL]}
    with pytest.raises(UserError, match=r"rows.jsonl:1: the text of field 'tools' is not JSON"):
        prompt_of(tokenizer, jsonl([row]))
    assert prompt_of(tokenizer, jsonl([row]), tools_field="functions") == [
        rendered(tokenizer, [user("hi")], tools=[TOOL], add_generation_prompt=True)
    ]
    assert "<tools>" not in prompt_of(tokenizer, jsonl([row | {"tools": []}]), tools=[TOOL])[0]  # the row's none wins
    assert "<tools>" not in prompt_of(tokenizer, jsonl([row]), tools_field="")[0]
    assert prompt_of(tokenizer, jsonl([row | {"prompt": "hi"}])) == ["hi"]  # a text has no tools


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"tools": ["f"]}, "field 'tools' must be a list of tool objects"),
        ({"tools": 3}, "(or this list as JSON text), not the number 3"),
        ({"chat_template_kwargs": [1]}, "field 'chat_template_kwargs' must be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize is set by the stage"),
    ],
)
def test_arguments_that_cannot_be_used(jsonl, tokenizer, columns, part):
    with pytest.raises(UserError, match=r"rows.jsonl:1: ") as caught:
        prompt_of(tokenizer, jsonl([{"prompt": [user("hi")]} | columns]))
    assert part in str(caught.value)
    with pytest.raises(ValueError, match="add_generation_prompt is set by the stage"):
        PromptsConfig(path="x", chat_template_kwargs={"add_generation_prompt": False})


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_the_refusal_says_how_to_name_no_column(jsonl, tokenizer, column):
    with pytest.raises(UserError) as caught:
        prompt_of(tokenizer, jsonl([{"prompt": [user("hi")], column: 3}]))
    assert str(caught.value).endswith(f"set {column}_field to another column, or to '' for no column")


def test_columns_that_hold_none(jsonl, tokenizer):
    chat = [user("hi")]
    bare = rendered(tokenizer, chat, add_generation_prompt=True)
    of_settings = rendered(tokenizer, chat, tools=[TOOL], add_generation_prompt=True, **SWITCH)
    settings = {"tools": [TOOL], "chat_template_kwargs": SWITCH}
    absent = jsonl([{"prompt": chat, "tools": none, "chat_template_kwargs": none} for none in (None, "", " ", "null")])
    assert prompt_of(tokenizer, absent) == [bare] * 4
    assert prompt_of(tokenizer, absent, **settings) == [of_settings] * 4
    none = {"prompt": chat, "tools": [], "chat_template_kwargs": {}}
    empty = jsonl([none, none | {"tools": "[]", "chat_template_kwargs": "{}"}])
    assert prompt_of(tokenizer, empty) == [bare] * 2
    # An empty list is the row's own; an object without arguments overrides none.
    switched = rendered(tokenizer, chat, add_generation_prompt=True, **SWITCH)
    assert prompt_of(tokenizer, empty, **settings) == [switched] * 2


def test_tools_as_a_list_of_json_texts(jsonl, tokenizer):
    path = jsonl([{"prompt": [user("hi")], "tools": [json.dumps(TOOL), json.dumps(OTHER_TOOL)]}])
    assert prompt_of(tokenizer, path) == [
        rendered(tokenizer, [user("hi")], tools=[TOOL, OTHER_TOOL], add_generation_prompt=True)
    ]


def test_columns_beside_prompts_of_text_are_said(jsonl, tokenizer):
    own = {"tools": [TOOL], "chat_template_kwargs": json.dumps(SWITCH)}
    none = {"tools": "[]", "chat_template_kwargs": {}}

    def said(columns, prompt):
        answers = {"response": "b", "chosen": "b", "rejected": "c"}
        path = jsonl([{"prompt": prompt} | answers | columns])
        return [
            str(load_prompts(PromptsConfig(path=path), tokenizer, 512, "stop").report),
            str(load_demonstrations(DemonstrationsConfig(path=path), tokenizer, 512, "stop")[1]),
            str(load_preferences(PreferencesConfig(path=path), tokenizer, 512, "stop")[1]),
        ]

    for report in said(own, "hi"):
        assert report.endswith("1 of 1 rows, text prompts ignore chat_template_kwargs and tools")
    for report in (*said(own, [user("hi")]), *said(none, "hi"), *said({}, "hi")):
        assert "ignore" not in report


def test_what_the_template_ignores_is_said(jsonl, tokenizer):
    def said(using, **columns):
        path = jsonl([{"prompt": [user("hi")]} | columns])
        return str(load_prompts(PromptsConfig(path=path), using, 512, "stop").report)

    plain = characters("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    assert said(plain, tools=[TOOL], chat_template_kwargs={"enable_thinkng": 1}).endswith(
        "1 of 1 rows, the chat template ignores enable_thinkng and tools"
    )
    for report in (said(plain), said(tokenizer, tools=[TOOL], chat_template_kwargs=SWITCH)):
        assert "the chat template ignores" not in report


def test_nulls_of_tables_are_not_rendered(jsonl, tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "g", "parameters": {"properties": {"day": {"enum": ["a", None]}}}}},
    ]
    chat = [
        user("hi"), assistant(None, tool_calls=[call("f", {"city": "Rome"}), call("g", {"day": "Monday"})]),
        {"role": "tool", "content": "1", "name": "f"},
    ]  # fmt: skip
    row = {"prompt": chat, "tools": tools}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    stored = parquet.read_table(tmp_path / "rows.parquet").to_pylist()[0]
    assert stored != row and stored["prompt"][1]["tool_calls"][0]["function"]["arguments"]["day"] is None
    want = rendered(tokenizer, chat, tools=tools, add_generation_prompt=True)
    assert prompt_of(tokenizer, str(tmp_path / "rows.parquet")) == prompt_of(tokenizer, jsonl([row])) == [want]


# ---------------------------------------------------------------- forms of messages


def test_content_that_is_null_beside_calls(tokenizer):
    chat = [user("hi"), assistant(None, tool_calls=[call()]), {"role": "tool", "content": "1"}]
    assert tokenizer.chats.prompt_text(chat, "") == rendered(tokenizer, chat, add_generation_prompt=True)
    written = "{% for m in messages %}{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    ends = "{% endfor %}{{ '<eos>' }}{% endfor %}"
    assert characters(written + ends).chats.whole_text(chat, "") == "userhi<eos>assistantf<eos>tool1<eos>"
    # DeepSeek's: text where content is not none, so that a message without it fails.
    asks = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.role + m.content }}{% endif %}{% endfor %}"
    )
    assert characters(asks).chats.whole_text(chat, "") == "userhiftool1"
    # A template that knows no calls would lose them.
    knows_none = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"x:1: the chat template of .* refuses this chat: .*no attribute 'content'"):
        characters(knows_none).chats.whole_text(chat, "x:1: ")


def test_arguments_of_calls_as_objects_and_as_text(tokenizer):
    objects, texts = ([user("hi"), assistant(None, tool_calls=[call("f", a)])] for a in ({"é": 1}, '{"é": 1}'))
    assert tokenizer.chats.whole_text(texts, "") == rendered(tokenizer, objects)
    adds = (
        "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    for chat in (objects, texts):
        assert characters(adds).chats.whole_text(chat, "") == 'userassistantf {"é": 1}'
    odd = [user("hi"), assistant(None, tool_calls=[call("f", "not JSON")])]
    assert '"arguments": "not JSON"' in tokenizer.chats.whole_text(odd, "")


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


PARTS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ '<eos>' }}{% endfor %}"
)
ONLY_PARTS = (
    "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("refuses_system", [False, True])
def test_content_in_parts(tokenizer, jsonl, refuses_system):
    chat, text = [user(parts("a ", " b"))], [user("a  b")]
    joined = rendered(tokenizer, text, add_generation_prompt=True)
    assert prompt_of(tokenizer, jsonl([{"messages": chat}, {"messages": text}])) == [joined, joined]
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" * refuses_system
    takes = characters(strict + PARTS)
    assert takes.chats.prompt_text(chat, "") == rendered(takes, chat) == "user:ab<eos>"
    assert takes.chats.prompt_text(text, "") == rendered(takes, text) == "user:a  b<eos>"
    wants = characters(strict + ONLY_PARTS)
    assert wants.chats.prompt_text(chat, "") == wants.chats.prompt_text(text, "") == "user:a  b"


def test_a_template_that_reads_the_first_part_only_gets_one_text():
    """As Mistral Small's does in a system message."""
    first = PARTS.replace("in m.content %}", "in m.content[:1] %}")
    assert characters(first).chats.prompt_text([user(parts("a ", " b"))], "") == "user:a  b<eos>"


# ---------------------------------------------------------------- the assistant's beginning


def test_a_prompt_that_ends_with_the_assistants_beginning_is_continued(jsonl, tokenizer):
    beginning, rest, other = "<think>Let me see", " that</think>4", "</think>5"
    chat = [user("2+2?"), assistant(beginning)]
    before = rendered(tokenizer, chat, continue_final_message=True)
    whole, worse = (rendered(tokenizer, [chat[0], assistant(beginning + text)]) for text in (rest, other))
    assert before == whole[: len(before)]
    assert prompt_of(tokenizer, jsonl([{"prompt": chat}])) == [before]
    for answer in (rest, assistant(rest), [assistant(rest)]):
        assert pair_of(tokenizer, jsonl([{"prompt": chat, "response": answer}])) == [(before, rest + "<eos>")]
    for chosen, rejected in ((rest, other), ([assistant(rest)], [assistant(other)])):
        got = preferred(tokenizer, jsonl([{"prompt": chat, "chosen": chosen, "rejected": rejected}]))
        assert got == [(whole.strip(), worse.strip())]
    # In a chat, a last answer is what is to be written: it is left out of prompts, and learnt.
    opened = rendered(tokenizer, chat[:1], add_generation_prompt=True)
    assert prompt_of(tokenizer, jsonl([{"messages": chat}])) == [opened]
    assert pair_of(tokenizer, jsonl([{"messages": chat}])) == [(opened, beginning + "<eos>")]
    # Two turns in a row stay two there.
    twice = [*chat, assistant("4")]
    (got,) = pair_of(tokenizer, jsonl([{"messages": twice}]))
    assert "".join(got) == rendered(tokenizer, twice).strip()


# A header that ends with blanks, and content without those around it, as Llama 3's.
HEADERS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("nothing", ["", " \n", [{"type": "text", "text": ""}]])
def test_an_empty_beginning_is_left_out(jsonl, nothing):
    headers = characters(HEADERS)
    chat = [user("hi"), assistant(nothing)]
    before = rendered(headers, chat[:1], add_generation_prompt=True)
    assert prompt_of(headers, jsonl([{"prompt": chat}])) == [before]
    assert headers.chats.prompt_text(chat, "") == before
    assert pair_of(headers, jsonl([{"prompt": chat, "response": "b"}])) == [(before, "b<eos>")]
    for chosen, rejected in (("b", "c"), ([*chat[:1], assistant("b")], [*chat[:1], assistant("c")])):
        got = preferred(headers, jsonl([{"prompt": chat, "chosen": chosen, "rejected": rejected}]))
        assert got == [(before + "b<eos>", before + "c<eos>")]
    assert as_chat([user("hi"), assistant("a"), assistant(nothing)]) == as_chat([user("hi"), assistant("a")])
    thought = [user("hi"), assistant(nothing, reasoning_content="so")]
    assert as_chat(thought).messages == thought
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat has no message before the response"):
        prompt_of(headers, jsonl([{"prompt": chat[1:]}]))
    with pytest.raises(UserError, match=r"rows.jsonl:1: the prompt ends with a tool call"):
        prompt_of(headers, jsonl([{"prompt": [user("hi"), assistant(nothing, tool_calls=[call()])]}]))


def test_beginnings_that_cannot_be_continued(tokenizer):
    called = [user("hi"), assistant(None, tool_calls=[call()])]
    with pytest.raises(UserError, match=r"x:1: the prompt ends with a tool call of the assistant; a message of"):
        list(tokenizer.encode_prompts([called], ["x:1"]))
    drops = characters("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    with pytest.raises(UserError, match=r"x:1: the chat template of characters refuses this chat: .*continue"):
        list(drops.encode_prompts([[user("hi"), assistant("a</think>")]], ["x:1"]))


def test_a_chat_followed_by_an_answer():
    chat = as_chat([user("a"), assistant("b", name="x")])
    assert chat.continued and chat.followed_by("c").messages == [user("a"), assistant("bc", name="x")]
    assert not Chat(chat.messages).continued
    assert Chat(chat.messages).followed_by("c").messages == [*chat.messages, assistant("c")]
    several = chat.followed_by([assistant(parts("c")), user("d"), assistant("e")])
    assert several == Chat([user("a"), assistant("bc", name="x"), user("d"), assistant("e")])


# ---------------------------------------------------------------- prompt and answer apart


THINKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def test_an_answer_behind_an_opening_that_begins_it(tokenizer):
    """As DeepSeek R1's: the prompt ends with <think>, which finished turns do not have."""
    thinks = characters(THINKS)
    for answer in ("<think>\nso</think>b", "<think>so</think>b", "so</think>b"):
        assert thinks.chats.pair_texts([user("a")], answer, "") == (
            "<|user|>a<eos><|assistant|><think>\n",
            "so</think>b",
        )
    assert thinks.chats.pair_texts([user("a")], "b", "")[1] == "b"


def test_pairs_that_cannot_be_told_apart_are_refused(tokenizer):
    several = [assistant("b"), user("c"), assistant("d")]
    before, after = tokenizer.chats.pair_texts([user("a")], several, "")
    assert before + after == rendered(tokenizer, [user("a"), *several])
    with pytest.raises(UserError, match=r"x:1: .*if the response has several turns"):
        characters(THINKS).chats.pair_texts([user("a")], several, "x:1: ")
    with pytest.raises(UserError, match=r"x:1: the response begins with a turn of user; its first turn must"):
        tokenizer.chats.pair_texts([user("a")], several[1:], "x:1: ")


# ---------------------------------------------------------------- templates that do not compile


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("overflow", ["stop", "drop"])
def test_a_template_that_does_not_compile_is_refused_once(jsonl, overflow, timed):
    broken = characters("{{ strftime_now('%Y') }}\n{% for m in messages %}{{ m.content }}{% endfr %}")
    broken.chats.time = datetime.datetime(2020, 1, 1) if timed else None
    texts = {"prompt": "hi", "response": "b", "chosen": "b", "rejected": "c"}
    loaders = (
        (load_prompts, PromptsConfig),
        (load_demonstrations, DemonstrationsConfig),
        (load_preferences, PreferencesConfig),
    )
    for load, config in loaders:
        path = jsonl([texts | {"prompt": [user("hi")]}] * 2)
        with pytest.raises(UserError) as caught:
            load(config(path=path), broken, 512, overflow)
        message = str(caught.value)
        assert message.startswith("characters: line 2 of the chat template does not compile: "), message
        assert "endfr" in message and "\n" not in message and "rows.jsonl" not in message
        load(config(path=jsonl([texts] * 2)), broken, 512, overflow)  # texts need no template
    with pytest.raises(UserError, match=r"characters: line .* of the chat template does not compile"):
        list(broken.encode_chats([[user("hi")]]))
    assert not broken.for_model(broken.vocab_size, []).notes  # nothing is said of how it ends answers


# ---------------------------------------------------------------- the clock


DATED = (
    "{%- set format = '%d %b %Y' %}\n{{- 'Today: ' + strftime_now(format) + strftime_now(' %-d.%-m. %H:%M %%')}}\n"
    + TOOLS
)


def test_the_clock_stands_still_where_a_time_is_set(monkeypatch):
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 9, cls.day, 8, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    dated, chat = characters(DATED), [user("hi")]
    first = rendered(dated, chat, add_generation_prompt=True)
    assert first.startswith("Today: 01 Sep 2026 1.9. 08:05 %\n<|user|>") and dated.chats.uses_time
    assert dated.chats.prompt_text(chat, "") == first
    dated.chats.time = began = dated.chats.now()
    assert began == Clock(2026, 9, 1, 8, 5)
    Clock.day = 12
    assert rendered(dated, chat, add_generation_prompt=True) != first
    assert dated.chats.prompt_text(chat, "") == first and dated.chats.now().day == 12
    dated.chats.time = None
    assert dated.chats.prompt_text(chat, "").startswith("Today: 12 Sep 2026 12.9.")
    plain = characters(TOOLS)
    assert not plain.chats.uses_time
