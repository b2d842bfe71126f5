/* py_copy_run.c: one copy, from finding the first byte to the last, and whom it asks on the way. */
#include "py_copy.h"

enum outcome { MOVED, MISSED, FAULTED, PAUSED };

/* So much at most without looking whether somebody pressed Ctrl-C; and so often Python serves the same
 * address, which takes more tries than one only if another thread takes away what it has made. */
enum { QUANTUM_BYTES = 64 << 20, MAX_TRIES = 100 };

static PyObject *name_serve, *name_failed, *name_obj;

/* ---- numbers and buffers ---------------------------------------------------------------------------- */

int py_copy_number_slowly(PyObject *object, uint64_t *ret)
{
    PyErr_Clear(); /* of the quick try */
    PyObject *index = PyNumber_Index(object);
    if (!index)
        return -1;
    unsigned long long number = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) {
        /* Below zero or above 64 bits: no address space reaches that far. */
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
    }
    *ret = number;
    return 0;
}

/* Whether touching a buffer of this object may fault, or wait for another thread: anything may but what
 * lives in the interpreter's own heap. */
static bool may_block(PyObject *object)
{
    if (PyBytes_CheckExact(object) || PyByteArray_CheckExact(object))
        return false;
    if (!Py_IS_TYPE(object, &PyMemoryView_Type))
        return true;
    PyObject *base = PyObject_GetAttr(object, name_obj);
    if (!base) {
        PyErr_Clear();
        return true;
    }
    bool is_plain = PyBytes_CheckExact(base) || PyByteArray_CheckExact(base);
    Py_DECREF(base);
    return !is_plain;
}

static int export(PyObject *object, struct py_copy_buffer *b, int flags)
{
    if (PyObject_GetBuffer(object, &b->view, flags)) {
        if (PyErr_ExceptionMatches(PyExc_BufferError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "a C-contiguous%s buffer is needed, not %R",
                         flags & PyBUF_WRITABLE ? ", writable" : "", object);
        }
        return -1;
    }
    b->may_block = may_block(object);
    if (b->may_block)
        kvmmm_safecopy_own();
    return 0;
}

int py_copy_source(PyObject *object, struct py_copy_buffer *b)
{
    if (PyBytes_CheckExact(object)) {
        /* Immutable, and the caller holds it: nothing is to be released. */
        b->view.obj = NULL;
        b->view.buf = PyBytes_AsString(object);
        b->view.len = PyBytes_Size(object);
        b->may_block = false;
        return 0;
    }
    if (PyUnicode_Check(object)) {
        Py_ssize_t n_bytes;
        const char *utf8 = PyUnicode_AsUTF8AndSize(object, &n_bytes); /* kept by the object */
        if (!utf8)
            return -1;
        b->may_block = false;
        return PyBuffer_FillInfo(&b->view, object, (void *)utf8, n_bytes, 1, PyBUF_SIMPLE);
    }
    return export(object, b, PyBUF_C_CONTIGUOUS);
}

int py_copy_target(PyObject *object, struct py_copy_buffer *b)
{
    return export(object, b, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE);
}

void py_copy_release(struct py_copy_buffer *b)
{
    if (b->view.obj)
        PyBuffer_Release(&b->view);
}

/* ---- asking Python ---------------------------------------------------------------------------------- */

int py_copy_fail(const struct py_copy *c, const char *why)
{
    PyObject *text = PyUnicode_FromString(why), *addr = PyLong_FromUnsignedLongLong(c->addr);
    PyObject *done = PyLong_FromUnsignedLongLong(c->done), *before = PyLong_FromUnsignedLongLong(c->before);
    PyObject *n_bytes = PyLong_FromUnsignedLongLong(c->n_bytes), *access = PyLong_FromLong(c->access);
    PyObject *none = NULL;
    if (text && addr && done && before && n_bytes && access)
        none = PyObject_CallMethodObjArgs((PyObject *)c->core, name_failed, text, addr, done, n_bytes, access, before,
                                          NULL);
    if (none)
        PyErr_SetString(PyExc_SystemError, "_copy_failed did not raise");
    PyObject *all[] = {text, addr, done, before, n_bytes, access, none};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        Py_XDECREF(all[i]);
    return -1;
}

