"""The reward_model stage: trains a model that predicts which of two completions people prefer."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxrlhf.data.order import hold_out
from jaxrlhf.data.preferences import Pair, PreferenceData, load_preferences, preferences_reader
from jaxrlhf.data.streamed import StreamedBatches
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, shard_batch
from jaxrlhf.evaluation.probabilities import calibration_table
from jaxrlhf.models.adapters import as_kind, init_adapter, with_head
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.records import Adapter
from jaxrlhf.stages.evaluation import Evaluated
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.roles import Roles, mark_finished, save_role
from jaxrlhf.stages.samples import rounded
from jaxrlhf.stages.sizes import check_total_steps
from jaxrlhf.stages.training import check_settings, open_stream, planned_steps, train_adapter
from jaxrlhf.steps.reward_model import pair_scores, reward_model_update

MARGINS = 1000  # score differences in a record of samples.jsonl


@dataclasses.dataclass(frozen=True)
class RewardModelInputs:
    """The stage's checked pairs."""

    train: PreferenceData | StreamedBatches
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

    def data(pairs: list[Pair], bounds: np.ndarray | None = None) -> PreferenceData:
        sizes = (config.batch_size, config.max_length)
        return PreferenceData(pairs, *sizes, run.config.seed, config.buckets, tokenizer.pad_id, bounds)

    if config.data.streaming:
        limits = (tokenizer, config.max_length, config.overflow)
        stream = open_stream(run, "reward_model", config.data, lambda source: preferences_reader(source, *limits))
        train = StreamedBatches(stream, data, config.max_length, config.epochs)
        check_total_steps(planned_steps(config, train)[0], "reward_model.max_steps")
        if config.evaluation.data is not None:
            return RewardModelInputs(train, data(read(config.evaluation.data)))
        run.say(
            "reward_model: no pairs of a stream are held out, so accuracy is measured on the first "
            f"{config.evaluation.heldout} training pairs; give reward_model.evaluation.data"
        )
        return RewardModelInputs(train, data(stream.first.items[: config.evaluation.heldout]))
    pairs = read(config.data)
    held = None if config.evaluation.data is None else read(config.evaluation.data)
    train, held = (pairs, held) if held is not None else hold_out(pairs, config.evaluation.heldout, run.config.seed)
    if not held:
        held = train
        run.say(
            f"reward_model: none of the {len(pairs)} pairs is held out, so accuracy is measured on the training pairs"
        )
    inputs = RewardModelInputs(data(train), data(held))
    check_total_steps(planned_steps(config, inputs.train)[0], "reward_model.epochs")
    return inputs


def train(run: Run, roles: Roles, inputs: RewardModelInputs) -> Roles:
    """Runs the stage. Returns the roles, to which the reward adapter is added."""
    config = run.config.reward_model
    key = key_for(run.config.seed, "reward_model", 0, "adapter")
    adapter_config = run.config.adapter_or(config.adapter)
    if config.start == "sft" and roles.reference is not None:
        adapter = with_head(as_kind(roles.base, roles.reference, adapter_config.kind), roles.base, "reward", key)
    else:
        adapter = init_adapter(roles.base, adapter_config, key, head="reward")
    coefficient = config.center_rewards_coef
    shown = {"loss": "reward_model/loss", "accuracy": "reward_model/accuracy"}
    evaluate = evaluation(run, roles.base, inputs.heldout, coefficient)
    adapter, results = train_adapter(
        run, roles.base, "reward_model", adapter, inputs.train, reward_model_update, coefficient,
        shown=shown, evaluate=evaluate,
    )  # fmt: skip
    save_role(run.config.run_dir, "reward", adapter)
    mark_finished(run.config.run_dir, "reward_model", results)
    return dataclasses.replace(roles, adapters=roles.adapters | {"reward": adapter})


def evaluation(
    run: Run, base: Decoder, data: PreferenceData, center_rewards_coef: float
) -> Callable[[Adapter], Evaluated]:
    """Returns a function that measures an adapter on pairs, with one compiled program for all calls."""
    program = Program(pair_scores, "pair_scores", run.mesh, compiler_options(base))

    def evaluate(adapter: Adapter) -> Evaluated:
        batches = list(data.all_batches())
        scores = fetch([program(base, adapter, shard_batch(run.mesh, batch)) for batch in batches])
        real = np.concatenate([batch.weight > 0 for batch in batches])
        chosen, rejected, margin = (
            np.concatenate(rows)[real].astype(np.float64) for rows in (*zip(*scores), [b.margin for b in batches])
        )
        return measured(chosen, rejected, margin, center_rewards_coef)

    return evaluate


def measured(chosen: np.ndarray, rejected: np.ndarray, margin: np.ndarray, center_rewards_coef: float) -> Evaluated:
    """Returns the metrics of a reward model on N pairs, from scores f64[N] of both sides and the data's margins f64[N].

    The loss is the same as in training (`pairwise_loss`). Ties count half in the accuracy. The reward model's
    probability that the chosen completion is better is sigmoid(chosen - rejected). The calibration error measures this
    probability.
    """
    difference, both = chosen - rejected, np.concatenate([chosen, rejected])
    losses = np.logaddexp(0, margin - difference) + center_rewards_coef * np.square(chosen + rejected)
    right = np.where(difference == 0, 0.5, difference > 0)
    table = calibration_table(1 / (1 + np.exp(-np.abs(difference))), right)
    error = sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(right)
    metrics = {
        "accuracy": float(right.mean()),
        "loss": float(losses.mean()),
        "margin": float(difference.mean()),
        "calibration_error": float(error),
    }
    results = {f"heldout_{name}": value for name, value in metrics.items()} | {
        "heldout_pairs": len(right), "score_mean": float(both.mean()), "score_std": float(both.std())
    }  # fmt: skip
    record = {"calibration": table, "margins": rounded(difference[:MARGINS])}
    return Evaluated({f"reward_model/{name}": value for name, value in metrics.items()}, record, results)
