"""A short trial of kills at random moments; `benchmarks/kill_trial.py` without --short is the long one."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_is_bit_identical(processes, tmp_path):
    trial = ROOT / "benchmarks" / "kill_trial.py"
    done = processes.run(trial, "--short", "--kills", 4, "--folder", tmp_path, "--signals", "KILL,TERM")
    assert "bit-identical: average, base, policy, reward, value" in done.output


def test_the_trial_finds_differences(tmp_path):
    """Two runs that are not the same are told apart: by a byte of the weights, a line lost, a line doubled."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from kill_trial import Trial, differences
    finally:
        sys.path.pop(0)
    one, other = (Trial(tmp_path, name) for name in ("one", "other"))
    lines = ['{"stage": "sft", "step": 1, "loss": 0.5, "seconds": 1}\n', '{"stage": "sft", "step": 2, "loss": 0.4}\n']
    for trial in (one, other):
        (trial.run / "roles" / "sft").mkdir(parents=True)
        (trial.run / "roles" / "sft" / "adapter.safetensors").write_bytes(b"weights")
        for name in ("metrics.jsonl", "samples.jsonl"):
            (trial.run / name).write_text("".join(lines))
    assert differences(one, other) == []
    (other.run / "metrics.jsonl").write_text("".join(lines).replace('"seconds": 1', '"seconds": 2'))
    assert differences(one, other) == []
    for text in (lines[0], lines[0] + 2 * lines[1], "".join(lines).replace("0.4", "0.41"), ""):
        (other.run / "metrics.jsonl").write_text(text)
        assert differences(one, other) != [], text
    (other.run / "metrics.jsonl").write_text("".join(lines))
    (other.run / "roles" / "sft" / "adapter.safetensors").write_bytes(b"Weights")
    assert differences(one, other) == ["roles/sft/adapter.safetensors differs"]
    (other.run / "roles" / "sft" / "adapter.safetensors").unlink()
    assert differences(one, other) != []
