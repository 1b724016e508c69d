"""Over-optimisation: best of n by a learnt reward, against the true reward.

    python -m studies.over_optimisation --figure=runs/best_of_n.svg

Gao, Schulman & Hilton 2022 (arXiv:2210.10760), figure 1a. The true (gold)
reward is known exactly. A letter has a value, and an answer of 16 letters has
the sum s of its values, scaled to variance 1 under the policy, which draws
letters at random. More is better, up to a point:

    gold = s - s^2 / (2 x 1.25)

The proxies are reward models of one shape that learn from pairs of random
answers, with labels drawn from the Bradley-Terry model of the gold reward. They
differ in the number of pairs, and in the noise of the labels. Best of n takes
the best of n random answers by a proxy; the gold reward gives its true value.
Every curve has a fit of R(d) = d (alpha - beta d), d = sqrt(KL).

Expected: a proxy of few pairs learns that a larger sum is better, but not that
too large a sum is worse, so the gold reward rises and then falls with n. A
proxy of many pairs learns both. LOG.md has the measured result. Takes about
three minutes on two CPU cores.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from absl import app
import jax
import jax.numpy as jnp
import numpy as np

from data import data_config
from evals import best_of_n
from experiments import presets
from models.layers import reward_head
from studies.common import figure, study_flags
from training import experiment as experiment_lib, learner as learner_lib
from training.objectives import port, reward
from training.optimizer import chain

NUM_LETTERS, LENGTH = 26, 16
_PEAK = 1.25  # s of the largest gold reward
_ROWS, _PAIRS_PER_ROW = 16, 4
_BATCH = _ROWS * _PAIRS_PER_ROW  # pairs
NUM_GROUPS, GROUP = 16, 2048  # groups of answers, which give the errors
_NUM_HELD_OUT = 4096  # pairs
_SCORED_TOGETHER = 4096  # answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proxy:
  """The training of a reward model."""

  name: str
  num_pairs: int
  num_steps: int
  # Factor of the gold rewards in the Bradley-Terry model of the labels.
  sharpness: float = 4.0


PROXIES = (
  Proxy(name='1,024 pairs', num_pairs=1024, num_steps=60),
  Proxy(name='16,384 pairs', num_pairs=16_384, num_steps=800),
  Proxy(
    name='16,384 noisy pairs', num_pairs=16_384, num_steps=800, sharpness=0.5
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """A proxy beside the gold reward."""

  accuracy: best_of_n.Estimate  # on held-out pairs without noise
  label_accuracy: float  # of the training labels: the share that is right
  curve: best_of_n.Curve
  fit: best_of_n.Fit


def gold(answers: np.ndarray) -> np.ndarray:
  """Returns the true reward of answers [..., LENGTH], float64 [...]."""
  values_V = np.random.default_rng(0).normal(size=NUM_LETTERS)
  values_V = (values_V - values_V.mean()) / values_V.std()
  sums = values_V[answers].sum(axis=-1) / np.sqrt(LENGTH)
  return sums - sums**2 / (2 * _PEAK)


def draw(shape: tuple[int, ...], seed: Any) -> np.ndarray:
  """Returns answers of the policy, [..., LENGTH]: letters at random."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, NUM_LETTERS, (*shape, LENGTH), dtype=np.int32)


def labelled_pairs(proxy: Proxy, seed: int) -> tuple[np.ndarray, float]:
  """Returns pairs [pairs, 2, LENGTH], chosen first, and the right share."""
  answers = draw((proxy.num_pairs, 2), [seed, 1])
  gaps = np.subtract(*gold(answers).T)
  probs = np.exp(-np.logaddexp(0, -proxy.sharpness * gaps))  # sigmoid
  is_first = np.random.default_rng([seed, 2]).random(len(gaps)) < probs
  chosen = np.where(is_first[:, None, None], answers, answers[:, ::-1])
  return chosen, float(np.mean(is_first == (gaps > 0)))


def experiment_of(proxy: Proxy) -> experiment_lib.Experiment:
  """Returns the experiment that trains a proxy."""
  return experiment_lib.Experiment(
    name='over_optimisation',
    model=presets.llama(
      vocab_size=NUM_LETTERS,
      num_layers=2,
      num_heads=2,
      num_kv_heads=2,
      width=32,
      mlp_width=96,
      length=2 * LENGTH * _PAIRS_PER_ROW,
    ),
    data=data_config.DataConfig(
      path='-', row_length=2 * LENGTH * _PAIRS_PER_ROW, batch_size=_ROWS
    ),
    objective=reward.Reward(),
    optimizer=chain.OptimizerConfig(peak_lr=3e-3, end_lr=0.0, warmup_steps=20),
    num_steps=proxy.num_steps,
  )


