"""Markov chains that differ from sequence to sequence, with their exact floors.

A chain of K states has rows of transition probabilities from Dirichlet(1), and
starts in a random state. A reader of a sequence does not know its chain, so the
loss of a model has four floors, each in nats per predicted state:

    uniform   log K: every state alike
    unigram   the counts of states so far
    bigram    the counts of transitions so far: Bayes, the lowest possible
    entropy   with the chain itself known, which no model knows

The predictions from counts are means of posteriors under Dirichlet(1):
(count + 1) / (total + K). The prediction from transitions is exact; the
prediction from states is the same rule for a source without memory.

Reference: Edelman et al. 2024, arXiv:2402.11004, sections 2 and 3.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains:
  """Sequences, and the chains that drew them."""

  states_BT: np.ndarray  # int32, below K
  transitions_BKK: np.ndarray  # [b, i, j]: probability of j after i


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floors:
  """Losses in nats per state, means over all states but the first."""

  uniform: float
  unigram: float
  bigram: float
  entropy: float


def draw(
  rng: np.random.Generator, num_chains: int, length: int, num_states: int
) -> Chains:
  """Returns one sequence of each of `num_chains` new chains.

  Raises:
    ValueError: there are fewer than two states, or fewer than two of a
      sequence.
  """
  if num_states < 2 or length < 2 or num_chains < 1:
    raise ValueError(
      f'chains: got {num_chains} of {num_states} states and length {length},'
      ' expected at least 1 of 2 states and length 2'
    )
  transitions_BKK = rng.dirichlet(
    np.ones(num_states), size=(num_chains, num_states)
  )
  cumulative_BKK = np.cumsum(transitions_BKK, axis=-1)
  states_BT = np.empty((num_chains, length), np.int32)
  states_BT[:, 0] = rng.integers(num_states, size=num_chains)
  chain_B = np.arange(num_chains)
  for t in range(1, length):
    limits_BK = cumulative_BKK[chain_B, states_BT[:, t - 1]]
    passed_BK = limits_BK < rng.random(num_chains)[:, None]
    # Rounding may leave the last limit below 1.
    states_BT[:, t] = np.minimum(passed_BK.sum(axis=-1), num_states - 1)
  return Chains(states_BT=states_BT, transitions_BKK=transitions_BKK)


def floors(chains: Chains) -> Floors:
  """Returns the losses of the four predictions on these sequences."""
  states_BT = chains.states_BT
  num_chains, length = states_BT.shape
  num_states = chains.transitions_BKK.shape[-1]
  chain_B = np.arange(num_chains)
  unigram_BK = np.ones((num_chains, num_states))
  bigram_BKK = np.ones((num_chains, num_states, num_states))
  sums = np.zeros(3)
  for t in range(1, length):
    before_B, now_B = states_BT[:, t - 1], states_BT[:, t]
    unigram_BK[chain_B, before_B] += 1
    rows_BK = bigram_BKK[chain_B, before_B]
    for i, weights_BK in enumerate(
      (unigram_BK, rows_BK, chains.transitions_BKK[chain_B, before_B])
    ):
      probs_B = weights_BK[chain_B, now_B] / weights_BK.sum(axis=-1)
      sums[i] -= np.log(probs_B).mean()
    bigram_BKK[chain_B, before_B, now_B] += 1
  unigram, bigram, entropy = (sums / (length - 1)).tolist()
  return Floors(
    uniform=float(np.log(num_states)),
    unigram=unigram,
    bigram=bigram,
    entropy=entropy,
  )
