"""The values that a replica and the server exchange about a version."""

import dataclasses
from typing import Any

from inference.constraints import constraint as constraint_lib
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests as requests_lib
from inference.server.versions import memory
from parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All that a replica is told when it starts."""

  name: str  # in its log and in metrics
  compilation_cache: str | None  # directory of compiled programs
  audit_threshold: float  # see ServerConfig
  heartbeat_timeout_s: float = processes.DEFAULT_HEARTBEAT_S
  # The processes that share the engine, of which the replica is the first.
  cluster: processes.Cluster | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """A version to load."""

  version: str  # NAME@DIGEST, for the log
  directory: str
  config: engine_config.EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """A loaded engine, for the process that makes its requests."""

  capacity: int  # tokens of one sequence that the KV cache holds, and one more
  numerics: dict[str, Any]  # see `fingerprint`
  products: str
  adapter_rank: int
  memory: memory.Plan
  device: dict[str, Any]  # see `about`


# (index of the request, index of its sequence, text, ids, logprobs, cached
# tokens of the prompt, completion or None): an update, as a plain tuple.
Update = tuple[int, int, str, Any, Any, int, requests_lib.Completion | None]


def update(item: tuple[int, requests_lib.Update]) -> Update:
  """Returns an update of a submission as a plain tuple."""
  which, each = item
  return (
    which,
    each.index,
    each.text,
    tuple(each.token_ids),
    tuple(each.logprobs),
    each.num_cached,
    each.completion,
  )


def item(of: Update) -> tuple[int, requests_lib.Update]:
  """Returns the update of a plain tuple, with the index of its request."""
  which, index, text, ids, logprobs, num_cached, completion = of
  return which, requests_lib.Update(
    which, index, text, ids, logprobs, completion, num_cached
  )


_ERRORS: dict[str, type[Exception]] = {
  each.__name__: each
  for each in (
    requests_lib.TooLong,
    engine_lib.Overloaded,
    constraint_lib.ConstraintError,
    FileNotFoundError,
    ModuleNotFoundError,
    ValueError,
  )
}


def error_as_values(error: Exception) -> tuple[str, str]:
  """Returns the type of an error that the other process knows, and its text."""
  kind = next(
    (name for name, each in _ERRORS.items() if isinstance(error, each)), ''
  )
  text = str(error) if kind else f'{type(error).__name__}: {error}'
  return kind, text


def error_of(values: tuple[str, str]) -> Exception:
  """Returns the error of these values."""
  kind, text = values
  return _ERRORS.get(kind, RuntimeError)(text)
