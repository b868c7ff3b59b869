"""A directory that vanishes with the processes that see it. Linux only; standard library only.

Ray keeps named sockets in its session directory, and a SIGKILL of every process at once leaves nobody to remove them. So Ray is
started in a mount namespace of its own, with a tmpfs over that directory: the kernel drops both with the last process in it. It needs
root, or a user namespace; where neither is allowed (a container without CAP_SYS_ADMIN) the directory is an ordinary one, and the
reaper or the next `diptych` command removes it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_SLAVE = 2, 4, 1 << 14, 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def make_vanishing(directory: Path) -> bool:
    """Put a tmpfs over `directory` that only this process and its future children see; False if that is not allowed here.

    To be called while the process has one thread. A child tries first, as half a success could not be undone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            _enter(directory)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        return False
    _enter(directory)
    return True


def _enter(directory: Path) -> None:
    """Raises `OSError`."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", CLONE_NEWNS)
    else:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _call("mount", b"none", b"/", None, MS_REC | MS_SLAVE, None)  # the host's later mounts still come in; ours do not go out
    _call("mount", b"diptych", os.fsencode(directory), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=700")


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
