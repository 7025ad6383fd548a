"""Weight-only quantisation of a frozen base, to int8 or nf4.

The kernels of the linear layers in the blocks are quantised. Each kernel becomes an array of codes and an array of
scales. A code is a small integer that stands for a weight.

int8: a weight is its code times the scale of its output channel. This scale is the largest magnitude in the channel /
127 (2208.07339, section 2.1).
nf4: 4-bit NormalFloat (2305.14314, section 3). The weights of an output are split into blocks of 64 along the inputs.
A code selects one of 16 values. A weight is this value times the scale of its block. If the number of inputs is a
multiple of 64, the blocks are those of bitsandbytes. Otherwise the last block of each output is shorter. Two choices
differ from QLoRA. First, the scale need not be the block's largest magnitude (see `_nf4`). Second, k_proj and v_proj
are int8 in grouped-query attention, because these few weights are the most sensitive. On a small trained model the
relative error of the logits is 8.4%. The choices of QLoRA give 11%.

Embeddings, norms, biases and heads are not quantised. The forward pass dequantises the kernels layer by layer.

There are no integer matrix products: codes are first cast to the dtype of the activations. Activations are not
quantised. Codes and scales have no gradients. The library qwix also quantises, but qwix intercepts the calls of a
model, keeps one nf4 code per byte on a CPU, and needs dimensions that are multiples of the block.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, find_module, linear_shapes, named_parameters, shallow_copy
from jaxrlhf.models.linear import Linear, ambient_precision
from jaxrlhf.models.sharding import parameter_sharding

KINDS = ("int8", "nf4")
BLOCK = 64
# The 16 values of nf4 (2305.14314, appendix E): quantiles of the normal distribution, scaled to [-1, 1], and exact 0.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_NF4_BOUNDS = (NF4[1:] + NF4[:-1]) / 2
_CHUNK = 1 << 16  # number of weights that are quantised at a time; they must fit in a processor's cache


class QuantizedLinear(Linear):
    """A linear layer whose kernel is stored as codes and scales. Bias and LoRA pair are as in `Linear`.

    The codes are kernel_int8 i8[in, out], or kernel_nf4 u8[in / 2 rounded up, out]. A byte of kernel_nf4 holds two
    codes. The code of the even input is in the low four bits. The scales are kernel_scale f32[blocks, out]. int8 has
    one block.
    """

    def __init__(self, codes: jax.Array, scale: jax.Array, fan_in: int, bias: nnx.Param | None = None):
        self.kind = "int8" if codes.dtype == jnp.int8 else "nf4"
        self.fan_in = fan_in
        setattr(self, f"kernel_{self.kind}", nnx.Param(codes))
        self.kernel_scale = nnx.Param(scale)
        self.bias = nnx.data(bias)
        self.lora_a = self.lora_b = self.lora_scale = nnx.data(None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.fan_in, self.kernel_scale.shape[1]

    @property
    def can_merge(self) -> bool:
        return False

    def merges(self, rounded: bool) -> bool:
        return False

    def project(self, x: jax.Array) -> jax.Array:
        return _product(self.fan_in, ambient_precision(), x, *self._leaves())

    def float32_kernel(self) -> jax.Array:
        return dequantize(*self._leaves(), self.fan_in)

    def _leaves(self) -> tuple[jax.Array, jax.Array]:
        return getattr(self, f"kernel_{self.kind}")[...], self.kernel_scale[...]


# ---------------------------------------------------------------- one kernel


def quantize(kernel: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes, scales) of a kernel f32[in, out], in the layout of `QuantizedLinear`."""
    if kind == "int8":
        scale = np.abs(kernel).max(axis=0, keepdims=True) / np.float32(127)
        return np.clip(np.rint(kernel / _divisor(scale)), -127, 127).astype(np.int8), scale
    fan_in, fan_out = kernel.shape
    blocks = np.zeros((fan_out, -(-fan_in // BLOCK), BLOCK), np.float32)
    blocks.reshape(fan_out, -1)[:, :fan_in] = kernel.T
    largest = np.abs(blocks).max(axis=2)
    codes, scale = _nf4((blocks / _divisor(largest)[:, :, None]).reshape(-1, BLOCK))
    codes = codes.reshape(fan_out, -1).T[: fan_in + fan_in % 2]
    return codes[0::2] | codes[1::2] << 4, (scale.reshape(largest.shape) * largest).T


def _nf4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (codes u8[N, 64], scales f32[N, 1]) of N blocks of weights. The largest magnitude in a block must be 1.

    The function tries four scales for each block, and keeps the scale with the smallest squared error. The scales 1
    and -1 are tried because the 16 values are not symmetric. The weights are rounded to
    codes with each of these two scales. The other two scales are those that fit the two sets of codes best (least
    squares).
    """
    codes, scale = np.zeros(blocks.shape, np.uint8), np.ones_like(blocks[:, :1])
    least_error = np.full_like(scale, np.inf)
    for sign in (1, -1):
        candidate = np.full_like(scale, sign)
        for _ in range(2):
            normed, nearest = blocks / candidate, np.zeros(blocks.shape, np.uint8)
            for bound in _NF4_BOUNDS:
                nearest += normed > bound
            values = NF4[nearest]
            residual = values * candidate - blocks
            error = _row_dot(residual, residual)
            better = error < least_error
            codes, scale = np.where(better, nearest, codes), np.where(better, candidate, scale)
            least_error = np.minimum(error, least_error)
            candidate = _divisor(_row_dot(values, blocks) / _divisor(_row_dot(values, values)))
    return codes, scale


def _row_dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the dot product of row i of x and row i of y, for each i: f32[N, 1]."""
    return np.einsum("ij,ij->i", x, y)[:, None]


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Returns the scale with 1 in place of 0. So a block of zeros can be divided by its scale."""
    return np.where(scale == 0, np.float32(1), scale)


def dequantize(codes: jax.Array, scale: jax.Array, fan_in: int) -> jax.Array:
    """Returns the kernel f32[in, out] from its codes and scales."""
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * scale
    fan_out = codes.shape[1]
    pairs = jnp.stack([codes & 15, codes >> 4], axis=1).reshape(-1, fan_out)
    scales = jnp.broadcast_to(scale[:, None], (scale.shape[0], BLOCK, fan_out)).reshape(-1, fan_out)
    return jnp.asarray(NF4)[pairs[:fan_in]] * scales[:fan_in]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(fan_in: int, precision: str | None, x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x [..., in] @ the dequantised kernel, in the dtype of x. Codes and scales have no gradient.

    The dequantised kernels of all layers would take too much memory. Without the function `_after`, XLA would
    dequantise all kernels before the decode loop or at the start of the program. Without the custom gradient, autodiff
    would save all dequantised kernels for the backward pass. So a kernel is dequantised only after x is computed, and
    again in the backward pass.
    """
    return _matmul(fan_in, precision, x, _after(x, codes), scale)


def _forward(fan_in: int, precision: str | None, x: jax.Array, codes: jax.Array, scale: jax.Array):
    return _product(fan_in, precision, x, codes, scale), (codes, scale)


def _backward(fan_in: int, precision: str | None, kernel: tuple[jax.Array, jax.Array], gradient: jax.Array):
    codes, scale = kernel
    codes = _after(gradient, codes)
    x = jax.ShapeDtypeStruct((*gradient.shape[:-1], fan_in), gradient.dtype)
    return *jax.linear_transpose(lambda x: _matmul(fan_in, precision, x, codes, scale), x)(gradient), None, None


_product.defvjp(_forward, _backward)


def _after(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the codes with a data dependency on x, so that XLA cannot use the codes before x is computed."""

    def with_barrier(x: jax.Array, codes: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier((x, codes))[1]

    def with_zero(x: jax.Array, codes: jax.Array) -> jax.Array:
        return codes + _opaque_false(x).astype(codes.dtype)

    # On a CPU, XLA drops barriers before it schedules operations. A zero that depends on x works on every platform. But
    # if x is split over devices, the zero costs a collective operation.
    return jax.lax.platform_dependent(x, codes, cpu=with_zero, default=with_barrier)


@jax.custom_batching.custom_vmap
def _opaque_false(x: jax.Array) -> jax.Array:
    """Returns False, computed from x. XLA cannot know the result, and so cannot replace it by a constant."""
    first = x[(0,) * x.ndim]
    return first * first < -1


@_opaque_false.def_vmap
def _opaque_false_of_batch(_, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    return _opaque_false(x), False  # one value for the whole batch, so that the codes are not copied for each row


def _matmul(fan_in: int, precision: str | None, x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    if codes.dtype == jnp.int8:
        # Scaling the outputs is cheaper than scaling the weights. Sums are in float32, because codes are up to 127.
        y = jnp.matmul(x, codes.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        return (y * scale[0]).astype(x.dtype)
    return jnp.matmul(x, dequantize(codes, scale, fan_in).astype(x.dtype), precision=precision)


# ---------------------------------------------------------------- a model


def quantization(model: Decoder) -> str | None:
    """Returns the model's kind of quantisation, "int8" or "nf4". Returns None if the model is not quantised."""
    kinds = {name.rpartition("/kernel_")[2] for name in named_parameters(model)}
    return next((kind for kind in reversed(KINDS) if kind in kinds), None)


def kind_of(config: DecoderConfig, path: str, kind: str) -> str:
    """Returns the kind of quantisation of the layer at `path`. `kind` is the model's kind of quantisation."""
    grouped_kv = config.kv_heads < config.heads and path.endswith((".k_proj", ".v_proj"))
    return "int8" if grouped_kv else kind


def quantize_decoder(base: Decoder, kind: str) -> Decoder:
    """Returns a copy of the base with quantised linear layers. The copy shares all other weights. The base must be on
    one device.
    """

    def replace(path: str, linear: Linear) -> Linear:
        kernel = np.asarray(linear.kernel[...], np.float32)
        codes, scale = quantize(kernel, kind_of(base.config, path, kind))
        return QuantizedLinear(jnp.asarray(codes), jnp.asarray(scale), kernel.shape[0], linear.bias)

    return _with_layers(base, replace)


def dequantize_decoder(base: Decoder) -> Decoder:
    """Returns the base with dequantised kernels. If the base is not quantised, returns the base itself.

    The kernels get the dtype of the embedding.
    """
    if quantization(base) is None:
        return base
    dtype = base.embed_tokens.embedding.dtype

    def replace(path: str, linear: Linear) -> Linear:
        bias = None if linear.bias is None else linear.bias[...]
        return Linear(linear.float32_kernel().astype(dtype), bias)

    return _with_layers(base, replace)


def abstract_quantized(abstract: Decoder, kind: str) -> Decoder:
    """Returns the quantised form of a decoder of `jax.ShapeDtypeStruct`s. The result also holds shapes, no arrays."""

    def replace(path: str, linear: Linear) -> Linear:
        (fan_in, fan_out), blocks, codes = linear.shape, 1, jnp.zeros(linear.shape, jnp.int8)
        if kind_of(abstract.config, path, kind) == "nf4":
            blocks, codes = -(-fan_in // BLOCK), jnp.zeros((-(-fan_in // 2), fan_out), jnp.uint8)
        return QuantizedLinear(codes, jnp.zeros((blocks, fan_out)), fan_in, linear.bias)

    return jax.eval_shape(lambda model: _with_layers(model, replace), abstract)


def load_quantized(
    path: str,
    kind: str,
    shape: tuple[int, int],
    read: Callable[[slice], np.ndarray],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Quantises the kernel of the layer at `path`, and returns its codes and scales by leaf name.

    The arrays are placed on the mesh, or on the default device if `mesh` is None. `shape` is the kernel's shape
    (in, out). `read(columns)` returns some columns of the kernel, f32[in, columns]. A process reads only the columns
    that its devices keep. The process reads all rows of these columns, because a scale covers several rows.
    """

    @functools.cache
    def quantize_columns(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        step = max(_CHUNK // shape[0], 1)
        chunks = [slice(left, min(left + step, stop)) for left in range(start, stop, step)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            quantized = threads.map(lambda columns: quantize(read(columns), kind), chunks)
        return tuple(np.concatenate(pieces, axis=1) for pieces in zip(*quantized))

    rows = (shape[0], 1) if kind == "int8" else (-(-shape[0] // 2), -(-shape[0] // BLOCK))
    leaves = {}
    for which, leaf in enumerate((f"kernel_{kind}", "kernel_scale")):
        name = f"{path}/{leaf}"
        if mesh is None:
            leaves[name] = jnp.array(quantize_columns(0, shape[1])[which])
            continue

        def slice_of(index: tuple[slice, slice], which: int = which) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return quantize_columns(start, stop)[which][index[0]]

        leaf_shape = (rows[which], shape[1])
        leaves[name] = jax.make_array_from_callback(leaf_shape, parameter_sharding(mesh, name, leaf_shape), slice_of)
    return leaves


def _with_layers(model: Decoder, replace: Callable[[str, Linear], Linear]) -> Decoder:
    """Returns a copy of the model with `replace(path, layer)` for each linear layer. All other arrays are shared."""
    model = shallow_copy(model)
    for path in linear_shapes(model):
        parent_path, _, name = path.rpartition(".")
        parent: Any = find_module(model, parent_path)
        setattr(parent, name, replace(path, getattr(parent, name)))
    return model
