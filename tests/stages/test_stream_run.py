"""Runs on streamed data: the weights of data in memory, bit-identical resumes, and rows that are bad in the middle."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.cli import train
from jaxrlhf.toy.world import BUILTIN
from jaxrlhf.tracking.metrics import MetricsLog

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
MODEL = {
    "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
}


def rewards(prompts, completions, **columns):
    return [len(text) % 7 for text in completions]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with files of rows, and the config of a run on them."""
    folder = tmp_path_factory.mktemp("streams")
    for kind, count in (("demonstrations", 240), ("preferences", 120), ("prompts", 60)):
        rows = BUILTIN[f"assistant-{kind}"]("train", count)
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": MODEL, "adapter": FEW, "report": False,
        "sft": {
            "data": {"path": str(folder / "demonstrations.jsonl")}, "batch_size": 4, "max_length": 64, "epochs": 2,
            "evaluation": {"heldout": 0}, "save_every": 3, "optimizer": {"learning_rate": 0.01},
        },
        "reward_model": {
            "data": {"path": str(folder / "preferences.jsonl")}, "batch_size": 8, "max_length": 48, "buckets": 1,
            "evaluation": {"data": {"path": str(folder / "preferences.jsonl")}}, "save_every": 3,
        },
        "ppo": {
            "data": {"path": str(folder / "prompts.jsonl")}, "batch_size": 4, "iterations": 6, "save_every": 2,
            "max_prompt_tokens": 24, "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2}, "resample": 1,
            "evaluation": {"prompts": 4}, "reward": {"kind": "function", "function": f"{__file__}:rewards"},
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


STREAMED = {
    "sft": ["sft.data.streaming=true", "sft.max_steps=1000"],
    "reward_model": ["reward_model.data.streaming=true", "reward_model.max_steps=1000"],
    "ppo": ["ppo.data.streaming=true"],
}  # fmt: skip


def command(folder, run_dir, *overrides):
    return train.main(["--config", str(folder / "config.json"), f"run_dir={folder / run_dir}", *overrides])


def result(folder, run_dir):
    """Every array of the run's roles, and its metrics without times."""
    roles = sorted((folder / run_dir / "roles").glob("*/*.safetensors"))
    arrays = {f"{path.parent.name}/{name}": array for path in roles for name, array in load_file(path).items()}
    lines = map(json.loads, (folder / run_dir / "metrics.jsonl").read_text().splitlines())
    others = ("seconds", "time", "tokens_per", "memory", "compiles")
    return arrays, [{k: v for k, v in line.items() if not k.startswith(others)} for line in lines]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[1] == other[1]
    assert all(np.array_equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.slow
def test_a_window_with_the_whole_set_trains_the_weights_of_data_in_memory(workshop, capfd):
    stages = "stages=[sft,reward_model,ppo]"
    streamed = [override for overrides in STREAMED.values() for override in overrides]
    assert command(workshop, "memory", stages) == 0
    assert command(workshop, "streamed", stages, *streamed) == 0
    arrays, lines = result(workshop, "streamed")
    passes = [line["stream/pass"] for line in lines if line["stage"] == "sft"]
    assert passes[0] == 1 and passes[-1] == 2 and passes == sorted(passes)
    lines = [{k: v for k, v in line.items() if not k.startswith("stream/")} for line in lines]
    assert_same(result(workshop, "memory"), (arrays, lines))
    said = capfd.readouterr().err
    assert "sft: at most 1,000 optimizer steps and 2 passes over a stream; learning rate" in said


def interrupted(monkeypatch, workshop, run_dir, at, *overrides):
    """Runs until the metrics of step `at` are written, as if the process were killed then."""
    write = MetricsLog.write

    def interrupt(self, stage, step, values):
        write(self, stage, step, values)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupt)
        assert command(workshop, run_dir, *overrides) == 130


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings", "saved"),
    [
        ("sft", [*STREAMED["sft"], "sft.data.shuffle_buffer=50"], 9),
        ("ppo", [*STREAMED["ppo"], "ppo.data.shuffle_buffer=7"], 2),
        ("ppo", ["ppo.success_curriculum.solved_at=3"], 2),
    ],
    ids=["sft", "ppo", "success"],
)
def test_a_killed_run_continues_with_the_same_rows(workshop, monkeypatch, capfd, stage, settings, saved):
    straight, killed = (f"{name}-{len(settings)}-{stage}" for name in ("straight", "killed"))
    assert command(workshop, straight, f"stages=[{stage}]", *settings) == 0
    interrupted(monkeypatch, workshop, killed, saved + 1, f"stages=[{stage}]", *settings)
    capfd.readouterr()
    assert command(workshop, killed, f"stages=[{stage}]", *settings) == 0
    assert f"{stage}: resumes after step {saved} of" in capfd.readouterr().err
    assert_same(result(workshop, straight), result(workshop, killed))
    if "success" in settings[0]:
        shares = [line["curriculum/seen"] for line in result(workshop, killed)[1] if "curriculum/seen" in line]
        assert len(shares) == 6 and shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1


@pytest.mark.slow
def test_a_bad_row_in_the_middle_stops_the_run_which_continues_when_it_is_corrected(workshop, capfd):
    path = workshop / "correct.jsonl"
    good = (workshop / "demonstrations.jsonl").read_text()
    path.write_text(good)
    settings = ["stages=[sft]", *STREAMED["sft"], "sft.data.shuffle_buffer=50", f"sft.data.path={path}", "sft.epochs=1"]
    assert command(workshop, "good", *settings) == 0
    lines = good.splitlines()
    lines[170] = lines[170][:-9]
    path.write_text("\n".join(lines) + "\n")
    assert command(workshop, "bad", *settings) == 1
    said = capfd.readouterr().err
    assert "correct.jsonl:171: not JSON" in said and "correct it, and run the same command to continue" in said
    path.write_text(good)
    assert command(workshop, "bad", *settings) == 0
    assert "sft: resumes after step" in capfd.readouterr().err
    assert_same(result(workshop, "good"), result(workshop, "bad"))
    path.write_text(good.replace("the", "a", 1))
    assert command(workshop, "bad", *settings, "sft.save_every=4") == 0  # finished stages do not read their rows
