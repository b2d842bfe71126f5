/* segment_gap.c: the search for a large enough gap, and the invariants. See segment.h. */
#include "segment.h"

/* Bytes between segment `index` of a block and what follows it: a segment, or 2^64. */
static uint64_t gap_behind(const struct segment_set *set, size_t block, uint32_t index)
{
    const struct segment_block *b = &set->blocks[block];
    uint64_t last = segment_lasts(b)[index];
    if (index + 1 < b->n)
        return b->starts[index + 1] - last - 1;
    return block + 1 < set->n_blocks ? set->firsts[block + 1] - last - 1 : UINT64_MAX - last;
}

static uint64_t computed_max_gap(const struct segment_set *set, size_t block)
{
    const struct segment_block *b = &set->blocks[block];
    const uint64_t *starts = b->starts, *lasts = segment_lasts(b);
    uint64_t longest = gap_behind(set, block, b->n - 1);
    for (uint32_t i = 0; i + 1 < b->n; i++) {
        uint64_t gap = starts[i + 1] - lasts[i] - 1;
        longest = gap > longest ? gap : longest;
    }
    return longest;
}

static uint64_t max_gap(struct segment_set *set, size_t block)
{
    if (set->max_gaps[block] == SEGMENT_GAP_UNKNOWN)
        set->max_gaps[block] = computed_max_gap(set, block);
    return set->max_gaps[block];
}

/* What is looked for, and in what. */
struct search {
    uint64_t start, last;  /* the range */
    uint64_t more_bytes;   /* the length, minus one */
    uint64_t align_mask;
    bool top_down;
    uint64_t found;
};

/* Whether the gap [start, last], as far as it lies in the range, has the place. */
static bool fits(struct search *s, uint64_t start, uint64_t last)
{
    if (start < s->start)
        start = s->start;
    if (last > s->last)
        last = s->last;
    if (start > last || last - start < s->more_bytes)
        return false;
    uint64_t lowest = (start + s->align_mask) & ~s->align_mask, highest = last - s->more_bytes;
    if (lowest < start || lowest > highest) /* less: it wrapped */
        return false;
    s->found = s->top_down ? highest & ~s->align_mask : lowest;
    return true;
}

static bool fits_behind(const struct segment_set *set, struct search *s, size_t block, uint32_t index)
{
    uint64_t gap_bytes = gap_behind(set, block, index);
    uint64_t last = segment_lasts(&set->blocks[block])[index];
    return gap_bytes > s->more_bytes && fits(s, last + 1, last + gap_bytes);
}

/* Gaps behind the segments from p on. */
static bool search_up(struct segment_set *set, struct search *s, struct segment_position p)
{
    for (; p.block < set->n_blocks && set->firsts[p.block] <= s->last; p.block++, p.index = 0) {
        if (max_gap(set, p.block) <= s->more_bytes)
            continue;
        for (; p.index < set->blocks[p.block].n; p.index++)
            if (fits_behind(set, s, p.block, p.index))
                return true;
    }
    return false;
}

/* Gaps behind the segments from p down, as long as one can reach into the range. */
static bool search_down(struct segment_set *set, struct search *s, struct segment_position p)
{
    for (;; p.index = set->blocks[--p.block].n - 1) {
        if (max_gap(set, p.block) > s->more_bytes)
            for (uint32_t i = p.index + 1; i--;)
                if (fits_behind(set, s, p.block, i))
                    return true;
        if (!p.block || set->firsts[p.block] <= s->start)
            return false;
    }
}

bool segment_find_gap(struct segment_set *set, uint64_t start, uint64_t last, uint64_t length_bytes,
                      uint64_t align_bytes, bool top_down, uint64_t *found)
{
    struct search s = {start, last, length_bytes - 1, align_bytes - 1, top_down, 0};
    struct segment_position p = {0, 0};
    bool any_before = segment_floor(set, top_down ? last : start, &p);
    bool has_front = !set->n_blocks || set->firsts[0]; /* a gap in front of everything */
    uint64_t front_last = set->n_blocks ? set->firsts[0] - 1 : UINT64_MAX;
    bool ok;
    if (top_down)
        ok = (any_before && search_down(set, &s, p)) || (has_front && fits(&s, 0, front_last));
    else
        ok = (has_front && fits(&s, 0, front_last)) || search_up(set, &s, p);
    *found = s.found;
    return ok;
}

const char *segment_check_block(const struct segment_set *set, size_t block)
{
    const struct segment_block *b = &set->blocks[block];
    if (!b->n || b->n > b->capacity || b->capacity > set->block_max)
        return "too many segments, or none";
    if (set->firsts[block] != b->starts[0])
        return "the directory has another first address";
    if (block) {
        const struct segment_block *before = b - 1;
        if (segment_lasts(before)[before->n - 1] >= b->starts[0])
            return "overlaps the block before";
    }
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->starts[i] > segment_lasts(b)[i] || (i && segment_lasts(b)[i - 1] >= b->starts[i]))
            return "segments out of order";
        if (!segment_values(b)[i])
            return "a segment without a value";
    }
    if (set->max_gaps[block] != SEGMENT_GAP_UNKNOWN && set->max_gaps[block] != computed_max_gap(set, block))
        return "the longest gap is another";
    return NULL;
}

bool segment_check_counters(const struct segment_set *set)
{
    size_t n_segments = 0;
    uint64_t span_bytes = 0;
    for (size_t block = 0; block < set->n_blocks; block++) {
        const struct segment_block *b = &set->blocks[block];
        n_segments += b->n;
        for (uint32_t i = 0; i < b->n; i++)
            span_bytes += segment_lasts(b)[i] - b->starts[i] + 1;
    }
    return n_segments == set->n_segments && span_bytes == set->span_bytes;
}
