"""`data convert`: rows of each format become rows that the stages read; faults name file and line."""
# ruff: noqa: E501  (one faulty row a line)

import json
import math

import pytest
from broken import jsonl

from jaxrlhf.__main__ import main
from jaxrlhf.curation.convert import FORMATS, convert
from jaxrlhf.curation.reading import open_source
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.library import entity_f1
from jaxrlhf.rewards.structured import span_f1


def turn(role, content):
    return {"role": role, "content": content}


HH = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: A joke?\n\nAssistant:"
ASKED = [turn("user", "Hello"), turn("assistant", "Hi!"), turn("user", "A joke?")]
ULTRA = {"instruction": "Why?", "completions": [{"response": r, "overall_score": s} for r, s in (("a", 2), ("b", 5), ("c", 1))]}
CONLL = "-DOCSTART- -X- O O\n\nJohn NNP I-NP B-PER\nSmith NNP I-NP I-PER\nsaw VBD O O\nNew NNP I-NP I-LOC\nYork NNP I-NP I-LOC\n\nyes UH O O\n"
# format -> (input, kind of the result, rows of the result)
GOOD = {
    "hh-rlhf": (
        jsonl([{"chosen": HH + " Yes.", "rejected": HH + " No."}]), "preferences",
        [{"prompt": ASKED, "chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "No.")]}],
    ),
    "ultrafeedback": (
        jsonl([ULTRA, {"chosen": [*ASKED, turn("assistant", "y")], "rejected": [*ASKED, turn("assistant", "n")],
                       "score_chosen": 8.0, "score_rejected": 6.5}]), "preferences",
        [{"prompt": [turn("user", "Why?")], "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")],
          "margin": 4.0},
         {"prompt": ASKED, "chosen": [turn("assistant", "y")], "rejected": [turn("assistant", "n")], "margin": 1.5}],
    ),
    "scored": (
        jsonl([{"prompt": p, "completions": [{"response": r, "role": "sft", "score": s} for r, s in (("a", 0), ("b", 1))]}
               for p in ("Why?", ASKED)]), "preferences",
        [{"prompt": "Why?", "chosen": "b", "rejected": "a", "margin": 1.0},
         {"prompt": ASKED, "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "a")], "margin": 1.0}],
    ),
    "alpaca": (
        jsonl([{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho",
               "system": "Be brief", "history": [["a", "b"]]}]), "chats",
        [{"messages": [turn("user", "Add\n\n1 2"), turn("assistant", "3")]},
         {"messages": [turn("system", "Be brief"), turn("user", "a"), turn("assistant", "b"), turn("user", "Hi"),
                       turn("assistant", "Ho")]}],
    ),
    "sharegpt": (
        jsonl([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                  {"from": "human", "value": "bye"}]}]), "chats",
        [{"messages": [turn("user", "a"), turn("assistant", "b")]}],
    ),
    "conll": (
        CONLL.encode(), "demonstrations",
        [{"prompt": "John Smith saw New York", "response": "PER: John Smith\nLOC: New York",
          "entities": [{"type": "PER", "text": "John Smith"}, {"type": "LOC", "text": "New York"}],
          "tokens": ["John", "Smith", "saw", "New", "York"], "tags": ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]},
         {"prompt": "yes", "response": "none", "entities": [], "tokens": ["yes"], "tags": ["O"]}],
    ),
    "csv": (
        b'question,answer,id\n"a ""b""\nc",d,7\ne,f,\n', "demonstrations",
        [{"prompt": 'a "b"\nc', "response": "d", "id": "7"}, {"prompt": "e", "response": "f"}],
    ),
}  # fmt: skip
COLUMNS = {"prompt": "question", "response": "answer"}
NAMES = {"conll": "a.txt", "csv": "a.csv"}


def converted(tmp_path, form, data, **options):
    path = tmp_path / NAMES.get(form, "a.jsonl")
    path.write_bytes(data)
    columns = COLUMNS if form == "csv" else None
    convert(str(path), str(tmp_path / "out.jsonl"), form, columns=columns, **options)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_become_rows_that_a_stage_reads(tmp_path, form):
    data, kind, rows = GOOD[form]
    assert converted(tmp_path, form, data) == rows
    source = open_source(str(tmp_path / "out.jsonl"))
    assert source.kind == kind and len([source.read(row) for row in source.rows]) == len(rows)


def test_entities_are_those_of_the_reward(tmp_path):
    rows = converted(tmp_path, "conll", GOOD["conll"][0])
    assert span_f1([row["response"] for row in rows], entities=[row["entities"] for row in rows]) == [1.0, 1.0]


def test_adjacent_entities_and_other_schemes():
    tags = ["B-PER", "B-PER", "I-PER", "E-PER", "S-LOC", "I-LOC", "L-LOC", "U-ORG"]
    row = FORMATS["conll"](open_row(tokens=list("abcdefgh"), tags=tags))
    entities = row["entities"]
    for wanted in (entities, row["tags"]):
        assert entity_f1([row["response"]], [wanted], [row["tokens"]]) == [1.0]
    assert row["tags"] == ["B-PER", "B-PER", "I-PER", "I-PER", "B-LOC", "B-LOC", "I-LOC", "B-ORG"]
    assert [(e["type"], e["text"]) for e in entities] == [
        ("PER", "a"), ("PER", "b c d"), ("LOC", "e"), ("LOC", "f g"), ("ORG", "h")
    ]  # fmt: skip


def open_row(**values):
    from jaxrlhf.data.sources import Row

    return Row(values, "a:1")


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("hh-rlhf", {"chosen": HH + " a", "rejected": "\n\nHuman: b\n\nAssistant: c"}, "the same dialogue up to the last turn"),
        ("hh-rlhf", {"chosen": "hello", "rejected": HH + " a"}, "field 'chosen' must be turns"),
        ("hh-rlhf", {"chosen": HH, "rejected": HH + " a"}, "field 'chosen' ends with an empty turn"),
        ("ultrafeedback", {"instruction": "a", "completions": ULTRA["completions"][:1]}, "two completions with different"),
        ("ultrafeedback", {"instruction": "a", "completions": [{"response": "b"}]}, "completion 1 must have a `response`"),
        ("scored", {"prompt": "a", "completions": [{"response": "b", "score": None}]}, "completion 1 must have a `response` and a finite number `score`"),
        ("scored", {"prompt": "a", "completions": [{"response": x, "score": y} for x, y in (("b", 1), ("c", math.nan))]}, "completion 2 must have"),
        ("alpaca", {"instruction": "a", "output": ""}, "field 'output' is empty"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "turn 1 must have a text `value`"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}, "no answer to a turn of the user"),
    ],
)  # fmt: skip
def test_a_faulty_row_stops_with_its_line_or_is_dropped(tmp_path, form, row, message):
    data = GOOD[form][0] + jsonl([row])
    line = data.count(b"\n")
    with pytest.raises(UserError, match=message) as caught:
        converted(tmp_path, form, data)
    assert f"a.jsonl:{line}: " in str(caught.value) and not (tmp_path / "out.jsonl").exists()
    assert converted(tmp_path, form, data, drop=True) == GOOD[form][2]


def test_a_faulty_line_of_conll_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(CONLL + "\nlonely\n")
    assert main(["data", "convert", "a.txt", "--from", "conll", "--out", "b.jsonl"]) == 2
    assert "a.txt:11: must be a token and a tag" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text(CONLL)
    assert main(["data", "convert", "a.txt", "--from", "conll", "--out", "b.jsonl"]) == 0
    assert "a.txt: 2 of 2 rows" in capsys.readouterr().out
