/* py_copy_section.c: the read section for Python: a Reader or Writer that is given guest memory itself.
 *
 * The token leaves when it goes: an interrupt may come between entering and keeping it.
 */
#include "py_copy.h"

#include <pythread.h>

struct py_token {
    PyObject_HEAD
    struct py_copy_core *core; /* NULL: not made, or left */
    unsigned long thread;
    unsigned phase;
};

static PyTypeObject *py_token_type;

static void leave(struct py_token *token)
{
    struct py_copy_core *core = token->core;
    struct py_inside *inside = core->inside;
    token->core = NULL;
    for (unsigned i = inside->n; i-- > 0;)
        if (inside->threads[i] == token->thread) {
            inside->threads[i] = inside->threads[--inside->n];
            break;
        }
    kvmmm_section_leave(&core->section, token->phase);
    Py_DECREF((PyObject *)core);
}

PyObject *py_copy_enter(PyObject *op, PyObject *ignored)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    if (!self->inside || self->inside->n == PY_INSIDE_MAX) {
        PyErr_Format(PyExc_RuntimeError, "%d Readers and Writers at once are too many", PY_INSIDE_MAX);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(py_token_type, Py_tp_alloc);
    struct py_token *token = (struct py_token *)alloc(py_token_type, 0);
    if (!token)
        return NULL;
    token->core = (struct py_copy_core *)Py_NewRef(op);
    token->thread = PyThread_get_thread_ident();
    self->inside->threads[self->inside->n++] = token->thread;
    token->phase = kvmmm_section_enter(&self->section);
    return (PyObject *)token;
}

PyObject *py_copy_leave(PyObject *op, PyObject *object)
{
    struct py_token *token = (struct py_token *)object;
    if (!Py_IS_TYPE(object, py_token_type))
        return PyErr_Format(PyExc_TypeError, "what enter_copy returned is wanted, not %R", object);
    if (token->core != (struct py_copy_core *)op || token->thread != PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError, "left already, or entered by another thread or memory manager");
        return NULL;
    }
    leave(token);
    Py_RETURN_NONE;
}

static void token_dealloc(PyObject *op)
{
    struct py_token *token = (struct py_token *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (token->core)
        leave(token);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyType_Slot token_slots[] = {
    {Py_tp_dealloc, token_dealloc},
    {0, NULL},
};

static PyType_Spec token_spec = {
    .name = "kvmmm._core.CopyToken",
    .basicsize = sizeof(struct py_token),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = token_slots,
};

int py_token_register(PyObject *module) { return py_add_type(module, &token_spec, &py_token_type); }
