"""ServerConfig: the limits within which the server answers its clients.

No client may hold memory, a file descriptor or a thread for longer, or take
more of it, than these fields say. Imports nothing heavy: serve.py makes a flag
of each field.
"""

import dataclasses
import math

from checks import expect, flag_field
from text.replies import detection, formats

# A MiB of `[1,1,...]` is half a million numbers. Python runs nothing else while
# they are parsed: 25 to 50 ms on one core.
_BODY_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
  """Limits of the server; every field is a flag `--server.NAME` of serve.py.

  Raises:
    ValueError: a value is out of range.
  """

  max_connections: int = flag_field.field(
    1024,
    'Largest number of open connections. At this number the connection that has'
    ' waited longest without a request is closed for a new one; if all have a'
    ' request, a new one is answered 503.',
  )
  max_body_bytes: int = flag_field.field(
    _BODY_BYTES,
    'Largest body of a request; a larger one is answered 413. While a body is'
    ' parsed, the event loop waits: a larger limit delays other requests more.',
  )
  head_seconds: float = flag_field.field(
    10.0,
    'Seconds in which the head of a request must arrive, from its first byte or'
    ' from the connection; then the connection is closed.',
  )
  body_seconds: float = flag_field.field(
    30.0,
    'Seconds in which the body of a request must arrive; then the answer is 408'
    ' and the connection is closed.',
  )
  write_seconds: float = flag_field.field(
    30.0,
    'Seconds in which a client must read a part of its answer; then its'
    ' connection is closed and its request cancelled.',
  )
  idle_seconds: float = flag_field.field(
    15.0,
    'Seconds that a connection may wait for its next request; then it is'
    ' closed.',
  )
  store_days: float = flag_field.field(
    30.0,
    'Days for which responses of /v1/responses are kept, with their prompts, so'
    ' that clients can continue them by an id; a request says store: false to'
    ' be left out. 0 keeps none.',
  )
  store_mebibytes: int = flag_field.field(
    256,
    'Largest size of the responses that are kept for one API key, in MiB; the'
    ' oldest make room.',
  )
  ping_seconds: float = flag_field.field(
    15.0,
    'Seconds without an event after which a stream sends a comment, so that'
    ' no proxy closes it while a prompt waits or is computed.',
  )
  reply_format: str = flag_field.field(
    detection.AUTO,
    'Format of tool calls and reasoning in the answers of a model: auto finds'
    f' it in the chat template; none; {", ".join(formats.CALLS)} of calls;'
    f' {", ".join(formats.REASONING)} of reasoning; or one of each, as'
    ' hermes+think.',
  )
  # Of the flag --drain_seconds, which is older than this class.
  drain_seconds: float = dataclasses.field(
    default=30.0, metadata={'flag': False}
  )

  def __post_init__(self):
    expect.at_least('server.max_connections', self.max_connections, 1)
    expect.at_least('server.max_body_bytes', self.max_body_bytes, 1)
    if not 0 <= self.store_days < math.inf:
      raise ValueError(
        f'server.store_days: got {self.store_days}, expected a finite number of'
        ' days, at least 0; 0 keeps no responses'
      )
    expect.at_least('server.store_mebibytes', self.store_mebibytes, 1)
    if not 0 <= self.drain_seconds < math.inf:
      raise ValueError(
        f'drain_seconds: got {self.drain_seconds}, expected a finite number of'
        ' seconds, at least 0'
      )
    detection.check_name(self.reply_format)
    for name in ('head', 'body', 'write', 'idle', 'ping'):
      seconds = getattr(self, f'{name}_seconds')
      if not 0 < seconds < math.inf:
        raise ValueError(
          f'server.{name}_seconds: got {seconds}, expected a finite number of'
          ' seconds above 0'
        )
