"""Memory of a training step on each device, computed from shapes alone.

`--plan` prints the result of this formula in seconds, and the compiler's own
figure beside it if the step was compiled. Every term is an array that has to
exist:

    state        parameters, optimizer, the average of the parameters if the run
                 keeps one, and the objective's frozen models, split over
                 devices by the placement
    gradients    of every trained parameter, split alike; twice with
                 micro-batches: the sum so far, and the new gradients
    cast         the stacked weights in the compute dtype: XLA converts them
                 once, before the loop over layers
    saved        results that the forward pass of all layers stores for the
                 backward pass

The peak is their sum and the largest of four phases of the step:

    loss         the head in the compute dtype and its float32 gradient, whole
                 except along `tensor`; a chunk of logits; the hidden states
    layers       one layer's weights gathered, and their float32 gradient before
                 it is scattered; the results that its backward pass recomputes
    embedding    the table's float32 gradient, whole except along `tensor`
    update       for orthogonalised matrices, their momentum and their updates,
                 and one whole matrix that is multiplied with itself

The results that a layer saves are not counted by hand. The layer is traced with
abstract values, and `jax.vjp` shows the results that it keeps. So remat
policies, attention kernels and mixtures of experts count as they are in the
step.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from models import (
  adapter_config,
  block as block_lib,
  execution as execution_lib,
  remat,
  transformer,
)
from models.attention import dense
from models.layers import adapters as models_adapters
from models.linear.stored import tree as stored_tree
from models.moe import dispatch
from training import (
  adapters,
  execution as run_execution,
  experiment as experiment_lib,
  learner as learner_lib,
  state as state_lib,
)
from training.optimizer import param_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on one device."""

  params: float
  optimizer: float
  average: float
  frozen: float  # frozen models of the objective
  gradients: float
  cast: float
  saved: float
  loss: float
  layers: float
  embedding: float
  update: float

  @property
  def phases(self) -> dict[str, float]:
    """Bytes of each phase, besides state and gradients."""
    return {
      'loss': self.saved + self.loss,
      'layers': self.saved + self.layers,
      'embedding': self.embedding,
      'update': self.update,
    }

  @property
  def total(self) -> float:
    """Bytes at the peak of a step."""
    return (
      self.params
      + self.optimizer
      + self.average
      + self.frozen
      + self.gradients
      + self.cast
      + max(self.phases.values())
    )


def estimate(learner: learner_lib.Learner) -> Memory:
  """Returns the memory of a learner's train step, without allocating any."""
  experiment = learner.experiment
  model = experiment.model
  parallel = _sizes(learner)
  itemsize = jnp.dtype(experiment.compute_dtype).itemsize
  params, optimizer = _state_bytes(learner)
  layer_params = _layer_bytes(learner)
  layer_whole = 4 * _layer_numbers(learner)
  tokens = _tokens(experiment, parallel)
  table = 4 * model.vocab_size * model.model_width / parallel['tensor']
  saved = _residual_bytes(learner, experiment.execution.remat)
  stages = parallel['stage']
  parts = experiment.parallel.num_stage_microbatches
  # A pipeline has one buffer per tick, and some ticks are idle.
  in_flight = (parts + stages - 1) / parts
  layers_here = model.num_layers / stages
  # Frozen weights have no gradients, neither in the loss, nor in a layer, nor
  # in the table.
  gradient = 0 if experiment.is_base_frozen else 1
  return Memory(
    params=params,
    optimizer=optimizer,
    average=params if learner.abstract_state.average is not None else 0.0,
    frozen=_frozen_bytes(learner),
    gradients=_params_bytes(learner, _is_trained(learner))
    * (2 if experiment.num_microbatches > 1 else 1),
    cast=layer_params * itemsize / 4 if itemsize < 4 else 0.0,
    # No gradient goes through layers that heads only read.
    saved=0.0
    if experiment.objective.trains_heads_alone
    else saved * layers_here * in_flight,
    loss=table * (itemsize / 4 + gradient)
    + _loss_bytes(learner, tokens, itemsize),
    layers=layer_whole * (itemsize / 4 + gradient)
    + _working_bytes(learner, tokens),
    embedding=table * gradient,
    update=_update_bytes(learner),
  )


