"""The sampler: logits in, the next token of each sequence out.

It follows prefill and every decode step. Settings are arrays with one entry per
sequence, so that no setting causes a compilation.

The order is fixed:

  1. repetition penalty             } `adjusted_logits`; greedy sampling takes
  2. presence, frequency penalties  } the largest one
  3. logit bias                     }
  4. minimum of tokens: no EOS      }
     or the tokens of a grammar     }
  5. temperature                          } `filtered_logits`, the distribution
  6. top-k                                } that a token is drawn from
  7. top-p, of the tokens after top-k     }
  8. min-p, share of the most probable    }

The sampled token depends on the logits, the settings, the tokens so far, the
key of the sequence and the position of the token, and on nothing else. The key
of a token is fold_in(sequence key, position). Noise is drawn per row. The
filters of a row see that row only. Sums over the vocabulary have an order that
does not depend on the number of rows. Other rows only decide which branches
run: each optional stage runs if any row needs it.

References: top-k, Fan et al., arXiv:1805.04833; top-p, Holtzman et al.,
arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082; sampling by Gumbel
noise, Maddison et al., arXiv:1411.0030; for stages 1 to 3, see
`inference.sampling.penalties`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference.sampling import (
  penalties,
  settings as settings_lib,
  vocabulary,
)

# A lower temperature means greedy: dividing by it would overflow float32.
MIN_TEMPERATURE = 1e-5
# A value of `num_logprobs_B`: the logprob of the sampled token, in the
# distribution that it was drawn from.
OF_DRAWN = -2
_MAX_INT32 = 2**31 - 1


class Sampler(NamedTuple):
  """The sampler settings of each sequence of a batch.

  On the device, the leading axis B numbers sequences or slots. On the host,
  `row` makes the settings of one sequence: NumPy arrays without that axis.
  """

  temperature_B: Any  # float32; 0 is greedy
  top_k_B: Any  # int32, tokens; 0 keeps all
  top_p_B: Any  # float32 in (0, 1], probability mass; 1 keeps all
  min_p_B: Any  # float32 in [0, 1), share of the largest probability
  repetition_B: Any  # float32 above 0; 1 changes nothing
  presence_B: Any  # float32; 0 changes nothing
  frequency_B: Any  # float32; 0 changes nothing
  bias_ids_BL: Any  # int32 [B, MAX_BIASED] token ids; -1 is none
  bias_values_BL: Any  # float32, added to the logits of `bias_ids_BL`
  stop_ids_BI: Any  # int32 [B, MAX_STOP_IDS + 1], EOS among them; -1 is none
  end_ids_BI: Any  # the same, without an EOS that is ignored
  min_position_B: Any  # int32, first position where a stop id may be sampled
  # int32, alternatives; 0: sampled token only, -1: none, or OF_DRAWN
  num_logprobs_B: Any
  key_B: Any  # typed PRNG keys; on the host, two uint32 words of the seed


def row(
  settings: settings_lib.Settings,
  *,
  num_prompt_tokens: int,
  seed: int,
  eos_id: int | None,
) -> Sampler:
  """Returns the settings of one sequence, on the host.

  `min_tokens` excludes EOS even if `ignore_eos` lets the sequence continue
  after EOS, as in vLLM.

  Args:
    settings: of the request.
    num_prompt_tokens: the position of the first sampled token.
    seed: an integer of 64 bits.
    eos_id: None for a tokenizer without one.
  """
  stop_ids = [*settings.stop_ids] + ([] if eos_id is None else [eos_id])
  end_ids = settings.stop_ids if settings.ignore_eos else stop_ids
  biases = settings.logit_bias
  least = settings.min_tokens
  first_end = num_prompt_tokens + least if least else 0
  info = np.finfo(np.float32)
  return Sampler(
    # Settings are Python floats; these two may be out of the float32 range.
    temperature_B=np.float32(min(settings.temperature, float(info.max))),
    top_k_B=np.int32(settings.top_k),
    top_p_B=np.float32(max(settings.top_p, float(info.tiny))),
    min_p_B=np.float32(settings.min_p),
    repetition_B=np.float32(settings.repetition_penalty),
    presence_B=np.float32(settings.presence_penalty),
    frequency_B=np.float32(settings.frequency_penalty),
    bias_ids_BL=_filled(
      [i for i, _ in biases], settings_lib.MAX_BIASED, -1, np.int32
    ),
    bias_values_BL=_filled(
      [bias for _, bias in biases], settings_lib.MAX_BIASED, 0, np.float32
    ),
    stop_ids_BI=_filled(stop_ids, settings_lib.MAX_STOP_IDS + 1, -1, np.int32),
    end_ids_BI=_filled(end_ids, settings_lib.MAX_STOP_IDS + 1, -1, np.int32),
    min_position_B=np.int32(min(first_end, _MAX_INT32)),
    num_logprobs_B=np.int32(
      -1 if settings.logprobs is None else settings.logprobs
    ),
    key_B=np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
  )


def idle() -> Sampler:
  """Returns the settings of a slot without a sequence: greedy.

  Greedy sampling costs nothing. Settings of a sequence that has ended would
  still run its filters.
  """
  settings = settings_lib.Settings(temperature=0.0)
  return row(settings, num_prompt_tokens=0, seed=0, eos_id=None)


def empty(num_slots: int) -> Sampler:
  """Returns the settings of slots without sequences, on the device."""
  return stack([idle()] * num_slots)


def stack(rows: Sequence[Sampler]) -> Sampler:
  """Returns the settings of several sequences, on the device."""
  batch = jax.tree.map(lambda *fields: jnp.asarray(np.stack(fields)), *rows)
  return batch._replace(key_B=_keys(batch.key_B))


def _keys(words: jax.Array) -> jax.Array:
  """Returns the keys of seeds, given as words [..., 2]."""
  # `jax.random.key` keeps 32 bits of a seed. For smaller seeds both are equal.
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def take(sampler: Sampler, slots_R: jax.Array) -> Sampler:
  """Returns the settings of the given slots, in that order."""
  return jax.tree.map(lambda field: field[slots_R], sampler)


def words(rows: Sequence[Sampler]) -> np.ndarray:
  """Returns the settings of S sequences as one array, int32 [S, W].

  It holds the bits of all fields, one after another: one array travels to the
  device in place of fourteen.
  """
  return np.stack(
    [
      np.concatenate([np.ravel(field).view(np.int32) for field in row])
      for row in rows
    ]
  )


def put(sampler: Sampler, slots_S: jax.Array, words_SW: jax.Array) -> Sampler:
  """Gives slots the settings of sequences, which are those of `words`.

  Where a slot is named more than once, its settings must be the same.
  """
  fields, start = [], 0
  for field in idle():
    part_SW = words_SW[:, start : start + field.size]
    part = jax.lax.bitcast_convert_type(part_SW, field.dtype)
    fields.append(part.reshape(len(words_SW), *field.shape))
    start += field.size
  rows = Sampler(*fields)
  rows = rows._replace(key_B=_keys(rows.key_B))
  return jax.tree.map(
    lambda into, field: into.at[slots_S].set(field), sampler, rows
  )


def sample(
  logits_BV: jax.Array,
  sampler: Sampler,
  seen_BV: jax.Array,
  positions_B: jax.Array,
  *,
  slots_B: jax.Array | None = None,
  allowed_BW: jax.Array | None = None,
) -> jax.Array:
  """Returns the next token of each sequence, int32 [B].

  Args:
    logits_BV: float32.
    sampler: the settings of each sequence.
    seen_BV: token counts of `penalties.recount` and `penalties.count`.
    positions_B: the position of each new token.
    slots_B: the row of each sequence in `seen_BV`; None: in order.
    allowed_BW: uint32, a bit per token: whether a grammar allows it; None: all.
  """

  def sampled(logits_BV):
    adjusted_BV = adjusted_logits(
      logits_BV, sampler, seen_BV, positions_B, slots_B=slots_B
    )
    if allowed_BW is not None:
      # Impossible here, and so in all later stages.
      adjusted_BV = penalties.allow(adjusted_BV, allowed_BW)
    # An all-greedy batch computes no noise and no filters.
    return jax.lax.cond(jnp.all(is_greedy_B), ids.argmax, mixed, adjusted_BV)

  def mixed(logits_BV):
    noisy_BV = _filtered(logits_BV, sampler) + ids.gumbel(
      sampler.key_B, positions_B, logits_BV.shape[-1]
    )
    return jnp.where(is_greedy_B, ids.argmax(logits_BV), ids.argmax(noisy_BV))

  ids = vocabulary.here()
  is_greedy_B = _is_greedy(sampler)
  if allowed_BW is not None:
    return sampled(logits_BV)
  is_plain = jnp.all(is_greedy_B) & ~_any_adjusted(sampler, positions_B)
  # A plain batch does not even copy its logits.
  return jax.lax.cond(is_plain, ids.argmax, sampled, logits_BV)


def is_end(
  tokens_B: jax.Array, sampler: Sampler, positions_B: jax.Array
) -> jax.Array:
  """Returns whether each token ends its sequence, bool [B].

  By EOS or a stop id, as `output.stopping.Transcript` decides on the host, and
  before the host knows the token.

  Args:
    tokens_B: the sampled tokens.
    sampler: the settings of each sequence.
    positions_B: of the tokens.
  """
  is_among_B = jnp.any(tokens_B[:, None] == sampler.end_ids_BI, axis=-1)
  return is_among_B & ~_is_too_early(sampler, positions_B)


def filtered_logits(
  logits_BV: jax.Array,
  sampler: Sampler,
  seen_BV: jax.Array,
  positions_B: jax.Array,
  *,
  slots_B: jax.Array | None = None,
) -> jax.Array:
  """Returns the logits of the distribution that is sampled from, float32.

  They are adjusted, divided by the temperature, shifted so that the largest is
  0, and -inf where a filter removed the token. Temperature 0 counts as 1. The
  arguments are those of `sample`.
  """
  adjusted_BV = adjusted_logits(
    logits_BV, sampler, seen_BV, positions_B, slots_B=slots_B
  )
  return _filtered(adjusted_BV, sampler)


def scored_logits(
  logits_BV: jax.Array,
  sampler: Sampler,
  seen_BV: jax.Array,
  positions_B: jax.Array,
  *,
  slots_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the logits that logprobs are of, and how many each row wants.

  They are the model's, and those of `filtered_logits` where a row asks for
  OF_DRAWN. The arguments are those of `sample`.
  """
  is_drawn_B = sampler.num_logprobs_B == OF_DRAWN

  def drawn(logits_BV):
    filtered_BV = filtered_logits(
      logits_BV, sampler, seen_BV, positions_B, slots_B=slots_B
    )
    return jnp.where(is_drawn_B[:, None], filtered_BV, logits_BV)

  scored_BV = jax.lax.cond(jnp.any(is_drawn_B), drawn, lambda x: x, logits_BV)
  return scored_BV, jnp.where(is_drawn_B, 0, sampler.num_logprobs_B)


