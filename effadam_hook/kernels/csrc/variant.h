/* Instantiates the engines of one variant. The variant has chosen its instruction set, has defined
 * VARIANT, FUSED and HAS_DOUBLE, and provides expand_codes (and the fused steps). */

enum { GROUP_NUMEL = 2048, GROUP_BLOCKS = 16, READ_AHEAD = 2048 };

static const int64_t bytes_of_store[] = {4, 8, 2, 2};

#define REAL float
#define REAL_IS_DOUBLE 0
#include "engine.h"

/* Few models have float64 parameters: one engine, small, serves them on every processor. */
#if HAS_DOUBLE
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("Os")
#endif
#define REAL double
#define REAL_IS_DOUBLE 1
#include "engine.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

void effadam_run_double(const Job *job, int64_t first, int64_t last) { run_double(job, first, last); }
#endif

const Variant VARIANT = {VARIANT_NAME, run_float, effadam_run_double};