def _update_bytes(learner) -> float:
  """Returns the bytes of the updates that need whole matrices."""
  params = learner.abstract_state.params
  is_hidden = jax.tree.map(
    lambda is_trained, is_hidden: is_trained and is_hidden,
    _is_trained(learner),
    learner.experiment.optimizer.rule.orthogonalised(params),
  )
  matrices = jax.tree.leaves(param_groups.selected(is_hidden, params))
  if not matrices:
    return 0.0
  # Newton and Schulz's iteration holds X, its square, a polynomial of the
  # square, and the product of X and the polynomial.
  whole = max(4 * math.prod(leaf.shape[-2:]) for leaf in matrices)
  # With stages all layers of a stage are updated at once, without stages one
  # layer after the other (`rules.Muon`).
  stages = _sizes(learner)['stage']
  num_layers = learner.experiment.model.num_layers
  num_bytes = _params_bytes(learner, is_hidden)
  return 2 * num_bytes + 4 * whole * (num_layers / stages if stages > 1 else 1)


def _is_trained(learner) -> Any:
  params = learner.abstract_state.params
  return param_groups.trained_by(learner.optimizer, params)


def _params_bytes(learner, is_selected) -> float:
  """Returns the bytes of some of the parameters on one device."""
  params = param_groups.selected(is_selected, learner.abstract_state.params)
  shardings = getattr(learner.placement, 'whole_shardings', None)
  if shardings is None:
    return _bytes(params)
  return _shard_bytes(
    params, param_groups.selected(is_selected, shardings.params)
  )


def _loss_bytes(learner, tokens, itemsize) -> float:
  model = learner.experiment.model
  hidden = tokens * model.model_width * itemsize
  tensor = _sizes(learner)['tensor']
  logits = min(
    tokens * model.vocab_size / tensor,
    learner.experiment.execution.loss_chunk_logits,
  )
  # Logits, and their gradient in the compute dtype.
  return 2 * hidden + logits * (4 + itemsize)


def _sizes(learner) -> dict[str, int]:
  mesh = getattr(learner.placement, 'mesh', None)
  if mesh is not None:
    return dict(mesh.shape)
  ones = dict.fromkeys(
    ('stage', 'data', 'fsdp', 'expert', 'context', 'tensor'), 1
  )
  return ones | {'data': len(learner.placement.devices)}


def _rows(experiment: experiment_lib.Experiment, sizes: dict[str, int]) -> int:
  """Rows of a micro-batch on one device."""
  rows = experiment.data.batch_size // experiment.num_microbatches
  return rows // (sizes['data'] * sizes['fsdp'] * sizes['expert'])


def _tokens(experiment, sizes) -> float:
  row_length = experiment.data.row_length / sizes['context']
  return _rows(experiment, sizes) * row_length


def _state_bytes(learner) -> tuple[float, float]:
  """Returns the bytes of params and of the optimizer, on one device."""
  state = learner.abstract_state
  shardings = getattr(learner.placement, 'state_shardings', None)
  if shardings is None:
    return _bytes(state.params), _bytes(state.opt_state)
  return (
    _shard_bytes(state.params, learner.placement.whole_shardings.params),
    _shard_bytes(state.opt_state, learner.placement.whole_shardings.opt_state),
  )


def _frozen_bytes(learner) -> float:
  """Returns the bytes of the objective's frozen models on one device."""
  state = learner.abstract_state
  shardings = getattr(learner.placement, 'whole_shardings', None)
  if shardings is None:
    return _bytes(state.frozen_params)
  return _shard_bytes(state.frozen_params, shardings.frozen_params)


def _layer_bytes(learner) -> float:
  """Returns the float32 bytes of all layers' weights on one device."""
  params = _weights(learner, learner.abstract_state)
  shardings = getattr(learner.placement, 'whole_shardings', None)
  names = [name for name in params if name.startswith('layer')]
  layers = _float32({name: params[name] for name in names})
  if shardings is None:
    return _bytes(layers)
  weights = _weights(learner, shardings)
  return _shard_bytes(layers, _float32({name: weights[name] for name in names}))


def _weights(learner, state) -> Any:
  """Returns the model's weights of a state; some runs have frozen ones."""
  if learner.experiment.is_base_frozen:
    return state.frozen_params[adapters.BASE]['params']
  return state.params['params']


def _float32(tree: Any) -> Any:
  """Returns the tree without the weights that are stored in fewer bits."""
  return jax.tree.map(
    lambda x: None if stored_tree.is_stored(x) else x,
    tree,
    is_leaf=stored_tree.is_stored,
  )


