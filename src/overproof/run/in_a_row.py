"""Several runs, one after another: training that diverges in one of them does not take the others along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof import console
from overproof.config import RunConfig
from overproof.errors import NonFiniteLossError
from overproof.folder import RunFolder
from overproof.run.execute import execute

REFERENCES = ("teacher", "standard_teacher", "model", "judge")  # sections whose `run` is another run


class DivergedError(NonFiniteLossError):
    """Training diverged in some of several runs.

    Args:
        message: which, and why.
        done: the others.
    """

    def __init__(self, message: str, done: list[RunFolder]) -> None:
        super().__init__(message)
        self.done = done


class Row:
    """Executes runs in order; finished ones are kept and unfinished ones resumed."""

    def __init__(self) -> None:
        self.folders: list[RunFolder] = []
        self.lost: dict[Path, str] = {}

    def execute(self, config: RunConfig, folder: RunFolder, **options: Any) -> None:
        """One run; it is lost if its loss is no number any more, or if it needs a run that is lost."""
        self.folders.append(folder)
        table = config.table()
        needed = (Path(table.get(section, {}).get("run") or "") for section in REFERENCES)
        if gone := [path.name for path in needed if path in self.lost]:
            self.lost[folder.path] = f"It needs {gone[0]}."
            console.note(f"left out: it needs {gone[0]}")
            return
        try:
            execute(config, folder.path, resume=folder.exists, **options)
        except NonFiniteLossError as error:
            self.lost[folder.path] = str(error)
            console.note(f"{folder.path}: {error}")

    def finish(self) -> None:
        """Tell what was lost, after all that was not.

        Raises:
            DivergedError: names the runs without a result, and why.
        """
        if self.lost:
            told = "\n".join(f"{path}: {why}" for path, why in self.lost.items())
            done = [folder for folder in self.folders if folder.path not in self.lost]
            raise DivergedError(
                f"{len(self.lost)} of {len(self.folders)} runs have no result; the others are done.\n{told}", done
            )
