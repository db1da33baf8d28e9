"""Whether the hub can be reached: without a route its libraries retry for up to a minute and print each try."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def offline_when_unreachable(*modules: Any) -> Iterator[None]:
    """Within, the libraries whose `modules` hold HF_HUB_OFFLINE go to the local cache at once if the hub is away."""
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before) and not reachable():
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def reachable() -> bool:
    """Whether the hub answers on its port; a proxy is given the benefit of the doubt, since it resolves names."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except (OSError, UnicodeError):
        return False
    return True
