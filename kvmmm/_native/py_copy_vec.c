/* py_copy_vec.c: many ranges in one call: an AddrRangeSeq and one buffer, or a list of pairs. */
#include "py_copy.h"

static PyObject *name_packed;

/* ---- a sequence of ranges ---------------------------------------------------------------------------- */

/* What AddrRangeSeq.packed holds. */
struct range {
    uint64_t start, n_bytes;
};

/* sequence.packed. The descriptor of the type that was seen last is kept: asking it is several times as
 * quick as asking the object. */
static PyObject *packed_of(PyObject *sequence)
{
    static PyTypeObject *type;
    static PyObject *descriptor;
    static descrgetfunc get;
    if (!Py_IS_TYPE(sequence, type)) {
        PyObject *found = PyObject_GetAttr((PyObject *)Py_TYPE(sequence), name_packed);
        if (!found)
            return NULL;
        descrgetfunc found_get = (descrgetfunc)PyType_GetSlot(Py_TYPE(found), Py_tp_descr_get);
        if (!Py_IS_TYPE(found, &PyMemberDescr_Type)) {
            Py_DECREF(found);
            return PyObject_GetAttr(sequence, name_packed);
        }
        Py_XDECREF((PyObject *)type);
        Py_XDECREF(descriptor);
        type = Py_TYPE(sequence);
        Py_INCREF((PyObject *)type);
        descriptor = found;
        get = found_get;
    }
    PyObject *packed = get(descriptor, sequence, (PyObject *)type);
    if (packed || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return packed;
    PyErr_Clear(); /* a slot that is filled when it is asked for */
    return PyObject_GetAttr(sequence, name_packed);
}

/* The packed ranges (a new reference, which keeps them), or NULL with an error set. */
static PyObject *ranges_of(PyObject *sequence, const struct range **ranges, Py_ssize_t *n_ranges)
{
    PyObject *packed = packed_of(sequence);
    if (!packed && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return PyErr_Format(PyExc_TypeError, "the ranges are an AddrRangeSeq, not %R", sequence);
    }
    if (!packed)
        return NULL;
    if (!PyBytes_CheckExact(packed) || PyBytes_Size(packed) % (Py_ssize_t)sizeof(struct range)) {
        PyErr_Format(PyExc_TypeError, "the ranges are an AddrRangeSeq, not %R", sequence);
        Py_DECREF(packed);
        return NULL;
    }
    *ranges = (const struct range *)PyBytes_AsString(packed);
    *n_ranges = PyBytes_Size(packed) / (Py_ssize_t)sizeof(struct range);
    return packed;
}

/* Each range is in order, the empty ones too, before anything is copied; *total is what they have. */
static int check_ranges(struct py_copy *c, const struct range *ranges, Py_ssize_t n_ranges, uint64_t *total)
{
    uint64_t max_addr = c->core->max_addr, sum = 0;
    for (Py_ssize_t i = 0; i < n_ranges; i++) {
        uint64_t addr = ranges[i].start, n_bytes = ranges[i].n_bytes;
        sum += n_bytes;
        if (addr <= max_addr && n_bytes <= max_addr - addr && sum <= INT64_MAX)
            continue;
        c->addr = addr;
        c->n_bytes = n_bytes;
        if (py_copy_begin_slowly(c))
            return -1;
        PyErr_SetString(PyExc_OverflowError, "the ranges have more bytes than can be counted");
        return -1;
    }
    *total = sum;
    return 0;
}

/* Ranges that lie in one page each and are known to the frame table, from the first on: how many. */
static Py_ssize_t run_quickly(struct py_copy *c, const struct range *ranges, Py_ssize_t n_ranges, uint8_t *host)
{
    const struct py_copy_core *core = c->core;
    if ((c->flags & PY_COPY_MECHANISM_MASK) > PY_COPY_INTERNAL || core->uses_mirror || c->may_block ||
        !core->frames.chunks)
        return 0;
    unsigned need = c->flags & PY_COPY_IGNORE_PERMISSIONS ? c->access << KVMMM_FRAME_MAX_SHIFT : c->access;
    struct kvmmm_fault fault = {0, 0};
    Py_ssize_t i = 0;
    for (uint64_t n; i < n_ranges; i++, host += n) {
        uintptr_t hva = kvmmm_frames_find(&core->frames, ranges[i].start, ranges[i].n_bytes, need, &n);
        if (!hva || n > 4096 || n != ranges[i].n_bytes)
            break;
        size_t moved = c->access == KVMMM_FRAME_READ ? kvmmm_copy(host, (const void *)hva, n, &fault)
                                                     : kvmmm_copy((void *)hva, host, n, &fault);
        if (moved != n)
            break;
        c->before += n;
    }
    return i;
}

static PyObject *run_vec(struct py_copy *c, PyObject *sequence, PyObject *buffer, PyObject *const *values,
                         PyObject *names)
{
    const struct range *ranges = NULL;
    Py_ssize_t n_ranges = 0;
    struct py_copy_buffer b;
    uint64_t total, n_bytes;
    uint8_t *host;
    Py_ssize_t i = 0;
    int flags = names ? py_copy_options(values, names) : 0;
    PyObject *packed = flags < 0 ? NULL : ranges_of(sequence, &ranges, &n_ranges), *result = NULL;
    if (!packed)
        return NULL;
    c->flags = (unsigned)flags;
    py_copy_settle(c);
    if (py_copy_plain(buffer, c->access, &host, &n_bytes)) {
        if (check_ranges(c, ranges, n_ranges, &total))
            goto drop;
        i = total == n_bytes ? run_quickly(c, ranges, n_ranges, host) : 0;
        if (i == n_ranges && total == n_bytes) {
            result = PyLong_FromUnsignedLongLong(total);
            goto drop;
        }
    }
    if (c->access == KVMMM_FRAME_READ ? py_copy_target(buffer, &b) : py_copy_source(buffer, &b))
        goto drop;
    c->may_block = b.may_block;
    if (check_ranges(c, ranges, n_ranges, &total))
        goto release;
    if (total != (uint64_t)b.view.len) {
        PyErr_Format(PyExc_ValueError, "the ranges have %llu bytes, the buffer %zd", (unsigned long long)total,
                     b.view.len);
        goto release;
    }
    for (i = i ? i : run_quickly(c, ranges, n_ranges, b.view.buf); i < n_ranges; i++) {
        c->addr = ranges[i].start;
        c->n_bytes = ranges[i].n_bytes;
        c->host = (uint8_t *)b.view.buf + c->before;
        c->done = 0;
        if (py_copy_run(c))
            goto release;
        c->before += c->n_bytes;
    }
    result = PyLong_FromUnsignedLongLong(total);
release:
    py_copy_release(&b);
drop:
    Py_DECREF(packed);
    return result;
}

PY_COPY_METHOD(copy_in_vec)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_READ};
    if (n != 2)
        return PyErr_Format(PyExc_TypeError, "copy_in_vec(ranges, dst) takes 2 positional arguments (%zd given)", n);
    return run_vec(&c, args[0], args[1], args + n, names);
}

