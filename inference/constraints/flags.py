"""The flags of serve.py that constrain the completion of --prompt.

Imports no jax: --help need not wait for it.
"""

import pathlib
from typing import Any

from absl import flags

from checks import expect, path_flags
from inference.constraints import constraint as constraint_lib

NAMES = constraint_lib.KINDS


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for each kind of constraint."""
  flags.disclaim_key_flags()  # --help lists them as flags of the caller
  path_flags.DEFINE_path(
    constraint_lib.JSON_SCHEMA,
    None,
    'File with a JSON schema. The completion of --prompt is JSON that matches'
    ' it.',
    flag_values=values,
  )
  flags.DEFINE_string(
    constraint_lib.REGEX,
    None,
    'Regular expression that matches the whole completion of --prompt.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    constraint_lib.CHOICE,
    None,
    'A text that the completion of --prompt may be. Repeat the flag for each'
    ' text; the completion is exactly one of them.',
    flag_values=values,
  )
  path_flags.DEFINE_path(
    constraint_lib.LARK,
    None,
    "File with a grammar in llguidance's Lark, for the completion of --prompt.",
    flag_values=values,
  )


def given(
  values: flags.FlagValues = flags.FLAGS,
) -> dict[str, constraint_lib.Constraint]:
  """Returns the constraint of the flags, as a setting; {} without such a flag.

  Raises:
    ConstraintError: two kinds of constraint are given, a file cannot be read,
      the text is no valid constraint, or llguidance is not installed.
  """
  kinds = [kind for kind in NAMES if values[kind].value]
  if not kinds:
    return {}
  if len(kinds) > 1:
    raise constraint_lib.ConstraintError(
      f'got {" and ".join(f"--{kind}" for kind in kinds)}, expected one of them'
    )
  if not constraint_lib.is_available():
    raise constraint_lib.ConstraintError(
      f'--{kinds[0]}: got no llguidance, expected it to be installed; run pip'
      ' install -r requirements-serve.txt'
    )
  (kind,) = kinds
  return {'constraint': _read(kind, values[kind].value)}


def _read(kind: str, value: Any) -> constraint_lib.Constraint:
  if kind == constraint_lib.CHOICE:
    return constraint_lib.choice(value)
  if kind == constraint_lib.REGEX:
    return constraint_lib.regex(value)
  try:
    text = pathlib.Path(value).read_text('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise constraint_lib.ConstraintError(
      f'--{kind}: got {expect.shown(value)}, which cannot be read ({error}),'
      ' expected a file'
    ) from None
  make = {
    constraint_lib.JSON_SCHEMA: constraint_lib.json_schema,
    constraint_lib.LARK: constraint_lib.lark,
  }[kind]
  return make(text)
