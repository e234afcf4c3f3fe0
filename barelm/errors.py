"""What a script says to its user, and no traceback."""


class UserError(SystemExit):
    """Something the user can mend, told in one line: what, where, what to do. Unhandled: exit 1."""
