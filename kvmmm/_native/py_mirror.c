/* py_mirror.c: MirrorWindow, the mirror's windows as a Python type. kvmmm.platform.mirror subclasses it. */
#include <errno.h>

#include "py_copy.h"

#include <structmember.h>

struct py_mirror {
    PyObject_HEAD
    struct kvmmm_mirror m; /* n_chunks is 0 before init and after release */
    bool busy;             /* a change of ours runs without the GIL */
    long long n_maps, n_clears;
};

enum { PAGE_BYTES = 4096, POPULATE_LONG_BYTES = 64 * PAGE_BYTES, CLEAR_LONG_BYTES = 512 * PAGE_BYTES };
#define WINDOW_BYTES (1ull << KVMMM_MIRROR_SHIFT)

static PyTypeObject *py_mirror_type;

struct kvmmm_mirror *py_mirror_of(PyObject *mirror)
{
    if (PyObject_TypeCheck(mirror, py_mirror_type))
        return &((struct py_mirror *)mirror)->m;
    PyErr_SetString(PyExc_TypeError, "this is no MirrorWindow");
    return NULL;
}

static int mirror_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_mirror *self = (struct py_mirror *)op;
    unsigned long long max_addr;
    if (!PyArg_ParseTuple(args, "K", &max_addr))
        return -1;
    if (self->m.n_chunks || !max_addr || max_addr > 1ull << 57 || max_addr % PAGE_BYTES) {
        PyErr_SetString(PyExc_ValueError, "max_addr must be a multiple of 4 KiB, above 0, at most 2^57");
        return -1;
    }
    int rc = kvmmm_mirror_init(&self->m, max_addr);
    if (!rc)
        return 0;
    py_raise_errno(-rc);
    return -1;
}

/* args[0:2] as a range of pages; -1 with an exception where it is none, or the mirror is not to be changed. */
static int range_of(struct py_mirror *self, PyObject *const *args, Py_ssize_t n, Py_ssize_t n_wanted, uint64_t *range)
{
    if (n != n_wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are needed, not %zd", n_wanted, n);
        return -1;
    }
    range[0] = PyLong_AsUnsignedLongLong(args[0]);
    range[1] = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return -1;
    if (!self->m.n_chunks)
        PyErr_SetString(PyExc_ValueError, "the mirror was released");
    else if (self->busy)
        PyErr_SetString(PyExc_RuntimeError, "another thread changes the mirror");
    else if (range[0] > range[1] || range[1] > self->m.max_addr || (range[0] | range[1]) % PAGE_BYTES)
        PyErr_SetString(PyExc_ValueError, "no range of whole pages below max_addr");
    else
        return 0;
    return -1;
}

static PyObject *result_of(int rc)
{
    if (rc)
        return py_raise_errno(-rc);
    Py_RETURN_NONE;
}

/* map(start, end, fd, fo, perms) */
static PyObject *mirror_map(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2];
    if (range_of(self, args, n, 5, range))
        return NULL;
    long fd = PyLong_AsLong(args[2]), perms = PyLong_AsLong(args[4]);
    uint64_t fo = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred())
        return NULL;
    bool fits = range[0] < range[1] && range[0] / WINDOW_BYTES == (range[1] - 1) / WINDOW_BYTES;
    if (!fits || perms < 1 || perms > 7 || fd < 0 || fd > INT32_MAX || fo % PAGE_BYTES || fo > 1ull << 62) {
        PyErr_SetString(PyExc_ValueError, "a run lies in one GiB, of a file's pages, with some permission");
        return NULL;
    }
    int rc;
    kvmmm_mirror_forget(&self->m, range[0], range[1]);
    /* What is replaced may be many pages, 0.1 us each; what is new costs the same whatever its length. */
    if (range[1] - range[0] < CLEAR_LONG_BYTES || kvmmm_mirror_is_bare(&self->m, range[0], range[1])) {
        rc = kvmmm_mirror_place(&self->m, range[0], range[1], (int)fd, fo, perms & 2);
    } else {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS
        rc = kvmmm_mirror_place(&self->m, range[0], range[1], (int)fd, fo, perms & 2);
        Py_END_ALLOW_THREADS
        self->busy = false;
    }
    if (!rc) {
        kvmmm_mirror_admit(&self->m, range[0], range[1], perms & 2);
        self->n_maps++;
    }
    return result_of(rc);
}

/* populate(start, end) */
static PyObject *mirror_populate(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2];
    if (range_of(self, args, n, 2, range))
        return NULL;
    int rc;
    if (range[1] - range[0] < POPULATE_LONG_BYTES) {
        rc = kvmmm_mirror_populate(&self->m, range[0], range[1]);
    } else {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS
        rc = kvmmm_mirror_populate(&self->m, range[0], range[1]);
        Py_END_ALLOW_THREADS
        self->busy = false;
    }
    return result_of(rc);
}

/* forget(start, end) */
static PyObject *mirror_forget(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2];
    if (range_of(self, args, n, 2, range))
        return NULL;
    kvmmm_mirror_forget(&self->m, range[0], range[1]);
    Py_RETURN_NONE;
}

/* clear(start, end) */
static PyObject *mirror_clear(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2];
    if (range_of(self, args, n, 2, range))
        return NULL;
    kvmmm_mirror_forget(&self->m, range[0], range[1]);
    if (kvmmm_mirror_is_bare(&self->m, range[0], range[1]))
        Py_RETURN_NONE;
    int rc;
    self->n_clears++;
    if (range[1] - range[0] < CLEAR_LONG_BYTES) {
        rc = kvmmm_mirror_clear(&self->m, range[0], range[1]);
    } else {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS
        rc = kvmmm_mirror_clear(&self->m, range[0], range[1]);
        Py_END_ALLOW_THREADS
        self->busy = false;
    }
    return result_of(rc);
}

