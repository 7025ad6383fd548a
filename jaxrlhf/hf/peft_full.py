"""The tensors of a PEFT adapter that become full weights: saved modules, LoRA pairs on the embedding, and DoRA.

These are PEFT's rules. A module in `modules_to_save` is a copy. So if the embedding is trained, a head that is tied to
it keeps the old embedding. A tensor may also be saved next to the LoRA pairs, or as `base_layer`. This tensor replaces
the tensor of the base and all tensors that are tied to it. Full weights that equal the weights of the base are dropped.
"""

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
RESIZE = "if tokens were added or removed, merge the adapter with PEFT (merge_and_unload) and use the merged folder"


def module_of(base: Decoder, ours: str) -> str:
    """Returns the name in transformers of a module of the decoder. The module has a kernel or an embedding."""
    leaf = "embedding" if ours == EMBEDDING else "kernel"
    module = address_of(base.config, f"{ours}/{leaf}").tensor.removesuffix(".weight")
    return NEWER_NAMES.get(module, module)


def full_weights(
    base: Decoder,
    saved: dict[str, StoredTensor],
    embedding_pair: tuple[StoredTensor, StoredTensor] | None,
    head_pair: bool,
    config: PeftConfig,
    file: Path,
) -> Adapter:
    """Returns the full weights of an adapter in float32. They come from saved tensors and the embedding's LoRA pair.

    Removes the used tensors from `saved`. `head_pair` is True if the head has a LoRA pair. Raises `UserError` if the
    shape of a tensor differs from that of the base. Also raises `UserError` if `modules_to_save` lists embedding or
    head and its tensor is missing.
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
    """Adds the weights of embedding and head to the adapter. Weights that equal those of the base are not added."""
    tied = base.lm_head is None
    own = base.embed_tokens.embedding[...]
    D, V = base.config.hidden_size, base.config.vocab_size
    embedding, head = module_of(base, EMBEDDING), module_of(base, HEAD)
    tables: dict[str, jax.Array] = {}  # [V, D]
    for module in (embedding, head):
        if (tensor := saved.get(f"{module}.weight")) is not None:
            if tensor.shape != (V, D):
                raise UserError(
                    f"{tensor.file}: tensor {tensor.name} must have shape {[V, D]} for this base, not "
                    f"{list(tensor.shape)}; {RESIZE}"
                )
            tables[module] = jnp.asarray(np.array(tensor.view(), np.float32))
        elif config.saves(module):
            raise UserError(f"{file}: tensor {module}.weight is missing, but modules_to_save lists it")
    old_table = own  # the embedding before training; a tied head keeps it
    if tied:
        replaced = [table for module, table in tables.items() if not config.saves(module)]
        old_table = replaced[-1] if replaced else own
    table = tables.get(embedding, old_table)
    if pair is not None:
        rank = config.rank_of(embedding)
        for tensor, shape in zip(pair, ((rank, V), (D, rank))):
            tensor.check_shape(shape, "the adapter's rank and this base")
        a_RV, b_DR = (np.array(tensor.view(), np.float32) for tensor in pair)
        table = jnp.asarray(table, jnp.float32) + config.scale(embedding) * (b_DR @ a_RV).T
    if not _same(table, own):
        adapter[EMBEDDING] = {"embedding": jnp.asarray(table, jnp.float32)}
    kernel = tables.get(head, old_table if tied else None)  # None means the head of the base
    # If the head is tied and the adapter holds no kernel for it, `bind` uses the new embedding as the head. If the head
    # has a LoRA pair, `bind` uses the head of the base.
    default = (own if head_pair else table) if tied else base.head_kernel().T
    if kernel is not None and not _same(kernel, default):
        adapter[HEAD] = {"kernel": jnp.asarray(kernel, jnp.float32).T}


def folded_dora(
    base: Decoder, kernel: jax.Array | None, ours: str, pair: tuple[np.ndarray, np.ndarray], magnitude: np.ndarray,
    scale: float,
) -> dict[str, jax.Array]:
    """Returns the merged kernel of a DoRA layer (2402.09353). DoRA rescales the weights of each output.

    `magnitude` f32[out] is the new norm of the weights of each output. `pair` is (A [R, in], B [out, R]). If `kernel`
    is given, it replaces the kernel of the base.
    """
    a_RI, b_OR = pair
    if kernel is None:
        kernel = base.head_kernel() if ours == HEAD else find_module(base, ours).float32_kernel()
    moved = jnp.asarray(kernel, jnp.float32) + scale * (b_OR @ a_RI).T
    return {"kernel": moved * (magnitude / jnp.linalg.norm(moved, axis=0))}


def check_foldable(base: Decoder, file: Path) -> None:
    """Raises `UserError` if the base is quantised. DoRA cannot be merged into a quantised base."""
    if (kind := quantization(base)) is not None:
        raise UserError(
            f"{file}: use_dora changes full weights, but this base is quantised ({kind}); load the base without "
            "quantize"
        )


def _read(base: Decoder, tensor: StoredTensor, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Reads the saved tensor as the parameter `name`, f32[shape]."""
    address = address_of(base.config, name)
    tensor.check_shape(stored_shape(shape, base.config, address), "this base")
    return load_parameter(tensor, jax.ShapeDtypeStruct(shape, jnp.float32), base.config, address, None)


def _same(value: jax.Array, own: jax.Array) -> bool:
    """Returns True if a weight equals the weight `own` of the base, after rounding to the dtype of the base."""
    return value is own or bool(jnp.array_equal(jnp.asarray(value, own.dtype), own))


def beyond_peft(path: str, leaves: dict) -> bool:
    """Returns True if a module of an adapter has full weights that PEFT's format cannot hold."""
    if path in (SCORE, EMBEDDING):
        return False
    return ("lora_a" not in leaves and path != HEAD) or ("kernel" in leaves and "lora_a" in leaves)
