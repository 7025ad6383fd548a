"""Whole runs of configs/gsm8k.yaml on made-up problems: PPO, and GRPO by the overrides that its header gives."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.rewards.library import numeric_answer
from jaxrlhf.stages.run import run_stages

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ROWS = 8  # answers of an iteration: as many as samples.jsonl holds of one, so all of them
ALONE = [f"ppo.batch_size={ROWS}"]
GROUPS = ["ppo.batch_size=2", f"ppo.sampling.samples_per_prompt={ROWS // 2}"]
FEW = "{rank: 2, target_modules: [q_proj, down_proj]}"
SHORT = [
    "ppo.iterations=3", "ppo.evaluation.prompts=2", "ppo.sample_every=1", f"ppo.adapter={FEW}",
    f"ppo.value_adapter={FEW}", "sft.evaluation.heldout=4",
]  # fmt: skip


def problem(name, thing, first, second):
    question = f"{name} has {first} {thing} and buys {second} . how many ?"
    return {"question": question, "answer": f"{first} + {second} = {first + second}\n#### {first + second}"}


PROBLEMS = [
    problem(name, thing, first, second)
    for name in ("ada", "bo", "cy")
    for thing in ("eggs", "hats")
    for first in range(2, 6)
    for second in range(2, 6)
]


def header_overrides(config, algorithm):
    """The settings that a config's header gives for an algorithm: those of the paragraph that its name begins."""
    header = "\n".join(line[1:] for line in config.read_text().splitlines() if line.startswith("#"))
    paragraph = next(text for text in header.split("\n\n") if text.startswith(f" {algorithm}"))
    return re.findall(r"\b[a-z_.]+=\S+", paragraph)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Overrides that name a tiny model with a vocabulary of words, and problems to learn and to be measured on."""
    folder = tmp_path_factory.mktemp("sums")
    words = dict.fromkeys(word for row in PROBLEMS for text in row.values() for word in text.split())
    tokenizer = build_word_tokenizer(list(words))
    shape = DecoderConfig(tokenizer.vocab_size, 32, 32, 1, 2, 1, 16, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    jaxrlhf.save_pretrained(folder / "model", Decoder(shape, jax.random.key(0)), tokenizer=tokenizer)
    for name, rows in (("train", PROBLEMS[8:]), ("test", PROBLEMS[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.path={folder / 'model'}", f"sft.data.path={folder / 'train.jsonl'}",
        f"ppo.data.path={folder / 'train.jsonl'}", f"ppo.evaluation.data.path={folder / 'test.jsonl'}",
        "sft.batch_size=2", "sft.max_length=64", "sft.epochs=6", "sft.optimizer.learning_rate=1e-2",
        "sft.adapter={kind: full}", "sft.microbatch_size=null", "ppo.update.microbatch_size=2", "model.dtype=float32",
        "ppo.max_prompt_tokens=16", "ppo.sampling.max_new_tokens=10",
        # Words between blanks know no new line.
        "ppo.reward.parts.format.options={pattern: '#### [0-9]+$', mode: search}",
    ]  # fmt: skip


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def run_checked(config, solutions):
    """Runs, and compares what was logged with the answers that were sampled; the lines of PPO's metrics."""
    run_stages(config)
    folder, parts = Path(config.run_dir), config.ppo.reward.parts
    records = [record for record in lines(folder, "metrics.jsonl") if record["stage"] == "ppo"]
    samples = [record for record in lines(folder, "samples.jsonl") if "samples" in record]
    pattern = parts["format"].options["pattern"]
    for record, sampled in zip(records, samples, strict=True):
        texts = [answer["completion"] for answer in sampled["samples"]]
        assert len(texts) == ROWS
        right = np.array(numeric_answer(texts, [solutions[answer["prompt"]] for answer in sampled["samples"]]))
        form = np.array([bool(re.search(pattern, text.strip())) for text in texts], float)
        assert record["reward/right"] == pytest.approx(right.mean(), abs=1e-6)
        assert record["reward/format"] == pytest.approx(form.mean(), abs=1e-6)
        scores = parts["right"].weight * right + parts["format"].weight * form
        assert [answer["score"] for answer in sampled["samples"]] == pytest.approx(list(scores), abs=1e-4)
        assert record["reward/score"] == pytest.approx(scores.mean(), abs=1e-5)
        unfinished = config.ppo.score.missing_eos_penalty * (1 - record["length/eos_share"])
        assert record["reward/adjusted"] == pytest.approx(scores.mean() - unfinished, abs=1e-5)
        assert {record[f"compiles/{name}"] for name in ("rollout", "annotate", "experience", "update")} == {1}
        assert record["policy/first_ratio_error"] < 1e-5
    assert len(records) == config.ppo.iterations
    return records


@pytest.mark.parametrize("algorithm", ["PPO", "GRPO"])
def test_made_up_problems(made_up, tmp_path, algorithm):
    file = CONFIGS / "gsm8k.yaml"
    of_algorithm = ALONE if algorithm == "PPO" else header_overrides(file, "GRPO") + GROUPS
    config = load_config(str(file), [*made_up, *SHORT, *of_algorithm, f"run_dir={tmp_path / 'run'}"])
    records = run_checked(config, {row["question"]: row["answer"] for row in PROBLEMS})
    assert any(record["reward/right"] for record in records), "SFT teaches sums: some answer is right"
    assert any(record["reward/format"] > record["reward/right"] for record in records), "and some only look right"
    if algorithm == "PPO":
        assert all("value/loss" in record and "policy/kl_loss" not in record for record in records)
    else:
        assert all("value/loss" not in record and "policy/kl_loss" in record for record in records)
        assert not (tmp_path / "run" / "roles" / "value").exists()


def test_the_overrides_for_grpo_are_those_of_the_algorithm():
    file = CONFIGS / "gsm8k.yaml"
    ppo, grpo = load_config(str(file)).ppo, load_config(str(file), header_overrides(file, "GRPO")).ppo
    assert grpo.advantage.estimator == "grpo" and grpo.sampling.samples_per_prompt == 8
    assert grpo.update.kl_loss == "k3" and grpo.update.aggregation == "sequence"
    assert grpo.batch_size * grpo.sampling.samples_per_prompt == ppo.batch_size, "as many answers as PPO's"
    assert grpo.reward == ppo.reward


def test_real_problems(texts, stories260k, tmp_path):
    """The config as it is but for its length, on GSM8K's problems and a real pretrained model."""
    train, test = (texts / "gsm8k" / f"{name}.jsonl" for name in ("train", "test"))
    real = [
        f"model.path={stories260k}", f"sft.data.path={train}", f"ppo.data.path={train}",
        f"ppo.evaluation.data.path={test}", "sft.data.limit=100", "ppo.data.limit=200", "ppo.iterations=1",
        "ppo.evaluation.data.limit=100", "ppo.sampling.max_new_tokens=16",
    ]  # fmt: skip
    config = load_config(str(CONFIGS / "gsm8k.yaml"), [*SHORT, *ALONE, *real, f"run_dir={tmp_path / 'run'}"])
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    run_checked(config, {row["question"]: row["answer"] for row in rows})
