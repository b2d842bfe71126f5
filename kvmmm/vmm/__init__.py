"""The composition root: micro-VMs out of device, arena, memory manager, tables and image.

    bundled.py           the guests that come with kvmmm
    image*.py, elf.py    what a guest file holds, checked before any VM exists
    system_area.py       kvmmm's own pages: boot info, rings, IDT, GDT, TSS, stubs, tables
    machine.py           what a MicroVM and a UserVM have in common: run, stop, close
    microvm.py           MicroVM: a guest kernel
    guest_memory.py      its memory as a whole; boot_tables.py: its tables, kept in step with the mm
    fork.py              a vCPU's state at a moment at which all of it can be seen
    user_vm.py           UserVM: Linux programs in ring 3; user_*.py: image, stack, processes,
                         who runs, system calls, reports
    exit_handler.py      what each exit means: EPT violations, traps, console, exit status
    emulation.py         instructions that KVM could not emulate, made restartable
    stop_report.py       the facts behind a stop, for report.py to render
    result.py            what a run came to

Only here do `kvmmm.mm` and `kvmmm.platform.kvm` meet.
"""
