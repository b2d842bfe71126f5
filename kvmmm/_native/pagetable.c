/* pagetable.c: the three walks that write. Which entry may be edited where it stands, and why, is told
 * in kvmmm/pagetables/__init__.py. */
#include "pagetable_entry.h"

enum { OP_MAP, OP_UNMAP, OP_PROTECT };

static bool is_in_order(const struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes)
{
    uint64_t last = gva + n_bytes - 1;
    if (t->is_released || !n_bytes || ((gva | n_bytes) & 4095) || last < gva ||
        !(last < LOWER_HALF_END || gva >= UPPER_HALF_START))
        return false;
    for (unsigned slot = index_of(gva, ROOT_LEVEL); slot <= index_of(last, ROOT_LEVEL); slot++)
        if (is_fixed(t, slot))
            return false;
    return true;
}

/* ---- where the walk stands ----------------------------------------------------------------------- */

/* The entry that decides about `at`: a leaf, an absent one, or a link that must not be followed,
 * since what it leads to is shared. path[level] are the entries that led there. */
static uint64_t *find_entry(const struct kvmmm_pt *t, uint64_t *path[5], unsigned *level)
{
    uint64_t *table = table_at(t, t->root_gpa);
    for (unsigned l = ROOT_LEVEL;; l--) {
        uint64_t *e = &table[index_of(t->at, l)];
        path[l] = e;
        if (!is_link(*e, l) || !(*e & W)) {
            *level = l;
            return e;
        }
        table = table_at(t, *e);
    }
}

static bool is_whole(const struct kvmmm_pt *t, unsigned level)
{
    return !(t->at & (span_of(level) - 1)) && t->left_bytes >= span_of(level);
}

/* How many entries, from the one for `at` on, lie in its table and wholly in the range. */
static uint64_t n_whole(const struct kvmmm_pt *t, unsigned level)
{
    uint64_t n = t->left_bytes >> shift_of(level), room = N_ENTRIES - index_of(t->at, level);
    return n < room ? n : room;
}

static void advance(struct kvmmm_pt *t, uint64_t n_bytes)
{
    if (n_bytes > t->left_bytes)
        n_bytes = t->left_bytes;
    t->at += n_bytes;
    t->left_bytes -= n_bytes;
}

/* To where the next entry of that level begins. */
static void skip(struct kvmmm_pt *t, unsigned level)
{
    advance(t, span_of(level) - (t->at & (span_of(level) - 1)));
}

static unsigned stop(struct kvmmm_pt *t, unsigned why, unsigned level, uint64_t *e)
{
    t->level = level;
    t->link = e;
    t->entry = *e;
    t->leaf_level = 1;
    for (unsigned l = level - 1; l > 1; l--)
        if (l <= t->fit_level && is_whole(t, l)) {
            t->leaf_level = l;
            break;
        }
    return why;
}

/* Whether a present entry, the one for `at` or one after it, may be changed where it stands. */
static bool may_edit(const struct kvmmm_pt *t, uint64_t *e, unsigned level)
{
    if (level == 1 || !t->live)
        return true;
    return t->fresh[level] == (uintptr_t)(e - index_of(t->at, level)) - t->hva_delta;
}

/* ---- map ----------------------------------------------------------------------------------------- */

static unsigned put_leaves(struct kvmmm_pt *t, unsigned level, uint64_t *e)
{
    uint64_t leaf = (t->at + t->delta) | t->flags | ps_of(level), n = n_whole(t, level), i;
    bool may_change = may_edit(t, e, level), changed = false;
    for (i = 0; i < n; i++, leaf += span_of(level)) {
        uint64_t old = e[i];
        if (old & P) {
            if (is_link(old, level))
                break;
            if (differ(old, leaf)) {
                if (!may_change)
                    break;
                changed = true;
            }
        }
        store(&e[i], leaf);
    }
    advance(t, i << shift_of(level));
    return changed ? KVMMM_PT_CHANGED : 0;
}

static unsigned go_map(struct kvmmm_pt *t)
{
    unsigned done = 0, level;
    uint64_t *path[5];
    while (t->left_bytes) {
        uint64_t *e = find_entry(t, path, &level), entry = *e, span = span_of(level);
        if (is_link(entry, level))
            return done | stop(t, KVMMM_PT_DETACHED, level - 1, e);
        uint64_t leaf = ((t->at & -span) + t->delta) | t->flags | ps_of(level);
        bool is_same = entry && !differ(entry, leaf);
        if (level <= t->fit_level && is_whole(t, level)) {
            if (entry && !is_same && !may_edit(t, e, level))
                return done | stop(t, KVMMM_PT_DETACHED, level, e);
            done |= put_leaves(t, level, e);
        } else if (is_same) {
            skip(t, level); /* a superpage around it says so already */
        } else if (entry && !may_edit(t, e, level)) {
            return done | stop(t, KVMMM_PT_DETACHED, level, e);
        } else {
            return done | stop(t, entry ? KVMMM_PT_SPLIT : KVMMM_PT_ABSENT, level, e);
        }
    }
    return done;
}

