"""Every recipe runs in a small size, with a reward that is defined on its rows."""

import runpy
from pathlib import Path

import pytest

from jaxrlhf.config.reading import load_config
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.toy import builtin

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
SMALL = [
    "model.new.hidden_size=32", "model.new.layers=1", "model.new.heads=2", "model.new.kv_heads=1",
    "model.new.intermediate_size=32", "sft.epochs=1", "sft.data.limit=16", "sft.batch_size=8", "ppo.iterations=1",
    "ppo.batch_size=8", "ppo.adapter.rank=2", "ppo.update.epochs=1", "ppo.update.minibatches=1",
    "ppo.evaluation.every=1", "ppo.evaluation.prompts=8", "ppo.update.value_warmup=0", "report=false",
]  # fmt: skip
SMALL_REWARD_MODEL = ["reward_model.batch_size=8", "reward_model.epochs=1"]
PACKAGES = {"summarisation": "rouge_score", "translation": "sacrebleu"}


def small_classifier(folder):
    """The settings of the recipe detoxification with a classifier that has hardly been trained."""
    runpy.run_path(str(RECIPES[0].parent / "make_toxicity_classifier.py"))["make"](str(folder / "classifier"), steps=2)
    return [f"ppo.reward.parts.clean.path={folder / 'classifier'}"]


def sources(config):
    """The key path and the settings of every source of a config's stages."""
    for name in config.stages:
        stage = getattr(config, name)
        for key, source in (("data", stage.data), ("evaluation.data", stage.evaluation.data)):
            if source is not None:
                yield f"{name}.{key}", source


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_in_a_small_size(recipe, tmp_path):
    from jaxrlhf.stages.run import run_stages

    if recipe.stem in PACKAGES:
        pytest.importorskip(PACKAGES[recipe.stem])
    full = load_config(recipe)
    small = SMALL + (SMALL_REWARD_MODEL if "reward_model" in full.stages else [])
    small += [f"{key}.limit=16" for key, source in sources(full) if source.path.startswith("builtin:")]
    if recipe.stem == "detoxification":
        small += small_classifier(tmp_path)
    config = load_config(recipe, [*small, f"run_dir={tmp_path / 'run'}"])
    run_stages(config)
    assert (tmp_path / "run" / "roles" / "policy").is_dir()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_stage_of_a_recipe_reads_the_test_split(recipe):
    splits = [source.split for _, source in sources(load_config(recipe))]
    assert splits and "test" not in splits


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_vocabulary_has_every_word_of_the_rows(recipe):
    config = load_config(recipe, ["sft.data.limit=300", "ppo.data.limit=300"])
    words, template = builtin.vocabulary(config.model.new.vocabulary)
    assert len(set(words)) == len(words) <= 1000
    tokenizer = build_word_tokenizer(words, template)
    ids = [*load_prompts(config.ppo.data, tokenizer, config.ppo.max_prompt_tokens, "stop").ids]
    demonstrations, _ = load_demonstrations(config.sft.data, tokenizer, config.sft.max_length, "stop")
    ids += [part for row in demonstrations for part in (row.prompt_ids, row.response_ids)]
    if (stage := config.reward_model) is not None:
        pairs, _ = load_preferences(stage.data, tokenizer, stage.max_length, "stop")
        ids += [part for pair in pairs for part in (pair.chosen_ids, pair.rejected_ids)]
    assert not any(tokenizer.fast.unk_token_id in row for row in ids)
