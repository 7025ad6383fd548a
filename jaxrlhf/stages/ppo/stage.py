"""The ppo stage: iterations of sampling, scoring and updating, then a table of the results."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.running import gain_and_bias
from jaxrlhf.config import AdapterConfig, ModelRewardConfig, PPOConfig, PPOStageConfig
from jaxrlhf.config.functions import load_function
from jaxrlhf.data.episode_rows import EpisodeRows, load_episode_rows
from jaxrlhf.data.prompts import LoadedPrompt, PromptSet, load_prompts, prompt_set, prompts_reader
from jaxrlhf.data.sft import SFTData, load_demonstrations
from jaxrlhf.data.streamed import PromptSource, StreamedPrompts
from jaxrlhf.data.success import Success
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.mesh import check_batch, make_meshes
from jaxrlhf.environments.text_environments import TextEnvironments
from jaxrlhf.errors import UserError, short
from jaxrlhf.hf.adapter_files import load_adapter
from jaxrlhf.models.adapters import as_kind, bare, init_adapter, is_full, scaled_head, without_head
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.sharding import shard
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.load import Rewards, check_prompts, compose, load_rewards, needs_own, on_first
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.steps import granularity_of
from jaxrlhf.rewards.trial import try_rewards
from jaxrlhf.rollout.sampling import truncates
from jaxrlhf.stages.checks import check_adapter, check_slots, rate_text, with_optimizers
from jaxrlhf.stages.choices import load_choices, prompts_of
from jaxrlhf.stages.episodes import make_environments
from jaxrlhf.stages.evaluation import Evaluated, check_results, comparison
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.stages.ppo.episode_sampler import EpisodeSampler
from jaxrlhf.stages.ppo.iteration import Iteration, StageState
from jaxrlhf.stages.ppo.remarks import remarks
from jaxrlhf.stages.ppo.sampler import Sampler
from jaxrlhf.stages.ppo.value import starting_value
from jaxrlhf.stages.roles import Roles, mark_finished, ppo_adapters, save_role
from jaxrlhf.stages.training import check_settings, open_stream
from jaxrlhf.steps.annotate import Control
from jaxrlhf.steps.ppo import complete, init_ppo

OPTIMIZERS = ("optimizer", "value_optimizer")
SHOWN = {"reward": "reward/score", "KL": "kl/k1", "length": "length/mean"}


@dataclasses.dataclass(frozen=True)
class PPOInputs:
    """The stage's checked prompts, rewards, adapters and pretraining rows."""

    prompts: PromptSource | EpisodeRows
    evaluation: PromptSet | EpisodeRows
    rewards: Rewards  # empty if an environment gives the rewards
    gold: FunctionReward | None
    choices: Choices | None = None
    policy: Adapter | None = None  # the adapter of ppo.policy
    reference: Adapter | None = None  # the adapter of ppo.reference
    pretraining: SFTData | None = None


def check(run: Run, roles: Roles) -> None:
    """Raises `UserError` if the settings do not fit the model, the mesh or the earlier stages."""
    config = run.config.ppo
    if run.config.mesh.rollout is not None and not config.async_:
        raise UserError(
            "mesh.rollout: without ppo.async one of the two meshes would always wait for the other; give ppo.async=1, "
            "or leave mesh.rollout and mesh.update out"
        )
    rollout_mesh, run = _on_meshes(run)
    check_batch(rollout_mesh, config.batch_size, "ppo.batch_size", "mesh.rollout")
    check_slots(config, rollout_mesh, "mesh.rollout")
    mix = config.pretraining
    check_adapter(roles.base, run.config.adapter_or(config.value_adapter), "ppo.value_adapter")
    check_settings(run, roles.base, "ppo", config.data, config.evaluation.data, mix and mix.data)
    for remark in remarks(config):
        run.say(f"ppo: {remark}")
    if truncates(config.sampling):
        run.say(
            "ppo: top_k, top_p or min_p limits which tokens are sampled; logprobs are still those of the full "
            "distribution"
        )
    if needs_own(config.reward) and "reward" not in roles.adapters and "reward_model" not in run.config.stages:
        raise UserError(
            "ppo.reward.kind=model needs a reward adapter, but there is none; run the stage reward_model, start from "
            "a run that has a reward adapter (model.run), or give a reward model (ppo.reward.path=FOLDER) or a "
            "function "
            "(ppo.reward.kind=function ppo.reward.function=path.py:name)"
        )