def rows(pairs: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a batch of pairs [_BATCH, 2, LENGTH]: rows without padding."""
  tokens_BT = pairs.reshape(_ROWS, -1)
  shape, size = tokens_BT.shape, 2 * _PAIRS_PER_ROW
  positions_T = np.tile(np.arange(LENGTH, dtype=np.int32), size)
  segments_T = np.repeat(np.arange(1, size + 1, dtype=np.int32), LENGTH)
  return {
    'tokens': tokens_BT,
    'targets': tokens_BT,  # a reward model predicts none
    'positions': np.tile(positions_T, (_ROWS, 1)),
    'segment_ids': np.tile(segments_T, (_ROWS, 1)),
    'weights': np.ones(shape, np.float32),
  }


def train(
  proxy: Proxy, pairs: np.ndarray, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function from answers [..., LENGTH] to rewards."""
  learner = learner_lib.make(experiment_of(proxy), jax.devices()[:1])
  state = learner.init(jax.random.key(seed))
  train_step = learner.compile_train_step()
  rng = np.random.default_rng([seed, 3])
  num_epochs = -(-proxy.num_steps * _BATCH // len(pairs))
  order = np.concatenate(
    [rng.permutation(len(pairs)) for _ in range(num_epochs)]
  )
  for step in range(proxy.num_steps):
    chosen = pairs[order[step * _BATCH : (step + 1) * _BATCH]]
    state, _ = train_step(state, learner.placement.put_batch(rows(chosen)))
  model = port.Model(learner.model)

  @jax.jit
  def score(params, answers_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), answers_BT.shape)
    hidden = model.hidden(
      params, answers_BT, positions_BT, jnp.ones_like(answers_BT)
    )
    head = params[port.HEADS][reward_head.NAME]
    return reward_head.rewards(head, hidden.states_BTD[:, -1])

  def score_all(answers):
    flat = answers.reshape(-1, LENGTH)
    parts = np.split(flat, range(_SCORED_TOGETHER, len(flat), _SCORED_TOGETHER))
    found = [np.asarray(score(state.params, part)) for part in parts]
    return np.concatenate(found).reshape(answers.shape[:-1])

  return score_all


def measure(
  proxy: Proxy,
  *,
  num_groups: int = NUM_GROUPS,
  group: int = GROUP,
  seed: int = 0,
) -> Result:
  """Trains a proxy; returns its accuracy, and its curve of best of n."""
  pairs, label_accuracy = labelled_pairs(proxy, seed)
  score = train(proxy, pairs, seed)
  held_out = draw((_NUM_HELD_OUT, 2), [seed, 4])
  is_right = (
    np.subtract(*score(held_out).T) * np.subtract(*gold(held_out).T) > 0
  )
  share = float(np.mean(is_right))
  error = float(np.std(is_right, ddof=1) / np.sqrt(len(is_right)))
  answers = draw((num_groups, group), [seed, 5])
  curve = best_of_n.curve(score(answers), gold(answers), ns_of(group))
  return Result(
    accuracy=best_of_n.Estimate(share, error),
    label_accuracy=label_accuracy,
    curve=curve,
    fit=best_of_n.fit(curve),
  )


def ns_of(group: int) -> tuple[int, ...]:
  """Returns powers of two up to half a group."""
  # For larger n, the sets of n answers have most answers in common.
  return tuple(2**i for i in range(group.bit_length() - 1))


def gold_curve(
  *, num_groups: int = NUM_GROUPS, group: int = GROUP, seed: int = 0
) -> best_of_n.Curve:
  """Returns the curve of the gold reward as its own proxy."""
  rewards = gold(draw((num_groups, group), [seed, 5]))
  return best_of_n.curve(rewards, rewards, ns_of(group))


def lines_of(name: str, result: Result) -> list[str]:
  """Returns the rows of the table about a proxy."""
  fit, curve = result.fit, result.curve
  numbers = {
    'held-out accuracy': _shown(result.accuracy),
    'right labels': f'{result.label_accuracy:.3f}',
    'alpha': _shown(fit.alpha),
    'beta': _shown(fit.beta),
    'R^2': f'{fit.r_squared:.3f}',
    'fitted peak, d': f'{fit.peak:.2f}',
    'lost from peak to last n': _shown(curve.decline()),
  }
  return [
    f'{name}: ' + ', '.join(f'{key} {text}' for key, text in numbers.items()),
    '  n     ' + ''.join(f'{n:>7}' for n in curve.ns),
    '  gold  ' + ''.join(f'{curve.gold(n).value:7.3f}' for n in curve.ns),
    '  error ' + ''.join(f'{curve.gold(n).error:7.3f}' for n in curve.ns),
  ]


def _shown(estimate: best_of_n.Estimate) -> str:
  return f'{estimate.value:.3f} +- {estimate.error:.3f}'


def panels(
  results: dict[str, Result], best: best_of_n.Curve
) -> Sequence[figure.Panel]:
  """Returns the gold reward over d: measured, and the fits, dashed."""
  lines = {}
  for name, result in results.items():
    curve = result.curve
    mean, error = np.array([curve.gold(n) for n in curve.ns]).T
    lines[name] = figure.Line(
      x=curve.distances.tolist(),
      y=mean.tolist(),
      low=(mean - error).tolist(),
      high=(mean + error).tolist(),
      style='.-',
    )
    lines[f'{name}: fit'] = figure.Line(
      x=curve.distances.tolist(),
      y=result.fit(curve.distances).tolist(),
      style='--',
    )
  lines['the gold reward itself'] = figure.Line(
    x=best.distances.tolist(),
    y=[best.gold(n).value for n in best.ns],
    style=':',
  )
  return [
    figure.Panel(
      title='best of n by a proxy',
      x_label='d, root of the KL in nats',
      y_label='gold reward above the policy',
      lines=lines,
    )
  ]


def main(argv: list[str]) -> None:
  """Trains the proxies, prints their curves and fits, and draws them."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  results = {}
  for proxy in PROXIES:
    results[proxy.name] = measure(proxy)
    print('\n'.join(lines_of(proxy.name, results[proxy.name])), flush=True)
  best = gold_curve()
  print('the gold reward itself:')
  print('  gold  ' + ''.join(f'{best.gold(n).value:7.3f}' for n in best.ns))
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, panels(results, best))


if __name__ == '__main__':
  app.run(main)
