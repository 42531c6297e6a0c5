#pragma once
// Threads over rows. A pool of our own rather than OpenMP: no second OpenMP runtime beside torch's,
// nothing to link, and the same behaviour with every compiler. The caller passes the thread count
// (torch.get_num_threads()), works too, and returns when all rows are done.
#include <cstdint>
#include <functional>

namespace spo {

// How many logits rows one thread takes at a time: enough work to outweigh the hand-over.
inline int64_t rows_per_piece(int64_t vocab) { return vocab < 65536 ? 65536 / (vocab + 1) + 1 : 1; }

// Calls body(begin, end) on disjoint pieces of [0, size) of at most `grain` items, on up to
// `num_threads` threads. A thread takes the next piece when it has finished one, so the result of
// `body` must not depend on the thread. A call made while another one runs uses its own thread
// only.
void parallel_for(int64_t size, int64_t grain, int32_t num_threads,
                  const std::function<void(int64_t begin, int64_t end)>& body);

// The same on the threads of torch's OpenMP, where it has loaded one: for long work beside products
// of torch. After each of those its threads spin for milliseconds on the cores that helpers of ours
// would need. For short work it is worse: while other processes run, its barrier takes as long.
void torch_parallel_for(int64_t size, int64_t grain, int32_t num_threads,
                        const std::function<void(int64_t begin, int64_t end)>& body);

// Memory of the calling thread, at a multiple of 64 bytes, kept for its next call.
void* thread_buffer(int64_t bytes);

}  // namespace spo
