"""Evaluates the roles of a run, or one model. This is the evaluate command.

Every role answers the same prompts with the same random numbers, in batches of one shape. The last batch is filled up
with extra rows, and their results are dropped. Shapes: N prompts, B rows per batch.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.checkpoint.compilation_cache import AUTO, cached_programs
from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.config import MeshConfig
from jaxrlhf.data.sft import SFTData
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import check_batch, fetch, make_mesh, shard_batch
from jaxrlhf.errors import Fault, UserError, printable
from jaxrlhf.evaluation.bootstrap import Metrics, difference, intervals, mean
from jaxrlhf.evaluation.preference import win_rate, wins_by_judge, wins_by_score
from jaxrlhf.evaluation.probabilities import fit_temperature, label_probabilities, perplexity, softmax
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.sharding import shard
from jaxrlhf.rewards.completions import abstained_rows
from jaxrlhf.stages.answering import Answers, Chooser, EpisodeSampler, Sampler
from jaxrlhf.stages.candidates import Model, load_candidates, sampling_of
from jaxrlhf.stages.episodes import make_environments
from jaxrlhf.stages.evaluation_inputs import Inputs, Pairs, judged, load_inputs
from jaxrlhf.steps.sft import sft_row_losses

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")  # settings of sampling in the report


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Returns (the report of `jaxrlhf evaluate`, the text for the file of `--samples`).

    The report has the form in which `--json` writes it. `arguments` are the command's options.
    """
    mesh = _mesh(arguments)
    roles, config, chosen = load_candidates(arguments, mesh, all_roles=True)
    chosen = {role: (base, adapter and shard(mesh, adapter)) for role, (base, adapter) in chosen.items()}
    size = arguments.batch_size or (config.ppo.batch_size if config is not None and config.ppo is not None else 32)
    check_batch(mesh, size, "--batch-size" if arguments.batch_size else "--batch-size (default)")
    inputs = load_inputs(arguments, config, roles, sampling_of(arguments, config, roles), mesh, size)
    answers: dict[str, Answers] = {}
    temperatures: dict[str, float] = {}  # by role; fitted
    of_text: dict[str, Metrics] = {}
    cache = AUTO if config is None else config.compilation_cache
    with contextlib.ExitStack() as stack:
        stack.enter_context(cached_programs(cache, lambda text: print(printable(text), file=sys.stderr)))
        if inputs.prompts is not None:
            common = (inputs, mesh, roles.base, roles.tokenizer, arguments.seed)
            if inputs.environment is not None:
                made = make_environments(inputs.environment, roles.base, roles.tokenizer, size, _progress)
                sampler = EpisodeSampler(*common, stack.enter_context(contextlib.closing(made)))
            else:
                sampler = (Sampler if inputs.choices is None else Chooser)(*common)
            for role, model in chosen.items():
                answers[role] = sampler.answers(*model)
                if inputs.validation is not None:
                    rows, labels = inputs.validation
                    temperatures[role] = fit_temperature(sampler.logprobs_of(*model, rows), labels)
                what = "completions" if inputs.environment is None else "episodes"
                _progress(f"{role}: {len(inputs.prompts)} {what}")
        if inputs.text is not None:
            program = Program(sft_row_losses, "sft_row_losses", mesh, compiler_options(roles.base))
            for role, model in chosen.items():
                of_text[role] = _perplexity(program, mesh, model, inputs.text)
                _progress(f"{role}: loss of {len(inputs.text.examples)} texts")
        report = _report(arguments, inputs, answers, of_text, temperatures)
    lines = () if arguments.samples is None else _sample_lines(inputs, answers, temperatures)
    return report, "".join(lines)


def _mesh(arguments: argparse.Namespace) -> jax.sharding.Mesh:
    """Returns the mesh of the run if it fits this machine's devices, else a mesh that splits rows over them."""
    if arguments.run is not None:
        from jaxrlhf.config.reading import load_config

        try:
            return make_mesh(load_config(f"{arguments.run}/config.yaml").mesh)
        except UserError:  # a later load of the roles reports what is wrong with the folder
            pass
    return make_mesh(MeshConfig())


def _progress(text: str) -> None:
    print(printable(f"evaluate: {text}"), file=sys.stderr, flush=True)


# ---------------------------------------------------------------- metrics