int64_t py_copy_serve(struct py_copy *c, unsigned *n_tries)
{
    if (++*n_tries > MAX_TRIES)
        return py_copy_fail(c, "stuck");
    const void *there = c->word ? c->word : c->host ? c->host + c->done : NULL;
    PyObject *args[] = {
        PyLong_FromUnsignedLongLong(c->addr),  PyLong_FromUnsignedLongLong(c->done),
        PyLong_FromUnsignedLongLong(c->n_bytes), PyLong_FromLong(c->access),
        PyLong_FromLong(c->flags | (c->may_block ? PY_COPY_MAY_BLOCK : 0)), PyLong_FromVoidPtr((void *)there),
        PyLong_FromUnsignedLongLong(c->before),
    };
    bool is_whole = true;
    for (size_t i = 0; i < sizeof args / sizeof *args; i++)
        is_whole = is_whole && args[i];
    PyObject *answer = is_whole ? PyObject_CallMethodObjArgs((PyObject *)c->core, name_serve, args[0], args[1], args[2],
                                                             args[3], args[4], args[5], args[6], NULL)
                                : NULL;
    for (size_t i = 0; i < sizeof args / sizeof *args; i++)
        Py_XDECREF(args[i]);
    if (!answer)
        return -1;
    long long moved = PyLong_AsLongLong(answer);
    Py_DECREF(answer);
    if (moved == -1 && !PyErr_Occurred()) {
        c->flags = (c->flags & ~PY_COPY_MECHANISM_MASK) | PY_COPY_INTERNAL;
        return 0;
    }
    if (moved >= 0 && (uint64_t)moved > c->n_bytes - c->done) {
        PyErr_SetString(PyExc_SystemError, "_serve_copy says that it has moved more than there is");
        return -1;
    }
    return moved;
}

/* ---- the copy ---------------------------------------------------------------------------------------- */

void py_copy_settle(struct py_copy *c)
{
    unsigned mechanism = c->flags & PY_COPY_MECHANISM_MASK;
    if (mechanism && ((c->flags & (PY_COPY_IGNORE_PERMISSIONS | PY_COPY_INACTIVE)) ||
                      (mechanism == PY_COPY_WALK && !c->core->walk)))
        c->flags = (c->flags & ~PY_COPY_MECHANISM_MASK) | PY_COPY_INTERNAL;
}

int py_copy_begin_slowly(struct py_copy *c)
{
    py_copy_settle(c);
    if (c->addr <= c->core->max_addr && c->n_bytes <= c->core->max_addr - c->addr)
        return 0;
    return py_copy_fail(c, "range");
}

uintptr_t py_copy_find(const struct py_copy *c, uint64_t n, uint64_t *n_ret)
{
    const struct py_copy_core *core = c->core;
    uint64_t addr = c->addr + c->done;
    uintptr_t hva;
    switch (c->flags & PY_COPY_MECHANISM_MASK) {
    case PY_COPY_WALK:
        return kvmmm_walk_find(core->walk, addr, n, c->access, n_ret);
    case PY_COPY_MIRROR:
        return core->mirror ? kvmmm_mirror_find(core->mirror, addr, n, c->access, n_ret) : 0;
    case PY_COPY_AUTO:
        /* Resident in the mirror, one addition is all; elsewhere the frame table knows. */
        if (core->uses_mirror && core->mirror && !(c->flags & (PY_COPY_IGNORE_PERMISSIONS | PY_COPY_INACTIVE)) &&
            (hva = kvmmm_mirror_find(core->mirror, addr, n, c->access, n_ret)))
            return hva;
    }
    unsigned need = c->flags & PY_COPY_IGNORE_PERMISSIONS ? c->access << KVMMM_FRAME_MAX_SHIFT : c->access;
    return core->frames.chunks ? kvmmm_frames_find(&core->frames, addr, n, need, n_ret) : 0;
}

