"""Every error that a caller can see.

NimbosError
├── InvalidRequest            400  the request itself is wrong; `param` names the field
│   ├── UnsupportedField      400  a field we know and do not honour, or do not know at all
│   ├── BrokenProgram         400  a program that cannot be one; names the file and, where there is one, the line
│   └── PromptTooLong         400  with both counts
├── Unauthorized              401  no key, or a wrong one
├── Forbidden                 403  the key is good, and may not do this
├── NotFound                  404
│   └── ModelNotFound         404
├── PayloadTooLarge           413
├── Conflict                  409  what is there does not allow this change
├── Overloaded                429  a limit was hit; names it, with an honest `retry_after_s`
├── BudgetExhausted           429  nothing is left to spend; names the budget, and when its period ends
├── ModelUnusable             422  this file cannot serve: truncated, not GGUF, unknown family, too large
├── DownloadFailed            502  a source could not give what was asked of it
├── EngineFailed              500  the engine died more often than it is restarted, or refused a step
│   └── AnswerFailed          500  one answer cannot go on; the engine and all others do
├── NotReady                  503  still loading, or shutting down
├── StorageUnavailable        503  the database is full, locked, read-only, gone, or newer than this program
└── ConfigError               500  a setting that cannot be

A constructor takes facts; the message says what happened with the values, then what to do next.
Lower-library errors are mapped where they happen, with `from`.
"""

from __future__ import annotations

from typing import ClassVar

_SHOWN_NAME_CHARACTERS = 100  # of a name that came from outside
_UNITS = {"tokens": "tokens", "cost_micros": "millionths", "seconds_ms": "milliseconds of work", "calls": "calls"}


class NimbosError(Exception):
    """The root. `code` and `status` are what the wire shows; `param` is the field at fault, if one is."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # OpenAI's `error.type`

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(NimbosError):
    code = "invalid_request"
    status = 400
    kind = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"

    def __init__(self, field: str, *, why: str, nearest: str | None = None) -> None:
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"The field {field!r} is {why}.{hint}", param=field)
        self.nearest = nearest


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"

    def __init__(self, *, have: int, limit: int) -> None:
        super().__init__(
            f"The prompt has {have} tokens and this model takes at most {limit} (one is kept for the answer). "
            "Shorten the prompt or choose a model with a larger context.",
            param="messages",
        )
        self.have = have
        self.limit = limit


class BrokenProgram(InvalidRequest):
    """`file`: its path in the program, "" for the program as a whole. `line`: from 1."""

    code = "broken_program"

    def __init__(self, file: str, *, why: str, line: int | None = None) -> None:
        shown = repr(file[:_SHOWN_NAME_CHARACTERS])[1:-1]
        where = f"{shown}, line {line}" if line is not None else shown or "The program"
        super().__init__(f"{where}: {why.rstrip('.?')}{'?' if why.endswith('?') else '.'}", param=shown or None)
        self.file = file
        self.line = line
        self.why = why


class Unauthorized(NimbosError):
    code = "invalid_api_key"
    status = 401
    kind = "authentication_error"


class Forbidden(NimbosError):
    code = "forbidden"
    status = 403
    kind = "permission_error"


class NotFound(NimbosError):
    code = "not_found"
    status = 404
    kind = "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model: str, *, have: tuple[str, ...] = ()) -> None:
        known = ", ".join(have) if have else "none yet"
        shown = model[:_SHOWN_NAME_CHARACTERS]
        hint = f"There is no model {shown!r} here (installed: {known}). Try `nimbos pull {shown}`."
        super().__init__(hint, param="model")
        self.model = model


class PayloadTooLarge(NimbosError):
    code = "payload_too_large"
    status = 413
    kind = "invalid_request_error"

    def __init__(self, *, have: int | None, limit: int, what: str = "body") -> None:
        size = f"{have} bytes" if have is not None else "larger than that"
        super().__init__(f"The {what} may have at most {limit} bytes; this one is {size}.")


class Overloaded(NimbosError):
    """`limit` is what was hit: requests, tokens (a minute), concurrent asks, budget, queue, cells. `owner` is whose it
    is ("key 'laptop'"), "" where it is the server's. `retry_after_s` None: a limit of 0, which no waiting mends."""

    code = "overloaded"
    status = 429
    kind = "rate_limit_error"

    def __init__(self, *, limit: str, value: int, used: int, retry_after_s: float | None, owner: str = "") -> None:
        whose = f" of the {owner}" if owner else ""
        if retry_after_s is None:
            then = "Nothing is let through until that is changed."
        else:
            then = f"Try again in {max(1.0, retry_after_s):.0f} s."
        super().__init__(f"The limit {limit!r} of {value}{whose} is reached ({used} in use). {then}")
        self.owner = owner
        self.limit = limit
        self.value = value
        self.used = used
        self.retry_after_s = retry_after_s


class Conflict(NimbosError):
    code = "conflict"
    status = 409
    kind = "invalid_request_error"


class BudgetExhausted(NimbosError):
    """`owner` is whose budget it is ("key laptop"); `limit` and `used` are in the unit of `meter`. `retry_after_s`:
    until its period ends; None where it has none, or where even a new one is `too_small`: then asking again cannot
    help."""

    code = "insufficient_quota"
    status = 429
    kind = "insufficient_quota"

    def __init__(
        self,
        *,
        owner: str,
        meter: str,
        period: str,
        limit: int,
        used: int,
        retry_after_s: float | None,
        too_small: bool = False,
    ) -> None:
        unit = _UNITS.get(meter, meter)
        again = f"It is renewed in {retry_after_s:.0f} s." if retry_after_s is not None else "It is not renewed."
        if too_small:
            again = "This ask alone needs more than the whole of it."
        super().__init__(
            f"The budget of the {owner} is spent: {used} of {limit} {unit} ({period}). {again} "
            "`nimbos budget` shows and raises it."
        )
        self.owner = owner
        self.meter = meter
        self.period = period
        self.limit = limit
        self.used = used
        self.retry_after_s = retry_after_s
        self.too_small = too_small


class StorageUnavailable(NimbosError):
    """Nothing of the transaction was written, unless it is `in_doubt`: then it may have been, whole. The service
    resumes when the database is back."""

    code = "storage_unavailable"
    status = 503

    def __init__(self, where: str, *, reason: str, in_doubt: bool = False) -> None:
        super().__init__(f"The storage cannot be used: {reason}")  # where it is, is for the operator alone
        self.where = where
        self.reason = reason
        self.in_doubt = in_doubt


class ModelUnusable(NimbosError):
    """A file that cannot serve. The server lives on."""

    code = "model_unusable"
    status = 422
    kind = "invalid_request_error"

    def __init__(self, path: str, *, reason: str) -> None:
        super().__init__(f"{path} cannot be used: {reason}", param="model")
        self.path = path
        self.reason = reason


class DownloadFailed(NimbosError):
    code = "download_failed"
    status = 502
    kind = "server_error"


class EngineFailed(NimbosError):
    code = "engine_failed"
    status = 500


class AnswerFailed(EngineFailed):
    """Logits that are no numbers, or a grammar that ran into its limits: this ask ends, the engine goes on."""

    code = "answer_failed"


class NotReady(NimbosError):
    code = "not_ready"
    status = 503


class ConfigError(NimbosError):
    code = "config_error"
    status = 500
