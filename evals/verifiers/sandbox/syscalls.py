"""The system calls that a confined program may make, as a filter of the kernel.

The list is of allowed calls: computing, memory, threads of its own, reading
files, and reading and writing open files. All other calls fail with EPERM, also
calls that later kernels add: processes, programs, sockets, signals to others,
every change of a file.

References: seccomp(2); linux/filter.h and linux/seccomp.h for the numbers of
the instructions; the system call tables of the kernel for x86-64 and aarch64.
"""

import ctypes
import errno
import os
import struct

# machine -> (AUDIT_ARCH of linux/audit.h, column of the table)
_MACHINES = {'x86_64': (0xC000003E, 0), 'aarch64': (0xC00000B7, 1)}
_X32 = 0x40000000  # numbers of x86-64's second set of calls, with other types

# Numbers on x86-64 and aarch64; -1: there is no such call.
_ALLOWED = {
  'read': (0, 63), 'write': (1, 64), 'close': (3, 57), 'stat': (4, -1),
  'fstat': (5, 80), 'lstat': (6, -1), 'poll': (7, -1), 'lseek': (8, 62),
  'mmap': (9, 222), 'mprotect': (10, 226), 'munmap': (11, 215),
  'brk': (12, 214), 'rt_sigaction': (13, 134), 'rt_sigprocmask': (14, 135),
  'rt_sigreturn': (15, 139), 'pread64': (17, 67), 'readv': (19, 65),
  'writev': (20, 66), 'access': (21, -1), 'select': (23, -1),
  'sched_yield': (24, 124), 'mremap': (25, 216), 'madvise': (28, 233),
  'dup': (32, 23), 'nanosleep': (35, 101), 'alarm': (37, -1),
  'setitimer': (38, 103), 'getpid': (39, 172), 'exit': (60, 93),
  'uname': (63, 160), 'getcwd': (79, 17), 'readlink': (89, -1),
  'gettimeofday': (96, 169), 'getrlimit': (97, 163), 'getrusage': (98, 165),
  'sysinfo': (99, 179), 'times': (100, 153), 'getuid': (102, 174),
  'getgid': (104, 176), 'geteuid': (107, 175), 'getegid': (108, 177),
  'getppid': (110, 173), 'sigaltstack': (131, 132), 'gettid': (186, 178),
  'futex': (202, 98), 'sched_getaffinity': (204, 123),
  'getdents64': (217, 61), 'set_tid_address': (218, 96),
  'restart_syscall': (219, 128), 'fadvise64': (221, 223),
  'clock_gettime': (228, 113), 'clock_getres': (229, 114),
  'clock_nanosleep': (230, 115), 'exit_group': (231, 94),
  'newfstatat': (262, 79), 'readlinkat': (267, 78), 'faccessat': (269, 48),
  'pselect6': (270, 72), 'ppoll': (271, 73), 'set_robust_list': (273, 99),
  'pipe2': (293, 59), 'getrandom': (318, 278), 'membarrier': (324, 283),
  'statx': (332, 291), 'rseq': (334, 293), 'faccessat2': (439, 439),
}  # fmt: skip
# Allowed for some values of one argument: see `_conditions`.
_OPEN, _OPENAT, _IOCTL, _FCNTL = (2, -1), (257, 56), (16, 29), (72, 25)
_CLONE, _CLONE3 = (56, 220), (435, 435)
_TGKILL, _PRLIMIT = (234, 131), (302, 261)

_CLONE_THREAD = 0x10000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_TMPFILE, the same on both machines.
_WRITES = 0o3 | 0o100 | 0o1000 | 0o20000000
# TCGETS, FIOCLEX, FIONCLEX, FIONREAD.
_IOCTLS = (0x5401, 0x5451, 0x5450, 0x541B)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no command that
# lets the kernel send signals to another process.
_FCNTLS = (0, 1, 2, 3, 4, 1030)

