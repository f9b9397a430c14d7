"""Errors a user can act on. Each message says what, where, why and the remedy, in one line."""

LONGEST_MESSAGE = 2000


class AlphaQError(Exception):
    """Base of every error that is the input's or the user's; the command line exits with 2 on it.

    Messages quote what strangers wrote, so they are cut short and hold nothing that a terminal would obey.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 2 :]}"
        if not message.isprintable():
            message = "".join(char if char.isprintable() or char.isspace() else "\ufffd" for char in message)
        super().__init__(message)


class CheckpointError(AlphaQError):
    """A checkpoint is missing, damaged, or of a kind that cannot be read."""


class ArchitectureError(CheckpointError):
    """The model's architecture is unknown, or its files do not match what its config promises."""


class PassError(CheckpointError):
    """Tokens cannot pass through the model. reason: why, without the remedy, which depends on what the pass is for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason} Use --method alphaq, or another that needs no forward pass.")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.reason,)


class SpectrumError(AlphaQError):
    """A matrix has no defined tail exponent (too few positive eigenvalues, or not finite)."""


class StatsError(AlphaQError):
    """A stats file lacks columns or holds values that cannot be used."""


class ChoiceError(AlphaQError):
    """A storage choice is not one that the engine or the quantizer offers."""


class BudgetError(AlphaQError):
    """A budget is malformed, ambiguous or infeasible."""


class TooSmallError(BudgetError):
    """A budget is below the least that its choices take."""


class PlanError(AlphaQError):
    """A plan is malformed or does not fit the checkpoint it is used with."""


class QuantizationError(AlphaQError):
    """A matrix cannot be quantized (infinities, NaN, values beyond fp16 scales)."""


class OutputError(AlphaQError):
    """Output cannot be written: it exists, or the disk refuses."""


class VerificationError(AlphaQError):
    """Files on disk differ from what their plan and manifest promise."""


class UnknownNameError(AlphaQError):
    """A name is not in a registry; the message suggests the closest one."""


class WorkerError(AlphaQError):
    """A worker process died."""


class JournalError(AlphaQError):
    """A cache or an unfinished output is in use by another process."""


class DeviceError(AlphaQError):
    """A compute device is not there."""


class MissingEngineError(AlphaQError):
    """An engine that a folder is to be run in is not installed."""

    def __init__(self, engine: str, packages: str) -> None:
        self.given = engine, packages
        super().__init__(f"{engine} is not installed, so nothing can be run in it. Install it: pip install {packages}.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), self.given


class MissingExtraError(AlphaQError):
    """A package that only one of the extras brings is not installed."""

    def __init__(self, extra: str, why: str) -> None:
        self.given = extra, why
        super().__init__(f"{why}, which the plain install leaves out. Install it: pip install 'alphaq[{extra}]'.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), self.given  # a worker sends it by what it was made of


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
