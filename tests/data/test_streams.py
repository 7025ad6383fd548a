"""Streams give the rows of the files, from any position on, and the batches of data in memory."""

import csv
import functools
import gzip
import io
import itertools
import json
import weakref

import numpy as np
import pytest
from pydantic import ValidationError

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig, SFTConfig, SourceConfig
from jaxrlhf.data import sources
from jaxrlhf.data.preferences import PreferenceData, load_preferences, preferences_reader
from jaxrlhf.data.prompts import load_prompts, prompt_set, prompts_reader
from jaxrlhf.data.sft import SFTData, demonstrations_reader, load_demonstrations
from jaxrlhf.data.sources import read_rows, rows_from
from jaxrlhf.data.streamed import StreamedBatches, StreamedPrompts
from jaxrlhf.data.streams import Stream, StreamFault
from jaxrlhf.errors import UserError

LETTERS = "abcdefgh"
ROWS = [{"prompt": f"{LETTERS[i % 8]} {LETTERS[i // 8 % 8]}", "response": " ".join(LETTERS[: i % 5 + 1]), "n": i}
        for i in range(60)]  # fmt: skip


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows([row | {"response": row["response"].replace("b", '"b"\r\n\n')} for row in rows])
    return file.getvalue().encode()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lambda: as_lines(ROWS).replace(b"\n", b"\n\n", 3)),
        ("a.jsonl.gz", lambda: gzip.compress(as_lines(ROWS), mtime=0)),
        ("a.csv", lambda: as_csv(ROWS)),
        ("a.csv.gz", lambda: gzip.compress(as_csv(ROWS), mtime=0)),
        ("a.parquet", lambda: as_parquet(ROWS)),
    ],
    ids=["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"],
)
def test_a_file_is_read_from_every_position_as_from_its_start(tmp_path, name, data):
    (tmp_path / name).write_bytes(data())
    source = SourceConfig(path=str(tmp_path / name))
    found = list(rows_from(source))
    assert [row for row, _ in found] == read_rows(source) and len(found) == len(ROWS)
    for number, (_, position) in enumerate(found[:-1]):
        rest = list(rows_from(source, json.loads(json.dumps(position))))
        assert rest == found[number + 1 :]
    assert list(rows_from(source, found[-1][1])) == []


def test_a_pattern_names_shards_in_order(tmp_path):
    for number, part in enumerate((ROWS[:20], ROWS[20:33], ROWS[33:])):
        (tmp_path / f"part-{number}.jsonl").write_bytes(as_lines(part))
    source = SourceConfig(path=str(tmp_path / "part-*.jsonl"))
    found = list(rows_from(source))
    assert [row.values for row, _ in found] == ROWS == [row.values for row in read_rows(source)]
    assert found[20][0].where == f"{tmp_path}/part-1.jsonl:1"
    for number in (0, 18, 19, 20, 40):
        assert list(rows_from(source, found[number][1])) == found[number + 1 :]
    with pytest.raises(UserError, match=r"none-\*.jsonl: no file matches this pattern"):
        read_rows(SourceConfig(path=str(tmp_path / "none-*.jsonl")))


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "files"])
def test_a_data_set_continues_from_every_row(tmp_path, saved):
    hf = pytest.importorskip("datasets")
    if saved:
        hf.Dataset.from_list(ROWS[:20]).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        for number in range(2):
            (tmp_path / "set" / f"{number}.jsonl").write_bytes(as_lines(ROWS[10 * number : 10 * number + 10]))
    source = SourceConfig(path=str(tmp_path / "set"), format="datasets")
    found = list(rows_from(source))
    assert [row.values for row, _ in found] == ROWS[:20] and found[4][0].where.endswith("set train row 5")
    for number in (0, 8, 9, 10, 18):
        rest = rows_from(source, json.loads(json.dumps(found[number][1])))
        assert [row for row, _ in rest] == [row for row, _ in found[number + 1 :]]


def test_what_cannot_be_streamed_says_so(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match=r"a.json: a JSON file is read as a whole, so it cannot be streamed; leave"):
        next(rows_from(SourceConfig(path=str(tmp_path / "a.json"))))
    with pytest.raises(UserError, match="a builtin set is made in memory"):
        next(rows_from(SourceConfig(path="builtin:assistant-prompts")))


