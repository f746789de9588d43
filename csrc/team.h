// Threads for the length of one call. Nothing of them outlives it, so a fork between calls finds no dead pool, and
// interpreter exit has nothing to join.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace attribution {

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(workers_.size()) + 1; }

  // Runs job(member) on every member, 0 being the caller, and returns when all have returned. Rethrows the first
  // exception.
  void run(const std::function<void(int)>& job);

 private:
  void work(int member);
  void attempt(int member);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  const std::function<void(int)>* job_ = nullptr;
  std::exception_ptr failure_;
  // Atomic, because who waits looks at them for some microseconds before it sleeps: a walk has many short rounds.
  std::atomic<int64_t> round_{0};
  std::atomic<int> busy_{0};
  bool closing_ = false;
};

}  // namespace attribution
