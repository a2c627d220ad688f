"""What one rank prepares for all of them: vocabularies, tokens, the lengths of sound files."""

from collections.abc import Callable

import torch.distributed as dist

from recipes.training.task import DataError


def once(make: Callable[[], None]) -> None:
    """Rank 0 calls `make`, which leaves files behind, while the others wait; every rank must see the folder.

    Raises:
        DataError: on every rank, where rank 0 met it.
    """
    if not dist.is_initialized():
        make()
        return
    wrong: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            make()
        except DataError as error:
            wrong = [str(error)]
    dist.broadcast_object_list(wrong, src=0)
    if wrong[0] is not None:
        raise DataError(wrong[0])
