"""The roles of a run on disk: base, SFT adapter, reward, policy, value, moving average; and which stages have finished.

    RUN/roles/base/          Hugging Face folder, where the run made or changed its base; else config's model
    RUN/roles/NAME/          adapter: sft, reward, policy, value, average
    RUN/roles/*/record.json  sizes and checksums of a role's files: a damaged one is not trained on
    RUN/roles/finished.json  what each finished stage reached
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrlhf.checkpoint.checksums import RECORD, Damaged, seal, unseal
from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.checkpoint.run_dir import begun_at
from jaxrlhf.config import ModelConfig, RunConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.sources import one_line
from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import load_adapter, save_adapter
from jaxrlhf.hf.folders import AUTO
from jaxrlhf.hf.weights import load_pretrained, save_pretrained, with_tokenizer
from jaxrlhf.models.config import new_decoder_config
from jaxrlhf.models.decoder import Decoder, with_target
from jaxrlhf.models.quantize import quantization
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Adapter
from jaxrlhf.stages.keys import key_for

ADAPTERS = ("sft", "reward", "policy", "value", "average")


@dataclasses.dataclass
class Roles:
    """The base and what has been trained on it so far."""

    base: Decoder
    tokenizer: Tokenizer
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)  # by name in ADAPTERS

    @property
    def reference(self) -> Adapter | None:
        """What the policy is when PPO begins: the SFT adapter, or the base itself."""
        return self.adapters.get("sft")


def load_roles(config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Roles:
    """The roles as a run with this config finds them: its own where it has left any, else its model's."""
    folder = Path(config.run_dir) / "roles"
    _check_seals(folder)
    inherited: dict[str, Adapter] = {}
    kept = (config.model.dtype, mesh, config.model.quantize)
    if (folder / "base").is_dir():
        base, tokenizer = load_pretrained(str(folder / "base"), *kept)
    elif config.model.run is not None:
        origin = load_run(config.model.run, _given(config.model.dtype), *kept[1:])
        base, tokenizer = origin.base, origin.tokenizer
        inherited = {name: origin.adapters[name] for name in ("sft", "reward") if name in origin.adapters}
    elif config.model.path is not None:
        base, tokenizer = load_pretrained(config.model.path, *kept)
    else:
        base, tokenizer = _new_model(config)
    other = config.model.tokenizer is not None
    if other:
        tokenizer = load_tokenizer(config.model.tokenizer)
    if tokenizer is None:
        raise UserError(f"model.tokenizer: {_origin(config.model)} has no tokenizer files; name a folder that has")
    # Added tokens that the model has no row for are refused where a text spells one out.
    if tokenizer.text_size > base.config.vocab_size:
        raise UserError(
            f"model.tokenizer: {tokenizer.text_size} tokens, but the model's vocabulary is {base.config.vocab_size}"
        )
    if other:
        base, tokenizer = with_tokenizer(base, tokenizer)
    base = with_target(base, target_of(mesh, config.model.matmul_precision))
    own = {name: load_adapter(str(folder / name), base) for name in ADAPTERS if (folder / name).is_dir()}
    return Roles(base, tokenizer, inherited | own)


def check_none_gone(config: RunConfig) -> None:
    """`UserError` where a role that this run saved is gone: continuing would silently make a different one."""
    folder = Path(config.run_dir) / "roles"
    left_by = {"sft": "base" if config.sft_trains_base else "sft", "reward_model": "reward", "ppo": "policy"}
    wanted = {left_by[stage]: f"the stage {stage} has left it" for stage in finished_stages(config.run_dir)}
    if config.model.new is not None and (folder.parent / "checkpoints").is_dir():
        wanted.setdefault("base", "the run has made it")
    for name, why in wanted.items():
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: is gone, and {why}; restore it from a copy, or give another run_dir")


def _check_seals(folder: Path) -> None:
    """`UserError` where a role is not as it was written."""
    for name in ("base", *ADAPTERS):
        if not (folder / name / RECORD).is_file():
            continue  # nothing is there, or a kill came before the record
        try:
            unseal(folder / name, jax.process_index(), jax.process_count())
        except (Damaged, OSError) as error:
            what = error if isinstance(error, Damaged) else f"cannot be read: {one_line(error)}"
            raise UserError(f"{folder / name}: {what}; restore it from a copy, or give another run_dir") from None