def load(run: Run, roles: Roles) -> PPOInputs:
    """Reads adapters, rewards, prompts and rows. Raises `UserError` if they are invalid."""
    config = run.config.ppo
    _, run = _on_meshes(run)
    policy = _named_adapter(roles, config.policy, "ppo.policy")
    reference = _named_adapter(roles, config.reference, "ppo.reference")
    if config.environment is None:
        inputs = _load_prompts_and_rewards(run, roles)
    else:
        inputs = _load_episodes(run, roles)
    inputs = dataclasses.replace(
        inputs, policy=policy, reference=reference, pretraining=_load_pretraining(run, roles)
    )
    _check_kinds(run, inputs)
    if "sft" not in run.config.stages:  # if sft runs first, its adapter does not exist yet
        jax.eval_shape(lambda: starting_reference(run, roles, inputs, starting_policy(run, roles, inputs)))
    return inputs


def _load_episodes(run: Run, roles: Roles) -> PPOInputs:
    """Reads the rows of episodes, and tries the environment out. Raises `UserError` if one of them is invalid."""
    config = run.config.ppo
    rows = evaluation = load_episode_rows(config.data)
    if config.evaluation.data is not None:
        evaluation = load_episode_rows(config.evaluation.data)
        run.say(f"ppo: evaluation: {evaluation.report}")
    if rows.report is not None:
        run.say(f"ppo: {rows.report}")
    load_function(config.environment.factory, "ppo.environment.factory")
    if processes.is_first():
        with _environments(run, roles, 1, lambda line: None) as environments:
            text = " ".join(environments.try_out(run.config.seed, rows.columns[0] or None).split())
        run.say(f"ppo: the environment {config.environment.factory.rpartition('/')[2]} begins with {short(text)}")
    return PPOInputs(rows, evaluation, {}, None)


def _environments(
    run: Run, roles: Roles, count: int, say: Callable[[str], None]
) -> contextlib.closing[TextEnvironments]:
    """Returns a context with environments. They are closed at its end."""
    return contextlib.closing(make_environments(run.config.ppo, roles.base, roles.tokenizer, count, say))


def _load_prompts_and_rewards(run: Run, roles: Roles) -> PPOInputs:
    """Reads prompts and rewards, and tries the rewards out. Raises `UserError` if they are invalid."""
    config = run.config.ppo
    products, time = run.config.model.matmul_precision, roles.tokenizer.chats.time
    rewards = load_rewards(config.reward, run.mesh, "ppo.reward", run.say, time, products)
    gold = FunctionReward(config.gold, "ppo.gold") if config.gold is not None else None

    def checked(prompts: PromptSet) -> PromptSet:
        check_prompts(rewards, prompts, "ppo.reward")
        if gold is not None:
            gold.check_columns(set().union(*prompts.columns), "ppo.gold")
        return prompts

    prompts, first = _load_prompts(run, roles, checked)
    evaluation = first
    if config.evaluation.data is not None:
        evaluation = load_prompts(config.evaluation.data, roles.tokenizer, config.max_prompt_tokens, config.overflow)
        run.say(f"ppo: evaluation: {evaluation.report}")
        checked(evaluation)
    choices = load_choices(config.sampling, roles.base.config, roles.tokenizer, prompts_of(first), run.say)
    if processes.is_first():
        tried = {f"ppo.reward.parts.{name}" if name else "ppo.reward": reward for name, (reward, _) in rewards.items()}
        try_rewards(tried | {"ppo.gold": gold}, first, roles.tokenizer, config.sampling.choices)
    return PPOInputs(prompts, evaluation, rewards, gold, choices)


def _load_prompts(
    run: Run, roles: Roles, checked: Callable[[PromptSet], PromptSet]
) -> tuple[PromptSource, PromptSet]:
    """Returns (the source of training prompts, a prompt set: all prompts, or the first window of a stream).

    Each window is checked when it is read.
    """
    config, tokenizer = run.config.ppo, roles.tokenizer
    limits = (config.max_prompt_tokens, config.overflow)
    if not config.data.streaming:
        prompts = load_prompts(config.data, tokenizer, *limits)
        run.say(f"ppo: {prompts.report}")
        if (rule := config.success_curriculum) is not None:
            prompts = dataclasses.replace(prompts, success=Success(len(prompts), rule.solved_at, rule.decay))
        return checked(prompts), prompts
    stream = open_stream(run, "ppo", config.data, lambda source: prompts_reader(source, tokenizer, *limits))

    def make(loaded: list[LoadedPrompt]) -> PromptSet:
        return checked(prompt_set(loaded, stream.first.report, config.max_prompt_tokens, tokenizer.pad_id))

    prompts = StreamedPrompts(stream, make, config.batch_size)
    if config.evaluation.data is None:
        run.say("ppo: evaluated on prompts of the first window of the stream; ppo.evaluation.data gives other prompts")
    return prompts, prompts.first_window


def _load_pretraining(run: Run, roles: Roles) -> SFTData | None:
    mix, tokenizer = run.config.ppo.pretraining, roles.tokenizer
    if mix is None:
        return None
    examples, report = load_demonstrations(mix.data, tokenizer, mix.max_length, "cut")
    run.say(f"ppo: pretraining: {report}")
    return SFTData(examples, mix.batch_size, mix.max_length, run.config.seed, pad_id=tokenizer.pad_id)


def train(run: Run, roles: Roles, inputs: PPOInputs) -> Roles:
    """Runs the stage. Returns the roles, with the policy, the value model and the average of the policy added.

    If rollout and update have meshes of their own, the base moves from the mesh of the run to these two meshes. So no
    device holds the base twice.
    """
    with contextlib.ExitStack() as stack:
        return _train(run, roles, inputs, stack)


