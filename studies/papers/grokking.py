"""Measurement of the claim about grokking: its delay and its frequencies.

A model that adds modulo p by the trigonometric algorithm has logits for the
sum c of a and b that are a sum of cos(w_k (a + b - c)), w_k = 2 pi k / p, over
a few frequencies k (Nanda et al. 2023, section 4). Over the table of all pairs,
the logits of one c are then in the span of cos(w_k (a + b)) and of
sin(w_k (a + b)). `Waves` takes this part of the logits apart by frequency.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np
from scipy import special

from data.synthetic import modular
from evals import claims as claims_lib
from models import model_config
from studies.papers import port, small_models

_MODULUS, _WIDTH = 59, 64
_TRAINED = 0.35  # share of the pairs
_STEPS, _LOOK_EVERY = 3000, 50
_KNOWN = 0.99  # right answers of a set that counts as known
_KEY = 0.05  # least share of the waves' variance that makes a frequency a key


class Waves:
  """The waves of all frequencies over the table of pairs."""

  def __init__(self, modulus: int):
    """Computes the waves.

    Args:
      modulus: p, odd.

    Raises:
      ValueError: the modulus is even, so that one frequency lacks a sine.
    """
    if modulus % 2 == 0:
      raise ValueError(f'modulus: got {modulus}, expected an odd number')
    self._modulus = modulus
    sums_B = np.add.outer(np.arange(modulus), np.arange(modulus)).ravel()
    frequencies_K = np.arange(1, modulus // 2 + 1)
    angles_KB = 2 * np.pi / modulus * np.outer(frequencies_K, sums_B)
    waves_K2B = np.stack([np.cos(angles_KB), np.sin(angles_KB)], axis=1)
    # Orthonormal: each wave has p^2 / 2 as its squared length.
    self._waves_K2B = waves_K2B * np.sqrt(2) / modulus

  def parts(self, logits_BC: np.ndarray) -> np.ndarray:
    """Returns the part of the logits of each frequency, [K, B, C].

    Args:
      logits_BC: logits of the sums C for all pairs B, [p^2, p].
    """
    heights_K2C = np.einsum('kib,bc->kic', self._waves_K2B, logits_BC)
    return np.einsum('kib,kic->kbc', self._waves_K2B, heights_K2C)

  def variances(self, logits_BC: np.ndarray) -> np.ndarray:
    """Returns the squared length of each frequency's part, [K]."""
    heights_K2C = np.einsum('kib,bc->kic', self._waves_K2B, logits_BC)
    return np.square(heights_K2C).sum(axis=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
  """A training run, looked at in N steps."""

  steps_N: np.ndarray
  known_N: np.ndarray  # right answers to trained pairs
  held_out_N: np.ndarray  # right answers to the other pairs
  # Loss of the trained pairs without the key frequencies of the last model.
  excluded_N: np.ndarray
  num_keys: int
  explained: float  # share of the last logits' variance in the key frequencies


def grokking(claim: claims_lib.Claim, setting: port.Setting) -> port.Measured:
  """Returns the delay, the frequencies, and the order of events."""
  runs = [_run(seed, setting) for seed in setting.seeds]
  return {
    quantity.name: [run[kind] for run in runs]
    for quantity, kind in zip(
      claim.quantities,
      ('known', 'held_out', 'delay', 'num_keys', 'explained', 'lead'),
      strict=True,
    )
  }


def _run(seed: int, setting: port.Setting) -> Mapping[str, float]:
  recipe = small_models.Recipe(
    model=model_config.ModelConfig(
      vocab_size=modular.num_ids(_MODULUS),
      num_layers=1,
      model_width=_WIDTH,
      num_heads=4,
      num_kv_heads=4,
      head_width=_WIDTH // 4,
      mlp='relu',
      mlp_width=4 * _WIDTH,
      max_length=4,
      tie_embeddings=False,
      scan_layers=False,
    ),
    optimizer=dataclasses.replace(
      small_models.adam(2e-3, decay=1.0, beta2=0.98),
      warmup_steps=10,
      clip_norm=0.0,
    ),
    num_steps=_STEPS,
    look_every=_LOOK_EVERY,
  )
  return small_models.kept(
    setting, recipe, 'grokking', seed, lambda: told(course(recipe, seed))
  )


def course(recipe: small_models.Recipe, seed: int) -> Course:
  """Trains a model on a part of all pairs, the whole part in each step."""
  ids_BT, is_sum_BT = modular.rows(_MODULUS)
  order = np.random.default_rng([seed, 2]).permutation(len(ids_BT))
  trained = np.sort(order[: round(_TRAINED * len(ids_BT))])
  is_trained_B = np.isin(np.arange(len(ids_BT)), trained)
  trainer = small_models.Trainer(recipe)
  looks = [
    (step, trainer.logits(variables, ids_BT[:, :3])[:, -1, :_MODULUS])
    for step, variables in trainer.run(
      seed, lambda _: (ids_BT[trained], is_sum_BT[trained])
    )
  ]
  return of_logits(
    [step for step, _ in looks],
    [logits_BC for _, logits_BC in looks],
    ids_BT[:, 3],
    is_trained_B,
  )


def of_logits(
  steps: Sequence[int],
  logits_NBC: Sequence[np.ndarray],
  sums_B: np.ndarray,
  is_trained_B: np.ndarray,
) -> Course:
  """Returns the course of a run from its logits, N times [p^2, p].

  The key frequencies are those of the last logits: each has at least a
  twentieth of the variance of all waves.
  """
  waves = Waves(logits_NBC[-1].shape[1])
  centred_BC = logits_NBC[-1] - logits_NBC[-1].mean(axis=0)
  variances_K = waves.variances(centred_BC)
  is_key_K = variances_K >= _KEY * variances_K.sum()
  known, held_out, excluded = [], [], []
  for logits_BC in logits_NBC:
    is_right_B = logits_BC.argmax(axis=1) == sums_B
    known.append(is_right_B[is_trained_B].mean())
    held_out.append(is_right_B[~is_trained_B].mean())
    without_BC = logits_BC - waves.parts(logits_BC)[is_key_K].sum(axis=0)
    excluded.append(_loss(without_BC, sums_B)[is_trained_B].mean())
  return Course(
    steps_N=np.array(steps),
    known_N=np.array(known),
    held_out_N=np.array(held_out),
    excluded_N=np.array(excluded),
    num_keys=int(is_key_K.sum()),
    explained=float(variances_K[is_key_K].sum() / np.square(centred_BC).sum()),
  )


def _loss(logits_BC: np.ndarray, sums_B: np.ndarray) -> np.ndarray:
  """Returns -log p of the sums, nats, [B]."""
  chosen_B = np.take_along_axis(logits_BC, sums_B[:, None], axis=1)[:, 0]
  return special.logsumexp(logits_BC, axis=1) - chosen_B


def told(run: Course) -> dict[str, float]:
  """Returns the numbers of the claim.

  `delay` is the number of steps until the held-out pairs are known, over the
  steps until the trained pairs are. `lead` is the number of steps from half of
  the excluded loss's rise to half of the held-out accuracy's. A run that never
  comes to know a set counts as one that knows it after the last step.
  """
  known = _first(run.steps_N, run.known_N >= _KNOWN)
  # From its lowest value on: before, the model learns what it excludes later.
  lowest = int(np.argmin(run.excluded_N))
  rise_N = run.excluded_N[lowest:]
  half = (rise_N[0] + rise_N[-1]) / 2
  risen = _first(run.steps_N[lowest:], rise_N >= half)
  first, last = run.held_out_N[0], run.held_out_N[-1]
  general = _first(run.steps_N, run.held_out_N >= (first + last) / 2)
  return {
    'known': float(run.known_N[-1]),
    'held_out': float(run.held_out_N[-1]),
    'delay': _first(run.steps_N, run.held_out_N >= _KNOWN) / max(known, 1.0),
    'num_keys': float(run.num_keys),
    'explained': run.explained,
    'lead': general - risen,
  }


def _first(steps_N: np.ndarray, is_true_N: np.ndarray) -> float:
  """Returns the first step at which something is true, or the last step."""
  return float(
    steps_N[np.argmax(is_true_N)] if is_true_N.any() else steps_N[-1]
  )
