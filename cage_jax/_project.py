"""The version, the addresses, and what to install where a package is missing."""

VERSION = "0.1.0"
REPOSITORY = "https://github.com/cage-jax/cage_jax"
DOCS = "https://cage-jax.readthedocs.io"


def install(extra: str) -> str:
    """Returns the sentence of an error that says how an extra is installed."""
    return (
        f'Run pip install "cage_jax[{extra}] @ git+{REPOSITORY}", or in a clone '
        f"pip install -e '.[{extra}]'."
    )


def missing(package: str, purpose: str, extra: str) -> ImportError:
    """Makes the error for a package that is not installed."""
    return ImportError(
        f"{purpose} needs the package {package}, which is not installed. "
        + install(extra)
    )
