"""GET /: the page, and its files below /page/, before any key is asked for.

The files are plain text without a secret, so that no key is needed to load the
page. The page asks its user for a key and sends it with its own requests.

The content security policy lets the page load its own files only, and run no
script inside its text. An answer of a model is shown through DOM nodes; the
policy refuses every function that would parse text as HTML.

Reference: www.w3.org/TR/CSP3; www.w3.org/TR/trusted-types.
"""

import hashlib
import pathlib

from starlette import requests, responses

_DIRECTORY = pathlib.Path(__file__).parents[1] / 'page'
_INDEX = 'index.html'
_TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.svg': 'image/svg+xml',
}
_HEADERS = {
  'content-security-policy': '; '.join(
    (
      "default-src 'none'",
      "script-src 'self'",
      "style-src 'self'",
      "img-src 'self'",
      "connect-src 'self'",
      "base-uri 'none'",
      "form-action 'none'",
      "frame-ancestors 'none'",
      "require-trusted-types-for 'script'",
      "trusted-types 'none'",
    )
  ),
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  # A browser asks again each time, and gets 304 unless the file has changed:
  # after an update of the server, an old script is never mixed with a new page.
  'cache-control': 'no-cache',
}


class PageFiles:
  """ASGI middleware: answers GET and HEAD of the page; passes on the rest."""

  def __init__(self, app):
    """Reads the files, once."""
    self._app = app
    self._files = {
      '/' if path.name == _INDEX else f'/page/{path.name}': _File(path)
      for path in _DIRECTORY.iterdir()
      if path.suffix in _TYPES
    }

  async def __call__(self, scope, receive, send):
    answer = self._app
    is_read = scope['type'] == 'http' and scope['method'] in ('GET', 'HEAD')
    if is_read and (file := self._files.get(scope['path'])):
      answer = file.answer(requests.Request(scope))
    await answer(scope, receive, send)


class _File:
  """A file of the page, in memory."""

  def __init__(self, path: pathlib.Path):
    self._content = path.read_bytes()
    self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
    self._headers = {
      **_HEADERS,
      'etag': self._tag,
      'content-type': _TYPES[path.suffix],
    }

  def answer(self, request: requests.Request) -> responses.Response:
    """Returns the file, or 304 for a client that has it."""
    known = request.headers.get('if-none-match', '').split(',')
    if self._tag in (tag.strip().removeprefix('W/') for tag in known):
      return responses.Response(status_code=304, headers=self._headers)
    return responses.Response(self._content, headers=self._headers)
