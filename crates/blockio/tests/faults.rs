//! The engine that fails and delays on demand.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::{sync::Arc, time::Duration};

use blockio::{
    Engine, EngineKind, FileIndex, Op,
    fault::{Fault, FaultEngine, FaultPlan, OpClass},
    new_engine,
};
use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const ENOSPC: i32 = 28;
const FILE: FileIndex = FileIndex(0);

struct Setup {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    plan: Arc<FaultPlan>,
    engine: FaultEngine,
}

fn setup(kind: EngineKind) -> Setup {
    let dir = disk_dir();
    let path = dir.path().join("disk");
    let file = Arc::new(create(&path, 1 << 20));
    let plan = FaultPlan::new();
    let engine = FaultEngine::new(new_engine(kind, 8, vec![file]).unwrap(), plan.clone()).unwrap();
    Setup { _dir: dir, path, plan, engine }
}

fn write(block: u64) -> Op {
    Op::Write { file: FILE, offset: block * 4096, buf: owned(&[block as u8 + 1; 4096]) }
}

fn written(setup: &Setup) -> Vec<u64> {
    let content = std::fs::read(&setup.path).unwrap();
    (0..256).filter(|block| content[*block as usize * 4096] != 0).collect()
}

fn is_readable(engine: &FaultEngine) -> bool {
    let fd = engine.completion_fd().unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Sync];

#[test]
fn planned_failure_meets_only_the_planned_operation() {
    for kind in KINDS {
        let mut setup = setup(kind);
        setup.plan.on(OpClass::Write, 1, Fault::Fail(ENOSPC));
        setup.plan.on(OpClass::Write, 2, Fault::FailAfter(ENOSPC));
        for block in 0..4 {
            setup.engine.push(block, write(block));
        }
        setup.engine.push(4, Op::SyncData { file: FILE });
        let done = run(&mut setup.engine);
        let errors: Vec<_> =
            done.iter().map(|done| done.result.as_ref().err().and_then(|e| e.raw_os_error())).collect();
        assert_eq!(errors, [None, Some(ENOSPC), Some(ENOSPC), None, None]);
        assert!(done[..4].iter().all(|done| done.buf.is_some()));
        assert_eq!(written(&setup), [0, 2, 3]);
        assert_eq!(setup.plan.seen(OpClass::Write), 4);
    }
}

#[test]
fn held_operations_wait_until_released_in_order() {
    for kind in KINDS {
        let mut setup = setup(kind);
        setup.plan.on(OpClass::Write, 0, Fault::HoldBefore);
        setup.plan.on(OpClass::Write, 1, Fault::HoldAfter);
        for block in 0..3 {
            setup.engine.push(block, write(block));
        }
        setup.engine.submit();
        let mut done = Vec::new();
        while done.is_empty() {
            setup.engine.wait(None).unwrap();
            setup.engine.reap(&mut done);
        }
        assert_eq!(done[0].token, 2);
        setup.engine.wait(Some(Duration::from_millis(1))).unwrap();
        setup.engine.reap(&mut done);
        assert_eq!((done.len(), setup.engine.in_flight(), setup.plan.held()), (1, 2, 2));
        assert_eq!(written(&setup), [1, 2]);
        for (token, held) in [(0, 1), (1, 0)] {
            let plan = setup.plan.clone();
            let thread = std::thread::spawn(move || plan.release_one());
            while done.last().unwrap().token != token {
                setup.engine.wait(None).unwrap();
                setup.engine.reap(&mut done);
            }
            thread.join().unwrap();
            assert_eq!(setup.plan.held(), held);
        }
        assert_eq!(written(&setup), [0, 1, 2]);
        assert_eq!(setup.engine.in_flight(), 0);
        setup.engine.wait(None).unwrap();
    }
}

#[test]
fn descriptor_tells_of_planned_failures_and_releases() {
    for kind in KINDS {
        let mut setup = setup(kind);
        let mut done = Vec::new();
        assert!(!is_readable(&setup.engine));
        setup.plan.on(OpClass::Write, 0, Fault::Fail(ENOSPC));
        setup.plan.on(OpClass::Write, 1, Fault::HoldBefore);
        setup.engine.push(0, write(0));
        setup.engine.push(1, write(1));
        setup.engine.submit();
        assert!(is_readable(&setup.engine));
        setup.engine.reap(&mut done);
        assert_eq!(done.len(), 1);
        assert!(!is_readable(&setup.engine));
        setup.plan.release_all();
        assert!(is_readable(&setup.engine));
        while done.len() < 2 {
            let fd = setup.engine.completion_fd().unwrap();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
            setup.engine.reap(&mut done);
        }
        assert!(done[1].result.is_ok());
    }
}

#[test]
fn held_operation_of_a_dropped_engine_never_happens() {
    for kind in KINDS {
        let mut setup = setup(kind);
        setup.plan.on_every(OpClass::Write, Fault::HoldBefore);
        setup.engine.push(0, write(0));
        setup.engine.submit();
        let Setup { _dir, path, plan, engine } = setup;
        drop(engine);
        plan.release_all();
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn rules_removed_let_everything_pass() {
    let mut setup = setup(EngineKind::IoUring);
    setup.plan.rule(|op| (op.offset == 4096).then_some(Fault::Fail(5)));
    setup.engine.push(1, write(1));
    assert!(run(&mut setup.engine)[0].result.is_err());
    setup.plan.clear();
    setup.engine.push(1, write(1));
    assert!(run(&mut setup.engine)[0].result.is_ok());
}
