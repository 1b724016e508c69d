"""ServerConfig: the limits within which the server answers its clients.

These fields limit how much memory, how many file descriptors and threads a
client may take, and for how long. Imports nothing heavy: serve.py makes a flag
of each field.
"""

import dataclasses
import math

from checks import expect, flag_field, paths
from text.replies import detection, formats

# A MiB of `[1,1,...]` is half a million numbers. Python runs nothing else while
# they are parsed: 25 to 50 ms on one core.
_BODY_BYTES = 2**20
EFFORTS = 'minimal', 'low', 'medium', 'high', 'xhigh'


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
  reasoning_efforts: str = flag_field.field(
    'minimal:128,low:512,medium:2048,high:8192,xhigh:32768',
    'Most tokens of reasoning for each reasoning_effort of a request, beside'
    ' none, which is 0, and auto, see --server.effort_predictor.',
  )
  effort_predictor: str = flag_field.field(
    '',
    'File of python -m training.effort, of the weights or an adapter that is'
    ' served: it chooses for requests with the reasoning_effort auto. If not'
    ' given, auto is refused.',
    is_path=True,
  )
  scorers: str = flag_field.field(
    '',
    'Reward models that strategies of requests may name as their scorers,'
    ' NAME=DIR with commas between several. Each has an engine of its own.',
  )
  verifiers: str = flag_field.field(
    '',
    'Verifiers that strategies of requests may name as their scorers, with'
    ' commas between several: number, exact, choice, pattern, json_schema,'
    ' unit_tests, which runs code of answers and of clients in a sandbox, and'
    ' column_sum, which checks the steps of a sum.',
  )
  effort_flops: float = flag_field.field(
    0.0,
    'Mean FLOPs that a request with the effort auto may cost. 0: no limit, so'
    ' that each has the effort of the most probable right answer.',
  )
  models_root: str = flag_field.field(
    '',
    'Directory of frozen directories that POST /admin/models may load. If not'
    ' given, it may load none.',
    is_path=True,
  )
  audit_share: float = flag_field.field(
    0.01,
    'Share of the requests whose answers are scored again, by a forward pass'
    ' without a cache, while no request is open. Each takes about the time of'
    ' its prefill. 0 audits none.',
  )
  audit_threshold: float = flag_field.field(
    0.0,
    'The audit raises an alarm if a log-probability differs by more than this,'
    ' in nats. 0: the most that rounding explains, 0.01 for float32 on a CPU'
    ' and 1 for bfloat16, or for an int8 or fp8 cache.',
  )
  feedback: bool = flag_field.field(
    False,
    'Stores feedback that clients without keys send to POST /v1/feedback: a'
    ' rating of an answer, and the conversation. On a server with keys, each'
    ' key allows this or not.',
  )
  price_prompt: float = flag_field.field(
    0.0,
    'Price of a million prompt tokens, in any currency. Budgets of keys are in'
    ' the same currency.',
  )
  price_cached: float = flag_field.field(
    0.0, 'Price of a million prompt tokens found in the prefix cache.'
  )
  price_completion: float = flag_field.field(
    0.0, 'Price of a million completion tokens.'
  )
  public_metrics: bool = flag_field.field(
    False, 'Whether /metrics needs no key, even if the server has keys.'
  )
  store_days: float = flag_field.field(
    30.0,
    'Days for which responses of /v1/responses are kept, with their prompts, so'
    ' that clients can continue them by an id; a request with store: false is'
    ' not kept. 0 keeps none.',
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
  # Value of the flag --drain_seconds, which is older than this class.
  drain_seconds: float = dataclasses.field(
    default=30.0, metadata={'flag': False}
  )

  @property
  def efforts(self) -> dict[str, int | None]:
    """Returns the most tokens of reasoning of each effort, None for no limit.

    Raises:
      ValueError: the field is not NAME:NUMBER, with commas between.
    """
    found: dict[str, int | None] = {'none': 0, 'auto': None}
    for part in self.reasoning_efforts.split(','):
      name, _, number = part.strip().partition(':')
      if name not in EFFORTS or not (number.isascii() and number.isdigit()):
        raise ValueError(
          f'server.reasoning_efforts: got {expect.shown(part)}, expected'
          f' NAME:TOKENS with commas between, of {", ".join(EFFORTS)}'
        )
      found[name] = int(number)
    if missing := [name for name in EFFORTS if name not in found]:
      raise ValueError(
        f'server.reasoning_efforts: got none for {", ".join(missing)}, expected'
        ' a number of tokens for each'
      )
    return found

  @property
  def verifier_names(self) -> tuple[str, ...]:
    """Returns the names of the allowed verifiers."""
    parts = (part.strip() for part in self.verifiers.split(','))
    return tuple(part for part in parts if part)

  @property
  def scorer_directories(self) -> dict[str, str]:
    """Returns the directories of reward models, by name.

    Raises:
      ValueError: the field is not NAME=DIR, with commas between.
    """
    found: dict[str, str] = {}
    for part in filter(None, self.scorers.split(',')):
      name, directory = paths.named('server.scorers', part)
      if name in found:
        raise ValueError(
          f'server.scorers: got the name {expect.shown(name)} twice, expected'
          ' different names; rename one'
        )
      found[name] = directory
    return found

  def __post_init__(self):
    _ = self.efforts, self.scorer_directories
    if not 0 <= self.effort_flops < math.inf or (
      self.effort_flops and not self.effort_predictor
    ):
      raise ValueError(
        f'server.effort_flops: got {self.effort_flops}, expected a finite'
        ' number, at least 0, with --server.effort_predictor'
      )
    expect.at_least('server.max_connections', self.max_connections, 1)
    expect.at_least('server.max_body_bytes', self.max_body_bytes, 1)
    if not 0 <= self.audit_share <= 1:
      raise ValueError(
        f'server.audit_share: got {self.audit_share}, expected 0 to 1'
      )
    if not 0 <= self.audit_threshold < math.inf:
      raise ValueError(
        f'server.audit_threshold: got {self.audit_threshold}, expected a finite'
        ' number of nats, at least 0'
      )
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
