/* py_segment_lookup.c: SegmentSet's arguments and its lookups. */
#include "py_segment.h"

static PyObject *limit; /* 2^64 */

/* Made when first asked for; NULL with MemoryError. */
static PyObject *limit_object(void)
{
    if (!limit) {
        PyObject *one = PyLong_FromLong(1), *bits = PyLong_FromLong(64);
        if (one && bits)
            limit = PyNumber_Lshift(one, bits);
        Py_XDECREF(one);
        Py_XDECREF(bits);
    }
    return limit;
}

PyObject *py_end_of(uint64_t last)
{
    return last < UINT64_MAX ? PyLong_FromUnsignedLongLong(last + 1) : Py_XNewRef(limit_object());
}

int py_boundary_of(PyObject *object, uint64_t *addr)
{
    *addr = PyLong_AsUnsignedLongLong(object);
    if (*addr != UINT64_MAX || !PyErr_Occurred())
        return BOUNDARY_INSIDE;
    if (!PyErr_ExceptionMatches(PyExc_OverflowError))
        return -1;
    PyErr_Clear();
    PyObject *top = limit_object();
    int above = top ? PyObject_RichCompareBool(object, top, Py_GT) : -1;
    int equal = above ? 0 : PyObject_RichCompareBool(object, top, Py_EQ);
    if (above < 0 || equal < 0)
        return -1;
    return above ? BOUNDARY_ABOVE : equal ? BOUNDARY_LIMIT : BOUNDARY_BELOW;
}

int py_range_of(PyObject *start, PyObject *end, uint64_t *start_ret, uint64_t *last_ret)
{
    uint64_t first, end_addr;
    int start_where = py_boundary_of(start, &first);
    int end_where = start_where < 0 ? -1 : py_boundary_of(end, &end_addr);
    if (end_where < 0)
        return -1;
    *start_ret = start_where == BOUNDARY_BELOW ? 0 : first;
    *last_ret = end_where == BOUNDARY_INSIDE ? end_addr - 1 : UINT64_MAX;
    if (start_where >= BOUNDARY_LIMIT || end_where == BOUNDARY_BELOW)
        return 0;
    return !(end_where == BOUNDARY_INSIDE && end_addr <= *start_ret);
}

bool py_has_arguments(const char *name, Py_ssize_t n, Py_ssize_t wanted)
{
    if (n == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments (%zd given)", name, wanted, n);
    return false;
}

PyObject *py_segment_tuple(uint64_t start, uint64_t last, void *value)
{
    Py_INCREF((PyObject *)value); /* first: an allocation below may run whatever drops it */
    PyObject *start_object = PyLong_FromUnsignedLongLong(start);
    PyObject *end_object = py_end_of(last);
    PyObject *tuple = start_object && end_object ? PyTuple_New(3) : NULL;
    if (!tuple) {
        Py_XDECREF(start_object);
        Py_XDECREF(end_object);
        Py_DECREF((PyObject *)value);
        return NULL;
    }
    PyTuple_SetItem(tuple, 0, start_object);
    PyTuple_SetItem(tuple, 1, end_object);
    PyTuple_SetItem(tuple, 2, value);
    return tuple;
}

static PyObject *tuple_at(const struct segment_set *set, struct segment_position p)
{
    if (segment_is_end(set, p))
        Py_RETURN_NONE;
    struct segment s = segment_at(set, p);
    return py_segment_tuple(s.start, s.last, s.value);
}

/* The segment that covers an address: 1, or 0 for none; -1 with an exception. */
static int cover(PyObject *op, PyObject *addr_object, struct segment *s)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    uint64_t addr;
    struct segment_position p;
    int where = py_boundary_of(addr_object, &addr);
    if (where != BOUNDARY_INSIDE)
        return where < 0 ? -1 : 0;
    if (!segment_floor(set, addr, &p))
        return 0;
    *s = segment_at(set, p);
    return addr <= s->last;
}

PyObject *py_segment_find(PyObject *op, PyObject *addr)
{
    struct segment s;
    int found = cover(op, addr, &s);
    if (found <= 0)
        return found ? NULL : Py_NewRef(Py_None);
    return py_segment_tuple(s.start, s.last, s.value);
}

PyObject *py_segment_find_value(PyObject *op, PyObject *addr)
{
    struct segment s;
    int found = cover(op, addr, &s);
    if (found <= 0)
        return found ? NULL : Py_NewRef(Py_None);
    return Py_NewRef((PyObject *)s.value);
}

