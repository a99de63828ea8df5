"""The error a user can mend: printed as one line with its cure, exit code 2, no stack trace."""


class UserError(ValueError):
    """A mistake in flags, files or machine set-up; the message names the cure."""
