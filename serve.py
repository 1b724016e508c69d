"""Life two: frozen weights answer prompts, and no weight changes.

    python serve.py --model=DIR --prompt='def add('
    python serve.py --model=DIR --prompt='2+2=' --strategy=self_consistency:9
    python serve.py --model=DIR --chat
    python serve.py --model=DIR --port=8000 --engine.max_sequences=64
    python serve.py --model=DIR --eval=perplexity:book.txt --eval.limit=100
    python serve.py --model=DIR --plan=v5e:2x4
    python serve.py --config=experiments/pretrain.py:8b --plan=h100:8
    python serve.py --model=DIR --adapters=sql=DIR2,poems=DIR3 --port=8000

DIR is a frozen directory: `train.py` writes one, and so does
`python -m frozen.freeze`. A setting without a flag is as DIR recommends.

To share one engine between machines, start the same command on each, as with
train.py; process 0 answers, and the others compute with it. --engine.tensor is
the number of all devices, and DIR has the same weights everywhere:

    python serve.py --model=DIR --port=8000 --engine.tensor=16 \\
      --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0  # then 1

--port answers every client that can reach it, so that without keys it listens
on loopback addresses only. `python -m inference.server.keys` makes keys in the
file of --records, with limits and a budget each; --api_keys=FILE reads lines
`name:key`. Each name has its share of the engine and its own cache of prompts.
`python -m inference.server.usage` sums up what the records say of them.
"""

from collections.abc import Callable
import gc
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

# None of these imports JAX: --help and a wrong flag need not wait for it.
from checks import path_flags
from evals import options as eval_options
from hardware import compilation_cache, host_memory
from inference import flags as flags_lib
from inference.constraints import flags as constraint_flags
from inference.engine import engine_config
from inference.engine.processes import options as processes_options
from inference.sampling import settings as settings_lib
from inference.search import options as search_options
from inference.server import server_config

FLAGS = flags.FLAGS
_WAYS = 'prompt', 'chat', 'port', 'eval', 'plan'
_SETTINGS = flags_lib.Group(
  config=settings_lib.Settings,
  ways=('prompt', 'chat'),
  default_words="the model's recommendation, else {}",
)
_ENGINE = flags_lib.Group(
  config=engine_config.EngineConfig,
  prefix='engine.',
  ways=('prompt', 'chat', 'port', 'eval'),
)
_SERVER = flags_lib.Group(
  config=server_config.ServerConfig, prefix='server.', ways=('port',)
)
_PROCESSES = flags_lib.Group(
  config=processes_options.Options, ways=('prompt', 'chat', 'port', 'eval')
)
_SEARCH = flags_lib.Group(config=search_options.Options, ways=('prompt',))
_EVAL = flags_lib.Group(
  config=eval_options.Options, prefix='eval.', ways=('eval',)
)
_GROUPS = _SETTINGS, _ENGINE, _PROCESSES, _SERVER, _EVAL, _SEARCH
_OF_PORT = (
  *('host', 'name', 'api_keys', 'records', 'receipts', 'receipts_key'),
  *('insecure', 'replicas', 'drain_seconds'),
)
_OF_PLAN = (
  *('tensor', 'experts', 'max_adapters', 'max_adapter_rank'),
  *('speculation', 'draft_model', 'draft_head'),
)
# Ways of asking that the other flags matter to, where it is not all of them.
_HEEDED_BY = {
  'n': ('prompt',),
  **dict.fromkeys(constraint_flags.NAMES, ('prompt',)),
  'adapters': _ENGINE.ways,
  'adapter': ('prompt', 'chat', 'eval'),
  'system': ('prompt', 'chat'),
  **dict.fromkeys(_OF_PORT, ('port',)),
  'eval_out': ('eval',),
  'config': ('plan',),
  **{f'engine.{name}': _WAYS for name in _OF_PLAN},
  'compilation_cache': _ENGINE.ways,
}


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
  if FLAGS.model is None and way != 'plan':
    _fail('--model: got none, expected a frozen directory')
  logging.set_verbosity(logging.WARNING)  # orbax logs each of its steps
  # A terminal that cannot show a character shows a question mark instead.
  sys.stdout.reconfigure(errors='replace')  # pyright: ignore
  try:
    # Imported here, since these import JAX.
    if way == 'plan':
      print(_plan())
      return
    host_memory.reuse_freed_memory(one_heap=False)
    gc.disable()  # until `_load` has made what stays: a seventh of the start
    shared = processes_options.Options(**_PROCESSES.given())
    cluster = shared.cluster(os.environ)
    _cache_compilations(is_alone=cluster is None)
    if way == 'port':
      _listen(cluster, shared)
    else:
      _with_others(cluster, shared, lambda leader: _answer(way, leader))
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    _fail(str(error))
  except KeyboardInterrupt:
    print()
    sys.exit(130)  # what a shell expects after Ctrl-C


