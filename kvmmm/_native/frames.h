/* frames.h: the frame table: guest page -> frame of the arena, and what may be done with it.
 *
 * One load answers both questions, and its cost does not depend on how many pmas there are. A cache of
 * the pmas: filled when a copy misses, cleared before anything that it says ceases to be true. Chunks of
 * 1 GiB of guest addresses are made when they are first filled.
 */
#ifndef KVMMM_FRAMES_H
#define KVMMM_FRAMES_H

#include <stdbool.h>
#include <stdint.h>

/* Low bits of an entry, the frame's number above them: what the pma permits, and what a debugger may do.
 * An access is one of READ and WRITE, or both; ignoring permissions shifts it by KVMMM_FRAME_MAX_SHIFT. */
enum {
    KVMMM_FRAME_READ = 1,
    KVMMM_FRAME_WRITE = 2,
    KVMMM_FRAME_MAX_SHIFT = 2,
    KVMMM_FRAME_BITS = 4,
};

enum { KVMMM_CHUNK_SHIFT = 30, KVMMM_CHUNK_PAGES = 1 << (KVMMM_CHUNK_SHIFT - 12) };

struct kvmmm_frames {
    uint32_t **chunks; /* by addr >> KVMMM_CHUNK_SHIFT; NULL: all absent */
    uint64_t n_chunks;
    uint64_t *made;    /* which chunks there are, as they came */
    uint64_t n_made;
    uintptr_t base;    /* host address of the arena's offset 0 */
    uint64_t n_frames; /* that an entry can name */
};

/* 0 or -errno. */
int kvmmm_frames_init(struct kvmmm_frames *f, uint64_t max_addr, uintptr_t base, uint64_t n_bytes);
void kvmmm_frames_release(struct kvmmm_frames *f);

/* Page aligned, inside max_addr and the arena. 0 or -errno: no memory for a chunk; some may be filled. */
int kvmmm_frames_fill(struct kvmmm_frames *f, uint64_t start, uint64_t end, uint64_t fo, unsigned bits);
void kvmmm_frames_clear(struct kvmmm_frames *f, uint64_t start, uint64_t end);

/* How often the 2 MiB around @p addr were copied without the mirror, one more; 0: nobody counts there. */
uint32_t kvmmm_frames_count(struct kvmmm_frames *f, uint64_t addr, bool reset);

/* The first run of entries at or after *start that say the same; false: none below @p end. */
bool kvmmm_frames_run(const struct kvmmm_frames *f, uint64_t *start, uint64_t end, uint64_t *stop, uint64_t *fo,
                      unsigned *bits);

/* How many bytes from @p addr on, @p n at most, lie side by side; the first page is known to. */
uint64_t kvmmm_frames_extent(const uint32_t *chunk, uint64_t addr, uint64_t n, unsigned need);

/* Host address of @p addr (below max_addr) if it may be accessed, or 0; *n_ret as for the extent. */
static inline uintptr_t kvmmm_frames_find(const struct kvmmm_frames *f, uint64_t addr, uint64_t n, unsigned need,
                                          uint64_t *n_ret)
{
    const uint32_t *chunk = __atomic_load_n(&f->chunks[addr >> KVMMM_CHUNK_SHIFT], __ATOMIC_ACQUIRE);
    if (!chunk)
        return 0;
    uint32_t entry = __atomic_load_n(&chunk[(addr >> 12) & (KVMMM_CHUNK_PAGES - 1)], __ATOMIC_RELAXED);
    if ((entry & need) != need)
        return 0;
    uint64_t offset = addr & 4095;
    *n_ret = n <= 4096 - offset ? n : kvmmm_frames_extent(chunk, addr, n, need);
    return f->base + ((uint64_t)(entry >> KVMMM_FRAME_BITS) << 12) + offset;
}

#endif /* KVMMM_FRAMES_H */
