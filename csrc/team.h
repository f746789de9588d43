// Threads, and one team of them that stays for the next call.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace attribution {

class Team;
struct Keep {
  void operator()(Team* team) const;
};
using BorrowedTeam = std::unique_ptr<Team, Keep>;

// The team that the last call kept; or a new one if there is none (a forked child has none: a fork copies no threads), if
// it has another size, or if it is in use. To begin and end threads takes a tenth of a millisecond, and so does to wait for them.
BorrowedTeam borrow_team(int threads);

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return int(workers_.size()) + 1; }

  // Runs job(member) on members of the team, the caller as 0, and returns when all who began have returned. Rethrows the
  // first exception. A job's work is taken piece by piece by whoever is there: a member that wakes up only after the caller
  // has found nothing left does not begin, so that nobody waits for it.
  void run(const std::function<void(int)>& job);
  // Runs job(i) for all i < count, each on one member; a single one without waking anybody.
  void share(int count, const std::function<void(int)>& job);

 private:
  friend BorrowedTeam borrow_team(int threads);
  void work(int member);
  void attempt(int member, const std::function<void(int)>& job);
  void keep_off_the_callers_processor();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable begin_, end_;
  const std::function<void(int)>* job_ = nullptr;  // or null: nobody may begin
  std::exception_ptr failure_;
  // Atomic, because who waits looks at them for some microseconds before it sleeps: a walk has many short rounds.
  std::atomic<int64_t> round_{0};
  std::atomic<int> busy_{0};  // workers that have begun and not returned
  bool closing_ = false;
  int callers_processor_ = -1;  // which workers do not use, or -1
};

}  // namespace attribution
