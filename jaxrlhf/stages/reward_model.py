"""The reward_model stage: learn which of two answers people prefer."""

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
from jaxrlhf.stages.programs import reward_model_program, static_arguments
from jaxrlhf.stages.roles import Roles, mark_finished, save_role
from jaxrlhf.steps.optimizer import init_optimizer, with_rate
from jaxrlhf.steps.reward_model import pair_scores


@dataclasses.dataclass(frozen=True)
class RewardModelInputs:
    """Pairs that have been read and checked."""

    train: PreferenceData
    heldout: PreferenceData


def check(run: Run, roles: Roles) -> None:
    """UserError where the settings do not fit the model or the mesh, or a source is not there."""
    config = run.config.reward_model
    for source in filter(None, (config.data, config.test_data)):
        check_source(source)
    check_adapter(roles.base, run.config.adapter_or(config.adapter), "reward_model.adapter")
    for note in check_stage(run.config, "reward_model", roles.base.config, run.mesh):
        run.say(note)


def load(run: Run, roles: Roles) -> RewardModelInputs:
    """Reads the stage's pairs; UserError where they cannot be used."""
    config, tokenizer = run.config.reward_model, roles.tokenizer

    def read(source) -> list[Pair]:
        pairs, report = load_preferences(source, tokenizer, config.max_length, config.overflow)
        run.say(f"reward_model: {report}")
        return pairs

    def data(pairs: list[Pair]) -> PreferenceData:
        return PreferenceData(
            pairs, config.batch_size, config.max_length, run.config.seed, config.buckets, tokenizer.pad_id
        )

    pairs = read(config.data)
    if config.test_data is not None:
        return RewardModelInputs(data(pairs), data(read(config.test_data)))
    rows, held = hold_out(len(pairs), config.heldout, run.config.seed)
    if not len(held):  # fewer than ten pairs: the accuracy is that of the training pairs
        held = rows
        run.say(f"reward_model: {len(pairs)} pairs are too few to hold any out: accuracy is on the training pairs")
    return RewardModelInputs(data([pairs[i] for i in rows]), data([pairs[i] for i in held]))


def train(run: Run, roles: Roles, inputs: RewardModelInputs) -> Roles:
    """Runs the stage; the roles with the reward adapter."""
    config = run.config.reward_model
    key = key_for(run.config.seed, "reward_model", 0, "adapter")
    wanted = run.config.adapter_or(config.adapter)
    if config.start == "sft" and roles.reference is not None:
        adapter = with_head(as_kind(roles.base, roles.reference, wanted.kind), roles.base, "reward", key)
    else:
        adapter = init_adapter(roles.base, wanted, key, head="reward")
    total = config.epochs * len(inputs.train)
    optimizer = with_rate(with_total_steps(config.optimizer, total), "reward_model", adapter)
    steps = steps_text(config.epochs, len(inputs.train))
    run.say(f"reward_model: {steps}; learning rate {rate_text(optimizer, adapter)}")
    state = TrainState(adapter, init_optimizer(adapter), jnp.int32(0))
    update, static = reward_model_program(run.mesh, roles.base, state), static_arguments(config)
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
    """Share of pairs whose chosen answer scores higher (ties count half), and the mean and deviation of scores."""
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