def _with_others(
  cluster, shared: processes_options.Options, answer: Callable[[Any], None]
) -> None:
  """Answers in the first of several processes, or in the only one."""
  from inference.engine.processes import follower, joined

  timeout = shared.heartbeat_timeout_s
  joined.run(
    cluster,
    answer,
    follow=lambda: follower.follow(
      FLAGS.model, _ENGINE.given(), heartbeat_timeout_s=timeout
    ),
    heartbeat_timeout_s=timeout,
  )


def _plan() -> str:
  """Returns the plan of a frozen directory, or of a config without weights."""
  from inference.planning import plan, report, subject
  from studies.common import load

  planned = subject.of(
    FLAGS.model, FLAGS.config, lambda name: load.experiment(name, '--config')
  )
  return report.report(plan.make(planned, FLAGS.plan, **_ENGINE.given()))


def _is_asked(value) -> bool:
  return value is not None and value is not False  # --port=0 asks


def _answer(way: str, leader) -> None:
  """Answers in the terminal; `leader` is that of several processes, or None."""
  from inference import terminal_prompt

  shown: Any = {
    'write': _show,
    'warn': lambda text: print(text, file=sys.stderr),
    'system': FLAGS.system,
  }
  if way == 'chat':
    from inference import terminal_chat

    terminal_chat.run(
      _load_small(1, leader),
      _SETTINGS.given(),
      read=input,
      write=_show,
      system=FLAGS.system,
    )
  elif way == 'eval':
    _evaluate(leader)
  elif given := _SEARCH.given():
    from inference.search import prompt as prompt_search

    options = search_options.Options(**given)
    specs = prompt_search.check(options, FLAGS.n)
    num = max(each.num_sequences for each in specs)
    chosen = _SETTINGS.given() | constraint_flags.given()
    generator = _load_small(min(num, 16), leader)
    terminal_prompt.search(generator, FLAGS.prompt, chosen, options, **shown)
  else:
    chosen = _SETTINGS.given() | constraint_flags.given()
    generator = _load_small(FLAGS.n or 1, leader)
    terminal_prompt.complete(
      generator, FLAGS.prompt, chosen, adapter=FLAGS.adapter, **shown
    )


def _evaluate(leader) -> None:
  """Runs a task on the engine, and prints its scores with their errors."""
  from evals import evaluate
  from evals.results import report
  from inference import model_port

  # Files are read first, so that a wrong one is refused before weights load.
  task = evaluate.open_task(FLAGS.eval, eval_options.Options(**_EVAL.given()))
  # Of a reward model, tasks that need another function say so.
  generator = _load(_engine_config(), leader, is_for_rewards=True)
  result = task.run(model_port.evaluated(generator))
  print(report.text(result))
  if FLAGS.eval_out:
    result.save(FLAGS.eval_out)
    print(f'saved {FLAGS.eval_out}; python -m evals.compare A.json B.json')


