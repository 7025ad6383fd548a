"""The sft stage: supervised fine-tuning on demonstrations."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.sft import Example, SFTData, demonstrations_reader, load_demonstrations
from jaxrlhf.data.streamed import StreamedBatches
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import init_adapter, merge
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter
from jaxrlhf.stages.evaluation import Evaluated
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles, mark_finished, save_base, save_role
from jaxrlhf.stages.sizes import check_total_steps
from jaxrlhf.stages.training import check_settings, open_stream, planned_steps, train_adapter
from jaxrlhf.steps.sft import sft_evaluate, sft_update


@dataclasses.dataclass(frozen=True)
class SFTInputs:
    """The stage's checked rows."""

    train: SFTData | StreamedBatches
    heldout: SFTData | None


def check(run: Run, roles: Roles) -> None:
    """Raises `UserError` if the settings do not fit the model or the mesh, or the data source is missing."""
    check_settings(run, roles.base, "sft", run.config.sft.data, run.config.sft.evaluation.data)


def load(run: Run, roles: Roles) -> SFTInputs:
    """Reads the stage's rows. Raises `UserError` if they are invalid."""
    config, tokenizer = run.config.sft, roles.tokenizer

    def read(source) -> list[Example]:
        examples, report = load_demonstrations(source, tokenizer, config.max_length, config.overflow)
        run.say(f"sft: {report}")
        return examples

    def data(examples: list[Example], bounds: np.ndarray | None = None) -> SFTData:
        sizes = (config.batch_size, config.max_length)
        return SFTData(examples, *sizes, run.config.seed, config.packing, tokenizer.pad_id, bounds)

    if config.data.streaming:
        heldout = None if config.evaluation.data is None else data(read(config.evaluation.data))
        train = _stream(run, roles, data)
        check_total_steps(planned_steps(config, train)[0], "sft.max_steps")
        return SFTInputs(train, heldout)
    examples = read(config.data)
    if config.evaluation.data is not None:
        inputs = SFTInputs(data(examples), data(read(config.evaluation.data)))
    else:
        train, held = hold_out(examples, config.evaluation.heldout, run.config.seed)
        inputs = SFTInputs(data(train), data(held) if held else None)
    if config.evaluation.every is not None and inputs.heldout is None:
        raise UserError(
            f"sft.evaluation.every: none of the {len(examples)} rows is held out for evaluation; give "
            "sft.evaluation.data, or at least 10 rows and sft.evaluation.heldout above 0"
        )
    check_total_steps(planned_steps(config, inputs.train)[0], "sft.epochs")
    return inputs


def _stream(run: Run, roles: Roles, data: Callable[..., SFTData]) -> StreamedBatches:
    config, limits = run.config.sft, (roles.tokenizer, run.config.sft.max_length, run.config.sft.overflow)
    if config.evaluation.data is None:
        run.say("sft: no rows of a stream are held out, so no held-out loss is measured; give sft.evaluation.data")
    stream = open_stream(run, "sft", config.data, lambda source: demonstrations_reader(source, *limits))
    return StreamedBatches(stream, data, config.max_length, config.epochs)


def train(run: Run, roles: Roles, inputs: SFTInputs) -> Roles:
    """Runs the stage. Returns the roles, to which the SFT adapter is added.

    A full fine-tune adds no adapter; the returned roles have a new base.
    """
    config, folder = run.config, run.config.run_dir
    adapter = init_adapter(roles.base, config.adapter_or(config.sft.adapter), key_for(config.seed, "sft", 0, "adapter"))
    evaluate = evaluation(run, roles.base, inputs.heldout) if inputs.heldout is not None else None
    shown = {"loss": "sft/loss"}
    adapter, results = train_adapter(
        run, roles.base, "sft", adapter, inputs.train, sft_update, shown=shown, evaluate=evaluate
    )
    if config.sft_trains_base:
        base = shard(run.mesh, merge(roles.base, adapter))
        save_base(folder, base, roles.tokenizer)
        roles = Roles(base, roles.tokenizer)  # adapters of the old base do not fit the new base
    else:
        save_role(folder, "sft", adapter)
        roles = dataclasses.replace(roles, adapters=roles.adapters | {"sft": adapter})
    mark_finished(folder, "sft", results)
    return roles


def evaluation(run: Run, base: Decoder, data: SFTData) -> Callable[[Adapter], Evaluated]:
    """Returns a function that measures an adapter: mean cross-entropy per learned token, in nats, and perplexity."""
    program = Program(sft_evaluate, "sft_evaluate", run.mesh, compiler_options(base))

    def evaluate(adapter: Adapter) -> Evaluated:
        sums = [program(base, adapter, shard_batch(run.mesh, batch)) for batch in data.all_batches()]
        losses, tokens = zip(*fetch(sums))
        loss = float(sum(losses) / max(sum(tokens), 1))
        with np.errstate(over="ignore"):
            metrics = {"sft/loss": loss, "sft/perplexity": float(np.exp(np.float64(loss)))}
        return Evaluated(metrics, {}, {"heldout_loss": loss})

    return evaluate
