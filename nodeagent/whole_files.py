"""Files that are replaced as a whole: nobody sees one half written, also after a crash of the host."""

import os
from pathlib import Path
from typing import Final

# As `open` creates files; the umask takes from it.
_FOR_ALL: Final = 0o666
_FOR_OWNER: Final = 0o600


def replace_file(file: Path, content: bytes, *, private: bool = False, like: Path | None = None) -> None:
    """Write the content under another name, wait until the disk has it, and give it the file's name. Blocks; raises
    OSError.

    Only the agent's own user can read a `private` file. Made by root, it belongs to the owner of `like`, if that is
    given.
    """
    scratch = file.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    mode = _FOR_OWNER if private else _FOR_ALL
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    if like is not None and os.geteuid() == 0:
        owner = like.stat()
        os.chown(scratch, owner.st_uid, owner.st_gid)
    scratch.replace(file)
