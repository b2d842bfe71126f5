"""What can back memory, and what can be mapped.

    Mappable   what mmap takes: a file, shared anonymous memory; it says where its bytes lie
    File       what a CPU can be given: frames behind one linear host mapping, reference-counted

    mm ──translate(range, access)──► Mappable ──► [(range, File, file range, perms)]
    mm ◄──invalidate(addresses)───── Mappable      (truncated: look again)

The arena is a File; private anonymous memory has no Mappable, the mm allocates it there. Source:
gVisor pkg/sentry/memmap.
"""
