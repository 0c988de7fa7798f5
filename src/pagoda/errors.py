"""Errors that people read: each says what is wrong and what to do, and knows its HTTP status.

PagodaError
├── BadRequest              400 invalid_request_error
│   └── ContextLengthExceeded   400 context_length_exceeded
├── Unauthorized            401
├── NotFound                404 model_not_found / not_found
├── TooLarge                413
├── RateLimited             429 + Retry-After
├── Overloaded              503 + Retry-After
├── EngineError             500 this request failed in the engine
├── ConfigError             exit code 78: a flag, file or variable is wrong
├── ModelError              exit code 65: the model's files are missing, broken or not supported
└── MemoryShort             exit code 75: it does not fit, and what would
"""

from __future__ import annotations


class PagodaError(Exception):
    """Base of all errors with a text for people. `remedy` is the next thing to type or change, '' if none."""

    status = 500
    code = "internal_error"
    type = "InternalServerError"
    exit_code = 70

    def __init__(self, message: str, *, remedy: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class BadRequest(PagodaError):
    status = 400
    code = "invalid_request_error"
    type = "BadRequestError"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(PagodaError):
    status = 401
    code = "invalid_api_key"
    type = "AuthenticationError"


class NotFound(PagodaError):
    status = 404
    code = "not_found"
    type = "NotFoundError"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(PagodaError):
    status = 405
    code = "method_not_allowed"
    type = "BadRequestError"


class TooLarge(PagodaError):
    status = 413
    code = "request_too_large"
    type = "BadRequestError"


class Overloaded(PagodaError):
    """The server cannot take this now; `retry_after_s` says when to come back."""

    status = 503
    code = "server_overloaded"
    type = "ServiceUnavailableError"
    retry_after_s = 1


class RateLimited(Overloaded):
    """This client has as much here as it may have at once; others are still served."""

    status = 429
    code = "rate_limit_exceeded"
    type = "RateLimitError"


class EngineError(PagodaError):
    code = "engine_error"


class ConfigError(PagodaError):
    exit_code = 78


class ModelError(PagodaError):
    exit_code = 65


class MemoryShort(PagodaError):
    exit_code = 75
