"""Every failure in the OpenAI API's error shape: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from localmoe.core.errors import (
    AuthenticationError,
    BackendUnavailableError,
    ConfigError,
    ConflictError,
    DeadlineExceededError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InsufficientMemoryError,
    InvalidRequestError,
    IssuerUnavailableError,
    ModelBuildError,
    ModelFileError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    PreconditionError,
    QuotaExceededError,
    RateLimitedError,
    RequestTooLargeError,
    SettingNotFoundError,
    StorageError,
    StorageFullError,
    UnsupportedFieldError,
    VersionNotFoundError,
)

logger = logging.getLogger(__name__)

_MAX_VALUE_CHARS = 80
_ABSENCES = (
    (OverloadedError, "overloaded"),
    (DeadlineExceededError, "deadline_exceeded"),
    (EngineDiedError, "engine_died"),
)
"""Codes of why no engine has answered."""


class ErrorDetail(BaseModel):
    """What was wrong, for people (`message`) and for programs (the rest)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


@dataclass(frozen=True, kw_only=True)
class ApiError:
    """A failure as the client sees it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> bytes:
        """The JSON document, ASCII only, so that no text from a client can fail to encode."""
        detail = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": detail}, separators=(",", ":")).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The whole HTTP answer."""
        headers = dict(headers or {})
        if self.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
            headers["retry-after-ms"] = str(math.ceil(self.retry_after_s * 1000))
        if self.code == "engine_fault" or (self.status == 429 and self.retry_after_s is None):
            headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients would; who could was tried
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, media_type="application/json")


INTERNAL_ERROR = ApiError(
    status=500,
    message="the server failed on this request; its log says why",
    type="server_error",
    code="internal_error",
)


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. One that was not raised on purpose is logged and not described."""
    message = str(error)
    match error:
        case InvalidRequestError():
            default = "unsupported_parameter" if isinstance(error, UnsupportedFieldError) else "invalid_value"
            return ApiError(status=400, message=message, param=error.param, code=error.code or default)
        case ModelNotFoundError():
            return ApiError(status=404, message=message, param="model", code="model_not_found")
        case NotFoundError():
            return ApiError(status=404, message=message, param=error.param, code="not_found")
        case QuotaExceededError():
            return ApiError(status=413, message=message, code="quota_exceeded")
        case StorageError():
            is_full = isinstance(error, StorageFullError)
            return ApiError(
                status=507 if is_full else 503,
                message=message,
                type="server_error",
                code="storage_full" if is_full else "storage_unavailable",
                retry_after_s=None if is_full else 1.0,
            )
        case SettingNotFoundError() | VersionNotFoundError():
            return ApiError(status=404, message=message, code="not_found")
        case PreconditionError():
            return ApiError(status=412, message=message, param="if-match", code="precondition_failed")
        case ConflictError():
            code = "insufficient_memory" if isinstance(error, InsufficientMemoryError) else "conflict"
            return ApiError(status=409, message=message, code=code)
        case EngineStartError() | ModelBuildError() | ModelFileError():
            return ApiError(status=422, message=message, code="model_load_failed")
        case ConfigError():
            return ApiError(status=422, message=message, code="invalid_configuration")
        case AuthenticationError():
            return ApiError(status=401, message=message, code="invalid_api_key")
        case PermissionDeniedError():
            return ApiError(status=403, message=message, type="permission_error", code="permission_denied")
        case IssuerUnavailableError():
            code = "issuer_unavailable"
            return ApiError(status=503, message=message, type="server_error", code=code, retry_after_s=10.0)
        case RateLimitedError():
            code = "rate_limit_exceeded"
            return ApiError(
                status=429, message=message, type=error.kind, code=code, retry_after_s=error.retry_after_s
            )
        case RequestTooLargeError():
            return ApiError(status=413, message=message, code="request_too_large")
        case BackendUnavailableError():
            code = next((code for kind, code in _ABSENCES if isinstance(error, kind)), "engine_unavailable")
            return ApiError(
                status=503, message=message, type="server_error", code=code, retry_after_s=error.retry_after_s
            )
        case EngineFaultError():
            return ApiError(status=500, message=message, type="server_error", code="engine_fault")
        case _:
            logger.error("unexpected failure of a request", exc_info=error)
            return INTERNAL_ERROR


def field_path(loc: Sequence[int | str]) -> str | None:
    """`("messages", 0, "content")` as clients write it: `messages[0].content`."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("<", "[")):  # tags of unions, and pydantic's [key], are no fields
            path += f".{part}" if path else part
    return path[:200] or None


def validation_error(problem: Mapping[str, Any]) -> ApiError:
    """One of pydantic's complaints about a body."""
    kind: str = problem["type"]
    loc = problem["loc"][1:]
    if kind == "json_invalid":
        return ApiError(status=400, message=f"the body is not valid JSON: {problem['ctx']['error']} at {loc[0]}")
    param = field_path(loc)
    if param is None and kind == "missing":
        return ApiError(status=400, message="the body is missing; send a JSON object")
    if param is None and kind in ("dict_type", "model_type", "model_attributes_type"):
        return ApiError(status=400, message="the body must be a JSON object", code="invalid_type")
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        param = field_path([*loc, *([cause.param] if cause.param else [])])
        known = to_api_error(cause)
        return ApiError(status=400, message=f"{param}: {known.message}", param=param, code=known.code)
    if kind == "missing":
        return ApiError(status=400, message=f"{param} is required", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ApiError(
            status=400, message=f"{param} is not a field of this API", param=param, code="unknown_parameter"
        )
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(
        status=400, message=f"{param}: {problem['msg']}; got {_shorten(problem['input'])}", param=param, code=code
    )


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value if not isinstance(value, str) else value[:_MAX_VALUE_CHARS])
    return text[:_MAX_VALUE_CHARS]


async def handle_known_error(request: Request, error: Exception) -> Response:
    """For exceptions of our own tree that a route lets pass."""
    return to_api_error(error).response()


async def handle_validation_error(request: Request, error: Exception) -> Response:
    """For bodies that do not match a schema; FastAPI reads a body of another content type as mere bytes."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (media_type.startswith("application/") and "+json" in media_type)
    if problem["loc"][0] == "body" and not is_json:
        return ApiError(
            status=415, message=f"content-type must be application/json, not {content_type[:100]!r}"
        ).response()
    return validation_error(problem).response()


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """For what the router and the body parser raise."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    match error.status_code, error.__cause__:
        case 404, _:
            message = f"no such route: {request.method} {path}"
        case 405, _:
            allowed = Headers(error.headers).get("allow", "another method")
            message = f"{request.method} is not allowed for {path}; allowed: {allowed}"
        case 400, UnicodeDecodeError():
            message = "the body is not valid UTF-8"
        case 400, RecursionError():
            message = "the body is nested too deeply"
        case _:
            message = error.detail
    return ApiError(status=error.status_code, message=message).response(error.headers)
