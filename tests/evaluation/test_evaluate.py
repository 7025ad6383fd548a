"""The command: every role on all rows, win rates in both orders, the KL and perplexity of their definitions."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.cli import evaluate
from jaxrlhf.config import AdapterConfig
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.stages.roles import mark_finished, save_role

PROMPTS = 11  # not a multiple of the batch
WORDS = ["what", "is", "it", "good", "bad", "red"]
FUNCTIONS = """
def count(completions):
    return [float(text.split().count("good")) for text in completions]

def some(completions):
    return [None if not text.split() else float(len(text.split())) for text in completions]

def longest(prompts, completions):
    return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in completions]

def first(prompts, completions):
    return [0] * len(prompts)

def strange(prompts, completions):
    return [7] * len(prompts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a finished run of it with an SFT adapter and a policy, prompts with labels, and texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = build_word_tokenizer(WORDS)
    shape = DecoderConfig(tokenizer.vocab_size, 32, 64, 1, 4, 2, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    base = Decoder(shape, jax.random.key(0))
    jaxrlhf.save_pretrained(folder / "model", base, tokenizer=tokenizer)
    rows = [{"prompt": "what is it " * (1 + i % 3), "label": ["good", "bad"][i % 2]} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"prompt": "what is it", "response": "good " * (1 + i % 4)} for i in range(7)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "broken.jsonl").write_text('{"prompt": "what"}\n{not json\n')
    (folder / "run.yaml").write_text(f"""
run_dir: {folder}/run
stages: [sft, ppo]
model: {{path: {folder}/model}}
sft: {{data: {{path: {folder}/texts.jsonl}}, evaluation: {{data: {{path: {folder}/texts.jsonl}}}}, max_length: 32}}
ppo:
  data: {{path: {folder}/prompts.jsonl}}
  reward: {{kind: function, function: "{folder}/functions.py:count"}}
  batch_size: 4
  sampling: {{max_new_tokens: 5}}
""")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump_config(load_config(folder / "run.yaml")))
    (folder / "run" / "begun.txt").write_text("2026-01-01T00:00:00")
    for i, name in enumerate(("sft", "policy")):
        adapter = init_adapter(base, AdapterConfig(rank=2), jax.random.key(i))
        adapter = jax.tree.map(functools.partial(jnp.add, 0.05 * (i + 1)), adapter)
        save_role(str(folder / "run"), name, adapter)
    for stage in ("sft", "ppo"):
        mark_finished(str(folder / "run"), stage, {})
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def report_of(capsys, *arguments):
    assert evaluate.main([*arguments, "--resamples", "200", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_on_all_rows(here, capsys):
    judge = ["--judge", "functions.py:longest", "--gold", "functions.py:some"]
    task = ["--task", "classification", "--labels", "good,bad", "--samples", "samples.jsonl"]
    report = report_of(capsys, "--run", "run", *judge, *task)
    samples = json_lines("samples.jsonl")
    assert report["prompts"]["rows"] == len(samples) == PROMPTS and list(report["roles"]) == ["base", "sft", "policy"]
    assert report["text"]["rows"] == 7
    for role, metrics in report["roles"].items():
        own = [sample["answers"][role] for sample in samples]
        texts = [answer["completion"] for answer in own]
        assert metrics["reward/score"]["value"] == pytest.approx(np.mean([t.split().count("good") for t in texts]))
        scored = [len(t.split()) for t in texts if t.split()]
        assert metrics["reward/gold"]["value"] == pytest.approx(np.mean(scored)), "abstentions do not count"
        assert metrics["length/mean"]["value"] == pytest.approx(np.mean([answer["length/mean"] for answer in own]))
        assert metrics["kl/k1"]["value"] == pytest.approx(np.mean([answer["kl/k1"] for answer in own]))
        assert np.sum(report["confusion"][role]["counts"]) == PROMPTS
        for bounds in metrics.values():
            assert bounds["low"] <= bounds["value"] <= bounds["high"]
    assert report["roles"]["sft"]["kl/k1"]["value"] == 0 != report["roles"]["policy"]["kl/k1"]["value"]
    score, length = ([sample["answers"][role] for sample in samples] for role in ("policy", "sft"))
    wins = [np.sign(a["reward/score"] - b["reward/score"]) / 2 + 0.5 for a, b in zip(score, length)]
    found = report["win_rates"]["policy against sft"]
    assert found["reward"]["win_rate"]["value"] == pytest.approx(np.mean(wins))
    longer = [np.sign(len(a["completion"]) - len(b["completion"])) / 2 + 0.5 for a, b in zip(score, length)]
    assert found["judge"]["win_rate"]["value"] == pytest.approx(np.mean(longer))
    assert found["judge"]["order_agreement"]["value"] == 1
    gap = report["differences"]["policy - sft"]["reward/score"]["value"]
    both = [report["roles"][role]["reward/score"]["value"] for role in ("policy", "sft")]
    assert gap == pytest.approx(both[0] - both[1])


def test_perplexity_and_kl_are_those_of_a_plain_forward_pass(here, capsys):
    base, tokenizer = jaxrlhf.load_pretrained("model")
    policy = jaxrlhf.bind(base, jaxrlhf.load_adapter("run/roles/policy", base))
    reference = jaxrlhf.bind(base, jaxrlhf.load_adapter("run/roles/sft", base))
    more = ["--samples", "samples.jsonl", "--batch-size", "9", "--max-new-tokens", "20", "--samples-per-prompt", "4"]
    report = report_of(capsys, "--run", "run", "--roles", "policy", *more)

    forward = jax.jit(lambda model, tokens, mask: jax.nn.log_softmax(model(tokens, mask), axis=-1))

    def logprobs(model, ids):
        tokens, mask = np.zeros((1, 32), np.int32), np.arange(32)[None] < len(ids)
        tokens[0, : len(ids)] = ids
        values = np.asarray(forward(model, tokens, mask))[0]
        return np.array([values[i, token] for i, token in enumerate(ids[1:])])

    losses = []
    for row in json_lines("texts.jsonl"):
        (prompt, response), = tokenizer.encode_pairs([(row["prompt"], row["response"])])
        losses += (-logprobs(policy, [*prompt, *response])[len(prompt) - 1 :]).tolist()
    assert report["roles"]["policy"]["text/loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report["roles"]["policy"]["text/perplexity"]["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    compared = 0
    for sample in json_lines("samples.jsonl"):
        answer = sample["answers"]["policy"]
        prompt = tokenizer.encode_prompt(sample["prompt"])
        (_, response), = tokenizer.encode_pairs([(sample["prompt"], answer["completion"])])
        if not answer["length/eos_share"] or answer["length/mean"] != len(response):
            continue  # its text does not tell all of its tokens: cut off, or with a special token inside
        ids = [*prompt, *response]
        kl = (logprobs(policy, ids) - logprobs(reference, ids))[len(prompt) - 1 :].sum()
        assert answer["kl/k1"] == pytest.approx(kl, abs=1e-4)
        compared += abs(kl) > 0.01
    assert compared > 3


def test_a_batch_size_changes_no_text_metric_and_a_judge_of_one_place_decides_nothing(here, capsys):
    few = ["--run", "run", "--roles", "sft,policy", "--temperature", "0", "--judge", "functions.py:first"]
    one, other = (report_of(capsys, *few, "--batch-size", size) for size in ("4", "11"))
    for role in ("sft", "policy"):
        for name, bounds in one["roles"][role].items():
            assert bounds["value"] == pytest.approx(other["roles"][role][name]["value"], rel=1e-5), name
    judged = one["win_rates"]["policy against sft"]["judge"]
    assert judged["win_rate"]["value"] == 0.5 and judged["order_agreement"]["value"] == 0


def test_a_model_has_a_table_and_samples_of_a_prompt_are_one_row(here, capsys):
    arguments = ["--model", "model", "--data", "prompts.jsonl", "--text", "texts.jsonl", "--max-new-tokens", "4"]
    arguments += ["--reward", "functions.py:count", "--samples-per-prompt", "3", "--samples", "samples.jsonl"]
    assert evaluate.main([*arguments, "--json", "report.json"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(Path("report.json").read_text())
    assert len(json_lines("samples.jsonl")) == 3 * PROMPTS and report["prompts"]["rows"] == PROMPTS
    value = report["roles"]["base"]["text/perplexity"]["value"]
    assert re.search(rf"^perplexity on text +{value:.3f} \[", shown, re.MULTILINE), shown
    assert "11 prompts of" in shown and "(3 completions each)" in shown and not report["win_rates"]


def test_a_role_of_another_run_is_evaluated_beside_those_of_the_run(here, capsys):
    shutil.copytree("run", "other")
    shutil.rmtree("other/roles/policy")
    shutil.copytree("run/roles/sft", "other/roles/policy")
    report = report_of(capsys, "--run", "run", "--roles", "sft,policy,other:policy")
    sft, policy, other = (report["roles"][role] for role in ("sft", "policy", "other:policy"))
    assert other == sft != policy and "other:policy - policy" in report["differences"]

    tokenizer = build_word_tokenizer(WORDS[::-1])
    base, _ = jaxrlhf.load_pretrained("model")
    jaxrlhf.save_pretrained("reversed-model", base, tokenizer=tokenizer)
    text = Path("other/config.yaml").read_text().replace(f"{here}/model", f"{here}/reversed-model")
    Path("other/config.yaml").write_text(text)
    assert evaluate.main(["--run", "run", "--roles", "sft,other:policy"]) == 2
    assert "--roles other:policy: the tokenizer or the model size of other differs" in capsys.readouterr().err


BAD = {
    "no prompts": (["--model", "model"], r"nothing to evaluate on; give prompts with --data"),
    "no folder": (["--model", "absent", "--data", "prompts.jsonl"], r"absent"),
    "no run": (["--run", "model"], r"config\.yaml"),
    "role": (["--run", "run", "--roles", "sft,best"], r"--roles: this run has no role 'best'.*: base, sft, policy"),
    "role of no run": (["--run", "run", "--roles", "sft,absent:sft"], r"absent: not a run directory"),
    "step of a model": (["--model", "model", "--step", "3", "--data", "prompts.jsonl"], r"--step '3'"),
    "row": (["--run", "run", "--data", "broken.jsonl"], r"broken\.jsonl:2"),
    "reward": (["--run", "run", "--reward", "functions.py:none"], r"--reward.*no function none"),
    "reward settings": (["--run", "run", "--reward", "{kind: http}"], r"--reward: .*url"),
    "kind of reward": (["--run", "run", "--reward", "{kind: htpt}"], r"--reward: ppo\.reward\.kind must be .*htpt"),
    "reward of no run": (["--model", "model", "--data", "prompts.jsonl", "--reward", "{kind: model}"], r"--reward: .*"),
    "judge": (["--run", "run", "--judge", "functions.py:strange"], r"--judge: .*must return 0, 1"),
    "task": (["--run", "run", "--task", "rouge"], r"--task rouge: the data has no column reference; it has label"),
    "task without prompts": (["--model", "model", "--text", "texts.jsonl", "--task", "rouge"], r"--task: needs p"),
    "file": (["--run", "run", "--json", "nowhere/report.json"], r"--json .*nowhere"),
    "confidence": (["--run", "run", "--confidence", "0.95"], r"--confidence: must be percent from 50 .*not 0.95"),
    "tokens": (["--run", "run", "--max-new-tokens", "900"], r"--max-new-tokens: must be below .*64 positions, not 900"),
    "batch": (["--run", "run", "--batch-size", "0"], r"--batch-size.*at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_one_line_and_status_2(here, capsys, arguments, message):
    assert evaluate.main(arguments) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), shown.err
    assert not shown.out and "evaluate: " not in shown.err, "nothing is sampled"
