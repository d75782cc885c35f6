"""Whether containers can use the GPUs."""

import shutil
from pathlib import Path

_TOOLKIT = ("nvidia-ctk", "nvidia-container-cli")
_MARKERS = (".dockerenv", "run/.containerenv")
"""Files that Docker and Podman put into containers."""


def has_container_toolkit() -> bool:
    """Whether the NVIDIA Container Toolkit is installed."""
    return any(shutil.which(command) for command in _TOOLKIT)


def is_container(root: Path = Path("/")) -> bool:
    """Whether this is one; the toolkit is then the business of the machine around it.

    Args:
        root: tests point it elsewhere.
    """
    return any((root / marker).exists() for marker in _MARKERS)
