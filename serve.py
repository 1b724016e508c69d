"""Life two: frozen weights answer prompts, and nothing here changes them.

    python serve.py --model=DIR --prompt='def add('
    python serve.py --model=DIR --chat
    python serve.py --model=DIR --port=8000

DIR is a frozen directory, written by `train.py` or by `python -m frozen.freeze`.
"""

import sys

from absl import app, flags

flags.DEFINE_string('model', None, 'Frozen directory.', required=True)
flags.DEFINE_string('prompt', None, 'Complete this text, then report speed.')
flags.DEFINE_bool('chat', False, 'Talk in the terminal.')
flags.DEFINE_integer('port', None, "Serve OpenAI's completions API here.")
flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on, with --port.')
flags.DEFINE_float('temperature', None, '0 is greedy.', lower_bound=0)
flags.DEFINE_integer('top_k', None, 'Most probable tokens to keep; 0: all.')
flags.DEFINE_float('top_p', None, 'Probability mass to keep; 1: all.')
flags.DEFINE_float('min_p', None, 'Least share of the top probability; 0: any.')
flags.DEFINE_integer('seed', None, 'Of the sampling; drawn if not given.')
flags.DEFINE_integer('max_tokens', None, 'Most tokens to generate.')
flags.DEFINE_multi_string('stop', None, 'Text to stop at; may be repeated.')

_SETTINGS = 'temperature', 'top_k', 'top_p', 'min_p', 'seed', 'max_tokens'


def main(argv: list[str]) -> None:
  """Loads the model and answers in the way the flags ask for."""
  values = flags.FLAGS
  ways = [
    name for name in ('prompt', 'chat', 'port') if values[name].using_default_value is False
  ]
