//! What it takes to wake a client that sleeps, whatever the backend does: the floor under every figure at depth 1.
//!
//! ```text
//! cargo bench -p pristine-tests --bench wake -- [--rounds N]
//! ```
//!
//! One thread is the client, on its processor: it makes a request, which is a store to memory, and sleeps in `ppoll`
//! and `read` until an eventfd is written, as a client of virtqueues does. The other is a backend that polls and has
//! nothing to do but write that eventfd, on the processor of the backends. Prints medians, with and without the `poll`
//! that `pristine` makes before it writes, so that no client can block it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pristine_tests::bench::median;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Requests of a measurement.
const REQUESTS: u64 = 50_000;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let rounds = match &words[..] {
        [] => 9,
        [word, rounds] if word == "--rounds" => rounds.parse().unwrap(),
        _ => {
            eprintln!("usage: cargo bench -p pristine-tests --bench wake -- [--rounds N]");
            std::process::exit(2);
        }
    };
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for turn in 0..2 {
            let polls = (round + turn) % 2;
            times[polls].push(cycle_us(polls == 1));
        }
    }
    let [plain, polling] = times.map(median);
    println!("| a request that asks for nothing | us |\n| --- | --- |");
    println!("| backend only writes the eventfd | {plain:.2} |");
    println!("| and asks `poll` before | {polling:.2} |");
}

/// Time of one request in microseconds.
fn cycle_us(polls: bool) -> f64 {
    let call = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let asked = Arc::new(AtomicU64::new(0));
    let backend = std::thread::spawn({
        let (call, asked) = (Arc::clone(&call), Arc::clone(&asked));
        move || answer(&call, &asked, polls)
    });
    run_on(0);
    let begin = Instant::now();
    for request in 1..=REQUESTS {
        asked.store(request, Ordering::Release);
        poll(&mut [PollFd::new(&*call, PollFlags::IN)], None).unwrap();
        rustix::io::read(&*call, &mut [0; 8]).unwrap();
    }
    let took = begin.elapsed();
    backend.join().unwrap();
    took.as_secs_f64() * 1e6 / REQUESTS as f64
}

/// The backend: sees each request by polling memory, and answers it.
fn answer(call: &OwnedFd, asked: &AtomicU64, polls: bool) {
    run_on(1);
    for request in 1..=REQUESTS {
        while asked.load(Ordering::Acquire) < request {
            std::hint::spin_loop();
        }
        if polls {
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(call, PollFlags::OUT)], Some(&at_once)).unwrap();
        }
        rustix::io::write(call, &1u64.to_ne_bytes()).unwrap();
    }
}

/// Keeps this thread on the processor where `bench::machine::Place` has the client (0) or the backend (1).
fn run_on(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    // A machine with one processor has no other place; its figure is then one of switching threads.
    let _ = sched_setaffinity(None, &set);
}
