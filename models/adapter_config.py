"""AdapterConfig: the layers that a run adapts, their ranks and scales.

An adapter of rank r changes a kernel by `scale` A B, with A [in, r] and
B [r, out] of models/layers/adapters.py, and

    scale = alpha / rank          (LoRA, arXiv:2106.09685, section 4.1)
    scale = alpha / sqrt(rank)    with rslora (arXiv:2312.03732)

A starts uniform in +-1 / sqrt(in), as in the code of the paper and in peft, and
B as zeros: so the first step begins with the function of the base, bit for bit.

DoRA (arXiv:2402.09353) also trains the norm of each column, `magnitude` [out]:

    W' = magnitude (W + scale A B) / |W + scale A B|

where the norms in the denominator get no gradient (section 4.3 of the paper).
The model receives the quotient as `gain`, so a merge computes the same
products.

Training keeps {a, b, magnitude}; `effective` returns the arrays for the model.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from checks import expect
from models import axes
from models.layers import adapters
from models.linear.stored import tree as stored_tree

MAGNITUDE = 'magnitude'
BASES = ('float', *stored_tree.BASES)
_ALPHA = 32.0
_ROUTER = 'router'

# (regular expression, rank, alpha)
Groups = tuple[tuple[str, int, float], ...]


class Choice(NamedTuple):
  """The adapter of one layer."""

  rank: int
  alpha: float
  scale: float


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
  """Low-rank adapters that are trained in place of the model's weights."""

  rank: int = 0  # of every adapted layer; 0: no adapters, all weights train
  alpha: float = _ALPHA  # see `scale` above
  # Regular expression, searched for in names such as layers/attention/query and
  # layer_3/mlp/up. '': all linear layers but routers.
  layers: str = ''
  # (regular expression, rank, alpha) of layers that differ: the first one found
  # in a name counts, and rank 0 leaves the layer as it is.
  groups: Groups = ()
  rslora: bool = False
  dora: bool = False
  # The frozen kernels in memory: float (float32) | int8 | int4 (QLoRA).
  base: str = 'float'

  def validate(self) -> None:
    """Raises ValueError for values that no run can use."""
    expect.at_least('adapter.rank', self.rank, 0)
    expect.one_of('adapter.base', self.base, BASES)
    if not 0 < self.alpha < float('inf'):
      raise ValueError(
        f'adapter.alpha: got {self.alpha}, expected a finite number > 0; the'
        ' change of a layer is multiplied by alpha / rank'
      )
    _check_expression('adapter.layers', self.layers)
    for group in self.groups:
      if not _is_group(group):
        raise ValueError(
          f'adapter.groups: got {group!r} in {self.groups!r}, expected triples'
          ' (regular expression, rank >= 0, alpha > 0); write'
          " (('mlp/', 16, 32.0),)"
        )
      _check_expression('adapter.groups', group[0])
    if not self.rank:
      self._check_unused()

  def _check_unused(self) -> None:
    default = type(self)()
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value != getattr(default, field.name):
        raise ValueError(
          f'adapter.{field.name}: got {value!r} with adapter.rank = 0, which'
          ' trains no adapter, expected a rank of at least 1; set'
          f' adapter.rank, or leave out adapter.{field.name}'
        )

  def choices(self, params: Any) -> dict[str, Choice]:
    """Returns the adapter of each layer that has one, by path.

    Args:
      params: collection `params` of the model, arrays or shapes.

    Raises:
      ValueError: an expression matches no linear layer, or it matches a table
        or a matrix of experts; a rank is larger than the layer.
    """
    found = dict(kernels(params))
    shapes = {name: k.shape[-2:] for name, k in found.items() if _fits(name)}
    self._check_matches(found, shapes)
    chosen = {}
    for name, shape in shapes.items():
      rank, alpha = self._of(name)
      if not rank:
        continue
      # An output may be narrower, as the outputs of shared keys and values are.
      if rank > shape[0]:
        raise ValueError(
          f'adapter.rank: got {rank} for {name}, which reads {shape[0]} numbers'
          f' per token, expected at most {shape[0]}; lower it, or give the'
          ' layer a group of its own in adapter.groups'
        )
      scale = alpha / (rank**0.5 if self.rslora else rank)
      chosen[name] = Choice(rank, alpha, scale)
    if not chosen:
      raise ValueError(
        f'adapter.groups: got {self.groups!r}, which leave no layer to adapt,'
        ' expected a rank above 0 for at least one'
      )
    return chosen

  def _check_matches(self, all_kernels, shapes) -> None:
    expressions = [('adapter.layers', self.layers)] if self.layers else []
    expressions += [('adapter.groups', group[0]) for group in self.groups]
    for field, pattern in expressions:
      found = [name for name in all_kernels if re.search(pattern, name)]
      others = [name for name in found if name not in shapes]
      # Separate layers differ only in their number: the error shows one.
      known = {re.sub(r'^layer_\d+', 'layer_0', name) for name in shapes}
      if not found or others:
        what = (
          f'which matches {others[0]}: tables of tokens and matrices of experts'
          ' have no adapters'
          if others
          else 'which matches no linear layer'
        )
        raise ValueError(
          f'{field}: got {pattern!r}, {what}, expected part of one of'
          f' {", ".join(sorted(known))}'
        )

  def _of(self, name: str) -> tuple[int, float]:
    for pattern, rank, alpha in self.groups:
      if re.search(pattern, name):
        return rank, alpha
    is_router = name.endswith(_ROUTER)
    if re.search(self.layers, name) if self.layers else not is_router:
      return self.rank, self.alpha
    return 0, self.alpha


