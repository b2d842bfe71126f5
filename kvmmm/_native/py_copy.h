/* py_copy.h: the Python types around copies: CopyCore and what it asks. */
#ifndef KVMMM_PY_COPY_H
#define KVMMM_PY_COPY_H

#include "py.h"

#include "frames.h"
#include "mirror.h"
#include "safecopy.h"
#include "section.h"
#include "walk.h"

/* ---- who else has a type here --------------------------------------------------------------------- */

/* The C state inside a PageWalk or Mirror, or NULL with TypeError set. Both live as long as the object. */
struct kvmmm_walk *py_walk_of(PyObject *walk);
struct kvmmm_mirror *py_mirror_of(PyObject *mirror);

int py_walk_register(PyObject *module);
int py_mirror_register(PyObject *module);
int py_pinned_register(PyObject *module);
int py_safecopy_register(PyObject *module);
int py_copy_register(PyObject *module);
int py_options_register(PyObject *module);
int py_lock_register(PyObject *module);
int py_token_register(PyObject *module);

/* ---- threads inside a Reader or Writer ------------------------------------------------------------- */

/* Which threads of one mm are; shared by its CopyCore and its locks. With the GIL held. */
enum { PY_INSIDE_MAX = 64 };
struct py_inside {
    unsigned n_owners, n;
    unsigned long threads[PY_INSIDE_MAX];
};

struct py_inside *py_inside_share(struct py_inside *inside);
void py_inside_drop(struct py_inside *inside);
/* 0, or -1 with StateError set: this thread is inside. */
int py_inside_refuse(const struct py_inside *inside, const char *what);

/* ---- options ------------------------------------------------------------------------------------- */

/* Of one call, as `opts=IOOpts(...)` or `ignore_permissions=...` say; also what _serve_copy is told. */
enum {
    PY_COPY_IGNORE_PERMISSIONS = 1,
    PY_COPY_INACTIVE = 2, /* the address space is not active: not through it */
    PY_COPY_ATOMIC = 4,   /* what is to be done is a word operation's */
    PY_COPY_MAY_BLOCK = 8, /* the host's buffer may fault, or wait for another thread */
    PY_COPY_MECHANISM_SHIFT = 4,
    PY_COPY_AUTO = 0 << PY_COPY_MECHANISM_SHIFT,
    PY_COPY_INTERNAL = 1 << PY_COPY_MECHANISM_SHIFT,
    PY_COPY_WALK = 2 << PY_COPY_MECHANISM_SHIFT,
    PY_COPY_MIRROR = 3 << PY_COPY_MECHANISM_SHIFT,
    PY_COPY_MECHANISM_MASK = 3 << PY_COPY_MECHANISM_SHIFT,
};

/* The keywords of a FASTCALL, whose values are at @p values. Flags, or -1 with TypeError set. */
int py_copy_options(PyObject *const *values, PyObject *names);

/* ---- CopyCore ------------------------------------------------------------------------------------- */

struct py_copy_core {
    PyObject_HEAD
    uint64_t max_addr;
    struct kvmmm_frames frames;
    struct kvmmm_section section;
    struct py_inside *inside;
    struct kvmmm_walk *walk;
    struct kvmmm_mirror *mirror;
    PyObject *walk_object, *mirror_object; /* keep those two */
    /* The policy (kvmmm.mm.policy): copies of so many bytes release the GIL; whether a copy goes through
     * the mirror where that is resident; how often a region of 2 MiB is copied before it is mirrored. */
    uint64_t release_bytes;
    bool uses_mirror;
    uint32_t promote_after;
};

extern PyTypeObject *py_copy_type;

/* One copy on its way. */
struct py_copy {
    struct py_copy_core *core;
    uint64_t addr, n_bytes, done;
    uint64_t before;    /* bytes done by earlier ranges of the same operation */
    uint8_t *host;      /* of the byte for addr; NULL: zeros */
    unsigned access;    /* KVMMM_FRAME_READ: guest -> host; KVMMM_FRAME_WRITE: host -> guest */
    unsigned flags;     /* PY_COPY_*; the mechanism is settled before it begins */
    bool may_block;     /* the host's buffer may fault: not with the GIL held */
    const void *word;   /* an atomic operation, done by Python where C cannot find the word */
};

/* The mechanism that is used: the forced one, where it can be. */
void py_copy_settle(struct py_copy *c);
/* Settle it, check the range. 0, or -1 with an error set. */
int py_copy_begin_slowly(struct py_copy *c);
static inline int py_copy_begin(struct py_copy *c)
{
    uint64_t max_addr = c->core->max_addr;
    bool is_plain = !(c->flags & PY_COPY_MECHANISM_MASK) && c->addr <= max_addr && c->n_bytes <= max_addr - c->addr;
    return is_plain ? 0 : py_copy_begin_slowly(c);
}
/* Move all of it. 0, or -1 with an error set, and c->done bytes moved. */
int py_copy_run(struct py_copy *c);
/* Have Python serve what cannot be found at addr + done. Bytes that it has moved, or -1 with an error. */
int64_t py_copy_serve(struct py_copy *c, unsigned *n_tries);
/* Where the rest begins, and how much of it lies side by side; 0: not to be found. */
uintptr_t py_copy_find(const struct py_copy *c, uint64_t n, uint64_t *n_ret);
/* The usual copy: small, of memory that was copied before and lies in one piece, and from or to a buffer that
 * does not block. Bytes moved: 0 where it is none, fewer than n_bytes where it faulted. With the GIL held from
 * look-up to end, nobody can take the frames away meanwhile. Always inline: with @p access and @p flags known,
 * and nothing in memory, it takes a tenth off a call. */