def _layer_numbers(learner) -> float:
  """Returns the number of one layer's weights that a device multiplies with.

  Weights are gathered, except along `tensor`; each device uses only its own
  experts.
  """
  params = _weights(learner, learner.abstract_state)
  layers = {k: v for k, v in params.items() if k.startswith('layer')}
  sizes = _sizes(learner)
  total = 0.0
  whole = jax.tree.leaves_with_path(layers, is_leaf=stored_tree.is_stored)
  for path, leaf in whole:
    is_expert = 'expert_' in jax.tree_util.keystr(path)
    total += math.prod(leaf.shape) / (sizes['expert'] if is_expert else 1)
  return total / learner.experiment.model.num_layers / sizes['tensor']


def _bytes(tree: Any) -> float:
  return sum(
    math.prod(leaf.shape) * _itemsize(leaf) for leaf in jax.tree.leaves(tree)
  )


def _shard_bytes(tree: Any, shardings: Any) -> float:
  sizes = jax.tree.map(
    lambda leaf, sharding: (
      math.prod(sharding.shard_shape(leaf.shape)) * _itemsize(leaf)
    ),
    tree,
    shardings,
  )
  return float(sum(jax.tree.leaves(sizes)))


def _itemsize(leaf) -> int:
  # A typed key is two 32-bit words.
  return (
    8
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else (leaf.dtype.itemsize)
  )


