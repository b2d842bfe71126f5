"""Host memory, and the boundary to C.

`ffi` is the only module that imports the compiled core; whatever needs C imports it from there.
"""
