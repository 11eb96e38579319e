"""The exception for errors in the user's input."""


class UserError(Exception):
    """An error in the user's input. Its message says what is wrong, where (file, index, value), and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
