"""Life two: frozen weights answer prompts, and nothing here changes them.

    python serve.py --model=DIR --prompt='def add('
    python serve.py --model=DIR --chat
    python serve.py --model=DIR --port=8000 --engine.max_sequences=64
    python serve.py --model=DIR --eval=perplexity:book.txt --eval.limit=100
    python serve.py --model=DIR --plan=v5e:2x4

DIR is a frozen directory: `train.py` writes one, and so does
`python -m frozen.freeze`. What is not chosen by a flag is as DIR recommends.

--port answers for anybody who reaches it, unless --api_keys names a file of
lines `name:key`: then for who sends one of them, and each name has its share
of the engine and its own cache of prompts.
"""

import contextlib
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

FLAGS = flags.FLAGS
_WAYS = 'prompt', 'chat', 'port', 'eval', 'plan'
_SETTINGS = (
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'repetition_penalty',
  'presence_penalty',
  'frequency_penalty',
  'seed',
  'n',
  'max_tokens',
  'min_tokens',
  'stop',
  'stop_ids',
  'ignore_eos',
)
_ENGINE = 'engine.'  # in front of the fields of an EngineConfig
_EVAL = 'eval.'  # and of evals.run.Options


def main(argv: list[str]) -> None:
  """Loads the model and answers in the way that the flags ask for."""
  asked = [way for way in _WAYS if _is_asked(FLAGS[way].value)]
  if len(argv) > 1 or len(asked) != 1:
    _fail(
      f'got {" and ".join([f"--{way}" for way in asked] + argv[1:]) or "none"},'
      f' expected one of {", ".join(f"--{way}" for way in _WAYS)}; see python'
      ' serve.py --help'
    )
  (way,) = asked
  _check_heeded(way)
  logging.set_verbosity(logging.WARNING)  # orbax tells its every step
  # A terminal that cannot show a character shows a mark in its place.
  sys.stdout.reconfigure(errors='replace')  # pyright: ignore
  try:
    # Imported here: --help and a wrong flag need not wait for JAX.
    if way == 'plan':
      from inference import plan

      print(plan.report(plan.make(FLAGS.model, FLAGS.plan)))
      return
    _cache_compilations()
    if way == 'port':
      _listen()
    elif way == 'chat':
      from inference import chat

      chat.run(_load_small(1), _chosen(), read=input, write=_show)
    elif way == 'eval':
      _evaluate()
    else:
      _complete(FLAGS.prompt, _chosen())
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    _fail(str(error))
  except KeyboardInterrupt:
    print()
    sys.exit(130)  # what a shell expects after Ctrl-C


def _is_asked(value) -> bool:
  return value is not None and value is not False  # --port=0 asks


def _complete(prompt: str, chosen) -> None:
  """Streams the completion of a prompt, then reports speed and digests."""
  from frozen import format as frozen_format

  generator = _load_small(FLAGS.n or 1)
  before = frozen_format.weights_digest(generator.frozen.params)
  settings = generator.settings_for(prompt, **chosen)
  updates = generator.updates([prompt], settings)
  _show(prompt)
  done = {}
  for _, update in updates:
    if settings.n == 1:
      _show(update.text)
    if update.completion:
      done[update.index] = update.completion
  after = frozen_format.weights_digest(generator.frozen.params)
  is_same = before == after == generator.frozen.manifest.weights_digest
  print('\n')
  completions = [done[index] for index in sorted(done)]
  if settings.n > 1:
    for completion in completions:
      print(f'--- seed {completion.seed}\n{completion.text}\n')
  print(_speed(completions, generator.engine.compile_seconds))
  print(f'weights before  {before}')
  print(f'weights after   {after}  {"unchanged" if is_same else "CHANGED"}')
  if not is_same:
    _fail('the weights changed while they were used; report this as a bug')


