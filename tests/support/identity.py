"""Keys in memory, and gateways that ask for them."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from localmoe.core.errors import ConflictError
from localmoe.core.identity import RateLimits, Role
from localmoe.core.keys import KeyRecord
from localmoe.gateway.identity.keys import make_key


class MemoryKeyStore:
    """See `KeyStore`."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.num_finds = 0
        self.touches: list[dict[str, float]] = []

    async def add(self, record: KeyRecord) -> None:
        if record.id in self.records:
            raise ConflictError(f"there is a key {record.id}")
        self.records[record.id] = record

    async def find(self, digest: bytes) -> KeyRecord | None:
        self.num_finds += 1
        return next((record for record in self.records.values() if record.digest == digest), None)

    async def all(self) -> Sequence[KeyRecord]:
        return list(self.records.values())

    async def revoke(self, key_id: str, *, at_s: float) -> bool:
        record = self.records.get(key_id)
        if record is None:
            return False
        revoked_s = at_s if record.revoked_s is None else min(at_s, record.revoked_s)
        self.records[key_id] = msgspec.structs.replace(record, revoked_s=revoked_s)
        return True

    async def touch(self, used_s: Mapping[str, float]) -> None:
        self.touches.append(dict(used_s))

    def make(
        self,
        role: Role = Role.USER,
        *,
        expires_s: float | None = None,
        models: tuple[str, ...] = (),
        limits: RateLimits | None = None,
        now_s: float | None = None,
    ) -> str:
        """A new key, which is kept."""
        key, record = make_key(
            name=role.name.lower(),
            role=role,
            now_s=time.time() if now_s is None else now_s,
            expires_s=expires_s,
            models=models,
            limits=limits or RateLimits(),
        )
        self.records[record.id] = record
        return key


def bearer(credential: str) -> dict[str, str]:
    """The header that shows it."""
    return {"authorization": f"Bearer {credential}"}
