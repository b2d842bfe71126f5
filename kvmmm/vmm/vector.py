"""Exception vectors by name, and what their error codes say.

Sources: SDM volume 3, table 6-1, 6.13, 4.7 (page faults); AMD APM volume 2, table 8-1 (28 to 30).
"""

from __future__ import annotations

PAGE_FAULT = 14

_VECTORS = {
    0: "#DE divide error",
    1: "#DB debug",
    2: "NMI",
    3: "#BP breakpoint",
    4: "#OF overflow",
    5: "#BR bound range exceeded",
    6: "#UD invalid opcode",
    7: "#NM device not available",
    8: "#DF double fault",
    9: "coprocessor segment overrun",
    10: "#TS invalid TSS",
    11: "#NP segment not present",
    12: "#SS stack fault",
    13: "#GP general protection",
    14: "#PF page fault",
    16: "#MF x87 floating point",
    17: "#AC alignment check",
    18: "#MC machine check",
    19: "#XM SIMD floating point",
    20: "#VE virtualization",
    21: "#CP control protection",
    28: "#HV hypervisor injection",
    29: "#VC VMM communication",
    30: "#SX security",
}
_SELECTOR_ERRORS = frozenset({10, 11, 12, 13})  # their error code names a descriptor


def trap_name(vector: int, error_code: int | None = None) -> str:
    """Return an exception's name, with its error code taken apart."""
    name = _VECTORS.get(vector, "reserved" if vector < 32 else "interrupt")
    name = f"{name} (vector {vector})"
    if error_code is None:
        return name
    return f"{name}, error code {error_code:#x}{_decoded(vector, error_code)}"


def _decoded(vector: int, error_code: int) -> str:
    if vector == PAGE_FAULT:
        present = "page present" if error_code & 1 else "page not present"
        access = "write" if error_code & 2 else "fetch" if error_code & 16 else "read"
        ring = "from ring 3" if error_code & 4 else "from ring 0 to 2"
        reserved = ", reserved bit set in a table" if error_code & 8 else ""
        return f": {present}, {access}, {ring}{reserved}"
    if vector in _SELECTOR_ERRORS and error_code:
        external = ", external event" if error_code & 1 else ""
        if error_code & 2:
            return f": IDT entry {error_code >> 3}{external}"
        table = "LDT" if error_code & 4 else "GDT"
        return f": selector {error_code & ~7:#x} in the {table}{external}"
    return ""
