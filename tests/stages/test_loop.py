"""The host loop alone: programs are numbers here, and reading a metric is an event."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.config import MeshConfig, RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.errors import Fault
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.tracking.metrics import MetricsLog

TOTAL, SAVE_EVERY = 5, 3


class Metric:
    """A number that records when it is read."""

    def __init__(self, events, name, value):
        self.events, self.name, self.value = events, name, value

    def __float__(self):
        self.events.append(f"read {self.name}")
        return self.value


@pytest.fixture
def run(tmp_path):
    settings = {
        "run_dir": str(tmp_path), "stages": ["sft"], "sft": {"data": {"path": "none.jsonl"}}, "health": {"patience": 1},
        "model": {"new": {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 8}},
    }  # fmt: skip
    logs = [MetricsLog(tmp_path / f"{name}.jsonl") for name in ("metrics", "samples")]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Run(RunConfig.model_validate(settings), mesh, *logs, SimpleNamespace(due=lambda: 0, at_work=None))


def play(run, events, skipped=None, stop_after=None):
    """Runs steps whose state counts them. Step `skipped` makes no update; a signal arrives during step `stop_after`."""
    with Loop(run, "sft", {"step": jnp.int32(0)}, TOTAL, SAVE_EVERY) as loop:
        for step in loop.steps():
            loop.state = {"step": loop.state["step"] + 1}
            events.append(f"submit {step}")
            metrics = {"sft/loss": Metric(events, step, step / 2), "optimizer/skipped": float(step == skipped)}
            batch = {"tokens": np.full((2, 3), step, np.int32)}
            loop.submitted(step, metrics, {"loss": "sft/loss"}, 6, batch)
            if step == stop_after:
                run.stop.due = lambda: 15
    return loop


def lines(run):
    text = (run.folder / "metrics.jsonl").read_text()
    return [(line["step"], line["sft/loss"]) for line in map(json.loads, text.splitlines())]


def test_a_step_is_read_when_the_next_is_submitted_and_all_are_logged_in_order(run):
    """But at a checkpoint (after step 3) and at the end."""
    events = []
    loop = play(run, events)
    assert events == [
        "submit 0", "submit 1", "read 0", "submit 2", "read 1", "read 2", "submit 3", "submit 4", "read 3", "read 4",
    ]  # fmt: skip
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]
    assert int(loop.checkpoints.restore(3, loop.state)["step"]) == 3
    assert loop.reached == TOTAL and int(loop.result()["step"]) == TOTAL


def test_a_step_that_failed_is_named_with_its_own_batch_though_the_next_was_submitted(run):
    events = []
    with pytest.raises(Fault, match=r"sft: a step made no update.*the batch of step 1 is in"):
        play(run, events, skipped=0)
    assert events == ["submit 0", "submit 1", "read 0"] and lines(run) == [(1, 0.0)]
    assert (load_file(run.folder / "inspect" / "sft-1" / "batch.safetensors")["tokens"] == 0).all()
    assert not (run.folder / "checkpoints" / "sft" / "2").exists()


def test_a_signal_saves_the_step_that_is_still_unread(run):
    events = []
    with pytest.raises(Stopped, match=r"sft: step 2 of 5 is saved"):
        play(run, events, stop_after=1)
    assert events == ["submit 0", "submit 1", "read 0", "read 1"] and len(lines(run)) == 2
    run.stop.due = lambda: 0
    again = play(run, events)
    assert again.first == 2 and int(again.state["step"]) == TOTAL
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]


def test_a_stage_that_begins_again_says_so(run, capsys):
    run.metrics.write("sft", 1, {"sft/loss": 0.5})
    run.metrics.write("sft", 2, {"sft/loss": 0.25})
    play(run, [])
    said = "sft: has no checkpoint, so it begins again; its 2 lines of metrics.jsonl are removed\n"
    assert capsys.readouterr().err.startswith(said)
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]
    play(run, [])
    assert "begins again" not in capsys.readouterr().err


# ---------------------------------------------------------------- alarms


def alarmed(run, **alarm):
    entry = {"name": "x", "metric": "sft/loss", "above": 0.4, **alarm}
    config = RunConfig.model_validate(run.config.model_dump(by_alias=True) | {"alarms": [entry]})
    return dataclasses.replace(run, config=config)


def alarm_lines(run):
    text = (run.folder / "metrics.jsonl").read_text()
    return [line.get("alarm/x") for line in map(json.loads, text.splitlines())]


def test_an_alarm_is_said_once_and_logged_while_it_holds(run, capsys):
    play(alarmed(run, above=0.4), [])
    assert alarm_lines(run) == [None, 1.0, 1.0, 1.0, 1.0]
    assert capsys.readouterr().err.count("sft: alarm x: sft/loss is 0.5, above 0.4 since step 2\n") == 1


def test_stop_saves_and_stops_again_until_the_alarm_is_changed(run, capsys):
    stopping = alarmed(run, above=0.9, do="stop")
    with pytest.raises(Stopped, match=r"sft: stopped by alarm x; step 3 of 5 is saved") as stopped:
        play(stopping, [])
    assert stopped.value.status == 3 and "change that alarm" in stopped.value.then
    events = []
    with pytest.raises(Stopped, match=r"stopped by alarm x; step 3 of 5 is saved"):
        play(stopping, events)
    assert events == []
    loop = play(alarmed(run, above=0.9), events)
    assert loop.first == 3 and int(loop.state["step"]) == TOTAL
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]
    assert alarm_lines(run) == [None, None, 1.0, 1.0, 1.0]


def test_pause_saves_and_waits_for_the_file(run, capsys, monkeypatch):
    pausing = alarmed(run, above=0.9, do="pause")
    waits = []

    def sleep(seconds):
        waits.append(sorted(path.name for path in (run.folder / "checkpoints" / "sft").iterdir()))
        if len(waits) == 2:
            (run.folder / "continue").touch()

    monkeypatch.setattr("jaxrlhf.stages.alarms.time", SimpleNamespace(sleep=sleep))
    (run.folder / "continue").touch()  # left from an earlier pause
    play(pausing, [])
    assert len(waits) == 2 and "3" in waits[0] and not (run.folder / "continue").exists()
    said = capsys.readouterr().err
    assert f"sft: paused by alarm x; step 3 of 5 is saved; create the file {run.folder}/continue to continue" in said
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]


def test_a_signal_ends_a_pause(run, monkeypatch):
    pausing = alarmed(run, above=0.9, do="pause")
    stop = lambda seconds: setattr(run.stop, "due", lambda: 15)  # noqa: E731
    monkeypatch.setattr("jaxrlhf.stages.alarms.time", SimpleNamespace(sleep=stop))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM: sft: step 3 of 5 is saved"):
        play(pausing, [])


def test_alarms_after_a_resume_are_those_of_a_run_that_was_not_stopped(run):
    counting = alarmed(run, above=0.4, over=2, **{"for": 2})
    with pytest.raises(Stopped):
        play(counting, [], stop_after=2)
    run.stop.due = lambda: 0
    play(counting, [])
    assert alarm_lines(run) == [None, None, None, 1.0, 1.0]