def adjusted_logits(
  logits_BV: jax.Array,
  sampler: Sampler,
  seen_BV: jax.Array,
  positions_B: jax.Array,
  *,
  slots_B: jax.Array | None = None,
) -> jax.Array:
  """Returns the logits after penalties, bias and the minimum of tokens.

  The arguments are those of `sample`.
  """

  def adjusted(logits_BV):
    logits_BV = penalties.penalize(
      logits_BV,
      seen_BV,
      repetition_B=sampler.repetition_B,
      presence_B=sampler.presence_B,
      frequency_B=sampler.frequency_B,
      slots_B=slots_B,
    )
    logits_BV = penalties.add_bias(
      logits_BV, sampler.bias_ids_BL, sampler.bias_values_BL
    )
    return penalties.forbid(
      logits_BV, sampler.stop_ids_BI, _is_too_early(sampler, positions_B)
    )

  return jax.lax.cond(
    _any_adjusted(sampler, positions_B), adjusted, lambda x: x, logits_BV
  )


def _any_adjusted(sampler: Sampler, positions_B) -> jax.Array:
  """Returns whether any row needs `adjusted_logits`."""
  asks_B = (
    (sampler.repetition_B != 1)
    | (sampler.presence_B != 0)
    | (sampler.frequency_B != 0)
    | jnp.any(sampler.bias_ids_BL >= 0, axis=-1)
    | _is_too_early(sampler, positions_B)
  )
  return jnp.any(asks_B)


