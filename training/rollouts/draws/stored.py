"""Rollout batches as text: a checkpoint keeps the batches drawn ahead.

The weights that drew them are gone when a run resumes, so they cannot be drawn
again. Numbers are the same to the bit: JSON has the shortest decimals that give
the same float.
"""

import base64
import dataclasses
import json
from typing import Any
import zlib

import numpy as np

from training.rollouts.dialogues import episodes as episodes_lib
from training.rollouts.draws import drawing, scoring


def text_of(drawn: drawing.Drawn) -> str:
  """Returns a rollout batch as compressed text."""
  record = {
    **drawn._asdict(),
    'episodes': [_fields(episode) for episode in drawn.episodes],
    'scored': _fields(drawn.scored),
  }
  text = json.dumps(record, default=_plain)
  return base64.b64encode(zlib.compress(text.encode(), 1)).decode()


def read(text: str) -> drawing.Drawn:
  """Returns the rollout batch that `text_of` wrote."""
  record = json.loads(zlib.decompress(base64.b64decode(text)))
  scored = record['scored']
  return drawing.Drawn(
    **{
      **record,
      'episodes': tuple(_episode(fields) for fields in record['episodes']),
      'scored': scoring.Scored(
        total_N=np.asarray(scored['total_N'], np.float64),
        parts={
          name: np.asarray(values, np.float64)
          for name, values in scored['parts'].items()
        },
        failures=scored['failures'],
      ),
    }
  )


def _fields(instance: Any) -> dict[str, Any]:
  """Returns the fields of a dataclass, not copied."""
  names = [field.name for field in dataclasses.fields(instance)]
  return {name: getattr(instance, name) for name in names}


def _plain(value: Any) -> Any:
  """Returns arrays and numbers of NumPy as JSON has them."""
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  raise TypeError(
    f'rollouts.staleness: got a {type(value).__name__} in the record of a'
    ' prompt, expected what JSON holds: a checkpoint keeps the answers that'
    ' are drawn ahead; change the data source'
  )


def _episode(fields: dict[str, Any]) -> episodes_lib.Episode:
  trained = fields['trained']
  return episodes_lib.Episode(
    **{
      **fields,
      'prompt_ids': tuple(fields['prompt_ids']),
      'ids': tuple(fields['ids']),
      'logprobs': np.asarray(fields['logprobs'], np.float32),
      'versions': np.asarray(fields['versions'], np.int32),
      'trained': None if trained is None else np.asarray(trained, bool),
      'turn_rewards': {
        int(last): reward for last, reward in fields['turn_rewards'].items()
      },
    }
  )
