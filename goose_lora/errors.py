"""What is wrong with what a user gave."""


class UserError(ValueError):
    """Say what is wrong, with the values, and the way out.

    A command ends in this one line and exit code 2. Any other exception is a bug of the program and
    shows its traceback.
    """


class FailedWriteError(UserError, OSError):
    """Say that a result could not be written or sent, what is kept, and the way out."""


class LostProcessError(UserError, ChildProcessError):
    """Say that another process of the run has died, and how to go on."""


class TimeLimitError(UserError, TimeoutError):
    """Say that something of the user's has not answered in the time that a setting allows."""
