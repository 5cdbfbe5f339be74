"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Something the user can mend: one sentence with what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1.
    """
