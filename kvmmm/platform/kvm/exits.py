"""Cold exits, decoded from kvm_run into typed values.

The two exits that can be hot, IoExit and MmioExit, are C types. Everything here happens at most
once a run or on the way to making an instruction restartable, so clarity comes first: construct
reads the records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.platform.kvm import abi

if TYPE_CHECKING:
    from kvmmm.platform.kvm.vcpu import Vcpu

_UNION_OFFSET = 32
"""Where kvm_run's union of exit records starts. Source: struct kvm_run."""


class HltExit:
    """KVM_EXIT_HLT: the guest halted, and nothing can wake it."""

    reason = abi.KVM_EXIT_HLT


class ShutdownExit:
    """KVM_EXIT_SHUTDOWN: a triple fault. On SVM the registers are gone."""

    reason = abi.KVM_EXIT_SHUTDOWN


class FailEntryExit:
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the guest's state.

    Attributes:
        hardware_reason: 0x80000021 on VMX: invalid guest state (SDM Vol. 3C 27.3.1).
        cpu: The host CPU.
    """

    reason = abi.KVM_EXIT_FAIL_ENTRY

    def __init__(self, hardware_reason: int, cpu: int) -> None:
        self.hardware_reason = hardware_reason
        self.cpu = cpu


class InternalErrorExit:
    """KVM_EXIT_INTERNAL_ERROR.

    Attributes:
        suberror: abi.KVM_INTERNAL_ERROR_EMULATION and so on.
        data: KVM's own words about it, as 64-bit numbers.
        instruction: Bytes at rip, when KVM could read them; empty for a fetch without memory.
    """

    reason = abi.KVM_EXIT_INTERNAL_ERROR

    def __init__(self, suberror: int, data: list[int], instruction: bytes) -> None:
        self.suberror = suberror
        self.data = data
        self.instruction = instruction

    @property
    def is_emulation_failure(self) -> bool:
        """Whether KVM met an instruction that it had to emulate and could not."""
        return self.suberror == abi.KVM_INTERNAL_ERROR_EMULATION


class SystemEventExit:
    """KVM_EXIT_SYSTEM_EVENT: shutdown, reset or crash, asked for by the guest.

    Attributes:
        event: KVM_SYSTEM_EVENT_*.
    """

    reason = abi.KVM_EXIT_SYSTEM_EVENT

    def __init__(self, event: int) -> None:
        self.event = event


class OtherExit:
    """An exit reason that nothing here asked for.

    Attributes:
        reason: KVM_EXIT_*.
    """

    def __init__(self, reason: int) -> None:
        self.reason = reason

    @property
    def name(self) -> str:
        """The reason as text."""
        return abi.EXIT_NAMES.get(self.reason, f"reason {self.reason}")


ColdExit = HltExit | ShutdownExit | FailEntryExit | InternalErrorExit | SystemEventExit | OtherExit


def decode(vcpu: Vcpu, reason: int) -> ColdExit:
    """Return the typed exit for what kvm_run holds."""
    if reason == abi.KVM_EXIT_HLT:
        return HltExit()
    if reason == abi.KVM_EXIT_SHUTDOWN:
        return ShutdownExit()
    if reason not in (
        abi.KVM_EXIT_FAIL_ENTRY,
        abi.KVM_EXIT_INTERNAL_ERROR,
        abi.KVM_EXIT_SYSTEM_EVENT,
    ):
        return OtherExit(reason)
    record = _records()[reason].parse(vcpu.run_bytes()[_UNION_OFFSET:])
    if reason == abi.KVM_EXIT_FAIL_ENTRY:
        return FailEntryExit(record.hardware_reason, record.cpu)
    if reason == abi.KVM_EXIT_SYSTEM_EVENT:
        return SystemEventExit(record.type)
    return InternalErrorExit(
        record.suberror, list(record.data[: record.ndata]), _instruction(record)
    )


_MAX_INSTRUCTION_BYTES = 15


def _instruction(record: Any) -> bytes:  # noqa: ANN401 - a construct Container
    # struct emulation_failure overlays data: flags, then size and 15 bytes (api.rst,
    # KVM_EXIT_INTERNAL_ERROR).
    if record.suberror != abi.KVM_INTERNAL_ERROR_EMULATION or record.ndata < 4:
        return b""
    if not record.data[0] & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
        return b""
    packed = b"".join(word.to_bytes(8, "little") for word in record.data[1:3])
    return packed[1 : 1 + min(packed[0], _MAX_INSTRUCTION_BYTES)]


_cached_records: dict[int, Any] = {}


def _records() -> dict[int, Any]:
    """The construct Structs, built at first use: importing construct costs more than a VM."""
    if not _cached_records:
        from construct import Array, Int32ul, Int64ul, Struct

        _cached_records.update(
            {
                abi.KVM_EXIT_FAIL_ENTRY: Struct("hardware_reason" / Int64ul, "cpu" / Int32ul),
                abi.KVM_EXIT_INTERNAL_ERROR: Struct(
                    "suberror" / Int32ul, "ndata" / Int32ul, "data" / Array(16, Int64ul)
                ),
                abi.KVM_EXIT_SYSTEM_EVENT: Struct("type" / Int32ul, "ndata" / Int32ul),
            }
        )
    return _cached_records
