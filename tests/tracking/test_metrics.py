"""The log is valid JSON whatever happens to the numbers or to the process."""

import datetime
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.tracking.metrics import MetricsLog


def _lines(path) -> list[dict]:
    """The lines of a log without their times."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    records = [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def test_each_line_has_the_time_at_which_it_was_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = datetime.datetime.now(datetime.UTC)
    log.write("sft", 1, {})
    log.close()
    time = json.loads((tmp_path / "metrics.jsonl").read_text())["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    written = datetime.datetime.fromisoformat(time)
    assert datetime.timedelta(milliseconds=-1) < written - before < datetime.timedelta(seconds=5)


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("ppo", 1, {"seconds": 0.5, "kl/k1": jnp.float32(0.25), "compiles/update": 1})
    assert _lines(path) == [{"stage": "ppo", "step": 1, "seconds": 0.5, "kl/k1": 0.25, "compiles/update": 1}]
    log.write("ppo", np.int64(2), {"a": np.float32(np.nan), "b": float("inf"), "c": jnp.float32(-jnp.inf), "d": None})
    assert _lines(path)[1] == {"stage": "ppo", "step": 2, "a": None, "b": None, "c": None, "d": None}
    log.close()


def test_samples_hold_text_of_any_kind(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = {"prompt": "a\nb\u2028c\r\x00", "scores": np.array([1.0, np.nan]), "chat": [{"role": "é"}]}
    for _ in range(2):
        log = MetricsLog(path)  # opened again: appends
        log.write("ppo", 1, sample)
        log.write("ppo", 1, {"prompt": "\ud800"})  # half a surrogate pair cannot be written as it is
        log.close()
    found = _lines(path)
    assert len(found) == 4
    assert found[2] == {"stage": "ppo", "step": 1, **sample, "scores": [1.0, None]}
    MetricsLog(path).truncate("ppo", 1)
    assert _lines(path) == found


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None)
    log.write("ppo", 1, {})
    log.truncate("ppo", 0)
    log.close()
    assert list(tmp_path.iterdir()) == []


PLACES = [("sft", 1), ("sft", 2), ("sft", 2), ("sft", 3), ("ppo", 1), ("ppo", 2)]


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [
        ("sft", 2, 3),  # both lines of step 2, nothing of step 3 or ppo
        ("sft", 3, 4),
        ("sft", 9, 4),
        ("sft", 0, 0),
        ("ppo", 0, 4),  # no checkpoint yet: the stage begins again, those before it stay
        ("ppo", 1, 5),
        ("ppo", 2, 6),
        ("reward_model", 0, 6),  # a stage that has not begun has nothing to forget
    ],
)
@pytest.mark.parametrize("tail", ["", '{"stage": "ppo", "st'])
def test_truncate_keeps_what_the_checkpoint_has_seen(tmp_path, stage, step, kept, tail):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"stage": s, "step": i, "n": n}) + "\n" for n, (s, i) in enumerate(PLACES)]
    path.write_text("".join(lines) + tail)
    log = MetricsLog(path)
    log.truncate(stage, step)
    assert path.read_text() == "".join(lines[:kept])
    log.write(stage, step + 1, {})
    log.close()
    assert len(_lines(path)) == kept + 1


def test_truncate_of_an_open_log_and_of_none(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate("sft", 0)
    assert not (tmp_path / "metrics.jsonl").exists()
    log.write("sft", 1, {})
    log.write("sft", 2, {})
    log.truncate("sft", 1)
    log.write("sft", 2, {"again": 1})
    log.close()
    assert [(line["step"], line.get("again")) for line in _lines(tmp_path / "metrics.jsonl")] == [(1, None), (2, 1)]


def test_half_a_line_goes_also_without_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 1}\n{"sta')
    log = MetricsLog(path)
    log.write("sft", 2, {})
    log.close()
    assert [line["step"] for line in _lines(path)] == [1, 2]


def test_line_of_something_else_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("hello", "3", "{}", "\udcff"):
        path.write_bytes(b'{"stage": "sft", "step": 1}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a line of this log"):
            MetricsLog(path).truncate("sft", 1)