PyObject *py_segment_lower_bound(PyObject *op, PyObject *addr_object)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    uint64_t addr;
    int where = py_boundary_of(addr_object, &addr);
    if (where < 0)
        return NULL;
    if (where >= BOUNDARY_LIMIT)
        Py_RETURN_NONE;
    return tuple_at(set, segment_locate(set, where == BOUNDARY_BELOW ? 0 : addr));
}

PyObject *py_segment_next_segment(PyObject *op, PyObject *addr_object)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    uint64_t addr;
    int where = py_boundary_of(addr_object, &addr);
    if (where < 0)
        return NULL;
    if (where >= BOUNDARY_LIMIT)
        Py_RETURN_NONE;
    if (where == BOUNDARY_BELOW)
        addr = 0;
    struct segment_position p = segment_locate(set, addr);
    if (!segment_is_end(set, p) && segment_at(set, p).start < addr)
        p = segment_next(set, p);
    return tuple_at(set, p);
}

PyObject *py_segment_prev_segment(PyObject *op, PyObject *addr_object)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    uint64_t addr;
    int where = py_boundary_of(addr_object, &addr);
    if (where < 0)
        return NULL;
    if (where == BOUNDARY_BELOW)
        Py_RETURN_NONE;
    struct segment_position p = {set->n_blocks, 0};
    if (where == BOUNDARY_INSIDE)
        p = segment_locate(set, addr);
    if (!segment_prev(set, &p))
        Py_RETURN_NONE;
    if (where == BOUNDARY_LIMIT || where == BOUNDARY_ABOVE || segment_at(set, p).last < addr)
        return tuple_at(set, p);
    Py_RETURN_NONE;
}

PyObject *py_segment_find_gap(PyObject *op, PyObject *addr_object)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    uint64_t addr;
    int where = py_boundary_of(addr_object, &addr);
    if (where != BOUNDARY_INSIDE)
        return where < 0 ? NULL : Py_NewRef(Py_None);
    struct segment_position p = segment_locate(set, addr), before = p;
    bool is_end = segment_is_end(set, p);
    if (!is_end && segment_at(set, p).start <= addr)
        Py_RETURN_NONE;
    uint64_t start = segment_prev(set, &before) ? segment_at(set, before).last + 1 : 0;
    PyObject *end = py_end_of(is_end ? UINT64_MAX : segment_at(set, p).start - 1);
    return end ? Py_BuildValue("KN", (unsigned long long)start, end) : NULL;
}

/* A power of two from a keyword argument; 0 with an exception. */
static uint64_t alignment_of(PyObject *object)
{
    uint64_t align_bytes = PyLong_AsUnsignedLongLong(object);
    if (align_bytes == UINT64_MAX && PyErr_Occurred())
        return 0;
    if (!align_bytes || (align_bytes & (align_bytes - 1))) {
        PyErr_SetString(PyExc_ValueError, "align_bytes must be a power of two");
        return 0;
    }
    return align_bytes;
}

PyObject *py_segment_find_large_gap(PyObject *op, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    uint64_t start, last, length_bytes, align_bytes = 4096, found;
    int top_down = 0;
    if (!py_has_arguments("find_large_gap", n, 3))
        return NULL;
    for (Py_ssize_t i = 0; i < (names ? PyTuple_Size(names) : 0); i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        if (!PyUnicode_CompareWithASCIIString(name, "align_bytes"))
            align_bytes = alignment_of(args[n + i]);
        else if (!PyUnicode_CompareWithASCIIString(name, "top_down"))
            top_down = PyObject_IsTrue(args[n + i]);
        else
            return PyErr_Format(PyExc_TypeError, "find_large_gap() has no argument %R", name);
        if (!align_bytes || top_down < 0)
            return NULL;
    }
    int some = py_range_of(args[0], args[1], &start, &last);
    int where = some < 0 ? -1 : py_boundary_of(args[2], &length_bytes);
    if (where < 0)
        return NULL;
    if (where == BOUNDARY_BELOW || (where == BOUNDARY_INSIDE && !length_bytes)) {
        PyErr_SetString(PyExc_ValueError, "length_bytes must be above zero");
        return NULL;
    }
    if (!some || where == BOUNDARY_ABOVE)
        Py_RETURN_NONE;
    if (where == BOUNDARY_LIMIT)
        length_bytes = 0; /* as segment.h has it */
    struct segment_set *set = &((struct py_segment_set *)op)->set;
    if (!segment_find_gap(set, start, last, length_bytes, align_bytes, top_down, &found))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(found);
}
