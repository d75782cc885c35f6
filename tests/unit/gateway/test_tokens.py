"""JSON Web Tokens: which are taken, and for whose."""

import base64
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from localmoe.core.errors import AuthenticationError, PermissionDeniedError
from localmoe.core.identity import Role
from localmoe.gateway.identity.config import TokenConfig
from localmoe.gateway.identity.jwks import PublicKeys
from localmoe.gateway.identity.tokens import TokenVerifier

SECRET = "s" * 32
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
URL = "https://login.example/keys"


def claims(**changes: Any) -> dict[str, Any]:
    values = {"sub": "alice", "exp": time.time() + 60, "role": "user", **changes}
    return {name: value for name, value in values.items() if value is not None}


def signed(**changes: Any) -> str:
    return jwt.encode(claims(**changes), SECRET, "HS256")


def hs256(**config: Any) -> TokenVerifier:
    return TokenVerifier(TokenConfig(secret=SECRET, **config), None)


def jwk(key: Any, key_id: str, **more: Any) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": key_id, **more}


def oidc(*keys: dict[str, Any], **config: Any) -> TokenVerifier:
    async def fetch(url: str) -> bytes:
        assert url == URL
        return json.dumps({"keys": keys}).encode()

    settings = TokenConfig(jwks_url=URL, issuer="https://login.example", audience="localmoe", **config)
    return TokenVerifier(settings, PublicKeys(URL, fetch=fetch))


def oidc_claims(**changes: Any) -> dict[str, Any]:
    return claims(**{"iss": "https://login.example", "aud": "localmoe", **changes})


async def test_a_token_signed_with_the_secret() -> None:
    expires_s = time.time() + 60
    principal, until_s = await hs256(leeway_s=5).verify(signed(exp=expires_s))
    assert (principal.id, principal.name, principal.role) == ("jwt::alice", "alice", Role.USER)
    assert until_s == pytest.approx(expires_s + 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": 1}, "has expired"),
        ({"exp": None}, "has no 'exp'"),
        ({"exp": "soon"}, "not valid"),
        ({"exp": float("inf")}, "not valid"),
        ({"nbf": 2**40}, "not valid"),
        ({"sub": None}, "has no 'sub'"),
        ({"sub": 5}, "not valid"),
        ({"sub": ""}, "'sub' is empty"),
        ({"sub": "a" * 257}, "'sub' is empty, too long"),
        ({"sub": "a\nb"}, "no plain text"),
        ({"iss": "a" * 257}, "'iss' is empty, too long"),
        ({"iss": "a\nb"}, "no plain text"),
    ],
)
async def test_claims_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AuthenticationError, match=words):
        await hs256().verify(signed(**changes))


@pytest.mark.parametrize("issuer", [["a"], {"a": 1}, 5, None])
async def test_an_issuer_that_is_no_text(issuer: Any) -> None:
    payload = json.dumps({**claims(), "iss": issuer}).encode()
    token = jwt.PyJWS().encode(payload, SECRET, "HS256")
    with pytest.raises(AuthenticationError, match=r"not valid|'iss' is"):
        await hs256().verify(token)


async def test_issuer_and_audience() -> None:
    verifier = hs256(issuer="us", audience="localmoe")
    principal, _ = await verifier.verify(signed(iss="us", aud=["others", "localmoe"]))
    assert principal.id == "jwt:us:alice"
    with pytest.raises(AuthenticationError, match="another audience"):
        await verifier.verify(signed(iss="us", aud="others"))
    with pytest.raises(AuthenticationError, match="has no 'aud'"):
        await verifier.verify(signed(iss="us"))
    with pytest.raises(AuthenticationError, match="another issuer"):
        await verifier.verify(signed(iss="them", aud="localmoe"))


async def test_within_the_leeway_a_token_is_taken() -> None:
    late = signed(exp=time.time() - 20)
    await hs256(leeway_s=30).verify(late)
    with pytest.raises(AuthenticationError, match="has expired"):
        await hs256(leeway_s=10).verify(late)


def _forged(header: dict[str, Any], payload: dict[str, Any], signature: bytes = b"") -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    return ".".join([part(json.dumps(header).encode()), part(json.dumps(payload).encode()), part(signature)])


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, "HS512", ["HS256"], {}])
async def test_no_signature_or_another_kind_is_refused(algorithm: Any) -> None:
    token = _forged({"alg": algorithm, "typ": "JWT"}, claims())
    for verifier in (hs256(), oidc(jwk(RSA_KEY, "a"))):
        with pytest.raises(AuthenticationError):
            await verifier.verify(token)


