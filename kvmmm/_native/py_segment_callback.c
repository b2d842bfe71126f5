/* py_segment_callback.c: SegmentSet's callbacks merge and split, and the guard around them. */
#include "py_segment.h"

bool py_segment_begin(struct py_segment_set *self)
{
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "this SegmentSet is being changed already: merge, split and "
                                            "change must not change the set that calls them");
        return false;
    }
    self->busy = true;
    return true;
}

static PyObject *equal_or_none(PyObject *value, PyObject *next_value)
{
    int equal = PyObject_RichCompareBool(value, next_value, Py_EQ);
    return equal < 0 ? NULL : Py_NewRef(equal ? value : Py_None);
}

PyObject *py_segment_merge_equal_call(PyObject *type, PyObject *const *args, Py_ssize_t n)
{
    return py_has_arguments("merge_equal", n, 4) ? equal_or_none(args[2], args[3]) : NULL;
}

PyObject *py_segment_merged(struct py_segment_set *self, uint64_t start, uint64_t next_start,
                            PyObject *value, PyObject *next_value)
{
    if (self->merge == py_segment_merge_equal)
        return equal_or_none(value, next_value);
    PyObject *start_object = PyLong_FromUnsignedLongLong(start);
    PyObject *end_object = PyLong_FromUnsignedLongLong(next_start);
    PyObject *merged = NULL;
    if (start_object && end_object)
        merged = PyObject_CallFunctionObjArgs(self->merge, start_object, end_object, value, next_value, NULL);
    Py_XDECREF(start_object);
    Py_XDECREF(end_object);
    return merged;
}

static PyObject *call_split(struct py_segment_set *self, uint64_t start, uint64_t last, PyObject *value,
                            uint64_t at)
{
    PyObject *start_object = PyLong_FromUnsignedLongLong(start);
    PyObject *end_object = py_end_of(last);
    PyObject *at_object = PyLong_FromUnsignedLongLong(at);
    PyObject *pair = NULL;
    if (start_object && end_object && at_object)
        pair = PyObject_CallFunctionObjArgs(self->split, start_object, end_object, value, at_object, NULL);
    Py_XDECREF(start_object);
    Py_XDECREF(end_object);
    Py_XDECREF(at_object);
    return pair;
}

int py_segment_halves(struct py_segment_set *self, uint64_t start, uint64_t last, PyObject *value,
                      uint64_t at, PyObject **left, PyObject **right)
{
    if (!self->split) {
        *left = Py_NewRef(value);
        *right = Py_NewRef(value);
        return 0;
    }
    PyObject *pair = call_split(self, start, last, value, at);
    if (!pair)
        return -1;
    if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2 || PyTuple_GetItem(pair, 0) == Py_None ||
        PyTuple_GetItem(pair, 1) == Py_None) {
        PyErr_Format(PyExc_TypeError, "split must return a tuple of two values, not %R", pair);
        Py_DECREF(pair);
        return -1;
    }
    *left = Py_NewRef(PyTuple_GetItem(pair, 0));
    *right = Py_NewRef(PyTuple_GetItem(pair, 1));
    Py_DECREF(pair);
    return 0;
}
