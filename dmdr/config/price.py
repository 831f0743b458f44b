"""What devices cost, to count the money that a run has used. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from dmdr.config.section import Rate, Section


class Price(Section):
    """What an hour of each kind of device costs. Records, the live page and `dmdr runs` then tell the money."""

    currency: str = Field("USD", pattern=r"^[A-Z]{3}$")
    # part of a device's name, as its driver tells it -> the price of an hour of one of them, for example H100: 2.49.
    # cpu: of an hour of CPU time, where a stage runs without a GPU
    hour: dict[Annotated[str, Field(min_length=1)], Rate] = Field(min_length=1)

    def find(self, device: str) -> float | None:
        """The price of an hour of a device, by the longest name that is a part of its own; None if none is."""
        names = [name for name in self.hour if name.lower() in device.lower()]
        return self.hour[max(names, key=len)] if names else None

    def count(self, device_s: Mapping[str, float]) -> float | None:
        """The money for these seconds of each device; None where one of them has no price."""
        prices = {device: self.find(device) for device in device_s}
        known = {device: price for device, price in prices.items() if price is not None}
        if len(known) < len(prices):
            return None
        return sum(device_s[device] / 3600 * price for device, price in known.items())
