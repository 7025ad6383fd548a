"""The commands with choices: the probability of every label, and what follows from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.cli import evaluate, generate
from jaxrlhf.config import AdapterConfig
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.evaluation.probabilities import fit_temperature, label_probabilities
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.stages.roles import mark_finished, save_role

LABELS = ["good", "very good", "bad"]
PROMPTS = 11  # not a multiple of the batch


def test_log_loss_and_brier_score_are_their_definitions():
    logprobs = np.log([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    found = {name: x for one in label_probabilities(logprobs, np.array([0, 1])) for name, x in one.estimates().items()}
    assert found == {
        "log_loss": pytest.approx(-(np.log(0.7) + np.log(0.1)) / 2),
        "brier": pytest.approx((0.09 + 0.04 + 0.01 + 0.01 + 0.81 + 0.64) / 2),
        "calibration_error": pytest.approx((0.3 + 0.8) / 2),
    }


def test_the_fitted_temperature_is_that_of_the_labels():
    """Labels are drawn at temperature 1; logprobs that were multiplied by 2.5 need 2.5."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal((20_000, 3))
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(2.5 * logits + 7, labels) == pytest.approx(2.5, abs=0.08)
    assert fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(0.01)  # the bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with a policy, whose sampling has choices, and prompts with labels."""
    folder = tmp_path_factory.mktemp("choices")
    tokenizer = build_word_tokenizer(["what", "is", "it", "good", "bad", "very"])
    shape = DecoderConfig(tokenizer.vocab_size, 32, 64, 1, 4, 2, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    base = Decoder(shape, jax.random.key(0))
    jaxrlhf.save_pretrained(folder / "model", base, tokenizer=tokenizer)
    for name, shift in (("prompts", 0), ("validation", 1)):
        rows = [{"prompt": "what is it " * (1 + i % 3), "label": LABELS[(i + shift) % 3]} for i in range(PROMPTS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(f"""
run_dir: {folder}/run
stages: [ppo]
model: {{path: {folder}/model}}
ppo:
  data: {{path: {folder}/prompts.jsonl}}
  reward: {{kind: function, function: "jaxrlhf.rewards.library:label_accuracy"}}
  batch_size: 4
  sampling: {{max_new_tokens: 3, choices: {LABELS}}}
""")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump_config(load_config(folder / "run.yaml")))
    (folder / "run" / "begun.txt").write_text("2026-01-01T00:00:00")
    adapter = init_adapter(base, AdapterConfig(rank=2), jax.random.key(1))
    save_role(str(folder / "run"), "policy", jax.tree.map(lambda x: jnp.add(x, 0.1), adapter))
    mark_finished(str(folder / "run"), "ppo", {})
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def evaluated(capsys, *arguments):
    status = evaluate.main([*arguments, "--resamples", "50", "--json", "-"])
    out, errors = capsys.readouterr()
    return json.loads(out) if status == 0 else (status, errors)


def test_every_label_has_its_probability(here, capsys):
    task = ["--task", "classification", "--calibrate", "validation.jsonl", "--samples", "samples.jsonl"]
    report = evaluated(capsys, "--run", "run", *task)
    samples = [json.loads(line) for line in (here / "samples.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in (here / "prompts.jsonl").read_text().splitlines()]
    assert report["choices"] == LABELS and len(samples) == PROMPTS
    assert set(report["temperatures"]) == {"base", "policy"}
    rows = {role: [sample["answers"][role] for sample in samples] for role in ("base", "policy")}
    exact = {}
    for role, metrics in report["roles"].items():
        own, value = rows[role], {name: bounds["value"] for name, bounds in metrics.items()}
        p = np.array([[answer["probabilities"][label] for label in LABELS] for answer in own])
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        assert [answer["completion"] for answer in own] == [LABELS[i] for i in p.argmax(1)]
        of_label = p[np.arange(PROMPTS), [LABELS.index(label) for label in labels]]
        assert value["calibrated/log_loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-5)
        right = np.mean([answer["completion"] == label for answer, label in zip(own, labels)])
        assert value["classification/accuracy"] == value["reward/score"] == pytest.approx(right)
        assert value["length/eos_share"] == 1 and value["kl/k1"] >= 0
        raw = p ** report["temperatures"][role]
        exact[role] = raw / raw.sum(1, keepdims=True)
        of_label = exact[role][np.arange(PROMPTS), [LABELS.index(label) for label in labels]]
        assert value["probability/log_loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-4)
    kl = (exact["policy"] * np.log(exact["policy"] / exact["base"])).sum(1)
    np.testing.assert_allclose([answer["kl/k1"] for answer in rows["policy"]], kl, rtol=1e-3, atol=1e-6)
    assert kl.max() > 1e-3


def test_choices_of_the_command_line(here, capsys):
    assert generate.main(["--model", "model", "--prompt", "what is", "--prompt", "it", "--json",
                          "--choices", '["good bad", good]']) == 0  # fmt: skip
    answers = [json.loads(line)["answers"]["base"].strip() for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2 and set(answers) <= {"good bad", "good"}
    report = evaluated(capsys, "--model", "model", "--data", "prompts.jsonl", "--choices", "good, bad")
    assert report["choices"] == ["good", "bad"] and "probability/log_loss" not in report["roles"]["base"]


REFUSED = {
    ("--run", "run", "--samples-per-prompt", "2"): "--samples-per-prompt: with choices",
    ("--run", "run", "--calibrate", "validation.jsonl"): "--calibrate: needs labels",
    ("--run", "run", "--data", "validation.jsonl", "--task", "classification", "--calibrate", "validation.jsonl"): (
        "--calibrate: has the same rows as --data"
    ),
    ("--run", "run", "--choices", "", "--calibrate", "validation.jsonl"): "--calibrate: needs the probabilities",
    ("--run", "run", "--choices", "good,bad", "--task", "classification"): "'very good' is not one of the choices",
    ("--run", "run", "--choices", "good,it is it", "--max-new-tokens", "2"): "--max-new-tokens: is 2, but the choice",
    ("--run", "run", "--choices", "good,good"): "--choices: the choice 'good' is given more than once",
    ("--run", "run", "--choices", "good,zebra"): "--choices: the tokenizer has no tokens for 'zebra'",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda arguments: " ".join(arguments[2:4]))
def test_what_contradicts_is_refused(here, capsys, arguments):
    status, errors = evaluated(capsys, *arguments)
    assert status == 2 and REFUSED[arguments] in errors
