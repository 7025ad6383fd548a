"""PPO with rewards that somebody else trained: a run with each kind, and what stops one before it starts."""

import json
import re

import jax
import numpy as np
import pytest

from jaxrlhf.cli import train
from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.distributed.mesh import MeshConfig, make_mesh
from jaxrlhf.hf.classifiers import save_sequence_classifier
from jaxrlhf.hf.weights import save_pretrained
from jaxrlhf.models.adapters import with_head
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.load import load_rewards
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.ppo.sampler import Sampler
from jaxrlhf.stages.roles import load_roles
from jaxrlhf.stages.run import run_stages
from jaxrlhf.toy.world import VOCABULARY

CHAT = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <eos> ' }}{% endfor %}"
FEW = {"rank": 2, "target_modules": ["q_proj"]}


def config(folder, reward, **ppo):
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 64}
    return RunConfig.model_validate({
        "run_dir": str(folder / "run"), "stages": ["ppo"], "model": {"new": small},
        "ppo": {
            "data": {"path": "builtin:assistant-prompts", "limit": 12}, "iterations": 2, "batch_size": 8,
            "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "adapter": FEW, "value_adapter": FEW,
            "update": {"epochs": 1, "minibatches": 1}, "evaluation": {"prompts": 8}, "sample_every": 1,
            "reward": reward,
        } | ppo,
    })  # fmt: skip


def save_reward_model(folder, template=None):
    """A decoder with the world's words in another order."""
    tokenizer = build_word_tokenizer([*VOCABULARY[::-1], "user", "assistant"], chat_template=template)
    shape = DecoderConfig(tokenizer.vocab_size, 16, 24, 1, 2, 1, 8, 64, tie_embeddings=True, initializer_range=0.5,
                          bos_token=1, stop_tokens=(2,), pad_token=0)  # fmt: skip
    base = Decoder(shape, jax.random.key(3))
    save_sequence_classifier(folder, base, with_head({}, base, "reward", jax.random.key(4)), tokenizer)


def save_classifier(folder):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="classifiers are torch models")
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(VOCABULARY)
    settings = transformers.DistilBertConfig(
        vocab_size=tokenizer.vocab_size, dim=16, n_heads=2, n_layers=1, hidden_dim=24, max_position_embeddings=64,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, initializer_range=0.5,
    )  # fmt: skip
    transformers.DistilBertForSequenceClassification(settings).save_pretrained(folder)
    tokenizer.save(str(folder))


def lines(folder, name):
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def scores_of(reward, sample, tokenizer):
    """What the reward says of one sample, read again as text."""
    prompt, response = tokenizer.encode_prompt(sample["prompt"]), tokenizer.encode_prompt(sample["completion"])[1:]
    tokens, mask = np.array([prompt + response]), np.ones((1, len(prompt + response)), bool)
    nothing = np.zeros(1)
    rollout = Rollout(tokens, mask, mask[:, len(prompt) :], nothing, nothing.astype(bool), nothing)
    return reward(Completions(rollout, [sample["prompt"]], [{}], tokenizer))


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_ppo_on_a_pretrained_reward(kind, tmp_path):
    {"model": save_reward_model, "classifier": save_classifier}[kind](tmp_path / "reward")
    # Whether an answer ended is not in the samples: without an EOS the text alone decides.
    reward = {"kind": kind, "path": str(tmp_path / "reward"), "batch_size": 4}
    reward |= {"end_at_eos": False} if kind == "model" else {"label": "good", "score": "probability"}
    settings = config(tmp_path, reward)
    run_stages(settings)
    records = lines(tmp_path, "metrics.jsonl")
    assert len(records) == 2 and all(np.isfinite(record["reward/score"]) for record in records)
    assert records[0]["optimizer/grad_norm"] > 0
    assert all(records[-1][f"compiles/{name}"] == 1 for name in ("rollout", "annotate", "experience", "update"))
    samples = lines(tmp_path, "samples.jsonl")[0]["samples"]
    assert len({sample["score"] for sample in samples}) > 2
    again = load_rewards(settings.ppo.reward, make_mesh(MeshConfig(), jax.devices()[:1]), "ppo.reward")[""][0]
    for sample in samples:
        score = scores_of(again, sample, build_word_tokenizer(VOCABULARY))
        np.testing.assert_allclose(score, [sample["score"]], atol=2e-4)  # rounded in the file


