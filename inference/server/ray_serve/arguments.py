"""The arguments of the application of Ray Serve."""

from collections.abc import Mapping
from typing import Any

import pydantic

from checks import expect
from inference.engine import engine_config
from inference.server.ray_serve import scaling as scaling_lib

# Flags that a replica sets itself.
_OWN = 'host', 'port', 'coordinator', 'num_processes', 'process_id'
_AUTO = 'auto'
_OF_AUTO = 'min_replicas', 'max_replicas', 'target_requests'


class Arguments(pydantic.BaseModel):
  """How Ray runs replicas; further arguments are flags of serve.py."""

  model_config = pydantic.ConfigDict(extra='allow')

  model: str  # frozen directory, on every node
  replicas: int | str = 1  # or auto: by the open requests of each
  min_replicas: int = 1  # with auto, like the next two
  max_replicas: int = 8
  # Open requests per replica from which on another one starts; None: four
  # fifths of the slots of a replica (engine.max_sequences).
  target_requests: float | None = None
  num_gpus: float = 0  # of a replica
  num_cpus: float = 1
  max_ongoing_requests: int = 256  # of a replica; more wait in the proxies
  start_seconds: float = 900  # longest until a replica is ready
  drain_seconds: float = 30
  insecure: bool = False  # may answer clients without keys

  def check(self) -> None:
    """Checks all arguments but the values of flags.

    Raises:
      ValueError: a number is out of range, a flag is one that a replica sets,
        or clients need no key.
    """
    expect.at_least('max_ongoing_requests', self.max_ongoing_requests, 1)
    if isinstance(self.replicas, str):
      expect.one_of('replicas', self.replicas, (_AUTO,))
      self._check_scaling(self.scaling())
    else:
      expect.at_least('replicas', self.replicas, 1)
      for name in _OF_AUTO:
        if name in self.model_fields_set:
          raise ValueError(
            f'{name}: got {getattr(self, name)} with replicas ='
            f' {self.replicas}, expected none; give replicas={_AUTO}, or leave'
            ' it out'
          )
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

  def scaling(self) -> scaling_lib.Scaling:
    """Returns the number of replicas by load, with `replicas=auto`.

    Raises:
      ValueError: a number is out of range.
    """
    target = self.target_requests
    return scaling_lib.Scaling(
      target_ongoing_requests=(
        scaling_lib.target_of(self._num_slots) if target is None else target
      ),
      min_replicas=self.min_replicas,
      max_replicas=self.max_replicas,
    )

  def options(self) -> dict[str, Any]:
    """Returns the options of the deployment.

    Raises:
      ValueError: a number is out of range.
    """
    found: dict[str, Any] = {
      'num_replicas': self.replicas,
      'max_ongoing_requests': self.max_ongoing_requests,
      'graceful_shutdown_timeout_s': self.drain_seconds + 10,
      'ray_actor_options': {
        'num_gpus': self.num_gpus,
        'num_cpus': self.num_cpus,
      },
    }
    if self.replicas == _AUTO:
      found['autoscaling_config'] = self.scaling().config()
    return found

  def flags(self) -> list[str]:
    """Returns the flags of serve.py."""
    return [
      f'--model={self.model}',
      f'--drain_seconds={self.drain_seconds:.0f}',
      '--replicas=0',  # the engine is in the process of the server
      *(f'--{name}={value}' for name, value in self._given.items()),
    ]

  def _check_scaling(self, scaling: scaling_lib.Scaling) -> None:
    target = scaling.target_ongoing_requests
    if self.max_ongoing_requests < target:
      raise ValueError(
        f'max_ongoing_requests: got {self.max_ongoing_requests}, expected at'
        f' least the {target:g} open requests from which on a replica is added;'
        ' raise it, or lower target_requests'
      )

  @property
  def _num_slots(self) -> int:
    """The sequences that an engine answers together."""
    given = self._given
    if (slots := given.get('engine.max_sequences')) is not None:
      return int(slots)
    if shapes := given.get('engine.decode_shapes'):
      return max(map(int, str(shapes).strip('()[]').replace(',', ' ').split()))
    return engine_config.MAX_SEQUENCES

  @property
  def _given(self) -> Mapping[str, Any]:
    return self.model_extra or {}
