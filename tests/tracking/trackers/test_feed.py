"""A feed gives a tracker each line of the logs once, whatever it has, and also if the logs were cut and repeated."""

import json
import math
import os

import pytest

from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.tracking.trackers.feed import Feed, LogReader, metrics_of, tables_of, with_stage

LINES = [("sft", 1), ("sft", 2), ("ppo", 1), ("ppo", 2), ("ppo", 3), ("ppo", 4)]
SAMPLES = {("ppo", 2): "a", ("ppo", 4): "b"}  # written before the line of their step
LAST = ("ppo", 4, "end")  # written after it


def _write(folder, lines, last=True):
    metrics, samples = (MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    for stage, step in lines:
        if (stage, step) in SAMPLES:
            samples.write(stage, step, {"samples": [{"text": SAMPLES[stage, step]}]})
        metrics.write(stage, step, {"loss": step / 10})
        yield
    if last:
        samples.write(*LAST[:2], {"after": [{"text": LAST[2]}]})
        yield
    metrics.close()
    samples.close()


def _found(lines):
    return [(line.number, bool(line.metrics), [r["text"] for t in line.tables.values() for r in t]) for line in lines]


ALL = [(1, True, []), (2, True, []), (3, True, []), (4, True, ["a"]), (5, True, []), (6, True, ["b"])]


def test_whole_logs_give_each_line_with_its_samples(tmp_path):
    list(_write(tmp_path, LINES))
    assert _found(Feed(tmp_path, 0, 0).new()) == [*ALL[:5], (6, True, ["b", "end"])]


def test_growing_logs_give_the_same_lines(tmp_path):
    feed, found = Feed(tmp_path, 0, 0), []
    for _ in _write(tmp_path, LINES):
        found += _found(feed.new())
    assert found == [*ALL, (6, False, ["end"])]
    assert list(feed.new()) == [] and feed.samples == 3


@pytest.mark.parametrize("last", range(7))
def test_a_tracker_gets_only_what_it_lacks(tmp_path, last):
    list(_write(tmp_path, LINES))
    samples = sum(number <= last and len(texts) for number, _, texts in ALL)
    rest = [*ALL[last:5], (6, last < 6, ["b", "end"] if last < 6 else ["end"])]
    assert _found(Feed(tmp_path, last, samples).new()) == rest
    assert _found(Feed(tmp_path, 6, 3).new()) == []


@pytest.mark.parametrize("kept", range(1, 5))
def test_lines_that_a_resumed_run_repeats_come_once(tmp_path, kept):
    feed = Feed(tmp_path, 0, 0)
    list(_write(tmp_path, LINES[:5], last=False))
    found = _found(feed.new())
    assert found == ALL[:5]
    stage, step = LINES[kept - 1]
    for name in ("metrics", "samples"):
        MetricsLog(tmp_path / f"{name}.jsonl").truncate(stage, step, {"metrics": kept, "samples": int(kept > 3)}[name])
    for _ in _write(tmp_path, LINES[kept:]):
        found += _found(feed.new())
    assert found == [*ALL, (6, False, ["end"])]


def test_half_a_line_is_left_until_it_is_whole(tmp_path):
    path = tmp_path / "log"
    reader = LogReader(path)
    assert list(reader.new()) == []
    with open(path, "wb", buffering=0) as file:
        file.write(b'{"a": 1}\n{"a"')
        assert list(reader.new()) == [(1, {"a": 1})]
        assert list(reader.new()) == []
        os.ftruncate(file.fileno(), 9)  # as after a full disk
        file.seek(9)
        file.write(b'{"b": 2}\n')
        assert list(reader.new()) == [(2, {"b": 2})]


def test_names_say_the_stage_once():
    assert with_stage("reward/score", "ppo") == "ppo/reward/score"
    for name in ("sft/loss", "evaluation/sft/loss"):
        assert with_stage(name, "sft") == name
    record = {"stage": "sft", "step": 3, "time": "2026-01-01T00:00:00+00:00", "sft/loss": None, "seconds": 2}
    metrics = metrics_of(record)
    assert math.isnan(metrics.pop("sft/loss")) and metrics == {"sft/step": 3.0, "sft/seconds": 2.0}


def test_tables_keep_texts_and_numbers_of_records():
    rows = [{"prompt": "p", "score": 1.0, "tokens": ["a"]}, {"prompt": "q", "gold": 0.5}]
    record = {"stage": "ppo", "step": 1, "evaluation": {"samples": rows, "scores": [1.0, 2.0]}, "before": []}
    table = [{"prompt": "p", "score": 1.0, "gold": None}, {"prompt": "q", "score": None, "gold": 0.5}]
    assert tables_of(json.loads(json.dumps(record))) == {"ppo/evaluation/samples": table}
