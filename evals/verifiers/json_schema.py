"""The verifier of JSON: a value that a JSON Schema allows.

    {"schema": {"type": "object", "required": ["name"]}}

The answer is JSON, or has it in a fenced block. A `$ref` is looked up in the
schema and among the standards' own schemas, never fetched. Regular expressions
of a schema may take exponential time, so such a schema is applied in a confined
process.

Reference: json-schema.org, draft 2020-12, and the drafts before by `$schema`.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

from checks import expect
from evals.verifiers import blocks, verifier
from evals.verifiers.sandbox import runner

_NEEDS = (
  'jsonschema: got no such package, expected it for JSON schemas; pip install'
  ' -r requirements-rewards.txt'
)
_ROOT = pathlib.Path(__file__).parents[2]
_PATTERNS = ('pattern', 'patternProperties')


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonSchema(verifier.Verifier):
  """JSON that a schema allows. Of a record: `schema`, an object or its text."""

  cpu_seconds: int = 2  # limit for a schema with regular expressions

  def check(self, record: verifier.Record) -> None:
    """Raises ValueError for an invalid schema."""
    schema = _schema(record)
    jsonschema, registry = _library()
    kind = jsonschema.validators.validator_for(
      schema, default=jsonschema.Draft202012Validator
    )
    try:
      kind.check_schema(schema)
    except jsonschema.SchemaError as error:
      raise verifier.wrong(
        record, 'schema', f'a JSON Schema ({error.message[:200]})'
      ) from None
    own = [each['$id'] for each in _objects(schema) if '$id' in each]
    for each in _objects(schema):
      for name in ('$ref', '$dynamicRef'):
        target = each.get(name)
        if not isinstance(target, str) or target.startswith('#') or own:
          continue
        if target.split('#')[0] not in registry:
          raise verifier.wrong(
            {name: target}, name, 'a place in the schema; none is fetched'
          )
    if _has_patterns(schema):
      runner.check()

  def __call__(self, answer: str, record: verifier.Record) -> verifier.Score:
    """Returns 1 for JSON that the schema allows."""
    schema = _schema(record)
    text = blocks.block(answer, ('json',))
    try:
      value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
      return verifier.Score(0.0, f'got no JSON ({error})'[:300])
    if not _has_patterns(schema):
      fault = fault_of(schema, value)
    else:
      _library()
      ran = runner.run(
        _APPLY,
        runner.Limits(cpu_seconds=self.cpu_seconds),
        stdin=json.dumps([schema, value]),
        path=[str(_ROOT), *_library_paths()],
      )
      if ran.status != 'ok':
        why = 'time' if ran.status == 'time' else 'error'
        return verifier.Score(0.0, f'schema: {ran.reason}', failure=why)
      fault = json.loads(ran.output)
    return verifier.passed(not fault, fault or 'as the schema says')


_APPLY = """\
import json
from evals.verifiers import json_schema
print(json.dumps(json_schema.fault_of(*json.loads(input()))))
"""


def fault_of(schema: Any, value: Any) -> str:
  """Returns the first part that the schema forbids; '' for none.

  Raises:
    ValueError: a `$ref` of the schema leads nowhere.
    ModuleNotFoundError: jsonschema is not installed.
  """
  jsonschema, registry = _library()
  kind = jsonschema.validators.validator_for(
    schema, default=jsonschema.Draft202012Validator
  )
  try:
    # With its own registry the library fetches nothing.
    error = next(kind(schema, registry=registry).iter_errors(value), None)
  except jsonschema.exceptions._WrappedReferencingError as wrapped:
    raise ValueError(f'schema: got {wrapped}, expected a place in it') from None
  if error is None:
    return ''
  return f'{error.json_path}: {error.message}'[:300]


def _library() -> tuple[Any, Any]:
  """Returns the library, and the registry of the standards' schemas."""
  try:
    import jsonschema
  except ModuleNotFoundError:
    raise ModuleNotFoundError(_NEEDS) from None
  # The registry knows these schemas, and has no way to fetch others.
  return jsonschema, sys.modules['jsonschema_specifications'].REGISTRY


def _library_paths() -> set[str]:
  """Returns the directories of the library and of its dependencies."""
  names = 'jsonschema', 'jsonschema_specifications', 'referencing', 'rpds'
  files = (sys.modules[name].__file__ for name in (*names, 'attr'))
  return {str(pathlib.Path(file).parents[1]) for file in files if file}


def _schema(record: verifier.Record) -> Any:
  schema = record.get('schema')
  if isinstance(schema, str):
    with contextlib.suppress(ValueError):
      schema = json.loads(schema)
  if not isinstance(schema, Mapping | bool):
    raise verifier.wrong(record, 'schema', 'a JSON Schema')
  return schema


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
  """Yields every object of a schema."""
  waiting = [schema]
  while waiting:
    each = waiting.pop()
    if isinstance(each, Mapping):
      yield each
      waiting += each.values()
    elif isinstance(each, list):
      waiting += each


def _has_patterns(schema: Any) -> bool:
  return any(name in each for each in _objects(schema) for name in _PATTERNS)


def _no_constant(name: str) -> Any:
  raise ValueError(f'{expect.shown(name)} is no JSON')
