"""The roles of a run in memory and on disk, and the list of its finished stages.

    RUN/roles/base/          Hugging Face folder, if the run made or changed its base; else the config's model
    RUN/roles/NAME/          adapter: sft, reward, policy, value, average
    RUN/roles/*/record.json  sizes and checksums of a role's files, checked on loading
    RUN/roles/finished.json  final metrics of each finished stage
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrlhf.checkpoint.checkpoints import stored_arrays, stored_best, stored_steps
from jaxrlhf.checkpoint.checksums import RECORD, Damaged, seal, unseal
from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.checkpoint.run_dir import started_at
from jaxrlhf.config import PPOConfig, RunConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError, one_line, short
from jaxrlhf.hf.adapter_files import check_leaves, kind_of, load_adapter, nested, save_adapter
from jaxrlhf.hf.folders import AUTO
from jaxrlhf.hf.weights import load_pretrained, save_pretrained, with_tokenizer
from jaxrlhf.models.adapters import merge
from jaxrlhf.models.config import new_decoder_config
from jaxrlhf.models.decoder import Decoder, with_target
from jaxrlhf.models.quantize import quantization
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Adapter
from jaxrlhf.stages.keys import key_for
from jaxrlhf.stages.sizes import check_new_model

ADAPTERS = ("sft", "reward", "policy", "value", "average")


@dataclasses.dataclass
class Roles:
    """The base, its tokenizer, and the adapters that were trained on this base so far."""

    base: Decoder
    tokenizer: Tokenizer
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)  # by name in ADAPTERS
    checkpoint: tuple[str, int] | None = None  # (stage, step) if that stage's roles come from a checkpoint

    @property
    def reference(self) -> Adapter | None:
        """Returns the SFT adapter, or None if the base is the reference."""
        return self.adapters.get("sft")


def load_roles(config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Roles:
    """Loads the roles of a run: the roles that the run has saved, or else the roles of its model."""
    folder = Path(config.run_dir) / "roles"
    _check_seals(folder)
    model, inherited = config.model, {}
    if (folder / "base").is_dir():
        base, tokenizer = load_pretrained(str(folder / "base"), model.dtype, mesh, model.quantize)
    else:
        base, tokenizer, inherited = _load_model(config, mesh)
    if model.tokenizer is not None:
        tokenizer = load_tokenizer(model.tokenizer)
    if tokenizer is None:
        origin = model.path or model.run or folder
        raise UserError(f"model.tokenizer: {origin} has no tokenizer files; give a folder that has tokenizer files")
    # Added tokens without a row in the model are allowed here; a text that contains one is refused later.
    if tokenizer.text_size > base.config.vocab_size:
        raise UserError(
            f"model.tokenizer: the tokenizer has {tokenizer.text_size} tokens, but the model's vocabulary has only "
            f"{base.config.vocab_size}"
        )
    if model.tokenizer is not None:
        base, tokenizer = with_tokenizer(base, tokenizer)
    base = with_target(base, target_of(mesh, model.matmul_precision, model.scan_layers, model.decode_kernels))
    own = {name: load_adapter(str(folder / name), base) for name in ADAPTERS if (folder / name).is_dir()}
    return Roles(base, tokenizer, inherited | own)


def check_none_missing(config: RunConfig) -> None:
    """Raises `UserError` if a saved role of the run is missing.

    Otherwise a resumed run would silently make a new one.
    """
    folder = Path(config.run_dir) / "roles"
    role_of = {"sft": "base" if config.sft_trains_base else "sft", "reward_model": "reward", "ppo": "policy"}
    expected = {role_of[stage]: f"the stage {stage} saved it" for stage in finished_stages(config.run_dir)}
    if config.model.new is not None and (folder.parent / "checkpoints").is_dir():
        expected.setdefault("base", "the run made it")
    for name, why in expected.items():
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: is missing, but {why}; restore it from a copy, or give another run_dir")


def _check_seals(folder: Path) -> None:
    """Raises `UserError` if the files of a role have changed since they were written."""
    for name in ("base", *ADAPTERS):
        if not (folder / name / RECORD).is_file():
            continue  # there is no such role, or the run was killed before it wrote the record
        try:
            unseal(folder / name, jax.process_index(), jax.process_count())
        except (Damaged, OSError) as error:
            problem = error if isinstance(error, Damaged) else f"cannot be read: {one_line(error)}"
            raise UserError(f"{folder / name}: {problem}; restore it from a copy, or give another run_dir") from None


@contextlib.contextmanager
def _sealed(folder: Path) -> Iterator[None]:
    """Records checksums of the files that the `with` block writes to `folder`, so that loading finds damaged files."""
    writes = jax.process_index() == 0
    if writes:
        (folder / RECORD).unlink(missing_ok=True)
    yield
    if writes:
        seal(folder, {})


def load_origin(config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """Loads the base from which the run started. The run's own stages have not changed this base."""
    model = config.model
    target = target_of(mesh, model.matmul_precision, model.scan_layers, model.decode_kernels)
    return with_target(_load_model(config, mesh)[0], target)


