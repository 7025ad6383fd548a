"""What a run's stages call: each program with the shapes of what it is given and of what it gives.

`plan` compiles these calls, `bench` runs them on arrays of these shapes. A test holds them to what the stages give.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import ModelRewardConfig, PPOConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.hf.folders import AUTO
from jaxrlhf.models.adapters import bare, value_head
from jaxrlhf.models.decoder import abstract_decoder
from jaxrlhf.records import Annotated, Experience, PreferenceBatch, Prompts, Rollout, SFTBatch, TrainState
from jaxrlhf.rewards.load import needs_own, parts_of
from jaxrlhf.rewards.model import score_program
from jaxrlhf.rewards.pretrained import token_score_program
from jaxrlhf.stages.checks import with_optimizers, with_total_steps
from jaxrlhf.stages.programs import (
    annotate_program,
    experience_program,
    greedy_program,
    reward_model_program,
    rollout_program,
    sft_program,
    static_arguments,
    update_program,
)
from jaxrlhf.stages.shapes import Shapes, folder_dtype, mask, numbers, read_folder, tokens
from jaxrlhf.steps.annotate import Control, ExperienceSettings
from jaxrlhf.steps.optimizer import init_optimizer, with_rate
from jaxrlhf.steps.ppo import complete, init_ppo

STEPS = 1000  # of an optimizer, which schedules need; the number changes no shape


@dataclasses.dataclass(frozen=True)
class Call:
    """One program and what it is given."""

    name: str
    program: Program
    args: tuple
    kwargs: dict[str, Any]
    result: Any  # shapes of what it gives, where a later call takes it; None: none does
    rows: Any  # what of the arguments are rows of data
    lives: dict[str, Any]  # what the stage holds while it runs, by part: weights, adapters, optimizer
    times: float = 1.0  # how often an iteration, or an optimizer step, runs it
    trips: int = 1  # of a loop whose length is not in the program: the steps of decoding
    remat: str | None = None  # what an update computes again; None: it is no update

    def with_remat(self, policy: str) -> "Call":
        """The same update under another policy: of PPO its last argument has it, of other stages an argument's name."""
        args, kwargs = self.args, self.kwargs
        if "remat" in kwargs:
            kwargs = kwargs | {"remat": policy}
        else:
            args = (*args[:-1], args[-1].model_copy(update={"remat": policy}))
        return dataclasses.replace(self, args=args, kwargs=kwargs, remat=policy)


def calls_of(stage: str, shapes: Shapes) -> list[Call]:
    """The programs of an optimizer step (sft, reward_model) or an iteration (ppo), in order."""
    return _STAGES[stage](shapes)


def _sft(shapes: Shapes) -> list[Call]:
    config = shapes.config.sft
    state = _train_state(shapes, shapes.adapter(shapes.config.adapter_or(config.adapter)))
    batch = shapes.rows(_sft_batch(config.batch_size, config.max_length))
    return [_step(shapes, "sft", sft_program, state, batch, config, ())]


def _reward_model(shapes: Shapes) -> list[Call]:
    """On the longest of its padded lengths."""
    config = shapes.config.reward_model
    state = _train_state(shapes, shapes.adapter(shapes.config.adapter_or(config.adapter), "reward"))
    B, L = config.batch_size, config.max_length
    sides = (tokens(B, L), mask(B, L))
    batch = shapes.rows(PreferenceBatch(*sides, *sides, margin=numbers(B), weight=numbers(B)))
    return [_step(shapes, "reward_model", reward_model_program, state, batch, config, (config.center_rewards_coef,))]


def _ppo(shapes: Shapes) -> list[Call]:
    config, mesh, base = shapes.config.ppo, shapes.mesh, shapes.base
    policy, value = _policy_and_value(shapes)
    rates = {"optimizer": ("policy", policy), "value_optimizer": ("value", value or {})}
    whole = complete(config.update, config.batch_size * config.sampling.samples_per_prompt)
    update = with_optimizers(whole, rates, dict.fromkeys(rates, STEPS))
    state = shapes.placed(jax.eval_shape(lambda p, v: init_ppo(p, v, update), policy, value))
    reference, scorer, models = _reference(shapes, policy), _own_reward(shapes), _reward_models(shapes)
    lives = {
        "weights": (base, [model.args[0] for model in models]),
        "adapters": (state.policy, state.value, state.average, reference, scorer, [m.args[1] for m in models]),
        "optimizer": (state.policy_optimizer, state.value_optimizer),
    }
    B, P, sampling = config.batch_size, config.max_prompt_tokens, config.sampling
    n, R = sampling.samples_per_prompt, sampling.max_new_tokens
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts, answers = shapes.rows((Prompts(tokens(B, P), mask(B, P)), _rollout(B * n, P, R)))
    sample = rollout_program(mesh, base)
    given = (base, state.policy, prompts, key)
    calls = [Call("rollout", sample, (*given, sampling), {}, answers, prompts, lives, trips=R - 1)]
    greedy = None
    if ADVANTAGES[config.advantage.estimator].needs_greedy:
        alone = sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        greedy = shapes.rows((_rollout(B, P, R), numbers(B)))
        program = greedy_program(mesh, base, sample, n)
        calls.append(Call("greedy", program, (*given, alone), {}, greedy[0], prompts, lives, trips=R - 1))
    if scorer is not None:
        size = {"microbatch_size": update.microbatch_size}
        calls.append(
            Call("reward", score_program(mesh, base), (base, scorer, answers), size, None, answers, lives)
        )
    calls += [dataclasses.replace(model, lives=lives) for model in models]
    annotated = shapes.rows(Annotated(*(numbers(B * n, R),) * 3))
    args = (base, state.policy, state.value, reference, answers, update)
    calls.append(Call("annotate", annotate_program(mesh, base), args, {}, annotated, answers, lives))
    settings = ExperienceSettings(config.kl, config.advantage, config.score, update, n)
    control = shapes.placed(jax.eval_shape(lambda: Control.start(0.0)))
    rows = (answers, annotated, shapes.rows(numbers(B * n)), greedy)
    experience = shapes.rows(_experience(answers, annotated))
    args = (*rows, control, settings)
    calls.append(Call("experience", experience_program(mesh), args, {}, (experience,), rows, lives))
    rows = (experience, _mix(shapes, update))
    args = (state, base, experience, key, update)
    calls.append(
        Call("update", update_program(mesh, base, state), args, {"mix": rows[1]}, None, rows, lives,
             remat=update.remat)
    )  # fmt: skip
    return calls


