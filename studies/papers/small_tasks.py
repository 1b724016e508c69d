"""Measurements of claims about tasks that a small model learns."""

from collections.abc import Mapping

import numpy as np

from data.synthetic import pairs as pairs_lib, sums
from evals import claims as claims_lib
from studies.papers import port, small_models

_DIGITS, _KNOWN, _HELD_OUT = 2, 2500, 2000  # of additions
_WIDTHS = (4, 8, 16, 32)
_PAIRS, _IDS = 200, 40  # of names and descriptions; half in both orders


def reversed_sums(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the right sums, reversed, and their lead over plain ones."""
  right, lead = claim.quantities
  reverse, plain = (
    [
      _trained_on_sums(48, seed, setting, is_reversed=order)['exact']
      for seed in setting.seeds
    ]
    for order in (True, False)
  )
  return {
    right.name: reverse,
    lead.name: np.subtract(reverse, plain).tolist(),
  }


def emergence(claim: claims_lib.Claim, setting: port.Setting) -> port.Measured:
  """Returns how sudden two scores of the same models are, over their sizes."""
  gain, exact, token = claim.quantities
  found: dict[str, list[float]] = {
    gain.name: [],
    exact.name: [],
    token.name: [],
  }
  for seed in setting.seeds:
    runs = [
      _trained_on_sums(width, seed, setting, is_reversed=True)
      for width in _WIDTHS
    ]
    scores = {name: [run[name] for run in runs] for name in ('exact', 'token')}
    sudden = {name: _largest_gain(each) for name, each in scores.items()}
    found[gain.name].append(sudden['exact'] - sudden['token'])
    found[exact.name].append(scores['exact'][0])
    found[token.name].append(scores['token'][0])
  return found


def _largest_gain(scores: list[float]) -> float:
  """Returns the largest gain between neighbours, as a share of the range."""
  return float(np.diff(scores).max() / (max(scores) - min(scores)))


def _trained_on_sums(
  width: int, seed: int, setting: port.Setting, *, is_reversed: bool
) -> Mapping[str, float]:
  """Returns the shares of held-out sums and of digits that are right."""
  length = 3 * _DIGITS + 3
  recipe = small_models.Recipe(
    model=small_models.gpt(width, sums.NUM_IDS, length),
    optimizer=small_models.adam(3e-3),
    num_steps=2000,
    look_every=500,
  )
  # All pairs in random order: the first are trained, others are asked.
  order = np.random.default_rng([seed, 2]).permutation(100**_DIGITS)
  pairs_B2 = np.stack(np.divmod(order, 10**_DIGITS), axis=-1)
  ids_BT, is_sum_BT = sums.rows(pairs_B2, _DIGITS, is_reversed=is_reversed)

  def draw(rng):
    chosen = rng.integers(_KNOWN, size=64)
    return ids_BT[chosen], is_sum_BT[chosen]

  def measure():
    trainer = small_models.Trainer(recipe)
    held_out = slice(_KNOWN, _KNOWN + _HELD_OUT)
    _, is_right_BT = trainer.seen(trainer.last(seed, draw), ids_BT[held_out])
    digits_BC = is_right_BT[:, -(_DIGITS + 1) :]
    return {
      'exact': float(digits_BC.all(axis=-1).mean()),
      'token': float(digits_BC.mean()),
    }

  name = f'{"reversed" if is_reversed else "plain"}_{width}'
  return small_models.kept(setting, recipe, name, seed, measure)


def reversal_curse(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the right answers to three kinds of questions."""
  runs = [_trained_on_pairs(seed, setting) for seed in setting.seeds]
  return {
    quantity.name: [run[kind] for run in runs]
    for quantity, kind in zip(
      claim.quantities, ('forward', 'backward', 'both'), strict=True
    )
  }


def _trained_on_pairs(seed: int, setting: port.Setting) -> Mapping[str, float]:
  recipe = small_models.Recipe(
    model=small_models.gpt(64, _IDS, pairs_lib.ROW_LENGTH),
    optimizer=small_models.adam(2e-3),
    num_steps=2000,
    look_every=500,
  )
  known = pairs_lib.draw(np.random.default_rng([seed, 2]), _PAIRS, _IDS)
  forward, is_answer = known.rows(pairs_lib.FORWARD)
  backward, is_name = known.rows(pairs_lib.BACKWARD)
  half = _PAIRS // 2  # the second half is told in both orders
  told = np.concatenate([forward, backward[half:]])
  is_told = np.concatenate([is_answer, is_name[half:]])

  def draw(rng):
    chosen = rng.integers(len(told), size=64)
    return told[chosen], is_told[chosen]

  def measure():
    trainer = small_models.Trainer(recipe)
    params = trainer.last(seed, draw)

    def right(ids, is_asked):
      _, is_right = trainer.seen(params, ids)
      return float((is_right | ~is_asked[:, 1:]).all(axis=-1).mean())

    return {
      'forward': right(forward, is_answer),
      'backward': right(backward[:half], is_name[:half]),
      'both': right(backward[half:], is_name[half:]),
    }

  return small_models.kept(setting, recipe, 'pairs', seed, measure)
