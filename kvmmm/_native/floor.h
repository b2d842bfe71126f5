/* floor.h: the best known mechanism in C, for the benchmarks to divide by. Nothing else calls it. */
#ifndef KVMMM_FLOOR_H
#define KVMMM_FLOOR_H
#endif