def _listen(cluster, shared: processes_options.Options) -> None:
  """Serves HTTP until a signal stops the server."""
  if not FLAGS.host.strip():
    # An unset variable. The system would take it for all addresses.
    _fail('--host: got an empty address, expected one such as 127.0.0.1')
  from frozen import manifest as manifest_lib

  try:
    from inference.server import start
  except ModuleNotFoundError as error:
    _fail(f'{error}; for --port: pip install -r requirements-serve.txt')
  limits = {'drain_seconds': FLAGS.drain_seconds, **_SERVER.given()}
  if cluster:  # the default audits some answers
    limits.setdefault('audit_share', 0.0)
  options = start.Options(
    directory=FLAGS.model,
    name=_served_name(manifest_lib.read(pathlib.Path(FLAGS.model))),
    engine=_engine_config(),
    limits=server_config.ServerConfig(**limits),
    host=FLAGS.host,
    port=FLAGS.port,
    adapters=FLAGS.adapters,
    api_keys=FLAGS.api_keys,
    records=FLAGS.records,
    has_receipts=FLAGS.receipts,
    receipts_key=FLAGS.receipts_key,
    is_insecure=FLAGS.insecure,
    replicas=FLAGS.replicas,
    compilation_cache=FLAGS.compilation_cache,
    heartbeat_timeout_s=shared.heartbeat_timeout_s,
    cluster=cluster,
  )
  if cluster and cluster.process_id:
    sys.exit(start.follow(options, _ENGINE.given()))
  start.serve(options)


def _served_name(manifest) -> str:
  """Returns the name by which requests name the model."""
  from storage import file_names

  if FLAGS.name is not None:
    if not FLAGS.name.strip():
      _fail('--name: got an empty name, expected some text; or leave it out')
    return FLAGS.name
  directory = pathlib.Path(FLAGS.model).resolve().name
  # Every run calls its directory so: the experiment has a name that tells more.
  return manifest.name if directory == file_names.FROZEN else directory


def _load(config: engine_config.EngineConfig, leader, **how):
  from inference import adapters, generate

  named = adapters.parsed(FLAGS.adapters)
  if FLAGS.adapter is not None and FLAGS.adapter not in named:
    _fail(
      f'--adapter: got {FLAGS.adapter!r}, expected one of the names of'
      f' --adapters: {", ".join(named) or "none"}'
    )
  generator = generate.load(
    FLAGS.model, config, adapters=named, leader=leader, **how
  )
  if FLAGS.adapter is not None:
    generator = generator.adapted(FLAGS.adapter)
  gc.freeze()  # it stays: the collector need not walk it
  gc.enable()
  return generator


def _load_small(num_sequences: int, leader=None):
  """Loads an engine that compiles quickly, with few sequences and shapes."""
  return _load(
    _engine_config(
      max_sequences=num_sequences,
      decode_shapes=(num_sequences,),
      chunk_tokens=128,
      max_chunks=1,
      max_mixed_chunks=1,
    ),
    leader,
  )


def _engine_config(**defaults) -> engine_config.EngineConfig:
  """Returns the config of the flags; `defaults` are for flags not given."""
  given = _ENGINE.given()
  # Defaults must fit the given values. The last decode shape is max_sequences,
  # and mixed chunks are at most the chunks of other steps.
  for name, other in (
    ('max_sequences', 'decode_shapes'),
    ('decode_shapes', 'max_sequences'),
    ('max_mixed_chunks', 'max_chunks'),
    ('max_chunks', 'max_mixed_chunks'),
  ):
    if name in given:
      defaults.pop(other, None)
  return engine_config.EngineConfig(**{**defaults, **given})


def _cache_compilations(*, is_alone: bool) -> None:
  """Keeps compiled programs on disk, for the next start."""
  given = FLAGS.compilation_cache
  # As train.py does: GPUs of several processes share the work of tuning, so
  # they must find the same programs, in a directory of all of them.
  is_given = given is not None or compilation_cache.VARIABLE in os.environ
  directory = compilation_cache.directory_of(given)
  if directory and (is_given or is_alone):
    compilation_cache.use(directory)


def _heeded_by(name: str) -> tuple[str, ...]:
  """Returns the ways of asking that a flag matters to."""
  if name in _HEEDED_BY:
    return _HEEDED_BY[name]
  for group in _GROUPS:
    if name in group.fields:
      return group.ways
  return _WAYS


