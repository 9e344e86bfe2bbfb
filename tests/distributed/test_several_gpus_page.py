"""The programs on the page about several GPUs run under torchrun."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.pages import BLOCKS, ROOT

pytestmark = pytest.mark.tier2

PROGRAM, *PARTS = [
    b.code for b in BLOCKS if b.page == "docs/several-gpus.md" and b.language == "python" and not b.is_session
]

# What the parts of a program that the page shows take as given, and what must come of them.
BEFORE = """
import torch
import torch._dynamo  # what is imported once there is a group may hold it for good, as a default argument
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import sparseflash as sf
import sparseflash.distributed.checkpoint
from sparseflash.distributed import Sharding, context_parallel_attention

device = "cpu"
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
mask = sf.parse("causal() & local(100)").compile(1024)
sharding = Sharding.of(mask, 2)
whole = torch.randn(dist.get_world_size() // 2, 3, 1, 2, 1024, 16)[dist.get_rank() // 2]  # of this slice of `data`
q, k, v = (sharding.shard(x, dist.get_rank() % 2, dim=2) for x in whole)
"""
BETWEEN = """
together = sharding.gather(out, mesh["context"], dim=2)
assert (together - sf.attention(*whole, mask)).abs().max() < 1e-5
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(8, 4)).square().mean().backward()
optimizer.step()
trained = model.module.weight.detach().clone()
"""
AFTER = """
import gc
assert step == 100
assert torch.equal(model.module.weight, trained)
gc.collect()  # what torch loads checkpoints with refers to itself
dist.barrier()
del model  # see the page
print(f"rank {dist.get_rank()} is done\\n", end="")
dist.destroy_process_group()
"""

# A thread of Gloo that lives on, since something holds the group, may be the death of the rank when Python ends.
LEFT = """
import os
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
print(f"{sum('gloo' in name for name in names)} threads are left\\n", end="")
"""


def torchrun(code: str, ranks: int, folder: Path) -> str:
    (folder / "train.py").write_text(code)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "train.py")
    ]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_program_of_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    assert PROGRAM.startswith("# train.py: torchrun")
    printed = torchrun(PROGRAM + LEFT, 2, tmp_path)
    (difference,) = re.findall(r"largest difference to one process: (\S+)", printed)
    assert float(difference) < 1e-5
    assert re.findall(r"(\d+) threads are left", printed) == ["0", "0"]


def test_the_parts_that_the_page_shows_run_under_torchrun(tmp_path: Path) -> None:
    parallel, checkpoint = PARTS
    body = "\n".join([BEFORE, parallel, BETWEEN, checkpoint, AFTER])
    printed = torchrun(f"def main():\n{textwrap.indent(body, '    ')}\n\nmain()\n{LEFT}", 4, tmp_path)
    assert sorted(re.findall(r"rank (\d) is done", printed)) == ["0", "1", "2", "3"]
    assert re.findall(r"(\d+) threads are left", printed) == ["0"] * 4


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens at a port, as the system writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.partition(":")[2], 16) == port:
                found.add(address.partition(":")[0])
    return found


def test_what_the_page_says_of_the_network_is_so() -> None:
    anywhere = {"0" * 8, "0" * 32}
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert listening(store.port) <= anywhere, "torch binds its store: the page is out of date"
    assert listening(store.port)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    bound = TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach(), wait_for_workers=False)
    assert listening(bound.port) == {"0100007F"}
