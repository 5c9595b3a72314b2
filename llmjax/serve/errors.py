"""Errors as the OpenAI API sends them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from llmjax.core.errors import ConfigError
from llmjax.serve.engine import ContextLengthError
from llmjax.serve.scheduler import OverloadedError, StoppedError

RETRY_AFTER = {"Retry-After": "1"}  # seconds


@dataclasses.dataclass
class ApiError(Exception):
    """An error that goes to the client as it is."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    type: str = "invalid_request_error"
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.as_dict(), self.status, headers=dict(self.headers))


def to_api_error(error: Exception) -> ApiError:
    """What the client is told of any exception; of those that are not its fault, no detail."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers or {})
        case pydantic.ValidationError():
            return _of_validation(error)
        case OverloadedError():
            return ApiError(429, str(error), code="server_overloaded", type="rate_limit_error", headers=RETRY_AFTER)
        case StoppedError():
            return ApiError(503, str(error), code="shutting_down", type="server_error", headers=RETRY_AFTER)
        case ContextLengthError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ConfigError():
            return ApiError(400, str(error))
    return ApiError(500, "the server failed on this request; its log says why", type="server_error")


async def handle(_: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for everything."""
    return to_api_error(error).response()


def _of_validation(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}")
    # Places inside a union carry the names of its types; what a client knows are fields and indices.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    return ApiError(400, f"{param}: {first['msg']}" if param else first["msg"], param=param)
