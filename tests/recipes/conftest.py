import pytest

from recipes.images import made as made_images


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The small made image data sets, written once: `made("cifar10")` is a folder."""
    written = {}

    def folder(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            {"cifar10": made_images.cifar10, "imagenet": made_images.image_folder}[name](written[name])
        return written[name]

    return folder
