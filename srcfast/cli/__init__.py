"""The command line: what may be said (`app`), and what each command does."""