PY_COPY_METHOD(copy_out_vec)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_WRITE};
    if (n != 2)
        return PyErr_Format(PyExc_TypeError, "copy_out_vec(ranges, src) takes 2 positional arguments (%zd given)", n);
    return run_vec(&c, args[0], args[1], args + n, names);
}

/* ---- a list of pairs ---------------------------------------------------------------------------------- */

/* A HostBufferError counts from the beginning of the list; its buffer is that of one item, which begins
 * where `before` bytes are done. A new error (stolen: the old one), or the same if it is any other. */
static PyObject *in_its_buffer(PyObject *error, uint64_t before)
{
    PyObject *module = PyImport_ImportModule("kvmmm.errors"), *done = NULL, *moved = NULL;
    PyObject *type = module ? PyObject_GetAttrString(module, "HostBufferError") : NULL;
    if (type && PyObject_IsInstance(error, type) == 1 && (done = PyObject_GetAttrString(error, "done"))) {
        unsigned long long n = PyLong_AsUnsignedLongLong(done);
        if (!PyErr_Occurred())
            moved = PyObject_CallFunction(type, "KO", n - before, done);
    }
    PyErr_Clear(); /* then it stays as it is */
    Py_XDECREF(done);
    Py_XDECREF(type);
    Py_XDECREF(module);
    if (!moved)
        return error;
    Py_DECREF(error);
    return moved;
}

