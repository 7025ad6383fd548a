"""The roles of a run that was stopped, from its checkpoints; and a run that ends where it was stopped."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf.cli import export, generate, train
from jaxrlhf.config.reading import load_config
from jaxrlhf.hf.adapter_files import load_adapter
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.stages.roles import load_origin, load_run, save_base
from jaxrlhf.tracking.metrics import MetricsLog

MODEL = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
REWARD = "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
ROWS = {"batch_size": 8, "max_length": 64, "save_every": 2}
CONFIG = {
    "model": {"new": MODEL}, "stages": ["ppo"], "adapter": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
    "checkpoints": {"best": "length/mean", "best_is": "lowest"},
    "sft": ROWS | {"data": {"path": "builtin:assistant-demonstrations", "limit": 40}, "evaluation": {"heldout": 4}},
    "reward_model": ROWS | {"data": {"path": "builtin:assistant-preferences", "limit": 40}, "buckets": 1},
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 50, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "evaluation": {"prompts": 4},
        "update": {"epochs": 1, "minibatches": 1, "ema_decay": 0.5}, "save_every": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Settings, a reward, and `stopped`: a PPO run that was stopped in step 6, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "reward.py").write_text(REWARD)
    reward = {"kind": "function", "function": f"{folder / 'reward.py'}:score"}
    settings = CONFIG | {"ppo": CONFIG["ppo"] | {"reward": reward}}
    (folder / "config.json").write_text(json.dumps(settings))
    write = MetricsLog.write

    def interrupt(self, stage, step, values):
        write(self, stage, step, values)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupt)
        assert command(folder / "config.json", folder / "stopped") == 130
    return folder


def command(config, run_dir, *overrides):
    return train.main(["--config", str(config), f"run_dir={run_dir}", *overrides])


def run(main, *arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, main, *arguments):
    capsys.readouterr()
    assert run(main, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out
    return shown.err


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_run_that_ends_where_it_was_stopped_is_a_shorter_run(folder, tmp_path, capsys):
    stopped = shutil.copytree(folder / "stopped", tmp_path / "stopped")
    config = folder / "config.json"
    for wrong in (3, 5):  # 5 was done, but not saved
        error = refused(capsys, train.main, "--config", config, f"run_dir={stopped}", f"ppo.iterations={wrong}")
        assert f"ppo.iterations was 50, is now {wrong};" in error and "give ppo.iterations=4 to end the run" in error
    at_step = load_run(str(stopped), step="latest")
    assert command(config, stopped, "ppo.iterations=4") == 0
    shown = capsys.readouterr()
    assert "ppo.iterations was 50, is now 4: the stage ends at its last checkpoint" in shown.err
    assert "before PPO" in shown.out and "after PPO" in shown.out
    assert command(config, tmp_path / "short", "ppo.iterations=4") == 0
    for name in ("policy", "value", "average"):
        path = f"roles/{name}/adapter.safetensors"
        assert (stopped / path).read_bytes() == (tmp_path / "short" / path).read_bytes()
        same(at_step.adapters[name], load_adapter(stopped / "roles" / name, at_step.base))
    finished = [(path / "roles" / "finished.json").read_text() for path in (stopped, tmp_path / "short")]
    assert finished[0] == finished[1]
    error = refused(capsys, train.main, "--config", config, f"run_dir={stopped}", "ppo.iterations=2")
    assert "ppo.iterations was 4, is now 2" in error


def test_a_stopped_run_answers_and_is_exported(folder, tmp_path, capsys):
    stopped = folder / "stopped"
    question = ("--run", stopped, "--prompt", "hello", "--max-new-tokens", 4, "--json")
    target = ("--run", stopped, "--to", tmp_path / "x", "--format", "merged")
    for main, arguments in ((generate.main, question), (export.main, target)):
        error = refused(capsys, main, *arguments)
        assert "no stage of this run has finished" in error and "--step latest" in error
        for step, words in (
            ("3", "has checkpoints of steps 2, 4"),
            ("newest", "latest, best or the number of a saved step"),
            ("9" * 5000, "steps 2, 4"),
        ):
            error = refused(capsys, main, *arguments, "--step", step)
            assert words in error and len(error) < 500
    assert run(generate.main, *question, "--step", "latest", "--roles", "base,policy,average") == 0
    shown = capsys.readouterr()
    assert set(json.loads(shown.out)["answers"]) == {"base", "policy", "average"} and "of step 4" in shown.err
    weights = []
    for step in ("2", "4", "best"):
        assert run(export.main, *target, "--step", step) == 0
        weights.append(named_parameters(load_pretrained(tmp_path / "x")[0]))
    name = "layers.0.attention.q_proj/kernel"
    assert (weights[0][name] != weights[1][name]).any()
    lengths = [json.loads(line)["length/mean"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    same(weights[2], weights[0 if lengths[1] <= lengths[3] else 1])
    assert not (stopped / "roles" / "policy").exists(), "reading a checkpoint writes nothing"


def test_what_is_not_there_is_named(folder, tmp_path, capsys):
    stopped = shutil.copytree(folder / "stopped", tmp_path / "stopped")
    assert "give --run" in refused(capsys, generate.main, "--model", "m", "--prompt", "a", "--step", "latest")
    target = ("--run", stopped, "--to", tmp_path / "x", "--format")
    error = refused(capsys, export.main, *target, "reward", "--step", "latest")
    assert "no role reward; it has policy, value, average; give --role value" in error
    data = next(path for path in (stopped / "checkpoints/ppo/4/state/d").iterdir())
    data.write_bytes(b"\0" + data.read_bytes()[1:])
    assert "4: this checkpoint is damaged: " in refused(capsys, export.main, *target, "merged", "--step", "4")
    assert run(export.main, *target, "merged", "--step", "2") == 0
    shutil.rmtree(stopped / "roles" / "base")
    assert "roles/base: is missing" in refused(capsys, export.main, *target, "merged", "--step", "2")
    shutil.rmtree(stopped / "checkpoints")
    assert "has no checkpoint" in refused(capsys, export.main, *target, "merged", "--step", "latest")
    assert "has finished; continue this run, or give another run" in refused(capsys, export.main, *target, "merged")


@pytest.fixture(scope="module")
def earlier(folder):
    """Finished runs: SFT and reward model as LoRA adapters, and SFT of all weights."""
    command(folder / "config.json", folder / "lora", "stages=[sft, reward_model]")
    command(folder / "config.json", folder / "full", "stages=[sft]", "sft.adapter.kind=full")
    return SimpleNamespace(lora=folder / "lora", full=folder / "full")


def test_the_stage_under_way_is_the_last_one_with_checkpoints(earlier, tmp_path, capsys):
    for stage, name in (("reward_model", "reward"), ("sft", "sft")):
        lora = shutil.copytree(earlier.lora, tmp_path / stage)
        saved = load_run(str(lora))
        if stage == "sft":
            shutil.rmtree(lora / "checkpoints" / "reward_model")
        shutil.rmtree(lora / "roles" / name)
        finished = json.loads((lora / "roles" / "finished.json").read_text())
        finished.pop(stage)
        (lora / "roles" / "finished.json").write_text(json.dumps(finished))
        read = load_run(str(lora), step="latest")
        assert set(read.adapters) == {"sft", "reward"}
        same(read.adapters, saved.adapters)
        target = ("--run", lora, "--to", tmp_path / "x", "--format")
        assert run(export.main, *target, "reward" if stage == "reward_model" else "merged", "--step", "latest") == 0
        assert f"x: {name} of {lora} (checkpoint of {stage}, step {read.checkpoint[1]})" in capsys.readouterr().out


def test_sft_of_all_weights_is_the_base_of_its_checkpoint(earlier, tmp_path):
    full = shutil.copytree(earlier.full, tmp_path / "full")
    trained = load_run(str(full)).base
    config = load_config(full / "config.yaml").model_copy(update={"run_dir": str(full)})
    started = load_origin(config)  # what the run's folder held before the stage ended
    save_base(str(full), started, load_run(str(full)).tokenizer)
    (full / "roles" / "finished.json").unlink()
    read = load_run(str(full), step="latest")
    assert not read.adapters
    same(named_parameters(read.base), named_parameters(trained))
    name = "layers.0.attention.q_proj/kernel"
    assert (named_parameters(started)[name] != named_parameters(trained)[name]).any()


def test_a_checkpoint_of_another_model_is_named(folder, tmp_path, capsys):
    stopped = shutil.copytree(folder / "stopped", tmp_path / "stopped")
    config = (stopped / "config.yaml").read_text()
    settings = load_config(stopped / "config.yaml").model_copy(update={"run_dir": str(tmp_path / "other")})
    new = settings.model.new.model_copy(update={"hidden_size": 8})
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"new": new})})
    save_base(str(tmp_path / "other"), load_origin(other), load_run(str(stopped), step="latest").tokenizer)
    shutil.rmtree(stopped / "roles" / "base")
    shutil.copytree(tmp_path / "other" / "roles" / "base", stopped / "roles" / "base")
    error = refused(capsys, generate.main, "--run", stopped, "--prompt", "a", "--step", "latest")
    assert "ppo/4: tensor layers.0" in error and "for this base, not" in error
    assert (stopped / "config.yaml").read_text() == config
