"""The program calls of each stage: every program with the shapes of its arguments and of its result.

`plan` compiles these calls; `bench` runs them on arrays of these shapes. A test compares them with a real run.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import ModelRewardConfig, PPOConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import sampling_axes
from jaxrlhf.hf.folders import AUTO
from jaxrlhf.models.adapters import bare, value_head
from jaxrlhf.models.decoder import abstract_decoder
from jaxrlhf.records import Annotated, Experience, PreferenceBatch, Prompts, Rollout, SFTBatch, TrainState
from jaxrlhf.rewards.load import gives_steps, is_own, needs_own, parts_of
from jaxrlhf.rewards.model import score_program
from jaxrlhf.rewards.pretrained import token_score_program
from jaxrlhf.rewards.steps import granularity_of
from jaxrlhf.rollout.schedule import Schedule
from jaxrlhf.stages.checks import Mesh, with_optimizers, with_total_steps
from jaxrlhf.stages.programs import (
    annotate_program,
    experience_program,
    greedy_program,
    rollout_program,
    static_arguments,
    train_program,
    update_program,
)
from jaxrlhf.stages.shapes import Shapes, folder_dtype, mask, numbers, read_folder, tokens
from jaxrlhf.steps.annotate import Control, ExperienceSettings
from jaxrlhf.steps.optimizer import init_optimizer, with_rate
from jaxrlhf.steps.ppo import complete, init_ppo
from jaxrlhf.steps.reward_model import reward_model_update
from jaxrlhf.steps.sft import sft_update

STEPS = 1000  # optimizer steps, for schedules; any number gives the same shapes


@dataclasses.dataclass(frozen=True)
class Call:
    """One program with the shapes of its arguments."""

    name: str
    program: Program
    args: tuple
    kwargs: dict[str, Any]
    result: Any  # shapes of the result if a later call uses the result, else None
    rows: Any  # shapes of the arguments that are rows of data
    resident: dict[str, Any]  # arrays that stay in memory between calls: weights, adapters, optimizer
    times: float = 1.0  # number of calls per iteration or optimizer step
    trips: tuple[float, ...] = ()  # iterations of nested loops of dynamic length, the outer one first
    slots: int = 0  # completions that decode at the same time; 0 if the program does not decode
    remat: str | None = None  # rematerialisation policy of an update; None for other programs

    def with_remat(self, policy: str) -> "Call":
        """Returns the same call of an update with another rematerialisation policy."""
        if "remat" in self.kwargs:  # sft and reward_model; PPO has it in its settings, the last argument
            return dataclasses.replace(self, kwargs=self.kwargs | {"remat": policy}, remat=policy)
        args = (*self.args[:-1], self.args[-1].model_copy(update={"remat": policy}))
        return dataclasses.replace(self, args=args, remat=policy)


def calls_of(stage: str, shapes: Shapes) -> list[Call]:
    """Returns the calls of an optimizer step (sft, reward_model) or an iteration (ppo), in order."""
    if stage == "ppo":
        return _ppo(shapes)
    return [_sft(shapes) if stage == "sft" else _reward_model(shapes)]


def _sft(shapes: Shapes) -> Call:
    config = shapes.config.sft
    return _training_call(shapes, "sft", sft_update, None, _sft_batch(config.batch_size, config.max_length))


def _reward_model(shapes: Shapes) -> Call:
    """Returns the call of the reward model's training step, with rows of the longest padded length."""
    config = shapes.config.reward_model
    B, L = config.batch_size, config.max_length
    sides = (tokens(B, L), mask(B, L))
    batch = PreferenceBatch(*sides, *sides, margin=numbers(B), weight=numbers(B))
    return _training_call(shapes, "reward_model", reward_model_update, "reward", batch, config.center_rewards_coef)


