"""A step as calls of small programs: before the layers, per layer, after them.

    lowered = layered.lower(params, kv_cache, last_B, inputs, ...)
    kv_cache, *results = lowered.compile()(params, kv_cache, last_B, inputs)

These are the results of `steps.prefill` and `steps.decode_step`. A program of a
whole step has all layers in it, and XLA compiles and loads each of them anew,
though most are alike. Here layers that are alike are one program, called once
per layer. For 30 layers of width 576, 1.2 s of CPU time compile a step, in
place of 3 to 6. A step has the same bits, and where layers are large it takes
the same time.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax

from inference.engine import device_state, steps
from models import (
  block as block_lib,
  kv_cache as kv_cache_lib,
  layout,
  model_config,
  transformer,
)

# A call takes the host 30 to 60 us when it has a core to itself, and wakes
# XLA's threads again. Layers of 7 MB do not hide that: a token of a 110M model
# in int8 took 37 ms of CPU time by layers and 28 ms in one program, a share of
# its prompt included, on 2 busy cores. Accelerators, whose steps are shorter,
# never call layers.
MIN_LAYER_BYTES = 12 * 2**20


def suits(params: device_state.Params, platform: str) -> bool:
  """Returns whether all layers are large enough to be called one by one."""
  return platform == 'cpu' and all(
    sum(
      leaf.size * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(layer['params'])
    )
    >= MIN_LAYER_BYTES
    for layer in parted(params)[1]
  )


class Step(NamedTuple):
  """The programs of a step; called as `steps.prefill` and `steps.decode_step`.

  They are lowered, or after `compile` compiled.
  """

  begin: Any
  layers: dict[Any, Any]  # one for all layers that are alike
  finish: Any
  kinds: list[Any]  # of each layer

  def compile(self, options: dict[str, Any] | None = None) -> 'Step':
    """Returns the compiled step."""
    begin, finish = (
      each.compile(options) for each in (self.begin, self.finish)
    )
    layers = {kind: each.compile(options) for kind, each in self.layers.items()}
    return Step(begin, layers, finish, self.kinds)

  def __call__(self, params, kv_cache, last_B, inputs: steps.Inputs) -> tuple:
    shared, layers = parted(params)
    x_1TD, *others = self.begin(shared, last_B, inputs)
    written, kept = [], kv_cache[len(layers) :]
    for kind, layer, pages in zip(
      self.kinds, layers, kv_cache[: len(layers)], strict=True
    ):
      x_1TD, pages = self.layers[kind](layer, x_1TD, pages, *others)
      written.append(pages)
    kept, *results = self.finish(shared, kept, x_1TD, inputs)
    return (*written, *kept), *results


def lower(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  last_B: jax.Array,
  inputs: steps.Inputs,
  *,
  model: transformer.Transformer,
  vocab_size: int,
  finish: Callable[..., tuple[Any, ...]] = steps.finish,
) -> Step:
  """Traces the programs of a step; arguments as of `steps.prefill`.

  `finish` makes the results of the final hidden states, as `steps.finish` does.
  """
  config = model.config
  shared, layers = parted(params)
  begin = _begin.lower(shared, last_B, inputs, model=model)
  x_1TD, *others = begin.out_info
  kinds = [_kind(config.layer(n), layer) for n, layer in enumerate(layers)]
  lowered = {}
  each_pages, kept = steps.parted(kv_cache, model)
  for kind, layer, pages in zip(kinds, layers, each_pages, strict=True):
    if kind not in lowered:
      block = block_lib.Block(
        config, model.dtype, model.execution, kind[0], parent=None
      )
      lowered[kind] = _layer.lower(layer, x_1TD, pages, *others, block=block)
  finished = _finish.lower(
    shared,
    kept,
    x_1TD,
    inputs,
    model=model,
    vocab_size=vocab_size,
    finish=finish,
  )
  return Step(begin, lowered, finished, kinds)


def _kind(layer: model_config.Layer, variables: Any) -> tuple[Any, ...]:
  """Returns what layers of one program have in common."""
  # Kernels in fewer bits may differ in form from layer to layer.
  leaves, structure = jax.tree.flatten(variables)
  return layer, structure, tuple((x.shape, x.dtype) for x in leaves)


def parted(variables) -> tuple[Any, list[Any]]:
  """Returns the variables that no layer has, and those of each layer."""
  num_layers = sum(name.startswith('layer_') for name in variables['params'])
  layers = [
    {
      collection: tree[name]
      for collection, tree in variables.items()
      if name in tree
    }
    for name in map('layer_{}'.format, range(num_layers))
  ]
  shared = {
    name: leaf
    for name, leaf in variables['params'].items()
    if not name.startswith('layer_')
  }
  return {'params': shared}, layers


@functools.partial(jax.jit, static_argnames=('model',))
def _begin(params, last_B, inputs: steps.Inputs, *, model):
  """Returns the first layer's input, and the arguments of all layers."""
  x_1TD, shared = steps.embedded(params, last_B, inputs, model)
  tables = inputs.decode_table_DL, inputs.chunk_table_XL
  return x_1TD, shared, tables, steps.adapter_slots(inputs)


@functools.partial(
  jax.jit, donate_argnames=('x_1TD', 'pages'), static_argnames=('block',)
)
def _layer(
  variables, x_1TD, pages, shared, tables, slots_1T, *, block: block_lib.Block
):
  """Returns the output of a layer, and its pages."""
  variables = steps.routed(variables, slots_1T, block.execution)
  variables = layout.whole_kernels(variables)
  entry = kv_cache_lib.PagedLayer(pages, *tables)
  # Flax's type of the result fits no block in particular.
  result: Any = block.apply(variables, x_1TD, entry, *shared)
  x_1TD, (entry, _) = result
  return x_1TD, entry.pages


@functools.partial(
  jax.jit,
  donate_argnames=('kept',),
  static_argnames=('model', 'vocab_size', 'finish'),
)
def _finish(
  params, kept, x_1TD, inputs: steps.Inputs, *, model, vocab_size, finish
):
  """Returns the pages of hidden states, if any, and the results of a step."""
  hidden_1TD = steps.apply(model, params, x_1TD, method='normalised')
  results = finish(model, params, vocab_size, hidden_1TD[0], inputs)
  return steps.keep(kept, hidden_1TD, inputs), *results
