"""Host memory, and the boundary to C.

ffi             the only module that imports the compiled core; what needs C imports it there
block           memory that is lent for a call, and may fault: `Block`, `BlockSeq`
loan            how long it may be used
stream          who reads into it, or writes from it: `Reader`, `Writer`, and adapters
file_stream     files and sockets as such
"""
