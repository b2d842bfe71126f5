/* py_mapping.c: HostMapping, a shared mapping of a file that lives as long as a buffer on it does. */
#include <errno.h>
#include <sys/mman.h>

#include "py.h"

struct py_mapping {
    PyObject_HEAD
    uint8_t *base; /* NULL once closed */
    Py_ssize_t n_bytes;
    Py_ssize_t n_exports;
    int readonly;
};

PyTypeObject *py_mapping_type;

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "length_bytes", "align_bytes", "writable", NULL};
    int fd, writable = 1;
    Py_ssize_t n_bytes, align_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "inn|p", names, &fd, &n_bytes, &align_bytes,
                                     &writable))
        return NULL;
    if (n_bytes <= 0 || align_bytes <= 0 || (align_bytes & (align_bytes - 1))) {
        PyErr_SetString(PyExc_ValueError, "length must be above zero, alignment a power of two");
        return NULL;
    }
    uintptr_t hva = 0;
    int rc = (writable ? kvmmm_map_shared_aligned : kvmmm_map_readonly_aligned)(
        fd, (size_t)n_bytes, (size_t)align_bytes, &hva);
    if (rc) {
        errno = -rc;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct py_mapping *self = (struct py_mapping *)alloc(type, 0);
    if (!self) {
        munmap((void *)hva, (size_t)n_bytes);
        return NULL;
    }
    self->base = (uint8_t *)hva;
    self->n_bytes = n_bytes;
    self->readonly = !writable;
    return (PyObject *)self;
}

static void unmap(struct py_mapping *self)
{
    if (self->base)
        munmap(self->base, (size_t)self->n_bytes);
    self->base = NULL;
}

static void mapping_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    unmap((struct py_mapping *)op); /* no buffer can be out: each holds a reference */
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static int mapping_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    struct py_mapping *self = (struct py_mapping *)op;
    if (!self->base) {
        PyErr_SetString(PyExc_ValueError, "the mapping is closed");
        return -1;
    }
    if (PyBuffer_FillInfo(view, op, self->base, self->n_bytes, self->readonly, flags))
        return -1;
    self->n_exports++;
    return 0;
}

static void mapping_releasebuffer(PyObject *op, Py_buffer *view)
{
    (void)view;
    ((struct py_mapping *)op)->n_exports--;
}

static PyObject *mapping_close(PyObject *op, PyObject *ignored)
{
    struct py_mapping *self = (struct py_mapping *)op;
    if (self->n_exports)
        return PyErr_Format(PyExc_BufferError,
                            "cannot unmap: %zd memoryview(s) of this memory are still held",
                            self->n_exports);
    unmap(self);
    Py_RETURN_NONE;
}

static PyObject *mapping_sync(PyObject *op, PyObject *args)
{
    struct py_mapping *self = (struct py_mapping *)op;
    Py_ssize_t start, end;
    if (!PyArg_ParseTuple(args, "nn", &start, &end))
        return NULL;
    if (!self->base || start < 0 || end < start || end > self->n_bytes) {
        PyErr_SetString(PyExc_ValueError, "the range is outside the mapping, or that is closed");
        return NULL;
    }
    self->n_exports++; /* stays mapped meanwhile */
    int rc;
    Py_BEGIN_ALLOW_THREADS
    rc = msync(self->base + start, (size_t)(end - start), MS_SYNC) ? errno : 0;
    Py_END_ALLOW_THREADS
    self->n_exports--;
    if (rc) {
        errno = rc;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *mapping_get_hva(PyObject *op, void *closure)
{
    return PyLong_FromSize_t((size_t)((struct py_mapping *)op)->base);
}

static PyObject *mapping_get_length(PyObject *op, void *closure)
{
    return PyLong_FromSsize_t(((struct py_mapping *)op)->n_bytes);
}

static PyMethodDef mapping_methods[] = {
    {"close", mapping_close, METH_NOARGS, "Unmap; BufferError while a buffer on it is held."},
    {"sync", mapping_sync, METH_VARARGS, "Write [start, end) back to the file's storage, and wait."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef mapping_getset[] = {
    {"hva", mapping_get_hva, NULL, "Host virtual address of the first byte; 0 once closed.", NULL},
    {"length_bytes", mapping_get_length, NULL, "Length of the mapping.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},
    {Py_bf_getbuffer, mapping_getbuffer},
    {Py_bf_releasebuffer, mapping_releasebuffer},
    {0, NULL},
};

static PyType_Spec mapping_spec = {
    .name = "kvmmm._core.HostMapping",
    .basicsize = sizeof(struct py_mapping),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = mapping_slots,
};

int py_mapping_register(PyObject *module)
{
    return py_add_type(module, &mapping_spec, &py_mapping_type);
}
