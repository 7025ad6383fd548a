"""What of a PEFT adapter becomes whole weights of ours: saved modules, pairs of the embedding, and DoRA.

PEFT's rules. A module in `modules_to_save` is a copy: a head that is tied to a trained embedding stays what the
embedding was. A tensor that is saved beside the pairs, or as `base_layer`, replaces the base's own, and what is tied
to it. Whole weights that equal the base's are left out.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.hf.decoder_tensors import load_parameter, stored_shape
from jaxrlhf.hf.families import address_of
from jaxrlhf.hf.peft_config import NEWER_NAMES, PeftConfig
from jaxrlhf.hf.tensor_files import StoredTensor
from jaxrlhf.models.adapters import HEAD, SCORE
from jaxrlhf.models.decoder import Decoder, abstract_decoder, find_module, named_parameters
from jaxrlhf.models.quantize import quantization
from jaxrlhf.records import Adapter

EMBEDDING = "embed_tokens"
RESIZE = "tokens were added or removed; merge it with PEFT (merge_and_unload) and use that folder as the model"


def module_of(base: Decoder, ours: str) -> str:
    """transformers' name of a module of ours that has one kernel or embedding."""
    leaf = "embedding" if ours == EMBEDDING else "kernel"
    module = address_of(base.config, f"{ours}/{leaf}").tensor.removesuffix(".weight")
    return NEWER_NAMES.get(module, module)


def whole_weights(
    base: Decoder,
    saved: dict[str, StoredTensor],
    embedding_pair: tuple[StoredTensor, StoredTensor] | None,
    head_pair: bool,
    config: PeftConfig,
    file: Path,
) -> Adapter:
    """The leaves of saved tensors, by the checkpoint's names, and of a pair on the embedding; float32.

    Takes what it uses out of `saved`; `head_pair` says whether the head has a pair. Raises `UserError` for a tensor of
    another shape than the base's, and for an absent embedding or head that `modules_to_save` names.
    """
    adapter: Adapter = {}
    abstract = named_parameters(abstract_decoder(base.config))
    values = named_parameters(base)
    apart = [f"{EMBEDDING}/embedding", f"{HEAD}/kernel"]
    for name, leaf in abstract.items():
        where = address_of(base.config, name)
        if name in apart or where.tensor not in saved:
            continue
        value = _read(base, saved[where.tensor], name, leaf.shape)
        if name not in values or not _same(value, values[name]):
            path, _, part = name.partition("/")
            adapter.setdefault(path, {})[part] = value
    _embedding_and_head(adapter, base, saved, embedding_pair, head_pair, config, file)
    for tensor in (*(address_of(base.config, name).tensor for name in abstract), f"{module_of(base, HEAD)}.weight"):
        saved.pop(tensor, None)
    return adapter


def _embedding_and_head(
    adapter: Adapter, base: Decoder, saved: dict, pair, head_pair: bool, config: PeftConfig, file: Path
) -> None:
    """Adds the leaves of embedding and head, where they are not the base's."""
    tied = base.lm_head is None
    own = base.embed_tokens.embedding[...]
    D, V = base.config.hidden_size, base.config.vocab_size
    embedding, head = module_of(base, EMBEDDING), module_of(base, HEAD)
    tables: dict[str, jax.Array] = {}  # [V, D]
    for module in (embedding, head):
        if (tensor := saved.get(f"{module}.weight")) is not None:
            if tensor.shape != (V, D):
                raise UserError(
                    f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, the base's has "
                    f"{[V, D]}: {RESIZE}"
                )
            tables[module] = jnp.asarray(np.array(tensor.view(), np.float32))
        elif config.saves(module):
            raise UserError(f"{file}: tensor {module}.weight is missing, which modules_to_save calls for")
    before = own  # what the head is where it is tied
    if tied:
        replaced = [table for module, table in tables.items() if not config.saves(module)]
        before = replaced[-1] if replaced else own
    table = tables.get(embedding, before)
    if pair is not None:
        a_RV, b_DR = (np.array(tensor.view(), np.float32) for tensor in pair)
        rank = config.rank_of(embedding)
        for tensor, shape in zip(pair, ((rank, V), (D, rank))):
            if tensor.shape != shape:
                found = list(tensor.shape)
                raise UserError(f"{tensor.file}: tensor {tensor.name} has shape {found}, not {list(shape)}")
        table = jnp.asarray(table, jnp.float32) + config.scale(embedding) * (b_DR @ a_RV).T
    if not _same(table, own):
        adapter[EMBEDDING] = {"embedding": jnp.asarray(table, jnp.float32)}
    kernel = tables.get(head, before if tied else None)  # None: the base's own
    # A head without leaves is the embedding where it is tied; one with a pair alone is what the base's embedding was.
    alone = (own if head_pair else table) if tied else base.head_kernel().T
    if kernel is not None and not _same(kernel, alone):
        adapter[HEAD] = {"kernel": jnp.asarray(kernel, jnp.float32).T}


def folded_dora(
    base: Decoder, kernel: jax.Array | None, ours: str, pair: tuple[np.ndarray, np.ndarray], magnitude: np.ndarray,
    scale: float,
) -> dict[str, jax.Array]:
    """The kernel of a DoRA layer (2402.09353): each output's weights, pair included, have the length `magnitude` says.

    pair is (A [R, in], B [out, R]), magnitude f32[out]; `kernel` is what the base's is replaced by, None: nothing.
    """
    a_RI, b_OR = pair
    if kernel is None:
        kernel = base.head_kernel() if ours == HEAD else find_module(base, ours).float32_kernel()
    moved = jnp.asarray(kernel, jnp.float32) + scale * (b_OR @ a_RI).T
    return {"kernel": moved * (magnitude / jnp.linalg.norm(moved, axis=0))}


def check_foldable(base: Decoder, file: Path) -> None:
    """`UserError` where the base is codes, into which nothing is folded."""
    if (kind := quantization(base)) is not None:
        raise UserError(f"{file}: use_dora changes whole weights, and this base is in {kind} codes; leave quantize out")


def _read(base: Decoder, tensor: StoredTensor, name: str, shape: tuple[int, ...]) -> jax.Array:
    where = address_of(base.config, name)
    if math.prod(tensor.shape) == 0 or tensor.shape != stored_shape(shape, base.config, where):
        wanted = list(stored_shape(shape, base.config, where))
        raise UserError(f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}; this base wants {wanted}")
    return load_parameter(tensor, jax.ShapeDtypeStruct(shape, jnp.float32), base.config, where, None)


def _same(value: jax.Array, own: jax.Array) -> bool:
    """Whether a weight is the base's, as far as the base's dtype can tell."""
    return value is own or bool(jnp.array_equal(jnp.asarray(value, own.dtype), own))


def beyond_peft(path: str, leaves: dict) -> bool:
    """Whether a module of an adapter has whole weights, and so no place in PEFT's format as we write it."""
    if path in (SCORE, EMBEDDING):
        return False
    return ("lora_a" not in leaves and path != HEAD) or ("kernel" in leaves and "lora_a" in leaves)
