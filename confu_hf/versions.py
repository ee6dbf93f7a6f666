"""What must be installed, and in which versions: looked at before anything is imported, with the standard library alone.

`setup.cfg` names the range that was tested. Inside of it nothing is said; outside, a warning; where the import fails
because something is missing or has lost a name, one line that says what to install.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import marked

TORCH = "tested with `pip install torch==2.13.0`; https://pytorch.org/get-started/locally has the builds for GPUs"


def warn_outside_tested_range(package: str) -> None:
    """Warn if a requirement of an installed `package` is not met: it was never run on what is there."""
    for message in outside_tested_range(package):
        warnings.warn(message, stacklevel=2)


def outside_tested_range(package: str) -> list[str]:
    """A sentence for every installed requirement of `package` in a version that it was never run on."""
    # Comes with Transformers. Here, and not above: without it `importing` has a better word than this line.
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires(package) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []  # a checkout that is not installed declares nothing
    found = []
    for requirement in requirements:
        if requirement.marker is not None:
            continue  # of an extra
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(
                f"{package}: got {requirement.name} {version}, tested with {requirement.name}{requirement.specifier}. "
                f'It may not work. Run `pip install "{requirement.name}{requirement.specifier}"`, '
                f"or install a newer {package}."
            )
    return found


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Around the imports of `package`: what fails there is told in one line that says what to install.

    Raises:
        ImportError: a package is missing, or one of a version that was never tested has lost a name.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == package:
            raise
        if missing == "torch":
            raise marked(
                ImportError(
                    f"{package} needs PyTorch, which is not installed. Install the build for your machine: {TORCH}."
                )
            ) from error
        _explain(package, error)
        if importlib.util.find_spec(missing) is not None:
            raise  # a part of what is installed
        raise marked(
            ImportError(
                f"{package} needs {missing}, which is not installed. Run `pip install {missing}`, or install {package} "
                "with pip, which brings it along."
            )
        ) from error
    except (ImportError, AttributeError) as error:
        _explain(package, error)
        raise


def _explain(package: str, error: Exception) -> None:
    """Raise in place of an error that versions outside of the tested range explain."""
    outside = outside_tested_range(package)
    if outside:
        raise marked(ImportError(f"{' '.join(outside)} (The import failed: {error})")) from error
