"""Whose things a request may see."""

import re

from localmoe.core.identity import Role
from localmoe.gateway.exchange import current_principal

MAX_ID_CHARS = 64
ID_PATTERN = r"^[!-~]+$"
"""Of ids that there may be. Databases are not asked for others, which not all of them can take."""
_ID = re.compile(ID_PATTERN)


def could_be_id(text: str) -> bool:
    """Whether anything here may have this id."""
    return len(text) <= MAX_ID_CHARS and _ID.fullmatch(text) is not None


def visible_owner() -> str | None:
    """The owner whose files, jobs and batches whoever asks may see: themselves; None for administrators:
    everybody."""
    principal = current_principal()
    return None if principal.role >= Role.ADMIN else principal.id