def load_run(
    run_dir: str,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
    step: str | None = None,
) -> Roles:
    """Loads the roles that a run has saved. `dtype` and `quantize` default to the settings of the run.

    If `step` is "latest", "best" or a number, the roles of the unfinished stage come from that checkpoint. Raises
    `UserError` if `run_dir` is not a run directory, if it has no such checkpoint, or if `step` is None and no stage has
    finished.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run directory: it has no config.yaml")
    config = load_config(path).model_copy(update={"run_dir": run_dir})
    if step is None and not finished_stages(run_dir):
        saved = any(stored_steps(_checkpoints(config, stage)) for stage in config.stages)
        remedy = "give --step latest to generate or export from its last checkpoint" if saved else "give another run"
        raise UserError(f"{run_dir}: no stage of this run has finished; continue this run, or {remedy}")
    if step is not None:
        find_checkpoint(config, step)  # first, so that an error comes before weights are read
        check_none_missing(config)
    changes = {name: value for name, value in (("dtype", dtype), ("quantize", quantize)) if value is not None}
    config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    roles = load_roles(config, mesh)
    roles.tokenizer.chats.time = started_at(run_dir)  # dates in prompts are the same as in the run
    # The checkpoint is looked up again: a run that is still training may have replaced the first one.
    return roles if step is None else _at_checkpoint(roles, config, *find_checkpoint(config, step))


def find_checkpoint(config: RunConfig, step: str) -> tuple[str, int]:
    """Returns (stage, step) of a checkpoint. The stage is the last stage that has checkpoints.

    `step` is "latest", "best" or a number. Raises `UserError` if there is no such checkpoint.
    """
    for stage in reversed(config.stages):
        if steps := stored_steps(_checkpoints(config, stage)):
            break
    else:
        raise UserError(f"--step {short(step)}: {config.run_dir} has no checkpoint")
    earlier = ["..."] if len(steps) > 10 else []
    there = f"the stage {stage} has checkpoints of steps {', '.join([*earlier, *map(str, steps[-10:])])}"
    if step == "latest":
        return stage, steps[-1]
    if step == "best":
        metric, lowest = config.checkpoints.best, config.checkpoints.best_is == "lowest"
        if metric is None:
            raise UserError(f"--step best: checkpoints.best of this run names no metric; {there}")
        if (best := stored_best(_checkpoints(config, stage), metric, lowest)) is None:
            raise UserError(f"--step best: no checkpoint was saved as the best by {metric}; {there}")
        return stage, best
    for number in steps:
        if step == str(number):
            return stage, number
    raise UserError(f"--step {short(step)}: must be latest, best or the number of a saved step; {there}")


def _checkpoints(config: RunConfig, stage: str) -> Path:
    return Path(config.run_dir) / "checkpoints" / stage


def _at_checkpoint(roles: Roles, config: RunConfig, stage: str, step: int) -> Roles:
    """Returns the roles. The roles that `stage` trains come from its checkpoint of `step`."""
    folder = _checkpoints(config, stage)

    def adapter(above: str) -> Adapter:
        leaves = stored_arrays(folder, step, above)
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        if leaves:  # empty if the run has no value model or no average
            check_leaves(shapes, kind_of(shapes), roles.base, folder / str(step))
        return nested(leaves)

    if stage == "ppo":
        update = config.ppo.update
        own = ppo_adapters(adapter("ppo/policy"), adapter("ppo/value"), adapter("ppo/average"), update)
    elif stage == "sft" and config.sft_trains_base:
        return Roles(merge(roles.base, adapter("adapter")), roles.tokenizer, checkpoint=(stage, step))
    else:
        own = {"sft" if stage == "sft" else "reward": adapter("adapter")}
    return Roles(roles.base, roles.tokenizer, roles.adapters | own, (stage, step))


def ppo_adapters(policy: Adapter, value: Adapter, average: Adapter, update: PPOConfig) -> dict[str, Adapter]:
    """Returns the adapters that ppo saves, by role. `value` and `average` may be empty.

    If the value model is a head on the policy's trunk, the trunk is saved with this head.
    """
    trained = {"policy": policy}
    if value:
        trained["value"] = {**policy, **value} if update.value_trunk == "policy" else value
    return trained | ({"average": average} if average else {})


def save_base(run_dir: str, base: Decoder, tokenizer: Tokenizer) -> None:
    """Writes the run's own base. Raises `UserError` if the base is quantised."""
    if (kind := quantization(base)) is not None:
        raise UserError(
            f"model.quantize: a base quantised to {kind} cannot be saved as the run's own base; leave quantize out"
        )
    folder = Path(run_dir) / "roles" / "base"
    with _sealed(folder):
        save_pretrained(str(folder), base, tokenizer=tokenizer)