def _check_expression(field: str, pattern: Any) -> None:
  try:
    re.compile(pattern)
  except (TypeError, re.error) as error:
    raise ValueError(
      f'{field}: got {pattern!r} ({error}), expected a regular expression'
    ) from None


def _is_group(group: Any) -> bool:
  if not isinstance(group, tuple | list) or len(group) != 3:
    return False
  pattern, rank, alpha = group
  return (
    isinstance(pattern, str)
    and isinstance(rank, int)
    and rank >= 0
    and isinstance(alpha, int | float)
    and 0 < alpha < float('inf')
  )


def kernels(params: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields each matrix or table, with the path of the module that owns it."""
  for name in sorted(params):
    here = f'{path}/{name}' if path else name
    for kind in ('kernel', 'embedding'):
      if kind in params[name]:
        yield here, params[name][kind]
    if isinstance(params[name], Mapping):
      below = {k: v for k, v in params[name].items() if isinstance(v, Mapping)}
      yield from kernels(below, here)


def _fits(name: str) -> bool:
  owner = name.rsplit('/', 1)[-1]
  return not owner.startswith('expert_') and owner not in axes.TABLES


def init(config: AdapterConfig, params: Any, key: jax.Array) -> dict[str, Any]:
  """Returns the adapters before the first step, float32.

  Args:
    params: collection `params` of the base.
    key: PRNG key of the values of A.
  """
  owned, tree = dict(kernels(params)), {}
  for index, (name, choice) in enumerate(config.choices(params).items()):
    *stack, rows, columns = owned[name].shape
    bound = rows**-0.5
    tree[name] = {
      adapters.A: jax.random.uniform(
        jax.random.fold_in(key, index),
        (*stack, rows, choice.rank),
        minval=-bound,
        maxval=bound,
      ),
      adapters.B: jnp.zeros((*stack, choice.rank, columns)),
    }
    if config.dora:
      tree[name][MAGNITUDE] = column_norms(
        owned[name], tree[name], choice.scale
      )
  return adapters.nested(tree)


def effective(
  config: AdapterConfig, params: Any, trained: Any
) -> dict[str, Any]:
  """Returns the adapters as a model reads them: the scale is in B.

  Args:
    params: collection `params` of the base, as the run computes with it.
    trained: adapters as `init` returns them.
  """
  owned, tree = dict(kernels(params)), {}
  choices = config.choices(params)
  for name, entry in adapters.entries(trained):
    scale = choices[name].scale
    tree[name] = {
      adapters.A: entry[adapters.A],
      adapters.B: entry[adapters.B] * scale,
    }
    if config.dora:
      norms = column_norms(owned[name], entry, scale)
      tree[name][adapters.GAIN] = entry[MAGNITUDE] / norms
  return adapters.nested(tree)


def column_norms(kernel: Any, entry: Any, scale: float) -> jax.Array:
  """Returns the norm of each column of W + scale A B, [..., out].

  As |W|^2 + 2 scale W.(A B) + scale^2 |A B|^2, which makes no matrix of the
  size of W. No gradient goes through it.
  """
  if stored_tree.is_stored(kernel):
    kernel = kernel.whole(jnp.float32)
  w, a, b = jax.lax.stop_gradient(
    (kernel, entry[adapters.A], entry[adapters.B])
  )
  exact: Any = {'precision': jax.lax.Precision.HIGHEST}
  across = jnp.einsum('...io,...ir->...ro', w, a, **exact)
  within = jnp.einsum('...ir,...is->...rs', a, a, **exact)
  within = jnp.einsum('...rs,...so->...ro', within, b, **exact)
  squares = jnp.sum(jnp.square(w), axis=-2)
  change = jnp.sum(b * (2 * scale * across + scale**2 * within), axis=-2)
  return jnp.sqrt(squares + change)
