"""KVM: device → VM → vCPU, memslots, exits, the start state of a CPU, the memslot address space.

    device.py         /dev/kvm, asked once a process: version, capabilities, CPUID
    trial.py          what only trying tells, found in a throw-away VM
    vm.py             one VM: its memslots and vCPUs, closed in order
    memslot.py        guest-physical range ↔ host address, and the bookkeeping of slot numbers
    vcpu.py           one vCPU: registers, run; its loop is C (`_native/run.c`)
    vcpu_state.py     a vCPU's state as a value: saved from one, loaded into another
    exits.py          cold exits as typed values (the hot two are C types)
    boot.py           the state a CPU starts in: segments, GDT, IDT, TSS, control registers
    address_space.py  MemslotAddressSpace: an mm address is a guest-physical address

    page_table_space.py  PageTableAddressSpace: an mm address is a guest-virtual address, ring 3
    guest_physical.py    where the frames of files lie in a VM, and the slots over them
    table_frames.py      page tables, in frames of the arena
    kernel_half.py       what ring 3 needs above its addresses: IDT, TSS, stubs, stacks
    shootdown.py         how a running vCPU is made to forget a translation
    shootdown_trial.py   which ways of doing so work here, tried on one

A VM and what belongs to it is not locked: one thread runs a vCPU, and from others may come
`Vcpu.stop`, `Vcpu.set_root` and `Vm.paused` alone.
"""
