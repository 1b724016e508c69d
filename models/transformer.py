"""The decoder: one definition for training, prefill and decode.

    logits_BTV, cache = model.apply(params, tokens_BT, positions_BT, cache)

`cache=None` is training: attention sees the tokens of the call, and nothing is
kept. With a cache, the keys and values of the call are written into the cache,
and attention reads the cache, for a prompt and for a single token alike. The
cache is an argument and a result; nothing is stored in Flax collections.

The layers are in `models/block.py`. Families of models differ in their
`ModelConfig` fields only; no module belongs to one family.
"""

import functools
from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import (
  axes,
  block as block_lib,
  execution as execution_lib,
  kv_cache,
  model_config,
  mup,
  packed_rows,
  remat,
)
from models.attention import rope
from models.layers import adapters, cross_entropy, norms, table as table_lib

# The arguments of every layer after its cache: angles, positions, segment ids.
Shared = tuple[block_lib.Angles, jax.Array, jax.Array | None]


class Transformer(nn.Module):
  """A decoder-only language model.

  Attributes:
    config: the function of the model.
    dtype: dtype of the computation. Parameters are float32 in training, and
      have the dtype of the frozen directory in serving. Softmax and norms are
      always float32.
    execution: the way of computing; it does not change the function.
  """

  config: model_config.ModelConfig
  dtype: Any = jnp.float32
  execution: execution_lib.Execution = execution_lib.Execution()

  def setup(self):
    config = self.config
    normal = nn.initializers.normal(config.init_std)
    self.embed = table_lib.Table(
      config.vocab_size, config.model_width, embedding_init=normal
    )
    if config.positions == 'learned':
      self.position_embed = nn.Embed(
        config.max_length, config.model_width, embedding_init=normal
      )
    is_looped = config.scan_layers and not self.execution.is_unrolled
    block = remat.wrap(block_lib.Block, self.execution.remat, is_looped)
    if config.scan_layers:
      self.layers = nn.scan(
        block,
        variable_axes={'params': 0, adapters.COLLECTION: 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=cast(
          Any, (0, *[nn.broadcast] * 3)
        ),  # the cache of each layer; shared arguments
        length=config.num_layers,
        unroll=1 if is_looped else config.num_layers,
        # The check traces the layers once more. It concerns variables that all
        # layers share, and this stack has none. But random numbers depend on
        # it, and a seed has to give the weights that it always gave.
        check_constancy_invariants=self.is_initializing()
        or config.dropout_rate > 0,
      )(config, self.dtype, self.execution, config.layer(0))
    else:
      self.layer = [
        block(config, self.dtype, self.execution, config.layer(n))
        for n in range(config.num_layers)
      ]
    self.dropout = nn.Dropout(config.dropout_rate)
    # Logits are linear in the final hidden states. Scaled here, they are scaled
    # in every loss and in decoding.
    self.final_norm = norms.Norm(
      config, mup.logit_multiplier(config), self.execution.by_row
    )
    if not config.tie_embeddings:
      self.head = table_lib.Table(
        config.vocab_size, config.model_width, embedding_init=normal
      )

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    segment_ids_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Returns float32 logits, [B, T, V], and the updated cache.

    Args:
      positions_BT: position of each token in its document; 0..T-1 if None.
      segment_ids_BT: the document of each token in a packed row; 0 is padding.
        Packed rows are for training only and cannot have a cache.
    """
    hidden_BTD, cache = self.hidden(
      tokens_BT, positions_BT, cache, segment_ids_BT
    )
    return self.unembed(hidden_BTD), cache

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    segment_ids_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Returns the final hidden states, [B, T, D], and the updated cache."""
    hidden_BTD, cache, _ = self.hidden_and_routing(
      tokens_BT, positions_BT, cache, segment_ids_BT
    )
    return hidden_BTD, cache

  def hidden_and_routing(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    segment_ids_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None, Any]:
    """Returns hidden states and cache as `hidden` does, and the routing.

    The routing is `models.moe.layer.routing_sums`, with each array stacked over
    the layers with experts, [N, ...]; None for a dense model.
    """
    if cache is not None and segment_ids_BT is not None:
      raise ValueError(
        'got a cache and segment ids, expected one of them: a cache holds one'
        ' document per sequence; give each document a row of its own'
      )
    self._check_length(tokens_BT, cache)
    x_BTD, shared = self.embedded(
      tokens_BT, positions_BT, segment_ids_BT, has_cache=cache is not None
    )
    x_BTD, cache, routing = self._run_layers(x_BTD, cache, shared)
    return self.normalised(x_BTD), cache, routing

  def embedded(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    has_cache: bool,
  ) -> tuple[jax.Array, Shared]:
    """Returns the input of the first layer, [B, T, D], and `Shared`."""
    config = self.config
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape
      )
    x_BTD = self.execution.look_up(self.embed.embedding, tokens_BT)
    x_BTD = nn.with_logical_constraint(x_BTD, axes.STREAM)
    if config.embed_multiplier != 1:
      x_BTD = x_BTD * config.embed_multiplier
    if config.positions == 'learned':
      x_BTD = x_BTD + self.position_embed(positions_BT)
    x_BTD = x_BTD.astype(self.dtype)
    if (most := self.execution.max_documents) and segment_ids_BT is not None:
      # Attention would mix them silently: the loss becomes NaN instead.
      is_excess_BT = packed_rows.is_excess(segment_ids_BT, most)
      x_BTD = jnp.where(is_excess_BT[..., None], jnp.nan, x_BTD)
    x_BTD = self.dropout(x_BTD, deterministic=not self.has_rng('dropout'))
    angles = self._angles(positions_BT, has_cache, segment_ids_BT)
    return x_BTD, (angles, positions_BT, segment_ids_BT)

  def normalised(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the final hidden states of the output of the last layer."""
    return nn.with_logical_constraint(self.final_norm(x_BTD), axes.HEAD_STREAM)

  def _angles(
    self, positions_BT, has_cache, segment_ids_BT
  ) -> block_lib.Angles:
    """Returns the rotation angles of global and of local layers."""
    config = self.config
    if config.positions != 'rope':
      return block_lib.Angles(None)
    global_BTc = rope.angles(
      positions_BT,
      config.rotated_width,
      config.rope_base,
      config.rope_scaling,
      max_length=config.max_length,
      has_cache=has_cache,
      segment_ids_BT=segment_ids_BT,
    )
    if not config.rope_local_base:
      return block_lib.Angles(global_BTc)
    return block_lib.Angles(
      global_BTc,
      rope.angles(positions_BT, config.rotated_width, config.rope_local_base),
    )

  def _run_layers(self, x_BTD, cache, shared):
    """Returns x after every layer, the cache, and the routing of each layer."""
    # Initialisation runs in place: a pipeline needs parameters that exist.
    is_port = self.execution.run_layers is not None and cache is None
    if is_port and not self.is_initializing():
      x_BTD, routing = self._run_layers_elsewhere(x_BTD, shared)
      return x_BTD, None, routing
    if self.config.scan_layers:
      x_BTD, (cache, routing) = self.layers(x_BTD, cache, *shared)
      return x_BTD, cache, routing
    entries = cache or (None,) * self.config.num_layers
    layers = self.layer
    if cache is not None and not self.is_initializing():
      layers = self._layers_traced_once()
    results = []
    for layer, entry in zip(layers, entries, strict=True):
      x_BTD, result = layer(x_BTD, entry, *shared)
      results.append(result)
    written, routings = zip(*results, strict=True)
    # The first layers of a moe model may be dense and have no routing.
    routings = [routing for routing in routings if routing is not None]
    routing = None
    if routings:
      routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
    return x_BTD, written if cache is not None else None, routing

  def _layers_traced_once(self):
    """Returns a function per layer; JAX traces each kind of layer once.

    An engine traces its model for every shape of a step. XLA inlines the calls
    and compiles the same program as without them.
    """
    config, calls = self.config, {}
    for layer in map(config.layer, range(config.num_layers)):
      if layer not in calls:
        block = block_lib.Block(
          config, self.dtype, self.execution, layer, parent=None
        )
        calls[layer] = jax.jit(block.apply)
    return [
      functools.partial(
        calls[config.layer(n)], self._layer_variables(f'layer_{n}')
      )
      for n in range(config.num_layers)
    ]

  def _layer_variables(self, name: str) -> dict[str, Any]:
    """Returns the variables of a layer, or of the stack, by collection."""
    return {
      collection: tree[name]
      for collection, tree in self.variables.items()
      if name in tree
    }

  def _run_layers_elsewhere(self, x_BTD, shared):
    """Returns x and the routing of the port `run_layers`, a pipeline."""
    if not self.config.scan_layers:
      raise ValueError(
        'got scan_layers = False with layers run in stages, expected True:'
        ' stages take their layers from a stack; set model.scan_layers'
      )
    block = remat.wrap(block_lib.Block, self.execution.remat, True)(
      self.config, self.dtype, self.execution, self.config.layer(0), parent=None
    )

    def apply_layer(variables, x_BTD, shared, key):
      rngs = None if key is None else {'dropout': key}
      x_BTD, (_, routing) = block.apply(
        variables, x_BTD, None, *shared, rngs=rngs
      )
      return x_BTD, routing

    key = self.make_rng('dropout') if self.has_rng('dropout') else None
    assert self.execution.run_layers is not None
    return self.execution.run_layers(
      apply_layer, self._layer_variables(axes.LAYERS), x_BTD, shared, key
    )

  def weighted_nll(
    self,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss_weight: float = 0.0,
  ) -> cross_entropy.LossSums:
    """Returns the loss of the targets, in nats, without logits."""
    form = cross_entropy.LossForm(
      dtype=jnp.dtype(self.dtype),
      softcap=self.config.logit_softcap,
      z_weight=z_loss_weight,
      spare_ids=self.config.spare_ids,
    )
    return self.execution.weighted_nll(
      hidden_BTD, self.head_matrix(), targets_BT, weights_BT, form
    )

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D].

    Logits of `spare_ids` are `cross_entropy.MASKED`.
    """
    logits = table_lib.unembed(
      hidden, self._head_table(), self.dtype, self.execution
    )
    logits = cross_entropy.capped(logits, self.config.logit_softcap)
    return self.execution.masked(logits, self.config.spare_ids)

  def _check_length(self, tokens_BT, cache) -> None:
    # A lookup past the table would be clamped, without an error.
    length = tokens_BT.shape[1]
    if cache is not None:
      # Page tables may hold more slots; the scheduler keeps to max_length.
      slots = kv_cache.length(cache)
      length = 0 if slots is None else max(length, slots)
    if self.config.positions == 'learned' and length > self.config.max_length:
      raise ValueError(
        f'learned positions: got a row or cache of {length} tokens, expected'
        f' at most max_length = {self.config.max_length}; shorten it or train'
        ' with a longer model.max_length'
      )

  def token_rows(self, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings of tokens [B, T] alone, [B, T, D]."""
    return self.execution.look_up(self.embed.embedding, tokens)

  def head_matrix(self) -> jax.Array:
    """Returns the unembedding matrix, [V, D]; the embedding if tied."""
    return table_lib.whole(self._head_table(), self.dtype)

  def _head_table(self) -> Any:
    return (self.embed if self.config.tie_embeddings else self.head).embedding
