"""How large a model is, from the headers of its safetensors files alone. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from srppo.config import is_embedded
from srppo.world import base_path


def parameter_count(base: str) -> int | None:
    """Parameters of an embedded base or of a local folder, tied ones once; None for a hub name or without safetensors.

    The header of a safetensors file is 8 bytes of its length, little-endian, and JSON of each tensor's shape.
    """
    folder = base_path(base.partition(":")[2] or "s") if is_embedded(base) else Path(base).expanduser()
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            shapes |= {name: tuple(each["shape"]) for name, each in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # what is wrong with the model is said when it is loaded
    return sum(map(math.prod, shapes.values())) or None
