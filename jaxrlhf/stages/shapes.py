"""Shapes of a run's arrays on its mesh: base, adapters, optimizers and batches. Allocates no memory."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.config import AdapterConfig, ModelConfig, RunConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.data import hub
from jaxrlhf.data.tokenizers import Tokenizer, build_word_tokenizer, load_tokenizer
from jaxrlhf.distributed.mesh import batch_sharding, replicated
from jaxrlhf.errors import UserError
from jaxrlhf.hf.families import read_config
from jaxrlhf.hf.folders import AUTO, DTYPES, PEFT_INFO, find_model
from jaxrlhf.hf.tensor_files import read_json
from jaxrlhf.models.adapters import init_adapter, target_paths
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.config import DecoderConfig, new_decoder_config
from jaxrlhf.models.decoder import Decoder, abstract_decoder
from jaxrlhf.models.layer_scan import wants_stacked_layers
from jaxrlhf.models.quantize import abstract_quantized
from jaxrlhf.models.sharding import tree_shardings
from jaxrlhf.models.target import Target, target_of
from jaxrlhf.records import Adapter
from jaxrlhf.stages.choices import load_choices, on_mesh
from jaxrlhf.steps.ppo import complete
from jaxrlhf.toy.builtin import vocabulary

_LAYER = re.compile(r"layers\.\d+\.")


def resolved(config: RunConfig) -> RunConfig:
    """Returns the settings with two derived values filled in: the base's dtype and the number of minibatches."""
    changes: dict[str, Any] = {"model": config.model.model_copy(update={"dtype": model_dtype(config.model)})}
    if (ppo := config.ppo) is not None:
        update = complete(ppo.update, ppo.batch_size * ppo.sampling.samples_per_prompt)
        changes["ppo"] = ppo.model_copy(update={"update": update})
    return config.model_copy(update=changes)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Makes the shapes of one run from its settings, mesh and decoder config."""

    config: RunConfig
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    model: DecoderConfig

    def with_layers(self, layers: int) -> "Shapes":
        """Returns the shapes of the same run on a model with `layers` layers.

        Whether programs loop over the layers depends on the size of the whole model, and does not change.
        """
        scans = wants_stacked_layers(self.base, self.mesh.shape)
        model = self.config.model.model_copy(update={"scan_layers": scans})
        config = self.config.model_copy(update={"model": model})
        return dataclasses.replace(self, config=config, model=dataclasses.replace(self.model, layers=layers))

    @functools.cached_property
    def base(self) -> Decoder:
        """Returns the frozen base as global shapes, each with its sharding over the mesh."""
        model = self.for_mesh(self.model, self.config.model.attention)
        abstract = abstract_decoder(model, model_dtype(self.config.model))
        kind = self.config.model.quantize
        return self.sharded(abstract if kind is None else abstract_quantized(abstract, kind))

    @functools.cached_property
    def choices(self) -> Choices | None:
        """Returns the choices of PPO's sampling: arrays on a mesh of devices, else shapes; None if there are none.

        The prompts are not read. So the choices have the tokens that they have after a short text.
        """
        sampling = self.config.ppo.sampling
        if sampling.choices is None:
            return None
        tokenizer = read_tokenizer(self.config.model).for_model(self.model.vocab_size, self.model.stop_tokens)
        model = dataclasses.replace(self.model, stop_tokens=tokenizer.stop_ids)
        choices = load_choices(sampling, model, tokenizer, ["a"], lambda text: None)
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            return jax.tree.map(lambda leaf: _shape(leaf, replicated(self.mesh)), choices)
        return on_mesh(choices, self.mesh)

    def adapter(self, config: AdapterConfig, head: Literal["value", "reward"] | None = None) -> Adapter:
        """Returns the shapes of an adapter on the base.

        Raises `UserError` if it targets modules that the model lacks.
        """
        if config.kind == "lora":
            target_paths(self.base, config)
        if self.model.layers == 1 or any(_LAYER.match(target) for target in config.target_modules):
            adapter = jax.eval_shape(lambda base: init_adapter(base, config, jax.random.key(0), head), self.base)
        else:  # all layers have the same shapes, and tracing the initialisation of every layer would take seconds
            first, layers = self.with_layers(1).adapter(config, head), range(self.model.layers)
            adapter = {_LAYER.sub(f"layers.{i}.", path): leaves for i in layers for path, leaves in first.items()}
        return self.sharded(adapter)

    def for_mesh(self, model: DecoderConfig, attention: str = "xla") -> DecoderConfig:
        """Returns the decoder config for the mesh's devices. An abstract mesh stands for GPUs."""
        settings = self.config.model
        own = {name: getattr(settings, name) for name in ("matmul_precision", "scan_layers", "decode_kernels")}
        abstract = isinstance(self.mesh, jax.sharding.AbstractMesh)
        target = Target("gpu", **own) if abstract else target_of(self.mesh, **own)
        return dataclasses.replace(model, target=dataclasses.replace(target, attention=attention))

    def sharded(self, tree: Any) -> Any:
        """Returns the tree's shapes with the shardings of `tree_shardings`."""
        return jax.tree.map(_shape, tree, tree_shardings(self.mesh, tree))

    def rows(self, tree: Any) -> Any:
        """Returns the tree's shapes with rows split over the mesh and scalars replicated."""
        by_rows, scalar = batch_sharding(self.mesh), replicated(self.mesh)
        return jax.tree.map(lambda leaf: _shape(leaf, by_rows if leaf.shape else scalar), tree)


