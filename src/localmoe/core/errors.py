"""The one exception tree.

Every failure that a person may meet has a class here. The message says what was wrong and what to do;
`param` names the offending field where there is one. How a class becomes an HTTP status is the gateway's
business; how it becomes an exit code is the command line's.
"""


class LocalMoEError(Exception):
    """Root of all errors that LocalMoE raises on purpose."""


class ConfigError(LocalMoEError):
    """A setting is wrong; the message names the setting, its value, where it came from, and what is allowed."""


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


class RequestTooLargeError(LocalMoEError):
    """The request body is over the configured bound."""


class BackendUnavailableError(LocalMoEError):
    """No engine can take the request now.

    Args:
        retry_after_s: when trying again makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(BackendUnavailableError):
    """The engine's queue is full."""


class EngineDiedError(BackendUnavailableError):
    """The engine's process ended while it held this request."""


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
