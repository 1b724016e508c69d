"""Over-optimisation by reinforcement, beside best of n on one axis of KL.

    python -m studies.over_optimisation_rl --figure=runs/reinforced.svg

Gao, Schulman & Hilton 2022 (arXiv:2210.10760), figure 1 and section 3.6. Gold
reward, proxies and best of n come from studies/over_optimisation.py. The policy
has a separate distribution for each of the 16 letters, so it begins as the
random policy, and its KL from the random policy is known exactly. RLOO trains
it against the proxy, through the loss that trains language models. With d =
sqrt(KL), the curve has the paper's fit for reinforcement:

    R(d) = d (alpha - beta log d)

Expected: the gold reward rises and then falls while the proxy still rises. A KL
penalty ends the run at a smaller d, near the largest gold reward. There, the
gold reward is about the same as in the run without a penalty: the penalty is an
early stop. A policy of independent letters cannot be as good as best of n,
whose answers avoid sums that are too small or too large; so the curves compare
in form, not in height. LOG.md has the measured result. Takes about five minutes
on two CPU cores.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from absl import app
import jax
import jax.numpy as jnp
import numpy as np
import optax

from evals import best_of_n
from evals.results import statistics
from models import transformer
from studies import over_optimisation as lab
from studies.common import figure, study_flags
from training.objectives import port
from training.objectives.policy import recipes

PROXY = lab.PROXIES[0]
PENALTIES = 0.0, 0.5, 2.0  # factors of the KL in the reward
NUM_SEEDS, NUM_STEPS, STEPS_PER_POINT = 3, 200, 10
_GROUP, _ANSWERS, _MEASURED = 16, 256, 2048
_PEAK_LR = 0.03


@dataclasses.dataclass(frozen=True)
class _Letters(port.Model):
  """The model port of a table of logits, one row a letter of the answer."""

  def hidden(self, params, tokens_BT, positions_BT, segment_ids_BT):
    del params, tokens_BT, segment_ids_BT
    return port.Hidden(jax.nn.one_hot(positions_BT, lab.LENGTH), None)

  def logits(self, params, states):
    return states @ params[port.MODEL]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
  """The course of a run: one point every few steps, [seeds, points]."""

  distance_SP: np.ndarray  # root of the KL from the first policy, in nats
  gold_SP: np.ndarray  # gold reward above the first policy's
  proxy_SP: np.ndarray

  def peak(self) -> best_of_n.Estimate:
    """Returns the gold reward where an early stop would have ended the run."""
    best = int(np.argmax(self.gold_SP.mean(axis=0)))
    return _mean(self.gold_SP[:, best])

  def decline(self) -> best_of_n.Estimate:
    """Returns the gold reward lost from the peak to the end; 0: none."""
    best = int(np.argmax(self.gold_SP.mean(axis=0)))
    return _mean(self.gold_SP[:, best] - self.gold_SP[:, -1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """R(d) = d (alpha - beta log d), fitted to the paths of a run."""

  alpha: best_of_n.Estimate
  beta: best_of_n.Estimate
  r_squared: float

  def __call__(self, distances: np.ndarray) -> np.ndarray:
    """Returns R(d) for distances above 0."""
    slopes = self.alpha.value - self.beta.value * np.log(distances)
    return distances * slopes

  @property
  def peak(self) -> float:
    """Returns the distance of the largest reward; infinity: it never falls."""
    if self.beta.value <= 0:
      return np.inf
    return float(np.exp(self.alpha.value / self.beta.value - 1))


def fit(path: Path) -> Fit:
  """Returns the fit by least squares, with errors over seeds."""
  coefficients, left, varied = [], 0.0, 0.0
  for d_P, gold_P in zip(path.distance_SP, path.gold_SP, strict=True):
    form_P2 = np.stack([d_P, -d_P * np.log(d_P)], axis=1)
    own, *_ = np.linalg.lstsq(form_P2, gold_P)
    coefficients.append(own)
    left += np.sum((gold_P - form_P2 @ own) ** 2)
    varied += np.sum((gold_P - gold_P.mean()) ** 2)
  alphas, betas = np.transpose(coefficients)
  return Fit(
    alpha=_mean(alphas), beta=_mean(betas), r_squared=float(1 - left / varied)
  )


def kl_of(logits_TV: np.ndarray) -> float:
  """Returns the KL of a policy from letters at random, in nats."""
  logits_TV = np.asarray(logits_TV, np.float64)
  total_T1 = np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
  logprobs_TV = logits_TV - total_T1
  ratio_TV = logprobs_TV + np.log(lab.NUM_LETTERS)
  return max(0.0, float(np.sum(np.exp(logprobs_TV) * ratio_TV)))


def train(
  score: Callable[[np.ndarray], np.ndarray],
  *,
  penalty: float,
  seed: int,
  num_steps: int = NUM_STEPS,
) -> np.ndarray:
  """Returns d, gold and proxy reward along a run, [3, points].

  Args:
    score: the proxy, from answers [..., LENGTH] to rewards.
    penalty: factor of the KL in the reward.
    seed: seed of the answers.
  """
  objective = recipes.rloo(group_size=_GROUP, kl=penalty, max_length=lab.LENGTH)
  objective.validate()
  # The port reads only its number of letters.
  model = _Letters(transformer.Transformer(lab.experiment_of(PROXY).model))
  optimizer = optax.adam(_PEAK_LR)

  @jax.jit
  def step(params, state, batch):
    def loss(params):
      totals = objective.totals(params, batch, model)
      total, sums = objective(params, batch, model, totals=totals)
      return total / sums['weight']

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  shape = lab.LENGTH, lab.NUM_LETTERS
  params: Any = {port.MODEL: jnp.zeros(shape, jnp.float32)}
  state, points = optimizer.init(params), []
  first = lab.draw((_MEASURED,), [seed, 6])
  base = np.array([lab.gold(first).mean(), score(first).mean()])
  for index in range(num_steps):
    key = jax.random.fold_in(jax.random.key(seed), index)
    answers = _drawn(params[port.MODEL], key, _ANSWERS)
    params, state = step(params, state, _rows(objective, answers, score))
    if (index + 1) % STEPS_PER_POINT == 0:
      key = jax.random.fold_in(key, 1)
      seen = _drawn(params[port.MODEL], key, _MEASURED)
      rewards = np.array([lab.gold(seen).mean(), score(seen).mean()]) - base
      points.append([np.sqrt(kl_of(params[port.MODEL])), *rewards])
  return np.transpose(points)


def _drawn(logits_TV, key, count) -> np.ndarray:
  shape = count, lab.LENGTH
  return np.asarray(jax.random.categorical(key, logits_TV, shape=shape))


def _rows(objective, answers, score) -> dict[str, np.ndarray]:
  """Returns the batch of some answers, one a row."""
  shape = answers.shape
  advantages_B = objective.advantages(score(answers))
  return {
    'tokens': answers,  # the policy of a letter does not read the others
    'targets': answers,
    'positions': np.tile(np.arange(lab.LENGTH, dtype=np.int32), (shape[0], 1)),
    'segment_ids': np.ones(shape, np.int32),
    'weights': np.ones(shape, np.float32),
    'advantages': np.broadcast_to(advantages_B[:, None], shape),
    'ref_logprobs': np.full(shape, -np.log(lab.NUM_LETTERS), np.float32),
  }


def measure(
  score: Callable[[np.ndarray], np.ndarray],
  penalty: float,
  *,
  num_seeds: int = NUM_SEEDS,
  num_steps: int = NUM_STEPS,
) -> Path:
  """Returns the paths of several runs against one proxy."""
  found = [
    train(score, penalty=penalty, seed=seed, num_steps=num_steps)
    for seed in range(num_seeds)
  ]
  distance_SP, gold_SP, proxy_SP = np.swapaxes(found, 0, 1)
  return Path(distance_SP=distance_SP, gold_SP=gold_SP, proxy_SP=proxy_SP)


def beside(path: Path, free: Path) -> best_of_n.Estimate:
  """Returns the gold reward at the end of runs above that of free runs.

  At the same distance from the first policy; 0: the penalty is an early stop.
  """
  gaps = [
    path.gold_SP[s, -1]
    - np.interp(path.distance_SP[s, -1], free.distance_SP[s], free.gold_SP[s])
    for s in range(len(path.gold_SP))
  ]
  return _mean(np.array(gaps))


def _mean(values: np.ndarray) -> best_of_n.Estimate:
  error = statistics.standard_error(values)
  return best_of_n.Estimate(float(np.mean(values)), error)


def lines_of(penalty: float, path: Path, free: Path) -> list[str]:
  """Returns the rows of the table about the runs of a penalty."""
  fitted = fit(path)
  numbers = {
    'd at the end': _mean(path.distance_SP[:, -1]),
    'proxy at the end': _mean(path.proxy_SP[:, -1]),
    'gold at the end': _mean(path.gold_SP[:, -1]),
    'largest gold': path.peak(),
    'lost after it': path.decline(),
    'alpha': fitted.alpha,
    'beta': fitted.beta,
  }
  if penalty:
    numbers['above the run without penalty at the same d'] = beside(path, free)
  shown = (f'{k} {x.value:.3f} +- {x.error:.3f}' for k, x in numbers.items())
  return [
    f'penalty {penalty}: ' + ', '.join(shown),
    f'  R^2 {fitted.r_squared:.3f}, fitted peak, d {fitted.peak:.2f}',
  ]


def _panel(paths: dict[float, Path], best: best_of_n.Curve) -> figure.Panel:
  gold_n = [best.gold(n).value for n in best.ns]
  lines = {
    'best of n': figure.Line(x=best.distances.tolist(), y=gold_n, style='.:')
  }
  for penalty, path in paths.items():
    x = path.distance_SP.mean(axis=0)
    lines[f'RLOO, penalty {penalty}'] = figure.Line(
      x=x.tolist(), y=path.gold_SP.mean(axis=0).tolist()
    )
  free = paths[0.0]
  x = free.distance_SP.mean(axis=0)
  lines['fit without penalty'] = figure.Line(
    x=x.tolist(), y=fit(free)(x).tolist(), style='--'
  )
  return figure.Panel(
    title='one proxy, two ways to use it',
    x_label='d, root of the KL in nats',
    y_label='gold reward above the first policy',
    lines=lines,
  )


def main(argv: list[str]) -> None:
  """Trains against the proxy, prints curves and fits, and draws them."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  pairs, _ = lab.labelled_pairs(PROXY, 0)
  score = lab.train(PROXY, pairs, 0)
  answers = lab.draw((lab.NUM_GROUPS, lab.GROUP), [0, 5])
  ns = lab.ns_of(lab.GROUP)
  best = best_of_n.curve(score(answers), lab.gold(answers), ns)
  fitted = best_of_n.fit(best)
  print(
    f'best of n: largest d {best.distances[-1]:.2f}, largest gold'
    f' {max(best.gold(n).value for n in ns):.3f}, at the last n'
    f' {best.gold(ns[-1]).value:.3f} +- {best.gold(ns[-1]).error:.3f}, alpha'
    f' {fitted.alpha.value:.3f}, beta {fitted.beta.value:.3f}'
  )
  options = {
    'num_seeds': study_flags.SEEDS.value or NUM_SEEDS,
    'num_steps': study_flags.STEPS.value or NUM_STEPS,
  }
  paths: dict[float, Path] = {}
  for penalty in PENALTIES:
    paths[penalty] = measure(score, penalty, **options)
    print('\n'.join(lines_of(penalty, paths[penalty], paths[0.0])), flush=True)
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, [_panel(paths, best)])


if __name__ == '__main__':
  app.run(main)
