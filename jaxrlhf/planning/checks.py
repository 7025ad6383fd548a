"""Settings against the mesh and the model, before anything is compiled."""

import math

import jax

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.compiler_options import check_options
from jaxrlhf.distributed.mesh import BATCH_AXES, check_batch, uneven_rows
from jaxrlhf.models.decoder import DecoderConfig
from jaxrlhf.models.fused_attention import check_model
from jaxrlhf.stages.ppo_settings import check_algorithm
from jaxrlhf.stages.settings import check_length, check_microbatches, check_minibatches, check_tokens
from jaxrlhf.steps.ppo import complete

BATCHES = {"sft": "sft.batch_size", "reward_model": "reward_model.batch_size", "ppo": "ppo.batch_size"}


def check(config: RunConfig, mesh: jax.sharding.Mesh, model: DecoderConfig) -> list[str]:
    """What is worth knowing of how rows fall on the mesh; `UserError` where a run would refuse the settings."""
    check_options(config.compiler_options)
    if config.model.attention == "cudnn":
        check_model(model, mesh.shape["tensor"])
    notes = []
    for stage in config.stages:
        section = getattr(config, stage)
        check_batch(mesh, section.batch_size, BATCHES[stage])
        rows, name = section.batch_size, BATCHES[stage]
        if stage == "ppo":
            check_tokens(model, section.sampling, "ppo.sampling")
            check_algorithm(section)
            length = section.max_prompt_tokens + section.sampling.max_new_tokens
            where = "ppo.max_prompt_tokens + ppo.sampling.max_new_tokens"
            answers = rows * section.sampling.samples_per_prompt
            count = complete(section.update, answers).minibatches
            check_minibatches(answers, count, "ppo.update.minibatches")
            rows, name = answers // count, "ppo.update.minibatches"
            size, key_path = section.update.microbatch_size, "ppo.update.microbatch_size"
        else:
            length, where = section.max_length, f"{stage}.max_length"
            size, key_path = section.microbatch_size, f"{stage}.microbatch_size"
        check_length(model, length, where)
        check_microbatches(rows, size, key_path)
        if size is not None:
            rows, name = size, key_path
        if note := uneven_rows(mesh, rows, name):
            notes.append(note)
    return notes


def valid_batches(config: RunConfig, stage: str, shares: int, most: int) -> int | None:
    """The largest batch of at most `most` rows that splits over the mesh and into the stage's parts; None: none."""
    section = getattr(config, stage)
    for batch in range(most - most % shares, 0, -shares):
        rows, size = batch, None if stage == "ppo" else section.microbatch_size
        if stage == "ppo":
            answers = batch * section.sampling.samples_per_prompt
            minibatches = complete(section.update, answers).minibatches
            if answers % minibatches:
                continue
            rows, size = answers // minibatches, section.update.microbatch_size
        if size is None or rows % size == 0:
            return batch
    return None


def shares_of(mesh: jax.sharding.Mesh) -> int:
    """Over how many groups of devices rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
