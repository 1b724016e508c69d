"""A replica: the real scheduler of an engine, on a clock that costs move.

The sequence manager plans, begins and ends as in `inference.engine.engine`; in
place of a device there is a table of costs. As there, the host is one dispatch
ahead: a step is planned before the tokens of the step before are read, and a
sequence that ended meanwhile is computed in vain.
"""

import dataclasses

from inference.scheduling import limits as limits_lib, sequence_manager, spans
from studies.fleet import costs as costs_lib, traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """An engine, as far as its speed depends on it."""

  limits: limits_lib.Limits
  num_pages: int  # P, the null page included
  decode_steps: int = 8  # the most of a dispatch
  stream_seconds: float = 0.0  # the longest dispatch of decodes; 0: any
  # Whether host and device take turns, as on a clock of CPU time.
  is_serial: bool = False


@dataclasses.dataclass(kw_only=True)
class Answer:
  """The life of a request, in seconds of the simulated clock."""

  request: traffic.Request
  replica: int
  first: float = 0.0  # of its first token
  last: float = 0.0
  num_made: int = 0
  num_cached: int = 0  # tokens of its prompt

  @property
  def to_first(self) -> float:
    """Seconds to the first token."""
    return self.first - self.request.arrival

  @property
  def per_token(self) -> float:
    """Seconds per token after the first."""
    return (self.last - self.first) / max(self.num_made - 1, 1)


class Replica:
  """An engine without a device."""

  def __init__(
    self, settings: Settings, costs: costs_lib.Costs, index: int = 0
  ):
    """Starts without requests, at second 0.

    Args:
      settings: of the engine.
      costs: of its steps.
      index: of the replica in its fleet.
    """
    self.settings, self.costs, self.index = settings, costs, index
    self.now = self.busy = 0.0  # seconds; the second is the device's
    self.num_open = self.num_served = 0
    self._manager = sequence_manager.SequenceManager(
      settings.limits, num_pages=settings.num_pages
    )
    self._answers = {}
    self._device_free = 0.0
    # A step, its seconds on the device, and the second when it is computed.
    self._flight: tuple[spans.Step, float, float] | None = None
    self._step_seconds = 0.0  # of a decode step

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._answers) or self._flight is not None

  def submit(self, request: traffic.Request) -> Answer:
    """Adds a request; returns its answer, which fills as steps are made.

    Raises:
      Refused: the engine could never answer it.
    """
    if not self.has_work:
      self.now = max(self.now, request.arrival)
    answer = Answer(request=request, replica=self.index)
    sequence = self._manager.submit(
      self.num_served, request.prompt, request.most_new
    )
    self._answers[sequence] = answer
    self.num_open += 1
    self.num_served += 1
    return answer

  def step(self) -> None:
    """Dispatches a step, then takes the tokens of the step before."""
    plan = self._manager.plan()
    flight = None
    if plan.preempted or not plan.is_empty:
      num = self._manager.decode_steps(plan, self._most_steps())
      step = self._manager.begin(plan, decode_steps=num)
      self.now += self.costs.host(step)
      if step.spans:
        flight = step, *self._sent(step)
    landed, self._flight = self._flight, flight
    if landed is not None:
      step, seconds, end = landed
      is_serial = self.settings.is_serial
      self.now = self.now + seconds if is_serial else max(self.now, end)
      self._land(step)

  def _most_steps(self) -> int:
    most, seconds = self.settings.decode_steps, self.settings.stream_seconds
    if not seconds or not self._step_seconds:
      return most
    return max(1, min(most, int(seconds / self._step_seconds)))

  def _sent(self, step: spans.Step) -> tuple[float, float]:
    """Returns the seconds of a step, and when the device has computed it."""
    seconds = self.costs.seconds(step)
    if step.decodes and not step.chunks:
      turns = max(each.length for each in step.decodes)
      self._step_seconds = seconds / turns
    self._device_free = max(self.now, self._device_free) + seconds
    self.busy += seconds
    return seconds, self._device_free

  def _land(self, step: spans.Step) -> None:
    for span in step.spans:
      answer = self._answers.get(span.sequence)
      if answer is None or not span.samples:
        continue  # it ended while this step was in flight
      for _ in range(span.length if span in step.decodes else 1):
        if self._takes(span.sequence, answer):
          break

  def _takes(self, sequence, answer: Answer) -> bool:
    """Gives a sequence its next token; returns whether it was its last."""
    self._manager.append(sequence, -1 - answer.num_made)
    if not answer.num_made:
      answer.first = self.now
      answer.num_cached = sequence.num_cached
    answer.num_made += 1
    answer.last = self.now
    if answer.num_made < answer.request.num_new:
      return False
    self._manager.end(sequence)
    del self._answers[sequence]
    self.num_open -= 1
    return True
