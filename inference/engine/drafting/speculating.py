"""Which drafts an engine verifies, and what became of them.

An engine that speculates waits for the tokens in flight when a draft may follow
them, plans one step that verifies drafts of all decoding sequences, and waits
for that as well (`compiled.verification`). It sends decode steps ahead, as any
engine does, while no sequence has a draft, and where `speculation.choice`
expects them to be quicker. In a step with prompt chunks, the tokens of drafts
take places of decodes that its shape has to spare.

A sequence that a grammar constrains has drafts, too: the tokens that may follow
each of them are found while the device verifies it (`engine.flight`).
"""

from collections.abc import Hashable
import time
from typing import Any

from inference.engine import (
  engine_config,
  flight as flight_lib,
  metrics as metrics_lib,
)
from inference.engine.compiled import programs as programs_lib
from inference.requests import answer
from inference.scheduling import page_tables, scheduler, sequence_manager, spans
from inference.speculation import (
  choice as choice_lib,
  ngrams,
  source as source_lib,
)

# Chances to wait for tokens that are passed over, if waiting was in vain as
# often before.
_MOST_PASSED = 16
# Decode steps that are sent at once: a draft can follow tokens that were read.
# The host is ready for the next dispatch in less time than these take.
MOST_STEPS = 8


class Speculator:
  """Drafts tokens for the sequences of one engine."""

  def __init__(
    self,
    config: engine_config.EngineConfig,
    programs: programs_lib.Programs,
    manager: sequence_manager.SequenceManager,
    metrics: metrics_lib.Metrics,
    source: source_lib.Source | None = None,
  ):
    """Starts without sequences.

    Args:
      config: of the engine, with its kind of speculation.
      programs: of the engine; they bound the length of a draft.
      manager: of its sequences.
      metrics: of the engine.
      source: of the drafts, if they are no look-ups.
    """
    self._programs, self._manager, self._metrics = programs, manager, metrics
    self._limits = manager.limits
    self._measured = choice_lib.Measured()
    self._choice = choice_lib.Choice(self._measured)
    self._last_landed = 0.0
    # Waits for tokens that no draft followed, and chances to wait that are
    # passed over after them.
    self._num_vain, self._num_passed, self._has_waited = 0, 0, False
    # When the drafts of the latest step were begun; the seconds of all drafts
    # that the host has waited for.
    self._began, self.waited = 0.0, 0.0
    self.source = source
    if config.speculation == 'ngram':
      self.source = source_lib.OfHost(ngrams.Ngrams())

  @property
  def most_steps(self) -> int:
    """Returns the largest number of decode steps of a dispatch."""
    most = self._programs.decode_steps
    return min(most, MOST_STEPS) if self.source else most

  def wants_tokens(self, step: spans.Step, may_draft: bool) -> bool:
    """Returns whether the tokens in flight are needed before the next plan.

    After a step that verifies, always: how many tokens it gives is unknown.
    After another one if the known tokens have a draft, which may go on.

    Args:
      step: in flight.
      may_draft: whether the next step may verify anything.
    """
    if step.is_verified or not (may_draft and self.source):
      return step.is_verified
    running = [each for each in self._manager.running() if each.is_ready]
    # One without a token in flight has prompt tokens left.
    ready = [each for each in running if each.num_in_flight]
    if not ready or not (most := self._most_tokens()):
      return False
    num_chunks = 0
    if len(ready) < len(running):  # the next step is expected to be like this
      most_chunks = self._limits.max_mixed_chunks
      num_chunks = min(max(len(step.chunks), 1), most_chunks)
    num_prompt = num_chunks * self._limits.chunk_tokens
    lengths = self.source.lengths(ready, most)
    if not self._chosen(lengths, num_chunks, num_prompt):
      return False
    if not self.source.advance(ready):
      return False
    self._num_passed += 1
    if self._num_passed < min(self._num_vain, _MOST_PASSED):
      return False
    self._num_passed, self._has_waited = 0, True
    return True

  def drafts(
    self, plan: scheduler.StepPlan
  ) -> dict[Hashable, tuple[int, ...]] | None:
    """Returns the drafts that a step of a plan verifies; None: it has none.

    Args:
      plan: the latest; no step is in flight.
    """
    if not self.source or not (most := self._most_tokens()):
      return None
    by_id = {each.id: each for each in self._manager.running()}
    decoding = [by_id[id] for id in plan.decodes if id in by_id]
    # A sequence that enters with this plan has no draft yet.
    drafts = dict.fromkeys(plan.decodes, 0) | self.source.ready(decoding, most)
    chosen = self._chosen(
      drafts,
      sum(self._limits.num_chunks(each.length) for each in plan.prefills),
      sum(each.length for each in plan.prefills),
    )
    has_waited, self._has_waited = self._has_waited, False
    lengths = self._manager.draft_lengths(plan, chosen) if chosen else {}
    if not any(lengths.values()):
      self._num_vain += has_waited
      return None
    self._num_vain = 0
    return self.source.placed({id: num for id, num in lengths.items() if num})

  def filled(self, step: spans.Step, state: Any) -> spans.Step:
    """Returns a step that verifies drafts with the tokens of its drafts.

    Args:
      step: as it was begun, after the copies of its pages.
      state: of the engine.
    """
    assert self.source
    self._began = time.perf_counter()
    step = self.source.filled(step, state)
    self.waited += time.perf_counter() - self._began
    return step

  def _most_tokens(self) -> int:
    """Returns the tokens of the longest draft; 0: nothing can verify any."""
    # Those of the smallest number: all widths have the same numbers of spans.
    widths = [shape.width for shape in self._programs.verified_shapes(1)]
    return max(widths, default=1) - 1

  def _chosen(
    self, drafts: source_lib.Lengths, num_chunks: int, num_prompt: int
  ) -> dict[Hashable, int]:
    """Returns how many tokens of drafts are worth a step; {}: none are.

    Args:
      drafts: tokens of the draft of every decoding sequence, 0 or more.
      num_chunks: chunks of the step.
      num_prompt: tokens in them.
    """
    if not any(drafts.values()):
      return {}
    assert self.source
    num, programs = len(drafts), self._programs
    plain = programs.shape_for(num, num_chunks)
    rows = plain if num_chunks else plain.num_decodes
    if self.source.is_endless and not self._choice.costs.seconds(rows, 1):
      return {}
    waiting = self._manager.num_waiting
    if num_chunks:
      num_later = len(self._manager.running()) + waiting
      num_later = min(num_later, self._limits.max_sequences)
      chosen = self._choice.choose_beside(
        drafts,
        programs.beside_shapes(num, num_chunks),
        rows,
        width=self._most_tokens() + 1,
        num_prompt=num_prompt,
        rows_later=programs.shape_for(num_later, 0).num_decodes,
        num_later=num_later,
      )
    else:
      shapes = programs.verified_shapes(num)
      chosen = self._choice.choose(
        drafts,
        [(shape.num_spans, shape.width) for shape in shapes],
        rows,
        is_queue=waiting > 0,
      )
    self._metrics.speculation_gain.set(chosen.gain)
    return chosen.lengths

  def timed(
    self, flight: flight_lib.Flight, num_steps: int, now: float
  ) -> None:
    """Notes how long a dispatch took, at the time when it was read.

    A step that verifies takes from the reading of the one before: the host
    plans while the device waits. The time of its drafts is a part of it.
    """
    before, self._last_landed = self._last_landed, now
    if not self.source or not flight.step.decodes or not num_steps:
      return
    seconds = now - max(flight.sent_at, before)
    if flight.step.is_verified:
      # After a pause without work, the time between two readings says nothing.
      seconds = min(now - before, 2 * (now - max(self._began, before)))
    rows: Hashable = flight.shape.num_decodes
    if flight.step.chunks:
      rows = flight.beside or flight.shape
    self._measured.observe(rows, flight.width, seconds / num_steps)

  def landed(
    self, span: spans.Span, tokens: list[int], live: answer.Live
  ) -> None:
    """Counts the tokens of a draft, and takes back the wrong ones.

    Args:
      span: that was verified.
      tokens: that the answer has taken.
      live: the answer.
    """
    assert span.tokens is not None
    draft = span.tokens[1:]
    num_accepted = sum(
      token == guess for token, guess in zip(tokens, draft, strict=False)
    )
    live.usage.accepted_tokens += num_accepted
    live.usage.rejected_tokens += len(draft) - num_accepted
    self._metrics.count_draft(drafted=len(draft), accepted=num_accepted)
    self._choice.observe(
      span.sequence.id, accepted=num_accepted, length=len(draft)
    )
    self._metrics.acceptance.set(self._choice.acceptance)
    if not live.transcript.finish_reason:
      self._manager.reject(span.sequence, span.length - len(tokens))

  def forget(self, sequence: page_tables.Sequence) -> None:
    """Drops everything kept for a sequence, which has ended."""
    if self.source:
      self.source.forget(sequence.id)
      self._choice.forget(sequence.id)
