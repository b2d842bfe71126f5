/* frames.c: filling and clearing the frame table. With the GIL held; who looks up may not hold it. */
#define _GNU_SOURCE
#include "frames.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

/* Behind the entries of a chunk: a count for each 2 MiB. Clearing so many pages is left to the kernel, and
 * over so many chunks only those that exist are looked at. */
enum {
    ENTRIES_BYTES = KVMMM_CHUNK_PAGES * sizeof(uint32_t),
    CHUNK_BYTES = ENTRIES_BYTES + (1 << (KVMMM_CHUNK_SHIFT - 21)) * sizeof(uint32_t),
    DROP_PAGES = 16384,
    MANY_CHUNKS = 64,
};

#define CHUNK_MASK ((uint64_t)KVMMM_CHUNK_PAGES - 1)

static void *sparse(uint64_t n_bytes)
{
    void *at = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

int kvmmm_frames_init(struct kvmmm_frames *f, uint64_t max_addr, uintptr_t base, uint64_t n_bytes)
{
    f->n_chunks = (max_addr >> KVMMM_CHUNK_SHIFT) + 1;
    f->chunks = sparse(f->n_chunks * sizeof *f->chunks);
    f->made = sparse(f->n_chunks * sizeof *f->made);
    f->base = base;
    f->n_frames = n_bytes >> 12;
    if (f->n_frames > 1ULL << (32 - KVMMM_FRAME_BITS))
        f->n_frames = 1ULL << (32 - KVMMM_FRAME_BITS);
    return f->chunks && f->made ? 0 : -ENOMEM;
}

void kvmmm_frames_release(struct kvmmm_frames *f)
{
    for (uint64_t i = 0; i < f->n_made; i++)
        munmap(f->chunks[f->made[i]], CHUNK_BYTES);
    if (f->chunks)
        munmap(f->chunks, f->n_chunks * sizeof *f->chunks);
    if (f->made)
        munmap(f->made, f->n_chunks * sizeof *f->made);
    f->chunks = NULL;
    f->made = NULL;
    f->n_made = 0;
}

/* How far the chunk of @p at reaches. */
static uint64_t chunk_end(uint64_t at, uint64_t end)
{
    uint64_t next = ((at >> KVMMM_CHUNK_SHIFT) + 1) << KVMMM_CHUNK_SHIFT;
    return next < end ? next : end;
}

int kvmmm_frames_fill(struct kvmmm_frames *f, uint64_t start, uint64_t end, uint64_t fo, unsigned bits)
{
    while (start < end) {
        uint64_t stop = chunk_end(start, end);
        uint32_t *chunk = f->chunks[start >> KVMMM_CHUNK_SHIFT];
        if (!chunk) {
            if (!(chunk = sparse(CHUNK_BYTES)))
                return -ENOMEM;
            f->made[f->n_made++] = start >> KVMMM_CHUNK_SHIFT;
            __atomic_store_n(&f->chunks[start >> KVMMM_CHUNK_SHIFT], chunk, __ATOMIC_RELEASE);
        }
        uint32_t entry = (uint32_t)(fo >> 12 << KVMMM_FRAME_BITS) | bits;
        for (uint64_t page = start >> 12; page < stop >> 12; page++, entry += 1 << KVMMM_FRAME_BITS)
            __atomic_store_n(&chunk[page & CHUNK_MASK], entry, __ATOMIC_RELAXED);
        fo += stop - start;
        start = stop;
    }
    return 0;
}

/* [page, last) of one chunk, by number within the chunk. */
static void clear_in(uint32_t *chunk, uint64_t page, uint64_t last)
{
    if (last - page >= DROP_PAGES) {
        uint64_t from = (page + 1023) & ~1023ULL, to = last & ~1023ULL;
        if (!madvise(&chunk[from], (to - from) * sizeof *chunk, MADV_DONTNEED)) {
            clear_in(chunk, page, from);
            page = to;
        }
    }
    for (; page < last; page++)
        if (chunk[page])
            __atomic_store_n(&chunk[page], 0, __ATOMIC_RELAXED);
}

void kvmmm_frames_clear(struct kvmmm_frames *f, uint64_t start, uint64_t end)
{
    if ((end - start) >> KVMMM_CHUNK_SHIFT > MANY_CHUNKS) {
        for (uint64_t i = 0; i < f->n_made; i++) {
            uint64_t at = f->made[i] << KVMMM_CHUNK_SHIFT, stop = at + (1ULL << KVMMM_CHUNK_SHIFT);
            uint64_t from = at < start ? start : at, to = stop < end ? stop : end;
            if (from < to)
                clear_in(f->chunks[f->made[i]], (from - at) >> 12, (to - at) >> 12);
        }
        return;
    }
    while (start < end) {
        uint64_t stop = chunk_end(start, end), at = start & -(1ULL << KVMMM_CHUNK_SHIFT);
        uint32_t *chunk = f->chunks[start >> KVMMM_CHUNK_SHIFT];
        if (chunk)
            clear_in(chunk, (start - at) >> 12, (stop - at) >> 12);
        start = stop;
    }
}

uint32_t kvmmm_frames_count(struct kvmmm_frames *f, uint64_t addr, bool reset)
{
    uint32_t *chunk = f->chunks ? f->chunks[addr >> KVMMM_CHUNK_SHIFT] : NULL;
    if (!chunk)
        return 0;
    uint32_t *count = &chunk[KVMMM_CHUNK_PAGES + ((addr & ((1 << KVMMM_CHUNK_SHIFT) - 1)) >> 21)];
    return *count = reset ? 0 : *count + 1;
}

static uint32_t entry_at(const struct kvmmm_frames *f, uint64_t addr)
{
    const uint32_t *chunk = f->chunks[addr >> KVMMM_CHUNK_SHIFT];
    return chunk ? chunk[(addr >> 12) & CHUNK_MASK] : 0;
}

bool kvmmm_frames_run(const struct kvmmm_frames *f, uint64_t *start, uint64_t end, uint64_t *stop, uint64_t *fo,
                      unsigned *bits)
{
    uint64_t at = *start;
    while (at < end && !entry_at(f, at))
        at = f->chunks[at >> KVMMM_CHUNK_SHIFT] ? at + 4096 : chunk_end(at, end);
    if (at >= end)
        return false;
    uint32_t entry = entry_at(f, at);
    *start = at;
    *fo = (uint64_t)(entry >> KVMMM_FRAME_BITS) << 12;
    *bits = entry & ((1 << KVMMM_FRAME_BITS) - 1);
    do {
        at += 4096;
        entry += 1 << KVMMM_FRAME_BITS;
    } while (at < end && entry_at(f, at) == entry);
    *stop = at;
    return true;
}

uint64_t kvmmm_frames_extent(const uint32_t *chunk, uint64_t addr, uint64_t n, unsigned need)
{
    uint64_t page = (addr >> 12) & CHUNK_MASK, extent = 4096 - (addr & 4095);
    uint32_t frame = __atomic_load_n(&chunk[page], __ATOMIC_RELAXED) >> KVMMM_FRAME_BITS;
    while (extent < n && ++page < KVMMM_CHUNK_PAGES) {
        uint32_t entry = __atomic_load_n(&chunk[page], __ATOMIC_RELAXED);
        if ((entry & need) != need || entry >> KVMMM_FRAME_BITS != ++frame)
            break;
        extent += 4096;
    }
    return extent < n ? extent : n;
}
