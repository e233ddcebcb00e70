"""Walk the sources: every file once, loops and odd things named, memory flat in the number of files."""

# Plain strings: a Path for each of 10^6 files costs more than the look-up itself.
# ruff: noqa: PTH116, PTH118, PTH120, PTH206

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.errors import UsageError

#: Folders of version control are no part of an archive (git-annex keeps the content of linked files there).
NOT_WALKED = frozenset({".git", ".hg", ".svn"})


@dataclass(frozen=True, slots=True)
class Found:
    """One entry of a source.

    Attributes:
        source: Number of the source.
        path: Path relative to the source's root, as `path_text` gives it; `.` is the root itself.
        size: Bytes.
        mtime_ns: Time of the last change.
        code: Reason code if the entry cannot be read, else empty.
        detail: What was found.
    """

    source: int
    path: str
    size: int = 0
    mtime_ns: int = 0
    code: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """A folder, or one file in its folder.

    Attributes:
        root: Absolute folder that relative paths start from.
        only: Name of the single file, if the source is one.
    """

    root: Path
    only: str | None = None

    @property
    def path(self) -> Path:
        """Return the path the user named, made absolute."""
        return self.root if self.only is None else self.root / self.only


def resolve_sources(sources: Sequence[Path], out: Path) -> list[Source]:
    """Check the sources against each other and against the output.

    Raises:
        UsageError: If a source does not exist, is given twice, lies in another or in the output, or holds the output.
    """
    if not sources:
        raise UsageError("No source given: name at least one folder or file.")
    result: list[Source] = []
    target = out.resolve()
    for given in sources:
        try:
            path = given.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"The source {given} does not exist or cannot be reached. Check the path.") from error
        if target == path or path in target.parents:
            raise UsageError(
                f"--out {out} lies in the source {given}: choose a folder outside, so that it is not indexed itself."
            )
        if target in path.parents:
            raise UsageError(f"The source {given} lies in --out {out}: choose another --out.")
        for other in result:
            if path == other.path or path in other.path.parents or other.path in path.parents:
                raise UsageError(f"The sources {given} and {other.path} overlap: name the outer one only.")
        result.append(Source(path) if path.is_dir() else Source(path.parent, path.name))
    return result


def walk(source: Source, number: int, others: Sequence[Source] = ()) -> Iterator[Found]:
    """Yield every file below a source in the order of the folders' names.

    Links to files and folders are followed, unless what they point to is read at its own place anyway. Nothing is
    opened: pipes and devices cannot block.

    Args:
        source: What to walk.
        number: Its number.
        others: All sources: what lies in one of them is not read again through a link.
    """
    roots = [os.path.realpath(one.path) for one in (*others, source)]
    if source.only is not None:
        yield _file(source, number, source.only, roots)
        return
    entered: set[tuple[int, int]] = set()
    links: list[str] = []
    pending = [""]
    while pending or links:
        # Linked folders come last: what they share with true folders has then been read at its own place.
        folder = pending.pop() if pending else links.pop(0)
        where = os.path.join(source.root, folder)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in entered:
                yield Found(number, path_text(folder) or ".", code="linked_twice", detail="folder was read before")
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(where) as entries:
                names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            yield Found(number, path_text(folder) or ".", code=_code_of(error), detail=f"folder: {_reason(error)}")
            continue
        folders = []
        for name, is_folder in names:
            path = os.path.join(folder, name)
            if is_folder:
                if name not in NOT_WALKED:
                    folders.append(path)
                continue
            found = _file(source, number, path, roots)
            if found.code == "linked_folder":
                links.append(path)
            else:
                yield found
        pending.extend(reversed(folders))


def path_text(path: str) -> str:
    r"""Return a relative path as valid Unicode: bytes that are not UTF-8 become `\xNN`."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    return path


def absolute(root: Path, text: str) -> Path:
    """Return the file that a relative path of the manifest names.

    Args:
        root: The source's root.
        text: As `path_text` wrote it.
    """
    literal = root / text
    if "\\x" in text and not literal.exists():
        pieces = re.split(r"(\\x[0-9a-f]{2})", text)
        raw = b"".join(
            bytes([int(piece[2:], 16)]) if index % 2 else os.fsencode(piece) for index, piece in enumerate(pieces)
        )
        return root / os.fsdecode(raw)
    return literal


def _file(source: Source, number: int, path: str, roots: Sequence[str]) -> Found:
    where = os.path.join(source.root, path)
    text = path_text(path)
    try:
        status = os.lstat(where)
        if stat.S_ISLNK(status.st_mode):
            target = os.path.realpath(where, strict=True)
            status = os.stat(target)
            code = _link(where, target, stat.S_ISDIR(status.st_mode), roots)
            if code:
                return Found(number, text, code=code, detail="symbolic link")
    except OSError as error:
        return Found(number, text, code=_code_of(error), detail=_reason(error))
    if not stat.S_ISREG(status.st_mode):
        return Found(number, text, code="special_file", detail="socket, pipe or device")
    if status.st_size == 0:
        return Found(number, text, 0, status.st_mtime_ns, code="empty_file", detail="0 bytes")
    return Found(number, text, status.st_size, status.st_mtime_ns)


def _link(where: str, target: str, is_folder: bool, roots: Sequence[str]) -> str:
    place = os.path.realpath(os.path.dirname(where))
    if is_folder and (place == target or place.startswith(target.rstrip(os.sep) + os.sep)):
        return "symlink_loop"
    for root in roots:
        if target == root or target.startswith(root.rstrip(os.sep) + os.sep):
            inner = target[len(root) :].split(os.sep)
            if not NOT_WALKED.intersection(inner):
                return "linked_twice"
    return "linked_folder" if is_folder else ""


def _code_of(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "symlink_loop"
    if error.errno == errno.ENOENT:
        return "broken_link"
    return "unreadable"


def _reason(error: OSError) -> str:
    # The error's own text would name the whole path.
    return error.strerror or type(error).__name__
