/* mirror.c: windows, their bitmaps, and what is mapped in them. */
#define _GNU_SOURCE
#include "mirror.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define WINDOW (1ul << KVMMM_MIRROR_SHIFT)
#define RESERVED (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

typedef struct kvmmm_mirror_chunk chunk_t;

static _Atomic uint64_t n_vmas_all;

/* ---- bits [first, end) of a bitmap ------------------------------------------------------------ */

/* The bits of word @p word that lie in [first, end). */
static uint64_t word_mask(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t mask = ~0ull;
    if (first > word * 64)
        mask &= ~0ull << (first % 64);
    if (end < word * 64 + 64)
        mask &= ~(~0ull << (end % 64));
    return mask;
}

/* Writers are one at a time: no need for an atomic or. Returns how many bits changed. */
static uint64_t change_bits(_Atomic uint64_t *bits, uint64_t first, uint64_t end, bool set)
{
    uint64_t n_changed = 0;
    for (uint64_t word = first / 64; word * 64 < end; word++) {
        uint64_t mask = word_mask(word, first, end);
        uint64_t old = atomic_load_explicit(&bits[word], memory_order_relaxed);
        uint64_t new = set ? old | mask : old & ~mask;
        n_changed += (uint64_t)__builtin_popcountll(old ^ new);
        if (old != new)
            atomic_store_explicit(&bits[word], new, memory_order_release);
    }
    return n_changed;
}

/* ---- what is mapped where --------------------------------------------------------------------- */

/* Equal but for the page number where the kernel merges: same file, same protection. The descriptor is cut
 * off at 21 bits and the offset at 53: what that confuses is a count. */
static uint64_t what_of(int fd, uint64_t fo, bool writable)
{
    return 1ull << 63 | (uint64_t)writable << 62 | ((uint64_t)fd & 0x1fffff) << 41 | (fo / PAGE & ((1ull << 41) - 1));
}

static uint64_t what_after(uint64_t what, uint64_t n_pages) { return what ? what + n_pages : 0; }

/* The last set bit up to @p at: there is one. */
static uint64_t last_set(const uint64_t *bits, uint64_t at)
{
    uint64_t word = at / 64, found = bits[word] & ~0ull >> (63 - at % 64);
    while (!found)
        found = bits[--word];
    return word * 64 + 63 - (uint64_t)__builtin_clzll(found);
}

/* The first set bit from @p at on, or @p n: how many there are, a multiple of 64. */
static uint64_t first_set(const uint64_t *bits, uint64_t at, uint64_t n)
{
    uint64_t word = at / 64;
    if (at >= n)
        return n;
    uint64_t found = bits[word] & ~0ull << (at % 64);
    while (!found) {
        if (++word == n / 64)
            return n;
        found = bits[word];
    }
    return word * 64 + (uint64_t)__builtin_ctzll(found);
}

static uint64_t run_start(const chunk_t *c, uint64_t page)
{
    if (c->starts[page / 64] & ~0ull >> (63 - page % 64))
        return last_set(c->starts, page);
    return last_set(c->starts, last_set(c->filled, page / 64 - 1) * 64 + 63); /* page 0 always starts */
}

/* The first start behind @p page, or the window's end. */
static uint64_t run_end(const chunk_t *c, uint64_t page)
{
    uint64_t word = ++page / 64;
    if (word < KVMMM_MIRROR_WORDS && c->starts[word] & ~0ull << (page % 64))
        return first_set(c->starts, page, KVMMM_MIRROR_PAGES);
    word = first_set(c->filled, word + 1, KVMMM_MIRROR_WORDS);
    return first_set(c->starts, word * 64, KVMMM_MIRROR_PAGES);
}

static uint64_t what_at(const chunk_t *c, uint64_t page)
{
    uint64_t start = run_start(c, page);
    return what_after(c->what[start], page - start);
}

static void begin_run(chunk_t *c, uint64_t page, uint64_t what)
{
    c->starts[page / 64] |= 1ull << (page % 64);
    c->filled[page / 4096] |= 1ull << (page / 64 % 64);
    c->what[page] = what;
    c->n_runs++;
}

/* Modulo 2^64: fewer is a large number. */
static void count_vmas(struct kvmmm_mirror *m, uint64_t n_more)
{
    m->n_vmas += n_more;
    atomic_fetch_add(&n_vmas_all, n_more);
}

/* Pages [first, end) now map @p what. */
static void set_run(struct kvmmm_mirror *m, chunk_t *c, uint64_t first, uint64_t end, uint64_t what)
{
    uint64_t n_runs = c->n_runs, right = end < KVMMM_MIRROR_PAGES ? what_at(c, end) : 0;
    bool joins = first && what_after(what_at(c, first - 1), 1) == what;
    uint64_t edge = end < KVMMM_MIRROR_PAGES ? end + 1 : end;
    for (uint64_t word = first / 64; word * 64 < edge; word++) {
        uint64_t gone = c->starts[word] & word_mask(word, first, edge);
        c->starts[word] ^= gone;
        if (!c->starts[word])
            c->filled[word / 64] &= ~(1ull << (word % 64));
        c->n_runs -= (uint64_t)__builtin_popcountll(gone);
    }
    if (!joins)
        begin_run(c, first, what);
    if (end < KVMMM_MIRROR_PAGES && what_after(what, end - first) != right)
        begin_run(c, end, right);
    count_vmas(m, c->n_runs - n_runs);
}

