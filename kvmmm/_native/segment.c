/* segment.c: blocks of segments and their directory. See segment.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "segment.h"

enum { FIRST_CAPACITY = 8 };

void segment_set_init(struct segment_set *set, uint32_t block_max)
{
    memset(set, 0, sizeof(*set));
    set->block_max = block_max;
}

void segment_set_free(struct segment_set *set)
{
    for (size_t i = 0; i < set->n_blocks; i++)
        free(set->blocks[i].starts);
    free(set->firsts);
    free(set->blocks);
    free(set->max_gaps);
    uint64_t version = set->version + 1;
    segment_set_init(set, set->block_max);
    set->version = version;
}

/* An edge of segment `index`, or its presence, has changed: the gaps around it have. */
static void forget_gaps(struct segment_set *set, size_t block, uint32_t index)
{
    if (block < set->n_blocks)
        set->max_gaps[block] = SEGMENT_GAP_UNKNOWN;
    if (index == 0 && block)
        set->max_gaps[block - 1] = SEGMENT_GAP_UNKNOWN;
}

/* Moves n segments between (or inside) blocks that have the room. */
static void move(struct segment_block *to, uint32_t at, const struct segment_block *from, uint32_t index,
                 uint32_t n)
{
    memmove(to->starts + at, from->starts + index, n * sizeof(uint64_t));
    memmove(segment_lasts(to) + at, segment_lasts(from) + index, n * sizeof(uint64_t));
    memmove(segment_values(to) + at, segment_values(from) + index, n * sizeof(void *));
}

static int make_block(struct segment_block *b, uint32_t capacity)
{
    *b = (struct segment_block){malloc(capacity * sizeof(uint64_t) * 3), 0, capacity};
    return b->starts ? 0 : -ENOMEM;
}

static int grow_block(struct segment_block *b, uint32_t capacity)
{
    struct segment_block grown;
    if (make_block(&grown, capacity))
        return -ENOMEM;
    move(&grown, 0, b, 0, b->n);
    grown.n = b->n;
    free(b->starts);
    *b = grown;
    return 0;
}

/* Room for one more block in the three arrays; each may stay larger than it need be. */
static int grow_directory(struct segment_set *set)
{
    if (set->n_blocks < set->directory_capacity)
        return 0;
    size_t capacity = set->directory_capacity ? set->directory_capacity * 2 : 1;
    uint64_t *firsts = realloc(set->firsts, capacity * sizeof(*firsts));
    if (!firsts)
        return -ENOMEM;
    set->firsts = firsts;
    struct segment_block *blocks = realloc(set->blocks, capacity * sizeof(*blocks));
    if (!blocks)
        return -ENOMEM;
    set->blocks = blocks;
    uint64_t *max_gaps = realloc(set->max_gaps, capacity * sizeof(*max_gaps));
    if (!max_gaps)
        return -ENOMEM;
    set->max_gaps = max_gaps;
    set->directory_capacity = capacity;
    return 0;
}

/* Puts a block into the directory, which has the room. */
static void add_block(struct segment_set *set, size_t at, struct segment_block block)
{
    size_t n = set->n_blocks - at;
    memmove(set->firsts + at + 1, set->firsts + at, n * sizeof(*set->firsts));
    memmove(set->blocks + at + 1, set->blocks + at, n * sizeof(*set->blocks));
    memmove(set->max_gaps + at + 1, set->max_gaps + at, n * sizeof(*set->max_gaps));
    set->blocks[at] = block;
    set->firsts[at] = block.n ? block.starts[0] : 0;
    set->max_gaps[at] = SEGMENT_GAP_UNKNOWN;
    set->n_blocks++;
}

/* Takes blocks [from, to) out of the directory and frees them. */
static void drop_blocks(struct segment_set *set, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++)
        free(set->blocks[i].starts);
    size_t n = set->n_blocks - to;
    memmove(set->firsts + from, set->firsts + to, n * sizeof(*set->firsts));
    memmove(set->blocks + from, set->blocks + to, n * sizeof(*set->blocks));
    memmove(set->max_gaps + from, set->max_gaps + to, n * sizeof(*set->max_gaps));
    set->n_blocks -= to - from;
}

/* Cuts a full block in two. */
static int cut_block(struct segment_set *set, size_t block)
{
    struct segment_block upper;
    if (grow_directory(set) || make_block(&upper, set->block_max))
        return -ENOMEM;
    struct segment_block *lower = &set->blocks[block];
    uint32_t half = lower->n / 2;
    upper.n = lower->n - half;
    move(&upper, 0, lower, half, upper.n);
    lower->n = half;
    set->max_gaps[block] = SEGMENT_GAP_UNKNOWN;
    add_block(set, block + 1, upper);
    return 0;
}

