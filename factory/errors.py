"""Every error a user can meet, and the exit code it ends with.

    FactoryError                     1   a bug of ours, if it has no better class
    ├── RecipeError                  2   the recipe, a path or an option is wrong
    ├── TooManyFailures              3   the run finished, but over its failure limit, or without a row
    ├── AuthError                    4   key missing or refused, TLS
    ├── BudgetError                  5   money, requests, tokens or hours are used up
    ├── IdentityError                6   the endpoint answers as another model
    ├── OutageError                  7   the provider cannot be reached
    ├── EngineError                  8   a local model (vLLM, transformers, trainer) failed
    ├── DiskError                    9   disk full, folder not writable
    ├── LockedError                 10   another process holds this journal
    ├── JournalError                11   the journal is damaged
    ├── VersionError                12   the journal was written by a newer factory
    ├── Waiting                     13   a batch is submitted; the same command again collects it
    └── NotReached                  14   the run is complete, but an evaluation's `require` is not met
    (signals.Interrupted: 129, 130, 143  hang-up, Ctrl-C or SIGTERM; the same command goes on)

A message says what is wrong, where, and what to do. The command line prints it without a traceback.
"""

import errno


class FactoryError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1


class RecipeError(FactoryError):
    """The recipe, one of its files or an option is wrong; nothing was sent."""

    exit_code = 2


class TooManyFailures(FactoryError):
    """The run ended, but more rows failed than the limit allows, or none is left."""

    exit_code = 3


class AuthError(FactoryError):
    """A key is missing or was refused, or the TLS certificate is not trusted."""

    exit_code = 4


class BudgetError(FactoryError):
    """The budget or the provider's quota is used up; the run can be resumed."""

    exit_code = 5


class IdentityError(FactoryError):
    """The endpoint does not serve the model that the recipe names."""

    exit_code = 6


class OutageError(FactoryError):
    """The endpoint cannot be reached; stored answers are safe, run again later."""

    exit_code = 7


class EngineError(FactoryError):
    """A local model or trainer process failed."""

    exit_code = 8


class DiskError(FactoryError):
    """The disk is full or the folder cannot be written."""

    exit_code = 9


_IN_THE_WAY = "something else stands in its place: move it away, or choose another folder"
_ADVICE = {
    errno.ENOSPC: "free some space, then run again",
    errno.EDQUOT: "free some of your quota, then run again",
    errno.EFBIG: "raise the limit on the size of files, then run again",
    errno.EACCES: "give yourself the right to it, or choose another folder",
    errno.EPERM: "give yourself the right to it, or choose another folder",
    errno.EROFS: "mount it writable, or choose another folder",
    errno.EIO: "look at the disk's health before you go on",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n), then run again",
    errno.ENFILE: "close other programs, then run again",
}


def disk_error(error: OSError, where: object = "") -> DiskError | None:
    """What the operating system refused, as an error for people; None if it is not about files and folders."""
    if error.errno not in _ADVICE:
        return None
    return DiskError(f"{error.filename or where or 'the run folder'}: {error.strerror}; {_ADVICE[error.errno]}")


class LockedError(FactoryError):
    """Another process holds the journal."""

    exit_code = 10


class JournalError(FactoryError):
    """The journal file is damaged."""

    exit_code = 11


class VersionError(FactoryError):
    """The journal was written by a newer version."""

    exit_code = 12


class Waiting(FactoryError):
    """A batch is submitted and not done yet; the same command again collects it and goes on."""

    exit_code = 13


class NotReached(FactoryError):
    """The run is complete, but its student does not reach what `evaluate: {require: ...}` asks of it."""

    exit_code = 14
