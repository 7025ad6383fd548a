"""Checks and small completions of settings that need to know the model or the number of steps."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, PPOStageConfig, RunConfig, Sampling
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed.mesh import BATCH_AXES, check_batch
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import SCORE, check_kind, is_full, target_paths
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.fused_attention import check_model
from jaxrlhf.records import Adapter
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.steps.optimizer import with_rate
from jaxrlhf.steps.ppo import complete

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def check_stage(config: RunConfig, stage: str, model: DecoderConfig, mesh: Mesh) -> list[str]:
    """What is worth knowing of how a stage's rows lie on the mesh; `UserError` where its settings do not fit.

    Runs, plans and benchmarks check the same, before anything is compiled: sizes against the model and the mesh.
    """
    section = getattr(config, stage)
    if config.model.attention == "cudnn":
        check_model(model, mesh.shape["tensor"])
    check_batch(mesh, section.batch_size, f"{stage}.batch_size")
    if stage == "ppo":
        _check_ppo(section, model, mesh)
    else:
        check_length(model, section.max_length, f"{stage}.max_length")
    rows, size, where = _update_rows(config, stage, section.batch_size)
    check_microbatches(rows, size, where)
    if size is None and stage == "ppo":
        where = "ppo.update.minibatches"
    elif size is None:
        where = f"{stage}.batch_size"
    rows, shares = size or rows, shares_of(mesh)
    if rows % shares == 0:
        return []
    return [
        f"{where}: {rows} rows go through at a time, which {shares} groups of devices cannot share evenly: some "
        f"compute the same; {shares * max(rows // shares, 1)} rows at a time would be shared"
    ]


def _check_ppo(config: PPOStageConfig, model: DecoderConfig, mesh: Mesh) -> None:
    check_tokens(model, config.sampling, "ppo.sampling")
    length = config.max_prompt_tokens + config.sampling.max_new_tokens
    check_length(model, length, "ppo.max_prompt_tokens + ppo.sampling.max_new_tokens")
    if config.update.buckets > 1:
        check_one_rope(model, config.max_prompt_tokens + 1, length, "ppo.update.buckets")
    answers = config.batch_size * config.sampling.samples_per_prompt
    check_minibatches(answers, complete(config.update, answers).minibatches, "ppo.update.minibatches")
    mix, size = config.pretraining, config.update.microbatch_size
    if mix is not None:
        check_length(model, mix.max_length, "ppo.pretraining.max_length")
        check_batch(mesh, mix.batch_size, "ppo.pretraining.batch_size")
        if size is not None and mix.batch_size > size:
            check_microbatches(mix.batch_size, size, "ppo.update.microbatch_size for ppo.pretraining.batch_size")
    check_algorithm(config)


def _update_rows(config: RunConfig, stage: str, batch: int) -> tuple[int, int | None, str]:
    """(rows of an optimizer step, rows of a microbatch, its key path); rows are 0 where minibatches do not divide."""
    section = getattr(config, stage)
    if stage != "ppo":
        return batch, section.microbatch_size, f"{stage}.microbatch_size"
    answers = batch * section.sampling.samples_per_prompt
    count = complete(section.update, answers).minibatches
    rows = 0 if answers % count else answers // count
    return rows, section.update.microbatch_size, "ppo.update.microbatch_size"


def valid_batches(config: RunConfig, stage: str, shares: int, most: int) -> int | None:
    """The largest batch of at most `most` rows that splits over the mesh and into the stage's parts; None: none."""
    for batch in range(most - most % shares, 0, -shares):
        rows, size, _ = _update_rows(config, stage, batch)
        if rows and (size is None or rows % size == 0):
            return batch
    return None


