/* py_options.c: IOOpts, how one copy is to be done, and the keywords that say so. */
#include "py_copy.h"

struct py_options {
    PyObject_HEAD
    int flags;
};

static PyTypeObject *py_options_type;
static PyObject *name_opts, *name_ignore;

static const char *const mechanisms[] = {NULL, "internal", "walk", "mirror"};

/* The mechanism's flags, or -1 with ValueError set. */
static int mechanism_of(PyObject *name)
{
    if (name == Py_None)
        return PY_COPY_AUTO;
    for (int i = 1; i <= 3; i++)
        if (PyUnicode_Check(name) && !PyUnicode_CompareWithASCIIString(name, mechanisms[i]))
            return i << PY_COPY_MECHANISM_SHIFT;
    PyErr_Format(PyExc_ValueError, "mechanism is 'internal', 'walk', 'mirror' or None, not %R", name);
    return -1;
}

static PyObject *options_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ignore_permissions", "address_space_active", "mechanism", NULL};
    int ignores = 0, active = 1;
    PyObject *mechanism = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|ppO", names, &ignores, &active, &mechanism))
        return NULL;
    int flags = mechanism_of(mechanism);
    if (flags < 0)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct py_options *self = (struct py_options *)alloc(type, 0);
    if (self)
        self->flags = flags | (ignores ? PY_COPY_IGNORE_PERMISSIONS : 0) | (active ? 0 : PY_COPY_INACTIVE);
    return (PyObject *)self;
}

static void options_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyObject *get_ignore(PyObject *op, void *closure)
{
    return PyBool_FromLong(((struct py_options *)op)->flags & PY_COPY_IGNORE_PERMISSIONS);
}

static PyObject *get_active(PyObject *op, void *closure)
{
    return PyBool_FromLong(!(((struct py_options *)op)->flags & PY_COPY_INACTIVE));
}

static PyObject *get_mechanism(PyObject *op, void *closure)
{
    int i = (((struct py_options *)op)->flags & PY_COPY_MECHANISM_MASK) >> PY_COPY_MECHANISM_SHIFT;
    return i ? PyUnicode_FromString(mechanisms[i]) : Py_NewRef(Py_None);
}

static PyObject *options_repr(PyObject *op)
{
    int flags = ((struct py_options *)op)->flags;
    PyObject *mechanism = get_mechanism(op, NULL);
    if (!mechanism)
        return NULL;
    PyObject *repr = PyUnicode_FromFormat(
        "IOOpts(ignore_permissions=%s, address_space_active=%s, mechanism=%R)",
        flags & PY_COPY_IGNORE_PERMISSIONS ? "True" : "False", flags & PY_COPY_INACTIVE ? "False" : "True", mechanism);
    Py_DECREF(mechanism);
    return repr;
}

static PyGetSetDef options_getset[] = {
    {"ignore_permissions", get_ignore, NULL, "What could ever be allowed counts, as for a debugger.", NULL},
    {"address_space_active", get_active, NULL, "Whether the copy may go through the address space.", NULL},
    {"mechanism", get_mechanism, NULL, "The one to use where it can be; None leaves it to the policy.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot options_slots[] = {
    {Py_tp_new, options_new},   {Py_tp_dealloc, options_dealloc}, {Py_tp_getset, options_getset},
    {Py_tp_repr, options_repr}, {0, NULL},
};

static PyType_Spec options_spec = {
    .name = "kvmmm._core.IOOpts",
    .basicsize = sizeof(struct py_options),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = options_slots,
};

/* Whether two names are the same; keywords in a call are interned. */
static bool is_name(PyObject *name, PyObject *known)
{
    return name == known || !PyUnicode_Compare(name, known);
}

int py_copy_options(PyObject *const *values, PyObject *names)
{
    int flags = 0;
    Py_ssize_t n = PyTuple_Size(names);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *name = PyTuple_GetItem(names, i), *value = values[i];
        if (is_name(name, name_opts)) {
            if (Py_IS_TYPE(value, py_options_type)) {
                flags |= ((struct py_options *)value)->flags;
            } else if (value != Py_None) {
                PyErr_Format(PyExc_TypeError, "opts is an IOOpts or None, not %R", value);
                return -1;
            }
        } else if (is_name(name, name_ignore)) {
            int ignores = PyObject_IsTrue(value);
            if (ignores < 0)
                return -1;
            flags |= ignores ? PY_COPY_IGNORE_PERMISSIONS : 0;
        } else {
            PyErr_Format(PyExc_TypeError, "unexpected keyword argument %R (there are opts and ignore_permissions)",
                         name);
            return -1;
        }
    }
    return flags;
}

int py_options_register(PyObject *module)
{
    name_opts = PyUnicode_InternFromString("opts");
    name_ignore = PyUnicode_InternFromString("ignore_permissions");
    return !name_opts || !name_ignore || py_add_type(module, &options_spec, &py_options_type) ? -1 : 0;
}
