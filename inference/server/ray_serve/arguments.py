"""The arguments of the application of Ray Serve."""

from collections.abc import Mapping
from typing import Any

import pydantic

from checks import expect

# Flags that a replica sets itself.
_OWN = 'host', 'port', 'coordinator', 'num_processes', 'process_id'


class Arguments(pydantic.BaseModel):
  """How Ray runs replicas; further arguments are flags of serve.py."""

  model_config = pydantic.ConfigDict(extra='allow')

  model: str  # frozen directory, on every node
  replicas: int | str = 1  # or auto: by the requests of each
  num_gpus: float = 0  # of a replica
  num_cpus: float = 1
  max_ongoing_requests: int = 256  # of a replica; more wait in the proxies
  start_seconds: float = 900  # longest until a replica is ready
  drain_seconds: float = 30
  insecure: bool = False  # may answer clients without keys

  def check(self) -> None:
    """Checks all arguments but the values of flags.

    Raises:
      ValueError: a flag is one that a replica sets, or clients need no key.
    """
    if isinstance(self.replicas, str):
      expect.one_of('replicas', self.replicas, ('auto',))
    else:
      expect.at_least('replicas', self.replicas, 1)
    expect.at_least('max_ongoing_requests', self.max_ongoing_requests, 1)
    for name in self._given:
      if name in _OWN:
        raise ValueError(
          f'{name}: got a flag of one server, expected none: each replica has'
          ' its own; leave it out'
        )
    if not (self.insecure or {'api_keys', 'records'} & set(self._given)):
      raise ValueError(
        'api_keys: got none, expected keys, since the proxies of Ray listen for'
        ' other machines; give api_keys or records, or insecure=true'
      )

  def flags(self) -> list[str]:
    """Returns the flags of serve.py."""
    return [
      f'--model={self.model}',
      f'--drain_seconds={self.drain_seconds:.0f}',
      '--replicas=0',  # the engine is in the process of the server
      *(f'--{name}={value}' for name, value in self._given.items()),
    ]

  @property
  def _given(self) -> Mapping[str, Any]:
    return self.model_extra or {}
