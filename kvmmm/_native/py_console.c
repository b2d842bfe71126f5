/* py_console.c: VcpuCore's methods about what the guest prints, the Python face of console.c. */
#include <errno.h>

#include "py.h"

PyObject *py_vcpu_console_take(PyObject *op, PyObject *ignored)
{
    struct kvmmm_vcpu *v = py_vcpu_state((struct py_vcpu *)op);
    if (!v)
        return NULL;
    int64_t pending = kvmmm_console_pending(&v->console);
    if (pending == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    PyObject *bytes = pending > 0 ? PyBytes_FromStringAndSize(NULL, pending) : NULL;
    if (pending > 0 && !bytes)
        return NULL;
    int64_t n = pending < 0 ? pending
                            : kvmmm_console_take(&v->console, (uint8_t *)PyBytes_AsString(bytes), pending);
    if (n < 0) {
        Py_XDECREF(bytes);
        return py_raise_errno((int)-n);
    }
    if (n == pending)
        return bytes;
    /* Between the two calls the guest may have taken its head back (several vCPUs, a wild write). */
    PyObject *fewer = PyBytes_FromStringAndSize(PyBytes_AsString(bytes), n);
    Py_DECREF(bytes);
    return fewer;
}

/* set_console(shared_hva, ring_hva, ring_bytes, tail=0): a ring of which `tail` bytes have been taken. */
PyObject *py_vcpu_set_console(PyObject *op, PyObject *args)
{
    struct kvmmm_vcpu *v = py_vcpu_state((struct py_vcpu *)op);
    Py_ssize_t shared, ring;
    unsigned int ring_bytes;
    unsigned long long tail = 0;
    if (!v || !PyArg_ParseTuple(args, "nnI|K", &shared, &ring, &ring_bytes, &tail))
        return NULL;
    v->console.shared = (struct kvmmm_console *)shared;
    v->console.ring = (const uint8_t *)ring;
    v->console.ring_bytes = ring_bytes;
    v->console.tail = tail;
    Py_RETURN_NONE;
}

/* set_coalesced(page): the ring that KVM keeps for the VM, that many pages into our mapping. */
PyObject *py_vcpu_set_coalesced(PyObject *op, PyObject *page_object)
{
    struct kvmmm_vcpu *v = py_vcpu_state((struct py_vcpu *)op);
    size_t offset = PyLong_AsSize_t(page_object) * 4096;
    if (!v || PyErr_Occurred())
        return NULL;
    if (offset + 4096 > v->run_bytes)
        return py_raise_errno(EINVAL);
    v->console.coalesced_max = (4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio);
    v->console.coalesced = (struct kvm_coalesced_mmio_ring *)((uint8_t *)v->run + offset);
    kvmmm_vcpu_poll_console(v);
    Py_RETURN_NONE;
}
