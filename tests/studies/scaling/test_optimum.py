"""The best size: closed form, numeric search, and the bill of both lives."""

import dataclasses
import math

import numpy as np
import pytest

from studies.common import figure
from studies.scaling import kaplan, optimum
from training.planning import scaling_laws

LAWS = [*scaling_laws.FITS, scaling_laws.SARDANA]


@pytest.mark.parametrize('law', LAWS)
def test_the_closed_form_is_the_lowest_loss_of_the_budget(law):
  flops = 3e20
  best, tokens = law.optimum(flops)
  assert 6 * best * tokens == pytest.approx(flops)
  sizes = best * np.geomspace(0.5, 2, 20_001)
  losses = [law.loss(n, flops / (6 * n)) for n in sizes.tolist()]
  # Half a step of the grid.
  assert sizes[int(np.argmin(losses))] == pytest.approx(best, rel=7e-5)


@pytest.mark.parametrize('law', LAWS)
def test_without_requests_the_cheapest_model_is_the_compute_optimal_one(law):
  reference, best = optimum.plan(law, 1e21, optimum.Use())
  # The cost is flat at its minimum: an error of 1e-5 in N is one of 1e-10.
  assert best.params == pytest.approx(reference.params, rel=1e-5)
  assert best.total == pytest.approx(reference.total, rel=1e-9)


def test_a_few_requests_change_little_and_many_shrink_the_model():
  law = scaling_laws.BESIROGLU
  sizes, saved = [], []
  for tokens in (1e3, 1e10, 1e12, 1e14, 1e17):
    use = optimum.Use(answer_tokens=tokens)
    reference, best = optimum.plan(law, 1e21, use)
    assert best.loss == pytest.approx(reference.loss, rel=1e-12)
    sizes.append(best.params / reference.params)
    saved.append(1 - best.total / reference.total)
  assert sizes[0] == pytest.approx(1, rel=1e-5)
  assert sizes == sorted(sizes, reverse=True)
  assert saved == sorted(saved)
  # Infinitely many requests: the smallest size that reaches the loss at all.
  least = (law.params_scale / (reference.loss - law.floor)) ** (
    1 / law.params_exponent
  )
  assert sizes[-1] * reference.params == pytest.approx(least, rel=0.05)


def test_the_published_example_saves_17_percent():
  """Sardana et al., arXiv:2401.00448: 13B, 2T tokens served, 1.7e22 FLOPs."""
  law = scaling_laws.SARDANA
  use = optimum.Use(prompt_tokens=2e12)
  # The budget whose best size is 13B: N grows as C^a.
  a = law.tokens_exponent / (law.params_exponent + law.tokens_exponent)
  budget = 1e22 * (13e9 / law.optimum(1e22)[0]) ** (1 / a)
  reference, best = optimum.plan(law, budget, use)
  assert reference.params == pytest.approx(13e9)
  assert reference.tokens == pytest.approx(5.76e11, rel=2e-3)
  small = optimum.choice(
    law, 7e9, optimum.tokens_for(law, 7e9, reference.loss), use
  )
  saved = reference.total - small.total
  assert saved == pytest.approx(1.69e22, rel=1e-3)
  assert saved / reference.total == pytest.approx(0.174, abs=1e-3)
  assert best.total < small.total
  assert best.params == pytest.approx(7e9, rel=0.01)


def test_the_cheapest_model_is_that_of_a_search_over_sizes():
  law = scaling_laws.HOFFMANN
  use = optimum.Use(
    prompt_tokens=1e12,
    answer_tokens=2e11,
    training_utilisation=0.5,
    prompt_utilisation=0.4,
    answer_utilisation=0.02,
  )
  reference, best = optimum.plan(law, 1e22, use)
  models = [
    optimum.choice(law, n, optimum.tokens_for(law, n, reference.loss), use)
    for n in np.geomspace(best.params / 2, best.params * 2, 4001).tolist()
    if math.isfinite(optimum.tokens_for(law, n, reference.loss))
  ]
  found = min(models, key=lambda each: each.total)
  assert best.params == pytest.approx(found.params, rel=4e-4)
  assert best.total <= found.total
  # Slow answers weigh more: the model is smaller than at equal utilisation.
  even = dataclasses.replace(use, answer_utilisation=0.5)
  assert best.params < optimum.plan(law, 1e22, even)[1].params


def test_a_loss_below_the_floor_and_bad_shares_are_refused():
  law = scaling_laws.BESIROGLU
  with pytest.raises(ValueError, match='the lowest loss of the law'):
    optimum.cheapest(law, 1.8, optimum.Use())
  with pytest.raises(ValueError, match='--training_utilisation: got 1.2'):
    optimum.plan(law, 1e21, optimum.Use(training_utilisation=1.2))
  with pytest.raises(ValueError, match='answer_tokens: got nan'):
    optimum.plan(law, 1e21, optimum.Use(answer_tokens=math.nan))
  assert optimum.tokens_for(law, 1.0, 2.0) == math.inf


@pytest.mark.parametrize('text', ['nobody', '1,2,3', '1,2,3,4,-5', '1,,2,3,4'])
def test_a_law_that_is_none_is_refused(text):
  with pytest.raises(ValueError, match='--law: got'):
    optimum.parse_law(text)


def test_a_law_is_read_from_its_numbers():
  law = optimum.parse_law('1.69,406.4,410.7,0.34,0.28')
  assert law.optimum(1e21) == scaling_laws.HOFFMANN.optimum(1e21)


def test_the_table_and_the_figure_have_both_models(tmp_path):
  law, use = scaling_laws.BESIROGLU, optimum.Use(answer_tokens=7e11)
  table = optimum.table(*optimum.plan(law, 1e21, use))
  assert '| cheapest |' in table
  assert '36.2% of the total' in table
  pytest.importorskip('matplotlib')
  path = tmp_path / 'cost.png'
  figure.save(path, optimum.panels(law, 1e21, use))
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('law', 'reported'), [(kaplan.LAWS[0], 0.78), (kaplan.LAWS[1], 0.74)]
)
def test_kaplans_exponent_follows_from_chinchillas_law(law, reported):
  """Pearce and Song, arXiv:2406.12907, from a search over 20 sizes."""
  assert kaplan.exponent(law) == pytest.approx(reported, abs=0.01)
  low, high = kaplan.RANGE
  # The curve bends from above Kaplan's value to Chinchilla's.
  assert kaplan.exponent(law, low, 1e17) > 0.8
  assert kaplan.exponent(law, 1e24, 1e28) == pytest.approx(
    law.tokens_exponent / (law.params_exponent + law.tokens_exponent), abs=2e-3
  )


def test_kaplans_closed_form_is_the_lowest_loss_of_the_budget():
  law, flops = kaplan.LAWS[0], 1e18
  best = kaplan.best_params(law, flops)
  sizes = best * np.geomspace(0.5, 2, 20_001)
  losses = [
    law.loss(kaplan.num_total(n), flops / (6 * n)) for n in sizes.tolist()
  ]
  assert sizes[int(np.argmin(losses))] == pytest.approx(best, rel=7e-5)
