"""Makes API keys, and tells whose they are.

A key is `lm-`, an id of ten characters that is no secret, and 256 random bits: `lm-k3v9q2xabc-…`. Only its SHA-256 is
kept. A digest without salt is enough, since nobody can guess what has 256 random bits; and it is what keys are looked
up by, so that the time this takes says nothing about keys that are nearly right.
"""

import base64
import hashlib
import hmac
import re
import secrets

import msgspec

from localmoe.core.identity import RateLimits, Role
from localmoe.core.keys import KeyRecord

_ID_CHARS = "abcdefghijkmnpqrstuvwxyz23456789"
"""Without those that look like others."""
_NUM_ID_CHARS = 10
_NUM_SECRET_BYTES = 32
_KEY = re.compile(rf"lm-[{_ID_CHARS}]{{{_NUM_ID_CHARS}}}-[A-Za-z0-9_-]{{43}}", re.ASCII)
_MAX_NAME_CHARS = 100
MAX_MODELS = 100


def is_key(credential: str) -> bool:
    """Whether it looks like an API key."""
    return _KEY.fullmatch(credential) is not None


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def is_of(key: str, record: KeyRecord) -> bool:
    """Whether a record is this key's, in a time that does not depend on how nearly it is."""
    return hmac.compare_digest(digest_of(key), record.digest)


def make_key(
    *,
    name: str,
    role: Role,
    now_s: float,
    expires_s: float | None = None,
    models: tuple[str, ...] = (),
    limits: RateLimits = RateLimits(),  # noqa: B008  (frozen)
) -> tuple[str, KeyRecord]:
    """A new key and what is to be kept of it.

    Args:
        now_s: Unix time.
        expires_s: likewise.

    Raises:
        ValueError: the message says what cannot be.
    """
    if not name.strip() or not name.isprintable() or len(name) > _MAX_NAME_CHARS:
        raise ValueError(f"name is {name[:200]!r}; it must be 1 to {_MAX_NAME_CHARS} printable characters")
    if expires_s is not None and expires_s <= now_s:
        raise ValueError("expires must be in the future")
    if models and role > Role.USER:
        # Who may load models under any name is not kept from any.
        raise ValueError(f"models can be limited for the roles viewer and user only, not for {role.name.lower()}")
    if len(models) > MAX_MODELS:
        raise ValueError(f"models are {len(models)}; at most {MAX_MODELS} can be listed")
    key_id = "lm-" + "".join(secrets.choice(_ID_CHARS) for _ in range(_NUM_ID_CHARS))
    secret = base64.urlsafe_b64encode(secrets.token_bytes(_NUM_SECRET_BYTES)).rstrip(b"=").decode()
    key = f"{key_id}-{secret}"
    record = KeyRecord(
        id=key_id,
        principal_id=key_id,
        digest=digest_of(key),
        name=name,
        role=role,
        models=models,
        limits=limits,
        created_s=now_s,
        expires_s=expires_s,
    )
    return key, record


def rotated(old: KeyRecord, *, now_s: float) -> tuple[str, KeyRecord]:
    """A new key for the same principal, that may do what the old one may."""
    key, fresh = make_key(
        name=old.name,
        role=old.role,
        now_s=now_s,
        expires_s=old.expires_s,
        models=old.models,
        limits=old.limits,
    )
    return key, msgspec.structs.replace(fresh, principal_id=old.principal_id)
