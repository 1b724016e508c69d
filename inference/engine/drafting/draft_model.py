"""The draft model of an engine: a smaller model guesses, the model verifies.

A draft model has a pool of as many pages as the model, and reads its page
tables (`speculation.followed`). It computes nothing until drafts are worth
their time. Then it first catches up with the tokens of the sequences, a few
chunks per step, so that no other sequence waits for a long prompt. From then on
it has one or two tokens to compute before each draft.

Which tokens it drafts changes the time of an answer, and never a token of it:
so it has fast numerics beside a model with invariant ones, and guesses for
adapters, too, as their base would answer.

Where devices share the model, each has a copy of the draft model and of its
pages, and all compute the same: it is small, and parts of it would wait for
each other more than they compute. The samples are made as those of the model
are, each device with its part of the vocabulary, so they have the same noise.

Reference: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
"""

from collections.abc import Collection, Sequence
from concurrent import futures
import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from inference.engine import (
  device_state,
  engine_config,
  execution,
  inputs as inputs_lib,
)
from inference.engine.compiled import programs as programs_lib
from inference.engine.drafting import draft_steps
from inference.engine.spread import placement as placement_lib, results
from inference.scheduling import page_tables
from inference.speculation import followed as followed_lib, source
from models import kv_cache as kv_cache_lib, model_config, transformer

_FORM = results.alike(donated=(1,))  # of the programs, which donate the pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """A frozen model that drafts."""

  config: model_config.ModelConfig
  params: device_state.Unread
  dtype: Any
  digest: str = ''  # of the weights


