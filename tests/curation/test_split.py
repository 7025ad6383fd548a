"""`data split`: each row is in one part, shares and labels are kept, groups stay together, a seed gives one result."""

import json
from collections import Counter
from pathlib import Path

import pytest
from broken import classification, demonstrations, jsonl, one_word

from jaxrlhf.__main__ import main
from jaxrlhf.curation.split import parse_parts, split
from jaxrlhf.errors import UserError


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(tmp_path, rows):
    (tmp_path / "all.jsonl").write_bytes(jsonl(rows))
    return str(tmp_path / "all.jsonl")


def test_each_row_is_in_one_part_in_its_order(tmp_path):
    rows = demonstrations(100)
    parts = split(write(tmp_path, rows), str(tmp_path / "out"))
    assert [(part.name, part.rows) for part in parts] == [("train", 80), ("validation", 10), ("test", 10)]
    numbers = [[rows.index(row) for row in read(part.path)] for part in parts]
    assert sorted(number for part in numbers for number in part) == list(range(100))
    assert all(part == sorted(part) for part in numbers)


def test_the_seed_decides(tmp_path):
    path = write(tmp_path, demonstrations(100))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(path, str(tmp_path / name), seed=seed)
    names = ("train.jsonl", "validation.jsonl", "test.jsonl")
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc")
    assert a == b and a[2] != c[2]


def test_labels_have_their_shares_in_each_part(tmp_path):
    rows = [{"text": f"t{i}", "label": "rare" if i % 20 == 0 else "often"} for i in range(200)]
    parts = split(write(tmp_path, rows), str(tmp_path / "out"), stratify="label", parts={"a": 0.7, "b": 0.3})
    assert [part.labels for part in parts] == [{"often": 133, "rare": 7}, {"often": 57, "rare": 3}]


def test_many_rare_labels_still_fill_every_part(tmp_path):
    rows = [{"text": f"t{i}", "label": f"l{i // 2}"} for i in range(200)]
    parts = split(write(tmp_path, rows), str(tmp_path / "out"), stratify="label")
    assert all(abs(part.rows - wanted) <= 1 for part, wanted in zip(parts, (160, 20, 20)))


@pytest.mark.parametrize("stratify", [None, "label"])
def test_groups_stay_together(tmp_path, stratify):
    rows = [row | {"user": i % 23} for i, row in enumerate(classification(200))]
    parts = split(write(tmp_path, rows), str(tmp_path / "out"), group="user", stratify=stratify)
    users = [{row["user"] for row in read(part.path)} for part in parts]
    assert not users[0] & users[1] and not users[1] & users[2] and not users[0] & users[2]
    assert sum(part.rows for part in parts) == 200 and abs(parts[0].rows - 160) <= 10


def test_near_prompts_stay_together(tmp_path):
    rows = demonstrations(40)
    rows += [row | {"prompt": one_word(row["prompt"], 0)} for row in rows]
    parts = split(write(tmp_path, rows), str(tmp_path / "out"), near=True, parts={"a": 0.5, "b": 0.5})
    assert [part.rows for part in parts] == [40, 40]
    for part in parts:
        assert set(Counter(" ".join(row["prompt"].split()[1:]) for row in read(part.path)).values()) == {2}


def test_what_cannot_be_split_is_refused(tmp_path):
    path = write(tmp_path, [{"prompt": f"p{i}", "user": i // 5} for i in range(10)])
    for settings, message in (
        ({"group": "user"}, "part validation would be empty: the file has 10 rows in 2 groups"),
        ({"group": "usr"}, "all.jsonl:1: the row has no 'usr'"),
        ({"parts": {"a": 0.5, "b": 0.6}}, "the shares must be positive, and their sum must be 1"),
    ):
        with pytest.raises(UserError, match=message):
            split(path, str(tmp_path / "out"), **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="the folder cannot be made: File exists; give another --out"):
        split(path, path)
    with pytest.raises(UserError, match="must be NAME=SHARE"):
        parse_parts("train=0.5,train=0.5")


def test_the_command_keeps_older_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, classification(30))
    command = ["data", "split", "all.jsonl", "--out", "out", "--stratify", "label"]
    assert main(command) == 0
    assert "train.jsonl: 24 rows (bad 8, good 8, neither 8)" in capsys.readouterr().out
    assert main(command) == 2 and "the file exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
