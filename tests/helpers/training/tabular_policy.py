"""A policy whose texts can all be listed: a table of logits, one row a prefix.

Three ids and at most three of them; the id 0 ends a text. So there are 15 texts
of 1 to 3 ids. Whatever a loss estimates from samples is then a sum over them,
which this file computes in NumPy with float64 and derivatives by hand:

    grad log p(y_t | prefix) = one_hot(y_t) - p(. | prefix), in the prefix's row
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from tests.helpers import tiny_models
from training.objectives import port

V, T, END = 3, 3, 0
LENGTH = T + 1  # of a row: one place is padding


def _texts():
  found = set()
  for ids in itertools.product(range(V), repeat=T):
    stop = ids.index(END) + 1 if END in ids else T
    found.add(ids[:stop])
  return sorted(found)


TEXTS = _texts()
PREFIXES = sorted({text[:t] for text in TEXTS for t in range(len(text))})
NUM_PREFIXES = len(PREFIXES)


@dataclasses.dataclass(frozen=True)
class Tabular(port.Model):
  """The model port of a table: hidden states name the prefix."""

  def hidden(self, params, tokens_BT, positions_BT, segment_ids_BT):
    del params, positions_BT, segment_ids_BT
    # The row before each target: the prompt, then the text. Numbers in base 4.
    codes_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
    code_B = jnp.zeros(tokens_BT.shape[0], jnp.int32)
    for t in range(1, tokens_BT.shape[1]):
      code_B = code_B * (V + 1) + tokens_BT[:, t] + 1
      codes_BT = codes_BT.at[:, t].set(code_B)
    known_P = jnp.array([_code(prefix) for prefix in PREFIXES])
    states_BTP = codes_BT[:, :, None] == known_P[None, None, :]
    return port.Hidden(states_BTP.astype(jnp.float32), None)

  def logits(self, params, states):
    return states @ params['params']


def _code(prefix):
  code = 0
  for token in prefix:
    code = code * (V + 1) + token + 1
  return code


def model() -> Tabular:
  """Returns the port. Its params are {'params': logits [prefixes, V]}."""
  return Tabular(transformer.Transformer(tiny_models.gpt2_like(vocab_size=V)))


def table(seed: int) -> np.ndarray:
  """Returns random logits [prefixes, V], float64."""
  return np.random.default_rng(seed).normal(size=(NUM_PREFIXES, V))


def rows() -> dict[str, np.ndarray]:
  """Returns a batch of all texts after the prompt 0, one a row."""
  shape = len(TEXTS), LENGTH
  batch = {
    name: np.zeros(shape, np.int32)
    for name in ('tokens', 'targets', 'positions', 'segment_ids')
  }
  batch['weights'] = np.zeros(shape, np.float32)
  for b, text in enumerate(TEXTS):
    size = len(text)
    batch['tokens'][b, 1:size] = text[:-1]
    batch['targets'][b, :size] = text
    batch['positions'][b, :size] = np.arange(size)
    batch['segment_ids'][b, :size] = 1
    batch['weights'][b, :size] = 1.0
  return batch


@dataclasses.dataclass(frozen=True)
class Exact:
  """Probabilities and their derivatives, of a table and a temperature."""

  logits_PV: np.ndarray
  temperature: float = 1.0

  @property
  def logprobs_PV(self) -> np.ndarray:
    scaled_PV = self.logits_PV / self.temperature
    return scaled_PV - np.log(np.exp(scaled_PV).sum(axis=1, keepdims=True))

  def token_logprobs(self) -> np.ndarray:
    """Returns log p of each token of each text, [texts, LENGTH]; else 0."""
    found = np.zeros((len(TEXTS), LENGTH))
    for b, t, prefix, token in _places():
      found[b, t] = self.logprobs_PV[prefix, token]
    return found

  def probs(self) -> np.ndarray:
    """Returns the probability of each text, [texts]."""
    return np.exp(self.token_logprobs().sum(axis=1))

  def gradient(self, factors_BT: np.ndarray) -> np.ndarray:
    """Returns the sum of factor x grad log p over all tokens, [prefixes, V]."""
    found_PV = np.zeros_like(self.logits_PV)
    for b, t, prefix, token in _places():
      score_V = -np.exp(self.logprobs_PV[prefix])
      score_V[token] += 1
      found_PV[prefix] += factors_BT[b, t] * score_V / self.temperature
    return found_PV

  def prefix_probs(self) -> np.ndarray:
    """Returns the probability of each prefix, [prefixes]."""
    found = np.zeros(NUM_PREFIXES)
    for b, _, prefix, _ in _places():
      found[prefix] += self.probs()[b]
    return found

  def divergence(self, other: 'Exact') -> float:
    """Returns KL(self || other) of whole texts."""
    own_BT, their_BT = self.token_logprobs(), other.token_logprobs()
    return float(self.probs() @ (own_BT - their_BT).sum(axis=1))

  def values(self, rewards_B: np.ndarray) -> np.ndarray:
    """Returns the expected reward after each prefix, [prefixes]."""
    total = np.zeros(NUM_PREFIXES)
    for b, _, prefix, _ in _places():
      total[prefix] += self.probs()[b] * rewards_B[b]
    return total / self.prefix_probs()


def _places():
  """Yields text, time, number of the prefix, and token."""
  for b, text in enumerate(TEXTS):
    for t, token in enumerate(text):
      yield b, t, PREFIXES.index(text[:t]), token


def at_prefixes(values_P: np.ndarray) -> np.ndarray:
  """Returns the number of its prefix at each token, [texts, LENGTH]."""
  found = np.zeros((len(TEXTS), LENGTH))
  for b, t, prefix, _ in _places():
    found[b, t] = values_P[prefix]
  return found


def lengths() -> np.ndarray:
  """Returns the number of tokens of each text."""
  return np.array([len(text) for text in TEXTS])


def expected(objective, logits_PV, batch, groups, probs, heads=None, **others):
  """Returns value and gradient of the loss, as steps divide it, in expectation.

  Args:
    objective: the loss.
    logits_PV: the table.
    batch: arrays of all texts, [texts, LENGTH]; or, with advantages of groups,
      arrays [groups, size, LENGTH].
    groups: the texts of each batch that a step may see, [groups, size].
    probs: the probability of each of these batches, [groups].
    heads: trained beside the table.
    **others: frozen models.
  """
  objective.validate()
  groups = np.asarray(groups)
  given = {
    name: jnp.asarray(
      batch[name] if batch[name].ndim == 3 else batch[name][groups]
    )
    for name in objective.batch_spec()
  }
  policy = model()
  params = {'params': jnp.asarray(logits_PV, jnp.float32)}
  if heads is not None:
    params[port.HEADS] = heads

  def loss(params):
    def of_one(arrays):
      totals = objective.totals(params, arrays, policy, **others)
      total, sums = objective(params, arrays, policy, totals=totals, **others)
      return total / sums['weight']

    return jnp.sum(jnp.asarray(probs, jnp.float32) * jax.vmap(of_one)(given))

  return jax.jit(jax.value_and_grad(loss))(params)
