"""The versions of this program, its libraries and its device."""

import functools
import importlib.metadata
import platform
from typing import Any

import jax

from frozen import manifest as manifest_lib
from inference.server.records import database
from storage import code_commit


@functools.cache
def version() -> dict[str, Any]:
  """Returns the body of GET /version."""
  device = jax.local_devices()[0]
  commit = code_commit.find()
  return {
    # The project has no releases: a version is a commit.
    'version': commit[:12],
    'commit': commit,
    'python': platform.python_version(),
    'jax': importlib.metadata.version('jax'),
    'jaxlib': importlib.metadata.version('jaxlib'),
    'platform': device.platform,
    'device': device.device_kind,
    'num_devices': jax.local_device_count(),
    'formats': {
      'frozen': manifest_lib.FORMAT_VERSION,
      'records': database.FORMAT,
    },
  }
