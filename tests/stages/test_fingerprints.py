"""A run continues with the model, tokenizer and rows that it began with; another reward is reported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.cli.train import main
from jaxrlhf.stages.fingerprints import fingerprint

PPO = {"iterations": 1, "batch_size": 4, "max_prompt_tokens": 16, "evaluation": {"prompts": 4}}


def test_a_fingerprint_depends_on_every_bit():
    matrix, flags, halves = jnp.arange(12.0).reshape(3, 4), jnp.array([True, False]), jnp.ones(2, "bfloat16")
    tree = {"a": matrix, "b": flags, "c": jnp.int8(3), "d": halves}
    known = fingerprint(tree)
    assert fingerprint(jax.tree.map(jnp.copy, tree)) == known
    for name, leaf in tree.items():
        bits = np.array(leaf).reshape(-1).view(np.uint8)
        bits[-1] ^= 1
        changed = jnp.asarray(bits.view(leaf.dtype).reshape(leaf.shape))
        assert fingerprint(tree | {name: changed}) != known
    assert fingerprint(tree | {"a": tree["a"][::-1]}) != known and fingerprint(tree | {"a": tree["a"].T}) != known


@pytest.fixture
def run(tmp_path, stories260k, capsys):
    """`run(*overrides)` gives the command of one run again; its exit status and its lines on stderr."""
    model = shutil.copytree(stories260k, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    words = ("cat", "dog", "sun", "big")
    rows.write_text("".join(json.dumps({"prompt": f"the {word}", "answer": word}) + "\n" for word in words))
    reward = tmp_path / "reward.py"
    reward.write_text("def score(prompts, completions, **columns):\n    return [float(len(t)) for t in completions]\n")
    config = {
        "run_dir": str(tmp_path / "run"), "stages": ["ppo"], "model": {"path": str(model)},
        "ppo": PPO | {"data": {"path": str(rows)}, "sampling": {"max_new_tokens": 4},
                      "adapter": {"rank": 2, "target_modules": ["q_proj"]},
                      "reward": {"kind": "function", "function": f"{reward}:score"}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def give(*overrides):
        status = main(["--config", str(tmp_path / "config.yaml"), *overrides])
        return status, capsys.readouterr().err

    give.model, give.rows, give.reward, give.folder = model, rows, reward, tmp_path / "run"
    return give


def _scale_a_norm(run):
    tensors = load_file(run.model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    save_file(tensors, run.model / "model.safetensors", {"format": "pt"})


def _another_row(run):
    run.rows.write_text(run.rows.read_text().replace("the dog", "the cat"))


def _another_column(run):
    run.rows.write_text(run.rows.read_text().replace('"answer": "dog"', '"answer": "cat"'))


def _another_template(run):
    file = run.model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages[0].content }}"}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_scale_a_norm, "the model changed"),
        (_another_row, "the prompts rows of ppo changed"),
        (_another_column, "the prompts rows of ppo changed"),
        (_another_template, "the tokenizer changed"),
    ],
)
def test_another_origin_is_refused_and_writes_nothing(run, change, what):
    assert run()[0] == 0
    kept = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    change(run)
    status, errors = run("ppo.iterations=2", "ppo.update.optimizer.schedule=constant")
    assert status == 2 and what in errors and "restore the earlier state" in errors
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == kept


def test_another_reward_is_reported(run):
    assert run()[0] == 0
    run.reward.write_text(run.reward.read_text() + "# mended\n")
    status, errors = run("ppo.iterations=2")
    assert status == 0 and "ppo.reward changed since the run began; the run continues with it" in errors
    assert run("ppo.iterations=3")[1].count("changed") == 0, "reported once"


def test_steps_without_their_checkpoints_are_not_begun_again(run):
    assert run()[0] == 0
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(run.folder / "checkpoints")
    status, errors = run("ppo.iterations=2")
    assert status == 2 and "checkpoints/ppo: is missing, but metrics.jsonl has steps of the stage ppo" in errors
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics
