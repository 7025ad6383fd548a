"""Loads the inputs of the evaluate command: prompts, held-out text, rewards, judge and tasks.

All are checked before sampling.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pydantic

from jaxrlhf.config import (
    DemonstrationsConfig,
    ModelRewardConfig,
    PPOStageConfig,
    PromptsConfig,
    RewardConfig,
    RunConfig,
    Sampling,
)
from jaxrlhf.config.faults import explain
from jaxrlhf.config.paths import function_path
from jaxrlhf.config.reading import parse_yaml
from jaxrlhf.data.episode_rows import load_episode_rows
from jaxrlhf.data.order import hold_out
from jaxrlhf.data.prompts import PromptSet, load_prompts
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sft import SFTData, load_demonstrations
from jaxrlhf.data.templates import data_of, format_of
from jaxrlhf.errors import UserError
from jaxrlhf.evaluation.tasks import Task
from jaxrlhf.hf.adapter_files import load_adapter
from jaxrlhf.models.adapters import without_head
from jaxrlhf.models.sharding import shard
from jaxrlhf.rewards.completions import Reward, abstained_rows
from jaxrlhf.rewards.functions import FunctionReward, RewardFault
from jaxrlhf.rewards.load import check_prompts, compose, load_rewards, needs_own
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.steps import granularity_of
from jaxrlhf.rewards.trial import try_rewards
from jaxrlhf.stages.candidates import Model, choices_of
from jaxrlhf.stages.checks import check_length
from jaxrlhf.stages.choices import ChoiceTokens, prompts_of
from jaxrlhf.stages.roles import Roles
from jaxrlhf.tracking.notices import notice

PROMPT_STEP = 32  # prompts are padded to a multiple of this length
LONGEST_TEXT = 1024  # largest number of tokens of a held-out text, if no run sets it


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The data of an evaluation, and the functions that judge the completions."""

    prompts: PromptSet | None  # N rows; the rows of one prompt's samples are adjacent
    text: SFTData | None  # unpacked
    text_path: str | None
    batch_size: int
    reward: Reward | None
    gold: FunctionReward | None
    judge: FunctionReward | None
    reference: Model | None  # reference of the KL
    tasks: list[Task]
    sampling: Sampling
    choices: ChoiceTokens | None = None  # the tokens of each choice
    labels: np.ndarray | None = None  # i64[N]; number of the right choice, -1 if unknown; None without classification
    validation: tuple[PromptSet, np.ndarray] | None = None  # prompts and labels from which temperatures are fitted
    environment: PPOStageConfig | None = None  # plays episodes, whose rows are the columns of the prompts
    group: int = 1  # samples per prompt


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The input of a judge: the prompts, two completions of each prompt as texts, and the other columns."""

    prompts: list[str]
    texts: list[list[str]]
    rows: list[dict[str, Any]]


def judged(judge: FunctionReward, pairs: Pairs) -> np.ndarray:
    """Returns the judge's choices f64[N]: 0 for the first completion, 1 for the second, -1 for neither.

    The judge returns 0, 1, or None for neither. Raises `RewardFault` for any other value.
    """
    found = judge(pairs)
    chosen = np.where(abstained_rows(found), -1.0, np.ma.getdata(found))
    if (odd := chosen[~np.isin(chosen, (0, 1, -1))]).size:
        raise RewardFault(f"judge {judge.name} must return 0, 1, or None for neither, not {odd[0]}")
    return chosen


def load_inputs(
    arguments: argparse.Namespace,
    config: RunConfig | None,
    roles: Roles,
    sampling: Sampling,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Inputs:
    """Reads and checks all inputs. The run gives the inputs that the arguments leave out. Raises `UserError`."""
    ppo = None if config is None else config.ppo
    judge = None if arguments.judge is None else FunctionReward(arguments.judge, "--judge")
    gold = arguments.gold or (ppo and ppo.gold)
    gold = None if gold is None else FunctionReward(gold, "--gold" if arguments.gold else "ppo.gold")
    reward = _reward_config(arguments.reward) if arguments.reward else (ppo and ppo.reward)
    if reward is not None and needs_own(reward) and "reward" not in roles.adapters:
        if arguments.reward:
            raise UserError(
                "--reward: kind model without path means the reward model of the run, but there is none; give path"
            )
        notice("this run has no reward model, so no reward is measured; --reward sets a reward")
        reward = None
    environment = None
    if ppo is not None and ppo.environment is not None and arguments.data is None:
        environment = ppo.model_copy(update={"sampling": sampling})
        length = ppo.max_prompt_tokens + environment.response_tokens
        check_length(roles.base.config, length, "--max-new-tokens: an episode")
    prompts = _prompts(arguments, config, roles, sampling) if environment is None else _episodes(arguments, ppo)
    text, text_path = _text(arguments, config, roles, batch_size)
    if prompts is None and text is None:
        raise UserError("there is nothing to evaluate on; give prompts with --data, or held-out text with --text")
    tasks: list[Task] = []
    answers = labels = validation = None
    if prompts is not None:
        where = "--reward" if arguments.reward else "ppo.reward"
        reward = None if reward is None else _reward(reward, where, roles, mesh, prompts, config, sampling.choices)
        if gold is not None:
            gold.check_columns(set().union(*prompts.columns), "--gold" if arguments.gold else "ppo.gold")
            named = {"--gold" if arguments.gold else "ppo.gold": gold}
            try_rewards(named, prompts, roles.tokenizer, sampling.choices)
        if judge is not None:
            judge.check_columns(set().union(*prompts.columns), "--judge")
            try:
                judged(judge, Pairs(prompts.texts[:2], [["a", "b"]] * len(prompts.texts[:2]), prompts.columns[:2]))
            except RewardFault as fault:
                raise UserError(f"--judge: the judge failed on the first 2 rows: {fault}") from fault
        options = {name: getattr(arguments, name) for name in ("pick", "ignore_case", "normalize", "tokenize")}
        options["labels"] = None if arguments.labels is None else [name.strip() for name in arguments.labels.split(",")]
        tasks = [Task(spec, prompts.columns, options) for spec in arguments.task or ()]
        lengths = max(map(len, prompts.ids))
        sampling, answers = choices_of(arguments, sampling, roles, prompts_of(prompts), lengths)
        if answers is not None:
            labels, validation = _labels(arguments, config, roles, sampling, tasks, answers)
        elif arguments.calibrate is not None:
            raise UserError("--calibrate: needs the probabilities of choices; give --choices")
    elif asked := [name for name in ("task", "judge", "reward", "gold", "calibrate") if getattr(arguments, name)]:
        raise UserError(f"--{asked[0]}: needs prompts; give --data")
    reference = None if config is None or prompts is None else _reference(config, roles, mesh)
    more = (answers, labels, validation, environment, arguments.samples_per_prompt)
    return Inputs(prompts, text, text_path, batch_size, reward, gold, judge, reference, tasks, sampling, *more)


def _labels(
    arguments: argparse.Namespace,
    config: RunConfig | None,
    roles: Roles,
    sampling: Sampling,
    tasks: list[Task],
    answers: ChoiceTokens,
) -> tuple[np.ndarray | None, tuple[PromptSet, np.ndarray] | None]:
    """Returns (indices of the right choices, (labelled prompts of `--calibrate`, indices of their right choices)).

    The labels are in the column of the first classification task. Both results are None if there is no such task. The
    second is None if `--calibrate` is not given.
    """
    if arguments.samples_per_prompt > 1:
        raise UserError(
            "--samples-per-prompt: with choices the completion is the most probable choice, so there is only one; "
            "leave it out"
        )
    task = next((task for task in tasks if task.name == "classification"), None)
    if task is None:
        if arguments.calibrate is not None:
            raise UserError("--calibrate: needs labels; give their column with --task classification:COLUMN")
        return None, None
    labels = task.labels_among(list(answers))
    if arguments.calibrate is None:
        return labels, None
    if (arguments.calibrate, arguments.calibrate_split) == (arguments.data, arguments.split):
        raise UserError("--calibrate: has the same rows as --data; give rows that are not evaluated")
    learnt = None if config is None or config.ppo is None else config.ppo.data
    if learnt and (arguments.calibrate, arguments.calibrate_split or "train") == (learnt.path, learnt.split):
        notice("--calibrate: has the training prompts (ppo.data), about which the policy is too certain; give others")
    file = _file(arguments.calibrate, arguments.calibrate_split, None, arguments, config)
    rows = _load_prompts(file, arguments, config, roles, sampling)
    own = Task(f"{task.name}:{task.column}", rows.columns, task.options).labels_among(list(answers))
    known = np.flatnonzero(own >= 0)
    parts = {name: [getattr(rows, name)[i] for i in known] for name in ("ids", "texts", "chats", "columns")}
    return labels, (dataclasses.replace(rows, **parts), own[known])


def _prompts(
    arguments: argparse.Namespace, config: RunConfig | None, roles: Roles, sampling: Sampling
) -> PromptSet | None:
    """Returns the prompts of `--data`, else those of the run, else None.

    Each prompt is repeated `--samples-per-prompt` times.
    """
    ppo = None if config is None else config.ppo
    if arguments.data is not None:
        data = _file(arguments.data, arguments.split, arguments.limit, arguments, config)
    elif ppo is not None:
        if ppo.evaluation.data is None:
            notice(f"{arguments.run}: evaluated on the training prompts (ppo.data); --data sets other prompts")
        data = ppo.evaluation.data or ppo.data
        data = _first_rows(data) if data.streaming else data
        data = data.model_copy(update={"limit": arguments.limit or data.limit})
    else:
        return None
    return _load_prompts(data, arguments, config, roles, sampling)


def _episodes(arguments: argparse.Namespace, ppo: PPOStageConfig) -> PromptSet:
    """Returns prompts that stand for the episodes of a run's environment: their texts are known when they are played.

    There is one episode, or `--samples-per-prompt` of them, for each row of the data; without data, for each of
    `ppo.evaluation.prompts` seeds. `--limit` is another number. Raises `UserError` for options that need prompts.
    """
    for name in ("task", "judge", "reward", "gold", "calibrate", "choices"):
        if getattr(arguments, name):
            raise UserError(
                f"--{name}: is about completions of prompts, but the run has an environment (ppo.environment), which "
                "gives the rewards; leave it out, or give prompts with --data"
            )
    rows, path = load_episode_rows(ppo.evaluation.data or ppo.data), ppo.environment.factory
    count = arguments.limit or (ppo.evaluation.prompts if rows.report is None else len(rows))
    if rows.report is not None:
        notice(str(rows.report))
    columns = [rows.columns[i % len(rows)] for i in range(count) for _ in range(arguments.samples_per_prompt)]
    N = len(columns)
    ids = [np.zeros(1, np.int32)] * N
    return PromptSet(ids, [""] * N, [None] * N, columns, ppo.max_prompt_tokens, None, LoadReport(path, N))


def _file(
    path: str, split: str | None, limit: int | None, arguments: argparse.Namespace, config: RunConfig | None
) -> PromptsConfig:
    """Returns the settings for reading prompts from a file that is named on the command line."""
    source = {"path": path, "split": split, "limit": limit}
    source |= {} if arguments.prompt_field is None else {"prompt_field": arguments.prompt_field}
    if (data := data_of(config)) is not None:  # chats get the format of the run
        source |= format_of(data, arguments.prompt_field)
    return PromptsConfig(**{name: value for name, value in source.items() if value is not None})


def _load_prompts(
    data: PromptsConfig, arguments: argparse.Namespace, config: RunConfig | None, roles: Roles, sampling: Sampling
) -> PromptSet:
    ppo, positions = None if config is None else config.ppo, roles.base.config.max_positions
    limit = positions - sampling.max_new_tokens
    if limit < 1:
        most = f"must be below the model's {positions} positions"
        raise UserError(f"--max-new-tokens: {most}, not {sampling.max_new_tokens}")
    if ppo is not None:
        limit = min(limit, ppo.max_prompt_tokens) if arguments.data is None else limit
    prompts = load_prompts(data, roles.tokenizer, limit, "stop" if ppo is None else ppo.overflow)
    notice(str(prompts.report))
    longest = -(-max(map(len, prompts.ids)) // PROMPT_STEP) * PROMPT_STEP
    rows = {
        name: [value for value in getattr(prompts, name) for _ in range(arguments.samples_per_prompt)]
        for name in ("ids", "texts", "chats", "columns")
    }
    return dataclasses.replace(prompts, max_prompt_tokens=min(longest, limit), **rows)


def _first_rows(data: PromptsConfig) -> PromptsConfig:
    """Returns the settings of streamed prompts with each source limited to its first rows, as many as a window has."""
    most = data.shuffle_buffer
    parts = [source.model_copy(update={"limit": min(source.limit or most, most)}) for source in (data, *data.mix_with)]
    return parts[0].model_copy(update={"mix_with": parts[1:]})


def _text(
    arguments: argparse.Namespace, config: RunConfig | None, roles: Roles, batch_size: int
) -> tuple[SFTData | None, str | None]:
    """Returns (rows, path) of `--text`, or else of the run's held-out demonstrations."""
    sft = None if config is None else config.sft
    longest = min(roles.base.config.max_positions, arguments.max_length or (sft.max_length if sft else LONGEST_TEXT))
    overflow = sft.overflow if sft else "cut"
    if arguments.text is not None:
        source = {"path": arguments.text, "split": arguments.split, "limit": arguments.limit}
        data = DemonstrationsConfig(**{name: value for name, value in source.items() if value is not None})
        examples, report = load_demonstrations(data, roles.tokenizer, longest, overflow)
    elif sft is not None and (sft.evaluation.data is not None or (sft.evaluation.heldout and not sft.data.streaming)):
        try:
            examples, report = load_demonstrations(sft.evaluation.data or sft.data, roles.tokenizer, longest, overflow)
        except UserError as error:  # only a notice: the run is trained, and only its held-out rows are missing
            notice(f"no perplexity: {error}; --text sets other rows")
            return None, None
        if sft.evaluation.data is None:
            _, examples = hold_out(examples, sft.evaluation.heldout, config.seed)
            if not examples:
                return None, None
    else:
        return None, None
    notice(f"{report}, of which {len(examples)} are evaluated")
    return SFTData(examples, batch_size, longest, 0, packing=False, pad_id=roles.tokenizer.pad_id), report.path


