"""The profiler records the asked steps, never one that compiles unless asked, and once in a run."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.config import ProfileConfig
from jaxrlhf.tracking.profiler import StepProfiler


def _run(settings, folder, done, total, until=None, stage="ppo"):
    """Runs the steps after `done`; returns what was said. Stops before step `until`."""
    said = []
    profiler = StepProfiler(settings, stage, folder, done, total, said.append)
    program = jax.jit(lambda x: x @ x)
    state = jnp.ones((8, 8))
    for step in range(done + 1, total + 1 if until is None else until):
        profiler.begin(step, state)
        state = program(state)
        profiler.end(step, state)
    profiler.close()
    return said


def _steps(folder, stage="ppo"):
    """The steps in a recording."""
    (path,) = (folder / "profile" / stage).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({int(event["args"]["step_num"]) for event in events if event.get("name") == stage})


@pytest.mark.parametrize(
    ("steps", "done", "total", "expected"),
    [
        ((3, 4), 0, 9, [3, 4]),
        ((1, 2), 0, 9, [1, 2]),  # the first step compiles: it was asked for
        ((3, 4), 2, 9, [4, 5]),  # step 3 is the first after a resume
        ((3, 4), 6, 9, [8, 9]),  # resumed after them
        ((1, 3), 2, 9, [4, 5, 6]),
        ((3, 7), 0, 5, [3, 4, 5]),
    ],
)
def test_steps(tmp_path, steps, done, total, expected):
    (line,) = _run(ProfileConfig(steps=steps, stage="ppo"), tmp_path, done, total)
    assert _steps(tmp_path) == expected
    assert f"steps {expected[0]} to {expected[-1]} in {tmp_path / 'profile' / 'ppo'}; open it with: xprof" in line


def test_nothing_is_recorded_unless_asked(tmp_path):
    assert _run(None, tmp_path, 0, 4) == []
    assert _run(ProfileConfig(steps=(2, 3), stage="sft"), tmp_path, 0, 4) == []
    assert "no step is left" in _run(ProfileConfig(steps=(7, 8), stage="ppo"), tmp_path, 0, 4)[0]
    assert _run(ProfileConfig(steps=(7, 8)), tmp_path, 0, 4) == []
    assert not (tmp_path / "profile").exists()


def test_an_interrupted_recording_is_made_again_and_a_complete_one_kept(tmp_path):
    settings = ProfileConfig(steps=(3, 4))
    assert _run(settings, tmp_path, 0, 9, until=4) == []
    assert not list((tmp_path / "profile").glob("*"))
    assert len(_run(settings, tmp_path, 3, 9)) == 1
    assert _steps(tmp_path) == [5, 6]
    assert _run(settings, tmp_path, 5, 9) == []
    assert _steps(tmp_path) == [5, 6]
