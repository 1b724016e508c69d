"""The search for the best learning rate, and the comparison of the optima."""

import math

import pytest

from experiments import lora_against_full
from studies import lora_rates


@pytest.mark.parametrize('first', [-12, -8, -3])
def test_the_best_rate_is_found_from_any_start(first):
  asked = []

  def loss_of(rate):
    asked.append(rate)
    return (rate + 7.3) ** 2 + 1

  losses = lora_rates.bracketed(loss_of, first)
  assert min(losses, key=losses.__getitem__) == -7
  assert {-8, -7, -6} <= set(losses)
  assert list(losses) == sorted(losses)
  assert len(asked) == len(set(asked))


def test_runs_that_diverge_are_worse_than_all_others():
  losses = lora_rates.bracketed(
    lambda rate: math.nan if rate > -5 else (rate + 6) ** 2 + 1.0, -3
  )
  assert math.isnan(losses[-4])
  assert {-7, -6, -5} <= set(losses)


def test_a_loss_that_falls_for_ever_is_an_error():
  with pytest.raises(
    ValueError, match=r'learning rates: got losses .* from 2\^0, exp'
  ):
    lora_rates.bracketed(lambda rate: -rate, 0)


def test_the_table_has_ratios_to_the_first_kind():
  losses = {
    'full': {rate: 2.0 + (rate + 11) ** 2 / 100 for rate in (-12, -11, -10)},
    'rank-8': {rate: 2.02 + (rate + 8) ** 2 / 100 for rate in (-9, -8, -7)},
  }
  shares = {'full': 1.0, 'rank-8': 0.02}
  *_, full, adapters = lora_rates.report(losses, shares).splitlines()
  assert full.startswith('| full | 100.00% | 2.0000 | +0.00% | 2^-11.00 =')
  assert adapters.startswith('| rank-8 | 2.00% | 2.0200 | +1.00% | 2^-8.00 =')
  assert adapters.endswith('| 8.0 x |')


def test_rank_8_has_at_most_3_percent_of_the_parameters():
  share = lora_rates.share_of_parameters(lora_against_full.get_config('rank-8'))
  width, mlp_width, vocab_size = 512, 1376, 1024
  adapters = 2 * 8 * (4 * 2 * width + 3 * (width + mlp_width))
  layers = 2 * (4 * width**2 + 3 * width * mlp_width + 2 * width)
  assert share == adapters / (layers + width + vocab_size * width)
  assert share < 0.03
  assert (
    lora_rates.share_of_parameters(lora_against_full.get_config('full')) == 1
  )


def test_rates_start_at_those_of_the_experiment():
  assert lora_rates.first_rate(lora_against_full.get_config('full')) == -11
  assert lora_rates.first_rate(lora_against_full.get_config('rank-8')) == -8