def _training_call(
    shapes: Shapes, stage: str, step: Callable, head: Literal["reward"] | None, batch: Any, *arguments: float
) -> Call:
    """Returns the call of the training step of sft or reward_model; see `stages.training`."""
    config, base = getattr(shapes.config, stage), shapes.base
    adapter, batch = shapes.adapter(shapes.config.adapter_or(config.adapter), head), shapes.rows(batch)
    optimizer = jax.eval_shape(init_optimizer, adapter)
    state = shapes.sharded(TrainState(adapter, optimizer, jax.ShapeDtypeStruct((), jnp.int32)))
    program = train_program(step, shapes.mesh, base, state)
    settings = with_rate(with_total_steps(config.optimizer, STEPS), stage, adapter)
    resident = {"weights": base, "adapters": state.adapter, "optimizer": state.optimizer}
    args = (state, base, batch, settings, *arguments)
    return Call(program.name, program, args, static_arguments(config), None, batch, resident, remat=config.remat)


def _ppo(shapes: Shapes) -> list[Call]:
    config, mesh, base = shapes.config.ppo, shapes.mesh, shapes.base
    policy, value = _policy_and_value(shapes)
    rates = {"optimizer": ("policy", policy), "value_optimizer": ("value", value or {})}
    update = complete(config.update, config.batch_size * config.sampling.samples_per_prompt)
    update = with_optimizers(update, rates, dict.fromkeys(rates, STEPS))
    state = shapes.sharded(jax.eval_shape(lambda p, v: init_ppo(p, v, update), policy, value))
    reference, scorer, models = _reference(shapes, policy), _own_reward(shapes), _reward_models(shapes)
    behind = state.policy if config.async_ else None  # a copy
    resident = {
        "weights": (base, [model.args[0] for model in models]),
        "adapters": (state.policy, state.value, state.average, reference, scorer, [m.args[1] for m in models], behind),
        "optimizer": (state.policy_optimizer, state.value_optimizer),
    }
    B, P, sampling = config.batch_size, config.max_prompt_tokens, config.sampling
    n, R = sampling.samples_per_prompt, sampling.max_new_tokens
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts, rollout = shapes.rows((Prompts(tokens(B, P), mask(B, P)), _rollout(B * n, P, R)))
    sample = rollout_program(mesh, base)
    inputs, choices = (base, state.policy, prompts, key), {"choices": shapes.choices}
    calls = [_decoding_call("rollout", sample, (*inputs, sampling), choices, rollout, resident, mesh)]
    greedy = None
    if ADVANTAGES[config.advantage.estimator].needs_greedy:
        greedy_sampling = sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        greedy = shapes.rows((_rollout(B, P, R), numbers(B)))
        program = greedy_program(mesh, base, sample, n)
        args = (*inputs, greedy_sampling)
        calls.append(_decoding_call("greedy", program, args, choices, greedy[0], resident, mesh))
    if scorer is not None:
        by_token = any(is_own(part) and granularity_of(part) is not None for part in parts_of(config.reward))
        size = {"microbatch_size": update.microbatch_size, "by_token": by_token}
        calls.append(Call("reward", score_program(mesh, base), (base, scorer, rollout), size, None, rollout, resident))
    calls += [dataclasses.replace(model, resident=resident) for model in models]
    annotated = shapes.rows(Annotated(*(numbers(B * n, R),) * 3))
    args = (base, state.policy, state.value, reference, rollout, update)
    program = annotate_program(mesh, base, config.async_ == 1)
    calls.append(Call("annotate", program, args, choices, annotated, rollout, resident))
    settings = ExperienceSettings(config.kl, config.advantage, config.score, update, n)
    control = shapes.sharded(jax.eval_shape(lambda: Control.start(0.0)))
    inside = gives_steps(config.reward)
    rows = (rollout, annotated, shapes.rows(numbers(B * n, R) if inside else numbers(B * n)), greedy)
    steps = {"steps": shapes.rows(mask(B * n, R))} if inside else {}
    experience = shapes.rows(_experience(rollout, annotated))
    args = (*rows, control, settings)
    calls.append(Call("experience", experience_program(mesh), args, steps, (experience,), rows, resident))
    rows = (experience, _mix(shapes, update))
    args = (state, base, experience, key, update)
    program = update_program(mesh, base, state)
    mix = {"mix": rows[1]}
    calls.append(Call("update", program, args, mix | choices, None, rows, resident, remat=update.remat))
    return calls


