"""Checks settings against the model and the mesh, and fills in settings that depend on the number of steps."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, PPOStageConfig, RunConfig, Sampling
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.distributed.mesh import BATCH_AXES, HEAD_AXES, POSITION_AXIS, check_batch
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import SCORE, check_kind, is_full, target_paths
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.fused_attention import check_model
from jaxrlhf.records import Adapter
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.stages.sizes import check_tokens_per_step, check_total_steps
from jaxrlhf.steps.optimizer import with_rate
from jaxrlhf.steps.ppo import complete

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def check_stage(config: RunConfig, stage: str, model: DecoderConfig, mesh: Mesh) -> list[str]:
    """Checks that a stage's sizes fit the model and the mesh, and returns warnings.

    Raises `UserError` if a size does not fit. Runs, plans and benchmarks all call this before they compile anything.
    """
    section = getattr(config, stage)
    if config.model.attention == "cudnn":
        check_model(model, mesh.shape["tensor"])
    _check_context(config, stage, model, mesh)
    check_batch(mesh, section.batch_size, f"{stage}.batch_size")
    if stage == "ppo":
        _check_ppo(section, model, mesh)
        if config.mesh.rollout is None:
            check_slots(section, mesh)
    else:
        check_length(model, section.max_length, f"{stage}.max_length")
        check_tokens_per_step(section.batch_size, section.max_length, f"{stage}.batch_size")
    rows, size, key_path = _update_rows(config, stage, section.batch_size)
    if size is not None:
        check_microbatches(rows, size, key_path)
    else:
        key_path = "ppo.update.minibatches" if stage == "ppo" else f"{stage}.batch_size"
    rows, shares = size or rows, shares_of(mesh)
    if rows % shares == 0:
        return []
    return [
        f"{key_path}: {rows} rows at a time do not divide evenly over {shares} groups of devices, so some groups "
        f"compute the same rows; {shares * max(rows // shares, 1)} rows would divide evenly"
    ]


def check_slots(config: PPOStageConfig, mesh: Mesh, section: str = "mesh") -> None:
    """Raises `UserError` if the slots cannot be split over the mesh of the rollout, whose sizes are in `section`."""
    check_batch(mesh, config.sampling.slots or shares_of(mesh), "ppo.sampling.slots", section)


def check_one_mesh(config: RunConfig) -> None:
    """Raises `UserError` if the run has two meshes. Plans and benchmarks call this: their programs are for one mesh."""
    if config.mesh.rollout is not None:
        raise UserError(
            "mesh.rollout: plan and bench work on one mesh only; give mesh.rollout=null mesh.update=null, and set "
            "mesh.data, mesh.fsdp, mesh.context and mesh.tensor to the sizes of mesh.rollout or of mesh.update"
        )


def check_no_environment(config: RunConfig) -> None:
    """Raises `UserError` if the run has an environment. Plans and benchmarks call this."""
    if config.ppo is not None and config.ppo.environment is not None:
        raise UserError(
            "ppo.environment: plan and bench do not know how long episodes are; leave environment out and give "
            "ppo.data and ppo.reward, with ppo.sampling.max_new_tokens as long as an episode"
        )


def _check_ppo(config: PPOStageConfig, model: DecoderConfig, mesh: Mesh) -> None:
    check_tokens(model, config.sampling, "ppo.sampling")
    length, rest = config.max_prompt_tokens + config.response_tokens, "ppo.sampling.max_new_tokens"
    if config.environment is not None:
        rest = f"ppo.environment.max_episode_tokens ({config.response_tokens})"
    check_length(model, length, f"ppo.max_prompt_tokens + {rest}")
    rows = config.batch_size * config.sampling.samples_per_prompt
    check_tokens_per_step(rows, length, "ppo.batch_size x ppo.sampling.samples_per_prompt")
    if (config.sampling.slots or 0) > rows:
        slots = config.sampling.slots
        raise UserError(f"ppo.sampling.slots: is {slots}, but an iteration has only {rows} completions; give less")
    minibatches = complete(config.update, rows).minibatches
    if rows % minibatches:
        raise UserError(
            f"ppo.update.minibatches: {rows} rows cannot be split into {minibatches} minibatches; {_fitting(rows)}"
        )
    check_total_steps(config.iterations * config.update.epochs * minibatches, "ppo.iterations")
    mix, size = config.pretraining, config.update.microbatch_size
    if mix is not None:
        check_length(model, mix.max_length, "ppo.pretraining.max_length")
        check_tokens_per_step(mix.batch_size, mix.max_length, "ppo.pretraining.batch_size")
        check_batch(mesh, mix.batch_size, "ppo.pretraining.batch_size")
        if size is not None and mix.batch_size > size:
            check_microbatches(mix.batch_size, size, "ppo.update.microbatch_size for ppo.pretraining.batch_size")
    check_algorithm(config)


def _check_context(config: RunConfig, stage: str, model: DecoderConfig, mesh: Mesh) -> None:
    """Raises `UserError` if `mesh.tensor` x `mesh.context` does not divide the heads, or `mesh.context` the lengths."""
    section, parts = getattr(config, stage), mesh.shape[POSITION_AXIS]
    heads = math.prod(mesh.shape[axis] for axis in HEAD_AXES)
    if parts > 1 and model.heads % heads:
        raise UserError(
            f"mesh.context: mesh.tensor x mesh.context is {heads}, but it must divide the {model.heads} query heads, "
            f"because attention splits heads; {_fitting(model.heads)}"
        )
    lengths = {f"{stage}.max_length": getattr(section, "max_length", 0)}
    if stage == "ppo":
        lengths = {
            "ppo.max_prompt_tokens": section.max_prompt_tokens,
            "ppo.sampling.max_new_tokens": section.sampling.max_new_tokens,
            "ppo.environment.max_episode_tokens": section.response_tokens,
            "ppo.pretraining.max_length": 0 if section.pretraining is None else section.pretraining.max_length,
        }
    for key_path, length in lengths.items():
        if length % parts:
            raise UserError(
                f"{key_path}: {length} tokens cannot be split over mesh.context={parts} devices; give "
                f"{max(length - length % parts, parts)}, or another multiple of {parts}"
            )


def _update_rows(config: RunConfig, stage: str, batch: int) -> tuple[int, int | None, str]:
    """Returns (rows per optimizer step, rows per microbatch, key path of the microbatch size).

    The rows per step are 0 if the batch cannot be split into equal minibatches.
    """
    section = getattr(config, stage)
    if stage != "ppo":
        return batch, section.microbatch_size, f"{stage}.microbatch_size"
    rows = batch * section.sampling.samples_per_prompt
    minibatches = complete(section.update, rows).minibatches
    rows = 0 if rows % minibatches else rows // minibatches
    return rows, section.update.microbatch_size, "ppo.update.microbatch_size"


def valid_batches(config: RunConfig, stage: str, shares: int, most: int) -> int | None:
    """Returns the largest valid batch size up to `most`, or None.

    A valid batch can be split over the mesh (`shares` parts), into minibatches, and these into microbatches.
    """
    for batch in range(most - most % shares, 0, -shares):
        rows, size, _ = _update_rows(config, stage, batch)
        if rows and (size is None or rows % size == 0):
            return batch
    return None


def shares_of(mesh: Mesh) -> int:
    """Returns the number of groups of devices over which rows are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def with_optimizers(update: PPOConfig, trained: Mapping[str, tuple[str, Any]], steps: Mapping[str, int]) -> PPOConfig:
    """Returns the update settings. Default learning rates and numbers of steps are filled in for each optimizer.

    `trained` maps an optimizer's name to (role, tree) of what it trains. `steps` maps the name to the number of steps.
    """
    optimizers = {
        name: with_rate(with_total_steps(getattr(update, name), steps[name]), role, tree)
        for name, (role, tree) in trained.items()
    }
    return update.model_copy(update=optimizers)