def _reward_config(text: str) -> RewardConfig:
    """Returns the settings in `--reward`: YAML as in a config, or module:function or path.py:function."""
    if ": " not in text and ":" in text and not text.lstrip().startswith("{"):
        given: Any = {"kind": "function", "function": function_path(text)}
    else:
        given = parse_yaml(text, "--reward")
    if not isinstance(given, dict):
        raise UserError("--reward: must be module:function, or settings as in a config: '{kind: http, url: ...}'")
    whole = {"run_dir": "runs/x", "stages": ["ppo"], "model": {"path": "x"}}  # errors then name the key ppo.reward
    try:
        return RunConfig.model_validate(whole | {"ppo": {"data": {"path": "x"}, "reward": given}}).ppo.reward
    except pydantic.ValidationError as error:
        raise UserError(explain(error, "--reward", {})) from None


def _reward(
    settings: RewardConfig,
    where: str,
    roles: Roles,
    mesh: jax.sharding.Mesh,
    prompts: PromptSet,
    config: RunConfig | None,
    choices: Sequence[str] | None,
) -> Reward:
    """Returns the reward. As a test, the reward first scores two rows, unless scoring must compile a program."""
    precision = "highest" if config is None else config.model.matmul_precision
    rewards = load_rewards(settings, mesh, where, notice, roles.tokenizer.chats.time, precision)
    check_prompts(rewards, prompts, where)
    named = {f"{where}.parts.{name}" if name else where: part for name, (part, _) in rewards.items()}
    try_rewards(named, prompts, roles.tokenizer, choices)

    def own(part: ModelRewardConfig) -> ModelReward:
        adapter, steps = shard(mesh, roles.adapters["reward"]), (granularity_of(part), part.step_reward)
        return ModelReward(roles.base, adapter, mesh, None, *steps)

    return compose(rewards, own)


def _reference(config: RunConfig, roles: Roles, mesh: jax.sharding.Mesh) -> Model:
    """Returns the reference: the model to which the run's PPO stage measures the KL, even if that stage has not run."""
    adapter = roles.reference
    if config.ppo is not None and config.ppo.reference is not None:
        adapter = without_head(load_adapter(config.ppo.reference, roles.base))
    return roles.base, None if adapter is None else shard(mesh, adapter)
