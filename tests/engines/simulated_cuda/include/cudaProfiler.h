/* Stands in for the toolkit's header of this name, which no wheel on PyPI brings: pycuda includes it
 * for three functions. The simulated driver answers all of them with "not supported". */
#ifndef SIMULATED_CUDA_PROFILER_H
#define SIMULATED_CUDA_PROFILER_H
#include <cuda.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef enum { CU_OUT_KEY_VALUE_PAIR = 0, CU_OUT_CSV = 1 } CUoutput_mode;
CUresult cuProfilerInitialize(const char *config, const char *output, CUoutput_mode mode);
CUresult cuProfilerStart(void);
CUresult cuProfilerStop(void);
#ifdef __cplusplus
}
#endif
#endif
