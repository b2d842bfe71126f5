/* bench_console: what a console of bytes costs. Expected: repeat * bytes of text, then status 0.
 *
 * Options: mode=bulk (one console_write of `bytes`), lines (bytes / line console_writes of `line`
 * bytes, each flushed), raw (the floor: `rep movsb` into the ring's memory and one `out` to port
 * 0xb0, the ring's indexes untouched); bytes=65536, line=64, repeat=1;
 * mark=1: one `out` to port 0xb1 before each repetition, text and ring being resident by then, so
 * that a clock may start there; after=spin: never end, but flush and spin.
 */
#include "kvmmm.h"

static void write_raw(const char *text, uint64_t bytes, uint64_t line)
{
    const struct kvmmm_console *console = (const struct kvmmm_console *)kvmmm_boot->console;
    void *data = (void *)console->out_data;

    (void)line;
    asm volatile("rep movsb" : "+D"(data), "+S"(text), "+c"(bytes) : : "memory");
    asm volatile("outl %0, $0xb0" : : "a"(0) : "memory");
}

static void write_bulk(const char *text, uint64_t bytes, uint64_t line)
{
    (void)line;
    console_write(text, bytes);
}

static void write_lines(const char *text, uint64_t bytes, uint64_t line)
{
    for (; bytes >= line; bytes -= line, text += line) {
        console_write(text, line);
        console_flush();
    }
}

/* Lines that differ, each ending in a newline. */
static void fill(char *text, uint64_t bytes, uint64_t line)
{
    for (uint64_t i = 0; i < bytes; i++)
        text[i] = (char)(i % line == line - 1 ? '\n' : 'a' + (i / line + i % line) % 26);
}

/* What a first use would fault in: the ring's memory (its indexes stay), and the code. */
static void warm_up(const struct kvmmm_console *console)
{
    memset((void *)console->out_data, 0, console->out_bytes);
    console_write("", 0);
}

static int run(void *arg)
{
    const char *mode = kvmmm_option("mode", "bulk");
    uint64_t bytes = kvmmm_option_number("bytes", 65536);
    uint64_t line = kvmmm_option_number("line", 64);
    uint64_t repeat = kvmmm_option_number("repeat", 1);
    bool mark = kvmmm_option_number("mark", 0) != 0;
    struct kvmmm_range ram = kvmmm_ram();
    const struct kvmmm_console *console = (const struct kvmmm_console *)kvmmm_boot->console;
    void (*write)(const char *, uint64_t, uint64_t) = kvmmm_equal(mode, "raw")     ? write_raw
                                                      : kvmmm_equal(mode, "bulk")  ? write_bulk
                                                      : kvmmm_equal(mode, "lines") ? write_lines
                                                                                   : NULL;

    (void)arg;
    if (write == NULL || line == 0 || bytes > ram.end - ram.start ||
        (write == write_raw && bytes > console->out_bytes)) {
        kprintf("bench_console: cannot do mode=%s bytes=%lu line=%lu\n", mode, bytes, line);
        return KVMMM_STATUS_USAGE;
    }
    fill((char *)ram.start, bytes, line);
    if (mark)
        warm_up(console);
    for (; repeat > 0; repeat--) {
        if (mark)
            asm volatile("outl %0, $0xb1" : : "a"((uint32_t)repeat) : "memory");
        write((const char *)ram.start, bytes, line);
    }
    console_flush();
    while (kvmmm_equal(kvmmm_option("after", "exit"), "spin"))
        asm volatile("");
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("mode bytes line repeat mark after");
    return kvmmm_enter_ring3(run, NULL);
}
