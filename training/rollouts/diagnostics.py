"""Diagnostics: the figures of a rollout batch, and warnings in words."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from training.rollouts import rollout_config, rows as rows_lib
from training.rollouts.draws import drawing, scoring

# Number of rollout batches on each side of a comparison in a warning.
_WINDOW = 10
_MOST_WITHOUT_SIGNAL = 0.9
_LEAST_ENTROPY = 0.1  # as a share of the entropy at the start
_MOST_FAILED = 0.1  # share of the answers on which a verifier or judge fails
_MOST_GROWTH = 2.0  # growth of the mean length


def figures(
  step: int, drawn: drawing.Drawn, arrays: rows_lib.Arrays, group_size: int
) -> dict[str, float]:
  """Returns the figures of a rollout batch, by name.

  `staleness` is the mean age of the tokens, in steps, at the first step on
  them.
  `entropy` is the mean of -log p of the sampled tokens, in nats per token: an
  unbiased estimate of the policy's entropy. `failed/NAME` is the share of all
  answers with the reward 0 because a verifier or judge failed. `gap_*` compares
  the log-probabilities of sampler and trainer, where the objective has the
  trainer's.
  """
  total_N = drawn.scored.total_N
  lengths_N = np.asarray([e.num_sampled for e in drawn.episodes], np.float64)
  truncated_N = np.asarray([e.is_truncated for e in drawn.episodes])
  spread_G = total_N.reshape(-1, group_size).std(axis=1)
  trained_BT = arrays['weights'] > 0
  values = {
    'reward': total_N.mean(),
    'reward_std': total_N.std(),
    'reward_std_in_groups': spread_G.mean(),
    'without_signal': drawn.share_without_signal,
    'rounds': drawn.num_rounds,
    'length': lengths_N.mean(),
    'length_max': lengths_N.max(),
    'truncated': truncated_N.mean(),
  }
  if not truncated_N.all():
    values['length_ended'] = lengths_N[~truncated_N].mean()
  for name, values_N in drawn.scored.parts.items():
    values[f'reward/{name}'] = values_N.mean()
  for name, share in drawn.failed.items():
    values[f'failed/{name}'] = share
  if trained_BT.any():
    sampled_N = arrays['sampler_logprobs'][trained_BT].astype(np.float64)
    values['entropy'] = -sampled_N.mean()
    versions_N = arrays['versions'][trained_BT]
    values['staleness'] = step - versions_N.mean()
    if 'old_logprobs' in arrays:
      values |= gap(arrays['old_logprobs'][trained_BT], sampled_N)
  return {name: float(value) for name, value in values.items()}


def gap(trainer_N: np.ndarray, sampler_N: np.ndarray) -> dict[str, float]:
  """Returns the difference of two log-probabilities of the same tokens, nats.

  `gap_kl` estimates KL(sampler || trainer) by k3 (Schulman 2020), and
  `gap_ess` is the effective sample size of trainer over sampler weights, as a
  share of the tokens (Kish).
  """
  difference_N = np.asarray(trainer_N, np.float64) - sampler_N
  ratio_N = np.exp(np.clip(difference_N, -20, 20))
  return {
    'gap_mean': float(np.abs(difference_N).mean()),
    'gap_max': float(np.abs(difference_N).max()),
    'gap_kl': float((ratio_N - 1 - difference_N).mean()),
    'gap_ess': float(
      ratio_N.sum() ** 2 / (np.square(ratio_N).sum() * len(ratio_N))
    ),
  }


class Watch:
  """Watches the figures of a run, and warns of common problems in words.

  Each warning is given once.
  """

  def __init__(
    self, config: rollout_config.RolloutConfig, say: Callable[[str], None]
  ):
    self._say = say
    self._is_rewarded = config.is_rewarded
    self._verifiers = [p.label for p in config.rewards if not p.weight]
    self._seen: collections.deque[dict[str, float]] = collections.deque(
      maxlen=2 * _WINDOW
    )
    self._first: dict[str, float] = {}
    self._said: set[str] = set()

  def see(self, step: int, values: dict[str, float]) -> None:
    """Takes the figures of the next rollout batch."""
    self._first = self._first or values
    self._seen.append(values)
    latest = list(self._seen)[-_WINDOW:]
    if len(latest) < _WINDOW:
      return

    def mean(name: str, records: Any = latest) -> float:
      return float(np.mean([r.get(name, 0.0) for r in records]))

    for name in [n for n in latest[-1] if n.startswith('failed/')]:
      if mean(name) > _MOST_FAILED:
        self._warn(
          name,
          f'step {step}: {name.partition("/")[2]} failed on {mean(name):.0%} of'
          ' the answers, which count as 0: right answers may be among them;'
          ' look at the log for the first reason of each batch, and raise the'
          " verifier's limits",
        )
    length = self._first['length']
    if mean('length') > _MOST_GROWTH * length:
      self._warn(
        'length',
        f'step {step}: answers grew from {length:.0f} to {mean("length"):.0f}'
        f' tokens, {mean("truncated"):.0%} reach rollouts.max_tokens; look at'
        ' samples.jsonl, or set rollouts.overlong_tokens',
      )
    if self._is_rewarded:
      self._see_learning(step, mean)
      self._see_hacking(step, mean)

  def _see_learning(self, step: int, mean: Callable[..., float]) -> None:
    if mean('without_signal') > _MOST_WITHOUT_SIGNAL:
      self._warn(
        'signal',
        f'step {step}: in {mean("without_signal"):.0%} of the groups all'
        ' answers have the same reward, which teaches nothing: the prompts are'
        ' too hard or too easy; change them, raise the group size or the'
        ' temperature, or set rollouts.drops_groups_without_signal',
      )
    start = self._first.get('entropy', 0.0)
    if mean('entropy') < _LEAST_ENTROPY * start and mean('reward') < 0.9:
      self._warn(
        'entropy',
        f'step {step}: the entropy fell from {start:.3g} to'
        f' {mean("entropy"):.3g} nats per token: answers are nearly the same,'
        ' and no better ones are found; raise objective.clip_high, lower'
        ' optimizer.peak_lr, or add a distance to the reference',
      )

  def _see_hacking(self, step: int, mean: Callable[..., float]) -> None:
    before = list(self._seen)[:-_WINDOW]
    if len(before) < _WINDOW:
      return
    for name in self._verifiers:
      label = f'reward/{name}'
      falls = mean(label, before) - mean(label)
      # Twice the deviation of a mean of that many batches.
      noise_N = [r[label] for r in self._seen]
      least = 2 * float(np.std(noise_N)) / _WINDOW**0.5
      if falls > max(least, 1e-3) and mean('reward') > mean('reward', before):
        self._warn(
          f'hacking {name}',
          f'step {step}: the reward rises while {name}, which is measured and'
          f' not trained on, fell from {mean(label, before):.3f} to'
          f' {mean(label):.3f}: the policy may be gaming the reward; look at'
          ' samples.jsonl, stop earlier, or stay nearer to the reference',
        )

  def _warn(self, kind: str, text: str) -> None:
    if kind not in self._said:
      self._said.add(kind)
      self._say(f'WARNING    {text}')


def report(index: int, values: dict[str, float], *, is_rewarded: bool) -> str:
  """Returns the figures of a rollout batch as one line.

  Args:
    is_rewarded: whether the reward trains, so that groups need a signal.
  """
  signal_text = (
    f', no signal in {values["without_signal"]:.0%} of groups'
    if is_rewarded
    else ''
  )
  gap_text = (
    f', gap to the sampler {values["gap_mean"]:.2g} (at most'
    f' {values["gap_max"]:.2g})'
    if 'gap_mean' in values
    else ''
  )
  return (
    f'rollout {index}: reward {values["reward"]:.4f} +-'
    f' {values["reward_std"]:.4f}{signal_text}, length'
    f' {values["length"]:.1f}, truncated {values["truncated"]:.1%}, entropy'
    f' {values.get("entropy", 0.0):.3f}{gap_text}'
  )


def table(
  step: int, drawn: drawing.Drawn, group_size: int, num_groups: int
) -> list[dict[str, Any]]:
  """Returns the answers of the first prompts with their rewards, as JSON."""
  rows = []
  for i, episode in enumerate(drawn.episodes[: num_groups * group_size]):
    parts = drawn.scored.parts.items()
    rows.append(
      {
        'step': step,
        'group': i // group_size,
        'prompt': [dict(message) for message in episode.messages],
        'answer': episode.text,
        'reward': float(drawn.scored.total_N[i]),
        'parts': {name: float(values[i]) for name, values in parts},
        'tokens': episode.num_sampled,
        'truncated': episode.is_truncated,
      }
    )
  return rows


def signal(drawn: drawing.Drawn, group_size: int) -> np.ndarray:
  """Returns whether each group of a batch has a training signal, bool [G]."""
  return scoring.has_signal(drawn.scored.total_N, group_size)
