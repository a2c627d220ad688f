"""Results that are kept in a file as they come, so that a benchmark that was stopped goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.training.once import unfinished

Row = dict[str, Any]


class Kept:
    """Rows in a JSON file.

    Args:
        path: the file.
        settings: what all rows were made with; it stands beside them.
        apart: what rows of a file with other settings are of, for the refusal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, apart: str) -> None:
        self._path, self._settings = path, dict(settings)
        self.rows: list[Row] = []
        if path.is_file():
            saved = json.loads(path.read_text())
            if {name: saved.get(name) for name in settings} != self._settings:
                raise SystemExit(f"{path} holds runs of {apart}: name another --json, or delete it.")
            self.rows = saved["rows"]

    def find(self, name: Row) -> Row | None:
        """The row in which all of `name` stands."""
        return next((row for row in self.rows if name.items() <= row.items()), None)

    def keep(self, row: Row) -> None:
        """Write the file with one more row: a kill leaves the old file or the new one."""
        self.rows.append(row)
        lines = ",\n".join(json.dumps(each) for each in self.rows)
        scratch = unfinished(self._path)
        scratch.write_text(f'{json.dumps(self._settings)[:-1]}, "rows": [\n{lines}\n]}}\n')
        scratch.replace(self._path)
