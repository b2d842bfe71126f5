/* py_pinned.c: PinnedWindow, pieces of files side by side in one host window.
 *
 * Frames that lie anywhere in their files become one contiguous buffer. It is mapped for as long as a buffer on it
 * is held; then it is unmapped, and whoever keeps the frames for it is told, in this order: nobody can reach a
 * frame through it that has been given to somebody else.
 */
#include <errno.h>
#include <sys/mman.h>

#include "py_copy.h"

#define PAGE_MASK 4095

struct py_pinned {
    PyObject_HEAD
    uint8_t *base;
    Py_ssize_t n_bytes;
    PyObject *on_release; /* NULL: nobody is to be told */
    int readonly;
};

static PyTypeObject *py_pinned_type;

/* One (fd, offset, n_bytes); 0, or -1 with an exception set. */
static int parse_piece(PyObject *piece, int *fd, long long *offset, Py_ssize_t *n_bytes)
{
    if (!PyTuple_Check(piece)) {
        PyErr_SetString(PyExc_TypeError, "a piece is a tuple (fd, offset, n_bytes)");
        return -1;
    }
    if (!PyArg_ParseTuple(piece, "iLn", fd, offset, n_bytes))
        return -1;
    if (*offset < 0 || *n_bytes <= 0 || ((*offset | *n_bytes) & PAGE_MASK)) {
        PyErr_SetString(PyExc_ValueError, "a piece is made of whole pages, one or more");
        return -1;
    }
    return 0;
}

static Py_ssize_t total_of(PyObject *pieces)
{
    Py_ssize_t total = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(pieces); i++) {
        int fd;
        long long offset;
        Py_ssize_t n_bytes;
        if (parse_piece(PyTuple_GetItem(pieces, i), &fd, &offset, &n_bytes))
            return -1;
        if (__builtin_add_overflow(total, n_bytes, &total)) {
            PyErr_SetString(PyExc_OverflowError, "the pieces are longer than any window");
            return -1;
        }
    }
    if (!total)
        PyErr_SetString(PyExc_ValueError, "a window has one piece at least");
    return total ? total : -1;
}

/* Map every piece over its part of the window; -errno when the host has had enough, 1 with an exception set. */
static int map_pieces(struct py_pinned *self, PyObject *pieces)
{
    uint8_t *at = self->base;
    int prot = self->readonly ? PROT_READ : PROT_READ | PROT_WRITE;
    for (Py_ssize_t i = 0; i < PyTuple_Size(pieces); i++) {
        int fd;
        long long offset;
        Py_ssize_t n_bytes;
        if (parse_piece(PyTuple_GetItem(pieces, i), &fd, &offset, &n_bytes))
            return 1;
        if (n_bytes > self->base + self->n_bytes - at) {
            PyErr_SetString(PyExc_ValueError, "the pieces have grown meanwhile");
            return 1;
        }
        if (mmap(at, (size_t)n_bytes, prot, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) == MAP_FAILED)
            return -errno;
        at += n_bytes;
    }
    /* A number that is asked twice may answer twice. What is not mapped over may not be touched. */
    if (at != self->base + self->n_bytes) {
        PyErr_SetString(PyExc_ValueError, "the pieces have shrunk meanwhile");
        return 1;
    }
    return 0;
}

static PyObject *new_window(PyTypeObject *type, PyObject *pieces, PyObject *on_release, bool writable)
{
    Py_ssize_t n_bytes = total_of(pieces);
    if (n_bytes < 0)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct py_pinned *self = (struct py_pinned *)alloc(type, 0);
    if (!self)
        return NULL;
    self->readonly = !writable;
    void *base = mmap(NULL, (size_t)n_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int rc = base == MAP_FAILED ? -errno : 0;
    if (!rc) {
        self->base = base;
        self->n_bytes = n_bytes;
        rc = map_pieces(self, pieces);
    }
    if (!rc) {
        self->on_release = Py_NewRef(on_release);
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return rc < 0 ? py_raise_errno(-rc) : NULL;
}

/* PinnedWindow(pieces, on_release, writable=True). When it fails on_release is not called. */
static PyObject *pinned_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pieces", "on_release", "writable", NULL};
    PyObject *list, *on_release;
    int writable = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O|p", names, &PyList_Type, &list, &on_release, &writable))
        return NULL;
    /* A number in it may be asked by code that changes the list. */
    PyObject *pieces = PyList_AsTuple(list);
    PyObject *window = pieces ? new_window(type, pieces, on_release, writable) : NULL;
    Py_XDECREF(pieces);
    return window;
}

/* Say once that it is over. Whatever runs here may be in the middle of something: its exception is kept, and ours
 * is only reported. */
static void tell(struct py_pinned *self, PyObject *is_collected)
{
    PyObject *on_release = self->on_release;
    self->on_release = NULL;
    if (!on_release)
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *answer = PyObject_CallFunctionObjArgs(on_release, is_collected, NULL);
    if (answer)
        Py_DECREF(answer);
    else
        PyErr_WriteUnraisable(on_release);
    PyErr_Restore(type, value, traceback);
    Py_DECREF(on_release);
}

static void pinned_dealloc(PyObject *op)
{
    struct py_pinned *self = (struct py_pinned *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->base)
        munmap(self->base, (size_t)self->n_bytes); /* no buffer can be out: each holds a reference */
    tell(self, Py_False);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

/* The collector found it, maybe with all that on_release needs: that is whole only now, before anything is
 * cleared. It is still mapped; so frames must not be given to somebody else before the collector is done. */
static void pinned_finalize(PyObject *op) { tell((struct py_pinned *)op, Py_True); }

/* Without a tp_clear: a cycle is broken elsewhere, at the buffer, so that nobody sees this without its memory. */
static int pinned_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((struct py_pinned *)op)->on_release);
    return 0;
}

static int pinned_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    struct py_pinned *self = (struct py_pinned *)op;
    return PyBuffer_FillInfo(view, op, self->base, self->n_bytes, self->readonly, flags);
}

static PyType_Slot pinned_slots[] = {
    {Py_tp_new, pinned_new},
    {Py_tp_dealloc, pinned_dealloc},
    {Py_tp_finalize, pinned_finalize},
    {Py_tp_traverse, pinned_traverse},
    {Py_bf_getbuffer, pinned_getbuffer},
    {0, NULL},
};

static PyType_Spec pinned_spec = {
    .name = "kvmmm._core.PinnedWindow",
    .basicsize = sizeof(struct py_pinned),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = pinned_slots,
};

int py_pinned_register(PyObject *module) { return py_add_type(module, &pinned_spec, &py_pinned_type); }