/* ---- windows ---------------------------------------------------------------------------------- */

/* At the limit of VMAs every mmap fails, one that would take away thousands as well; only munmap works,
 * and a window must have no hole. So these few are kept, of kinds that do not merge, to be given up then. */
enum { SPARE_PAGES = 6 };
static uint8_t *spare;

static void make_spare(void)
{
    if (spare)
        return;
    uint8_t *pages = mmap(NULL, SPARE_PAGES * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return;
    for (unsigned i = 1; i < SPARE_PAGES; i += 2)
        if (mprotect(pages + i * PAGE, PAGE, PROT_NONE)) {
            munmap(pages, SPARE_PAGES * PAGE);
            return;
        }
    spare = pages;
}

/* A GiB of nothing, at 2 MiB: so huge pages of the file can be huge pages here. */
static uint8_t *reserve_window(void)
{
    uint8_t *base = mmap(NULL, WINDOW, PROT_NONE, RESERVED, -1, 0);
    if (base == MAP_FAILED || !((uintptr_t)base % HUGE))
        return base;
    munmap(base, WINDOW);
    base = mmap(NULL, WINDOW + HUGE, PROT_NONE, RESERVED, -1, 0);
    if (base == MAP_FAILED)
        return base;
    uint8_t *start = base + (HUGE - (uintptr_t)base % HUGE) % HUGE;
    if (start != base)
        munmap(base, (size_t)(start - base));
    if (start != base + HUGE)
        munmap(start + WINDOW, (size_t)(base + HUGE - start));
    return start;
}

static int new_chunk(struct kvmmm_mirror *m, uint64_t addr, chunk_t **ret)
{
    make_spare();
    chunk_t *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, RESERVED, -1, 0);
    if (c == MAP_FAILED)
        return -errno;
    madvise(c, sizeof *c, MADV_NOHUGEPAGE); /* sparse: a huge page would be 2 MiB of zeroes */
    uint8_t *window = reserve_window();
    if (window == MAP_FAILED) {
        int rc = -errno;
        munmap(c, sizeof *c);
        return rc;
    }
    c->hva = (uintptr_t)window;
    begin_run(c, 0, 0);
    count_vmas(m, 2); /* and its own memory */
    m->n_windows++;
    atomic_store_explicit(&m->chunks[addr >> KVMMM_MIRROR_SHIFT], c, memory_order_release);
    *ret = c;
    return 0;
}

int kvmmm_mirror_init(struct kvmmm_mirror *m, uint64_t max_addr)
{
    uint64_t n_chunks = (max_addr + WINDOW - 1) / WINDOW;
    void *chunks = mmap(NULL, n_chunks * sizeof *m->chunks, PROT_READ | PROT_WRITE, RESERVED, -1, 0);
    if (chunks == MAP_FAILED)
        return -errno;
    *m = (struct kvmmm_mirror){.chunks = chunks, .n_chunks = n_chunks, .max_addr = max_addr};
    return 0;
}

void kvmmm_mirror_release(struct kvmmm_mirror *m)
{
    uint64_t n_chunks = m->n_chunks;
    m->n_chunks = 0;
    for (uint64_t i = 0; i < n_chunks && m->n_windows; i++) {
        chunk_t *c = m->chunks[i];
        if (!c)
            continue;
        m->n_windows--;
        count_vmas(m, -(c->n_runs + 1));
        munmap((void *)c->hva, WINDOW);
        munmap(c, sizeof *c);
    }
    if (n_chunks)
        munmap(m->chunks, n_chunks * sizeof *m->chunks);
    m->chunks = NULL;
    m->n_resident = 0;
}

/* ---- changes ---------------------------------------------------------------------------------- */

int kvmmm_mirror_place(struct kvmmm_mirror *m, uint64_t start, uint64_t end, int fd, uint64_t fo, bool writable)
{
    chunk_t *c = kvmmm_mirror_chunk_at(m, start);
    int rc = c ? 0 : new_chunk(m, start, &c);
    if (rc)
        return rc;
    uint64_t offset = start % WINDOW;
    void *hva = (void *)(c->hva + offset);
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    if (mmap(hva, end - start, prot, MAP_SHARED | MAP_FIXED, fd, (off_t)fo) == MAP_FAILED) {
        rc = -errno;
        /* Before Linux 6.12 an mmap that fails late has unmapped already what was there. */
        if (mmap(hva, end - start, PROT_NONE, RESERVED | MAP_FIXED_NOREPLACE, -1, 0) == hva)
            set_run(m, c, offset / PAGE, (offset + end - start) / PAGE, 0);
        return rc;
    }
    set_run(m, c, offset / PAGE, (offset + end - start) / PAGE, what_of(fd, fo, writable));
    return 0;
}

