/* What the generated half of the module needs to see. */
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "core.h"
#include "floor.h"
#include "pagetable.h"
#include "pagetable_scan.h"
