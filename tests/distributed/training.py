"""A small model trained by ranks that share samples and sequences, as the tests run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.distributed import Sharding, context_parallel_attention, summed
from sparseflash.distributed.checkpoint import load_checkpoint, save_checkpoint

SAMPLES, TOKENS, WIDTH, HEADS, VOCABULARY = 4, 200, 16, 2, 11
MASK = (P.causal() & P.local(40)).compile(TOKENS, block=16)


class Model(nn.Module):
    """Embeddings of tokens and positions, one layer of attention, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
        x = self.tokens(tokens) + self.places(positions)
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if mesh is None:
            out = sf.attention(q, k, v, MASK, sinks=self.sinks)
        else:
            out = context_parallel_attention(q, k, v, MASK, mesh, sinks=self.sinks)
        logits: torch.Tensor = self.out(out.transpose(1, 2).flatten(2))
        return logits


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and what to predict, [samples, tokens] each."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(VOCABULARY, (2, SAMPLES, TOKENS), generator=generator)
    return drawn[0], drawn[1]


def loss(net: nn.Module, step: int, mesh: DeviceMesh | None) -> torch.Tensor:
    """The mean over all tokens; of several ranks, this one's part times their number, for DDP and FSDP average."""
    tokens, targets = batch(step)
    positions, ranks = torch.arange(TOKENS), 1
    if mesh is not None:
        data, context, ranks = mesh["data"], mesh["context"], mesh.size()
        sharding, rank = Sharding.of(MASK, context.size()), context.get_local_rank()
        here = torch.arange(SAMPLES).chunk(data.size())[data.get_local_rank()]
        tokens, targets = (sharding.shard(x[here], rank, 1) for x in (tokens, targets))
        positions, mesh = sharding.positions(rank), context
    logits = net(tokens, positions, mesh)
    part = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return part * ranks / (SAMPLES * TOKENS)


class Readout(nn.Module):
    """One answer a sample: a head over the mean of what a model makes of all its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Model(), nn.Linear(VOCABULARY, 2)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
        total = self.body(tokens, positions, mesh).sum(1)
        mean = (total if mesh is None else summed(total, mesh)) / TOKENS
        answers: torch.Tensor = self.head(mean)
        return answers


def readout_gradients(data: int, context: int) -> None:
    """With a readout over all tokens, DDP's averages are the gradients of one process."""
    mesh, (tokens, _) = grid(data, context), batch(0)
    torch.manual_seed(0)
    alone, shared = Readout().double(), Readout().double()
    shared.load_state_dict(alone.state_dict())
    alone(tokens, torch.arange(TOKENS), None).square().mean().backward()
    sharding = Sharding.of(MASK, context)
    here = torch.arange(SAMPLES).chunk(data)[mesh["data"].get_local_rank()]
    rank = mesh["context"].get_local_rank()
    trained = DistributedDataParallel(shared)  # which must live until the backward pass
    answers = trained(sharding.shard(tokens[here], rank, 1), sharding.positions(rank), mesh["context"])
    answers.square().mean().backward()
    for (name, want), got in zip(alone.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


def grid(data: int, context: int) -> DeviceMesh:
    return init_device_mesh("cpu", (data, context), mesh_dim_names=("data", "context"))


def gradients(data: int, context: int, kind: str) -> None:
    """Under DDP or FSDP2, on a mesh of data x context ranks, gradients are those of one process."""
    alone, shared, mesh = model(), model(), grid(data, context)
    loss(alone, 0, None).backward()
    trained = _wrapped(shared, mesh, kind)
    loss(trained, 0, mesh).backward()
    for (name, want), got in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert want.grad is not None
        assert got.grad is not None, name
        full = got.grad.full_tensor() if kind == "fsdp" else got.grad  # type: ignore[attr-defined]
        torch.testing.assert_close(full, want.grad, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


def _wrapped(net: Model, mesh: DeviceMesh, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(net)
    fully_shard(net, mesh=mesh)  # replicated over data, sharded over context
    return net


def train(
    data: int, context: int, kind: str, begin: int, end: int, load: Path | None = None, save: Path | None = None
) -> list[float]:
    """Losses of the steps; from a checkpoint, and into one, if asked for."""
    net, mesh = model(), grid(data, context)
    trained = _wrapped(net, mesh, kind)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    if load is not None:
        progress = load_checkpoint(load, trained, optimizer)
        assert progress == {"step": begin, "name": "small"}
    losses = []
    for step in range(begin, end):
        optimizer.zero_grad()
        part = loss(trained, step, mesh)
        part.backward()
        optimizer.step()
        losses.append(float(_mean(part)))
    if save is not None:
        save_checkpoint(save, trained, optimizer, step=end, name="small")
    return losses


def alone(steps: int) -> list[float]:
    """Losses of one process."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        part = loss(net, step, None)
        part.backward()
        optimizer.step()
        losses.append(part.item())
    return losses


def refused(path: Path, what: str) -> None:
    """A checkpoint that cannot be written or read, for a reason that the rank may not see itself."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    if what == "exists":
        save_checkpoint(path, net, optimizer)
    elif what == "progress":
        save_checkpoint(path / "new", net, optimizer, step=[1])  # type: ignore[arg-type]
    elif what == "model":
        other: Any = nn.Linear(3, 4)
        load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))
    else:
        load_checkpoint(path, net, optimizer)


def _mean(part: torch.Tensor) -> torch.Tensor:
    total = part.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
