"""Every recipe runs in a small size, with a reward that is defined on its rows."""

from pathlib import Path

import pytest
from repository_files import sources

from jaxrlhf.config.reading import load_config
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
PACKAGES = {"summarisation": "rouge_score", "translation": "sacrebleu"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_in_a_small_size(recipe, tmp_path):
    from jaxrlhf.stages.run import run_stages

    if recipe.stem in PACKAGES:
        pytest.importorskip(PACKAGES[recipe.stem])
    limits = [f"{key}.limit=16" for key, _ in sources(load_config(recipe))]
    config = load_config(recipe, [*SMALL, *limits, f"run_dir={tmp_path / 'run'}"])
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
    assert not any(tokenizer.fast.unk_token_id in row for row in ids)
