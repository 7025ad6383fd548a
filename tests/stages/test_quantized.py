"""Runs on a base in int8 or nf4 codes: PPO on it, what starts from such a run, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint.run_dir import open_run
from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind, merge
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.models.quantize import quantization, quantize_decoder
from jaxrlhf.stages.roles import load_roles, load_run, mark_finished, save_base
from jaxrlhf.stages.run import run_stages
from jaxrlhf.toy.world import VOCABULARY

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
PPO = {
    "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 2, "batch_size": 8,
    "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": FEW, "value_adapter": FEW,
    "reward": {"kind": "function", "function": f"{__file__}:count_a"}, "evaluation": {"prompts": 8},
    "update": {"epochs": 2, "minibatches": 1, "optimizer": {"learning_rate": 0.01}},
}  # fmt: skip


def count_a(completions, **columns):
    """The reward."""
    return [float(completion.count("a")) for completion in completions]


def settings(model, run_dir, **sections):
    return RunConfig.model_validate({"run_dir": str(run_dir), "model": model, **sections})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer."""
    tokenizer = build_word_tokenizer(VOCABULARY)
    config = DecoderConfig(
        tokenizer.vocab_size, 32, 80, layers=1, heads=2, kv_heads=1, head_dim=16, max_positions=64,
        stop_tokens=(tokenizer.eos_id,), pad_token=tokenizer.pad_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, Decoder(config, jax.random.key(0)), tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A PPO run on nf4 codes that has finished: its settings and its roles."""
    run_dir = tmp_path_factory.mktemp("runs") / "nf4"
    config = settings({"path": str(folder), "quantize": "nf4"}, run_dir, stages=["ppo"], ppo=PPO)
    return config, run_stages(config)


def check_same(one, other):
    one, other = named_parameters(one), named_parameters(other)
    assert set(one) == set(other)
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_ppo_runs_on_codes_and_leaves_no_base(finished, folder):
    config, roles = finished
    expected = load_pretrained(folder, quantize="nf4")[0]
    check_same(roles.base, expected)  # not a byte was written
    left = load_run(config.run_dir)
    check_same(left.base, expected)
    assert not (Path(config.run_dir) / "roles" / "base").exists() and set(left.adapters) == {"policy", "value"}
    assert any((pair["lora_b"] != 0).any() for pair in left.adapters["policy"].values())
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "ppo"]
    assert len(steps) == 2
    for line in steps:
        assert line["policy/first_ratio_error"] < 1e-5 and line["gap/logprob_max"] < 1e-4
        assert line["compiles/rollout"] == line["compiles/annotate"] == line["compiles/update"] == 1


def test_a_merged_export_computes_what_the_policy_did(finished, tmp_path):
    _, roles = finished
    save_pretrained(tmp_path / "merged", roles.base, roles.adapters["policy"], roles.tokenizer)
    merged, _ = load_pretrained(tmp_path / "merged")
    assert quantization(merged) is None
    tokens = jnp.arange(3, 15)[None]
    run = jax.jit(Decoder.__call__)
    expected = run(bind(roles.base, roles.adapters["policy"]), tokens)
    np.testing.assert_allclose(run(merged, tokens), expected, atol=1e-5)
    assert np.abs(expected - run(merge(roles.base, None), tokens)).max() > 1e-5


def test_a_run_that_starts_from_it_keeps_its_codes_or_asks_for_others(finished, folder, tmp_path):
    origin = finished[0].run_dir
    for quantize, kind in ((None, "nf4"), ("int8", "int8")):
        config = settings({"run": origin, "quantize": quantize}, tmp_path / "next", stages=["ppo"], ppo=PPO)
        check_same(load_roles(config).base, load_pretrained(folder, quantize=kind)[0])


def test_a_base_that_another_run_trained_whole_may_be_quantised(folder, tmp_path):
    """Such a run keeps its base as a plain folder; the codes are made when it is loaded."""
    base, tokenizer = load_pretrained(folder)
    ppo_only = {"stages": ["ppo"], "ppo": PPO}
    origin = settings({"path": str(folder)}, tmp_path / "whole", **ppo_only)
    open_run(origin.run_dir, dump_config(origin))
    changed = jax.tree.map(lambda leaf: leaf * 1.5, base)
    save_base(origin.run_dir, changed, tokenizer)
    mark_finished(origin.run_dir, "sft", {})
    config = settings({"run": origin.run_dir, "quantize": "int8"}, tmp_path / "next", **ppo_only)
    check_same(load_roles(config).base, quantize_decoder(changed, "int8"))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_training_a_quantised_model_whole_is_refused(stage, folder, tmp_path):
    full = {"kind": "full"}
    sections = {
        "sft": {"data": {"path": "builtin:assistant-demonstrations", "limit": 20}, "adapter": full, "max_length": 64},
        "reward_model": {
            "data": {"path": "builtin:assistant-preferences", "limit": 20}, "adapter": full, "max_length": 48,
        },
        "ppo": PPO | {"adapter": full},
    }  # fmt: skip
    model = {"path": str(folder), "quantize": "int8"}
    config = settings(model, tmp_path / "run", stages=[stage], **{stage: sections[stage]})
    with pytest.raises(UserError, match=rf"^{stage}\.adapter\.kind: must be lora, .*quantised \(int8\).*lora") as error:
        run_stages(config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_base_in_codes_is_never_a_runs_own(folder, tmp_path):
    base, tokenizer = load_pretrained(folder, quantize="nf4")
    with pytest.raises(UserError, match=r"model\.quantize: a base quantised to nf4 cannot be saved"):
        save_base(str(tmp_path), base, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_new_model_is_not_quantised(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"run_dir: {tmp_path}/run\nmodel: {{new: {{layers: 1}}, quantize: int8}}\nstages: [sft]\n")
    with pytest.raises(UserError, match="quantize needs a base that is not trained"):
        load_config(file)