def residuals(
  experiment: experiment_lib.Experiment,
  sizes: dict[str, int],
  policy: str,
  is_fused: bool,
  *,
  recomputes_activation: bool = False,
) -> list[jax.ShapeDtypeStruct]:
  """Returns the arrays that one layer stores for its backward pass.

  Args:
    sizes: sizes of the mesh axes. The layer is traced with the heads, columns
      and tokens of one device.
  """
  model = experiment.model
  config = dataclasses.replace(
    model,
    num_heads=max(model.num_heads // sizes['tensor'], 1),
    num_kv_heads=max(model.num_kv_heads // sizes['tensor'], 1),
    mlp_width=model.mlp_width // sizes['tensor'],
  )
  if model.num_experts:
    config = dataclasses.replace(
      config, expert_width=model.expert_width // sizes['tensor']
    )
  dtype = jnp.dtype(experiment.compute_dtype)
  block = remat.wrap(block_lib.Block, policy, is_scanned=False)(
    config,
    dtype,
    execution_lib.Execution(
      remat=policy,
      attend=_fused_attend if is_fused else dense.attend,
      apply_experts=functools.partial(_apply_experts, sizes['expert']),
      recomputes_activation=recomputes_activation,
    ),
    # If layers differ, the layers with experts come last, and store the most.
    config.layer(config.num_layers - 1),
  )
  rows = _rows(experiment, sizes)
  time = experiment.data.row_length // sizes['context']
  shape = functools.partial(jax.ShapeDtypeStruct, (rows, time))
  x_BTD = jax.ShapeDtypeStruct((rows, time, model.model_width), dtype)
  angles_BTc: Any = (
    jax.ShapeDtypeStruct((rows, time, model.rotated_width // 2), jnp.float32)
    if model.positions == 'rope'
    else None
  )
  angles = block_lib.Angles(angles_BTc)
  shared = angles, shape(dtype=jnp.int32), shape(dtype=jnp.int32)

  ranks = _ranks(experiment)

  def kept(key, x_BTD, shared):
    params = block.init(key, x_BTD, None, *shared)
    trained, frozen = params, {}
    if ranks:
      trained, frozen = _adapted(experiment.adapter, params, ranks)
    _, vjp = jax.vjp(
      lambda trained, x: block.apply({**frozen, **trained}, x, None, *shared)[
        0
      ],
      trained,
      x_BTD,
    )
    return (trained, frozen), vjp

  params, vjp = jax.eval_shape(kept, jax.random.key(0), x_BTD, shared)
  # Weights and arrays that all layers share are counted elsewhere.
  elsewhere = [leaf.shape for leaf in jax.tree.leaves((params, shared))]
  return [
    leaf
    for leaf in jax.tree.leaves(vjp)
    if hasattr(leaf, 'shape') and leaf.shape not in elsewhere
  ]


def _ranks(experiment: experiment_lib.Experiment) -> dict[str, int]:
  """Returns the largest rank of each layer in a block, by its path there."""
  if not experiment.adapter.rank:
    return {}
  shapes = state_lib.abstract_params(transformer.Transformer(experiment.model))
  ranks: dict[str, int] = {}
  for path, choice in experiment.adapter.choices(shapes['params']).items():
    _, _, owner = path.partition('/')
    ranks[owner] = max(ranks.get(owner, 0), choice.rank)
  return ranks


def _adapted(config, params, ranks) -> tuple[Any, Any]:
  """Returns the adapters of a block, and its frozen weights."""
  entries = {}
  for path, kernel in adapter_config.kernels(params['params']):
    if rank := ranks.get(path):
      into, out = kernel.shape
      entries[path] = {
        'a': jnp.zeros((into, rank)),
        'b': jnp.zeros((rank, out)),
      }
  tree = {models_adapters.COLLECTION: models_adapters.nested(entries)}
  return tree, adapters.in_form(config, params)


def _apply_experts(num_shards, x_BTD, ids_BTA, gates_BTA, kernels, dtype):
  """Applies the experts of one device to the rows of all devices of a group."""

  def gathered(part):
    return jnp.concatenate([part] * num_shards) if num_shards > 1 else part

  y_BTD = dispatch.apply_experts(
    gathered(x_BTD.astype(dtype)),
    gathered(ids_BTA),
    gathered(gates_BTA),
    kernels,
    dtype,
  )
  return y_BTD[: x_BTD.shape[0]]


@functools.partial(jax.custom_vjp)
def _fused(q_BTHC, k_BKTC, v_BKTC):
  return _fused_forward(q_BTHC, k_BKTC, v_BKTC)[0]


def _fused_forward(q_BTHC, k_BKTC, v_BKTC):
  """Keeps the arrays that a kernel keeps. Only their shapes matter here."""
  name = functools.partial(checkpoint_name, name=remat.ATTENTION)
  out_BTHC = name(q_BTHC * 1)
  log_sum_BTH = name(jnp.sum(q_BTHC, axis=-1, dtype=jnp.float32))
  return out_BTHC, (q_BTHC, k_BKTC, v_BKTC, out_BTHC, log_sum_BTH)


def _fused_backward(kept, dout_BTHC):
  q_BTHC, k_BKTC, v_BKTC, *_ = kept
  del dout_BTHC
  return q_BTHC, k_BKTC, v_BKTC


_fused.defvjp(_fused_forward, _fused_backward)


def _fused_attend(
  q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT=None, dropout=None, form=None
):
  """The stand-in for an attention kernel, to trace shapes."""
  del segment_ids_BT, dropout, form
  out_BTHC: Any = _fused(q_BTHC, k_BKTC, v_BKTC)
  return out_BTHC


def _residuals(learner, policy: str) -> list[jax.ShapeDtypeStruct]:
  path = run_execution.attention_path(learner.experiment, learner.placement)
  return residuals(
    learner.experiment,
    _sizes(learner),
    policy,
    path in ('splash', 'cudnn'),
    recomputes_activation=learner.model.execution.recomputes_activation,
  )


def _working_bytes(learner, tokens: float) -> float:
  """Returns the bytes that the backward pass of one layer holds at a time.

  It counts all results that the layer would store without remat: either the
  results are recomputed, or their gradients are held. Float32 results of norms
  are neither, because the compiler computes them where they are read. Instead
  there are two float32 gradients of the residual stream, the incoming and the
  outgoing gradient. A mixture of experts also holds the gradient of the
  experts' outputs.
  """
  experiment = learner.experiment
  model, sizes = experiment.model, _sizes(learner)
  itemsize = jnp.dtype(experiment.compute_dtype).itemsize
  normed = [(model.model_width,)]  # [D] of the stream, [H, C] of each head
  if model.qk_norm:
    normed += [
      (max(heads // sizes['tensor'], 1), model.head_width)
      for heads in (model.num_heads, model.num_kv_heads)
    ]
  kept = [
    leaf
    for leaf in _residuals(learner, 'none')
    if itemsize == 4
    or leaf.dtype != jnp.float32
    or leaf.shape[2:] not in normed
  ]
  copies = tokens * model.num_active_experts * sizes['expert']
  wide = 4 * 2 * tokens + itemsize * copies
  return _bytes(kept) + model.model_width * wide


def _residual_bytes(learner, policy: str) -> float:
  return _bytes(_residuals(learner, policy))
