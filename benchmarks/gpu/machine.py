"""The machine of a measurement: a device, a clock for its calls, and the number of operands that keep its cache cold.

The parts take these as they come, so that a test runs them whole on a CPU with the wall's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparseflash.tools.timing import Call, Clock, wall

MOST_SETS = 16


@dataclass(frozen=True)
class Machine:
    """A device and how its calls are timed.

    Attributes:
        device: where operands lie.
        clock: seconds of one call.
        cache: bytes of the largest cache: what a round leaves there, the next one must not find.
    """

    device: torch.device
    clock: Clock
    cache: int

    def sets(self, nbytes: int) -> int:
        """How many sets of operands of so many bytes to go through in turn: twice the cache, or one that passes it."""
        return min(-(-2 * self.cache // nbytes), MOST_SETS)

    def alive(self) -> bool:
        """Whether the device still works: after an illegal address no call of this process does."""
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return False
        return True

    def empty_cache(self) -> None:
        """Give the device's memory back that nobody holds."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Events:
    """Seconds between two events on the device around a call.

    The device sleeps before the first event for as long as the call needs to be enqueued: else the time that Python
    takes to enqueue it would count.
    """

    ASLEEP = 2_000_000  # clock cycles, about a millisecond

    def __call__(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.ASLEEP)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def gpu() -> Machine:
    """The GPU that torch takes by default."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(torch.device("cuda", torch.cuda.current_device()), Events(), properties.L2_cache_size)


def cpu() -> Machine:
    """This CPU; one set of operands, since tests ask for the parts to run, not for figures."""
    return Machine(torch.device("cpu"), wall, 1)
