"""What an engine of several devices does not do yet, refused when it starts."""

from inference.engine import engine_config
from models import model_config


def check(
  config: engine_config.EngineConfig, model: model_config.ModelConfig
) -> None:
  """Refuses an engine that works on one device only.

  Args:
    config: of the engine.
    model: that it serves.

  Raises:
    ValueError: something of the config or of the model is not supported over
      several devices.
  """
  if found := problem(config, model):
    raise ValueError(found)


def problem(
  config: engine_config.EngineConfig, model: model_config.ModelConfig
) -> str | None:
  """Returns why an engine of several devices is refused, None if it works.

  Args:
    config: of the engine.
    model: that it serves.
  """
  if config.num_parts == 1:
    return None
  if found := _of_config(config) or _of_model(config, model):
    got, expected = found
    return f'engine.tensor: got {config.tensor} and {got}, expected {expected}'
  return None


def _of_config(config: engine_config.EngineConfig) -> tuple[str, str] | None:
  if config.native == 'on':
    # A CPU is one device in real use. Devices that XLA makes of one CPU share
    # its cores, which a native product takes all by itself.
    return (
      'engine.native = on',
      'off: native products compute on one device, as a CPU is, and take all of'
      ' its cores; leave it out',
    )
  return None


def _of_model(
  config: engine_config.EngineConfig, model: model_config.ModelConfig
) -> tuple[str, str] | None:
  if model.expert_width % config.num_parts:
    return (
      f'experts of width {model.expert_width}',
      'a divisor of the width; choose another number of devices',
    )
  if config.experts > 1 and not model.num_experts:
    return (
      f'engine.experts = {config.experts} of a model without experts',
      '1; leave it out',
    )
  if model.num_experts % config.experts:
    return (
      f'engine.experts = {config.experts} of {model.num_experts} experts',
      'a divisor of their number; choose another one',
    )
  return None
