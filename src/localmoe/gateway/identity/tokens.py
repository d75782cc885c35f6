"""JSON Web Tokens (RFC 7519): whose they are.

How a token's signature is verified is decided by settings and by the issuer's keys, never by the token: it may say
that it was signed with HS256 only where there is a secret, and otherwise must say what its key is for. So "none" is
no signature, and a public key no secret.
"""

from typing import Any

import jwt

from localmoe.core.errors import AuthenticationError, PermissionDeniedError
from localmoe.core.identity import Principal, Role
from localmoe.gateway.identity.config import TokenConfig
from localmoe.gateway.identity.jwks import PublicKeys

_MAX_NAME_CHARS = 256
_MAX_KEY_ID_CHARS = 512
_REQUIRED = ["exp", "sub"]


class TokenVerifier:
    """Verifies tokens by these settings.

    Args:
        keys: of the issuer; None: only tokens signed with the secret are taken.
    """

    def __init__(self, config: TokenConfig, keys: PublicKeys | None) -> None:
        self._config = config
        self._keys = keys
        self._roles = (
            {value: Role[name.upper()] for value, name in config.roles.items()}
            if config.roles
            else {role.name.lower(): role for role in Role}
        )

    async def verify(self, token: str) -> tuple[Principal, float]:
        """Whose token it is, and until when it may be taken for that, in Unix time.

        Raises:
            AuthenticationError: it is not valid.
            PermissionDeniedError: it is, and names no role.
            IssuerUnavailableError: see `PublicKeys.find`.
        """
        key, algorithm = await self._key_of(token)
        config = self._config
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=config.issuer,
                audience=config.audience,
                leeway=config.leeway_s,
                options={"require": _REQUIRED, "verify_aud": config.audience is not None},
            )
            until_s = float(claims["exp"]) + config.leeway_s
        except jwt.ExpiredSignatureError:
            raise AuthenticationError("the token has expired") from None
        except jwt.InvalidAudienceError:
            raise AuthenticationError("the token is for another audience") from None
        except jwt.InvalidIssuerError:
            raise AuthenticationError("the token is of another issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise AuthenticationError(f"the token has no {error.claim!r}") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
            raise AuthenticationError("the token is not valid") from None
        return self._principal(claims), until_s

    async def _key_of(self, token: str) -> tuple[str | jwt.PyJWK, str]:
        """What the token is to be verified with, and how."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            raise AuthenticationError("the token is not valid") from None
        if header.get("alg") == "HS256" and self._config.secret is not None:
            return self._config.secret, "HS256"
        key_id = header.get("kid")
        if self._keys is None or header.get("alg") in (None, "none", "HS256"):
            raise AuthenticationError("the token is not signed in a way that is accepted here")
        if key_id is not None and not (isinstance(key_id, str) and len(key_id) <= _MAX_KEY_ID_CHARS):
            raise AuthenticationError("the token is not valid")
        key = await self._keys.find(key_id)
        if key is None:
            raise AuthenticationError("the token is signed with a key that the issuer does not publish")
        return key, key.algorithm_name

    def _principal(self, claims: dict[str, Any]) -> Principal:
        for name in ("sub", "iss"):
            if name in claims and not _is_name(claims[name]):
                raise AuthenticationError(f"the token's {name!r} is empty, too long, or no plain text")
        roles = [self._roles[value] for value in _values(claims, self._config.role_claim) if value in self._roles]
        if not roles:
            raise PermissionDeniedError(
                f"the token's claim {self._config.role_claim!r} names none of {', '.join(self._roles)}"
            )
        # With the issuer, so that nobody gets what is another's by a subject that only looks the same.
        return Principal(id=f"jwt:{claims.get('iss', '')}:{claims['sub']}", name=claims["sub"], role=max(roles))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME_CHARS and value.isprintable()


def _values(claims: dict[str, Any], path: str) -> list[str]:
    """What a claim says, whether it is one text or a list of them."""
    value: Any = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, str)]
