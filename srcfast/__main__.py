"""`python -m srcfast`."""

from srcfast.cli.app import app

app()
