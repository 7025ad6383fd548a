"""The programs that a run's stages compile, each with the shapes of what it is given.

A stage is a generator: it yields a `Call` and is sent the shapes of that program's results, which the next one takes.
The programs are the stages' own (`stages.programs`); what they are given is what the stages give them, as shapes, and
a test holds the two together.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOConfig, RewardConfig
from jaxrlhf.distributed.programs import Program
from jaxrlhf.models.adapters import bare, value_head
from jaxrlhf.models.decoder import DecoderConfig
from jaxrlhf.models.folders import AUTO
from jaxrlhf.planning.shapes import Shapes, folder_dtype, mask, numbers, read_folder, tokens
from jaxrlhf.records import PreferenceBatch, Prompts, SFTBatch, TrainState
from jaxrlhf.rewards.model import score_program
from jaxrlhf.rewards.pretrained import token_score_program
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
from jaxrlhf.stages.settings import with_optimizers, with_total_steps
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
    rows: Any  # what of the arguments are rows of data
    lives: dict[str, Any]  # what the stage holds while it runs, by part: weights, adapters, optimizer
    times: float = 1.0  # how often an iteration, or an optimizer step, runs it
    cache: int = 0  # positions of keys and values that each row keeps
    remat: str | None = None  # what an update computes again; None: it is no update

    def with_remat(self, policy: str) -> "Call":
        """The same update under another policy: of PPO its last argument has it, of other stages an argument's name."""
        args, kwargs = self.args, self.kwargs
        if "remat" in kwargs:
            kwargs = kwargs | {"remat": policy}
        else:
            args = (*args[:-1], args[-1].model_copy(update={"remat": policy}))
        return dataclasses.replace(self, args=args, kwargs=kwargs, remat=policy)


Calls = Generator[Call, Any, None]


def sft(shapes: Shapes) -> Calls:
    """One optimizer step of the sft stage."""
    config = shapes.config.sft
    state = _train_state(shapes, shapes.adapter(shapes.config.adapter_or(config.adapter)))
    batch = shapes.rows(_sft_batch(config.batch_size, config.max_length))
    yield _update(shapes, sft_program(shapes.mesh, shapes.base(), state), state, batch, config, ())


def reward_model(shapes: Shapes) -> Calls:
    """One optimizer step of the reward_model stage, on the longest of its padded lengths."""
    config = shapes.config.reward_model
    state = _train_state(shapes, shapes.adapter(shapes.config.adapter_or(config.adapter), "reward"))
    B, L = config.batch_size, config.max_length
    sides = (tokens(B, L), mask(B, L))
    batch = shapes.rows(PreferenceBatch(*sides, *sides, margin=numbers(B), weight=numbers(B)))
    program = reward_model_program(shapes.mesh, shapes.base(), state)
    yield _update(shapes, program, state, batch, config, (config.centring,))


def ppo(shapes: Shapes) -> Calls:
    """One iteration of the ppo stage."""
    config, mesh = shapes.config.ppo, shapes.mesh
    base, policy, value = shapes.base(), *_policy_and_value(shapes)
    rates = {"optimizer": ("policy", policy), "value_optimizer": ("value", value or {})}
    whole = complete(config.update, config.batch_size * config.sampling.samples_per_prompt)
    update = with_optimizers(whole, rates, dict.fromkeys(rates, STEPS))
    state = shapes.placed(jax.eval_shape(lambda p, v: init_ppo(p, v, update), policy, value))
    reference, scorer = _reference(shapes, policy), _own_reward(shapes)
    models = _reward_models(shapes)
    lives = {
        "weights": (base, [model.args[0] for model in models]),
        "adapters": (state.policy, state.value, state.average, reference, scorer, [m.args[1] for m in models]),
        "optimizer": (state.policy_optimizer, state.value_optimizer),
    }
    B, P, sampling = config.batch_size, config.max_prompt_tokens, config.sampling
    n, S = sampling.samples_per_prompt, P + sampling.max_new_tokens
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = shapes.rows(Prompts(tokens(B, P), mask(B, P)))
    sample = rollout_program(mesh, base)
    answers = yield Call("rollout", sample, (base, state.policy, prompts, key, sampling), {}, prompts, lives, cache=S)
    greedy = None
    if ADVANTAGES[config.advantage.estimator].needs_greedy:
        alone = sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        program = greedy_program(mesh, base, sample, n)
        best = yield Call("greedy", program, (base, state.policy, prompts, key, alone), {}, prompts, lives, cache=S)
        greedy = (best, shapes.rows(numbers(B)))
    if scorer is not None:
        size = {"microbatch_size": update.microbatch_size}
        yield Call("reward", score_program(mesh, base), (base, scorer, answers), size, answers, lives)
    for model in models:
        yield dataclasses.replace(model, lives=lives)
    args = (base, state.policy, state.value, reference, answers, update)
    annotated = yield Call("annotate", annotate_program(mesh, base), args, {}, answers, lives)
    settings = ExperienceSettings(config.kl, config.advantage, config.score, update, n)
    control = shapes.placed(jax.eval_shape(lambda: Control.start(0.0)))
    rows = (answers, annotated, shapes.rows(numbers(B * n)), greedy)
    experience, _, _ = yield Call("experience", experience_program(mesh), (*rows, control, settings), {}, rows, lives)
    rows, change = (experience, _mix(shapes, update)), update_program(mesh, base, state)
    args = (state, base, experience, key, update)
    yield Call("update", change, args, {"mix": rows[1]}, rows, lives, remat=update.remat)


