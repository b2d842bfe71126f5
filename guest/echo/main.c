/* echo: console input arrives whole and in order. Expected: its input, line by line, then status 0.
 *
 * Lines longer than the buffer come back in pieces; a last line without a newline comes back too.
 */
#include "kvmmm.h"

static char line[4096];

static int echo(void *arg)
{
    size_t length = 0, n;

    (void)arg;
    while ((n = console_read(line + length, sizeof line - length)) > 0) {
        size_t start = 0;
        length += n;
        for (size_t i = length - n; i < length; i++)
            if (line[i] == '\n') {
                console_write(line + start, i + 1 - start);
                start = i + 1;
            }
        if (start == 0 && length == sizeof line) {
            console_write(line, length);
            start = length;
        }
        memmove(line, line + start, length - start);
        length -= start;
    }
    console_write(line, length);
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    return kvmmm_enter_ring3(echo, NULL);
}
