"""What can back memory, and what can be mapped.

    Mappable   what mmap takes: a file, shared anonymous memory; it says where its bytes lie
    File       what a CPU can be given: frames behind one linear host mapping, reference-counted

    mm ──translate(range, access)──► Mappable ──► [(range, File, file range, perms)]
    mm ◄──invalidate(addresses)───── Mappable      (truncated: look again)

    file.py           the protocols
    mapping_set.py    who maps what of a mappable, and where
    shared_memory.py  `SharedMemory`: shared anonymous memory
    host_file.py      `HostFile`: a file of the host, both File and Mappable
    linear_file.py    the File in it: one mapping, references, moving bytes
    references.py     counts by page
    check.py          what `translate` promises, checked

The arena is a File; private anonymous memory has no Mappable, the mm allocates it there. Source:
gVisor pkg/sentry/memmap.
"""
