"""The composition root: a micro-VM out of device, arena, memory manager, tables and image.

    bundled.py           the guests that come with kvmmm
    image*.py, elf.py    what a guest file holds, checked before any VM exists
    system_area.py       kvmmm's own pages: boot info, rings, IDT, GDT, TSS, stubs, tables
    microvm.py           MicroVM: load, run, stop, close
    exit_handler.py      what each exit means: EPT violations, traps, console, exit status
    emulation.py         instructions that KVM could not emulate, made restartable
    stop_report.py       the facts behind a stop, for report.py to render
    result.py            what a run came to

Only here do `kvmmm.mm` and `kvmmm.platform.kvm` meet.
"""
