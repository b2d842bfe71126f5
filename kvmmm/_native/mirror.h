/* mirror.h: a host window in which guest memory lies at the guest's own distances.
 *
 * The guest's address space is too large to be reserved as a whole. So each GiB of it that is mirrored
 * has a window of a GiB somewhere in the host, made at first use. In a window lie runs, pieces of a file
 * mapped shared, and between them PROT_NONE; never a hole, in which somebody else's mmap could land.
 *
 *     guest   |  GiB 3  |            chunks[3] -> window     | none | run | none | run | run |
 *     host    somewhere else                      starts       ^      ^     ^      ^     ^
 *
 * What may be accessed stands in bitmaps. They are written with the GIL held, and after a run is mapped or
 * before it is taken away; they may be read at any time, so a clear bit never lies, and a set one does
 * not for whoever is in the read section (section.h). All else needs the owner's lock.
 */
#ifndef KVMMM_MIRROR_H
#define KVMMM_MIRROR_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KVMMM_MIRROR_SHIFT = 30,
    KVMMM_MIRROR_PAGES = 1 << (KVMMM_MIRROR_SHIFT - 12),
    KVMMM_MIRROR_WORDS = KVMMM_MIRROR_PAGES / 64,
    KVMMM_MIRROR_BLOCK = 64, /* pages; evicted together where they are in pieces */
};

struct kvmmm_mirror_chunk {
    uintptr_t hva;
    uint64_t n_runs; /* bits set in starts: how many VMAs the window is */
    uint64_t n_resident; /* readable pages */
    _Atomic uint64_t readable[KVMMM_MIRROR_WORDS], writable[KVMMM_MIRROR_WORDS];
    /* Where a mapping begins that the kernel does not merge with the one before; page 0 always. And
     * there only, what it maps: 0 nothing, or something that counts up with the pages (mirror.c). */
    uint64_t starts[KVMMM_MIRROR_WORDS];
    uint64_t filled[KVMMM_MIRROR_WORDS / 64]; /* which words of starts are not zero */
    uint64_t what[KVMMM_MIRROR_PAGES];
};

struct kvmmm_mirror {
    struct kvmmm_mirror_chunk *_Atomic *chunks;
    uint64_t n_chunks; /* 0 before init and after release */
    uint64_t max_addr;
    uint64_t n_windows;
    uint64_t n_vmas; /* of its windows, and one a window for the chunk */
    uint64_t n_resident;
};

static inline struct kvmmm_mirror_chunk *kvmmm_mirror_chunk_at(const struct kvmmm_mirror *m, uint64_t addr)
{
    uint64_t index = addr >> KVMMM_MIRROR_SHIFT;
    return index < m->n_chunks ? atomic_load_explicit(&m->chunks[index], memory_order_acquire) : NULL;
}

/* Host address of @p addr in the window, if its page is resident there for @p access (READ 1, WRITE 2), and
 * in *n_ret how many bytes from there, @p n at most, are. 0: not resident. Touches nothing. */
static inline uintptr_t kvmmm_mirror_find(const struct kvmmm_mirror *m, uint64_t addr, uint64_t n, unsigned access,
                                          uint64_t *n_ret)
{
    const struct kvmmm_mirror_chunk *c = kvmmm_mirror_chunk_at(m, addr);
    if (!c)
        return 0;
    const _Atomic uint64_t *bits = access & 2 ? c->writable : c->readable;
    uint64_t offset = addr & ((1ull << KVMMM_MIRROR_SHIFT) - 1), word = offset >> 18, first = offset >> 12 & 63;
    uint64_t absent = ~atomic_load_explicit(&bits[word], memory_order_acquire) >> first;
    if (absent & 1)
        return 0;
    if (n > (1ull << KVMMM_MIRROR_SHIFT) - offset)
        n = (1ull << KVMMM_MIRROR_SHIFT) - offset;
    uint64_t in_page = offset & 4095, n_pages = (in_page + n + 4095) >> 12;
    /* What was shifted in is zero: a bit that is set says absent and is true. */
    uint64_t n_found = absent ? (uint64_t)__builtin_ctzll(absent) : 64 - first;
    while (!absent && n_found < n_pages) {
        absent = ~atomic_load_explicit(&bits[++word], memory_order_acquire);
        n_found += absent ? (uint64_t)__builtin_ctzll(absent) : 64;
    }
    *n_ret = n_found < n_pages ? (n_found << 12) - in_page : n;
    return c->hva + offset;
}

/* 0, or -errno. */
int kvmmm_mirror_init(struct kvmmm_mirror *m, uint64_t max_addr);
/* Unmap every window. Idempotent. Nobody may be inside one, or come back. */
void kvmmm_mirror_release(struct kvmmm_mirror *m);

/* Ranges are multiples of 4 KiB. This one lies in one GiB, and no page of it is resident: map it, and a
 * window first if there is none. 0, or -errno and what was mapped there still is. */
int kvmmm_mirror_place(struct kvmmm_mirror *m, uint64_t start, uint64_t end, int fd, uint64_t fo, bool writable);
/* ... and let copies in. GIL held. */
void kvmmm_mirror_admit(struct kvmmm_mirror *m, uint64_t start, uint64_t end, bool writable);
/* No copy finds the range any more; who has found it still may be there. GIL held. */
void kvmmm_mirror_forget(struct kvmmm_mirror *m, uint64_t start, uint64_t end);
/* PROT_NONE over the range, which was forgotten. 0, or -errno where something stayed mapped. */
int kvmmm_mirror_clear(struct kvmmm_mirror *m, uint64_t start, uint64_t end);
/* The same for the whole window around @p addr, with the last reserves: works where the process has no
 * VMA left. */
int kvmmm_mirror_clear_window(struct kvmmm_mirror *m, uint64_t addr);
/* Whether nothing is mapped in the range: clearing it is free. */
bool kvmmm_mirror_is_bare(const struct kvmmm_mirror *m, uint64_t start, uint64_t end);
/* Have the range's page-table entries made. 0, or -errno: EINVAL where the kernel cannot. */
int kvmmm_mirror_populate(const struct kvmmm_mirror *m, uint64_t start, uint64_t end);

/* n_vmas of all mirrors of the process. */
uint64_t kvmmm_mirror_count_all(void);

/* What to clear to be rid of what is mapped in a range within one GiB: widened to whole runs, and with
 * those in the blocks that it touches. False: nothing is. *n_runs_ret: VMAs that begin there. */
bool kvmmm_mirror_victim(const struct kvmmm_mirror *m, uint64_t *start, uint64_t *end, uint64_t *n_runs_ret);

#endif /* KVMMM_MIRROR_H */
