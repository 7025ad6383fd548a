"""The reward_model stage: learns which of two completions people prefer."""

import dataclasses

import numpy as np

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.preferences import Pair, PreferenceData, load_preferences
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.models.adapters import as_kind, init_adapter, with_head
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Adapter
from jaxrlhf.stages.evaluation import check_results
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles, mark_finished, save_role
from jaxrlhf.stages.sizes import check_total_steps
from jaxrlhf.stages.training import check_settings, train_adapter
from jaxrlhf.steps.reward_model import pair_scores, reward_model_update


@dataclasses.dataclass(frozen=True)
class RewardModelInputs:
    """The stage's checked pairs."""

    train: PreferenceData
    heldout: PreferenceData


def check(run: Run, roles: Roles) -> None:
    """Raises `UserError` if the settings do not fit the model or the mesh, or a data source is missing."""
    config = run.config.reward_model
    check_settings(run, roles.base, "reward_model", config.data, config.evaluation.data)


def load(run: Run, roles: Roles) -> RewardModelInputs:
    """Reads the stage's pairs. Raises `UserError` if they are invalid."""
    config, tokenizer = run.config.reward_model, roles.tokenizer

    def read(source) -> list[Pair]:
        pairs, report = load_preferences(source, tokenizer, config.max_length, config.overflow)
        run.say(f"reward_model: {report}")
        return pairs

    def data(pairs: list[Pair]) -> PreferenceData:
        sizes = (config.batch_size, config.max_length)
        rows = PreferenceData(pairs, *sizes, run.config.seed, config.buckets, tokenizer.pad_id)
        check_total_steps(config.epochs * len(rows), "reward_model.epochs")
        return rows

    pairs = read(config.data)
    if config.evaluation.data is not None:
        return RewardModelInputs(data(pairs), data(read(config.evaluation.data)))
    rows, held = hold_out(len(pairs), config.evaluation.heldout, run.config.seed)
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
    coefficient = config.center_rewards_coef
    shown = {"loss": "reward_model/loss", "accuracy": "reward_model/accuracy"}
    adapter = train_adapter(
        run, roles.base, "reward_model", adapter, inputs.train, reward_model_update, coefficient, shown=shown
    )
    results = evaluate(run, roles.base, adapter, inputs.heldout)
    check_results("reward_model", results, run.config.run_dir)
    save_role(run.config.run_dir, "reward", adapter)
    mark_finished(run.config.run_dir, "reward_model", results)
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
