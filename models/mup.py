"""muP: hyper-parameters found at one width stay good at every other.

The maximal update parametrisation (Yang et al., arXiv:2203.03466, table 8, for
Adam and its like) says how initialisation, learning rates and a few constants
of the function depend on width, so that each activation changes by as much in a
step, however wide the model. Widths are compared with a base, at which muP and
the standard parametrisation are one and the same: m = D / mup_base_width.

    parameters                          initial std    learning rate
    query key value, gate up, experts   s / sqrt(m)    1 / m
    of latent attention, all            s / sqrt(m)    1 / m
    out down, of experts too            r / sqrt(m)    1 / m
    router                              s / m          1 / m
    embed position_embed head           s              1
    scales of norms, biases             as ever        1

with s = init_std and r = s / sqrt(2N). And of the function:

    logits            times 1 / m, which is done to what the head is applied to
    attention scores  times sqrt(C_base) / C, with C_base = mup_base_head_width:
                      1 / C where heads grow with D, 1 / sqrt(C) where not

The first three rows are matrices with a fan-in that grows. The family of models
is meant to keep its proportions: H x C, F and the width of an expert grow as D
does, so that m is the ratio of every fan-in. Depth, vocabulary, number of
experts, batch and number of steps are no widths and are not transferred over.

The head: a tied one is the embedding too. Table 8 is the form of muP in which
both have the same std and the same learning rate, so that they can be one
matrix. The router has a fan-in that grows and an output that does not, as the
head has; it is scaled as in table 3, the same function without a multiplier.

Not in these numbers: decoupled weight decay is to be independent of them, or
wide matrices would hardly decay (lr x decay is what shrinks a weight, and lr is
divided by m); an epsilon of Adam that is not far below the gradients, which
shrink as width grows; clipping by global norm, which is one number for all.
"""

from typing import Any

import jax

from models import axes, model_config

# By the name of the module that owns them; biases are not among them.
_HIDDEN = (
  'query',
  'key',
  'value',
  'query_down',
  'query_up',
  'latent',
  'key_rope',
  'key_up',
  'value_up',
  'out',
  'gate',
  'up',
  'down',
  'router',
  'expert_gate',
  'expert_up',
  'expert_down',
)


def width_ratio(config: model_config.ModelConfig) -> float:
  """Returns m, how many times wider than its base a model is; 1 without muP."""
  return config.model_width / (config.mup_base_width or config.model_width)


def hidden_std(config: model_config.ModelConfig) -> float:
  """Returns the initial scale of matrices with a fan-in that grows."""
  return config.init_std / width_ratio(config) ** 0.5


def router_std(config: model_config.ModelConfig) -> float:
  """Returns the initial scale of a router."""
  return config.init_std / width_ratio(config)


def logit_multiplier(config: model_config.ModelConfig) -> float:
  """Returns what logits are multiplied by."""
  return 1 / width_ratio(config)


def query_multiplier(config: model_config.ModelConfig) -> float:
  """Returns what queries are multiplied by, besides the usual 1 / sqrt(C)."""
  base = config.mup_base_head_width or config.head_width
  return (base / config.head_width) ** 0.5


def lr_multipliers(config: model_config.ModelConfig, params: Any) -> Any:
  """Returns what the learning rate of each parameter is multiplied by.

  For optimizers whose update does not depend on the scale of the gradient, as
  Adam's does not.

  Args:
    config: the model's.
    params: its variables, arrays or shapes, layers stacked or apart.

  Returns:
    The same tree with a float at each leaf; all 1 without muP.

  Reference: table 8 of arXiv:2203.03466, row 'Adam LR'.
  """

  def multiplier(path: tuple[Any, ...], _: Any) -> float:
    owner, kind = axes.names(path)[-2:]
    is_hidden = owner in _HIDDEN and kind == 'kernel'
    return 1 / width_ratio(config) if is_hidden else 1.0

  return jax.tree_util.tree_map_with_path(multiplier, params)
