#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <chrono>
#include <system_error>

namespace attribution {
namespace {

// Twice as long as it takes to wake a sleeping thread, and longer than a walk's caller works alone.
constexpr auto patience = std::chrono::microseconds(200);

template <class Condition>
void watch(const Condition& holds) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!holds() && std::chrono::steady_clock::now() < end) sched_yield();
}

// Signals are for the program's own threads, which may be waiting for them, but for those that tell of a thread's own
// faults. Threads begin with the mask of their maker.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// Never freed: at exit, its threads may still be asleep in it.
std::atomic<Team*> kept{nullptr};
// A fork copies no threads: the child has no team yet.
[[maybe_unused]] const int forgotten_by_children = pthread_atfork(nullptr, nullptr, [] { kept = nullptr; });

}  // namespace

Team::Team(int threads) {
  const SignalsBlocked blocked;
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

// A woken thread may be put behind the one that woke it, and wait there for milliseconds beside an idle processor.
void Team::keep_off_the_callers_processor() {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (workers_.empty() || here < 0 || here == callers_processor_) return;
  callers_processor_ = here;
  cpu_set_t processors;
  if (sched_getaffinity(0, sizeof processors, &processors) != 0) return;
  if (CPU_COUNT(&processors) >= size()) CPU_CLR(here, &processors);
  for (std::thread& worker : workers_) pthread_setaffinity_np(worker.native_handle(), sizeof processors, &processors);
#endif
}

void Team::run(const std::function<void(int)>& job) {
  keep_off_the_callers_processor();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    ++round_;
  }
  begin_.notify_all();
  attempt(0, job);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = nullptr;
  }
  watch([this] { return busy_ == 0; });
  std::unique_lock<std::mutex> lock(mutex_);
  end_.wait(lock, [this] { return busy_ == 0; });
  if (failure_) {
    std::exception_ptr failure;
    std::swap(failure, failure_);
    std::rethrow_exception(failure);
  }
}

void Team::share(int count, const std::function<void(int)>& job) {
  if (count == 1) return job(0);
  std::atomic<int> next{0};
  run([&](int) {
    for (int i; (i = next.fetch_add(1)) < count;) job(i);
  });
}

void Team::work(int member) {
  int64_t seen = 0;
  while (true) {
    watch([&] { return round_ != seen; });
    std::unique_lock<std::mutex> lock(mutex_);
    begin_.wait(lock, [&] { return closing_ || round_ != seen; });
    if (closing_) return;
    seen = round_;
    if (job_ == nullptr) continue;
    const std::function<void(int)>& job = *job_;
    ++busy_;
    lock.unlock();
    attempt(member, job);
    lock.lock();
    if (--busy_ == 0) end_.notify_one();
  }
}

void Team::attempt(int member, const std::function<void(int)>& job) {
  try {
    job(member);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

BorrowedTeam borrow_team(int threads) {
  Team* team = kept.exchange(nullptr);
  if (team != nullptr && team->size() != threads) {
    delete team;
    team = nullptr;
  }
  if (team == nullptr) return BorrowedTeam(new Team(threads));
  team->callers_processor_ = -1;  // who may run where can have changed
  return BorrowedTeam(team);
}

void Keep::operator()(Team* team) const {
  delete kept.exchange(team);
}

}  // namespace attribution
