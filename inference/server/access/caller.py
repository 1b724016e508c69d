"""The caller: the HTTP request on whose behalf the server works.

A context variable, since work for a request starts in many places, and none of
them may forget who pays.
"""

import contextvars
import dataclasses

from inference.server.access import keys


@dataclasses.dataclass(kw_only=True)
class Caller:
  """What admission has to know of a request, and tells it."""

  request_id: str = ''
  key: keys.Key | None = None  # None: the server has no keys
  # Digest of principal, Idempotency-Key and body; '' without that header.
  idempotency: str = ''
  headers: dict[str, str] = dataclasses.field(default_factory=dict)  # to send


_CURRENT: contextvars.ContextVar[Caller] = contextvars.ContextVar('caller')


def begin(caller: Caller) -> None:
  """Makes it the caller of this task, and of the tasks that it starts."""
  _CURRENT.set(caller)


def current() -> Caller:
  """Returns the caller; outside of a request, one without a key."""
  return _CURRENT.get(None) or Caller()