static inline __attribute__((always_inline)) uint64_t py_copy_few(const struct py_copy_core *core, uint64_t addr,
                                                                  uint8_t *host, uint64_t n_bytes, unsigned access,
                                                                  unsigned flags)
{
    uint64_t n;
    if ((flags & PY_COPY_MECHANISM_MASK) > PY_COPY_INTERNAL || n_bytes >= core->release_bytes || !n_bytes ||
        !core->frames.chunks)
        return 0;
    uintptr_t hva;
    if (core->uses_mirror && !flags) {
        /* Where it is not resident somebody has to count. */
        hva = core->mirror ? kvmmm_mirror_find(core->mirror, addr, n_bytes, access, &n) : 0;
    } else {
        unsigned need = flags & PY_COPY_IGNORE_PERMISSIONS ? access << KVMMM_FRAME_MAX_SHIFT : access;
        hva = kvmmm_frames_find(&core->frames, addr, n_bytes, need, &n);
    }
    if (!hva || n != n_bytes)
        return 0;
    struct kvmmm_fault fault = {0, 0};
    return access == KVMMM_FRAME_READ ? kvmmm_copy(host, (const void *)hva, n, &fault)
           : host                     ? kvmmm_copy((void *)hva, host, n, &fault)
                                      : kvmmm_zero((void *)hva, n, &fault);
}

/* Whether the usual copy was all; if not, nothing is lost: py_copy_run goes on from c->done. */
static inline bool py_copy_quickly(struct py_copy *c)
{
    if (c->may_block)
        return false;
    c->done = py_copy_few(c->core, c->addr, c->host, c->n_bytes, c->access, c->flags);
    return c->done && c->done == c->n_bytes;
}

/* Raise what `_copy_failed` raises for it. -1. */
int py_copy_fail(const struct py_copy *c, const char *why);

/* An address or a length: -1 with TypeError set if it is no integer. Out of 64 bits: *ret is the largest,
 * which no range has. */
int py_copy_number_slowly(PyObject *object, uint64_t *ret);
static inline int py_copy_number(PyObject *object, uint64_t *ret)
{
    /* AsUnsignedLongLong takes twice as long, above 30 bits some 20 ns. */
    _Static_assert(sizeof(unsigned long) == sizeof *ret, "a number in 64 bits");
    uint64_t number = PyLong_CheckExact(object) ? PyLong_AsUnsignedLong(object) : UINT64_MAX, slow;
    if (number == UINT64_MAX) {
        if (py_copy_number_slowly(object, &slow))
            return -1;
        number = slow;
    }
    *ret = number;
    return 0;
}

/* The host's side. */
struct py_copy_buffer {
    Py_buffer view; /* view.obj NULL: nothing to release */
    bool may_block;
};
int py_copy_source(PyObject *object, struct py_copy_buffer *b);
int py_copy_target(PyObject *object, struct py_copy_buffer *b);
void py_copy_release(struct py_copy_buffer *b);

/* The memory of bytes or of a bytearray. As long as nobody else runs who could resize it, it need not be
 * exported, which takes longer than to copy a few bytes. Whether it is such an object, good for @p access. */
static inline bool py_copy_plain(PyObject *object, unsigned access, uint8_t **host, uint64_t *n_bytes)
{
    if (PyByteArray_CheckExact(object)) {
        *host = (uint8_t *)PyByteArray_AsString(object);
        *n_bytes = (uint64_t)PyByteArray_Size(object);
        return true;
    }
    if (access == KVMMM_FRAME_WRITE && PyBytes_CheckExact(object)) {
        *host = (uint8_t *)PyBytes_AsString(object);
        *n_bytes = (uint64_t)PyBytes_Size(object);
        return true;
    }
    return false;
}

/* CopyCore's methods: py_copy_bytes.c, py_copy_vec.c, py_copy_atomic.c. */
#define PY_COPY_METHOD(name) \
    PyObject *py_copy_##name(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
PY_COPY_METHOD(copy_in);
PY_COPY_METHOD(copy_out);
PY_COPY_METHOD(read);
PY_COPY_METHOD(zero_out);
PY_COPY_METHOD(copy_in_vec);
PY_COPY_METHOD(copy_out_vec);
PY_COPY_METHOD(copy_in_many);
PY_COPY_METHOD(copy_out_many);
PY_COPY_METHOD(swap_uint32);
PY_COPY_METHOD(compare_and_swap_uint32);
PY_COPY_METHOD(load_uint32);
int py_copy_names(void);
int py_copy_vec_names(void);
PyObject *py_copy_enter(PyObject *self, PyObject *ignored);
PyObject *py_copy_leave(PyObject *self, PyObject *token);
/* What Python does in its slow path. */
PyObject *py_copy_move(PyObject *self, PyObject *args);
PyObject *py_copy_move_fresh(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *py_copy_atomic(PyObject *self, PyObject *args);

#endif
