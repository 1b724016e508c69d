"""Settings of a `TokenLoss` that cannot work, refused before a run starts."""

import math
from typing import Any

from checks import expect
from training.objectives.policy import corrections, estimators, terms

RECOMPUTED, OWN, SAMPLER = PROXIMALS = 'recomputed', 'own', 'sampler'
FULL = 'full'

# Fields that have a meaning with one term only, or for sampled batches only.
_OF_TERMS = (
  ('clip_low', 'policy'),
  ('clip_high', 'policy'),
  ('advantages', 'policy'),
  ('ratio', 'policy'),
  ('form', 'policy'),
  ('kl_reward', 'policy'),
  ('is_whitened', 'policy'),
  ('correction', 'policy'),
  ('distance', 'distance'),
)
_OF_SAMPLED = 'proximal', 'temperature', 'kl_reward', 'correction'


def check(loss: Any) -> None:
  """Raises ValueError for hyper-parameters that no run can use.

  Args:
    loss: a `token_loss.TokenLoss`.
  """
  expect.one_of('objective.distance', loss.distance, _distances())
  expect.one_of('objective.ratio', loss.ratio, terms.RATIOS)
  expect.one_of('objective.form', loss.form, terms.FORMS)
  expect.one_of('objective.aggregation', loss.aggregation, terms.AGGREGATIONS)
  expect.one_of('objective.proximal', loss.proximal, PROXIMALS)
  for name, term in _OF_TERMS:
    if not getattr(loss, f'{term}_scale'):
      _unused(loss, name, f'objective.{term}_scale = 0', f'the {term} term')
  if not loss.distance_scale and not loss.kl_reward:
    _unused(loss, 'reference', 'objective.distance_scale = 0', 'the distance')
  if not loss.is_sampled:
    for name in _OF_SAMPLED:
      reason = 'objective.is_sampled = False'
      _unused(loss, name, reason, 'sampling by the policy')
  _check_clips(loss)
  _check_numbers(loss)
  loss.advantages.validate()
  loss.correction.validate()
  if loss.correction.level != corrections.NONE and loss.proximal == SAMPLER:
    raise ValueError(
      'objective.correction: got weights against the sampler with'
      ' objective.proximal = sampler, expected level = none: the ratio itself'
      ' is against the sampler; take proximal = recomputed or own'
    )
  if loss.is_whitened and loss.is_penalised and loss.proximal == OWN:
    raise ValueError(
      'objective.is_whitened: got True with kl_reward and proximal = own,'
      ' expected proximal = recomputed or sampler: the mean of the penalised'
      ' advantages is needed before the forward pass'
    )


def _distances():
  return (*estimators.ESTIMATORS, FULL)


def _unused(loss, name, reason, missing):
  default = type(loss).__dataclass_fields__[name].default
  if (value := getattr(loss, name)) != default:
    raise ValueError(
      f'objective.{name}: got {value!r} with {reason}, expected {default!r}:'
      f' {missing} is left out; set it, or leave {name} out'
    )


def _check_clips(loss):
  low, high = loss.clip_low, loss.clip_high
  is_cispo = loss.form == terms.CISPO
  if not (0 <= low < 1 or (is_cispo and low == 1)) or not 0 <= high < math.inf:
    raise ValueError(
      f'objective.clip_low, clip_high: got {low} and {high}, expected 0 <='
      ' clip_low < 1 and clip_high >= 0; 0 for both does not clip, and'
      ' clip_low = 1 with form = cispo has no lower limit'
    )
  if (low == 0) != (high == 0) or (is_cispo and not high):
    raise ValueError(
      f'objective.clip_low, clip_high: got {low} and {high}, expected both'
      ' above 0, or 0 for both if form = clipped: a ratio is 1 where the policy'
      ' has not moved, and would never count beyond it'
    )


def _check_numbers(loss):
  if not 0 < loss.temperature < math.inf:
    raise ValueError(
      f'objective.temperature: got {loss.temperature}, expected a number above'
      ' 0, the one that text is sampled with'
    )
  if not 0 <= loss.kl_reward < math.inf:
    raise ValueError(
      f'objective.kl_reward: got {loss.kl_reward}, expected a number of at'
      ' least 0; 0 leaves the penalty out'
    )
  is_constant = loss.aggregation == terms.CONSTANT
  if loss.max_length < 0 or is_constant != bool(loss.max_length):
    raise ValueError(
      f'objective.max_length: got {loss.max_length} with aggregation ='
      f' {loss.aggregation}, expected the most sampled tokens of a completion'
      ' with aggregation = constant, else 0'
    )