def _check_heeded(way: str) -> None:
  """Refuses a flag that would have no effect."""
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
  constraint_flags.define()
  text, count = flags.DEFINE_string, flags.DEFINE_integer
  path = path_flags.DEFINE_path
  path('model', None, 'Frozen directory with the weights.')
  text(
    'config',
    None,
    'Model of --plan that has no weights yet: an experiment, such as'
    ' experiments/pretrain.py:8b, or a config.json of Hugging Face.',
  )
  flags.DEFINE_list(
    'adapters',
    [],
    'LoRA adapters of the model, NAME=DIR with commas between several. Each'
    ' answers beside the model, under its name.',
  )
  text(
    'adapter',
    None,
    'Name of the adapter that answers, of those in --adapters. If not given,'
    ' the model without an adapter answers.',
  )
  text(
    'prompt',
    None,
    'Completes this text, then reports speed and the digest of the weights.',
  )
  flags.DEFINE_bool('chat', False, 'Talks with the model in the terminal.')
  text(
    'system',
    None,
    'System prompt of --chat. With --prompt, the prompt is then the first'
    " message of a chat, in the model's template.",
  )
  count(
    'port',
    None,
    "Serves OpenAI's API over HTTP on this port, and a page to chat; 0 picks a"
    ' free one.',
    lower_bound=0,
    upper_bound=65535,
  )
  text(
    'plan',
    None,
    'Prints the memory that serving needs and the speed to expect. With a'
    ' device that is not here, such as v5e:2x4 or h100:8, compiles for it.',
  )
  text(
    'eval',
    None,
    'Evaluates the model in a task, KIND:FILE, such as perplexity:book.txt,'
    ' choice:a.jsonl, generate:a.jsonl, gsm8k:a.jsonl, judge:pairs.jsonl or'
    ' lm_eval:arc_easy; evals/evaluate.py lists all kinds.',
  )
  path(
    'eval_out',
    None,
    'File for the result of --eval, as JSON, to compare with other results. If'
    ' not given, scores are only printed.',
  )
  path('compilation_cache', None, compilation_cache.HELP)
  _define_server_flags()
  for group in _GROUPS:
    group.define()


def _define_server_flags() -> None:
  text, path = flags.DEFINE_string, path_flags.DEFINE_path
  text(
    'host',
    '127.0.0.1',
    'Address that --port listens on. 0.0.0.0 serves other machines too.',
  )
  text(
    'name',
    None,
    'Name of the model in requests to --port. Default: the name of the'
    " directory; of a run's own frozen/, the name of its experiment.",
  )
  path(
    'api_keys',
    None,
    'File of lines name:key. --port then answers only clients that send one of'
    ' the keys, or one of the keys in the file of --records.',
  )
  flags.DEFINE_bool(
    'insecure',
    False,
    'Lets --port without any key listen on an address that other machines'
    ' reach.',
  )
  path(
    'records',
    None,
    'File in which --port keeps its records, a SQLite database that it makes'
    ' where there is none. If not given, records are in memory and end with the'
    ' server.',
  )
  flags.DEFINE_bool(
    'receipts',
    False,
    'Keeps in --records what `python -m inference.server.replay` needs of every'
    ' answer: the ids of prompt and answer, settings, seed, log-probabilities.',
  )
  path(
    'receipts_key',
    None,
    'File of a key that encrypts the receipts, 32 random bytes in base64.'
    ' Required with --receipts where there are API keys.',
  )
  flags.DEFINE_integer(
    'replicas',
    None,
    'Processes with an engine each; 1 by default. A request goes to one that'
    ' knows the beginning of its prompt, or has least to do; one that dies'
    ' starts again. Each takes --engine.tensor devices, and memory for the'
    ' weights. 0, the default with --server.scorers: the engine is in the'
    ' process of the server, 0.5 GiB smaller; probes wait longer under load.',
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'drain_seconds',
    30,
    'Seconds in which --port finishes open requests after a signal to stop.'
    ' Then streams end with an error, and other requests are answered 503.',
    lower_bound=0,
  )


if __name__ == '__main__':
  _define_flags()
  app.run(main, flags_parser=_parse_flags)
