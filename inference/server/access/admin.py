"""Who may use the routes of an administrator.

With keys: a request whose key has the role admin. Without keys: a server that
listens on loopback alone. Then every program of this machine may, but no web
page that a browser of this machine shows: the Host of its requests is checked,
so that a foreign name which leads here is refused.
"""

import ipaddress

import fastapi

from inference.server.api import errors


def check(request: fastapi.Request, *, has_keys: bool, is_local: bool) -> None:
  """Refuses a request that may not administer the server.

  Args:
    request: any; its key is `request.state.key`, None where there are no keys.
    has_keys: whether requests need a key.
    is_local: whether the server listens on loopback alone.

  Raises:
    ApiError: status 403.
  """
  key = getattr(request.state, 'key', None)
  if key is not None:
    if key.is_admin:
      return
    fix = 'a key with the role admin'
  elif has_keys:
    fix = 'a key with the role admin'
  elif not is_local:
    fix = 'a server with API keys, or one that listens on 127.0.0.1'
  elif is_loopback(request.url.hostname or ''):
    return
  else:
    fix = 'the Host localhost or 127.0.0.1'
  raise errors.ApiError(
    403,
    f'{request.url.path}: got a request without the right to administer this'
    f' server, expected {fix}',
    param=None,
    code='not_admin',
  )


def is_loopback(host: str) -> bool:
  """Returns whether a host is this machine, as itself alone can reach it."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False
