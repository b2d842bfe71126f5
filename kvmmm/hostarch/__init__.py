"""Words of the machine: addresses, ranges, access bits. Pure values, no state, nothing imported.

Four address spaces, each with a type of its own so that mypy refuses to mix them:

    GuestVirt   gva   what an instruction of the guest uses
    GuestPhys   gpa   what KVM looks up in the memslots
    HostVirt    hva   an address in this process; never leaves safemem, arena, platform.kvm
    FileOffset  fo    an offset in the memfd behind an arena

Ranges are half-open, everywhere, and printed `[0x1000, 0x2000)`. All range arithmetic is
`AddrRange`.
"""
