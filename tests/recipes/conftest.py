"""The recipes are scripts beside each other: their folder is on the path, as when one of them is run."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parents[2] / "recipes", Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The small made image data sets, written once: `made("cifar10")` is a folder."""
    import made_images

    written = {}

    def folder(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            {"cifar10": made_images.cifar10, "imagenet": made_images.image_folder}[name](written[name])
        return written[name]

    return folder
