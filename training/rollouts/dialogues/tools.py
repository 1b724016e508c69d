"""Tools that a policy may call: a calculator, and Python in the sandbox.

A tool never raises: its result describes the error, and the model reads it.
"""

import ast
from collections.abc import Mapping
import dataclasses
import fractions
import json
import operator
from typing import Any, Protocol

from evals.verifiers.sandbox import runner

_MOST_CHARACTERS = 200  # in an expression
_MOST_BITS = 4096  # in a number
_OPERATORS = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
  ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


class Tool(Protocol):
  """A function that a model may call."""

  @property
  def schema(self) -> Mapping[str, Any]:
    """Returns name, description and parameters, as OpenAI's tools have them."""
    ...

  def __call__(self, **arguments: Any) -> str:
    """Returns the result as text; raises ValueError or TypeError in words."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calculator:
  """Exact arithmetic: + - * / // % and parentheses."""

  @property
  def schema(self) -> Mapping[str, Any]:
    """Returns the description of the calculator."""
    return _schema(
      'calculator', 'Computes an arithmetic expression.', 'expression'
    )

  def __call__(self, expression: str) -> str:
    """Returns the value: a whole number, or a fraction as a decimal."""
    if not isinstance(expression, str) or len(expression) > _MOST_CHARACTERS:
      raise ValueError(
        f'expected an expression of at most {_MOST_CHARACTERS} characters'
      )
    try:
      value = _value(ast.parse(expression.strip(), mode='eval').body)
    except ZeroDivisionError:
      raise ValueError('division by zero') from None
    except (SyntaxError, RecursionError, MemoryError):
      raise ValueError(f'{expression!r} is no expression') from None
    return str(value) if value.denominator == 1 else f'{float(value):.10g}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Python:
  """A Python program, in the sandbox of `evals/verifiers/sandbox/`."""

  limits: runner.Limits = dataclasses.field(
    default_factory=lambda: runner.Limits(output_bytes=2000)
  )

  @property
  def schema(self) -> Mapping[str, Any]:
    """Returns the description of the tool."""
    return _schema(
      'python', 'Runs a Python program; returns its output.', 'code'
    )

  def __call__(self, code: str) -> str:
    """Returns the output of the program, with the error if it failed."""
    if not isinstance(code, str):
      raise ValueError('expected the text of a program')
    ran = runner.run(code, self.limits)
    return f'{ran.output}error: {ran.reason}' if ran.reason else ran.output


def run(tools: Mapping[str, Tool], name: str, arguments: str) -> str:
  """Returns the result of a call, or an error that the model can read.

  Raises:
    Unavailable: this system has no sandbox, and the tool needs one.
  """
  try:
    given = json.loads(arguments or '{}')
    if not isinstance(given, dict):
      raise ValueError('expected an object of arguments')
    return tools[name](**given)
  except runner.Unavailable:
    raise
  except KeyError:
    return f'error: no tool {name}'
  except Exception as error:  # a call that fails is a result, not an end
    return f'error: {error}'[:500]


def _schema(name: str, description: str, argument: str) -> Mapping[str, Any]:
  return {
    'type': 'function',
    'function': {
      'name': name,
      'description': description,
      'parameters': {
        'type': 'object',
        'properties': {argument: {'type': 'string'}},
        'required': [argument],
      },
    },
  }


def _value(node: ast.AST) -> fractions.Fraction:
  """Returns the value of a node of an expression, exactly."""
  match node:
    case ast.Constant(value=int() | float()) if type(node.value) is not bool:
      found = fractions.Fraction(str(node.value))
    case ast.UnaryOp() if type(node.op) in _OPERATORS:
      found = _OPERATORS[type(node.op)](_value(node.operand))
    case ast.BinOp() if type(node.op) in _OPERATORS:
      left, right = _value(node.left), _value(node.right)
      found = fractions.Fraction(_OPERATORS[type(node.op)](left, right))
    case _:
      raise ValueError('expected numbers, + - * / // % and parentheses alone')
  if max(found.numerator.bit_length(), found.denominator.bit_length()) > (
    _MOST_BITS
  ):
    raise ValueError('the number is too long')
  return found
