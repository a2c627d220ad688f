"""What the API page makes of a docstring: "Example:" is a section of code, and every line of a formula stays one."""

from typing import Any

import griffe


class Sections(griffe.Extension):
    """The docstrings say "Example:", as Google's style allows; griffe knows "Examples:" alone."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
