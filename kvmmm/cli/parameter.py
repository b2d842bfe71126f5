"""Option types: sizes, durations and addresses as people type them. Each error says how."""

from __future__ import annotations

import re

import click

from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.hostarch.units import parse_bytes, parse_duration_ns


class Size(click.ParamType[int]):
    """A number of bytes: `64M`."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes."""
        try:
            return parse_bytes(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Duration(click.ParamType[int]):
    """A time: `10s`, `250ms`; a bare number means seconds."""

    name = "duration"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the nanoseconds."""
        try:
            return parse_duration_ns(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Address(click.ParamType[int]):
    """A guest address: `0x200000`, or with a suffix `2M`."""

    name = "address"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the address."""
        address = value if isinstance(value, int) else _parse_address(value)
        if address is None or not 0 <= address < ADDRESS_LIMIT:
            self.fail(f"{value!r} is no address: write it as 0x200000 or 2M", param, ctx)
        return address


def _parse_address(text: str) -> int | None:
    text = text.strip()
    if re.fullmatch(r"0[xX][0-9a-fA-F_]+|\d+", text):
        try:
            return int(text, 0)
        except ValueError:  # 007, 0x_
            return None
    try:
        return parse_bytes(text)
    except ValueError:
        return None


class Environment(click.ParamType[tuple[str, str]]):
    """An environment variable: `NAME=VALUE`."""

    name = "environment"

    def convert(
        self, value: str | tuple[str, str], param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:  # fmt: skip
        """Return name and value."""
        if not isinstance(value, str):
            return value
        name, equals, content = value.partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is no NAME=VALUE", param, ctx)
        return name, content


SIZE = Size()
DURATION = Duration()
ADDRESS = Address()
ENVIRONMENT = Environment()
