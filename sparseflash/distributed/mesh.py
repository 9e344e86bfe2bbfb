"""The one dim of a mesh that a sequence is sharded over."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def one_dim(mesh: DeviceMesh, ranks: int | None = None) -> tuple[dist.ProcessGroup, int, int]:
    """(process group, this process's rank in it, number of ranks) of a mesh with one dim.

    Raises:
        TypeError: not a DeviceMesh.
        ValueError: several dims, another number of ranks than asked for, or a mesh without this process.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh (torch.distributed.device_mesh.init_device_mesh), got {mesh!r}")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        one = f"mesh[{names[-1]!r}]" if names else "a mesh with named dims, indexed by one of them"
        raise ValueError(
            f"the sequence is sharded over one dim, the mesh has {mesh.ndim}"
            f"{' (' + ', '.join(names) + ')' if names else ''}: pass {one}"
        )
    if ranks is not None and mesh.size() != ranks:
        raise ValueError(f"the sharding is for {ranks} ranks, the mesh has {mesh.size()}")
    if mesh.get_coordinate() is None:
        raise ValueError("this process is no part of the mesh")
    return mesh.get_group(), mesh.get_local_rank(), mesh.size()
