// Where the threads of a product run.
#if defined(__linux__)
#include <omp.h>
#include <sched.h>
#endif

// cores [n]: thread i of the calling thread's team, itself the first, runs on core i from now on; where it cannot, core i becomes -1.
extern "C" void diptych_bind(int64_t* cores, int64_t n) {
#if defined(__linux__)
#pragma omp parallel num_threads(n)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        int64_t& core = cores[omp_get_thread_num()];
        CPU_SET(core, &set);
        if (sched_setaffinity(0, sizeof(set), &set) != 0) core = -1;
    }
#endif
}