def _train(run: Run, roles: Roles, inputs: PPOInputs, stack: contextlib.ExitStack) -> Roles:
    config = run.config.ppo
    rollout_mesh, run = _on_meshes(run)
    roles.base = shard(run.mesh, roles.base)
    start = shard(run.mesh, starting_policy(run, roles, inputs))
    reference = shard(run.mesh, starting_reference(run, roles, inputs, start))

    value, predicts_scores = starting_value(run, roles)
    for name, adapter, own in (("policy", start, config.adapter), ("value model", value, config.value_adapter)):
        if note := _kept_rank(adapter or {}, run.config.adapter_or(own)):
            run.say(f"ppo: the {name} {note}")
    update_config = _with_defaults(config, start, value)
    run.say(f"ppo: {_update_text(update_config, start, value)}")

    sampler = _sampler(run, roles, inputs, update_config, rollout_mesh, stack)
    ppo = init_ppo(start, value, update_config)
    iteration = Iteration(run, roles, sampler, update_config, ppo, reference, inputs.pretraining, inputs.choices)
    refreshed = reference if config.refresh_reference else None
    behind = start if iteration.overlaps else None
    state = StageState(ppo, Control.start(config.kl.coef), jnp.int32(0), refreshed, behind)
    optimizers = {name: getattr(update_config, name) for name in OPTIMIZERS}

    def evaluate(state: StageState) -> Evaluated:
        evaluation = iteration.evaluate(state.ppo.policy, state.ppo.value, inputs.evaluation)
        return Evaluated(evaluation.means, evaluation.record, evaluation)

    stream = inputs.prompts if isinstance(inputs.prompts, StreamedPrompts) else None
    rows, total, every = stream or inputs.prompts.success, config.iterations, config.save_every
    with Loop(run, "ppo", state, total, every, evaluate, optimizers, rows, lambda state: int(state.draws)) as loop:
        if config.score.normalise == "initial" and not loop.first:
            control = iteration.with_initial_moments(start, inputs.prompts, loop.state.control)
            loop.state = loop.state.replace(control=control)
            if predicts_scores:  # the value model must predict normalised scores instead
                ppo = loop.state.ppo
                value = shard(run.mesh, scaled_head(ppo.value, *gain_and_bias(control.moments)))
                loop.state = loop.state.replace(ppo=ppo.replace(value=value))
        for step in loop.steps():
            iteration.update_config = update_config.model_copy(update=loop.watch.optimizers)
            log_samples = _log_samples(run, step + 1)
            loop.state, metrics, experience = iteration(loop.state, step, inputs.prompts, log_samples)
            metrics |= {} if stream is None else stream.metrics(int(loop.state.draws))
            finish = loop.submitted if iteration.overlaps else loop.done
            finish(step, metrics, SHOWN, int(metrics["length/mean"] * iteration.rows), experience)
            if stream is not None:
                stream.release(int(loop.state.draws))
        state = loop.result()
    ppo = state.ppo
    results = {"before": iteration.evaluate(start, ppo.value, inputs.evaluation)}
    results["after"] = loop.evaluated(state).results
    if ppo.average:
        results["average of"] = iteration.evaluate(ppo.average, ppo.value, inputs.evaluation)
    check_results("ppo", results["after"].means, run.config.run_dir)
    trained = ppo_adapters(ppo.policy, ppo.value, ppo.average, update_config)
    for name, adapter in trained.items():
        save_role(run.config.run_dir, name, adapter)
    run.samples.write("ppo", loop.reached, {name.split()[0]: e.samples for name, e in results.items()})
    reached = {name.split()[0]: evaluation.means for name, evaluation in results.items()}
    mark_finished(run.config.run_dir, "ppo", reached | loop.stopped_early())
    if processes.is_first():
        print(comparison(results))
    return dataclasses.replace(roles, adapters=roles.adapters | trained)


def _sampler(
    run: Run,
    roles: Roles,
    inputs: PPOInputs,
    update: PPOConfig,
    mesh: jax.sharding.Mesh,
    stack: contextlib.ExitStack,
) -> Sampler:
    """Returns what samples and scores: completions, or episodes. `stack` closes the environments."""
    config = run.config.ppo
    if config.environment is not None:
        environments = None
        if processes.is_first():
            count = config.batch_size * config.sampling.samples_per_prompt
            environments = stack.enter_context(_environments(run, roles, count, run.say))
        return EpisodeSampler(run, roles, environments)

    def model_reward(part: ModelRewardConfig) -> ModelReward:
        adapter, steps = shard(run.mesh, roles.adapters["reward"]), (granularity_of(part), part.step_reward)
        return ModelReward(roles.base, adapter, run.mesh, update.microbatch_size, *steps)

    reward = compose(inputs.rewards, model_reward)
    return Sampler(run, roles, reward, inputs.gold and on_first(inputs.gold), mesh, inputs.choices)


def _on_meshes(run: Run) -> tuple[jax.sharding.Mesh, Run]:
    """Returns the mesh that samples, and the run on the mesh that learns. These are one mesh without `mesh.rollout`."""
    if run.config.mesh.rollout is None:
        return run.mesh, run
    rollout, update = make_meshes(run.config.mesh)
    return rollout, dataclasses.replace(run, mesh=update)


def _log_samples(run: Run, number: int) -> Callable[[dict], None] | None:
    """Returns a function that writes a record to samples.jsonl, or None if iteration `number` (from 1) writes none."""
    config = run.config.ppo
    if number % config.sample_every and number not in (1, config.iterations):
        return None
    return functools.partial(run.samples.write, "ppo", number)


def _named_adapter(roles: Roles, folder: str | None, key_path: str) -> Adapter | None:
    """Loads the adapter that a setting names. If it is a reward adapter, its head is left out."""
    if folder is None:
        return None
    try:
        return without_head(load_adapter(folder, roles.base))
    except UserError as error:
        raise UserError(f"{key_path}: {error}") from None


