"""The errors that a person can mend: the command line shows them as one line, without a traceback."""


class UserError(ValueError):
    """Bad input. The message is one line: which file or field, what is wrong, what to do."""
