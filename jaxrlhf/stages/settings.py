"""Checks and small completions of settings that need to know the model or the number of steps."""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, RunConfig, Sampling
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import SCORE, check_kind, is_whole, target_paths
from jaxrlhf.models.decoder import Decoder, DecoderConfig
from jaxrlhf.records import Adapter
from jaxrlhf.steps.optimizer import with_rate


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
    what = "a whole model" if is_whole(tree) else "a head" if set(tree) == {SCORE} else "a LoRA adapter"
    return f"{config.learning_rate:g} for {what}"


def steps_text(epochs: int, batches: int) -> str:
    """How many optimizer steps a stage makes, in words: a few rows make very few."""
    total = epochs * batches
    return f"{total:,} optimizer step{'s' * (total != 1)} (epochs x batches: {epochs} x {batches:,})"


def with_total_steps(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The optimizer with the stage's own number of steps, where the settings give none."""
    return config if config.total_steps is not None else config.model_copy(update={"total_steps": float(steps)})


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
