"""The host loop alone: programs are numbers here, and reading a metric is an event."""

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
    said = "sft: no checkpoint was saved; begins again; its 2 lines of metrics.jsonl are removed\n"
    assert capsys.readouterr().err == said
    assert lines(run) == [(step + 1, step / 2) for step in range(TOTAL)]
    play(run, [])
    assert "begins again" not in capsys.readouterr().err
