"""README.md of this directory: what it says is tested is, and no scenario is left out."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "tests" / "README.md"
CANNOT_APPLY = "What cannot apply"

# The scenarios, by package, without their Test.
SCENARIOS = """
mm: UsageASUpdates DataASUpdates BrkDataLimitUpdates IOAfterUnmap IOAfterMProtect
    AIOPrepareAfterDestroy AIOLookupAfterDestroy GetAllocationDirection PinnedPagesCopiedOnFork
    PinUnsharesCopyOnWritePages UnpinnedPagesCopyOnWriteAfterFork
usermem: BytesIOCopyOutSuccess BytesIOCopyOutFailure BytesIOCopyInSuccess BytesIOCopyInFailure
    BytesIOZeroOutSuccess BytesIOZeroOutFailure BytesIOCopyOutFromSuccess BytesIOCopyOutFromFailure
    BytesIOCopyInToSuccess BytesIOCopyInToFailure CopyStringInShort CopyStringInLong
    CopyStringInVeryLong CopyStringInNoTerminatingZeroByte CopyStringInTruncatedByMaxlen
    CopyInt32StringsInVec CopyInt32StringsInVecRequiresOneValidValue IOSequenceCopyOut
    IOSequenceCopyIn IOSequenceZeroOut IOSequenceTakeFirst
safemem: BlockSeqOfEmptyBlock BlockSeqOfNonemptyBlock BlockSeqNumBytes BlockSeqIterBlocks
    BlockSeqIterBytes BlockSeqDropBeyondLimit FromIOReaderFullRead FromIOReaderPartialRead
    SingleByteReader ReadFullToBlocks FromIOWriterFullWrite FromIOWriterPartialWrite
    SingleByteWriter WriteFullToBlocks
hostarch: TailIteration DropSingleByteIteration DropFirstEmpty TakeFirstEmpty TakeFirst
    CacheLineRoundUp CacheLineRoundUpWrapAround EndianString
safecopy: CopyInSuccess CopyOutSuccess CopySuccess ZeroOutSuccess SwapUint32Success
    SwapUint32AlignmentError CompareAndSwapUint32Success CompareAndSwapUint32AlignmentError
    CopyInSegvError CopyInBusError CopyOutSegvError CopyOutBusError CopySourceSegvError
    CopySourceBusError CopyDestinationSegvError CopyDestinationBusError ZeroOutSegvError
    ZeroOutBusError SwapUint32SegvError SwapUint32BusError CompareAndSwapUint32SegvError
    CompareAndSwapUint32BusError SwapUint64Success SwapUint64AlignmentError SwapUint64SegvError
    SwapUint64BusError CheckXstateFault CheckXstateSuccess
memmap: AddRemoveMapping InvalidateWhole InvalidatePartial InvalidateMultiple InvalidateOverlapping
    MixedWritable
pgalloc: FindAllocatable64K
segment: AddRandom RemoveRandom MaxGapAddRandom MaxGapAddRandomWithRandomInterval MaxGapRemoveRandom
    MaxGapRemoveHalfRandom AddRandomWithMerge RemoveHalfRandomWithMerge NextLargeEnoughGap
    PrevLargeEnoughGap AddSequentialAdjacent AddSequentialNonAdjacent Merge Isolate MutateRange
kvm: KernelSyscall KernelFault KernelFloatingPoint ApplicationSyscall ApplicationFault
    RegistersSyscall RegistersFault Segments Bounce BounceStress Invalidate EmptyAddressSpace
    WrongVCPU Rdtsc KernelVDSO Ioeventfd GetCS MXCSR KernelCPUID SafecopySigbus Safecopy ParseMaps
    KernelTLS SingleInterruptBeforeEnable MultipleInterruptsBeforeEnable
    SingleInterruptAfterEnable MultipleInterruptsAfterEnable
pagetables: Unmap ReadOnly ReadWrite SerialEntries SpanningEntries SparseEntries 2MAnd4K 1GAnd4K
    Split1GPage Split2MPage LargeAddresses NumMemoryTypes AllocFree
others: FindUnallocatedRange CopyObject MaxPCID FirstPCID FreePCID ReusePCID DirtySet
    DirtySetAccounting
"""


def tables() -> dict[str, list[list[str]]]:
    """The cells of each row, by the heading above."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| ") and not re.match(r"\| (Scenario|Operation|Moment) \|", line):
            found.setdefault(heading, []).append([c.strip() for c in line.strip("| ").split(" | ")])
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """What pytest would collect there, as Class::name or name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def test_every_test_that_it_names_is_there():
    missing = []
    n_named = 0
    for heading, rows in tables().items():
        if heading == CANNOT_APPLY:
            continue
        for scenario, cell in rows:
            named = re.findall(r"`([^`]+)`", cell)
            assert named, f"{heading}: {scenario} names no test"
            n_named += len(named)
            for one in named:
                path, _, name = one.partition("::")
                if not (ROOT / path).is_file() or name not in names_in(ROOT / path):
                    missing.append(one)
    assert not missing
    assert n_named > 100


def test_no_scenario_is_left_out():
    """Each is there once: as a test of the same name, or with a reason why it cannot be."""
    rows = tables()
    tested = {
        row[0]: {name.rpartition("::")[2] for name in re.findall(r"`([^`]+)`", row[1])}
        for heading, found in rows.items()
        for row in found
        if heading != CANNOT_APPLY
    }
    excused = {row[0] for row in rows[CANNOT_APPLY]}
    for scenario in re.sub(r"\w+:", "", SCENARIOS).split():
        assert (scenario in tested) != (scenario in excused), scenario
        if scenario in tested:
            names = {name.replace("_", "") for name in tested[scenario]}
            assert f"test{scenario.lower()}" in names, scenario


def test_every_excuse_has_a_reason():
    reasons = [row[2] for row in tables()[CANNOT_APPLY]]
    for i, reason in enumerate(reasons):
        assert len(reason) > 20 or (reason.endswith("the same") and i), reason
    text = " ".join(reasons)
    for word in ("arm64", "LA57", "AIO", "PCID", "vDSO", "xstate", "bluepill"):
        assert word in text
