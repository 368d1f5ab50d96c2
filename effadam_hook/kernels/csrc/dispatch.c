/* The exported functions: which variant runs, and on how many threads. */
#include <pthread.h>
#include <stddef.h>

#include "effadam_kernels.h"

#define EXPORT __attribute__((visibility("default")))

enum { MAX_THREADS = 256, THREAD_NUMEL = 1 << 16, STACK_BYTES = 1 << 20, ABI_VERSION = 1 };

typedef struct {
    Engine engine;
    const Job *job;
    int64_t first, last;
    pthread_t thread;
    int started;
} Share;

static int runs_here(const Variant *variant) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (variant == &effadam_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("bmi2");
    if (variant == &effadam_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
#endif
    return variant == &effadam_plain;
}

EXPORT int32_t effadam_abi_version(void) { return ABI_VERSION; }

/* The variants of this build that this processor runs, best first; NULL for any other index. */
static const Variant *variant_at(int32_t index) {
    static const Variant *const all[] = {
#if defined(__x86_64__)
        &effadam_avx512, &effadam_avx2,
#endif
        &effadam_plain};
    int32_t seen = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (runs_here(all[i]) && seen++ == index) return all[i];
    return NULL;
}

EXPORT const char *effadam_variant_name(int32_t index) {
    const Variant *variant = variant_at(index);
    return variant ? variant->name : NULL;
}

static void *run_share(void *argument) {
    const Share *share = argument;
    share->engine(share->job, share->first, share->last);
    return NULL;
}

/* Runs a job on a variant; plain C, which runs everywhere, stands in for one that there is not.
 *
 * Splits the blocks evenly. Threads live for one call, so nothing is left to go wrong after a fork;
 * one that cannot be started has its share run here. */
EXPORT void effadam_run(const Job *job, int32_t variant, int32_t is_double, int32_t threads) {
    const Variant *chosen = variant_at(variant);
    if (!chosen) chosen = &effadam_plain;
    Engine engine = is_double ? chosen->f64 : chosen->f32;
    int64_t blocks = 0, numel = 0;
    for (int64_t p = 0; p < job->wire->count; p++) {
        blocks += (job->wire->pieces[p].numel + job->wire->block_size - 1) / job->wire->block_size;
        numel += job->wire->pieces[p].numel;
    }
    int64_t useful = numel / THREAD_NUMEL;
    int64_t count = threads < useful ? threads : useful;
    count = count > MAX_THREADS ? MAX_THREADS : count;
    if (count < 2) {
        engine(job, 0, blocks);
        return;
    }
    Share shares[MAX_THREADS];
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (int64_t i = 0; i < count; i++) {
        Share *share = &shares[i];
        *share = (Share){.engine = engine,
                         .job = job,
                         .first = blocks * i / count,
                         .last = blocks * (i + 1) / count};
        if (i > 0)
            share->started = pthread_create(&share->thread, &attributes, run_share, share) == 0;
    }
    pthread_attr_destroy(&attributes);
    for (int64_t i = 0; i < count; i++)
        if (!shares[i].started) run_share(&shares[i]);
    for (int64_t i = 1; i < count; i++)
        if (shares[i].started) pthread_join(shares[i].thread, NULL);
}
