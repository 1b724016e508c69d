"""The processes of an engine, as flags; the names are those of train.py.

Imports no JAX: serve.py makes a flag of each field.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from checks import expect, flag_field

LOST = 75  # exit code: start all processes again (EX_TEMPFAIL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The processes that share one engine.

  Raises:
    ValueError: the timeout is below 1 s.
  """

  coordinator: str = flag_field.field(
    '',
    'Address of the first of several processes whose devices share one engine,'
    ' as host:port. The same command starts each of them; the first answers.'
    ' Empty: read from the environment (see parallel/processes.py), or one'
    ' process.',
  )
  num_processes: int = flag_field.field(
    None,
    'Number of processes of the engine. If not given: as for --coordinator.',
  )
  process_id: int = flag_field.field(
    None, 'Index of this process, from 0. If not given: as for --coordinator.'
  )
  heartbeat_timeout_s: int = flag_field.field(
    60,
    'Seconds without a heartbeat after which a process counts as dead: one of'
    ' several that share an engine, or a replica, which is then killed and'
    ' started again. A start, and a step of an engine, may take ten times as'
    ' long. Raise it if slow machines are taken for dead.',
  )

  def __post_init__(self):
    expect.at_least('--heartbeat_timeout_s', self.heartbeat_timeout_s, 1)

  def cluster(self, environ: Mapping[str, str]) -> Any:
    """Returns the `processes.Cluster` of this process; None: it is alone.

    Args:
      environ: environment variables.

    Raises:
      ValueError: a value is missing, or values contradict each other.
    """
    from parallel import processes  # here, since it imports JAX

    count, index = self.num_processes, self.process_id
    return processes.detect(
      environ,
      coordinator=self.coordinator,
      num_processes=-1 if count is None else count,
      process_id=-1 if index is None else index,
    )
