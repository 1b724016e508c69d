"""A simulated device made of dictionaries, and a loop that drives it.

The device remembers for each position of each page which tokens, from the first
on and under which scope, its keys and values would have been computed from. So
a page that is handed out too early, shared with the wrong sequence, not copied
before it is written or read before it is computed shows at once.
"""

import collections
import dataclasses
import zlib

from inference.scheduling import (
  limits as limits_lib,
  page_tables,
  pages,
  sequence_manager,
  spans,
)


def limits(**changes) -> limits_lib.Limits:
  """Returns tiny limits, with changes."""
  fields = {
    'max_sequences': 4,
    'chunk_tokens': 4,
    'max_chunks': 4,
    'max_mixed_chunks': 2,
    'stall_context': 10**9,  # contexts here are short
    'page_size': 4,
    'aging_steps': 8,
  }
  return limits_lib.Limits(**{**fields, **changes})


def preempt(
  manager: sequence_manager.SequenceManager, sequence: page_tables.Sequence
):
  """Makes a sequence give back its pages and wait, as a plan would."""
  assert sequence.pages
  manager._vacate(sequence)
  manager._planned = None


def forget(manager: sequence_manager.SequenceManager, scope):
  """Empties the prefix cache of one scope."""
  manager.tables.cache.forget(scope)
  manager._planned = None


@dataclasses.dataclass
class Truth:
  """The expected state of a sequence, known without pages."""

  scope: object
  num_prompt: int
  max_new_tokens: int
  tokens: list[int]  # tokens in flight included
  num_appended: int = 0


