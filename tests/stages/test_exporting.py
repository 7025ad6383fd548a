"""Runs written by hand, as training leaves them, and exported; and PPO that starts from what PEFT wrote."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint.run_dir import open_run
from jaxrlhf.cli import export
from jaxrlhf.config import AdapterConfig, RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import save_adapter
from jaxrlhf.hf.peft import load_peft, save_peft
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind, init_adapter, merge, without_head
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.roles import load_roles, mark_finished, save_base, save_role
from jaxrlhf.stages.run import run_stages
from jaxrlhf.tracking.metrics import MetricsLog

NEW = {"new": {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 40, "max_positions": 64}}
FORWARD = jax.jit(Decoder.__call__)
SFT = {"data": {"path": "builtin:assistant-demonstrations"}}


def lora(base, seed, head=None, targets=("all-linear",)):
    config = AdapterConfig(rank=3, alpha=3.0, target_modules=targets)
    adapter = init_adapter(base, config, jax.random.key(seed), head)
    noise = np.random.default_rng(seed)
    return {
        path: {
            name: leaf
            if name == "lora_scale"
            else leaf + jnp.asarray(0.2 * noise.standard_normal(leaf.shape), jnp.float32)
            for name, leaf in leaves.items()
        }
        for path, leaves in adapter.items()
    }


def make_run(folder, model, own_base=False, sft="lora", adapters=("sft", "reward", "value", "policy")):
    """A run whose stages have finished, without any training."""
    config = {"run_dir": str(folder), "model": model, "stages": ["sft"], "sft": SFT | {"adapter": {"kind": sft}}}
    config = RunConfig.model_validate(config)
    roles = load_roles(config)
    open_run(folder, dump_config(config))
    if own_base:
        save_base(str(folder), roles.base, roles.tokenizer)
    heads = {"reward": "reward", "value": "value"}
    roles.adapters = {name: lora(roles.base, seed, heads.get(name)) for seed, name in enumerate(adapters)}
    for name, adapter in roles.adapters.items():
        save_role(str(folder), name, adapter)
    mark_finished(str(folder), "sft", {})
    return SimpleNamespace(folder=folder, roles=roles, base=roles.base, adapters=roles.adapters)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that made its own base."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", NEW, own_base=True)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 30, (2, 7)).astype(np.int32)


def logits(base, adapter, tokens):
    return np.asarray(FORWARD(merge(base, adapter), tokens))  # merged, so that all have one program


def exported(*arguments):
    assert export.main([str(argument) for argument in arguments]) == 0


def theirs(folder, tokens, model="CausalLM", peft_on=None):
    """Logits or scores of transformers' model in a folder, or of PEFT's adapter there on the folder `peft_on`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    opened = getattr(transformers, f"AutoModelFor{model}").from_pretrained(peft_on or folder, dtype="float32")
    if peft_on is not None:
        opened = pytest.importorskip("peft").PeftModel.from_pretrained(opened, folder)
    with torch.no_grad():
        return opened(input_ids=torch.tensor(tokens).long()).logits.numpy()


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("role", [None, "sft"])
def test_a_merged_folder_is_the_role_for_transformers(run, tokens, tmp_path, role):
    exported("--run", run.folder, "--to", tmp_path / "x", "--format", "merged", *(["--role", role] if role else []))
    expected = logits(run.base, run.adapters[role or "policy"], tokens)
    np.testing.assert_allclose(theirs(tmp_path / "x", tokens), expected, atol=1e-4)
    assert np.abs(expected - logits(run.base, None, tokens)).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_folder_is_whole_sharded_and_of_the_dtype_asked_for(run, tmp_path, dtype):
    to = tmp_path / "x"
    exported("--run", run.folder, "--to", to, "--format", "merged", "--dtype", dtype, "--max-shard-bytes", 9000)
    model, tokenizer = load_pretrained(to, dtype=dtype)
    for name, leaf in named_parameters(merge(run.base, run.adapters["policy"])).items():
        assert named_parameters(model)[name].dtype == dtype
        np.testing.assert_array_equal(named_parameters(model)[name], leaf.astype(dtype), err_msg=name)
    assert tokenizer.vocab_size == run.roles.tokenizer.vocab_size and model.config == run.base.config
    files = {file.name for file in to.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    assert json.loads((to / "config.json").read_text())["dtype"] == dtype


def test_an_adapter_for_peft_belongs_on_the_base_that_the_run_made(run, tokens, tmp_path, capsys):
    exported("--run", run.folder, "--to", tmp_path / "x", "--format", "peft")
    base = str(run.folder / "roles" / "base")
    assert f"its base is {base}; a run made this base" in capsys.readouterr().out
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    computed = theirs(tmp_path / "x", tokens, peft_on=base)
    np.testing.assert_allclose(computed, logits(run.base, run.adapters["policy"], tokens), atol=1e-4)
    assert np.abs(computed - logits(run.base, None, tokens)).max() > 0.1


def test_an_adapter_for_peft_belongs_on_the_base_that_the_run_was_given(run, tmp_path, capsys, monkeypatch):
    save_pretrained(tmp_path / "model", run.base, tokenizer=run.roles.tokenizer)
    make_run(tmp_path / "first", {"path": str(tmp_path / "model")})
    make_run(tmp_path / "second", {"run": str(tmp_path / "first")}, adapters=["policy"])
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        exported("--run", name, "--to", f"{name}-adapter", "--format", "peft", "--dtype", "bfloat16")
        out = capsys.readouterr().out
        assert out.endswith(f"its base is {tmp_path / 'model'}\n")
    half = load_peft(tmp_path / "second-adapter", run.base)
    policy = load_roles(RunConfig.model_validate({"run_dir": "second", "model": {"run": "first"}, "stages": ["sft"],
                                                  "sft": SFT})).adapters["policy"]  # fmt: skip
    for ours, stored in zip(jax.tree.leaves(policy), jax.tree.leaves(half)):
        wanted = ours.astype(jnp.bfloat16).astype(jnp.float32) if ours.ndim else ours
        np.testing.assert_array_equal(stored, wanted)


@pytest.mark.parametrize("role", [None, "value"])
def test_a_reward_folder_scores_as_the_run_does(run, tokens, tmp_path, capsys, role):
    to = tmp_path / "x"
    exported("--run", run.folder, "--to", to, "--format", "reward", *(["--role", role] if role else []))
    shown = capsys.readouterr()
    assert ("score_bias" in shown.out) == (role == "value") and "Warning" not in shown.err
    model = bind(run.base, run.adapters[role or "reward"])
    expected = jax.jit(sequence_scores)(model, tokens[:1], jnp.ones((1, 7), bool))
    scores = theirs(to, tokens[:1], "SequenceClassification")
    assert scores.shape == (1, 1)
    # The format has no place for a value head's bias.
    bias = run.adapters[role or "reward"]["score"].get("bias", 0.0)
    assert (role == "value") == bool(bias)
    np.testing.assert_allclose(scores[:, 0] + bias, expected, atol=1e-4)
    assert (to / "tokenizer.json").is_file()


def test_sft_of_all_weights_is_the_base(run, tokens, tmp_path, capsys):
    whole = make_run(tmp_path / "run", NEW, own_base=True, sft="full", adapters=[])
    exported("--run", whole.folder, "--to", tmp_path / "x", "--format", "merged")
    assert "sft of" in capsys.readouterr().out
    for name, leaf in named_parameters(load_pretrained(tmp_path / "x")[0]).items():
        np.testing.assert_array_equal(leaf, named_parameters(whole.base)[name])


# ---------------------------------------------------------------- what cannot be used


def refused(capsys, *arguments):
    assert export.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.removesuffix("\n")
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_what_cannot_be_exported_is_one_line_and_status_2(run, tmp_path, capsys):
    whole = make_run(tmp_path / "whole", NEW, own_base=True, sft="full", adapters=["reward"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    to = tmp_path / "x"
    cases = [
        (tmp_path / "none", to, "merged", [], ["none", "config.yaml"]),
        (whole.folder, to, "merged", ["--role", "policy"], ["no role policy", "it has reward, sft"]),
        (whole.folder, to, "peft", [], ["sft", "full weights", "--format merged"]),
        (run.folder, to, "reward", ["--role", "sft"], ["sft", "no scalar head", "--role reward"]),
        (run.folder, to, "merged", ["--max-shard-bytes", "0"], ["--max-shard-bytes", "0"]),
        (run.folder, tmp_path / "notes", "merged", [], ["notes.txt", "empty folder"]),
        (run.folder, tmp_path / "notes", "peft", [], ["notes.txt", "empty folder"]),
        (run.folder, tmp_path / "a file", "peft", [], ["is a file"]),
        (run.folder, run.folder / "roles" / "base", "merged", [], ["--to", "give another folder"]),
        (run.folder, run.folder, "merged", [], ["--to", "give another folder"]),
    ]
    for folder, target, format, more, words in cases:
        error = refused(capsys, "--run", folder, "--to", target, "--format", format, *more)
        assert all(word in error for word in words), error
    assert not to.exists() and (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_a_run_without_policy_says_what_it_has(tmp_path, capsys):
    run = make_run(tmp_path / "run", NEW, own_base=True, adapters=["reward"])
    config = (run.folder / "config.yaml").read_text()
    assert "lora" in config
    error = refused(capsys, "--run", run.folder, "--to", tmp_path / "x", "--format", "merged")
    assert "no role policy or sft; it has reward" in error and "--format reward" in error


def test_a_format_without_its_role_says_which_are_there(tmp_path, capsys):
    run = make_run(tmp_path / "run", NEW, own_base=True, adapters=["policy", "value"])
    to = ("--run", run.folder, "--to", tmp_path / "x", "--format")
    for format, role, words in (
        ("reward", None, "--format reward: this run has no role reward; it has policy, value; give --role value"),
        ("reward", "reward", "--role reward: this run has no role reward; it has policy, value; give --role value"),
        ("reward", "policy", "--format reward: policy has no scalar head; give --role value"),
        ("merged", "sft", "--role sft: this run has no role sft; it has policy, value; give --role policy or --role"),
    ):
        assert words in refused(capsys, *to, format, *(["--role", role] if role else []))
    assert not (tmp_path / "x").exists()
    policy = make_run(tmp_path / "policy", NEW, own_base=True, adapters=["policy"])
    error = refused(capsys, "--run", policy.folder, "--to", tmp_path / "x", "--format", "reward")
    assert "no role reward; it has policy; give --format merged" in error


def test_an_export_replaces_what_an_earlier_one_wrote_and_nothing_else(run, tmp_path, capsys):
    to = tmp_path / "x"
    formats = ("merged", "peft", "reward", "peft", "merged")
    files = []
    for format in formats:
        exported("--run", run.folder, "--to", to, "--format", format)
        files.append(sorted(path.name for path in to.iterdir()))
    assert files[0] == files[4] and files[1] == files[3] and "config.json" not in files[1]
    capsys.readouterr()
    (to / "mine.txt").write_text("mine")
    for format in formats[:3]:
        assert "mine.txt" in refused(capsys, "--run", run.folder, "--to", to, "--format", format)
    assert sorted(path.name for path in to.iterdir()) == sorted([*files[4], "mine.txt"])
    inside = ("--run", run.folder, "--format", "merged", "--to")
    for folder in ("roles/x", "checkpoints/ppo/7"):
        assert "give another folder" in refused(capsys, *inside, run.folder / folder)


def test_the_model_that_a_run_was_given_is_not_replaced(run, tmp_path, capsys):
    save_pretrained(tmp_path / "model", run.base, tokenizer=run.roles.tokenizer)
    made = make_run(tmp_path / "run", {"path": str(tmp_path / "model")}, adapters=["policy"])
    error = refused(capsys, "--run", made.folder, "--to", tmp_path / "model", "--format", "merged")
    assert "--to" in error and "made from" in error


# ---------------------------------------------------------------- in again


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model of one layer, a PEFT folder for it, and a reward that differs from answer to answer."""
    folder = tmp_path_factory.mktemp("given")
    settings = {"run_dir": str(folder), "model": {"new": NEW["new"] | {"layers": 1}}, "stages": ["sft"], "sft": SFT}
    roles = load_roles(RunConfig.model_validate(settings))
    save_pretrained(folder / "model", roles.base, tokenizer=roles.tokenizer)
    adapter = lora(roles.base, 0, targets=("q_proj", "down_proj"))
    save_peft(folder / "adapter", roles.base, adapter)
    (folder / "reward.py").write_text("def letters(prompts, completions):\n    return [len(c) for c in completions]\n")
    return SimpleNamespace(folder=folder, base=roles.base, adapter=adapter, path=str(folder / "adapter"))


def settings_of(given, run_dir, **named):
    stage = {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 1, "batch_size": 8,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "evaluation": {"prompts": 8},
        "update": {"epochs": 1, "minibatches": 1},
        "reward": {"kind": "function", "function": f"{given.folder}/reward.py:letters"},
    } | named  # fmt: skip
    return {"run_dir": str(run_dir), "model": {"path": str(given.folder / "model")}, "stages": ["ppo"], "ppo": stage}


def test_ppo_starts_from_a_peft_folder_with_it_as_reference(given, tmp_path):
    settings = settings_of(given, tmp_path / "run", policy=given.path, reference=given.path)
    policy = run_stages(RunConfig.model_validate(settings)).adapters["policy"]
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["kl/k1"] == pytest.approx(0, abs=1e-4)
    # One step moves the policy by little beside what the adapter is, so that this is where it started.
    for path, leaves in given.adapter.items():
        moved = np.abs(policy[path]["lora_b"] - leaves["lora_b"]).max()
        assert 0 < moved < 0.01 < np.abs(leaves["lora_b"]).max()
        assert policy[path]["lora_scale"] == leaves["lora_scale"]


@pytest.mark.parametrize(
    "named, start, reference",
    [
        ({"reference": "peft"}, "peft", "peft"),
        ({"policy": "peft"}, "peft", None),
        ({"policy": "ours", "reference": "peft"}, "ours", "peft"),
    ],
)
def test_where_policy_and_reference_come_from(given, tmp_path, named, start, reference):
    ours = lora(given.base, 5, head="reward")
    save_adapter(tmp_path / "ours", ours)
    folders = {"peft": given.path, "ours": str(tmp_path / "ours")}
    adapters = {"peft": given.adapter, "ours": without_head(ours), None: None}
    named = {setting: folders[name] for setting, name in named.items()}
    config = RunConfig.model_validate(settings_of(given, tmp_path / "run", **named))
    run = Run(config, make_mesh(config.mesh), MetricsLog(None), MetricsLog(None))
    roles = load_roles(config)
    inputs = ppo.load(run, roles)
    policy = ppo.starting_policy(run, roles, inputs)
    before = ppo.starting_reference(run, roles, inputs, policy)
    for found, wanted in ((policy, start), (before, reference)):
        jax.tree.map(np.testing.assert_array_equal, found, adapters[wanted])
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before)}
    assert not buffers & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(policy)}, "given away"


@pytest.mark.parametrize("setting", ["policy", "reference"])
def test_an_adapter_that_does_not_fit_stops_the_run_before_anything_is_written(run, given, tmp_path, setting):
    save_peft(tmp_path / "deep", run.base, run.adapters["policy"])
    config = RunConfig.model_validate(settings_of(given, tmp_path / "run", **{setting: str(tmp_path / "deep")}))
    with pytest.raises(UserError, match=rf"^ppo\.{setting}: .*layers\.1.*does not belong to this base") as caught:
        run_stages(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