STAGES: dict[str, Callable[[Shapes], Calls]] = {"sft": sft, "reward_model": reward_model, "ppo": ppo}


def _update(shapes: Shapes, program: Program, state: TrainState, batch: Any, config, more: tuple) -> Call:
    stage = program.name.removesuffix("_update")
    base, optimizer = shapes.base(), with_rate(with_total_steps(config.optimizer, STEPS), stage, state.adapter)
    lives = {"weights": base, "adapters": state.adapter, "optimizer": state.optimizer}
    args = (state, base, batch, optimizer, *more)
    return Call(program.name, program, args, static_arguments(config), batch, lives, remat=config.remat)


def _train_state(shapes: Shapes, adapter: Any) -> TrainState:
    optimizer = jax.eval_shape(init_optimizer, adapter)
    return shapes.placed(TrainState(adapter, optimizer, jax.ShapeDtypeStruct((), jnp.int32)))


def _sft_batch(rows: int, length: int) -> SFTBatch:
    return SFTBatch(tokens(rows, length), tokens(rows, length), mask(rows, length))


def _policy_and_value(shapes: Shapes) -> tuple[Any, Any]:
    run, config = shapes.config, shapes.config.ppo
    policy = shapes.adapter(run.adapter_or(config.adapter))
    if not ADVANTAGES[config.advantage.estimator].needs_value:
        return policy, None
    if config.update.value_trunk == "policy":
        return policy, shapes.placed(jax.eval_shape(value_head, shapes.base()))
    return policy, shapes.adapter(run.adapter_or(config.value_adapter), "value")


def _reference(shapes: Shapes, policy: Any) -> Any:
    """The reference's adapter; None where it is the base itself."""
    run, config = shapes.config, shapes.config.ppo
    if config.refresh_reference is not None:
        return shapes.placed(jax.eval_shape(bare, shapes.base(), policy))
    if config.reference is not None or ("sft" in run.stages and not run.sft_trains_base):
        return shapes.adapter(run.adapter_or(run.sft.adapter if run.sft is not None else config.adapter))
    return None


def _own_reward(shapes: Shapes) -> Any:
    """The reward adapter of the run, where PPO's reward is it or has it as a part."""
    run = shapes.config
    if not any(part.kind == "model" and part.path is None for part in _parts(run.ppo.reward)):
        return None
    trained = run.reward_model.adapter if run.reward_model is not None else None
    return shapes.adapter(run.adapter_or(trained), "reward")


def _parts(reward: RewardConfig) -> list[RewardConfig]:
    return list(reward.parts.values()) if reward.kind == "sum" else [reward]


def _reward_models(shapes: Shapes) -> list[Call]:
    """The decoders that score with a base of their own, each on all answers, at the longest padded length."""
    config, calls = shapes.config.ppo, []
    rows = config.batch_size * config.sampling.samples_per_prompt
    for part in _parts(config.reward):
        if part.kind != "model" or part.path is None:
            continue
        model: DecoderConfig = read_folder(part.path)
        base = shapes.base(model, folder_dtype(part.path) if part.dtype == AUTO else part.dtype)
        head = shapes.placed(jax.eval_shape(value_head, base))
        size, length = min(part.batch_size, rows), min(part.max_length, model.max_positions)
        batch = shapes.rows((tokens(size, length), mask(size, length)))
        program = token_score_program(shapes.mesh, base)
        calls.append(Call(f"reward {part.path}", program, (base, head, *batch), {}, batch, {}, -(-rows // size)))
    return calls


def _mix(shapes: Shapes, update: PPOConfig) -> SFTBatch | None:
    mix = shapes.config.ppo.pretraining
    if mix is None:
        return None
    return shapes.rows(_sft_batch(mix.batch_size * update.epochs * update.minibatches, mix.max_length))
