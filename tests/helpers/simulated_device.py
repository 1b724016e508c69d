"""A device made of dictionaries, and a loop that drives a roster with it.

The device remembers for each position of each page which tokens, from the first
on and under which scope, its keys and values would have been computed from. So
a page that is handed out too early, shared with the wrong sequence, not copied
before it is written or read before it is computed shows at once.
"""

import collections
import dataclasses
import zlib

from inference.scheduling import pages, scheduler, sequence_manager


def limits(**changes) -> scheduler.Limits:
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
  return scheduler.Limits(**{**fields, **changes})


@dataclasses.dataclass
class Truth:
  """What a sequence should be, known without any pages."""

  scope: object
  num_prompt: int
  max_new_tokens: int
  tokens: list[int]  # those in flight included
  num_appended: int = 0


class Device:
  """Executes steps; `last_B` is what a slot sampled last."""

  def __init__(self, page_size: int):
    self.page_size = page_size
    self.truths: dict[object, Truth] = {}
    self.contents: dict[tuple[int, int], int] = {}
    self.last_B: dict[int, int] = {}
    self._histories: dict[tuple, int] = {}

  def execute(self, step: sequence_manager.Step) -> list[tuple[object, int]]:
    """Computes a step and returns the tokens that it samples."""
    self._copy(step.copies)
    written: set[tuple[int, int]] = set()
    sampled = []
    for row in (*step.decodes, *step.chunks):
      truth = self.truths[row.id]
      stop = row.start + row.length
      assert row.length >= 1
      assert len(row.pages) == -(-stop // self.page_size)
      assert len(set(row.pages)) == len(row.pages)
      assert pages.NULL_PAGE not in row.pages
      tokens = [self.last_B[row.slot]] if row.tokens is None else row.tokens
      assert list(tokens) == truth.tokens[row.start : stop], row
      history = self._read(row, truth)
      for position, token in enumerate(tokens, row.start):
        place = self._place(row, position)
        assert place not in written, f'{row} writes where another row does'
        written.add(place)
        history = self._history(history, token)
        self.contents[place] = history
      assert row.samples == (stop == len(truth.tokens))
      if row.samples:
        sampled.append((row, history))
    for row, history in sampled:
      # Of the sequence and its past only: samples of one prompt differ, and
      # none depends on who else is there.
      token = zlib.crc32(f'{row.id} {history}'.encode()) % 5
      self.last_B[row.slot] = token
      self.truths[row.id].tokens.append(token)
    return [(row.id, self.truths[row.id].tokens[-1]) for row, _ in sampled]

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

  def _read(self, row: sequence_manager.Row, truth: Truth) -> int:
    """Reads all that a row attends to; returns what its last token is from."""
    history = self._history(-1, truth.scope)
    for position in range(row.start):
      history = self._history(history, truth.tokens[position])
      found = self.contents.get(self._place(row, position))
      assert found == history, f'{row} reads another sequence at {position}'
    return history

  def _place(self, row: sequence_manager.Row, position: int) -> tuple[int, int]:
    index, offset = divmod(position, self.page_size)
    return row.pages[index], offset

  def _history(self, before: int, token) -> int:
    return self._histories.setdefault((before, token), len(self._histories))


class Loop:
  """Drives a roster as an engine would, `depth` steps ahead of the device."""

  def __init__(
    self, limits: scheduler.Limits, *, num_pages: int, depth: int = 1
  ):
    self.limits = limits
    self.roster = sequence_manager.Roster(limits, num_pages=num_pages)
    self.device = Device(limits.page_size)
    self.depth = depth
    self.steps: list[sequence_manager.Step] = []
    self.in_flight: collections.deque[list] = collections.deque()
    self.ended: dict[object, Truth] = {}
    self.end_steps: dict[object, int] = {}
    self.first_steps: dict[object, int] = {}

  @property
  def truths(self) -> dict[object, Truth]:
    """What every sequence that is here should be."""
    return self.device.truths

  def submit(self, id, prompt, max_new_tokens: int, **settings):
    """Submits a sequence to the roster, and to the truth."""
    self.roster.submit(id, prompt, max_new_tokens, **settings)
    self.truths[id] = Truth(
      settings.get('scope'), len(prompt), max_new_tokens, list(prompt)
    )

  def step(self) -> sequence_manager.Step | None:
    """Dispatches a step if there is one, and takes in a result that is due."""
    plan = self.roster.plan()
    step = None
    if not plan.is_empty or plan.preempted:
      step = self.roster.begin(plan)
      self._check(step)
      self.steps.append(step)
      for row in (*step.decodes, *step.chunks):
        self.first_steps.setdefault(row.id, len(self.steps))
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
      self.roster.append(id, token)
      truth.num_appended += 1
      if truth.num_appended == truth.max_new_tokens:
        self.end(id)

  def end(self, id):
    """Ends a sequence."""
    self.roster.end(id)
    self.ended[id] = self.truths.pop(id)
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

  def _check(self, step: sequence_manager.Step):
    limits = self.limits
    assert len(step.decodes) <= limits.max_sequences
    most = limits.max_mixed_chunks if step.decodes else limits.max_chunks
    assert len(step.chunks) <= most
    rows = (*step.decodes, *step.chunks)
    assert {row.slot for row in rows} <= set(range(limits.max_sequences))
    slots = {row.id: row.slot for row in rows}
    assert len(set(slots.values())) == len(slots)
    assert set(step.seated) <= slots.keys()
    assert len(step.copies) <= len(slots)
    assert all(row.length == 1 for row in step.decodes)
    assert all(row.length <= limits.chunk_tokens for row in step.chunks)
    lengths = [row.start for row in step.decodes]
    assert lengths == sorted(lengths)
