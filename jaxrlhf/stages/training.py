"""Trains an adapter on a data set for a number of epochs or steps. The stages sft and reward_model use this module."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrlhf.data.mixture import Reader
from jaxrlhf.data.preferences import PreferenceData
from jaxrlhf.data.sft import SFTData
from jaxrlhf.data.sources import check_source
from jaxrlhf.data.streamed import StreamedBatches
from jaxrlhf.data.streams import Stream
from jaxrlhf.distributed.mesh import shard_batch
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.records import Adapter, TrainState
from jaxrlhf.stages.checks import check_adapter, check_stage, rate_text, with_total_steps
from jaxrlhf.stages.evaluation import Evaluated, check_results
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.stages.programs import static_arguments, train_program
from jaxrlhf.stages.sizes import check_lora, check_packed, check_rollout
from jaxrlhf.steps.optimizer import init_optimizer, with_rate


def check_settings(run: Run, base: Decoder, stage: str, *sources: Any) -> None:
    """Raises `UserError` if a stage does not fit the model or the mesh, or a data source is missing.

    Prints warnings.
    """
    for source in filter(None, sources):
        check_source(source)
    check_adapter(base, run.config.adapter_or(getattr(run.config, stage).adapter), f"{stage}.adapter")
    for warning in check_stage(run.config, stage, base.config, run.mesh):
        run.say(warning)
    _check_memory(run, base, stage)


def _check_memory(run: Run, base: Decoder, stage: str) -> None:
    """Raises `UserError` if the stage needs more memory than there is, even if all rows are short."""
    config, settings = run.config, getattr(run.config, stage)
    for name in ("adapter", "value_adapter"):
        own = getattr(settings, name, None)
        if (adapter := config.adapter_or(own)).kind == "lora":
            check_lora(base, adapter, run.mesh, f"{stage}.{name}" if own is not None else "adapter")
    if stage == "ppo":
        check_rollout(settings, base.config, run.mesh)
    elif getattr(settings, "packing", False):
        rows = settings.microbatch_size or settings.batch_size
        check_packed(rows, settings.max_length, base.config, run.mesh, f"{stage}.batch_size")


def open_stream(run: Run, stage: str, config: Any, reader_of: Callable[[Any], Reader]) -> Stream:
    """Returns the stream of a stage. Reads its first window. Raises `UserError` if the rows are invalid."""
    stream = Stream(config, reader_of, lambda text: run.say(f"{stage}: {text}"))
    if not stream.first.ends_pass:
        run.say(f"{stage}: {stream.first.report} (the first window; each has {config.shuffle_buffer:,} rows)")
    return stream


def train_adapter(
    run: Run,
    base: Decoder,
    stage: str,
    adapter: Adapter,
    data: SFTData | PreferenceData | StreamedBatches,
    step: Callable,
    *arguments: float,
    shown: dict[str, str],
    evaluate: Callable[[Adapter], Evaluated] | None,
) -> tuple[Adapter, dict[str, Any]]:
    """Trains an adapter, from the stage's last checkpoint to its last epoch. Returns (adapter, results of the stage).

    `step` is the training step and `arguments` are the last arguments of `step`. `shown` maps progress labels to metric
    names. `evaluate` measures an adapter on held-out rows; None measures nothing. Raises `Diverged` if a result of the
    final evaluation is not finite.
    """
    config = getattr(run.config, stage)
    total, steps = planned_steps(config, data)
    optimizer = with_rate(with_total_steps(config.optimizer, total), stage, adapter)
    run.say(f"{stage}: {steps}; learning rate {rate_text(optimizer, adapter)}")
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    update, static = train_program(step, run.mesh, base, state), static_arguments(config)
    of_state = None if evaluate is None else lambda state: evaluate(state.adapter)
    stream = data if isinstance(data, StreamedBatches) else None
    with Loop(run, stage, state, total, config.save_every, of_state, {"optimizer": optimizer}, stream) as loop:
        if stream is not None:
            loop.ends_at(stream.total(loop.first))
        for number in loop.steps():
            if stream is not None:
                loop.ends_at(stream.total(number))
            batch = shard_batch(run.mesh, data.batch(number))
            optimizer = loop.watch.optimizers["optimizer"]
            loop.state, metrics = update(loop.state, base, batch, optimizer, *arguments, **static)
            metrics["compiles/update"] = update.compiles
            metrics |= {} if stream is None else stream.metrics()
            loop.submitted(number, metrics, shown, batch.token_count, batch)
        state = loop.result()
    results = {} if evaluate is None else loop.evaluated(state).results
    check_results(stage, results, run.config.run_dir)
    return state.adapter, results | loop.stopped_early()


def planned_steps(config: Any, data: SFTData | PreferenceData | StreamedBatches) -> tuple[int, str]:
    """Returns the largest number of optimizer steps of a stage, as a number and as text for the user."""
    if isinstance(data, StreamedBatches):
        limits = f"at most {config.max_steps:,} optimizer steps and {config.epochs} pass{'es' * (config.epochs > 1)}"
        return config.max_steps, f"{limits} over a stream"
    total, limit = config.epochs * len(data), ""
    if config.max_steps is not None and config.max_steps < total:
        total, limit = config.max_steps, f", limited by max_steps: {config.max_steps:,}"
    batches = f"(epochs x batches: {config.epochs} x {len(data):,}{limit})"
    return total, f"{total:,} optimizer step{'s' * (total != 1)} {batches}"
