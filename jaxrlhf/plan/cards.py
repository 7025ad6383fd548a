"""Accelerators by name, with published peak rates and the memory that a run can use.

Peak rates are those without sparsity. Runs usually reach 60 to 80 percent of the peak arithmetic and 80 to 90 percent
of the peak bandwidth. `network` is the rate of the host's network adapters divided by the number of cards, in the
maker's reference system.
"""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

from jaxrlhf.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Card:
    """The memory of a card and its peak rates per second."""

    name: str
    memory: float  # bytes
    flops: float  # operations of bfloat16 matrix products
    flops32: float  # operations of float32 matrix products, computed as TF32
    bandwidth: float  # bytes read from and written to memory
    link: float  # bytes to other cards of the host, in one direction
    network: float  # bytes to other hosts, in one direction
    source: str


CARDS = {
    card.name: card
    for card in (
        Card("a100", 80 * 10**9, 312e12, 156e12, 2.039e12, 300e9, 25e9, "NVIDIA A100 80GB SXM datasheet; DGX A100"),
        Card("a100-40", 40 * 10**9, 312e12, 156e12, 1.555e12, 300e9, 25e9, "NVIDIA A100 40GB SXM datasheet; DGX A100"),
        Card("h100", 80 * 10**9, 989e12, 494e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM datasheet; DGX H100"),
        Card("h200", 141 * 10**9, 989e12, 494e12, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM datasheet; DGX H200"),
        Card("b200", 180 * 10**9, 2250e12, 1125e12, 8.0e12, 900e9, 50e9, "NVIDIA DGX B200 datasheet, an eighth of it"),
        Card("l40s", 48 * 10**9, 362e12, 183e12, 0.864e12, 32e9, 25e9, "NVIDIA L40S datasheet; PCIe 4.0 x16; 200 Gb/s"),
    )
}


def find_card(name: str) -> Card:
    """Returns the card with this name. For an unknown name, raises `UserError` with a list of the known names."""
    if (card := CARDS.get(name.lower())) is None:
        raise UserError(f"--card: must be one of {', '.join(CARDS)}, not {name!r}")
    return card


def target_file(card: Card) -> Path:
    """Returns the path of the file that describes the card to XLA's compiler."""
    return Path(__file__).parent / "targets" / f"{card.name}.txtpb"


def parse_memory(text: str) -> float:
    """Returns the bytes that a text such as 80GiB means. Raises `UserError` if the text is not an amount of memory."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *GiB", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--memory: must be an amount in GiB, such as 80GiB, not {text!r}")
    return float(match[1]) * GIB


def usable_share() -> float:
    """Returns the share of a card's memory that a run may fill.

    The environment variable `XLA_PYTHON_CLIENT_MEM_FRACTION` sets this share. The default is 0.9.
    """
    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise UserError(f"XLA_PYTHON_CLIENT_MEM_FRACTION: must be above 0 and at most 1, not {text!r}")