def starting_policy(run: Run, roles: Roles, inputs: PPOInputs) -> Adapter:
    """Returns a copy of the adapter in ppo.policy, else of the reference, else a fresh adapter.

    The copy protects the original, because updates donate the policy.
    """
    config = run.config.adapter_or(run.config.ppo.adapter)
    for adapter in (inputs.policy, inputs.reference, roles.reference):
        if adapter is not None:
            return as_kind(roles.base, adapter, config.kind)
    return init_adapter(roles.base, config, key_for(run.config.seed, "ppo", 0, "policy"))


def _kept_rank(adapter: Adapter, config: AdapterConfig) -> str | None:
    """Returns a warning if the ranks of the starting adapter differ from the settings, else None."""
    ranks = sorted({leaves["lora_a"].shape[1] for leaves in adapter.values() if "lora_a" in leaves})
    if not ranks or ranks == [config.rank]:
        return None
    kept = ", ".join(map(str, ranks))
    return f"keeps rank {kept} of the adapter that it starts from; the rank {config.rank} of the settings has no effect"


def _check_kinds(run: Run, inputs: PPOInputs) -> None:
    """Raises `UserError` if the policy must be a LoRA adapter, but its starting adapter has full weights."""
    kind = run.config.adapter_or(run.config.ppo.adapter).kind
    named = (("policy", inputs.policy), ("reference", inputs.reference))
    name, start = next(((name, adapter) for name, adapter in named if adapter is not None), ("", None))
    if start is not None and kind == "lora" and is_full(start):
        why = "" if name == "policy" else ", from which the policy starts because ppo.policy is not set"
        raise UserError(
            f"ppo.{name}: {getattr(run.config.ppo, name)} holds full weights{why}, but ppo.adapter.kind is lora; "
            "give "
            "ppo.adapter.kind=full, or a LoRA adapter"
        )


def starting_reference(run: Run, roles: Roles, inputs: PPOInputs, policy: Adapter) -> Adapter | None:
    """Returns the adapter in ppo.reference, else the SFT adapter, else None. None means that the base is the reference.

    With `refresh_reference` the reference has the same leaves as the policy from the start, so that programs compile
    once.
    """
    reference = roles.reference if inputs.reference is None else inputs.reference
    if not run.config.ppo.refresh_reference:
        return reference
    if reference is None:
        return bare(roles.base, policy)
    reference = as_kind(roles.base, reference, run.config.adapter_or(run.config.ppo.adapter).kind)
    shapes = [jax.tree.map(np.shape, tree) for tree in (reference, policy)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "ppo.refresh_reference: the policy cannot replace the reference, because their adapters have different "
            "modules or ranks; start both from one adapter, or leave ppo.policy and ppo.reference out"
        )
    return reference


def _with_defaults(config: PPOStageConfig, policy: Adapter, value: Adapter | None) -> PPOConfig:
    """Returns the update settings. Minibatches, learning rates and numbers of steps are filled in."""
    update = complete(config.update, config.batch_size * config.sampling.samples_per_prompt)
    steps = update.epochs * update.minibatches
    trained = {"optimizer": ("policy", policy), "value_optimizer": ("value", value or {})}
    totals = {
        "optimizer": (config.iterations - update.value_warmup) * steps,
        "value_optimizer": config.iterations * steps,
    }
    return with_optimizers(update, trained, totals)


def _update_text(update: PPOConfig, policy: Adapter, value: Adapter | None) -> str:
    """Returns the optimizer steps per iteration and the learning rates, as text."""
    steps = f"{update.epochs} x {update.minibatches} optimizer steps per iteration (epochs x minibatches)"
    rates = [f"learning rate of the policy {rate_text(update.optimizer, policy)}"]
    rates += [f"of the value model {rate_text(update.value_optimizer, value)}"] if value else []
    return f"{steps}; {', '.join(rates)}"
