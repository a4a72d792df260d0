"""`python -m srcfast`."""

from srcfast.cli import app

app()
