"""`data check` finds each planted fault and only it, names the row, and is silent about clean files."""

import json
from pathlib import Path

import pytest
from broken import BROKEN, CLEAN, classification, demonstrations, jsonl, one_word, preferences

from jaxrlhf.__main__ import main
from jaxrlhf.cli import data
from jaxrlhf.curation.check import FAULTS, check
from jaxrlhf.curation.convert import FORMATS
from jaxrlhf.curation.reading import KINDS
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.errors import UserError

FILES = Path(__file__).parents[1] / "data" / "files"


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_in_a_clean_file(tmp_path, name):
    (tmp_path / name).write_bytes(CLEAN[name])
    report = check(str(tmp_path / name))
    assert report.faults == {} and report.rows == report.usable == (6 if name == "languages.jsonl" else 60)
    assert report.kind == {"windows": "demonstrations", "languages": "demonstrations", "answers": "demonstrations",
                           "instruction": "classification"}.get(name.split(".")[0], name.split(".")[0])  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_planted_fault_is_found_and_no_other(tmp_path, name):
    content, code, rows, place = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    report = check(str(tmp_path / name))
    assert list(report.faults) == [code], str(report)
    assert report.faults[code].rows == rows and place in report.faults[code].first[0], str(report)


def test_every_fault_is_planted_here():
    planted = {code for _, code, _, _ in BROKEN.values()} | {"too_long", "leak", "near_leak"}
    assert planted == set(FAULTS)


def test_long_rows_are_those_that_the_stages_would_cut(tmp_path):
    tokenizer = load_tokenizer(str(FILES / "stories260K"))
    rows = [{"prompt": "the cat", "response": " sat" * count} for count in (1, 5, 9)]
    sizes = [sum(map(len, tokenizer.encode_pair(row["prompt"], row["response"]))) for row in rows]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    report = check(str(tmp_path / "a.jsonl"), tokenizer=tokenizer, max_tokens=sizes[1])
    assert report.lengths["tokens"] == {"median": sizes[1], "p95": sizes[2], "longest": sizes[2]}
    assert report.faults["too_long"].first == [f"a.jsonl:3: {sizes[2]} tokens"] and len(report.faults) == 1


def test_leaks_between_two_files(tmp_path):
    train, test = demonstrations(60), demonstrations(70)[60:]
    (tmp_path / "train.jsonl").write_bytes(jsonl(train))
    (tmp_path / "test.jsonl").write_bytes(jsonl(test))
    (tmp_path / "other.jsonl").write_bytes(jsonl([{"prompt": "no row of the other"}]))
    files = [str(tmp_path / name) for name in ("train.jsonl", "test.jsonl", "other.jsonl")]
    assert check(files[0], against=files[1:]).faults == {}
    test[3] |= {"prompt": train[7]["prompt"]}
    test[5] |= {"prompt": one_word(train[9]["prompt"], 0)}
    (tmp_path / "test.jsonl").write_bytes(jsonl(test))
    faults = check(files[0], against=files[1:]).faults
    assert faults["leak"].first == ["test.jsonl:4: as train.jsonl:8"]
    assert faults["near_leak"].first == ["test.jsonl:6: nearly as train.jsonl:10"] and len(faults) == 2


def test_responses_that_repeat_are_labels(tmp_path):
    rows = [{"prompt": row["text"], "response": row["label"]} for row in classification()]
    rows[40] = {"prompt": rows[10]["prompt"], "response": "good"}
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    report = check(str(tmp_path / "a.jsonl"))
    assert report.labels == {"good": 21, "bad": 19, "neither": 20} and set(report.faults) == {"conflicting_labels"}


def test_the_shipped_files_have_their_known_faults_alone():
    settings = ["prompt_field=question", "response_field=answer"]
    train, test = (str(FILES / "gsm8k" / f"{name}.jsonl") for name in ("train", "test"))
    assert check(train, settings=settings, against=[test]).faults == {}
    assert check(str(FILES / "tinystories.jsonl")).faults == {}
    faults = check(str(FILES / "preferences.jsonl")).faults
    assert list(faults) == ["same_responses"] and faults["same_responses"].rows == 2


def test_the_command_says_it_by_its_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("clean.jsonl").write_bytes(jsonl(preferences()))
    Path("broken.jsonl").write_bytes(BROKEN["opposite.jsonl"][0])
    assert main(["data", "check", "clean.jsonl"]) == 0
    assert "60 rows of preferences, 60 usable" in capsys.readouterr().out
    assert main(["data", "check", "broken.jsonl", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [(fault["code"], fault["rows"]) for fault in shown["faults"]] == [("conflicting_preferences", 1)]
    for arguments, message in (
        (["check", "none.jsonl"], "none.jsonl: no such file"),
        (["check", "clean.jsonl", "--max-tokens", "3"], "--max-tokens: needs --tokenizer"),
        (["check", "clean.jsonl", "chosen_filed=a"], "must have the form SETTING=VALUE"),
        (["chek", "clean.jsonl"], "invalid choice: 'chek'"),
    ):
        assert main(["data", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_command_offers_every_kind_and_format():
    assert set(data.KINDS) == set(KINDS) and set(data.FORMATS) == set(FORMATS)


def test_a_row_of_no_kind_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"question": "a", "answer": "b"}]))
    with pytest.raises(UserError, match="the fields of no kind of data; its fields are: question, answer; name the"):
        check(str(tmp_path / "a.jsonl"))


def test_a_file_without_a_row_that_can_be_read_and_a_field_that_no_row_has(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "caf\xe9", "response": "b"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a.jsonl:1: not UTF-8.*; no row of the file can be read"):
        check(str(path))
    path.write_bytes(jsonl([{"prompt": "a", "response": "b", "label": "c"}]))
    with pytest.raises(UserError, match=r"label_field: none of the first 1 rows has the field .labels.; the"):
        check(str(path), settings=["label_field=labels"])
