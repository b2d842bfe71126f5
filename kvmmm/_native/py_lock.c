/* py_lock.c: GuardedLock, a lock that a thread inside a Reader or Writer of the same mm cannot take.
 *
 * Who holds the mm's locks may wait for all Readers and Writers. A thread that is in one would wait for
 * itself: so it is told instead.
 */
#include "py_copy.h"

#include <pythread.h>

struct py_lock {
    PyObject_HEAD
    PyThread_type_lock lock;
    struct py_inside *inside;
    bool is_locked;
};

static PyTypeObject *py_lock_type;

struct py_inside *py_inside_share(struct py_inside *inside)
{
    if (!inside && !(inside = calloc(1, sizeof *inside)))
        return NULL;
    inside->n_owners++;
    return inside;
}

void py_inside_drop(struct py_inside *inside)
{
    if (inside && !--inside->n_owners)
        free(inside);
}

static bool is_inside(const struct py_inside *inside)
{
    if (!inside->n)
        return false;
    unsigned long self = PyThread_get_thread_ident();
    for (unsigned i = 0; i < inside->n; i++)
        if (inside->threads[i] == self)
            return true;
    return false;
}

int py_inside_refuse(const struct py_inside *inside, const char *what)
{
    if (!is_inside(inside))
        return 0;
    PyObject *errors = PyImport_ImportModule("kvmmm.errors");
    PyObject *type = errors ? PyObject_GetAttrString(errors, "StateError") : NULL;
    Py_XDECREF(errors);
    if (type)
        PyErr_Format(type,
                     "%s from inside a Reader or Writer of the same memory manager: it holds pages that "
                     "this might have to wait for",
                     what);
    Py_XDECREF(type);
    return -1;
}

/* GuardedLock(core), or GuardedLock(): a plain lock, that costs a third of threading.Lock's `with` */
static int lock_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_lock *self = (struct py_lock *)op;
    PyObject *core = NULL;
    if (!PyArg_ParseTuple(args, "|O!", py_copy_type, &core))
        return -1;
    if (self->lock)
        return 0;
    /* Of its own: nobody is ever in there. */
    self->inside = py_inside_share(core ? ((struct py_copy_core *)core)->inside : NULL);
    self->lock = PyThread_allocate_lock();
    if (!self->lock || !self->inside) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static int acquire(struct py_lock *self)
{
    if (!self->lock) {
        PyErr_SetString(PyExc_ValueError, "the lock was never made");
        return -1;
    }
    if (py_inside_refuse(self->inside, "a memory operation, or a copy of memory that is not there yet,"))
        return -1;
    if (!PyThread_acquire_lock(self->lock, NOWAIT_LOCK)) {
        PyLockStatus status;
        do {
            Py_BEGIN_ALLOW_THREADS
            status = PyThread_acquire_lock_timed(self->lock, -1, 1);
            Py_END_ALLOW_THREADS
            if (status == PY_LOCK_INTR && PyErr_CheckSignals())
                return -1;
        } while (status != PY_LOCK_ACQUIRED);
    }
    self->is_locked = true;
    return 0;
}

static PyObject *lock_acquire(PyObject *op, PyObject *args)
{
    struct py_lock *self = (struct py_lock *)op;
    int blocking = 1;
    if (!PyArg_ParseTuple(args, "|p", &blocking))
        return NULL;
    if (!blocking && self->lock && (is_inside(self->inside) || !PyThread_acquire_lock(self->lock, NOWAIT_LOCK)))
        Py_RETURN_FALSE;
    if (!blocking && self->lock)
        self->is_locked = true;
    else if (acquire(self))
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *lock_enter(PyObject *op, PyObject *ignored)
{
    if (acquire((struct py_lock *)op))
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *lock_release(PyObject *op, PyObject *ignored)
{
    struct py_lock *self = (struct py_lock *)op;
    if (!self->is_locked) {
        PyErr_SetString(PyExc_RuntimeError, "release unlocked lock");
        return NULL;
    }
    self->is_locked = false;
    PyThread_release_lock(self->lock);
    Py_RETURN_NONE;
}

static PyObject *lock_exit(PyObject *op, PyObject *const *args, Py_ssize_t n) { return lock_release(op, NULL); }

static PyObject *lock_locked(PyObject *op, PyObject *ignored)
{
    return PyBool_FromLong(((struct py_lock *)op)->is_locked);
}

static void lock_dealloc(PyObject *op)
{
    struct py_lock *self = (struct py_lock *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->lock) {
        if (self->is_locked)
            PyThread_release_lock(self->lock);
        PyThread_free_lock(self->lock);
    }
    py_inside_drop(self->inside);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyMethodDef lock_methods[] = {
    {"acquire", lock_acquire, METH_VARARGS, "Take it; acquire(False) does not wait. Whether it was taken."},
    {"release", lock_release, METH_NOARGS, "Give it back."},
    {"locked", lock_locked, METH_NOARGS, "Whether somebody has it."},
    {"__enter__", lock_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_init, lock_init},
    {Py_tp_dealloc, lock_dealloc},
    {Py_tp_methods, lock_methods},
    {0, NULL},
};

static PyType_Spec lock_spec = {
    .name = "kvmmm._core.GuardedLock",
    .basicsize = sizeof(struct py_lock),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = lock_slots,
};

int py_lock_register(PyObject *module) { return py_add_type(module, &lock_spec, &py_lock_type); }
