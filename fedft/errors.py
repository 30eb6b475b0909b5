"""The exceptions fedft raises for what a user, a site or a network can cause.

Each message is one line that names the key or file, the value found, what is allowed, and the remedy. Anything that is
not a `FedftError` is a bug in fedft.
"""


class FedftError(Exception):
    """Base of all of fedft's own exceptions."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, for a message of one line; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ConfigError(FedftError):
    """A run-config or node-config value has the wrong type, is out of range, or contradicts another."""


class PolicyError(FedftError):
    """A site's policy refuses the run, or cannot be used itself."""


class UsageError(FedftError):
    """A command was given options that it cannot work with."""


class FetchError(FedftError):
    """A built-in model or data set could not be fetched, verified or unpacked."""


class DataError(FedftError):
    """A data set cannot be read, has the wrong columns, or cannot be partitioned as asked."""


class ModelError(FedftError):
    """A base model cannot be loaded, or cannot carry the adapter asked for."""


class AdapterError(FedftError):
    """Adapter arrays have the wrong keys, shapes or types, or are not finite."""


class RunDirectoryError(FedftError):
    """A run directory cannot be written, read or found."""


class ResumeError(FedftError):
    """A run cannot be continued: it has nothing to continue from, does not match, or is still going on."""


class FederationError(FedftError):
    """Too few nodes connected, or too few usable replies came back."""


class RoundError(FederationError):
    """A round failed: too few usable replies came back. The next one may succeed."""


class NoFurtherRoundError(FedftError):
    """No further round may or can run; the run ends as stopped, its adapter saved."""


class LedgerError(FedftError):
    """The privacy ledger refuses an entry, or its saved state is damaged."""


class PlanError(FedftError):
    """A privacy plan has a value out of range, or is given too much or too little to be worked out."""


class AuditError(FedftError):
    """Counts or scores of a privacy audit are out of range."""
