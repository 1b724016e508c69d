"""Checks of the fields of an EngineConfig that depend on each other."""

from typing import Any

from checks import expect


def drafts(config: Any) -> None:
  """Checks the sources of drafts.

  Raises:
    ValueError: a source is missing, or none uses it.
  """
  for kind, given in (
    ('model', config.draft_model),
    ('head', config.draft_head),
  ):
    if (config.speculation == kind) != bool(given):
      raise ValueError(
        f'engine.draft_{kind}: got {given or "none"} with speculation ='
        f' {config.speculation}, expected a directory with speculation = {kind}'
        ' and none otherwise; give both, or leave both out'
      )


def parts(config: Any) -> None:
  """Checks the parts into which a model is cut.

  Raises:
    ValueError: they do not fit the devices or the numerics.
  """
  if config.tensor_parts and config.numerics != 'invariant':
    raise ValueError(
      f'engine.tensor_parts: got {config.tensor_parts} with numerics ='
      f' {config.numerics}, expected 0; add --engine.numerics=invariant'
    )
  if config.num_parts % config.tensor:
    raise ValueError(
      f'engine.tensor: got {config.tensor} with invariant numerics, expected a'
      f' divisor of the {config.num_parts} parts of the model; change it or'
      ' engine.tensor_parts'
    )
  if config.num_parts % config.experts or (
    config.experts % config.tensor and config.tensor % config.experts
  ):
    of = 'parts of the model' if config.tensor_parts else 'devices'
    raise ValueError(
      f'engine.experts: got {config.experts}, expected a divisor of the'
      f' {config.num_parts} {of} (engine.tensor); change one of them'
    )


def prefill(config: Any) -> None:
  """Checks the engines that compute prompts.

  Raises:
    ValueError: the engine cannot take their pages.
  """
  expect.at_least('engine.prefill_engines', config.prefill_engines, 0)
  if not config.prefill_engines:
    return
  for name, is_wrong, expected in (
    ('prefix_cache', not config.prefix_cache, 'True: pages arrive by it'),
    ('page_size', not config.page_size, 'pages of a number of tokens'),
    (
      'speculation',
      config.speculation in ('model', 'head'),
      'off or ngram: drafts of a model need states of the prompt',
    ),
  ):
    if is_wrong:
      raise ValueError(
        f'engine.{name}: got {getattr(config, name)} with prefill_engines ='
        f' {config.prefill_engines}, expected {expected}; change one of them'
      )
