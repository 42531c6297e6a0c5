#include "csrc/cpu/parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace spo {
namespace {

struct Task {
  const std::function<void(int64_t, int64_t)>* body = nullptr;
  int64_t size = 0;
  int64_t grain = 1;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t begin; (begin = next.fetch_add(grain)) < size;)
      (*body)(begin, std::min(size, begin + grain));
  }
};

class Pool {
 public:
  void run(Task& task, int32_t helpers) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (; started_ < helpers; ++started_)
      std::thread([this, id = started_] { serve(id); }).detach();
    task_ = &task;
    wanted_ = helpers;
    running_ = helpers;
    ++generation_;
    lock.unlock();
    wake_.notify_all();
    task.work();
    lock.lock();
    done_.wait(lock, [&] { return running_ == 0; });
    task_ = nullptr;
  }

  std::mutex busy;  // held by the one caller that uses the helpers

 private:
  void serve(int32_t id) {
    std::unique_lock<std::mutex> lock(mutex_);
    // A helper starts inside the run() that it first serves, so it must work on that generation.
    for (uint64_t seen = generation_ - 1;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= wanted_) continue;
      Task* task = task_;
      lock.unlock();
      task->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Task* task_ = nullptr;
  uint64_t generation_ = 0;
  int32_t started_ = 0, wanted_ = 0, running_ = 0;
};

// The helpers are detached and the pool is never destroyed: joining threads while the process
// exits can deadlock. A forked child inherits no threads, so it makes its own pool.
Pool& pool() {
  static std::mutex guard;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(guard);
  if (owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
}

using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
const pid_t loaded_in = getpid();

// A forked child has none of OpenMP's threads, and OpenMP does not notice.
Team openmp() {
  static const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_in ? team : nullptr;
}

}  // namespace

void parallel_for(int64_t size, int64_t grain, int32_t num_threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  Task task;
  task.body = &body;
  task.size = size;
  task.grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (size + task.grain - 1) / task.grain;
  const int32_t helpers = static_cast<int32_t>(std::min<int64_t>(num_threads, pieces)) - 1;
  if (helpers > 0) {
    Pool& threads = pool();
    std::unique_lock<std::mutex> mine(threads.busy, std::try_to_lock);
    if (mine.owns_lock()) {
      threads.run(task, helpers);
      return;
    }
  }
  task.work();
}

void torch_parallel_for(int64_t size, int64_t grain, int32_t num_threads,
                        const std::function<void(int64_t, int64_t)>& body) {
  static std::mutex busy;  // two callers would have two teams on the same cores
  const Team team = num_threads > 1 && size > grain ? openmp() : nullptr;
  std::unique_lock<std::mutex> mine(busy, std::defer_lock);
  if (!team || !mine.try_lock()) return parallel_for(size, grain, num_threads, body);
  Task task;
  task.body = &body;
  task.size = size;
  task.grain = std::max<int64_t>(grain, 1);
  team([](void* data) { static_cast<Task*>(data)->work(); }, &task, num_threads, 0);
}

void* thread_buffer(int64_t bytes) {
  constexpr int64_t kAlignment = 64;  // of a vector
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> data;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = 0;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    data.reset(std::aligned_alloc(kAlignment, bytes));
    if (!data) throw std::bad_alloc();
    size = bytes;
  }
  return data.get();
}

}  // namespace spo
