"""The sft stage: supervised fine-tuning on demonstrations."""

import dataclasses

import jax.numpy as jnp

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.sft import SFTData, load_demonstrations
from jaxrlhf.data.sources import check_source
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.adapters import init_adapter, merge
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter, TrainState
from jaxrlhf.stages.checks import check_adapter, check_stage, rate_text, steps_text, with_total_steps
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.stages.programs import static_arguments, train_program
from jaxrlhf.stages.roles import Roles, mark_finished, save_base, save_role
from jaxrlhf.steps.optimizer import init_optimizer, with_rate
from jaxrlhf.steps.sft import sft_evaluate, sft_update


@dataclasses.dataclass(frozen=True)
class SFTInputs:
    """The stage's checked rows."""

    train: SFTData
    heldout: SFTData | None


def check(run: Run, roles: Roles) -> None:
    """Raises `UserError` if the settings do not fit the model or the mesh, or a data source is missing."""
    config = run.config.sft
    check_source(config.data)
    check_adapter(roles.base, run.config.adapter_or(config.adapter), "sft.adapter")
    for note in check_stage(run.config, "sft", roles.base.config, run.mesh):
        run.say(note)


def load(run: Run, roles: Roles) -> SFTInputs:
    """Reads the stage's rows. Raises `UserError` if they are invalid."""
    config, tokenizer = run.config.sft, roles.tokenizer
    examples, report = load_demonstrations(config.data, tokenizer, config.max_length, config.overflow)
    run.say(f"sft: {report}")
    train, held = hold_out(len(examples), config.heldout, run.config.seed)

    def data(rows) -> SFTData:
        sizes = (config.batch_size, config.max_length)
        return SFTData([examples[i] for i in rows], *sizes, run.config.seed, config.packing, tokenizer.pad_id)

    return SFTInputs(data(train), data(held) if len(held) else None)


def train(run: Run, roles: Roles, inputs: SFTInputs) -> Roles:
    """Runs the stage. Returns the roles with the SFT adapter, or with a new base after a full fine-tune."""
    config = run.config.sft
    key = key_for(run.config.seed, "sft", 0, "adapter")
    adapter = init_adapter(roles.base, run.config.adapter_or(config.adapter), key)
    total = config.epochs * len(inputs.train)
    optimizer = with_rate(with_total_steps(config.optimizer, total), "sft", adapter)
    run.say(f"sft: {steps_text(config.epochs, len(inputs.train))}; learning rate {rate_text(optimizer, adapter)}")
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    update, static = train_program(sft_update, run.mesh, roles.base, state), static_arguments(config)
    with Loop(run, "sft", state, total, config.save_every) as loop:
        for step in loop.steps():
            batch = shard_batch(run.mesh, inputs.train.batch(step))
            loop.state, metrics = update(loop.state, roles.base, batch, optimizer, **static)
            metrics["compiles/update"] = update.compiles
            loop.submitted(step, metrics, {"loss": "sft/loss"}, int(batch.tokens.size), batch)
        adapter = loop.result().adapter
    reached = {"heldout_loss": evaluate(run, roles.base, adapter, inputs.heldout)} if inputs.heldout else {}
    if run.config.sft_trains_base:
        base = shard(run.mesh, merge(roles.base, adapter))
        save_base(run.config.run_dir, base, roles.tokenizer)
        roles = Roles(base, roles.tokenizer)  # adapters of the old base do not fit the new one
    else:
        save_role(run.config.run_dir, "sft", adapter)
        roles = dataclasses.replace(roles, adapters=roles.adapters | {"sft": adapter})
    mark_finished(run.config.run_dir, "sft", reached)
    return roles


def evaluate(run: Run, base: Decoder, adapter: Adapter | None, data: SFTData) -> float:
    """Mean cross-entropy per token in the loss, in nats."""
    program = Program(sft_evaluate, "sft_evaluate", run.mesh, compiler_options(base))
    sums = [program(base, adapter, shard_batch(run.mesh, batch)) for batch in data.all_batches()]
    losses, tokens = zip(*fetch(sums))
    return float(sum(losses) / max(sum(tokens), 1))
