"""Receipts: the data that a replay of an answer needs, in the server's records.

A receipt is of one sequence: the ids of its prompt, its settings and seed, the
ids that it answered with their log-probabilities, and the version. The id of a
request, `x-request-id`, and the id of its answer have the same digits; these
name the receipts of its choices.

Prompts are private. Receipts are off unless the operator asks for them, and on
a server with keys they must be sealed.
"""

from collections.abc import Sequence
import dataclasses
import json
import logging
import re
import sqlite3
import time
from typing import Any
import zlib

from inference.constraints import constraint as constraint_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.server import service
from inference.server.http import exchanges
from inference.server.receipts import sealing
from inference.server.records import database
from inference.server.versions import fingerprint

FORMAT = 1
TABLES = """
CREATE TABLE IF NOT EXISTS receipts (
  request TEXT NOT NULL,  -- the digits of the id of the request
  choice INTEGER NOT NULL,
  created REAL NOT NULL,  -- seconds since 1970
  is_sealed INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (request, choice)
) STRICT, WITHOUT ROWID;
"""

_LOG = logging.getLogger('uvicorn.error')
_DIGITS = re.compile(r'(?:\w+[-_])?([0-9a-f]{32})')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
  """The data that a replay of one sequence needs."""

  format: int = FORMAT
  request_id: str
  choice: int  # its number in the answer
  version: str  # NAME@DIGEST
  fingerprint: str
  digests: dict[str, str]  # see `versions.fingerprint`
  numerics: dict[str, str]
  prompt_ids: tuple[int, ...]
  target: int | None  # see `Request.target`
  settings: settings_lib.Settings
  seed: int  # of this sequence
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # of token_ids
  finish_reason: str
  num_cached: int  # prompt tokens that were read from the prefix cache
  num_preemptions: int

  def packed(self) -> bytes:
    """Returns the receipt as compressed JSON."""
    return zlib.compress(json.dumps(dataclasses.asdict(self)).encode())


def unpacked(data: bytes) -> Receipt:
  """Returns a receipt that was packed.

  Raises:
    ValueError: it is damaged, or of another format.
  """
  try:
    fields: dict[str, Any] = json.loads(zlib.decompress(data))
    if fields['format'] != FORMAT:
      raise ValueError(
        f'receipt: got format {fields["format"]}, expected {FORMAT}; use the'
        ' code that wrote it'
      )
    settings = fields.pop('settings')
    for name in ('stop', 'stop_ids'):
      settings[name] = tuple(settings[name])
    settings['logit_bias'] = tuple(map(tuple, settings['logit_bias']))
    settings['constraint'] = _constraint(settings.get('constraint'))
    for name in ('prompt_ids', 'token_ids', 'logprobs'):
      fields[name] = tuple(fields[name])
    return Receipt(**fields, settings=settings_lib.Settings(**settings))
  except (zlib.error, KeyError, TypeError, UnicodeDecodeError) as error:
    raise ValueError(
      f'receipt: got one that cannot be read ({error}), expected a whole one'
    ) from error


def _constraint(
  fields: dict[str, Any] | None,
) -> constraint_lib.Constraint | None:
  if fields is None:
    return None
  thought = fields.pop('thought')
  return constraint_lib.Constraint(
    **fields, thought=thought and constraint_lib.Thought(**thought)
  )


def digits(text: str) -> str:
  """Returns the digits of the id of a request or of its answer.

  Raises:
    ValueError: it is no such id.
  """
  if not (found := _DIGITS.fullmatch(text.strip())):
    raise ValueError(
      f'id: got {text!r}, expected one such as req_ and 32 hex digits, the'
      ' x-request-id or the id of an answer'
    )
  return found[1]


def find(
  connection: sqlite3.Connection, request: str, seal: sealing.Seal | None
) -> list[Receipt]:
  """Returns the receipts of a request, by choice.

  Args:
    connection: connection to the records.
    request: digits of its id.
    seal: opens sealed receipts.

  Raises:
    ValueError: the receipts are sealed and there is no seal, or another seal.
  """
  rows = connection.execute(
    'SELECT body, is_sealed FROM receipts WHERE request = ? ORDER BY choice',
    (request,),
  ).fetchall()
  found = []
  for body, is_sealed in rows:
    if is_sealed and seal is None:
      raise ValueError(
        'key_file: got none, expected the key that sealed the receipt; add'
        ' --key_file=FILE'
      )
    found.append(unpacked(seal.open(body) if is_sealed and seal else body))
  return found


class Recorder:
  """Observes models, and writes a receipt of each finished sequence."""

  def __init__(self, records: database.Database, seal: sealing.Seal | None):
    """Takes the records, opened with `TABLES`, and the seal if there is one."""
    self._records, self._seal = records, seal

  def observe(
    self,
    model: service.ServedModel,
    requests: Sequence[requests_lib.Request],
  ) -> service.OnFinished | None:
    """Returns the function that writes a receipt of each finished sequence."""
    exchange, generator = exchanges.current(), model.generator()
    if exchange.principal and self._seal is None:
      return None  # a key was made while the server ran
    digests = fingerprint.digests(model.manifest, generator, model.adapter)
    common = {
      'request_id': exchange.request_id,
      'version': f'{model.name}@{model.digest}',
      'fingerprint': fingerprint.of(generator),
      'digests': digests,
      'numerics': fingerprint.numerics(generator),
    }

    def write(
      which: int, index: int, completion: requests_lib.Completion
    ) -> None:
      request = requests[which]
      receipt = Receipt(
        **common,
        choice=which * request.settings.n + index,
        prompt_ids=request.prompt_ids,
        target=request.target,
        settings=request.settings,
        seed=completion.seed,
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(each.chosen for each in completion.logprobs or ()),
        finish_reason=completion.finish_reason,
        num_cached=completion.usage.cached_tokens,
        num_preemptions=completion.usage.preemptions,
      )
      self._records.submit(self._insert, receipt).add_done_callback(_report)

    return write

  def _insert(self, connection: sqlite3.Connection, receipt: Receipt) -> None:
    body = receipt.packed()
    connection.execute(
      'INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?)',
      (
        digits(receipt.request_id),
        receipt.choice,
        time.time(),
        self._seal is not None,
        self._seal.close(body) if self._seal else body,
      ),
    )


def _report(done) -> None:
  if error := done.exception():
    _LOG.error('a receipt was not written', exc_info=error)
