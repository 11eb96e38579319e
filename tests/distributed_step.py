"""One training step in float64, alone or under torchrun; its gradients go to the file given. For test_distributed.

On one GPU both processes share it: gloo takes its tensors, too, where NCCL wants a GPU for each process.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from test_train import small_config

from spade_model.data import create_dataset, create_loader
from spade_model.trainer import Trainer

GLOBAL_BATCH = 4


def step(out: Path, accumulate: int, device: str) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    norms = {"norm_G": "spectralspadesyncbatch3x3", "norm_D": "spectralsyncbatch", "use_vae": True}
    config = small_config(out.parent, accumulate=accumulate, r1_gamma=10.0, model=norms)
    data = replace(config.data, batch_size=GLOBAL_BATCH // world_size // accumulate)
    config = replace(config, data=data)
    torch.manual_seed(0)
    trainer = Trainer(config, device)
    # Styles are drawn per process: without their noise every process sees what one process sees.
    torch.nn.init.constant_(trainer.encoder.fc_var.bias, -200.0)
    loader = create_loader(create_dataset(data, "train"), data, shuffle=True, epoch=1, rank=rank, world_size=world_size)
    batches = [batch for _, batch in zip(range(accumulate), loader, strict=False)]
    batches = [replace(batch, image=batch.image.double()) for batch in batches]
    trainer.step(batches)
    if rank == 0:
        networks = {"G": trainer.generator, "D": trainer.discriminator, "E": trainer.encoder}
        gradients = {f"{k}.{n}": p.grad for k, net in networks.items() for n, p in net.named_parameters()}
        buffers = {f"{k}.{n}": b for k, net in networks.items() for n, b in net.named_buffers()}
        found = {"gradients": gradients, "buffers": buffers}
        torch.save({kind: {name: t.cpu() for name, t in tensors.items()} for kind, tensors in found.items()}, out)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    step(Path(sys.argv[1]), int(sys.argv[2]), *(sys.argv[3:] or ["cpu"]))
