"""Stacks the weights of equal layers, so that a program runs the layers in a loop and compiles only one of them.

The time to compile a program then does not grow with the number of layers. The stacked weights are a second copy of
the layers of the base. The copy takes memory while the program runs. A rollout uses the stacked weights only in its
pass over prompts. In decode steps, a loop over layers inside the loop over tokens would copy each weight for each
token.

Layers may repeat with a period, for example if every second layer has a window. The loop then runs one period per step,
and the layers after the last whole period follow one by one. If the last layer is inside the loop, it computes all
positions of a sequence. Outside the loop, the last layer skips positions whose outputs are not needed. In a rollout's
pass over prompts these are all positions but one, so the last layer stays outside there.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrlhf.distributed.mesh import constrain
from jaxrlhf.models.adapters import has_only_pairs, stack_pairs
from jaxrlhf.models.decoder import Decoder, shallow_copy
from jaxrlhf.models.sharding import leaf_name, parameter_sharding
from jaxrlhf.records import Adapter

MOST_BYTES = 8 * 2**30  # size of the copy on each device, up to which `scan_layers: null` stacks the weights
STACKED = "stacked."  # start of the module paths of stacked layers
_LONGEST_PERIOD = 8


def with_stacked_layers(base: Decoder, *adapters: Adapter | None, last_apart: bool = False) -> tuple[Any, ...]:
    """Returns (base, *adapters) with stacked layers, if the target of the base asks for them, else the arguments.

    A base with stacked layers has the layers after the last whole period in `layers`, and the others in `stacked`. The
    arguments are returned unchanged if the loop would have one step, or if an adapter holds more than LoRA pairs and
    heads. `last_apart` keeps the last layer out of the loop. See `Target.scan_layers`.
    """
    wanted = wants_stacked_layers(base, jax.sharding.get_abstract_mesh().shape)
    period, steps = _period(list(base.layers)[: len(base.layers) - last_apart]) if wanted else (1, 1)
    if steps < 2 or not all(has_only_pairs(adapter or {}) for adapter in adapters):
        return base, *adapters
    model, blocks = shallow_copy(base), list(base.layers)
    groups = [blocks[first : period * steps : period] for first in range(period)]
    model.stacked = nnx.List([jax.tree_util.tree_map_with_path(_stacked, *group) for group in groups])
    model.layers = nnx.List(blocks[period * steps :])
    return model, *(None if adapter is None else stacked_adapter(model, adapter) for adapter in adapters)


def stacked_adapter(model: Decoder, adapter: Adapter) -> Adapter:
    """Returns the adapter for a base with stacked layers. A pair that a layer lacks is zero.

    Works for every tree with the structure of an adapter, such as a moment of the optimizer.
    """
    if model.stacked is None:
        return adapter
    result, groups = {}, {}
    for path, leaves in adapter.items():
        path, step = _place(model, path)
        if step is None:
            result[path] = leaves
        else:
            groups.setdefault(path, {})[step] = leaves
    steps = range(_steps(model))
    result |= {path: stack_pairs([by_step.get(i) for i in steps]) for path, by_step in groups.items()}
    return result


def unstacked_adapter(model: Decoder, stacked: Adapter, like: Adapter) -> Adapter:
    """Inverts `stacked_adapter`: returns the adapter whose stacked form is `stacked`, with the structure of `like`.

    The scales of LoRA pairs are those of `like`, because no step changes them. Slicing `stacked` would launch a kernel
    for each scale.
    """
    if model.stacked is None:
        return stacked
    result = {}
    for path, leaves in like.items():
        place, step = _place(model, path)
        pair = stacked[place]
        if step is not None:  # cut to the rank of this layer
            pair = {
                name: leaf if name == "lora_scale" else pair[name][(step, *map(slice, leaf.shape))]
                for name, leaf in leaves.items()
            }
        result[path] = pair
    return result


def _steps(model: Decoder) -> int:
    return jax.tree.leaves(model.stacked)[0].shape[0]


def _place(model: Decoder, path: str) -> tuple[str, int | None]:
    """Returns (module path in a base with stacked layers, step of the loop). The step is None outside the loop."""
    start, _, rest = path.partition(".")
    if start != "layers":
        return path, None
    layer, _, module = rest.partition(".")
    period, looped = len(model.stacked), len(model.stacked) * _steps(model)
    if int(layer) >= looped:
        return f"layers.{int(layer) - looped}.{module}", None
    return f"{STACKED}{int(layer) % period}.{module}", int(layer) // period


def wants_stacked_layers(base: Decoder, mesh: Mapping[str, int]) -> bool:
    """Returns whether layers are stacked. `mesh` has the sizes of the mesh axes.

    `Target.scan_layers` decides. If it is None, layers are stacked unless the platform is a CPU, or the copy takes more
    than `MOST_BYTES` on each device.
    """
    target = base.config.target
    if target.scan_layers is not None or target.platform == "cpu":
        return bool(target.scan_layers)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(base.layers))
    return size <= MOST_BYTES * mesh.get("fsdp", 1) * mesh.get("tensor", 1)


def _period(blocks: list[Any]) -> tuple[int, int]:
    """Returns (period, steps) of a loop over the first period * steps blocks.

    Blocks i and i + period differ only in their weights.
    """
    layers = len(blocks)
    forms = [(jax.tree.structure(b), [(x.shape, x.dtype) for x in jax.tree.leaves(b)]) for b in blocks]
    for period in range(1, min(_LONGEST_PERIOD, layers) + 1):
        steps = layers // period
        if all(forms[i] == forms[i % period] for i in range(period * steps)):
            return period, steps
    return 1, 1


def _stacked(path: Any, *leaves: jax.Array) -> jax.Array:
    """Returns the stacked leaves, sharded as each of them is."""
    stacked, mesh = jnp.stack(leaves), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return stacked
    return constrain(stacked, None, *parameter_sharding(mesh, leaf_name(path), leaves[0].shape).spec)
