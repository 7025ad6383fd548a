"""A model whose files name three different ends: answers stop where SFT and the reward model teach them to."""

import json

import jax
import pytest
from tokenizers import AddedToken

from jaxrlhf.cli import export
from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, RunConfig
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer
from jaxrlhf.hf.weights import load_pretrained, save_pretrained, with_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.stages.roles import load_run
from jaxrlhf.stages.run import run_stages

TEMPLATE = (
    "{% for m in messages %}{{ '<turn> ' + m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ' }}{% endif %}"
)
WORDS = ["<turn>", "<end>", "<stop>", "user", "assistant", "sky", "grass", "snow", "blue", "green", "white", "red"]
ANSWERS = {"sky": "blue", "grass": "green", "snow": "white"}


def words(template=TEMPLATE) -> Tokenizer:
    """EOS is <eos>, the template ends turns with <end>."""
    fast = build_word_tokenizer(WORDS, chat_template=template).fast
    fast.add_tokens([AddedToken(token, special=True) for token in WORDS[:3]])
    return Tokenizer(fast, "words")


def say(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def files(tmp_path):
    """A folder whose config.json and generation_config.json end answers with <stop>; demonstrations and pairs."""
    tokenizer = words()
    stop = tokenizer.encode_prompt("<stop>")[-1]
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2,
        head_dim=8, max_positions=64, tie_embeddings=True, initializer_range=0.1, stop_tokens=(stop,), pad_token=0,
    )  # fmt: skip
    save_pretrained(tmp_path / "model", Decoder(config, jax.random.key(0)), tokenizer=tokenizer)
    rows = [
        {"prompt": say("user", thing), "response": answer, "chosen": say("assistant", answer), "rejected": "red"}
        for thing, answer in ANSWERS.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return tmp_path


def test_the_union_stands_in_the_model(files):
    base, tokenizer = load_pretrained(files / "model")
    ends = [tokenizer.encode_prompt(token)[-1] for token in ("<stop>", "<eos>", "<end>")]
    assert list(base.config.stop_tokens) == list(tokenizer.stop_ids) == ends
    save_pretrained(files / "again", base, tokenizer=tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((files / "again" / name).read_text())["eos_token_id"] == ends
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (files / "again" / name).read_bytes() == (files / "model" / name).read_bytes()
    # Another tokenizer brings its own end, and what the model's files name is a word there.
    joined, found = with_tokenizer(base, build_word_tokenizer(["a", "b", "c"], eos="<halt>"))
    assert joined.config.stop_tokens == found.stop_ids == (2,) and list(base.config.stop_tokens) == ends
    assert joined.layers[0].attention.config == joined.config
    assert [note.split(" is ")[0] for note in found.notes] == ["word tokenizer: id 6", "word tokenizer: id 5"]


@pytest.mark.slow
def test_answers_stop_where_it_is_taught(files):
    run, rows = files / "run", str(files / "rows.jsonl")
    common = {"batch_size": 8, "max_length": 32, "optimizer": {"learning_rate": 0.01}}
    config = RunConfig.model_validate({
        "run_dir": str(run), "stages": ["sft", "reward_model", "ppo"], "model": {"path": str(files / "model")},
        "adapter": {"kind": "full"},
        "sft": {"data": {"path": rows}, "epochs": 30, "packing": False, "evaluation": {"heldout": 0}, **common},
        "reward_model": {"data": {"path": rows}, "epochs": 3, "buckets": 1, **common},
        "ppo": {
            "data": {"path": rows}, "max_prompt_tokens": 16, "iterations": 1, "batch_size": 8,
            "evaluation": {"prompts": 3}, "sampling": {"max_new_tokens": 8, "temperature": 0.3},
            "reward": {"kind": "model"},
        },
    })  # fmt: skip
    run_stages(config)
    reached = json.loads((run / "roles" / "finished.json").read_text())["ppo"]["before"]
    assert reached["length/eos_share"] == 1 and reached["length/mean"] == 2  # the answer and its end
    roles = load_run(str(run))
    end = roles.tokenizer.encode_prompt("<end>")[-1]
    assert end in roles.base.config.stop_tokens and roles.tokenizer.stop_ids == roles.base.config.stop_tokens
    pairs, _ = load_preferences(PreferencesConfig(path=rows), roles.tokenizer, 32, "stop")
    demonstrations, _ = load_demonstrations(DemonstrationsConfig(path=rows), roles.tokenizer, 32, "stop")
    for pair, example in zip(pairs, demonstrations):
        assert pair.chosen_ids.tolist() == [*example.prompt_ids, *example.response_ids]
        assert example.response_ids.tolist()[1:] == [end] and pair.rejected_ids[-1] == end
    export.main(["--run", str(run), "--to", str(files / "out"), "--format", "merged"])
    generation = json.loads((files / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(roles.base.config.stop_tokens)
