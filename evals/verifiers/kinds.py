"""The verifiers that a line of a file can name.

Programs import the verifier that they want, with their own settings.
"""

from collections.abc import Mapping

from checks import expect
from evals.verifiers import (
  column_sum,
  json_schema,
  texts,
  unit_tests,
  verifier,
)

KINDS: Mapping[str, verifier.Verifier] = {
  'number': texts.Number(),  # answer
  'exact': texts.Exact(),  # answer
  'choice': texts.Choice(),  # answer, choices
  'pattern': texts.Pattern(),  # pattern
  'json_schema': json_schema.JsonSchema(),  # schema
  'unit_tests': unit_tests.UnitTests(),  # tests, entry_point; cases
  'column_sum': column_sum.ColumnSum(),  # no field: it checks steps
}
# The fields of a record that they read.
FIELDS = (
  'answer', 'choices', 'pattern', 'schema', 'tests', 'entry_point', 'cases'
)  # fmt: skip


def named(name: str) -> verifier.Verifier:
  """Returns the verifier of this name.

  Raises:
    ValueError: there is none.
  """
  expect.one_of('verifier', name, KINDS)
  return KINDS[name]