def shares_of(mesh: Mesh) -> int:
    """Over how many groups of devices rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def with_optimizers(update: PPOConfig, trained: Mapping[str, tuple[str, Any]], steps: Mapping[str, int]) -> PPOConfig:
    """The update with learning rate and number of steps of each optimizer, where the settings give none.

    Both are by the optimizer's name; `trained` has its role and its tree.
    """
    found = {
        name: with_rate(with_total_steps(getattr(update, name), steps[name]), role, tree)
        for name, (role, tree) in trained.items()
    }
    return update.model_copy(update=found)


def rate_text(config: OptimizerConfig, tree: Adapter) -> str:
    """A learning rate and what it is for, in words."""
    what = "a whole model" if is_full(tree) else "a head" if set(tree) == {SCORE} else "a LoRA adapter"
    return f"{config.learning_rate:g} for {what}"


def steps_text(epochs: int, batches: int) -> str:
    """How many optimizer steps a stage makes, in words: a few rows make very few."""
    total = epochs * batches
    return f"{total:,} optimizer step{'s' * (total != 1)} (epochs x batches: {epochs} x {batches:,})"


def with_total_steps(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The optimizer with the stage's own number of steps, where the settings give none."""
    return config if config.total_steps is not None else config.model_copy(update={"total_steps": steps})


def check_length(model: DecoderConfig, length: int, key_path: str) -> None:
    """UserError where sequences would be longer than the model's positions."""
    if length > model.max_positions:
        raise UserError(f"{key_path}: {length} tokens, but the model has {model.max_positions} positions")


def check_one_rope(model: DecoderConfig, shortest: int, longest: int, key_path: str) -> None:
    """UserError where rows cut to several lengths would be turned by longrope's short list and by its long one."""
    for kind in model.layer_kinds:
        border = dict(kind.rope.numbers).get("original_max_position_embeddings") if kind.rope is not None else None
        if kind.rope is not None and kind.rope.kind == "longrope" and shortest <= border < longest:
            raise UserError(
                f"{key_path}: rows would be cut to lengths between {shortest} and {longest}, and this model's longrope "
                f"turns rows of more than {border} tokens otherwise; give 1"
            )


def check_minibatches(rows: int, count: int, key_path: str) -> None:
    """UserError where rows do not divide into `count` minibatches."""
    if rows % count:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"{key_path}: {rows} rows cannot be split into {count} equal minibatches; these fit: {fitting}")


def check_microbatches(rows: int, size: int | None, key_path: str) -> None:
    """UserError where rows do not divide into microbatches."""
    if size is not None and rows % size:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"{key_path}: {rows} rows cannot be split into parts of {size}; these fit: {fitting}")


def check_adapter(base: Decoder, config: AdapterConfig, key_path: str) -> None:
    """UserError where the adapter names modules that the model lacks, or would train a quantised model whole."""
    try:
        check_kind(base, config)
        if config.kind == "lora":
            target_paths(base, config)
    except UserError as error:
        raise UserError(f"{key_path}.{error}") from None


def check_tokens(model: DecoderConfig, sampling: Sampling, key_path: str) -> None:
    """UserError where a stop or pad token is no id of the vocabulary."""
    tokens = [*(sampling.stop_tokens or ()), sampling.pad_token or 0]
    largest = model.vocab_size - 1
    if min(tokens) < 0 or max(tokens) > largest:
        raise UserError(f"{key_path}: stop_tokens and pad_token are ids from 0 to {largest}, given {tokens}")


def end_notes(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Lines on ends of answers that do not agree, for a person to read before the run."""
    lines = list(tokenizer.notes)
    stops = None if config.ppo is None else config.ppo.sampling.stop_tokens
    taught = {*({tokenizer.chat_end_id} if tokenizer.has_chat_template else ()), tokenizer.text_end_id} - {None}
    if stops is not None and taught and not taught.intersection(stops):
        names = ", ".join(f"{tokenizer.fast.convert_ids_to_tokens(token)} (id {token})" for token in sorted(taught))
        lines.append(f"ppo.sampling.stop_tokens: without {names}, which ends an answer in the other stages")
    return lines
