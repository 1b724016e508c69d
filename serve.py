"""Life two: frozen weights answer prompts, and nothing here changes them.

    python serve.py --model=DIR --prompt='def add('
    python serve.py --model=DIR --chat
    python serve.py --model=DIR --port=8000
    python serve.py --model=DIR --plan=v5e:2x4

DIR is a frozen directory: `train.py` writes one, and so does
`python -m frozen.freeze`. What is not chosen by a flag is as DIR recommends.
"""

import sys

from absl import app, flags, logging

FLAGS = flags.FLAGS
_SETTINGS = 'temperature', 'top_k', 'top_p', 'min_p', 'seed', 'max_tokens'


def main(argv: list[str]) -> None:
  """Loads the model and answers in the way that the flags ask for."""
  ways = {
    '--prompt': FLAGS.prompt is not None,
    '--chat': FLAGS.chat,
    '--port': FLAGS.port is not None,
    '--plan': FLAGS.plan is not None,
  }
  asked = [way for way, is_asked in ways.items() if is_asked]
  if len(argv) > 1 or len(asked) != 1:
    _fail(
      f'got {" and ".join(asked + argv[1:]) or "none of them"}, expected one'
      f' of {", ".join(ways)}; see python serve.py --help'
    )
  logging.set_verbosity(logging.WARNING)  # orbax tells its every step
  # A terminal that cannot show a character shows a mark in its place.
  sys.stdout.reconfigure(errors='replace')  # pyright: ignore
  try:
    # Imported here: --help and a wrong flag need not wait for JAX.
    if FLAGS.plan is not None:
      from inference import plan

      print(plan.report(plan.make(FLAGS.model, FLAGS.plan)))
      return
    from inference import generate

    chosen = {name: FLAGS[name].value for name in _SETTINGS}
    chosen['stop'] = tuple(FLAGS.stop) if FLAGS.stop else None
    generator = generate.load(FLAGS.model)
    if FLAGS.port is not None:
      _listen(generator)
    elif FLAGS.chat:
      from inference import chat

      chat.run(generator, chosen, read=input, write=_show)
    else:
      _complete(generator, FLAGS.prompt, chosen)
  except (ValueError, FileNotFoundError) as error:
    _fail(str(error))
  except KeyboardInterrupt:
    print()
    sys.exit(130)  # what a shell expects after Ctrl-C


def _complete(generator, prompt: str, chosen) -> None:
  """Streams the completion of a prompt, then reports speed and digests."""
  from frozen import format as frozen_format

  before = frozen_format.weights_digest(generator.frozen.params)
  settings = generator.settings_for(prompt, **chosen)
  items = generator.stream(prompt, settings)
  _show(prompt)
  completion = None
  for item in items:
    if isinstance(item, str):
      _show(item)
    else:
      completion = item
  after = frozen_format.weights_digest(generator.frozen.params)
  is_same = before == after == generator.frozen.manifest.weights_digest
  print('\n')
  print(_speed(completion))
  print(f'weights before  {before}')
  print(f'weights after   {after}  {"unchanged" if is_same else "CHANGED"}')
  if not is_same:
    _fail('the weights changed while they were used; report this as a bug')


def _speed(completion) -> str:
  """Returns what the completion took, compilation apart."""
  num_prompt = completion.num_prompt_tokens
  # The first token comes out of prefill.
  num_decoded = completion.num_completion_tokens - 1
  prefill = f'{num_prompt / completion.prefill_seconds:,.0f} tokens/s'
  decode = (
    f'{num_decoded / completion.decode_seconds:,.1f} tokens/s'
    if num_decoded
    else 'no tokens'
  )
  return (
    f'prefill         {prefill} ({num_prompt} tokens)\n'
    f'decode          {decode} ({num_decoded} tokens, ended by'
    f' {completion.finish_reason}, seed {completion.seed})\n'
    f'compilation     {completion.compile_seconds:.1f} s, not counted above'
  )


def _listen(generator) -> None:
  """Serves HTTP until it is told to stop."""
  try:
    import uvicorn

    from inference.server import app as app_lib
  except ModuleNotFoundError as error:
    _fail(f'{error}; for --port: pip install -r requirements-serve.txt')
  manifest = generator.frozen.manifest
  print(f'serving {manifest.experiment!r}, weights {manifest.weights_digest}')
  uvicorn.run(
    app_lib.create_app(generator, manifest.experiment),
    host=FLAGS.host,
    port=FLAGS.port,
  )


def _show(text: str) -> None:
  print(text, end='', flush=True)


def _fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
  from parallel import targets

  argv = targets.with_default(argv)
  targets.prepare_for(targets.value_in(argv))
  return app.parse_flags_with_usage(argv)


def _define_flags() -> None:
  flags.DEFINE_string('model', None, 'Frozen directory.', required=True)
  flags.DEFINE_string('prompt', None, 'Complete this text and report speed.')
  flags.DEFINE_bool('chat', False, 'Talk in the terminal.')
  flags.DEFINE_integer('port', None, "Serve OpenAI's completions API here.")
  flags.DEFINE_string(
    'plan',
    None,
    'Print what serving takes and leave; of a device that is not here, as in'
    ' v5e:2x4 or h100:8, by compiling for it.',
  )
  flags.DEFINE_string('host', '127.0.0.1', 'Address that --port listens on.')
  flags.DEFINE_float('temperature', None, '0 is greedy.')
  flags.DEFINE_integer('top_k', None, 'Most probable tokens to keep; 0: all.')
  flags.DEFINE_float('top_p', None, 'Probability mass to keep; 1: all.')
  flags.DEFINE_float('min_p', None, 'Least share of the top probability.')
  flags.DEFINE_integer('seed', None, 'Of the sampling; drawn if not given.')
  flags.DEFINE_integer('max_tokens', None, 'Most tokens to generate.')
  flags.DEFINE_multi_string('stop', None, 'Text to stop at; may be repeated.')


if __name__ == '__main__':
  _define_flags()
  app.run(main, flags_parser=_parse_flags)