def _speed(completions, compile_seconds: float) -> str:
  """Returns what the completions of one prompt took, compilation apart."""
  first = completions[0]
  took = first.usage
  # The first token of each comes out of prefill. All are decoded together.
  num_decoded = sum(each.num_completion_tokens - 1 for each in completions)
  seconds = max(each.usage.decode_seconds for each in completions)
  prefill = f'{took.prefill_tokens / took.prefill_seconds:,.0f} tokens/s'
  decode = (
    f'{num_decoded / seconds:,.1f} tokens/s' if num_decoded else 'no tokens'
  )
  reasons = ', '.join(dict.fromkeys(each.finish_reason for each in completions))
  return (
    f'prefill         {prefill} ({first.num_prompt_tokens} tokens,'
    f' {took.cached_tokens} of them cached)\n'
    f'decode          {decode} ({num_decoded} tokens, ended by'
    f' {reasons}, seed {first.seed})\n'
    f'compilation     {compile_seconds:.1f} s, not counted above'
  )


def _evaluate() -> None:
  """Runs a task on the engine, and prints its scores with their errors."""
  from evals import options, run
  from evals.results import report
  from inference import generate

  given: dict[str, Any] = {
    name.removeprefix(_EVAL): FLAGS[name].value
    for name in FLAGS
    if name.startswith(_EVAL) and FLAGS[name].value is not None
  }
  # Files are read first: a wrong one need not wait for the engine.
  task = run.open_task(FLAGS.eval, options.Options(**given))
  generator = generate.load(FLAGS.model, _engine_config())
  result = task.run(_evaluated(generator))
  print(report.text(result))
  if FLAGS.eval_out:
    result.save(FLAGS.eval_out)
    print(f'saved {FLAGS.eval_out}; python -m evals.compare A.json B.json')


def _evaluated(generator):
  """Returns the model that evaluations ask, which is the engine that serves."""
  from evals import encoding, ports
  from inference import chat, model_port

  manifest, engine = generator.frozen.manifest, generator.engine
  # Several ids may end a text; a tokenizer has one of them as its EOS.
  sample = model_port.sampler(engine, stop_ids=generator.defaults.stop_ids)
  score = model_port.scorer(engine)

  def score_all(requests):
    return [ports.Scored(*each) for each in score(requests)]

  def complete(prompts, settings, num_samples):
    return [
      [ports.Completion(each.text, each.ids) for each in samples]
      for samples in sample(prompts, settings, num_samples)
    ]

  def encode_chat(messages):
    prompt, _ = chat.render(generator, messages)
    return list(generator.prompt_ids(prompt))

  return ports.Model(
    tokenizer=generator.tokenizer,
    max_length=engine.model_config.max_length,
    logprob_fn=score_all,
    sample_fn=complete,
    adds_bos=manifest.has_bos,
    encode_prompt=encoding.naming_special_tokens(generator.tokenizer),
    encode_chat=encode_chat,
    description={
      'experiment': manifest.experiment,
      'weights_digest': manifest.weights_digest,
      'dtype': manifest.dtype,
      'step': manifest.step,
    },
  )


def _listen() -> None:
  """Serves HTTP until it is told to stop."""
  from frozen import manifest as manifest_lib
  from inference import generate

  try:
    import uvicorn

    from inference.server import api_keys, app as app_lib, engine_loop
  except ModuleNotFoundError as error:
    _fail(f'{error}; for --port: pip install -r requirements-serve.txt')
  config = _engine_config()
  keys = api_keys.read(FLAGS.api_keys) if FLAGS.api_keys else None
  manifest = manifest_lib.read(pathlib.Path(FLAGS.model))
  print(f'serving {manifest.experiment!r}, weights {manifest.weights_digest}')
  loop = engine_loop.EngineLoop(
    lambda: generate.load(FLAGS.model, config),
    on_load_failure=lambda: setattr(server, 'should_exit', True),
  )
  server = uvicorn.Server(
    uvicorn.Config(
      app_lib.create_app(loop, manifest, manifest.experiment, keys),
      host=FLAGS.host,
      port=FLAGS.port,
      timeout_graceful_shutdown=FLAGS.drain_seconds,
    )
  )
  try:
    with contextlib.suppress(KeyboardInterrupt):
      server.run()
  finally:
    if loop.is_loading:
      # The thread is inside XLA, which nothing interrupts, and in which an
      # ordinary end of the process would wait, or crash.
      sys.stdout.flush()
      os._exit(1)
  if loop.failure:
    raise loop.failure


