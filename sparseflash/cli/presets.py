"""``sparseflash train --list-presets``: the recipes that have a name."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparseflash.train.tasks import PRESETS, TASKS, load_preset


def show() -> None:
    """Print each task with its presets, each with a line about it."""
    presets = {name: load_preset(name) for name in PRESETS}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for task in TASKS:
        table.add_row(Text(task, style="bold"))
        for name, preset in presets.items():
            if preset.config.task == task:
                table.add_row(Text(f"  {name}"), Text(preset.summary))
    Console(highlight=False).print(table)
