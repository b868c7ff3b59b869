// Where the threads of a product run.
#if defined(__linux__)
#include <omp.h>
#include <sched.h>
#endif

// cores [n]: thread i of the calling thread's team, itself the first, runs on core i from now on.
extern "C" void diptych_bind(const int64_t* cores, int64_t n) {
#if defined(__linux__)
#pragma omp parallel num_threads(n)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cores[omp_get_thread_num()], &set);
        sched_setaffinity(0, sizeof(set), &set);
    }
#endif
}
