"""The toy checkpoint, which commands use where they are given none."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]  # a wheel includes it
_REPOSITORY = Path(__file__).parents[2]  # a clone has it at the root


def toy_checkpoint() -> str:
    """The folder of the toy checkpoint, `tiny-llama`, in the installed package or at the root of the repository.

    Raises:
        FileNotFoundError: neither has it.
    """
    for place in (_PACKAGE, _REPOSITORY):
        folder = place / "tiny-llama"
        if (folder / "params.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"--ckpt_dir must be given: the toy checkpoint, its default, is neither in {_PACKAGE} nor in {_REPOSITORY}; "
        "pass the folder that holds params.json and consolidated.00.pth"
    )