static enum outcome move_some(struct py_copy *c, uint64_t quantum, struct kvmmm_fault *fault)
{
    uint64_t end = c->n_bytes - c->done > quantum ? c->done + quantum : c->n_bytes, n;
    while (c->done < end) {
        uintptr_t hva = py_copy_find(c, end - c->done, &n);
        if (!hva)
            return MISSED;
        uint8_t *host = c->host ? c->host + c->done : NULL;
        size_t moved = c->access == KVMMM_FRAME_READ ? kvmmm_copy(host, (const void *)hva, n, fault)
                       : host                        ? kvmmm_copy((void *)hva, host, n, fault)
                                                     : kvmmm_zero((void *)hva, n, fault);
        c->done += moved;
        if (moved < n)
            return FAULTED;
    }
    return c->done < c->n_bytes ? PAUSED : MOVED;
}

/* Others may run meanwhile: so whoever takes frames away has to wait. */
static enum outcome move_released(struct py_copy *c, struct kvmmm_fault *fault)
{
    struct py_copy_core *core = c->core;
    struct kvmmm_walk *walk = (c->flags & PY_COPY_MECHANISM_MASK) == PY_COPY_WALK ? core->walk : NULL;
    enum outcome outcome;
    unsigned phase = kvmmm_section_enter(&core->section);
    unsigned walk_phase = walk ? kvmmm_section_enter(&walk->section) : 0;
    Py_BEGIN_ALLOW_THREADS
    outcome = move_some(c, QUANTUM_BYTES, fault);
    if (walk)
        kvmmm_section_leave(&walk->section, walk_phase);
    kvmmm_section_leave(&core->section, phase);
    Py_END_ALLOW_THREADS
    return outcome;
}

/* 0 to go on by internal mappings, -1 with an error set. */
static int after_fault(struct py_copy *c, const struct kvmmm_fault *fault)
{
    uintptr_t host = (uintptr_t)c->host;
    if (host && fault->addr >= host && fault->addr - host < c->n_bytes)
        return py_copy_fail(c, "buffer");
    if ((c->flags & PY_COPY_MECHANISM_MASK) == PY_COPY_INTERNAL || (c->flags & PY_COPY_IGNORE_PERMISSIONS))
        return py_copy_fail(c, "bus");
    c->flags = (c->flags & ~PY_COPY_MECHANISM_MASK) | PY_COPY_INTERNAL;
    return 0;
}

/* Copied often enough without the mirror: Python decides whether it is worth a place there. */
static int count_use(struct py_copy *c)
{
    struct py_copy_core *core = c->core;
    uint64_t n;
    if (core->mirror && kvmmm_mirror_find(core->mirror, c->addr, c->n_bytes, c->access, &n) && n == c->n_bytes)
        return 0;
    if (kvmmm_frames_count(&core->frames, c->addr, false) < core->promote_after)
        return 0;
    kvmmm_frames_count(&core->frames, c->addr, true);
    PyObject *done = PyObject_CallMethod((PyObject *)core, "_promote", "KKI", (unsigned long long)c->addr,
                                         (unsigned long long)c->n_bytes, c->access);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

int py_copy_run(struct py_copy *c)
{
    unsigned n_tries = 0;
    while (c->done < c->n_bytes) {
        struct kvmmm_fault fault = {0, 0};
        uint64_t was = c->done;
        bool releases = c->may_block || c->n_bytes - was >= c->core->release_bytes;
        enum outcome outcome = releases ? move_released(c, &fault) : move_some(c, c->n_bytes, &fault);
        if (c->done != was)
            n_tries = 0;
        if (outcome == FAULTED && after_fault(c, &fault))
            return -1;
        if (outcome == PAUSED && PyErr_CheckSignals())
            return -1;
        if (outcome == MISSED) {
            int64_t moved = py_copy_serve(c, &n_tries);
            if (moved < 0)
                return -1;
            c->done += (uint64_t)moved;
        }
    }
    bool is_for_mirror =
        !(c->flags & (PY_COPY_MECHANISM_MASK | PY_COPY_IGNORE_PERMISSIONS | PY_COPY_INACTIVE)) && c->n_bytes;
    return c->core->uses_mirror && is_for_mirror ? count_use(c) : 0;
}

int py_copy_names(void)
{
    name_serve = PyUnicode_InternFromString("_serve_copy");
    name_failed = PyUnicode_InternFromString("_copy_failed");
    name_obj = PyUnicode_InternFromString("obj");
    return name_serve && name_failed && name_obj ? 0 : -1;
}