def _load_small(num_sequences: int):
  """Loads an engine that compiles quickly: few sequences, few shapes."""
  from inference import generate

  return generate.load(
    FLAGS.model,
    _engine_config(
      max_sequences=num_sequences,
      decode_shapes=(num_sequences,),
      chunk_tokens=128,
      max_chunks=1,
      max_mixed_chunks=1,
    ),
  )


def _engine_config(**defaults):
  """Returns what the flags say of the engine, else the defaults."""
  from inference.engine import engine_config

  names = [name for name in FLAGS if name.startswith(_ENGINE)]
  given = {
    name.removeprefix(_ENGINE): FLAGS[name].value
    for name in names
    if FLAGS[name].value is not None
  }
  if (shapes := given.get('decode_shapes')) is not None:
    given['decode_shapes'] = tuple(shapes)
  elif 'max_sequences' in given:
    defaults.pop('decode_shapes', None)
  return engine_config.EngineConfig(**{**defaults, **given})


def _cache_compilations() -> None:
  """Keeps what is compiled for the next start."""
  directory = FLAGS.compilation_cache
  if directory is None:
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
      return  # JAX reads it
    base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    directory = pathlib.Path(base) / 'two-lives' / 'xla'
  if directory == '':
    return
  import jax

  for name, value in {
    'jax_compilation_cache_dir': str(pathlib.Path(directory).expanduser()),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }.items():
    jax.config.update(name, value)


def _chosen() -> dict:
  """Returns the settings that flags give; None: not given."""
  chosen = {name: FLAGS[name].value for name in _SETTINGS}
  for name in ('stop', 'stop_ids'):
    if (several := FLAGS[name].value) is not None:
      chosen[name] = tuple(several)
  return chosen


def _heeded_by(name: str) -> tuple[str, ...]:
  """Returns the ways of asking that a flag means something to."""
  if name == 'n':
    return ('prompt',)
  if name in _SETTINGS:
    return 'prompt', 'chat'
  if name in ('host', 'api_keys', 'drain_seconds'):
    return ('port',)
  if name == 'eval_out' or name.startswith(_EVAL):
    return ('eval',)
  if name == 'compilation_cache' or name.startswith(_ENGINE):
    return 'prompt', 'chat', 'port', 'eval'
  return _WAYS


def _check_heeded(way: str) -> None:
  """Refuses a flag that would change nothing."""
  for name in FLAGS:
    if FLAGS[name].present and way not in (ways := _heeded_by(name)):
      _fail(
        f'got --{name} with --{way}, expected it with'
        f' {" or ".join(f"--{each}" for each in ways)}; leave it out'
      )


def _show(text: str) -> None:
  print(text, end='', flush=True)


def _fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
  from hardware import targets

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
  flags.DEFINE_string(
    'eval',
    None,
    'Run a task: perplexity:FILE, choice:FILE.jsonl, generate:FILE.jsonl,'
    ' gsm8k:FILE.jsonl, lm_eval:TASK[,TASK].',
  )
  flags.DEFINE_string('eval_out', None, 'File for the result of --eval, JSON.')
  flags.DEFINE_string(
    'compilation_cache',
    None,
    'Directory that keeps compiled programs for the next start; empty: none.'
    ' By default JAX_COMPILATION_CACHE_DIR, else ~/.cache/two-lives/xla.',
  )
  flags.DEFINE_string('host', '127.0.0.1', 'Address that --port listens on.')
  flags.DEFINE_string('api_keys', None, 'File of lines name:key for --port.')
  flags.DEFINE_integer(
    'drain_seconds', 30, 'When told to stop: to finish what was asked.'
  )
  _define_settings()
  _define_engine()
  _define_options()


