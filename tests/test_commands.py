"""The commands as a person calls them: bad input stops at once with one line and status 2."""

import gzip
import json
import re
from pathlib import Path

import jax
import pytest

import jaxrlhf
from jaxrlhf.cli import generate, train
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a small model and files of rows, good and bad."""
    tokenizer = build_word_tokenizer(["what", "is", "it", "good", "bad"])
    shape = DecoderConfig(tokenizer.vocab_size, 32, 64, 1, 4, 2, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    jaxrlhf.save_pretrained(tmp_path / "model", Decoder(shape, jax.random.key(0)), tokenizer=tokenizer)
    row = {"prompt": "what is it", "response": "good", "chosen": "good", "rejected": "bad"}
    (tmp_path / "good.jsonl").write_text((json.dumps(row) + "\n") * 12)
    misspelt = {"prompt": "what", "respnse": "x"}
    (tmp_path / "field.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(misspelt) + "\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(row) + "\n{not json\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "what is it " * 30}) + "\n")
    packed = bytearray(gzip.compress((json.dumps(row) + "\n").encode() * 40, mtime=0))
    packed[14:20] = b"\xff" * 6
    (tmp_path / "corrupt.jsonl.gz").write_bytes(packed)
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    unknown = json.loads((tmp_path / "model" / "config.json").read_text()) | {"model_type": "mystery"}
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(unknown))
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "other.py").write_text("def f(texts):\n    return [0.0 for _ in texts]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ON_MODEL = ["model.new=null", "model.path=model"]
SFT = ["stages=[sft]", "sft.data={path: good.jsonl}", "sft.max_length=32", *ON_MODEL]
PPO = ["stages=[ppo]", "ppo.evaluation.data=null", "ppo.data={path: good.jsonl}", *ON_MODEL]
PPO += ["ppo.reward={kind: function, function: 'jaxrlhf.toy.world:gold_score'}"]

FEW = ["--max-new-tokens", "4"]

BAD = {
    "unknown key": (["ppo.itertions=3"], r"ppo\.itertions; did you mean ppo\.iterations\?$"),
    "key of a section below": (["ppo.klcoef=3"], r"ppo\.klcoef; did you mean ppo\.kl\.coef\?$"),
    "wrong type": (["ppo.iterations=many"], r"ppo\.iterations.*many"),
    "out of bounds": (["ppo.update.epochs=0"], r"ppo\.update\.epochs.*(1|0)"),
    "two origins": (["model.path=model"], r"exactly one of path, run, new"),
    "missing file": ([*SFT, "sft.data.path=nowhere.jsonl"], r"nowhere\.jsonl"),
    "row without its field": ([*SFT, "sft.data.path=field.jsonl"], r"field\.jsonl:2.*response"),
    "row that is not JSON": ([*SFT, "sft.data.path=broken.jsonl"], r"broken\.jsonl:2"),
    "empty set": ([*SFT, "sft.data.path=empty.jsonl"], r"empty\.jsonl"),
    "no weights": ([*SFT, "model.path=weightless"], r"weightless.*(safetensors|weights)"),
    "unknown family": ([*SFT, "model.path=unknown"], r"mystery.*llama"),
    "no folder": ([*SFT, "model.path=./absent"], r"absent"),
    "no run": ([*SFT, "model.path=null", "model.run=model"], r"not a run directory"),
    "prompt too long": ([*PPO, "ppo.data.path=long.jsonl"], r"long\.jsonl:1.*max_prompt_tokens"),
    "no reward adapter": ([*PPO, "ppo.reward={kind: model}"], r"reward adapter"),
    "no reward function": ([*PPO, "ppo.reward.function='missing.py:f'"], r"missing\.py"),
    "longer than the model": ([*PPO, "ppo.sampling.max_new_tokens=999"], r"64 positions"),
    "more minibatches than rows": ([*PPO, "ppo.update.minibatches=65"], r"ppo\.update\.minibatches.*64 rows.*32, 64"),
    "minibatches divide but a part": ([*PPO, "ppo.update.minibatches=24"], r"ppo\.update\.minibatches"),
    "seed beyond 32 bits": (["seed=4294967296"], r"seed must be int >= 0 and < 4294967296"),
    "decay of 1": (["sft.optimizer.beta1=1"], r"beta1.*< 1"),
    "corrupt gzip": ([*SFT, "sft.data.path=corrupt.jsonl.gz"], r"corrupt\.jsonl\.gz: the file cannot be read"),
    "minibatches do not divide": ([*PPO, "ppo.update.minibatches=7"], r"ppo\.update\.minibatches"),
    "unknown adapter module": ([*PPO, "ppo.adapter.target_modules=[zzz]"], r"ppo\.adapter\.target.*zzz.*q_proj"),
    "stop token not in the vocabulary": ([*PPO, "ppo.sampling.stop_tokens=[999]"], r"stop_tokens.*999"),
    "reward file that exits": ([*PPO, "ppo.reward.function='exits.py:f'"], r"exits\.py.*SystemExit"),
    "reward function of other keywords": ([*PPO, "ppo.reward.function='other.py:f'"], r"other\.py:f .* keywords texts"),
    "reward function without signature": ([*PPO, "ppo.reward.function='builtins:max'"], r"builtins:max"),
    "greedy PPO": ([*PPO, "ppo.sampling.temperature=0"], r"temperature"),
    "mesh does not fit": ([*SFT, "mesh.data=3"], r"mesh"),
    "machine without cuDNN": ([*SFT, "model.attention=cudnn", "model.dtype=bfloat16"], r"model\.attention: .*NVIDIA"),
    "attention without its dtype": ([*SFT, "model.attention=cudnn"], r"model: attention cudnn.*bfloat16"),
    "option that XLA lacks": (["compiler_options.update.xla_no=1"], r"compiler_options\.update\.xla_no: .*no such"),
    "batch does not parse": (["seed=[1"], r"seed"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_status_2(folder, capsys, overrides, message):
    assert train.main(["--config", QUICKSTART, "run_dir=run", *overrides]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert not (folder / "run").exists(), "nothing is written"


def test_another_runs_directory_is_refused_and_left_as_it_is(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump_config(load_config(QUICKSTART, ["run_dir=run", "seed=7"])))
    before = (folder / "run" / "config.yaml").read_text()
    assert train.main(["--config", QUICKSTART, "run_dir=run"]) == 2
    assert re.fullmatch(r"error: .*seed was 7, is now 0.*\n", capsys.readouterr().err)
    assert [file.name for file in (folder / "run").iterdir()] == ["config.yaml"]
    assert (folder / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "absent", "--prompt", "what"], "absent"),
        (["--run", "model", "--prompt", "what"], "config.yaml"),
        (["--model", "model", "--prompts", "field.jsonl", "--prompt-field", "question"], "question"),
        (["--model", "model", "--prompt", "what", "--temperature", "-1"], "temperature"),
        (["--model", "model", "--prompt", "what", "--max-new-tokens", "500"], "64"),
        (["--model", "model", "--prompt", "what", "--roles", "policy"], "policy"),
        (["--model", "model", "--prompts", "late.jsonl", *FEW], "late.jsonl:41: 91 tokens"),
    ],
)
def test_generate_says_what_is_wrong(folder, capsys, arguments, message):
    (folder / "late.jsonl").write_text('{"prompt": "what"}\n' * 40 + json.dumps({"prompt": "what is it " * 30}))
    assert generate.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 1 and message in shown.err
    assert not shown.out, "no prompt is answered where one cannot be"


def test_settings_and_functions_are_checked_before_any_large_set_is_read(folder, capsys):
    stages = ["stages=[sft, ppo]", *SFT[1:], *PPO[1:], "sft.data.path=field.jsonl"]
    for fault in ("ppo.update.minibatches=7", "ppo.reward.function='missing.py:f'"):
        assert train.main(["--config", QUICKSTART, "run_dir=run", *stages, fault]) == 2
        error = capsys.readouterr().err
        assert "field.jsonl" not in error and fault.split("=")[0] in error


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_spoilt_record_of_finished_stages_is_named(folder, capsys, text):
    (folder / "run" / "roles").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(dump_config(load_config(QUICKSTART, ["run_dir=run"])))
    (folder / "run" / "roles" / "finished.json").write_text(text)
    assert generate.main(["--run", "run", "--prompt", "what"]) == 2
    assert re.fullmatch(r"error: .*finished\.json: .*\n", capsys.readouterr().err)


def test_generate_answers_in_order(folder, capsys):
    arguments = ["--model", "model", "--prompts", "good.jsonl", "--max-new-tokens", "4", "--json"]
    assert generate.main(arguments) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["what is it"] * 12
    assert len({record["answers"]["base"] for record in records}) > 1, "each row has its own noise"
    assert generate.main(arguments) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records


def test_help_names_every_setting_with_its_default(processes):
    shown = processes.run("-m", "jaxrlhf.train", "--help", seconds=60).output
    for setting, default in [("ppo.update.clip_low", "0.2"), ("ppo.advantage.lam", "0.95"), ("sft.packing", "true")]:
        assert re.search(rf"{re.escape(setting)}\b.*{default}", shown), setting


def test_help_of_several_settings_shows_each(capsys):
    shown = {}
    for names in (["ppo.kl"], ["seed"], ["ppo.kl", "seed=1"]):
        with pytest.raises(SystemExit):
            train.main(["--help", *names])
        shown[names[-1], len(names)] = capsys.readouterr().out
    assert shown["seed=1", 2] == shown["ppo.kl", 1] + shown["seed", 1]


@pytest.mark.parametrize(
    "name", ["ppo.kl", "ppo.kl.coef", "ppo.kl.coef=0.1", "ppo.reward[http].url", "ppo.reward.end_at_eos"]
)
def test_help_of_a_section_or_a_setting_shows_nothing_else(name, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help", name])
    shown, name = capsys.readouterr().out.splitlines(), name.split("=")[0]
    assert ended.value.code == 0 and shown
    assert all(re.sub(r"\[\w+\]", "", line).startswith(re.sub(r"\[\w+\]", "", name)) for line in shown)
    assert (len(shown) > 1) == (name == "ppo.kl")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ppo.kl.ceof", "did you mean ppo.kl.coef"), ("ppo.coef", "did you mean ppo.kl.coef"), ("zzz", "there are "),
     ("", "there are "), ("ppo.", "did you mean ppo or ")],
)  # fmt: skip
def test_help_of_an_unknown_setting_names_the_nearest(name, hint, capsys):
    assert train.main(["--help", "seed", name]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: --help: no setting {name or repr(name)}; {hint}") and not shown.out


def test_only_a_run_that_writes_is_said_to_continue(folder, monkeypatch, capsys):
    import jaxrlhf.stages.run

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxrlhf.stages.run, "run_stages", interrupted)
    assert train.main(["--config", QUICKSTART, "run_dir=run"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues from the last checkpoint, if any\n"
    assert train.main(["--config", QUICKSTART, "run_dir=run", "--dry-run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_dry_run_checks_all_and_writes_nothing(folder, capsys):
    stages = ["stages=[sft, ppo]", *SFT[1:], *PPO[1:], "ppo.iterations=7", "sft.epochs=2", "sft.batch_size=4"]
    stages += ["sft.evaluation.heldout=0", "ppo.batch_size=4", "ppo.max_prompt_tokens=8", "compilation_cache=cache"]
    stages += ["ppo.reward.function='ok.py:f'", "ppo.gold=null"]
    (folder / "ok.py").write_text("def f(completions):\n    return [float(len(text)) for text in completions]\n")
    before = sorted(folder.rglob("*"))
    assert train.main(["--dry-run", "--config", QUICKSTART, "run_dir=run", *stages]) == 0
    shown = capsys.readouterr()
    *_, sft, ppo, last = shown.err.splitlines()
    assert re.match(r"sft: would run \d+ optimizer steps \(epochs x batches: 2 x \d+\)$", sft), sft
    assert ppo == "ppo: would run 7 iterations of 4 prompts"
    assert last.startswith("dry run: all checks passed, and nothing was written") and not shown.out
    assert sorted(folder.rglob("*")) == before
    assert train.main(["--dry-run", "--config", QUICKSTART, "run_dir=run", *stages, "sft.data.path=field.jsonl"]) == 2
    assert "field.jsonl:2" in capsys.readouterr().err and sorted(folder.rglob("*")) == before


def test_module_lists_the_commands(processes):
    shown = processes.run("-m", "jaxrlhf").output
    assert "jaxrlhf train" in shown and "jaxrlhf generate" in shown
