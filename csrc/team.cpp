#include "team.h"

#include <system_error>

namespace attribution {
namespace {

// A little longer than it takes to wake a sleeping thread.
template <class Condition>
void watch(const Condition& holds) {
  for (int i = 0; i < 1000 && !holds(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace

Team::Team(int threads) {
  for (int member = 1; member < threads; ++member) {
    try {
      workers_.emplace_back([this, member] { work(member); });
    } catch (const std::system_error&) {
      break;  // the process may start no more threads: fewer do the same work
    }
  }
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  begin_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::function<void(int)>& job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    busy_ = int(workers_.size());
    ++round_;
  }
  begin_.notify_all();
  attempt(0);
  watch([this] { return busy_ == 0; });
  std::unique_lock<std::mutex> lock(mutex_);
  end_.wait(lock, [this] { return busy_ == 0; });
  if (failure_) {
    std::exception_ptr failure;
    std::swap(failure, failure_);
    std::rethrow_exception(failure);
  }
}

void Team::work(int member) {
  int64_t seen = 0;
  while (true) {
    watch([&] { return round_ != seen; });
    std::unique_lock<std::mutex> lock(mutex_);
    begin_.wait(lock, [&] { return closing_ || round_ != seen; });
    if (closing_) return;
    seen = round_;
    lock.unlock();
    attempt(member);
    lock.lock();
    if (--busy_ == 0) end_.notify_one();
  }
}

void Team::attempt(int member) {
  try {
    (*job_)(member);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

}  // namespace attribution
