"""What the memory manager asks of a platform (`base`), and the platforms: so far `kvm`.

`base` holds consumer-side interfaces: what `kvmmm.mm` needs, and nothing that a platform could
also do. `mirror` is the part of a platform that needs no KVM: guest memory in a host window.
"""
