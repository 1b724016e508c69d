"""muP: hyper-parameters tuned at one width stay good at other widths.

In the maximal update parametrisation (Yang et al., arXiv:2203.03466, table 8,
for Adam and similar optimizers), initialisation, learning rates and a few
constants of the function depend on width. A step then changes each activation
by the same amount at every width. Widths are relative to a base width, at which
muP equals the standard parametrisation: m = D / mup_base_width.

    parameters                          initial std    learning rate
    query key value, gate up, experts   s / sqrt(m)    1 / m
    latent attention, all               s / sqrt(m)    1 / m
    out down, also of experts           r / sqrt(m)    1 / m
    router                              s / m          1 / m
    embed position_embed head           s              1
    scales of norms, biases             unchanged      1

with s = init_std and r = s / sqrt(2N). Two constants of the function change:

    logits            times 1 / m, applied to the final hidden states
    attention scores  times sqrt(C_base) / C, with C_base = mup_base_head_width:
                      1 / C if heads grow with D, 1 / sqrt(C) if they do not

The first three rows are matrices whose fan-in grows. The models of a family
must keep their proportions: H x C, F and expert_width grow as D does, so that m
is the ratio of every fan-in. Depth, vocabulary, number of experts, batch size
and number of steps are not widths; muP does not transfer over them.

A tied head is also the embedding. In table 8, both have the same std and the
same learning rate, so that they can be one matrix. The router, like the head,
has a fan-in that grows and an output that does not. It is scaled as in table 3,
which is the same function without a multiplier.

These numbers do not cover three things. Decoupled weight decay must not depend
on m: lr x decay shrinks a weight and lr is divided by m, so that wide matrices
would hardly decay. The epsilon of Adam must be far below the gradients, which
shrink as width grows. Clipping by global norm uses one number for all
parameters.
"""

from typing import Any

import jax

from models import axes, model_config

# Modules whose kernel has a fan-in that grows; their biases are not scaled.
_HIDDEN = (
  'query', 'key', 'value', 'query_down', 'query_up', 'latent', 'key_rope',
  'key_up', 'value_up', 'out', 'gate', 'up', 'down', 'router', 'expert_gate',
  'expert_up', 'expert_down',
)  # fmt: skip


def width_ratio(config: model_config.ModelConfig) -> float:
  """Returns m, the width of the model over its base width; 1 without muP."""
  return config.model_width / (config.mup_base_width or config.model_width)


def hidden_std(config: model_config.ModelConfig) -> float:
  """Returns the initial std of matrices with a fan-in that grows."""
  return config.init_std / width_ratio(config) ** 0.5


def router_std(config: model_config.ModelConfig) -> float:
  """Returns the initial std of a router."""
  return config.init_std / width_ratio(config)


def logit_multiplier(config: model_config.ModelConfig) -> float:
  """Returns the multiplier of the logits."""
  return 1 / width_ratio(config)


def query_multiplier(config: model_config.ModelConfig) -> float:
  """Returns the multiplier of queries, besides the usual 1 / sqrt(C)."""
  base = config.mup_base_head_width or config.head_width
  return (base / config.head_width) ** 0.5


def lr_multipliers(config: model_config.ModelConfig, params: Any) -> Any:
  """Returns the multiplier of each parameter's learning rate.

  For optimizers whose update does not depend on the scale of the gradient, such
  as Adam.

  Returns:
    The same tree with a float at each leaf; all 1 without muP.

  Reference: table 8 of arXiv:2203.03466, row 'Adam LR'.
  """

  def multiplier(path: tuple[Any, ...], _: Any) -> float:
    owner, kind = axes.names(path)[-2:]
    # Of an adapter, only A has a fan-in that grows.
    is_hidden = owner in _HIDDEN and kind in ('kernel', 'a')
    return 1 / width_ratio(config) if is_hidden else 1.0

  return jax.tree_util.tree_map_with_path(multiplier, params)
