"""Makes ``sibo_triton.kernels`` importable from a checkout, where its files live in the top-level folder ``kernels/``.

``setup.py`` maps that folder to the package ``sibo_triton.kernels``, but an interpreter that starts in the root of a
checkout finds ``sibo_triton/`` on its path before it asks any installer, and there the package has no such folder.
"""

from collections.abc import MutableSequence
from pathlib import Path


def append_repository_root(package_path: MutableSequence[str]) -> None:
    """Append the checkout's root to ``sibo_triton.__path__`` if that is where ``kernels/`` lies.

    Does nothing when the package has a ``kernels`` folder of its own (a regular install), when the root is already
    there, or when the folder above the package is no checkout of ours.

    Args:
        package_path: ``sibo_triton.__path__``; changed in place.
    """
    package = Path(package_path[0])
    root = package.parent
    if (package / "kernels").is_dir() or str(root) in package_path:
        return
    # In site-packages a sibling `kernels` would be Hugging Face's: only one beside our setup.py is ours.
    if (root / "setup.py").is_file() and (root / "kernels").is_dir():
        package_path.append(str(root))
