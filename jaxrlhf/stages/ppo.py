"""The ppo stage: sample, score, update, again; then a table of what it changed.

Per iteration three compiled programs run (rollout, annotate with GAE, update), and a fourth where the reward
is an adapter or a model of its own. The host does only what must be text: decode for a reward that reads it, log, save.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOConfig, PPOStageConfig, Sampling
from jaxrlhf.data.prompts import PromptSet, load_prompts
from jaxrlhf.data.sources import check_source
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapter_files import load_adapter
from jaxrlhf.models.adapters import init_adapter, without_head
from jaxrlhf.records import Adapter, Rollout
from jaxrlhf.rewards.answers import Answers, Reward
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.load import Rewards, check_prompts, compose, load_rewards, needs_own
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.rollout.sampling import truncates
from jaxrlhf.runtime.mesh import check_batch, place, place_batch, replicated
from jaxrlhf.runtime.programs import Program, peak_memory_bytes
from jaxrlhf.runtime.random import key_for
from jaxrlhf.stages.evaluation import SAMPLES, Evaluation, comparison, rows_measured, samples_of
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.stages.roles import Roles, mark_finished, save_role
from jaxrlhf.stages.settings import (
    check_adapter,
    check_length,
    check_microbatches,
    check_minibatches,
    check_tokens,
    with_stop_tokens,
    with_total_steps,
)
from jaxrlhf.steps.annotate import annotate_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update, single_step

SHOWN = {"reward": "reward/score", "KL": "kl/k1", "length": "length/mean"}


@dataclasses.dataclass(frozen=True)
class PPOInputs:
    """Prompts, functions and adapters that have been read and checked."""

    prompts: PromptSet
    evaluation: PromptSet
    rewards: Rewards
    gold: FunctionReward | None
    policy: Adapter | None = None  # where settings name one
    reference: Adapter | None = None  # where settings name one


def check(run: Run, roles: Roles) -> None:
    """UserError where the settings do not fit the model, the mesh or the stages before."""
    config = run.config.ppo
    for source in filter(None, (config.data, config.evaluation_data)):
        check_source(source)
    check_adapter(roles.base, config.adapter, "ppo.adapter")
    check_adapter(roles.base, config.value_adapter, "ppo.value_adapter")
    check_tokens(roles.base, config.sampling, "ppo.sampling")
    length = config.max_prompt_tokens + config.sampling.max_new_tokens
    check_length(roles.base, length, "ppo.max_prompt_tokens + ppo.sampling.max_new_tokens")
    check_batch(run.mesh, config.batch_size, "ppo.batch_size")
    answers = config.batch_size * config.sampling.samples_per_prompt
    check_minibatches(answers, config.update.minibatches, "ppo.update.minibatches")
    rows = answers // config.update.minibatches
    check_microbatches(rows, config.update.microbatch_size, "ppo.update.microbatch_size")
    if ADVANTAGES[config.advantage.estimator].needs_group and config.sampling.samples_per_prompt == 1:
        raise UserError(
            f"ppo.advantage.estimator: {config.advantage.estimator} compares the answers to one prompt; "
            "give ppo.sampling.samples_per_prompt at least 2, such as 8"
        )
    if config.sampling.temperature == 0:
        raise UserError("ppo.sampling.temperature: PPO samples; 0 is greedy, give a number above 0 such as 1.0")
    if truncates(config.sampling):
        run.say("ppo: top_k, top_p or min_p are on: logprobs are those of the whole distribution, not the sampled one")
    reward_adapter = "reward" in roles.adapters or "reward_model" in run.config.stages
    if needs_own(config.reward) and not reward_adapter:
        raise UserError(
            "ppo.reward.kind: model needs a reward adapter: run the stage reward_model, start from a run that has "
            "(model.run), or give a reward model (ppo.reward.path=FOLDER) or a function "
            "(ppo.reward.kind=function ppo.reward.function=path.py:name)"
        )


def load(run: Run, roles: Roles) -> PPOInputs:
    """Reads adapters, rewards and prompts; UserError where they cannot be used."""
    config = run.config.ppo
    policy = _named_adapter(roles, config.policy, "ppo.policy")
    reference = _named_adapter(roles, config.reference, "ppo.reference")
    rewards = load_rewards(config.reward, run.mesh, "ppo.reward", run.say)
    gold = FunctionReward(config.gold, "ppo.gold") if config.gold is not None else None
    prompts = load_prompts(config.data, roles.tokenizer, config.max_prompt_tokens, config.overflow)
    run.say(f"ppo: {prompts.report}")
    evaluation = prompts
    if config.evaluation_data is not None:
        evaluation = load_prompts(config.evaluation_data, roles.tokenizer, config.max_prompt_tokens, config.overflow)
        run.say(f"ppo: evaluation: {evaluation.report}")
    for given in (prompts, evaluation):
        check_prompts(rewards, given, "ppo.reward")
        if gold is not None:
            gold.check_columns(set().union(*given.columns), "ppo.gold")
    return PPOInputs(prompts, evaluation, rewards, gold, policy, reference)


def train(run: Run, roles: Roles, inputs: PPOInputs) -> Roles:
    """Runs the stage; the roles with policy and value."""
    config = run.config.ppo
    iteration = Iteration(run, roles, inputs)
    ppo = init_ppo(iteration.start, _starting_value(run, roles), iteration.update_config)
    state = {"ppo": ppo, "kl_coef": jnp.float32(config.kl.coef)}
    with Loop(run, "ppo", state, config.iterations, config.save_every) as loop:
        for step in loop.steps():
            loop.state, metrics, answers, scores = iteration(loop.state, step)
            loop.done(step, metrics, SHOWN, tokens=int(metrics["length/mean"] * iteration.rows))
            if (step + 1) % config.sample_every == 0:
                _write_samples(run, step + 1, answers, scores)
        ppo = loop.state["ppo"]
    trained = {"policy": ppo.policy} | ({"value": ppo.value} if ppo.value else {})
    for name, adapter in trained.items():
        save_role(run.config.run_dir, name, adapter)
    before, after = iteration.evaluate(iteration.start, ppo.value), iteration.evaluate(ppo.policy, ppo.value)
    run.samples.write("ppo", config.iterations, {"before": before.samples, "after": after.samples})
    mark_finished(run.config.run_dir, "ppo", {"before": before.numbers, "after": after.numbers})
    print(comparison(before, after))
    return dataclasses.replace(roles, adapters=roles.adapters | trained)


class Iteration:
    """One PPO iteration as a function of the state: what it uses and does not change stands here."""

    def __init__(self, run: Run, roles: Roles, inputs: PPOInputs):
        config = run.config.ppo
        self.run, self.roles, self.inputs, self.config = run, roles, inputs, config
        self.update_config = _with_total_steps(config)
        self.group = config.sampling.samples_per_prompt
        self.rows = config.batch_size * self.group
        self.sampling = with_stop_tokens(config.sampling, roles.base, roles.tokenizer)
        self.reference = place(run.mesh, roles.reference if inputs.reference is None else inputs.reference)
        self.start = place(run.mesh, _starting_policy(run, roles, inputs))
        self.reward: Reward = compose(
            inputs.rewards, lambda: ModelReward(roles.base, place(run.mesh, roles.adapters["reward"]))
        )
        self.rollout = Program(rollout, "rollout")
        self.greedy = self.sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
        self.annotate = Program(
            annotate_experience,
            "annotate",
            static_argnames=("group", "kl_in_loss", "microbatches", "recompute_policy"),
        )
        self.update = Program(ppo_update, "update", donate_argnums=0)
        size = config.update.microbatch_size or self.rows // config.update.minibatches
        self.microbatches = self.rows // size

    def __call__(self, state: dict, step: int) -> tuple[dict, dict[str, float], Answers, np.ndarray]:
        """(state, metrics, answers, scores) of the iteration after `step` iterations."""
        seed, config, clock = self.run.config.seed, self.config, Clock()
        chosen = self.inputs.prompts.rows(seed, step, config.batch_size)
        ppo = state["ppo"]
        answers = self.answer(ppo.policy, self.inputs.prompts, chosen, key_for(seed, "ppo", step, "rollout"))
        clock.lap("time/rollout", answers.rollout)
        scores, metrics = self.score(answers)
        greedy = self.greedy_scores(ppo.policy, self.inputs.prompts, chosen)
        clock.lap("time/reward", scores)
        experience, kl_coef, noted = self.annotated(
            ppo.policy, ppo.value, answers.rollout, scores, state["kl_coef"], greedy
        )
        clock.lap("time/annotate", experience)
        ppo, updated = self.update(
            ppo, self.roles.base, experience, key_for(seed, "ppo", step, "update"), self.update_config
        )
        clock.lap("time/update", updated)
        metrics |= {name: float(value) for name, value in jax.device_get({**noted, **updated}).items()}
        sampled = metrics["length/mean"] * self.rows
        metrics |= clock.laps | {
            "tokens_per_second/rollout": sampled / clock.laps["time/rollout"],
            "tokens_per_second/update": sampled * config.update.epochs / clock.laps["time/update"],
            "memory/peak_bytes": peak_memory_bytes(),
            **{f"compiles/{p.name}": p.compiles for p in (self.rollout, self.annotate, self.update)},
        }
        return {"ppo": ppo, "kl_coef": kl_coef}, metrics, answers, np.asarray(scores)

    def answer(
        self, policy: Adapter, prompts: PromptSet, chosen: np.ndarray, key: jax.Array, sampling: Sampling | None = None
    ) -> Answers:
        """Samples answers to each of the chosen prompts, given by their numbers; those to one stand side by side."""
        sampling = self.sampling if sampling is None else sampling
        padded, _, _ = prompts.take(chosen)
        answered = self.rollout(self.roles.base, policy, place_batch(self.run.mesh, padded), key, sampling)
        asked = np.repeat(chosen, sampling.samples_per_prompt)
        texts, rows, chats = ([kind[i] for i in asked] for kind in (prompts.texts, prompts.columns, prompts.chats))
        return Answers(answered, texts, rows, self.roles.tokenizer, chats)

    def greedy_scores(self, policy: Adapter, prompts: PromptSet, chosen: np.ndarray) -> jax.Array | None:
        """Scores of the greedy answers to the prompts, f32[rows], where the advantages are measured from them."""
        if not ADVANTAGES[self.config.advantage.estimator].needs_greedy:
            return None
        answers = self.answer(policy, prompts, chosen, jax.random.key(0), self.greedy)
        scores = np.asarray(self.reward(answers)) - self.config.missing_eos_penalty * ~np.asarray(answers.ended)
        return place_batch(self.run.mesh, np.repeat(scores, self.group).astype(np.float32))

    def score(self, answers: Answers) -> tuple[jax.Array, dict[str, float]]:
        """Scores f32[B] of the reward that is maximised; means of its parts, and of the one that is only measured."""
        metrics = {}
        if self.inputs.gold is not None:
            metrics["reward/gold"] = float(np.mean(self.inputs.gold(answers)))
        if isinstance(self.reward, ComposedReward):
            scores, parts = self.reward.scores_and_parts(answers)
            metrics |= {f"reward/{name}": float(np.mean(values)) for name, values in parts.items()}
        else:
            scores = self.reward(answers)
        return place_batch(self.run.mesh, scores), metrics

    def annotated(
        self,
        policy: Adapter,
        value: Adapter,
        rollout: Rollout,
        scores: jax.Array,
        kl_coef: jax.Array,
        greedy: jax.Array | None,
    ):
        """(experience, next KL coefficient, metrics); see `steps.annotate.annotate_experience`."""
        return self.annotate(
            self.roles.base,
            policy,
            value,
            self.reference,
            rollout,
            scores,
            kl_coef,
            self.config.kl,
            self.config.advantage,
            self.config.missing_eos_penalty,
            greedy,
            group=self.group,
            kl_in_loss=self.config.update.kl_loss is not None,
            microbatches=self.microbatches,
            recompute_policy=not single_step(self.update_config),
        )

    def evaluate(self, policy: Adapter, value: Adapter) -> Evaluation:
        """Answers to `evaluation_prompts` prompts in turn, with the same programs at the same shapes."""
        size, wanted = self.config.batch_size, self.config.evaluation_prompts
        no_penalty = jax.device_put(jnp.float32(0.0), replicated(self.run.mesh))
        rows_of: dict[str, list[np.ndarray]] = {}
        samples = []
        for start in range(0, wanted, size):
            chosen = np.arange(start, start + size) % len(self.inputs.evaluation)
            key = key_for(self.run.config.seed, "evaluation", start, "rollout")
            answers = self.answer(policy, self.inputs.evaluation, chosen, key)
            scores, _ = self.score(answers)
            greedy = self.greedy_scores(policy, self.inputs.evaluation, chosen)
            experience = self.annotated(policy, value, answers.rollout, scores, no_penalty, greedy)[0]
            by_row = rows_measured(answers, scores, experience, self.config.missing_eos_penalty)
            if self.inputs.gold is not None:
                by_row["reward/gold"] = self.inputs.gold(answers)
            for name, values in by_row.items():
                rows_of.setdefault(name, []).append(np.asarray(values)[: (wanted - start) * self.group])
            samples += samples_of(answers, scores)
        return Evaluation(
            {name: float(np.mean(np.concatenate(values))) for name, values in rows_of.items()}, samples[:SAMPLES]
        )


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, result) -> None:
        """Ends a phase when its result is there."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _write_samples(run: Run, step: int, answers: Answers, scores: np.ndarray) -> None:
    run.samples.write("ppo", step, {"samples": samples_of(answers, scores)[:SAMPLES]})


