"""The draft head of an engine: guesses behind the model's own hidden states.

    tokens_GD = draft(shared, drawing, hidden, slots, flat_I, ...)

The pages of an engine with a head hold one vector per token more: the final
hidden state (`models.kv_cache.init_hidden`), which every step writes beside the
keys. The state before the last known token of a sequence is all that a draft
begins with (`models/layers/draft_head.py`). So the head has no cache to fill,
to follow or to take back: prefix hits, forks, preemptions, cancellations and
rejected drafts move pages, and the states with them.

A drafted token is sampled as the token that it guesses, with the settings of
the sequence and the key of its position, as a draft model does (`draft_steps`).

Where devices share the model, each has a copy of the head, and the rows of the
unembedding that it has anyway: it computes the logits of its ids alone.

Reference: ReDrafter, arXiv:2403.09919.
"""

from collections.abc import Callable, Collection
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import device_state, engine_config, steps
from inference.engine.compiled import layered, programs as programs_lib
from inference.engine.spread import placement as placement_lib, results
from inference.sampling import sampler as sampler_lib, vocabulary
from inference.scheduling import page_tables
from inference.speculation import source
from models import kv_cache as kv_cache_lib, transformer
from models.layers import cross_entropy, draft_head
from models.linear import plain
from models.linear.native import few_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """A frozen head that drafts."""

  head: Any  # for models.layers.draft_head; float32
  num_ids: int  # K, the ids that it guesses: the first ones
  dtype: Any  # of the model that it drafts for
  digest: str = ''  # of the head

  def num_bytes(self, model_width: int, dtype: Any) -> int:
    """Returns the bytes of the head, and of the rows that it unembeds with.

    Args:
      model_width: D, of the model.
      dtype: that they are stored in.
    """
    numbers = sum(leaf.size for leaf in jax.tree.leaves(self.head))
    numbers += self.num_ids * model_width
    return numbers * jnp.dtype(dtype).itemsize


class Ports(NamedTuple):
  """How a guess multiplies, and the dtype of its weights.

  Reading weights takes most of the time of a guess. Where a native product
  reads bfloat16 weights for floats of any dtype, they are rounded to it: a
  guess may be another one, and the verification finds out either way.
  """

  linear: Callable[..., Any]
  unembed: Callable[..., jax.Array]
  dtype: Any

  @classmethod
  def of(cls, execution: Any, dtype: Any, num_rows: int) -> 'Ports':
    """Returns the ports beside a model.

    Args:
      execution: of the model.
      dtype: of the model.
      num_rows: most sequences of one call.
    """
    native = execution.unembed
    if isinstance(native, few_rows.Unembed) and num_rows <= few_rows.MOST_ROWS:
      linear = few_rows.Linear(native.target, is_transposed=False)
      return cls(linear, native, jnp.bfloat16)
    return cls(plain.linear, plain.unembed, dtype)


class Drawing(NamedTuple):
  """The arrays that guesses are drawn with, in the dtype of `Ports`."""

  head: Any
  table_KD: jax.Array  # the first rows of the model's unembedding on a device


class Inputs(NamedTuple):
  """The arrays that the host makes for one call of `draft`, int32 [D] each."""

  tokens_D: Any  # the last known token of each sequence
  positions_D: Any  # of that token
  lengths_D: Any  # tokens to draft; 0: padding
  slots_D: Any
  pages_D: Any  # the page of the token before
  places_D: Any  # its place in that page


def most_rows(config: engine_config.EngineConfig) -> int:
  """Returns the most sequences that one call drafts for."""
  return max(rows for rows, _ in config.verified_shapes())


