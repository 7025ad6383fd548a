"""The reward_model stage: learns which of two completions people prefer."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.preferences import Pair, PreferenceData, load_preferences
from jaxrlhf.data.sources import check_source
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.adapters import as_kind, init_adapter, with_head
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Adapter, TrainState
from jaxrlhf.stages.checks import check_adapter, check_stage, rate_text, steps_text, with_total_steps
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.stages.programs import static_arguments, train_program
from jaxrlhf.stages.roles import Roles, mark_finished, save_role
from jaxrlhf.steps.optimizer import init_optimizer, with_rate
from jaxrlhf.steps.reward_model import pair_scores, reward_model_update


@dataclasses.dataclass(frozen=True)
class RewardModelInputs:
    """The stage's checked pairs."""

    train: PreferenceData
    heldout: PreferenceData


def check(run: Run, roles: Roles) -> None:
    """Raises `UserError` if the settings do not fit the model or the mesh, or a data source is missing."""
    config = run.config.reward_model
    for source in filter(None, (config.data, config.test_data)):
        check_source(source)
    check_adapter(roles.base, run.config.adapter_or(config.adapter), "reward_model.adapter")
    for note in check_stage(run.config, "reward_model", roles.base.config, run.mesh):
        run.say(note)


def load(run: Run, roles: Roles) -> RewardModelInputs:
    """Reads the stage's pairs. Raises `UserError` if they are invalid."""
    config, tokenizer = run.config.reward_model, roles.tokenizer

    def read(source) -> list[Pair]:
        pairs, report = load_preferences(source, tokenizer, config.max_length, config.overflow)
        run.say(f"reward_model: {report}")
        return pairs

    def data(pairs: list[Pair]) -> PreferenceData:
        sizes = (config.batch_size, config.max_length)
        return PreferenceData(pairs, *sizes, run.config.seed, config.buckets, tokenizer.pad_id)

    pairs = read(config.data)
    if config.test_data is not None:
        return RewardModelInputs(data(pairs), data(read(config.test_data)))
    rows, held = hold_out(len(pairs), config.heldout, run.config.seed)
    if not len(held):
        held = rows
        run.say(f"reward_model: no held-out pairs (of {len(pairs)}): accuracy is on the training pairs")
    return RewardModelInputs(data([pairs[i] for i in rows]), data([pairs[i] for i in held]))


def train(run: Run, roles: Roles, inputs: RewardModelInputs) -> Roles:
    """Runs the stage. Returns the roles with the reward adapter."""
    config = run.config.reward_model
    key = key_for(run.config.seed, "reward_model", 0, "adapter")
    adapter_config = run.config.adapter_or(config.adapter)
    if config.start == "sft" and roles.reference is not None:
        adapter = with_head(as_kind(roles.base, roles.reference, adapter_config.kind), roles.base, "reward", key)
    else:
        adapter = init_adapter(roles.base, adapter_config, key, head="reward")
    total = config.epochs * len(inputs.train)
    optimizer = with_rate(with_total_steps(config.optimizer, total), "reward_model", adapter)
    steps = steps_text(config.epochs, len(inputs.train))
    run.say(f"reward_model: {steps}; learning rate {rate_text(optimizer, adapter)}")
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    update, static = train_program(reward_model_update, run.mesh, roles.base, state), static_arguments(config)
    shown = {"loss": "reward_model/loss", "accuracy": "reward_model/accuracy"}
    with Loop(run, "reward_model", state, total, config.save_every) as loop:
        for step in loop.steps():
            batch = shard_batch(run.mesh, inputs.train.batch(step))
            loop.state, metrics = update(loop.state, roles.base, batch, optimizer, config.center_rewards_coef, **static)
            metrics["compiles/update"] = update.compiles
            loop.submitted(step, metrics, shown, int(batch.chosen.size + batch.rejected.size), batch)
        adapter = loop.result().adapter
    reached = evaluate(run, roles.base, adapter, inputs.heldout)
    save_role(run.config.run_dir, "reward", adapter)
    mark_finished(run.config.run_dir, "reward_model", reached)
    accuracy, pairs = reached["heldout_accuracy"], reached["heldout_pairs"]
    run.say(f"reward_model: accuracy {accuracy:.3f} on {pairs} held-out pairs")
    return dataclasses.replace(roles, adapters=roles.adapters | {"reward": adapter})


def evaluate(run: Run, base: Decoder, adapter: Adapter, data: PreferenceData) -> dict[str, float]:
    """Share of pairs whose chosen side scores higher (ties count half), and mean and standard deviation of scores."""
    program = Program(pair_scores, "pair_scores", run.mesh, compiler_options(base))
    batches = list(data.all_batches())
    scores = fetch([program(base, adapter, shard_batch(run.mesh, batch)) for batch in batches])
    real = np.concatenate([batch.weight > 0 for batch in batches])
    chosen, rejected = (np.concatenate(side)[real] for side in zip(*scores))
    both = np.concatenate([chosen, rejected])
    return {
        "heldout_accuracy": float(np.mean(np.where(chosen == rejected, 0.5, chosen > rejected))),
        "heldout_pairs": len(chosen),
        "score_mean": float(both.mean()),
        "score_std": float(both.std()),
    }