def _is_too_early(sampler: Sampler, positions_B) -> jax.Array:
  """Returns the rows that have not sampled their minimum of tokens."""
  return positions_B < sampler.min_position_B


def _filtered(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
  """Applies the temperature, then the filters."""
  is_greedy_B = _is_greedy(sampler)
  temperature_B = jnp.where(is_greedy_B, 1.0, sampler.temperature_B)
  ids = vocabulary.here()
  shifted_BV = logits_BV - ids.max(logits_BV)
  # Adding zero turns -0.0 into 0.0: `_heaviest` would order them by their bits.
  scaled_BV = shifted_BV / temperature_B[:, None] + 0.0

  num_ids = ids.size(logits_BV)
  has_top_k_B = (sampler.top_k_B > 0) & (sampler.top_k_B < num_ids)
  has_top_p_B = sampler.top_p_B < 1.0
  has_min_p_B = sampler.min_p_B > 0.0

  def search(index, keep_BV):
    """Applies top-k (0) or top-p (1): one body, since it compiles for long."""
    is_top_p = index == 1
    mass_BV = jnp.where(keep_BV, jnp.exp(scaled_BV), 0.0)
    kept_BV = _heaviest(
      scaled_BV,
      jnp.where(is_top_p, mass_BV, 1.0),
      jnp.where(
        is_top_p,
        sampler.top_p_B * ids.sum(mass_BV),
        sampler.top_k_B.astype(jnp.float32),
      ),
    )
    has_filter_B = jnp.where(is_top_p, has_top_p_B, has_top_k_B)
    return keep_BV & (kept_BV | ~has_filter_B[:, None])

  def min_p(keep_BV):
    # The most probable token passes both filters: its value is exp(0) = 1.
    return keep_BV & (jnp.exp(scaled_BV) >= sampler.min_p_B[:, None])

  def filtered(scaled_BV):
    def is_needed(has_filter_B):
      return jnp.any(has_filter_B & ~is_greedy_B)

    # A search costs 32 passes over the vocabulary: it runs only if needed.
    first = jnp.where(is_needed(has_top_k_B), 0, 1)
    last = jnp.where(is_needed(has_top_p_B), 1, 0)
    keep_BV = jnp.ones(scaled_BV.shape, bool)
    keep_BV = jax.lax.fori_loop(first, last + 1, search, keep_BV)
    keep_BV = jax.lax.cond(is_needed(has_min_p_B), min_p, lambda x: x, keep_BV)
    return jnp.where(keep_BV, scaled_BV, -jnp.inf)

  has_any_B = (has_top_k_B | has_top_p_B | has_min_p_B) & ~is_greedy_B
  return jax.lax.cond(jnp.any(has_any_B), filtered, lambda x: x, scaled_BV)


def _is_greedy(sampler: Sampler) -> jax.Array:
  return sampler.temperature_B < MIN_TEMPERATURE


def _heaviest(values_BV, weights_BV, wanted_B) -> jax.Array:
  """Returns a mask of the largest values whose weights reach `wanted_B`.

  The mask has as few tokens as possible, and at least one. Equal values rank by
  token id. With weights of 1 this is top-k, with probabilities top-p.

  The smallest kept value is found by bisection on the 32 bits of the floats,
  which order like unsigned integers after a change of the sign bit. Measured on
  CPU, one row of 50k: 1 ms, where a sort takes 10 ms.
  """
  ids, num_tokens = vocabulary.here(), values_BV.shape[-1]
  # Padded once here: padding inside each sum takes two to four times as long.
  spare = ((0, 0), (0, ids.spare(num_tokens)))
  values_BV = jnp.pad(values_BV, spare, constant_values=-jnp.inf)
  weights_BV = jnp.pad(weights_BV, spare)
  bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

  def weight_where(chosen_BV):
    return ids.sum(jnp.where(chosen_BV, weights_BV, 0.0))

  def set_bit(index, cut_B):
    candidate_B = cut_B | (sign >> index.astype(jnp.uint32))
    is_heavy_B = weight_where(order_BV >= candidate_B[:, None]) >= wanted_B
    return jnp.where(is_heavy_B, candidate_B, cut_B)

  cut_B = jnp.zeros(wanted_B.shape, jnp.uint32)
  cut_BV = jax.lax.fori_loop(0, 32, set_bit, cut_B)[:, None]
  is_above_BV, is_tied_BV = order_BV > cut_BV, order_BV == cut_BV
  num_tied_before_BV = ids.num_before(is_tied_BV)
  weight_before_BV = (
    weight_where(is_above_BV)[:, None] + num_tied_before_BV * weights_BV
  )
  is_wanted_BV = weight_before_BV < wanted_B[:, None]
  return (is_above_BV | (is_tied_BV & is_wanted_BV))[:, :num_tokens]


def _filled(values, width: int, fill, dtype) -> np.ndarray:
  """Returns `values` in an array of static width."""
  array = np.full((width,), fill, dtype)
  array[: len(values)] = values
  return array
