"""Every recipe runs in a small size, with a reward that is defined on its rows."""

from pathlib import Path

import pytest

from jaxrlhf.config.reading import load_config

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
SMALL = [
    "model.new.hidden_size=32", "model.new.layers=1", "model.new.heads=2", "model.new.kv_heads=1",
    "model.new.intermediate_size=32", "sft.epochs=1", "sft.data.limit=16", "sft.batch_size=8", "ppo.iterations=1",
    "ppo.batch_size=8", "ppo.adapter.rank=2", "ppo.update.epochs=1", "ppo.update.minibatches=1",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_in_a_small_size(recipe, tmp_path):
    from jaxrlhf.stages.run import run_stages

    config = load_config(recipe, [*SMALL, f"run_dir={tmp_path / 'run'}"])
    run_stages(config)
    assert (tmp_path / "run" / "roles" / "policy").is_dir()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_stage_of_a_recipe_reads_the_test_split(recipe):
    splits = [
        source.split
        for section in (load_config(recipe).sft, load_config(recipe).reward_model, load_config(recipe).ppo)
        if section is not None
        for source in (section.data, section.evaluation and section.evaluation.data)
        if source is not None
    ]
    assert splits and "test" not in splits
