"""What this host's KVM can do, found out by doing it.

Every mechanism that kvmmm relies on is exercised in a VM of some bytes of machine code. Nothing is
concluded from a host's name: `verdict` says what kind of KVM this is by what it did.

    finding.py     Check, Finding: what is asked, what came out
    lab.py         a tiny VM around some machine code; a script that talks with it exit by exit
    code.py        the few instruction sequences that all guests share
    device.py      /dev/kvm, capabilities, creating VMs
    ring.py        rings, `out`, exceptions, syscall, int n
    feature.py     SSE, AVX, FSGSBASE, CPUID, large pages
    violation.py   EPT violations of all kinds
    paging.py      host edits of page tables, shootdowns, slots that go
    stop.py        ending a guest that does not end
    console.py     the two consoles
    speed.py       what an instruction and an exit cost
    policy.py      what copies go by here, and why a calibration is not used
    examination.py all checks in order, none of which can stop another; the verdict

Layers: it stands on `kvmmm.vmm`, beside `kvmmm.bench`; `kvmmm.cli.doctor` only prints.
"""

from kvmmm.doctor.examination import Examination, examine

__all__ = ["Examination", "examine"]
