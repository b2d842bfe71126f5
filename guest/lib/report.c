/* Verdicts in the form of kvm-unit-tests, one a line, and counted where the host can read them. */
#include "kvmmm.h"

void report(bool passed, const char *name, ...)
{
    struct kvmmm_report *verdicts = (struct kvmmm_report *)kvmmm_boot->report;
    char text[KPRINTF_BYTES];
    va_list args;

    va_start(args, name);
    kvmmm_vformat(text, sizeof text, name, args);
    va_end(args);
    if (passed)
        verdicts->passed++;
    else
        verdicts->failed++;
    kprintf("%s: %s\n", passed ? "PASS" : "FAIL", text);
}

int report_summary(void)
{
    const struct kvmmm_report *verdicts = (const struct kvmmm_report *)kvmmm_boot->report;

    kprintf("SUMMARY: %u checks, %u failed\n", verdicts->passed + verdicts->failed,
            verdicts->failed);
    return verdicts->failed > 0 ? KVMMM_STATUS_FAILED : KVMMM_STATUS_OK;
}
