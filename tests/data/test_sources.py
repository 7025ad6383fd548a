"""Every source gives the same rows; every broken one says in one line what is wrong, where."""

import gzip
import json

import pytest

from jaxrlhf.config import SourceConfig
from jaxrlhf.data import hub
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sources import Row, read_rows, stream_rows
from jaxrlhf.errors import UserError

ROWS = [{"prompt": f"p{i} ä\u2028", "chosen": "yes", "score": i} for i in range(5)]


def read(path, **settings):
    return read_rows(SourceConfig(path=str(path), **settings))


def fails(*parts, path, **settings):
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# The time in gzip's header is fixed: parameters name tests, and pytest-xdist wants the same names in each worker.
ZIPPED = gzip.compress(lines(ROWS).encode(), mtime=0)


# ---------------------------------------------------------------- what can be read


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.ndjson", lines(ROWS).rstrip("\n")),
        ("a.JSONL", "\ufeff" + lines(ROWS)),
        ("a.jsonl", lines(ROWS).replace("\n", "\r\n")),
        ("a.jsonl.gz", ZIPPED),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"data": ROWS})),
    ],
)
def test_json_forms_give_the_same_rows(write, name, data):
    path = write(name, data)
    assert [row.values for row in read(path)] == ROWS
    assert [row.values for row in read(path, limit=2)] == ROWS[:2]
    assert len(read(path, limit=99)) == len(ROWS)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.TSV", "\t"), ("a.tsv.gz", "\t")])
def test_a_table_has_texts_and_nulls(write, name, separator):
    cells = [["a", "b"], ['"x ""y""\nz"', ""], ["", "2"]]
    data = ("\ufeff" + "".join(separator.join(row) + "\r\n" for row in cells)).encode()
    path = write(name, gzip.compress(data) if name.endswith(".gz") else data)
    rows = read(path)
    assert [row.values for row in rows] == [{"a": 'x "y"\nz', "b": None}, {"a": None, "b": "2"}]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]


def test_rows_after_a_line_without_a_row_can_be_read(write):
    path, errors = write("a.jsonl", '{"a": 1}\n{"a"\n[]\n{"a": 2}\n'), []
    assert [row.values for row in stream_rows(SourceConfig(path=path), errors.append)] == [{"a": 1}, {"a": 2}]
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:2", f"{path}:3"]


def test_blank_lines_are_skipped_and_counted(write):
    path = write("a.jsonl", '{"a": 1}\n\n   \n{"a": 2}\n')
    assert [row.where for row in read(path)] == [f"{path}:1", f"{path}:4"]


def test_format_overrides_the_ending(write):
    assert [row.values for row in read(write("a.txt", lines(ROWS)), format="jsonl")] == ROWS


