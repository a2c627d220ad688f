import math

import pytest
import torch

import anybatch


@pytest.fixture(autouse=True)
def _namespace(doctest_namespace, tmp_path):
    torch.manual_seed(0)
    doctest_namespace.update(anybatch=anybatch, torch=torch, tmp_path=tmp_path, math=math)