/* Room for one more segment at *p, which moves along. */
static int make_room(struct segment_set *set, struct segment_position *p)
{
    if (!set->n_blocks) {
        struct segment_block block;
        uint32_t capacity = set->block_max < FIRST_CAPACITY ? set->block_max : FIRST_CAPACITY;
        if (grow_directory(set) || make_block(&block, capacity))
            return -ENOMEM;
        add_block(set, 0, block);
        return 0;
    }
    struct segment_block *b = &set->blocks[p->block];
    if (b->n < b->capacity)
        return 0;
    if (b->capacity < set->block_max)
        return grow_block(b, b->capacity * 2 < set->block_max ? b->capacity * 2 : set->block_max);
    if (cut_block(set, p->block))
        return -ENOMEM;
    uint32_t half = set->blocks[p->block].n;
    if (p->index > half)
        *p = (struct segment_position){p->block + 1, p->index - half};
    return 0;
}

struct segment_position segment_place(const struct segment_set *set, uint64_t start)
{
    struct segment_position p;
    if (!segment_floor(set, start, &p))
        return (struct segment_position){0, 0};
    p.index++;
    return p;
}

int segment_insert_at(struct segment_set *set, struct segment_position *p, struct segment segment)
{
    if (make_room(set, p))
        return -ENOMEM;
    struct segment_block *b = &set->blocks[p->block];
    move(b, p->index + 1, b, p->index, b->n - p->index);
    b->starts[p->index] = segment.start;
    segment_lasts(b)[p->index] = segment.last;
    segment_values(b)[p->index] = segment.value;
    b->n++;
    if (p->index == 0)
        set->firsts[p->block] = segment.start;
    forget_gaps(set, p->block, p->index);
    set->n_segments++;
    set->span_bytes += segment.last - segment.start + 1;
    set->version++;
    return 0;
}

void segment_move_start(struct segment_set *set, struct segment_position p, uint64_t start)
{
    struct segment_block *b = &set->blocks[p.block];
    set->span_bytes += b->starts[p.index] - start;
    b->starts[p.index] = start;
    if (p.index == 0)
        set->firsts[p.block] = start;
    forget_gaps(set, p.block, p.index);
}

void segment_move_last(struct segment_set *set, struct segment_position p, uint64_t last)
{
    uint64_t *lasts = segment_lasts(&set->blocks[p.block]);
    set->span_bytes += last - lasts[p.index];
    lasts[p.index] = last;
    set->max_gaps[p.block] = SEGMENT_GAP_UNKNOWN;
}

void *segment_swap_value(struct segment_set *set, struct segment_position p, void *value)
{
    void **place = &segment_values(&set->blocks[p.block])[p.index];
    void *old = *place;
    *place = value;
    return old;
}

/* Deletes segments [from, to) of one block; it may become empty. */
static void delete_inside(struct segment_set *set, size_t block, uint32_t from, uint32_t to)
{
    struct segment_block *b = &set->blocks[block];
    for (uint32_t i = from; i < to; i++)
        set->span_bytes -= segment_lasts(b)[i] - b->starts[i] + 1;
    set->n_segments -= to - from;
    move(b, from, b, to, b->n - to);
    b->n -= to - from;
    if (from == 0 && b->n)
        set->firsts[block] = b->starts[0];
}

/* Lets a block take in its successor when both together fill at most half a block. Without memory for
 * that they stay as they are. */
static bool unite(struct segment_set *set, size_t block)
{
    if (block + 1 >= set->n_blocks)
        return false;
    struct segment_block *b = &set->blocks[block], *more = b + 1;
    uint32_t n = b->n + more->n;
    if (n > set->block_max / 2 || (n > b->capacity && grow_block(b, set->block_max / 2)))
        return false;
    move(b, b->n, more, 0, more->n);
    b->n = n;
    set->max_gaps[block] = SEGMENT_GAP_UNKNOWN;
    drop_blocks(set, block + 1, block + 2);
    return true;
}

void segment_delete(struct segment_set *set, struct segment_position from, struct segment_position to)
{
    size_t block = from.block, stop = block + 1; /* blocks [block, stop) are cut behind some index */
    if (block == to.block) {
        if (from.index == to.index)
            return;
        delete_inside(set, block, from.index, to.index);
    } else {
        for (stop = block; stop < to.block; stop++)
            delete_inside(set, stop, stop == block ? from.index : 0, set->blocks[stop].n);
        if (to.index) {
            delete_inside(set, to.block, 0, to.index);
            set->max_gaps[to.block] = SEGMENT_GAP_UNKNOWN;
        }
    }
    drop_blocks(set, block + (set->blocks[block].n != 0), stop);
    forget_gaps(set, block, from.index);
    if (!unite(set, block) && block)
        unite(set, block - 1);
    set->version++;
}
