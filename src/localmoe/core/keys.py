"""API keys: what is known of one, and what keeps that. A key itself is shown once, to whoever has it made, and kept
nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from localmoe.core.identity import Principal, RateLimits, Role


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One key. Times are Unix times in seconds."""

    id: str
    """The public beginning of the key, such as `lm-k3v9q2xabc`; never used again."""
    principal_id: str
    """Whose key it is: the id of the first key, where this one has replaced others."""
    digest: bytes
    """SHA-256 of the whole key."""
    name: str
    """For people."""
    role: Role
    models: tuple[str, ...] = ()
    """Names of models that may be used; none: all."""
    limits: RateLimits = RateLimits()
    created_s: float
    expires_s: float | None = None
    """From then on it is good for nothing; None: for as long as it is not revoked."""
    revoked_s: float | None = None
    """Likewise; may be in the future."""
    last_used_s: float | None = None
    """Up to some minutes before the true time."""

    def is_valid(self, now_s: float) -> bool:
        """Whether it opens anything."""
        return all(end_s is None or now_s < end_s for end_s in (self.expires_s, self.revoked_s))

    @property
    def principal(self) -> Principal:
        """Whoever has it."""
        return Principal(
            id=self.principal_id, name=self.name, role=self.role, models=self.models, limits=self.limits
        )


class KeyStore(Protocol):
    """Keeps API keys. Every method raises StorageError where that cannot be done now."""

    async def add(self, record: KeyRecord) -> None:
        """Keep a new key.

        Raises:
            ConflictError: there is one of this id or digest.
        """
        ...

    async def replace(self, old: KeyRecord, record: KeyRecord, *, until_s: float) -> bool:
        """Keep a new key in another's place, which opens nothing from `until_s` on. False: the other has been revoked
        since it was read, and nothing is changed.

        Raises:
            ConflictError: there is one of this id or digest.
        """
        ...

    async def find(self, digest: bytes) -> KeyRecord | None:
        """The key of this digest, also one that is not valid any more; None: there is none."""
        ...

    async def all(self) -> Sequence[KeyRecord]:
        """Every key, also those that are not valid any more, the oldest first."""
        ...

    async def revoke(self, key_id: str, *, at_s: float) -> bool:
        """Let a key open nothing from then on, or from when it was revoked already if that is earlier. False: there
        is none of this id."""
        ...

    async def touch(self, used_s: Mapping[str, float]) -> None:
        """Record when keys, by id, were used last, unless a later time is known. Those that are not there are left
        out."""
        ...