void kvmmm_mirror_admit(struct kvmmm_mirror *m, uint64_t start, uint64_t end, bool writable)
{
    chunk_t *c = kvmmm_mirror_chunk_at(m, start);
    uint64_t first = start % WINDOW / PAGE, last = first + (end - start) / PAGE;
    uint64_t n_more = change_bits(c->readable, first, last, true);
    c->n_resident += n_more;
    m->n_resident += n_more;
    if (writable)
        change_bits(c->writable, first, last, true);
}

/* The next window in [*start, end), if there is one, and which pages of it. */
static chunk_t *next_chunk(const struct kvmmm_mirror *m, uint64_t *start, uint64_t end, uint64_t *first,
                           uint64_t *last)
{
    while (*start < end && *start >> KVMMM_MIRROR_SHIFT < m->n_chunks) {
        uint64_t base = *start & -WINDOW, stop = end - base < WINDOW ? end : base + WINDOW;
        chunk_t *c = kvmmm_mirror_chunk_at(m, base);
        *first = (*start - base) / PAGE;
        *last = (stop - base) / PAGE;
        *start = stop;
        if (c)
            return c;
    }
    return NULL;
}

void kvmmm_mirror_forget(struct kvmmm_mirror *m, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    for (chunk_t *c; (c = next_chunk(m, &start, end, &first, &last));)
        if (c->n_resident) {
            uint64_t n_fewer = change_bits(c->readable, first, last, false);
            c->n_resident -= n_fewer;
            m->n_resident -= n_fewer;
            change_bits(c->writable, first, last, false);
        }
}

static bool is_bare(const chunk_t *c, uint64_t first, uint64_t last)
{
    return !what_at(c, first) && run_end(c, first) >= last;
}

bool kvmmm_mirror_is_bare(const struct kvmmm_mirror *m, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    for (const chunk_t *c; (c = next_chunk(m, &start, end, &first, &last));)
        if (!is_bare(c, first, last))
            return false;
    return true;
}

static int clear_pages(struct kvmmm_mirror *m, chunk_t *c, uint64_t first, uint64_t last)
{
    void *hva = (void *)(c->hva + first * PAGE);
    if (mmap(hva, (last - first) * PAGE, PROT_NONE, RESERVED | MAP_FIXED, -1, 0) == MAP_FAILED)
        return -errno;
    set_run(m, c, first, last, 0);
    return 0;
}

int kvmmm_mirror_clear(struct kvmmm_mirror *m, uint64_t start, uint64_t end)
{
    int rc = 0;
    uint64_t first, last;
    for (chunk_t *c; (c = next_chunk(m, &start, end, &first, &last));) {
        int err = is_bare(c, first, last) ? 0 : clear_pages(m, c, first, last);
        rc = err ? err : rc;
    }
    return rc;
}

int kvmmm_mirror_clear_window(struct kvmmm_mirror *m, uint64_t addr)
{
    chunk_t *c = kvmmm_mirror_chunk_at(m, addr);
    if (!c)
        return 0;
    int rc = clear_pages(m, c, 0, KVMMM_MIRROR_PAGES);
    if (rc == -ENOMEM && spare) {
        munmap(spare, SPARE_PAGES * PAGE);
        spare = NULL;
        rc = clear_pages(m, c, 0, KVMMM_MIRROR_PAGES);
        make_spare();
    }
    return rc;
}

int kvmmm_mirror_populate(const struct kvmmm_mirror *m, uint64_t start, uint64_t end)
{
    uint64_t first, last;
    for (const chunk_t *c; (c = next_chunk(m, &start, end, &first, &last));)
        if (madvise((void *)(c->hva + first * PAGE), (last - first) * PAGE, MADV_POPULATE_READ))
            return -errno;
    return 0;
}

uint64_t kvmmm_mirror_count_all(void) { return atomic_load(&n_vmas_all); }

bool kvmmm_mirror_victim(const struct kvmmm_mirror *m, uint64_t *start, uint64_t *end, uint64_t *n_runs_ret)
{
    uint64_t base = *start & -WINDOW, first, last, at = *start;
    const chunk_t *c = next_chunk(m, &at, *end, &first, &last);
    if (!c || is_bare(c, first, last))
        return false;
    if (what_at(c, first))
        first = run_start(c, first);
    if (what_at(c, last - 1))
        last = run_end(c, last - 1);
    /* To the ends of the blocks; a longer run that comes in from outside stays. */
    uint64_t low = first & -(uint64_t)KVMMM_MIRROR_BLOCK;
    uint64_t high = (last + KVMMM_MIRROR_BLOCK - 1) & -(uint64_t)KVMMM_MIRROR_BLOCK;
    if (run_start(c, low) < low && what_at(c, low))
        low = run_end(c, low) < first ? run_end(c, low) : first;
    if (high < KVMMM_MIRROR_PAGES && run_start(c, high) < high && what_at(c, high))
        high = run_start(c, high) > last ? run_start(c, high) : last;
    *n_runs_ret = 0;
    for (uint64_t page = low; page < high; page = run_end(c, page))
        *n_runs_ret += 1;
    *start = base + low * PAGE;
    *end = base + high * PAGE;
    return true;
}
