"""Trains an adapter on a data set for a number of epochs. The stages sft and reward_model use this module."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxrlhf.data.preferences import PreferenceData
from jaxrlhf.data.sft import SFTData
from jaxrlhf.data.sources import check_source
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


def train_adapter(
    run: Run,
    base: Decoder,
    stage: str,
    adapter: Adapter,
    data: SFTData | PreferenceData,
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
    total = config.epochs * len(data)
    optimizer = with_rate(with_total_steps(config.optimizer, total), stage, adapter)
    steps = f"{total:,} optimizer step{'s' * (total != 1)} (epochs x batches: {config.epochs} x {len(data):,})"
    run.say(f"{stage}: {steps}; learning rate {rate_text(optimizer, adapter)}")
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    update, static = train_program(step, run.mesh, base, state), static_arguments(config)
    of_state = None if evaluate is None else lambda state: evaluate(state.adapter)
    with Loop(run, stage, state, total, config.save_every, of_state, {"optimizer": optimizer}) as loop:
        for number in loop.steps():
            batch = shard_batch(run.mesh, data.batch(number))
            optimizer = loop.watch.optimizers["optimizer"]
            loop.state, metrics = update(loop.state, base, batch, optimizer, *arguments, **static)
            metrics["compiles/update"] = update.compiles
            loop.submitted(number, metrics, shown, batch.token_count, batch)
        state = loop.result()
    results = {} if evaluate is None else loop.evaluated(state).results
    check_results(stage, results, run.config.run_dir)
    return state.adapter, results | loop.stopped_early()