def _define_settings() -> None:
  number, count = flags.DEFINE_float, flags.DEFINE_integer
  number('temperature', None, '0 is greedy.')
  count('top_k', None, 'Most probable tokens to keep; 0: all.')
  number('top_p', None, 'Probability mass to keep; 1: all.')
  number('min_p', None, 'Least share of the top probability.')
  number('repetition_penalty', None, 'Divides logits of tokens seen; 1: none.')
  number('presence_penalty', None, 'Taken off tokens made; 0: none.')
  number('frequency_penalty', None, 'The same, per time made; 0: none.')
  count('seed', None, 'Of the sampling; drawn if not given.')
  count('n', None, 'Completions of --prompt.')
  count('max_tokens', None, 'Most tokens to generate.')
  count('min_tokens', None, 'Tokens before which nothing stops.')
  flags.DEFINE_multi_string('stop', None, 'Text to stop at; may be repeated.')
  flags.DEFINE_multi_integer(
    'stop_ids', None, 'Token id to stop at; may be repeated.'
  )
  flags.DEFINE_bool('ignore_eos', None, 'Go on behind the end of the text.')


def _define_engine() -> None:
  """Defines the fields of `inference.engine.engine_config.EngineConfig`.

  By hand: importing it would make --help wait for JAX. Without a value the
  default is the field's own.
  """

  def define(kind, name: str, text: str, **kwargs):
    kind(_ENGINE + name, None, text, **kwargs)

  count, choice = flags.DEFINE_integer, flags.DEFINE_string
  define(count, 'max_sequences', 'Sequences that run at once.')
  define(count, 'page_size', 'Tokens of a page; 0: the whole context.')
  define(count, 'num_pages', 'Pages of the cache; 0: what memory allows.')
  define(count, 'chunk_tokens', 'Prompt tokens computed together, a block.')
  define(count, 'max_chunks', 'Blocks of a step in which nobody decodes.')
  define(count, 'max_mixed_chunks', 'Blocks of a step in which somebody does.')
  define(count, 'stall_context', 'Tokens before such a block: it counts twice.')
  define(choice, 'kv_dtype', 'What pages hold: model or int8.')
  define(
    choice, 'numerics', 'fast, or invariant: the same bits in any company.'
  )
  define(choice, 'attention', 'auto, reference or kernel.')
  define(flags.DEFINE_bool, 'prefix_cache', 'Keep the prompts of before.')
  define(
    flags.DEFINE_bool,
    'share_prefixes',
    'Between principals too, who can then tell what others asked.',
  )
  define(count, 'max_waiting', 'Sequences that may wait; more are refused.')
  define(count, 'aging_steps', 'Of waiting, worth a level of priority.')
  define(
    flags.DEFINE_multi_integer,
    'decode_shapes',
    'Numbers of decode rows to compile for; may be repeated.',
  )


def _define_options() -> None:
  """Defines the fields of `evals.run.Options`, without their defaults."""

  def define(kind, name: str, text: str):
    kind(_EVAL + name, None, text)

  count = flags.DEFINE_integer
  define(count, 'limit', 'First examples, or blocks of text, to take.')
  define(count, 'stride', 'Of perplexity, tokens; half of the context if none.')
  define(count, 'num_fewshot', 'Solved examples in front of each.')
  define(flags.DEFINE_string, 'fewshot_path', 'File with those, of gsm8k.')
  define(count, 'max_tokens', 'Of a completion.')
  define(flags.DEFINE_float, 'temperature', '0 is greedy.')
  define(count, 'num_samples', 'Of each prompt, for pass@k.')
  define(count, 'seed', 'Of the samples.')
  define(flags.DEFINE_bool, 'chat', "Through the model's chat template.")


if __name__ == '__main__':
  _define_flags()
  app.run(main, flags_parser=_parse_flags)