def test_the_reward_reads_the_chat_and_not_what_the_policy_made_of_it(tmp_path):
    pytest.importorskip("jinja2", reason="chat templates are written in jinja2")
    own = build_word_tokenizer([*VOCABULARY, "user", "assistant"], chat_template=CHAT)
    shape = DecoderConfig(own.vocab_size, 16, 24, 1, 2, 1, 8, 64, stop_tokens=(2,), pad_token=0)
    save_pretrained(tmp_path / "policy", Decoder(shape, jax.random.key(1)), tokenizer=own)
    save_reward_model(tmp_path / "reward", CHAT)
    texts = [" ".join(VOCABULARY[i : i + 3]) for i in range(0, 24, 3)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"path": str(tmp_path / "reward")}
    settings = config(tmp_path, reward, data={"path": str(tmp_path / "chats.jsonl")})
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={
        "new": None, "path": str(tmp_path / "policy")})})  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    run = Run(settings, mesh, None, None)
    run_roles = load_roles(settings, mesh)
    inputs = ppo.load(run, run_roles)
    reward = inputs.rewards[""][0]
    policy = ppo.starting_policy(run, run_roles, inputs)
    completions = Sampler(run, run_roles, reward, None).sample(policy, inputs.prompts, np.arange(8), jax.random.key(5))
    scorer = reward.tokenizer
    seen = []
    reward.program = lambda base, adapter, tokens, mask, **_: (seen.append((tokens, mask)), np.zeros(len(tokens)))[1]
    reward(completions)
    read = {scorer.fast.decode(np.asarray(row)[np.asarray(real)]) for t, m in seen for row, real in zip(t, m)}
    spoken = [f"user {text} <eos> assistant {said} <eos>" for text, said in zip(texts, completions.texts)]
    assert read == {text.replace("  ", " ") for text in spoken}


BAD = {
    "no folder": ({"path": "./absent"}, "absent: no such folder"),
    "no reward model": ({"path": "plain"}, "plain/config.json: architectures"),
    "no label": ({"kind": "classifier", "path": "labels"}, "ppo.reward.label: .*labels has 2.*'bad' (0), 'good' (1)"),
    "no classifier": ({"kind": "classifier", "path": "./absent"}, "ppo.reward.path: .*absent: no such folder"),
    "label of a reward model": (
        {"path": "plain", "label": "good"},
        "ppo.reward.label; it belongs to kind: classifier",
    ),
    "kind without path": ({"kind": "classifier"}, "ppo.reward.path is missing"),
    "function with path": (
        {"kind": "function", "function": "a:b", "path": "x"},
        "ppo.reward.path; it belongs to kind: model",
    ),
    "template": ({"path": "plain", "template": "{prompt}"}, "ppo.reward: template must contain {completion}"),
    "nothing at all": ({}, "ppo.reward.path=FOLDER"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    save_classifier(path / "labels")
    save_reward_model(path / "plain")
    document = json.loads((path / "plain" / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (path / "plain" / "config.json").write_text(json.dumps(document))
    (path / "run.yaml").write_text(dump_config(config(path, {"path": "x"})))
    return path


@pytest.mark.parametrize(("reward", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_stops_with_one_line_before_anything_is_written(reward, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    override = f"ppo.reward={json.dumps(reward)}"
    assert train.main(["--config", "run.yaml", override]) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(printed) == 1 and all(re.search(re.escape(part), printed[0]) for part in words.split(".*")), printed
    assert not (folder / "run").exists()
