"""Measurements of claims about scaling laws, published ones and our own."""

from typing import Any

import numpy as np

from evals import claims as claims_lib
from experiments.scaling import bytes as bytes_page, bytes_large
from studies.papers import port
from studies.scaling import (
  isoflop,
  kaplan as kaplan_lib,
  optimum,
  parabolas,
  parametric,
  points as points_lib,
)
from training.planning import scaling_laws

# Models of highest loss that Besiroglu et al. leave out.
_DROPPED = 5
# Sizes of one budget of the grid without noise, as in arXiv:2603.22339.
_NUM_SIZES = 15


def chinchilla_refit(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the law of the published points, by the Huber loss."""
  del claim
  points = points_lib.read(setting.inputs['points'])
  law = parametric.huber(points_lib.without_highest(points, _DROPPED))
  found = parametric.quantities(law)
  return {name: found[name] for name in ('E', 'A', 'B', 'alpha', 'beta', 'a')}


def inference_adjusted(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the FLOPs that a model of 7B saves against one of 13B."""
  del claim, setting
  law = scaling_laws.SARDANA
  use = optimum.Use(answer_tokens=2e12)
  # The tokens with which 13B is the compute-optimal size.
  flops = 6 * 13e9 * 5.76e11
  reference = optimum.choice(law, 13e9, flops / (6 * 13e9), use)
  tokens = optimum.tokens_for(law, 7e9, reference.loss)
  smaller = optimum.choice(law, 7e9, tokens, use)
  saved = reference.total - smaller.total
  return {
    'tokens of the 7B model': tokens,
    'FLOPs saved': saved,
    'share saved, %': 100 * saved / reference.total,
  }


def kaplan_reconciled(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the exponents of parameters without embeddings."""
  del claim, setting
  names = "Besiroglu's law", "Hoffmann's law"
  return {
    name: kaplan_lib.exponent(law)
    for name, law in zip(names, kaplan_lib.LAWS, strict=True)
  }


def parabola_bias(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns how far parabolas miss the optimum of losses without noise."""
  del claim, setting
  law = scaling_laws.HOFFMANN
  found = {}
  for factor in (2, 4, 8, 16):
    points = _noise_free(law, factor)
    bias = parabolas.bias(law, points)
    shares = list(bias.best_params.values())
    found[f'N_opt too high, grid x{factor}, %'] = 100 * float(np.mean(shares))
    if factor == 16:
      found['exponent too high, grid x16'] = bias.exponent
  return found


def _noise_free(law: scaling_laws.Fit, factor: float) -> points_lib.Points:
  """Returns points from best / factor to best x factor of five budgets."""
  sizes, tokens, budgets = [], [], []
  for flops in np.geomspace(1e17, 1e21, 5).tolist():
    best, _ = law.optimum(flops)
    for size in np.geomspace(best / factor, best * factor, _NUM_SIZES):
      sizes.append(size)
      tokens.append(flops / (6 * size))
      budgets.append(flops)
  losses = [law.loss(n, d) for n, d in zip(sizes, tokens, strict=True)]
  return points_lib.make(sizes, tokens, losses, budgets)


def repeated_data(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the worth of repeated epochs, in epochs of new data."""
  del claim, setting
  return {
    f'{epochs} epochs': scaling_laws.effective_tokens(1.0, epochs)
    for epochs in (4, 16, 40)
  }


def isoflop_bytes(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the exponents of a grid that a CPU trains."""
  return _exponents(claim, setting, bytes_page)


def isoflop_bytes_large(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the exponents of a grid that a GPU trains."""
  return _exponents(claim, setting, bytes_large)


def _exponents(
  claim: claims_lib.Claim, setting: port.Setting, grid: Any
) -> port.Measured:
  """Trains a grid, and returns its exponents with their intervals."""
  text = isoflop.cut_text(setting.inputs.get('text', ''), setting.workdir)
  points = isoflop.measure(isoflop.make_grid(grid, text=text), setting.workdir)
  if points is None:
    raise port.Stopped(1)
  points_lib.write(setting.workdir / isoflop.POINTS, points)
  power = parabolas.fit(points)
  around = parabolas.bootstrap(points)
  law = parametric.bootstrap(points, parametric.project)
  exponent = parametric.quantities(law.fit)['a']
  of_law = law.intervals['a']
  names = [quantity.name for quantity in claim.quantities]
  found = (
    port.Interval(value=power.exponent, low=around.low, high=around.high),
    port.Interval(value=exponent, low=of_law.low, high=of_law.high),
    parabolas.bias(law.fit, points).exponent,
  )
  return dict(zip(names, found, strict=True))
