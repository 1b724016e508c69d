"""One of several processes that share an engine, for tests.

    python -m tests.helpers.serving.shared_engine MODEL OUT PORT COUNT INDEX
      FIELDS

Process 0 answers prompts and writes the results as JSON. FIELDS are those of
the config of the engine, as JSON; `texts`: ids of texts to draft from;
`adapters`: their directories by name; and `more`: other fields of further
engines, by name, each of which answers after the one before it.
"""

import json
import pathlib
import sys

from inference import generate
from inference.constraints import constraint as constraint_lib
from inference.engine import engine as engine_lib, engine_config
from inference.engine.processes import follower, joined
from inference.sampling import settings as settings_lib
from parallel import processes
from tests.helpers.serving import guesses

LAYOUT = {
  'max_sequences': 4,
  'decode_shapes': (4,),
  'page_size': 8,
  'num_pages': 11,  # so few that sequences are preempted
  'chunk_tokens': 16,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'speculation': 'ngram',
}
_COMMON = 'the beginning of all prompts '
_PROMPTS = {
  'greedy': {'temperature': 0.0, 'prompt_logprobs': 1},
  'abc abc abc abc abc': {'temperature': 0.0, 'ignore_eos': True},
  _COMMON: {'temperature': 1.0, 'n': 2},
  _COMMON + 'and more': {'temperature': 0.8, 'repetition_penalty': 1.3},
}
_DIGITS = constraint_lib.Constraint(kind='regex', text='[0-9]{4}')


def answers(generator: generate.Generator, *, has_grammars: bool) -> list:
  """Returns ids and log-probabilities of all completions, as JSON has them.

  Args:
    generator: answers.
    has_grammars: whether one is within a grammar; its programs take long.
  """
  prompts = dict(_PROMPTS)
  if has_grammars:
    prompts['x'] = {'constraint': _DIGITS}
  settings = [
    settings_lib.Settings(
      **{'max_tokens': 12, 'seed': 3, 'logprobs': 2, **each}
    )
    for each in prompts.values()
  ]
  found = generator.generate(list(prompts), settings)
  return json.loads(
    json.dumps([(each.token_ids, each.logprobs) for each in found])
  )


def texts(generator: generate.Generator, found: list) -> list[list[int]]:
  """Returns the ids of prompts with their answers, those of n = 1."""
  single = [prompt for prompt in _PROMPTS if 'n' not in _PROMPTS[prompt]]
  answers_of = [ids for ids, _ in found]
  del answers_of[2:4]  # of the prompt with n = 2
  return [
    [*generator.prompt_ids(prompt), *ids]
    for prompt, ids in zip(single, answers_of, strict=False)
  ]


def _metrics(engine: engine_lib.Engine) -> dict[str, float]:
  value = engine.metrics.value
  return {
    'preemptions': value('preemptions_total'),
    'cached': value('cached_tokens_total'),
    'accepted': value('speculation_tokens_total', kind='accepted'),
    'rejected': value('speculation_tokens_total', kind='rejected'),
  }


def _beside(model: str, leader, fields) -> dict:
  """Returns the results of a further engine."""
  config = engine_config.EngineConfig(
    **{
      **LAYOUT,
      **fields,
      'constraints': False,
      'decode_steps': 1,  # a draft follows tokens that were read
    }
  )
  # As on a server, which leaves programs to a thread where it can.
  generator = generate.load(model, config, compile_all=False, leader=leader)
  engine = generator.engine
  # All drafts are worth their time.
  engine._speculator._choice.costs = guesses.Costs()
  others = engine._prefillers._prefillers if engine._prefillers else ()
  result = {
    'digest': generator.weights_digest(),
    'answers': answers(generator, has_grammars=False),
    'metrics': _metrics(engine),
    'apart': sum(
      each.engine.metrics.value('prefill_tokens_total') for each in others
    ),
  }
  engine.release()
  return result


def main() -> None:
  model, out, port, count, index, given = sys.argv[1:]
  fields = json.loads(given)
  known = fields.pop('texts', None)
  adapters = fields.pop('adapters', {})
  more = fields.pop('more', {})
  # Fields that a flag would set in every process.
  given = {
    name: value
    for name, value in fields.items()
    if not any(name in each for each in more.values())
  }
  has_grammars = fields.get('constraints', True)

  def answer(leader) -> None:
    config = engine_config.EngineConfig(**{**LAYOUT, **fields})
    generator = generate.load(model, config, adapters=adapters, leader=leader)
    if known:
      guesses.install(generator.engine, guesses.Guesses(known))
    with guesses.verified_beside(generator.engine) as beside:
      found = answers(generator, has_grammars=has_grammars)
    result = {
      'answers': found,
      'adapted': {
        name: answers(generator.adapted(name), has_grammars=False)
        for name in adapters
      },
      'metrics': {**_metrics(generator.engine), 'beside': sum(beside.values())},
      'digest': generator.weights_digest(),
    }
    if more:
      generator.engine.release()
    for name, each in more.items():
      result[name] = _beside(model, leader, {**fields, **each})
    pathlib.Path(out).write_text(json.dumps(result))

  joined.run(
    processes.Cluster(
      coordinator=f'127.0.0.1:{port}',
      num_processes=int(count),
      process_id=int(index),
    ),
    answer,
    follow=lambda: follower.follow(model, given),
  )


if __name__ == '__main__':
  main()
