"""The versions of other packages that peft_reft was run with: older and newer ones are refused, or warned of."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED = {  # from, and below
    "peft": ("0.21.0", "0.22"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.16", "5.25"),
    "trl": ("1.16", "1.17"),
}


def supported(package: str) -> str:
    """The supported range, as pip writes it.

    >>> supported("peft")
    'peft>=0.21.0,<0.22'
    """
    low, below = TESTED[package]
    return f"{package}>={low},<{below}"


def check_peft_version(installed: str) -> None:
    """Raise ImportError, with both versions, if this PEFT is not supported."""
    low, below = map(Version, TESTED["peft"])
    if not low <= Version(Version(installed).base_version) < below:
        raise ImportError(
            f"peft_reft supports {supported('peft')}, but peft {installed} is installed. "
            f'Install a supported one: pip install "{supported("peft")}"'
        )


def warn_of_untested_versions() -> None:
    """Say which installed version is newer than those that were tested."""
    for package in ("torch", "transformers", "trl"):
        try:
            installed = version(package)
        except PackageNotFoundError:  # trl is an extra
            continue
        low, below = TESTED[package]
        if Version(Version(installed).base_version) >= Version(below):
            warnings.warn(
                f"peft_reft was tested with {package} {low} to below {below}; {installed} is installed. If "
                f'something is wrong, try pip install "{package}<{below}".',
                stacklevel=2,
            )
