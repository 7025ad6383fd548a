"""`data clean`: what it writes has no fault that it removes, and every other row stays as it was."""

import json
from pathlib import Path

import pytest
from broken import BROKEN, CLEAN, demonstrations, jsonl, preferences

from jaxrlhf.__main__ import main
from jaxrlhf.curation.check import check
from jaxrlhf.curation.clean import clean
from jaxrlhf.curation.reading import open_source
from jaxrlhf.errors import UserError

STAYS = {"conflicting_preferences", "conflicting_labels", "label_spelling", "label_balance", "mojibake",
         "replacement_characters", "empty_prompt"}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_cleaned_file_has_no_fault(tmp_path, name):
    data, code, rows, _ = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    result = clean(str(tmp_path / name), str(tmp_path / "out.jsonl"), near=True)
    assert list(check(str(tmp_path / "out.jsonl")).faults) == [code] * (code in STAYS)
    assert result.report.kept + result.changed >= result.report.rows - rows
    assert result.report.kept == check(str(tmp_path / "out.jsonl")).rows


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_file_keeps_its_rows(tmp_path, name):
    (tmp_path / name).write_bytes(CLEAN[name])
    clean(str(tmp_path / name), str(tmp_path / "out.jsonl"), near=True)
    before, after = (open_source(str(tmp_path / file)).rows for file in (name, "out.jsonl"))
    assert [row.values for row in before] == [row.values for row in after]


def test_texts_are_normal_at_every_depth(tmp_path):
    row = {"messages": [{"role": "user", "content": "cafe\u0301\r\nx\x00"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "a.jsonl").write_bytes(jsonl([row | {"tags": ["z\u200dz\u0007"], "count": 3}]))
    result = clean(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    (cleaned,) = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
    assert cleaned["messages"][0]["content"] == "café\nx" and result.changed == 1
    assert cleaned["tags"] == ["z\u200dz"] and cleaned["count"] == 3


def test_lengths_and_reasons(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "p" * n, "response": "r"} for n in (1, 5, 9)] + [{"prompt": "p", "response": "r"}]
    Path("a.jsonl").write_bytes(jsonl(rows))
    assert main(["data", "clean", "a.jsonl", "--out", "b.jsonl", "--min-chars", "3", "--max-chars", "6"]) == 0
    assert [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()] == [rows[1]]
    shown = capsys.readouterr().out
    assert "kept 1 of 4 rows, 0 of them changed" in shown
    for reason in ("fewer than 3 characters", "more than 6 characters", "equal to an earlier row"):
        assert f"1  dropped: {reason}" in shown


def test_the_input_is_replaced_only_if_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([*demonstrations(5), *demonstrations(5)]))
    with pytest.raises(UserError, match="the file exists"):
        clean(str(path), str(path))
    clean(str(path), str(path), overwrite=True)
    assert path.read_bytes() == jsonl(demonstrations(5))
    path.write_bytes(jsonl([row | {"rejected": row["chosen"]} for row in preferences(3)]))
    before = path.read_bytes()
    with pytest.raises(UserError, match="none of the 3 rows can be used: 3 chosen and rejected are equal"):
        clean(str(path), str(path), overwrite=True)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
