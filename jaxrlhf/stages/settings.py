"""Checks and small completions of settings that need to know the model or the number of steps."""

from jaxrlhf.config import AdapterConfig, OptimizerConfig, Sampling
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import check_kind, target_paths
from jaxrlhf.models.decoder import Decoder, DecoderConfig


def with_total_steps(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The optimizer with the stage's own number of steps, where the settings give none."""
    return config if config.total_steps is not None else config.model_copy(update={"total_steps": float(steps)})


def check_length(model: DecoderConfig, length: int, key_path: str) -> None:
    """UserError where sequences would be longer than the model's positions."""
    if length > model.max_positions:
        raise UserError(f"{key_path}: {length} tokens, but the model has {model.max_positions} positions")


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


def with_stop_tokens(sampling: Sampling, base: Decoder, tokenizer: Tokenizer) -> Sampling:
    """The sampling with the tokenizer's end token, where neither settings nor model name one."""
    if sampling.stop_tokens is None and not base.config.stop_tokens and tokenizer.eos_id is not None:
        return sampling.model_copy(update={"stop_tokens": (tokenizer.eos_id,)})
    return sampling
