"""The one exception that means "the caller can mend this"."""


class UserError(ValueError):
    """Bad input, told in one sentence: who, what was expected, what came, how to mend it.

    The command line prints the sentence and exits with code 2; the library lets it pass to the caller.
    """
