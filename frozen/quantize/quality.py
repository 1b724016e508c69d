"""The distance of a quantised model from its original, on held-out rows.

    KL           from the original's next-token distribution to the quantised
    same top-1   how often both have the same most likely token
    perplexity   of the quantised model, divided by the original's

Means over tokens. Errors are standard errors over rows, since the tokens of a
row are alike. llama.cpp's `--kl-divergence` reports the same numbers.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen import manifest as manifest_lib
from frozen.quantize import activations
from models import model_config, transformer


def table(
  config: model_config.ModelConfig,
  outer: Any,
  original: Sequence[activations.Batch],
  quantised: Sequence[activations.Batch],
  tokens_RT: np.ndarray,
) -> dict[str, Any]:
  """Returns the quality table, JSON values.

  Args:
    config: config of the model.
    outer: params outside of the layers, the same in both models.
    original: outputs of the last layer.
    quantised: outputs of the last quantised layer.
    tokens_RT: the rows.
  """
  model = transformer.Transformer(config)
  hidden = [
    np.concatenate([np.asarray(batch.x_BTD) for batch in batches])
    for batches in (original, quantised)
  ]
  rows = [
    _of_row({'params': outer}, *x_TD, tokens_T, model=model)
    for *x_TD, tokens_T in zip(*hidden, tokens_RT, strict=True)
  ]
  return summary({name: [row[name] for row in rows] for name in rows[0]})


def summary(rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
  """Returns the table of the means of each row: kl, same_top1, nll, nll_new."""
  of_rows = {name: np.asarray(each, np.float64) for name, each in rows.items()}

  def mean(values):
    return float(values.mean()), float(
      values.std(ddof=1) / np.sqrt(len(values))
    )

  kl, kl_error = mean(of_rows['kl'])
  same, same_error = mean(of_rows['same_top1'])
  difference, error = mean(of_rows['nll_new'] - of_rows['nll'])
  ratio = float(np.exp(difference))
  return {
    'kl': kl,
    'kl_error': kl_error,
    'same_top1': same,
    'same_top1_error': same_error,
    'perplexity': float(np.exp(of_rows['nll_new'].mean())),
    'original_perplexity': float(np.exp(of_rows['nll'].mean())),
    'perplexity_ratio': ratio,
    # Paired: the difficulty of a row, common to both models, cancels.
    'perplexity_ratio_error': ratio * error,
    'rows': len(of_rows['kl']),
  }


def told(manifest: manifest_lib.Manifest) -> str:
  """Returns the table of a frozen directory in one line; '' if it has none."""
  record = manifest.quantization.get('record', {})
  return text(record['quality']) if 'quality' in record else ''


def text(quality: Mapping[str, Any]) -> str:
  """Returns the table in one line."""
  return (
    f'KL {quality["kl"]:.3g} +- {quality["kl_error"]:.2g},'
    f' same top-1 {quality["same_top1"]:.2%} +-'
    f' {quality["same_top1_error"]:.2%},'
    f' perplexity {quality["perplexity"]:.4g}, x'
    f' {quality["perplexity_ratio"]:.4f} +-'
    f' {quality["perplexity_ratio_error"]:.4f} of the original'
  )


@functools.partial(jax.jit, static_argnames=('model',))
def _of_row(variables, old_TD, new_TD, tokens_T, *, model):
  def logprobs(x_TD):
    hidden_1TD = model.apply(variables, x_TD[None], method='normalised')
    logits = model.apply(variables, hidden_1TD[0, :-1], method='unembed')
    return jax.nn.log_softmax(logits)

  old_TV, new_TV = logprobs(old_TD), logprobs(new_TD)
  chosen_T1 = tokens_T[1:, None]

  def nll(logprobs_TV):
    return -jnp.mean(jnp.take_along_axis(logprobs_TV, chosen_T1, axis=1))

  # Masked ids have no probability: their difference is set to 0, because it
  # would be a difference of infinite numbers.
  terms_TV = jnp.exp(old_TV) * (old_TV - new_TV)
  kl_T = jnp.sum(jnp.where(jnp.exp(old_TV) > 0, terms_TV, 0), axis=1)
  same_T = jnp.argmax(old_TV, axis=1) == jnp.argmax(new_TV, axis=1)
  return {
    'kl': jnp.mean(kl_T),
    'same_top1': jnp.mean(same_T),
    'nll': nll(old_TV),
    'nll_new': nll(new_TV),
  }