def _decoding_call(
    name: str, program: Program, args: tuple, kwargs: dict, result: Rollout, resident: dict, mesh: Mesh
) -> Call:
    """Returns the call of a rollout. The loop counts are those for completions of full length."""
    _, _, prompts, _, sampling = args
    axes = sampling_axes(mesh.shape, prompts.tokens.shape[0], sampling.slots or 0)
    schedule = Schedule.of(sampling, prompts.tokens.shape[0], math.prod(mesh.shape[axis] for axis in axes))
    trips, slots = schedule.trips(sampling.max_new_tokens), schedule.shares * schedule.slots
    return Call(name, program, args, kwargs, result, prompts, resident, trips=trips, slots=slots)


def _sft_batch(rows: int, length: int) -> SFTBatch:
    return SFTBatch(tokens(rows, length), tokens(rows, length), mask(rows, length))


def _rollout(rows: int, P: int, R: int) -> Rollout:
    ended = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    return Rollout(tokens(rows, P + R), mask(rows, P + R), mask(rows, R), numbers(rows, R), ended, numbers(rows))


def _experience(rollout: Rollout, annotated: Annotated) -> Experience:
    shared = ("tokens", "mask", "response_mask", "temperature", "sample_logprobs")
    fields = {name: getattr(rollout, name) for name in shared} | vars(annotated)
    return Experience(**fields, advantages=annotated.values, returns=annotated.values, kl_coef=rollout.temperature)


def _policy_and_value(shapes: Shapes) -> tuple[Any, Any]:
    run, config = shapes.config, shapes.config.ppo
    policy = shapes.adapter(run.adapter_or(config.adapter))
    if not ADVANTAGES[config.advantage.estimator].needs_value:
        return policy, None
    if config.update.value_trunk == "policy":
        return policy, shapes.sharded(jax.eval_shape(value_head, shapes.base))
    return policy, shapes.adapter(run.adapter_or(config.value_adapter), "value")


def _reference(shapes: Shapes, policy: Any) -> Any:
    """Returns the adapter of PPO's reference, or None if the base is the reference."""
    run, config = shapes.config, shapes.config.ppo
    if config.refresh_reference is not None:
        return shapes.sharded(jax.eval_shape(bare, shapes.base, policy))
    if config.reference is not None or ("sft" in run.stages and not run.sft_trains_base):
        return shapes.adapter(run.adapter_or(run.sft.adapter if run.sft is not None else config.adapter))
    return None


def _own_reward(shapes: Shapes) -> Any:
    """Returns the run's reward adapter if PPO's reward uses it, else None."""
    run = shapes.config
    if not needs_own(run.ppo.reward):
        return None
    trained = run.reward_model.adapter if run.reward_model is not None else None
    return shapes.adapter(run.adapter_or(trained), "reward")


def _reward_models(shapes: Shapes) -> list[Call]:
    """Returns the calls of reward models with their own base.

    They score all completions at the longest padded length.
    """
    config = shapes.config.ppo
    rows = config.batch_size * config.sampling.samples_per_prompt
    models = [part for part in parts_of(config.reward) if isinstance(part, ModelRewardConfig) and part.path is not None]
    return [_reward_model_call(shapes, part, rows) for part in models]


def _reward_model_call(shapes: Shapes, part: ModelRewardConfig, rows: int) -> Call:
    model = read_folder(part.path)
    dtype = folder_dtype(part.path) if part.dtype == AUTO else part.dtype
    base = shapes.sharded(abstract_decoder(shapes.for_mesh(model), dtype))
    head = shapes.sharded(jax.eval_shape(value_head, base))
    size, length = min(part.batch_size, rows), min(part.max_length, model.max_positions)
    batch = shapes.rows((tokens(size, length), mask(size, length)))
    program = token_score_program(shapes.mesh, base)
    by_token = {"by_token": granularity_of(part) is not None}
    return Call(f"reward {part.path}", program, (base, head, *batch), by_token, None, batch, {}, -(-rows // size))


def _mix(shapes: Shapes, update: PPOConfig) -> SFTBatch | None:
    mix = shapes.config.ppo.pretraining
    if mix is None:
        return None
    return shapes.rows(_sft_batch(mix.batch_size * update.epochs * update.minibatches, mix.max_length))