def _named_adapter(roles: Roles, folder: str | None, key_path: str) -> Adapter | None:
    """The adapter that a setting names, without the head that a reward adapter has."""
    if folder is None:
        return None
    try:
        return without_head(load_adapter(folder, roles.base))
    except UserError as error:
        raise UserError(f"{key_path}: {error}") from None


def _starting_policy(run: Run, roles: Roles, inputs: PPOInputs) -> Adapter:
    """A copy, because the update gives away its buffers: of the adapter named, else of the reference; else fresh."""
    for adapter in (inputs.policy, inputs.reference, roles.reference):
        if adapter is not None:
            return jax.tree.map(lambda x: jnp.array(x, copy=True), adapter)
    return init_adapter(roles.base, run.config.ppo.adapter, key_for(run.config.seed, "ppo", 0, "policy"))


def _starting_value(run: Run, roles: Roles) -> Adapter | None:
    """The value model's adapter; None where the advantages need none."""
    if not ADVANTAGES[run.config.ppo.advantage.estimator].needs_value:
        return None
    if run.config.ppo.value_from == "reward" and "reward" in roles.adapters:
        return roles.adapters["reward"]
    key = key_for(run.config.seed, "ppo", 0, "value")
    return init_adapter(roles.base, run.config.ppo.value_adapter, key, head="value")


def _with_total_steps(config: PPOStageConfig) -> PPOConfig:
    update = config.update
    steps = config.iterations * update.epochs * update.minibatches
    return update.model_copy(
        update={
            "optimizer": with_total_steps(update.optimizer, steps),
            "value_optimizer": with_total_steps(update.value_optimizer, steps),
        }
    )