class Device:
  """Executes steps; `last_B` is the last sampled token of each slot."""

  def __init__(self, page_size: int):
    self.page_size = page_size
    self.truths: dict[object, Truth] = {}
    self.contents: dict[tuple[int, int], int] = {}
    self.last_B: dict[int, int] = {}
    self._histories: dict[tuple, int] = {}

  def execute(self, step: spans.Step) -> list[tuple[object, int]]:
    """Computes a step and returns the tokens that it samples."""
    self._copy(step.copies)
    written: set[tuple[int, int]] = set()
    sampled = []
    for span in step.spans:
      truth = self.truths[span.sequence.id]
      stop = span.start + span.length
      assert span.length >= 1
      assert len(span.pages) == -(-stop // self.page_size)
      assert len(set(span.pages)) == len(span.pages)
      assert pages.NULL_PAGE not in span.pages
      tokens = [self.last_B[span.slot]] if span.tokens is None else span.tokens
      assert list(tokens) == truth.tokens[span.start :][: len(tokens)], span
      history = self._read(span, truth)
      if span in step.decodes:
        sampled += self._decode(span, history, truth, written)
        continue
      assert len(tokens) == span.length
      for position, token in enumerate(tokens, span.start):
        history = self._write(span, position, token, history, written)
      assert span.samples == (stop == len(truth.tokens))
      if span.samples:
        sampled.append((span.sequence.id, self._sample(span, history, truth)))
    return sampled

  def _decode(self, span, history: int, truth: Truth, written: set):
    """Computes one token after another, and samples after each."""
    assert len(truth.tokens) == span.start + 1
    assert span.samples
    sampled = []
    for position in range(span.start, span.start + span.length):
      token = truth.tokens[position]
      history = self._write(span, position, token, history, written)
      sampled.append((span.sequence.id, self._sample(span, history, truth)))
    return sampled

  def _write(self, span, position: int, token: int, history: int, written: set):
    place = self._place(span, position)
    assert place not in written, f'{span} writes where another span does'
    written.add(place)
    self.contents[place] = self._history(history, token)
    return self.contents[place]

  def _sample(self, span, history: int, truth: Truth) -> int:
    # A function of the sequence and its past: samples of one prompt differ, and
    # no sample depends on other sequences.
    token = zlib.crc32(f'{span.sequence.id} {history}'.encode()) % 5
    self.last_B[span.slot] = token
    truth.tokens.append(token)
    return token

  def _copy(self, copies: tuple[tuple[int, int], ...]):
    destinations = [destination for _, destination in copies]
    assert len(set(destinations)) == len(destinations)
    read = {
      (destination, offset): self.contents.get((source, offset))
      for source, destination in copies
      for offset in range(self.page_size)
    }
    self.contents.update(
      (place, content) for place, content in read.items() if content is not None
    )

  def _read(self, span: spans.Span, truth: Truth) -> int:
    """Reads the past of a span; returns the history that it continues."""
    history = self._history(-1, truth.scope)
    for position in range(span.start):
      history = self._history(history, truth.tokens[position])
      found = self.contents.get(self._place(span, position))
      assert found == history, f'{span} reads another sequence at {position}'
    return history

  def _place(self, span: spans.Span, position: int) -> tuple[int, int]:
    index, offset = divmod(position, self.page_size)
    return span.pages[index], offset

  def _history(self, before: int, token) -> int:
    return self._histories.setdefault((before, token), len(self._histories))


class Loop:
  """Drives a SequenceManager as an engine would.

  The host is `depth` dispatches ahead of the device. Each has up to
  `decode_steps` decode steps.
  """

  def __init__(
    self,
    limits: limits_lib.Limits,
    *,
    num_pages: int,
    depth: int = 1,
    decode_steps: int = 1,
  ):
    self.limits, self.decode_steps = limits, decode_steps
    self.manager = sequence_manager.SequenceManager(limits, num_pages=num_pages)
    self.device = Device(limits.page_size)
    self.depth = depth
    self.sequences: dict[object, page_tables.Sequence] = {}
    self.steps: list[spans.Step] = []
    self.in_flight: collections.deque[list] = collections.deque()
    self.ended: dict[object, Truth] = {}
    self.end_steps: dict[object, int] = {}
    self.first_steps: dict[object, int] = {}

  @property
  def truths(self) -> dict[object, Truth]:
    """The expected state of every unfinished sequence."""
    return self.device.truths

  def submit(self, id, prompt, max_new_tokens: int, *, parent=None, **settings):
    """Submits a sequence to the manager, and notes its truth."""
    self.sequences[id] = self.manager.submit(
      id,
      prompt,
      max_new_tokens,
      parent=None if parent is None else self.sequences[parent],
      **settings,
    )
    self.truths[id] = Truth(
      settings.get('scope'), len(prompt), max_new_tokens, list(prompt)
    )

  def step(self) -> spans.Step | None:
    """Dispatches a step if there is one, and reads a result that is due."""
    plan = self.manager.plan()
    step = None
    if not plan.is_empty or plan.preempted:
      num = self.manager.decode_steps(plan, self.decode_steps)
      step = self.manager.begin(plan, decode_steps=num)
      self._check(step)
      self.steps.append(step)
      for span in step.spans:
        self.first_steps.setdefault(span.sequence.id, len(self.steps))
      self.in_flight.append(self.device.execute(step))
    if len(self.in_flight) > self.depth or (step is None and self.in_flight):
      self.take_results()
    return step

  def take_results(self):
    """Appends the tokens of the oldest step in flight."""
    for id, token in self.in_flight.popleft():
      if id not in self.truths:
        continue  # it has ended meanwhile
      truth = self.truths[id]
      self.manager.append(self.sequences[id], token)
      truth.num_appended += 1
      if truth.num_appended == truth.max_new_tokens:
        self.end(id)

  def cancel(self, id) -> Truth:
    """Ends a sequence that does not count as ended; returns its truth."""
    self.manager.end(self.sequences[id])
    return self.truths.pop(id)

  def preempt(self, id):
    """Preempts a sequence that holds pages."""
    preempt(self.manager, self.sequences[id])

  def holders(self) -> list:
    """Returns the ids of the sequences that hold pages."""
    return [id for id in self.truths if self.sequences[id].pages]

  def end(self, id):
    """Ends a sequence."""
    self.ended[id] = self.cancel(id)
    self.end_steps[id] = len(self.steps)

  def run(self, max_steps: int = 10_000):
    """Steps until nothing is left to do, each time making progress."""
    for _ in range(max_steps):
      if not self.truths:
        return
      was_in_flight = bool(self.in_flight)
      step = self.step()
      is_progress = step is not None and (step.decodes or step.chunks)
      assert is_progress or was_in_flight, 'a step that does nothing'
    raise AssertionError(f'{len(self.truths)} left after {max_steps} steps')

  def _check(self, step: spans.Step):
    limits = self.limits
    assert len(step.decodes) <= limits.max_sequences
    most = limits.max_mixed_chunks if step.decodes else limits.max_chunks
    assert len(step.chunks) <= most
    spans = step.spans
    assert {span.slot for span in spans} <= set(range(limits.max_sequences))
    slots = {span.sequence.id: span.slot for span in spans}
    assert len(set(slots.values())) == len(slots)
    assert {each.id for each in step.seated} <= slots.keys()
    assert len(step.copies) <= len(slots)
    most = 1 if step.chunks else self.decode_steps
    assert all(span.length <= most for span in step.decodes)
    assert all(span.length <= limits.chunk_tokens for span in step.chunks)
    lengths = [span.start for span in step.decodes]
    assert lengths == sorted(lengths)
