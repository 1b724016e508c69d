"""A copy of a run's metrics at Weights & Biases: --wandb=PROJECT.

The mirror reads metrics.jsonl, the source of truth, and sends new records from
a thread while the run trains. So neither the loop nor a step waits for a
network, and an error of the service never ends a run. `wandb.json` in the
workdir notes the records that were sent: a resumed run continues the same W&B
run, and sends no step twice. The mode is W&B's own: WANDB_MODE=offline writes
below WORKDIR/wandb, for `wandb sync`.

`pip install -r requirements-wandb.txt` installs the library, which is imported
only with the flag.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import secrets
import threading
from typing import Any

from frozen import run_record
from storage import atomic, file_names, json_lines

HELP = (
  'Also sends the metrics to this project at Weights & Biases, PROJECT or'
  ' TEAM/PROJECT. WANDB_MODE=offline keeps them in the workdir. Empty'
  ' (default): nothing is sent.'
)
STATE = 'wandb.json'
_SECONDS = 10.0  # between two reads of metrics.jsonl
# Modes in which no key is needed.
_LOCAL = ('offline', 'dryrun', 'disabled')


def library(project: str) -> Any:
  """Returns W&B's library, logged in.

  Args:
    project: value of --wandb.

  Raises:
    ValueError: it is not installed, the project has no name, or there is no
      key.
  """
  try:
    import wandb  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError:
    raise ValueError(
      f'--wandb={project}: got no wandb, expected it to be installed; run pip'
      ' install -r requirements-wandb.txt'
    ) from None
  parts = project.split('/')
  if len(parts) > 2 or not all(parts):
    raise ValueError(
      f'--wandb: got {project!r}, expected PROJECT or TEAM/PROJECT'
    )
  if os.environ.get('WANDB_MODE') not in _LOCAL:
    try:
      # Logs in here, where it may ask, and not in a thread minutes later.
      is_known = wandb.login()
    except Exception as error:  # W&B's own classes, and network errors
      raise _no_key(project, f' ({_one_line(error)})') from None
    if not is_known:
      raise _no_key(project, '')
  return wandb


def _no_key(project: str, reason: str) -> ValueError:
  return ValueError(
    f'--wandb={project}: got no key of W&B{reason}, expected one; run wandb'
    ' login, or set WANDB_API_KEY or WANDB_MODE=offline'
  )


class Mirror:
  """Sends the records of one run; opened by the first of them."""

  def __init__(
    self,
    workdir: pathlib.Path,
    project: str,
    wandb: Any,
    *,
    name: str = '',
    group: str = '',
  ):
    """Sends nothing yet.

    Args:
      workdir: workdir of the run; it need not exist.
      project: PROJECT or TEAM/PROJECT.
      wandb: result of `library`.
      name: name of the run at W&B; '': the name of the workdir.
      group: group of the run at W&B; each trial of a sweep is a group.
    """
    self._workdir = workdir
    self._project = project
    self._wandb = wandb
    self._name = name or workdir.absolute().name
    self._group = group
    self._run: Any = None
    self._id = ''
    self._sent: dict[str, int] = {}  # last step by kind
    self._file = (0, 0)  # inode and bytes of metrics.jsonl that were read

  def sync(self) -> int:
    """Sends the records that are new; returns how many.

    Raises:
      Exception: an error of W&B, or of a file. No record is lost: all are sent
        the next time.
    """
    if not (self._workdir / file_names.RUN).exists():
      return 0
    if self._run is None:
      self._run = self._open()
    run: Any = self._run
    records, file = self._new_records()
    sent, count = dict(self._sent), 0
    for record in records:
      kind, step = record['kind'], record['step']
      values = {
        f'{kind}/{key}': value
        for key, value in record.items()
        if key not in ('kind', 'step') and isinstance(value, int | float)
      }
      if step <= self._sent.get(kind, -1) or not values:
        continue
      # `step` is sent as a value: W&B's own step must not go back, but kinds
      # of records alternate.
      run.log({'step': step, **values})
      sent[kind] = max(step, sent.get(kind, -1))
      count += 1
    self._file = file
    if sent != self._sent:
      self._sent = sent
      self._save()
    return count

  def close(self, exit_code: int = 0) -> None:
    """Ends the W&B run, if one was opened; it can be resumed."""
    if self._run is not None:
      self._run.finish(exit_code=exit_code)
      self._run = None

  def _open(self) -> Any:
    path = self._workdir / STATE
    try:
      state = json.loads(path.read_text())
      if state['project'] == self._project:
        self._id, self._sent = state['id'], state['sent']
    except (OSError, ValueError, KeyError, TypeError):
      pass  # no state, or a damaged one: the run is sent again, as a new one
    self._id = self._id or secrets.token_hex(4)
    entity, _, project = self._project.rpartition('/')
    run = self._wandb.init(
      project=project,
      entity=entity or None,
      id=self._id,
      resume='allow',
      name=self._name,
      group=self._group or None,
      config=run_record.read(self._workdir)['config'],
      dir=str(self._workdir),
    )
    run.define_metric('*', step_metric='step')
    self._save()
    return run

  def _save(self) -> None:
    state = {'project': self._project, 'id': self._id, 'sent': self._sent}
    atomic.write_text(self._workdir / STATE, json.dumps(state) + '\n')

  def _new_records(self) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Returns the new records, and the position in the file after them."""
    path = self._workdir / file_names.METRICS
    if not path.exists():
      return [], self._file
    with path.open('rb') as file:
      status = os.fstat(file.fileno())
      inode, start = self._file
      # Another file, or a shorter one: the run went back to a checkpoint.
      if status.st_ino != inode or status.st_size < start:
        start = 0
      file.seek(start)
      data = file.read()
    whole = data[: data.rfind(b'\n') + 1]
    lines = whole.split(b'\n')[:-1]
    # The run itself reports damaged lines.
    records, _ = json_lines.parse(lines, ('kind', 'step'))
    return records, (status.st_ino, start + len(whole))


@contextlib.contextmanager
def following(
  workdir: pathlib.Path,
  project: str,
  tell: Callable[[str], None],
  seconds: float = _SECONDS,
) -> Iterator[None]:
  """Mirrors a run while the block trains it.

  Args:
    project: PROJECT or TEAM/PROJECT; '': nothing is sent.
    tell: receives a line if sending begins to fail.
    seconds: seconds between two reads of the file.

  Raises:
    ValueError: raised by `library`, before the block begins.
  """
  if not project:
    yield
    return
  mirror = Mirror(workdir, project, library(project))
  is_over = threading.Event()
  told = threading.Event()

  def attempt(do: Callable[[], Any]) -> None:
    try:
      do()
    except Exception as error:  # of any kind: the run continues
      if not told.is_set():
        told.set()
        tell(
          f'--wandb={project}: got {_one_line(error)}; the run goes on, and the'
          ' next start sends the records that are missing'
        )

  def follow() -> None:
    while not is_over.wait(seconds):
      attempt(mirror.sync)

  thread = threading.Thread(target=follow, name='wandb', daemon=True)
  thread.start()
  code = 1
  try:
    yield
    code = 0
  finally:
    is_over.set()
    thread.join()
    attempt(mirror.sync)
    attempt(lambda: mirror.close(code))


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'
