"""Pseudonyms: keyed hashes (HMAC-SHA256, RFC 2104) in place of identities, and the split of patients that follows.

A bare hash of a hospital number can be found again by trying all numbers; a keyed one cannot without the key. The key
is made once per user (`~/.config/medssl/pseudonym.key`, or `$XDG_CONFIG_HOME`) and copied into `INDEX/private/`: one
patient has one pseudonym and one side of the split in every index that a user makes. `--key-file` and the variable
`MEDSSL_KEY_FILE` name another one, for example from a secret's mount; that one is never copied.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from medssl.errors import UsageError

KEY_BYTES = 32
KEY_VARIABLE = "MEDSSL_KEY_FILE"
#: Share of patients held out for validation. A patient's side depends on the key and the patient alone.
VALIDATION_SHARE = 0.1
# 20 base32 characters are 100 bits: no two of 10^9 volumes meet by chance (birthday bound 4e-13).
_TEXT_LENGTH = 20

logger = logging.getLogger(__name__)


class Pseudonyms:
    """Turns identities into keys.

    Args:
        key: The secret, at least 16 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, *identity: str) -> str:
        """Return the pseudonym of an identity: 20 lower-case letters and digits, the first one a letter.

        Args:
            kind: What is named (`patient`, `study`, `series`, `volume`): equal texts of two kinds differ.
            identity: Its parts; the borders between them count.
        """
        # Base32 may begin with a digit; SQL, file names and nnU-Net case names are happier with a letter.
        return kind[0] + base64.b32encode(self._digest(kind, *identity)).decode().lower()[: _TEXT_LENGTH - 1]

    def split(self, patient_key: str) -> str:
        """Return `train` or `validation` for a patient; patients added later never move the old ones."""
        number = int.from_bytes(self._digest("split", patient_key)[:8], "big") / 2**64
        return "validation" if number < VALIDATION_SHARE else "train"

    @property
    def fingerprint(self) -> str:
        """Return what tells two keys apart without giving either away."""
        return self.of("fingerprint")

    def _digest(self, *parts: str) -> bytes:
        # Each part is preceded by its length, so that ("ab", "c") and ("a", "bc") differ.
        encoded = (part.encode("utf-8", "surrogatepass") for part in parts)
        message = b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
        return hmac.new(self._key, message, hashlib.sha256).digest()


def open_key(private: Path, key_file: Path | None) -> Pseudonyms:
    """Find or make the key of an index.

    In this order: `key_file`, the file that `MEDSSL_KEY_FILE` names, the copy in `private`, the user's own key. A file
    that does not exist is made, readable by its owner only.

    Args:
        private: `INDEX/private`.
        key_file: Value of `--key-file`.

    Raises:
        UsageError: If a key file cannot be read or made, or is too short to be a secret.
    """
    named = key_file or (Path(os.environ[KEY_VARIABLE]) if os.environ.get(KEY_VARIABLE) else None)
    if named is not None:
        return Pseudonyms(_read(named) if named.exists() else _make(named))
    copy = private / "key"
    if not copy.exists():
        _write(copy, _user_key())
    return Pseudonyms(_read(copy))


def open_user_key() -> Pseudonyms:
    """Return the pseudonyms of `MEDSSL_KEY_FILE` or of the user's own key, where no index is made.

    Without either (a read-only home) the names are a hash of the UIDs with no secret: the same each time, and no more
    than a UID itself tells.

    Raises:
        UsageError: If the key file that is named cannot be used.
    """
    if os.environ.get(KEY_VARIABLE):
        named = Path(os.environ[KEY_VARIABLE])
        return Pseudonyms(_read(named) if named.exists() else _make(named))
    try:
        return Pseudonyms(_read(user_key_path()) if user_key_path().exists() else _make(user_key_path()))
    except UsageError:
        return Pseudonyms(b"no secret: names of series")


def user_key_path() -> Path:
    """Return where the user's own key lies."""
    configuration = os.environ.get("XDG_CONFIG_HOME")
    folder = Path(configuration) if configuration else Path(os.path.expanduser("~")) / ".config"  # noqa: PTH111
    # os.path.expanduser, unlike Path.home, does not raise where the user id has no name (containers).
    return folder / "medssl" / "pseudonym.key"


def _user_key() -> bytes:
    path = user_key_path()
    try:
        return _read(path) if path.exists() else _make(path)
    except UsageError as error:
        # A read-only home is no reason to fail: this index then has a key of its own.
        logger.warning("No key of the user (%s): the index gets one of its own.", error)
        return secrets.token_bytes(KEY_BYTES)


def _make(path: Path) -> bytes:
    key = secrets.token_bytes(KEY_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, key)
    except FileExistsError:
        return _read(path)  # another process was faster
    except OSError as error:
        raise UsageError(
            f"The key file {path} cannot be made: {error.strerror}. Name another with --key-file."
        ) from error
    return key


def _write(path: Path, key: bytes) -> None:
    # The name appears with its whole content, at once: a link to a finished file.
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(key.hex() + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"The key file {path} cannot be read: {error.strerror}. Check --key-file.") from error
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except (UnicodeDecodeError, ValueError):
        key = content  # any secret of a vault will do
    if len(key) < 16:
        raise UsageError(f"The key file {path} holds {len(key)} bytes; a secret needs at least 16.")
    if path.stat().st_mode & 0o077:
        logger.warning("The key file %s can be read by others: chmod 600 it.", path)
    return key