async def test_a_public_key_is_no_secret() -> None:
    # What the classic confusion of algorithms signs with: the public key, whose text everybody knows.
    public = RSA_KEY.public_key()
    for known in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk(RSA_KEY, "a")).encode(),
    ):
        header = {"alg": "HS256", "typ": "JWT", "kid": "a"}
        unsigned = _forged(header, oidc_claims()).rpartition(".")[0]
        signature = jwt.get_algorithm_by_name("HS256").sign(unsigned.encode(), known)
        token = f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
        with pytest.raises(AuthenticationError, match="not signed in a way that is accepted"):
            await oidc(jwk(RSA_KEY, "a")).verify(token)
        with pytest.raises(AuthenticationError, match="not valid"):
            await oidc(jwk(RSA_KEY, "a"), secret=SECRET).verify(token)


async def test_tokens_of_an_issuer() -> None:
    verifier = oidc(jwk(RSA_KEY, "rsa"), jwk(EC_KEY, "ec"))
    for key, algorithm, key_id in ((RSA_KEY, "RS256", "rsa"), (EC_KEY, "ES256", "ec")):
        token = jwt.encode(oidc_claims(), key, algorithm, headers={"kid": key_id})
        principal, _ = await verifier.verify(token)
        assert principal.id == "jwt:https://login.example:alice"
    for refused, words in (
        ({"aud": "another"}, "another audience"),
        ({"aud": None}, "has no 'aud'"),
        ({"iss": "https://evil.example"}, "another issuer"),
    ):
        token = jwt.encode(oidc_claims(**refused), RSA_KEY, "RS256", headers={"kid": "rsa"})
        with pytest.raises(AuthenticationError, match=words):
            await verifier.verify(token)


async def test_a_key_is_used_for_what_it_is_for_only() -> None:
    # The issuer says that the key is for RS256.
    verifier = oidc(jwk(RSA_KEY, "a", alg="RS256"))
    token = jwt.encode(oidc_claims(), RSA_KEY, "PS256", headers={"kid": "a"})
    with pytest.raises(AuthenticationError, match="not valid"):
        await verifier.verify(token)


async def test_a_token_signed_by_somebody_else() -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    token = jwt.encode(oidc_claims(), other, "RS256", headers={"kid": "a"})
    with pytest.raises(AuthenticationError, match="not valid"):
        await oidc(jwk(RSA_KEY, "a")).verify(token)


@pytest.mark.parametrize("key_id", ["another", 5, ["a"], "a" * 600])
async def test_key_ids_that_there_are_not(key_id: Any) -> None:
    token = _forged({"alg": "RS256", "typ": "JWT", "kid": key_id}, oidc_claims(), b"x" * 256)
    with pytest.raises(AuthenticationError):
        await oidc(jwk(RSA_KEY, "a"), jwk(EC_KEY, "b")).verify(token)


async def test_without_a_key_id_the_only_key_is_meant() -> None:
    token = jwt.encode(oidc_claims(), RSA_KEY, "RS256")
    await oidc(jwk(RSA_KEY, "a")).verify(token)
    with pytest.raises(AuthenticationError, match="does not publish"):
        await oidc(jwk(RSA_KEY, "a"), jwk(EC_KEY, "b")).verify(token)


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b.c", "ä.ö.ü", "." * 1000, "eyJhbGciOiJIUzI1NiJ9.e30.", "\x00.\x00.\x00"]
)
async def test_what_is_no_token(token: str) -> None:
    with pytest.raises(AuthenticationError, match="not valid"):
        await hs256().verify(token)


async def test_roles_by_claim() -> None:
    verifier = hs256(role_claim="realm_access.roles", roles={"llm-admins": "admin", "llm-users": "user"})

    def token(roles: Any) -> str:
        return signed(role="admin", realm_access={"roles": roles})

    assert (await verifier.verify(token(["llm-users", "else"])))[0].role == Role.USER
    assert (await verifier.verify(token(["llm-users", "llm-admins"])))[0].role == Role.ADMIN
    assert (await verifier.verify(token("llm-users")))[0].role == Role.USER
    for roles in ([], ["else"], None, 4, {"llm-admins": True}, [["llm-admins"]], ["admin"]):
        with pytest.raises(
            PermissionDeniedError, match=r"'realm_access.roles' names none of llm-admins, llm-users"
        ):
            await verifier.verify(token(roles))
    with pytest.raises(PermissionDeniedError, match="names none of"):
        await verifier.verify(signed(realm_access="llm-admins"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"secret": "short"}, "shorter than 32 bytes"),
        ({"jwks_url": URL, "audience": "a"}, "issuer is not set"),
        ({"jwks_url": URL, "issuer": "a"}, "audience is not set"),
        ({"jwks_url": "http://login.example/keys"}, "must begin with https://"),
        ({"jwks_url": "https://"}, "must be https:// and a host"),
        ({"jwks_url": "https://user@login.example"}, "user name"),
        ({"jwks_url": "file:///etc/passwd"}, "must be https://"),
        ({"leeway_s": 1e9}, "from 0 to 600"),
        ({"role_claim": "a..b"}, "names with dots"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenConfig(**config)


def test_the_secret_is_not_shown() -> None:
    assert SECRET not in repr(TokenConfig(secret=SECRET))