class DraftModel:
  """A model that drafts, see `source.Source`; of the engine's thread."""

  is_endless = True

  def __init__(
    self,
    weights: Weights,
    config: engine_config.EngineConfig,
    placement: placement_lib.Placement,
  ):
    """Chooses the way of computing; allocates nothing.

    Args:
      weights: of the model.
      config: of the engine.
      placement: of the engine.

    Raises:
      ValueError: the engine has a way of computing that the model does not
        support.
    """
    self._weights, self._placement = weights, placement
    self._model_config = dataclasses.replace(weights.config, scan_layers=False)
    platform, dtype = placement.device.platform, weights.dtype
    self._backend = backend(
      config, self._model_config, dtype, platform
    ).multiplying(config, weights.params.shapes, dtype, platform)
    self._model = transformer.Transformer(
      self._model_config,
      jnp.dtype(weights.dtype),
      self._backend.execution,
    )
    self._vocab_size = placement.num_ids
    self._chunk_tokens = config.chunk_tokens
    context = config.context(placement.model.max_length)
    self._table_width = config.table_width(context)
    self._padding_slot = config.max_sequences
    self._most = max(width for _, width in config.verified_shapes()) - 1
    rows = sorted({rows for rows, _ in config.verified_shapes()})
    # Every second one: a program takes long to compile, and rows of padding
    # cost a small model little.
    self._rows = sorted({rows[0], *rows[::-2]})
    self._chunks = sorted({1, config.max_chunks})
    self._compiled: dict[Any, Any] = {}

  @property
  def digest(self) -> str:
    """The digest of the weights."""
    return self._weights.digest

  @property
  def num_bytes(self) -> int:
    """Bytes of the weights."""
    return self._weights.params.num_bytes

  @property
  def bytes_per_token(self) -> float:
    """Bytes of the KV cache of one token, all layers."""
    return self._backend.bytes_per_token(self._model_config)

  def allocate(
    self,
    state: device_state.State,
    params: Any,
    programs: programs_lib.Programs,
  ) -> None:
    """Reads the weights, and makes as many pages as the engine has.

    Args:
      state: of the engine.
      params: shapes of its params.
      programs: of the engine; calls go through them.
    """
    del params
    self._programs = programs
    num_pages, page_size = state.kv_cache[0].kv_PQYC.shape[:2]
    self._page_size = page_size
    self._slots = device_state.abstract(state.slots)
    self._followed = followed_lib.Followed(page_size)
    params = self._backend.read(self._weights.params, self._model_config)
    self._params = self._placement.copied(params)
    kv_cache = kv_cache_lib.init_pages(
      self._model_config,
      num_pages=num_pages,
      page_size=page_size,
      dtype=self._backend.kv_dtype,
      channels=self._backend.channels,
    )
    self._kv_cache: Any = self._placement.copied(kv_cache)
    self._shapes = device_state.abstract(self.arrays)

  def use(self, params: device_state.Params) -> None:
    """Does nothing: this model has weights of its own."""

  @property
  def arrays(self) -> tuple[device_state.Params, device_state.KVCache]:
    """Weights and pages."""
    return self._params, self._kv_cache

  def compile(self, is_now: bool = True) -> None:
    """Compiles the programs; from any thread, until then there are no drafts.

    Args:
      is_now: False leaves them to a later call.
    """
    if not is_now or self._compiled:
      return
    made = {}
    with futures.ThreadPoolExecutor() as pool:
      for num in self._chunks:
        layout = self._layout(num)
        flat_I = np.zeros((layout.size,), np.int32)
        lowered = self._placement.lower_drafts(
          draft_steps.extend,
          *self._shapes,
          flat_I,
          form=_FORM,
          layout=layout,
          model=self._model,
        )
        made['extend', num] = pool.submit(lowered.compile)
      for num in self._rows:
        flat_I, _ = draft_steps.empty(num, self._table_width, 0)
        lowered = self._placement.lower_drafts(
          draft_steps.draft,
          *self._shapes,
          self._slots,
          flat_I,
          form=_FORM,
          num_rows=num,
          most=self._most,
          model=self._model,
          vocab_size=self._vocab_size,
        )
        made['draft', num] = pool.submit(lowered.compile)
    self._compiled = {key: each.result() for key, each in made.items()}

  def compute(
    self,
    key: tuple[str, int],
    state: device_state.State | None,
    flat_I: np.ndarray,
  ) -> np.ndarray | None:
    """Calls a program; returns the tokens of drafts, and waits for them.

    Args:
      key: of the program: its kind, and its number of chunks or rows.
      state: of the engine; chunks need none.
      flat_I: the inputs, filled.
    """
    program = self._compiled[key]
    if state is None:
      self._kv_cache = program(self._params, self._kv_cache, flat_I)
      return None
    self._kv_cache, tokens_GD = program(
      self._params, self._kv_cache, state.slots, flat_I
    )
    return np.asarray(tokens_GD)

  def lengths(
    self, sequences: Collection[page_tables.Sequence], most: int
  ) -> dict[Any, int]:
    """Returns how many tokens a draft of each sequence may have."""
    return {each.id: self._length(each, most) for each in sequences}

  def advance(self, sequences: Collection[page_tables.Sequence]) -> bool:
    """Computes a few chunks of sequences; returns whether any is complete."""
    return len(self._caught_up(sequences)) > 0

  def ready(
    self, sequences: Collection[page_tables.Sequence], most: int
  ) -> dict[Any, int]:
    """Returns the length of each draft; 0 where tokens are still missing.

    Computes a few chunks of the missing tokens first.
    """
    known = self._caught_up(sequences)
    return {
      each.id: self._length(each, most) if each.id in known else 0
      for each in sequences
    }

  def placed(self, lengths: source.Lengths) -> dict[Any, tuple[int, ...]]:
    """Returns places for drafts of these lengths."""
    return {id: (0,) * length for id, length in lengths.items()}

  def filled(self, step, state):
    """Drafts, and returns the step with the tokens; waits for the device."""
    drafted = [span for span in step.decodes if span.length > 1]
    num_rows = next(num for num in self._rows if num >= len(drafted))
    flat_I, inputs = draft_steps.empty(
      num_rows, self._table_width, self._padding_slot
    )
    # A page that was just copied is not in the cache of this model: its
    # sequence catches up in the next step, and its draft is no guess in this.
    drafted = [span for span in drafted if self._is_known(span.sequence)]
    for row, span in enumerate(drafted):
      tokens = span.sequence.tokens
      num_known = len(tokens) - self._num_computed(span.sequence)
      inputs.known_KD[-num_known:, row] = tokens[-num_known:]
      inputs.num_known_D[row] = num_known
      inputs.positions_D[row] = span.start
      inputs.lengths_D[row] = span.length - 1
      inputs.slots_D[row] = span.slot
      inputs.table_DL[row, : len(span.pages)] = span.pages
    key = 'draft', num_rows
    tokens_GD = self._programs.draft(self.compute, key, state, flat_I)
    assert tokens_GD is not None
    filled = {}
    for row, span in enumerate(drafted):
      guess = tuple(tokens_GD[: span.length - 1, row].tolist())
      sequence = span.sequence
      self._followed.wrote(sequence.id, sequence.tokens, len(sequence.tokens))
      # No key of the last one is computed.
      self._followed.guessed(sequence.id, span.pages, guess[:-1])
      assert span.tokens is not None
      filled[sequence.id] = dataclasses.replace(
        span, tokens=(span.tokens[0], *guess)
      )
    decodes = tuple(filled.get(x.sequence.id, x) for x in step.decodes)
    return dataclasses.replace(step, decodes=decodes)

  def forget(self, id: Any) -> None:
    """Drops what is known of a sequence, which has ended."""
    self._followed.forget(id)

  def _length(self, sequence: page_tables.Sequence, most: int) -> int:
    if not self._compiled:
      return 0
    # Positions beyond its context mean nothing to the draft model.
    room = self._model_config.max_length - len(sequence.tokens)
    return max(min(source.most_of(sequence, most), room), 0)

  def _num_computed(self, sequence: page_tables.Sequence) -> int:
    return self._followed.num_computed(
      sequence.id, sequence.tokens, sequence.pages, sequence.num_preemptions
    )

  def _is_known(self, sequence: page_tables.Sequence) -> bool:
    """Returns whether `draft` can compute all that is left."""
    left = len(sequence.tokens) - self._num_computed(sequence)
    return left <= draft_steps.KNOWN

  def _caught_up(self, sequences: Collection[page_tables.Sequence]) -> set[Any]:
    """Computes known tokens; returns the ids of sequences with none left.

    One chunk of a sequence is always computed. More of them are for as many as
    a step of prompts has.
    """
    known, work = set(), []
    for each in sequences:
      if not self._length(each, 1):
        continue
      start, end = self._num_computed(each), len(each.tokens) - 1
      if end + 1 - start > draft_steps.KNOWN:
        room = max(self._chunks[-1] - len(work), 1)
        stops = [*range(start + self._chunk_tokens, end, self._chunk_tokens)]
        cuts = [start, *stops, end][: room + 1]
        work += [(each, *span) for span in itertools.pairwise(cuts)]
        if cuts[-1] < end:
          continue
      known.add(each.id)
    most = self._chunks[-1]
    for at in range(0, len(work), most):
      self._extend(work[at : at + most])
    return known

  def _extend(
    self, work: Sequence[tuple[page_tables.Sequence, int, int]]
  ) -> None:
    """Computes chunks (sequence, start, stop)."""
    num_chunks = next(num for num in self._chunks if num >= len(work))
    flat_I, inputs = inputs_lib.empty(
      self._layout(num_chunks), padding_slot=self._padding_slot
    )
    for row, (sequence, start, stop) in enumerate(work):
      at = row * self._chunk_tokens
      part = slice(at, at + stop - start)
      inputs.tokens_T[part] = sequence.tokens[start:stop]
      inputs.positions_T[part] = np.arange(start, stop)
      pages = sequence.pages[: -(-stop // self._page_size)]
      inputs.chunk_table_XL[row, : len(pages)] = pages
      self._followed.wrote(sequence.id, sequence.tokens, stop)
    self._programs.draft(self.compute, ('extend', num_chunks), None, flat_I)

  def _layout(self, num_chunks: int) -> inputs_lib.Layout:
    return inputs_lib.Layout(
      0, num_chunks, self._chunk_tokens, self._table_width, num_chunks
    )


def backend(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  dtype: Any,
  platform: str,
) -> execution.Backend:
  """Returns the way in which a draft model computes on a platform.

  Raises:
    ValueError: no way supports the model.
  """
  # A guess needs no numerics of its own, and no kernel. Every device has all of
  # the model.
  fast = dataclasses.replace(
    config, numerics='fast', attention='auto', tensor=1, tensor_parts=0,
    experts=1,
  )  # fmt: skip
  return execution.choose(fast, model, dtype, platform)
