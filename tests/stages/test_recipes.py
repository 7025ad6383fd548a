"""Every recipe runs in a small size, with a reward that is defined on its rows."""

import runpy
from pathlib import Path

import pytest
from repository_files import sources

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
SMALL_REWARD_MODEL = ["reward_model.epochs=1", "reward_model.batch_size=8"]
PACKAGES = {"detoxification": "torch", "summarisation": "rouge_score", "translation": "sacrebleu"}


def small(recipe, tmp_path):
    """The overrides for a small run of a recipe."""
    config = load_config(recipe)
    limits = [f"{key}.limit=16" for key, _ in sources(config)]
    if recipe.stem == "detoxification":
        folder = tmp_path / "classifier"
        runpy.run_path(str(recipe.with_name("detoxification_classifier.py")))["save_classifier"](folder, steps=2)
        limits.append(f"ppo.reward.parts.harmless.path={folder}")
    return [*SMALL, *(SMALL_REWARD_MODEL if "reward_model" in config.stages else []), *limits]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_in_a_small_size(recipe, tmp_path):
    from jaxrlhf.stages.run import run_stages

    if recipe.stem in PACKAGES:
        pytest.importorskip(PACKAGES[recipe.stem])
    config = load_config(recipe, [*small(recipe, tmp_path), f"run_dir={tmp_path / 'run'}"])
    run_stages(config)
    assert (tmp_path / "run" / "roles" / "policy").is_dir()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_stage_of_a_recipe_reads_the_test_split(recipe):
    splits = [source.split for _, source in sources(load_config(recipe))]
    assert splits and "test" not in splits


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_vocabulary_has_every_word_of_the_rows(recipe):
    config = load_config(recipe, [f"{key}.limit=300" for key, _ in sources(load_config(recipe))])
    words, template = builtin.vocabulary(config.model.new.vocabulary)
    assert len(set(words)) == len(words) <= 1000
    tokenizer = build_word_tokenizer(words, template)
    ids = [*load_prompts(config.ppo.data, tokenizer, config.ppo.max_prompt_tokens, "stop").ids]
    demonstrations, _ = load_demonstrations(config.sft.data, tokenizer, config.sft.max_length, "stop")
    ids += [part for row in demonstrations for part in (row.prompt_ids, row.response_ids)]
    if "reward_model" in config.stages:
        pairs, _ = load_preferences(config.reward_model.data, tokenizer, config.reward_model.max_length, "stop")
        ids += [part for pair in pairs for part in (pair.chosen_ids, pair.rejected_ids)]
    assert not any(tokenizer.fast.unk_token_id in row for row in ids)