def _shape(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def tokens(rows: int, length: int) -> jax.ShapeDtypeStruct:
    """i32[rows, length]."""
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def mask(rows: int, length: int) -> jax.ShapeDtypeStruct:
    """bool[rows, length]."""
    return jax.ShapeDtypeStruct((rows, length), jnp.bool_)


def numbers(*shape: int) -> jax.ShapeDtypeStruct:
    """f32[...]."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def read_model(config: ModelConfig) -> DecoderConfig:
    """Reads the decoder config of a run's model, without weights. Raises `UserError` if there is no such model."""
    if config.new is not None:
        tokenizer = build_word_tokenizer(*vocabulary(config.new.vocabulary))
        return new_decoder_config(config.new, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    if config.run is not None:
        folder = Path(config.run)
        if (folder / "roles" / "base").is_dir():
            return read_folder(str(folder / "roles" / "base"))
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{config.run}: not a run directory: it has no config.yaml")
        return read_model(load_config(folder / "config.yaml").model)
    return read_folder(config.path)


def read_tokenizer(config: ModelConfig) -> Tokenizer:
    """Loads the tokenizer of a run's model. Raises `UserError` if there is none."""
    if config.new is not None and config.tokenizer is None:
        return build_word_tokenizer(*vocabulary(config.new.vocabulary))
    if config.run is not None and config.tokenizer is None:
        base = Path(config.run) / "roles" / "base"
        if not base.is_dir():
            return read_tokenizer(load_config(Path(config.run) / "config.yaml").model)
        path = str(base)
    else:
        path = config.tokenizer or config.path
    if (tokenizer := load_tokenizer(path)) is None:
        raise UserError(f"{path}: has no tokenizer files, which ppo.sampling.choices need; give model.tokenizer")
    return tokenizer


def model_dtype(config: ModelConfig) -> str:
    """Returns the dtype in which a run loads the model: from the settings, else from `config.json`, else float32."""
    if config.dtype != AUTO or config.new is not None:
        return "float32" if config.dtype == AUTO else config.dtype
    if config.run is not None:
        folder = Path(config.run)
        own = load_config(folder / "config.yaml").model
        if own.dtype == AUTO and (folder / "roles" / "base").is_dir():
            return folder_dtype(str(folder / "roles" / "base"))
        return model_dtype(own)
    return folder_dtype(config.path)


def folder_dtype(path: str) -> str:
    """Returns the dtype in the `config.json` of a folder or hub id. If the file has none, this is float32."""
    document, _ = _read_document(path)
    inner = document.get("text_config")  # a multimodal model may name its dtype only in `text_config`
    sections = [document, inner] if isinstance(inner, dict) else [document]
    names = [section.get(key) for section in sections for key in ("dtype", "torch_dtype")]
    return next((name for name in names if name in DTYPES), "float32")


def read_folder(path: str) -> DecoderConfig:
    """Reads the decoder config of a folder or hub id."""
    document, file = _read_document(path)
    return read_config(document, str(file))


def _read_document(path: str) -> tuple[dict[str, Any], Path]:
    """Reads the `config.json` of a folder or hub id. Returns its content and its path. Downloads no other file."""
    folder = Path(path).expanduser()
    if (folder / PEFT_INFO).is_file():
        folder = find_model(folder)[0]
    file = folder / "config.json"
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        try:
            file = hub.download_file(path, "config.json")
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"{path}: no such folder, and the download from the hub failed: {reason}") from None
    if not file.is_file():
        raise UserError(f"{path}: no such folder with a config.json; give a model folder or a hub id")
    return read_json(file), file
