"""Confines the process that calls it, before it runs a program of a stranger.

    limits of the kernel (setrlimit)   CPU time, memory, no file grows, no core
    seccomp                            system calls, see `syscalls.py`; required
    Landlock                           which files can be read
    a user and a network namespace     no other process, no network

Landlock and namespaces depend on the kernel and on the container. One of both
must be there: without them a program could read the memory and the environment
of the process that started it, through /proc.

References: landlock(7), user_namespaces(7), capabilities(7), prctl(2).
"""

from collections.abc import Sequence
import ctypes
import os
import resource
import signal
import struct
import sys

from evals.verifiers.sandbox import syscalls

_LIBC = ('/lib', '/lib64', '/usr/lib', '/usr/lib64')
_MORE = ('/usr/share/zoneinfo', '/dev/null', '/dev/urandom')
_MOST_FILES = 64  # files that are open at once

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CLONE_NEWIPC, _CLONE_NEWUSER = 0x08000000, 0x10000000
_CLONE_NEWNET = 0x40000000
_CAPABILITY_VERSION = 0x20080522  # from linux/capability.h
_CAPSET = {'x86_64': 126, 'aarch64': 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
# The rights of the first version of Landlock; later versions add rights to
# change files, which seccomp refuses anyway.
_RIGHTS, _READ_FILE, _READ_DIR = (1 << 13) - 1, 1 << 2, 1 << 3


def apply(
  *,
  parent: int,
  cpu_seconds: int,
  memory_bytes: int,
  readable: Sequence[str] = (),
) -> None:
  """Confines this process, which must have one thread only.

  Args:
    parent: id of the process that started this one; this process dies with it.
    readable: files and directories to read besides Python and its libraries.

  Raises:
    OSError: this kernel cannot confine it.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  if os.getppid() != parent:
    sys.exit('the process that asked for this one has died')
  for what, limit in (
    (resource.RLIMIT_CPU, cpu_seconds),
    (resource.RLIMIT_AS, memory_bytes),
    (resource.RLIMIT_NOFILE, _MOST_FILES),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_CORE, 0),
  ):
    resource.setrlimit(what, (limit, limit))
  libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
  if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
    raise OSError(ctypes.get_errno(), 'no_new_privs')
  flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
  is_apart = not libc.unshare(ctypes.c_int(flags))
  if not (_restrict_reading(libc, readable) or is_apart):
    raise OSError(
      0,
      'got a kernel without Landlock, on which namespaces of users are not'
      ' allowed either, expected one of both',
    )
  _drop_capabilities(libc)
  syscalls.install()


def _drop_capabilities(libc: ctypes.CDLL) -> None:
  """Gives up all capabilities; root then is an ordinary user."""
  header = struct.pack('Ii', _CAPABILITY_VERSION, 0)
  number = _CAPSET[os.uname().machine]
  if libc.syscall(number, header, struct.pack('6I', *[0] * 6)):
    raise OSError(ctypes.get_errno(), 'capset')


def _restrict_reading(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
  """Lets this process open only some files; returns whether Landlock exists.

  Raises:
    OSError: Landlock exists, and refuses a rule.
  """
  if libc.syscall(_LANDLOCK_CREATE, None, 0, _VERSION_FLAG) < 1:
    return False
  described = struct.pack('Q', _RIGHTS)
  rules = _checked(libc.syscall(_LANDLOCK_CREATE, described, 8, 0))
  for path in (sys.base_prefix, *_LIBC, *_MORE, *readable):
    try:
      opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
      continue  # not every system has all of them
    rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
    rule = struct.pack('=Qi', rights, opened)
    _checked(libc.syscall(_LANDLOCK_ADD, rules, _PATH_BENEATH, rule, 0))
    os.close(opened)
  _checked(libc.syscall(_LANDLOCK_RESTRICT, rules, 0))
  os.close(rules)
  return True


def _checked(result: int) -> int:
  if result < 0:
    code = ctypes.get_errno()
    raise OSError(code, f'landlock: {os.strerror(code)}')
  return result
