"""configs/real on copies of their data sets: the columns, subsets and splits of the hub, a few rows of our own."""

import json
import math
from pathlib import Path

import pytest
from repository_files import sources

from jaxrlhf.cli import data, train
from jaxrlhf.config.reading import load_config
from jaxrlhf.models.decoder import abstract_decoder, named_parameters
from jaxrlhf.stages.shapes import read_folder

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs" / "real").glob("*.yaml"))
QUICK = "compiler_options={all: {xla_backend_optimization_level: 0, xla_llvm_disable_expensive_passes: true}}"
CITIES = ["Rome", "Oslo", "Lima", "Kyiv", "Bern", "Doha", "Bonn", "Riga"]

# Model of a config -> the tiny folder of the same family, with the same kind of chat template.
FOLDERS = {
    "Qwen/Qwen3-0.6B": "Qwen3-0.6B",
    "Qwen/Qwen2.5-7B": "Qwen2.5-0.5B",
    "meta-llama/Llama-3.2-1B": "Llama-3.2-1B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct": "Llama-3.2-1B-Instruct",
}
# Name of configs/plans -> the number of parameters, as the model cards have it.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920, "llama3.2-1b": 1_235_814_400, "qwen2.5-7b": 7_615_616_512, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
}  # fmt: skip


def problem(city):
    return {"question": f"{city} has 2 cats and 3 dogs. How many pets?", "answer": "2 + 3 = <<2+3=5>>5 pets.\n#### 5"}


def post(city):
    return f"SUBREDDIT: r/pets\n\nTITLE: {city}\n\nPOST: My cat ran away.\n\nTL;DR:"


def feedback(city):
    asked, good, bad = f"Where is {city}?", f"{city} is in Europe.", "No idea."
    chats = {
        name: [{"content": asked, "role": "user"}, {"content": text, "role": "assistant"}]
        for name, text in (("chosen", good), ("rejected", bad))
    }
    scores = {"score_chosen": 8.5, "score_rejected": 3.0}
    return {"prompt": asked, "prompt_id": city, **chats, "messages": chats["chosen"], **scores}


def dialogue(city):
    opening = f"\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: Where is {city}?\n\nAssistant:"
    return {"chosen": f"{opening} It is a city in Europe.", "rejected": f"{opening} Find out yourself."}


def summary(city):
    return {"prompt": post(city), "completion": f" The cat left {city}."}


def comparison(city):
    return {"prompt": post(city), "chosen": f" The cat left {city}.", "rejected": " A pet."}


# Hub id -> (subset, row of a city, the splits).
SETS = {
    "openai/gsm8k": ("main", problem, ["train", "test"]),
    "trl-lib/tldr": ("default", summary, ["train", "validation", "test"]),
    "trl-lib/tldr-preference": ("default", comparison, ["train", "validation"]),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "default", feedback, ["train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"]
    ),
    "Anthropic/hh-rlhf": ("default", dialogue, ["train", "test"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Hub id -> a folder with the files of such a hub repository: a card with subsets and splits, and Parquet files."""
    import datasets

    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        folders = {}
        for name, (subset, row, splits) in SETS.items():
            folder = folders[name] = root / name
            files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
            folder.mkdir(parents=True)
            card = json.dumps([{"config_name": subset, "data_files": files}])
            (folder / "README.md").write_text(f"---\nconfigs: {card}\n---\n")
            for split in splits:
                table = datasets.Dataset.from_list([row(city) for city in CITIES])
                table.to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
        yield folders


def header(file):
    """The commands of a config's header, without the prompt signs."""
    lines = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    return [line for line in lines if line.startswith(("python -m jaxrlhf", "jaxrlhf "))]


@pytest.fixture
def tiny_run(hub, sets, tmp_path, monkeypatch):
    """`tiny_run(file)`: the arguments of a run of the config on a tiny model, with the copies of its data sets."""

    def arguments(file):
        monkeypatch.chdir(tmp_path)
        config = load_config(str(file))
        for command in header(file):
            if command.startswith("jaxrlhf data "):
                words = [str(sets.get(word, word)) for word in command.split()[2:]]
                assert data.main(words) == 0
        given = [f"model.path={hub(FOLDERS[config.model.path], 1).path}", f"run_dir={tmp_path / 'run'}"]
        given += ["model.dtype=float32", "model.attention=xla", "mesh={}", "compilation_cache=null", QUICK]
        for key, source in sources(config):
            if (path := sets.get(source.path)) is not None:
                given.append(f"{key}.path={path}")
        if config.adapter.kind == "lora":
            given += ["adapter.rank=2", "adapter.target_modules=[q_proj, down_proj]"]
        for stage in set(config.stages) - {"ppo"}:
            given += [f"{stage}.{setting}" for setting in ("batch_size=4", "microbatch_size=2", "max_length=400")]
        group = config.ppo.sampling.samples_per_prompt
        small = {"max_prompt_tokens": 400, "iterations": 1, "batch_size": 8 // group, "evaluation.prompts": 2}
        small |= {"sampling.max_new_tokens": 8, "sampling.slots": "null", "update.microbatch_size": 2}
        small |= {"update.minibatches": min(config.ppo.update.minibatches, 2)}
        return ["--config", str(file), *given, *(f"ppo.{name}={value}" for name, value in small.items())]

    return arguments


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_rows_model_and_reward_of_a_config_fit(file, tiny_run, capsys):
    assert train.main(["--dry-run", *tiny_run(file)]) == 0
    assert not Path("run").exists() and f"{len(CITIES)} of {len(CITIES)} rows" in capsys.readouterr().err


@pytest.mark.slow
def test_the_config_with_three_stages_runs(tiny_run):
    assert train.main(tiny_run(ROOT / "configs" / "real" / "llama-3.2-1b-tldr.yaml")) == 0
    assert {"sft", "reward_model", "ppo"} <= set(json.loads(Path("run/roles/finished.json").read_text()))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_header_gives_the_command_and_the_cards(file):
    """Its plan names the config, as many cards as the mesh needs, and a folder of configs/plans."""
    relative, commands = file.relative_to(ROOT), header(file)
    assert commands[0] == f"python -m jaxrlhf.train --config {relative}"
    (plan,) = [command.split() for command in commands if command.startswith("jaxrlhf plan ")]
    mesh = load_config(str(file)).mesh
    assert plan[plan.index("--config") + 1] == str(relative)
    assert int(plan[plan.index("--devices") + 1]) == abs(mesh.data) * mesh.fsdp * mesh.context * mesh.tensor
    (folder,) = [word.removeprefix("model.path=") for word in plan if word.startswith("model.path=")]
    assert (ROOT / folder / "config.json").is_file() and "never run" in file.read_text()


@pytest.mark.parametrize("name", PARAMETERS)
def test_plans_are_of_these_models(name):
    model = read_folder(str(ROOT / "configs" / "plans" / name))
    leaves = named_parameters(abstract_decoder(model, "bfloat16")).values()
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
