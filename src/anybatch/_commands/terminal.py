"""What the commands share: one clear line and exit code 2 for whatever a user can get wrong."""

import typer


def words(text: str) -> list[str]:
    """The comma-separated words of an option, in lower case."""
    return [word.strip().lower() for word in text.split(",") if word.strip()]


def failed(message: str) -> typer.Exit:
    """To be raised: the message on standard error, exit code 2."""
    typer.echo(message, err=True)
    return typer.Exit(2)
