"""cuDNN's fused attention for whole sequences (`jax.nn.dot_product_attention`), and checks of cuDNN's limits.

cuDNN has these limits. The dtype is float16 or bfloat16. The head size is a multiple of 8 and at most 128; on Hopper
and newer GPUs it is at most 256. Lengths are even if a gradient is computed. There is no soft cap. Only rows and heads
may be split over devices. A mask must be given as a bias in the dtype of the queries. Decoding has one query per row
and uses XLA instead of cuDNN.

Every layer reads the bias [B,1,T,S]. In jax 0.10.2 cuDNN also writes the gradient of the bias, although nothing uses
this gradient. In jax 0.12 cuDNN does not write it. Rows without padding on their left need no bias: attention is then
causal and nothing else (`attend_fused_causal`). `models.scoring` aligns rows this way. Packed rows keep the bias.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, HEAD_AXES, constrain
from jaxrlhf.errors import UserError
from jaxrlhf.models.config import DecoderConfig

KEY_PATH = "model.attention"
_HEAD_STEP, _LARGEST_HEAD, _LARGEST_ON_HOPPER = 8, 128, 256


def attend_fused(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scale: float | None = None
) -> jax.Array:
    """Computes causal grouped-query attention [B,T,N,H] with cuDNN. The queries are in the last T of S slots.

    If a query sees no key, its outputs are arbitrary finite numbers. If T = S, cuDNN skips the blocks above the
    diagonal.
    """
    T, S = mask_BTS.shape[1:]
    odd_T, odd_S = T % 2, S % 2  # an unused last query and a masked last key make odd lengths even
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, odd_T), (0, 0), (0, 0)))
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, odd_S), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    mask_B1TS = jnp.pad(mask_BTS, ((0, 0), (0, odd_T), (0, odd_S)))[:, None]
    # cuDNN requires the same sharding for queries, keys and values. Length and head dimension must not be split.
    q_BTNH, k_BSKH, v_BSKH = (constrain(x, BATCH_AXES, None, HEAD_AXES, None) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=constrain(mask_B1TS, BATCH_AXES, None, None, None),
        scale=scale,
        is_causal=T == S,
        implementation="cudnn",
    )
    return out_BTNH[:, :T]


def attend_fused_causal(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, scale: float | None = None, window: int | None = None
) -> jax.Array:
    """Computes causal grouped-query attention [B,T,N,H] with cuDNN, without a bias. Each query sees all earlier slots.

    If `window` is given, a query sees only the last `window` slots up to its own.
    """
    T = q_BTNH.shape[1]
    even = ((0, 0), (0, T % 2), (0, 0), (0, 0))  # jax 0.10.2 refuses gradients of odd lengths
    qkv = (constrain(jnp.pad(x, even), BATCH_AXES, None, "tensor", None) for x in (q_BTNH, k_BTKH, v_BTKH))
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        *qkv, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )[:, :T]


def check_model(model: DecoderConfig, tensor: int) -> None:
    """Raises `UserError` if cuDNN cannot compute this model's attention with heads split over `tensor` devices."""
    if model.attention_softcap is not None:
        raise UserError(
            f"{KEY_PATH}: cudnn does not support a soft cap on attention, but this model has the soft cap "
            f"{model.attention_softcap:g}; use xla"
        )
    if model.head_dim % _HEAD_STEP or model.head_dim > _LARGEST_ON_HOPPER:
        raise UserError(
            f"{KEY_PATH}: for cudnn, head_dim must be a multiple of {_HEAD_STEP} and at most {_LARGEST_ON_HOPPER}, "
            f"but this model's head_dim is {model.head_dim}; use xla"
        )
    if model.heads % tensor or model.kv_heads % tensor:
        raise UserError(
            f"{KEY_PATH}: for cudnn, mesh.tensor must divide the number of query heads ({model.heads}) and of key "
            f"heads ({model.kv_heads}), but mesh.tensor is {tensor}; use xla, or change mesh.tensor"
        )


def check_device(model: DecoderConfig, dtype: jax.typing.DTypeLike) -> None:
    """Runs cuDNN attention and its gradient once. Raises `UserError` if this machine cannot run them for this model."""
    if jnp.dtype(dtype) == jnp.float32:
        raise UserError(f"{KEY_PATH}: cudnn does not support a float32 base; set model.dtype=bfloat16, or use xla")
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        kind = f"{device.platform} ({device.device_kind})"
        raise UserError(f"{KEY_PATH}: cudnn needs an NVIDIA GPU, but this machine has {kind}; use xla")
    capability = tuple(map(int, str(getattr(device, "compute_capability", "0")).split(".")))
    if model.head_dim > _LARGEST_HEAD and capability < (9, 0):
        raise UserError(
            f"{KEY_PATH}: for cudnn on {device.device_kind}, head_dim must be at most {_LARGEST_HEAD}, but this "
            f"model's head_dim is {model.head_dim}; use xla, or a GPU of compute capability 9.0 (Hopper) or newer"
        )
    q, k = (jnp.ones((1, 64, n, model.head_dim), dtype) for n in (model.heads, model.kv_heads))
    mask = jnp.ones((1, 64, 64), bool)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        both = attend_fused(q, k, k, mask), attend_fused_causal(q, k, k)
        return sum(x.astype(jnp.float32).sum() for x in both)

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(q, k))
    except Exception as error:  # jax, XLA and cuDNN raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{KEY_PATH}: cudnn does not work on this machine ({reason}); use xla") from None
