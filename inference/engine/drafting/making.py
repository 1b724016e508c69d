"""The part of an engine that drafts on the device: a model, or a head."""

from inference.engine import device_state, engine_config, execution
from inference.engine.compiled import programs as programs_lib
from inference.engine.drafting import draft_head, draft_model
from inference.engine.spread import placement as placement_lib

Weights = draft_model.Weights | draft_head.Weights
Source = draft_model.DraftModel | draft_head.DraftHead
_KINDS = {
  'model': ('draft model', draft_model.Weights),
  'head': ('draft head', draft_head.Weights),
}


def made(
  weights: Weights | None,
  config: engine_config.EngineConfig,
  placement: placement_lib.Placement,
  backend: execution.Backend,
) -> tuple[Source | None, execution.Backend]:
  """Returns the source of drafts on the device, and a backend with its room.

  Args:
    weights: that draft; None: the engine has no such source.
    config: of the engine.
    placement: of the engine.
    backend: of the model.

  Raises:
    ValueError: the weights are not of the kind that the config asks for, or see
      `draft_model.DraftModel`.
  """
  name, wanted = _KINDS.get(config.speculation, ('', type(None)))
  if not isinstance(weights, wanted):
    got = next(
      (kind for kind, of in _KINDS.values() if isinstance(weights, of)),
      'nothing that drafts',
    )
    expected = f'a {name}' if name else 'none'
    raise ValueError(
      f'engine.speculation: got {config.speculation!r} with {got}, expected'
      f' {expected}; give --engine.draft_model=DIR with model,'
      ' --engine.draft_head=DIR with head, or leave both out'
    )
  if weights is None:
    return None, backend
  if isinstance(weights, draft_head.Weights):
    head = draft_head.DraftHead(weights, config, placement, backend.execution)
    beside = head.bytes_per_token(backend.kv_dtype)
    return head, backend._replace(beside_bytes=beside)
  model = draft_model.DraftModel(weights, config, placement)
  return model, backend._replace(beside_bytes=model.bytes_per_token)


def num_bytes(source: Source | None) -> int:
  """Returns the bytes of the weights of a source, if there is one."""
  return source.num_bytes if source else 0


def digest(source: Source | None) -> str:
  """Returns the digest of the weights of a source, '' if there is none."""
  return source.digest if source else ''


def compile_now(
  source: Source | None,
  state: device_state.State,
  params: device_state.Params,
  programs: programs_lib.Programs,
  compile_all: bool,
) -> None:
  """Allocates what a source needs beside an engine, and compiles its programs.

  Args:
    source: None: does nothing.
    state: of the engine.
    params: shapes of its params.
    programs: of the engine.
    compile_all: False leaves the programs to `source.compile`.
  """
  if source:
    source.allocate(state, params, programs)
    source.compile(compile_all)
