"""Whole runs on tiny copies of hub folders: SFT by heart, a reward model, PPO; transformers opens the exports."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from hub_folders import FOLDERS

from jaxrlhf.cli import export, generate, train
from jaxrlhf.config import PreferencesConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.stages.roles import load_roles

pytestmark = pytest.mark.slow

TAUGHT = {
    "is snow red ?": "no , white .", "what colour is grass ?": "it is green .", "who are you ?": "a small model .",
    "name a river .": "the Nile .",
}  # fmt: skip
NEW, PROMPT, LENGTH = 16, 112, 128
# Programs are small and run a few times: compiling them is what takes the time.
QUICK = {"all": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}}
# A base model with the tokenizer of its chat version, whose end of turn the base's files do not name.
OTHERS = {"Llama-3.2-1B with the tokenizer of Instruct": ("Llama-3.2-1B", "Llama-3.2-1B-Instruct")}


def config_of(folder, tokenizer, rows):
    """A run whose SFT learns four answers by heart, from rows in chats where there is a template, else in texts."""
    chats = tokenizer.about.template is not None
    prompt = {text: [{"role": "user", "content": text}] if chats else text for text in TAUGHT}
    said = (*TAUGHT.values(), "blue")
    answer = {text: [{"role": "assistant", "content": text}] if chats else f" {text}" for text in said}
    taught = [{"prompt": prompt[text], "response": answer[TAUGHT[text]]} for text in TAUGHT]
    pairs = [{"prompt": prompt[text], "chosen": answer[TAUGHT[text]], "rejected": answer["blue"]} for text in TAUGHT]
    model = {"path": str(folder.path), "dtype": "float32"}
    if tokenizer is not folder:
        model["tokenizer"] = str(tokenizer.path)
    return {
        "run_dir": str(folder.path.parent / f"run of {tokenizer.name}"),
        "model": model,
        "adapter": {"rank": 2, "target_modules": ["q_proj", "down_proj"]},
        "compiler_options": QUICK,
        "sft": {
            "data": {"path": rows("sft", taught)}, "evaluation": {"heldout": 0}, "epochs": 150, "batch_size": 4,
            "max_length": LENGTH, "packing": False, "adapter": {"kind": "full"},
            "optimizer": {"learning_rate": 0.01, "schedule": "cosine"},
        },
        "reward_model": {
            "data": {"path": rows("pairs", pairs)}, "evaluation": {"heldout": 1}, "epochs": 8, "batch_size": 4,
            "max_length": LENGTH, "buckets": 1, "optimizer": {"learning_rate": 0.01},
        },
        "ppo": {
            "data": {"path": rows("prompts", [{"prompt": prompt[asked]} for asked in TAUGHT])}, "iterations": 2,
            "max_prompt_tokens": PROMPT, "batch_size": 4, "sampling": {"max_new_tokens": NEW, "temperature": 0.5},
            "evaluation": {"prompts": 4}, "update": {"epochs": 1, "minibatches": 2},
        },
    }  # fmt: skip


@pytest.fixture(params=[*FOLDERS, *OTHERS])
def finished(hub, request, rows, tmp_path):
    """A run that has finished: its tokenizer's folder, its last samples, the folder with run.yaml and exports."""
    folder, tokenizer = (hub(name, 1) for name in OTHERS.get(request.param, (request.param, request.param)))
    settings = config_of(folder, tokenizer, rows)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "run.yaml")]) == 0
    run_dir = settings["run_dir"]
    for form, name in (("merged", "policy"), ("reward", "reward")):
        assert export.main(["--run", run_dir, "--to", str(tmp_path / name), "--format", form]) == 0
    last = json.loads((Path(run_dir) / "samples.jsonl").read_text().splitlines()[-1])
    return SimpleNamespace(tokenizer=tokenizer, samples=last, exports=tmp_path)


def test_a_run_from_files_to_files(finished, capsys):
    """Answers end, the reward is read where it was taught, exports agree. One test: the run is what takes the time."""
    config = load_config(finished.exports / "run.yaml")
    roles = load_roles(config)
    tokenizer, stops = roles.tokenizer, {*roles.base.config.stop_tokens}

    # Answers end, with what SFT has taught (behind an empty thought, where the template writes one).
    before = finished.samples["before"]
    taught = [sample for sample in before if sample["completion"].endswith(TAUGHT[asked(sample)])]
    reached = json.loads((Path(config.run_dir) / "roles" / "finished.json").read_text())
    assert reached["ppo"]["before"]["length/eos_share"] == reached["ppo"]["after"]["length/eos_share"] == 1
    assert len(taught) >= 3

    # The reward is read where it was taught: the score of a taught answer is that of the pair's sequence.
    pairs = load_preferences(PreferencesConfig(path=config.reward_model.data.path), tokenizer, LENGTH, "stop")[0]
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(str(finished.exports / "reward"))
    reward.config.pad_token_id = None  # single rows: where EOS has to be pad (GPT-2), transformers reads before it
    for sample in taught:
        ids = pairs[[*TAUGHT].index(asked(sample))].chosen_ids.tolist()
        assert ids[-1] in stops
        with torch.no_grad():
            score = reward(torch.tensor([ids])).logits.item()
        assert sample["score"] == pytest.approx(score, abs=1e-3)

    # transformers answers greedily with the export as the run itself does, and stops where it stops.
    model = transformers.AutoModelForCausalLM.from_pretrained(str(finished.exports / "policy"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(finished.exports / "policy"))
    prompts = str(config.ppo.data.path)
    capsys.readouterr()
    assert generate.main(["--run", config.run_dir, "--prompts", prompts, "--temperature", "0", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for record in records:
        ids = tokenizer.encode_prompt(record["prompt"])
        if isinstance(record["prompt"], list):
            text = theirs.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False)
            assert theirs(text, add_special_tokens=False).input_ids == ids
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, repetition_penalty=1.0)
        answer = made[0, len(ids) :].tolist()
        assert theirs.decode(answer, skip_special_tokens=True) == record["answers"]["policy"]
        assert answer[-1] in stops and not stops & {*answer[:-1]}
    file = (finished.tokenizer.path / "tokenizer.json").read_bytes()
    for name in ("policy", "reward"):
        assert (finished.exports / name / "tokenizer.json").read_bytes() == file


def asked(sample):
    """The question that a rendered prompt holds."""
    return next(text for text in TAUGHT if text in sample["prompt"])
