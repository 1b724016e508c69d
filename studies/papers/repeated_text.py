"""Measurement of the claim about repeated text: what its epochs are worth.

Models of one size are trained on U rows of text for several epochs, and others
on D rows that are all new, once. The worth of E epochs is the D at which a
model of new rows has the same loss, over U. Between the sizes D that are
trained, the loss is taken to be linear in log D.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import numpy as np

from data import sources
from evals import claims as claims_lib
from models import model_config
from studies.papers import port, small_models

# Bytes of a row, rows of a step. Steps of 8 rows were so few that losses of
# seeds differed by .2 nats.
_LENGTH, _BATCH = 128, 2
_UNIQUE = 512  # rows that are repeated, U
_NEW = 1, 2, 4, 8, 16  # multiples of U that are new
_EPOCHS = 4, 16
_HELD_OUT = 1024  # rows


def repeated_text(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the worth of epochs, in multiples of the text that is repeated."""
  runs = [_losses(seed, setting) for seed in setting.seeds]
  found = {
    quantity.name: [
      worth(_NEW, [run[f'new_{size}'] for size in _NEW], run[f'epochs_{count}'])
      for run in runs
    ]
    for quantity, count in zip(claim.quantities, _EPOCHS, strict=False)
  }
  cost = claim.quantities[-1]
  return found | {
    cost.name: [run['epochs_4'] - run['new_4'] for run in runs],
  }


def worth(
  sizes: Sequence[float], losses: Sequence[float], loss: float
) -> float:
  """Returns the size at which new text gives a loss.

  Args:
    sizes: sizes of texts, ascending.
    losses: the loss that each gives; it falls.
    loss: a loss; outside of the others, the nearest end counts.

  Raises:
    ValueError: a larger text gives no lower loss.
  """
  if not np.all(np.diff(losses) < 0):
    raise ValueError(
      f'losses: got {[round(x, 4) for x in losses]} of texts of the sizes'
      f' {list(sizes)}, expected them to fall; more steps or seeds may help'
    )
  return float(np.exp(np.interp(-loss, np.negative(losses), np.log(sizes))))


@functools.cache
def _rows() -> np.ndarray:
  """Returns all of the text as rows of bytes, [N, T + 1]."""
  source = sources.python_stdlib()
  texts = (source[i]['text'].encode('utf-8') for i in range(len(source)))
  ids = np.frombuffer(b''.join(texts), np.uint8)
  width = _LENGTH + 1
  return ids[: len(ids) // width * width].reshape(-1, width)


def _losses(seed: int, setting: port.Setting) -> Mapping[str, float]:
  """Returns the held-out loss of each run of a seed, nats per byte."""
  runs = {f'new_{size}': (size, 1) for size in _NEW}
  runs |= {f'epochs_{count}': (1, count) for count in _EPOCHS}
  return {
    name: _run(name, seed, setting, num_rows=size * _UNIQUE, epochs=epochs)
    for name, (size, epochs) in runs.items()
  }


def _run(
  name: str, seed: int, setting: port.Setting, *, num_rows: int, epochs: int
) -> float:
  num_steps = num_rows * epochs // _BATCH
  width = 48
  adam = small_models.adam(2e-3, decay=0.1)
  recipe = small_models.Recipe(
    model=model_config.ModelConfig(
      vocab_size=256,
      num_layers=2,
      model_width=width,
      num_heads=3,
      num_kv_heads=3,
      head_width=width // 3,
      mlp_width=128,
      max_length=_LENGTH,
      tie_embeddings=True,
      scan_layers=False,
    ),
    optimizer=dataclasses.replace(
      adam, schedule='linear', end_lr=0.0, warmup_steps=20
    ),
    num_steps=num_steps,
    look_every=min(num_steps, _UNIQUE // _BATCH),
  )

  def measure() -> dict[str, float]:
    rows_BT = _rows()
    order = np.random.default_rng([seed, 3]).permutation(len(rows_BT))
    held_out, known = np.split(order, [_HELD_OUT])
    draw = epochs_of(rows_BT[known[:num_rows]], _BATCH)
    trainer = small_models.Trainer(recipe)
    nll, _ = trainer.seen(trainer.last(seed, draw), rows_BT[held_out])
    return {'loss': float(nll.mean())}

  return small_models.kept(setting, recipe, name, seed, measure)['loss']


def epochs_of(rows_NT: np.ndarray, batch_size: int) -> small_models.Draw:
  """Returns a function that draws rows, each once in an epoch.

  Args:
    rows_NT: N rows; the batch size divides N.
    batch_size: rows of a batch.

  Raises:
    ValueError: the batch size does not divide N.
  """
  if len(rows_NT) % batch_size:
    raise ValueError(
      f'rows: got {len(rows_NT)}, expected a multiple of the batch size'
      f' {batch_size}: an epoch is whole batches'
    )
  left: list[np.ndarray] = []

  def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if not left:
      order = rng.permutation(len(rows_NT))
      left.extend(np.split(order, len(rows_NT) // batch_size))
    drawn = rows_NT[left.pop()]
    return drawn.astype(np.int32), np.ones(drawn.shape, bool)

  return draw
