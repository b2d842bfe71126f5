/* py_control.c: VcpuCore's root table, special registers and trap area. */
#define _GNU_SOURCE 1
#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "py.h"

/* The vCPU, when this thread may touch its registers: it runs it, or nobody does. */
static struct kvmmm_vcpu *own_state_of(PyObject *op)
{
    struct kvmmm_vcpu *v = py_vcpu_state((struct py_vcpu *)op);
    int tid = v ? atomic_load(&v->tid) : 0;
    if (!tid || tid == gettid())
        return v;
    PyErr_SetString(PyExc_RuntimeError, "the vCPU is running on another thread");
    return NULL;
}

static bool is_number(uint64_t number) { return number != UINT64_MAX || !PyErr_Occurred(); }

/* ---- The root table --------------------------------------------------------------------------- */

PyObject *py_vcpu_set_root(PyObject *op, PyObject *gpa_object)
{
    struct kvmmm_vcpu *v = py_vcpu_state((struct py_vcpu *)op);
    uint64_t gpa = PyLong_AsUnsignedLongLong(gpa_object);
    if (!v || !is_number(gpa))
        return NULL;
    if (gpa & 4095)
        return PyErr_Format(PyExc_ValueError, "a root table is page-aligned, and %p is not", (void *)gpa);
    if (v->has_root && atomic_load(&v->root_gpa) == gpa) /* KVM would not flush anything either */
        Py_RETURN_NONE;
    atomic_fetch_add(&v->attention, 1);
    if (atomic_load(&v->where) != KVMMM_OUTSIDE) {
        v->n_pins++;
        Py_BEGIN_ALLOW_THREADS
        kvmmm_vcpu_push_out(v);
        Py_END_ALLOW_THREADS
        v->n_pins--;
    }
    atomic_store(&v->root_gpa, gpa);
    v->has_root = true;
    atomic_fetch_or(&v->attention, KVMMM_NEW_ROOT);
    atomic_fetch_sub(&v->attention, 1);
    kvmmm_vcpu_wake(v);
    Py_RETURN_NONE;
}

/* Special registers, CR3 among them, come from elsewhere now. */
static void forget_root(struct kvmmm_vcpu *v)
{
    v->has_root = false;
    atomic_fetch_and(&v->attention, ~KVMMM_NEW_ROOT);
}

/* ---- Special registers ------------------------------------------------------------------------ */

PyObject *py_vcpu_fetch_sregs(PyObject *op, PyObject *ignored)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    if (!v)
        return NULL;
    int rc = atomic_load(&v->attention) & KVMMM_NEW_ROOT ? kvmmm_vcpu_load_root(v) : kvmmm_vcpu_fetch_sregs(v);
    if (rc)
        return py_raise_ioctl_error("KVM_GET_SREGS", -rc);
    Py_RETURN_NONE;
}

/* sregs_written(with_root): whether CR3 was meant too. If not, a root that waits to be loaded still is. */
PyObject *py_vcpu_sregs_written(PyObject *op, PyObject *with_root)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    if (!v)
        return NULL;
    if (with_root == Py_True)
        forget_root(v);
    kvmmm_vcpu_sregs_written(v);
    Py_RETURN_NONE;
}

/* registers_replaced(with_general): the special ones were, and perhaps the general ones. */
PyObject *py_vcpu_registers_replaced(PyObject *op, PyObject *with_general)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    if (!v)
        return NULL;
    forget_root(v);
    if (with_general == Py_True) {
        v->run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_REGS;
        if (ioctl(v->fd, KVM_GET_REGS, &v->run->s.regs.regs))
            return py_raise_ioctl_error("KVM_GET_REGS", errno);
    }
    v->run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_SREGS;
    if (ioctl(v->fd, KVM_GET_SREGS, kvmmm_sync_sregs(v->run)))
        return py_raise_ioctl_error("KVM_GET_SREGS", errno);
    v->sregs_asked = v->n_enters;
    Py_RETURN_NONE;
}

PyObject *py_vcpu_set_tss_type(PyObject *op, PyObject *type)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    long bits = PyLong_AsLong(type);
    if (!v || (bits == -1 && PyErr_Occurred()))
        return NULL;
    v->tss_type = (uint8_t)bits;
    Py_RETURN_NONE;
}

/* ---- Traps ------------------------------------------------------------------------------------ */

PyObject *py_vcpu_set_trap_area(PyObject *op, PyObject *args)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    unsigned long long stubs_gva;
    Py_ssize_t stack_top_hva;
    if (!v || !PyArg_ParseTuple(args, "Kn", &stubs_gva, &stack_top_hva))
        return NULL;
    if (stack_top_hva & 15) { /* the CPU aligns it before it pushes */
        PyErr_SetString(PyExc_ValueError, "the ring-0 stack's top is not 16-byte aligned");
        return NULL;
    }
    v->stubs_gva = stubs_gva;
    v->trap_stack_top = (const uint8_t *)stack_top_hva;
    kvmmm_vcpu_sync_sregs(v);
    Py_RETURN_NONE;
}

PyObject *py_vcpu_set_syscall_stub(PyObject *op, PyObject *gva_object)
{
    struct kvmmm_vcpu *v = own_state_of(op);
    uint64_t gva = PyLong_AsUnsignedLongLong(gva_object);
    if (!v || !is_number(gva))
        return NULL;
    v->syscall_gva = gva;
    kvmmm_vcpu_sync_sregs(v);
    Py_RETURN_NONE;
}

PyObject *py_vcpu_set_gate(PyObject *op, PyObject *gate)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    struct kvmmm_vcpu *v = py_vcpu_state(self);
    if (!v)
        return NULL;
    if (atomic_load(&v->tid) || self->gate || !PyObject_TypeCheck(gate, py_gate_type)) {
        PyErr_SetString(PyExc_TypeError, "a vCPU gets one PauseGate, before it runs");
        return NULL;
    }
    self->gate = Py_NewRef(gate);
    v->gate = py_gate_of(gate);
    Py_RETURN_NONE;
}
