"""Optional packages, and the extras that install them."""

EXTRAS = dict.fromkeys(
    ("tensorflow_datasets", "array_record", "importlib_resources"), "train"
)
"""Packages that only some commands need -> the extra that installs them."""


def install(extra: str) -> str:
    """Returns the commands that install an extra."""
    return (
        f"pip install 'anchor_jax[{extra}]' (in a checkout: pip install '.[{extra}]')"
    )


def explain(error: ModuleNotFoundError) -> str | None:
    """Returns a message about a missing optional package; None for other packages."""
    package = str(error.name).partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"the package {package} is missing: {install(EXTRAS[package])}"
