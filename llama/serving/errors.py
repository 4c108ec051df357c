"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama.errors import NonFiniteLogitsError, PromptError, RankError, printable


class ApiError(Exception):
    """An error that the client gets.

    Args:
        param: the field that is wrong; None for the whole body.
        code: names the error for programs.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """What a client gets for an error of the library."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, PromptError):  # its message begins with the name of the field
            name = re.match(r"[\w.\[\]]+", str(error))
            return cls(str(error), param=name.group() if name else None)
        if isinstance(error, ImportError):  # an extra is not installed
            return cls(str(error), status=501, code="unsupported_parameter")
        if isinstance(error, RankError):
            return cls(f"the server has lost a part of the network: {printable(error)}", status=503, code="rank_lost")
        if isinstance(error, NonFiniteLogitsError):
            return cls(str(error), status=500, code="logits_not_finite", headers={"x-should-retry": "false"})
        return cls("the server failed to compute the answer; its log says why", status=500, code="failed")

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients know."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class BusyError(ApiError):
    """The server cannot take a request now. It may be sent again."""

    def __init__(self, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, status=503, code=code, headers={"Retry-After": "1", **(headers or {})})