class DraftHead:
  """A head that drafts, see `source.Source`; of the engine's thread."""

  is_endless = True

  def __init__(
    self,
    weights: Weights,
    config: engine_config.EngineConfig,
    placement: placement_lib.Placement,
    execution: Any,
  ):
    """Allocates nothing.

    Args:
      weights: of the head.
      config: of the engine.
      placement: of the engine.
      execution: of the model; its embedding is looked up through it.
    """
    self._weights, self._placement = weights, placement
    dtype = jnp.dtype(weights.dtype)
    self._model = transformer.Transformer(placement.model, dtype, execution)
    # Rows of an embedding may be more than the ids that can be sampled.
    self._num_ids = min(weights.num_ids, placement.num_ids)
    self._num_rows = min(self._num_ids, placement.vocab_size)  # of a device
    self._padding_slot = config.max_sequences
    self._most = max(width for _, width in config.verified_shapes()) - 1
    rows = sorted({rows for rows, _ in config.verified_shapes()})
    self._rows = sorted({rows[0], *rows[::-2]})
    self._ports = Ports.of(execution, dtype, most_rows(config))
    self._compiled: dict[int, Any] = {}
    self._shared: Any = None

  @property
  def digest(self) -> str:
    """The digest of the head."""
    return self._weights.digest

  @property
  def num_bytes(self) -> int:
    """Bytes of the head, and of its rows of the unembedding."""
    weights = dataclasses.replace(self._weights, num_ids=self._num_rows)
    return weights.num_bytes(self._model.config.model_width, self._ports.dtype)

  def bytes_per_token(self, kv_dtype: Any) -> float:
    """Bytes of the hidden state of one token.

    Args:
      kv_dtype: dtype of the keys and values of the engine.
    """
    stored = device_state.hidden_dtype(self._weights.dtype, kv_dtype)
    return self._model.config.model_width * jnp.dtype(stored).itemsize

  def allocate(
    self,
    state: device_state.State,
    params: Any,
    programs: programs_lib.Programs,
  ) -> None:
    """Takes the shapes of an engine, and moves the head to its device.

    Args:
      state: of the engine.
      params: shapes of its params.
      programs: of the engine; calls go through them.
    """
    self._programs = programs
    self._page_size = state.kv_cache[-1].page_size
    dtype, shared = self._ports.dtype, layered.parted(params)[0]
    head = jax.tree.map(lambda x: jnp.asarray(x, dtype), self._weights.head)
    self._first_rows = self._placement.lower_drafts(
      first_rows,
      shared,
      form=results.Form(results.ROWS),
      model=self._model,
      num_rows=self._num_rows,
      dtype=jnp.dtype(dtype),
    ).compile()
    table_KD = self._first_rows.out_info
    self._drawing = Drawing(self._placement.copied(head), table_KD)
    arrays = shared, self._drawing, state.kv_cache[-1], state.slots
    self._shapes = device_state.abstract(arrays)

  def use(self, params: device_state.Params) -> None:
    """Takes the tables of the model, which the engine computes with now."""
    self._shared = layered.parted(params)[0]
    table_KD = self._first_rows(self._shared)
    self._drawing = self._drawing._replace(table_KD=table_KD)

  @property
  def arrays(self) -> Drawing:
    """The arrays that no one else has."""
    return self._drawing

  def compile(self, is_now: bool = True) -> None:
    """Compiles the programs; from any thread, until then there are no drafts.

    Args:
      is_now: False leaves them to a later call.
    """
    if not is_now or self._compiled:
      return
    self._compiled = {
      num: self._placement.lower_drafts(
        draft,
        *self._shapes,
        np.zeros((len(Inputs._fields), num), np.int32),
        form=results.alike(),
        most=self._most,
        model=self._model,
        ports=self._ports,
        num_ids=self._num_ids,
      ).compile()
      for num in self._rows
    }

  def compute(
    self, key: int, state: device_state.State, inputs_ID: np.ndarray
  ) -> np.ndarray:
    """Calls a program; returns the tokens of drafts, and waits for them.

    Args:
      key: of the program: its number of rows.
      state: of the engine.
      inputs_ID: the arrays of `Inputs`, filled.
    """
    return np.asarray(
      self._compiled[key](
        self._shared, self._drawing, state.kv_cache[-1], state.slots, inputs_ID
      )
    )

  def lengths(
    self, sequences: Collection[page_tables.Sequence], most: int
  ) -> dict[Any, int]:
    """Returns how many tokens a draft of each sequence may have."""
    return {each.id: self._length(each, most) for each in sequences}

  ready = lengths

  def advance(self, sequences: Collection[page_tables.Sequence]) -> bool:
    """Returns True: nothing is due before a draft."""
    del sequences
    return True

  def placed(self, lengths: source.Lengths) -> dict[Any, tuple[int, ...]]:
    """Returns places for drafts of these lengths."""
    return {id: (0,) * length for id, length in lengths.items()}

  def filled(self, step, state):
    """Drafts, and returns the step with the tokens; waits for the device."""
    drafted = [span for span in step.decodes if span.length > 1]
    num_rows = next(num for num in self._rows if num >= len(drafted))
    inputs_ID = np.zeros((len(Inputs._fields), num_rows), np.int32)
    inputs = Inputs(*inputs_ID)
    inputs.slots_D[:] = self._padding_slot
    for row, span in enumerate(drafted):
      before = span.start - 1
      inputs.tokens_D[row] = span.tokens[0]
      inputs.positions_D[row] = span.start
      inputs.lengths_D[row] = span.length - 1
      inputs.slots_D[row] = span.slot
      inputs.pages_D[row] = span.pages[before // self._page_size]
      inputs.places_D[row] = before % self._page_size
    tokens_GD = self._programs.draft(self.compute, num_rows, state, inputs_ID)
    assert tokens_GD is not None
    filled = {
      span.sequence.id: dataclasses.replace(
        span,
        tokens=(span.tokens[0], *tokens_GD[: span.length - 1, row].tolist()),
      )
      for row, span in enumerate(drafted)
    }
    decodes = tuple(filled.get(x.sequence.id, x) for x in step.decodes)
    return dataclasses.replace(step, decodes=decodes)

  def forget(self, id: Any) -> None:
    """Does nothing: nothing is kept for a sequence."""

  def _length(self, sequence: page_tables.Sequence, most: int) -> int:
    # The token before the last one has the state that a draft begins with.
    if not self._compiled or len(sequence.tokens) < 2:
      return 0
    return max(source.most_of(sequence, most), 0)


@functools.partial(
  jax.jit, static_argnames=('most', 'model', 'ports', 'num_ids')
)
def draft(
  shared: device_state.Params,
  drawing: Drawing,
  hidden: kv_cache_lib.Pages,
  slots: device_state.Slots,
  inputs_ID: jax.Array,
  *,
  most: int,
  model: transformer.Transformer,
  ports: Ports,
  num_ids: int,
) -> jax.Array:
  """Drafts the next tokens of D sequences; returns them, int32 [G, D].

  Args:
    shared: serving params without those of layers.
    drawing: the head and its rows.
    hidden: pages of final hidden states.
    slots: of the engine, whose settings and counts are read. Counts of drafted
      tokens are not added: with penalties a draft is right less often.
    inputs_ID: the arrays of `Inputs`, one after another.
    most: G, the largest number of drafted tokens.
    model: of the engine.
    ports: of its products.
    num_ids: ids that may be guessed.
  """
  inputs = Inputs(*inputs_ID)
  sampler = sampler_lib.take(slots.sampler, inputs.slots_D)
  softcap = model.config.logit_softcap
  stored_DC = hidden.kv_PQYC[inputs.pages_D, inputs.places_D, 0]
  num_local = slots.seen_BV.shape[1]
  num_left = num_local - len(drawing.table_KD)
  is_guessed_1V = vocabulary.here().ids(num_local)[None] < num_ids

  def is_left(carry) -> jax.Array:
    return carry[0] < jnp.max(inputs.lengths_D)

  def step(carry) -> Any:
    index, states_DD, last_D, tokens_GD = carry
    embeddings_1DD = steps.apply(
      model, shared, last_D[None], method='token_rows'
    )
    states_DD = draft_head.advanced(
      drawing.head, states_DD, embeddings_1DD[0], model.dtype, ports.linear
    )
    logits_DK = draft_head.logits(
      states_DD, drawing.table_KD, softcap, model.dtype, ports.unembed
    )
    logits_DV = jnp.pad(logits_DK, ((0, 0), (0, num_left)))
    logits_DV = jnp.where(is_guessed_1V, logits_DV, cross_entropy.MASKED)
    last_D = sampler_lib.sample(
      logits_DV,
      sampler,
      slots.seen_BV,
      inputs.positions_D + 1 + index,
      slots_B=inputs.slots_D,
    )
    return index + 1, states_DD, last_D, tokens_GD.at[index].set(last_D)

  carry = (
    jnp.int32(0),
    kv_cache_lib.loaded(stored_DC, model.dtype),
    inputs.tokens_D,
    jnp.zeros((most, inputs_ID.shape[1]), jnp.int32),
  )
  return jax.lax.while_loop(is_left, step, carry)[-1]


@functools.partial(jax.jit, static_argnames=('model', 'num_rows', 'dtype'))
def first_rows(
  shared: device_state.Params,
  *,
  model: transformer.Transformer,
  num_rows: int,
  dtype: Any,
) -> jax.Array:
  """Returns the first rows of a model's unembedding, [K, D], in a dtype."""
  table_VD = steps.apply(model, shared, method='head_matrix')
  return table_VD[:num_rows].astype(dtype)
