"""The sft stage: supervised fine-tuning on demonstrations."""

import dataclasses

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.sft import Example, SFTData, load_demonstrations
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.adapters import init_adapter, merge
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter
from jaxrlhf.stages.evaluation import check_results
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles, mark_finished, save_base, save_role
from jaxrlhf.stages.sizes import check_total_steps
from jaxrlhf.stages.training import check_settings, train_adapter
from jaxrlhf.steps.sft import sft_evaluate, sft_update


@dataclasses.dataclass(frozen=True)
class SFTInputs:
    """The stage's checked rows."""

    train: SFTData
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

    def data(examples: list[Example]) -> SFTData:
        sizes = (config.batch_size, config.max_length)
        return SFTData(examples, *sizes, run.config.seed, config.packing, tokenizer.pad_id)

    examples = read(config.data)
    if config.evaluation.data is not None:
        inputs = SFTInputs(data(examples), data(read(config.evaluation.data)))
    else:
        train, held = hold_out(len(examples), config.evaluation.heldout, run.config.seed)
        heldout = data([examples[i] for i in held]) if len(held) else None
        inputs = SFTInputs(data([examples[i] for i in train]), heldout)
    check_total_steps(config.epochs * len(inputs.train), "sft.epochs")
    return inputs


def train(run: Run, roles: Roles, inputs: SFTInputs) -> Roles:
    """Runs the stage. Returns the roles with the SFT adapter, or with a new base after a full fine-tune."""
    config, folder = run.config, run.config.run_dir
    adapter = init_adapter(roles.base, config.adapter_or(config.sft.adapter), key_for(config.seed, "sft", 0, "adapter"))
    adapter = train_adapter(run, roles.base, "sft", adapter, inputs.train, sft_update, shown={"loss": "sft/loss"})
    results = {"heldout_loss": evaluate(run, roles.base, adapter, inputs.heldout)} if inputs.heldout else {}
    check_results("sft", results, folder)
    if config.sft_trains_base:
        base = shard(run.mesh, merge(roles.base, adapter))
        save_base(folder, base, roles.tokenizer)
        roles = Roles(base, roles.tokenizer)  # adapters of the old base do not fit the new one
    else:
        save_role(folder, "sft", adapter)
        roles = dataclasses.replace(roles, adapters=roles.adapters | {"sft": adapter})
    mark_finished(folder, "sft", results)
    return roles


def evaluate(run: Run, base: Decoder, adapter: Adapter | None, data: SFTData) -> float:
    """Mean cross-entropy per token in the loss, in nats."""
    program = Program(sft_evaluate, "sft_evaluate", run.mesh, compiler_options(base))
    sums = [program(base, adapter, shard_batch(run.mesh, batch)) for batch in data.all_batches()]
    losses, tokens = zip(*fetch(sums))
    return float(sum(losses) / max(sum(tokens), 1))
