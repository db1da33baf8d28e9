"""The exceptions a user may meet. The command line prints one line for each and a traceback only with `--debug`.

SrppoError                  exit code 1
├── UserError               exit code 2: what is wrong, what was found, what is allowed, what to do
│   ├── ConfigError         an unknown or impossible setting
│   ├── DataError           demonstrations or prompts that cannot be read or used
│   ├── ModelError          a model or tokenizer that cannot be loaded or does not fit
│   └── RecordError         a run folder that belongs to another run, process or disk state
└── RunError                a run that began and did not finish
    ├── Diverged            non-finite loss, or KL beyond its limit; the last good checkpoint is kept
    ├── OutOfMemory         the device's memory did not suffice; the last checkpoint survives
    ├── StorageError        the disk is full or refuses to write; the last checkpoint survives
    ├── OtherEnded          another process of the run has ended; the last checkpoint survives
    └── Interrupted         stopped by Ctrl-C or SIGTERM after saving (exit code 130); the same command resumes
"""


class SrppoError(Exception):
    """Root of every error this package raises on purpose. The message is one line."""

    exit_code = 1


class UserError(SrppoError):
    """The user's mistake; nothing was started or lost."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown or impossible setting."""


class DataError(UserError):
    """Demonstrations or prompts that cannot be read or used."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded or does not fit."""


class RecordError(UserError):
    """A run folder that belongs to another run, another process, or is damaged."""


class RunError(SrppoError):
    """A run that began and did not finish."""


class Diverged(RunError):
    """Training left the region where its numbers mean anything. Carries the step and the reason in its message."""


class OutOfMemory(RunError):
    """The memory of the device did not suffice; the message says for what, and what helps."""


class StorageError(RunError):
    """Writing failed (disk full, quota, read-only); what was committed before is whole."""


class OtherEnded(RunError):
    """Another process of the same run has ended, and says itself why; what was saved before is whole."""


class Interrupted(RunError):
    """Stopped on request after the state was saved."""

    exit_code = 130