@contextlib.contextmanager
def _sealed(folder: Path) -> Iterator[None]:
    """What the block writes there is put under seal, so that damage is found before it is trained on."""
    writes = jax.process_index() == 0
    if writes:
        (folder / RECORD).unlink(missing_ok=True)
    yield
    if writes:
        seal(folder, {})


def load_origin(config: RunConfig) -> Decoder:
    """The base that a run began with, before any stage of its own."""
    kept = (config.model.dtype, None, config.model.quantize)
    if config.model.run is not None:
        base = load_run(config.model.run, _given(config.model.dtype), *kept[1:]).base
    elif config.model.path is not None:
        base = load_pretrained(config.model.path, *kept)[0]
    else:
        base = _new_model(config)[0]
    return with_target(base, target_of(None, config.model.matmul_precision))


def load_run(
    run_dir: str, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None, quantize: str | None = None
) -> Roles:
    """The roles that a run has left, in its own dtype and quantisation where none are given.

    UserError where `run_dir` is no run or has finished no stage.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run directory: it has no config.yaml")
    config = load_config(path).model_copy(update={"run_dir": run_dir})
    if not finished_stages(run_dir):
        raise UserError(f"{run_dir}: no stage of this run has finished yet")
    given = {name: value for name, value in (("dtype", dtype), ("quantize", quantize)) if value is not None}
    config = config.model_copy(update={"model": config.model.model_copy(update=given)})
    roles = load_roles(config, mesh)
    roles.tokenizer.chats.time = begun_at(run_dir)  # prompts as the run had them
    return roles


def save_base(run_dir: str, base: Decoder, tokenizer: Tokenizer) -> None:
    """Writes the run's own base; UserError where it is quantised: codes are no weights to go on from."""
    if (kind := quantization(base)) is not None:
        raise UserError(f"model.quantize: a base in {kind} codes is not saved as a run's own; leave quantize out")
    folder = Path(run_dir) / "roles" / "base"
    with _sealed(folder):
        save_pretrained(str(folder), base, tokenizer=tokenizer)


def save_role(run_dir: str, name: str, adapter: Adapter) -> None:
    """Writes an adapter of the run."""
    folder = Path(run_dir) / "roles" / name
    with _sealed(folder):
        save_adapter(str(folder), adapter)


def finished_stages(run_dir: str) -> dict[str, dict]:
    """What each finished stage reached, by stage."""
    path = Path(run_dir) / "roles" / "finished.json"
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}; restore it, or give another run_dir") from None
    if not isinstance(stages, dict):
        raise UserError(f"{path}: must hold an object with the finished stages; restore it, or give another run_dir")
    return stages


def mark_finished(run_dir: str, stage: str, reached: dict) -> None:
    """Notes that a stage has finished; its roles must have been written before."""
    if jax.process_index():
        return  # one process writes
    stages = finished_stages(run_dir) | {stage: reached}
    atomic_write(Path(run_dir) / "roles" / "finished.json", json.dumps(stages, indent=1) + "\n")


def mark_unfinished(run_dir: str, stage: str) -> None:
    """Notes that a stage goes on; what it reached is forgotten."""
    stages = {name: reached for name, reached in finished_stages(run_dir).items() if name != stage}
    atomic_write(Path(run_dir) / "roles" / "finished.json", json.dumps(stages, indent=1) + "\n")


def _given(dtype: str) -> str | None:
    """The dtype that the settings name; None where they leave it to what is loaded."""
    return None if dtype == AUTO else dtype


def _origin(model: ModelConfig) -> str:
    return model.tokenizer or model.path or model.run or "the new model"


def _new_model(config: RunConfig) -> tuple[Decoder, Tokenizer]:
    """A decoder of random weights, and the tokenizer of its vocabulary's words."""
    from jaxrlhf.toy.world import VOCABULARY

    tokenizer = build_word_tokenizer(VOCABULARY)
    shape = new_decoder_config(config.model.new, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    dtype = jnp.dtype(_given(config.model.dtype) or "float32")
    return Decoder(shape, key_for(config.seed, "model", 0, "weights"), dtype), tokenizer
