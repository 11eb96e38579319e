"""The one exception that means: the input is wrong, not the program."""


class UserError(Exception):
    """What was wrong, where (file, index, value), and what to do about it, in one message.

    The command line prints the message without a traceback and exits with status 2.
    """
