"""``sparseflash doctor``: print versions, devices and the tests of backends."""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparseflash.tools.doctor import examine

RUNS_WHERE = (
    ("patterns, masks, tables", "any machine"),
    ("attention on CPU tensors", "backend cpu: fp32, fp16, bf16; fp64 in torch"),
    ("attention on GPU tensors", "backend triton: fp16, bf16, fp32"),
    ("Pathfinder images", "CPU cores, one process each"),
)


def run(as_json: bool) -> None:
    """Print the results."""
    found = examine()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in found.versions.items():
        table.add_row(name, Text(version or "not installed"))
    machine = found.machine
    table.add_row("system", Text(f"{machine.system}, {machine.cores} cores, torch uses {machine.torch_threads}"))
    for gpu in machine.gpus:
        table.add_row("GPU", Text(f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib} GiB"))
    if not machine.gpus:
        table.add_row("GPU", "none that torch sees")
    for name, backend in found.backends.items():
        state = Text("works", style="green") if backend.works else Text("not here", style="yellow")
        details = [each for each in (backend.why, backend.tried) if each is not None]
        if backend.largest_error is not None:
            details.append(f"largest error against float64 {backend.largest_error:.1e}")
        table.add_row(f"backend {name}", state + Text(f": {', '.join(details)}"))
    kernel = found.cpu_kernel
    table.add_row("CPU kernel", Text(f"{kernel.name}: {kernel.gives}"))
    if kernel.why is not None:
        table.add_row("", Text(f"nothing better, for {kernel.why}", style="yellow"))
    for what, where in RUNS_WHERE:
        table.add_row(what, where)
    console.print(table)
    if kernel.faster is not None:  # on one line, for copying
        console.print(Text(f"Faster on a CPU: {kernel.faster}"), soft_wrap=True)