def save_role(run_dir: str, name: str, adapter: Adapter) -> None:
    """Writes an adapter of the run."""
    folder = Path(run_dir) / "roles" / name
    with _sealed(folder):
        save_adapter(str(folder), adapter)


def finished_stages(run_dir: str) -> dict[str, dict]:
    """Returns stage -> final metrics, for each finished stage."""
    path = Path(run_dir) / "roles" / "finished.json"
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}; restore it, or give another run_dir") from None
    if not isinstance(stages, dict):
        raise UserError(
            f"{path}: must contain a JSON object of finished stages; restore the file, or give another run_dir"
        )
    return stages


def mark_finished(run_dir: str, stage: str, reached: dict) -> None:
    """Process 0 records that a stage has finished, with its final metrics.

    The roles of the stage must already be saved.
    """
    if jax.process_index() == 0:
        _write_finished(run_dir, finished_stages(run_dir) | {stage: reached})


def mark_unfinished(run_dir: str, stage: str) -> None:
    """Removes a stage from the finished stages."""
    stages = finished_stages(run_dir)
    stages.pop(stage, None)
    _write_finished(run_dir, stages)


def _write_finished(run_dir: str, stages: dict[str, dict]) -> None:
    atomic_write(Path(run_dir) / "roles" / "finished.json", json.dumps(stages, indent=1) + "\n")


def _load_model(
    config: RunConfig, mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, Tokenizer | None, dict[str, Adapter]]:
    """Loads the model that the settings name. Returns (base, tokenizer, adapters inherited from another run)."""
    model = config.model
    if model.run is not None:
        origin = load_run(model.run, None if model.dtype == AUTO else model.dtype, mesh, model.quantize)
        adapters = {name: origin.adapters[name] for name in ("sft", "reward") if name in origin.adapters}
        return origin.base, origin.tokenizer, adapters
    if model.path is not None:
        return *load_pretrained(model.path, model.dtype, mesh, model.quantize), {}
    from jaxrlhf.toy.builtin import vocabulary

    tokenizer = build_word_tokenizer(*vocabulary(model.new.vocabulary))
    dtype = jnp.dtype("float32" if model.dtype == AUTO else model.dtype)
    check_new_model(model.new, tokenizer.vocab_size, dtype.itemsize, mesh)
    shape = new_decoder_config(model.new, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    return Decoder(shape, key_for(config.seed, "model", 0, "weights"), dtype), tokenizer, {}
