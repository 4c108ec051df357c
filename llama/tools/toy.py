"""The toy checkpoint of the repository, which commands use where they are given none."""

from __future__ import annotations

from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


def toy_checkpoint() -> str:
    """The folder of the toy checkpoint.

    Raises:
        FileNotFoundError: there is none, as in an installed package, which does not include it.
    """
    folder = _REPOSITORY / "tiny-llama"
    if not (folder / "params.json").is_file():
        raise FileNotFoundError(
            "--ckpt_dir must be given: the toy checkpoint, its default, is in the repository alone and not in an "
            "installed package; pass the folder that holds params.json and consolidated.00.pth"
        )
    return str(folder)