/* ---- unmap --------------------------------------------------------------------------------------- */

static bool is_clear(const uint64_t *table)
{
    for (unsigned i = 0; i < N_ENTRIES; i++)
        if (table[i])
            return false;
    return true;
}

static void take_out(struct kvmmm_pt *t, uint64_t *link, unsigned bits, uint64_t at)
{
    t->removed[t->n_removed] = (*link & ADDRESS) | bits;
    t->removed_at[t->n_removed++] = at;
    store(link, 0);
}

/* Take out the table of path[level], if it is empty now, and then those above it. */
static unsigned prune(struct kvmmm_pt *t, uint64_t *path[5], unsigned level, uint64_t at)
{
    for (; level < ROOT_LEVEL && is_clear(path[level] - index_of(at, level)); level++)
        take_out(t, path[level + 1], level, at);
    return t->n_removed ? KVMMM_PT_REMOVED : 0;
}

static unsigned clear_leaves(struct kvmmm_pt *t, unsigned level, uint64_t *path[5])
{
    uint64_t *e = path[level], n = n_whole(t, level), at = t->at, i;
    bool may_change = may_edit(t, e, level), changed = false;
    for (i = 0; i < n; i++) {
        if (!e[i])
            continue;
        if (is_link(e[i], level) || !may_change)
            break;
        store(&e[i], 0);
        changed = true;
    }
    advance(t, i << shift_of(level));
    return changed ? KVMMM_PT_CHANGED | prune(t, path, level, at) : 0;
}

/* Whether anything in the range, below an entry that takes W away, has not `flags` yet (0: is there
 * at all). Reads only, so that nothing is copied for nothing. */
static bool is_affected(const struct kvmmm_pt *t, uint64_t link, unsigned level, uint64_t at, uint64_t left)
{
    const uint64_t *table = table_at(t, link);
    while (left) {
        uint64_t entry = table[index_of(at, level)], span = span_of(level);
        uint64_t n = span - (at & (span - 1));
        n = n < left ? n : left;
        if (is_link(entry, level)) {
            if (is_affected(t, entry, level - 1, at, n))
                return true;
        } else if (entry && (!t->flags || differ(entry & ~(ADDRESS | PS | W), t->flags))) {
            return true;
        }
        at += n;
        left -= n;
        if (!index_of(at, level))
            break; /* the table's end */
    }
    return false;
}

static unsigned go_unmap(struct kvmmm_pt *t)
{
    unsigned done = 0, level;
    uint64_t *path[5];
    while (t->left_bytes) {
        uint64_t *e = find_entry(t, path, &level), entry = *e;
        if (t->n_removed + ROOT_LEVEL > KVMMM_PT_MAX_REMOVED)
            return done | stop(t, KVMMM_PT_FULL, level, e);
        if (is_link(entry, level)) {
            if (!is_affected(t, entry, level - 1, t->at, t->left_bytes)) {
                skip(t, level);
                continue;
            }
            if (!is_whole(t, level))
                return done | stop(t, KVMMM_PT_DETACHED, level - 1, e);
            if (!may_edit(t, e, level))
                return done | stop(t, KVMMM_PT_DETACHED, level, e);
            /* All of it goes: the reference is dropped, nothing is copied. */
            take_out(t, e, (level - 1) | KVMMM_PT_DROPPED, t->at);
            done |= KVMMM_PT_CHANGED | prune(t, path, level, t->at);
            skip(t, level);
        } else if (!entry && !is_whole(t, level)) {
            skip(t, level);
        } else if (entry && !may_edit(t, e, level)) {
            return done | stop(t, KVMMM_PT_DETACHED, level, e);
        } else if (is_whole(t, level)) {
            done |= clear_leaves(t, level, path);
        } else {
            return done | stop(t, KVMMM_PT_SPLIT, level, e);
        }
    }
    return done;
}

/* ---- protect ------------------------------------------------------------------------------------- */

static unsigned flag_leaves(struct kvmmm_pt *t, unsigned level, uint64_t *e)
{
    uint64_t flags = t->flags | ps_of(level), n = n_whole(t, level), i;
    bool may_change = may_edit(t, e, level), changed = false;
    for (i = 0; i < n; i++) {
        if (!e[i])
            continue;
        if (is_link(e[i], level))
            break;
        uint64_t leaf = (e[i] & ADDRESS) | flags;
        if (differ(e[i], leaf)) {
            if (!may_change)
                break;
            changed = true;
            store(&e[i], leaf);
        }
    }
    advance(t, i << shift_of(level));
    return changed ? KVMMM_PT_CHANGED : 0;
}