def test_limit_stops_before_a_later_fault(write):
    assert len(read(write("a.jsonl", '{"a": 1}\n{"a": 2}\nbroken'), limit=2)) == 2


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """The datasets library with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_parquet(hf, tmp_path):
    path = str(tmp_path / "a.parquet")
    hf.Dataset.from_list(ROWS).to_parquet(path)
    rows = read(path)
    assert [row.values for row in rows] == ROWS
    assert rows[3].where == f"{path} row 4"
    assert [row.values for row in read(path, limit=3)] == ROWS[:3]


def test_saved_datasets(hf, tmp_path):
    table = hf.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    hf.DatasetDict(train=table, test=table.select([4])).save_to_disk(str(tmp_path / "two"))
    assert [row.values for row in read(tmp_path / "one")] == ROWS
    assert [row.values for row in read(tmp_path / "two")] == ROWS
    rows = read(tmp_path / "two", split="test")
    assert [row.values for row in rows] == ROWS[4:] and rows[0].where.endswith("two test row 1")
    assert len(read(tmp_path / "two", limit=2)) == 2
    fails("no split 'dev'", "train, test", path=tmp_path / "two", split="dev")
    fails("has no splits", "dev", path=tmp_path / "one", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    fails("cannot be read", path=tmp_path / "one")


def test_folder_of_data_files(hf, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(ROWS))
    (folder / "test.jsonl").write_text(lines(ROWS[:1]))
    assert [row.values for row in read(folder)] == ROWS
    assert [row.values for row in read(folder, split="test")] == ROWS[:1]
    fails("dev", "['train', 'test']", path=folder, split="dev")
    fails("this is a folder", path=folder, format="jsonl")


def test_hub_ids_go_to_the_hub(hf, monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return hf.Dataset.from_list(ROWS)

    monkeypatch.setattr(hf, "load_dataset", load)
    monkeypatch.setattr(hub, "_reached", lambda name: True)
    rows = read("owner/name", subset="small", split="test", limit=2)
    assert calls == [(("owner/name", "small"), {"split": "test", "streaming": False})]
    assert [row.values for row in rows] == ROWS[:2]
    assert rows[1].where == "owner/name test row 2"


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ConnectionError("Couldn't reach it\nsecond line"), "hub cannot be reached: Couldn't reach it"),
        (ValueError('Unknown split "x". Should be one of [\'a\', \'b\'].'), "['a', 'b']"),
        (FileNotFoundError("doesn't exist on the Hub"), "doesn't exist"),
    ],
)
def test_hub_failures_are_one_line(hf, monkeypatch, error, part):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf, "load_dataset", load)
    monkeypatch.setattr(hub, "_reached", lambda name: True)
    fails("owner/name", part, path="owner/name")


def test_an_unreachable_hub_is_asked_once_and_its_logs_are_not_shown(hf, monkeypatch, capfd):
    import huggingface_hub
    from huggingface_hub.utils import logging

    asked = []

    def refuse(self, *arguments, **options):
        asked.append(arguments)
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    fails("nope/nada", "hub cannot be reached", path="nope/nada")
    assert asked == [("nope/nada",)] and capfd.readouterr() == ("", "")
    assert not hf.config.HF_HUB_OFFLINE, "as before"


def test_the_copy_in_the_cache_is_used_where_the_hub_is_unreachable(hf, monkeypatch, capfd):
    monkeypatch.setattr(hub, "_reached", lambda name: False)

    def load(*arguments, **options):
        assert hf.config.HF_HUB_OFFLINE
        return hf.Dataset.from_list(ROWS)

    monkeypatch.setattr(hf, "load_dataset", load)
    assert [row.values for row in read("owner/cached")] == ROWS
    note = "note: owner/cached: the hub cannot be reached; the copy of the data set in the cache is used\n"
    assert capfd.readouterr().err == note


def test_builtin_sets(monkeypatch):
    toys = {"toys": lambda split, limit: [{"text": f"{split} {i}"} for i in range(limit or 3)]}
    monkeypatch.setattr("jaxrlhf.toy.world.BUILTIN", toys)
    assert [row.values["text"] for row in read("builtin:toys")] == ["train 0", "train 1", "train 2"]
    assert [row.values["text"] for row in read("toys", format="builtin", split="test", limit=1)] == ["test 0"]
    fails("builtin:none", "builtin:toys", path="builtin:none")
    fails("dev", "train, test", path="builtin:toys", split="dev")


# ---------------------------------------------------------------- what cannot


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', (":3: not JSON", "each line must be one JSON object")),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', (":2: not UTF-8", "0xff")),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', (":2: a row must be a JSON object", "a list of 2")),
        ("a.jsonl", '{"a": 1}\n"text"\n', (":2: a row must be", "the text 'text'")),
        ("a.jsonl", "", ("has no rows",)),
        ("a.jsonl", "\n\n", ("has no rows",)),
        ("a.jsonl", "[" * 100_000, (":1: not usable JSON",)),
        ("a.jsonl", "9" * 5000, (":1: not usable JSON",)),
        ("a.json", "[]", ("has no rows",)),
        ("a.json", '{"rows": []}', ("must be a list of rows", "an object with rows")),
        ("a.json", '[{"a": 1},\n {"a": 2}\n {"a": 3}]', (":3: not JSON",)),
        ("a.json", '[{"a": 1},\n {"a": 2},\n 3]', ("a.json row 3: a row must be", "the number 3")),
        ("a.json", '{"a": 1}\n{"a": 2}\n', (":2: not JSON", "format: jsonl")),
        ("a.json", b'[{"a": 1},\n{"a": "\xe4"}]', (":2: not UTF-8",)),
        ("a.parquet", "not parquet", ("the file cannot be read as Parquet",)),
        ("a.jsonl.gz", "not gzip", ("cannot be read",)),
        ("a.jsonl.gz", ZIPPED[:-9], ("cannot be read",)),
        ("a.txt", "a,b", ("is no known format", ".jsonl")),
        ("a.csv", "a,b\n", ("has no rows",)),
        ("a.csv", "a,a\n1,2\n", (":1: the header must give each column a different name",)),
        ("a.csv", 'a,b\n"1\n2",3\n4\n', (":4: the row has 1 cells, but the header has 2",)),
        ("a.csv", 'a,b\n1,"2\n', (":2: not CSV",)),
        ("a.csv", b"a,b\n1,\xe4\n", (":2: not UTF-8", "0xe4")),
    ],
)
def test_broken_files(write, name, data, parts):
    fails(name, *parts, path=write(name, data))


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "missing.json", "data/missing.parquet", "/no/where", "./here/not", "a/b/c"]
)
def test_missing_files(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(path.removeprefix("."), "no such file", path=path)


def test_report_counts_andrefuses_nothing_left():
    report = LoadReport("x.jsonl", 3, cut=1)
    report.drop("too long")
    assert report.kept == 2
    report.check()
    assert str(report) == "x.jsonl: 2 of 3 rows, 1 cut to length, 1 dropped (too long)"
    report.drop("too long")
    report.drop("equal")
    with pytest.raises(UserError, match=r"none of the 3 rows can be used: 2 too long; 1 equal"):
        report.check()


def test_report_names_the_first_row_of_a_reason_and_not_every_reason():
    report = LoadReport("x.jsonl", 30)
    rows = [Row({}, f"x.jsonl:{number}") for number in range(1, 21)]
    for row in rows:
        report.refuse(row, f"{row.where}: number {int(row.where[8:]) // 2} is wrong; want another")
    said = str(report)
    assert said.startswith("x.jsonl: 10 of 30 rows, 2 dropped (number 1 is wrong; first x.jsonl:2), 2 dropped (")
    assert said.endswith("10 dropped (6 other reasons)") and sum(report.dropped.values()) == 20


def test_usable_rows():
    rows, report = [Row({"a": value}, f"x.jsonl:{value}") for value in (1, 2, 3)], LoadReport("x.jsonl", 3)

    def read(row):
        if row.values["a"] == 2:
            raise UserError(f"{row.where}: two; want another")
        return row.values["a"] * 10

    assert [made for _, made in report.usable(rows, read, drop=True)] == [10, 30]
    assert report.dropped == {"two": 1} and report.first == {"two": "x.jsonl:2"}
    with pytest.raises(UserError, match=r"^x.jsonl:2: two; want another$"):
        list(report.usable(rows, read, drop=False))
    with pytest.raises(KeyError):  # only what is a row's fault is dropped
        list(report.usable(rows, lambda row: {}[0], drop=True))
