"""Templates of rows: they write prompts and responses from columns, with solved examples."""

import pytest
from pydantic import ValidationError

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig
from jaxrlhf.data import templates
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.sources import read_rows
from jaxrlhf.errors import SharedFault, UserError

ROWS = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}, {"text": "d", "label": 1}]


def written(path, **settings):
    config = PromptsConfig(path=path, **settings)
    return templates.template_writer(config)(read_rows(config))


def test_a_text_template_writes_the_prompt_and_keeps_the_columns(jsonl, words):
    config = PromptsConfig(path=jsonl(ROWS), template="b {{ text }}\n{% if label %}\nd\n{% endif %}")
    prompts = load_prompts(config, words, 16, "stop")
    assert prompts.texts == ["b a b\n", "b c\nd\n", "b d\nd\n"]
    assert prompts.columns == ROWS
    assert [ids.tolist() for ids in prompts.ids] == [words.encode_prompt(text) for text in prompts.texts]


def test_messages_make_a_chat(jsonl, chat):
    template = [{"role": "system", "content": "b"}, {"role": "user", "content": "{{ text }}"}]
    prompts = load_prompts(PromptsConfig(path=jsonl(ROWS), messages_template=template), chat, 32, "stop")
    want = [{"role": "system", "content": "b"}, {"role": "user", "content": "a b"}]
    assert prompts.chats[0] == Chat(want)
    assert prompts.ids[0].tolist() == chat.encode_prompt(want)


def test_demonstrations_and_preferences(jsonl, words):
    names = "{{ ['c', 'd d'][label] }}"
    config = DemonstrationsConfig(path=jsonl(ROWS), template="b {{ text }}", response_template=names)
    examples, _ = load_demonstrations(config, words, 16, "stop")
    plain = [{"prompt": f"b {row['text']}", "response": ["c", "d d"][row["label"]]} for row in ROWS]
    wanted, _ = load_demonstrations(DemonstrationsConfig(path=jsonl(plain)), words, 16, "stop")
    for example, want in zip(examples, wanted, strict=True):
        assert example.prompt_ids.tolist() == want.prompt_ids.tolist()
        assert example.response_ids.tolist() == want.response_ids.tolist()
    pairs = [row | {"chosen": "c", "rejected": "d"} for row in ROWS]
    found, _ = load_preferences(PreferencesConfig(path=jsonl(pairs), template="b {{ text }}"), words, 16, "stop")
    pairs = [{"prompt": f"b {row['text']}", "chosen": "c", "rejected": "d"} for row in ROWS]
    wanted, _ = load_preferences(PreferencesConfig(path=jsonl(pairs)), words, 16, "stop")
    assert [pair.chosen_ids.tolist() for pair in found] == [pair.chosen_ids.tolist() for pair in wanted]


def test_shots_leave_out_the_row_itself(jsonl):
    path = jsonl(ROWS)
    template = "{% for shot in shots %}{{ shot.text }}={{ shot.label }} {% endfor %}{{ text }}="
    rows = written(path, template=template, shots={"path": path, "count": 2})
    assert [row.values["prompt"] for row in rows] == ["c=1 d=1 a b=", "a b=0 d=1 c=", "a b=0 c=1 d="]
    drawn = [written(path, template=template, shots={"path": path, "count": 1, "choose": "random", "seed": seed})
             for seed in range(20)]  # fmt: skip
    firsts = {row[0].values["prompt"] for row in drawn}
    assert firsts == {"c=1 a b=", "d=1 a b="}
    again = written(path, template=template, shots={"path": path, "count": 1, "choose": "random", "seed": 3})
    assert [row.values for row in again] == [row.values for row in drawn[3]]
    with pytest.raises(UserError, match=r"shots.count is 3, but the source has only 2 examples .*rows.jsonl:1;"):
        written(path, template=template, shots={"path": path, "count": 3})
    with pytest.raises(UserError, match=r"rows.jsonl:1: the column 'shots' has the name"):
        written(jsonl([{"shots": 1}, {"shots": 2}]), template="a", shots={"path": path, "count": 1})


def test_a_template_that_fails_names_the_row(jsonl, words):
    path = jsonl([ROWS[0], {"label": 1}, {"text": 3}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: the template of field 'prompt' fails: 'text' is undefined; .*"):
        written(path, template="{{ text }}")
    with pytest.raises(UserError, match=r"other.jsonl:3: the template of field 'prompt' fails: .*'upper'"):
        written(jsonl([ROWS[0], ROWS[1], {"text": 3}], "other.jsonl"), template="{{ text.upper() }}")
    config = PromptsConfig(path=path, template="{{ text }}", unusable="drop")
    prompts = load_prompts(config, words, 16, "stop")
    assert prompts.texts == ["a b", "3"]
    assert "1 dropped (the template of field 'prompt' fails: 'text' is undefined; first" in str(prompts.report)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the template of field 'prompt' fails"):
        load_prompts(PromptsConfig(path=path, template="{{ no }}", unusable="drop"), words, 16, "stop")


def test_a_template_that_is_no_jinja(jsonl):
    with pytest.raises(UserError, match=r"rows.jsonl: template, line 2: not valid jinja \("):
        written(jsonl(ROWS), template="a\n{{ text")
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "{% if %}"}]
    with pytest.raises(UserError, match=r"rows.jsonl: messages_template, message 2, line 1: not valid jinja"):
        written(jsonl(ROWS), messages_template=messages)


def test_a_template_cannot_reach_python(jsonl):
    with pytest.raises(UserError, match=r"access to attribute '__class__' of 'str' object is unsafe"):
        written(jsonl(ROWS), template="{{ text.__class__.__mro__ }}")
    with pytest.raises(UserError, match=r"rows.jsonl:1: the template of field 'prompt' fails"):
        written(jsonl([{"items": [1]}]), template="{{ items.append(2) }}")


def test_an_endless_template_stops(jsonl, monkeypatch):
    monkeypatch.setattr(templates, "TIME_LIMIT", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(SharedFault, match=r"rows.jsonl:1: the template took more than 0.3 seconds for 3 rows"):
        written(jsonl(ROWS), template=loops)


@pytest.mark.parametrize("writer", [{"template": "a"}, {"messages_template": [{"role": "user", "content": "a"}]}])
@pytest.mark.parametrize("kind", [DemonstrationsConfig, PreferencesConfig, PromptsConfig])
def test_settings_with_every_field_are_read_again(kind, writer):
    """As `evaluate` and `generate` read the config.yaml of a run."""
    source = kind(path="rows.jsonl", **writer)
    assert kind.model_validate(source.model_dump()) == source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"messages_template": [{"role": "user", "text": "a"}]}, r"message 1 must have exactly the keys role and"),
        ({"messages_template": []}, "at least 1 item"),
        ({"template": "a", "text_field": "body"}, "template and text_field each give the prompt; give one of them"),
        ({"template": "a", "messages_template": [{"role": "user", "content": "a"}]}, "each give the prompt"),
        ({"shots": {"path": "x.jsonl"}}, "shots has no effect without a template"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptsConfig(path="rows.jsonl", **settings)
