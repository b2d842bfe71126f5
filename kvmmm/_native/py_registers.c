/* py_registers.c: Registers, the general registers in kvm_run's synchronised area.
 *
 * KVM stores them there at every exit (KVM_CAP_SYNC_REGS), so a read is a load. A write marks them
 * dirty, and KVM loads all of them at the next KVM_RUN (Linux arch/x86/kvm/x86.c, sync_regs).
 */
#include "py.h"

struct py_registers {
    PyObject_HEAD
    struct py_vcpu *vcpu; /* borrowed; the vCPU clears it when it goes */
};

PyTypeObject *py_registers_type;

static struct kvm_run *run_of(PyObject *op)
{
    struct kvmmm_vcpu *v = py_vcpu_state(((struct py_registers *)op)->vcpu);
    return v ? v->run : NULL;
}

static PyObject *registers_get(PyObject *op, void *offset)
{
    struct kvm_run *run = run_of(op);
    if (!run)
        return NULL;
    return PyLong_FromUnsignedLongLong(*(uint64_t *)((uint8_t *)&run->s.regs.regs + (size_t)offset));
}

static int registers_set(PyObject *op, PyObject *value, void *offset)
{
    struct kvm_run *run = run_of(op);
    if (!run)
        return -1;
    if (!value) {
        PyErr_SetString(PyExc_TypeError, "a register cannot be deleted");
        return -1;
    }
    uint64_t bits = PyLong_AsUnsignedLongLong(value);
    if (bits == UINT64_MAX && PyErr_Occurred())
        return -1;
    *(uint64_t *)((uint8_t *)&run->s.regs.regs + (size_t)offset) = bits;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    return 0;
}

static void registers_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

#define REGISTER(name) \
    {#name, registers_get, registers_set, NULL, (void *)offsetof(struct kvm_regs, name)}

static PyGetSetDef registers_getset[] = {
    REGISTER(rax), REGISTER(rbx), REGISTER(rcx), REGISTER(rdx), REGISTER(rsi), REGISTER(rdi),
    REGISTER(rsp), REGISTER(rbp), REGISTER(r8),  REGISTER(r9),  REGISTER(r10), REGISTER(r11),
    REGISTER(r12), REGISTER(r13), REGISTER(r14), REGISTER(r15), REGISTER(rip), REGISTER(rflags),
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot registers_slots[] = {
    {Py_tp_dealloc, registers_dealloc},
    {Py_tp_getset, registers_getset},
    {0, NULL},
};

static PyType_Spec registers_spec = {
    .name = "kvmmm._core.Registers",
    .basicsize = sizeof(struct py_registers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = registers_slots,
};

PyObject *py_registers_new(struct py_vcpu *vcpu)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(py_registers_type, Py_tp_alloc);
    struct py_registers *self = (struct py_registers *)alloc(py_registers_type, 0);
    if (self)
        self->vcpu = vcpu;
    return (PyObject *)self;
}

void py_registers_orphan(PyObject *registers)
{
    ((struct py_registers *)registers)->vcpu = NULL;
}

int py_registers_register(PyObject *module)
{
    return py_add_type(module, &registers_spec, &py_registers_type);
}
