"""The processes of a run: groups, each of which draws its own images, and the ranks of a group, which share tokens."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparseflash.train.config import TrainConfig


@dataclass(frozen=True)
class Processes:
    """The number of processes and groups, and the rank of this process.

    Ranks of a group are consecutive: with ``context`` ranks per group, the first group has ranks 0 to ``context - 1``.

    Attributes:
        rank: rank of this process.
        world: number of processes.
        context: ranks per group, which share the tokens of each image.
    """

    rank: int = 0
    world: int = 1
    context: int = 1

    @classmethod
    def here(cls, context: int) -> "Processes":
        """The processes of the existing process group, or otherwise those of torchrun's environment.

        Raises:
            ValueError: the number of processes is not a multiple of ``context``, or the environment has only some of
                torchrun's variables.
        """
        if context < 1:
            raise ValueError(f"context_parallel must be at least 1; got {context!r}")
        if distributed.is_initialized():
            rank, world = distributed.get_rank(), distributed.get_world_size()
        else:
            rank, world = _from_launcher()
        if world % context:
            processes = f"{world} processes do" if world > 1 else "one process does"
            raise ValueError(
                f"context_parallel={context} ranks share each image, but {processes} not divide into groups of "
                f"{context}; start a multiple of {context}: torchrun --nproc-per-node {-(-world // context) * context}"
            )
        return cls(rank, world, context)

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def groups(self) -> int:
        """Number of groups, each of which draws its own images."""
        return self.world // self.context

    @property
    def group(self) -> int:
        """The group of this process."""
        return self.rank // self.context

    def check(self, config: TrainConfig, shards: int) -> None:
        """Refuse a recipe that these processes cannot share.

        Args:
            config: the recipe.
            shards: batches of a global batch, one for each group that the run was started with.

        Raises:
            ValueError: the groups cannot share the batches of a step equally, or the ranks the tokens of an image.
        """
        if (batches := config.accumulate * shards) % self.groups:
            raise ValueError(
                f"this run's steps have {batches} batches, which {self.groups} groups of processes cannot share "
                f"evenly; resume with a number of groups that divides {batches}, of {self.context} processes each"
            )
        if self.context > 1:
            for stage in config.stages[config.first_stage :]:
                stage.check_shared(config.model, self.context)

    def join(self, device: torch.device) -> tuple[torch.device, DeviceMesh | None, bool]:
        """Start the process group, unless there is one.

        Returns:
            The device of this process, the mesh of its group if tokens are shared, and whether it was this call that
            started the process group.
        """
        joined = False
        if self.world > 1:
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            if joined := not distributed.is_initialized():
                distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if self.context == 1:
            return device, None, joined
        mesh = init_device_mesh(device.type, (self.groups, self.context), mesh_dim_names=("data", "context"))
        return device, mesh["context"], joined

    def gathered(self, figures: Tensor) -> Tensor:
        """The figures [micro-steps, F] of every group, in the order of batches: [micro-steps * groups, F]."""
        if self.world == 1:
            return figures
        every = figures.new_zeros(len(figures), self.groups, figures.shape[1])
        every[:, self.group] = figures / self.context
        distributed.all_reduce(every)
        return every.flatten(0, 1)

    def total(self, count: int, device: torch.device) -> int:
        """The sum of a count over all processes."""
        if self.world == 1:
            return count
        shared = torch.tensor(count, device=device)
        distributed.all_reduce(shared)
        return int(shared)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        shared = torch.tensor(float(flag), device=device)
        distributed.all_reduce(shared)
        return bool(shared > 0)


def _from_launcher() -> tuple[int, int]:
    """Rank and number of processes from torchrun's environment; (0, 1) without one.

    An incomplete environment is refused: a process that believed to be the second of several would write nothing.
    """
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not told:
        return 0, 1
    way_out = "unset RANK and WORLD_SIZE to train in one process, or start the processes with torchrun"
    numbers = []
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1)):
        value = told.get(name)
        if value is None:
            raise ValueError(f"the environment has {' and '.join(told)} but no {name}; {way_out}")
        if not value.isdecimal() or int(value) < least:
            raise ValueError(f"{name} must be a number of at least {least}; got {value!r}; {way_out}")
        numbers.append(int(value))
    rank, world = numbers
    if rank >= world:
        raise ValueError(f"RANK must be below WORLD_SIZE; got RANK={rank} and WORLD_SIZE={world}; {way_out}")
    if world > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise ValueError(f"WORLD_SIZE is {world}, but the environment has no {missing[0]}; {way_out}")
    return rank, world