/* Note which item failed, on the error that is set; `before` bytes were done when it began. */
static void note_item(Py_ssize_t i, uint64_t before)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error && before)
        error = in_its_buffer(error, before);
    PyObject *item = PyLong_FromSsize_t(i);
    if (error && item && PyObject_SetAttrString(error, "item", item))
        PyErr_Clear(); /* one that takes no attributes */
    Py_XDECREF(item);
    PyErr_Restore(type, error, traceback);
}

/* A pair of the list, held: its address is in *addr, its other half returned; NULL with an error set. */
static PyObject *pair_of(PyObject *list, Py_ssize_t i, uint64_t *addr)
{
    PyObject *pair = PySequence_GetItem(list, i), *half = NULL;
    if (pair && PyTuple_CheckExact(pair) && PyTuple_Size(pair) == 2) {
        half = Py_NewRef(PyTuple_GetItem(pair, 1));
        if (py_copy_number(PyTuple_GetItem(pair, 0), addr))
            Py_CLEAR(half);
    } else if (pair) {
        PyErr_Format(PyExc_TypeError, "item %zd is no pair: %R", i, pair);
    }
    Py_XDECREF(pair);
    return half;
}

static int many_options(PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    if (n != 1 || !(PyList_Check(args[0]) || PyTuple_Check(args[0]))) {
        PyErr_SetString(PyExc_TypeError, "one list or tuple of pairs is expected");
        return -1;
    }
    return names ? py_copy_options(args + n, names) : 0;
}

PY_COPY_METHOD(copy_in_many)
{
    int flags = many_options(args, n, names);
    uint64_t total = 0;
    PyObject *all = flags < 0 ? NULL : PyList_New(0);
    /* The list may change meanwhile, by what its items do when they are asked for their number. */
    for (Py_ssize_t i = 0; all && i < PySequence_Size(args[0]); i++) {
        struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_READ,
                            .before = total, .flags = (unsigned)flags};
        PyObject *length = pair_of(args[0], i, &c.addr), *bytes = NULL;
        if (length && !py_copy_number(length, &c.n_bytes) && !py_copy_begin(&c) &&
            (bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)c.n_bytes))) {
            c.host = (uint8_t *)PyBytes_AsString(bytes);
            if (!py_copy_quickly(&c) && py_copy_run(&c))
                Py_CLEAR(bytes);
            total += c.done;
        }
        Py_XDECREF(length);
        if (!bytes || PyList_Append(all, bytes)) {
            note_item(i, 0);
            Py_CLEAR(all);
        }
        Py_XDECREF(bytes);
    }
    return all;
}

PY_COPY_METHOD(copy_out_many)
{
    int flags = many_options(args, n, names), rc = 0;
    uint64_t total = 0;
    if (flags < 0)
        return NULL;
    for (Py_ssize_t i = 0; !rc && i < PySequence_Size(args[0]); i++) {
        struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_WRITE,
                            .before = total, .flags = (unsigned)flags};
        struct py_copy_buffer b;
        PyObject *data = pair_of(args[0], i, &c.addr);
        rc = data ? py_copy_source(data, &b) : -1;
        if (!rc) {
            c.host = b.view.buf;
            c.n_bytes = (uint64_t)b.view.len;
            c.may_block = b.may_block;
            rc = py_copy_begin(&c);
            if (!rc && !py_copy_quickly(&c))
                rc = py_copy_run(&c);
            total += c.done;
            py_copy_release(&b);
        }
        Py_XDECREF(data);
        if (rc)
            note_item(i, c.before);
    }
    return rc ? NULL : PyLong_FromUnsignedLongLong(total);
}

int py_copy_vec_names(void)
{
    name_packed = PyUnicode_InternFromString("packed");
    return name_packed ? 0 : -1;
}