# Instructions of classic BPF (linux/filter.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _FAIL = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # places in struct seccomp_data

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_Instruction = tuple[int, int, int, int]  # code, jump if true, if false, value


def refusal() -> str:
  """Returns why this machine has no such filter; '' if it has one."""
  system, machine = os.uname().sysname, os.uname().machine
  if system == 'Linux' and machine in _MACHINES:
    return ''
  return f'got {system} on {machine}, expected Linux on x86_64 or aarch64'


def install() -> None:
  """Confines this process, for ever. It must have one thread only.

  Raises:
    OSError: the kernel refuses the filter.
  """
  program = b''.join(
    struct.pack('HBBI', *each)
    for each in filter_of(os.uname().machine, os.getpid())
  )
  buffer = ctypes.create_string_buffer(program, len(program))
  # struct sock_fprog: the number of instructions, and where they are.
  described = struct.pack(
    'HxxxxxxP', len(program) // 8, ctypes.addressof(buffer)
  )
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0):
    code = ctypes.get_errno()
    raise OSError(code, f'seccomp: {os.strerror(code)}')


def filter_of(machine: str, pid: int) -> list[_Instruction]:
  """Returns the filter of a process, as instructions of classic BPF."""
  arch, column = _MACHINES[machine]
  found = [
    (_LOAD, 0, 0, _ARCH),
    (_EQUAL, 1, 0, arch),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, _NUMBER),
    (_AT_LEAST, 0, 1, _X32),
    (_RETURN, 0, 0, _KILL),
  ]
  for numbers in _ALLOWED.values():
    found += _if_number(numbers[column], [(_RETURN, 0, 0, _ALLOW)])
  for numbers, body in _conditions(pid):
    found += _if_number(numbers[column], body)
  return [*found, _failing(errno.EPERM)]


def _conditions(pid: int) -> list[tuple[tuple[int, int], list[_Instruction]]]:
  """Returns the calls that depend on an argument."""
  return [
    (_OPEN, _unless_bits(1, _WRITES)),
    (_OPENAT, _unless_bits(2, _WRITES)),
    (_IOCTL, _if_among(1, _IOCTLS)),
    (_FCNTL, _if_among(1, _FCNTLS)),
    # A new thread, no new process. clone3 has its flags in memory, where a
    # filter cannot look: libc falls back to clone.
    (
      _CLONE,
      [
        (_LOAD, 0, 0, _place(0)),
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        _failing(errno.EPERM),
      ],
    ),
    (_CLONE3, [_failing(errno.ENOSYS)]),
    (_TGKILL, _if_among(0, (pid,))),  # abort() signals its own process
    (  # limits may be read: the pointer to new ones is null, in both halves
      _PRLIMIT,
      [
        (_LOAD, 0, 0, _place(2)),
        (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _place(2) + 4),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        _failing(errno.EPERM),
      ],
    ),
  ]


def _place(argument: int) -> int:
  """Returns the place of an argument's low half; both are little-endian."""
  return _ARGUMENTS + 8 * argument


def _failing(code: int) -> _Instruction:
  return (_RETURN, 0, 0, _FAIL | code)


def _if_number(number: int, body: list[_Instruction]) -> list[_Instruction]:
  """Returns a body that is skipped for other numbers; it ends in a return."""
  return [(_EQUAL, 0, len(body), number), *body] if number >= 0 else []


def _unless_bits(argument: int, bits: int) -> list[_Instruction]:
  return [
    (_LOAD, 0, 0, _place(argument)),
    (_ANY_BIT, 1, 0, bits),
    (_RETURN, 0, 0, _ALLOW),
    _failing(errno.EPERM),
  ]


def _if_among(argument: int, values: tuple[int, ...]) -> list[_Instruction]:
  count = len(values)
  return [
    (_LOAD, 0, 0, _place(argument)),
    *((_EQUAL, count - i, 0, value) for i, value in enumerate(values)),
    _failing(errno.EPERM),
    (_RETURN, 0, 0, _ALLOW),
  ]