static unsigned go_protect(struct kvmmm_pt *t)
{
    unsigned done = 0, level;
    uint64_t *path[5];
    while (t->left_bytes) {
        uint64_t *e = find_entry(t, path, &level), entry = *e;
        if (is_link(entry, level)) {
            if (is_affected(t, entry, level - 1, t->at, t->left_bytes))
                return done | stop(t, KVMMM_PT_DETACHED, level - 1, e);
            skip(t, level);
        } else if (!entry || !differ(entry & ~ADDRESS, t->flags | ps_of(level))) {
            skip(t, level);
        } else if (!may_edit(t, e, level)) {
            return done | stop(t, KVMMM_PT_DETACHED, level, e);
        } else if (is_whole(t, level)) {
            done |= flag_leaves(t, level, e);
        } else {
            return done | stop(t, KVMMM_PT_SPLIT, level, e);
        }
    }
    return done;
}

/* ---- the calls ----------------------------------------------------------------------------------- */

unsigned kvmmm_pt_resume(struct kvmmm_pt *t)
{
    return t->op == OP_MAP ? go_map(t) : t->op == OP_UNMAP ? go_unmap(t) : go_protect(t);
}

static void begin(struct kvmmm_pt *t, unsigned op, uint64_t gva, uint64_t n_bytes, uint64_t flags)
{
    t->op = op;
    t->at = gva;
    t->left_bytes = n_bytes;
    t->flags = flags;
    t->fit_level = 3;
    t->n_removed = 0;
    for (unsigned l = 0; l <= ROOT_LEVEL; l++)
        t->fresh[l] = NO_TABLE;
}

unsigned kvmmm_pt_unmap(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes)
{
    if (!is_in_order(t, gva, n_bytes))
        return KVMMM_PT_INVALID;
    begin(t, OP_UNMAP, gva, n_bytes, 0);
    return go_unmap(t);
}

/* What keeps its frame and loses no permission may be used on. */
static bool is_stale(uint64_t old, uint64_t new)
{
    return (old & P) && ((old ^ new) & ADDRESS || (old & ~new & W) || (new & ~old & NX));
}

static bool add_stale(struct kvmmm_pt_stale *stale, uint64_t gpa)
{
    stale->n_pages++;
    if (stale->n_runs && stale->runs[stale->n_runs - 1].end == gpa) {
        stale->runs[stale->n_runs - 1].end += 4096;
        return true;
    }
    if (stale->n_runs == KVMMM_PT_MAX_STALE)
        return false;
    stale->runs[stale->n_runs].start = gpa;
    stale->runs[stale->n_runs++].end = gpa + 4096;
    return true;
}

static bool is_map_in_order(const struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags)
{
    return is_in_order(t, gva, n_bytes) && !(gpa & 4095) && n_bytes <= GPA_LIMIT &&
           gpa <= GPA_LIMIT - n_bytes && !(flags & ~LEAF_FLAGS) && (flags & P);
}

static void begin_map(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags)
{
    begin(t, OP_MAP, gva, n_bytes, flags);
    t->used = true;
    t->delta = gpa - gva;
    /* A leaf of some size fits where both addresses agree modulo that size: one answer for all. */
    t->fit_level = t->top_level;
    while (t->delta & (span_of(t->fit_level) - 1))
        t->fit_level--;
}

unsigned kvmmm_pt_map(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags)
{
    if (!(flags & P))
        return kvmmm_pt_unmap(t, gva, n_bytes);
    if (!is_map_in_order(t, gva, n_bytes, gpa, flags))
        return KVMMM_PT_INVALID;
    begin_map(t, gva, n_bytes, gpa, flags);
    return go_map(t);
}

int kvmmm_pt_map_leaves(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags,
                        uint64_t low_gpa, uint64_t high_gpa, struct kvmmm_pt_stale *stale)
{
    unsigned level;
    uint64_t *path[5];
    if (!is_map_in_order(t, gva, n_bytes, gpa, flags))
        return -1;
    begin_map(t, gva, n_bytes, gpa, flags);
    uint64_t *e = find_entry(t, path, &level), leaf = gpa | flags | ps_of(level);
    uint64_t n = n_bytes >> shift_of(level);
    if (level > t->fit_level || !is_whole(t, level) || n << shift_of(level) != n_bytes || n != n_whole(t, level))
        return -1;
    stale->n_runs = stale->n_pages = 0;
    for (uint64_t i = 0, new = leaf; i < n; i++, new += span_of(level)) {
        uint64_t old = e[i], frame = old & ADDRESS;
        if (!(old & P))
            continue;
        if (level > 1)
            return -1;
        if (!is_stale(old, new))
            continue;
        if (frame < low_gpa || frame >= high_gpa || !add_stale(stale, frame))
            return -1;
    }
    for (uint64_t i = 0; i < n; i++, leaf += span_of(level))
        if (!stale->n_runs)
            store(&e[i], leaf);
        else if (is_stale(e[i], leaf))
            store(&e[i], 0);
    return stale->n_runs ? 1 : 0;
}

unsigned kvmmm_pt_protect(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t flags)
{
    if (!(flags & P))
        return kvmmm_pt_unmap(t, gva, n_bytes);
    if (!is_in_order(t, gva, n_bytes) || (flags & ~LEAF_FLAGS))
        return KVMMM_PT_INVALID;
    begin(t, OP_PROTECT, gva, n_bytes, flags);
    return go_protect(t);
}
