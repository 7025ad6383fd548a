"""What a file, a setting or an option can cost is bounded, and refused in one line before anything is made."""

import json
import os

import jax
import pytest

import jaxrlhf
from jaxrlhf.cli import bench, generate, plan, train
from jaxrlhf.data import chats
from jaxrlhf.data.time_limit import within
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import SharedFault, UserError
from jaxrlhf.hf.tensor_files import read_json, read_tensors
from jaxrlhf.hf.weights import load_pretrained
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.stages.checks import check_microbatches

TEXT = """\
run_dir: run
stages: [sft, reward_model, ppo]
model: {new: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32}}
sft: {data: {path: "builtin:assistant-demonstrations", limit: 20}, max_length: 64}
reward_model: {data: {path: "builtin:assistant-preferences", limit: 20}, max_length: 64}
ppo:
  data: {path: "builtin:assistant-prompts", limit: 20}
  max_prompt_tokens: 16
  sampling: {max_new_tokens: 8}
  reward: {kind: function, function: "jaxrlhf.toy.world:gold_score"}
"""
HUGE = 10**12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def model(folder):
    """A small model folder in the current directory, and a function that changes its JSON files."""
    tokenizer = build_word_tokenizer(["what", "is", "it"])
    shape = DecoderConfig(tokenizer.vocab_size, 16, 32, 1, 2, 1, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    jaxrlhf.save_pretrained("model", Decoder(shape, jax.random.key(0)), tokenizer=tokenizer)

    def change(file="config.json", **entries):
        path = folder / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize("key", [
    "sft.batch_size", "sft.microbatch_size", "sft.max_length", "sft.epochs", "sft.evaluation.heldout", "sft.save_every",
    "sft.data.limit", "reward_model.batch_size", "reward_model.max_length", "reward_model.epochs",
    "reward_model.buckets", "ppo.batch_size", "ppo.iterations", "ppo.max_prompt_tokens", "ppo.evaluation.prompts",
    "ppo.resample", "ppo.sampling.max_new_tokens", "ppo.sampling.samples_per_prompt", "ppo.sampling.top_k",
    "ppo.sampling.slots", "ppo.sampling.prefill_chunk", "ppo.update.epochs", "ppo.update.minibatches",
    "ppo.score.initial_completions", "ppo.update.optimizer.total_steps", "adapter.rank", "model.new.hidden_size",
    "model.new.layers", "model.new.max_positions", "model.new.intermediate_size", "mesh.data", "mesh.context",
    "mesh.tensor", "seed", "checkpoints.keep", "checkpoints.grace", "ppo.data.limit", "ppo.data.text_tokens",
])  # fmt: skip
@pytest.mark.parametrize("size", [HUGE, 10**30])
def test_a_setting_that_no_machine_holds_is_refused_before_anything_is_made(folder, key, size, capsys):
    assert train.main(["--config", "run.yaml", f"{key}={size}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and key in error
    assert os.listdir(folder) == ["run.yaml"]


@pytest.mark.parametrize("overrides", [
    ["ppo.batch_size=1000000000"],
    ["ppo.batch_size=50000", "ppo.sampling.samples_per_prompt=50000"],
    ["ppo.batch_size=2147483647", "ppo.update.minibatches=7"],
    ["sft.batch_size=2147483647"],
    ["reward_model.batch_size=2147483647"],
    ["model.new.hidden_size=2000000000"],
    ["model.new.layers=10001"],
    ["model.new.intermediate_size=2147483647", "model.new.layers=10000"],
    ["adapter.rank=2147483647"],
    ["ppo.value_adapter.rank=2147483647"],
    ["ppo.iterations=2147483647", "ppo.update.epochs=1000"],
    ["model.new.max_positions=2147483647", "sft.max_length=2147483647"],
    ["sft.epochs=2147483647", "sft.batch_size=2", "sft.packing=false"],
    ["reward_model.epochs=2147483647", "reward_model.batch_size=2"],
    ["sft.data.limit=2147483647"],
    ["ppo.sampling.slots=2147483647"],
    ["model.new.max_positions=2147483647", "ppo.sampling.max_new_tokens=2147483000"],
    ["ppo.reward={kind: http, url: 'http://x', timeout: 1e300}"],
    ["sft.optimizer.learning_rate=1e300"],
])  # fmt: skip
def test_sizes_that_are_valid_each_but_huge_together_are_refused(folder, overrides, capsys):
    assert train.main(["--config", "run.yaml", *overrides]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(errors[0]) < 400, errors
    assert os.listdir(folder) == ["run.yaml"], "so that the same folder takes the right settings"


def test_the_divisors_of_a_message_are_all_there():
    with pytest.raises(UserError, match=r"these fit: 1, 2, 3, 4, 6, 9, 12, 18, 36$"):
        check_microbatches(36, 5, "k")


@pytest.mark.parametrize("command, arguments, option", [
    (generate, ["--model", "m", "--prompt", "caf\udce9"], "--prompt"),
    (generate, ["--model", "m", "--prompt", "a", "--seed", "9" * 23], "--seed"),
    (generate, ["--model", "m", "--prompt", "a", "--seed", "-1"], "--seed"),
    (generate, ["--model", "m", "--prompt", "a", "--seed", "9" * 5000], "--seed"),
    (generate, ["--model", "m", "--prompt", "a", "--max-new-tokens", "9" * 23], "--max-new-tokens"),
    (generate, ["--model", "m", "--prompt", "a", "--top-k", "9" * 23], "--top-k"),
    (generate, ["--model", "m", "--prompt", "a", "--temperature", "nan"], "--temperature"),
    (generate, ["--model", "m", "--prompt", "a", "--top-p", "1e999"], "--top-p"),
    (plan, ["--config", "run.yaml", "--devices", "9" * 12], "--devices"),
    (plan, ["--config", "run.yaml", "--devices", "8", "--per-host", "x"], "--per-host"),
    (bench, ["--config", "run.yaml", "--repeats", "9" * 23], "--repeats"),
    (bench, ["--config", "run.yaml", "--iterations", "-1"], "--iterations"),
    (train, ["--config", "run.yaml", "--start-timeout", "1e300"], "--start-timeout"),
    (train, ["--config", "run.yaml", "--processes", "9" * 23], "--processes"),
    (train, ["--config", "run.yaml", "--process", "-1"], "--process"),
    (train, ["--nonsense"], "--config"),
])  # fmt: skip
def test_options_out_of_bounds_are_one_line(folder, command, arguments, option, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and option in error and error.count("\n") == 1 and len(error) < 400


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "model.safetensors.index.json"])  # fmt: skip
def test_deep_json_of_a_model_is_one_line(model, folder, file):
    (folder / "model" / file).write_text(DEEP)
    if "index" in file:
        (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        load_pretrained("model")
    assert "\n" not in str(caught.value) and "model" in str(caught.value)


def test_deep_json_elsewhere_is_one_line(folder):
    (folder / "deep.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"deep\.json: cannot be read as JSON"):
        read_json(folder / "deep.json")
    (folder / "deep.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    with pytest.raises(UserError, match="no safetensors header"):
        read_tensors(folder / "deep.safetensors")


@pytest.mark.parametrize("entry", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings",
                                   "num_attention_heads", "intermediate_size"])  # fmt: skip
def test_huge_sizes_of_a_model_are_one_line(model, entry):
    model(**{entry: 10**18})
    with pytest.raises(UserError, match=entry):
        load_pretrained("model")


def test_more_layers_than_tensors_are_refused_before_a_decoder_is_built(model):
    model(num_hidden_layers=9999)
    with pytest.raises(UserError, match=r"requires 9999 layers, but the weights have only .* tensors"):
        load_pretrained("model")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [99999, [1, 99999]])
def test_an_eos_outside_the_vocabulary_is_refused(model, file, value):
    model(file, eos_token_id=value)
    with pytest.raises(UserError, match=rf"{file}: eos_token_id must be from 0 to \d+, not 99999"):
        load_pretrained("model")


LOOPS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro m(n) %}{% for i in range(99999) %}{{ m(n) if n > 9 }}{% for j in range(999) %}{% endfor %}"
    "{% endfor %}{% endmacro %}{{ m(1) }}",
}  # fmt: skip


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_chat_template_that_loops_is_one_line(model, monkeypatch, template):
    model("tokenizer_config.json", chat_template=template)
    monkeypatch.setattr(chats, "TIME_LIMIT", 0.3)
    tokenizer = load_tokenizer("model")
    with pytest.raises(SharedFault, match=r"the chat template took more than 0.3 seconds for one chat") as caught:
        tokenizer.encode_prompt([{"role": "user", "content": "what"}])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(chats, "TIME_LIMIT", 1000)
    with pytest.raises(SharedFault):  # at once
        tokenizer.encode_prompt([{"role": "user", "content": "why"}])


def test_a_chat_template_that_computes_a_power_is_one_line(model):
    model("tokenizer_config.json", chat_template="{{ 10 ** 10 ** 10 }}")
    with pytest.raises(SharedFault, match=r"the chat template uses the operator \*\*"):
        load_tokenizer("model").encode_prompt([{"role": "user", "content": "what"}])


def test_stars_of_text_and_of_arguments_are_no_power(model):
    template = "**{{ dict(**{'a': messages[0].content}).a }}** 2 ** 3"
    model("tokenizer_config.json", chat_template=template)
    chat = [{"role": "user", "content": "what"}]
    assert load_tokenizer("model").chats.prompt_text(chat, "") == "**what** 2 ** 3"


def test_the_time_limit_passes_results_and_errors_on():
    assert within(10, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(10, lambda: {}["a"])
    ended = []

    def endless():
        try:
            while True:
                pass
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        within(0.1, endless)
    for _ in range(100):
        if ended:
            break
        within(1, lambda: None)
        jax.block_until_ready(jax.numpy.zeros(1))
    assert ended, "its thread has ended"
