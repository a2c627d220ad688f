"""What the server of `processes.py` has imported before it forks; each process then starts in milliseconds.

Only imports: a process group or a backward pass here would leave threads that a fork does not have.
"""

# ruff: noqa: F401

import gc

import sklearn.datasets
import sklearn.model_selection
import torch._dynamo
import torch._inductor.utils
import torch.distributed.algorithms.join
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.elastic.rendezvous.registry
import torch.distributed.fsdp
import torch.distributed.launcher.api
import torch.distributed.optim
import torch.distributed.tensor
import torch.nn.parallel
import torch.utils.serialization.config

import anybatch
import anybatch._demo
import anybatch._gradients.fsdp

anybatch.attach  # noqa: B018  # the package loads its modules at the first use of a public name
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a fork does not touch, and so does not copy, what is loaded here
