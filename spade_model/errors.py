"""The one exception that means: the input is wrong, not the program."""


class UserError(Exception):
    """An error for the user: its message says what was wrong, where (file, index, value), and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
