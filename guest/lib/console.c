/* The console: two byte rings in memory that the host shares. No exit a byte, nor a line.
 *
 * Output: copy, publish out_head, fence, and only then ask whether the host sleeps. The host does
 * the mirror image (set host_sleeps, fence, look at out_head), so one of the two always sees the
 * other's store, and no wake-up is lost. `xchg` is the store and the fence in one instruction.
 */
#include "kvmmm.h"

static struct kvmmm_console *ring(void)
{
    return (struct kvmmm_console *)kvmmm_boot->console;
}

void console_flush(void)
{
    struct kvmmm_console *c = ring();
    uint64_t head = c->out_head;

    __atomic_exchange_n(&c->out_head, head, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->host_sleeps, __ATOMIC_RELAXED))
        kvmmm_out8(KVMMM_PORT_DOORBELL, 0);
}

void console_write(const void *bytes, size_t n)
{
    struct kvmmm_console *c = ring();
    const char *from = bytes;
    char *data = (char *)c->out_data;
    uint64_t head = c->out_head; /* ours alone to write */
    uint64_t size = c->out_bytes;

    while (n > 0) {
        /* Acquire: the host has read the bytes below out_tail, so they may be overwritten. */
        uint64_t room = size - (head - __atomic_load_n(&c->out_tail, __ATOMIC_ACQUIRE));
        if (room == 0) {
            kvmmm_out8(KVMMM_PORT_DOORBELL, 0); /* comes back when the ring is drained */
            continue;
        }
        uint64_t at = head & (size - 1);
        uint64_t chunk = n < room ? n : room;
        uint64_t first = chunk < size - at ? chunk : size - at; /* up to the ring's end */
        memcpy(data + at, from, first);
        if (chunk > first)
            memcpy(data, from + first, chunk - first);
        from += chunk;
        n -= chunk;
        head += chunk;
        __atomic_exchange_n(&c->out_head, head, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&c->host_sleeps, __ATOMIC_RELAXED))
            kvmmm_out8(KVMMM_PORT_DOORBELL, 0);
    }
}

size_t console_read(void *bytes, size_t n)
{
    struct kvmmm_console *c = ring();
    const char *data = (const char *)c->in_data;
    uint64_t tail = c->in_tail; /* ours alone to write */
    uint64_t size = c->in_bytes;

    while (n > 0) {
        /* in_eof before in_head: what the host put in before it said EOF is still read. */
        bool eof = __atomic_load_n(&c->in_eof, __ATOMIC_ACQUIRE);
        uint64_t there = __atomic_load_n(&c->in_head, __ATOMIC_ACQUIRE) - tail;
        if (there > 0) {
            uint64_t at = tail & (size - 1);
            uint64_t chunk = n < there ? n : there;
            uint64_t first = chunk < size - at ? chunk : size - at;
            memcpy(bytes, data + at, first);
            if (chunk > first)
                memcpy((char *)bytes + first, data, chunk - first);
            __atomic_store_n(&c->in_tail, tail + chunk, __ATOMIC_RELEASE);
            return chunk;
        }
        if (eof)
            return 0;
        console_flush(); /* a prompt is seen before its answer is waited for */
        kvmmm_out8(KVMMM_PORT_INPUT, 0);
    }
    return 0;
}
