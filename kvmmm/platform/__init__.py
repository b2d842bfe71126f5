"""What the memory manager asks of a platform (`base`), and the platforms: so far `kvm`.

`base` holds consumer-side interfaces: what `kvmmm.mm` needs, and nothing that a platform could
also do.
"""