def rate_text(config: OptimizerConfig, tree: Adapter) -> str:
    """Returns a text that names a learning rate and what is trained with it: full weights, a head or an adapter."""
    kind = "a full fine-tune" if is_full(tree) else "a head" if set(tree) == {SCORE} else "a LoRA adapter"
    return f"{config.learning_rate:g} for {kind}"


def with_total_steps(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """Returns the optimizer settings, with `total_steps` set to `steps` if it is None."""
    return config if config.total_steps is not None else config.model_copy(update={"total_steps": steps})


def check_length(model: DecoderConfig, length: int, key_path: str) -> None:
    """Raises `UserError` if the model has fewer than `length` positions."""
    if length > model.max_positions:
        raise UserError(
            f"{key_path}: is {length} tokens, but the model has only {model.max_positions} positions; give less"
        )


def check_microbatches(rows: int, size: int, key_path: str) -> None:
    """Raises `UserError` if `rows` rows cannot be split into microbatches of `size` rows."""
    if rows % size:
        raise UserError(f"{key_path}: {rows} rows cannot be split into microbatches of {size}; {_fitting(rows)}")


def _fitting(rows: int) -> str:
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = [*small, *(rows // n for n in reversed(small) if n * n != rows)]
    return f"these fit: {', '.join(map(str, divisors))}"


def check_adapter(base: Decoder, config: AdapterConfig, key_path: str) -> None:
    """Raises `UserError` if the adapter targets modules that the model lacks, or trains a quantised model in full."""
    try:
        check_kind(base, config)
        if config.kind == "lora":
            target_paths(base, config)
    except UserError as error:
        raise UserError(f"{key_path}.{error}") from None


def check_tokens(model: DecoderConfig, sampling: Sampling, key_path: str) -> None:
    """Raises `UserError` if a stop or pad token is outside the vocabulary."""
    tokens = [*(sampling.stop_tokens or ()), sampling.pad_token or 0]
    largest = model.vocab_size - 1
    if min(tokens) < 0 or max(tokens) > largest:
        raise UserError(f"{key_path}: stop_tokens and pad_token must be ids from 0 to {largest}, not {tokens}")


def end_notes(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """Returns warnings about end tokens that differ between files of the tokenizer or between stages."""
    lines = list(tokenizer.notes)
    stops = None if config.ppo is None else config.ppo.sampling.stop_tokens
    end_ids = {*({tokenizer.chat_end_id} if tokenizer.has_chat_template else ()), tokenizer.text_end_id} - {None}
    if stops is not None and end_ids and not end_ids.intersection(stops):
        names = ", ".join(f"{tokenizer.fast.convert_ids_to_tokens(token)} (id {token})" for token in sorted(end_ids))
        lines.append(f"ppo.sampling.stop_tokens: does not contain {names}, which ends completions in the other stages")
    return lines
