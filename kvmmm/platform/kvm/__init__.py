"""KVM: device → VM → vCPU, memslots, exits, the start state of a CPU, the memslot address space.

    device.py         /dev/kvm, asked once a process: version, capabilities, CPUID
    trial.py          what only trying tells, found in a throw-away VM
    vm.py             one VM: its memslots and vCPUs, closed in order
    memslot.py        guest-physical range ↔ host address, and the bookkeeping of slot numbers
    vcpu.py           one vCPU: registers, run; its loop is C (`_native/run.c`)
    exits.py          cold exits as typed values (the hot two are C types)
    boot.py           the state a CPU starts in: segments, GDT, IDT, TSS, control registers
    address_space.py  MemslotAddressSpace: an mm address is a guest-physical address

A VM and what belongs to it is not locked: one thread runs it, and `Vcpu.stop` alone may come from
others.
"""