# ---------------------------------------------------------------- batches


def batches_of(items, bounds=None, packing=True):
    return SFTData(items, 3, 12, 5, packing, 0, bounds)


def streamed_sft(config, words, passes=1, packing=True, said=None):
    say = [].append if said is None else said.append
    stream = Stream(config, lambda s: demonstrations_reader(s, words, 12, "cut"), say)
    return StreamedBatches(stream, functools.partial(batches_of, packing=packing), 12, passes)


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_one_window_gives_the_batches_of_data_in_memory(jsonl, words, packing):
    config = DemonstrationsConfig(path=jsonl(ROWS), streaming=True, shuffle_buffer=60)
    examples, report = load_demonstrations(config, words, 12, "cut")
    whole = batches_of(examples, None, packing)
    said = []
    stream = streamed_sft(config, words, 2, packing, said)
    assert stream.total(0) is None and stream.total(len(whole)) == 2 * len(whole)
    stream = streamed_sft(config, words, 2, packing)
    assert all(equal(stream.batch(step), whole.batch(step)) for step in range(2 * len(whole)))
    assert said == [str(report)]
    with pytest.raises(IndexError, match=f"has {2 * len(whole)} batches"):
        stream.batch(2 * len(whole))


def test_one_window_gives_the_preferences_and_prompts_of_data_in_memory(jsonl, words):
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "h"} for row in ROWS]
    config = PreferencesConfig(path=jsonl(pairs, "pairs.jsonl"), streaming=True)
    whole = PreferenceData(load_preferences(config, words, 12, "cut")[0], 4, 12, 5, 4, 0)
    stream = Stream(config, lambda s: preferences_reader(s, words, 12, "cut"), print)
    batches = StreamedBatches(stream, lambda items, bounds: PreferenceData(items, 4, 12, 5, 4, 0, bounds), 12, 2)
    assert all(equal(batches.batch(step), whole.batch(step)) for step in range(2 * len(whole)))
    config = PromptsConfig(path=jsonl(ROWS), streaming=True)
    memory, prompts = load_prompts(config, words, 8, "stop"), streamed_prompts(config, words, 7)
    for draw in range(20):
        rows, wanted = prompts.rows(5, draw, 7), memory.rows(5, draw, 7)
        assert [prompts.columns[i]["n"] for i in rows] == [memory.columns[i]["n"] for i in wanted]
        assert equal(prompts.padded(rows), memory.padded(wanted))
        prompts.release(draw)


def tokens(batches, total):
    """Every learned example of the batches, as a multiset."""
    found = []
    for step in range(total):
        batch = batches.batch(step)
        for row, segments in zip(batch.tokens, batch.segments):
            found += [row[segments == number].tolist() for number in range(1, segments.max() + 1)]
    return sorted(found)


@pytest.mark.parametrize("packing", [True, False])
def test_every_pass_over_small_windows_has_each_row_once(jsonl, words, packing):
    config = DemonstrationsConfig(path=jsonl(ROWS), streaming=True, shuffle_buffer=25)
    examples, _ = load_demonstrations(config, words, 12, "cut")
    whole = batches_of(examples, None, packing)
    total = 0
    while (found := streamed_sft(config, words, 2, packing).total(total)) is None:
        total += 1
    assert tokens(streamed_sft(config, words, 2, packing), found) == sorted(2 * tokens(whole, len(whole)))
    first = [streamed_sft(config, words, 2, packing).batch(0) for _ in range(2)]
    assert equal(*first)
    stream = streamed_sft(config, words, 2, packing)
    lengths = {stream.batch(step).tokens.shape[1] for step in range(found)}
    assert lengths <= {8, 12}  # the padded lengths of the first window, and max_length


