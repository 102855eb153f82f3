"""One base class for every error a user can cause, one subclass per stage.

A message is one sentence: what is wrong, the value, the limit, and the remedy.
The command line prints it and exits with :data:`EXIT_BAD_INPUT`; nothing else catches it.
"""

EXIT_CHECK_FAILED = 1  # the command ran, and what it checked does not hold
EXIT_BAD_INPUT = 3  # an ImpqError: a file, value or machine that cannot serve


class ImpqError(Exception):
    """Base class of all errors that are the input's fault rather than the program's."""


class RecordError(ImpqError):
    """A record on disk is missing, malformed, of another schema, or cannot be written."""


class ModelError(ImpqError):
    """A checkpoint, its configuration or its tokenizer cannot be used."""


class DeviceError(ImpqError):
    """A device profile is unknown or malformed, or a model cannot fit the device."""


class BackendError(ImpqError):
    """A quantisation backend is missing or refuses the weights."""


class SensitivityError(ImpqError):
    """A sensitivity profile cannot be estimated, resumed or reused."""


class AllocationError(ImpqError):
    """No allocation meets the budget, or the solver failed."""


class ConversionError(ImpqError):
    """A GGUF cannot be written as asked."""


class ValidationError(ImpqError):
    """A GGUF cannot be loaded or run."""


class ReleaseError(ImpqError):
    """A release cannot be made, checked or published as asked."""