def _perplexity(program: Program, mesh, model: Model, data: SFTData) -> Metrics:
    """Returns loss and perplexity of every text. Rows without a token only fill up a batch, and are left out."""
    parts = [fetch(program(*model, shard_batch(mesh, batch))) for batch in data.all_batches()]
    losses, tokens = (np.concatenate(part) for part in zip(*parts))
    return perplexity(losses[tokens > 0], tokens[tokens > 0]).named("text")


def _metrics(answers: Answers, inputs: Inputs, temperature: float | None) -> list[Metrics]:
    """Returns the metrics of a role's answers. Each metric has N rows. `temperature` calibrates probabilities."""
    found = []
    for name, values in answers.rows.items():
        abstained = abstained_rows(values)
        found.append(mean(name, np.ma.getdata(values), ~abstained))
        if abstained.any() and not name.startswith("environment/"):
            found.append(mean(f"{name}_abstained", abstained))
    found += [task(answers.texts) for task in inputs.tasks]
    if inputs.labels is not None:
        labelled = np.flatnonzero(inputs.labels >= 0)
        logprobs, labels = answers.logprobs[labelled], inputs.labels[labelled]
        for name, divisor in (("probability", 1.0), ("calibrated", temperature)):
            metrics = [] if divisor is None else label_probabilities(logprobs / divisor, labels)
            found += [one.of_some(labelled, len(inputs.labels)).named(name) for one in metrics]
    return found


def _wins(inputs: Inputs, answers: Answers, other: Answers) -> dict[str, Metrics]:
    """Returns the win rates of one role against another: by the reward, by the gold function and by the judge."""
    lengths = answers.rows["length/mean"], other.rows["length/mean"]
    found = {}
    for judge, name in (("reward", "reward/score"), ("gold", "reward/gold")):
        if name in answers.rows:
            scores, others = answers.rows[name], other.rows[name]
            either = abstained_rows(scores) | abstained_rows(others)  # then neither role wins
            wins = wins_by_score(np.ma.getdata(scores), np.ma.getdata(others))
            found[judge] = win_rate(np.where(either, 0.5, wins), *lengths)
    if inputs.judge is not None:
        forward, backward = (_judged(inputs, *pair) for pair in ((answers, other), (other, answers)))
        wins, agreed = wins_by_judge(forward, backward)
        found["judge"] = win_rate(wins, *lengths, agreed)
    return found


def _judged(inputs: Inputs, first: Answers, second: Answers) -> np.ndarray:
    """Returns the judge's choices f64[N] between the answers of two roles."""
    prompts, chosen = inputs.prompts, []
    for start in range(0, len(prompts), inputs.batch_size):
        some = slice(start, start + inputs.batch_size)
        texts = [list(pair) for pair in zip(first.texts[some], second.texts[some])]
        chosen.append(judged(inputs.judge, Pairs(prompts.texts[some], texts, prompts.columns[some])))
    return np.concatenate(chosen)


