"""What is wrong with what a user gave."""


class UserError(ValueError):
    """Say what is wrong, with the values, and the way out.

    A command ends in this one line and exit code 2. Any other exception is a bug of the program and
    shows its traceback.
    """