def test_a_mixture_has_the_shares_of_its_weights(jsonl, words):
    few = [{"prompt": "k", "response": "k", "n": -1 - i} for i in range(4)]
    config = PromptsConfig(
        path=jsonl(ROWS), weight=3.0, streaming=True, shuffle_buffer=10,
        mix_with=[{"path": jsonl(few, "few.jsonl"), "weight": 1.0}],
    )  # fmt: skip
    prompts = streamed_prompts(config, words, 10)
    draws = [[prompts.columns[i]["n"] for i in prompts.rows(0, draw, 10)] for draw in range(8)]
    shares = [sum(n < 0 for n in draw) for draw in draws]
    assert sum(shares) == 20 and {*shares} <= {2, 3}
    numbers = list(itertools.chain(*draws))
    assert sorted(n for n in numbers if n >= 0) == list(range(60))
    assert [n for n in numbers if n < 0].count(-1) == 5


# ---------------------------------------------------------------- resuming


def streamed_prompts(config, words, batch_size):
    stream = Stream(config, lambda s: prompts_reader(s, words, 8, "stop"), lambda text: None)
    return StreamedPrompts(stream, lambda loaded: prompt_set(loaded, stream.first.report, 8, 0), batch_size)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_batches_continue_from_every_step(tmp_path, words, name):
    data = {"jsonl": as_lines, "gz": lambda rows: gzip.compress(as_lines(rows), mtime=0), "parquet": as_parquet}
    (tmp_path / name).write_bytes(data[name.split(".")[-1]](ROWS))
    config = DemonstrationsConfig(path=str(tmp_path / name), streaming=True, shuffle_buffer=25)
    straight = streamed_sft(config, words, 2)
    batches, notes, step = [], [], 0
    while straight.total(step) != step:
        notes.append(json.loads(json.dumps(straight.notes(step))))
        batches.append(straight.batch(step))
        step += 1
    assert len({note["first"] for note in notes}) == 6  # 3 windows in each of 2 passes
    for start in range(0, step, 2):
        resumed = streamed_sft(config, words, 2)
        resumed.resume(notes[start])
        assert all(equal(resumed.batch(i), batches[i]) for i in range(start, step))
        assert resumed.total(step) == step


def test_prompts_continue_from_every_draw(jsonl, words):
    config = PromptsConfig(path=jsonl(ROWS), streaming=True, shuffle_buffer=7)
    straight = streamed_prompts(config, words, 10)
    draws, notes = [], []
    for draw in range(14):
        notes.append(json.loads(json.dumps(straight.notes(draw))))
        numbers = straight.rows(3, draw, 10)
        straight.rows(3, draw + 1, 10)  # prepared before the checkpoint of this draw
        draws.append((numbers.tolist(), [straight.texts[i] for i in numbers]))
        straight.release(draw + 1)
    for start in range(14):
        resumed = streamed_prompts(config, words, 10)
        resumed.resume(notes[start])
        for draw in range(start, 14):
            numbers = resumed.rows(3, draw, 10)
            assert (numbers.tolist(), [resumed.texts[i] for i in numbers]) == draws[draw]


def test_a_resumed_stream_skips_the_rows_before_its_window(jsonl, words, monkeypatch):
    config = DemonstrationsConfig(path=jsonl(ROWS), streaming=True, shuffle_buffer=10)
    straight = streamed_sft(config, words)
    straight.batch(straight.total(100) - 1)
    resumed, parsed, parse = streamed_sft(config, words), [], sources._parse
    monkeypatch.setattr(sources, "_parse", lambda *args: parsed.append(args[2]) or parse(*args))
    resumed.resume(straight.notes(100))
    assert parsed == [*range(51, 61), 1]  # the last window, and the first row of the next pass


def test_changed_rows_are_noticed(jsonl, words):
    config = DemonstrationsConfig(path=jsonl(ROWS), streaming=True, shuffle_buffer=20)
    stream = streamed_sft(config, words, 3)
    notes, step = None, 0
    while stream._window.number == 0:
        step += 1
        stream.batch(step)
    notes, checksum = stream.notes(step), stream.checksum()
    changed = [*ROWS[:30], ROWS[30] | {"n": 7}, *ROWS[31:]]
    jsonl(changed)
    other = streamed_sft(config, words, 3)
    assert other.checksum() == checksum  # the first window is the same
    with pytest.raises(UserError, match=r"rows.jsonl: rows from row 21 on changed since the run read them; restore"):
        other.resume(notes)
    jsonl([ROWS[0] | {"n": 7}, *ROWS[1:]])
    assert streamed_sft(config, words, 3).checksum() != checksum
    jsonl([*ROWS[:50], ROWS[50] | {"n": 7}, *ROWS[51:]])  # a row that the run has not read yet
    other = streamed_sft(config, words, 3)
    other.resume(notes)
    while other.total(step) is None and other._window.start["pass"] == 0:
        step += 1
    jsonl(ROWS)  # the data change between the passes
    with pytest.raises(StreamFault, match="pass 3 has other rows than the first pass, because the data changed"):
        other.total(1000)


