"""The parts of a captioner, told from the names of its parameters; imports nothing."""

from __future__ import annotations

from typing import Literal

Part = Literal["vision", "connector", "language"]


# The last three are BLIP-2's.
_CONNECTORS = (
    "connector",
    "projector",
    "merger",
    "qformer",
    "query_tokens",
    "language_projection",
)


def part_of(name: str) -> Part:
    """Which part of a captioner a parameter belongs to, from its name in the checkpoint."""
    if any(
        key in name for key in ("vision_model", "vision_tower", ".visual.blocks", "patch_embed")
    ):
        return "vision"
    if any(key in name for key in _CONNECTORS):
        return "connector"
    return "vision" if ".visual." in name else "language"
