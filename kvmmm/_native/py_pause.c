/* py_pause.c: PauseGate, the context manager that keeps the vCPUs of a VM outside KVM_RUN.
 *
 * It is C so that no Ctrl-C comes between raising the gate and the `with` that lowers it.
 */
#include "py.h"

struct py_gate {
    PyObject_HEAD
    struct kvmmm_gate gate;
    PyObject *vcpus; /* the VM's list */
};

PyTypeObject *py_gate_type;

struct kvmmm_gate *py_gate_of(PyObject *gate) { return &((struct py_gate *)gate)->gate; }

static PyObject *gate_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *vcpus;
    if (!PyArg_ParseTuple(args, "O!", &PyList_Type, &vcpus))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct py_gate *self = (struct py_gate *)alloc(type, 0);
    if (self)
        self->vcpus = Py_NewRef(vcpus);
    return (PyObject *)self;
}

static int gate_clear(PyObject *op)
{
    Py_CLEAR(((struct py_gate *)op)->vcpus);
    return 0;
}

static int gate_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((struct py_gate *)op)->vcpus);
    return 0;
}

static void gate_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    gate_clear(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

/* The i-th vCPU, borrowed; NULL for one that is closed or none of ours. */
static struct py_vcpu *open_vcpu_at(PyObject *list, Py_ssize_t i)
{
    PyObject *vcpu = PyList_GetItem(list, i);
    if (!vcpu || !PyObject_TypeCheck(vcpu, py_vcpu_type) || !((struct py_vcpu *)vcpu)->v)
        return NULL;
    return (struct py_vcpu *)vcpu;
}

/* Those in the guest, held and pinned; n of them, in memory that the caller frees. */
static struct py_vcpu **pin_running(PyObject *list, Py_ssize_t *n_ret)
{
    Py_ssize_t n_vcpus = PyList_Size(list), n = 0;
    struct py_vcpu **running = malloc((size_t)(n_vcpus + 1) * sizeof(struct py_vcpu *));
    for (Py_ssize_t i = 0; running && i < n_vcpus; i++) {
        struct py_vcpu *vcpu = open_vcpu_at(list, i);
        if (!vcpu || atomic_load(&vcpu->v->where) == KVMMM_OUTSIDE)
            continue;
        Py_INCREF((PyObject *)vcpu);
        vcpu->v->n_pins++;
        running[n++] = vcpu;
    }
    *n_ret = n;
    return running;
}

/* Without the GIL. */
static void push_out(struct py_vcpu **running, Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i++) { /* all of them at once, */
        running[i]->v->run->immediate_exit = 1;
        kvmmm_vcpu_kick(running[i]->v);
    }
    for (Py_ssize_t i = 0; i < n; i++) /* then one after the other */
        kvmmm_vcpu_push_out(running[i]->v);
}

static PyObject *gate_enter(PyObject *op, PyObject *ignored)
{
    struct py_gate *self = (struct py_gate *)op;
    Py_ssize_t n;
    /* A vCPU that joins later looks at the gate before it enters: whoever is in the guest is listed. */
    atomic_fetch_add(&self->gate.n_pauses, 1);
    struct py_vcpu **running = pin_running(self->vcpus, &n);
    if (!running) {
        atomic_fetch_sub(&self->gate.n_pauses, 1);
        return PyErr_NoMemory();
    }
    if (n) {
        Py_BEGIN_ALLOW_THREADS
        push_out(running, n);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        running[i]->v->n_pins--;
        Py_DECREF((PyObject *)running[i]);
    }
    free(running);
    kvmmm_pauses_count(1);
    Py_RETURN_NONE;
}

static PyObject *gate_exit(PyObject *op, PyObject *args)
{
    struct py_gate *self = (struct py_gate *)op;
    if (!atomic_load(&self->gate.n_pauses)) {
        PyErr_SetString(PyExc_RuntimeError, "no pause to end");
        return NULL;
    }
    kvmmm_pauses_count(-1);
    if (atomic_fetch_sub(&self->gate.n_pauses, 1) == 1) {
        for (Py_ssize_t i = 0; i < PyList_Size(self->vcpus); i++) {
            struct py_vcpu *vcpu = open_vcpu_at(self->vcpus, i);
            if (vcpu)
                kvmmm_vcpu_wake(vcpu->v);
        }
    }
    Py_RETURN_NONE;
}

static PyObject *gate_get_n_pauses(PyObject *op, void *closure)
{
    return PyLong_FromUnsignedLong(atomic_load(&((struct py_gate *)op)->gate.n_pauses));
}

static PyMethodDef gate_methods[] = {
    {"__enter__", gate_enter, METH_NOARGS, "Have every vCPU outside KVM_RUN, and keep it there."},
    {"__exit__", gate_exit, METH_VARARGS, "Let them go on, unless another pause lasts."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef gate_getset[] = {
    {"n_pauses", gate_get_n_pauses, NULL, "Pauses that last now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot gate_slots[] = {
    {Py_tp_new, gate_new},         {Py_tp_dealloc, gate_dealloc}, {Py_tp_traverse, gate_traverse},
    {Py_tp_clear, gate_clear},     {Py_tp_methods, gate_methods}, {Py_tp_getset, gate_getset},
    {0, NULL},
};

static PyType_Spec gate_spec = {
    .name = "kvmmm._core.PauseGate",
    .basicsize = sizeof(struct py_gate),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = gate_slots,
};

int py_gate_register(PyObject *module) { return py_add_type(module, &gate_spec, &py_gate_type); }