# ---------------------------------------------------------------- bad rows, and memory


def test_bad_rows_in_the_middle(jsonl, words):
    rows = [*ROWS[:40], ROWS[40] | {"response": ""}, *ROWS[41:]]
    stop = DemonstrationsConfig(path=jsonl(rows), streaming=True, shuffle_buffer=10)
    stream = streamed_sft(stop, words)
    for _ in range(2):  # the second attempt reads the window again
        with pytest.raises(StreamFault, match=r"rows.jsonl:41: field 'response'.*run the same command to continue"):
            stream.total(100)
    jsonl(ROWS)
    assert stream.total(100) is not None
    drop, said = stop.model_copy(update={"unusable": "drop"}), []
    jsonl(rows)
    assert streamed_sft(drop, words, said=said).total(100) is not None
    assert said == [str(load_demonstrations(drop, words, 12, "cut")[1])] and "59 of 60 rows" in said[0]


def test_windows_without_usable_rows_are_passed_over(jsonl, words):
    bad = [row | {"response": ""} for row in ROWS]
    rows = [*ROWS[:10], *bad[10:35], *ROWS[35:45], *bad[45:]]
    config = DemonstrationsConfig(path=jsonl(rows), streaming=True, shuffle_buffer=5, unusable="drop")
    usable = [row["prompt"] for row in (*ROWS[:10], *ROWS[35:45])]
    stream = streamed_sft(config, words)
    total = stream.total(100)
    assert len(tokens(streamed_sft(config, words), total)) == len(usable)
    with pytest.raises(UserError, match="none of the 5 rows can be used"):
        streamed_sft(DemonstrationsConfig(path=jsonl(bad), streaming=True, shuffle_buffer=5, unusable="drop"), words)


def test_the_rows_of_two_windows_are_in_memory(jsonl, words):
    alive, most = set(), 0

    def counted(source):
        reader = demonstrations_reader(source, words, 12, "cut")

        def read(rows, first=0):
            nonlocal most
            items, report = reader(rows, first)
            for item in items:
                alive.add(id(item))
                weakref.finalize(item, alive.discard, id(item))
            most = max(most, len(alive))
            return items, report

        return read

    config = DemonstrationsConfig(path=jsonl(ROWS * 20), streaming=True, shuffle_buffer=20)
    stream, step = StreamedBatches(Stream(config, counted, print), batches_of, 12, 1), 0
    while stream.total(step) != step:
        stream.batch(step)
        step += 1
    assert step > 200 and most == 40  # of 1200


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle_buffer": 5}, "shuffle_buffer has no effect without streaming"),
        ({"streaming": True, "mix_with": [{"path": "b"}]}, "a streamed mixture needs a weight for every source"),
        ({"streaming": True, "epochs": 2.0}, "a streamed source cannot have epochs"),
        ({"streaming": True, "curriculum": "level"}, "curriculum sorts all rows, but a stream reads only some"),
    ],
)
def test_settings_that_a_stream_cannot_have(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptsConfig(path="a.jsonl", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.streaming needs max_steps, because the number of rows is not known"),
        ({"max_steps": 5, "batch_size": 20_000}, r"shuffle_buffer \(10000\) must be at least batch_size \(20000\)"),
        ({"max_steps": 5, "evaluation": {"every": 2}}, "evaluation.every needs evaluation.data"),
        ({"max_steps": 5, "evaluation": {"data": {"path": "b.jsonl", "streaming": True}}}, "read as a whole; leave"),
    ],
)
def test_settings_that_a_streamed_stage_needs(settings, message):
    with pytest.raises(ValidationError, match=message):
        SFTConfig(data={"path": "a.jsonl", "streaming": True}, **settings)
