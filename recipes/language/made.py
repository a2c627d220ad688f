"""A text that every Python brings along: what `help()` has to say about the language, about half a megabyte."""

from pathlib import Path
from pydoc_data.topics import topics


def make(folder: Path, *, size: str = "tiny", seed: int = 0) -> None:
    """Write `python.txt` to `folder`; there is one size, and no chance in it."""
    del size, seed
    folder.mkdir(parents=True, exist_ok=True)
    text = "<|endoftext|>\n".join(topics[name] for name in sorted(topics))
    (folder / "python.txt").write_text(text, encoding="utf-8", newline="\n")
