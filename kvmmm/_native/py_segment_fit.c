/* py_segment_fit.c: SegmentSet's move_fit: an allocator's usual case in one call. */
#include "py_segment.h"

/* Where a piece of n_bytes fits into a segment, at fo % align == phase and not before hint. */
static bool fits(struct segment s, uint64_t hint, uint64_t n_bytes, uint64_t align, uint64_t phase, uint64_t *fo)
{
    *fo = s.start > hint ? s.start : hint;
    *fo += (phase - *fo) & (align - 1);
    return *fo >= s.start && *fo <= s.last && s.last - *fo >= n_bytes - 1;
}

/* Adds [fo, last] where it touches no other segment; false: it does, or there is no memory. */
static bool put_apart(struct py_segment_set *other, uint64_t fo, uint64_t last, PyObject *value)
{
    struct segment_set *set = &other->set;
    struct segment_position place = segment_place(set, fo), next = place;
    if (other->busy || value == Py_None)
        return false;
    if (place.index) {
        struct segment_position prev = {place.block, place.index - 1};
        uint64_t prev_last = segment_at(set, prev).last;
        if (prev_last >= fo || prev_last + 1 == fo)
            return false;
        next = segment_next(set, prev);
    }
    if (!segment_is_end(set, next) && segment_at(set, next).start - 1 <= last)
        return false;
    return !segment_insert_at(set, &place, (struct segment){fo, last, Py_NewRef(value)}) || (Py_DECREF(value), false);
}

/* Takes [fo, last] off the end, the beginning or the middle of the segment at p, whose halves share its
 * value; false: it is all of it, or there is no memory. */
static bool cut_off(struct py_segment_set *self, struct segment_position p, uint64_t fo, uint64_t last)
{
    struct segment_set *set = &self->set;
    struct segment s = segment_at(set, p);
    if (self->busy || self->split || (fo == s.start && last == s.last))
        return false;
    if (fo == s.start) {
        segment_move_start(set, p, last + 1);
        return true;
    }
    if (last < s.last) {
        p.index++;
        if (segment_insert_at(set, &p, (struct segment){last + 1, s.last, Py_NewRef((PyObject *)s.value)})) {
            Py_DECREF((PyObject *)s.value);
            return false;
        }
        segment_prev(set, &p);
    }
    segment_move_last(set, p, fo - 1);
    return true;
}

/* What was inserted goes again, with the exception that is set staying. */
static void take_back(PyObject *other, PyObject *const *range)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_XDECREF(py_segment_remove(other, range, 2));
    PyErr_Restore(type, value, traceback);
}

/* The same with whatever neighbours and callbacks there are: 0, or -1 with an exception and nothing moved. */
static int move_slowly(PyObject *op, PyObject *other, PyObject *value, PyObject *start, uint64_t last, bool is_put)
{
    PyObject *end = py_end_of(last);
    PyObject *range[3] = {start, end, value}, *done = end && is_put ? Py_NewRef(Py_None) : NULL;
    if (end && !is_put)
        done = py_segment_insert(other, range, 3);
    if (done) {
        Py_DECREF(done);
        done = py_segment_remove(op, range, 2);
        if (!done)
            take_back(other, range);
    }
    Py_XDECREF(end);
    Py_XDECREF(done);
    return done ? 0 : -1;
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
    uint64_t last = fo + number[1] - 1;
    PyObject *start = PyLong_FromUnsignedLongLong(fo);
    if (!start)
        return NULL;
    bool is_put = put_apart((struct py_segment_set *)args[0], fo, last, args[1]);
    /* Nothing of Python has run: p is still where it was. */
    if (!(is_put && cut_off(self, p, fo, last)) && move_slowly(op, args[0], args[1], start, last, is_put))
        Py_CLEAR(start);
    return start;
}
