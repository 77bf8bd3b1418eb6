"""The one error that is the user's to mend."""


class PlaitError(ValueError):
    """Bad input: a file, a key or a value that the user can mend.

    The message is one line that names the file or field, the reason and the mend. The command line prints it
    without a traceback and exits with code 2.
    """
