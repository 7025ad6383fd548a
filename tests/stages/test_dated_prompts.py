"""Chat templates that write the date: a run keeps the date that it began with, on every later day."""

import datetime
import json
from types import SimpleNamespace

import jax
import pytest

import jaxrlhf
from jaxrlhf.checkpoint.run_dir import record_start
from jaxrlhf.config import ModelRewardConfig, RunConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.distributed.mesh import MeshConfig, make_mesh
from jaxrlhf.hf.classifiers import save_sequence_classifier
from jaxrlhf.models.adapters import with_head
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.rewards.load import load_rewards
from jaxrlhf.stages.roles import load_run
from jaxrlhf.stages.run import _set_clock, run_stages

pytest.importorskip("jinja2", reason="chat templates are written in jinja2")

DATED = (
    "{{ 'day ' + strftime_now('%d') + ' ' }}"
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
WORDS = ["day", "user", "assistant", "sky", "grass", "good", "bad", *(f"{day:02}" for day in range(1, 32))]


@pytest.fixture
def clock(monkeypatch):
    """The clock that templates ask; `clock.day` is the day of September 2026."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        day = 20

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 9, cls.day, 8, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def test_a_run_begins_once(clock, tmp_path):
    said = []
    run = SimpleNamespace(folder=tmp_path, say=said.append)
    roles = SimpleNamespace(tokenizer=build_word_tokenizer(WORDS, chat_template=DATED))
    record_start(tmp_path, _set_clock(run, roles))
    assert not said
    clock.day = 21
    again = SimpleNamespace(tokenizer=build_word_tokenizer(WORDS, chat_template=DATED))
    assert _set_clock(run, again) == datetime.datetime(2026, 9, 20, 8, 5)
    assert said == [
        f"run_dir {tmp_path}: the chat template writes the date 2026-09-20, on which the run started, instead of "
        "today's date 2026-09-21"
    ]
    prompt = [{"role": "user", "content": "sky"}]
    assert again.tokenizer.decode(again.tokenizer.encode_prompt(prompt)) == "day 20 user sky assistant"
    undated = SimpleNamespace(tokenizer=build_word_tokenizer(WORDS, chat_template=DATED.replace("strftime_now", "str")))
    _set_clock(run, undated)
    assert len(said) == 1  # nothing is to be said of a date that is not written


def test_reward_models_keep_the_date_too(clock, tmp_path):
    tokenizer = build_word_tokenizer(WORDS, chat_template=DATED)
    base = Decoder(shape_of(tokenizer), jax.random.key(3))
    save_sequence_classifier(tmp_path, base, with_head({}, base, "reward", jax.random.key(4)), tokenizer)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = ModelRewardConfig(path=str(tmp_path))
    for time, day in ((None, 20), (datetime.datetime(2026, 9, 3), 3)):
        reward = load_rewards(config, mesh, "ppo.reward", None, time)[""][0]
        assert reward.chats.whole_text([{"role": "user", "content": "sky"}], "").startswith(f"day {day:02} user")


def shape_of(tokenizer):
    return DecoderConfig(
        tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 64, tie_embeddings=True, bos_token=1, stop_tokens=(2,), pad_token=0
    )


@pytest.mark.slow
def test_a_run_that_goes_on_tomorrow_has_todays_prompts(clock, tmp_path):
    tokenizer = build_word_tokenizer(WORDS, chat_template=DATED)
    jaxrlhf.save_pretrained(tmp_path / "model", Decoder(shape_of(tokenizer), jax.random.key(0)), tokenizer=tokenizer)
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("sky", "grass", "good", "bad")]
    (tmp_path / "r.py").write_text("def score(completions):\n    return [float(len(text)) for text in completions]\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"rank": 2, "target_modules": ["q_proj"]}

    def run(name, iterations):
        run_stages(RunConfig.model_validate({
            "run_dir": str(tmp_path / name), "stages": ["ppo"], "model": {"path": str(tmp_path / "model")},
            "adapter": few, "ppo": {
                "data": {"path": str(tmp_path / "p.jsonl")}, "iterations": iterations, "batch_size": 4, "save_every": 1,
                "sample_every": 1, "sampling": {"max_new_tokens": 4}, "evaluation": {"prompts": 4},
                "max_prompt_tokens": 16, "reward": {"kind": "function", "function": f"{tmp_path}/r.py:score"},
            },
        }))  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        return [line["samples"] for line in lines if "samples" in line]

    run("broken", 1)
    clock.day = 21
    broken = run("broken", 2)
    assert {sample["prompt"].split()[1] for samples in broken for sample in samples} == {"20"}
    assert load_run(str(tmp_path / "broken")).tokenizer.chats.time.day == 20
    clock.day = 20
    assert run("whole", 2) == broken
