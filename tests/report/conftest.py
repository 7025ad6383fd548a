"""Run directories made by hand, line by line."""

import json

import pytest


@pytest.fixture
def write_run(tmp_path):
    """`write_run(name, ppo=[...], samples=[...], settings="yaml")`: a run directory; `ppo`: metrics of each step."""

    def write(name="run", ppo=(), samples=(), settings="seed: 0\n", extra=""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [{"stage": "ppo", "step": i, "seconds": 0.5, **metrics} for i, metrics in enumerate(ppo, start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + extra)
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
        if settings is not None:
            (folder / "config.yaml").write_text(settings)
        return folder

    return write
