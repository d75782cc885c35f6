"""The one exception tree.

Every failure that a person may meet has a class here. The message says what was wrong and what to do;
`param` names the offending field where there is one. How a class becomes an HTTP status is the gateway's
business; how it becomes an exit code is the command line's.
"""


class LocalMoEError(Exception):
    """Root of all errors that LocalMoE raises on purpose."""


class ConfigError(LocalMoEError):
    """A setting is wrong; the message names the setting, its value, where it came from, and what is allowed."""


class SettingNotFoundError(ConfigError):
    """There is no setting of this name."""


class VersionNotFoundError(ConfigError):
    """The history has no such version of the configuration, or not any more."""


class InvalidRequestError(LocalMoEError, ValueError):
    """The request cannot be served as it stands.

    Args:
        message: names the field, the value and what is allowed.
        param: the field, as the client spelled it (`stop`, `messages[0].content`).
        code: a short machine-readable reason, such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnsupportedFieldError(InvalidRequestError):
    """A field that could change the answer and that this server does not honour."""


class ContextLengthError(InvalidRequestError):
    """Prompt and requested tokens exceed the model's context."""


class ModelNotFoundError(LocalMoEError):
    """No such model, on this machine or on this server."""


class NotFoundError(LocalMoEError):
    """Something that was asked for by its name is not there, or not for whoever asks.

    Args:
        message: names it.
        param: the field or path parameter that names it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConflictError(LocalMoEError):
    """It cannot be done beside what is there or under way."""


class PreconditionError(ConflictError):
    """It is not any more what whoever would change it has seen."""


class InsufficientMemoryError(ConflictError):
    """The machine cannot hold it beside what it holds."""


class RequestTooLargeError(LocalMoEError):
    """The request body is over the configured bound."""


class QuotaExceededError(LocalMoEError):
    """Somebody keeps as much here as they may."""


class StorageError(LocalMoEError):
    """What is kept cannot be reached or written now. Nothing was changed."""


class StorageFullError(StorageError):
    """There is no room on a disk. Nothing was changed."""


class AuthenticationError(LocalMoEError):
    """Nobody knows who asks."""


class PermissionDeniedError(LocalMoEError):
    """Whoever asks may not do that."""


class IssuerUnavailableError(LocalMoEError):
    """Whoever issues tokens does not say now how they are verified."""


class RateLimitedError(LocalMoEError):
    """Whoever asks has asked for as much as they may.

    Args:
        kind: of what: `requests`, `tokens` or `concurrent_requests`.
        retry_after_s: when trying again makes sense; None: it makes none.
    """

    def __init__(self, message: str, *, kind: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class BackendUnavailableError(LocalMoEError):
    """No engine can take the request now.

    Args:
        retry_after_s: when trying again makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(BackendUnavailableError):
    """The queue is full, or too long for the answer to be complete in time."""


class GatewayOverloadedError(OverloadedError):
    """The gateway itself has no time, whichever model is asked."""


class DeadlineExceededError(BackendUnavailableError):
    """The answer was not complete in time."""


class EngineDiedError(BackendUnavailableError):
    """The engine's process ended while it held this request, which may be why, and no other engine answered it."""


class EngineStartError(LocalMoEError):
    """The engine could not start; trying again without a change will fail again."""


class EngineFaultError(LocalMoEError):
    """The engine failed while computing this request; the engine itself lives on."""


class DeviceError(EngineFaultError):
    """A GPU failed while it copied or computed."""


class ModelFileError(LocalMoEError):
    """A model file is missing, damaged, or not what it claims to be. The message begins with its path."""


class CheckpointError(ModelFileError):
    """A checkpoint (safetensors, GGUF or their JSON companions) is damaged or of an unsupported kind."""


class StoreError(ModelFileError):
    """An expert store is truncated, its header lies, or it has another layout version."""


class ChecksumError(StoreError):
    """Bytes in a store do not have the checksum that the header promises."""


class StripeError(StoreError):
    """A stripe is missing, or not of the store that it is to be read with."""


class TraceError(LocalMoEError):
    """A routing trace is missing, damaged or not one. The message begins with its path and, within it, the line."""


class ModelBuildError(LocalMoEError):
    """Fetching, converting or building a model failed; nothing half-made is left behind."""


class EngineInstallError(LocalMoEError):
    """An engine's environment could not be made; what is there is taken up again by the next attempt."""
