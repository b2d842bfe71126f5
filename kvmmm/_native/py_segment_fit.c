/* py_segment_fit.c: SegmentSet's move_fit: an allocator's usual case in one call. */
#include "py_segment.h"

/* Where a piece of n_bytes fits into a segment, at fo % align == phase and not before hint. */
static bool fits(struct segment s, uint64_t hint, uint64_t n_bytes, uint64_t align, uint64_t phase, uint64_t *fo)
{
    *fo = s.start > hint ? s.start : hint;
    *fo += (phase - *fo) & (align - 1);
    return *fo >= s.start && *fo <= s.last && s.last - *fo >= n_bytes - 1;
}

/* What was inserted goes again, with the exception that is set staying. */
static void take_back(PyObject *other, PyObject *const *range)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_XDECREF(py_segment_remove(other, range, 2));
    PyErr_Restore(type, value, traceback);
}

/* move_fit(other, value, hint, length, align, phase) */
PyObject *py_segment_move_fit(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    uint64_t number[4], fo;
    if (!py_has_arguments("move_fit", n, 6))
        return NULL;
    if (!PyObject_TypeCheck(args[0], py_segment_set_type) || args[0] == op) {
        PyErr_SetString(PyExc_TypeError, "move_fit() moves into another SegmentSet");
        return NULL;
    }
    for (int i = 0; i < 4; i++)
        number[i] = PyLong_AsUnsignedLongLong(args[2 + i]);
    if (PyErr_Occurred())
        return NULL;
    struct segment_position p = segment_locate(&self->set, number[0]);
    if (!number[1] || !number[2] || (number[2] & (number[2] - 1)) || segment_is_end(&self->set, p) ||
        !fits(segment_at(&self->set, p), number[0], number[1], number[2], number[3], &fo))
        Py_RETURN_NONE;
    PyObject *start = PyLong_FromUnsignedLongLong(fo), *end = py_end_of(fo + number[1] - 1);
    PyObject *range[3] = {start, end, args[1]}, *done = NULL;
    if (start && end)
        done = py_segment_insert(args[0], range, 3);
    if (done) {
        Py_DECREF(done);
        done = py_segment_remove(op, range, 2);
        if (!done)
            take_back(args[0], range);
    }
    Py_XDECREF(end);
    if (!done)
        Py_CLEAR(start);
    Py_XDECREF(done);
    return start;
}
