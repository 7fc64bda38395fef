"""Before any test is imported: the repository on the path, and Triton's interpreter where there is no GPU."""

import os
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

# Triton reads this once, when it is first imported, and transformers, peft and torch._dynamo all import
# it. With a GPU the kernels run there instead, and torch.compile needs a Triton that compiles.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped without one")
