"""A whole run on conversations that takes seconds, and the model before it.

The model has ids and a chat template in the style of Qwen. Its tokenizer has
the same token for EOS and for the end of a turn, and padding of its own.
"""

import json
import pathlib

import numpy as np

from data import data_config, sources
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files
from tests.helpers.training import tiny_run
from text import hf_tokenizer
from training import experiment as experiment_lib
from training.checkpoints import init_from

TEMPLATES = pathlib.Path(__file__).parents[2] / 'text' / 'chat_templates'
TEMPLATE = (TEMPLATES / 'chatml.jinja').read_text('utf-8')
GENERATION = {'temperature': 0.0, 'max_tokens': 77, 'stop_ids': [332, 330]}
ROW_LENGTH = 128  # no conversation of `write_chats` is longer
_WORDS = ('red', 'blue', 'naïve', '数', 'two', 'plus', 'is', 'a\nb')


def write_base(directory: pathlib.Path, *, family=hf_files.qwen, **fields):
  """Writes a frozen chat model of random weights."""
  tokenizer_dir = directory.with_name(f'{directory.name}_tokenizer')
  hf_tokenizer.convert(
    family(directory.with_name(f'{directory.name}_source')), tokenizer_dir
  )
  return frozen_dirs.write(
    directory,
    **{
      'config': tiny_models.llama_like(
        vocab_size=352, num_layers=1, max_length=ROW_LENGTH
      ),
      'tokenizer_dir': tokenizer_dir,
      'chat_template': TEMPLATE,
      'generation': GENERATION,
      **fields,
    },
  )


def write_chats(directory: pathlib.Path, *, train=40, validation=4) -> str:
  """Writes conversations of one to three turns; returns the path for data."""
  directory.mkdir(parents=True)
  rng = np.random.default_rng(0)

  def said(role):
    return {'role': role, 'content': ' '.join(rng.choice(_WORDS, 2))}

  for split, count in (('train', train), ('validation', validation)):
    lines = [
      json.dumps(
        {
          'messages': [
            said(role)
            for _ in range(rng.integers(1, 4))
            for role in ('user', 'assistant')
          ]
        }
      )
      for _ in range(count)
    ]
    (directory / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return str(directory / '{split}.jsonl')


def experiment(
  chats: str, base: pathlib.Path, **overrides
) -> experiment_lib.Experiment:
  """Returns 12 steps of fine-tuning, with a checkpoint every 4."""
  data = {
    'open_source': sources.jsonl,
    'examples': 'chat',
    'packing': 'best_fit',
    'row_length': ROW_LENGTH,
    'tokenizer': data_config.TokenizerConfig(
      kind='directory', path=f'{base}/tokenizer'
    ),
    **overrides.pop('data', {}),
  }
  return tiny_run.experiment(
    chats,
    **{
      'model': init_from.model_of(str(base)),
      'init_from': str(base),
      'data': data,
      **overrides,
    },
  )