def _report(
    arguments: argparse.Namespace,
    inputs: Inputs,
    answers: dict[str, Answers],
    of_text: dict[str, Metrics],
    temperatures: dict[str, float],
) -> dict[str, Any]:
    """Returns all metrics with their intervals, and a description of the data that they were measured on."""
    bounds = functools.partial(
        intervals,
        resamples=arguments.resamples,
        confidence=arguments.confidence / 100,
        method=arguments.interval,
        seed=arguments.seed,
    )
    roles = list(answers or of_text)
    pairs = [(b, a) for a, b in itertools.combinations(roles, 2)]
    group = arguments.samples_per_prompt
    found: dict[str, list[list[Metrics]]] = {role: [] for role in roles}
    for role, own in answers.items():
        found[role].append(_of_prompts(_metrics(own, inputs, temperatures.get(role)), group))
    for role, metrics in of_text.items():
        found[role].append([metrics])
    by_role = {role: _bounded(bounds, groups) for role, groups in found.items()}
    differences = {
        f"{b} - {a}": _bounded(
            bounds, [_differences(*groups) for groups in zip(found[b], found[a])]
        )
        for b, a in pairs
    }
    wins = {(b, a): _wins(inputs, answers[b], answers[a]) for b, a in pairs} if answers else {}
    win_rates = {
        f"{b} against {a}": {judge: _bounded(bounds, [_of_prompts([one], group)]) for judge, one in by_judge.items()}
        for (b, a), by_judge in wins.items()
    }
    confusion = {
        role: next((table for task in inputs.tasks if (table := task.confusion(own.texts)) is not None), None)
        for role, own in answers.items()
    }
    return {
        "origin": arguments.run or arguments.model,
        "prompts": inputs.prompts and {"path": inputs.prompts.report.path, "rows": len(inputs.prompts) // group},
        "samples_per_prompt": group,
        "text": inputs.text and {"path": inputs.text_path, "rows": len(inputs.text.examples)},
        "sampling": {name: getattr(inputs.sampling, name) for name in SAMPLING},
        "choices": inputs.choices and list(inputs.choices),
        "temperatures": temperatures,
        "seed": arguments.seed,
        "interval": {name: getattr(arguments, name) for name in ("interval", "confidence", "resamples")},
        "roles": by_role,
        "differences": differences,
        "win_rates": win_rates,
        "confusion": {role: table for role, table in confusion.items() if table is not None},
    }


def _of_prompts(metrics: list[Metrics], group: int) -> list[Metrics]:
    """Returns the metrics with one row per prompt instead of one per sample: samples of one prompt are not independent.

    A prompt's row is the sum over its samples.
    """
    sums = (one.rows.reshape(-1, group, one.rows.shape[1]).sum(axis=1) for one in metrics)
    return [dataclasses.replace(one, rows=rows) for one, rows in zip(metrics, sums)]


def _differences(second: list[Metrics], first: list[Metrics]) -> list[Metrics]:
    """Returns the differences of the metrics that both roles have."""
    others = {metrics.names[0]: metrics for metrics in first}
    return [difference(metrics, others[metrics.names[0]]) for metrics in second if metrics.names[0] in others]


def _bounded(bounds, groups: list[list[Metrics]]) -> dict[str, dict[str, float | None]]:
    """Returns {"value", "low", "high"} of each metric by name; undefined numbers are None.

    All metrics of a group are measured on the same rows.
    """
    found: dict[str, dict[str, float | None]] = {}
    for metrics in groups:
        for by_name in bounds(metrics):
            for name, interval in by_name.items():
                values = dataclasses.asdict(interval)
                found[name] = {key: value if np.isfinite(value) else None for key, value in values.items()}
    return found


# ---------------------------------------------------------------- files


def check_files(arguments: argparse.Namespace) -> None:
    """Raises `UserError`, before anything is computed, if the folder of an output file does not exist."""
    for option, path in (("--json", arguments.json), ("--samples", arguments.samples)):
        if path not in (None, "-") and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            problem = "is a folder" if Path(path).is_dir() else f"there is no folder {Path(path).parent}"
            raise UserError(f"{option} {path}: {problem}; give a file in a folder that exists")


def write_files(files: Mapping[str, tuple[str, str]]) -> None:
    """Writes text files. `files` maps an option to (path, text).

    If a file cannot be written, the other files are still written, and then `Fault` is raised.
    """
    faults = []
    for option, (path, text) in files.items():
        try:
            atomic_write(path, text)
        except OSError as error:
            faults.append(f"{option} {path}: cannot be written: {error.strerror}")
    if faults:
        raise Fault("; ".join(faults))


def _sample_lines(
    inputs: Inputs, answers: dict[str, Answers], temperatures: dict[str, float]
) -> Iterator[str]:
    """Yields a line of JSON for each prompt. It has the completion of every role, and the completion's metrics.

    With choices it also has the probability of each choice, calibrated if there is a temperature.
    """
    for i, prompt in enumerate(inputs.prompts.texts if inputs.prompts is not None else ()):
        of_roles = {}
        for role, own in answers.items():
            values = {n: None if row[i] is np.ma.masked else float(row[i]) for n, row in own.rows.items()}
            of_roles[role] = {"completion": own.texts[i], **values}
            if own.logprobs is not None:
                found = softmax(own.logprobs[i] / temperatures.get(role, 1.0))
                of_roles[role]["probabilities"] = dict(zip(inputs.choices, found.tolist()))
        yield json.dumps({"prompt": prompt, "answers": of_roles}, ensure_ascii=True) + "\n"
