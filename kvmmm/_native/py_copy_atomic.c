/* py_copy_atomic.c: 32-bit words, atomically against the guest's own locked instructions. */
#include "py_copy.h"

enum operation { SWAP, CAS, LOAD };

struct word {
    enum operation operation;
    uint32_t old, new, result;
};

static bool operate(struct word *w, uintptr_t hva, struct kvmmm_fault *fault)
{
    switch (w->operation) {
    case SWAP:
        return kvmmm_swap_u32((uint32_t *)hva, w->new, &w->result, fault);
    case CAS:
        return kvmmm_cas_u32((uint32_t *)hva, w->old, w->new, &w->result, fault);
    default:
        return kvmmm_load_u32((const uint32_t *)hva, &w->result, fault);
    }
}

static int operand(PyObject *object, uint32_t *ret)
{
    uint64_t number;
    if (py_copy_number(object, &number))
        return -1;
    if (number > UINT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "%R is no unsigned number of 32 bits", object);
        return -1;
    }
    *ret = (uint32_t)number;
    return 0;
}

static PyObject *run(PyObject *self, PyObject *addr, struct word *w, int flags)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .n_bytes = 4, .word = w};
    c.access = w->operation == LOAD ? KVMMM_FRAME_READ : KVMMM_FRAME_READ | KVMMM_FRAME_WRITE;
    if (flags < 0 || py_copy_number(addr, &c.addr))
        return NULL;
    c.flags = (unsigned)flags | PY_COPY_ATOMIC;
    if (py_copy_begin(&c))
        return NULL;
    /* Aligned, it lies in one page: in one piece, wherever that is. */
    if (c.addr & 3) {
        py_copy_fail(&c, "alignment");
        return NULL;
    }
    unsigned n_tries = 0;
    while (c.done < 4) {
        struct kvmmm_fault fault = {0, 0};
        uint64_t n;
        uintptr_t hva = py_copy_find(&c, 4, &n);
        if (hva && operate(w, hva, &fault))
            break;
        if (fault.signal) {
            py_copy_fail(&c, "bus");
            return NULL;
        }
        int64_t moved = py_copy_serve(&c, &n_tries);
        if (moved < 0)
            return NULL;
        c.done = (uint64_t)moved;
    }
    return PyLong_FromUnsignedLong(w->result);
}

static int options_of(PyObject *const *args, Py_ssize_t n, Py_ssize_t n_wanted, PyObject *names)
{
    if (n != n_wanted) {
        PyErr_Format(PyExc_TypeError, "%zd positional arguments expected, %zd given", n_wanted, n);
        return -1;
    }
    return names ? py_copy_options(args + n, names) : 0;
}

PY_COPY_METHOD(swap_uint32)
{
    struct word w = {.operation = SWAP};
    int flags = options_of(args, n, 2, names);
    return flags < 0 || operand(args[1], &w.new) ? NULL : run(self, args[0], &w, flags);
}

PY_COPY_METHOD(compare_and_swap_uint32)
{
    struct word w = {.operation = CAS};
    int flags = options_of(args, n, 3, names);
    return flags < 0 || operand(args[1], &w.old) || operand(args[2], &w.new) ? NULL : run(self, args[0], &w, flags);
}

PY_COPY_METHOD(load_uint32)
{
    struct word w = {.operation = LOAD};
    int flags = options_of(args, n, 1, names);
    return flags < 0 ? NULL : run(self, args[0], &w, flags);
}

/* _atomic(hva, word): the operation on a word of a file that is not the arena. Whether it could be done. */
PyObject *py_copy_atomic(PyObject *self, PyObject *args)
{
    unsigned long long hva, word;
    if (!PyArg_ParseTuple(args, "KK", &hva, &word))
        return NULL;
    struct kvmmm_fault fault = {0, 0};
    kvmmm_safecopy_own();
    return PyBool_FromLong(operate((struct word *)(uintptr_t)word, hva, &fault));
}
