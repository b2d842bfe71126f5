/* segment.h: an ordered set of disjoint segments of [0, 2^64), each with a value.
 *
 * Segments lie in blocks of at most 256, three parallel arrays each, under a directory that keeps
 * the blocks' first addresses in one array: a lookup is two short bisections, a change moves a few
 * hundred words, whatever the size of the set. Plain C: values are pointers that it never follows.
 *
 * A segment is its first and its *last* byte, so that the end 2^64 needs no 65th bit.
 */
#ifndef KVMMM_SEGMENT_H
#define KVMMM_SEGMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SEGMENT_BLOCK_MAX = 256 };

struct segment {
    uint64_t start, last;
    void *value;
};

/* Never empty. One allocation holds starts, lasts and values, `capacity` of each; it doubles up to
 * the set's block_max, since most sets stay small. */
struct segment_block {
    uint64_t *starts;
    uint32_t n, capacity;
};

/* Segment `index` of block `block`; {n_blocks, 0} is the end. */
struct segment_position {
    size_t block;
    uint32_t index;
};

struct segment_set {
    size_t n_segments;
    uint64_t span_bytes; /* sum of the lengths, modulo 2^64: 0 of a set that is not empty is 2^64 */
    uint64_t version;    /* changes whenever positions may mean something else */
    size_t n_blocks, directory_capacity;
    uint64_t *firsts; /* firsts[i] == blocks[i].starts[0] */
    struct segment_block *blocks;
    /* Longest gap behind a segment of the block; that of the last reaches to the next block, or to
     * 2^64. SEGMENT_GAP_UNKNOWN until somebody asks. */
    uint64_t *max_gaps;
    uint32_t block_max;
};

#define SEGMENT_GAP_UNKNOWN UINT64_MAX

static inline uint64_t *segment_lasts(const struct segment_block *b) { return b->starts + b->capacity; }

static inline void **segment_values(const struct segment_block *b)
{
    return (void **)(b->starts + 2 * (size_t)b->capacity);
}

/* How many of n ascending numbers are at most x. */
static inline size_t segment_upper_bound(const uint64_t *numbers, size_t n, uint64_t x)
{
    const uint64_t *base = numbers;
    while (n > 1) {
        size_t half = n / 2;
        base = base[half] <= x ? base + half : base;
        n -= half;
    }
    return (size_t)(base - numbers) + (n && *base <= x);
}

static inline bool segment_is_end(const struct segment_set *set, struct segment_position p)
{
    return p.block == set->n_blocks;
}

static inline struct segment segment_at(const struct segment_set *set, struct segment_position p)
{
    const struct segment_block *b = &set->blocks[p.block];
    return (struct segment){b->starts[p.index], segment_lasts(b)[p.index], segment_values(b)[p.index]};
}

static inline struct segment_position segment_next(const struct segment_set *set, struct segment_position p)
{
    if (p.index + 1 < set->blocks[p.block].n)
        return (struct segment_position){p.block, p.index + 1};
    return (struct segment_position){p.block + 1, 0};
}

/* The position before p; false at the beginning. */
static inline bool segment_prev(const struct segment_set *set, struct segment_position *p)
{
    if (p->index)
        p->index--;
    else if (p->block)
        *p = (struct segment_position){p->block - 1, set->blocks[p->block - 1].n - 1};
    else
        return false;
    return true;
}

/* The last segment that starts at or before addr; false when there is none. */
static inline bool segment_floor(const struct segment_set *set, uint64_t addr, struct segment_position *p)
{
    size_t block = segment_upper_bound(set->firsts, set->n_blocks, addr);
    if (!block)
        return false;
    const struct segment_block *b = &set->blocks[block - 1];
    *p = (struct segment_position){block - 1, (uint32_t)segment_upper_bound(b->starts, b->n, addr) - 1};
    return true;
}

/* The first segment that covers addr or lies behind it. */
static inline struct segment_position segment_locate(const struct segment_set *set, uint64_t addr)
{
    struct segment_position p;
    if (!segment_floor(set, addr, &p))
        return (struct segment_position){0, 0};
    return addr <= segment_lasts(&set->blocks[p.block])[p.index] ? p : segment_next(set, p);
}

void segment_set_init(struct segment_set *set, uint32_t block_max);

/* Frees the memory; the values are the caller's. The set is empty afterwards. */
void segment_set_free(struct segment_set *set);

/* Where a segment that starts at `start` belongs: before the segment at the position, which may be
 * one past the last of its block. */
struct segment_position segment_place(const struct segment_set *set, uint64_t start);

/* Adds a segment at *p and says where it lies then. The caller knows that it fits there.
 * -ENOMEM: nothing has changed. */
int segment_insert_at(struct segment_set *set, struct segment_position *p, struct segment segment);

/* Moves one edge of a segment; the order stays as it is. */
void segment_move_start(struct segment_set *set, struct segment_position p, uint64_t start);
void segment_move_last(struct segment_set *set, struct segment_position p, uint64_t last);

/* Gives a segment another value; returns the one that it had. */
void *segment_swap_value(struct segment_set *set, struct segment_position p, void *value);

/* Deletes the segments from one position up to another. */
void segment_delete(struct segment_set *set, struct segment_position from, struct segment_position to);

/* The lowest (or highest) multiple of align_bytes, a power of two, in [start, last] from which
 * length_bytes (0: 2^64) lie in [start, last] and in no segment; false when there is none. */
bool segment_find_gap(struct segment_set *set, uint64_t start, uint64_t last, uint64_t length_bytes,
                      uint64_t align_bytes, bool top_down, uint64_t *found);

/* What is wrong with block `block` by itself, or between it and the one before; NULL if nothing. */
const char *segment_check_block(const struct segment_set *set, size_t block);

/* Whether the counters are those of the blocks. */
bool segment_check_counters(const struct segment_set *set);

#endif
