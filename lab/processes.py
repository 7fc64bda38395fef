"""One process or several. accelerate makes them a group: gloo between CPUs, nccl between GPUs. A launcher starts them:

    accelerate launch --num_processes 8 agrpo.py --task gsm8k                     8 GPUs of one machine
    torchrun --nproc_per_node 8 -- agrpo.py --task gsm8k                          the same; the -- keeps --m and --k from torchrun
    accelerate launch --multi_gpu --num_processes 2 agrpo.py --device cpu         2 processes without a GPU, to try it

Each process writes and learns from its own prompts; gradients are summed before the one optimizer step of a pass.
"""
import re
from datetime import timedelta

import torch


def join(cfg):
    """The accelerator of this process; with several, cfg.device becomes its own."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # One process may learn for long while another, with dead groups only, waits: nccl's 10 minutes would end the run.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(cpu=cfg.device == "cpu", kwargs_handlers=[patience])
    if accelerator.num_processes > 1:
        cfg.device = str(accelerator.device)
    return accelerator


def lost(e):
    """Does this error of a collective mean that another process is gone?"""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return group and bool(re.search("closed by peer|reset by peer|broken pipe|timed? ?out|gloo|nccl|remote process", str(e), re.I))


def leave():
    """Close the group, if there is one: torch warns of a group left open."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