/* clear_windows(start, end) */
static PyObject *mirror_clear_windows(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2];
    if (range_of(self, args, n, 2, range))
        return NULL;
    int rc = 0;
    for (uint64_t at = range[0] & -WINDOW_BYTES; at < range[1]; at += WINDOW_BYTES) {
        kvmmm_mirror_forget(&self->m, at, at + WINDOW_BYTES);
        int err = kvmmm_mirror_clear_window(&self->m, at);
        rc = err ? err : rc;
    }
    self->n_clears++;
    return result_of(rc);
}

/* find(addr, n_bytes, access) -> (hva, n_bytes) | None */
static PyObject *mirror_find(PyObject *op, PyObject *args)
{
    unsigned long long addr, n_bytes;
    unsigned access;
    if (!PyArg_ParseTuple(args, "KKI", &addr, &n_bytes, &access))
        return NULL;
    uint64_t n_found;
    uintptr_t hva = kvmmm_mirror_find(&((struct py_mirror *)op)->m, addr, n_bytes, access, &n_found);
    if (!hva)
        Py_RETURN_NONE;
    return Py_BuildValue("KK", (unsigned long long)hva, (unsigned long long)n_found);
}

/* victim(start, end) -> (start, end, n_runs) | None */
static PyObject *mirror_victim(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mirror *self = (struct py_mirror *)op;
    uint64_t range[2], n_runs;
    if (range_of(self, args, n, 2, range))
        return NULL;
    if (!kvmmm_mirror_victim(&self->m, &range[0], &range[1], &n_runs))
        Py_RETURN_NONE;
    return Py_BuildValue("KKK", (unsigned long long)range[0], (unsigned long long)range[1],
                         (unsigned long long)n_runs);
}

/* vmas_needed(addr) -> int */
static PyObject *mirror_vmas_needed(PyObject *op, PyObject *addr)
{
    const struct kvmmm_mirror *m = &((struct py_mirror *)op)->m;
    uint64_t index = PyLong_AsUnsignedLongLong(addr) >> KVMMM_MIRROR_SHIFT;
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(index < m->n_chunks && m->chunks[index] ? 2 : 4);
}

static PyObject *mirror_windows(PyObject *op, PyObject *ignored)
{
    const struct kvmmm_mirror *m = &((struct py_mirror *)op)->m;
    PyObject *list = PyList_New(0);
    for (uint64_t i = 0; list && i < m->n_chunks; i++) {
        const struct kvmmm_mirror_chunk *c = m->chunks[i];
        PyObject *pair = c ? Py_BuildValue("KK", (unsigned long long)i << KVMMM_MIRROR_SHIFT,
                                           (unsigned long long)c->hva)
                           : NULL;
        if (c && (!pair || PyList_Append(list, pair)))
            Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

static PyObject *mirror_release(PyObject *op, PyObject *ignored)
{
    struct py_mirror *self = (struct py_mirror *)op;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "another thread changes the mirror");
        return NULL;
    }
    kvmmm_mirror_release(&self->m);
    Py_RETURN_NONE;
}

static void mirror_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    kvmmm_mirror_release(&((struct py_mirror *)op)->m);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyObject *mirror_get_all(PyObject *op, void *closure)
{
    return PyLong_FromUnsignedLongLong(kvmmm_mirror_count_all());
}

#define FAST(name) (PyCFunction)(void (*)(void))name, METH_FASTCALL
static PyMethodDef mirror_methods[] = {
    {"map", FAST(mirror_map), "Map a run, and let copies in."},
    {"populate", FAST(mirror_populate), "Have page-table entries made."},
    {"forget", FAST(mirror_forget), "No copy finds the range any more."},
    {"clear", FAST(mirror_clear), "Forget a range, and map nothing there."},
    {"clear_windows", FAST(mirror_clear_windows), "Clear every window that a range touches."},
    {"find", mirror_find, METH_VARARGS, "Where copies go, or None."},
    {"victim", FAST(mirror_victim), "What to clear to be rid of a run."},
    {"vmas_needed", mirror_vmas_needed, METH_O, "How many VMAs a run may add at an address."},
    {"windows", mirror_windows, METH_NOARGS, "Guest and host address of each window."},
    {"release", mirror_release, METH_NOARGS, "Unmap all windows."},
    {NULL, NULL, 0, NULL},
};

#define COUNT(name, field, doc) {name, T_ULONGLONG, offsetof(struct py_mirror, field), READONLY, doc}
static PyMemberDef mirror_members[] = {
    COUNT("max_addr", m.max_addr, "Exclusive end of the guest addresses."),
    COUNT("n_vmas", m.n_vmas, "VMAs of the windows, as far as we know."),
    COUNT("n_resident_pages", m.n_resident, "Pages that copies find."),
    COUNT("n_windows", m.n_windows, "Windows reserved."),
    COUNT("n_maps", n_maps, "Runs mapped so far."),
    COUNT("n_clears", n_clears, "Ranges cleared so far that were not bare."),
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef mirror_getset[] = {
    {"n_vmas_of_process", mirror_get_all, NULL, "n_vmas of all mirrors of the process.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mirror_slots[] = {
    {Py_tp_init, mirror_init},       {Py_tp_dealloc, mirror_dealloc}, {Py_tp_methods, mirror_methods},
    {Py_tp_members, mirror_members}, {Py_tp_getset, mirror_getset},   {0, NULL},
};

static PyType_Spec mirror_spec = {
    .name = "kvmmm._core.MirrorWindow",
    .basicsize = sizeof(struct py_mirror),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = mirror_slots,
};

int py_mirror_register(PyObject *module) { return py_add_type(module, &mirror_spec, &py_mirror_type); }
