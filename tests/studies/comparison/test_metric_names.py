"""Metrics that a run will write are known before it begins."""

import pytest

from studies.comparison import metric_names
from tests.helpers.training import tiny_experiment
from training.evaluation import evals_config
from training.objectives import reward

TASKS = evals_config.EvalsConfig(tasks=('perplexity:some/book.txt',))


@pytest.mark.parametrize(
  ('metric', 'direction'),
  [
    ('loss', 'minimize'),
    ('average_bits_per_byte', 'minimize'),
    ('perplexity_book/perplexity', 'minimize'),
    ('accuracy', 'maximize'),
    ('tokens_per_s', 'maximize'),
    ('reward/length', 'maximize'),
    ('length', None),
  ],
)
def test_a_name_says_which_way_is_better(metric, direction):
  assert metric_names.direction_of(metric) == direction


@pytest.mark.parametrize(
  ('fields', 'metric'),
  [
    ({}, 'loss'),
    ({}, 'bits_per_byte'),
    ({}, 'tokens_per_s'),
    ({'evals': TASKS}, 'perplexity_book/perplexity'),
    ({'ema_decay': 0.9}, 'average_loss'),
    ({'objective': reward.Reward()}, 'accuracy'),
  ],
)
def test_a_metric_of_the_run_is_taken(fields, metric):
  metric_names.check(tiny_experiment.make(**fields), metric)


@pytest.mark.parametrize(
  ('fields', 'metric', 'words'),
  [
    (
      {},
      'accuracy',
      "metric: got 'accuracy', expected one of bits_per_byte, l",
    ),
    ({}, 'average_loss', 'expected one of bits_per_byte, loss, tokens_per_s'),
    ({}, 'token_per_s', 'did you mean tokens_per_s'),
    ({'evals': TASKS}, 'book/loss', 'loss, perplexity_book/SCORE, tokens_per_'),
    ({'objective': reward.Reward()}, 'bits_per_byte', 'accuracy, loss'),
  ],
)
def test_a_metric_of_no_run_is_one_line(fields, metric, words):
  with pytest.raises(ValueError, match=words):
    metric_names.check(tiny_experiment.make(**fields), metric)