_STAGES: dict[str, Callable[[Shapes], list[Call]]] = {"sft": _sft, "reward_model": _reward_model, "ppo": _ppo}


def _step(shapes: Shapes, stage: str, make: Callable[..., Program], state: TrainState, batch: Any, config, more):
    base, optimizer = shapes.base, with_rate(with_total_steps(config.optimizer, STEPS), stage, state.adapter)
    lives = {"weights": base, "adapters": state.adapter, "optimizer": state.optimizer}
    args, name = (state, base, batch, optimizer, *more), f"{stage}_update"
    program = make(shapes.mesh, base, state)
    return Call(name, program, args, static_arguments(config), None, batch, lives, remat=config.remat)


def _train_state(shapes: Shapes, adapter: Any) -> TrainState:
    optimizer = jax.eval_shape(init_optimizer, adapter)
    return shapes.placed(TrainState(adapter, optimizer, jax.ShapeDtypeStruct((), jnp.int32)))


def _sft_batch(rows: int, length: int) -> SFTBatch:
    return SFTBatch(tokens(rows, length), tokens(rows, length), mask(rows, length))


def _rollout(rows: int, P: int, R: int) -> Rollout:
    ended = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    return Rollout(tokens(rows, P + R), mask(rows, P + R), mask(rows, R), numbers(rows, R), ended, numbers(rows))


def _experience(answers: Rollout, annotated: Annotated) -> Experience:
    kept = ("tokens", "mask", "response_mask", "temperature", "sample_logprobs")
    told = {name: getattr(answers, name) for name in kept} | vars(annotated)
    return Experience(**told, advantages=annotated.values, returns=annotated.values, kl_coef=answers.temperature)


def _policy_and_value(shapes: Shapes) -> tuple[Any, Any]:
    run, config = shapes.config, shapes.config.ppo
    policy = shapes.adapter(run.adapter_or(config.adapter))
    if not ADVANTAGES[config.advantage.estimator].needs_value:
        return policy, None
    if config.update.value_trunk == "policy":
        return policy, shapes.placed(jax.eval_shape(value_head, shapes.base))
    return policy, shapes.adapter(run.adapter_or(config.value_adapter), "value")


def _reference(shapes: Shapes, policy: Any) -> Any:
    """The reference's adapter; None where it is the base itself."""
    run, config = shapes.config, shapes.config.ppo
    if config.refresh_reference is not None:
        return shapes.placed(jax.eval_shape(bare, shapes.base, policy))
    if config.reference is not None or ("sft" in run.stages and not run.sft_trains_base):
        return shapes.adapter(run.adapter_or(run.sft.adapter if run.sft is not None else config.adapter))
    return None


def _own_reward(shapes: Shapes) -> Any:
    """The reward adapter of the run, where PPO's reward is it or has it as a part."""
    run = shapes.config
    if not needs_own(run.ppo.reward):
        return None
    trained = run.reward_model.adapter if run.reward_model is not None else None
    return shapes.adapter(run.adapter_or(trained), "reward")


def _reward_models(shapes: Shapes) -> list[Call]:
    """The decoders that score with a base of their own, each on all answers, at the longest padded length."""
    config, calls = shapes.config.ppo, []
    rows = config.batch_size * config.sampling.samples_per_prompt
    for part in parts_of(config.reward):
        if isinstance(part, ModelRewardConfig) and part.path is not None:
            calls.append(_reward_of(shapes, part, rows))
    return calls


def _reward_of(shapes: Shapes, part: ModelRewardConfig, rows: int) -> Call:
    model = read_folder(part.path)
    dtype = folder_dtype(part.path) if part.dtype == AUTO else part.dtype
    base = shapes.placed(abstract_decoder(shapes.for_mesh(model), dtype))
    head = shapes.placed(jax.eval_shape(value_head, base))
    size, length = min(part.batch_size, rows), min(part.max_length, model.max_positions)
    batch = shapes.rows((tokens(size, length), mask(size, length)))
    program = token_score_program(shapes.mesh, base)
    return Call(f"reward {part.path}", program, (base, head, *batch), {}, None, batch, {}, -(-rows // size))


def _mix(shapes: Shapes, update: PPOConfig) -> SFTBatch | None:
    mix = shapes.config.ppo.pretraining
    if mix is None:
        return None
    return shapes.rows(_sft_batch(mix.batch_size * update.epochs * update.minibatches, mix.max_length))
