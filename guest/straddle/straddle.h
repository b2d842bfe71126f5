/* The frame of straddle's checks. An operation is a few instructions on bytes near an edge. It runs
 * three times: on resident memory, which says what is right; across an edge between two of the
 * host's windows; and across an edge between two pages. Bytes and registers must come out the same.
 */
#ifndef STRADDLE_H
#define STRADDLE_H

#include "kvmmm.h"

enum {
    SIDE_BYTES = 128, /* what is compared on either side of an edge */
    OUT_BYTES = 256,  /* what an operation may tell about registers */
};

/* What is there before the operation: pattern bytes, or memory that nobody has touched. */
enum fill {
    NONE = 1,  /* both sides untouched                  */
    BELOW = 2, /* bytes below the edge, untouched above */
    ABOVE = 4, /* untouched below the edge, bytes above */
    EACH = 7,  /* one after the other                   */
};

typedef void operation(uint8_t *at, uint8_t *out);

struct check {
    const char *name;
    operation *run;
    int offset; /* from the edge to where the operation works */
    unsigned fills;
};

void run_checks(const struct check *checks, size_t n);

/* An edge between untouched memory on both sides (or only below it, if `fill` is ABOVE): 2 MiB
 * aligned while there are untouched windows, then page aligned.
 */
uint8_t *fresh_window_edge(enum fill fill);
uint8_t *fresh_page_edge(void);

/* Which flags are compared at all: none with flags=0. */
extern uint64_t flags_mask;

/* 128 bytes that are resident, and none of them zero. */
extern uint8_t pattern[128];

void check_scalars(void);
void check_strings(void);
void check_vectors(void);
void check_avx(void);
void check_stack(void);
void check_code(void);

/* What an operation tells about its registers: slot n of 8 bytes. */
#define OUT(n) (((uint64_t *)out)[n])
#define COUNT(table) (sizeof(table) / sizeof *(table))

#endif
