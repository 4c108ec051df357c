"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama.errors import PromptError


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
    def of(cls, error: PromptError) -> ApiError:
        """The error with the name of the field, with which its message begins."""
        name = re.match(r"[\w.\[\]]+", str(error))
        return cls(str(error), param=name.group() if name else None)

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients know."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class BusyError(ApiError):
    """The server cannot take a request now. It may be sent again."""

    def __init__(self, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, status=503, code=code, headers={"Retry-After": "1", **(headers or {})})
