"""What the backward pass of a layer keeps from its forward pass, and what it computes again: the setting `remat`."""

from collections.abc import Callable

import jax

PRODUCT, INPUT = "weight_product", "layer_input"  # names of the outputs of linear layers, and of a layer's input

# Value of the setting -> policy that saves activations of a layer. A layer's input is always kept: on the device, or in
# the host's memory with "offload". "dots" saves the outputs of linear layers by their name. jax's own policy for matrix
# products is not used, for two reasons. That policy does not see products inside custom gradients (merged and quantised
# products). That policy would save the output of a kernel and the output of its LoRA pair, and not their sum.
REMAT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialised(run: Callable, remat: str, static_argnums: int) -> Callable:
    """Returns `run` with the policy `REMAT[remat]`, or `run` itself if `remat` is "none"."""
    return run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat], static_argnums=static_argnums)
